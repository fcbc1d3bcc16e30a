"""Stage 1: train the teacher, SASRec, on one data set.

Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, arXiv 1808.09781.
The default loss is the full softmax of Klenitskiy and Vasilev, RecSys 2023, arXiv 2309.07602:

    L_CE = - mean over real positions t of log softmax_i(F_t . M_i) at the next item i = s_{t+1}

F_t is the output after position t, M_i the vector of item i. Different from the paper: histories are padded
on the right, the embedding has a factor sqrt(d), and a last LayerNorm follows the blocks.

Reads   interactions, `user item` per row (data/README.md).
Writes  OUT, the model of the epoch with the best validation NDCG@10 (README.md, "Your own model").
        OUT.log.jsonl, a line per epoch.
Shapes  B users, T positions, N positions that have a next item, d features, V items, k negatives. Item 0 is
        padding.

    python sasrec_teacher.py data/ml-100k.txt --out runs/teacher.pt2
"""

import argparse
import copy
import fcntl
import hashlib
import io
import json
import math
import os
import re
import sys
import tempfile
import time
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn

# torchrun sets both: which process this is, and of how many
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# ---- Model (SASRec, section III) -------------------------------------------------------------------------


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


class SASRec(nn.Module):
    """Self-attentive sequential recommender. `forward` is the contract of a model file.

    Histories are padded on the right. The model is causal, so no mask is needed for the padding.
    """

    def __init__(self, num_items, max_length, dim, num_blocks, num_heads, dropout, scaled=False):
        super().__init__()
        self.M = nn.Embedding(num_items + 1, dim, padding_idx=0)  # item vectors, for input and for scores
        self.P = nn.Parameter(torch.empty(max_length, dim))  # position vectors
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, num_heads, dropout, scaled) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(dim)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
        self.M.weight.data[0] = 0

    def forward(self, users, items):
        """users [B], items [B, T] -> hidden [blocks+1, B, T, d], output F [B, T, d], item_vectors M [V+1, d].

        The score of item i after position t is r_{t,i} = F_t . M_i. SASRec ignores `users`.
        """
        # E_t = sqrt(d) M[s_t] + P_t
        x = math.sqrt(self.M.embedding_dim) * self.M(items) + self.P[: items.shape[1]]
        hidden = [self.dropout(x)]
        for block in self.blocks:
            hidden.append(block(hidden[-1]))
        return torch.stack(hidden), self.norm(hidden[-1]), self.M.weight


# ---- Losses: means over N positions. output [N, d], item_vectors [V+1, d], target [N]: the next items -----


def ce_loss(output, item_vectors, target):
    """L_CE = -log softmax_i(F_t . M_i) at the next item, over all V items (arXiv 2309.07602).

    Equals F.cross_entropy(output @ item_vectors[1:].T, target - 1). To save memory, the scores are computed
    for a few rows at a time.
    """
    rows = max(1, min(128, 2**23 // len(item_vectors)))  # at most 32 MiB of scores
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
    return F.linear_cross_entropy(output, item_vectors[1:], target - 1, options=options)


def bce_loss(output, item_vectors, target, negatives):
    """-[log sigma(r_target) + sum_j log(1 - sigma(r_j))], j in `negatives` [N, k] (section III-E).

    The SASRec paper has k = 1. arXiv 2309.07602 shows that more negatives are better.
    """
    # one look-up for all: each look-up has a gradient as large as the table
    items = torch.cat([target[:, None], negatives], 1)
    r = (output[:, None] * F.embedding(items, item_vectors)).sum(-1)  # [N, 1 + k]
    return -(F.logsigmoid(r[:, 0]) + F.logsigmoid(-r[:, 1:]).sum(-1)).mean()


def sampled_log_softmax(output, item_vectors, target, negatives, log_count):
    """Log-probabilities [N, 1 + k]: of the target in column 0, then of the `negatives` [k] of the batch.

    Frequent items are drawn more often. To correct this, each score is lowered by `log_count` [k], the log of
    the item's expected count among the k (Bengio and Senecal, 2008). A negative that is the target is masked.
    """
    target_score = (output * F.embedding(target, item_vectors)).sum(1, keepdim=True)
    scores = output @ F.embedding(negatives, item_vectors).T - log_count.to(output)
    scores = scores.masked_fill(target[:, None] == negatives, -1e9)  # with -inf, a KL would be NaN
    return torch.cat([target_score, scores], 1).log_softmax(1)


LOSSES = {
    "ce": ce_loss,
    "bce": bce_loss,
    "sampled": lambda *args: -sampled_log_softmax(*args)[:, 0].mean(),  # L_CE over k items, for large V
}


class SharedNegatives:
    """Draws negatives that a whole batch shares.

    Q [V+1] is the probability of each item. It is the mean of two distributions: the items of training, and
    uniform over the items that occur.
    """

    def __init__(self, data, histories):
        items = np.concatenate([data.items[b:e] for b, e in zip(histories.begin, histories.end, strict=True)])
        self.Q = np.bincount(items, minlength=data.items.max() + 1) / len(items) / 2
        self.Q[data.catalogue] += 1 / len(data.catalogue) / 2

    def draw(self, k, rng):
        """`k` items, with replacement, and the log of their expected counts: tensors [k]."""
        drawn = rng.choice(len(self.Q), k, p=self.Q)
        return torch.from_numpy(drawn), torch.from_numpy(np.log(k * self.Q[drawn]))


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


def set_up(args):
    """The data, the training histories, the validation users, the model, its program and its optimizer."""
    join_processes(args.device)
    torch.manual_seed(args.seed)
    data = read_interactions(args.data)
    histories, validation_users = training_part(data, args.max_length, args.seed)
    unseen = UnseenItems(data) if args.loss == "bce" else None
    if unseen:  # without users who have seen every item
        histories = Histories(*(column[unseen.possible[histories.users]] for column in histories))
    num_items, scaled = int(data.items.max()), args.blocks >= 4
    model = SASRec(num_items, args.max_length, args.dim, args.blocks, args.heads, args.dropout, scaled)
    program = export(model, args.max_length)
    model.to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), args.learning_rate, betas=(0.9, 0.98), fused=True)
    return data, histories, validation_users, unseen, model, program, optimizer


def train(args):
    """Train with Adam, stop early, and write the best model and the log."""
    data, histories, validation_users, unseen, model, program, optimizer = set_up(args)
    lengths = histories.end - histories.begin - 1  # targets of each history
    num_positions, num_batches = int(lengths.sum()), math.ceil(len(lengths) / args.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, args.final_rate, args.epochs * num_batches)
    k = args.negatives or {"ce": 0, "bce": 1, "sampled": 2048}[args.loss]
    sampler = SharedNegatives(data, histories) if args.loss == "sampled" else None
    config = {"items": int(data.items.max()), "max_length": args.max_length}
    run = Run(args, data, [args.out], [model, optimizer, schedule])
    best = run.state.get("best")
    if args.epochs == 0:
        run.save_model(args.out, program, model, **config)
    for epoch in range(len(run.log) + 1, args.epochs + 1):
        start, total = time.time(), torch.zeros((), dtype=torch.float64, device=args.device)
        rng, batches = epoch_batches(lengths, args.batch_size, args.seed, epoch)
        model.train()
        for batch in batches:
            local = batch[RANK::PROCESSES]  # the rows of this process
            ids, inputs, real, target = batch_of(data, histories, local, args.device)
            loss_inputs = ()  # what the loss takes after `target`
            if args.loss == "bce":
                # every process draws for the whole batch, then keeps its rows, as long as its histories
                shape = len(batch), lengths[batch].max(), k
                users = np.broadcast_to(histories.users[batch][:, None, None], shape)
                drawn = torch.from_numpy(unseen.draw(users, rng)[RANK::PROCESSES, : inputs.shape[1]])
                loss_inputs = (drawn[real],)  # [B, T, k] -> [N, k]
            elif args.loss == "sampled":
                loss_inputs = sampler.draw(k, rng)  # negatives [k] and log_count [k]
            _, output, item_vectors = model(ids, inputs)
            loss_inputs = [x.to(args.device) for x in loss_inputs]
            loss = LOSSES[args.loss](output[real], item_vectors, target, *loss_inputs)
            optimizer.zero_grad()
            # the loss is a mean over these rows; this factor gives all positions of the epoch equal weight
            (loss * len(target) * num_batches / num_positions).backward()
            sum_over_processes([weight.grad for weight in model.parameters()])
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(target)
        sum_over_processes([total])
        loss = total.item() / num_positions
        if not math.isfinite(loss):
            sys.exit(f"the loss of epoch {epoch} is {loss}; remove OUT.ckpt, lower --learning-rate")
        line = {"epoch": epoch, "loss": loss, "seconds": time.time() - start}
        model.eval()
        hr, ndcg = validate(model, data, validation_users, args.max_length, args.device)
        line |= {"HR@10": hr, "NDCG@10": ndcg}
        if best is None or line["NDCG@10"] > best["NDCG@10"]:
            best = {name: line[name] for name in ("epoch", "HR@10", "NDCG@10")}
            run.save_model(args.out, program, model, best, **config)
        epochs_left = min(args.epochs, best["epoch"] + args.patience) - epoch
        run.end_epoch(line, epochs_left, "*" * (best["epoch"] == epoch), best=best)
        if epochs_left == 0:
            break


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


def training_part(data, max_length, seed, limit=10_000):
    """Histories to train on, and the users to validate on, an array of indices into user_ids.

    A history is the last max_length + 1 training items of a user who has two or more. At most `limit` users
    are validated on, drawn at random.
    """
    users = np.flatnonzero(data.train_end - data.starts[:-1] >= 2)  # two items: an input and its target
    validation_users = np.flatnonzero(data.evaluated)
    if len(users) == 0 or len(validation_users) == 0:
        sys.exit(f"{data.path}: no user has 3 interactions, or none has 2 to train on; use a larger log")
    if len(validation_users) < PROCESSES:
        sys.exit(f"{PROCESSES} processes are too many: only {len(validation_users)} users are validated on")
    if len(validation_users) > limit:
        rng = np.random.default_rng(seed)
        validation_users = np.sort(rng.choice(validation_users, limit, replace=False))
    end = data.train_end[users]
    return Histories(users, np.maximum(data.starts[users], end - max_length - 1), end), validation_users


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


# ---- Several processes (torchrun): each takes its part of every batch, gradients are added up ------------


def join_processes(device):
    """Join the processes that torchrun has started. Without torchrun, do nothing."""
    if "RANK" not in os.environ:
        return
    try:
        if device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    except (KeyError, ValueError, RuntimeError) as error:
        sys.exit(f"RANK is set, but the processes of torchrun cannot connect: {error}".splitlines()[0])
    if RANK:
        sys.stdout = io.StringIO()  # one process prints


def sum_over_processes(tensors):
    """Replace each tensor by its sum over all processes. Entries that are None are left out. One dtype."""
    tensors = [tensor for tensor in tensors if tensor is not None]
    if dist.is_initialized() and tensors:
        total = nn.utils.parameters_to_vector(tensors)  # one all_reduce instead of one per tensor
        try:
            dist.all_reduce(total)
        except RuntimeError:
            print("another process of torchrun has ended", file=sys.stderr)
            os._exit(1)  # after sys.exit, a thread of gloo that still runs can abort Python
        nn.utils.vector_to_parameters(total, tensors)


# ---- Validation ------------------------------------------------------------------------------------------


def rank_of_target(scores, target, seen, catalogue):
    """rho = 1 + #{better} + #{equal} / 2 of each target among `catalogue` without `seen`: float64 [B].

    scores [B, V+1]; target [B]; seen: an array of items for each row; catalogue: the items that occur. A tie
    counts half: this is the expected rank under random tie-breaking.
    """
    target_score = scores.gather(1, torch.from_numpy(target)[:, None].to(scores.device))  # [B, 1]
    if scores.sum().isnan() or not target_score.isfinite().all():  # a NaN compares false with everything
        sys.exit("the scores of the model are not finite; train it again with a lower --learning-rate")
    ranked = np.zeros(scores.shape, bool)
    ranked[:, catalogue] = True
    for row, items, item in zip(ranked, seen, target, strict=True):
        row[items], row[item] = False, True
    ranked = torch.from_numpy(ranked).to(scores.device)
    better = (ranked & (scores > target_score)).sum(1)
    equal = (ranked & (scores == target_score)).sum(1) - 1  # beside the target itself
    return 1 + better.double() + equal.double() / 2


def last_output(output, items):
    """The output [B, e] after the last item of each history; output [B, T, e], items [B, T]."""
    return output[torch.arange(items.shape[0], device=items.device), (items > 0).sum(1) - 1]


@torch.no_grad()
def validate(model, data, users, window, device):
    """HR@10 and NDCG@10 of the validation items of `users` [W], ranked among all items they have not seen.

    The model reads the last `window` items of each history.
    """
    users, ranks = users[RANK::PROCESSES], []
    begin, end = data.starts[users], data.train_end[users]
    rows = max(1, min(256, 2**22 // data.items.max()))  # users per slice: at most 16 MiB of scores
    for part in np.array_split(np.argsort(end - begin), math.ceil(len(users) / rows)):
        b, e = begin[part], end[part]
        items = pad_batch(data.items, np.maximum(b, e - window), e).to(device)
        _, output, item_vectors = model(torch.from_numpy(data.user_ids[users[part]]).to(device), items)
        scores = last_output(output, items) @ item_vectors.T
        seen = [data.items[history] for history in map(slice, b, e)]
        target = data.items[e]  # the validation item stands behind the training items
        ranks.append(rank_of_target(scores, target, seen, data.catalogue).cpu())
    rank = torch.cat(ranks)
    hit = (rank <= 10).double()
    sums = torch.stack([hit.sum(), (hit / torch.log2(rank + 1)).sum(), torch.tensor(len(rank)).double()])
    sum_over_processes([sums])
    return (sums[0] / sums[2]).item(), (sums[1] / sums[2]).item()


# ---- Files -----------------------------------------------------------------------------------------------


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


class Run:
    """The files of a run: models, the log OUT.log.jsonl, and the checkpoint OUT.ckpt, which --resume reads.

    `parts` are the modules and optimizers whose states the checkpoint holds. `state` has what else the last
    `end_epoch` of a resumed run has stored, by name; it is empty for a new run.
    """

    def __init__(self, args, data, models, parts=()):
        self.out, self.parts, self.log, self.state = args.out, parts, [], {}
        checkpoint = Path(f"{args.out}.ckpt")
        inputs = [vars(args).get(name) for name in ("data", "teacher", "student", "architecture")]
        # OUT need not be one of `models`
        for path in map(Path, [args.out, *models, f"{args.out}.log.jsonl", checkpoint]):
            is_input = path.exists() and any(path.samefile(other) for other in inputs if other)
            if is_input or path.exists() and not path.is_file():
                sys.exit(f"{path} cannot be written: it is an input, or not a regular file")
        out_hash = hashlib.sha256(str(Path(args.out).resolve()).encode()).hexdigest()
        lock = os.open(Path(tempfile.gettempdir(), f"{out_hash}-{RANK}.lock"), os.O_CREAT | os.O_RDWR)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until this process ends
        except OSError:
            sys.exit(f"{args.out}: another run is writing it")
        paths = ("data", "out", "teacher", "student", "architecture", "resume")
        settings = {name: value for name, value in vars(args).items() if name not in paths}
        versions = {"torch": str(torch.__version__), "numpy": np.__version__}
        self.origin = {"stage": Path(__file__).stem, "settings": settings, "versions": versions}
        self.origin["data_sha256"] = data.sha256
        # a resumed run must have the same values as the run that was stopped
        files = [("script", __file__)] + [(name, vars(args).get(name)) for name in ("teacher", "student")]
        sha256 = {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files if file}
        must_match = settings | versions | sha256 | {"data": data.sha256, "number of processes": PROCESSES}
        self.must_match = must_match
        if checkpoint.exists() and not args.resume:
            sys.exit(f"{checkpoint}: a run stopped here; give --resume, or remove the file")
        if args.resume:
            content = io.BytesIO(checkpoint.read_bytes())
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch warns of some damaged files
                    saved, states, self.log, self.state = torch.load(content, "cpu", weights_only=True)
            except Exception:  # whatever unpickling meets in another file
                sys.exit(f"{checkpoint} cannot be resumed: it is not a checkpoint")
            names = saved.keys() | must_match.keys()
            if changed := sorted(name for name in names if saved.get(name) != must_match.get(name)):
                sys.exit(f"{checkpoint} cannot be resumed: it is of a run with another {', '.join(changed)}")
            # stages 1, 3 and 4 store the `best` epoch, whose models are written
            if self.state.get("best") and not all(Path(model).exists() for model in models):
                sys.exit(f"{checkpoint} cannot be resumed: a model that the run wrote is missing")
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
        counts = map(len, (data.user_ids, data.catalogue, data.items))
        print("{:,} users, {:,} items, {:,} interactions".format(*counts))

    def save_model(self, path, program, module, validation=None, **config):
        """Write `program`, with the weights of `module`, as a model file. Its config says how it was made."""
        if RANK:  # one process writes
            return
        for name, weight in module.state_dict().items():
            program.state_dict[name].data.copy_(weight)
        buffer, config = io.BytesIO(), config | self.origin | {"validation": validation}
        torch.export.save(program, buffer, extra_files={"config.json": json.dumps(config)})
        write(path, buffer.getvalue())

    def end_epoch(self, line, epochs_left, mark="", **state):
        """Print `line` and `mark`, and log `line`. Renew the checkpoint, or remove it after the last epoch.

        `line` has at least `epoch` and `seconds`. The time left is a lower bound: where a stage stops early,
        a better epoch restarts the patience.
        """
        self.log.append(line)
        figures = [f"{name} {value:.4f}" for name, value in line.items() if isinstance(value, float)]
        seconds = np.mean([earlier["seconds"] for earlier in self.log]) * epochs_left
        left = f"at least {seconds / 60:.1f} min left"
        print(*filter(None, [f"epoch {line['epoch']:3}", *figures, mark, left]), sep="  ", flush=True)
        write(f"{self.out}.log.jsonl", "".join(json.dumps(logged) + "\n" for logged in self.log).encode())
        if epochs_left:
            buffer, states = io.BytesIO(), [part.state_dict() for part in self.parts]
            torch.save((self.must_match, states, self.log, state), buffer)
            write(f"{self.out}.ckpt", buffer.getvalue())
        elif not RANK:
            Path(f"{self.out}.ckpt").unlink(missing_ok=True)


# ---- The command line ------------------------------------------------------------------------------------

DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
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


def main(argv=None):
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add, count = parser.add_argument, number(int, 1)
    add("data", help="interactions, `user item` per row: .txt or .npy (data/README.md)")
    add("--out", required=True, help="model file to write, such as runs/teacher.pt2")
    add("--dim", type=count, default=64, help="d: size of hidden states and item vectors")
    add("--blocks", type=count, default=2, help="blocks; from 4 on, each branch has a learned scale, epsilon")
    add("--heads", type=count, default=1, help="attention heads; must divide --dim")
    add("--max-length", type=number(int, 2), default=50, help="most recent items that the model sees")
    add("--dropout", type=number(float, 0, 0.99), default=0.2, help="probability that training drops a unit")
    add("--loss", choices=LOSSES, default="ce", help="bce: the paper's; ce: softmax; sampled: over k items")
    add("--negatives", type=count, help="k: per position with bce, default 1; per batch with sampled, 2048")
    add("--learning-rate", type=number(float, 0), default=1e-3, help="of Adam (beta_2 is 0.98)")
    add("--final-rate", type=number(float, 0, 1), default=1.0, help="last learning rate / first one, linear")
    add("--batch-size", type=count, default=128, help="users per batch")
    add("--epochs", type=number(int, 0), default=200, help="at most; 0 writes an untrained model")
    add("--patience", type=count, default=10, help="stop after so many epochs without a better NDCG@10")
    add("--resume", action="store_true", help="go on from OUT.ckpt, the checkpoint of a run that was stopped")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="same seed, data and machine: same file")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to compute")
    args = parser.parse_args(argv)
    if args.dim % args.heads:
        parser.error("--heads must divide --dim")
    if args.negatives and args.loss == "ce":
        parser.error("--negatives is for --loss bce and sampled")
    try:
        train(args)
    except OSError as error:  # a file that cannot be read or written
        sys.exit(f"{error.filename or args.out}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume goes on after the last whole epoch, if there is one")


if __name__ == "__main__":
    main()
