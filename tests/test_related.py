"""related/: each method against its formulas by another way, and on to the other stages."""

import json

import asrep
import dfa_distill
import domain_distill
import dt4sr
import numpy as np
import pytest
import statistics_distill
import torch
from scipy.linalg import sqrtm

import adarec_search
import emd_distill
import evaluate
import sasrec_teacher

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch, of exporting a GRU
HISTORIES = {u: [(5 * u + t * t) % 30 + 1 for t in range(2 + u % 9)] for u in range(1, 41)}


def fails(module, *argv):
    """The one line that `main` ends with."""
    with pytest.raises(SystemExit) as end:
        module.main([*map(str, argv)])
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


class Sum(torch.nn.Module):
    """Scores items by a sum over what it reads: order plays no part, but each item does."""

    def __init__(self, items):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.score = torch.nn.Parameter(torch.randn(items + 1, items + 1, generator=generator))
        self.item_vectors = torch.nn.Parameter(torch.eye(items + 1))

    def forward(self, users, items):
        output = self.score[items].cumsum(1)
        return output[None], output, self.item_vectors


# ---- ASReP -----------------------------------------------------------------------------------------------


def test_histories_backwards_by_hand():
    users, starts = np.array([4, 7, 9]), np.array([0, 5, 7, 10])
    items = np.array([1, 2, 3, 8, 9, 5, 6, 1, 2, 3])
    # user 4 trains on 1 2 3, user 7 on all of 5 6, user 9 on 1; the row of user 10 says that there is a 9
    rows = [(4, 3), (4, 2), (4, 1), (7, 6), (7, 5), (9, 1), (10, 9)]
    assert asrep.backwards(users, starts, items).tolist() == [list(row) for row in rows]


@pytest.mark.parametrize("max_length", [3, 50])
def test_prior_items_are_the_best_one_after_the_other(max_length):
    model, rng = Sum(12), np.random.default_rng(0)
    histories = [rng.permutation(12)[:n] + 1 for n in (1, 4, 6)]
    made = asrep.prior_items(model, np.array([1, 2, 3]), histories, 5, max_length, "cpu")
    for history, items in zip(histories, made.tolist(), strict=True):
        known = history.tolist()
        for item in items:
            score = model.score.detach()[known[-max_length:]].sum(0)
            free = [i for i in range(1, 13) if i not in known]
            assert item == max(free, key=lambda i: score[i].item())
            known.append(item)
        alone = asrep.prior_items(model, np.array([1]), [history], 5, max_length, "cpu")
        assert alone.tolist() == [items]  # padding beside longer histories plays no part


def run_asrep(data, backward, tmp_path, *more):
    """The histories that asrep.py writes, by user."""
    asrep.main([*map(str, (data, "--backward", backward, "--out", tmp_path / "longer.txt", *more))])
    rows = np.loadtxt(tmp_path / "longer.txt", int)
    return {user: rows[rows[:, 0] == user, 1].tolist() for user in np.unique(rows[:, 0]).tolist()}


def test_short_histories_get_longer_and_know_no_test_item(write_data, write_model, tmp_path):
    backward = write_model(Sum(30), 30, 8)
    longer = run_asrep(write_data(HISTORIES), backward, tmp_path, "--shorter-than", 4, "--items", 3)
    assert longer.keys() == HISTORIES.keys()
    for user, history in HISTORIES.items():
        short = 1 <= len(history) - 2 < 4
        made = longer[user][: len(longer[user]) - len(history)]
        assert longer[user][len(made) :] == history and len(made) == 3 * short
        assert len({*made} - {*history[:-2]}) == len(made)
    # other validation and test items, of the same number: the same is generated, unless it may see them
    changed = {
        u: [*h[:-2], h[-1] % 30 + 1, h[-2] % 30 + 1] if len(h) > 2 else h for u, h in HISTORIES.items()
    }
    other = write_data(changed, "other.txt")
    options = "--shorter-than", 4, "--items", 3
    again = run_asrep(other, backward, tmp_path, *options)
    assert all(again[user][:-2] == longer[user][:-2] for user in HISTORIES if len(HISTORIES[user]) > 2)
    whole = [
        run_asrep(data, backward, tmp_path, *options, "--whole") for data in (write_data(HISTORIES), other)
    ]
    assert any(whole[0][user][:-2] != whole[1][user][:-2] for user in HISTORIES)


def test_asrep_from_beginning_to_end(write_data, tmp_path, capsys):
    data, out = (
        write_data(HISTORIES),
        {name: tmp_path / name for name in ("r.txt", "b.pt2", "a.txt", "f.pt2")},
    )
    asrep.main([str(data), "--out", str(out["r.txt"])])
    train = "--max-length", "12", "--dim", "8", "--epochs", "2"
    sasrec_teacher.main([str(out["r.txt"]), *train, "--out", str(out["b.pt2"])])
    argv = "--backward", str(out["b.pt2"]), "--items", "4", "--shorter-than", "5"
    asrep.main([str(data), *argv, "--out", str(out["a.txt"])])
    argv = "--student", str(tmp_path / "a.pt2"), "--epochs", "1", "--out", str(out["f.pt2"])
    emd_distill.main([str(out["a.txt"]), *argv])
    capsys.readouterr()
    ranks = []
    for inputs in ([], ["--inputs", str(out["a.txt"])], ["--inputs", str(data)]):
        argv = [str(data), str(out["f.pt2"]), *inputs, "--json", "--ranks", str(tmp_path / "ranks.npy")]
        evaluate.main(argv)
        assert json.loads(capsys.readouterr().out)[0]["users"] == sum(len(h) > 2 for h in HISTORIES.values())
        ranks.append(np.load(tmp_path / "ranks.npy")[:, 0])
    long = np.array([len(h) - 2 >= 5 for h in HISTORIES.values() if len(h) > 2])
    assert (ranks[0] == ranks[2]).all() and (ranks[0] == ranks[1])[long].all()
    assert (ranks[0] != ranks[1])[~long].any()
    # what was generated may be ranked: the scores are of the longer history, only the real one is left out
    program, _ = evaluate.load_model(out["f.pt2"], 40, 30)
    rows, user = np.loadtxt(out["a.txt"], int), 3
    history = rows[rows[:, 0] == user, 1]
    _, output, item_vectors = program.module()(
        torch.tensor([user]), torch.from_numpy(history[:-1][-12:])[None]
    )
    scores = (output[0, -1] @ item_vectors.T).tolist()
    *seen, target = HISTORIES[user]
    better = sum(scores[i] > scores[target] for i in range(1, 31) if i not in seen)
    assert ranks[1][[u for u, h in HISTORIES.items() if len(h) > 2].index(user)] == 1 + better


def test_asrep_tells_what_is_wrong(write_data, write_model, tmp_path):
    data, out = write_data(HISTORIES), tmp_path / "new" / "out.txt"
    backward = write_model(Sum(30), 30, 8)
    assert "too few for --shorter-than and --items" in fails(
        asrep, data, "--backward", backward, "--out", out
    )
    other = write_model(Sum(29), 29, 8, "other.pt2")
    assert "is no model file for these data" in fails(asrep, data, "--backward", other, "--out", out)
    assert "No such file" in fails(asrep, tmp_path / "none.txt", "--out", out)
    forward = write_model(Sum(30), 30, 8, "forward.pt2", data_sha256=evaluate.sha256_of(data))
    argv = "--backward", forward, "--shorter-than", 3, "--items", 2, "--out", out
    assert "other data than the reversed histories" in fails(asrep, data, *argv)
    assert not out.parent.exists()
    swapped = write_data({u: [*h[:-2], *h[:-3:-1]] for u, h in HISTORIES.items()}, "swapped.txt")
    assert "not the histories of" in fails(evaluate, data, backward, "--inputs", swapped)
    short = write_data({u: h[:-1] for u, h in HISTORIES.items()}, "short.txt")
    for wrong in (short, write_data({1: [1, 30]}, "one.txt")):
        assert "not the histories of" in fails(evaluate, data, backward, "--inputs", wrong)


# ---- DT4SR -----------------------------------------------------------------------------------------------


def test_the_product_is_the_distance_of_gaussians():
    rng = np.random.default_rng(0)
    mu, item_mu = rng.normal(size=(2, 5, 3))
    sigma, item_sigma = np.exp(rng.normal(size=(2, 5, 3)))
    history = dt4sr.of_history(torch.from_numpy(mu), torch.from_numpy(sigma))
    scores = (history @ dt4sr.of_item(torch.from_numpy(item_mu), torch.from_numpy(item_sigma)).T).numpy()
    for t in range(5):
        distance = []  # by the formula for any covariances: trace(A + B - 2 (A^1/2 B A^1/2)^1/2)
        for i in range(5):
            A, B = np.diag(sigma[t]), np.diag(item_sigma[i])
            cross = sqrtm(sqrtm(A) @ B @ sqrtm(A))
            distance.append(np.sum((mu[t] - item_mu[i]) ** 2) + np.trace(A + B - 2 * cross).real)
        of_t_alone = np.sum(mu[t] ** 2 + sigma[t])
        np.testing.assert_allclose(scores[t] - of_t_alone, -np.array(distance), rtol=1e-10, atol=1e-10)
        assert (np.argsort(-scores[t]) == np.argsort(distance)).all()


def test_covariances_are_positive_and_their_roots_have_gradients():
    x = torch.tensor([-80.0, -20.0, -1.0, 0.0, 3.0], requires_grad=True)
    sigma = dt4sr.positive(x)
    torch.testing.assert_close(sigma, torch.nn.functional.elu(x.double()).float() + 1, rtol=1e-5, atol=1e-7)
    sigma.sqrt().sum().backward()
    assert (sigma > 0).all() and x.grad.isfinite().all() and (x.grad > 0).all()


def test_a_dt4sr_is_causal_and_learns_as_any_model(write_data, tmp_path):
    data, new, out = write_data(HISTORIES), tmp_path / "new.pt2", tmp_path / "out.pt2"
    dt4sr.main([str(data), "--dim", "6", "--max-length", "9", "--heads", "2", "--out", str(new)])
    program, config = evaluate.load_model(new, 40, 30)
    assert (config["layers"], config["dim"], config["stage"]) == (2, 12, "dt4sr")
    items = torch.randint(1, 31, (4, 9))
    later = torch.cat([items[:, :5], items[:, 5:] % 30 + 1], 1)
    hidden, output, item_vectors = program.module()(torch.ones(4, dtype=int), items)
    changed = program.module()(torch.ones(4, dtype=int), later)[1]
    torch.testing.assert_close(changed[:, :5], output[:, :5], rtol=0, atol=1e-6)
    assert (
        not torch.allclose(changed[:, 5:], output[:, 5:]) and output.shape[2] == item_vectors.shape[1] == 13
    )
    emd_distill.main([str(data), *f"--student {new} --epochs 8 --learning-rate 0.02 --out {out}".split()])
    log = [json.loads(line) for line in (tmp_path / "out.pt2.log.jsonl").read_text().splitlines()]
    assert log[-1]["L_CE"] < log[1]["L_CE"] - 0.1
    trained, start = (evaluate.load_model(path, 40, 30)[0].state_dict for path in (out, new))
    assert all(not torch.equal(weight, start[name]) for name, weight in trained.items())


def test_dt4sr_tells_what_is_wrong(write_data, tmp_path, capsys):
    data, out = write_data(HISTORIES), tmp_path / "new" / "out.pt2"
    assert "No such file" in fails(dt4sr, tmp_path / "none.txt", "--out", out)
    for wrong in (("--heads", 3), ("--dim", 0), ("--dropout", 2), ("--max-length", 1)):
        with pytest.raises(SystemExit):
            dt4sr.main([*map(str, (data, "--out", out, *wrong))])
    assert not out.parent.exists()


# ---- Entering a model in the middle ----------------------------------------------------------------------


@pytest.fixture
def files(write_data, tmp_path):
    """Data, a teacher of 4 layers and an untrained student of 2."""
    data, paths = write_data(HISTORIES), [tmp_path / "T.pt2", tmp_path / "S.pt2"]
    for path, options in zip(paths, ("--dim 8 --blocks 4 --epochs 2", "--dim 4 --epochs 0"), strict=True):
        sasrec_teacher.main([str(data), *f"--max-length 9 {options} --out {path}".split()])
    return data, *paths


def arguments(files, out, *more):
    """A command line for the scripts of related/ that distil."""
    data, teacher, student = files
    return [*map(str, (data, "--teacher", teacher, "--student", student, "--out", out, *more))]


def test_a_layers_own_state_put_back_gives_the_same_output(files, write_data, tmp_path):
    edges = {"cells": 3, "nodes": 2, "dim": 4, "edges": [["conv3"], ["mean", "max_pool"]]}
    (tmp_path / "a.json").write_text(json.dumps(edges))
    searched = f"{files[0]} --architecture {tmp_path}/a.json --max-length 9 --out {tmp_path}/A.json"
    adarec_search.main(searched.split())
    users, items = torch.arange(1, 6), torch.randint(1, 31, (5, 7))
    for path in (files[1], files[2], tmp_path / "A.pt2"):
        module = evaluate.load_model(path, 40, 30)[0].module()
        hidden, *made = module(users, items)
        for layer, state in enumerate(hidden):
            rest = statistics_distill.rest_of(module, layer)
            for found, expected in zip(rest(state, users, items), made, strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=0)
            changed = state.detach().clone().requires_grad_()
            rest(changed, users, items)[0].sum().backward()
            assert changed.grad.abs().sum() > 0
            assert {id(w) for w in rest.parameters()} <= {id(w) for w in module.parameters()}


# ---- Statistics by adaptive instance normalisation -------------------------------------------------------


def test_statistics_leave_padding_out():
    rng = np.random.default_rng(0)
    x, length = rng.normal(size=(3, 6, 2)), (6, 1, 4)
    real = torch.arange(6) < torch.tensor(length)[:, None]
    m, s = statistics_distill.statistics(torch.from_numpy(x), real)
    for row, n in enumerate(length):
        np.testing.assert_allclose(m[row, 0], x[row, :n].mean(0), rtol=1e-12)
        np.testing.assert_allclose(s[row, 0], np.sqrt(x[row, :n].var(0) + 1e-5), rtol=1e-12)
    m_new, s_new = torch.from_numpy(rng.normal(size=(2, 3, 1, 2)))
    changed = statistics_distill.adain(torch.from_numpy(x), real, m_new, s_new.abs())
    again = statistics_distill.statistics(changed, real)
    np.testing.assert_allclose(again[0], m_new, atol=1e-9)
    long = [0, 2]  # one position alone has no deviation to set
    np.testing.assert_allclose(again[1][long], s_new.abs()[long], rtol=1e-3)


@pytest.mark.parametrize("loss", ["adain", "l2"])
def test_equal_statistics_cost_nothing_and_the_teacher_is_left_alone(loss, files):
    module = evaluate.load_model(files[1], 40, 30)[0].module().requires_grad_(False)
    users, items = torch.arange(1, 6), torch.randint(1, 31, (5, 7))
    items[1, 3:] = 0
    hidden, output, _ = module(users, items)
    rest = statistics_distill.rest_of(module, 2)
    loss_of = lambda of_S: statistics_distill.JUDGES[loss](rest, hidden[2], output, of_S, users, items)  # noqa: E731
    # the same statistics in other places: each history's real positions in another order
    turned = hidden[2].flip(1)
    turned[1, :3] = hidden[2][1, :3].flip(0)
    assert loss_of(turned) == pytest.approx(0, abs=1e-9)
    other = (2 * hidden[2] + 1).requires_grad_()
    loss_of(other).backward()
    assert other.grad.abs().sum() > 0.01 and (other.grad[1, 3:] == 0).all()
    assert all(weight.grad is None for weight in module.parameters())


def test_the_loss_of_statistics_in_numpy(files):
    module = evaluate.load_model(files[1], 40, 30)[0].module()
    users, items = torch.arange(1, 4), torch.tensor([[3, 4, 5], [6, 0, 0], [7, 8, 0]])
    hidden, output, _ = module(users, items)
    of_S = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(0))
    rest, changed = statistics_distill.rest_of(module, 3), hidden[3].detach().clone()
    for row, n in enumerate((3, 1, 2)):
        x, s = hidden[3][row, :n].detach(), of_S[row, :n]
        deviation = [(y.var(0, correction=0) + 1e-5).sqrt() for y in (x, s)]
        changed[row, :n] = deviation[1] * (x - x.mean(0)) / deviation[0] + s.mean(0)
    squares = (rest(changed, users, items)[0] - output)[items > 0].square()
    found = statistics_distill.judged_by_teacher(rest, hidden[3], output, of_S, users, items)
    assert found.item() == pytest.approx(squares.mean().item(), rel=1e-5)


@pytest.mark.parametrize("module", [statistics_distill, dfa_distill], ids=lambda module: module.__name__)
def test_students_of_related_methods(module, files, tmp_path, capsys):
    teacher, out = files[1].read_bytes(), tmp_path / "out.pt2"
    module.main(arguments(files, out, "--epochs", 8, "--learning-rate", 0.02))
    said = capsys.readouterr().out.splitlines()
    l_ce = [float(line.split("L_CE ")[1].split()[0]) for line in said if line.startswith("epoch")]
    assert len(l_ce) == 8 and l_ce[-1] < l_ce[0] - 0.1 and files[1].read_bytes() == teacher
    module.main(arguments(files, tmp_path / "again.pt2", "--epochs", 8, "--learning-rate", 0.02))
    assert out.read_bytes() == (tmp_path / "again.pt2").read_bytes()
    program, config = evaluate.load_model(out, 40, 30, files[0], 9, 2)
    start = evaluate.load_model(files[2], 40, 30)[0]
    assert config["stage"] == module.__name__ and not any(
        torch.equal(weight, start.state_dict[name]) for name, weight in program.state_dict.items()
    )
    ids = torch.ones(2, dtype=int), torch.randint(1, 31, (2, 5))  # its dropout is off again
    torch.testing.assert_close(program.module()(*ids), program.module()(*ids), rtol=0, atol=0)
    emd_distill.main([*map(str, (files[0], "--student", out, "--epochs", 1, "--out", tmp_path / "on.pt2"))])


@pytest.mark.parametrize("module", [statistics_distill, dfa_distill], ids=lambda module: module.__name__)
def test_the_loss_is_l_ce_and_what_the_matched_layers_say(module, files, tmp_path, monkeypatch):
    """L of the first batch, by hand, of a teacher of 4 layers and a student of 2, both without dropout."""
    data, teacher, student = files
    (_, config), T = evaluate.load_model(teacher, 40, 30), evaluate.load_model(teacher, 40, 30)[0].module()
    S, found, entered = evaluate.load_model(student, 40, 30)[0].module(), [], []
    monkeypatch.setattr(module, "with_dropout", lambda module, on: module)
    rest_of = module.rest_of
    monkeypatch.setattr(
        module, "rest_of", lambda module, layer: entered.append(layer) or rest_of(module, layer)
    )

    def stop(loss_of, learned, rows, args):
        batch = np.arange(10)
        found.extend((*loss_of(batch), [weight.detach().clone() for weight in learned[-4:]], rows, batch))

    monkeypatch.setattr(module, "follow", stop)
    module.main(arguments(files, tmp_path / "out.pt2", *["--search-epochs", 0] * (module is dfa_distill)))
    loss, parts, W, (users, begin, end), batch = found
    assert entered == ([2, 4] if module is statistics_distill else [2, 1, 4, 2]) and config["layers"] == 4
    l_ce, squares = [], {0: [], 1: []}
    _, starts, items = evaluate.read_interactions(data)
    for row in batch:
        history = torch.from_numpy(items[begin[row] : end[row]])
        hidden_T, output_T, _ = T(torch.tensor([1]), history[None, :-1])
        hidden, output, item_vectors = S(torch.tensor([1]), history[None, :-1])
        log_p = (output[0] @ item_vectors[1:].T).log_softmax(1)
        l_ce.append(-log_p.gather(1, history[1:, None] - 1))
        for i in (0, 1):
            mine = hidden[i + 1] @ W[2 * i].T + W[2 * i + 1]
            if module is dfa_distill:  # the mean of layers 1 and 2, and of 3 and 4
                squares[i].append((mine - hidden_T[2 * i + 1 : 2 * i + 3].mean(0))[0].square())
                continue
            real = torch.ones(1, mine.shape[1], dtype=bool)
            given = module.adain(hidden_T[2 * i + 2], real, *module.statistics(mine, real))
            changed = rest_of(T, 2 * i + 2)(given, torch.tensor([1]), history[None, :-1])[0]
            squares[i].append((changed - output_T)[0].square())
    l_ce, l_more = torch.cat(l_ce).mean(), sum(torch.cat(of).mean() for of in squares.values())
    assert parts["L_CE"].item() == pytest.approx(l_ce.item(), rel=1e-4)
    assert loss.item() == pytest.approx((l_ce + l_more).item(), rel=1e-4) and l_more > 1e-3


@pytest.mark.parametrize("module", [statistics_distill, dfa_distill], ids=lambda module: module.__name__)
def test_what_related_methods_cannot_use_is_told(module, files, write_gru, write_model, tmp_path):
    data, teacher, student = files
    out = tmp_path / "out.pt2"
    gru = write_gru(30, 9)
    assert "is no stack" in fails(module, *arguments((data, gru, student), out))
    assert "2 layers or more" in fails(module, *arguments((data, write_gru(30, 9, 1), student), out))
    assert "is no model file" in fails(module, *arguments((data, data, student), out))
    assert "No such file" in fails(module, *arguments((tmp_path / "none.txt", teacher, student), out))
    assert "NaN" in fails(module, *arguments(files, out, "--learning-rate", 1e30, "--epochs", 3))
    assert not out.exists()


# ---- DFA -------------------------------------------------------------------------------------------------


class Planted(torch.nn.Module):
    """Four layers, of which `layer` (from 1) knows the item that was read last, and the others only noise."""

    def __init__(self, items, layer):
        super().__init__()
        self.layer, self.M = layer, torch.nn.Embedding(items + 1, 8)
        self.noise = torch.nn.Parameter(torch.randn(5, 50, 8))

    def forward(self, users, items):
        known = self.M(items)
        states = [known] + [noise[: items.shape[1]].expand_as(known) + 0 * known for noise in self.noise[:4]]
        states[self.layer] = known + 0
        return torch.stack(states), states[4] + states[self.layer], self.M.weight


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_the_layer_that_knows_most_wins(layer, write_data, write_model, tmp_path, capsys):
    torch.manual_seed(layer)
    rng = np.random.default_rng(layer)  # who reads an item reads the next one
    data = write_data({u: (rng.integers(12) + np.arange(3 + u % 6)) % 12 + 1 for u in range(1, 61)})
    teacher, student = write_model(Planted(12, layer), 12, 9), tmp_path / "S.pt2"
    new = f"{data} --max-length 9 --dim 8 --blocks 1 --epochs 0 --seed {layer} --out {student}"
    sasrec_teacher.main(new.split())
    argv = arguments((data, teacher, student), tmp_path / "out.pt2", "--epochs", 1, "--search-epochs", 15)
    dfa_distill.main([*argv, "--batch-size", "8", "--seed", str(layer)])
    last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("search")][-1]
    (shares,) = json.loads(last.split("softmax(alpha) ")[1])
    assert np.argmax(shares) == layer - 1 and max(shares) > 0.5


def test_groups_and_paths_by_hand():
    states = torch.arange(12.0).view(2, 1, 3, 2)
    alpha = torch.tensor([0.0, np.log(3)]).float()
    torch.testing.assert_close(dfa_distill.aggregate(alpha, states), states[0] / 4 + 3 * states[1] / 4)
    identity, asked = torch.nn.Identity(), []

    def rest(state, users, items):
        asked.append(state)
        return state, torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0]])

    real, target = torch.tensor([[True, True, False]]), torch.tensor([1, 2])
    about, hidden = (None, None, real, target), torch.tensor([[[1.0, 2.0], [0.0, 4.0], [7.0, 7.0]]])
    loss = dfa_distill.bridge_loss(alpha, states, hidden, (identity, identity), (rest, rest), about)
    torch.testing.assert_close(asked[1], dfa_distill.aggregate(alpha, states))
    l_ce = lambda right, wrong: np.log(1 + np.exp(wrong - right))  # noqa: E731
    student = (l_ce(1, 2) + l_ce(4, 0)) / 2
    teacher = (l_ce(4.5, 5.5) + l_ce(7.5, 6.5)) / 2
    assert loss.item() == pytest.approx(student + teacher, rel=1e-5)


# ---- Domain-adaptive distillation ------------------------------------------------------------------------


@pytest.fixture
def scenes(write_data, tmp_path):
    """Two scenes of the same items, a teacher of the source, an untrained student of the target."""
    data, paths = (
        write_data(HISTORIES),
        {name: tmp_path / f"scene-{name}.txt" for name in ("source", "target")},
    )
    domain_distill.main([str(data), "--split", "--out", str(tmp_path / "scene")])
    for name, scene, options in (
        ("T", "source", "--dim 8 --epochs 3"),
        ("S", "target", "--dim 4 --epochs 0"),
    ):
        argv = f"{paths[scene]} --max-length 9 {options} --out {tmp_path / name}.pt2"
        sasrec_teacher.main(argv.split())
    return paths["target"], paths["source"], tmp_path / "T.pt2", tmp_path / "S.pt2"


def adapt(scenes, out, *more):
    """Run domain_distill.py; the bytes of the student."""
    target, source, teacher, student = scenes
    argv = target, "--source", source, "--teacher", teacher, "--student", student, "--out", out, *more
    domain_distill.main([*map(str, argv)])
    return out.read_bytes()


def test_scenes_are_the_long_and_the_short_histories(scenes):
    rows = [np.loadtxt(path, int) for path in scenes[:2]]
    assert [list(part[-1]) for part in rows] == [[41, 30]] * 2
    users = [{*part[:-1, 0].tolist()} for part in rows]
    assert users[0] | users[1] == HISTORIES.keys() and not users[0] & users[1]
    assert max(len(HISTORIES[u]) for u in users[0]) <= min(len(HISTORIES[u]) for u in users[1])
    for part, of in zip(rows, users, strict=True):
        assert all(part[part[:, 0] == u, 1].tolist() == HISTORIES[u] for u in of)


def test_losses_of_domains_by_hand():
    z, z_T = torch.tensor([[0.0, 1.0, 2.0]]).double(), torch.tensor([[2.0, 5.0, 1.0]]).double()
    p, q = (np.exp(x[0].numpy()) / np.exp(x[0].numpy()).sum() for x in (z, z_T))
    assert domain_distill.output_loss(z, z_T).item() == pytest.approx(np.sum(q * np.log(q / p)))
    assert domain_distill.output_loss(z.repeat(7, 1), z_T.repeat(7, 1)).item() == pytest.approx(
        np.sum(q * np.log(q / p))
    )
    assert domain_distill.pseudo_loss(z, z_T).item() == pytest.approx(-np.log(p[1]))
    assert domain_distill.feature_loss(z, z_T).item() == pytest.approx((4 + 16 + 1) / 3)


def test_no_label_of_the_target_is_seen(scenes, tmp_path, write_data):
    target, source, teacher, student = scenes
    fast = "--epochs", 2, "--batch-size", 8
    first = adapt(scenes, tmp_path / "1.pt2", *fast)
    # the last training item of a history is never read, only a label; so are validation and test items
    rows = np.loadtxt(target, int)
    for user in np.unique(rows[:-1, 0]):
        at = np.flatnonzero(rows[:, 0] == user)[-3 if (rows[:, 0] == user).sum() > 2 else -1 :]
        rows[at, 1] = rows[at, 1] % 29 + 1
    np.savetxt(target, rows, "%d")
    again = f"{target} --max-length 9 --dim 4 --epochs 0 --out {student}"
    sasrec_teacher.main(again.split())
    adapt(scenes, tmp_path / "2.pt2", *fast)
    one, two = (evaluate.load_model(tmp_path / f"{n}.pt2", 41, 30)[0].state_dict for n in (1, 2))
    assert all(torch.equal(weight, two[name]) for name, weight in one.items()) and first
    rows[: len(rows) // 2, 1] = rows[: len(rows) // 2, 1] % 29 + 1  # what is read does count
    np.savetxt(target, rows, "%d")
    sasrec_teacher.main(again.split())
    adapt(scenes, tmp_path / "3.pt2", *fast)
    three = evaluate.load_model(tmp_path / "3.pt2", 41, 30)[0].state_dict
    assert not all(torch.equal(weight, three[name]) for name, weight in one.items())


def test_each_loss_of_domains_plays_a_part(scenes, tmp_path, capsys):
    every = [[], ["output"], ["feature"], ["pseudo"], ["output", "feature", "pseudo"]]
    made = {adapt(scenes, tmp_path / "o.pt2", "--epochs", 1, "--losses", *losses) for losses in every}
    assert len(made) == len(every)
    alone = adapt(scenes, tmp_path / "o.pt2", "--epochs", 1, "--losses")
    capsys.readouterr()
    for name in every[-1]:  # each is followed down, not up
        adapt(scenes, tmp_path / "o.pt2", "--epochs", 6, "--losses", name, "--weight", 9)
        of = [float(line.split(f"L_{name} ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
        assert of[-1] < of[0]
    assert adapt(scenes, tmp_path / "o.pt2", "--epochs", 1, "--weight", 0) == alone


def test_domains_tell_what_is_wrong(scenes, write_data, tmp_path):
    target, source, teacher, student = scenes
    other, out = write_data({1: [1, 2, 3, 4], 2: [5, 6, 29]}, "other.txt"), tmp_path / "out.pt2"
    argv = "--teacher", teacher, "--student", student, "--out", out
    assert "29 items" in fails(domain_distill, target, "--source", other, *argv)
    with pytest.raises(SystemExit):
        domain_distill.main([str(target), "--out", str(out)])
    assert "No such file" in fails(domain_distill, tmp_path / "none", "--split", "--out", out)
    assert not out.exists()
