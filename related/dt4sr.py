"""DT4SR: items and histories are Gaussians. The score of an item is the distance of the two.

Fan, Liu, Zheng, Wang and Yu, "Modeling Sequences as Distributions with Uncertainty for Sequential
Recommendation", CIKM 2021, arXiv 2106.06165.

Each item is a Gaussian with mean mu_i and diagonal covariance sigma_i. Two transformers, one of means and one
of covariances, turn a history into a Gaussian with mean mu_t and covariance sigma_t after position t. The
nearest item, by the 2-Wasserstein distance, is recommended first:

    W_2^2 = |mu_t - mu_i|^2 + |sqrt(sigma_t) - sqrt(sigma_i)|^2

Up to a term of t alone, -W_2^2 is a product of two vectors. So this is a model file like any other, and
emd_distill.py trains it, by the softmax over all items. The loss of the paper is BPR with one negative.

Reads   interactions, `user item` a row (data/README.md), for the number of items.
Writes  OUT, an untrained model file (README.md, "The model file").
Shapes  B users, T positions, d features, V items, L blocks. Item 0 is padding.

    python related/dt4sr.py data/beauty.txt --out runs/untrained.pt2
    python emd_distill.py data/beauty.txt --student runs/untrained.pt2 --out runs/dt4sr.pt2
"""

import argparse
import copy
import hashlib
import io
import json
import math
import os
import re
import sys
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---- The distance (section 3.3) --------------------------------------------------------------------------


def positive(x):
    """sigma = ELU(x) + 1, the diagonal of a covariance. Below 0 this is e^x, which does not round to 0."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def history_vector(mu, sigma):
    """[2 mu_t, 2 sqrt(sigma_t), 1]: mu, sigma [..., d] -> [..., 2d+1].

    The product with item_vector(mu_i, sigma_i) is -W_2^2 + |mu_t|^2 + |sqrt(sigma_t)|^2.
    """
    return torch.cat([2 * mu, 2 * sigma.sqrt(), torch.ones_like(mu[..., :1])], -1)


def item_vector(mu, sigma):
    """[mu_i, sqrt(sigma_i), -|mu_i|^2 - |sqrt(sigma_i)|^2]: mu, sigma [..., d] -> [..., 2d+1]."""
    return torch.cat([mu, sigma.sqrt(), -(mu.square() + sigma).sum(-1, keepdim=True)], -1)


# ---- The model (sections 3.1 and 3.2) --------------------------------------------------------------------


class Block(nn.Module):
    """x <- x + Dropout(g(LayerNorm(x))), twice: g is causal self-attention, then the feed-forward network.

    With `scaled`: x <- x + epsilon Dropout(g(LayerNorm(x))). The scalar epsilon is learned and starts at 0.
    A deep stack then starts as the identity, and training succeeds (published code of AdaRec's teacher).
    """

    def __init__(self, dim, num_heads, dropout, scaled):
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value, self.projection = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.W_1, self.W_2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.epsilon = nn.Parameter(torch.zeros(2)) if scaled else None  # of attention, feed-forward

    def attention(self, x):
        """softmax(Q K^T / sqrt(d / heads)) V. Position t attends to positions up to t (section III-B)."""
        per_head = self.query_key_value(x).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, heads, d/heads]
        q, k, v = per_head.permute(2, 0, 3, 1, 4)  # each [B, heads, T, d/heads]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.projection(attended.transpose(1, 2).flatten(2))  # [B, T, d]

    def feed_forward(self, x):
        """ReLU(x W_1 + b_1) W_2 + b_2 (section III-B)."""
        return self.W_2(F.relu(self.W_1(x)))

    def forward(self, x):
        epsilon_1, epsilon_2 = (1.0, 1.0) if self.epsilon is None else self.epsilon
        x = x + epsilon_1 * self.dropout(self.attention(self.norm_1(x)))
        return x + epsilon_2 * self.dropout(self.feed_forward(self.norm_2(x)))


class DT4SR(nn.Module):
    """Two transformers over the same history. `forward` is the contract of a model file."""

    def __init__(self, num_items, max_length, dim, num_blocks, num_heads, dropout):
        super().__init__()
        # the first of each pair is of means, the second of covariances
        self.M = nn.ModuleList(nn.Embedding(num_items + 1, dim, padding_idx=0) for _ in range(2))
        self.P = nn.ParameterList(torch.empty(max_length, dim) for _ in range(2))
        block = dim, num_heads, dropout, num_blocks >= 4
        pairs = (nn.ModuleList(Block(*block) for _ in range(2)) for _ in range(num_blocks))
        self.blocks = nn.ModuleList(pairs)
        self.norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)  # small, so each block starts close to the identity
        for M in self.M:
            M.weight.data[0] = 0

    def forward(self, users, items):
        """users [B], items [B, T] -> hidden [L+1, B, T, 2d], output [B, T, 2d+1], item_vectors [V+1, 2d+1].

        A hidden state is the state of the means beside the state of the covariances.
        """
        scale = math.sqrt(self.M[0].embedding_dim)
        embeddings = zip(self.M, self.P, strict=True)
        states = [self.dropout(scale * M(items) + P[: items.shape[1]]) for M, P in embeddings]
        hidden = [torch.cat(states, -1)]
        for pair in self.blocks:
            states = [block(state) for block, state in zip(pair, states, strict=True)]
            hidden.append(torch.cat(states, -1))
        mu, sigma = (norm(state) for norm, state in zip(self.norm, states, strict=True))
        item_vectors = item_vector(self.M[0].weight, positive(self.M[1].weight))
        return torch.stack(hidden), history_vector(mu, positive(sigma)), item_vectors


def write_untrained(args):
    """Write the untrained model."""
    torch.manual_seed(args.seed)
    data = read_interactions(args.data)
    num_items = int(data.items.max())
    model = DT4SR(num_items, args.max_length, args.dim, args.blocks, args.heads, args.dropout)
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "out")}
    config = {"items": num_items, "max_length": args.max_length, "settings": settings}
    config |= {"stage": Path(__file__).stem, "data_sha256": data.sha256}
    config["versions"] = {"torch": str(torch.__version__), "numpy": np.__version__}
    buffer, program = io.BytesIO(), export(model, args.max_length)
    torch.export.save(program, buffer, extra_files={"config.json": json.dumps(config)})
    write(args.out, buffer.getvalue())
    print(f"{args.out}: {sum(weight.numel() for weight in model.parameters()):,} parameters, untrained")


# ---- Data and files --------------------------------------------------------------------------------------

# The history of user_ids[u] is items[starts[u]:starts[u + 1]], oldest first. Leave-one-out: user u trains on
# items[starts[u]:train_end[u]]. A user with 3 interactions or more is `evaluated`: the validation item stands
# at train_end[u], the test item after it. `catalogue` are the items that occur; `sha256` is of the table.
Interactions = namedtuple("Interactions", "path sha256 user_ids starts items train_end evaluated catalogue")


def read_interactions(path):
    """Read a data file: `user item` per row, a user's rows together and in time order (data/README.md).

    Returns Interactions, with users in the order of the file. Ids go from 1 to 99,999,999.
    """
    is_text = not str(path).endswith(".npy")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of an empty file
            table = np.loadtxt(file, int, comments=None, ndmin=2) if is_text else np.load(path, mmap_mode="r")
        users, items = table.T
        if table.ndim != 2 or table.dtype.kind not in "iu" or not 0 < table.min() <= table.max() < 10**8:
            raise ValueError
    except OSError:
        raise
    except Exception:  # numpy raises many kinds, so look for the first bad line
        lines = enumerate(Path(path).read_text(errors="replace").splitlines() if is_text else [], 1)
        good = re.compile(r"\s*(0*[1-9]\d{0,7}\s+0*[1-9]\d{0,7}\s*)?").fullmatch
        bad = next((f", line {n}, {line[:40]!r}" for n, line in lines if not good(line)), "")
        sys.exit(f"{path}{bad}: a row must be `user item`, two ids from 1 (data/README.md)")
    first = np.append(0, 1 + np.flatnonzero(np.diff(users)))  # rows where another user begins
    if len(np.unique(users[first])) < len(first):
        sys.exit(f"{path}: the rows of a user must stand together, oldest first")
    sha256 = hashlib.sha256(np.ascontiguousarray(table, "<i8")).hexdigest()
    user_ids, starts = users[first].astype(int), np.append(first, len(users))
    items, evaluated, catalogue = items.astype(int, copy=is_text), np.diff(starts) >= 3, np.unique(items)
    if gaps := catalogue[-1] - len(catalogue):
        note = f"{path}: {gaps:,} item ids below {catalogue[-1]:,} never occur; data/prepare.py renumbers"
        sys.exit(note) if gaps > 10**6 + 100 * len(catalogue) else print(f"note: {note}", file=sys.stderr)
    train_end = starts[1:] - 2 * evaluated
    return Interactions(path, sha256, user_ids, starts, items, train_end, evaluated, catalogue)


# torchrun sets both: which process this is, and of how many
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def write(path, content):
    """Write the bytes `content` to `path`. Write a temporary file first: no reader ever finds half a file."""
    if RANK:  # one process writes
        return
    path = Path(path).resolve()  # the target of a link
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # after a full disk or Ctrl-C


def export(model, max_length):
    """The program of `model`, with a copy of its weights. It takes histories of up to `max_length` items."""
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=max_length)
    example = torch.ones(2, dtype=torch.int64), torch.ones(2, max_length, dtype=torch.int64)
    shapes = {0: batch}, {0: batch, 1: length}
    return torch.export.export(copy.deepcopy(model).eval(), example, dynamic_shapes=shapes)


# ---- The command line ------------------------------------------------------------------------------------

# --help shows the text at the top of this file as it stands, and the default of each option
Help = type("Help", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {})


def number(kind, low, high=1e30):
    """The `type` of an option: a number of `kind`, int or float, from `low` to `high`."""

    def convert(text):
        if not low <= kind(text) <= high:  # NaN fails, too
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return kind(text)

    convert.__name__ = kind.__name__
    return convert


def refuse_to_overwrite(outputs, inputs):
    """End if one of the files `outputs` is one of the `inputs`, or is there and is no regular file."""
    for path in map(Path, outputs):
        is_input = path.exists() and any(path.samefile(other) for other in inputs if other)
        if is_input or path.exists() and not path.is_file():
            sys.exit(f"{path} cannot be written: it is an input, or not a regular file")


def main(argv=None):
    """Read the command line and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add, count = parser.add_argument, number(int, 1)
    add("data", help="interactions, `user item` a row: .txt or .npy (data/README.md)")
    add("--out", required=True, help="model file to write, such as runs/untrained.pt2")
    add("--dim", type=count, default=64, help="d: size of a mean, and of a covariance")
    add("--blocks", type=count, default=2, help="L; from 4 blocks on, residuals have an epsilon")
    add("--heads", type=count, default=1, help="attention heads; must divide --dim")
    add("--max-length", type=number(int, 2), default=50, help="most recent items that the model sees")
    add("--dropout", type=number(float, 0, 1), default=0.2, help="probability that training drops a unit")
    add("--seed", type=number(int, 0), default=0, help="same seed, data and machine: same file")
    args = parser.parse_args(argv)
    if args.dim % args.heads:
        parser.error("--heads must divide --dim")
    try:
        refuse_to_overwrite([args.out], [args.data])
        write_untrained(args)
    except OSError as error:  # a file that cannot be read or written
        sys.exit(f"{error.filename or args.out}: {error.strerror}")


if __name__ == "__main__":
    main()
