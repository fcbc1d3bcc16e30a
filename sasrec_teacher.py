"""Stage 1: train the teacher, SASRec, on one data set.

Wang-Cheng Kang and Julian McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, arXiv 1808.09781;
with the full-softmax loss of Klenitskiy and Vasilev, RecSys 2023, arXiv 2309.07602, as the default.

    L = - mean over positions t of log softmax_i(F_t . M_i) at i = s_{t+1}

Reads   interactions, `user item` a row (data/README.md).
Writes  OUT, the model as an exported program (README.md, "The model file"), of the epoch whose validation
        NDCG@10 was best; and OUT.log.jsonl, a line an epoch.
Shapes  B users, T positions, N of them real, d features, V items, item 0 padding, L blocks, k negatives.

    python sasrec_teacher.py data/ml-100k.txt --out runs/teacher.pt2
"""

import argparse
import hashlib
import io
import json
import math
import os
import re
import sys
import time
import warnings
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn

# ---- Model (SASRec, section III) -------------------------------------------------------------------------


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


class SASRec(nn.Module):
    """Self-attentive sequential recommender; `forward` is the contract of a model file.

    Histories are padded on the right: a causal model needs no mask for what comes later.
    """

    def __init__(self, item_count, max_length, dim, blocks, heads, dropout, scaled=False):
        super().__init__()
        self.M = nn.Embedding(item_count + 1, dim, padding_idx=0)  # items, and scores by the same vectors
        self.P = nn.Parameter(torch.empty(max_length, dim))  # positions
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout, scaled) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)  # small: at first, what comes in passes on nearly unchanged
        self.M.weight.data[0] = 0

    def forward(self, users, items):
        """users [B], items [B, T] -> hidden [L+1, B, T, d], output F [B, T, d], item_vectors M [V+1, d].

        The score of item i after position t is r_{t,i} = F_t . M_i. SASRec does not look at users.
        """
        # E_t = sqrt(d) M[s_t] + P_t
        x = math.sqrt(self.M.embedding_dim) * self.M(items) + self.P[: items.shape[1]]
        hidden = [self.dropout(x)]
        for block in self.blocks:
            hidden.append(block(hidden[-1]))
        return torch.stack(hidden), self.norm(hidden[-1]), self.M.weight


# ---- Losses: means over the N real positions; output [N, d], target [N] the items that came next ---------


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
    asked = torch.cat([target[:, None], negatives], 1)  # one look-up: its gradient is as large as the table
    # not an einsum, which makes N products of matrices: slow where k is small
    r = (output[:, None] * F.embedding(asked, item_vectors)).sum(-1)  # [N, 1 + k]
    return -(F.logsigmoid(r[:, 0]) + F.logsigmoid(-r[:, 1:]).sum(-1)).mean()


def sampled_loss(output, item_vectors, target, negatives, log_count):
    """`ce_loss` estimated by the target and `negatives` [k] alone, which a batch shares.

    Each stands for the items that are not drawn, so its score is lowered by `log_count` [k], the log of how
    often it is expected among the k (Bengio and Senecal, 2008). The position's target is left out there.
    """
    positive_score = (output * F.embedding(target, item_vectors)).sum(-1)  # [N]
    scores = output @ F.embedding(negatives, item_vectors).T - log_count.to(output)  # [N, k]
    scores = scores.masked_fill(target[:, None] == negatives, -math.inf)
    return (torch.cat([positive_score[:, None], scores], 1).logsumexp(1) - positive_score).mean()


LOSSES = {"ce": ce_loss, "bce": bce_loss, "sampled": sampled_loss}


def proposal(items, begin, end):
    """Q [V+1], how likely an item is drawn as a negative that a batch shares: half of Q is uniform, half as
    the item is frequent in items[begin[k]:end[k]], the training histories.
    """
    training = np.concatenate([items[b:e] for b, e in zip(begin, end, strict=True)])
    Q = (np.bincount(training, minlength=items.max() + 1) / len(training) + 1 / items.max()) / 2
    Q[0] = 0
    return Q


def draw_shared(Q, k, rng):
    """`k` items drawn from Q, with replacement, and the log of how often each is expected among them: [k]."""
    drawn = rng.choice(len(Q), k, p=Q)
    return torch.from_numpy(drawn), torch.from_numpy(np.log(k * Q[drawn]))


def draw_negatives(users, seen, item_count, rng):
    """A uniform item that the user has not seen, for each entry of `users`, indices: int64 of the same shape.

    `seen` is what `seen_in_training` gives: a look-up is a binary search.
    """
    drawn, wrong = rng.integers(1, item_count + 1, users.size), np.arange(users.size)
    while len(wrong):
        key = users.flat[wrong] * (item_count + 1) + drawn[wrong]
        wrong = wrong[seen[np.minimum(np.searchsorted(seen, key), len(seen) - 1)] == key]
        drawn[wrong] = rng.integers(1, item_count + 1, len(wrong))
    return drawn.reshape(users.shape)


# ---- Training --------------------------------------------------------------------------------------------


def train(args):
    """Train with Adam, stop early, write the model file and its log."""
    began = time.time()
    torch.manual_seed(args.seed)
    user_ids, starts, items = read_interactions(args.data)
    item_count = int(items.max())
    rng = np.random.default_rng(args.seed)
    users, begin, end, judged = training_part(args.data, starts, args.max_length, rng)
    join(args, len(users), len(judged))
    seen = seen_in_training(user_ids, starts, items) if args.loss == "bce" else None
    Q = proposal(items, begin, end) if args.loss == "sampled" else None
    shape = args.dim, args.blocks, args.heads, args.dropout
    model = SASRec(item_count, args.max_length, *shape, scaled=args.blocks >= 4)
    program = export(model, args.max_length)  # it has the model's parameters: what is learnt is saved with it
    model.to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), args.learning_rate, betas=(0.9, 0.98), fused=True)
    print(f"{len(user_ids):,} users, {item_count:,} items, {len(items):,} interactions; on {args.device}")
    steps, positions = math.ceil(len(users) / args.batch_size), int((end - begin - 1).sum())
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, args.final_rate, args.epochs * steps)
    k = args.negatives or {"ce": 0, "bce": 1, "sampled": 2048}[args.loss]
    contract = {"items": item_count, "max_length": args.max_length}
    trained = model, optimizer, schedule
    run, past = load_checkpoint(args, trained)
    if args.epochs == 0:
        save_model(args, args.out, program, model, None, **contract)
    best, log = past.get("best"), past.get("log", [])
    began -= sum(line["seconds"] for line in log)
    for epoch in range(len(log) + 1, args.epochs + 1):
        model.train()
        rng, tick = random_numbers(args.seed, epoch), time.time()
        total = torch.zeros((), dtype=torch.float64, device=args.device)
        batches = batches_of_like_length(end - begin, args.batch_size, rng)
        for step, batch in enumerate(batches, 1):
            mine = batch[share()]
            ids = torch.from_numpy(user_ids[users[mine]]).to(args.device)
            inputs = pad_batch(items, begin[mine], end[mine] - 1)
            targets = pad_batch(items, begin[mine] + 1, end[mine])
            real, negatives = inputs > 0, ()
            if args.loss == "bce":  # the same of a position, however many processes there are
                longest = (end[batch] - begin[batch]).max() - 1
                asked = np.broadcast_to(users[batch][:, None, None], (len(batch), longest, k))
                drawn = draw_negatives(asked, seen, item_count, rng)[share(), : real.shape[1]]
                negatives = [torch.from_numpy(drawn)[real]]  # [N, k]
            elif args.loss == "sampled":
                negatives = draw_shared(Q, k, rng)
            targets, *negatives = (x.to(args.device) for x in (targets[real], *negatives))
            _, output, item_vectors = model(ids, inputs.to(args.device))
            loss = LOSSES[args.loss](output[real], item_vectors, targets, *negatives)
            optimizer.zero_grad()
            # a mean over positions: weighed by how many, or short histories would count as much as long ones
            (loss * len(targets) * steps / positions).backward()
            add_up([weight.grad for weight in model.parameters()])
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(targets)
            if sys.stdout.isatty():
                print(f"epoch {epoch}, {step / steps:.0%}", end="\r", flush=True)
        add_up([total])
        loss, seconds = total.item() / positions, time.time() - tick
        if not math.isfinite(loss):
            sys.exit(f"the loss became {loss} in epoch {epoch}; lower --learning-rate")
        hr, ndcg = validate(model.eval(), user_ids, starts, items, judged, args.max_length, args.device)
        log += [{"epoch": epoch, "loss": loss, "HR@10": hr, "NDCG@10": ndcg, "seconds": seconds}]
        if best is None or ndcg > best["NDCG@10"]:
            best = {"epoch": epoch, "HR@10": hr, "NDCG@10": ndcg}
            save_model(args, args.out, program, model, best, **contract)
        left = min(args.epochs, best["epoch"] + args.patience) - epoch
        report(args.out, log, left, began, "*" if best["epoch"] == epoch else "")
        if left == 0:
            break
        save_checkpoint(args.out, run, trained, best=best, log=log)
    complete(args.out)


# ---- Data: read, split by leave-one-out, pad -------------------------------------------------------------


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


def leave_one_out(starts):
    """`train_end` and `evaluated` [U]: user k trains on items[starts[k]:train_end[k]]; with 3 interactions or
    more, `evaluated`, the validation item stands at train_end[k], and the test item behind it.
    """
    evaluated = np.diff(starts) >= 3
    return starts[1:] - 2 * evaluated, evaluated


def training_part(path, starts, max_length, rng, judges=10_000):
    """What training reads: users [N] with two training items or more, of whom the last max_length + 1 are
    items[begin:end]; and the users that validation ranks, `judges` drawn ones where there are more.
    """
    train_end, evaluated = leave_one_out(starts)
    users = np.flatnonzero(train_end - starts[:-1] >= 2)  # two items make one pair of input and target
    judged = np.flatnonzero(evaluated)
    if len(users) == 0 or len(judged) == 0:
        sys.exit(f"{path}: no user has 3 interactions, or none has 2 to train on; take a larger log")
    if len(judged) > judges:
        judged = np.sort(rng.choice(judged, judges, replace=False))
    return users, np.maximum(starts[users], train_end[users] - max_length - 1), train_end[users], judged


def seen_in_training(user_ids, starts, items):
    """The training interactions as sorted numbers user * (V + 1) + item, each once; users are indices."""
    owner, base = np.repeat(np.arange(len(user_ids)), np.diff(starts)), items.max() + 1
    training = np.arange(len(items)) < leave_one_out(starts)[0][owner]
    seen = np.unique((owner * base + items)[training])
    full = np.bincount(seen // base) == base - 1
    if full.any():
        sys.exit(f"user {user_ids[full.argmax()]} has seen every item: none is left to draw; leave it out")
    return seen


def pad_batch(items, begin, end):
    """Histories `items[begin[k]:end[k]]` as rows, padded with 0 on the right: int64 tensor [B, T]."""
    rows = begin[:, None] + np.arange(max(1, (end - begin).max()))  # [B, T]
    inside = rows < end[:, None]
    return torch.from_numpy(np.where(inside, items[np.where(inside, rows, 0)], np.int64(0)))


def batches_of_like_length(length, batch_size, rng):
    """Shuffled batches of indices whose histories, of `length` [U], are about equally long: each 64 shuffled
    batches (a quarter of all, if less: epochs should differ) are sorted by length, for little padding.
    """
    order = rng.permutation(len(length))
    window = batch_size * max(1, min(64, len(length) // batch_size // 4))
    chunks = [order[k : k + window] for k in range(0, len(order), window)]
    order = np.concatenate([chunk[np.argsort(length[chunk], kind="stable")] for chunk in chunks])
    batches = np.array_split(order, math.ceil(len(order) / batch_size))
    return [batches[k] for k in rng.permutation(len(batches))]


# ---- Random numbers, and the processes of torchrun -------------------------------------------------------


def random_numbers(seed, epoch):
    """Those of an epoch, for what all processes draw alike; torch's own, for dropout, are not alike."""
    rng = np.random.default_rng([seed, epoch])
    torch.manual_seed(int(rng.integers(2**62)) + (share().start or 0))
    return rng


def join(args, rows, judged):
    """Join the processes that torchrun has started, if it has: each takes its share of each batch, and they
    add up their gradients. There are `rows` to make batches of, and `judged` users to validate on.
    """
    if "RANK" not in os.environ:
        return
    try:
        if args.device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.startswith("cuda") else "gloo")
    except (KeyError, ValueError, RuntimeError) as error:
        sys.exit(f"RANK is set, but torchrun's processes do not meet: {error}".splitlines()[0])
    if dist.get_world_size() > min(rows // math.ceil(rows / args.batch_size), judged):
        sys.exit(f"{dist.get_world_size()} processes are too many: some would get nothing of a batch")
    if dist.get_rank():
        sys.stdout = io.StringIO()  # one process prints


def share():
    """Which of a batch's rows are this process's: all, unless torchrun has started several."""
    return slice(dist.get_rank(), None, dist.get_world_size()) if dist.is_initialized() else slice(None)


def add_up(tensors):
    """Add up each of `tensors`, of one type, over all processes, in place; None stays None."""
    tensors = [tensor for tensor in tensors if tensor is not None]
    if dist.is_initialized() and tensors:
        total = torch.cat([tensor.flatten() for tensor in tensors])  # one message: each has to be waited for
        dist.all_reduce(total)
        for tensor, part in zip(tensors, total.split([x.numel() for x in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


# ---- Validation and files --------------------------------------------------------------------------------


def rank_of_target(scores, target, seen):
    """rho = 1 + #{better} + #{equal} / 2 of each row's target among the items not in `seen`; float64 [B].

    scores [B, V+1], overwritten; target [B]; seen [B, H], 0 for padding. By the halves, rho is
    what chance gives in the mean among items that are scored alike.
    """
    own = scores.gather(1, target[:, None])  # [B, 1]
    if not own.isfinite().all():  # nothing ranks above a NaN
        sys.exit("the model's scores are not finite; train it again with a lower --learning-rate")
    scores.scatter_(1, seen, -math.inf)[:, 0] = -math.inf
    scores.scatter_(1, target[:, None], own)
    better, equal = (scores > own).sum(1, dtype=torch.int32), (scores == own).sum(1, dtype=torch.int32)
    return 1 + better.double() + (equal.double() - 1) / 2


@torch.no_grad()
def validate(model, user_ids, starts, items, judged, max_length, device):
    """HR@10 and NDCG@10 of the validation items of users `judged`, ranked among all unseen items."""
    judged = judged[share()]
    ranks, begin, end = [], starts[judged], leave_one_out(starts)[0][judged]
    slices = math.ceil(max(len(end) * min(1, items.max() / 2**22), len(end) / 256))  # of 16 MiB of scores
    for chosen in np.array_split(np.argsort(end - begin), slices):
        b, e = begin[chosen], end[chosen]
        window = pad_batch(items, np.maximum(b, e - max_length), e).to(device)
        _, output, item_vectors = model(torch.from_numpy(user_ids[judged[chosen]]).to(device), window)
        last = output[torch.arange(len(e), device=device), (window > 0).sum(1) - 1]
        target, seen = torch.from_numpy(items[e]).to(device), pad_batch(items, b, e).to(device)
        ranks.append(rank_of_target(last @ item_vectors.T, target, seen).cpu())
    rank = torch.cat(ranks)
    hit = (rank <= 10).double()
    users, hr, ndcg = sums = torch.stack([torch.ones_like(hit), hit, hit / torch.log2(rank + 1)]).sum(1)
    add_up([sums])
    return (hr / users).item(), (ndcg / users).item()


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


def run_of(args):
    """What a run has in common with the one that it goes on from: its settings, data, code and versions."""
    files = {"data": sha256_of(args.data), "script": sha256_of(__file__), "number of processes": share().step}
    return vars(args) | files | {"resume": None, "torch": str(torch.__version__), "numpy": np.__version__}


def save_checkpoint(out, run, parts, **rest):
    """Write OUT.ckpt, from which --resume goes on: the states of `parts`, modules and optimizers, and `rest`,
    tensors and plain values.
    """
    buffer = io.BytesIO()
    torch.save({"run": run, "states": [part.state_dict() for part in parts], "rest": rest}, buffer)
    write(f"{out}.ckpt", buffer.getvalue())


def load_checkpoint(args, parts):
    """What `run_of` says now, and the `rest` of OUT.ckpt, whose states `parts` then have; without --resume
    {}. Ends where there is none, or another run's, and without --resume where a run has stopped.
    """
    path, run = Path(f"{args.out}.ckpt"), run_of(args)
    if path.exists() and not args.resume:
        sys.exit(f"{path}: a run stopped here; --resume it, or remove it")
    if not args.resume:
        return run, {}
    file = io.BytesIO(path.read_bytes())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(file, "cpu", weights_only=True)
        if other := [name for name in run if found["run"].get(name) != run[name]]:
            sys.exit(f"{path} cannot be resumed: it is of a run with another {', '.join(other)}")
        for part, state in zip(parts, found["states"], strict=True):
            part.load_state_dict(state)
        return run, found["rest"]
    except Exception:  # whatever unpickling meets in a file of another kind
        sys.exit(f"{path} cannot be resumed: it is damaged")


def complete(out):
    """Remove OUT.ckpt, when all processes have come to the end of the run."""
    if dist.is_initialized():
        dist.barrier()
    if not share().start:
        Path(f"{out}.ckpt").unlink(missing_ok=True)


def report(out, log, left, began, mark=""):
    """Print the last line of `log`, and how long the epochs `left` will take; write all to OUT.log.jsonl."""
    figures = "  ".join(f"{name} {value:.4f}" for name, value in log[-1].items() if isinstance(value, float))
    minutes = (time.time() - began) / len(log) * left / 60
    print(f"epoch {log[-1]['epoch']:3}  {figures}{mark}; {minutes:.1f} min left", flush=True)
    write(f"{out}.log.jsonl", "".join(json.dumps(line) + "\n" for line in log).encode())


# ---- The command line ------------------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """`--help`: the words at the top of this file as they stand, and each option's default."""


def refuse_numbers(parser, args):
    """End with one line if an option is a number that cannot be: below 0, a count of 0, a share above 1."""
    may_be_0 = "epochs", "negatives", "warm_up", "alpha_warm_up", "seed", "recommend"
    for name, value in vars(args).items():
        for x in value if isinstance(value, list) else [value]:
            low = type(x) in (int, float) and not x >= 0  # or NaN
            low |= type(x) is int and x == 0 and name not in may_be_0
            if low or (name in ("dropout", "gamma", "final_rate") and x is not None and x > 1):
                parser.error(f"--{name.replace('_', '-')} cannot be {x}")


def main(argv=None):
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("data", help="interactions, `user item` a row: .txt or .npy (data/README.md)")
    add("--out", required=True, help="model file to write, as runs/teacher.pt2; the log is OUT.log.jsonl")
    add("--dim", type=int, default=64, help="d: size of hidden states and item vectors")
    add("--blocks", type=int, default=2, help="L; from 4 blocks on, x + epsilon g(x), epsilon learned from 0")
    add("--heads", type=int, default=1, help="attention heads; must divide --dim")
    add("--max-length", type=int, default=50, help="n: most recent items that the model sees, from 2")
    add("--dropout", type=float, default=0.2, help="share of hidden units dropped in training")
    losses = "ce: of all items; bce: as first published; sampled: ce, estimated by k items"
    add("--loss", choices=LOSSES, default="ce", help=losses)
    add("--negatives", type=int, help="k: negatives; 1 with bce, 2048 with sampled if not given")
    add("--learning-rate", type=float, default=1e-3, help="of Adam, whose beta_2 is 0.98")
    add("--final-rate", type=float, default=1.0, help="share of --learning-rate at the end, reached evenly")
    add("--batch-size", type=int, default=128, help="users a step")
    add("--epochs", type=int, default=200, help="passes over all users, at most; 0 writes an untrained model")
    add("--patience", type=int, default=10, help="epochs without a better validation NDCG@10 to stop after")
    add("--resume", action="store_true", help="go on from OUT.ckpt, which a run that was stopped has left")
    add("--seed", type=int, default=0, help="same seed, data and machine: same file")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    refuse_numbers(parser, args)
    if args.dim % args.heads:
        parser.error("--heads must divide --dim")
    try:
        train(args)
    except OSError as error:  # a file that is not there, or a place that cannot be written
        sys.exit(f"{error.filename or args.out}: {error.strerror}")
    except KeyboardInterrupt:  # files are whole at any time
        more = ", --resume goes on after the last whole epoch" * Path(f"{args.out}.ckpt").exists()
        print(f"stopped{more}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
