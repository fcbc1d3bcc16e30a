"""emd_distill.py: the transport is optimal, its gradient is the flow, and each switch does what it says."""

import itertools
import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment, linprog

import adarec_search as search
import emd_distill as distill
import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch, of exporting a GRU
EDGES = [["conv3"], ["max_pool", "skip"]]


@pytest.fixture
def small(write_data):
    """A data file of 30 users who count through 12 items."""
    rng = np.random.default_rng(0)
    return write_data({u: (rng.integers(12) + np.arange(3 + u % 6)) % 12 + 1 for u in range(1, 31)})


@pytest.fixture
def architecture(tmp_path):
    """An architecture file of three small cells."""
    path = tmp_path / "architecture.json"
    path.write_text(json.dumps({"cells": 3, "nodes": 2, "dim": 8, "edges": EDGES}))
    return path


def run(*argv):
    """`main` must end with status 0."""
    assert distill.main([str(a) for a in argv]) == 0


def fails(argv, capsys):
    """The one line that `main` says on standard error before it ends with status 2."""
    assert distill.main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("emd_distill.py: ") and error.count("\n") == 1
    return error


def weights_of(path):
    """The parameters in a model file."""
    return torch.export.load(path).state_dict


def log_of(path):
    """The lines of a model file's log."""
    return [json.loads(line) for line in Path(f"{path}.log.jsonl").read_text().splitlines()]


def problem(rng, rows, columns):
    """Random weights of both sides, and distances."""
    return (
        rng.dirichlet(np.ones(rows)),
        rng.dirichlet(np.ones(columns)),
        rng.exponential(size=(rows, columns)),
    )


# ---- Transport ---------------------------------------------------------------------------------------------


def cost_of_best_vertex(w_S, w_T, D):
    """The least cost over all vertices of the transport polytope, by solving for every possible basis."""
    rows, columns = D.shape
    A = np.zeros((rows + columns, rows * columns))
    for i, j in itertools.product(range(rows), range(columns)):
        A[i, i * columns + j] = A[rows + j, i * columns + j] = 1
    b, best = np.concatenate([w_S, w_T]), math.inf
    for basis in itertools.combinations(range(rows * columns), rows + columns - 1):
        part = A[:-1, basis]
        if abs(np.linalg.det(part)) > 0.5:
            flow = np.linalg.solve(part, b[:-1])
            if flow.min() > -1e-12:
                best = min(best, flow @ D.ravel()[list(basis)])
    return best


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (2, 4), (3, 3), (3, 4), (4, 3)])
def test_transport_is_the_best_vertex(shape):
    rng = np.random.default_rng(0)
    for _ in range(5):
        w_S, w_T, D = problem(rng, *shape)
        flow = distill.transport(w_S, w_T, D)
        assert (flow * D).sum() == pytest.approx(cost_of_best_vertex(w_S, w_T, D), abs=1e-9)


def test_500_flows_are_feasible_and_certified_by_the_dual():
    rng = np.random.default_rng(0)
    for _ in range(500):
        w_S, w_T, D = problem(rng, *rng.integers(1, 9, size=2))
        D *= 10.0 ** rng.integers(-3, 4)
        flow = distill.transport(w_S, w_T, D)
        assert flow.min() >= -1e-9
        np.testing.assert_allclose(flow.sum(1), w_S, atol=1e-9)
        np.testing.assert_allclose(flow.sum(0), w_T, atol=1e-9)
        # the dual: max w_S u + w_T v with u_i + v_j <= D_ij, by linprog as a dense problem of its own
        rows, columns = D.shape
        pairs = list(itertools.product(range(rows), range(columns)))
        A = np.zeros((len(pairs), rows + columns))
        for k, (i, j) in enumerate(pairs):
            A[k, i] = A[k, rows + j] = 1
        objective, scale = -np.concatenate([w_S, w_T]), D.max()
        dual = linprog(objective, A_ub=A, b_ub=D.ravel() / scale, bounds=(None, None), method="highs")
        u, v = dual.x[:rows], dual.x[rows:]
        slack = D / scale - u[:, None] - v
        assert slack.min() > -1e-7
        assert (flow * slack).sum() < 1e-7  # complementary slackness: nothing flows where the dual has slack
        assert (flow * D).sum() / scale == pytest.approx(-dual.fun, abs=1e-7)


def test_uniform_square_transport_is_an_assignment():
    rng = np.random.default_rng(1)
    for size in (2, 4, 7):
        D = rng.exponential(size=(size, size))
        flow = distill.transport(np.full(size, 1 / size), np.full(size, 1 / size), D)
        rows, columns = linear_sum_assignment(D)
        assert (flow * D).sum() == pytest.approx(D[rows, columns].sum() / size)
        np.testing.assert_allclose(flow[rows, columns], 1 / size, atol=1e-9)


def test_transport_on_a_line_is_the_wasserstein_distance():
    rng = np.random.default_rng(2)
    for _ in range(20):
        w_S, w_T, _ = problem(rng, 5, 7)
        x, y = rng.normal(size=5), rng.normal(size=7)
        D = abs(x[:, None] - y)
        cost = (distill.transport(w_S, w_T, D) * D).sum()
        assert cost == pytest.approx(stats.wasserstein_distance(x, y, w_S, w_T))


def test_one_student_layer_pays_the_weighted_mean():
    _, w_T, D = problem(np.random.default_rng(3), 1, 6)
    np.testing.assert_allclose(distill.transport(np.ones(1), w_T, D)[0], w_T, atol=1e-12)


def test_a_layer_of_weight_zero_moves_nothing():
    w_S, w_T = np.array([0.0, 0.6, 0.4]), np.array([0.3, 0.0, 0.0, 0.7])
    D = np.random.default_rng(4).exponential(size=(3, 4))
    flow = distill.transport(w_S, w_T, D)
    assert abs(flow[0]).max() < 1e-12 and abs(flow[:, 1:3]).max() < 1e-12
    np.testing.assert_allclose(flow.sum(1), w_S, atol=1e-9)


def test_distances_of_zero_and_infinity():
    flow = distill.transport(np.array([0.5, 0.5]), np.ones(1), np.zeros((2, 1)))
    np.testing.assert_allclose(flow, [[0.5], [0.5]])
    for bad in (math.nan, math.inf):
        with pytest.raises(distill.BadInput, match="not finite"):
            distill.transport(np.ones(1), np.ones(1), np.array([[bad]]))


def test_a_solver_that_fails_is_told():
    with pytest.raises(distill.BadInput, match="could not be solved"):
        distill.transport(np.array([-0.5, 1.5]), np.array([0.5, 0.5]), np.ones((2, 2)))


def test_gradient_of_the_emd_is_the_flow():
    rng = np.random.default_rng(5)
    w_S, w_T, D = problem(rng, 3, 4)  # random distances: the optimum is unique
    flow = distill.transport(w_S, w_T, D)
    distance = torch.tensor(D, requires_grad=True)
    loss = distill.emd_loss(distance, flow)
    assert loss.item() == pytest.approx((flow * D).sum())
    loss.backward()
    np.testing.assert_allclose(distance.grad, flow)
    for i, j in itertools.product(range(3), range(4)):
        step = np.zeros_like(D)
        step[i, j] = 1e-5
        up, down = ((distill.transport(w_S, w_T, D + s) * (D + s)).sum() for s in (step, -step))
        assert (up - down) / 2e-5 == pytest.approx(flow[i, j], abs=1e-6)


# ---- Distances and layer weights ---------------------------------------------------------------------------


def test_mse_distances_are_their_formula():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 9, 5, dtype=torch.float64), torch.randn(3, 9, 5, dtype=torch.float64)
    distances = distill.mse_distances(student, teacher)
    for i, j in itertools.product(range(2), range(3)):
        assert distances[i, j].item() == pytest.approx((student[i] - teacher[j]).square().mean().item())


def test_distances_ignore_padding(small, write_gru, architecture, tmp_path, monkeypatch):
    # the same batches, padded by three more columns: everything must stay as it was
    argv = [small, "--teacher", write_gru(max_length=12), "--architecture", architecture, "--epochs", 2]
    argv += ["--dropout", 0]
    run(*argv, "--out", tmp_path / "a.pt2")
    real = distill.pad_batch
    monkeypatch.setattr(distill, "pad_batch", lambda *args: torch.nn.functional.pad(real(*args), (0, 3)))
    run(*argv, "--out", tmp_path / "b.pt2")
    for a, b in zip(log_of(tmp_path / "a.pt2"), log_of(tmp_path / "b.pt2"), strict=True):
        for part in ("L_CE", "L_emb", "L_hid", "L_pred", "flow"):
            np.testing.assert_allclose(a[part], b[part], rtol=1e-4, atol=1e-6)


def test_layer_weights_move_toward_cheap_layers_and_stay_positive():
    rng = np.random.default_rng(6)
    for zero in (False, True):
        for _ in range(50):
            w_S, w_T, D = problem(rng, 4, 5)
            if zero:
                D[0] = 0  # the first layer is free
            flow = distill.transport(w_S, w_T, D)
            after = distill.updated_weights(w_S, (flow * D).sum(1))
            assert (after > 0).all() and after.sum() == pytest.approx(1)
            unit = (flow * D).sum(1) / w_S
            order = np.argsort(unit)
            assert (np.diff(after[order]) <= 1e-12).all() and after[order[0]] > after[order[-1]]


@pytest.mark.parametrize("layers", [(1, 1), (2, 4), (4, 2), (3, 8), (4, 4)])
def test_fixed_flows(layers):
    one_to_one, last = (distill.fixed_flow(mapping, *layers) for mapping in ("one-to-one", "last"))
    assert one_to_one.sum() == pytest.approx(1) and last.sum() == 1 == last[-1, -1]
    np.testing.assert_allclose(one_to_one.sum(1), 1 / layers[0])
    assert one_to_one[-1, -1] > 0  # the last layers belong together
    chosen = one_to_one.argmax(1)
    assert (np.diff(chosen) >= 0).all() and (one_to_one > 0).sum() == layers[0]
    if layers == (3, 8):
        assert chosen.tolist() == [2, 5, 7]


def test_map_layers_of_each_kind():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 9, 5, dtype=torch.float64), torch.randn(4, 9, 5, dtype=torch.float64)
    w_S, w_T = np.full(2, 0.5), np.full(4, 0.25)
    least = None
    for distance, of in (("kl", distill.kl_distances), ("mse", distill.mse_distances)):
        D = of(student, teacher).numpy()
        loss, flow, next_S, next_T, _ = distill.map_layers(student, teacher, w_S, w_T, distance, "emd")
        least = loss.item()
        assert least == pytest.approx((flow * D).sum()) and flow.sum(1) == pytest.approx(w_S)
        np.testing.assert_allclose(next_T, distill.updated_weights(w_T, (flow * D).sum(0)))
        loss, flow, next_S, next_T, _ = distill.map_layers(student, teacher, w_S, w_T, distance, "last")
        assert loss.item() == pytest.approx(D[1, 3]) and next_S is w_S and next_T is w_T
        loss, flow, _, _, _ = distill.map_layers(student, teacher, w_S, w_T, distance, "one-to-one")
        assert loss.item() == pytest.approx((D[0, 1] + D[1, 3]) / 2)


# ---- Training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("final", [None, 1e-3])
def test_gamma_0_is_plain_training_bit_for_bit(small, write_gru, architecture, tmp_path, final):
    common = [small, "--architecture", architecture, "--epochs", 3, "--gamma", 0, "--max-length", 8]
    common += ["--batch-size", 8] + ([] if final is None else ["--final-learning-rate", final])
    run(*common, "--out", tmp_path / "plain.pt2")
    more = ["--teacher", write_gru(), "--mapping", "last", "--distance", "mse", "--hidden-weight", 3]
    run(*common, *more, "--out", tmp_path / "zero.pt2")
    plain, zero = weights_of(tmp_path / "plain.pt2"), weights_of(tmp_path / "zero.pt2")
    assert plain.keys() == zero.keys() and all(torch.equal(plain[k], zero[k]) for k in plain)
    # and plain training is: AdamW on the cross-entropy over all items, of the same batches; its rate may fall
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    _, starts, items = distill.read_interactions(small)
    train_end, _ = distill.leave_one_out(starts)
    users = np.flatnonzero(train_end - starts[:-1] >= 2)
    begin, end = np.maximum(starts[users], train_end[users] - 9), train_end[users]
    model = distill.Student(12, 8, 8, [distill.Cell(8, EDGES) for _ in range(3)], 0.2)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=5e-4)
    mean_count = (end - begin - 1).sum() / math.ceil(len(users) / 8)
    rates = iter(np.linspace(5e-3, final or 5e-3, 3 * math.ceil(len(users) / 8) + 1))
    losses = []
    for _ in range(3):
        model.train()
        total = 0
        for batch in distill.batches_of_like_length(end - begin, 8, rng):
            inputs = distill.pad_batch(items, begin[batch], end[batch] - 1)
            targets = distill.pad_batch(items, begin[batch] + 1, end[batch])
            scores = model.encode(inputs)[1] @ model.M.weight[1:].T
            loss = torch.nn.functional.cross_entropy(
                scores[inputs > 0], targets[inputs > 0] - 1, reduction="sum"
            )
            optimizer.zero_grad()
            (loss / mean_count).backward()
            optimizer.param_groups[0]["lr"] = next(rates)
            optimizer.step()
            total += loss.item()
        losses.append(total / (end - begin - 1).sum())
    np.testing.assert_allclose([line["L_CE"] for line in log_of(tmp_path / "plain.pt2")], losses, rtol=1e-4)


def test_one_epoch_lowers_the_emd_and_leaves_the_teacher(
    small, write_gru, architecture, tmp_path, monkeypatch, capsys
):
    loaded, real = [], distill.load_model

    def spy(*args):
        program, config = real(*args)
        loaded.append((program, {k: v.clone() for k, v in program.state_dict().items()}))
        return program, config

    monkeypatch.setattr(distill, "load_model", spy)
    out = tmp_path / "new" / "student.pt2"
    run(
        small,
        "--teacher",
        write_gru(),
        "--architecture",
        architecture,
        "--out",
        out,
        "--batch-size",
        4,
        "--epochs",
        3,
    )
    ((program, before),) = loaded
    assert before and all(torch.equal(before[k], v) for k, v in program.state_dict().items())
    log = log_of(out)
    assert log[1]["L_hid"] < log[0]["L_hid"] and log[1]["L_emb"] < log[0]["L_emb"]
    assert np.shape(log[0]["flow"]) == (3, 2) and np.sum(log[0]["flow"]) == pytest.approx(1)
    assert sum(log[-1]["student_weights"]) == pytest.approx(1) == sum(log[-1]["teacher_weights"])
    said = capsys.readouterr().out
    assert "flow of the last epoch" in said and said.count("weight") >= 2


def test_the_best_epoch_is_kept_and_the_file_is_a_model(small, write_gru, architecture, tmp_path):
    out = tmp_path / "student.pt2"
    run(
        small,
        "--teacher",
        write_gru(),
        "--architecture",
        architecture,
        "--out",
        out,
        "--epochs",
        40,
        "--patience",
        2,
        "--learning-rate",
        0.1,
    )
    log = log_of(out)
    best = max(log, key=lambda line: line["NDCG@10"])
    assert best["epoch"] < len(log) == best["epoch"] + 2 < 40
    program, config = evaluate.load_model(out, 30, 12, "cpu")
    assert config["validation"]["epoch"] == best["epoch"] and config["architecture"]["edges"] == EDGES
    items = torch.randint(1, 13, (5, 8))
    hidden, output, item_vectors = program(torch.ones(5), items)
    assert hidden.shape == (4, 5, 8, 8) and item_vectors.shape == (13, 8)
    for t in range(7):  # causal
        changed = items.clone()
        changed[:, t + 1 :] = torch.randint(1, 13, (5, 7 - t))
        torch.testing.assert_close(program(torch.ones(5), changed)[1][:, : t + 1], output[:, : t + 1])


def test_starts_from_the_searched_weights_beside_the_architecture(small, tmp_path, capsys):
    found = tmp_path / "a.json"
    options = [
        "--gamma",
        "0",
        "--cells",
        "2",
        "--dim",
        "8",
        "--edges",
        "conv3",
        "--epochs",
        "2",
        "--max-length",
        "8",
    ]
    assert search.main([str(small), "--out", str(found), *options]) == 0
    start = weights_of(found.with_suffix(".pt2"))
    frozen = [small, "--architecture", found, "--gamma", 0, "--epochs", 1, "--learning-rate", 1e-9]
    frozen += ["--max-length", 8]
    run(*frozen, "--out", tmp_path / "b.pt2")
    for name, weight in weights_of(tmp_path / "b.pt2").items():
        torch.testing.assert_close(weight, start[name], atol=1e-6, rtol=1e-5)
    assert "started from" in capsys.readouterr().out
    run(*frozen, "--out", tmp_path / "c.pt2", "--from-scratch")
    assert not torch.allclose(weights_of(tmp_path / "c.pt2")["M.weight"], start["M.weight"])
    other = tmp_path / "other.json"
    other.write_text(found.read_text().replace("conv3", "conv5"))
    begin = [small, "--architecture", other, "--gamma", 0, "--out", tmp_path / "d.pt2"]
    error = fails([*begin, "--start", found.with_suffix(".pt2")], capsys)
    assert "another architecture" in error and not (tmp_path / "d.pt2").exists()
    error = fails([small, "--architecture", found, "--gamma", 0, "--out", tmp_path / "d.pt2"], capsys)
    assert "reads 8 items, not 50" in error


def test_a_small_sasrec_can_be_the_student(small, write_gru, tmp_path):
    out = tmp_path / "s.pt2"
    argv = [small, "--teacher", write_gru(), "--out", out, "--student", "sasrec", "--dim", 6, "--blocks", 4]
    run(*argv, "--epochs", 2)
    program, config = evaluate.load_model(out, 30, 12, "cpu")
    assert program(torch.ones(2), torch.ones(2, 3, dtype=torch.int64))[0].shape == (5, 2, 3, 6)
    assert np.shape(log_of(out)[0]["flow"]) == (4, 2) and config["architecture"] is None


def test_switches_change_the_result(small, write_gru, architecture, tmp_path):
    results, teacher = [], write_gru()
    variants = [[], ["--mapping", "last"], ["--mapping", "one-to-one"], ["--distance", "mse"], ["--gamma", 1]]
    variants += [[f"--{part}-weight", 0] for part in ("embedding", "hidden", "prediction")]
    for k, options in enumerate(variants):
        argv = [
            small,
            "--teacher",
            teacher,
            "--architecture",
            architecture,
            "--out",
            tmp_path / f"{k}.pt2",
        ]
        run(*argv, "--epochs", 2, *options)
        results.append(weights_of(tmp_path / f"{k}.pt2")["M.weight"])
    for one, other in itertools.combinations(results, 2):
        assert not torch.equal(one, other)


def test_the_same_seed_gives_the_same_file(small, write_gru, architecture, tmp_path):
    teacher = write_gru()
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        argv = [
            small,
            "--teacher",
            teacher,
            "--architecture",
            architecture,
            "--epochs",
            2,
            "--seed",
            seed,
        ]
        run(*argv, "--out", tmp_path / name / "m.pt2")
    a, b, c = (tmp_path / name / "m.pt2" for name in "abc")
    assert a.read_bytes() == b.read_bytes()
    assert not torch.equal(weights_of(a)["M.weight"], weights_of(c)["M.weight"])


def test_item_losses_never_hold_all_scores():
    output, vectors = torch.randn(4000, 4), torch.randn(40_001, 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    target = torch.randint(1, 40_001, (4000,))
    distill.item_losses(output.requires_grad_(), vectors, target, output.detach(), vectors, 0.5, 0.5)[
        0
    ].backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    assert grown < 400  # MiB; the scores of one model alone are 610


# ---- Bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, says",
    [
        ({"cells": None}, "must have the keys"),
        ({"cells": 0}, "cells is 0"),
        ({"dim": "8"}, "dim is '8'"),
        ({"nodes": 3}, "edges for 2 nodes, but nodes is 3"),
        ({"edges": "conv3"}, "edges must be a list"),
        ({"edges": [["conv3"], ["skip"]]}, "node 2 needs 2 operations"),
        ({"edges": [["conv3"], ["skip", "conv9"]]}, "unknown operation 'conv9'"),
        ({"edges": [["conv3"], ["skip", 3]]}, "unknown operation 3"),
        ({"edges": [["none"], ["none", "none"]]}, "nothing of the input arrives"),
    ],
)
def test_bad_architecture_files_are_told(small, architecture, tmp_path, capsys, change, says):
    found = json.loads(architecture.read_text()) | change
    architecture.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
    argv = [small, "--architecture", architecture, "--gamma", 0, "--out", tmp_path / "m.pt2"]
    error = fails(argv, capsys)
    assert says in error and str(architecture) in error and not (tmp_path / "m.pt2").exists()


def test_files_that_are_none_are_told(small, architecture, tmp_path, capsys):
    out = ["--gamma", 0, "--out", tmp_path / "m.pt2"]
    assert "cannot read none.json" in fails([small, "--architecture", "none.json", *out], capsys)
    assert "is no JSON" in fails([small, "--architecture", small, *out], capsys)
    architecture.write_text("[]")
    assert "must have the keys" in fails([small, "--architecture", architecture, *out], capsys)


def test_teachers_that_do_not_fit_are_told(small, write_gru, architecture, tmp_path, capsys):
    argv = [small, "--architecture", architecture, "--out", tmp_path / "m.pt2"]
    assert "made for 13 items" in fails([*argv, "--teacher", write_gru(items=13)], capsys)
    assert "trained on other data" in fails([*argv, "--teacher", write_gru(data_sha256="0")], capsys)
    assert "no layer behind its embedding" in fails([*argv, "--teacher", write_gru(layers=0)], capsys)
    assert "lower --max-length" in fails([*argv, "--teacher", write_gru(), "--max-length", 9], capsys)
    assert "--teacher is missing" in fails(argv, capsys)


def test_options_that_do_not_fit_are_told(small, write_gru, architecture, tmp_path, capsys):
    argv = [small, "--teacher", write_gru(), "--out", tmp_path / "m.pt2"]
    assert "--architecture is missing" in fails(argv, capsys)
    assert "--start is for" in fails([*argv, "--student", "sasrec", "--start", "x.pt2"], capsys)
    assert "does not divide" in fails([*argv, "--student", "sasrec", "--heads", 3], capsys)
    rising = [*argv, "--student", "sasrec", "--final-learning-rate", 0.1]
    assert "is above --learning-rate 0.005" in fails(rising, capsys)
    with pytest.raises(SystemExit) as end:
        distill.main([str(a) for a in [*argv, "--gamma", 2]])
    assert end.value.code == 2


def test_loss_that_is_not_finite_is_told_and_nothing_overwritten(
    small, write_gru, architecture, tmp_path, capsys
):
    out = tmp_path / "m.pt2"
    out.write_text("old")
    argv = [small, "--teacher", write_gru(), "--architecture", architecture, "--out", out]
    assert "not finite" in fails([*argv, "--learning-rate", 1e30], capsys)
    assert "the loss became" in fails(
        [*argv, "--gamma", 0, "--batch-size", 2, "--learning-rate", 1e30], capsys
    )
    assert out.read_text() == "old"
