"""bidirectional_distill.py: who teaches whom what, worked out by hand, by brute force and by counting."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import bidirectional_distill as bd
import evaluate

SMALL = ["--teacher-dim", "6", "--student-dim", "2", "--warm-up", "2", "--epochs", "3", "--period", "2"]


@pytest.fixture
def small(write_data):
    """A data file of 40 users who count through 25 items; user 40 has 2 interactions."""
    rng = np.random.default_rng(0)
    histories = {u: (rng.integers(25) + np.arange(4 + u % 6)) % 25 + 1 for u in range(1, 40)}
    return write_data(histories | {40: [3, 4]})


def run(*argv):
    """`main` must end with status 0."""
    assert bd.main([str(a) for a in argv]) == 0


def fails(argv, capsys):
    """The one line that `main` says on standard error before it ends with status 2."""
    assert bd.main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bidirectional_distill.py: ") and error.count("\n") == 1
    return error


def weights_of(path):
    """The parameters in a model file."""
    return torch.export.load(path).state_dict


def same(one, other):
    """Whether two model files hold equal parameters."""
    one, other = weights_of(one), weights_of(other)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def log_of(out):
    """The lines of a run's log."""
    return [json.loads(line) for line in Path(f"{out}.log.jsonl").read_text().splitlines()]


def options(**changed):
    """What `weights_of` reads of the command line."""
    return SimpleNamespace(
        **{"sampling": "rank", "sign": "paper", "epsilon_exp": 0.5, "epsilon_tanh": 0.1} | changed
    )


# ---- Two users and five items, by hand ---------------------------------------------------------------------

SCORES_T = np.array([[9, 1, 5, 3, 7], [2, 2, 8, 6, 4]], np.float32)
SCORES_S = np.array([[1, 9, 5, 7, 3], [5, 1, 2, 9, 2]], np.float32)
OBSERVED = np.array([[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]], bool)
RANK_T = [[1, 4, 0, 3, 2], [3, 4, 1, 0, 2]]  # of user 2's items 1 and 2, equal, the smaller id is ahead
RANK_S = [[4, 1, 0, 2, 3], [1, 4, 2, 0, 3]]


def test_ranks_by_hand():
    assert bd.ranks(SCORES_T, OBSERVED).tolist() == RANK_T
    assert bd.ranks(SCORES_S, OBSERVED).tolist() == RANK_S


def test_probabilities_by_hand():
    rank_T, rank_S = np.array(RANK_T), np.array(RANK_S)
    assert bd.rank_discrepancy(rank_T, rank_S)[0].tolist() == [-3, 3, 0, 1, -1]
    p = bd.p_student_to_teacher(rank_T, rank_S, 0.5)
    expected = np.exp([[-1.5, 1.5, -np.inf, 0.5, -0.5], [1, 0, -0.5, -np.inf, -0.5]])
    np.testing.assert_allclose(
        p / p.sum(1, keepdims=True), expected / expected.sum(1, keepdims=True), rtol=1e-6
    )
    p = bd.p_teacher_to_student(rank_T, rank_S, 0.1)
    expected = np.tanh([[0.3, 0, 0, 0, 0.1], [0, 0, 0.1, 0, 0.1]])
    np.testing.assert_allclose(p, expected, rtol=1e-6)


def test_losses_by_hand():
    z_T, z_S = torch.tensor([0.0, 2.0], requires_grad=True), torch.tensor([3.0, -1.0], requires_grad=True)
    label = [1 / (1 + math.exp(-1.5)), 1 / (1 + math.exp(0.5))]  # sigma(z_S / 2)
    p = [0.5, 1 / (1 + math.exp(-2))]
    expected = -sum(q * math.log(a) + (1 - q) * math.log(1 - a) for q, a in zip(label, p, strict=True))
    loss = bd.bd_loss(z_T, z_S, 2.0)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert z_S.grad is None  # the one who teaches does not learn
    assert z_T.grad.tolist() == pytest.approx([a - q for q, a in zip(label, p, strict=True)], abs=1e-6)


# ---- Ranks and draws ---------------------------------------------------------------------------------------


def test_ranks_equal_a_slow_implementation():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = rng.normal(size=(3, 30)).round(1).astype(np.float32) * 10.0 ** rng.integers(-3, 9)
        scores[0, :3] = 0.0, -0.0, 0.0  # alike
        observed = rng.random((3, 30)) < 0.3
        rank = bd.ranks(scores, observed)
        for row in range(3):
            free = [i for i in range(30) if not observed[row, i]]
            order = sorted(free, key=lambda i: (-float(scores[row, i]), i))
            assert [rank[row, i] for i in order] == list(range(1, len(free) + 1))
            assert not rank[row][observed[row]].any()


@pytest.mark.parametrize("direction", [0, 1])
def test_draws_are_as_frequent_as_the_formulas_say(direction):
    rng = np.random.default_rng(1)
    observed = rng.random((1, 30)) < 0.2
    rank_T, rank_S = (bd.ranks(rng.normal(size=(1, 30)).astype(np.float32), observed) for _ in range(2))
    weights = bd.weights_of(rank_T, rank_S, options(epsilon_exp=0.1, epsilon_tanh=0.05))[direction][0]
    gap = (rank_T - rank_S)[0].astype(float)
    expected = [np.exp(gap * 0.1), np.tanh(np.maximum(-gap * 0.05, 0))][direction] * ~observed[0]
    drawn = bd.draw(weights, 50_000, rng)
    counts = np.bincount(drawn, minlength=31)[1:]
    possible = expected > 0
    assert not counts[~possible].any() and not counts[observed[0]].any()
    frequencies = 50_000 * expected[possible] / expected.sum()
    assert stats.chisquare(counts[possible], frequencies).pvalue > 1e-3


def test_where_the_teacher_is_nowhere_ahead_nothing_is_drawn():
    rank = bd.ranks(SCORES_T, OBSERVED)
    weights = bd.p_teacher_to_student(rank, rank, 0.1)
    assert bd.draw(weights[0], 7, np.random.default_rng(0)).tolist() == [0] * 7
    assert (bd.draw(bd.p_student_to_teacher(rank, rank, 0.1)[0], 7, np.random.default_rng(0)) > 0).all()


def test_a_large_discrepancy_does_not_overflow():
    rank_T, rank_S = np.array([[1, 20_000]], np.int32), np.array([[20_000, 1]], np.int32)
    weights = bd.p_student_to_teacher(rank_T, rank_S, 10.0)
    assert weights.tolist() == [[0.0, 1.0]]


def test_ablations_of_the_sampling():
    rng = np.random.default_rng(2)
    observed = np.zeros((1, 300), bool)
    observed[0, :20] = True
    rank_T, rank_S = (bd.ranks(rng.normal(size=(1, 300)).astype(np.float32), observed) for _ in range(2))
    for_T, for_S = bd.weights_of(rank_T, rank_S, options(sampling="uniform"))
    assert (for_T == ~observed).all() and (for_S == ~observed).all()
    for_T, for_S = bd.weights_of(rank_T, rank_S, options(sampling="top"))
    assert sorted(rank_S[for_T > 0]) == sorted(rank_T[for_S > 0]) == list(range(1, bd.TOP + 1))
    paper, published = (bd.weights_of(rank_T, rank_S, options(sign=s)) for s in ("paper", "published"))
    turned = bd.weights_of(rank_S, rank_T, options())
    assert np.array_equal(published[0], turned[0]) and np.array_equal(published[1], turned[1])
    assert not np.array_equal(paper[0], published[0])


def test_the_teacher_learns_the_group_that_the_student_knows_better():
    group, falls = np.arange(8), {}
    z_S = torch.full((40,), -2.0)
    z_S[group] = 2.0
    for sign in ("paper", "published"):
        z_T = torch.zeros(40)
        z_T[group] = -1.0  # the teacher has it at the bottom
        z_T.requires_grad_()
        observed = np.zeros((1, 40), bool)
        rank_T, rank_S = (bd.ranks(z.detach().numpy()[None], observed) for z in (z_T, z_S))
        weights, _ = bd.weights_of(rank_T, rank_S, options(sign=sign, epsilon_exp=0.1))
        drawn = bd.draw(weights[0], 400, np.random.default_rng(0)) - 1
        share = np.isin(drawn, group).mean()
        assert share > 0.8 if sign == "paper" else share < 0.05
        truth = torch.ones(len(group))
        before = torch.nn.functional.binary_cross_entropy_with_logits(z_T[group], truth).item()
        bd.bd_loss(z_T[drawn], z_S[drawn], 1.0).backward()
        after = torch.nn.functional.binary_cross_entropy_with_logits(
            z_T[group] - 0.01 * z_T.grad[group], truth
        )
        falls[sign] = before - after.item()
    assert falls["paper"] > 0.05 and abs(falls["published"]) < 0.01


# ---- Base models -------------------------------------------------------------------------------------------


def base_model(base):
    """A base model of 9 users and 25 items with weights large enough that each matters, not training."""
    torch.manual_seed(0)
    model = bd.BASES[base](9, 25, 4, 12)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
        for table in ("q", "W", "M"):
            if hasattr(model, table):
                getattr(model, table).weight[0] = 0
    return model.eval()


@pytest.mark.parametrize("base", bd.BASES)
def test_model_file_scores_what_training_sees_and_never_the_future(base, tmp_path):
    model = base_model(base)
    path = tmp_path / "m.pt2"
    path.write_bytes(bd.export_model(model, 12, {"items": 25, "max_length": 12}))
    program, _ = evaluate.load_model(path, 9, 25, "cpu")
    users = torch.tensor([1, 5, 9])
    items = torch.stack([torch.randperm(25)[:12] + 1 for _ in range(3)])
    hidden, output, item_vectors = program(users, items)
    assert hidden.ndim == 4 and hidden.shape[1:3] == (3, 12)
    for t in range(12):
        z = model.represent(users, items[:, : t + 1]) @ model.item_vectors().T
        torch.testing.assert_close(output[:, t] @ item_vectors.T, z, atol=1e-5, rtol=1e-5)
        changed = items.clone()
        changed[:, t + 1 :] = 1
        torch.testing.assert_close(program(users, changed)[1][:, : t + 1], output[:, : t + 1])
    padded = torch.cat([items[:, :5], torch.zeros(3, 4, dtype=torch.int64)], 1)
    torch.testing.assert_close(program(users, padded)[1][:, :5], output[:, :5], atol=1e-5, rtol=1e-5)
    assert program(users[:1], items[:1, :1])[1].shape[:2] == (1, 1)


def test_bpr_is_its_formula():
    model, users, items = base_model("bpr"), torch.tensor([1, 2]), torch.tensor([[3, 4, 0], [5, 0, 0]])
    negatives = torch.randint(1, 26, (2, 3, 2))
    loss, count, represented = model.learn(users, items, negatives)
    expected = 0
    for b, t in ((0, 0), (0, 1), (1, 0)):
        p = model.p.weight[users[b]]
        for j in negatives[b, t]:
            expected -= torch.sigmoid(p @ model.q.weight[items[b, t]] - p @ model.q.weight[j]).log()
    torch.testing.assert_close(loss, expected)
    assert count == 3 and torch.equal(represented, model.p.weight[users])


def test_cdae_is_its_formula():
    model, users, items = base_model("cdae"), torch.tensor([1, 2]), torch.tensor([[3, 4, 0], [5, 0, 0]])
    negatives = torch.randint(1, 26, (2, 3, 2))
    loss, count, represented = model.learn(users, items, negatives)
    expected = 0
    for b, real in ((0, [0, 1]), (1, [0])):
        y = torch.zeros(26)
        y[items[b, real]] = 1
        h = torch.sigmoid(y @ model.W.weight + model.v.weight[users[b]] + model.b)
        torch.testing.assert_close(represented[b, :-1], h)
        z = model.w_and_b[:, :-1] @ h + model.w_and_b[:, -1]
        for t in real:
            expected -= (
                torch.sigmoid(z[items[b, t]]).log() + (1 - torch.sigmoid(z[negatives[b, t]])).log().sum()
            )
    torch.testing.assert_close(loss, expected)
    assert count == 3
    # an item that comes twice is still one entry of y_u
    twice, once = torch.tensor([[3, 4, 3]]), torch.tensor([[3, 4]])
    torch.testing.assert_close(model(users[:1], twice)[1][0, 2], model(users[:1], once)[1][0, 1])


def test_cdae_drops_half_of_the_history_in_training_alone():
    model, users = base_model("cdae"), torch.ones(2000, dtype=torch.int64)
    items = torch.tensor([[3, 4]]).expand(2000, 2)
    assert (model.represent(users, items).std(0) < 1e-6).all()
    model.train()
    torch.manual_seed(0)
    different = model.represent(users, items).detach().numpy().round(4)
    _, counts = np.unique(different, axis=0, return_counts=True)
    assert stats.chisquare(counts, [500] * 4).pvalue > 1e-3


def test_sasrec_learns_every_next_item():
    model, users, items = base_model("sasrec"), torch.tensor([1, 2]), torch.tensor([[3, 4, 7], [5, 6, 0]])
    negatives = torch.randint(1, 26, (2, 3, 1))
    loss, count, represented = model.learn(users, items, negatives)
    output, expected = model.encode(items)[1], 0
    for b, t in ((0, 0), (0, 1), (1, 0)):
        r = output[b, t] @ model.M.weight.T
        expected -= torch.sigmoid(r[items[b, t + 1]]).log() + torch.sigmoid(-r[negatives[b, t + 1, 0]]).log()
    torch.testing.assert_close(loss, expected)
    assert count == 3
    torch.testing.assert_close(represented, torch.stack([output[0, 2], output[1, 1]]))


# ---- Training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", bd.BASES)
def test_a_run_of_each_base(small, tmp_path, base, capsys):
    out = tmp_path / "new" / "bd"
    run(small, "--base", base, "--out", out, *SMALL)
    log = log_of(out)
    assert [line["epoch"] for line in log] == [1, 2, 3, 4, 5]
    together = ("L_BD(T;S)", "L_BD(S;T)")
    assert all(log[k][part] == 0 for k in (0, 1) for part in together)
    assert all(log[k]["L_BD(T;S)"] > 0 for k in (2, 3, 4))
    assert ["student_better" in line for line in log] == [False, False, True, False, True]
    assert 0 <= log[2]["student_better"] <= 1
    for kind in ("teacher", "student"):
        _, config = evaluate.load_model(f"{out}-{kind}.pt2", 40, 25, "cpu")
        assert config["role"] == kind and config["settings"]["base"] == base
        judged = {line["epoch"]: line[f"{kind}_NDCG@10"] for line in log[2:]}
        assert config["validation"]["NDCG@10"] == max(judged.values())
        assert config["validation"]["epoch"] in judged
    reports = tmp_path / "r.json"
    assert (
        evaluate.main([str(small), f"{out}-teacher.pt2", f"{out}-student.pt2", "--split", "valid", "--json"])
        == 0
    )
    reports = json.loads(capsys.readouterr().out.split("min\n", 1)[1])
    for report in reports:
        _, config = evaluate.load_model(report["model"], 40, 25, "cpu")
        assert report["NDCG@10"] == pytest.approx(config["validation"]["NDCG@10"], abs=1e-6)


@pytest.mark.parametrize("base", bd.BASES)
def test_alone_is_alone_bit_for_bit(small, tmp_path, base):
    common = [small, "--base", base, *SMALL, "--learning-rate", 0.05]
    run(*common, "--direction", "none", "--out", tmp_path / "none")
    run(*common, "--direction", "none", "--student-dim", 3, "--out", tmp_path / "other")
    run(*common, "--lambda-teacher", 0, "--lambda-student", 0, "--out", tmp_path / "zero")
    run(*common, "--direction", "teacher-to-student", "--out", tmp_path / "down")
    run(*common, "--direction", "student-to-teacher", "--out", tmp_path / "up")
    teacher, student = (f"-{kind}.pt2" for kind in ("teacher", "student"))
    files = {
        name: (f"{tmp_path / name}{teacher}", f"{tmp_path / name}{student}") for name in ("none", "other")
    }
    files |= {
        name: (f"{tmp_path / name}{teacher}", f"{tmp_path / name}{student}")
        for name in ("zero", "down", "up")
    }
    last = {name: log_of(tmp_path / name)[-1] for name in files}
    assert last["none"]["L_CF(T)"] == last["other"]["L_CF(T)"] == last["zero"]["L_CF(T)"]
    assert last["none"]["L_CF(S)"] == last["zero"]["L_CF(S)"] != last["other"]["L_CF(S)"]
    assert same(files["none"][0], files["other"][0]) and same(files["none"][0], files["zero"][0])
    assert same(files["none"][1], files["zero"][1])
    # who does not learn from the other one is alone, too
    assert (
        last["down"]["L_CF(T)"] == last["none"]["L_CF(T)"]
        and last["down"]["L_CF(S)"] != last["none"]["L_CF(S)"]
    )
    assert (
        last["up"]["L_CF(S)"] == last["none"]["L_CF(S)"] and last["up"]["L_CF(T)"] != last["none"]["L_CF(T)"]
    )


def test_the_same_seed_gives_the_same_files(small, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(small, *SMALL, "--seed", seed, "--out", tmp_path / name / "bd")
    for kind in ("teacher", "student"):
        a, b, c = (tmp_path / name / f"bd-{kind}.pt2" for name in "abc")
        assert a.read_bytes() == b.read_bytes() and not same(a, c)


def test_variants_start_from_a_saved_warm_up(small, tmp_path, capsys):
    run(small, *SMALL, "--epochs", 0, "--out", tmp_path / "warm")
    assert len(log_of(tmp_path / "warm")) == 2
    frozen = ["--warm-up-from", tmp_path / "warm", "--epochs", 1, "--learning-rate", 1e-12]
    run(small, *SMALL, *frozen, "--out", tmp_path / "next")
    for kind in ("teacher", "student"):
        before, after = weights_of(tmp_path / f"warm-{kind}.pt2"), weights_of(tmp_path / f"next-{kind}.pt2")
        for name in before:
            torch.testing.assert_close(before[name], after[name], atol=1e-9, rtol=1e-6)
    start = [small, "--out", tmp_path / "x", "--warm-up-from", tmp_path / "warm", *SMALL]
    assert "is no bpr model" in fails([*start, "--base", "bpr"], capsys)
    assert "has other sizes" in fails([*start, "--teacher-dim", 7], capsys)
    other = tmp_path / "other.txt"
    other.write_text(small.read_text() + "41 25\n41 2\n41 3\n")
    fails([other, *start[1:]], capsys)
    text = small.read_text().splitlines()
    other.write_text("\n".join([*text[1:2], *text[0:1], *text[2:]]) + "\n")
    assert "trained on other data" in fails([other, *start[1:]], capsys)
    assert not list(tmp_path.glob("x*"))


def learner(base, data, seed, dim=4):
    """A learner of a new model on `data`."""
    torch.manual_seed(seed)
    args = SimpleNamespace(samples=2, learning_rate=0.01, weight_decay=0.0)
    return bd.Learner(bd.BASES[base](data.user_count, data.item_count, dim, data.max_length), args, [seed])


def data_of(path, base="bpr"):
    """The data of a run."""
    args = SimpleNamespace(data=path, device="cpu", base=base, max_length=10)
    return bd.Data(args, np.random.default_rng(0))


@pytest.mark.parametrize("base", bd.BASES)
def test_renewal_draws_unobserved_items_by_both_ranks(small, base, monkeypatch):
    data, args = data_of(small, base), options(samples=2)
    teacher, student = learner(base, data, 0), learner(base, data, 1)
    drawn, offsets, better, gap = bd.renew(teacher, student, data, args, 3, np.random.default_rng(0))
    assert drawn[0].shape == drawn[1].shape == (3, offsets[-1]) and drawn[0].dtype == np.int32
    ahead, asked = 0, 0
    for user in data.users:
        training = data.items[data.begin[user] : data.end[user]]
        assert offsets[user + 1] - offsets[user] == 2 * len(data.items[data.window[user] : data.end[user]])
        for side in drawn:
            items = side[:, offsets[user] : offsets[user + 1]]
            assert not np.isin(items, training).any()
        users, history = data.histories(np.array([user]))
        z = [one.model.represent(users, history) @ one.model.item_vectors().T for one in (teacher, student)]
        if data.evaluated[user] and data.items[data.end[user]] not in training:
            target = data.items[data.end[user]]
            free = np.setdiff1d(np.arange(1, 26), training)
            rank_T, rank_S = (sum((s[0, i] > s[0, target]).item() for i in free) for s in z)
            asked, ahead = asked + 1, ahead + (rank_S < rank_T)
    assert better == pytest.approx(ahead / asked) and (gap > 0).all()
    alike = bd.renew(teacher, teacher, data, args, 1, np.random.default_rng(0))
    assert (
        not alike[0][1].any() and alike[0][0].all()
    )  # nothing to teach the student; all alike for the teacher
    assert alike[2] == 0


def test_slices_of_users_make_no_difference(small, monkeypatch):
    data, args = data_of(small), options(samples=1)
    teacher, student = learner("bpr", data, 0), learner("bpr", data, 1)
    drawn = []
    for scores in (2**21, 100):  # all users at once, or 4 at a time
        monkeypatch.setattr(bd, "SCORES", scores)
        drawn.append(bd.renew(teacher, student, data, args, 2, np.random.default_rng(0))[0])
    for whole, sliced in zip(*drawn, strict=True):
        assert np.array_equal(whole, sliced)


def test_batches_hold_every_user_once_and_histories_are_training_items(small):
    data = data_of(small)
    batches = data.batches(7)
    assert sorted(np.concatenate(batches).tolist()) == data.users.tolist()
    for batch in batches:
        users, histories = data.histories(batch)
        for user, row, k in zip(users.tolist(), histories.tolist(), batch, strict=True):
            assert user == data.user_ids[k]
            assert [i for i in row if i] == data.items[data.begin[k] : data.end[k]].tolist()
        negatives = data.negatives(batch, histories.shape[1], 3, np.random.default_rng(0))
        for row, k in zip(negatives, batch, strict=True):
            assert not np.isin(row.numpy(), data.items[data.begin[k] : data.end[k]]).any()


def test_a_negative_may_be_the_validation_or_the_test_item(write_data):
    # the published code never draws them, and so learns which items to leave alone
    data = data_of(write_data({7: [1, 2, 3, 4], 8: [4, 3, 2, 1]}))
    drawn = data.negatives(np.array([0, 1]), 2, 50, np.random.default_rng(0))
    assert set(drawn[0].flatten().tolist()) == {3, 4} and set(drawn[1].flatten().tolist()) == {1, 2}


def test_switches_change_the_result(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bd, "TOP", 5)  # of 25 items
    variants = [
        [],
        ["--sign", "published"],
        ["--sampling", "uniform"],
        ["--sampling", "top"],
        ["--temperature", 9],
    ]
    variants += [["--epsilon-exp", 1], ["--epsilon-tanh", 1], ["--lambda-teacher", 1], ["--period", 1]]
    results = []
    for k, changed in enumerate(variants):
        run(small, "--base", "bpr", *SMALL, "--learning-rate", 0.05, "--out", tmp_path / str(k), *changed)
        log = log_of(tmp_path / str(k))
        results.append((log[-1]["L_CF(T)"], log[-1]["L_CF(S)"], log[-1]["L_BD(T;S)"]))
    for one, other in itertools.combinations(results, 2):
        assert one != other


# ---- Bad input ---------------------------------------------------------------------------------------------


def test_a_student_larger_than_the_teacher_is_noted(small, tmp_path, capsys):
    argv = [
        small,
        "--out",
        tmp_path / "bd",
        "--teacher-dim",
        2,
        "--student-dim",
        3,
        "--warm-up",
        0,
        "--epochs",
        0,
    ]
    run(*argv, "--base", "bpr")
    assert "the student is larger than the teacher" in capsys.readouterr().err
    assert (tmp_path / "bd-teacher.pt2").exists()


def test_a_user_who_has_seen_every_item_is_told(write_data, tmp_path, capsys):
    data = write_data({1: [1, 2, 3, 1, 2], 2: [1, 2, 3]})
    assert "user 1 has seen every item" in fails([data, "--out", tmp_path / "bd", *SMALL], capsys)


def test_other_bad_input_is_told(small, write_data, tmp_path, capsys):
    out = ["--out", tmp_path / "bd", *SMALL]
    assert "no user has 3 interactions" in fails([write_data({1: [1, 2], 2: [3]}, "short.txt"), *out], capsys)
    assert "cannot read none.txt" in fails(["none.txt", *out], capsys)
    assert "cannot write" in fails([small, "--out", small / "bd"], capsys)
    assert "cannot read" in fails([small, *out, "--warm-up-from", tmp_path / "none"], capsys)
    error = fails([small, *out, "--learning-rate", "1e30", "--epochs", "20"], capsys)
    assert "the loss became" in error or "not finite" in error
    assert not list(tmp_path.glob("bd*"))


@pytest.mark.parametrize(
    "option",
    [
        "--temperature=0",
        "--epsilon-exp=0",
        "--epsilon-tanh=-1",
        "--lambda-teacher=-1",
        "--lambda-student=-0.1",
    ],
)
def test_settings_out_of_range_end_with_status_2(small, tmp_path, option):
    with pytest.raises(SystemExit) as end:
        bd.main([str(small), "--out", str(tmp_path / "bd"), option])
    assert end.value.code == 2
