"""emd_distill.py: the transport is optimal, its gradient is the flow, training is its formulas, replayed."""

import itertools
import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.optimize import linear_sum_assignment, linprog

import adarec_search as search
import emd_distill as distill
import evaluate
import sasrec_teacher

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch, of exporting a GRU
ITEMS, LENGTH = 30, 6
EDGES = [["conv3"], ["max_pool", "skip"]]


@pytest.fixture
def small(write_data):
    """A data file of 30 users who count through 12 items."""
    rng = np.random.default_rng(0)
    return write_data({u: (rng.integers(12) + np.arange(3 + u % 6)) % 12 + 1 for u in range(1, 31)})


@pytest.fixture
def models(small, tmp_path):
    """A student as the search leaves it, of cells that have dropout, and an untrained teacher of stage 1."""
    found, teacher = tmp_path / "found.json", tmp_path / "teacher.pt2"
    found.write_text(json.dumps({"cells": 3, "nodes": 2, "dim": 8, "edges": EDGES}))
    search.main([str(a) for a in (small, "--architecture", found, "--out", found, "--max-length", 8)])
    shape = "--epochs", 0, "--dim", 6, "--max-length", 8
    sasrec_teacher.main([str(a) for a in (small, "--out", teacher, *shape)])
    return found.with_suffix(".pt2"), teacher


@pytest.fixture
def float64():
    """Everything that is made without a dtype is float64, in the script as in the test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Tower(torch.nn.Module):
    """A model that looks at users and items; its sizes, layers and dropout are all to be chosen."""

    def __init__(self, layers, dim, out, share=0.25, on=False, users=50, items=ITEMS):
        super().__init__()
        self.share, self.on = share, on
        self.P, self.M = torch.nn.Embedding(users + 1, dim), torch.nn.Embedding(items + 1, dim)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(dim, dim) for _ in range(layers))
        self.last, self.vectors = torch.nn.Linear(dim, out), torch.nn.Parameter(torch.empty(items + 1, out))
        for weight in self.parameters():
            torch.nn.init.normal_(weight, std=0.6)

    def forward(self, users, items):
        hidden = [F.dropout(self.M(items) + self.P(users)[:, None], self.share, self.on)]
        for layer in self.layers:
            hidden.append(F.dropout(hidden[-1].cumsum(1) + layer(hidden[-1]).tanh(), self.share, self.on))
        return torch.stack(hidden), self.last(hidden[-1]), self.vectors


def run(*argv):
    """`main` must come to its end."""
    assert distill.main([str(a) for a in argv]) is None


def fails(*argv):
    """What `main` exits with: one line, or the status of a wrong command line."""
    with pytest.raises(SystemExit) as end:
        distill.main([str(a) for a in argv])
    assert end.value.code == 2 or "\n" not in end.value.code
    return end.value.code


def weights_of(path):
    """The parameters in a model file."""
    return torch.export.load(path).state_dict


def log_of(path):
    """The lines of a model file's log."""
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
        # the dual: max w_S u + w_T v with u_i + v_j <= D_ij, by linprog as a dense problem of its own
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


def test_transports_that_cannot_be_are_told():
    for bad in (math.nan, math.inf):
        with pytest.raises(SystemExit, match="not finite"):
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
    for i, j in itertools.product(range(2), range(3)):
        total = 0
        for n in range(9):
            p = student[i, n].exp() / student[i, n].exp().sum()
            q = teacher[j, n].exp() / teacher[j, n].exp().sum()
            total += (q * (q / p).log()).sum().item()
        assert kl[i, j].item() == pytest.approx(total / 9)
        square = (student[i] - teacher[j]).square().mean().item()
        assert mse[i, j].item() == pytest.approx(square)
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
    for layers, chosen in ((1, 1), [0]), ((2, 4), [1, 3]), ((4, 2), [0, 0, 1, 1]), ((3, 8), [2, 5, 7]):
        one_to_one, last = (distill.fixed_flow(mapping, *layers) for mapping in ("one-to-one", "last"))
        np.testing.assert_allclose(one_to_one, np.eye(layers[1])[chosen] / layers[0])
        assert last.sum() == 1 == last[-1, -1]


@pytest.mark.parametrize("gamma", [0.0, 0.4])
def test_item_losses_are_their_formulas(gamma):
    torch.manual_seed(0)
    made = [torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (300, 41)]
    taught = [torch.randn(n, 7, dtype=torch.float64) for n in (300, 41)]
    target = torch.randint(1, 41, (300,))
    loss, l_ce, l_pred = distill.item_losses(*made, target, *taught, 0.7, gamma)
    z, r = (output @ vectors[1:].T for output, vectors in (made, taught))
    p, q = z.exp() / z.exp().sum(1, keepdim=True), r.exp() / r.exp().sum(1, keepdim=True)
    ce, kl = -p[range(300), target - 1].log().mean(), (q * (q / p).log()).sum(1).mean()
    assert l_ce.item() == pytest.approx(ce.item())
    assert l_pred.item() == pytest.approx(kl.item() if gamma else 0)
    expected = 0.7 * ce + gamma * kl
    torch.testing.assert_close(loss, expected)
    slopes = torch.autograd.grad(3 * loss, made), torch.autograd.grad(3 * expected, made)
    torch.testing.assert_close(*slopes)


def test_l_pred_survives_scores_that_are_far_from_0():
    # a constant in one feature adds the same to all scores of a position: softmaxes stay, float32 suffers
    torch.manual_seed(0)
    output, vectors, target = torch.randn(50, 5), torch.randn(41, 5), torch.randint(1, 41, (50,))
    output[:, 4], far = 1, vectors + torch.tensor([0, 0, 0, 0, 50.0])
    assert abs(distill.item_losses(output, far, target, output, vectors, 0.5, 0.5)[2]) < 1e-5


def test_a_remembered_teacher_is_asked_once():
    torch.manual_seed(0)
    teacher, asked, answers = Tower(2, 3, 4), [], {}
    ids, items = torch.tensor([3, 1, 5]), torch.tensor([[4, 2, 0], [7, 0, 0], [1, 2, 3]])
    ask = lambda users, items: asked.append(len(users)) or teacher(users, items)  # noqa: E731
    for k in ([0, 1], [2], [2, 0, 1], [1, 2]):
        batch = ids[k], items[k], items[k] > 0, ids[k].numpy()
        remembered, fresh = distill.ask(ask, *batch, answers), distill.ask(teacher, *batch, None)
        torch.testing.assert_close(remembered, fresh)
    assert asked == [2, 1] and remembered[1].shape == (4, 4)


def test_item_losses_never_hold_all_scores():
    output, vectors = torch.randn(4000, 4), torch.randn(40_001, 4)
    before, target = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, torch.randint(1, 40_001, (4000,))
    made = distill.item_losses(output.requires_grad_(), vectors, target, output.detach(), vectors, 0.5, 0.5)
    made[0].backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    assert grown < 400  # MiB; the scores of one model alone are 610


LR, FINAL, DECAY, GAMMA, BATCH, EPOCHS, PATIENCE, SEED = 0.05, 0.25, 0.3, 0.3, 4, 6, 2, 5


def flow_between(w_S, w_T, D, mapping):
    """The flow between two student layers and three teacher layers, without a solver."""
    if mapping != "emd":
        return np.array({"one-to-one": [[0, 0.5, 0], [0, 0, 0.5]], "last": [[0, 0, 0], [0, 0, 1]]}[mapping])
    first, left = np.zeros(3), w_S[0]
    for j in np.argsort(D[0] - D[1]):  # the first layer takes what it gets cheapest beside the second one
        first[j] = min(left, w_T[j])
        left -= first[j]
    return np.stack([first, w_T - first])


def divergences(output, vectors, target, output_T, vectors_T, negatives, count):
    """L_CE and L_pred, position after position, of the target and the others of `negatives`, each of which
    stands for 1 / `count` items.
    """
    sums = torch.zeros(2)
    for n, own in enumerate(target.tolist()):
        items = [own, *(j for j in negatives if j != own)]
        share = torch.tensor([1.0, *(1 / count[j] for j in items[1:])])
        p = share * (output[n] @ vectors[items].T).exp()
        p = p / p.sum()
        sums = sums + torch.stack([-p[0].log(), torch.zeros(())])
        if output_T is not None:
            q = share * (output_T[n] @ vectors_T[items].T).exp()
            q = q / q.sum()
            sums = sums + torch.stack([torch.zeros(()), (q * (q / p).log()).sum()])
    return sums / len(target)


def replay(student, share, teacher, histories, distance, mapping, drawn):
    """What the script is to do, in formulas and with nothing of it but its batches.

    Returns HR@10, NDCG@10, the losses and the flow of each epoch, the best epoch and its weights.
    """
    torch.manual_seed(SEED)
    W, w_S, w_T = [], np.full(2, 1 / 2), np.full(3, 1 / 3)
    if teacher:
        W = [torch.nn.Linear(student.M.weight.shape[1], teacher.M.weight.shape[1]) for _ in range(2)]
    learned = [p for module in (student, *W) for p in module.parameters()]
    moments, log, best, k = [(torch.zeros_like(p), torch.zeros_like(p)) for p in learned], [], 0, 0
    train = {u: h[:-2] if len(h) >= 3 else h for u, h in histories.items()}
    users = [u for u, h in train.items() if len(h) >= 2]
    windows = [torch.tensor(train[u][-LENGTH - 1 :]) for u in users]
    lengths, steps = np.array([len(h) for h in windows]), math.ceil(len(users) / BATCH)
    while len(log) <= min(EPOCHS, best + PATIENCE):
        student.on, student.share, sums = True, share, np.zeros(10 if teacher else 7)
        rng = np.random.default_rng([SEED, len(log)])
        torch.manual_seed(int(rng.integers(2**62)))
        for batch in distill.batches_of_like_length(lengths, BATCH, rng) if log else ():
            ids = torch.tensor([users[n] for n in batch])
            inputs = torch.nn.utils.rnn.pad_sequence([windows[n][:-1] for n in batch], batch_first=True)
            b, t = inputs.nonzero(as_tuple=True)  # the real positions, history after history
            H, output, vectors = student(ids, inputs)
            target = torch.cat([windows[n][1:] for n in batch])
            negatives, count = range(1, ITEMS + 1), np.ones(ITEMS + 1)
            if drawn:
                stands = np.bincount(torch.cat(windows), minlength=ITEMS + 1) / (lengths.sum())
                Q = [0, *(stands[1:] + 1 / ITEMS) / 2]
                negatives, count = rng.choice(ITEMS + 1, drawn, p=Q).tolist(), drawn * np.array(Q)
            made, taught, H = (output[b, t], vectors), (None, None), H[:, b, t]
            flow = np.zeros((2, 3))
            if teacher:
                H_T, output, vectors = (x.detach() for x in teacher(ids, inputs))
                H_T, taught = H_T[:, b, t], (output[b, t], vectors)
                if k == 0:  # projections begin where they map layers one-to-one with least squares
                    for projection, X, Y in zip(W, (H[0], H[1:]), (H_T[0], H_T[2:]), strict=True):
                        X = torch.cat([X, torch.ones(*X.shape[:-1], 1)], -1).flatten(0, -2).detach()
                        both = torch.linalg.pinv(X) @ Y.flatten(0, -2)
                        projection.weight.data, projection.bias.data = both[:-1].T.clone(), both[-1]
                one, other = (H[1:] @ W[1].weight.T + W[1].bias)[:, None], H_T[None, 1:]
                p, q = one.softmax(-1), other.softmax(-1)
                D = {"kl": (q * (q / p).log()).sum(-1).mean(-1), "mse": ((one - other) ** 2).mean((2, 3))}
                D = D[distance]
                flow = flow_between(w_S, w_T, D.detach().numpy(), mapping)
                if mapping == "emd":
                    paid = flow * D.detach().numpy()
                    c_S, c_T = paid.sum(1) / w_S, paid.sum(0) / w_T
                    w_S, w_T = (np.exp(c.sum() / np.maximum(c, c.sum() / 100) / 10) for c in (c_S, c_T))
                    w_S, w_T = w_S / w_S.sum(), w_T / w_T.sum()
                l_emb = ((H[0] @ W[0].weight.T + W[0].bias - H_T[0]) ** 2).mean()
                parts = [l_emb, (torch.tensor(flow) * D).sum()]
            l_ce, l_pred = divergences(*made, target, *taught, negatives, count)
            parts = [l_ce, *parts, l_pred] if teacher else [l_ce]
            loss = (1 - GAMMA) * l_ce + GAMMA * sum(parts[1:]) if teacher else l_ce
            gradients = torch.autograd.grad(loss * len(b) / ((lengths - 1).sum() / steps), learned)
            rate, k = LR * (1 - (1 - FINAL) * k / (EPOCHS * steps)), k + 1
            with torch.no_grad():  # AdamW
                for p, g, (m, v) in zip(learned, gradients, moments, strict=True):
                    m.copy_(0.9 * m + 0.1 * g)
                    v.copy_(0.999 * v + 0.001 * g * g)
                    p -= rate * (DECAY * p + m / (1 - 0.9**k) / ((v / (1 - 0.999**k)).sqrt() + 1e-8))
            sums = sums + len(b) * np.array([part.item() for part in parts] + flow.ravel().tolist())
        student.on, ranks = False, []
        for user, (*seen, target, _) in ((u, h) for u, h in histories.items() if len(h) >= 3):
            _, output, vectors = student(torch.tensor([user]), torch.tensor([seen[-LENGTH:]]))
            score = (output[0, -1] @ vectors.T).tolist()
            ranks.append(1 + sum(score[i] > score[target] for i in {*range(1, ITEMS + 1)} - {*seen}))
        gains = [1 / math.log2(rank + 1) if rank <= 10 else 0 for rank in ranks]
        log.append([np.mean([rank <= 10 for rank in ranks]), np.mean(gains), *sums / (lengths - 1).sum()])
        if np.argmax([row[1] for row in log]) == len(log) - 1:
            best, weights = len(log) - 1, {name: p.detach().clone() for name, p in student.named_parameters()}
    return log, best, weights


@pytest.mark.parametrize("mapping", ["emd", "one-to-one", "last", None])
@pytest.mark.parametrize("distance, on, share, drawn", [("kl", False, 0.4, 0), ("mse", True, 0.25, 11)])
def test_training_is_its_formulas(
    write_data, write_model, tmp_path, float64, mapping, distance, on, share, drawn
):
    # `on`: exported in training mode, and with the share of dropout to keep; without a mapping, no teacher;
    # `drawn`: how many negatives, if not all items, and then the teacher is asked once and remembered
    rng, out = np.random.default_rng(1), tmp_path / "new" / "student.pt2"
    histories = {50 - 3 * u: (rng.permutation(ITEMS)[: 1 + u] + 1).tolist() for u in range(13)}
    histories[1] = list(range(ITEMS, 0, -7))
    torch.manual_seed(1)
    student, teacher = Tower(2, 3, 4, on=on), Tower(3, 5, 6) if mapping else None
    argv = [write_data(histories), "--student", write_model(student, ITEMS, LENGTH), "--out", out]
    argv += ["--learning-rate", LR, "--final-rate", FINAL, "--weight-decay", DECAY, "--batch-size", BATCH]
    argv += ["--epochs", EPOCHS, "--patience", PATIENCE, "--seed", SEED] + ["--dropout", share] * (not on)
    argv += ["--negatives", drawn, "--remember"] if drawn else []
    if teacher:
        argv += ["--teacher", write_model(teacher, ITEMS, LENGTH + 1, "teacher.pt2"), "--gamma", GAMMA]
        argv += ["--mapping", mapping, "--distance", distance]
    run(*argv)
    expected, best, weights = replay(student, share, teacher, histories, distance, mapping, drawn)
    log, names = log_of(out), ["HR@10", "NDCG@10", "L_CE", *["L_emb", "L_hid", "L_pred"] * bool(teacher)]
    for line, row in zip(log, expected, strict=True):
        found = [line.get(name, 0) for name in names] + np.ravel(line.get("flow") or [0] * 6).tolist()
        np.testing.assert_allclose(found, row, rtol=1e-7, atol=1e-7)
    program, config = evaluate.load_model(out, 50, ITEMS)
    for name, weight in weights.items():
        torch.testing.assert_close(program.state_dict[name], weight, rtol=1e-6, atol=1e-8)
    assert config["validation"].items() <= log[best].items() and config["validation"]["epoch"] == best
    assert config["max_length"] == LENGTH


def test_the_seed_decides_and_a_teacher_of_gamma_0_does_not(small, models, tmp_path):
    student, teacher = models
    zero = "--teacher", teacher, "--gamma", 0, "--mapping", "last", "--distance", "mse"
    outs = [tmp_path / name / "student.pt2" for name in ("plain", "again", "zero", "other")]
    for out, options in zip(outs, ((), (), zero, ("--seed", 1)), strict=True):
        run(small, "--student", student, "--epochs", 25, "--patience", 25, "--out", out, *options)
    assert outs[0].read_bytes() == outs[1].read_bytes() and "L_emb" not in log_of(outs[2])[1]
    plain, _, zero, other, start = (weights_of(path) for path in (*outs, student))
    assert plain.keys() == zero.keys() and all(torch.equal(plain[k], zero[k]) for k in plain)
    assert not any(torch.equal(plain[k], start[k]) or torch.equal(plain[k], other[k]) for k in plain)
    # it is still the searched student, with dropout off again
    program, config = evaluate.load_model(outs[0], 30, 12)
    assert config["architecture"]["edges"] == EDGES and config["stage"] == "emd_distill"
    model = search.Student(12, 8, 8, [search.Cell(8, EDGES) for _ in range(3)], 0.2).eval()
    model.load_state_dict(plain)
    histories = torch.ones(5, dtype=torch.int64), torch.randint(1, 13, (5, 7))
    torch.testing.assert_close(program.module()(*histories), model(*histories))


def test_a_gru_learns_and_comes_out_as_a_model(small, write_gru, models, tmp_path, capsys):
    gru, out = write_gru(), tmp_path / "out.pt2"
    argv = small, "--student", gru, "--teacher", models[1], "--out", out
    assert "exported without dropout" in fails(*argv, "--dropout", 0.1) and not out.exists()
    run(*argv, "--epochs", 5, "--learning-rate", 0.02)
    log, start, (program, config) = log_of(out), weights_of(gru), evaluate.load_model(out, 30, 12)
    assert log[-1]["L_CE"] < log[1]["L_CE"]
    assert "flow, student layers down" in capsys.readouterr().out and config["validation"]["epoch"] > 1
    assert not any(torch.equal(program.state_dict[name], start[name]) for name in start)
    run(*argv, "--learning-rate", 0, "--patience", 2, "--epochs", 9)
    config = evaluate.load_model(out, 30, 12)[1]
    assert len(log_of(out)) == 3 and config["validation"]["epoch"] == 0  # no better is not better
    assert all(torch.equal(weight, start[name]) for name, weight in weights_of(out).items())
    run(*argv, "--epochs", 0)
    assert len(log_of(out)) == 1 and evaluate.load_model(out, 30, 12)[1]["validation"] == config["validation"]


CELLS = {
    "gru": torch.nn.GRU(6, 6, 2, dropout=0.5, batch_first=True),
    "lstm": torch.nn.LSTM(6, 6, 2, dropout=0.5, batch_first=True),
    "dropout": torch.nn.Dropout(),
}


@pytest.mark.parametrize("kind", CELLS)
def test_dropout_of_a_loaded_program_is_on_and_off(kind, write_model):
    class Dropped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.M, self.cell = torch.nn.Embedding(13, 6), CELLS[kind]

        def forward(self, users, items):
            made = self.cell(self.M(F.pad(items, (0, 9))[:, :9]))
            x = (made if kind == "dropout" else made[0])[:, : items.shape[1]]
            return x[None], x, self.M.weight

    program, _ = evaluate.load_model(write_model(Dropped(), 12, 8), 9, 12)
    ids = torch.ones(1, dtype=int), torch.arange(1, 9)[None]

    def output(on, share=None):
        return distill.with_dropout(program.module(), on, share)(*ids)[1]

    torch.testing.assert_close(output(False), output(False), rtol=0, atol=0)
    torch.testing.assert_close(output(True, 0.0), output(False))
    torch.testing.assert_close(output(True, 1.0), output(True, 1.0), rtol=0, atol=0)
    assert not torch.allclose(output(True), output(False)) and not torch.allclose(output(True), output(True))
    assert not torch.allclose(output(True, 1.0), output(False))


def test_models_that_do_not_fit_are_told_and_nothing_is_written(small, write_model, tmp_path):
    def model(layers=1, items=12, length=8, **config):
        name = f"{layers}-{items}-{length}-{len(config)}.pt2"
        return write_model(Tower(layers, 3, 4, users=30, items=items), items, length, name, **config)

    good, out = model(), ("--out", tmp_path / "out.pt2")
    bad = {model(data_sha256="0"): "trained on other data", model(items=13): "for 13 items, the data have 12"}
    bad |= {small: "is no model file", "none.pt2": "none.pt2: No such file"}
    teachers = dict.fromkeys(
        (model(layers=0), model(length=7)), "it must read 8 items and have 1 layers or more"
    )
    before = sorted(tmp_path.iterdir())
    for path, says in (bad | teachers).items():
        error = fails(small, "--student", good, "--teacher", path, *out)
        assert says in error and str(path) in error
        assert path not in bad or fails(small, "--student", path, *out) == error
    for gamma in (-0.1, 1.1):
        assert fails(small, "--student", good, "--teacher", good, "--gamma", gamma, *out) == 2
    assert sorted(tmp_path.iterdir()) == before


def test_loss_that_is_not_finite_is_told_and_nothing_overwritten(small, models, tmp_path):
    out = tmp_path / "out.pt2"
    out.write_text("old")
    argv = small, "--student", models[0], "--out", out, "--learning-rate", 1e30, "--batch-size", 2
    assert "distance between layers is not finite" in fails(*argv, "--teacher", models[1])
    assert "--resume it, or remove it" in fails(*argv)
    (tmp_path / "out.pt2.ckpt").unlink()
    assert "the loss became" in fails(*argv)
    assert out.read_text() == "old"
