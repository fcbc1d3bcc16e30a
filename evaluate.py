"""Compare models on one data set: accuracy, size and speed, side by side.

Accuracy is leave-one-out, with full ranking over the items that a user has not seen. A tie counts half. The
sampled protocols serve only to compare with papers: they rank models inconsistently (Krichene and Rendle,
"On Sampled Metrics for Item Recommendation", KDD 2020).

Reads   interactions, `user item` per row (data/README.md), and model files (README.md, "Your own model"). A
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
import os
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
import torch.nn.functional as F
from scipy import stats
from torch.export.passes import move_to_device_pass
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BATCH = 256  # users per batch, where batches are timed

# ---- Accuracy --------------------------------------------------------------------------------------------

# A function of the target's rank, 1 for the best, and k: each user's value, float64 [users]. A new metric is
# one more entry.
METRICS = {
    "HR": lambda rank, k: (rank <= k).astype(float),
    "NDCG": lambda rank, k: (rank <= k) / np.log2(rank + 1),
    "MRR": lambda rank, k: (rank <= k) / rank,
}


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


class Scorer(torch.nn.Module):
    """Scores [B, V+1] of all items after the last item of each history; users [B], items [B, T]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, users, items):
        _, output, item_vectors = self.model(users, items)
        return last_output(output, items) @ item_vectors.T


def draw_candidates(weight, seen, target, count, generator):
    """`count` different items a row, in proportion to `weight` [V+1], neither seen nor target: [B, count].

    seen: an array of items for each row. Each item gets an exponential waiting time of rate `weight`. The
    first items to come are a weighted sample without replacement.
    """
    waiting = torch.empty(len(seen), len(weight)).exponential_(generator=generator) / weight
    for row, items, item in zip(waiting, seen, target, strict=True):
        row[items] = row[item] = math.inf
    return waiting.topk(count, dim=1, largest=False).indices


@torch.no_grad()
def rank_all(scorer, window, data, inputs, users, end, args):
    """The rank of the target items[end] of each of `users`, after the history before it: float64 [users].

    users are indices into data.user_ids. The model reads the last `window` items of `inputs`: `data`, or the
    same histories with older items before them. With --protocol uniform or popularity, the rank is
    among the target and --negatives drawn items, the same for every model.
    """
    begin, ranks = data.starts[users], np.empty(len(users))
    # the target stands as far from the end of a history in `inputs` as in `data`
    input_begin, input_end = inputs.starts[users], inputs.starts[users + 1] - (data.starts[users + 1] - end)
    generator, counts = torch.Generator().manual_seed(args.seed), np.bincount(data.items)
    weight = torch.from_numpy(counts if args.protocol == "popularity" else counts > 0).float()
    order = np.argsort(end - begin, kind="stable")
    rows = max(1, min(64, 2**22 // len(counts)))  # users per slice: it should fit the cache
    for part in (order[n : n + rows] for n in range(0, len(order), rows)):
        b, e = begin[part], end[part]
        ids = torch.from_numpy(data.user_ids[users[part]]).to(args.device)
        input_e = input_end[part]
        items = pad_batch(inputs.items, np.maximum(input_begin[part], input_e - window), input_e)
        scores = scorer(ids, items.to(args.device))
        target, seen = data.items[e], [data.items[history] for history in map(slice, b, e)]
        if args.protocol != "full":
            drawn = draw_candidates(weight, seen, target, args.negatives, generator).to(args.device)
            kept = torch.cat([drawn, torch.from_numpy(target)[:, None].to(args.device)], 1)
            scores = torch.full_like(scores, -math.inf).scatter(1, kept, scores.gather(1, kept))
        if args.keep_seen or args.protocol != "full":  # else seen items are -inf already
            seen = [[]] * len(part)
        ranks[part] = rank_of_target(scores, target, seen, data.catalogue).cpu()
    return ranks


def bootstrap_interval(values, seed, resamples=1000):
    """95 % interval of the mean of `values` [users], by resampling users with replacement."""
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, len(values)).mean() for _ in range(resamples)]
    return np.quantile(means, [0.025, 0.975]).tolist()


def paired_p_value(values, reference):
    """Two-sided p-value of the paired t-test; the hypothesis: both means are equal. Both are [users]."""
    if len(values) < 2 or (values == reference).all():
        return 1.0
    return float(stats.ttest_rel(values, reference).pvalue)


# ---- Size and speed --------------------------------------------------------------------------------------


def count_parameters(model):
    """Number of parameters: all, and those outside of embedding tables and item vectors.

    A table is what the program looks rows up in, or what it returns as item vectors.
    """
    (result,) = (node.args[0] for node in model.graph.nodes if node.op == "output")
    tables = {node.args[0] for node in model.graph.nodes if node.target is torch.ops.aten.embedding.default}
    names = {node.target for node in [*tables, result[2]] if node.op == "get_attr"}
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if name not in names)


@torch.no_grad()
def count_multiply_adds(model, window, device):
    """Multiply-adds of the model for one request of `window` items, and those of scoring all items."""
    items = torch.ones(1, window, dtype=torch.int64, device=device)
    # the counter misses fused attention, so attention is computed as separate matrix products here
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, _, item_vectors = model(items[:, 0], items)
    return counter.get_total_flops() // 2, item_vectors[1:].numel()


def conv1d_as_product(x, weight, bias=None, stride=(1,), padding=(0,), dilation=(1,), groups=1):
    """conv1d of x [B, C, T] and weight [D, C, width] as one matrix product, with shifted copies of x."""
    if (*stride, *padding, groups) != (1, 0, 1):
        return torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, [0], groups)
    length = x.shape[-1] - dilation[0] * (weight.shape[2] - 1)
    shifted = [x[..., k * dilation[0] :][..., :length].mT for k in range(weight.shape[2])]
    return F.linear(torch.cat(shifted, -1), weight.mT.flatten(1), bias).mT


def compiled(scorer, window, device, one_request=True):
    """`scorer` compiled by AOTInductor, for up to `window` items: what a service runs.

    On a CPU, matrix products in place of convolutions halve the time of `one_request`, but not of a batch.
    """
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=window)
    example = [torch.ones(shape, dtype=torch.int64, device=device) for shape in (2, (2, window))]
    shapes = {0: batch}, {0: batch, 1: length if window > 1 else None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own code
            program = torch.export.export(scorer, tuple(example), dynamic_shapes=shapes)
            if one_request and device == "cpu":
                program = program.run_decompositions({torch.ops.aten.conv1d.default: conv1d_as_product})
            return torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program))
    except Exception as error:  # of many kinds
        sys.exit(f"--compile needs a C++ compiler; {type(error).__name__}: {error}".splitlines()[0])


@torch.no_grad()
def milliseconds(scorer, data, window, device, batch_size, repeats):
    """Median milliseconds, over `repeats`, to score all items for `batch_size` users, from padded histories.

    The users are spread evenly over the data, the same for every model. The first batch is not counted.
    """
    spread, times = np.linspace(0, len(data.user_ids) - 1, batch_size * (repeats + 1)).astype(int), []
    for users in np.random.default_rng(0).permutation(spread).reshape(repeats + 1, batch_size):
        end = data.starts[users + 1]
        items = pad_batch(data.items, np.maximum(data.starts[users], end - window), end).to(device)
        ids, start = torch.from_numpy(data.user_ids[users]).to(device), time.perf_counter()
        scorer(ids, items)[0, 0].item()  # .item() waits for a GPU
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
    repeats = sum(data.items[e] in data.items[b:e] for b, e in zip(data.starts[users], end, strict=True))
    if repeats:
        note = f"note: {repeats} of {len(users)} targets occur in their histories"
        print(f"{note}; `data/prepare.py convert --dedupe` drops repeats", file=sys.stderr)
    if args.protocol != "full":
        # history and target: neither can be drawn
        seen = [len(np.unique(data.items[b : e + 1])) for b, e in zip(data.starts[users], end, strict=True)]
        possible = len(data.catalogue) - np.array(seen) >= args.negatives
        if not possible.any():
            sys.exit(f"all users have fewer than {args.negatives} unseen items to draw; lower --negatives")
        if not possible.all():
            num_left_out = (~possible).sum()
            print(f"note: {num_left_out} users have too few unseen items: left out", file=sys.stderr)
        users, end = users[possible], end[possible]
    if args.inputs:  # its histories must end with those of `data`
        inputs = read_interactions(args.inputs)
        lengths, same = np.diff(data.starts), np.array_equal(inputs.user_ids, data.user_ids)
        if same := same and (np.diff(inputs.starts) >= lengths).all():
            shift = np.repeat(inputs.starts[1:] - data.starts[1:], lengths)
            same = np.array_equal(inputs.items[np.arange(len(data.items)) + shift], data.items)
        if not same or inputs.items.max() > data.items.max():
            sys.exit(f"{args.inputs}: not the histories of {args.data}, with or without more before them")
    reports, ranks = [], []
    models = [load_model(path, data, args.device, any_data=True) for path in args.models]
    for path, (model, config) in zip(args.models, models, strict=True):
        if config.get("data_sha256", data.sha256) != data.sha256:
            print(f"note: {path} was trained on other data than {args.data}", file=sys.stderr)
        scorer, window = Scorer(model), config["window"]
        ranks.append(rank_all(scorer, window, data, inputs, users, end, args))
        report = {"model": str(path), "stage": config.get("stage"), "users": len(users), "split": args.split}
        for (name, metric), k in product(METRICS.items(), args.at):
            values = metric(ranks[-1], k)
            report[f"{name}@{k}"] = float(values.mean())
            report[f"{name}@{k}_p_value"] = paired_p_value(values, metric(ranks[0], k))
        ndcg = METRICS["NDCG"](ranks[-1], 10)
        report["NDCG@10_interval"] = bootstrap_interval(ndcg, args.seed)
        report["p_value"] = paired_p_value(ndcg, METRICS["NDCG"](ranks[0], 10))
        sizes = count_parameters(model)
        report["parameters"], report["parameters_without_embeddings"] = sizes
        report["window"] = window
        reports.append(report)  # before the timing, as speed-ups divide reports[0]
        report["macs"], report["macs_item_scores"] = count_multiply_adds(model, window, args.device)
        ways = {"": (scorer, scorer)}  # for one request, and for a batch
        if args.compile:
            ways["_compiled"] = [compiled(scorer, window, args.device, one) for one in (True, False)]
        for way, (for_one, for_batch) in ways.items():
            timing = data, window, args.device
            report[f"ms_per_user{way}"] = milliseconds(for_one, *timing, batch_size=1, repeats=50)
            batches = milliseconds(for_batch, *timing, batch_size=BATCH, repeats=3)
            report[f"ms_per_1000_users{way}"] = batches * 1000 / BATCH
            for name in ("ms_per_user", "ms_per_1000_users"):
                report[f"{name}{way}_speed_up"] = reports[0][name + way] / report[name + way]
    if args.ranks:
        np.save(args.ranks, np.stack(ranks, 1))
    return reports


def print_table(reports, args):
    """The figures, a column per model."""
    among = "all items" if args.protocol == "full" else f"{args.negatives} {args.protocol} negatives"
    unseen = "" if args.keep_seen and args.protocol == "full" else ", the history left out"
    print(f"{args.data}: {args.split} items of {reports[0]['users']:,} users, ranked among {among}{unseen}")
    rows = [("", "{name}")]
    rows += [(f"{name}@{k}", f"{{{name}@{k}:.4f}}") for name in METRICS for k in args.at]
    rows += [
        ("NDCG@10, 95 % interval", "{NDCG@10_interval[0]:.4f}-{NDCG@10_interval[1]:.4f}"),
        ("NDCG@10, p against the first", "{p_value:.2g}"),
        ("parameters", "{parameters:,}"),
        ("  without embeddings", "{parameters_without_embeddings:,}"),
        ("items that the model needs", "{window}"),
        ("multiply-adds, one request", "{macs:,}"),
        ("  and to score the items", "{macs_item_scores:,}"),
    ]
    for way in ["", "_compiled"] if args.compile else [""]:
        rows += [
            (f"ms, one request{way.replace('_', ', ')}", f"{{ms_per_user{way}:.3f}}"),
            ("  speed-up", f"{{ms_per_user{way}_speed_up:.2f}}x"),
            (f"ms, 1,000 users{way.replace('_', ', ')}", f"{{ms_per_1000_users{way}:.1f}}"),
            ("  speed-up", f"{{ms_per_1000_users{way}_speed_up:.2f}}x"),
        ]
    names = [Path(r["model"]).stem for r in reports]
    names = names if len(set(names)) == len(names) else [r["model"] for r in reports]
    pairs = zip(names, reports, strict=True)
    columns = [[cell.format(name=name, **r) for _, cell in rows] for name, r in pairs]
    for (label, _), *cells in zip(rows, *columns, strict=True):
        padded = (f"{cell:>{max(map(len, column))}}" for cell, column in zip(cells, columns, strict=True))
        print(f"{label:29}", *padded, sep="  ")


def recommend(args):
    """Print the last 10 items of user --recommend, and each model's 10 best items after the whole history."""
    data, titles = read_interactions(args.data), {}
    models = [load_model(path, data, "cpu", True) for path in args.models]
    names = Path(f"{args.data}.items.tsv")  # a line an item: id, tab, title
    if names.exists():
        lines = names.read_text(encoding="utf-8", errors="replace").splitlines()
        titles = {line.partition("\t")[0]: line.partition("\t")[2] for line in lines}
    user = np.flatnonzero(data.user_ids == args.recommend)
    if len(user) == 0:
        sys.exit(f"{args.data} has no user {args.recommend}")
    history = torch.tensor(data.items[data.starts[user[0]] : data.starts[user[0] + 1]])
    tables = {f"user {args.recommend}: the last of {len(history)} items, oldest first": history[-10:]}
    for path, (model, config) in zip(args.models, models, strict=True):
        with torch.no_grad():
            items = history[None, -config["window"] :]
            (scores,) = Scorer(model)(torch.from_numpy(data.user_ids[user]), items)
        if not scores.isfinite().all():
            sys.exit(f"{path}: its scores are not finite; train it again with a lower --learning-rate")
        possible = np.setdiff1d(data.catalogue, [] if args.keep_seen else history)
        tables[f"{path} recommends"] = possible[scores[possible].argsort(descending=True)[:10]]
    for title, items in tables.items():
        lines = (f"    {item:>7}  {titles.get(str(item), '')}".rstrip() for item in items.tolist())
        print(title, *lines, sep="\n")


# ---- Data and models -------------------------------------------------------------------------------------

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


def pad_batch(items, begin, end):
    """Histories items[begin[b]:end[b]] as rows, padded with 0 on the right: int64 tensor [B, T]."""
    places = begin[:, None] + np.arange(max(1, (end - begin).max()))  # [B, T]
    inside = places < end[:, None]
    return torch.from_numpy(np.where(inside, items[np.where(inside, places, 0)], np.int64(0)))


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


def load_model(path, data, device, any_data=False):
    """The module of a model file on `device`, with dropout off, and its config.

    This adds to the config `layers`, L, and `dim`, d, of the hidden states, and `window`, how many recent
    items the output depends on. The run ends if the file is damaged, or is no model for the ids of `data`. It
    also ends if the model was trained on other data, unless `any_data`.
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
        if config["items"] < num_items:
            raise ValueError(f"it is for {config['items']} items, the data have ids up to {num_items}")
        if min(config["max_length"], config.get("sees", 1)) < 1:
            raise ValueError("its max_length or sees is below 1")
        example = torch.tensor([data.user_ids.max()]), torch.tensor([[num_items]])
        hidden, output, vectors = program.module()(*example)
        shapes = *vectors.shape, *hidden.shape[1:3]
        if shapes != (config["items"] + 1, output.shape[2], 1, 1):
            found = [list(result.shape) for result in (hidden, output, vectors)]
            needed = f"[L+1, 1, 1, d], [1, 1, e], [{config['items'] + 1}, e]"
            raise ValueError(f"for one item, its results have the shapes {found}, and should have {needed}")
        if not any_data and config.get("data_sha256", data.sha256) != data.sha256:
            raise ValueError("it was trained on other data and may know their test items")
        # without `sees`, the output depends on all items
        longest, window = config["max_length"], min(config["max_length"], config.get("sees", 10**9))
        items = torch.randint(1, num_items + 1, (1, longest), generator=torch.Generator().manual_seed(0))
        whole, cut = (program.module()(example[0], items[:, -n:])[1][:, -1] for n in (longest, window))
        if not torch.allclose(whole, cut, rtol=1e-3, atol=1e-4):
            raise ValueError(f"its output depends on more than the last {window} items, which `sees` says")
        module = move_to_device_pass(program, device).module()
    except Exception as error:  # whatever unpickling meets in another file
        sys.exit(f"{path} is no model file for these data; {type(error).__name__}: {error}".splitlines()[0])
    return module, config | {"layers": len(hidden) - 1, "dim": hidden.shape[3], "window": window}


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
    """Read the command line, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add, count = parser.add_argument, number(int, 1)
    add("data", help="interactions, `user item` per row: .txt or .npy (data/README.md)")
    add("models", nargs="+", help="model files; the first is the baseline. Load only files you trust")
    add("--at", type=count, nargs="+", default=[5, 10, 20], metavar="K", help="cut-offs of the metrics")
    splits = ["test", "valid"]
    add("--split", choices=splits, default="test", help="the last item of each user, or the one before")
    add("--protocol", choices=["full", "uniform", "popularity"], default="full", help="items to rank among")
    add("--negatives", type=count, default=100, help="items drawn per user by uniform and popularity")
    add("--keep-seen", action="store_true", help="also rank items of the history (full ranking)")
    add("--inputs", help="histories for the models to read, with more items before them (related/asrep.py)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="draws negatives, users, the bootstrap")
    add("--users", type=count, help="evaluate only so many users, drawn at random")
    add("--ranks", help="also write the rank of each user's item, [users, models], to this .npy file")
    add("--compile", action="store_true", help="also time the models compiled; needs a C++ compiler")
    add("--json", action="store_true", help="print a list with an object per model instead of the table")
    add("--recommend", type=count, metavar="USER", help="print what each model recommends to this user")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to compute")
    args = parser.parse_args(argv)
    try:
        if args.ranks and not args.ranks.endswith(".npy"):
            parser.error("--ranks must end in .npy")
        inputs = [args.data, *args.models, *[args.inputs] * bool(args.inputs)]
        if args.ranks and Path(args.ranks).exists() and any(map(Path(args.ranks).samefile, inputs)):
            parser.error(f"--ranks {args.ranks} is an input")
        if args.recommend is not None:
            recommend(args)
        elif args.json:
            print(json.dumps(evaluate(args), indent=2))
        else:
            print_table(evaluate(args), args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a file that cannot be read or written
        sys.exit(f"{error.filename or args.ranks}: {error.strerror}")


if __name__ == "__main__":
    main()
