"""related/: each method against its formulas by another way, and on to the other stages."""

import json

import asrep
import dt4sr
import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

import emd_distill
import evaluate
import sasrec_teacher

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
    assert not out.parent.exists()
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
