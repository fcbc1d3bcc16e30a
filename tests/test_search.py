"""adarec_search.py: the search space is causal, each equation is itself, the search finds what is there."""

import json
import math
from pathlib import Path

import numpy as np
import prepare
import pytest
import torch
import torch.nn.functional as F
from scipy import special, stats
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import adarec_search as search
import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch, of exporting a GRU
# how many items back an operation looks, a convolution's in the order of its taps
BACK = {"conv3": [2, 1, 0], "conv5": [4, 3, 2, 1, 0], "dilated_conv3": [4, 2, 0], "skip": [0], "none": []}
BACK |= {"dilated_conv5": [8, 6, 4, 2, 0], "avg_pool": [2, 1, 0], "max_pool": [2, 1, 0], "mean": range(20)}
OPERATIONS = list(search.OPERATIONS)
DEEP = [["conv3"], ["skip", "dilated_conv5"], ["avg_pool", "conv5", "max_pool"]]
BARE = [["max_pool"], ["dilated_conv3", "none"], ["none", "skip", "conv3"]]
MEAN = [["mean"], ["none", "conv3"]]
GOOD = {"cells": 1, "nodes": 1, "dim": 8, "edges": [["conv3"]]}
SMALL = ["--cells", 1, "--nodes", 2, "--dim", 8, "--epochs", 2, "--alpha-warm-up", 1]
SMALL += ["--max-length", 6]


@pytest.fixture
def small(write_data):
    """A data file of 60 users who count through 40 items."""
    rng = np.random.default_rng(0)
    return write_data({u: (rng.integers(40) + np.arange(3 + u % 6)) % 40 + 1 for u in range(1, 61)})


@pytest.fixture
def float64(monkeypatch):
    """All numbers in float64, those too that the script makes by `.float()`."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run(*argv):
    search.main([str(a) for a in argv])


def fails(*argv):
    """The one line that `main` ends with."""
    with pytest.raises(SystemExit) as end:
        run(*argv)
    assert isinstance(end.value.code, str) and end.value.code.count("\n") == 0
    return end.value.code


def log_of(out):
    return [json.loads(line) for line in Path(f"{out}.log.jsonl").read_text().splitlines()]


def operated(name, x, weight=None, bias=None):
    """o(x) of x [B, d, T], written out: a shifted copy of x for each item that o looks at."""
    past = [F.pad(x, (back, 0))[..., : x.shape[-1]] for back in BACK[name]]
    if name == "mean":
        return torch.stack([x[..., : t + 1].mean(-1) for t in range(x.shape[-1])], -1)
    if "conv" in name:
        return bias[:, None] + sum(weight[..., k] @ shifted for k, shifted in enumerate(past))
    if name == "max_pool":
        return torch.stack(past).max(0).values  # the oldest of equal ones gets the gradient
    return sum(past) / len(past) if past else torch.zeros_like(x)


def mixed(edges, target, y, x):
    """sum_o y_o o(x) on the edge to the `target`-th later node, every operation by itself; y [|O|]."""
    kernels, biases = edges.kernels[target].split([3, 5, 3, 5], -1), edges.biases[target]
    weights = {name: (kernels[o], biases[o]) for o, name in enumerate(OPERATIONS) if "conv" in name}
    return sum(y[o] * operated(name, x, *weights.get(name, ())) for o, name in enumerate(OPERATIONS))


def forward(model, items, y, dropout=0.0):
    """A supernet's hidden states [K+1, B, T, d] and output at y [E, |O|], by the equations of the paper."""
    size = model.P.shape[1:]
    hidden = [F.dropout(math.sqrt(size[0]) * model.M.weight[items] + model.P[: items.shape[1]], dropout)]
    for cell in model.cells:
        x, rows = [hidden[-1].transpose(1, 2)], iter(y)  # rows are of the edges 0-1, 0-2, 1-2, 0-3, ...
        for j in range(1, len(cell.w) + 1):
            x.append(sum(mixed(cell.sources[i], j - i - 1, next(rows), x[i].relu()) for i in range(j)))
        total = torch.einsum("j,jbdt->btd", cell.w.exp() / cell.w.exp().sum(), torch.stack(x[1:]))
        hidden.append(hidden[-1] + F.layer_norm(total, size, cell.norm.weight, cell.norm.bias).relu())
    output = F.layer_norm(F.dropout(hidden[-1], dropout), size, model.norm.weight, model.norm.bias)
    return torch.stack(hidden), output


def one_hot(edges):
    """y [E, |O|] of an architecture."""
    return F.one_hot(torch.tensor([OPERATIONS.index(o) for row in edges for o in row]), 9).double()


@pytest.fixture
def supernet(float64):
    """Two cells of three nodes with weights large enough that every path through them matters."""
    torch.manual_seed(0)
    model = search.Student(20, 12, 6, [search.MixedCell(6, 3) for _ in range(2)], 0.0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5)
        model.M.weight[0] = 0
    return model.eval()


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_sees_what_its_name_says_and_never_the_future(name):
    torch.manual_seed(0)
    operation = search.Operation(name, 4)
    for training in (True, False):
        operation.train(training)
        for length in (1, 2, 3, 7, 20):
            x = torch.rand(2, 4, length)  # the parameters of a convolution: weight and bias
            torch.testing.assert_close(operation(x), operated(name, x, *operation.parameters()))
        seen = set()
        for _ in range(8 if BACK[name] else 0):  # a maximum has a gradient at one item alone
            x = torch.rand(64, 4, 15, requires_grad=True)
            operation(x)[:, :, 10].pow(2).sum().backward()
            seen |= {10 - s for s in range(15) if x.grad[:, :, s].any()}
        assert seen == set(BACK[name]) & set(range(11))


def test_cell_is_the_papers_equation(supernet):
    y, items = torch.rand(6, 9), torch.randint(1, 21, (4, 12))
    torch.testing.assert_close(supernet(None, items, y)[:2], forward(supernet, items, y))


@pytest.mark.parametrize("edges", [DEEP, BARE, [["mean"], ["none", "conv3"], ["skip", "mean", "none"]]])
def test_derived_student_is_the_supernet_at_that_architecture(supernet, edges):
    items, student = torch.randint(1, 21, (4, 12)), search.derive(supernet, edges)
    expected = supernet(None, items, one_hot(edges))
    torch.testing.assert_close(student(None, items), expected, atol=1e-10, rtol=1e-10)
    before = [weight.detach().clone() for weight in supernet.parameters()]
    with torch.no_grad():
        for weight in student.parameters():  # its weights are its own
            weight += 1
    assert all(map(torch.equal, before, supernet.parameters()))


@pytest.mark.parametrize("seed", range(12))
def test_merged_edge_is_the_explicit_sum(float64, seed):
    """In value and in gradient: each operation alone, and three mixtures of all."""
    torch.manual_seed(seed)
    edges, x = search.MixedEdges(6, 2), F.relu(torch.randn(3, 6, 20)).requires_grad_()
    y = F.one_hot(torch.full((2,), seed), 9).double() if seed < 9 else torch.randn(2, 9)
    merged = edges(x, y.requires_grad_())
    explicit = torch.stack([mixed(edges, j, y[j], x) for j in (0, 1)], 1)
    torch.testing.assert_close(merged, explicit, atol=1e-10, rtol=1e-10)
    into, leaves = torch.randn(3, 2, 6, 20), (y, edges.kernels, edges.biases, x)
    ours, theirs = (torch.autograd.grad(total, leaves, into) for total in (merged, explicit))
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def keep_embedded(model):
    """A list that each embedded batch of `model` is put into, its gradient kept."""
    kept = []
    model.M.register_forward_hook(lambda m, a, embedded: embedded.retain_grad() or kept.append(embedded))
    return kept


@pytest.mark.parametrize("relaxation", ["gumbel", "softmax"])
def test_supernet_gives_exactly_no_gradient_to_the_future(supernet, relaxation):
    kept = keep_embedded(supernet)
    for t in range(12):
        y = search.choose(torch.zeros(6, 9), 1.0, relaxation, np.random.default_rng(0))
        hidden, output, _ = supernet(None, torch.randint(1, 21, (3, 12)), y)
        (output[:, t].pow(2).sum() + hidden[:, :, t].pow(2).sum()).backward()
        gradient = kept.pop().grad
        assert (gradient[:, t + 1 :] == 0).all() and (gradient[:, t].abs().sum(-1) > 0).all()


def test_a_students_file_names_no_device(small, tmp_path):
    # `.to(device)` moves its weights, and not what a node of its graph makes on a device of its own
    edges = [["mean"], ["none", "none"], ["max_pool", "skip", "avg_pool"]]
    given = {"cells": 1, "nodes": 3, "dim": 4, "edges": edges}
    (tmp_path / "a.json").write_text(json.dumps(given))
    run(small, "--architecture", tmp_path / "a.json", "--out", tmp_path / "b.json")
    graph = torch.export.load(tmp_path / "b.pt2").graph
    assert not [node for node in graph.nodes if "device" in node.kwargs]


@pytest.mark.parametrize("cells", [1, 3])
@pytest.mark.parametrize("edges", [DEEP, BARE, [["none"], ["skip", "conv3"]], MEAN])
def test_receptive_field_is_what_gradients_say(float64, edges, cells):
    torch.manual_seed(0)
    model = search.Student(9, 40, 8, [search.Cell(8, edges) for _ in range(cells)], 0.0).eval()
    kept, reached = keep_embedded(model), 0
    for _ in range(5):
        model(None, torch.randint(1, 10, (32, 40)))[1][:, 39].pow(2).sum().backward()
        reached = max(reached, 40 - int(kept.pop().grad.abs().sum((0, 2)).nonzero()[0]))
    assert min(40, search.receptive_field(edges, cells)) == reached


def test_gumbel_draws_each_operation_as_often_as_softmax_says(float64):
    torch.manual_seed(0)
    alpha = torch.randn(8)
    for tau in (1.0, 0.3):
        y = search.choose(alpha.expand(20_000, 8), tau, "gumbel", np.random.default_rng(0))
        assert (y.sort(1).values - F.one_hot(torch.tensor(7), 8)).abs().max() < 1e-6
        assert stats.chisquare(y.round().sum(0), 20_000 * alpha.softmax(0)).pvalue > 1e-3


def test_straight_through_gradient_is_that_of_the_softmax(float64):
    alpha, into = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)

    def soft(alpha):
        g = torch.from_numpy(np.random.default_rng(0).gumbel(size=(3, 8)))
        return (into * ((alpha.log_softmax(1) + g) / 0.7).softmax(1)).sum().item()

    (into * search.choose(alpha, 0.7, "gumbel", np.random.default_rng(0))).sum().backward()
    steps = 1e-6 * torch.eye(24).view(24, 3, 8)
    slopes = [(soft(alpha + step) - soft(alpha - step)) / 2e-6 for step in steps]
    assert alpha.grad.flatten().tolist() == pytest.approx(slopes, abs=1e-7)


def share(edges, dim, nodes):
    """Share of the dearest architecture, conv5 all over, in parameters and in multiply-adds; mean of both."""
    cell, edge_count = search.Cell(dim, edges), nodes * (nodes + 1) / 2
    with FlopCounterMode(display=False) as counter:
        cell(torch.zeros(1, 7, dim))
    # not counted by torch: 3 an item and feature for a pool, 1 for a running mean
    others = sum({"avg_pool": 3, "max_pool": 3, "mean": 1}.get(o, 0) for row in edges for o in row)
    counted = counter.get_total_flops() / 2 / 7 + dim * others
    parameters = sum(p.numel() for p in cell.operations.parameters())
    return (parameters / (5 * dim**2 + dim) + counted / (5 * dim**2)) / 2 / edge_count


@pytest.mark.parametrize("dim", [8, 64])
def test_costs_are_the_shares_of_built_modules(dim):
    costs = search.operation_costs(dim, 3)
    assert costs.tolist() == pytest.approx([share([[o]], dim, 3) for o in OPERATIONS])
    for edges in (DEEP, BARE):
        assert search.cost_loss(one_hot(edges), costs).item() == pytest.approx(share(edges, dim, 3))


@pytest.mark.parametrize("cost", [0, 0.3, 0.8])
def test_random_architectures_cost_what_is_asked(small, tmp_path, cost):
    costs, rng, out = search.operation_costs(16, 3), np.random.default_rng(0), tmp_path / "a.json"
    run(small, "--out", out, "--random", cost, "--nodes", 3, "--dim", 16, "--cells", 1)
    found = [search.random_edges(3, OPERATIONS, costs.numpy(), cost, rng) for _ in range(10)]
    for edges in [*found, json.loads(out.read_text())["edges"]]:
        assert search.cost_loss(one_hot(edges), costs).item() == pytest.approx(cost, rel=0.1)
        assert search.receptive_field(edges) > 0
    assert len(set(map(str, found))) > 5


def kl(q, p):
    """KL(q || p), mean over positions."""
    return (q * (q / p).log()).sum(-1).mean()


def cheapest_flow(w_S, w_T, D):
    """The best flow [2, L_T]: the first of two layers ships to where it is cheapest against the second."""
    first = np.zeros(len(w_T))
    for j in np.argsort(D[0] - D[1]):
        first[j] = min(w_T[j], w_S[0] - first.sum())
    return np.stack([first, w_T - first])


def layer_weights(w, paid):
    """Cost attention: softmax_i of (sum_k c_k / c_i) / 10."""
    cost = paid / w
    return special.softmax(cost.sum() / np.maximum(cost, cost.sum() / 100) / 10)


@pytest.mark.parametrize(
    "relaxation, gamma, drawn", [("softmax", 0.35, 0), ("softmax", 1.0, 9), ("gumbel", 0, 0)]
)
def test_whole_search_is_the_papers_equations(
    float64, write_data, write_gru, tmp_path, relaxation, gamma, drawn
):
    """Six epochs of three batches, all losses and steps written out; noise and dropout have the same seed.

    With a teacher nothing is drawn: where `none` is drawn all over, layers are alike, and any flow is best.
    """
    sizes, out = {3 * u: 1 + u % 13 for u in range(1, 27)}, tmp_path / "a.json"
    histories = {u: np.random.default_rng(u).integers(1, 26, size=n).tolist() for u, n in sizes.items()}
    argv = [write_data(histories), "--out", out, "--relaxation", relaxation, "--beta", 0.4, "--dropout", 0.3]
    argv += ["--cells", 2, "--nodes", 2, "--dim", 6, "--max-length", 6, "--batch-size", 9, "--epochs", 6]
    argv += ["--alpha-warm-up", 2, "--alpha-learning-rate", 0.06, "--learning-rate", 0.007, "--seed", 7]
    argv += ["--operations", *(o for o in OPERATIONS if o != "conv5")]
    if gamma:
        path = write_gru(items=25, layers=3)
        teacher = torch.export.load(path).module()
        argv += ["--teacher", path, "--gamma", gamma, *["--negatives", drawn, "--remember"] * bool(drawn)]
    run(*argv)

    costs = torch.tensor([share([[o]], 6, 2) for o in OPERATIONS])
    torch.manual_seed(7)
    model = search.Student(25, 6, 6, [search.MixedCell(6, 2) for _ in range(2)], 0.3)
    W_e, W_h = (nn.Linear(6, 10) if gamma else nn.Identity() for _ in range(2))
    w_S, w_T = np.full(2, 1 / 2), np.full(3, 1 / 3)
    alpha = torch.zeros(3, 9)
    alpha[:, [OPERATIONS.index("conv5")]] = -1e9
    alpha.requires_grad_()
    weights = {"params": [*model.parameters(), *W_e.parameters(), *W_h.parameters()], "weight_decay": 5e-4}
    groups = [weights, {"params": [alpha], "lr": 0.06, "weight_decay": 1e-4}]
    optimizer = torch.optim.AdamW(groups, 0.007, foreach=False)
    training = [h[:-2] if len(h) > 2 else h for h in histories.values()]
    training = [h[-7:] for h in training if len(h) > 1]
    mean_count = sum(len(h) - 1 for h in training) / math.ceil(len(training) / 9)
    for epoch, line in enumerate(log_of(out), 1):
        totals, flows, positions, rng = np.zeros(5), 0, 0, np.random.default_rng([7, epoch])
        torch.manual_seed(int(rng.integers(2**62)))
        for batch in search.batches_of_like_length(np.array([len(h) for h in training]), 9, rng):
            rows = [torch.tensor(training[u]) for u in batch]
            inputs = nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True)
            real, target = inputs > 0, torch.cat([row[1:] for row in rows])
            y, count = alpha.softmax(1), len(target)
            l_cost = (y * costs).sum()
            if relaxation == "gumbel" and epoch > 2:
                g = torch.from_numpy(rng.gumbel(size=(3, 9)))
                soft = ((alpha.log_softmax(1) + g) / (0.8 if epoch == 6 else 1.0)).softmax(1)
                y = F.one_hot(soft.argmax(1), 9) + (soft - soft.detach())
            hidden, output = forward(model, inputs, y, 0.3)
            # softmaxes of all items, or of the target, in column 0, and the drawn ones that are others
            columns, stands_for = torch.arange(1, 26), torch.ones(26)
            if drawn:  # of the training items, and of all, half each
                Q = np.bincount(np.concatenate(training), minlength=26) / sum(map(len, training)) / 2
                Q[1:] += 1 / 50
                columns, stands_for = torch.from_numpy(rng.choice(26, drawn, p=Q)), torch.tensor(drawn * Q)
            columns = torch.cat([target[:, None], columns.expand(count, -1)], 1)
            weight = stands_for[columns].log()
            weight[:, 0] = 0
            twice = columns == target[:, None]
            twice[:, 0] = False
            z = (output[real] @ model.M.weight.T).gather(1, columns) - weight
            p = z.masked_fill(twice, -math.inf).softmax(1)
            l_ce = -p[:, 0].log().mean()
            l_emb = l_hid = l_pred = torch.zeros(())
            if gamma:
                with torch.no_grad():
                    hidden_T, output_T, vectors_T = teacher(torch.ones(len(rows)), inputs)
                l_emb = (hidden[0][real] @ W_e.weight.T + W_e.bias - hidden_T[0][real]).pow(2).mean()
                layers, taught = hidden[1:, real] @ W_h.weight.T + W_h.bias, hidden_T[1:, real]
                pairs = [kl(t, s) for s in layers.softmax(-1) for t in taught.softmax(-1)]
                D = torch.stack(pairs).view(2, 3)
                flow = cheapest_flow(w_S, w_T, D.detach().numpy())
                l_hid, paid = (torch.from_numpy(flow) * D).sum(), flow * D.detach().numpy()
                w_S, w_T = layer_weights(w_S, paid.sum(1)), layer_weights(w_T, paid.sum(0))
                z = (output_T[real] @ vectors_T.T).gather(1, columns) - weight
                q, p = z.masked_fill(twice, -math.inf).softmax(1)[~twice], p[~twice]
                l_pred = (q * (q / p).log()).sum() / count
                flows = flows + count * flow
            loss = (1 - gamma) * l_ce + gamma * (l_emb + l_hid + l_pred) + 0.4 * l_cost
            optimizer.zero_grad()
            (loss * count / mean_count).backward()
            alpha.grad = alpha.grad if epoch > 2 else None
            optimizer.step()
            positions += count
            totals += count * np.array([part.item() for part in (l_ce, l_cost, l_emb, l_hid, l_pred)])
        i, j, k = (OPERATIONS[o] for o in alpha.argmax(1))
        edges, shares = [[i], [j, k]], alpha.detach().softmax(1)
        expected = dict(zip(("L_CE", "L_cost", "L_emb", "L_hid", "L_pred"), totals / positions, strict=True))
        expected["sure"] = shares.amax(1).mean().item()
        assert {name: line.get(name, 0) for name in expected} == pytest.approx(expected, rel=1e-7)
        np.testing.assert_allclose(line["alpha"], alpha.detach(), rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(line.get("flow", 0), flows / positions, atol=1e-9)
        assert line["edges"] == edges
    # the model file has the supernet's weights of the last epoch
    items = torch.randint(1, 26, (3, 6))
    found = torch.export.load(out.with_suffix(".pt2")).module()(torch.ones(3), items)
    expected = *forward(model, items, one_hot(edges)), model.M.weight
    torch.testing.assert_close(tuple(found), expected, atol=1e-7, rtol=1e-7)


def searched(folder, lag, beta):
    """The operation that a search picks if the next item hangs on that `lag` before the last; its log."""
    data, out = folder / f"{lag}.txt", folder / "found.json"
    scene = ["--scene", "lag", "--lag", lag] if lag else ["--scene", "markov"]
    scene += ["--users", 500, "--items", 40, "--length", 20, "--seed", 1, "--out", data]
    prepare.main(["synthetic", *map(str, scene)])
    options = ["--cells", 1, "--nodes", 1, "--dim", 16, "--max-length", 20, "--dropout", 0, "--beta", beta]
    run(data, "--out", out, *options, "--epochs", 20, "--batch-size", 16)
    return json.loads(out.read_text())["edges"][0][0], log_of(out)


@pytest.mark.parametrize("lag", [2, 4, 6])
def test_search_finds_an_operation_that_reaches_the_lag(tmp_path, lag):
    operation, log = searched(tmp_path, lag, 0.01)
    assert lag in BACK[operation] and log[-1]["sure"] > log[0]["sure"]


def test_cost_is_weighed_against_accuracy(tmp_path):
    # trained alone, conv3 reaches an L_CE 0.54 below that of skip, and costs 0.6 beta more
    assert "conv" in searched(tmp_path, 0, 0.3)[0] and searched(tmp_path, 0, 1.5)[0] in {"skip", "avg_pool"}
    operation, log = searched(tmp_path, 4, 1000)
    assert operation in {"skip", "none"} and log[-1]["L_cost"] < 0.05


def test_files_of_a_search_and_of_a_student_built_anew(small, write_gru, tmp_path):
    out, anew, weights = tmp_path / "new" / "a.json", tmp_path / "b.json", []
    shape = ["--cells", 3, "--nodes", 2, "--dim", 8, "--gamma", 0.1]
    run(
        small,
        "--teacher",
        write_gru(40),
        "--out",
        out,
        *shape,
        "--epochs",
        3,
        "--batch-size",
        8,
        "--alpha-warm-up",
        1,
    )
    run(small, "--architecture", out, "--out", anew, "--cells", 1, "--dim", 4, "--max-length", 7)
    log, architecture = log_of(out), json.loads(out.read_text())
    assert [line["epoch"] for line in log] == [1, 2, 3] and log[-1]["L_CE"] < log[0]["L_CE"]
    assert architecture == {"cells": 3, "nodes": 2, "dim": 8, "edges": log[-1]["edges"]}
    assert anew.read_text() == out.read_text()
    for file, max_length in [(out, 8), (anew, 7)]:  # the teacher's, and what was asked for
        program, config = evaluate.load_model(file.with_suffix(".pt2"), 60, 40, small)
        assert config["architecture"] == architecture and config["max_length"] == max_length
        hidden, _, item_vectors = program.module()(torch.ones(5), torch.ones(5, max_length, dtype=int))
        assert hidden.shape == (4, 5, max_length, 8)
        weights.append(item_vectors)
    assert not torch.equal(*weights)


@pytest.mark.parametrize("option", ["--batch-size=16", "--random", "--architecture=given.json"])
def test_the_same_seed_gives_the_same_files(small, tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    Path("given.json").write_text(json.dumps(GOOD))
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        run(small, "--out", tmp_path / name / "m.json", *SMALL, "--seed", seed, option)
    for suffix in ("json", "pt2"):
        a, b = (tmp_path / name / f"m.{suffix}" for name in "ab")
        assert a.read_bytes() == b.read_bytes()
    weights = [torch.export.load(tmp_path / n / "m.pt2").state_dict["M.weight"] for n in "ac"]
    assert not torch.equal(*weights)


EDGES = [[], 7, [["conv7"]], [[["conv3"]]], [["conv3"], ["skip"]], [["none"], ["none", "conv3"]]]
BAD = [{"cells": 0}, {"dim": 0}, {"cells": "x"}, {"dim": None}, *({"edges": edges} for edges in EDGES)]


@pytest.mark.parametrize("text", ["{", "[]", '{"dim": 8}', *(json.dumps(GOOD | bad) for bad in BAD)])
def test_bad_architectures_are_told(small, tmp_path, text):
    (path := tmp_path / "bad.json").write_text(text)
    said = fails(small, "--architecture", path, "--out", tmp_path / "a.json")
    assert said.startswith(f"{path} is no architecture; ") and not list(tmp_path.glob("a.*"))


def test_what_does_not_fit_is_told(small, write_gru, tmp_path, capsys):
    out = tmp_path / "a.json"
    to = [small, "--out", out, *SMALL]
    assert "41 items" in fails(*to, "--teacher", write_gru(41))
    assert "it must read 9 items and have 1 layers or more" in fails(
        *to, "--max-length", 9, "--teacher", write_gru(40)
    )
    assert "trained on other data" in fails(*to, "--teacher", write_gru(40, data_sha256="0"))
    assert "have 1 layers or more" in fails(*to, "--teacher", write_gru(40, layers=0))
    assert fails(*to, "--teacher", "none.pt2") == "none.pt2: No such file or directory"
    assert fails(*to, "--random", "--out", small / "a.json").startswith(f"{small}: ")
    assert "--random 2.0: no architecture" in fails(*to, "--random", 2)
    out.write_text("old")
    said = fails(*to, "--learning-rate", 1e30, "--epochs", 9)
    assert "the loss became" in said or "not finite" in said
    assert out.read_text() == "old" and not out.with_suffix(".pt2").exists()
    for wrong in ("--gamma=1.1", "--gamma=-0.1", "--epochs=1", "--out=a.pt2"):
        with pytest.raises(SystemExit, match="2"):
            run(*to, wrong)
        assert "error: --" in capsys.readouterr().err
