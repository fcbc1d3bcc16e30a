"""Compare models on one data set: accuracy, size and speed, side by side.

Leave-one-out, full ranking over the items a user has not seen; a tie counts against the target by halves.
The sampled protocols are there to compare with papers alone: they rank models inconsistently (Krichene and
Rendle, "On Sampled Metrics for Item Recommendation", KDD 2020).

Reads   interactions, `user item` a row (data/README.md), and any model files (README.md, "The model file").
        A model file is code: load only files that you trust.
Writes  a table, or JSON, on standard output. The first model is the one that others are compared with.

    python evaluate.py data/ml-100k.txt runs/teacher.pt2 runs/student.pt2
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

MAX_ID = 10**8  # a table of vectors has a row for every id up to the largest
BATCH = 256  # users a batch when batches are timed


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


def read_titles(path):
    """Item id -> title from `<data>.items.tsv` (`id<TAB>title` a line); empty without such a file."""
    path = Path(f"{path}.items.tsv")
    if not path.exists():
        return {}
    rows = (line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return {int(row[0]): row[1] for row in rows if len(row) == 2 and row[0].isdecimal()}


# ---- Models ----------------------------------------------------------------------------------------------


def load_model(path, user_count, item_count, device):
    """The program in model file `path`, as a function of `users` [B] and `items` [B, T], and its config.

    Raises BadInput when the file is no model, or not one for ids up to `user_count` and `item_count`.
    """
    extra = {"config.json": ""}
    try:
        with open(path, "rb") as file:
            program = torch.export.load(file, extra_files=extra).module().to(device)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # whatever unpickling meets in a file of another kind
        raise BadInput(
            f"{path} is no model file as torch.export saves it; make one with a training script"
        ) from None
    try:
        config = json.loads(extra["config.json"])
        items, max_length = int(config["items"]), int(config["max_length"])
    except (ValueError, KeyError, TypeError):
        raise BadInput(
            f"{path} has no config.json with `items` and `max_length`; export it with both"
        ) from None
    if items != item_count:
        raise BadInput(
            f"{path} was made for {items:,} items, the data have {item_count:,}; give it its own data"
        )
    last_ids = torch.tensor([[user_count, item_count]], device=device)
    try:
        with torch.no_grad():
            _, output, item_vectors = program(last_ids[:, 0], last_ids[:, 1:])
    except (IndexError, RuntimeError):
        raise BadInput(f"{path} does not take user {user_count}; give it the data it was made from") from None
    if output.shape[:2] != (1, 1) or item_vectors.shape != (items + 1, output.shape[-1]):
        raise BadInput(
            f"{path}: output {list(output.shape)} and item vectors {list(item_vectors.shape)} do not fit"
        )
    if not item_vectors.isfinite().all():
        raise BadInput(f"{path}: item vectors are not finite; train it again with a lower learning rate")
    return program, config | {"max_length": max_length}


@torch.no_grad()
def score(program, users, windows):
    """Scores of all items after the last item of each history: [B, V+1].

    users [B], windows [B, T], right-padded.
    """
    _, output, item_vectors = program(users, windows)
    last = (windows > 0).sum(1) - 1
    return output[torch.arange(len(windows), device=windows.device), last] @ item_vectors.T


# ---- Accuracy --------------------------------------------------------------------------------------------


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


def draw_candidates(weight, taken, count, generator):
    """`count` different items a row, drawn in proportion to `weight`, none of them in `taken`: [B, count].

    weight [V+1]; taken [B, H], 0 for padding. Each item gets an exponential waiting time of rate `weight`:
    the first to come are a weighted sample without replacement. Raises BadInput where too few items are left.
    """
    waiting = torch.empty(len(taken), len(weight)).exponential_(generator=generator) / weight
    waiting.scatter_(1, taken, math.inf)
    waiting[:, 0] = math.inf
    time_of, drawn = waiting.topk(min(count, waiting.shape[1]), dim=1, largest=False)
    if drawn.shape[1] < count or time_of.isinf().any():
        raise BadInput(f"a user has fewer than {count} unseen items to draw; lower --negatives")
    return drawn


def rank_all(program, config, data, evaluated, end, args, device):
    """Rank of every evaluated user's target, `items[end]`, after the history before it: float64 [users].

    `data` is what `read_interactions` gives, `evaluated` [users] which users, `end` [users] where their
    histories end. With --protocol uniform or popularity, among the target and --negatives drawn items; the
    same for every model.
    """
    user_ids, starts, items = data
    begin = starts[evaluated]
    ranks = torch.empty(len(end), dtype=torch.float64)
    generator = torch.Generator().manual_seed(args.seed)
    weight = torch.ones(items.max() + 1)
    if args.protocol == "popularity":
        weight = torch.from_numpy(np.bincount(items, minlength=items.max() + 1)).float()
    order = np.argsort(end - begin, kind="stable")
    size = max(1, min(64, 2**22 // int(items.max())))  # users a slice: it should fit the cache
    for chosen in (order[k : k + size] for k in range(0, len(order), size)):
        b, e = begin[chosen], end[chosen]
        users = torch.from_numpy(user_ids[evaluated[chosen]]).to(device)
        windows = pad_batch(items, np.maximum(b, e - config["max_length"]), e).to(device)
        target = torch.from_numpy(items[e]).to(device)
        seen = pad_batch(items, b, e).to(device)
        scores = score(program, users, windows)
        if args.protocol != "full":
            taken = torch.cat([seen, target[:, None]], 1).cpu()
            drawn = draw_candidates(weight, taken, args.negatives, generator).to(device)
            kept = torch.cat([drawn, target[:, None]], 1)
            scores = torch.full_like(scores, -math.inf).scatter(1, kept, scores.gather(1, kept))
        if args.keep_seen or args.protocol != "full":
            seen = torch.zeros_like(seen[:, :1])
        ranks[torch.from_numpy(chosen)] = rank_of_target(scores, target, seen).cpu()
    return ranks.numpy()


def metrics(rank, k):
    """Each user's HR@k, NDCG@k and MRR@k from the `rank` of the target, 1 = best: three float64 [users]."""
    hit = (rank <= k).astype(np.float64)
    return hit, hit / np.log2(rank + 1), hit / rank


def bootstrap_interval(values, seed, resamples=1000):
    """95 % interval of the mean of `values` [users], by resampling users with replacement."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    return tuple(float(x) for x in np.quantile(means, [0.025, 0.975]))


def paired_p_value(values, reference):
    """Two-sided p-value of the paired t-test that both models' per-user values have the same mean."""
    return float(stats.ttest_rel(values, reference).pvalue) if (values != reference).any() else 1.0


# ---- Size and speed --------------------------------------------------------------------------------------


def count_parameters(program, user_count, item_count):
    """Number of parameters: all, and those outside tables with a row for each item or user."""
    tables = {item_count, item_count + 1, user_count, user_count + 1}
    sizes = [(p.numel(), bool(tables & set(p.shape))) for p in program.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, table in sizes if not table)


@torch.no_grad()
def count_multiply_adds(program, max_length, device):
    """Multiply-adds of the program for one history of `max_length` items, and of then scoring all items."""
    items = torch.ones(1, max_length, dtype=torch.int64, device=device)
    # the counter knows matrix products, not the fused attention: take that apart for counting
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, _, item_vectors = program(items[:, 0], items)
    return counter.get_total_flops() // 2, (item_vectors.shape[0] - 1) * item_vectors.shape[1]


def milliseconds(program, data, max_length, device, batch, repeats):
    """Median time to score all items for `batch` users, from histories to scores, over `repeats` batches.

    The users are spread evenly over the data, and alike for every model; one batch before is not counted.
    """
    user_ids, starts, items = data
    spread = np.linspace(0, len(user_ids) - 1, batch * (repeats + 1)).astype(int)
    times = []
    for chosen in np.random.default_rng(0).permutation(spread).reshape(repeats + 1, batch):
        end = starts[chosen + 1]
        users = torch.from_numpy(user_ids[chosen]).to(device)
        windows = pad_batch(items, np.maximum(starts[chosen], end - max_length), end).to(device)
        tick = time.perf_counter()
        score(program, users, windows)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - tick))
    return statistics.median(times[1:])


# ---- Reports ---------------------------------------------------------------------------------------------


def evaluate(args):
    """All figures of all models: a list of dictionaries, as printed by --json."""
    data = user_ids, starts, items = read_interactions(args.data)
    user_count, item_count = int(user_ids.max()), int(items.max())
    train_end, evaluated = leave_one_out(starts)
    evaluated = np.flatnonzero(evaluated)
    if len(evaluated) == 0:
        raise BadInput(f"{args.data}: no user has 3 interactions or more, so there is nothing to evaluate")
    end = train_end[evaluated] + (args.split == "test")
    loaded = [load_model(path, user_count, item_count, args.device) for path in args.models]
    sha = hashlib.sha256(Path(args.data).read_bytes()).hexdigest()
    reports, first = [], None
    for path, (program, config) in zip(args.models, loaded, strict=True):
        if config.get("data_sha256", sha) != sha:
            print(f"note: {path} was trained on other data than {args.data}", file=sys.stderr)
        rank = rank_all(program, config, data, evaluated, end, args, args.device)
        report = {"model": str(path), "stage": config.get("stage"), "users": len(rank), "split": args.split}
        for k in args.at:
            for name, values in zip(("HR", "NDCG", "MRR"), metrics(rank, k), strict=True):
                report[f"{name}@{k}"] = float(values.mean())
        ndcg = metrics(rank, 10)[1]
        first = ndcg if first is None else first
        report["NDCG@10_interval"] = bootstrap_interval(ndcg, args.seed)
        report["p_value"] = paired_p_value(ndcg, first)
        report["parameters"], report["parameters_without_embeddings"] = count_parameters(
            program, user_count, item_count
        )
        report["macs"], report["macs_item_scores"] = count_multiply_adds(
            program, config["max_length"], args.device
        )
        report["ms_per_user"] = milliseconds(program, data, config["max_length"], args.device, 1, 50)
        report["ms_per_1000_users"] = (
            milliseconds(program, data, config["max_length"], args.device, BATCH, 3) * 1000 / BATCH
        )
        reports.append(report)
    for report in reports:
        report["speed_up"] = reports[0]["ms_per_user"] / report["ms_per_user"]
    return reports


def print_table(reports, args):
    """The figures, a column a model."""
    protocol = {"full": "all items", "uniform": f"{args.negatives} uniform negatives"}
    protocol = protocol.get(args.protocol, f"{args.negatives} negatives by popularity")
    print(
        f"{args.data}: {args.split} items of {reports[0]['users']:,} users, ranked among {protocol}"
        f"{'' if args.keep_seen and args.protocol == 'full' else ', the history left out'}"
    )
    names = [Path(r["model"]).stem for r in reports]
    rows = [("", names)]
    rows += [
        (f"{m}@{k}", [f"{r[f'{m}@{k}']:.4f}" for r in reports])
        for m in ("HR", "NDCG", "MRR")
        for k in args.at
    ]
    rows += [
        ("NDCG@10, 95 % interval", ["{:.4f}-{:.4f}".format(*r["NDCG@10_interval"]) for r in reports]),
        ("p-value against first", ["-"] + [f"{r['p_value']:.2g}" for r in reports[1:]]),
        ("parameters", [f"{r['parameters']:,}" for r in reports]),
        ("  without embeddings", [f"{r['parameters_without_embeddings']:,}" for r in reports]),
        ("multiply-adds, one history", [f"{r['macs']:,}" for r in reports]),
        ("  and to score the items", [f"{r['macs_item_scores']:,}" for r in reports]),
        ("ms a user, one by one", [f"{r['ms_per_user']:.3f}" for r in reports]),
        (f"ms 1,000 users, {BATCH} a batch", [f"{r['ms_per_1000_users']:.1f}" for r in reports]),
        ("speed-up, one by one", [f"{r['speed_up']:.2f}x" for r in reports]),
    ]
    wide = [max(len(row[1][k]) for row in rows) for k in range(len(names))]
    for label, cells in rows:
        print(f"{label:29}", *(f"{cell:>{w}}" for cell, w in zip(cells, wide, strict=True)), sep="  ")


def recommend(args):
    """Print the last 10 items of user --recommend, and each model's 10 best after the whole history."""
    user_ids, starts, items = read_interactions(args.data)
    titles = read_titles(args.data)
    at = np.flatnonzero(user_ids == args.recommend)
    if len(at) == 0:
        raise BadInput(
            f"{args.data} has no user {args.recommend}; its ids go from {user_ids.min()} to {user_ids.max()}"
        )
    begin, end = starts[at], starts[at + 1]
    last_ids = int(user_ids.max()), int(items.max())
    loaded = [load_model(path, *last_ids, args.device) for path in args.models]
    print(f"user {args.recommend}: the last of {end[0] - begin[0]} items, oldest first")
    for item in items[max(begin[0], end[0] - 10) : end[0]]:
        print(f"    {item:>7}  {titles.get(int(item), '')}".rstrip())
    for path, (program, config) in zip(args.models, loaded, strict=True):
        window = pad_batch(items, np.maximum(begin, end - config["max_length"]), end).to(args.device)
        scores = score(program, torch.from_numpy(user_ids[at]).to(args.device), window)[0]
        scores[0] = -math.inf
        if not args.keep_seen:
            scores[torch.from_numpy(items[begin[0] : end[0]]).to(args.device)] = -math.inf
        best = scores.topk(min(10, len(scores)))
        print(f"{path} recommends")
        for value, item in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if value > -math.inf:
                print(f"    {item:>7}  {titles.get(item, '')}".rstrip())


def main(argv=None):
    """Read the command line, evaluate, print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Accuracy, size and speed of model files on one data set, side by side.",
        epilog="example: python evaluate.py data/ml-100k.txt runs/*.pt2",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("data", help="interactions, `user item` a row: .txt or .npy (data/README.md)")
    add(
        "models",
        nargs="+",
        help="model files; the first is what the others are compared with. Load only trusted ones",
    )
    add(
        "--at",
        type=number(int, 1),
        nargs="+",
        default=[5, 10, 20],
        metavar="K",
        help="cut-offs of HR, NDCG and MRR",
    )
    add(
        "--split",
        choices=["test", "valid"],
        default="test",
        help="the last item of each user, or the one before it",
    )
    add(
        "--protocol",
        choices=["full", "uniform", "popularity"],
        default="full",
        help="rank among all items, or among drawn ones",
    )
    add(
        "--negatives",
        type=number(int, 1),
        default=100,
        help="items drawn a user by --protocol uniform or popularity",
    )
    add("--keep-seen", action="store_true", help="also rank items that are in the history (full ranking)")
    add("--seed", type=number(int, 0), default=0, help="of drawn negatives and of the bootstrap")
    add("--json", action="store_true", help="print a list with an object a model instead of the table")
    add(
        "--recommend",
        type=int,
        metavar="USER",
        help="print what each model recommends to this user, and stop",
    )
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
        if args.recommend is not None:
            recommend(args)
        else:
            reports = evaluate(args)
            print(json.dumps(reports, indent=2)) if args.json else print_table(reports, args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except BadInput as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
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
