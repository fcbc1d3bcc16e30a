"""DT4SR: items and sequences as Gaussians, scored by their distance.

Ziwei Fan, Zhiwei Liu, Lei Zheng, Shen Wang and Philip S. Yu, "Modeling Sequences as Distributions with
Uncertainty for Sequential Recommendation", CIKM 2021, arXiv 2106.06165.

Each item is a Gaussian of mean mu_i and diagonal covariance sigma_i. Two transformers, one of means and one
of covariances, turn a history into a Gaussian, too. The nearest item, by 2-Wasserstein distance, comes next.
The distance is a product of vectors, and so the model a file like any other, which emd_distill.py trains by
the softmax over all items (the paper: BPR, -log sigma of the difference of two scores, with one negative).

    python related/dt4sr.py data/beauty.txt --out runs/untrained.pt2
    python emd_distill.py data/beauty.txt --student runs/untrained.pt2 --out runs/dt4sr.pt2

Reads   interactions, `user item` a row (data/README.md), for the number of items.
Writes  an untrained model file (README.md, "The model file").
Shapes  B users, T positions, d features, V items, item 0 is padding.
"""

import argparse
import hashlib
import io
import json
import math
import re
import sys
import warnings
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn

# ---- The distance (section 3.3) --------------------------------------------------------------------------


def positive(x):
    """sigma = ELU(x) + 1, the diagonal of a covariance; of a small x, e^x, which rounding leaves above 0."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def of_history(mu, sigma):
    """[2 mu_t, 2 sqrt(sigma_t), 1], whose product with `of_item` is -W_2^2 = -|mu_t - mu_i|^2 -
    |sqrt(sigma_t) - sqrt(sigma_i)|^2, but for a term of t alone. mu, sigma [..., d] -> [..., 2 d + 1].
    """
    return torch.cat([2 * mu, 2 * sigma.sqrt(), torch.ones_like(mu[..., :1])], -1)


def of_item(mu, sigma):
    """[mu_i, sqrt(sigma_i), -|mu_i|^2 - sum of sigma_i]. mu, sigma [..., d] -> [..., 2 d + 1]."""
    return torch.cat([mu, sigma.sqrt(), -(mu.square() + sigma).sum(-1, keepdim=True)], -1)


# ---- The model (sections 3.1 and 3.2) --------------------------------------------------------------------


class Dropout(nn.Dropout):
    """torch's, with a mask of uniform numbers: on an AMD CPU they take a third of the time of Bernoulli's."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)  # what a model file has
        return x * ((torch.rand_like(x) >= self.p) / (1 - self.p))


class Block(nn.Module):
    """x <- x + Dropout(g(LayerNorm(x))); g is causal self-attention, then the feed-forward network.

    With `scaled`, x + epsilon * Dropout(g(LayerNorm(x))), epsilon learned from 0: a deep stack starts as the
    identity and so can be trained (AdaRec's teacher).
    """

    def __init__(self, dim, heads, dropout, scaled):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value, self.projection = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.W_1, self.W_2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)
        self.epsilon = nn.Parameter(torch.zeros(2)) if scaled else None

    def attention(self, x):
        """softmax(Q K^T / sqrt(d/heads)) V, position t seeing positions up to t alone (section III-B)."""
        per_head = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, h, d/h]
        q, k, v = per_head.permute(2, 0, 3, 1, 4)  # each [B, h, T, d/h]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.projection(attended.transpose(1, 2).flatten(2))  # [B, T, d]

    def feed_forward(self, x):
        """ReLU(x W_1 + b_1) W_2 + b_2 (section III-B)."""
        return self.W_2(F.relu(self.W_1(x)))

    def forward(self, x):
        update = self.dropout(self.attention(self.norm_1(x)))
        x = x + (update if self.epsilon is None else self.epsilon[0] * update)
        update = self.dropout(self.feed_forward(self.norm_2(x)))
        return x + (update if self.epsilon is None else self.epsilon[1] * update)


class DT4SR(nn.Module):
    """Two transformers over the same history; `forward` is the contract of a model file."""

    def __init__(self, item_count, max_length, dim, blocks, heads, dropout):
        super().__init__()
        # the first of each pair is of means, the second of covariances
        self.M = nn.ModuleList(nn.Embedding(item_count + 1, dim, padding_idx=0) for _ in range(2))
        self.P = nn.ParameterList(torch.empty(max_length, dim) for _ in range(2))
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(dim, heads, dropout, blocks >= 4) for _ in range(2)) for _ in range(blocks)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.dropout = Dropout(dropout)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
        for M in self.M:
            M.weight.data[0] = 0

    def forward(self, users, items):
        """users [B], items [B, T] -> hidden [L+1, B, T, 2d], output [B, T, 2d+1], item_vectors [V+1, 2d+1].

        A hidden state is that of the means and that of the covariances, side by side.
        """
        scale = math.sqrt(self.M[0].embedding_dim)
        start = zip(self.M, self.P, strict=True)
        states = [self.dropout(scale * M(items) + P[: items.shape[1]]) for M, P in start]
        hidden = [torch.cat(states, -1)]
        for pair in self.blocks:
            states = [block(state) for block, state in zip(pair, states, strict=True)]
            hidden.append(torch.cat(states, -1))
        mu, sigma = (norm(state) for norm, state in zip(self.norm, states, strict=True))
        item_vectors = of_item(self.M[0].weight, positive(self.M[1].weight))
        return torch.stack(hidden), of_history(mu, positive(sigma)), item_vectors


def write_untrained(args):
    """Write the untrained model."""
    torch.manual_seed(args.seed)
    _, _, items = read_interactions(args.data)
    item_count = int(items.max())
    model = DT4SR(item_count, args.max_length, args.dim, args.blocks, args.heads, args.dropout)
    program, contract = export(model, args.max_length), {"items": item_count, "max_length": args.max_length}
    args.device = "cpu"
    save_model(args, args.out, program, model, None, **contract)
    print(f"{args.out}: {sum(weight.numel() for weight in model.parameters()):,} parameters, untrained")


# ---- Data and files, as the stages have them -------------------------------------------------------------


def read_interactions(path):
    """Read a data file: `user item` a row, a user's rows together and in time order (data/README.md).

    Returns int64 `user_ids` [U], in file order, `starts` [U+1] and `items` [n]: the history of user_ids[k] is
    items[starts[k]:starts[k+1]], oldest first. Ids go from 1 to 99,999,999.
    """
    array = str(path).endswith(".npy")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an empty file, which is told below
            table = np.load(path, mmap_mode="r") if array else np.loadtxt(file, int, comments=None, ndmin=2)
        users, items = table.T
        first = np.append(0, 1 + np.flatnonzero(np.diff(users)))  # rows where another user begins
        if table.dtype.kind not in "iu" or not 0 < table.min() <= table.max() < 10**8:
            raise ValueError
    except (ValueError, OverflowError, EOFError, SyntaxError, TokenError):  # numpy's own words are few
        lines = enumerate([] if array else Path(path).read_text(errors="replace").splitlines(), 1)
        pair = re.compile(r"\s*(0*[1-9]\d{0,7}\s+0*[1-9]\d{0,7}\s*)?")
        bad = next((f", line {n}, {line[:40]!r}" for n, line in lines if not pair.fullmatch(line)), "")
        sys.exit(f"{path}{bad}: not `user item`, two ids from 1, a line (see data/README.md)")
    if len(np.unique(users[first])) < len(first):
        sys.exit(f"{path}: a user's rows stand apart; put them together, oldest first")
    return users[first].astype(int), np.append(first, len(users)), items.astype(int, copy=not array)


def share():
    """Which of a batch's rows are this process's: all, unless torchrun has started several."""
    return slice(dist.get_rank(), None, dist.get_world_size()) if dist.is_initialized() else slice(None)


def sha256_of(path):
    """SHA-256 of a file, in hexadecimal: a model file names the data it was trained on by it."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write(path, content):
    """Write the bytes `content` to `path`, under another name first: no reader ever finds half a file."""
    if share().start:  # one process writes
        return
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk, Ctrl-C: half a file is of no use


def export(model, max_length):
    """The program of `model`, with its parameters, for any number of users and up to `max_length` items."""
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=max_length)
    example = torch.ones(2, dtype=torch.int64), torch.ones(2, max_length, dtype=torch.int64)
    return torch.export.export(model.eval(), example, dynamic_shapes=({0: batch}, {0: batch, 1: length}))


def save_model(args, out, program, module, validation, **config):
    """Write `program`, which has the parameters of `module`, as a model file that tells how it was made."""
    paths = ("data", "out", "teacher", "student", "architecture", "resume")
    config["settings"] = {name: value for name, value in vars(args).items() if name not in paths}
    config["versions"] = {"torch": torch.__version__, "numpy": np.__version__}
    config |= {"stage": Path(__file__).stem, "data_sha256": sha256_of(args.data), "validation": validation}
    buffer = io.BytesIO()
    module.cpu()  # whoever reads the file may have no other device
    torch.export.save(program, buffer, extra_files={"config.json": json.dumps(config)})
    module.to(args.device)
    write(out, buffer.getvalue())


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """`--help`: the words at the top of this file as they stand, and each option's default."""


def main(argv=None):
    """Read the command line, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("data", help="interactions, `user item` a row: .txt or .npy (data/README.md)")
    add("--out", required=True, help="model file to write, as runs/untrained.pt2")
    add("--dim", type=int, default=64, help="d: size of means and of covariances")
    add("--blocks", type=int, default=2, help="L: transformer blocks, of each")
    add("--heads", type=int, default=1, help="attention heads; must divide --dim")
    add("--max-length", type=int, default=50, help="most recent items that the model sees, from 2")
    add("--dropout", type=float, default=0.2, help="share of hidden units dropped in training")
    add("--seed", type=int, default=0, help="same seed and data: same file")
    args = parser.parse_args(argv)
    if args.dim < 1 or args.heads < 1 or args.dim % args.heads or args.blocks < 1 or args.max_length < 2:
        parser.error("--dim, --blocks and --heads are counts, --heads divides --dim, --max-length is from 2")
    if not 0 <= args.dropout <= 1:
        parser.error("--dropout is a share")
    try:
        write_untrained(args)
    except OSError as error:
        sys.exit(f"{error.filename or args.out}: {error.strerror}")


if __name__ == "__main__":
    main()
