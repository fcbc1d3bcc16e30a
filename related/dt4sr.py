"""DT4SR: items and histories are Gaussians. The nearer an item is to the history, the higher is its score.

Fan, Liu, Zheng, Wang and Yu, "Modeling Sequences as Distributions with Uncertainty for Sequential
Recommendation", CIKM 2021, arXiv 2106.06165.

Each item is a Gaussian with mean mu_i and diagonal covariance sigma_i. Two transformers, one of means and one
of covariances, turn a history into a Gaussian with mean mu_t and covariance sigma_t after position t. The
nearest item, by the 2-Wasserstein distance, is recommended first:

    W_2^2 = |mu_t - mu_i|^2 + |sqrt(sigma_t) - sqrt(sigma_i)|^2

The loss of the paper is BPR with one negative; --loss ce is a softmax over all items. Up to a term that
depends on t only, -W_2^2 is a product of two vectors. So OUT is a model file like any other. --score dot
takes the product mu_t . mu_i + sigma_t . sigma_i instead, for comparison.

Reads   interactions, `user item` a row (data/README.md).
Writes  OUT, the model of the last epoch (README.md, "Your own model").
Shapes  B users, T positions, N real positions, d features, e features of an output, V items, L blocks. Item
        0 is padding.

    python related/dt4sr.py data/ml-100k.txt --out runs/dt4sr.pt2
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

# torchrun sets both: which process this is, and of how many
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# ---- The distance and the loss (sections 3.3 and 3.4) ----------------------------------------------------


def positive(x):
    """sigma = ELU(x) + 1, the diagonal of a covariance. Below 0: e^x, as (e^x - 1) + 1 would round to 0."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def history_vector(mu, sigma):
    """[2 mu_t, 2 sqrt(sigma_t), 1]: mu, sigma [..., d] -> [..., 2d+1].

    The product with item_vector(mu_i, sigma_i) is -W_2^2 + |mu_t|^2 + |sqrt(sigma_t)|^2.
    """
    return torch.cat([2 * mu, 2 * sigma.sqrt(), torch.ones_like(mu[..., :1])], -1)


def item_vector(mu, sigma):
    """[mu_i, sqrt(sigma_i), -|mu_i|^2 - |sqrt(sigma_i)|^2]: mu, sigma [..., d] -> [..., 2d+1]."""
    return torch.cat([mu, sigma.sqrt(), -(mu.square() + sigma).sum(-1, keepdim=True)], -1)


def mean_and_covariance(mu, sigma):
    """[mu, sigma]: mu, sigma [..., d] -> [..., 2d], of a history or an item, for the score `dot`."""
    return torch.cat([mu, sigma], -1)


# Each entry makes the vectors of a history and of an item, whose product is the score.
SCORES = {"wasserstein": (history_vector, item_vector), "dot": (mean_and_covariance, mean_and_covariance)}


def next_item_bpr_loss(output, item_vectors, target, negative):
    """L_BPR = mean of -log sigmoid(score of target - score of negative). The term of t only cancels.

    output [N, e], item_vectors [V+1, e]; target and negative [N], items.
    """
    difference = F.embedding(target, item_vectors) - F.embedding(negative, item_vectors)
    return -F.logsigmoid((output * difference).sum(-1)).mean()


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
        """softmax(Q K^T / sqrt(d / heads)) V. Position t attends up to t (SASRec, section III-B)."""
        per_head = self.query_key_value(x).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, heads, d/heads]
        q, k, v = per_head.permute(2, 0, 3, 1, 4)  # each [B, heads, T, d/heads]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.projection(attended.transpose(1, 2).flatten(2))  # [B, T, d]

    def feed_forward(self, x):
        """ReLU(x W_1 + b_1) W_2 + b_2 (SASRec, section III-B)."""
        return self.W_2(F.relu(self.W_1(x)))

    def forward(self, x):
        epsilon_1, epsilon_2 = (1.0, 1.0) if self.epsilon is None else self.epsilon
        x = x + epsilon_1 * self.dropout(self.attention(self.norm_1(x)))
        return x + epsilon_2 * self.dropout(self.feed_forward(self.norm_2(x)))


class DT4SR(nn.Module):
    """Two transformers over the same history. `forward` is the contract of a model file."""

    def __init__(self, num_items, max_length, dim, num_blocks, num_heads, dropout, score):
        super().__init__()
        self.score = score
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
        """users [B], items [B, T] -> hidden [L+1, B, T, 2d], output [B, T, e], item_vectors [V+1, e].

        e is 2d + 1, or 2d with the score `dot`. A hidden state is that of the means and that of the
        covariances, concatenated.
        """
        scale = math.sqrt(self.M[0].embedding_dim)
        embeddings = zip(self.M, self.P, strict=True)
        states = [self.dropout(scale * M(items) + P[: items.shape[1]]) for M, P in embeddings]
        hidden = [torch.cat(states, -1)]
        for pair in self.blocks:
            states = [block(state) for block, state in zip(pair, states, strict=True)]
            hidden.append(torch.cat(states, -1))
        mu, sigma = (norm(state) for norm, state in zip(self.norm, states, strict=True))
        vector_of_history, vector_of_item = SCORES[self.score]
        item_vectors = vector_of_item(self.M[0].weight, positive(self.M[1].weight))
        return torch.stack(hidden), vector_of_history(mu, positive(sigma)), item_vectors


class UnseenItems:
    """Draws items uniformly among those that are not in a user's training history."""

    def __init__(self, data):
        user = np.repeat(np.arange(len(data.user_ids)), np.diff(data.starts))
        training = np.arange(len(data.items)) < data.train_end[user]
        # the pair of a user and an item is one number, user * (V + 1) + item: a look-up is a binary search
        self.catalogue, self.base = data.catalogue, int(data.items.max()) + 1
        self.seen = np.unique((user * self.base + data.items)[training])
        num_seen = np.bincount(self.seen // self.base, minlength=len(data.user_ids))
        self.possible = num_seen < len(self.catalogue)
        if not self.possible.any():
            sys.exit(f"{data.path}: every user has seen every item, so none is left to draw")
        if not self.possible.all():
            num_left_out = (~self.possible).sum()
            print(f"note: {num_left_out} users have seen every item and are left out", file=sys.stderr)

    def draw(self, users, rng):
        """An item for each entry of `users`, indices into data.user_ids: int64 of the same shape."""
        drawn, wrong = np.zeros(users.size, int), np.arange(users.size)
        while len(wrong):
            drawn[wrong] = self.catalogue[rng.integers(len(self.catalogue), size=len(wrong))]
            pair = users.flat[wrong] * self.base + drawn[wrong]
            place = np.minimum(np.searchsorted(self.seen, pair), len(self.seen) - 1)
            wrong = wrong[self.seen[place] == pair]
        return drawn.reshape(users.shape)


# ---- Training --------------------------------------------------------------------------------------------


def train(args):
    """Train the model and write it."""
    torch.manual_seed(args.seed)
    data = read_interactions(args.data)
    num_items = int(data.items.max())
    sizes = args.max_length, args.dim, args.blocks, args.heads
    model = DT4SR(num_items, *sizes, args.dropout, args.score)
    program = export(model, args.max_length)
    model.to(args.device).train()
    histories = training_rows(data, args.max_length)
    unseen, rng = UnseenItems(data), np.random.default_rng(args.seed)
    histories = Histories(*(column[unseen.possible[histories.users]] for column in histories))

    def loss_of(batch):
        ids, inputs, real, target = batch_of(data, histories, batch, args.device)
        _, output, item_vectors = model(ids, inputs)
        if args.loss == "bpr":
            users = np.repeat(histories.users[batch], real.sum(1))  # [N]
            negative = torch.from_numpy(unseen.draw(users, rng)).to(args.device)
            loss = next_item_bpr_loss(output[real], item_vectors, target, negative)
        else:
            loss = F.cross_entropy(output[real] @ item_vectors[1:].T, target - 1)
        return loss, {"loss": loss}

    follow(loss_of, [*model.parameters()], histories, args)
    write_student(args, data, program, model, {"items": num_items, "max_length": args.max_length})


def follow(loss_of, weights, histories, args):
    """Minimise a loss with AdamW. The learning rate falls to 0. Print the terms of the loss, a line an epoch.

    loss_of(batch) returns the loss, a mean over the positions of a batch, and its terms by name.
    """
    lengths = histories.end - histories.begin - 1
    num_positions, num_batches = int(lengths.sum()), math.ceil(len(lengths) / args.batch_size)
    optimizer = torch.optim.AdamW(weights, args.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, args.epochs * num_batches)
    for epoch in range(1, args.epochs + 1):
        means, (_, batches) = {}, epoch_batches(lengths, args.batch_size, args.seed, epoch)
        for batch in batches:
            loss, terms = loss_of(batch)
            share = int(lengths[batch].sum()) / num_positions  # of the positions of the epoch
            optimizer.zero_grad()
            (loss * share * num_batches).backward()  # each position of the epoch counts alike
            optimizer.step()
            schedule.step()
            means = {name: means.get(name, 0) + term.detach() * share for name, term in terms.items()}
        if not all(mean.isfinite() for mean in means.values()):
            sys.exit(f"the loss is NaN or infinite in epoch {epoch}; lower --learning-rate")
        print(f"epoch {epoch:3}", *(f" {name} {mean:.4f}" for name, mean in means.items()), flush=True)


def epoch_batches(lengths, batch_size, seed, epoch):
    """The random generator and the batches (arrays of indices) of this epoch, the same in every process.

    Also seeds torch for this epoch. Histories are shuffled, cut into groups, and sorted by `lengths` within a
    group, so that batches have little padding. A group has 64 batches, or a quarter of all if that is less.
    """
    rng = np.random.default_rng([seed, epoch])
    torch.manual_seed(int(rng.integers(2**62)) + RANK)  # dropout differs between processes
    order = rng.permutation(len(lengths))
    group = batch_size * max(1, min(64, len(lengths) // batch_size // 4))
    groups = [order[k : k + group] for k in range(0, len(order), group)]
    order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in groups])
    batches = np.array_split(order, math.ceil(len(order) / batch_size))
    if min(map(len, batches)) < PROCESSES:
        sys.exit(f"{PROCESSES} processes are too many: some would get no rows of a batch")
    return rng, [batches[k] for k in rng.permutation(len(batches))]


# ---- Data: read, split by leave-one-out, pad -------------------------------------------------------------

# The history of user_ids[u] is items[starts[u]:starts[u + 1]], oldest first. Leave-one-out: user u trains on
# items[starts[u]:train_end[u]]. A user with 3 interactions or more is `evaluated`: the validation item stands
# at train_end[u], the test item after it. `catalogue` are the items that occur; `sha256` is of the table.
Interactions = namedtuple("Interactions", "path sha256 user_ids starts items train_end evaluated catalogue")
# Users, indices into user_ids, and for each of them the window items[begin:end]: int64 [N]
Histories = namedtuple("Histories", "users begin end")


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


def training_rows(data, max_length):
    """Histories to train on: the last max_length + 1 training items of each user who has two or more."""
    users = np.flatnonzero(data.train_end - data.starts[:-1] >= 2)  # two items: an input and its target
    if len(users) < 2:
        sys.exit(f"{data.path}: fewer than 2 users have 2 interactions to train on; use a larger log")
    end = data.train_end[users]
    return Histories(users, np.maximum(data.starts[users], end - max_length - 1), end)


def pad_batch(items, begin, end):
    """Histories items[begin[b]:end[b]] as rows, padded with 0 on the right: int64 tensor [B, T]."""
    places = begin[:, None] + np.arange(max(1, (end - begin).max()))  # [B, T]
    inside = places < end[:, None]
    return torch.from_numpy(np.where(inside, items[np.where(inside, places, 0)], np.int64(0)))


def batch_of(data, histories, batch, device):
    """User ids [B], inputs [B, T], which inputs are real [B, T] (on the CPU), and the next items [N]."""
    users, begin, end = (column[batch] for column in histories)
    inputs, targets = pad_batch(data.items, begin, end - 1), pad_batch(data.items, begin + 1, end)
    real, ids = inputs > 0, torch.from_numpy(data.user_ids[users])
    return ids.to(device), inputs.to(device), real, targets[real].to(device)


# ---- Files -----------------------------------------------------------------------------------------------


def with_dropout(module, on):
    """Switch the dropout of a loaded program `on` or off: its module has no working .train() and .eval().

    Dropout stands in the graph as dropout(x, p, on). A GRU or an LSTM has the same two arguments. BatchNorm
    stays as it was exported. Returns `module`.
    """
    aten = torch.ops.aten
    place = {aten.dropout.default: 2, aten.gru.input: 6, aten.lstm.input: 6}  # of `on` among the arguments
    for node in module.graph.nodes:
        if node.target in place:
            node.update_arg(place[node.target], on)
    module.recompile()
    return module


def export(model, max_length):
    """The program of `model`, with a copy of its weights. It takes histories of up to `max_length` items."""
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=max_length)
    example = torch.ones(2, dtype=torch.int64), torch.ones(2, max_length, dtype=torch.int64)
    shapes = {0: batch}, {0: batch, 1: length}
    return torch.export.export(copy.deepcopy(model).eval(), example, dynamic_shapes=shapes)


def write_student(args, data, program, student, config):
    """Write `program`, with the weights of `student` and dropout off, as a model file."""
    with_dropout(program.graph_module, False)
    for name, weight in student.state_dict().items():
        program.state_dict[name].data.copy_(weight)
    kept = {"items", "max_length", "sees", "architecture"} & config.keys()
    paths = "data", "out", "teacher", "student", "source", "start", "generator"
    settings = {name: value for name, value in vars(args).items() if name not in paths}
    config = {name: config[name] for name in sorted(kept)} | {"settings": settings}
    config |= {"stage": Path(__file__).stem, "data_sha256": data.sha256}
    buffer, temporary = io.BytesIO(), Path(f"{args.out}.tmp")
    torch.export.save(program, buffer, extra_files={"config.json": json.dumps(config)})
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(args.out)  # no reader ever finds half a file


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
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add, count = parser.add_argument, number(int, 1)
    add("data", help="interactions, `user item` a row: .txt or .npy (data/README.md)")
    add("--out", required=True, help="model file to write, such as runs/dt4sr.pt2")
    add("--dim", type=count, default=64, help="d: size of a mean, and of a covariance")
    add("--blocks", type=count, default=2, help="L; from 4 on, each branch has a learned scale, epsilon")
    add("--heads", type=count, default=1, help="attention heads; must divide --dim")
    add("--max-length", type=number(int, 2), default=50, help="most recent items that the model sees")
    add("--dropout", type=number(float, 0, 1), default=0.2, help="probability that training drops a unit")
    add("--score", choices=SCORES, default="wasserstein", help="dot: a product, not a distance")
    add("--loss", choices=["bpr", "ce"], default="bpr", help="bpr: as in the paper, 1 negative; ce: softmax")
    add("--learning-rate", type=number(float, 0), default=1e-3, help="of AdamW; falls to 0")
    add("--batch-size", type=count, default=128, help="users a step")
    add("--epochs", type=number(int, 0), default=30, help="passes over all users; 0: an untrained model")
    add("--seed", type=number(int, 0), default=0, help="same seed, data and machine: same file")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    if args.dim % args.heads:
        parser.error("--heads must divide --dim")
    try:
        refuse_to_overwrite([args.out], [args.data])
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)  # before the training, in case this fails
        train(args)
    except (OSError, KeyboardInterrupt) as error:  # a file that cannot be read or written, or Ctrl-C
        sys.exit(f"{args.out} is not written: {str(error) or 'stopped'}")


if __name__ == "__main__":
    main()
