"""adarec_search.py: operations are causal, equations are replayed, the search finds what the data need."""

import json
import math
from functools import partial
from pathlib import Path

import formulas
import numpy as np
import prepare
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import adarec_search as search
import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch, when it exports a GRU
OPERATIONS = list(search.OPERATIONS)
# how many places back an operation reads; of a convolution, in the order of its kernel
BACK = {"conv3": [2, 1, 0], "conv5": [4, 3, 2, 1, 0], "dilated_conv3": [4, 2, 0], "skip": [0], "none": []}
BACK |= {"dilated_conv5": [8, 6, 4, 2, 0], "avg_pool": [2, 1, 0], "max_pool": [2, 1, 0], "mean": range(20)}
BACK |= {"conv7": range(6, -1, -1), "dilated_conv7": range(18, -1, -3)}
BACK |= {"min_pool": [2, 1, 0]}
# multiply-adds for each place and channel of what torch does not count
MULTIPLY_ADDS = {"avg_pool": 3, "max_pool": 3, "mean": 1, "min_pool": 3}
DEEP = [["conv3"], ["skip", "dilated_conv5"], ["avg_pool", "conv5", "max_pool"]]
SPARSE = [["max_pool"], ["dilated_conv3", "none"], ["none", "skip", "conv3"]]
MEANS = [["mean"], ["none", "conv3"], ["skip", "mean", "none"]]
ARCHITECTURE = {"cells": 1, "nodes": 1, "dim": 8, "edges": [["conv3"]]}
SHORT_SEARCH = ["--cells=1", "--nodes=2", "--dim=8", "--max-length=6", "--epochs=2", "--alpha-warm-up=1"]


@pytest.fixture
def data(write_data):
    """A data file of 60 users who count through 40 items."""
    rng = np.random.default_rng(0)
    return write_data({u: (rng.integers(40) + np.arange(3 + u % 6)) % 40 + 1 for u in range(1, 61)})


@pytest.fixture(params=[None, "conv7", "dilated_conv7", "min_pool"])
def names(request, monkeypatch):
    """The operations of the script, and the same with one that a user adds."""
    if request.param:
        monkeypatch.setitem(search.OPERATIONS, request.param, ADDED[request.param])
    return list(search.OPERATIONS)


@pytest.fixture
def float64(float64, monkeypatch):
    """Every new tensor is float64, also where the script calls `.float()`."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def run(*argv):
    """Call `main` as the command line does."""
    search.main([str(word) for word in argv])


def fails(message, *argv):
    """Check that the script ends with one line which contains `message`."""
    with pytest.raises(SystemExit) as end:
        run(*argv)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code and message in end.value.code


def log_of(out):
    """The lines of a run's log."""
    return [json.loads(line) for line in Path(f"{out}.log.jsonl").read_text().splitlines()]


def apply_operation(name, x, weight=None, bias=None):
    """o(x) of x [B, d, T], from a shifted copy of x for each place that o reads."""
    if name == "mean":
        return torch.stack([x[..., : t + 1].mean(-1) for t in range(x.shape[-1])], -1)
    copies = [F.pad(x, (back, 0))[..., : x.shape[-1]] for back in BACK[name]]
    if "conv" in name:
        return bias[:, None] + sum(weight[..., k] @ copy for k, copy in enumerate(copies))
    if name == "max_pool":  # of equal ones, the oldest gets the gradient
        return torch.stack(copies).max(0).values
    if name == "min_pool":
        return torch.stack(copies).min(0).values
    return sum(copies) / len(copies) if copies else torch.zeros_like(x)


# operations that a user may add
ADDED = {"conv7": search.Operation(width=7), "dilated_conv7": search.Operation(width=7, dilation=3)}
ADDED["min_pool"] = search.Operation(
    function=partial(apply_operation, "min_pool"), function_looks_back=2, multiply_adds=3
)


def sum_over_operations(edges, target, y, x):
    """sum_o y_o o(x) on the edge of a MixedEdges to its `target`-th later node; y [|O|]."""
    of_target = slice(target * x.shape[1], (target + 1) * x.shape[1])
    convolutions = edges.convolutions.items()
    weights = {name: (conv.weight[of_target], conv.bias[of_target]) for name, conv in convolutions}
    outputs = [apply_operation(name, x, *weights.get(name, ())) for name in search.OPERATIONS]
    return sum(y_o * output for y_o, output in zip(y, outputs, strict=True))


def forward(model, items, y, dropout=0.0):
    """Hidden states [K+1, B, T, d] and output of a supernet at y [E, |O|], by the equations of the paper."""
    size = model.M.weight.shape[1:]
    hidden = [F.dropout(math.sqrt(size[0]) * model.M(items), dropout)]
    for cell in model.cells:
        x, rows = [hidden[-1].transpose(1, 2)], iter(y)  # the rows are the edges 0-1, 0-2, 1-2, 0-3, ...
        for j in range(1, len(cell.w) + 1):
            sources = enumerate(cell.sources[:j])
            x.append(sum(sum_over_operations(s, j - i - 1, next(rows), x[i].relu()) for i, s in sources))
        total = torch.einsum("j,jbdt->btd", cell.w.exp() / cell.w.exp().sum(), torch.stack(x[1:]))
        hidden.append(hidden[-1] + F.layer_norm(total, size, cell.norm.weight, cell.norm.bias).relu())
    output = F.layer_norm(F.dropout(hidden[-1], dropout), size, model.norm.weight, model.norm.bias)
    return torch.stack(hidden), output


def one_hot(edges):
    """y [E, |O|] of an architecture."""
    names = list(search.OPERATIONS)
    return F.one_hot(torch.tensor([names.index(name) for row in edges for name in row]), len(names)).double()


def random_supernet():
    """Two cells in evaluation mode. The weights are large enough that every path through them matters."""
    torch.manual_seed(0)
    model = search.Student(20, 6, [search.MixedCell(6, num_nodes=3) for _ in range(2)], dropout=0.0)
    for weight in model.parameters():
        weight.data.normal_(std=0.5)
    model.M.weight.data[0] = 0
    return model.eval()


def keep_embedded(model):
    """A list that collects the embedded items of each batch, with their gradient."""
    embedded = []
    model.M.register_forward_hook(lambda module, inputs, x: x.retain_grad() or embedded.append(x))
    return embedded


def items_seen(edges, num_cells):
    """How many of 40 items the output at the last one depends on, by its gradient to the positions."""
    torch.manual_seed(0)
    model = search.Student(9, 8, [search.Cell(8, edges) for _ in range(num_cells)], dropout=0.0)
    embedded = keep_embedded(model)
    model(None, torch.randint(1, 10, (160, 40)))[1][:, 39].pow(2).sum().backward()
    return 40 - int(embedded[0].grad.any(2).any(0).nonzero()[0])


def count_cost(edges, dim, num_nodes, max_length):
    """A third of the shares of parameters, multiply-adds and reach, each against the most on every edge."""
    names = [name for row in edges for name in row]
    modules = nn.ModuleList(search.Edge(name, dim) for name in names)
    with FlopCounterMode(display=False) as counter:
        [module(torch.zeros(1, dim, 1)) for module in modules]
    parameters = sum(weight.numel() for weight in modules.parameters())
    multiply_adds = counter.get_total_flops() / 2 + dim * sum(MULTIPLY_ADDS.get(name, 0) for name in names)
    widest = dim**2 * max(len(BACK[name]) for name in search.OPERATIONS if "conv" in name)
    back = {name: min(max(BACK[name], default=0), max_length - 1) for name in search.OPERATIONS}
    reach = sum(back[name] for name in names) / max(back.values())
    return (
        (parameters / (widest + dim) + multiply_adds / widest + reach) / 3 / (num_nodes * (num_nodes + 1) / 2)
    )


@pytest.mark.parametrize("name", BACK)
def test_operation_reads_the_places_of_its_name_and_never_the_future(monkeypatch, name):
    monkeypatch.setattr(search, "OPERATIONS", search.OPERATIONS | ADDED)
    torch.manual_seed(0)
    edge = search.Edge(name, 4)
    for length in (1, 2, 3, 7, 20):
        x = torch.rand(2, 4, length)
        assert_close(edge(x), apply_operation(name, x, *edge.parameters()))
    if name != "none":
        x = torch.rand(512, 4, 15, requires_grad=True)
        edge(x)[:, :, 10].pow(2).sum().backward()
        assert {10 - t for t in range(15) if x.grad[:, :, t].any()} == set(BACK[name]) & set(range(11))


def test_cell_is_the_papers_equation(float64, names):
    supernet, y, items = random_supernet(), torch.rand(6, len(names)), torch.randint(1, 21, (4, 12))
    assert_close(supernet(None, items, y)[:2], forward(supernet, items, y))


def test_derived_student_is_the_supernet_at_that_architecture(float64, names):
    supernet, items = random_supernet(), torch.randint(1, 21, (4, 12))
    for edges in (DEEP, SPARSE, MEANS, [[names[-1]], ["skip", "conv3"], [names[-1], "none", names[-1]]]):
        student, expected = search.derive(supernet, edges), supernet(None, items, one_hot(edges))
        assert_close(student(None, items), expected, atol=1e-10, rtol=1e-10)
    before = [weight.clone() for weight in supernet.parameters()]
    for weight in student.parameters():  # a student has its own copy of the weights
        weight.data += 1
    assert all(map(torch.equal, before, supernet.parameters()))


def test_mixed_edges_are_the_loop_over_operations(float64, names):
    """Each operation alone, and three mixtures of all, in value and in gradient."""
    torch.manual_seed(0)
    for y in [*torch.eye(len(names)).expand(2, -1, -1).unbind(1), *torch.randn(3, 2, len(names))]:
        edges, x = search.MixedEdges(6, 2), F.relu(torch.randn(3, 6, 20)).requires_grad_()
        merged = edges(x, y.requires_grad_())
        loop = torch.stack([sum_over_operations(edges, j, y[j], x) for j in (0, 1)], 1)
        assert_close(merged, loop, atol=1e-10, rtol=1e-10)
        weight, leaves = torch.randn(3, 2, 6, 20), (y, x, *edges.parameters())
        gradients = [torch.autograd.grad(total, leaves, weight) for total in (merged, loop)]
        assert_close(*gradients, atol=1e-9, rtol=1e-9)


def test_every_name_is_an_option_and_may_stand_in_an_architecture(data, tmp_path, names):
    run(data, "--out", tmp_path / "a.json", *SHORT_SEARCH, "--operations", names[-1])
    run(data, "--out", tmp_path / "b.json", "--architecture", tmp_path / "a.json")
    for file in ("a.json", "b.json"):
        assert json.loads((tmp_path / file).read_text())["edges"] == [names[-1:], 2 * names[-1:]]


@pytest.mark.parametrize("relaxation", ["gumbel", "softmax"])
def test_supernet_has_no_gradient_to_the_future(float64, relaxation):
    supernet = random_supernet()
    embedded = keep_embedded(supernet)
    for t in range(12):
        y = search.choose(torch.zeros(6, 9), 1.0, relaxation, np.random.default_rng(0))
        hidden, output, _ = supernet(None, torch.randint(1, 21, (1, 12)), y)
        (output[:, t].pow(2).sum() + hidden[:, :, t].pow(2).sum()).backward()
        gradient = embedded.pop().grad[0]
        assert (gradient[t + 1 :] == 0).all() and gradient[t].any()


def test_program_of_a_student_names_no_device():
    # `.to(device)` moves the weights, but not a tensor that a node of the graph makes on a device by name
    cell = search.Cell(4, [["mean"], ["none", "none"], ["max_pool", "skip", "avg_pool"]])
    graph = search.export(search.Student(9, 4, [cell], 0.2), 5).graph
    assert not [node for node in graph.nodes if "device" in node.kwargs]


@pytest.mark.parametrize("cells", [1, 3])
def test_receptive_field_is_where_gradients_reach(float64, names, cells):
    for edges in (DEEP, SPARSE, [["none"], ["skip", "conv3"]], MEANS[:2], [names[-1:], [names[-1], "conv3"]]):
        assert min(40, search.receptive_field(edges, cells)) == items_seen(edges, cells)


def test_gumbel_draws_each_operation_as_often_as_softmax_says(float64):
    torch.manual_seed(0)
    alpha = torch.randn(8)
    for tau in (1.0, 0.3):
        y = search.choose(alpha.expand(20_000, 8), tau, "gumbel", np.random.default_rng(0))
        assert (y.sort(1).values - F.one_hot(torch.tensor(7), 8)).abs().max() < 1e-6
        assert stats.chisquare(y.round().sum(0), 20_000 * alpha.softmax(0)).pvalue > 1e-3


def test_straight_through_gradient_is_that_of_the_softmax(float64):
    alpha, weight = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    hard = search.choose(alpha, 0.7, "gumbel", np.random.default_rng(0))
    g = torch.from_numpy(np.random.default_rng(0).gumbel(size=(3, 8)))
    soft = ((alpha.exp() / alpha.exp().sum(1, keepdim=True)).log() + g).div(0.7).softmax(1)
    assert_close(*(torch.autograd.grad((weight * y).sum(), alpha) for y in (hard, soft)))


@pytest.mark.parametrize("dim, max_length", [(8, 2), (8, 20), (64, 10)])
def test_costs_are_counted_on_built_edges(names, dim, max_length):
    costs = search.operation_costs(dim, 3, max_length)
    assert costs.tolist() == pytest.approx([count_cost([[name]], dim, 3, max_length) for name in names])
    for edges in (DEEP, SPARSE, [names[-1:], ["skip", names[-1]]]):
        cost = count_cost(edges, dim, 3, max_length)
        assert search.cost_loss(one_hot(edges), costs).item() == pytest.approx(cost)


@pytest.mark.parametrize("cost", [0, 0.3, 0.6])
def test_random_architectures_have_the_given_cost(data, tmp_path, cost):
    costs, rng, out = search.operation_costs(16, 3, 5), np.random.default_rng(0), tmp_path / "a.json"
    run(data, "--out", out, "--random", cost, "--nodes", 3, "--dim", 16, "--cells", 1, "--max-length", 5)
    drawn = [search.random_edges(3, OPERATIONS, costs.numpy(), cost, rng) for _ in range(10)]
    for edges in [*drawn, json.loads(out.read_text())["edges"]]:
        assert search.cost_loss(one_hot(edges), costs).item() == pytest.approx(cost, rel=0.1)
        assert search.receptive_field(edges) > 0
    assert len(set(map(str, drawn))) > 5


# with a teacher, only softmax: Gumbel may draw `none` on every edge, and then the best flow is not unique
@pytest.mark.parametrize("relaxation, gamma, k", [("softmax", 0.35, 0), ("softmax", 1, 9), ("gumbel", 0, 0)])
def test_search_is_its_equations(float64, write_data, write_gru, tmp_path, relaxation, gamma, k):
    """Six epochs of three batches, with all losses and steps written out, and the same random numbers."""
    out, sizes = tmp_path / "a.json", {3 * u: 1 + u % 13 for u in range(1, 27)}
    histories = {u: np.random.default_rng(u).integers(1, 26, size=n).tolist() for u, n in sizes.items()}
    argv = [write_data(histories), "--out", out, "--relaxation", relaxation, "--beta", 0.4, "--dropout", 0.3]
    argv += ["--cells", 2, "--nodes", 2, "--dim", 6, "--max-length", 6, "--batch-size", 9, "--epochs", 6]
    argv += ["--alpha-warm-up", 2, "--alpha-learning-rate", 0.06, "--learning-rate", 0.007, "--seed", 7]
    left_out = "conv5", "none"
    argv += ["--operations", *(name for name in OPERATIONS if name not in left_out)]
    argv += ["--negatives", k, "--remember"] if k else []
    path = write_gru(items=25, layers=3)
    run(*argv, *["--teacher", path, "--gamma", gamma] * bool(gamma))

    costs = torch.tensor([count_cost([[name]], 6, 2, 6) for name in OPERATIONS])
    teacher = torch.export.load(path).module()
    torch.manual_seed(7)
    model = search.Student(25, 6, [search.MixedCell(6, 2) for _ in range(2)], 0.3)
    W = nn.ModuleList(nn.Linear(6, 10) for _ in range(2) if gamma)
    w = np.full(2, 1 / 2), np.full(3, 1 / 3)  # weights of the layers
    alpha = torch.tensor([[-1e9 if name in left_out else 0.0 for name in OPERATIONS]] * 3, requires_grad=True)
    groups = [{"params": [*model.parameters(), *W.parameters()], "weight_decay": 5e-4}]
    groups += [{"params": [alpha], "lr": 0.06, "weight_decay": 1e-4}]
    optimizer = torch.optim.AdamW(groups, 0.007, foreach=False)
    windows = [*formulas.training_windows(histories, 6).values()]
    lengths, Q = np.array([len(items) - 1 for items in windows]), formulas.negative_probabilities(windows, 25)
    for epoch, line in enumerate(log_of(out), 1):
        sums, flows, (rng, batches) = 0, 0, search.epoch_batches(lengths, 9, 7, epoch)
        for batch in batches:
            inputs, target = formulas.inputs_and_targets([windows[n] for n in batch])
            y = alpha.softmax(1)
            l_cost = (y * costs).sum()
            if relaxation == "gumbel" and epoch > 2:
                g = torch.from_numpy(rng.gumbel(size=(3, 9)))
                soft = ((alpha.log_softmax(1) + g) / (0.8 if epoch == 6 else 1.0)).softmax(1)
                y = F.one_hot(soft.argmax(1), 9) + (soft - soft.detach())
            student = *forward(model, inputs, y, 0.3), model.M.weight
            taught = [x.detach() for x in teacher(torch.ones(len(batch)), inputs)] if gamma else None
            softmax = formulas.items_of_softmax(k, Q, rng)
            terms, flow, w = formulas.loss_terms(student, taught, inputs, target, *softmax, W, w)
            loss = (1 - gamma) * terms[0] + gamma * sum(terms[1:]) + 0.4 * l_cost
            optimizer.zero_grad()
            (loss * len(target) / lengths.sum() * len(batches)).backward()
            alpha.grad = alpha.grad if epoch > 2 else None
            optimizer.step()
            sums = sums + len(target) * np.array([term.item() for term in (l_cost, *terms)])
            flows = flows + len(target) * flow
        names = ["L_cost", "L_CE", *["L_emb", "L_hid", "L_pred"] * bool(gamma)]
        np.testing.assert_allclose([line[name] for name in names], sums / lengths.sum(), rtol=1e-7)
        np.testing.assert_allclose(line["flow"], flows / lengths.sum(), atol=1e-9)
        np.testing.assert_allclose(line["alpha"], alpha.detach(), rtol=1e-7, atol=1e-9)
        assert line["mean_max_p"] == pytest.approx(alpha.softmax(1).amax(1).mean().item(), rel=1e-7)
        first, *others = (OPERATIONS[o] for o in alpha.argmax(1))
        assert line["edges"] == [[first], others]
    # the model file has the weights of the supernet after the last epoch
    items = torch.randint(1, 26, (3, 6))
    written = torch.export.load(out.with_suffix(".pt2")).module()(torch.ones(3), items)
    expected = *forward(model, items, one_hot(line["edges"])), model.M.weight
    assert_close(tuple(written), expected, atol=1e-7, rtol=1e-7)


def search_scene(folder, scene, *options):
    """The operation of one edge that a search finds on a synthetic scene, and the log."""
    data, out = folder / "scene.txt", folder / "a.json"
    prepare.main(f"synthetic {scene} --users 500 --items 40 --length 20 --seed 1 --out {data}".split())
    shape = "--cells 1 --nodes 1 --dim 16 --max-length 20 --dropout 0 --batch-size 16"
    run(data, "--out", out, *shape.split(), *options)
    return json.loads(out.read_text())["edges"][0][0], log_of(out)


@pytest.mark.parametrize("lag", [2, 4, 6])
def test_search_finds_an_operation_that_reaches_the_lag(tmp_path, lag):
    names = [name for name in OPERATIONS if name != "mean"]  # `mean` reaches every lag
    options = "--epochs", 14, "--alpha-warm-up", 6, "--beta", 0.01, "--operations", *names
    operation, log = search_scene(tmp_path, f"--scene lag --lag {lag}", *options)
    assert lag in BACK[operation] and log[-1]["mean_max_p"] > 0.3 > 0.13 > log[0]["mean_max_p"]


def test_cost_is_weighed_against_accuracy(tmp_path):
    options = "--epochs", 12, "--alpha-warm-up", 4, "--alpha-learning-rate", 0.1, "--beta"
    # trained alone, conv3 reaches an L_CE 0.54 below that of skip, and costs 0.6 beta more
    assert "conv" in search_scene(tmp_path, "--scene markov", *options, 0.3)[0]
    assert search_scene(tmp_path, "--scene markov", *options, 1.5)[0] in {"skip", "avg_pool"}
    operation, log = search_scene(tmp_path, "--scene lag --lag 4", *options, 1000)
    assert operation in {"skip", "none"} and log[-1]["L_cost"] < 0.05


def test_files_of_a_search_and_of_a_student_built_anew(data, write_gru, tmp_path):
    out, anew, vectors = tmp_path / "new" / "a.json", tmp_path / "b.json", []
    options = "--cells 3 --nodes 2 --dim 8 --gamma 0.1 --beta 0.1 --epochs 3 --batch-size 8 --alpha-warm-up 1"
    run(data, "--teacher", write_gru(40), "--out", out, *options.split())
    run(data, "--architecture", out, "--out", anew, "--cells", 1, "--dim", 4, "--max-length", 7)
    log, architecture = log_of(out), json.loads(out.read_text())
    assert [line["epoch"] for line in log] == [1, 2, 3] and log[-1]["L_CE"] < log[0]["L_CE"]
    assert architecture == {"cells": 3, "nodes": 2, "dim": 8, "edges": log[-1]["edges"]}
    assert anew.read_text() == out.read_text()
    for file, max_length in [(out, 8), (anew, 7)]:  # the teacher's, and that of the option
        path, interactions = file.with_suffix(".pt2"), evaluate.read_interactions(data)
        module, config = evaluate.load_model(path, interactions, "cpu")
        assert config["architecture"] == architecture and config["max_length"] == max_length
        hidden, _, item_vectors = module(torch.ones(5), torch.ones(5, max_length, dtype=int))
        assert hidden.shape == (4, 5, max_length, 8)
        vectors.append(item_vectors)
    assert not torch.equal(*vectors)


@pytest.mark.parametrize("option", ["--batch-size=16", "--random", "--architecture=given.json"])
def test_the_same_seed_gives_the_same_files(data, tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    Path("given.json").write_text(json.dumps(ARCHITECTURE))
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        run(data, "--out", Path(name, "m.json"), *SHORT_SEARCH, "--seed", seed, option)
    for file in ("m.json", "m.pt2"):
        assert Path("a", file).read_bytes() == Path("b", file).read_bytes()
    assert not torch.equal(*(torch.export.load(Path(n, "m.pt2")).state_dict["M.weight"] for n in "ac"))


EDGES = [[], 7, [["conv7"]], [[["conv3"]]], [["conv3"], ["skip"]], [["none"], ["none", "conv3"]]]
BAD = [
    {"cells": 0},
    {"cells": math.inf},
    {"dim": 0},
    {"cells": "x"},
    {"dim": None},
    *({"edges": edges} for edges in EDGES),
]


@pytest.mark.parametrize("text", ["{", "[]", '{"dim": 8}', *(json.dumps(ARCHITECTURE | bad) for bad in BAD)])
def test_bad_architectures_are_refused(data, tmp_path, text):
    (path := tmp_path / "bad.json").write_text(text)
    fails(f"{path} is no architecture; ", data, "--architecture", path, "--out", tmp_path / "a.json")
    assert not list(tmp_path.glob("a.*"))


def test_what_does_not_fit_is_refused(data, write_gru, tmp_path, capsys):
    out, layers = tmp_path / "a.json", "and have a layer after the embedding"
    argv = [data, "--out", out, *SHORT_SEARCH]
    fails("39 items", *argv, "--teacher", write_gru(39))
    fails("trained on other data", *argv, "--teacher", write_gru(40, data_sha256="0"))
    fails(f"must read 6 items {layers}", *argv, "--teacher", write_gru(40, layers=0))
    fails(f"must read 9 items {layers}", *argv, "--max-length", 9, "--teacher", write_gru(40))
    fails("none.pt2: No such file or directory", *argv, "--teacher", "none.pt2")
    fails(f"{data}: ", *argv, "--random", "--out", data / "a.json")
    fails("--random 2.0: no architecture", *argv, "--random", 2)
    out.write_text("old")
    fails("is not finite; remove", *argv, "--learning-rate", 1e30, "--epochs", 9)
    assert out.read_text() == "old" and not out.with_suffix(".pt2").exists()
    for wrong in ("--gamma=1.1", "--gamma=-0.1", "--epochs=1", "--out=a.pt2", "--operations=conv7"):
        with pytest.raises(SystemExit, match="2"):
            run(*argv, wrong)
        assert wrong.split("=")[0] in capsys.readouterr().err.splitlines()[-1]
