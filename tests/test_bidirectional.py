"""bidirectional_distill.py: sampling, losses and training by hand, by brute force and by counting."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import bidirectional_distill as bd
import evaluate
import sasrec_teacher

ROLES = "teacher", "student"
SEQUENCES = "sequence", "softmax"  # bases that need two trained models
LONGEST = 6  # max_length of the students here; some histories are longer
# The histories of 22 users count through 25 items. Then follow a user with the same training item twice, one
# whose validation item is also a training item, one who is not evaluated, one who is not trained on, and one
# who is neither. The ids are not in order.
HISTORIES = {60 - 2 * u: [(7 * u + t) % 25 + 1 for t in range(4 + u % 8)] for u in range(22)}
HISTORIES |= {5: [1, 2, 1, 3, 4, 5], 7: [5, 6, 7, 5, 8], 3: [25, 4], 9: [6, 7, 8], 1: [9]}
TRAINING = {user: items[:-2] if len(items) > 2 else items for user, items in HISTORIES.items()}
STARTS = dict(zip(HISTORIES, np.cumsum([0, *map(len, HISTORIES.values())]), strict=False))
# of each history that is trained on: the user, the place of its first item in the data, its items
WINDOWS = [(u, STARTS[u] + max(0, len(t) - LONGEST), t[-LONGEST:]) for u, t in TRAINING.items() if t[1:]]
MODEL_FILES = {}  # of the fixture `trained`: an export takes half a second


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, write_data):
    """A test runs in its own folder, with the data file of HISTORIES."""
    monkeypatch.chdir(tmp_path)
    write_data(HISTORIES)


def random_model(base, dim, num_users=60):
    """A model of 25 items in evaluation mode. Its weights are large enough that each of them matters."""
    torch.manual_seed(dim)
    if base in SEQUENCES:
        model = sasrec_teacher.SASRec(25, LONGEST + 1, dim, num_blocks=1, num_heads=1, dropout=0.2)
    else:
        model = bd.BASES[base].model(num_users, 25, dim)
    for weight in model.parameters():
        weight.data.normal_(std=0.6)  # row 0 too, so that a use of padding shows
    return model.eval()


@pytest.fixture
def trained(write_model):
    """A function: the options with two trained models of a base. The teacher takes longer histories."""

    def model_file(base, dim, max_length):
        name = f"{base.replace('softmax', 'sequence')}-{dim}-{max_length}.pt2"
        if name not in MODEL_FILES:
            made_by = {"settings": {"base": base}}  # as this script writes it
            MODEL_FILES[name] = write_model(random_model(base, dim), 25, max_length, name, **made_by)
        return MODEL_FILES[name]

    def options(base, teacher=6, student=3):
        files = model_file(base, teacher, LONGEST + 1), model_file(base, student, LONGEST)
        return ["--base", base, "--teacher", files[0], "--student", files[1]]

    return options


def run(out, *argv, data="data.txt"):
    """Call `main` as the command line does. Returns the lines of the log."""
    bd.main([str(word) for word in (data, "--out", out, *argv)])
    return [json.loads(line) for line in Path(f"{out}.log.jsonl").read_text().splitlines()]


def weights_of(path):
    """The parameters in a model file as nested lists, which compare exactly."""
    return {name: weight.tolist() for name, weight in torch.export.load(path).state_dict.items()}


def config_of(path):
    """The config of a model file, which evaluate.py must accept for the data."""
    return evaluate.load_model(path, evaluate.read_interactions("data.txt"), "cpu")[1]


def validate_as(monkeypatch, ndcg):
    """Let `validate` return the next value of the iterator `ndcg`. Teacher and student take turns."""
    monkeypatch.setattr(bd, "validate", lambda *_: (0.0, next(ndcg)))


def settings(**changed):
    """The options that `renew` and `sampling_weights` read."""
    options = {"sampling": "rank", "sign": "paper", "epsilon_exp": 0.05, "epsilon_tanh": 0.05}
    return SimpleNamespace(**options | {"device": "cpu", "samples": 2, "seed": 0} | changed)


def test_ranks_and_sampling_weights_by_hand():
    observed = np.array([[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]], bool)
    rank_T = bd.rank_items(np.array([[9, 1, 5, 3, 7], [2, 2, 8, 6, 4]], np.float32), observed)
    rank_S = bd.rank_items(np.array([[1, 9, 5, 7, 3], [5, 1, 2, 9, 2]], np.float32), observed)
    assert rank_T.tolist() == [[1, 4, 0, 3, 2], [3, 4, 1, 0, 2]]  # of equal scores, the smaller id leads
    assert rank_S.tolist() == [[4, 1, 0, 2, 3], [1, 4, 2, 0, 3]]
    for_T, for_S = bd.sampling_weights(rank_T, rank_S, settings(epsilon_exp=0.5, epsilon_tanh=0.1))
    p = np.exp([[-1.5, 1.5, -np.inf, 0.5, -0.5], [1, 0, -0.5, -np.inf, -0.5]])
    np.testing.assert_allclose(for_T / for_T.sum(1)[:, None], p / p.sum(1)[:, None], rtol=1e-6)
    np.testing.assert_allclose(for_S, np.tanh([[0.3, 0, 0, 0, 0.1], [0, 0, 0.1, 0, 0.1]]), rtol=1e-6)
    swapped = bd.sampling_weights(rank_S, rank_T, settings())
    assert np.array_equal(bd.sampling_weights(rank_T, rank_S, settings(sign="published")), swapped)
    far_apart = np.array([[1, 20_000]]), np.array([[20_000, 1]])  # exp must not overflow
    assert bd.p_student_to_teacher(*far_apart, 10.0).tolist() == [[0.0, 1.0]]
    for weights in bd.sampling_weights(rank_T, rank_S, settings(sampling="uniform")):
        assert np.array_equal(weights, ~observed)
    rank_T, rank_S = np.roll(np.arange(300), 150), np.arange(300)  # rank 0: an observed item
    for_T, for_S = bd.sampling_weights(rank_T, rank_S, settings(sampling="top"))
    assert np.array_equal(for_T, np.isin(rank_S, range(1, 101)))  # TOP is 100
    assert np.array_equal(for_S, np.isin(rank_T, range(1, 101)))


def test_ranks_equal_a_slow_implementation():
    observed = np.array([[True, False, False]])  # an observed item has the score of the others
    assert bd.rank_items(np.ones((1, 3), np.float32), observed).tolist() == [[0, 1, 2]]
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = (rng.normal(size=(3, 30)).round(1) * 10.0 ** rng.integers(-3, 9)).astype(np.float32)
        scores[0, :3] = 0.0, -0.0, 0.0  # three equal scores
        observed = rng.random((3, 30)) < 0.3
        for row, rank in enumerate(bd.rank_items(scores, observed)):
            unobserved = [i for i in range(30) if not observed[row, i]]
            order = sorted(unobserved, key=lambda i: (-float(scores[row, i]), i))
            assert rank.tolist() == [order.index(i) + 1 if i in order else 0 for i in range(30)]


def test_bd_loss_by_hand():
    z_T, z_S = torch.tensor([0.0, 2.0], requires_grad=True), torch.tensor([3.0, -1.0], requires_grad=True)
    label, p = 1 / (1 + np.exp([-1.5, 0.5])), 1 / (1 + np.exp([0.0, -2.0]))  # sigma(z_S / 2), sigma(z_T)
    loss = bd.bd_loss(z_T, z_S, 2.0)
    assert loss.item() == pytest.approx(-(label * np.log(p) + (1 - label) * np.log(1 - p)).sum())
    (gradient,) = torch.autograd.grad(loss, z_T, retain_graph=True)
    assert gradient.tolist() == pytest.approx(p - label, abs=1e-6)
    assert torch.autograd.grad(loss, z_S, allow_unused=True)[0] is None  # the teaching model learns nothing
    (gradient,) = torch.autograd.grad(bd.bd_loss(z_T, z_S, np.inf), z_T)  # each label is 1/2
    assert gradient.tolist() == pytest.approx(p - 0.5, abs=1e-6)


def renewal(models, num_epochs, num_parts=1, epoch=1, data="data.txt", **changed):
    """A list of what `renew` returns for each of `num_parts` groups of the users in a data file."""
    data, args = bd.read_interactions(data), settings(**changed)
    histories, _ = bd.training_part(data, LONGEST - 1, seed=0)
    parts = zip(*(np.array_split(column, num_parts) for column in histories), strict=True)
    windows = [LONGEST] * 2
    return [bd.renew(models, windows, data, bd.Histories(*part), args, epoch, num_epochs) for part in parts]


@pytest.mark.parametrize("base", bd.BASES)
def test_draws_are_as_frequent_as_the_formulas_say(base):
    models, epochs, k = [random_model(base, dim) for dim in (6, 3)], 400, 2
    ((drawn, student_better),) = renewal(models, epochs)
    drawn = drawn.numpy()
    assert drawn.dtype == np.int32 and drawn.shape == (2, epochs, k * sum(map(len, HISTORIES.values())))
    chi_square, freedom, better = np.zeros(2), np.zeros(2), []
    for user, begin, window in WINDOWS:
        unseen, ranks = [i for i in range(1, 26) if i not in TRAINING[user]], []
        for model in models:
            _, output, item_vectors = model(torch.tensor([user]), torch.tensor([window]))
            z = (item_vectors @ output[0, -1])[unseen]
            ranks.append(z.argsort(descending=True).argsort().numpy())
        gap = ranks[0] - ranks[1]
        for side, p in enumerate((np.exp(gap * 0.05), np.tanh(np.maximum(-gap * 0.05, 0)))):
            own = drawn[side, :, begin * k : (begin + len(window)) * k]
            counts, expected = np.bincount(own.ravel(), minlength=26)[unseen], own.size * p / p.sum()
            assert counts[p > 0].sum() == own.size == epochs * len(window) * k  # and no other items are drawn
            chi_square[side] += stats.chisquare(counts[p > 0], expected[p > 0]).statistic
            freedom[side] += (p > 0).sum() - 1
            own[:] = 0
        if len(HISTORIES[user]) > 2 and HISTORIES[user][-2] in unseen:
            better.append(gap[unseen.index(HISTORIES[user][-2])] > 0)
    assert not drawn.any()  # nothing is drawn for an interaction that is not trained on
    assert (stats.chi2.sf(chi_square, freedom) > 1e-3).all()
    assert student_better == pytest.approx(np.mean(better)) and 0 < student_better < 1


def test_a_student_equal_to_its_teacher_is_taught_nothing(trained):
    ((drawn, student_better),) = renewal([random_model("cdae", 6)] * 2, num_epochs=3)
    num_drawn = 3 * 2 * sum(len(window) for _, _, window in WINDOWS)
    assert np.count_nonzero(drawn[0]) == num_drawn and not drawn[1].any() and student_better == 0
    options = [*trained("cdae", 3, 3), "--epochs=1", "--learning-rate=1e-9"]
    (_, uniform), (_, line) = run("bd", *options), run("bd", *options, "--negatives=drawn")
    assert uniform["L_BD(S;T)"] == line["L_BD(S;T)"] == 0 < min(uniform["L_BD(T;S)"], line["L_BD(T;S)"])
    assert uniform["L_CF(S)"] == pytest.approx(line["L_CF(S)"], rel=1e-6)  # not drawn, so uniform
    assert abs(uniform["L_CF(T)"] - line["L_CF(T)"]) > 1e-3


def test_draws_depend_on_epoch_seed_and_user_but_not_on_slices_and_processes(write_data, monkeypatch):
    many = write_data({u: [(u + t) % 25 + 1 for t in range(4 + u % 5)] for u in range(1, 802)}, "many.txt")
    models = [random_model("bpr", dim, num_users=801) for dim in (6, 3)]
    ((whole, student_better),) = renewal(models, 2, data=many)  # four slices of users
    for change in ({"epoch": 2}, {"seed": 1}):
        assert (renewal(models, 2, data=many, **change)[0][0] != whole).float().mean() > 0.5
    drawn, shares = zip(*renewal(models, 2, num_parts=9, data=many), strict=True)  # of 89 users each
    assert torch.equal(whole, sum(drawn)) and student_better == pytest.approx(np.mean(shares))
    # with equal weights, only random numbers tell users of one history, epochs and sides apart
    uniform = renewal(models, 2, data=many, sampling="uniform")[0][0]
    begin = 2 * sum(4 + u % 5 for u in range(1, 126))  # of user 126, who has the history of user 1
    draws = torch.cat([uniform[..., :6].flatten(0, 1), uniform[..., begin : begin + 6].flatten(0, 1)])
    assert draws.all() and len(draws.unique(dim=0)) == 8
    parts, sums = [], []
    monkeypatch.setattr(bd, "PROCESSES", 3)
    monkeypatch.setattr(bd, "sum_over_processes", lambda tensors: sums.append(tensors[0].clone()))
    for rank in range(3):
        monkeypatch.setattr(bd, "RANK", rank)
        parts.append(renewal(models, 2, data=many)[0][0])
    assert torch.equal(whole, sum(parts)) and torch.equal(whole > 0, sum(part > 0 for part in parts) == 1)
    better, evaluated = sum(sums[1::2])
    assert student_better == better / evaluated and evaluated == 801 and all(part.any() for part in parts)


@pytest.mark.parametrize("sign, in_group, fall", [("paper", 0.9, 0.2), ("published", 0.0, 0.0)])
def test_the_teacher_learns_the_group_that_the_student_knows_better(sign, in_group, fall):
    group = torch.arange(40) < 8
    z_S, z_T = torch.where(group, 2.0, -2.0), torch.where(group, -1.0, 0.0).requires_grad_()
    ranks = [bd.rank_items(z.detach().numpy()[None], np.zeros((1, 40), bool)) for z in (z_T, z_S)]
    for_T, _ = bd.sampling_weights(*ranks, settings(sign=sign, epsilon_exp=0.1))
    drawn = bd.draw_items(for_T[0], 400, np.random.default_rng(0)) - 1
    assert np.mean(drawn < 8) == pytest.approx(in_group, abs=0.1)
    bd.bd_loss(z_T[drawn], z_S[drawn], 1.0).backward()
    before, after = (F.softplus(-z[group]).mean().item() for z in (z_T, z_T - 0.01 * z_T.grad))
    assert before - after == pytest.approx(fall, abs=0.05)


def scores_of(base, model, w, user, history, kept=1.0):
    """Scores [n, V+1] that L_CF gives the last n items of `history` [T], and scores [V+1] for L_BD.

    n is T, or T - 1 with a sequence model. `kept` [T] is the value of each item in y_u of CDAE.
    """
    if base in SEQUENCES:
        _, output, item_vectors = torch.func.functional_call(model, w, (None, history[None]))
        scores = output[0] @ item_vectors.T
        zero = scores[-1, 1:].detach().sort().values[-4] if base == "softmax" else 0  # at the fourth rank
        return scores[:-1], scores[-1] - zero
    if base == "bpr":
        scores = w["q.weight"] @ w["p.weight"][user]
    else:
        y = torch.zeros(26, dtype=torch.float64)
        y[history] = kept
        h = (y @ w["W.weight"] + w["v.weight"][user] + w["b"]).sigmoid()
        scores = w["w_and_b"][:, :-1] @ h + w["w_and_b"][:, -1]
    return scores.expand(len(history), -1), scores


@pytest.mark.parametrize("base", ["bpr", "cdae"])
def test_model_file_is_the_formula_of_the_history_so_far(base):
    model, users = random_model(base, 4), [1, 5, 9]
    items = torch.stack([torch.randperm(25)[:12] + 1 for _ in users])
    items[0, 4] = items[0, 1]  # y_u of an item that comes twice is 1
    items[1, 5:] = 0
    program, w = bd.export(model, 12).module(), {n: x.double() for n, x in model.state_dict().items()}
    hidden, output, item_vectors = program(torch.tensor(users), items)
    assert hidden.ndim == 4 and hidden.shape[1:3] == (3, 12)
    for b, t in items.nonzero().tolist():
        _, scores = scores_of(base, None, w, users[b], items[b, : t + 1])
        torch.testing.assert_close((item_vectors @ output[b, t]).double(), scores, atol=1e-5, rtol=1e-5)
    assert torch.equal(item_vectors, model.q.weight if base == "bpr" else model.w_and_b)
    assert program(torch.tensor([1]), items[:1, :1])[1].shape[:2] == (1, 1)


REPLAYED = [(base, negatives) for base in bd.BASES for negatives in ("uniform", "drawn")]
REPLAYED.remove(("softmax", "drawn"))  # its negatives are all items


@pytest.mark.parametrize("base, negatives", REPLAYED)
def test_training_is_the_formulas_in_float64(base, negatives, trained, monkeypatch):
    renewals, unseen, renew, draw = [], [], bd.renew, bd.UnseenItems.draw  # keep what is drawn
    monkeypatch.setattr(bd, "renew", lambda *args: renewals.append(renew(*args)) or renewals[-1])
    monkeypatch.setattr(bd.UnseenItems, "draw", lambda *args: unseen.append(draw(*args)) or unseen[-1])
    validate_as(monkeypatch, itertools.count(1.0))  # so that the last epoch is saved
    if base in SEQUENCES:  # train without dropout
        monkeypatch.setattr(bd, "with_dropout", lambda module, on: module)
    monkeypatch.setattr(bd, "TOP", 4)
    options, batch_size = trained(base), 30 if base == "bpr" else 5
    numbers = "--samples 2 --learning-rate 0.02 --temperature 3 --warm-up 2 --epochs 3 --period 2"
    numbers += " --warm-up-weight-decay 0.03 0.3 --weight-decay 0.1 0.2 --lambda-teacher 0.7"
    numbers += f" --lambda-student 1.6 --negatives {negatives} --batch-size {batch_size}"
    log, rows, pairs = run("bd", *options, *numbers.split()), WINDOWS, set()  # pairs of user and negative
    if base == "bpr":
        rows = [(user, begin + t, [item]) for user, begin, window in WINDOWS for t, item in enumerate(window)]
    lengths = np.array([len(window) for _, _, window in rows])
    num_observed = (lengths - (base in SEQUENCES)).sum()
    models = [random_model(base, dim).double() for dim in (6, 3)]
    weights = [weights_of(path) for path in options[3::2]]
    weights = [{n: torch.tensor(x).double().requires_grad_() for n, x in w.items()} for w in weights]
    assert len(renewals) == 2 and len(log) == 6  # epoch 0 validates only
    drawn_of_epochs = torch.cat([drawn for drawn, _ in renewals], 1).long()
    for epoch in range(1, 6):
        _, batches = bd.epoch_batches(lengths, batch_size, 0, epoch)  # also seeds torch, so dropout repeats
        assert sorted(np.concatenate(batches)) == list(range(len(rows))) and len(batches) > 3
        if epoch in (1, 3):  # the warm-up and joint training each start with a new optimizer
            decays = zip(weights, (0.03, 0.3) if epoch == 1 else (0.1, 0.2), strict=True)
            groups = [{"params": w.values(), "weight_decay": decay} for w, decay in decays]
            optimizer = torch.optim.Adam(groups, 0.02)
        sums = np.zeros(4)
        for batch in batches:
            losses, batch_negatives = torch.zeros(4).double(), torch.zeros(2, len(batch), LONGEST, 2).long()
            if base != "softmax":
                batch_negatives = torch.from_numpy(unseen.pop(0))
                assert not torch.equal(*batch_negatives)  # teacher and student have different ones
            masks = [F.dropout(torch.ones(j.shape[:2]), 0.5).double() for j in batch_negatives]
            sides = list(zip(models, weights, masks, strict=True))
            for row, (user, begin, window) in enumerate(rows[n] for n in batch):
                first, history = [window.index(item) for item in window], torch.tensor(window)
                z = [scores_of(base, model, w, user, history, mask[row, first]) for model, w, mask in sides]
                for side, (scores, z_A) in enumerate(z):
                    j = batch_negatives[side][row, : len(window)]
                    pairs |= {(user, item) for item in batch_negatives[side][row].flatten().tolist()}
                    if epoch >= 3:
                        drawn = drawn_of_epochs[side, epoch - 3, 2 * begin : 2 * (begin + len(window))]
                        label, p = (z[1 - side][1][drawn] / 3).sigmoid().detach(), z_A[drawn].sigmoid()
                        losses[2 * side + 1] -= (label * p.log() + (1 - label) * (1 - p).log()).sum()
                        if negatives == "drawn":
                            j = torch.where(drawn > 0, drawn, j.flatten()).view_as(j)
                    i, j = history[-len(scores) :, None], j[-len(scores) :]
                    z_i, z_j = scores.gather(1, i), scores.gather(1, j)
                    p = {"bpr": [(z_i - z_j).sigmoid()]}
                    p["softmax"] = [scores[:, 1:].softmax(1).gather(1, i - 1)]
                    p = p.get(base, [z_i.sigmoid(), 1 - z_j.sigmoid()])
                    losses[2 * side] -= sum(likelihood.log().sum() for likelihood in p)
            optimizer.zero_grad()
            (losses @ torch.tensor([1, 0.7, 1, 1.6]).double() * len(batches) / num_observed).backward()
            optimizer.step()
            sums += losses.detach().numpy()
        line = [log[epoch][name] for name in ("L_CF(T)", "L_BD(T;S)", "L_CF(S)", "L_BD(S;T)")]
        assert line == pytest.approx(sums / num_observed, rel=1e-4)
    for role, w in zip(ROLES, weights, strict=True):
        for name, weight in weights_of(f"bd-{role}.pt2").items():
            np.testing.assert_allclose(weight, w[name].tolist(), atol=1e-4, rtol=1e-4)
    assert not unseen and not any(item in TRAINING[user] for user, item in pairs)
    # validation and test items are negatives too, or no loss would lower their scores (the published code)
    assert base == "softmax" or sum(item in HISTORIES[user][-2:] for user, item in pairs) > 20


SMALL = ["--dims", 6, 2, "--warm-up", 2, "--epochs", 3, "--period", 2]


def configs_of(out, capsys):
    """The configs of both model files of a run. evaluate.py must find the validation figures of the run."""
    files = [f"{out}-{role}.pt2" for role in ROLES]
    capsys.readouterr()
    evaluate.main(["data.txt", *files, "--split", "valid", "--json"])
    configs, reports = [config_of(path) for path in files], json.loads(capsys.readouterr().out)
    for role, config, report in zip(ROLES, configs, reports, strict=True):
        assert config["role"] == role and report["stage"] == "bidirectional_distill"
        for name in ("NDCG@10", "HR@10"):
            assert report[name] == pytest.approx(config["validation"][name], abs=1e-6)
    return configs


class Constant(torch.nn.Module):
    """A new base: an item has one score for all users, the sum of its vector."""

    def __init__(self, num_users, num_items, dim):
        super().__init__()
        self.item_vectors = torch.nn.Parameter(torch.zeros(num_items + 1, dim))

    def forward(self, users, items):
        output = torch.ones(*items.shape, self.item_vectors.shape[1])
        return output[None], output, self.item_vectors


OF_CONSTANT = {"learning_rate": 0.1, "temperature": 3.0, "epsilon_exp": 0.03, "epsilon_tanh": 0.04}
OF_CONSTANT |= {"batch_size": 9, "warm_up_weight_decay": [0.0, 0.1], "samples": 3, "warm_up": 2, "epochs": 4}
# its loss moves each weight towards 1
MOVE = lambda output, item_vectors, *_: ((item_vectors - 1) ** 2).sum()  # noqa: E731
CONSTANT = bd.Base(Constant, MOVE, bd.Defaults(**OF_CONSTANT))


@pytest.mark.parametrize("base", ["bpr", "cdae", "constant"])
def test_new_models_are_trained_and_trained_on(base, monkeypatch, capsys):
    monkeypatch.setitem(bd.BASES, "constant", CONSTANT)
    log, *_ = (run(f"new/{n}", "--base", base, *SMALL, "--seed", seed) for n, seed in enumerate((0, 0, 1)))
    configs = configs_of("new/0", capsys)
    # of two warm-up and three joint epochs: number, whether it renewed the draws, whether it validated
    phases = [(line["epoch"], "student_better" in line, "teacher_NDCG@10" in line) for line in log]
    assert phases == [(1, False, False), (2, False, True), (3, True, True), (4, False, True), (5, True, True)]
    files = [f"--{role}=new/0-{role}.pt2" for role in ROLES]
    log = run("again", "--base", base, *files, "--epochs=1", "--learning-rate=1e-12")
    assert [line["epoch"] for line in log] == [0, 1] and "L_CF(T)" not in log[0]  # epoch 0 validates
    table = {"bpr": "q.weight", "cdae": "W.weight", "constant": "item_vectors"}[base]
    for role, dim, config in zip(ROLES, (6, 2), configs, strict=True):
        assert (bd.BASES[base].defaults._asdict() | {"warm_up": 2, "epochs": 3}).items() <= config[
            "settings"
        ].items()
        assert log[0][f"{role}_NDCG@10"] == pytest.approx(config["validation"]["NDCG@10"])
        before, after = weights_of(f"new/0-{role}.pt2"), weights_of(f"again-{role}.pt2")
        assert np.shape(before[table]) == (26, dim) and (base != "constant" or np.min(before[table]) > 0.1)
        assert all(np.allclose(before[name], after[name], atol=1e-9, rtol=1e-6) for name in before)
        first, same, other = (f"new/{n}-{role}.pt2" for n in range(3))
        assert Path(first).read_bytes() == Path(same).read_bytes() and weights_of(first) != weights_of(other)


@pytest.mark.parametrize("name", OF_CONSTANT)
def test_a_base_that_lacks_a_default_fails(name):
    lacking = {other: value for other, value in OF_CONSTANT.items() if other != name}
    with pytest.raises(TypeError, match=name):
        bd.Defaults(**lacking)


def test_a_gru_learns_as_the_student_of_a_sasrec(trained, write_gru, capsys):
    files = trained("sequence")[3], write_gru(items=25, max_length=8)
    log = run("bd", "--teacher", files[0], "--student", files[1], "--epochs=4", "--learning-rate=0.02")
    assert [config["max_length"] for config in configs_of("bd", capsys)] == [7, 7] and len(log) == 5
    for role, path in zip(ROLES, files, strict=True):
        before, after = weights_of(path), weights_of(f"bd-{role}.pt2")
        assert before.keys() == after.keys()
        assert not any(before[name] == after[name] for name in before)
    assert log[-1]["L_CF(S)"] < 0.9 * log[1]["L_CF(S)"]


@pytest.mark.parametrize("base", bd.BASES)
def test_a_model_that_is_not_taught_is_bit_for_bit_the_model_alone(base, trained, monkeypatch):
    validate_as(monkeypatch, itertools.count(1.0))  # so that the last epoch is saved
    variants = {"none": ["--direction=none"], "both": []}
    variants |= {"to student": ["--lambda-teacher=0"], "to teacher": ["--lambda-student=0"]}
    if base not in SEQUENCES:  # of these, the dropout of one model shifts the dropout of the other
        variants["smaller"] = ["--direction=none", *trained(base, 6, 4)]
    w = {}
    for name, options in variants.items():
        run(name, *trained(base), *options, "--epochs=2", "--period=1")
        w[name] = [weights_of(f"{name}-{role}.pt2") for role in ROLES]
    for side, alone in enumerate(({"none", "to student", "smaller"}, {"none", "to teacher"})):
        assert {name for name in variants if w[name][side] == w["none"][side]} == alone & variants.keys()
    assert w["both"][1] != w["to teacher"][1]


def test_each_file_is_of_its_own_best_epoch(trained, monkeypatch):
    # Validation NDCG@10 of epochs 0 to 3. An equal value does not replace a file. The second student is best
    # in epoch 1, but worse than its teacher in each epoch.
    teacher, students = [0.6, 0.6, 0.7, 0.5], ([0.4, 0.3, 0.4, 0.4], [0.1, 0.3, 0.2, 0.2])
    for (number, student), epochs in itertools.product(enumerate(students), (1, 2, 3)):
        validate_as(monkeypatch, itertools.chain(*zip(teacher, student, strict=True)))
        run(f"{number}-{epochs}", *trained("bpr"), "--direction=none", "--period=1", "--epochs", epochs)
    for name, best in (("0-3-teacher", 2), ("0-3-student", 0), ("1-3-teacher", 2), ("1-3-student", 1)):
        assert config_of(f"{name}.pt2")["validation"]["epoch"] == best
    teachers = [weights_of(f"0-{epochs}-teacher.pt2") for epochs in (1, 2, 3)]
    assert teachers[2] == teachers[1] != teachers[0]
    assert weights_of("0-3-student.pt2") == weights_of(trained("bpr")[5])  # of the file that it started from
    assert weights_of("1-1-student.pt2") == weights_of("1-3-student.pt2") != weights_of("0-3-student.pt2")
    validate_as(monkeypatch, itertools.count(1.0, -0.1))  # each epoch is worse than the one before
    for epochs in (3, 4):  # a warm-up ends with its last epoch all the same
        run(epochs, "--base=bpr", "--dims", 6, 3, "--period=1", "--warm-up", epochs, "--epochs=0")
        assert all(config_of(f"{epochs}-{role}.pt2")["validation"]["epoch"] == epochs for role in ROLES)
    assert weights_of("3-student.pt2") != weights_of("4-student.pt2")


def test_new_models_start_as_published():
    run("bd", "--base=bpr", "--dims", 6, 3, "--warm-up=1", "--epochs=0", "--learning-rate=1e-12")
    for weight in (*weights_of("bd-teacher.pt2").values(), *weights_of("bd-student.pt2").values()):
        assert stats.kstest(np.ravel(weight[1:]), "norm").pvalue > 1e-3
    model = bd.CDAE(num_users=10, num_items=900, dim=100)
    for weight, bound in ((model.W.weight, 1 / 30), (model.b, 1 / 30), (model.w_and_b, 1 / 10)):
        assert 0.9 * bound < weight.max() <= bound and -bound <= weight.min() < -0.9 * bound
    assert not model.W.weight[0].any()


def test_defaults_of_each_base(monkeypatch):
    parsed, models = {}, ["--teacher=t.pt2", "--student=s.pt2"]
    monkeypatch.setattr(bd, "train", lambda args: parsed.update({args.base: vars(args)}))
    names = ["learning_rate", "temperature", "epsilon_exp", "epsilon_tanh", "batch_size", "samples"]
    names += ["warm_up", "epochs", "dims", "period", "lambda_teacher", "lambda_student", "weight_decay"]
    # Published for bpr and cdae. There, a weight decay of 1e-3 goes with the sum over a batch: 128 pairs, or
    # the pairs of 128 users. citeulike has 120,361 pairs of 5,219 users.
    decays = {"bpr": [1e-3 / 128, 0], "cdae": [1e-3 / 120_361 * np.ceil(5_219 / 128)] * 2}
    defaults = {"bpr": [1e-3, 5, 1e-4, 1e-2, 128, 1, 1000, 100]}
    defaults["cdae"] = [2e-3, 2, 1e-4, 1e-4, 128, 5, 1000, 1000]
    defaults["sequence"] = defaults["softmax"] = [1e-3, 1, 1e-3, 1e-2, 32, 1, 0, 20]
    assert bd.BASES.keys() == defaults.keys()
    for base, row in defaults.items():
        bd.main(["data.txt", "--out=bd", "--base", base, *(models if base in SEQUENCES else [])])
        assert [parsed[base][name] for name in names] == [*row, [50, 5], 10, 0.5, 0.5, [0, 0]]
        np.testing.assert_allclose(parsed[base]["warm_up_weight_decay"], decays.get(base, [0, 0]), rtol=0.01)
    bd.main(["data.txt", "--out=bd", "--base=bpr", *models])
    assert parsed["bpr"]["warm_up"] == 0  # trained models need no warm-up


def test_switches_change_the_result(trained, monkeypatch):
    monkeypatch.setattr(bd, "TOP", 5)  # of 25 items
    common, results = [*trained("bpr"), "--epochs=3", "--period=2", "--learning-rate=0.05"], []
    variants = ["", "--sign published", "--sampling uniform", "--sampling top", "--epsilon-exp 1"]
    variants += ["--negatives drawn", "--lambda-teacher 0 --lambda-student 0 --negatives drawn"]
    for options in [*variants, "--epsilon-tanh 1", "--temperature inf"]:
        line = run("bd", *common, *options.split())[-1]
        results.append([line[name] for name in ("L_CF(T)", "L_CF(S)", "L_BD(T;S)")])
    assert all(one != other for one, other in itertools.combinations(results, 2))


def test_bad_input_ends_with_one_line(write_data, trained, write_gru, tmp_path, capsys):
    def fails(message, *argv, out="bd", data="data.txt"):
        with pytest.raises(SystemExit, match=message) as end:
            run(out, *argv, data=data)
        assert isinstance(end.value.code, str) and "\n" not in end.value.code

    new, files = ["--base=bpr", *SMALL], trained("sequence")
    fails("no user has 3 interactions", *new, data=write_data({1: [1], 2: [3]}, "short.txt"))
    fails("none.txt", *new, data="none.txt")
    fails("is not finite; remove", *new, "--learning-rate", "1e25", out="lost")
    for role in ROLES:
        fails("trained on other data", *files, f"--{role}", write_gru(items=25, data_sha256="0"))
    fails("is for 24 items, the data have ids up to 25", *files, "--student", write_gru(items=24))
    fails("is no model file", *files, "--student", "data.txt")
    fails("none.pt2", *files, "--teacher", "none.pt2")
    for options in ([], ["--base=softmax"], ["--teacher=t"], ["--student=s"], ["--base=bpr", "--teacher=t"]):
        with pytest.raises(SystemExit, match="2"):  # trained models come in pairs
            run("bd", *options)
        assert "give --teacher and --student" in capsys.readouterr().err
    assert not list(tmp_path.glob("bd*"))
    fails("data.txt", *new, out="data.txt/bd")
