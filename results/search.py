"""What the supernet of adarec_search.py costs.

    python results/search.py data/ml-1m.txt

Seconds of a forward and backward pass of the supernet, of the student all of whose edges are conv5, and of
the supernet with every operation by itself, in turn, without a teacher.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import adarec_search as ada  # noqa: E402


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


def speed(args):
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


def main(argv=None):
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="interactions")
    parser.add_argument("--runs", type=int, default=7, help="passes of each model")
    speed(parser.parse_args(argv))


if __name__ == "__main__":
    main()
