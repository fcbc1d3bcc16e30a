"""Stage 1: train the teacher, SASRec, on one data set.

Wang-Cheng Kang and Julian McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, arXiv 1808.09781;
with the full-softmax loss of Klenitskiy and Vasilev, RecSys 2023, arXiv 2309.07602, as the default.

Reads   interactions, `user item` a row (data/README.md).
Writes  OUT, the model as an exported program (README.md, "The model file"), of the epoch whose validation
        NDCG@10 was best; and OUT.log.jsonl, a line an epoch.

    python sasrec_teacher.py data/ml-100k.txt --out runs/teacher.pt2
"""

import argparse
import copy
import hashlib
import io
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

MAX_ID = 10**8  # a table of vectors has a row for every id up to the largest
VALIDATION_USERS = 10_000  # enough to choose an epoch by; ranking every user of a large log each epoch is not


class BadInput(Exception):
    """Something the user can mend: `main` prints it as one line and ends with status 2."""


# ---- Data: read, split by leave-one-out, pad -------------------------------------------------------------


def read_interactions(path):
    """Read a data file: `user item` a row, a user's rows together and in time order (data/README.md).

    Returns int64 arrays `user_ids` [U], in file order, `starts` [U+1] and `items` [n]: the history of user
    `user_ids[k]` is `items[starts[k]:starts[k+1]]`, oldest first. Raises BadInput naming file and line.
    """
    try:
        if str(path).endswith(".npy"):
            table = np.load(path, mmap_mode="r")
        else:
            with open(path, "rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of an empty file, which is told below
                table = np.loadtxt(file, dtype=np.int64, comments=None, ndmin=2)
    except OSError as error:
        why = error.strerror or error
        raise BadInput(f"cannot read {path}: {why}; make it with data/prepare.py") from None
    except (ValueError, OverflowError, EOFError):
        table = np.zeros((1, 1))
    if table.size == 0:
        raise BadInput(f"{path} is empty; put `user item` on each line")
    good = table.ndim == 2 and table.shape[1] == 2 and table.dtype.kind in "iu"
    if not good or table.min() < 1 or table.max() > MAX_ID:
        raise BadInput(first_bad_row(path))
    users = np.asarray(table[:, 0])
    first = np.append(0, 1 + np.flatnonzero(np.diff(users)))  # rows where another user begins
    if len(np.unique(users[first])) < len(first):
        raise BadInput(first_bad_row(path))
    return users[first].astype(np.int64), np.append(first, len(users)), table[:, 1].astype(np.int64)


def first_bad_row(path):
    """What is wrong with the first bad row of `path`, read slowly, as a sentence that names the row."""
    if str(path).endswith(".npy"):
        return f"{path} is no integer array [n, 2], ids from 1, a user's rows together; see data/README.md"
    done, user = set(), None
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.split()
            if fields and not (
                len(fields) == 2 and all(f.isdecimal() and 0 < int(f) <= MAX_ID for f in fields)
            ):
                return (
                    f"{path}, line {number}: {line.strip()[:40]!r} is not `user item`, two integers from 1; "
                    "mend the line, or make ids with data/prepare.py convert"
                )
            if fields and fields[0] != user:
                if fields[0] in done:
                    return (
                        f"{path}, line {number}: user {fields[0]} again; put a user's rows together, by time"
                    )
                user = fields[0]
                done.add(user)
    return f"{path} is no table of two integers, `user item`"


def leave_one_out(starts):
    """The split (shared by every stage): last item test, the one before validation, the rest training.

    `starts` [U+1] as `read_interactions` gives it. Returns `train_end` [U] and `evaluated` [U]: user k trains
    on `items[starts[k]:train_end[k]]`; where `evaluated[k]`, that is with three interactions or more, the
    validation item stands at `train_end[k]`, the test item behind it. Shorter histories only train.
    """
    evaluated = np.diff(starts) >= 3
    return starts[1:] - 2 * evaluated, evaluated


def pad_batch(items, begin, end):
    """Histories `items[begin[k]:end[k]]` as rows, padded with 0 on the right: int64 tensor [B, T]."""
    steps = np.arange(max(1, (end - begin).max()))
    rows = begin[:, None] + steps  # [B, T]
    inside = rows < end[:, None]
    return torch.from_numpy(np.where(inside, items[np.where(inside, rows, 0)], 0))


def batches_of_like_length(length, batch_size, rng):
    """Shuffled batches of indices whose histories are about equally long, so that little padding is computed.

    `length` [U]. Within each 64 shuffled batches (a quarter of all, where that is less: batches should differ
    from epoch to epoch) the histories are sorted by length; then the batches are shuffled.
    """
    order = rng.permutation(len(length))
    window = batch_size * max(1, min(64, len(length) // batch_size // 4))
    chunks = [order[k : k + window] for k in range(0, len(order), window)]
    order = np.concatenate([chunk[np.argsort(length[chunk], kind="stable")] for chunk in chunks])
    batches = [order[k : k + batch_size] for k in range(0, len(order), batch_size)]
    return [batches[k] for k in rng.permutation(len(batches))]


def draw_negatives(users, seen, item_count, rng):
    """A uniform item that the user has not seen, for each entry of `users`: int64 of the same shape.

    `users` are indices; `seen` the training interactions as sorted numbers user * (item_count + 1) + item: a
    look-up is a binary search, and memory that of the interactions. Every user must have an unseen item.
    """
    drawn, wrong = rng.integers(1, item_count + 1, users.size), np.arange(users.size)
    while len(wrong):
        key = users.flat[wrong] * (item_count + 1) + drawn[wrong]
        wrong = wrong[seen[np.minimum(np.searchsorted(seen, key), len(seen) - 1)] == key]
        drawn[wrong] = rng.integers(1, item_count + 1, len(wrong))
    return drawn.reshape(users.shape)


# ---- Model (SASRec, section III) -------------------------------------------------------------------------


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
        self.dropout = nn.Dropout(dropout)
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


class SASRec(nn.Module):
    """Self-attentive sequential recommender; `forward` is the contract of a model file.

    Item 0 is padding. Histories are padded on the right: a causal model needs no mask for what comes later.
    """

    def __init__(self, item_count, max_length, dim, blocks, heads, dropout, scaled=False):
        super().__init__()
        self.M = nn.Embedding(item_count + 1, dim, padding_idx=0)  # items, and scores by the same vectors
        self.P = nn.Parameter(torch.empty(max_length, dim))  # positions
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout, scaled) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)  # small: at first, what comes in passes on nearly unchanged
        with torch.no_grad():
            self.M.weight[0] = 0

    def encode(self, items):
        """items [B, T] -> states of embedding layer and blocks, a list of [B, T, d]; output [B, T, d]."""
        # E_t = sqrt(d) M[s_t] + P_t
        x = math.sqrt(self.M.embedding_dim) * self.M(items) + self.P[: items.shape[1]]
        hidden = [self.dropout(x)]
        for block in self.blocks:
            hidden.append(block(hidden[-1]))
        return hidden, self.norm(hidden[-1])

    def forward(self, users, items):
        """users [B], items [B, T] -> hidden [L+1, B, T, d], output [B, T, d], item_vectors [V+1, d]."""
        hidden, output = self.encode(items)
        return torch.stack(hidden), output, self.M.weight


# ---- Losses ----------------------------------------------------------------------------------------------
# `output` [N, d] at the N real positions, `target` [N] the items that came next; the mean over N


def ce_loss(output, item_vectors, target):
    """-log softmax_i(F_t . M_i) at the next item, over all V items (L_CE of arXiv 2309.07602).

    The [N, V] scores are made a slice of rows at a time, with their gradient, and never kept.
    """
    rows = max(1, min(128, 2**23 // len(item_vectors)))  # a slice of at most 32 MiB
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
    return F.linear_cross_entropy(output, item_vectors[1:], target - 1, options=options)


def bce_loss(output, item_vectors, target, negatives):
    """-[log sigma(r_target) + sum_j log(1 - sigma(r_j))], j in `negatives` [N, k] (section III-E).

    k is 1 as first published; arXiv 2309.07602 shows that more are better.
    """
    positive_score = (output * F.embedding(target, item_vectors)).sum(-1)  # [N]
    negative_score = torch.einsum("nd,nkd->nk", output, F.embedding(negatives, item_vectors))
    return -(F.logsigmoid(positive_score) + F.logsigmoid(-negative_score).sum(-1)).mean()


def sampled_loss(output, item_vectors, target, negatives):
    """-log softmax of the target among itself and shared `negatives` [k] (L_CE-sampled, arXiv 2309.07602).

    A negative that is the position's target is left out there.
    """
    positive_score = (output * F.embedding(target, item_vectors)).sum(-1)  # [N]
    scores = output @ F.embedding(negatives, item_vectors).T  # [N, k]
    scores = scores.masked_fill(target[:, None] == negatives, -math.inf)
    return (torch.cat([positive_score[:, None], scores], 1).logsumexp(1) - positive_score).mean()


# ---- Validation ------------------------------------------------------------------------------------------


def rank_of_target(scores, target, seen):
    """rho = 1 + #{better} + #{equal} / 2 of each row's target among the items not in `seen`; float64 [B].

    scores [B, V+1], overwritten; target [B]; seen [B, H], 0 for padding. Ties count by halves against the
    target: a model that scores all items alike gets what chance gets. The target itself always takes part.
    Raises BadInput when its score is not finite, for nothing would rank above a NaN.
    """
    own = scores.gather(1, target[:, None])  # [B, 1]
    if not own.isfinite().all():
        raise BadInput("the model's scores are not finite; train it again with a lower --learning-rate")
    scores.scatter_(1, seen, -math.inf)
    scores[:, 0] = -math.inf
    scores.scatter_(1, target[:, None], own)
    better, equal = (scores > own).sum(1, dtype=torch.int32), (scores == own).sum(1, dtype=torch.int32)
    return 1 + better.double() + (equal.double() - 1) / 2


@torch.no_grad()
def validate(model, items, begin, end, max_length, device):
    """HR@10 and NDCG@10 of the items at `items[end]` after the histories `items[begin:end]`, full ranking."""
    model.eval()
    ranks = []
    slices = math.ceil(len(end) * len(model.M.weight) / 2**22)  # of 16 MiB of scores or less
    for chosen in np.array_split(np.argsort(end - begin), max(slices, math.ceil(len(end) / 256))):
        b, e = begin[chosen], end[chosen]
        window = pad_batch(items, np.maximum(b, e - max_length), e).to(device)
        _, output = model.encode(window)
        last = torch.from_numpy(np.minimum(e - b, max_length) - 1).to(device)
        scores = output[torch.arange(len(e), device=device), last] @ model.M.weight.T  # [B, V+1]
        target = torch.from_numpy(items[e]).to(device)
        ranks.append(rank_of_target(scores, target, pad_batch(items, b, e).to(device)).cpu())
    rank = torch.cat(ranks)
    hit = (rank <= 10).double()
    return hit.mean().item(), (hit / torch.log2(rank + 1)).mean().item()


# ---- Files -----------------------------------------------------------------------------------------------


def write_atomically(path, write):
    """Make `path` by `write(temporary path)` and a rename: an interrupted run leaves no half file.

    Parents are created. Raises BadInput when the place cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}; choose another --out") from None


def check_writable(path):
    """Raise BadInput now, rather than after training, if `path` cannot be written."""
    probe = Path(f"{path}.probe")
    write_atomically(probe, Path.touch)
    probe.unlink()
    if Path(path).is_dir():
        raise BadInput(f"cannot write {path}: it is a directory; choose another --out")


def export_model(model, max_length, config):
    """The bytes of a model file: the program with dynamic batch and length, and `config` as config.json."""
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=max_length)
    example = torch.ones(2, dtype=torch.int64), torch.ones(2, max(2, max_length), dtype=torch.int64)
    program = torch.export.export(
        copy.deepcopy(model).cpu().eval(), example, dynamic_shapes=({0: batch}, {0: batch, 1: length})
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"config.json": json.dumps(config)})
    return buffer.getvalue()


# ---- Training --------------------------------------------------------------------------------------------


def batch_loss(model, inputs, targets, loss, negatives):
    """`loss` over a batch's real positions; inputs and targets [B, T], negatives as the loss wants them."""
    real = inputs > 0
    _, output = model.encode(inputs)
    output, target, item_vectors = output[real], targets[real], model.M.weight  # [N, d], [N], [V+1, d]
    if loss == "ce":
        return ce_loss(output, item_vectors, target)
    return {"bce": bce_loss, "sampled": sampled_loss}[loss](output, item_vectors, target, negatives)


def train(args):
    """Train with Adam, stop early, write the model file and its log. Raises BadInput."""
    began = time.time()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    user_ids, starts, items = read_interactions(args.data)
    item_count = int(items.max())
    train_end, evaluated = leave_one_out(starts)
    log_path = f"{args.out}.log.jsonl"
    check_writable(args.out)
    check_writable(log_path)

    users = np.flatnonzero(train_end - starts[:-1] >= 2)  # two items make one pair of input and target
    if len(users) == 0 or not evaluated.any():
        raise BadInput(
            f"{args.data}: no user has 3 interactions, or none has 2 to train on; take a larger log"
        )
    begin, end = np.maximum(starts[users], train_end[users] - args.max_length - 1), train_end[users]
    chosen = np.flatnonzero(evaluated)
    if len(chosen) > VALIDATION_USERS:
        chosen = np.sort(rng.choice(chosen, VALIDATION_USERS, replace=False))
    owner = np.repeat(np.arange(len(user_ids)), np.diff(starts))  # user of each interaction
    known = np.arange(len(items)) < train_end[owner]
    seen = np.unique(owner[known] * (item_count + 1) + items[known])
    full = np.flatnonzero(np.bincount(seen // (item_count + 1)) == item_count)
    if args.loss == "bce" and len(full):
        raise BadInput(f"user {user_ids[full[0]]} has seen every item: there is no negative; use --loss ce")

    k = args.negatives or {"ce": 0, "bce": 1, "sampled": 256}[args.loss]
    scaled = args.blocks >= 4 if args.residual_scale is None else args.residual_scale
    model = SASRec(item_count, args.max_length, args.dim, args.blocks, args.heads, args.dropout, scaled)
    model.to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), args.learning_rate, betas=(0.9, 0.98), fused=True)
    print(
        f"{args.data}: {len(user_ids):,} users, {item_count:,} items, {len(items):,} interactions; "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, on {args.device}",
        flush=True,
    )

    mean_count = (end - begin - 1).sum() / math.ceil(len(users) / args.batch_size)  # positions a batch
    best, best_weights, log, progress = None, None, [], Progress()
    for epoch in range(1, args.epochs + 1):
        model.train()
        total, positions, tick = 0.0, 0, time.time()
        batches = batches_of_like_length(end - begin, args.batch_size, rng)
        for step, batch in enumerate(batches, 1):
            inputs = pad_batch(items, begin[batch], end[batch] - 1).to(args.device)
            targets = pad_batch(items, begin[batch] + 1, end[batch]).to(args.device)
            count = int((end[batch] - 1 - begin[batch]).sum())
            negatives = None
            if args.loss == "bce":
                owners = np.repeat(users[batch], end[batch] - 1 - begin[batch])  # user of each position, [N]
                negatives = draw_negatives(np.tile(owners[:, None], k), seen, item_count, rng)  # [N, k]
            elif args.loss == "sampled":
                negatives = rng.integers(1, item_count + 1, k)
            if negatives is not None:
                negatives = torch.from_numpy(negatives).to(args.device)
            loss = batch_loss(model, inputs, targets, args.loss, negatives)
            optimizer.zero_grad()
            # the losses sum over positions: a batch of short histories must not count as one of long ones
            (loss * count / mean_count).backward()
            optimizer.step()
            total, positions = total + loss.item() * count, positions + count
            if not math.isfinite(total):
                raise BadInput(f"the loss became {loss.item()} in epoch {epoch}; lower --learning-rate")
            progress.show(f"epoch {epoch}, batch {step} of {len(batches)}: loss {total / positions:.4f}")
        seconds = time.time() - tick
        hr, ndcg = validate(model, items, starts[chosen], train_end[chosen], args.max_length, args.device)
        log.append(
            {"epoch": epoch, "loss": total / positions, "HR@10": hr, "NDCG@10": ndcg, "seconds": seconds}
        )
        if best is None or ndcg > best["NDCG@10"]:
            best, best_weights = log[-1], copy.deepcopy(model.state_dict())
        left = min(args.epochs, best["epoch"] + args.patience) - epoch
        minutes = left * (time.time() - began) / epoch / 60
        progress.line(
            f"epoch {epoch:3}  loss {total / positions:.4f}  validation HR@10 {hr:.4f} NDCG@10 {ndcg:.4f}"
            f"{'*' if best is log[-1] else ' '}  {seconds:.1f} s; {minutes:.1f} min left if none gets better"
        )
        if left == 0:
            break

    model.load_state_dict(best_weights)
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "out")} | {
        "residual_scale": scaled,
        "negatives": k,
    }
    config = {
        "items": item_count,
        "max_length": args.max_length,
        "stage": "sasrec_teacher",
        "settings": settings,
        "data_sha256": hashlib.sha256(Path(args.data).read_bytes()).hexdigest(),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "validation": {k: best[k] for k in ("epoch", "HR@10", "NDCG@10")},
    }
    content = export_model(model, args.max_length, config)
    write_atomically(args.out, lambda path: path.write_bytes(content))
    write_atomically(log_path, lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in log)))
    print(
        f"{args.out}: epoch {best['epoch']}, validation HR@10 {best['HR@10']:.4f} "
        f"NDCG@10 {best['NDCG@10']:.4f}; {(time.time() - began) / 60:.1f} min"
    )


class Progress:
    """What happens now: one line written over on a terminal, else a new line each 8 s of silence."""

    def __init__(self):
        self.terminal, self.last = sys.stdout.isatty(), time.time()

    def show(self, text):
        """Show `text`, if it is time to."""
        if time.time() - self.last > (0.2 if self.terminal else 8):
            print(f"\r\033[K{text}" if self.terminal else text, end="" if self.terminal else "\n", flush=True)
            self.last = time.time()

    def line(self, text):
        """Print `text` to stay."""
        print(f"\r\033[K{text}" if self.terminal else text, flush=True)
        self.last = time.time()


def main(argv=None):
    """Read the command line and train; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Train a SASRec teacher; keep the epoch with the best validation NDCG@10, full ranking.",
        epilog="example: python sasrec_teacher.py data/ml-100k.txt --out runs/teacher.pt2",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("data", help="interactions, `user item` a row: .txt or .npy (data/README.md)")
    no_default = {"required": True, "default": argparse.SUPPRESS}
    add("--out", **no_default, help="model file to write, as runs/teacher.pt2; the log goes to OUT.log.jsonl")
    add("--dim", type=number(int, 1), default=64, help="d: size of hidden states and item vectors")
    add("--blocks", type=number(int, 1), default=2, help="blocks of attention and feed-forward network")
    add("--heads", type=number(int, 1), default=1, help="attention heads; must divide --dim")
    add("--max-length", type=number(int, 2), default=50, help="n: most recent items that the model sees")
    add("--dropout", type=number(float, 0, 1), default=0.2, help="share of hidden units dropped in training")
    add(
        "--residual-scale",
        action=argparse.BooleanOptionalAction,
        help="x + epsilon g(x), epsilon learned from 0; by itself from 4 blocks on",
    )
    add(
        "--loss",
        choices=["ce", "bce", "sampled"],
        default="ce",
        help="ce: softmax over all items; bce: against --negatives of each position, as first published; "
        "sampled: softmax over --negatives that a batch shares, for catalogues too large for ce",
    )
    add(
        "--negatives",
        type=number(int, 1),
        help="k: uniform negatives; 1 with bce, 256 with sampled if not given",
    )
    add("--learning-rate", type=number(float, 1e-12), default=1e-3, help="of Adam, whose beta_2 is 0.98")
    add("--batch-size", type=number(int, 1), default=128, help="users a step")
    add("--epochs", type=number(int, 1), default=200, help="passes over all users, at most")
    add(
        "--patience",
        type=number(int, 1),
        default=10,
        help="epochs without a better validation NDCG@10 to stop after",
    )
    add("--seed", type=number(int, 0), default=0, help="same seed, data and machine: same file")
    add(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where",
    )
    args = parser.parse_args(argv)
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise BadInput("no CUDA device was found; use --device cpu")
        if args.dim % args.heads:
            raise BadInput(f"--heads {args.heads} does not divide --dim {args.dim}; change one of them")
        train(args)
    except BadInput as error:
        print(f"sasrec_teacher.py: {error}", file=sys.stderr)
        return 2
    return 0


def number(kind, low, below=math.inf):
    """A reader of `kind` numbers from `low` up to, but not, `below`, for argparse."""

    def number(text):
        if not low <= kind(text) < below:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low:g}, {below:g})")
        return kind(text)

    return number


if __name__ == "__main__":
    sys.exit(main())
