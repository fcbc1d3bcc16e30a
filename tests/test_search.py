"""adarec_search.py: the search space is causal, each equation is itself, the search finds what is there."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch.utils.flop_counter import FlopCounterMode

import adarec_search as search
import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch, of exporting a GRU
OPERATIONS = ["conv3", "conv5", "dilated_conv3", "dilated_conv5", "avg_pool", "max_pool", "skip", "none"]
SMALL = ["--gamma", "0", "--cells", "1", "--nodes", "2", "--dim", "8", "--epochs", "2", "--max-length", "6"]


@pytest.fixture
def small(write_data):
    """A data file of 30 users who count through 12 items."""
    rng = np.random.default_rng(0)
    return write_data({u: (rng.integers(12) + np.arange(3 + u % 6)) % 12 + 1 for u in range(1, 31)})


def fails(argv, capsys):
    """The one line that `main` says on standard error before it ends with status 2."""
    assert search.main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("adarec_search.py: ") and error.count("\n") == 1
    return error


def one_hot(edges):
    """y [E, |O|] of an architecture."""
    rows = [OPERATIONS.index(o) for row in edges for o in row]
    return F.one_hot(torch.tensor(rows), len(OPERATIONS)).double()


def random_supernet(cells=2, nodes=3, dim=6, items=20, length=12):
    """A supernet in float64 with weights large enough that every path through it matters."""
    torch.manual_seed(0)
    model = search.Student(items, length, dim, [search.MixedCell(dim, nodes) for _ in range(cells)], 0.0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5)
        model.M.weight[0] = 0
    return model.double().eval()


# ---- Causality ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_sees_what_its_name_says_and_never_the_future(name, training):
    torch.manual_seed(0)
    operation = search.Operation(name, 4).train(training)
    back = {
        "conv3": {0, 1, 2},
        "conv5": {0, 1, 2, 3, 4},
        "dilated_conv3": {0, 2, 4},
        "dilated_conv5": {0, 2, 4, 6, 8},
        "avg_pool": {0, 1, 2},
        "max_pool": {0, 1, 2},
        "skip": {0},
        "none": set(),
    }[name]
    seen = set()
    for _ in range(8):  # a maximum has a gradient at one item alone
        x = torch.rand(64, 4, 15, requires_grad=True)
        if name != "none":
            operation(x)[:, :, 10].pow(2).sum().backward()
            seen |= {10 - s for s in range(15) if x.grad[:, :, s].abs().sum() > 0}
    assert seen == back
    for length in (1, 2, 3):
        assert operation(torch.rand(2, 4, length)).shape == (2, 4, length)


@pytest.mark.parametrize("length", [1, 2, 7, 20])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_the_same_in_training_and_for_one_history(name, length):
    torch.manual_seed(0)
    operation, x = search.Operation(name, 4), torch.rand(1, 4, length)
    torch.testing.assert_close(operation.eval()(x), operation.train()(x))


@pytest.mark.parametrize("relaxation", ["gumbel", "softmax"])
def test_supernet_gives_exactly_no_gradient_to_the_future(relaxation):
    model, kept = random_supernet(), []
    model.M.register_forward_hook(lambda m, a, embedded: embedded.retain_grad() or kept.append(embedded))
    for t in range(12):
        y = search.choose(torch.zeros(6, 8, dtype=torch.float64), 1.0, relaxation)
        hidden, output = model.encode(torch.randint(1, 21, (3, 12)), y)
        (output[:, t].pow(2).sum() + sum(h[:, t].pow(2).sum() for h in hidden)).backward()
        gradient = kept.pop().grad
        assert (gradient[:, t + 1 :] == 0).all() and (gradient[:, t].abs().sum(-1) > 0).all()


def test_padding_changes_nothing():
    model = random_supernet()
    y = search.choose(torch.zeros(6, 8, dtype=torch.float64), 1.0, "softmax")
    items = torch.randint(1, 21, (1, 7))
    alone = model.encode(items, y)[1]
    batch = torch.zeros(3, 12, dtype=torch.int64)
    batch[1, :7], batch[2] = items[0], 5
    torch.testing.assert_close(model.encode(batch, y)[1][1, :7], alone[0])


@pytest.mark.parametrize("cells", [1, 3])
@pytest.mark.parametrize(
    "text", ["dilated_conv5", "none;skip,conv3", "conv3;none,conv5;avg_pool,none,dilated_conv3"]
)
def test_receptive_field_is_what_gradients_say(text, cells):
    torch.manual_seed(0)
    edges = search.parse_edges(text)
    model = search.Student(9, 40, 8, [search.Cell(8, edges) for _ in range(cells)], 0.0).double().eval()
    kept = []
    model.M.register_forward_hook(lambda m, a, embedded: embedded.retain_grad() or kept.append(embedded))
    reached = 0
    for _ in range(5):
        model.encode(torch.randint(1, 10, (32, 40)))[1][:, 39].pow(2).sum().backward()
        reached = max(reached, 40 - int(kept.pop().grad.abs().sum((0, 2)).nonzero()[0]))
    assert search.receptive_field(edges, cells) == reached


# ---- The mixed edge ----------------------------------------------------------------------------------------


def explicit(edges, x, y):
    """sum_o y_o o(x) to each target, every operation by itself: the oracle of MixedEdges."""
    sums = []
    for target in range(len(y)):
        total = 0
        for o, name in enumerate(OPERATIONS):
            if "conv" in name:
                weight, bias = edges.operation_weights(target, name)
                dilation = 2 if "dilated" in name else 1
                padded = F.pad(x, ((weight.shape[-1] - 1) * dilation, 0))
                out = F.conv1d(padded, weight, bias, dilation=dilation)
            elif name == "none":
                out = torch.zeros_like(x)
            else:
                out = search.Operation(name, x.shape[1])(x)
            total = total + y[target, o] * out
        sums.append(total)
    return torch.stack(sums, 1)


MIXTURES = {name: F.one_hot(torch.full((2,), o), 8).double() for o, name in enumerate(OPERATIONS)} | {
    f"random {seed}": torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for seed in range(3)
}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_merged_edge_is_the_explicit_sum(mixture, dtype, tolerance):
    torch.manual_seed(0)
    edges = search.MixedEdges(6, 2).to(dtype)
    x = F.relu(torch.randn(3, 6, 20)).to(dtype).requires_grad_()
    y = MIXTURES[mixture].to(dtype).requires_grad_()
    into = torch.randn(3, 2, 6, 20).to(dtype)
    merged, separate = edges(x, y), explicit(edges, x, y)
    torch.testing.assert_close(merged, separate, atol=tolerance, rtol=tolerance)
    leaves = [y, edges.kernels, edges.biases]
    ours = torch.autograd.grad(merged, leaves, into)
    theirs = torch.autograd.grad(separate, leaves, into)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * max(1, b.abs().max().item()), rtol=tolerance)
    # the gradient of the input, where it is positive: at 0, ReLU stops it, and pools share ties differently
    ours, theirs = (
        torch.autograd.grad(f(), x, into)[0] for f in (lambda: edges(x, y), lambda: explicit(edges, x, y))
    )
    torch.testing.assert_close(ours[x > 0], theirs[x > 0], atol=10 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("seed", range(4))
def test_derived_student_is_the_supernet_at_that_architecture(seed):
    model, rng = random_supernet(), np.random.default_rng(seed)
    edges = [[OPERATIONS[o] for o in rng.integers(8, size=j)] for j in (1, 2, 3)]
    student = search.derive(model, edges, 0.0).eval()
    items = torch.randint(1, 21, (4, 12))
    hidden, output = model.encode(items, one_hot(edges))
    ours, out, item_vectors = student(torch.ones(4), items)
    torch.testing.assert_close(ours, torch.stack(hidden), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(out, output, atol=1e-10, rtol=1e-10)
    assert torch.equal(item_vectors, model.M.weight)
    student.cells[0].w.data += 1
    student.M.weight.data += 1  # its weights are its own
    assert not torch.equal(student.cells[0].w, model.cells[0].w)
    assert not torch.equal(student.M.weight, model.M.weight)


def test_cell_is_the_papers_equation():
    torch.manual_seed(0)
    cell = search.Cell(4, [["conv3"], ["skip", "max_pool"]]).double()
    with torch.no_grad():
        for weight in cell.parameters():
            weight.normal_()
    x_0 = torch.randn(1, 5, 4, dtype=torch.float64)
    a = x_0[0].clamp(min=0)  # [T, d]
    kernel, bias = cell.operations[0][0].convolution.weight, cell.operations[0][0].convolution.bias
    past = lambda x, t, back: x[t - back] if t >= back else torch.zeros(4, dtype=torch.float64)  # noqa: E731
    x_1 = torch.stack(
        [bias + sum(kernel[:, :, 2 - back] @ past(a, t, back) for back in range(3)) for t in range(5)]
    )
    b = x_1.clamp(min=0)
    x_2 = torch.stack([a[t] + torch.stack([past(b, t, back) for back in range(3)]).amax(0) for t in range(5)])
    share = cell.w.exp() / cell.w.exp().sum()
    total = share[0] * x_1 + share[1] * x_2
    normed = (total - total.mean(-1, keepdim=True)) / (
        total.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    expected = x_0[0] + (normed * cell.norm.weight + cell.norm.bias).clamp(min=0)
    torch.testing.assert_close(cell(x_0)[0], expected)


# ---- The relaxation ----------------------------------------------------------------------------------------


def test_gumbel_draws_each_operation_as_often_as_softmax_says():
    torch.manual_seed(0)
    alpha = torch.randn(1, 8)
    for tau in (1.0, 0.3):
        y = search.choose(alpha.expand(20_000, 8), tau, "gumbel")
        assert ((y - y.round()).abs() < 1e-6).all() and torch.allclose(y.sum(1), torch.ones(20_000))
        counts = y.round().sum(0).numpy()
        expected = alpha.softmax(-1)[0].double().numpy()
        assert stats.chisquare(counts, 20_000 * expected / expected.sum()).pvalue > 1e-3


def test_straight_through_gradient_is_that_of_the_softmax():
    alpha, into = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)

    def soft(alpha):
        torch.manual_seed(1)
        g = -(torch.empty_like(alpha).exponential_()).log()
        z = (alpha - alpha.exp().sum(-1, keepdim=True).log() + g) / 0.7
        return (into * z.exp() / z.exp().sum(-1, keepdim=True)).sum()

    alpha.requires_grad_()
    torch.manual_seed(1)
    (into * search.choose(alpha, 0.7, "gumbel")).sum().backward()
    with torch.no_grad():
        for k, o in itertools.product(range(3), range(8)):
            step = torch.zeros_like(alpha)
            step[k, o] = 1e-6
            slope = (soft(alpha + step) - soft(alpha - step)) / 2e-6
            assert alpha.grad[k, o].item() == pytest.approx(slope.item(), abs=1e-7)


def test_darts_relaxation_is_the_softmax():
    alpha = torch.randn(3, 8)
    assert torch.equal(search.choose(alpha, 0.1, "softmax"), alpha.softmax(-1))


def test_temperature_falls_by_a_fifth_every_five_epochs():
    assert [search.temperature(2.0, e) for e in (1, 5, 6, 10, 11)] == pytest.approx([2, 2, 1.6, 1.6, 1.28])


def test_best_edges_are_the_largest_alpha():
    alpha = torch.randn(6, 8)
    edges = search.best_edges(alpha)
    for j in (1, 2, 3):
        for i in range(j):
            assert edges[j - 1][i] == OPERATIONS[int(alpha[search.edge_index(i, j)].argmax())]
    assert sorted(search.edge_index(i, j) for j in (1, 2, 3) for i in range(j)) == list(range(6))


# ---- L_cost ------------------------------------------------------------------------------------------------


def built(name, dim, length):
    """Parameters and multiply-adds of one operation over `length` items, counted on a module of torch."""
    if "conv" in name:
        module = torch.nn.Conv1d(dim, dim, int(name[-1]), dilation=1 + name.startswith("dilated"))
        reach = (int(name[-1]) - 1) * (1 + name.startswith("dilated"))
        with FlopCounterMode(display=False) as counter:
            module(torch.zeros(1, dim, length + reach))
        return sum(p.numel() for p in module.parameters()), counter.get_total_flops() // 2
    return 0, 3 * dim * length if "pool" in name else 0


@pytest.mark.parametrize("nodes, dim", [(1, 8), (3, 64)])
def test_costs_are_the_shares_of_built_modules(nodes, dim):
    most = built("conv5", dim, 7)
    edges = nodes * (nodes + 1) / 2
    for name, cost in zip(OPERATIONS, search.operation_costs(dim, nodes).tolist(), strict=True):
        mine = built(name, dim, 7)
        assert cost == pytest.approx((mine[0] / most[0] + mine[1] / most[1]) / 2 / edges)


def test_cost_of_an_architecture_is_its_share_of_the_dearest():
    def real(edges):
        cells = [search.Cell(16, edges) for _ in range(2)]
        counted = [search.count(cell) for cell in cells]
        return [sum(column) for column in zip(*counted, strict=True)]

    edges = [["conv3"], ["skip", "dilated_conv5"], ["none", "conv5", "conv3"]]
    mine, most = real(edges), real([["conv5"], ["conv5"] * 2, ["conv5"] * 3])
    assert most[1] == 2 * 6 * 5 * 16 * 16
    loss = search.cost_loss(one_hot(edges), search.operation_costs(16, 3))
    assert loss.item() == pytest.approx((mine[0] / most[0] + mine[1] / most[1]) / 2)
    dearest = search.cost_loss(
        one_hot([["conv5"], ["conv5"] * 2, ["conv5"] * 3]), search.operation_costs(16, 3)
    )
    assert dearest.item() == pytest.approx(1)


# ---- L_KD --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_pred", [0.0, 0.4])
def test_item_losses_are_their_formulas(weight_pred):
    torch.manual_seed(0)
    output, item_vectors = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (300, 41))
    teacher, teacher_vectors = (
        torch.randn(300, 7, dtype=torch.float64),
        torch.randn(41, 7, dtype=torch.float64),
    )
    target = torch.randint(1, 41, (300,))
    loss, l_ce, l_pred = search.item_losses(
        output, item_vectors, target, teacher, teacher_vectors, 0.6, weight_pred
    )
    z, r = output @ item_vectors[1:].T, teacher @ teacher_vectors[1:].T
    p, q = z.exp() / z.exp().sum(1, keepdim=True), r.exp() / r.exp().sum(1, keepdim=True)
    ce = -torch.stack([p[n, target[n] - 1].log() for n in range(300)]).mean()
    kl = (q * (q / p).log()).sum(1).mean()
    assert l_ce.item() == pytest.approx(ce.item()) and not l_ce.requires_grad
    assert l_pred.item() == pytest.approx(kl.item() if weight_pred else 0)
    expected = 0.6 * ce + weight_pred * kl
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(3 * loss, (output, item_vectors))
    for a, b in zip(ours, torch.autograd.grad(3 * expected, (output, item_vectors)), strict=True):
        torch.testing.assert_close(a, b)


def test_kl_distances_are_their_formula():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 9, 5, dtype=torch.float64), torch.randn(3, 9, 5, dtype=torch.float64)
    distances = search.kl_distances(student, teacher)
    for i, j in itertools.product(range(2), range(3)):
        total = 0
        for n in range(9):
            p = student[i, n].exp() / student[i, n].exp().sum()
            q = teacher[j, n].exp() / teacher[j, n].exp().sum()
            total += (q * (q / p).log()).sum().item()
        assert distances[i, j].item() == pytest.approx(total / 9)
    assert search.kl_distances(teacher, teacher).diagonal().abs().max() < 1e-12


def test_layer_losses_use_one_projection_and_real_layers():
    torch.manual_seed(0)
    W_e, W_h = torch.nn.Linear(4, 6).double(), torch.nn.Linear(4, 6).double()
    hidden, teacher = torch.randn(3, 9, 4, dtype=torch.float64), torch.randn(4, 9, 6, dtype=torch.float64)
    w_S, w_T = np.array([0.3, 0.7]), np.array([0.2, 0.2, 0.6])
    l_emb, l_hid, flow, next_S, next_T, _ = search.layer_losses(hidden, teacher, W_e, W_h, w_S, w_T)
    assert l_emb.item() == pytest.approx(
        ((hidden[0] @ W_e.weight.T + W_e.bias - teacher[0]) ** 2).mean().item()
    )
    projected = hidden[1:] @ W_h.weight.T + W_h.bias
    D = search.kl_distances(projected, teacher[1:]).detach().numpy()
    assert l_hid.item() == pytest.approx((flow * D).sum())
    np.testing.assert_allclose(flow.sum(1), w_S, atol=1e-9)
    np.testing.assert_allclose(flow.sum(0), w_T, atol=1e-9)
    np.testing.assert_allclose(next_S, search.updated_weights(w_S, (flow * D).sum(1)))
    np.testing.assert_allclose(next_T, search.updated_weights(w_T, (flow * D).sum(0)))


def test_transport_of_uniform_weights_is_an_assignment():
    rng = np.random.default_rng(0)
    for _ in range(20):
        distance = rng.exponential(size=(5, 5))
        flow = search.transport(np.full(5, 0.2), np.full(5, 0.2), distance)
        rows, columns = linear_sum_assignment(distance)
        assert (flow * distance).sum() == pytest.approx(distance[rows, columns].sum() / 5)


def test_adapted_weights_by_hand():
    # unit costs 1/2 and 2: quotients 5 and 5/4, over tau_w = 10
    weights = search.updated_weights(np.array([0.4, 0.6]), np.array([0.2, 1.2]))
    e = np.exp([0.5, 0.125])
    np.testing.assert_allclose(weights, e / e.sum())
    weights = search.updated_weights(np.array([0.4, 0.6]), np.array([0.0, 1.2]))
    assert 0.99 < weights[0] < 1 and weights.sum() == pytest.approx(1) and weights[1] > 0
    np.testing.assert_array_equal(search.updated_weights(np.array([0.4, 0.6]), np.zeros(2)), [0.5, 0.5])


# ---- The search finds what is there ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Scenes where the next item hangs on the item 2, 4 or 6 places before the last, or on the last one."""
    folder, root = tmp_path_factory.mktemp("scenes"), Path(search.__file__).parent
    for lag in (0, 2, 4, 6):
        scene = ["--scene", "lag", "--lag", lag] if lag else ["--scene", "markov"]
        size = ["--users", 500, "--items", 40, "--length", 20, "--seed", 1]
        command = [
            sys.executable,
            root / "data" / "prepare.py",
            "synthetic",
            *scene,
            *size,
            "--out",
            folder / f"{lag}.txt",
        ]
        subprocess.run([str(c) for c in command], check=True, capture_output=True)
    return folder


def searched(scenes, lag, tmp_path, beta, epochs=20):
    """The one operation that a search picks, and its log."""
    out = tmp_path / f"{lag}-{beta}.json"
    options = ["--gamma", 0, "--cells", 1, "--nodes", 1, "--dim", 16, "--max-length", 20, "--dropout", 0]
    argv = [
        scenes / f"{lag}.txt",
        "--out",
        out,
        *options,
        "--beta",
        beta,
        "--epochs",
        epochs,
        "--batch-size",
        16,
    ]
    assert search.main([str(a) for a in argv]) == 0
    log = [json.loads(line) for line in Path(f"{out}.log.jsonl").read_text().splitlines()]
    return json.loads(out.read_text())["edges"][0][0], log


REACHES = {
    2: {"conv3", "conv5", "dilated_conv3", "dilated_conv5", "avg_pool", "max_pool"},
    4: {"conv5", "dilated_conv3", "dilated_conv5"},
    6: {"dilated_conv5"},
}


@pytest.mark.parametrize("lag", [2, 4, 6])
def test_search_finds_an_operation_that_reaches_the_lag(scenes, tmp_path, lag):
    operation, log = searched(scenes, lag, tmp_path, 0.01)
    assert operation in REACHES[lag]
    assert np.shape(log[0]["alpha"]) == (1, 8) and log[-1]["sure"] > log[0]["sure"]


def test_cost_decides_where_accuracy_does_not(scenes, tmp_path):
    assert searched(scenes, 0, tmp_path, 0.3)[0] in {"skip", "avg_pool", "max_pool"}
    operation, log = searched(scenes, 4, tmp_path, 1000)
    assert operation in {"skip", "none"} and log[-1]["expected_cost"] < 0.05


# ---- Training ----------------------------------------------------------------------------------------------


def test_search_with_a_gru_as_teacher_leaves_it_alone(small, write_gru, tmp_path, monkeypatch):
    loaded, real = [], search.load_model

    def spy(*args):
        program, config = real(*args)
        loaded.append((program, {k: v.clone() for k, v in program.state_dict().items()}))
        return program, config

    monkeypatch.setattr(search, "load_model", spy)
    out = tmp_path / "new" / "a.json"
    argv = [
        small,
        "--teacher",
        write_gru(),
        "--out",
        out,
        "--cells",
        3,
        "--nodes",
        2,
        "--dim",
        8,
        "--epochs",
        3,
    ]
    assert search.main([str(a) for a in argv]) == 0
    ((program, before),) = loaded
    assert before and all(torch.equal(before[k], v) for k, v in program.state_dict().items())
    log = [json.loads(line) for line in Path(f"{out}.log.jsonl").read_text().splitlines()]
    assert len(log) == 3 and np.shape(log[0]["alpha"]) == (3, 8) and np.shape(log[0]["flow"]) == (3, 2)
    assert sum(map(sum, log[0]["flow"])) == pytest.approx(1)
    assert all(log[0][part] > 0 for part in ("L_CE", "L_emb", "L_hid", "L_pred", "L_cost", "expected_cost"))
    assert log[-1]["L_emb"] < log[0]["L_emb"] and log[-1]["L_CE"] < log[0]["L_CE"]
    architecture = json.loads(out.read_text())
    assert architecture == {"cells": 3, "nodes": 2, "dim": 8, "edges": log[-1]["edges"]}
    program, config = evaluate.load_model(out.with_suffix(".pt2"), 30, 12, "cpu")
    assert config["architecture"] == architecture and config["max_length"] == 8  # the teacher's
    hidden, output, _ = program(torch.ones(5), torch.randint(1, 13, (5, 1)))
    assert hidden.shape == (4, 5, 1, 8)
    text = out.with_suffix(".md").read_text()
    assert "```mermaid" in text and "receptive field" in text and "x_2 = " in text


def test_architecture_round_trips(small, tmp_path):
    text = "max_pool;dilated_conv5,none"
    for name in ("a", "b"):
        argv = [str(small), "--out", str(tmp_path / f"{name}.json"), *SMALL, "--edges", text]
        assert search.main(argv) == 0
        edges = json.loads((tmp_path / f"{name}.json").read_text())["edges"]
        assert edges == [["max_pool"], ["dilated_conv5", "none"]]
        text = search.edges_text(edges)


@pytest.mark.parametrize("option", [[], ["--edges", "conv3"], ["--random"], ["--random", "0.6"]])
def test_the_same_seed_gives_the_same_files(small, tmp_path, option):
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        out = tmp_path / name / "m.json"
        assert search.main([str(small), "--out", str(out), *SMALL, "--seed", str(seed), *option]) == 0
    for suffix in ("json", "pt2", "md"):
        a, b = (tmp_path / name / f"m.{suffix}" for name in "ab")
        assert a.read_bytes() == b.read_bytes()
    weights = [torch.export.load(tmp_path / n / "m.pt2").state_dict["M.weight"] for n in "ac"]
    assert not torch.equal(*weights)


def test_the_published_alpha_rate_hardly_moves_alpha(small, tmp_path):
    out = tmp_path / "m.json"
    assert (
        search.main(
            [str(small), "--out", str(out), *SMALL, "--alpha-learning-rate", "2e-5", "--alpha-warm-up", "0"]
        )
        == 0
    )
    log = [json.loads(line) for line in Path(f"{out}.log.jsonl").read_text().splitlines()]
    assert log[-1]["sure"] == pytest.approx(1 / 8, abs=1e-3)


def test_ablations_switch_parts_off(small, write_gru, tmp_path):
    weights, teacher = {}, write_gru()
    for part in ("none", "embedding", "hidden", "prediction"):
        out = tmp_path / f"{part}.json"
        argv = [small, "--teacher", teacher, "--out", out, *SMALL[2:], "--edges", "conv3"]
        argv += [] if part == "none" else [f"--{part}-weight", 0]
        assert search.main([str(a) for a in argv]) == 0
        weights[part] = torch.export.load(out.with_suffix(".pt2")).state_dict["M.weight"]
    for one, other in itertools.combinations(weights.values(), 2):
        assert not torch.equal(one, other)


def test_random_architectures_cost_what_is_asked():
    costs, rng = search.operation_costs(16, 3), np.random.default_rng(0)
    seen = set()
    for low in (0.0, 0.3, 0.8):
        for _ in range(10):
            edges = search.random_edges(3, costs.numpy(), low, rng)
            assert low - 1e-9 <= search.cost_loss(one_hot(edges), costs).item() <= low + 0.1
            assert search.receptive_field(edges) > 0
            seen.add(search.edges_text(edges))
    assert len(seen) > 20


# ---- Bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edges, says",
    [
        ("conv7", "unknown operation 'conv7'"),
        ("conv3;skip", "node 2 needs 2 operations"),
        ("conv3,skip", "node 1 needs 1 operations"),
        ("", "unknown operation ''"),
        ("none;none,none", "nothing of the input arrives"),
        ("none;none,conv3", "nothing of the input arrives"),
    ],
)
def test_bad_architectures_are_told(small, tmp_path, capsys, edges, says):
    assert says in fails([small, "--out", tmp_path / "a.json", *SMALL, "--edges", edges], capsys)
    assert not list(tmp_path.glob("a.*"))


def test_teachers_that_do_not_fit_are_told(small, write_gru, tmp_path, capsys):
    out = ["--out", tmp_path / "a.json", "--epochs", 1]
    assert "made for 13 items" in fails([small, "--teacher", write_gru(items=13), *out], capsys)
    error = fails([small, "--teacher", write_gru(), "--max-length", 9, *out], capsys)
    assert "reads 8 items; lower --max-length" in error
    assert "trained on other data" in fails([small, "--teacher", write_gru(data_sha256="0"), *out], capsys)
    assert "no layer behind its embedding" in fails([small, "--teacher", write_gru(layers=0), *out], capsys)
    assert "cannot read none.pt2" in fails([small, "--teacher", "none.pt2", *out], capsys)
    assert "--teacher is missing" in fails([small, *out], capsys)
    assert not list(tmp_path.glob("a.*"))


def test_a_teacher_of_one_layer_works(small, write_gru, tmp_path):
    argv = [small, "--teacher", write_gru(layers=1), "--out", tmp_path / "a.json", "--epochs", 1, "--dim", 8]
    assert search.main([str(a) for a in argv]) == 0


def test_names_that_do_not_fit_are_told(small, tmp_path, capsys):
    assert "ends in .json" in fails([small, "--out", tmp_path / "a.pt2", *SMALL], capsys)
    assert "cannot write" in fails([small, "--out", small / "a.json", *SMALL], capsys)


def test_loss_that_is_not_finite_is_told_and_nothing_overwritten(small, tmp_path, capsys):
    out = tmp_path / "a.json"
    out.write_text("old")
    error = fails([small, "--out", out, *SMALL, "--learning-rate", "1e30", "--epochs", "9"], capsys)
    assert "the loss became" in error or "not finite" in error
    assert out.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "data.txt"]


def test_distances_that_are_not_finite_are_told():
    with pytest.raises(search.BadInput, match="not finite"):
        search.transport(np.ones(1), np.ones(1), np.array([[math.nan]]))


@pytest.mark.parametrize(
    "option",
    [
        "--gamma=1.1",
        "--gamma=-0.1",
        "--beta=-1",
        "--nodes=0",
        "--temperature=0",
        "--relaxation=x",
        "--random=2",
    ],
)
def test_settings_out_of_range_end_with_status_2(small, tmp_path, option):
    with pytest.raises(SystemExit) as end:
        search.main([str(small), "--out", str(tmp_path / "a.json"), option])
    assert end.value.code == 2


def test_all_of_gamma_may_be_distillation(small, write_gru, tmp_path):
    argv = [
        small,
        "--teacher",
        write_gru(),
        "--out",
        tmp_path / "a.json",
        "--gamma",
        1,
        "--epochs",
        1,
        "--dim",
        8,
    ]
    assert search.main([str(a) for a in argv]) == 0


def test_alpha_waits_for_its_warm_up(small, tmp_path):
    out = tmp_path / "m.json"
    assert search.main([str(small), "--out", str(out), *SMALL, "--epochs", "4", "--alpha-warm-up", "2"]) == 0
    log = [json.loads(line) for line in Path(f"{out}.log.jsonl").read_text().splitlines()]
    assert [bool(np.any(line["alpha"])) for line in log] == [False, False, True, True]
