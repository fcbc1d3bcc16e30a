"""What adarec_search.py finds, what its supernet costs, and whether it beats chance.

    python results/search.py planted
    python results/search.py speed data/ml-1m.txt
    python results/search.py chance data/ml-100k.txt --teacher runs/teacher.pt2

`planted`: searches with one cell and one node on synthetic scenes whose truth is known: how often the
operation found reaches the lag, what a cost loss of moderate and of large beta leaves, and expected cost over
beta. `speed`: seconds of a forward and backward pass of the supernet, of the student all of whose edges are
conv5, and of the supernet with every operation by itself, in turn, without a teacher. `chance`: architectures
that were searched and random ones of the same cost, trained alike from random weights by emd_distill.py:
validation NDCG@10. What stands behind `--` goes to adarec_search.py, behind a second `--` to emd_distill.py.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import adarec_search as ada  # noqa: E402

REACHES = {
    2: {"conv3", "conv5", "dilated_conv3", "dilated_conv5", "avg_pool", "max_pool"},
    4: {"conv5", "dilated_conv3", "dilated_conv5"},
    6: {"dilated_conv5"},
}


def script(*command):
    """Run a script of this repository."""
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def search(folder, data, *options):
    """The architecture that adarec_search.py writes, and the lines of its log."""
    out = Path(folder) / "architecture.json"
    script("adarec_search.py", data, "--out", out, *options)
    log = [json.loads(line) for line in Path(f"{out}.log.jsonl").read_text().splitlines()]
    return json.loads(out.read_text())["edges"], log


def planted(args, folder):
    """Print what searches find on `lag` and `markov` scenes."""
    small = ["--cells", 1, "--nodes", 1, "--dim", 32, "--max-length", 20, "--dropout", 0.1]
    small += ["--alpha-warm-up", 0, "--epochs", 20]
    for lag in (0, 2, 4, 6):
        scene = ["--scene", "lag", "--lag", lag] if lag else ["--scene", "markov"]
        size = ["--users", 1000, "--items", 60, "--length", 20]
        script("data/prepare.py", "synthetic", *scene, *size, "--out", f"{folder}/{lag}.txt")
    for lag, beta in ((2, 0.01), (4, 0.01), (6, 0.01), (0, 0.3), (4, 1000)):
        found = [
            search(folder, f"{folder}/{lag}.txt", *small, "--beta", beta, "--seed", seed)[0][0][0]
            for seed in range(args.seeds)
        ]
        what = f"lag {lag}" if lag else "markov"
        reach = f"; {sum(o in REACHES[lag] for o in found)} of {len(found)} reach" if beta == 0.01 else ""
        print(f"{what}, beta {beta}: {dict(Counter(found))}{reach}", flush=True)
    for beta in (0, 0.1, 1, 10):
        costs = [
            search(folder, f"{folder}/4.txt", *small, "--beta", beta, "--seed", seed)[1][-1]["expected_cost"]
            for seed in range(3)
        ]
        print(f"lag 4, beta {beta}: mean expected cost {statistics.mean(costs):.3f}", flush=True)


class Explicit(torch.nn.Module):
    """ada.MixedEdges with every operation of every edge by itself: what a supernet usually does."""

    def __init__(self, dim, targets):
        super().__init__()
        self.operations = torch.nn.ModuleList(
            torch.nn.ModuleList(ada.Operation(name, dim) for name in ada.OPERATIONS) for _ in range(targets)
        )

    def forward(self, x, y):
        """x [B, d, T], y [targets, |O|] -> [B, targets, d, T]."""
        sums = []
        for row, share in zip(self.operations, y, strict=True):
            outputs = []
            for o in row:
                if o.name.endswith("pool"):  # torch's own pools, which train faster than the exportable ones
                    pool = F.avg_pool1d if o.name == "avg_pool" else F.max_pool1d
                    outputs.append(pool(F.pad(x, (2, 0)), 3, stride=1))
                else:
                    outputs.append(o(x))
            sums.append(sum(w * out for w, out in zip(share, outputs, strict=True)))
        return torch.stack(sums, 1)


def speed(args, folder):
    """Print the seconds of a forward and backward pass, with L_CE and without, of three models in turn."""
    _, starts, items = ada.read_interactions(args.data)
    train_end, _ = ada.leave_one_out(starts)
    rng = np.random.default_rng(0)
    users = ada.batches_of_like_length(np.minimum(train_end - starts[:-1], 201), 128, rng)[0]
    begin, end = np.maximum(starts[users], train_end[users] - 201), train_end[users]
    inputs = ada.pad_batch(items, begin, end - 1)
    if inputs.shape[1] < 200:  # the longest histories, so that the batch is one of 200 items
        users = np.argsort(starts[:-1] - train_end)[:128]
        begin, end = train_end[users] - 201, train_end[users]
        inputs = ada.pad_batch(items, begin, end - 1)
    targets, nodes, dim = ada.pad_batch(items, begin + 1, end), 3, 64
    alpha = torch.zeros(6, len(ada.OPERATIONS), requires_grad=True)

    def model(cells):
        return ada.Student(int(items.max()), 200, dim, cells, 0.2)

    merged = model([ada.MixedCell(dim, nodes) for _ in range(4)])
    explicit = model([ada.MixedCell(dim, nodes) for _ in range(4)])
    for cell in explicit.cells:
        cell.sources = torch.nn.ModuleList(Explicit(dim, nodes - i) for i in range(nodes))
    conv5 = model([ada.Cell(dim, [["conv5"] * j for j in (1, 2, 3)]) for _ in range(4)])

    def step(net, ce):
        y = () if net is conv5 else (ada.choose(alpha, 1.0, "gumbel"),)
        tick = time.perf_counter()
        _, output, item_vectors = net(inputs[:, 0], inputs, *y)
        loss = output.square().mean()
        if ce:
            at_real = output[inputs > 0], item_vectors, targets[inputs > 0]
            loss, _, _ = ada.item_losses(*at_real, None, None, 1.0, 0.0)
        loss.backward()
        return time.perf_counter() - tick

    for ce in (False, True):
        times = {"supernet": [], "conv5": [], "explicit": []}
        for _ in range(args.runs + 1):
            for name, net in zip(times, (merged, conv5, explicit), strict=True):
                times[name].append(step(net, ce))
        middle = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
        print(
            f"{list(inputs.shape)} items, {'with' if ce else 'without'} L_CE: "
            + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in middle.items())
            + f"; supernet / conv5 {middle['supernet'] / middle['conv5']:.2f}, "
            f"supernet / explicit {middle['supernet'] / middle['explicit']:.2f}"
        )


def chance(args, folder):
    """Print validation NDCG@10 of searched and of random architectures after the same training."""
    taught = ["--teacher", args.teacher] if args.teacher else []
    reached, rows, start = {"searched": [], "random": []}, [], Path(folder) / "start.json"
    for seed in range(args.seeds):
        edges, log = search(folder, args.data, *taught, *args.options, "--seed", seed)
        costs = dict(zip(ada.OPERATIONS, ada.operation_costs(64, len(edges)).tolist(), strict=True))
        cost = sum(costs[o] for row in edges for o in row)
        print(
            f"search {seed}: {ada.edges_text(edges)}, cost {cost:.3f}, sure {log[-1]['sure']:.2f}", flush=True
        )
        found = Path(folder) / f"{seed}.json"
        found.write_text((Path(folder) / "architecture.json").read_text())
        rows.append(("searched", ["--architecture", found], seed))
    rows += [("random", ["--random", cost], seed) for seed in range(args.randoms)]
    for kind, options, seed in rows:
        script("adarec_search.py", args.data, *options, "--out", start, "--seed", seed)
        out = Path(folder) / "student.pt2"
        learn = [
            "--student",
            start.with_suffix(".pt2"),
            *taught,
            *args.training,
            "--seed",
            seed,
            "--out",
            out,
        ]
        script("emd_distill.py", args.data, *learn)
        log = [json.loads(line) for line in Path(f"{out}.log.jsonl").read_text().splitlines()]
        reached[kind].append(max(line["NDCG@10"] for line in log))
        edges = json.loads(start.read_text())["edges"]
        print(f"{kind} {seed}: {ada.edges_text(edges)}: {reached[kind][-1]:.4f}", flush=True)
    for kind, values in reached.items():
        spread = f", standard deviation {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        print(
            f"{kind}: mean {statistics.mean(values):.4f}{spread}, from {min(values):.4f} to {max(values):.4f}"
        )


def main(argv=None):
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["planted", "speed", "chance"], help="what to measure")
    parser.add_argument("data", nargs="?", help="interactions, for speed and chance")
    parser.add_argument("--teacher", help="model file, for chance")
    parser.add_argument("--seeds", type=int, default=10, help="searches of each kind")
    parser.add_argument("--randoms", type=int, default=5, help="random architectures, for chance")
    parser.add_argument("--runs", type=int, default=7, help="passes of each model, for speed")
    argv = sys.argv[1:] if argv is None else list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)  # what stands behind `--` is for the script
    args = parser.parse_args(argv[:cut])
    args.options, args.training = argv[cut + 1 :], []
    if "--" in args.options:
        cut = args.options.index("--")
        args.options, args.training = args.options[:cut], args.options[cut + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        {"planted": planted, "speed": speed, "chance": chance}[args.what](args, folder)


if __name__ == "__main__":
    main()
