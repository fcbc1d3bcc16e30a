"""Compare models on one data set: accuracy, size and speed, side by side.

Leave-one-out, full ranking over the items a user has not seen; a tie counts against the target by halves.
The sampled protocols are there to compare with papers alone: they rank models inconsistently (Krichene and
Rendle, "On Sampled Metrics for Item Recommendation", KDD 2020).

Reads   interactions, `user item` a row (data/README.md), and any model files (README.md, "The model file").
        A model file is code: load only files that you trust.
Writes  a table, or JSON, on standard output, and --ranks. The first model is what others are compared with.

Shapes  B users, T positions, V items, item 0 padding, e features of an output.

    python evaluate.py data/ml-100k.txt runs/teacher.pt2 runs/student.pt2
"""

import argparse
import hashlib
import io
import json
import logging
import math
import re
import sys
import time
import warnings
import zipfile
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from scipy import stats
from torch.fx.node import map_aggregate
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BATCH = 256  # users a batch when batches are timed

# ---- Accuracy --------------------------------------------------------------------------------------------


@torch.no_grad()
def score(model, users, windows):
    """Scores [B, V+1] of all items after the last item of each history; users [B], windows [B, T]."""
    _, output, item_vectors = model(users, windows)
    last = (windows > 0).sum(1) - 1
    return output[torch.arange(len(windows), device=windows.device), last] @ item_vectors.T


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


def draw_candidates(weight, taken, count, generator):
    """`count` different items a row, drawn in proportion to `weight`, none of them in `taken`: [B, count].

    weight [V+1]; taken [B, H], 0 for padding. Each item gets an exponential waiting time of rate `weight`:
    the first to come are a weighted sample without replacement. Ends where too few items are left.
    """
    waiting = torch.empty(len(taken), len(weight)).exponential_(generator=generator) / weight
    waiting.scatter_(1, taken, math.inf)
    waiting[:, 0] = math.inf
    time_of, drawn = waiting.topk(min(count, waiting.shape[1]), dim=1, largest=False)
    if drawn.shape[1] < count or time_of.isinf().any():
        sys.exit(f"a user has fewer than {count} unseen items to draw; lower --negatives")
    return drawn


def rank_all(model, max_length, data, inputs, evaluated, end, args):
    """Rank of every evaluated user's target, `items[end]`, after the history before it: float64 [users].

    `data` is what `read_interactions` gives, and `inputs` what the model reads: the same, or histories that
    begin otherwise; `evaluated` [users] which users, `end` [users] where their histories end. With --protocol
    uniform or popularity, among the target and --negatives drawn items, which are the same for every model.
    """
    user_ids, starts, items = data
    begin, ranks = starts[evaluated], np.empty(len(end))
    first, after = inputs[1][evaluated], inputs[1][evaluated + 1] - (starts[evaluated + 1] - end)
    generator, counts = torch.Generator().manual_seed(args.seed), np.bincount(items)
    weight = torch.from_numpy(counts if args.protocol == "popularity" else np.ones(len(counts))).float()
    order = np.argsort(end - begin, kind="stable")
    size = max(1, min(64, 2**22 // len(counts)))  # users a slice: it should fit the cache
    for chosen in (order[k : k + size] for k in range(0, len(order), size)):
        b, e = begin[chosen], end[chosen]
        users = torch.from_numpy(user_ids[evaluated[chosen]]).to(args.device)
        window = np.maximum(first[chosen], after[chosen] - max_length), after[chosen]
        scores = score(model, users, pad_batch(inputs[2], *window).to(args.device))
        target, seen = torch.from_numpy(items[e]).to(args.device), pad_batch(items, b, e).to(args.device)
        if args.protocol != "full":
            taken = torch.cat([seen, target[:, None]], 1).cpu()
            drawn = draw_candidates(weight, taken, args.negatives, generator).to(args.device)
            kept = torch.cat([drawn, target[:, None]], 1)
            scores = torch.full_like(scores, -math.inf).scatter(1, kept, scores.gather(1, kept))
        if args.keep_seen or args.protocol != "full":
            seen = torch.zeros_like(seen[:, :1])
        ranks[chosen] = rank_of_target(scores, target, seen).cpu()
    return ranks


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


def count_parameters(model, user_count, item_count):
    """Number of parameters: all, and those outside tables with a row for each item or user."""
    tables = {item_count, item_count + 1, user_count, user_count + 1}
    outside = [p.numel() for p in model.parameters() if not tables & set(p.shape)]
    return sum(p.numel() for p in model.parameters()), sum(outside)


@torch.no_grad()
def count_multiply_adds(model, max_length, device):
    """Multiply-adds of the model for one history of `max_length` items, and of then scoring all items."""
    items = torch.ones(1, max_length, dtype=torch.int64, device=device)
    # the counter knows matrix products, not the fused attention: take that apart for counting
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, _, item_vectors = model(items[:, 0], items)
    return counter.get_total_flops() // 2, item_vectors[1:].numel()


def milliseconds(model, data, max_length, device, batch, repeats):
    """Median time to score all items for `batch` users, from histories to scores, over `repeats` batches.

    The users are spread evenly over the data, and alike for every model; one batch before is not counted.
    """
    user_ids, starts, items = data
    spread, times = np.linspace(0, len(user_ids) - 1, batch * (repeats + 1)).astype(int), []
    for chosen in np.random.default_rng(0).permutation(spread).reshape(repeats + 1, batch):
        end = starts[chosen + 1]
        users = torch.from_numpy(user_ids[chosen]).to(device)
        windows = pad_batch(items, np.maximum(starts[chosen], end - max_length), end).to(device)
        tick = time.perf_counter()
        score(model, users, windows)[0, 0].item()  # a number to wait for, where there is another device
        times.append(1000 * (time.perf_counter() - tick))
    return float(np.median(times[1:]))


# ---- Reports ---------------------------------------------------------------------------------------------


def evaluate(args):
    """All figures of all models: a list of dictionaries, as printed by --json."""
    data = user_ids, starts, items = read_interactions(args.data)
    last_ids = int(user_ids.max()), int(items.max())
    train_end, evaluated = leave_one_out(starts)
    evaluated = np.flatnonzero(evaluated)
    if len(evaluated) == 0:
        sys.exit(f"{args.data}: no user has 3 interactions or more, so there is nothing to evaluate")
    if args.users and args.users < len(evaluated):
        drawn = np.random.default_rng(args.seed).choice(len(evaluated), args.users, replace=False)
        evaluated = evaluated[np.sort(drawn)]
    end = train_end[evaluated] + (args.split == "test")
    inputs = data
    if args.inputs:  # they have to end with the items of `data`
        inputs = read_interactions(args.inputs)
        same = np.array_equal(inputs[0], user_ids) and (np.diff(inputs[1]) >= np.diff(starts)).all()
        place = np.arange(len(items)) + np.repeat(inputs[1][1:] - starts[1:], np.diff(starts)) if same else []
        if not same or (inputs[2][place] != items).any() or inputs[2].max() > last_ids[1]:
            sys.exit(f"{args.inputs}: not the histories of {args.data}, with or without more before them")
    reports, ranks = [], []
    for path, (program, config) in [(path, load_model(path, *last_ids)) for path in args.models]:
        if config.get("data_sha256", sha256_of(args.data)) != sha256_of(args.data):
            print(f"note: {path} was trained on other data than {args.data}", file=sys.stderr)
        model, max_length = module_of(program, args.device), config["max_length"]
        ranks.append(rank := rank_all(model, max_length, data, inputs, evaluated, end, args))
        report = {"model": str(path), "stage": config.get("stage"), "users": len(rank), "split": args.split}
        for k in args.at:
            for name, values in zip(("HR", "NDCG", "MRR"), metrics(rank, k), strict=True):
                report[f"{name}@{k}"] = float(values.mean())
        ndcg, first = (metrics(ranks[n], 10)[1] for n in (-1, 0))
        report["NDCG@10_interval"] = bootstrap_interval(ndcg, args.seed)
        report["p_value"] = paired_p_value(ndcg, first)
        report["parameters"], report["parameters_without_embeddings"] = count_parameters(model, *last_ids)
        report["macs"], report["macs_item_scores"] = count_multiply_adds(model, max_length, args.device)
        report["ms_per_user"] = milliseconds(model, data, max_length, args.device, 1, 50)
        a_batch = milliseconds(model, data, max_length, args.device, BATCH, 3)
        reports.append(report | {"ms_per_1000_users": a_batch * 1000 / BATCH})
        reports[-1]["speed_up"] = reports[0]["ms_per_user"] / report["ms_per_user"]
    if args.ranks:
        np.save(args.ranks, np.stack(ranks, 1))
    return reports


def print_table(reports, args):
    """The figures, a column a model."""
    among = "all items" if args.protocol == "full" else f"{args.negatives} {args.protocol} negatives"
    unseen = "" if args.keep_seen and args.protocol == "full" else ", the history left out"
    print(f"{args.data}: {args.split} items of {reports[0]['users']:,} users, ranked among {among}{unseen}")
    rows = [("", "{name}")]
    rows += [(f"{name}@{k}", f"{{{name}@{k}:.4f}}") for name in ("HR", "NDCG", "MRR") for k in args.at]
    rows += [
        ("NDCG@10, 95 % interval", "{NDCG@10_interval[0]:.4f}-{NDCG@10_interval[1]:.4f}"),
        ("p-value against first", "{p_value:.2g}"),
        ("parameters", "{parameters:,}"),
        ("  without embeddings", "{parameters_without_embeddings:,}"),
        ("multiply-adds, one history", "{macs:,}"),
        ("  and to score the items", "{macs_item_scores:,}"),
        ("ms a user, one by one", "{ms_per_user:.3f}"),
        (f"ms 1,000 users, {BATCH} a batch", "{ms_per_1000_users:.1f}"),
        ("speed-up, one by one", "{speed_up:.2f}x"),
    ]
    columns = [[cell.format(name=Path(r["model"]).stem, **r) for _, cell in rows] for r in reports]
    for (label, _), *cells in zip(rows, *columns, strict=True):
        wide = (f"{cell:>{max(map(len, column))}}" for cell, column in zip(cells, columns, strict=True))
        print(f"{label:29}", *wide, sep="  ")


def recommend(args):
    """Print the last 10 items of user --recommend, and each model's 10 best after the whole history."""
    user_ids, starts, items = read_interactions(args.data)
    loaded = [load_model(path, int(user_ids.max()), int(items.max())) for path in args.models]
    names, titles = Path(f"{args.data}.items.tsv"), {}  # a line an item: id, tab, title
    if names.exists():
        titles = dict(line.split("\t", 1) for line in names.read_text(encoding="utf-8").splitlines())
    at = np.flatnonzero(user_ids == args.recommend)
    if len(at) == 0:
        sys.exit(f"{args.data} has no user {args.recommend}; take one from 1 to {user_ids.max()}")
    history = torch.tensor(items[starts[at[0]] : starts[at[0] + 1]])
    tables = {f"user {args.recommend}: the last of {len(history)} items, oldest first": history[-10:]}
    for path, (program, config) in zip(args.models, loaded, strict=True):
        window, users = history[None, -config["max_length"] :], torch.from_numpy(user_ids[at])
        scores = score(program.module(), users, window)[0]
        scores[torch.zeros(1, dtype=int) if args.keep_seen else history] = scores[0] = -math.inf
        tables[f"{path} recommends"] = scores.topk(min(10, int(scores.isfinite().sum()))).indices
    for title, table in tables.items():
        lines = (f"    {item:>7}  {titles.get(str(item), '')}".rstrip() for item in table.tolist())
        print(title, *lines, sep="\n")


# ---- Data and models -------------------------------------------------------------------------------------


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


def pad_batch(items, begin, end):
    """Histories `items[begin[k]:end[k]]` as rows, padded with 0 on the right: int64 tensor [B, T]."""
    rows = begin[:, None] + np.arange(max(1, (end - begin).max()))  # [B, T]
    inside = rows < end[:, None]
    return torch.from_numpy(np.where(inside, items[np.where(inside, rows, 0)], np.int64(0)))


def sha256_of(path):
    """SHA-256 of a file, in hexadecimal: a model file names the data it was trained on by it."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load_model(path, user_count, item_count, data=None, max_length=1, layers=0):
    """Program, and config with `layers` L and `dim` d of its hidden states, of a model file; ends unless it
    takes ids up to these counts, was trained on `data`, if given, and has this length and layers or more.
    """
    logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # of a bad file it would log a traceback
    file, extra = io.BytesIO(Path(path).read_bytes()), {"config.json": ""}
    try:
        if damaged := zipfile.ZipFile(file).testzip():
            raise ValueError(f"{damaged} in it is damaged")
        file.seek(0)
        program = torch.export.load(file, extra_files=extra)
        config = json.loads(extra["config.json"])
        hidden, output, vectors = program.module()(torch.tensor([user_count]), torch.tensor([[item_count]]))
        found = config["items"], *vectors.shape, *hidden.shape[1:3]
        if found != (item_count, item_count + 1, output.shape[2], 1, 1):
            raise ValueError(f"it is for {config['items']} items, the data have {item_count}")
        if config["max_length"] < max_length or len(hidden) <= layers:
            raise ValueError(f"it must read {max_length} items and have {layers} layers or more")
        if data and config.get("data_sha256", sha256_of(data)) != sha256_of(data):
            raise ValueError("it was trained on other data and may know their test items")
    except Exception as error:  # whatever unpickling meets in a file of another kind
        sys.exit(f"{path} is no model file for these data; {type(error).__name__}: {error}".splitlines()[0])
    return program, config | {"layers": len(hidden) - 1, "dim": hidden.shape[3]}


def module_of(program, device):
    """The module of a loaded program, on `device`, where it then makes its constants, too."""
    module = program.module().to(device)

    def there(x):
        return torch.device(device) if isinstance(x, torch.device) else x

    for part in module.modules():
        vars(part).update({k: x.to(device) for k, x in vars(part).items() if isinstance(x, torch.Tensor)})
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.args, node.kwargs = map_aggregate(node.args, there), map_aggregate(node.kwargs, there)
            part.recompile()
    return module


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
    """Read the command line, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("data", help="interactions, `user item` a row: .txt or .npy (data/README.md)")
    add("models", nargs="+", help="model files, compared with the first. Load only trusted ones")
    add("--at", type=int, nargs="+", default=[5, 10, 20], metavar="K", help="cut-offs of HR, NDCG and MRR")
    add("--split", choices=["test", "valid"], default="test", help="each user's last item, or that before it")
    add("--protocol", choices=["full", "uniform", "popularity"], default="full", help="among which items")
    add("--negatives", type=int, default=100, help="items drawn a user by --protocol uniform or popularity")
    add("--keep-seen", action="store_true", help="also rank items that are in the history (full ranking)")
    add("--inputs", help="histories for the models to read, that begin otherwise (related/asrep.py)")
    add("--seed", type=int, default=0, help="of drawn negatives and users, and of the bootstrap")
    add("--users", type=int, help="judge so many, drawn ones, where there are more")
    add("--ranks", help="also write the rank of each user's item, [users, models], to this .npy file")
    add("--json", action="store_true", help="print a list with an object a model instead of the table")
    add("--recommend", type=int, metavar="USER", help="print what each model recommends to this user")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    refuse_numbers(parser, args)
    if args.negatives < 1:
        parser.error("--negatives must be 1 or more")
    try:
        if args.recommend is not None:
            recommend(args)
        elif args.json:
            print(json.dumps(evaluate(args), indent=2))
        else:
            print_table(evaluate(args), args)
    except OSError as error:  # a file that is not there
        sys.exit(f"{error.filename or args.ranks}: {error.strerror}")


if __name__ == "__main__":
    main()
