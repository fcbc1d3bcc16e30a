"""Compare models on one data set: accuracy, size and speed, side by side.

Accuracy is leave-one-out, with full ranking over the items that a user has not seen. A tie counts half. The
sampled protocols serve only to compare with papers: they rank models inconsistently (Krichene and Rendle,
"On Sampled Metrics for Item Recommendation", KDD 2020).

Reads   interactions, `user item` a row (data/README.md), and model files (README.md, "The model file"). A
        model file is code: load only files that you trust.
Writes  a table, or JSON, on standard output. The other models are compared with the first one.
Shapes  B users, T positions, V items, e features of an output. Item 0 is padding.

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
from collections import namedtuple
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch.export.passes import move_to_device_pass
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BATCH = 256  # users a batch, where batches are timed

# ---- Accuracy --------------------------------------------------------------------------------------------

# Each user's value from the rank of the target, 1 for the best: float64 [users]. An entry here is all that a
# new metric needs.
METRICS = {
    "HR": lambda rank, k: (rank <= k).astype(float),
    "NDCG": lambda rank, k: (rank <= k) / np.log2(rank + 1),
    "MRR": lambda rank, k: (rank <= k) / rank,
}


def rank_of_target(scores, target, seen):
    """rho = 1 + #{better} + #{equal} / 2 of each row's target, among the items not in `seen`: float64 [B].

    scores [B, V+1] are overwritten; target [B]; seen [B, H], 0 for padding. A tie counts half: this is the
    expected rank under random tie-breaking.
    """
    target_score = scores.gather(1, target[:, None])  # [B, 1]
    if not target_score.isfinite().all():  # nothing would rank above a NaN
        sys.exit("the scores of the model are not finite; train it again with a lower --learning-rate")
    scores.scatter_(1, seen, -math.inf)[:, 0] = -math.inf
    scores.scatter_(1, target[:, None], target_score)
    better = (scores > target_score).sum(1, dtype=torch.int32)
    equal = (scores == target_score).sum(1, dtype=torch.int32)  # the target itself is one of them
    return 1 + better.double() + (equal.double() - 1) / 2


def last_output(output, items):
    """The output [B, e] after the last item of each history; output [B, T, e], items [B, T]."""
    return output[torch.arange(len(items), device=items.device), (items > 0).sum(1) - 1]


@torch.no_grad()
def score(model, users, items):
    """Scores [B, V+1] of all items after the last item of each history; users [B], items [B, T]."""
    _, output, item_vectors = model(users, items)
    return last_output(output, items) @ item_vectors.T


def draw_candidates(weight, taken, count, generator):
    """`count` different items a row, drawn in proportion to `weight` [V+1], none of `taken`: [B, count].

    taken [B, H], 0 for padding. Each item gets an exponential waiting time of rate `weight`. The first items
    to come are a weighted sample without replacement.
    """
    waiting = torch.empty(len(taken), len(weight)).exponential_(generator=generator) / weight
    waiting.scatter_(1, taken, math.inf)[:, 0] = math.inf
    arrival, drawn = waiting.topk(min(count, waiting.shape[1]), dim=1, largest=False)
    if drawn.shape[1] < count or arrival.isinf().any():
        sys.exit(f"a user has fewer than {count} unseen items to draw; lower --negatives")
    return drawn


def rank_all(model, max_length, data, inputs, users, end, args):
    """The rank of the target items[end] of each of `users`, after the history before it: float64 [users].

    users are indices into data.user_ids. The model reads `inputs`: Interactions like `data`, or with more
    items before each history. With --protocol uniform or popularity, the rank is among the target and
    --negatives drawn items, the same for every model.
    """
    begin, ranks = data.starts[users], np.empty(len(users))
    first, after = inputs.starts[users], inputs.starts[users + 1] - (data.starts[users + 1] - end)
    generator, counts = torch.Generator().manual_seed(args.seed), np.bincount(data.items)
    weight = torch.from_numpy(counts if args.protocol == "popularity" else np.ones(len(counts))).float()
    order = np.argsort(end - begin, kind="stable")
    rows = max(1, min(64, 2**22 // len(counts)))  # users a slice: it should fit the cache
    for part in (order[n : n + rows] for n in range(0, len(order), rows)):
        b, e = begin[part], end[part]
        ids = torch.from_numpy(data.user_ids[users[part]]).to(args.device)
        window = pad_batch(inputs.items, np.maximum(first[part], after[part] - max_length), after[part])
        scores = score(model, ids, window.to(args.device))
        target, seen = (
            torch.from_numpy(data.items[e]).to(args.device),
            pad_batch(data.items, b, e).to(args.device),
        )
        if args.protocol != "full":
            taken = torch.cat([seen, target[:, None]], 1).cpu()
            drawn = draw_candidates(weight, taken, args.negatives, generator).to(args.device)
            kept = torch.cat([drawn, target[:, None]], 1)
            scores = torch.full_like(scores, -math.inf).scatter(1, kept, scores.gather(1, kept))
        if args.keep_seen or args.protocol != "full":
            seen = torch.zeros_like(seen[:, :1])
        ranks[part] = rank_of_target(scores, target, seen).cpu()
    return ranks


def bootstrap_interval(values, seed, resamples=1000):
    """95 % interval of the mean of `values` [users], by resampling users with replacement."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    return tuple(float(x) for x in np.quantile(means, [0.025, 0.975]))


def paired_p_value(values, reference):
    """Two-sided p-value of the paired t-test that both models have the same mean; both [users]."""
    return float(stats.ttest_rel(values, reference).pvalue) if (values != reference).any() else 1.0


# ---- Size and speed --------------------------------------------------------------------------------------


def count_parameters(model, num_users, num_items):
    """Number of parameters: all, and those outside of tables with a row for each item or user."""
    tables = {num_items, num_items + 1, num_users, num_users + 1}
    outside = [p.numel() for p in model.parameters() if not tables & set(p.shape)]
    return sum(p.numel() for p in model.parameters()), sum(outside)


@torch.no_grad()
def count_multiply_adds(model, max_length, device):
    """Multiply-adds of the model for one history of `max_length` items, and of scoring all items after it."""
    items = torch.ones(1, max_length, dtype=torch.int64, device=device)
    # the counter knows matrix products but not the fused attention, so that is taken apart here
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, _, item_vectors = model(items[:, 0], items)
    return counter.get_total_flops() // 2, item_vectors[1:].numel()


def milliseconds(model, data, max_length, device, batch_size, repeats):
    """Median time to score all items for `batch_size` users, from histories to scores, over `repeats`.

    The users are spread evenly over the data, the same for every model. The first batch is not counted.
    """
    spread, times = np.linspace(0, len(data.user_ids) - 1, batch_size * (repeats + 1)).astype(int), []
    for users in np.random.default_rng(0).permutation(spread).reshape(repeats + 1, batch_size):
        end = data.starts[users + 1]
        window = pad_batch(data.items, np.maximum(data.starts[users], end - max_length), end).to(device)
        ids, start = torch.from_numpy(data.user_ids[users]).to(device), time.perf_counter()
        score(model, ids, window)[0, 0].item()  # .item() waits for a GPU
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times[1:]))


# ---- Reports ---------------------------------------------------------------------------------------------


def evaluate(args):
    """All figures of all models: a list of dictionaries, as --json prints them."""
    data = inputs = read_interactions(args.data)
    users = np.flatnonzero(data.evaluated)
    if len(users) == 0:
        sys.exit(f"{args.data}: no user has 3 interactions or more, so there is nothing to evaluate")
    if args.users and args.users < len(users):
        users = np.sort(np.random.default_rng(args.seed).choice(users, args.users, replace=False))
    end = data.train_end[users] + (args.split == "test")
    if args.inputs:  # its histories must end with those of `data`
        inputs = read_interactions(args.inputs)
        lengths, same = np.diff(data.starts), np.array_equal(inputs.user_ids, data.user_ids)
        if same and (np.diff(inputs.starts) >= lengths).all() and inputs.items.max() <= data.items.max():
            places = np.arange(len(data.items)) + np.repeat(inputs.starts[1:] - data.starts[1:], lengths)
            same = np.array_equal(inputs.items[places], data.items)
        else:
            same = False
        if not same:
            sys.exit(f"{args.inputs}: not the histories of {args.data}, with or without more before them")
    reports, ranks = [], []
    for path, (model, config) in [(path, load_model(path, data, args.device, True)) for path in args.models]:
        if config.get("data_sha256", data.sha256) != data.sha256:
            print(f"note: {path} was trained on other data than {args.data}", file=sys.stderr)
        ranks.append(rank_all(model, config["max_length"], data, inputs, users, end, args))
        report = {"model": str(path), "stage": config.get("stage"), "users": len(users), "split": args.split}
        for name, k in product(METRICS, args.at):
            of_model, of_first = (METRICS[name](rank, k) for rank in (ranks[-1], ranks[0]))
            report[f"{name}@{k}"] = float(of_model.mean())
            report[f"{name}@{k}_p_value"] = paired_p_value(of_model, of_first)
        ndcg, of_first = (METRICS["NDCG"](rank, 10) for rank in (ranks[-1], ranks[0]))
        report["NDCG@10_interval"] = bootstrap_interval(ndcg, args.seed)
        report["p_value"] = paired_p_value(ndcg, of_first)
        sizes = count_parameters(model, data.user_ids.max(), data.items.max())
        report["parameters"], report["parameters_without_embeddings"] = sizes
        report["macs"], report["macs_item_scores"] = count_multiply_adds(
            model, config["max_length"], args.device
        )
        timed = data, config["max_length"], args.device
        report["ms_per_user"] = milliseconds(model, *timed, 1, 50)
        report["ms_per_1000_users"] = milliseconds(model, *timed, BATCH, 3) * 1000 / BATCH
        reports.append(report)
        report["speed_up"] = reports[0]["ms_per_user"] / report["ms_per_user"]
    if args.ranks:
        np.save(args.ranks, np.stack(ranks, 1))
    return reports


def print_table(reports, args):
    """The figures, a column a model."""
    among = "all items" if args.protocol == "full" else f"{args.negatives} {args.protocol} negatives"
    unseen = "" if args.keep_seen and args.protocol == "full" else ", the history left out"
    print(f"{args.data}: {args.split} items of {reports[0]['users']:,} users, ranked among {among}{unseen}")
    rows = [("", "{name}")]
    rows += [(f"{name}@{k}", f"{{{name}@{k}:.4f}}") for name in METRICS for k in args.at]
    rows += [
        ("NDCG@10, 95 % interval", "{NDCG@10_interval[0]:.4f}-{NDCG@10_interval[1]:.4f}"),
        ("p-value against the first", "{p_value:.2g}"),
        ("parameters", "{parameters:,}"),
        ("  without embeddings", "{parameters_without_embeddings:,}"),
        ("multiply-adds, one history", "{macs:,}"),
        ("  and to score the items", "{macs_item_scores:,}"),
        ("ms, one request", "{ms_per_user:.3f}"),
        (f"ms, 1,000 users, {BATCH} a batch", "{ms_per_1000_users:.1f}"),
        ("speed-up, one request", "{speed_up:.2f}x"),
    ]
    columns = [[cell.format(name=Path(r["model"]).stem, **r) for _, cell in rows] for r in reports]
    for (label, _), *cells in zip(rows, *columns, strict=True):
        padded = (f"{cell:>{max(map(len, column))}}" for cell, column in zip(cells, columns, strict=True))
        print(f"{label:29}", *padded, sep="  ")


def recommend(args):
    """Print the last 10 items of user --recommend, and each model's 10 best items after the whole history."""
    data, titles = read_interactions(args.data), {}
    models = [load_model(path, data, "cpu", True) for path in args.models]
    names = Path(f"{args.data}.items.tsv")  # a line an item: id, tab, title
    if names.exists():
        titles = dict(line.split("\t", 1) for line in names.read_text(encoding="utf-8").splitlines())
    user = np.flatnonzero(data.user_ids == args.recommend)
    if len(user) == 0:
        sys.exit(f"{args.data} has no user {args.recommend}; take one from 1 to {data.user_ids.max()}")
    history = torch.tensor(data.items[data.starts[user[0]] : data.starts[user[0] + 1]])
    tables = {f"user {args.recommend}: the last of {len(history)} items, oldest first": history[-10:]}
    for path, (model, config) in zip(args.models, models, strict=True):
        scores = score(model, torch.from_numpy(data.user_ids[user]), history[None, -config["max_length"] :])[
            0
        ]
        scores[torch.zeros(1, dtype=int) if args.keep_seen else history] = scores[0] = -math.inf
        tables[f"{path} recommends"] = scores.topk(min(10, int(scores.isfinite().sum()))).indices
    for title, items in tables.items():
        lines = (f"    {item:>7}  {titles.get(str(item), '')}".rstrip() for item in items.tolist())
        print(title, *lines, sep="\n")


# ---- Data and models -------------------------------------------------------------------------------------

# The history of user_ids[u] is items[starts[u]:starts[u + 1]], oldest first. Leave-one-out: user u trains on
# items[starts[u]:train_end[u]]. A user with 3 interactions or more is `evaluated`: the validation item stands
# at train_end[u], the test item behind it. `sha256` is the checksum of the table.
Interactions = namedtuple("Interactions", "path sha256 user_ids starts items train_end evaluated")


def read_interactions(path):
    """Read a data file: `user item` a row, a user's rows together and in time order (data/README.md).

    Returns Interactions, with users in the order of the file. Ids go from 1 to 99,999,999.
    """
    is_text = not str(path).endswith(".npy")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of an empty file
            table = np.loadtxt(file, int, comments=None, ndmin=2) if is_text else np.load(path, mmap_mode="r")
        users, items = table.T
        if table.dtype.kind not in "iu" or not 0 < table.min() <= table.max() < 10**8:
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
    items, evaluated = items.astype(int, copy=is_text), np.diff(starts) >= 3
    return Interactions(path, sha256, user_ids, starts, items, starts[1:] - 2 * evaluated, evaluated)


def pad_batch(items, begin, end):
    """Histories items[begin[b]:end[b]] as rows, padded with 0 on the right: int64 tensor [B, T]."""
    places = begin[:, None] + np.arange(max(1, (end - begin).max()))  # [B, T]
    inside = places < end[:, None]
    return torch.from_numpy(np.where(inside, items[np.where(inside, places, 0)], np.int64(0)))


def with_dropout(module, on):
    """`.train()` or `.eval()` for the module of a loaded program, which has neither. Returns `module`.

    Dropout stands in the graph as dropout(x, p, on). A GRU or an LSTM has the same two arguments. BatchNorm
    stays as it was exported.
    """
    aten = torch.ops.aten
    place = {aten.dropout.default: 2, aten.gru.input: 6, aten.lstm.input: 6}  # of `on` among the arguments
    for node in module.graph.nodes:
        if node.target in place:
            node.update_arg(place[node.target], on)
    module.recompile()
    return module


def load_model(path, data, device, any_data=False):
    """The module of a model file on `device`, with dropout off, and its config.

    The config also gets `layers`, L, and `dim`, d, of the hidden states. Ends if the model is for other items
    or users than `data`, or was trained on other data, unless `any_data`.
    """
    logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # it logs a traceback for a bad file
    file, extra, num_items = io.BytesIO(Path(path).read_bytes()), {"config.json": ""}, data.items.max()
    try:
        if damaged := zipfile.ZipFile(file).testzip():
            raise ValueError(f"{damaged} in it is damaged")
        file.seek(0)
        program = torch.export.load(file, extra_files=extra)
        with_dropout(program.graph_module, False)
        config = json.loads(extra["config.json"])
        example = torch.tensor([data.user_ids.max()]), torch.tensor([[num_items]])
        hidden, output, vectors = program.module()(*example)
        shapes = config["items"], *vectors.shape, *hidden.shape[1:3]
        if shapes != (num_items, num_items + 1, output.shape[2], 1, 1) or config["max_length"] < 1:
            raise ValueError(f"it is for {config['items']} items, the data have {num_items}")
        if not any_data and config.get("data_sha256", data.sha256) != data.sha256:
            raise ValueError("it was trained on other data and may know their test items")
        module = move_to_device_pass(program, device).module()
    except Exception as error:  # whatever unpickling meets in another file
        sys.exit(f"{path} is no model file for these data; {type(error).__name__}: {error}".splitlines()[0])
    return module, config | {"layers": len(hidden) - 1, "dim": hidden.shape[3]}


# ---- The command line ------------------------------------------------------------------------------------

# --help shows the text at the top of this file as it stands, and the default of each option
Help = type("Help", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {})


def number(kind, low, high=math.inf):
    """The `type` of an option: a number of `kind`, int or float, from `low` to `high`."""

    def convert(text):
        if not low <= kind(text) <= high:  # nor is NaN
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return kind(text)

    convert.__name__ = kind.__name__
    return convert


def main(argv=None):
    """Read the command line, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add, count = parser.add_argument, number(int, 1)
    add("data", help="interactions, `user item` a row: .txt or .npy (data/README.md)")
    add("models", nargs="+", help="model files; the first is the baseline. Load only files you trust")
    add("--at", type=count, nargs="+", default=[5, 10, 20], metavar="K", help="cut-offs of the metrics")
    add(
        "--split",
        choices=["test", "valid"],
        default="test",
        help="the last item of each user, or the one before",
    )
    add("--protocol", choices=["full", "uniform", "popularity"], default="full", help="items to rank among")
    add("--negatives", type=count, default=100, help="items drawn per user by uniform and popularity")
    add("--keep-seen", action="store_true", help="also rank items of the history (full ranking)")
    add("--inputs", help="histories for the models to read, with more items before them (related/asrep.py)")
    add("--seed", type=number(int, 0), default=0, help="of drawn negatives and users, and of the bootstrap")
    add("--users", type=count, help="evaluate only so many users, drawn at random")
    add("--ranks", help="also write the rank of each user's item, [users, models], to this .npy file")
    add("--json", action="store_true", help="print a list with an object per model instead of the table")
    add(
        "--recommend",
        type=number(int, 0),
        metavar="USER",
        help="print what each model recommends to this user",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    try:
        if args.recommend is not None:
            recommend(args)
        elif args.json:
            print(json.dumps(evaluate(args), indent=2))
        else:
            print_table(evaluate(args), args)
    except OSError as error:  # a file that cannot be read or written
        sys.exit(f"{error.filename or args.ranks}: {error.strerror}")


if __name__ == "__main__":
    main()
