"""bidirectional_distill.py: who teaches whom what, worked out by hand, by brute force and by counting."""

import itertools
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch.func import functional_call

import bidirectional_distill as bd
import evaluate
import sasrec_teacher

SEQUENCES = "sequence", "softmax"  # bases whose models were trained before
WINDOW = 6  # max_length of the models here; some histories are longer
# 22 users count through 25 items; the others: a training item twice; the validation item seen in training;
# trained on, but not judged; judged, but not trained on; neither. Ids are not in order
HISTORIES = {60 - 2 * u: [(7 * u + t) % 25 + 1 for t in range(4 + u % 8)] for u in range(22)}
HISTORIES |= {5: [1, 2, 1, 3, 4, 5], 7: [5, 6, 7, 5, 8], 3: [25, 4], 9: [6, 7, 8], 1: [9]}
TRAINING = {user: items[:-2] if len(items) > 2 else items for user, items in HISTORIES.items()}
STARTS = dict(zip(HISTORIES, np.cumsum([0, *map(len, HISTORIES.values())]), strict=False))
# of each history that is trained on: the user, where in the file it begins, and the items
WINDOWS = [(u, STARTS[u] + max(0, len(t) - WINDOW), t[-WINDOW:]) for u, t in TRAINING.items() if len(t) > 1]
FILES = {}  # of `given`: to export takes half a second


@pytest.fixture
def small(write_data):
    """The data file of HISTORIES."""
    return write_data(HISTORIES)


def module(base, dim, users=60):
    """A model of 25 items with weights large enough that each matters, not training."""
    torch.manual_seed(dim)
    if base in SEQUENCES:
        model = sasrec_teacher.SASRec(25, WINDOW + 1, dim, blocks=1, heads=1, dropout=0.2)
    else:
        model = bd.BASES[base](users, 25, dim)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.6)  # that of padding, too: whatever it influenced would be seen
    return model.eval()


@pytest.fixture
def given(write_model):
    """A function: the options that give a base, and two model files of it; the teacher's takes more items."""

    def options(base, teacher=6, student=3):
        kind = "sequence" if base in SEQUENCES else base
        keys = (kind, teacher, WINDOW + 1), (kind, student, WINDOW)
        for key in keys:
            if key not in FILES:
                FILES[key] = write_model(module(*key[:2]), 25, key[2], "{}-{}-{}.pt2".format(*key))
        return ["--base", base, "--teacher", FILES[keys[0]], "--student", FILES[keys[1]]]

    return options


def run(*argv):
    """`main`, as the command line calls it."""
    bd.main([str(a) for a in argv])


def fails(*argv):
    """The one line that the script ends with."""
    with pytest.raises(SystemExit) as end:
        run(*argv)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


def weights_of(path):
    """The parameters in a model file."""
    return {name: weight.detach() for name, weight in torch.export.load(path).state_dict.items()}


def bytes_of(path):
    """The parameters in a model file as they lie there, for an exact and fast comparison."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if "/weights/" in name}


def log_of(out):
    """The lines of a run's log."""
    return [json.loads(line) for line in Path(f"{out}.log.jsonl").read_text().splitlines()]


def settings(**changed):
    """What learners, `renew` and `probabilities` read of the command line."""
    sampling = {"sampling": "rank", "sign": "paper", "epsilon_exp": 0.05, "epsilon_tanh": 0.05}
    training = {"device": "cpu", "samples": 2, "learning_rate": 0.1, "seed": 0}
    training |= {"warm_up_weight_decay": [0.0, 0.0]}
    return SimpleNamespace(**(sampling | training | changed))


def test_ranks_and_probabilities_by_hand():
    observed = np.array([[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]], bool)
    scores_T = np.array([[9, 1, 5, 3, 7], [2, 2, 8, 6, 4]], np.float32)
    scores_S = np.array([[1, 9, 5, 7, 3], [5, 1, 2, 9, 2]], np.float32)
    rank_T, rank_S = bd.ranks(scores_T, observed), bd.ranks(scores_S, observed)
    assert rank_T.tolist() == [[1, 4, 0, 3, 2], [3, 4, 1, 0, 2]]  # of equal scores, the smaller id leads
    assert rank_S.tolist() == [[4, 1, 0, 2, 3], [1, 4, 2, 0, 3]]
    p, q = bd.probabilities(rank_T, rank_S, settings(epsilon_exp=0.5, epsilon_tanh=0.1))
    expected = np.exp([[-1.5, 1.5, -np.inf, 0.5, -0.5], [1, 0, -0.5, -np.inf, -0.5]])
    p, expected = p / p.sum(1, keepdims=True), expected / expected.sum(1, keepdims=True)
    np.testing.assert_allclose(p, expected, rtol=1e-6)
    np.testing.assert_allclose(q, np.tanh([[0.3, 0, 0, 0, 0.1], [0, 0, 0.1, 0, 0.1]]), rtol=1e-6)
    far = np.array([[1, 20_000]]), np.array([[20_000, 1]])  # exp must not overflow
    assert bd.p_student_to_teacher(*far, 10.0).tolist() == [[0.0, 1.0]]


def test_losses_by_hand():
    z_T, z_S = torch.tensor([0.0, 2.0], requires_grad=True), torch.tensor([3.0, -1.0], requires_grad=True)
    label, p = 1 / (1 + np.exp([-1.5, 0.5])), 1 / (1 + np.exp([0.0, -2.0]))  # sigma(z_S / 2), sigma(z_T)
    loss = bd.bd_loss(z_T, z_S, 2.0)
    assert loss.item() == pytest.approx(-(label * np.log(p) + (1 - label) * np.log(1 - p)).sum())
    loss.backward()
    assert z_S.grad is None  # the one who teaches does not learn
    assert z_T.grad.tolist() == pytest.approx(p - label, abs=1e-6)
    z_T.grad = None
    bd.bd_loss(z_T, z_S, np.inf).backward()  # the control whose labels say nothing
    assert z_T.grad.tolist() == pytest.approx(p - 0.5, abs=1e-6)


def test_ranks_equal_a_slow_implementation():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = (rng.normal(size=(3, 30)).round(1) * 10.0 ** rng.integers(-3, 9)).astype(np.float32)
        scores[0, :3] = 0.0, -0.0, 0.0  # alike
        observed = rng.random((3, 30)) < 0.3
        rank = bd.ranks(scores, observed)
        for row in range(3):
            free = [i for i in range(30) if not observed[row, i]]
            order = sorted(free, key=lambda i: (-float(scores[row, i]), i))
            assert rank[row].tolist() == [order.index(i) + 1 if i in order else 0 for i in range(30)]


def renewal(path, models, epochs, parts=1):
    """What `renew` gives for all users of a data file, who come to it in so many parts."""
    data, args, rng = bd.read_interactions(path), settings(), np.random.default_rng(0)
    users, begin, end, _ = bd.training_part(path, data[1], WINDOW - 1, rng)
    both = [bd.Learner(bd.export(model, WINDOW), args, 0) for model in models]
    some = np.array_split(np.arange(len(users)), parts)
    return [bd.renew(*both, data, users[u], begin[u], end[u], args, epochs, rng) for u in some]


@pytest.mark.parametrize("base", bd.L_CF)
def test_draws_are_as_frequent_as_the_formulas_say(base, small):
    models, epochs, k = [module(base, dim) for dim in (6, 3)], 400, 2
    ((drawn, share),) = renewal(small, models, epochs)
    drawn = drawn.numpy()
    assert drawn.dtype == np.int32 and drawn.shape == (2, epochs, k * sum(map(len, HISTORIES.values())))
    surprise, freedom, better = np.zeros(2), np.zeros(2), []
    for user, b, window in WINDOWS:
        free, rank = [i for i in range(1, 26) if i not in TRAINING[user]], np.zeros((2, 26), int)
        for model, row in zip(models, rank, strict=True):
            _, output, item_vectors = model(torch.tensor([user]), torch.tensor([window]))
            z = (item_vectors @ output[0, -1]).tolist()
            row[sorted(free, key=lambda i: -z[i])] = range(1, len(free) + 1)
        gap = (rank[0] - rank[1])[free]
        for side, p in enumerate((np.exp(gap * 0.05), np.tanh(np.maximum(-gap * 0.05, 0)))):
            own = drawn[side, :, b * k : (b + len(window)) * k]
            counts, expected = np.bincount(own.ravel(), minlength=26), np.zeros(26)
            own[:] = 0
            expected[free] = epochs * len(window) * k * p / p.sum()
            possible = expected > 0
            assert not counts[~possible].any()
            surprise[side] += ((counts - expected)[possible] ** 2 / expected[possible]).sum()
            freedom[side] += possible.sum() - 1
        if len(HISTORIES[user]) > 2 and HISTORIES[user][-2] in free:
            better.append(rank[1, HISTORIES[user][-2]] < rank[0, HISTORIES[user][-2]])
    assert not drawn.any()  # nothing is drawn beside what nobody trains on
    assert (stats.chi2.sf(surprise, freedom) > 1e-3).all()
    assert share == pytest.approx(np.mean(better)) and 0 < share < 1


def test_where_the_teacher_is_nowhere_ahead_nothing_is_drawn(small, given, tmp_path):
    ((drawn, share),) = renewal(small, [module("cdae", 6)] * 2, epochs=3)
    places = sum(len(window) for _, _, window in WINDOWS)
    assert np.count_nonzero(drawn[0]) == 3 * 2 * places and not drawn[1].any() and share == 0
    first = []
    for of_l_cf in ("uniform", "drawn"):  # where nothing is drawn, negatives are uniform
        options = [*given("cdae", 3, 3), "--epochs", 1, "--learning-rate", 1e-9, "--negatives", of_l_cf]
        run(small, *options, "--out", tmp_path / "bd")
        first += log_of(tmp_path / "bd")[1:]
        assert first[-1]["L_BD(S;T)"] == 0 < first[-1]["L_BD(T;S)"]
    assert first[0]["L_CF(S)"] == pytest.approx(first[1]["L_CF(S)"], rel=1e-6)
    assert abs(first[0]["L_CF(T)"] - first[1]["L_CF(T)"]) > 1e-3


def test_slices_of_users_make_no_difference(write_data):
    path = write_data({u: [(u + t) % 25 + 1 for t in range(4 + u % 5)] for u in range(1, 302)})
    models = module("bpr", 6, users=301), module("bpr", 3, users=301)
    ((whole, share),) = renewal(path, models, 2)  # of 256 users and of 45
    drawn, shares = zip(*renewal(path, models, 2, parts=7), strict=True)  # of 43 each
    assert np.array_equal(whole, sum(drawn)) and share == pytest.approx(np.mean(shares))


def test_processes_that_share_a_renewal_draw_what_one_draws(write_data, monkeypatch):
    path = write_data({u: [(u + t) % 25 + 1 for t in range(4 + u % 5)] for u in range(1, 802)})
    models = module("bpr", 6, users=801), module("bpr", 3, users=801)
    ((whole, share),) = renewal(path, models, 2)  # four slices
    parts, sums = [], []
    monkeypatch.setattr(bd, "add_up", lambda tensors: sums.extend(x.clone() for x in tensors))
    for rank in range(2):
        monkeypatch.setattr(bd, "share", lambda rank=rank: slice(rank, None, 2))
        parts += [part for part, _ in renewal(path, models, 2)]
    assert (
        np.array_equal(whole, parts[0] + parts[1]) and not (np.asarray(parts[0]) * np.asarray(parts[1])).any()
    )
    better, judged = sums[1] + sums[3]
    assert share == better / judged and judged == 801 and all((np.asarray(part) > 0).any() for part in parts)


def test_ablations_of_the_sampling():
    rng, observed = np.random.default_rng(2), np.arange(300)[None] < 20
    rank_T, rank_S = (bd.ranks(rng.normal(size=(1, 300)).astype(np.float32), observed) for _ in range(2))
    for_T, for_S = bd.probabilities(rank_T, rank_S, settings(sampling="uniform"))
    assert (for_T == ~observed).all() and (for_S == ~observed).all()
    for_T, for_S = bd.probabilities(rank_T, rank_S, settings(sampling="top"))
    assert sorted(rank_S[for_T > 0]) == sorted(rank_T[for_S > 0]) == list(range(1, bd.TOP + 1))
    published, turned = settings(sign="published"), bd.probabilities(rank_S, rank_T, settings())
    assert np.array_equal(bd.probabilities(rank_T, rank_S, published), turned)


@pytest.mark.parametrize("sign, most, fall", [("paper", 0.9, 0.2), ("published", 0.0, 0.0)])
def test_the_teacher_learns_the_group_that_the_student_knows_better(sign, most, fall):
    group = torch.arange(40) < 8
    z_S, z_T = torch.where(group, 2.0, -2.0), torch.where(group, -1.0, 0.0).requires_grad_()
    rank = [bd.ranks(z.detach().numpy()[None], np.zeros((1, 40), bool)) for z in (z_T, z_S)]
    p, _ = bd.probabilities(*rank, settings(sign=sign, epsilon_exp=0.1))
    drawn = bd.draw(p[0], 400, np.random.default_rng(0)) - 1
    assert np.mean(drawn < 8) == pytest.approx(most, abs=0.1)
    bd.bd_loss(z_T[drawn], z_S[drawn], 1.0).backward()
    before, after = (F.softplus(-z[group]).mean().item() for z in (z_T, z_T - 0.01 * z_T.grad))
    assert before - after == pytest.approx(fall, abs=0.05)


def represent(base, model, w, user, history, kept=1.0):
    """What scores each item of `history` [T] and those after it, and the item vectors; by weights `w` alone.

    `kept` [T] is what each item counts in y_u of CDAE.
    """
    if base in SEQUENCES:
        _, output, item_vectors = functional_call(model, w, (None, history[None]))
        return output[0, :-1], output[0, -1], item_vectors
    if base == "bpr":
        state, item_vectors = w["p.weight"][user], w["q.weight"]
    else:
        y = torch.zeros(26, dtype=torch.float64)
        y[history] = kept
        h = (y @ w["W.weight"] + w["v.weight"][user] + w["b"]).sigmoid()
        state, item_vectors = torch.cat([h, h.new_ones(1)]), w["w_and_b"]
    return state.expand(len(history), -1), state, item_vectors


@pytest.mark.parametrize("base", bd.BASES)
def test_model_file_is_the_formula_of_the_history_so_far(base):
    model, users = module(base, 4), [1, 5, 9]
    items = torch.stack([torch.randperm(25)[:12] + 1 for _ in users])
    items[0, 4] = items[0, 1]  # y_u of an item that comes twice is 1
    items[1, 5:] = 0
    w = {name: weight.double() for name, weight in model.state_dict().items()}
    program = bd.export(model, 12).module()
    hidden, output, item_vectors = program(torch.tensor(users), items)
    assert hidden.ndim == 4 and hidden.shape[1:3] == (3, 12)
    for b, t in items.nonzero().tolist():
        _, state, expected = represent(base, None, w, users[b], items[b, : t + 1])
        torch.testing.assert_close(output[b, t].double(), state, atol=1e-5, rtol=1e-5)
    assert torch.equal(item_vectors.double(), expected)
    assert program(torch.tensor([1]), items[:1, :1])[1].shape[:2] == (1, 1)


TRAININGS = [(base, way) for base in bd.L_CF for way in ("uniform", "drawn")]
TRAININGS.remove(("softmax", "drawn"))  # all items are its negatives


@pytest.mark.parametrize("base, of_l_cf", TRAININGS)
def test_training_is_the_formulas_in_float64(base, of_l_cf, small, given, tmp_path, monkeypatch):
    made, options, rising = {}, given(base), itertools.count(1.0)
    for name in ("batches_of_like_length", "draw_negatives", "renew"):  # what is drawn, to be taken again

        def keep(*args, name=name, function=vars(bd)[name]):  # noqa: B008
            made.setdefault(name, []).append(function(*args))
            return made[name][-1]

        monkeypatch.setattr(bd, name, keep)
    of_epoch = lambda _, epoch: torch.manual_seed(epoch) and np.random.default_rng(epoch)  # noqa: E731
    monkeypatch.setattr(bd, "random_numbers", of_epoch)
    monkeypatch.setattr(bd, "validate", lambda *_: (0.0, next(rising)))  # so that the last epoch is saved
    if base in SEQUENCES:  # without dropout; that of cdae is drawn again below
        monkeypatch.setattr(bd, "with_dropout", lambda module, on: module)
    monkeypatch.setattr(bd, "TOP", 4)
    numbers = "--samples 2 --learning-rate 0.02 --temperature 3 --warm-up 2 --epochs 3 --period 2"
    numbers += " --warm-up-weight-decay 0.03 0.3 --weight-decay 0.1 0.2"
    numbers += f" --lambda-teacher 0.7 --lambda-student 1.6 --negatives {of_l_cf} --batch-size"
    run(small, *options, "--out", tmp_path / "bd", *numbers.split(), 30 if base == "bpr" else 5)

    models = [module(base, dim).double() for dim in (6, 3)]
    weights = [{n: w.double().requires_grad_() for n, w in weights_of(f).items()} for f in options[3::2]]
    log, negatives, asked, rows = log_of(tmp_path / "bd")[1:], iter(made["draw_negatives"]), set(), WINDOWS
    if base == "bpr":
        rows = [(user, b + t, [item]) for user, b, window in WINDOWS for t, item in enumerate(window)]
    observed = sum(len(window) - (base in SEQUENCES) for _, _, window in rows)
    assert len(made["renew"]) == 2 and len(log) == len(made["batches_of_like_length"]) == 5
    for epoch, batches in enumerate(made["batches_of_like_length"]):
        torch.manual_seed(epoch + 1)
        assert sorted(np.concatenate(batches)) == list(range(len(rows))) and len(batches) > 3
        if epoch in (0, 2):
            decays = (0.1, 0.2) if epoch else (0.03, 0.3)  # while both train, and before
            adams = [
                torch.optim.Adam(w.values(), 0.02, weight_decay=decay)
                for w, decay in zip(weights, decays, strict=True)
            ]
        sums = np.zeros(4)
        for batch in batches:
            l_cf, l_bd = [torch.zeros(())] * 2, [torch.zeros(())] * 2  # of teacher and student
            both = torch.from_numpy(next(negatives))
            assert not torch.equal(*both)  # each has its own
            masks = [F.dropout(torch.ones(j.shape[:2]), 0.5).double() for j in both]
            for row, (user, b, window) in enumerate(rows[n] for n in batch):
                first, found = [window.index(item) for item in window], []
                for model, w, mask in zip(models, weights, masks, strict=True):
                    found.append(represent(base, model, w, user, torch.tensor(window), mask[row, first]))
                for side, (states, r_A, vectors_A) in enumerate(found):
                    asked |= {(user, item) for item in both[side][row].flatten().tolist()}
                    i, j = window, both[side][row, : len(window)]
                    if epoch >= 2:
                        drawn, (_, r_B, vectors_B) = made["renew"][epoch // 2 - 1][0], found[1 - side]
                        taught = drawn[side, epoch % 2, 2 * b : 2 * (b + len(window))]
                        z_A, z_B = vectors_A[taught] @ r_A, vectors_B[taught] @ r_B
                        if base == "softmax":  # the fourth best is at 0
                            z_A = z_A - (vectors_A[1:] @ r_A).detach().sort().values[-4]
                            z_B = z_B - (vectors_B[1:] @ r_B).sort().values[-4]
                        label, a = (z_B / 3).sigmoid().detach(), z_A.sigmoid()
                        l_bd[side] = l_bd[side] - (label * a.log() + (1 - label) * (1 - a).log()).sum()
                        if of_l_cf == "drawn":
                            beside = taught.reshape(-1, 2).long()
                            j = torch.where(beside > 0, beside, j)
                    if base in SEQUENCES:
                        i, j = i[1:], j[1:]
                    z_i, z_j = (states * vectors_A[i]).sum(-1), (states[:, None] * vectors_A[j]).sum(-1)
                    terms = {"bpr": [(z_i[:, None] - z_j).sigmoid()]}
                    terms["softmax"] = [z_i.exp() / (states @ vectors_A[1:].T).exp().sum(-1)]
                    terms = terms.get(base, [z_i.sigmoid(), 1 - z_j.sigmoid()])
                    l_cf[side] = l_cf[side] - sum(term.log().sum() for term in terms)
            for side, adam in enumerate(adams):
                adam.zero_grad()
                ((l_cf[side] + (0.7, 1.6)[side] * l_bd[side]) / (observed / len(batches))).backward()
                adam.step()
            sums += [part.item() for part in (l_cf[0], l_bd[0], l_cf[1], l_bd[1])]
        parts = [log[epoch][name] for name in ("L_CF(T)", "L_BD(T;S)", "L_CF(S)", "L_BD(S;T)")]
        assert parts == pytest.approx(sums / observed, rel=1e-4)
    for kind, w in zip(bd.KINDS, weights, strict=True):
        learnt = weights_of(tmp_path / f"bd-{kind}.pt2")
        torch.testing.assert_close(learnt, w, check_dtype=False, atol=1e-4, rtol=1e-4)
    assert not any(item in TRAINING[user] for user, item in asked)
    # unlike the published code's: else validation and test items alone are never pushed down
    assert sum(item in HISTORIES[user][-2:] for user, item in asked) > 20


SMALL = ["--dims", 6, 2, "--warm-up", 2, "--epochs", 3, "--period", 2]


def configs_of(data, out, capsys):
    """What both model files of a run say of themselves; evaluate.py must find what the run found."""
    files, configs = [f"{out}-{kind}.pt2" for kind in bd.KINDS], []
    capsys.readouterr()
    evaluate.main([str(data), *files, "--split", "valid", "--json"])
    for kind, report in zip(bd.KINDS, json.loads(capsys.readouterr().out), strict=True):
        configs += [evaluate.load_model(report["model"], 60, 25, data)[1]]
        assert configs[-1]["role"] == kind and report["stage"] == "bidirectional_distill"
        for name in ("NDCG@10", "HR@10"):
            assert report[name] == pytest.approx(configs[-1]["validation"][name], abs=1e-6)
    return configs


@pytest.mark.parametrize("base, tau", [("bpr", 5.0), ("cdae", 2.0)])
def test_runs_of_each_base_and_one_that_goes_on(small, tmp_path, base, tau, capsys):
    out, again = tmp_path / "new" / "bd", tmp_path / "again"
    run(small, "--base", base, "--out", out, *SMALL)
    log, configs = log_of(out), configs_of(small, out, capsys)
    assert [line["epoch"] for line in log] == [1, 2, 3, 4, 5]
    assert ["student_better" in line for line in log] == [False, False, True, False, True]
    assert ["teacher_NDCG@10" in line for line in log] == [False, True, True, True, True]
    assert configs[0]["settings"]["temperature"] == tau
    for name, seed in (("same", 0), ("other", 1)):
        run(small, "--base", base, "--out", tmp_path / name / "bd", *SMALL, "--seed", seed)
    files = [f"--{kind}={out}-{kind}.pt2" for kind in bd.KINDS]
    run(small, "--base", base, *files, "--out", again, "--epochs", 1, "--learning-rate", 1e-12)
    log = log_of(again)  # models that are given need no warm-up, and are judged as they came
    assert [line["epoch"] for line in log] == [0, 1] and "L_CF(T)" not in log[0]
    for kind in bd.KINDS:
        assert log[0][f"{kind}_NDCG@10"] == pytest.approx(configs[kind == "student"]["validation"]["NDCG@10"])
    for kind, dim in zip(bd.KINDS, (6, 2), strict=True):
        before, after = weights_of(f"{out}-{kind}.pt2"), weights_of(f"{again}-{kind}.pt2")
        assert before["q.weight" if base == "bpr" else "W.weight"].shape == (26, dim)
        torch.testing.assert_close(before, after, atol=1e-9, rtol=1e-6)
        one, same, other = (tmp_path / name / f"bd-{kind}.pt2" for name in ("new", "same", "other"))
        assert one.read_bytes() == same.read_bytes() and bytes_of(one) != bytes_of(other)


def test_a_gru_learns_as_the_student_of_a_sasrec(small, given, write_gru, tmp_path, capsys):
    files, out = (given("sequence")[3], write_gru(items=25, max_length=8)), tmp_path / "bd"
    models = ["--teacher", files[0], "--student", files[1]]
    run(small, *models, "--out", out, "--epochs", 4, "--learning-rate", 0.02)
    log, configs = log_of(out), configs_of(small, out, capsys)
    assert [config["max_length"] for config in configs] == [7, 7] and len(log) == 5
    for kind, path in zip(bd.KINDS, files, strict=True):
        before, after = weights_of(path), weights_of(f"{out}-{kind}.pt2")
        assert before.keys() == after.keys()
        assert not any(torch.equal(before[name], after[name]) for name in before)
    assert log[-1]["L_CF(S)"] < 0.9 * log[1]["L_CF(S)"]


@pytest.mark.parametrize("base", bd.L_CF)
def test_alone_is_alone_bit_for_bit(small, given, tmp_path, base, monkeypatch):
    rising = itertools.count(1.0)
    monkeypatch.setattr(bd, "validate", lambda *_: (0.0, next(rising)))  # so that the last epoch is saved
    variants = {"none": ["--direction=none", "--negatives=drawn"], "both": []}
    variants |= {"down": ["--lambda-teacher=0"], "up": ["--lambda-student=0"]}
    if base not in SEQUENCES:  # there, dropout takes the random numbers that the other one's has left
        variants["other"] = ["--direction=none", *given(base, 6, 4)]
    w = {}
    for name, options in variants.items():
        run(small, *given(base), *options, "--epochs", 2, "--period", 1, "--out", tmp_path / name)
        w[name] = [bytes_of(tmp_path / f"{name}-{kind}.pt2") for kind in bd.KINDS]
    for side, alone in enumerate(({"none", "down", "other"}, {"none", "up"})):
        assert {name for name in variants if w[name][side] == w["none"][side]} == alone & variants.keys()
    assert w["both"][1] != w["up"][1]


def test_each_file_is_of_its_own_best_epoch(small, given, tmp_path, monkeypatch):
    common = [small, *given("bpr"), "--direction=none", "--period=1"]
    for epochs in (1, 2, 3):
        # teacher and student, from how they came on; what is only as good as before is not kept
        judged = iter([0.6, 0.4, 0.6, 0.3, 0.7, 0.4, 0.5, 0.4])
        monkeypatch.setattr(bd, "validate", lambda *_, judged=judged: (0.0, next(judged)))
        run(*common, "--epochs", epochs, "--out", tmp_path / str(epochs))
    for kind, best in (("teacher", 2), ("student", 0)):
        config = evaluate.load_model(tmp_path / f"3-{kind}.pt2", 60, 25)[1]
        assert config["validation"]["epoch"] == best
    assert bytes_of(tmp_path / "3-teacher.pt2") == bytes_of(tmp_path / "2-teacher.pt2")
    assert bytes_of(tmp_path / "3-teacher.pt2") != bytes_of(tmp_path / "1-teacher.pt2")
    came = weights_of(given("bpr")[5])
    assert all(torch.equal(w, came[name]) for name, w in weights_of(tmp_path / "3-student.pt2").items())


def test_a_warm_up_ends_with_its_last_epoch(small, tmp_path, monkeypatch):
    new = [small, "--base=bpr", "--dims", 6, 3, "--warm-up-weight-decay", 0.1, 0.2, "--period=1"]
    run(*new, "--warm-up=2", "--epochs=0", "--learning-rate=1e-12", "--out", tmp_path / "start")
    for path in tmp_path.glob("start-*.pt2"):  # BPR starts from N(0, 1), as nn.Embedding does
        for w in weights_of(path).values():
            assert stats.kstest(w[1:].flatten(), "norm").pvalue > 1e-3
    judged = itertools.cycle([0.9, 0.9, 0.5, 0.4])  # teacher and student
    monkeypatch.setattr(bd, "validate", lambda *_: (0.0, next(judged)))
    for options in ("--warm-up=4 --epochs=0", "--warm-up=3 --epochs=0"):
        run(*new, *options.split(), "--out", tmp_path / options[10])
    for kind, learnt in itertools.product(bd.KINDS, "34"):
        epoch = evaluate.load_model(tmp_path / f"{learnt}-{kind}.pt2", 60, 25)[1]["validation"]["epoch"]
        assert epoch == int(learnt)
    assert bytes_of(tmp_path / "3-student.pt2") != bytes_of(tmp_path / "4-student.pt2")


def test_published_settings(monkeypatch):
    found = {}
    monkeypatch.setattr(bd, "train", lambda args: found.update({args.base: vars(args)}))
    for base in bd.BASES:
        run("data.txt", "--base", base, "--out", "bd")
    assert found["bpr"]["dims"] == found["cdae"]["dims"] == [50, 5]
    names = ["warm_up", "epochs", "learning_rate", "batch_size", "samples", "temperature"]
    names += ["epsilon_exp", "epsilon_tanh", "period"]
    names += ["lambda_teacher", "lambda_student", "weight_decay"]
    alike = [10, 0.5, 0.5, [0, 0]]
    assert [found["bpr"][name] for name in names] == [1000, 100, 1e-3, 128, 1, 5, 1e-4, 1e-2, *alike]
    assert [found["cdae"][name] for name in names] == [1000, 1000, 2e-3, 128, 5, 2, 1e-4, 1e-4, *alike]
    # citeulike has 120,361 pairs of 5,219 users: 1e-3 on the sum over a batch of 128, as a mean over it
    pairs = 128, 120_361 / np.ceil(5_219 / 128)
    for base, count, decayed in (("bpr", pairs[0], [1, 0]), ("cdae", pairs[1], [1, 1])):
        expected = np.multiply(decayed, 1e-3 / count)
        np.testing.assert_allclose(found[base]["warm_up_weight_decay"], expected, rtol=0.01)


def test_switches_change_the_result(small, given, tmp_path, monkeypatch):
    monkeypatch.setattr(bd, "TOP", 5)  # of 25 items
    common, results = [small, *given("bpr"), "--epochs", 3, "--period", 2, "--learning-rate", 0.05], []
    variants = ["", "--sign published", "--sampling uniform", "--sampling top", "--epsilon-exp 1"]
    variants += ["--negatives drawn", "--lambda-teacher 0 --lambda-student 0 --negatives drawn"]
    for changed in [*variants, "--epsilon-tanh 1", "--temperature inf"]:
        run(*common, *changed.split(), "--out", tmp_path / "bd")
        results.append([log_of(tmp_path / "bd")[-1][part] for part in ("L_CF(T)", "L_CF(S)", "L_BD(T;S)")])
    assert all(one != other for one, other in itertools.combinations(results, 2))


def test_bad_input_is_told(small, write_data, given, write_gru, tmp_path):
    out = ["--out", tmp_path / "bd"]
    base, files = [*out, "--base", "bpr", *SMALL], [*out, *given("sequence")]
    full = write_data({1: [1, 2, 3, 1, 2], 2: [1, 2, 3]}, "full.txt")
    assert "user 1 has seen every item" in fails(full, *base)
    assert "no user has 3 interactions" in fails(write_data({1: [1], 2: [3]}, "short.txt"), *base)
    assert "none.txt" in fails("none.txt", *base)
    lost = ["--out", tmp_path / "lost", "--base", "bpr", *SMALL, "--learning-rate", "1e38"]
    assert "the loss became" in fails(small, *lost)
    other = write_gru(items=25, data_sha256="0")
    assert "trained on other data" in fails(small, *files, "--teacher", other)
    assert "trained on other data" in fails(small, *files, "--student", other)
    assert "is for 26 items, the data have 25" in fails(small, *files, "--student", write_gru(items=26))
    assert "is no model file" in fails(small, *files, "--student", small)
    assert "none.pt2" in fails(small, *files, "--teacher", tmp_path / "none.pt2")
    assert not list(tmp_path.glob("bd*"))
    assert "data.txt" in fails(small, *base, "--out", small / "bd")


@pytest.mark.parametrize(
    "options", [[], ["--base=softmax"], ["--teacher=t"], ["--student=s"], ["--base=bpr", "--teacher=t"]]
)
def test_models_come_in_pairs(small, tmp_path, options, capsys):
    with pytest.raises(SystemExit) as end:
        run(small, "--out", tmp_path / "bd", *options)
    assert end.value.code == 2 and "give --teacher and --student" in capsys.readouterr().err
