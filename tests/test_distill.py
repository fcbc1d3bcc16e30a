"""emd_distill.py: the transport is optimal, its gradient is the flow, training equals its formulas."""

import itertools
import json
import math
import resource
from pathlib import Path

import formulas
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.optimize import linear_sum_assignment, linprog
from torch.testing import assert_close

import adarec_search as search
import emd_distill as distill
import evaluate
import sasrec_teacher

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch, when it exports a GRU
NUM_ITEMS, MAX_LENGTH = 30, 6
EDGES = [["conv3"], ["max_pool", "skip"]]


@pytest.fixture
def data(write_data):
    """A data file of 30 users who count through 12 items."""
    rng = np.random.default_rng(0)
    return write_data({u: (rng.integers(12) + np.arange(3 + u % 6)) % 12 + 1 for u in range(1, 31)})


@pytest.fixture
def models(data, tmp_path):
    """A student of adarec_search.py, with dropout, and a teacher of sasrec_teacher.py. Both are untrained."""
    architecture, student, teacher = (tmp_path / name for name in ("a.json", "student.json", "teacher.pt2"))
    architecture.write_text(json.dumps({"cells": 3, "nodes": 2, "dim": 8, "edges": EDGES}))
    search.main([str(data), *f"--architecture {architecture} --out {student} --max-length 8".split()])
    sasrec_teacher.main([str(data), *f"--epochs 0 --dim 6 --max-length 8 --out {teacher}".split()])
    return student.with_suffix(".pt2"), teacher


class Tower(torch.nn.Module):
    """A model that reads users and items, with dropout."""

    def __init__(self, num_layers, dim, dim_out, num_users=50, num_items=NUM_ITEMS):
        super().__init__()
        self.P, self.M = torch.nn.Embedding(num_users + 1, dim), torch.nn.Embedding(num_items + 1, dim)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(dim, dim) for _ in range(num_layers))
        self.last = torch.nn.Linear(dim, dim_out)
        self.vectors = torch.nn.Parameter(torch.empty(num_items + 1, dim_out))
        for weight in self.parameters():
            torch.nn.init.normal_(weight, std=0.6)

    def forward(self, users, items):
        hidden = [F.dropout(self.M(items) + self.P(users)[:, None], 0.25, self.training)]
        for layer in self.layers:
            hidden.append(F.dropout(hidden[-1].cumsum(1) + layer(hidden[-1]).tanh(), 0.25, self.training))
        return torch.stack(hidden), self.last(hidden[-1]), self.vectors


def run(*argv):
    """Call `main` as the command line does."""
    distill.main([str(word) for word in argv])


def fails(message, *argv):
    """Check that the script ends with one line which contains `message`."""
    with pytest.raises(SystemExit) as end:
        run(*argv)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code and message in end.value.code


def read_model(path, data):
    """The module and the config of a model file, as evaluate.py reads them."""
    return evaluate.load_model(path, evaluate.read_interactions(data), "cpu")


def log_of(path):
    """The lines of a run's log."""
    return [json.loads(line) for line in Path(f"{path}.log.jsonl").read_text().splitlines()]


def problem(rng, rows, columns):
    """Random weights of both sides, and distances."""
    w_S, w_T = rng.dirichlet(np.ones(rows)), rng.dirichlet(np.ones(columns))
    return w_S, w_T, rng.exponential(size=(rows, columns))


def sums_of_a_flow(rows, columns):
    """The matrix that takes a flow, row after row, to the sums of its rows and of its columns."""
    return np.vstack([np.kron(np.eye(rows), np.ones(columns)), np.tile(np.eye(columns), rows)])


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (2, 4), (3, 3), (3, 4), (4, 3)])
def test_transport_is_the_best_vertex(shape):
    rng, A = np.random.default_rng(0), sums_of_a_flow(*shape)[:-1]
    for _ in range(5):
        w_S, w_T, D = problem(rng, *shape)
        costs = []  # of each vertex of the polytope, by solving for every possible basis
        for basis in map(list, itertools.combinations(range(D.size), len(A))):
            if abs(np.linalg.det(A[:, basis])) > 0.5:
                flow = np.linalg.solve(A[:, basis], np.concatenate([w_S, w_T])[:-1])
                costs.append(flow @ D.ravel()[basis] if flow.min() > -1e-12 else math.inf)
        assert (distill.transport(w_S, w_T, D) * D).sum() == pytest.approx(min(costs), abs=1e-9)


def test_500_flows_are_feasible_and_certified_by_the_dual():
    rng = np.random.default_rng(0)
    for _ in range(500):
        w_S, w_T, D = problem(rng, *rng.integers(1, 9, size=2))
        D *= 10.0 ** rng.integers(-3, 4)
        flow, A, b = distill.transport(w_S, w_T, D), sums_of_a_flow(*D.shape), np.concatenate([w_S, w_T])
        assert flow.min() >= -1e-9
        np.testing.assert_allclose(A @ flow.ravel(), b, atol=1e-9)
        # the dual: max w_S u + w_T v with u_i + v_j <= D_ij
        cost = D.ravel() / D.max()
        dual = linprog(-b, A_ub=A.T, b_ub=cost, bounds=(None, None), method="highs")
        slack = cost - dual.x @ A
        assert slack.min() > -1e-7
        assert flow.ravel() @ slack < 1e-7  # complementary slackness: nothing flows where the dual has slack
        assert flow.ravel() @ cost == pytest.approx(-dual.fun, abs=1e-7)


def test_special_transports():
    rng = np.random.default_rng(1)
    for size in (2, 4, 7):  # with equal weights, an assignment
        D = rng.exponential(size=(size, size))
        flow = distill.transport(np.full(size, 1 / size), np.full(size, 1 / size), D)
        np.testing.assert_allclose(flow[linear_sum_assignment(D)], 1 / size, atol=1e-9)
    for _ in range(20):  # on a line, the Wasserstein distance
        (w_S, w_T, _), x, y = problem(rng, 5, 7), rng.normal(size=5), rng.normal(size=7)
        D = abs(x[:, None] - y)
        cost = (distill.transport(w_S, w_T, D) * D).sum()
        assert cost == pytest.approx(stats.wasserstein_distance(x, y, w_S, w_T))
    w_S, w_T = np.array([0.0, 1.0, 0.0]), np.array([0.3, 0.0, 0.0, 0.7])  # a layer of weight 0 moves nothing
    for D in (rng.exponential(size=(3, 4)), np.zeros((3, 4))):
        np.testing.assert_allclose(distill.transport(w_S, w_T, D), w_S[:, None] * w_T, atol=1e-12)


def test_impossible_transports_are_refused():
    for bad in (math.nan, math.inf):
        with pytest.raises(SystemExit, match="is NaN or infinite"):
            distill.transport(np.ones(1), np.ones(1), np.array([[bad]]))
    with pytest.raises(SystemExit, match="could not be solved"):
        distill.transport(np.array([-0.5, 1.5]), np.array([0.5, 0.5]), np.ones((2, 2)))


def test_gradient_of_the_emd_is_the_flow():
    w_S, w_T, D = problem(np.random.default_rng(5), 3, 4)  # random distances: the optimum is unique
    flow, distance = distill.transport(w_S, w_T, D), torch.tensor(D, requires_grad=True)
    loss = distill.emd_loss(distance, flow)
    assert loss.item() == pytest.approx((flow * D).sum())
    loss.backward()
    np.testing.assert_allclose(distance.grad, flow)
    for k in range(12):
        step = 1e-5 * np.eye(12)[k].reshape(3, 4)
        up, down = ((distill.transport(w_S, w_T, D + s) * (D + s)).sum() for s in (step, -step))
        assert (up - down) / 2e-5 == pytest.approx(flow.flat[k], abs=1e-6)


def test_distances_are_their_formulas():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 9, 5, dtype=torch.float64), torch.randn(3, 9, 5, dtype=torch.float64)
    kl, mse = distill.kl_distances(student, teacher), distill.mse_distances(student, teacher)
    p, q = (x.exp() / x.exp().sum(-1, keepdim=True) for x in (student, teacher))
    for i, j in itertools.product(range(2), range(3)):
        assert kl[i, j].item() == pytest.approx((q[j] * (q[j] / p[i]).log()).sum(-1).mean().item())
        assert mse[i, j].item() == pytest.approx((student[i] - teacher[j]).square().mean().item())
    assert distill.kl_distances(teacher, teacher).diagonal().abs().max() < 1e-12
    large = 1e3 * torch.randn(20, 9, 5)
    assert distill.mse_distances(large, large).min() >= 0  # not a tiny negative number, by rounding


def test_layer_weights_are_their_formula():
    # unit costs 1/2 and 2: quotients 5 and 5/4, over tau_w = 10
    weights = distill.updated_weights(np.array([0.4, 0.6]), np.array([0.2, 1.2]))
    np.testing.assert_allclose(weights, np.exp([0.5, 0.125]) / np.exp([0.5, 0.125]).sum())
    # a free layer counts as a hundredth of the sum: quotients 100 and 1
    weights = distill.updated_weights(np.array([0.4, 0.6]), np.array([0.0, 1.2]))
    np.testing.assert_allclose(weights, np.exp([10, 0.1]) / np.exp([10, 0.1]).sum())
    np.testing.assert_array_equal(distill.updated_weights(np.array([0.4, 0.6]), np.zeros(2)), [0.5, 0.5])
    rng = np.random.default_rng(6)
    for free in [True, False] * 50:  # cheap layers get more, and every layer something
        w, c = rng.dirichlet(np.ones(4)), rng.exponential(size=4) * [not free, 1, 1, 1]
        after = distill.updated_weights(w, w * c)[np.argsort(c)]
        assert (np.diff(after) <= 0).all() and after[0] > after[-1] > 0 and after.sum() == pytest.approx(1)


def test_fixed_flows():
    for shape, layers in {(1, 1): [0], (2, 4): [1, 3], (4, 2): [0, 0, 1, 1], (3, 8): [2, 5, 7]}.items():
        w_S, w_T = (np.full(num_layers, 1 / num_layers) for num_layers in shape)
        one_to_one, last = (distill.MAPPINGS[m](w_S, w_T, np.zeros(shape)) for m in ("one-to-one", "last"))
        np.testing.assert_allclose(one_to_one, np.eye(shape[1])[layers] / shape[0])
        assert last.sum() == 1 == last[-1, -1]


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_item_losses_are_their_definition(float64, gamma):
    torch.manual_seed(0)
    student, teacher = ([torch.randn(n, dim) for n in (300, 41)] for dim in (5, 7))
    target = torch.randint(1, 41, (300,))
    for x in student:
        x.requires_grad_()
    loss, l_ce, l_pred = distill.ItemLosses.apply(*student, target, *teacher, gamma)
    z, z_T = (output @ item_vectors[1:].T for output, item_vectors in (student, teacher))
    ce = F.cross_entropy(z, target - 1)
    kl = F.kl_div(z.log_softmax(1), z_T.softmax(1), reduction="batchmean")
    expected = (1 - gamma) * ce + gamma * kl
    assert_close((loss, l_ce, l_pred), (expected, ce, kl if gamma else 0 * kl))
    assert not (l_ce.requires_grad or l_pred.requires_grad)
    assert_close(*(torch.autograd.grad(3 * total, student) for total in (loss, expected)))


def test_l_pred_survives_scores_that_are_far_from_0():
    # one feature adds the same to all scores of a position: the softmax is the same, float32 loses digits
    torch.manual_seed(0)
    output, vectors, target = torch.randn(50, 5), torch.randn(41, 5), torch.randint(1, 41, (50,))
    output[:, 4], far = 1, vectors + torch.tensor([0, 0, 0, 0, 50.0])
    assert abs(distill.ItemLosses.apply(output, far, target, output, vectors, 0.5)[2]) < 1e-5


def test_item_losses_never_hold_all_scores():
    output, vectors = torch.randn(4000, 4), torch.randn(40_001, 4)
    before, target = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, torch.randint(1, 40_001, (4000,))
    teacher = output.detach(), vectors
    distill.ItemLosses.apply(output.requires_grad_(), vectors, target, *teacher, 0.5)[0].backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    assert grown < 400  # MiB; the scores of one model alone are 610


def test_a_remembered_teacher_is_asked_once():
    torch.manual_seed(0)
    teacher, batch_sizes, answers = Tower(2, 3, 4).eval(), [], {}
    ids, items = torch.tensor([3, 1, 5]), torch.tensor([[4, 2, 0], [7, 0, 0], [1, 2, 3]])
    counted = lambda users, items: batch_sizes.append(len(users)) or teacher(users, items)  # noqa: E731
    for k in ([0, 1], [2], [2, 0, 1], [1, 2]):
        batch = ids[k], items[k], items[k] > 0, ids[k].numpy()
        remembered = distill.ask_teacher(counted, *batch, answers)
        assert_close(remembered, distill.ask_teacher(teacher, *batch, None))
    assert batch_sizes == [2, 1] and remembered[1].shape == (4, 4)


LR, FINAL, DECAY, GAMMA, BATCH, EPOCHS, PATIENCE, SEED = 0.05, 0.25, 0.3, 0.3, 4, 6, 2, 5
# the flow from two student layers to three teacher layers; `proportional` is a mapping that a user adds
FLOWS = {"emd": formulas.cheapest_flow, "proportional": lambda w_S, w_T, D: w_S[:, None] * w_T}
FLOWS["one-to-one"] = lambda *_: np.array([[0, 0.5, 0], [0, 0, 0.5]])
FLOWS["last"] = lambda *_: np.array([[0, 0, 0], [0, 0, 1.0]])
FLOWS["none"] = lambda *_: np.zeros((2, 3))  # L_hid is 0


def replay(student, teacher, histories, distance, mapping, k):
    """HR@10, NDCG@10, losses and flow of each epoch; the best epoch and its weights."""
    torch.manual_seed(SEED)
    W, w = [torch.nn.Linear(3, 5) for _ in range(2) if teacher], (np.full(2, 1 / 2), np.full(3, 1 / 3))
    weights = [p for module in (student, *W) for p in module.parameters()]
    moments, log, best, step = [(torch.zeros_like(p), torch.zeros_like(p)) for p in weights], [], 0, 0
    users, windows = zip(*formulas.training_windows(histories, MAX_LENGTH).items(), strict=True)
    lengths = np.array([len(items) - 1 for items in windows])
    Q = formulas.negative_probabilities(windows, NUM_ITEMS)
    while len(log) <= min(EPOCHS, best + PATIENCE):
        sums, (rng, batches) = 0, distill.epoch_batches(lengths, BATCH, SEED, len(log))
        student.train()
        for batch in batches if log else ():
            ids = torch.tensor([users[n] for n in batch])
            inputs, target = formulas.inputs_and_targets([windows[n] for n in batch])
            learner, taught = student(ids, inputs), teacher and [x.detach() for x in teacher(ids, inputs)]
            if teacher and step == 0:  # the projections begin at least squares, with layers one-to-one
                X, Y = learner[0][:, inputs > 0].detach(), taught[0][:, inputs > 0]
                for projection, x, y in zip(W, (X[0], X[1:]), (Y[0], Y[2:]), strict=True):
                    x = torch.cat([x, torch.ones(*x.shape[:-1], 1)], -1).flatten(0, -2)
                    solution = torch.linalg.pinv(x) @ y.flatten(0, -2)
                    projection.weight.data, projection.bias.data = solution[:-1].T.clone(), solution[-1]
            settings = *formulas.items_of_softmax(k, Q, rng), W, w, distance, FLOWS.get(mapping)
            terms, flow, w = formulas.loss_terms(learner, taught, inputs, target, *settings)
            loss = (1 - GAMMA) * terms[0] + GAMMA * sum(terms[1:]) if teacher else terms[0]
            gradients = torch.autograd.grad(loss * len(target) / lengths.sum() * len(batches), weights)
            rate, step = LR * (1 - (1 - FINAL) * step / (EPOCHS * len(batches))), step + 1
            with torch.no_grad():  # AdamW
                for p, g, (m, v) in zip(weights, gradients, moments, strict=True):
                    m.copy_(0.9 * m + 0.1 * g)
                    v.copy_(0.999 * v + 0.001 * g * g)
                    p -= rate * (DECAY * p + m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
            sums = sums + len(target) * np.array([term.item() for term in terms] + flow.ravel().tolist())
        student.eval()
        ranks = []
        for user, (*seen, target, _) in ((u, items) for u, items in histories.items() if len(items) >= 3):
            _, output, vectors = student(torch.tensor([user]), torch.tensor([seen[-MAX_LENGTH:]]))
            score = (output[0, -1] @ vectors.T).tolist()
            ranks.append(1 + sum(score[i] > score[target] for i in {*range(1, NUM_ITEMS + 1)} - {*seen}))
        ndcg = np.mean([1 / math.log2(rank + 1) if rank <= 10 else 0 for rank in ranks])
        log.append([np.mean([rank <= 10 for rank in ranks]), ndcg, *np.atleast_1d(sums / lengths.sum())])
        if np.argmax([row[1] for row in log]) == len(log) - 1:
            best, best_weights = len(log) - 1, {n: p.detach().clone() for n, p in student.named_parameters()}
    return log, best, best_weights


@pytest.mark.parametrize("mapping", [*FLOWS, None])  # None: no teacher
@pytest.mark.parametrize("distance, k", [("kl", 0), ("mse", 11)])
def test_training_is_replayed(float64, write_data, write_model, tmp_path, monkeypatch, mapping, distance, k):
    # with k negatives, the student was exported in training mode and the teacher is remembered
    rng, out = np.random.default_rng(1), tmp_path / "new" / "student.pt2"
    monkeypatch.setitem(distill.MAPPINGS, "proportional", FLOWS["proportional"])
    histories = {50 - 3 * u: (rng.permutation(NUM_ITEMS)[: 1 + u] + 1).tolist() for u in range(13)}
    histories[1] = list(range(NUM_ITEMS, 0, -7))
    data = write_data(histories)
    torch.manual_seed(1)
    student, teacher = Tower(2, 3, 4), Tower(3, 5, 6) if mapping else None
    argv = [data, "--student", write_model(student, NUM_ITEMS, MAX_LENGTH, training=k > 0), "--out", out]
    argv += ["--learning-rate", LR, "--final-rate", FINAL, "--weight-decay", DECAY, "--batch-size", BATCH]
    argv += ["--epochs", EPOCHS, "--patience", PATIENCE, "--seed", SEED]
    argv += ["--negatives", k, "--remember"] if k else []
    if teacher:
        path = write_model(teacher, NUM_ITEMS, MAX_LENGTH + 1, "teacher.pt2")
        argv += ["--teacher", path, "--gamma", GAMMA, "--mapping", mapping, "--distance", distance]
    run(*argv)
    expected, best, weights = replay(student, teacher, histories, distance, mapping, k)
    log, names = log_of(out), ["L_CE", *["L_emb", "L_hid", "L_pred"] * bool(teacher)]
    for line, row in zip(log, expected, strict=True):
        terms = [line[name] for name in names] + np.ravel(line["flow"]).tolist() if line["epoch"] else [0]
        np.testing.assert_allclose([line["HR@10"], line["NDCG@10"], *terms], row, rtol=1e-7, atol=1e-7)
    module, config = read_model(out, data)
    assert_close(dict(module.named_parameters()), weights, rtol=1e-6, atol=1e-8)
    assert config["validation"].items() <= log[best].items() and config["validation"]["epoch"] == best
    assert config["max_length"] == MAX_LENGTH


def test_the_seed_decides(data, models, tmp_path):
    student, _ = models
    outs = [tmp_path / name / "student.pt2" for name in ("plain", "again", "other")]
    for out, options in zip(outs, ((), (), ("--seed", 1)), strict=True):
        run(data, "--student", student, "--epochs", 6, "--learning-rate", 0.05, "--out", out, *options)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    paths = outs[0], outs[2], student
    plain, other, start = (read_model(path, data)[0].state_dict() for path in paths)
    assert not any(torch.equal(plain[k], start[k]) or torch.equal(plain[k], other[k]) for k in plain)
    # the file still has the searched student, with dropout off
    module, config = read_model(outs[0], data)
    assert config["architecture"]["edges"] == EDGES and config["stage"] == "emd_distill"
    model = search.Student(12, 8, [search.Cell(8, EDGES) for _ in range(3)], 0.2).eval()
    model.load_state_dict(plain)
    histories = torch.ones(5, dtype=torch.int64), torch.randint(1, 13, (5, 7))
    assert_close(torch.export.load(outs[0]).module()(*histories), model(*histories))


def test_a_gru_learns_and_is_written_as_a_model(data, write_gru, models, tmp_path, capsys):
    gru, out = write_gru(), tmp_path / "out.pt2"
    argv = data, "--student", gru, "--teacher", models[1], "--out", out
    run(*argv, "--epochs", 5, "--learning-rate", 0.02)
    assert "flow, a row per student layer" in capsys.readouterr().out
    log, start, (module, config) = log_of(out), read_model(gru, data)[0].state_dict(), read_model(out, data)
    assert log[-1]["L_CE"] < log[1]["L_CE"] and config["validation"]["epoch"] > 1
    assert not any(torch.equal(weight, start[name]) for name, weight in module.state_dict().items())
    for epochs, num_lines in (9, 3), (1, 2):
        run(*argv, "--learning-rate", 0, "--patience", 2, "--epochs", epochs)
        module, config = read_model(out, data)
        assert len(log_of(out)) == num_lines and config["validation"]["epoch"] == 0  # equal is not better
        assert all(torch.equal(weight, start[name]) for name, weight in module.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["GRU", "LSTM", "Dropout"])
def test_dropout_of_a_loaded_program_is_on_and_off(kind, training, write_model):
    class Dropped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            sizes = () if kind == "Dropout" else (6, 6, 2, True, True)  # 2 layers, with biases, batch first
            self.M, self.cell = torch.nn.Embedding(13, 6), getattr(torch.nn, kind)(*sizes, 0.5)

        def forward(self, users, items):
            x = self.cell(self.M(F.pad(items, (0, 9))[:, :9]))
            x = (x if kind == "Dropout" else x[0])[:, : items.shape[1]]
            return x[None], x, self.M.weight

    model, arguments = Dropped(), (torch.ones(1, dtype=int), torch.arange(1, 9)[None])
    module = torch.export.load(write_model(model, 12, 8, training=training)).module()
    for on in (True, False, True):
        outputs = []
        for forward in (distill.with_dropout(module, on), model.train(on)):
            torch.manual_seed(0)
            outputs += [forward(*arguments)[1] for _ in range(2)]
        assert_close(outputs[:2], outputs[2:])
        assert torch.equal(*outputs[:2]) != on


def test_models_that_do_not_fit_are_refused_and_nothing_is_written(data, write_model, tmp_path, capsys):
    def model(num_layers=1, num_items=12, max_length=8, **config):
        name = f"{num_layers}-{num_items}-{max_length}-{len(config)}.pt2"
        return write_model(Tower(num_layers, 3, 4, 30, num_items), num_items, max_length, name, **config)

    good, out = model(), ("--out", tmp_path / "out.pt2")
    bad = {data: "is no model file", "none.pt2": "No such file", model(num_items=11): "for 11 items"}
    bad[model(data_sha256="0")] = "trained on other data"
    teachers = [model(num_layers=0), model(max_length=7)]
    teachers = dict.fromkeys(teachers, "must read 8 items and have a layer after the embedding")
    teachers[model(num_items=13)] = "is for 13 items, the student for 12"
    before = sorted(tmp_path.iterdir())
    for path, message in (bad | teachers).items():
        fails(message, data, "--student", good, "--teacher", path, *out)
        fails(str(path), data, "--student", good, "--teacher", path, *out)
        if path in bad:
            fails(message, data, "--student", path, *out)
    for wrong in ("--gamma=-0.1", "--gamma=1.1", "--gamma=0", "--mapping=nearest"):
        with pytest.raises(SystemExit, match="2"):
            run(data, "--student", good, "--teacher", good, *out, wrong)
        assert wrong.split("=")[0] in capsys.readouterr().err.splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == before


def test_loss_that_is_not_finite_is_refused(data, models, tmp_path):
    out = tmp_path / "out.pt2"
    argv = data, "--student", models[0], "--out", out, "--learning-rate", 1e30, "--batch-size", 2
    fails("distance between layers is NaN or infinite", *argv, "--teacher", models[1])
    fails("give --resume, or remove the file", *argv)
    (tmp_path / "out.pt2.ckpt").unlink()
    fails("is not finite; remove", *argv)
    written, student = (read_model(path, data)[0].state_dict() for path in (out, models[0]))
    assert all(torch.equal(written[name], student[name]) for name in student)  # OUT is that of epoch 0
