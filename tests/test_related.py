"""related/: each method against its equations, computed in another way, and on to the other scripts."""

import itertools
import json
import math
import shutil
from argparse import Namespace
from collections import Counter, defaultdict
from pathlib import Path

import asrep
import dfa_distill
import domain_distill
import dt4sr
import numpy as np
import pytest
import ranking_distill
import statistics_distill
import torch
from conftest import save_data, save_gru, save_model
from scipy.linalg import sqrtm
from scipy.stats import chisquare

import adarec_search
import bidirectional_distill
import emd_distill
import evaluate
import sasrec_teacher

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch, of exporting a GRU
HISTORIES = {u: [(5 * u + t * t) % 30 + 1 for t in range(2 + u % 9)] for u in range(1, 41)}
FILES = "--teacher T.pt2 --student S.pt2 --out new/out.pt2"
DOMAINS = "d-target.txt --source d-source.txt --teacher D-T.pt2 --student D-S.pt2 --out new/out.pt2"
TWO, THREE = [statistics_distill, dfa_distill], [statistics_distill, dfa_distill, domain_distill]
FOUR, SIX = [*THREE, ranking_distill], [*THREE, ranking_distill, asrep, dt4sr]
WORDS = {statistics_distill: FILES, dfa_distill: FILES, domain_distill: f"{FILES} --source data.txt"}
WORDS |= {ranking_distill: f"{FILES} --interesting 5 --uninteresting 6"}
WORDS |= {asrep: "--start S.pt2 --out new/out.pt2", dt4sr: "--out new/out.pt2", evaluate: "sum.pt2"}
two, three, four, six = (
    pytest.mark.parametrize("module", group, ids=lambda m: m.__name__) for group in (TWO, THREE, FOUR, SIX)
)


class Taste(torch.nn.Embedding):
    """Scores depend on the user and on the sum over the history."""

    def forward(self, users, items):
        output = self.weight[items].cumsum(1) + 9 * self.weight[users % len(self.weight)][:, None]
        return output[None], output, torch.eye(len(self.weight))


class Sum(torch.nn.Embedding):
    """Scores items by a sum over the history: each item counts, their order does not."""

    def forward(self, users, items):
        output = self.weight[items].cumsum(1)
        return output[None], output, torch.eye(len(self.weight))


def run(module, *words):
    module.main(" ".join(map(str, words)).split())


def load(path, data="data.txt"):
    return evaluate.load_model(path, evaluate.read_interactions(data), "cpu", any_data=True)


def rewrite(path, new_path, training=False, **config):
    """Write a model file again, in training mode or not, and with other values in its config."""
    program = torch.export.load(path, extra_files=(extra := {"config.json": ""}))
    evaluate.with_dropout(program.graph_module, training)
    extra["config.json"] = json.dumps(json.loads(extra["config.json"]) | config)
    torch.export.save(program, new_path, extra_files=extra)


def read_rows(path):
    rows = np.loadtxt(path, int)
    return {user: rows[rows[:, 0] == user, 1].tolist() for user in np.unique(rows[:, 0]).tolist()}


def printed(name, capsys):
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    return [float(line.split(f" {name} ")[1].split()[0]) for line in lines]


def equal_weights(module, other):
    return [torch.equal(weight, other.state_dict()[name]) for name, weight in module.state_dict().items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data and two domains of them, a teacher T and an untrained student S of each, and files to refuse."""
    folder = tmp_path_factory.mktemp("related")
    sha256 = {"other": "0", "data": evaluate.read_interactions(save_data(folder, HISTORIES)).sha256}
    run(domain_distill, f"{folder}/data.txt --split --out {folder}/d")
    for out, data in {"T": "data", "S": "data", "D-T": "d-source", "D-S": "d-target"}.items():
        options = "8 --blocks 4 --epochs 3 --learning-rate 0.01" if out[-1] == "T" else "4 --epochs 0"
        run(sasrec_teacher, f"{folder}/{data}.txt --max-length 5 --out {folder}/{out}.pt2 --dim {options}")
    run(asrep, f"{folder}/data.txt --start {folder}/S.pt2 --reverse --epochs 2 --out {folder}/G.pt2")
    for layers, length in ((2, 5), (1, 5), (0, 5), (2, 4), (2, 9)):
        save_gru(folder, 30, length, layers).rename(folder / f"gru-{layers}-{length}.pt2")
    save_model(folder, Sum(31, 31), 30, 9, "sum.pt2")
    save_model(folder, Sum(30, 30), 29, 9, "sum-29.pt2")
    for name, known in (("T", "other"), ("S", "other"), ("sum", "other"), ("sum", "data")):
        rewrite(folder / f"{name}.pt2", folder / f"{name}-{known}.pt2", data_sha256=sha256[known])
    save_data(folder, {1: [1, 2, 3, 4], 2: [5, 6, 29]}, "29.txt")
    save_data(folder, {u: h[:-1] for u, h in HISTORIES.items()}, "short.txt")
    save_data(folder, {u: [*h[:-2], *h[:-3:-1]] for u, h in HISTORIES.items()}, "swapped.txt")
    return folder


@pytest.fixture(autouse=True)
def work_in_a_copy(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


REFUSED = [
    *((module, "", "No such file") for module in WORDS),
    (asrep, "--generator S.pt2", "S.pt2 was not trained with --reverse"),
    (asrep, "--generator G.pt2 --fill 29", "too few for --fill"),
    (asrep, "--generator G.pt2 --reverse", "takes no --generator"),
    (asrep, "--start T-other.pt2", "it was trained on other data"),
    (asrep, "--start sum-29.pt2", "is no model file for these data"),
    (asrep, "--out new/out.txt", "--out must end in .pt2"),
    (ranking_distill, "--interesting 20", "too few for K and M and a history"),
    (ranking_distill, "--student gru-2-9.pt2", "must read 9 items"),
    *(
        (dt4sr, word, word[:5])
        for word in ["--heads=3", "--dim=0", "--dropout=2", "--max-length=1", "--score=sum"]
    ),
    *((evaluate, f"--inputs {name}.txt", "not the histories") for name in ("swapped", "short", "29")),
    *((module, "--teacher data.txt", "data.txt is no model file") for module in FOUR),
    *((module, "--teacher T-other.pt2", "it was trained on other data") for module in FOUR),
    *((module, "--student S-other.pt2", "it was trained on other data") for module in FOUR),
    *((module, "--teacher gru-2-4.pt2", "5 items") for module in FOUR),
    *((module, "--learning-rate 1e30 --epochs 3", "NaN") for module in SIX),
    *((module, "--teacher gru-2-5.pt2", "is not a torch.stack") for module in TWO),
    *((module, "--teacher gru-1-5.pt2", "must have 2 layers") for module in TWO),
    *((module, "--student gru-0-5.pt2", "0 layers (min. 1)") for module in TWO),
    (domain_distill, "--source 29.txt", "trained on other data"),
    (domain_distill, "--source 29.txt --teacher sum-29.pt2", "must be for 30 items"),
    (domain_distill, "--source=", "give --source"),
    (domain_distill, "--split", "No such file"),
]


@pytest.mark.parametrize("module, words, message", REFUSED, ids=lambda x: getattr(x, "__name__", None))
def test_what_is_refused(module, words, message, capsys):
    with pytest.raises(SystemExit) as end:
        run(module, "none.txt" if message == "No such file" else "data.txt", WORDS[module], words)
    line = end.value.code if end.value.code != 2 else capsys.readouterr().err.splitlines()[-1]
    assert message in line and "\n" not in line
    assert not any(Path().glob("new/*" if module in SIX else "new"))  # these make a folder before training


@pytest.mark.parametrize("max_length", [3, 50])
def test_prior_items_are_the_best_one_after_the_other(max_length):
    model, rng, catalogue = Sum(15, 15), np.random.default_rng(0), np.arange(1, 13)  # 13 and 14 never occur
    histories = [rng.permutation(12)[:n] + 1 for n in (1, 4, 6)]
    prior = asrep.prior_items(model, np.array([1, 2, 3]), histories, 5, catalogue, max_length, "cpu")
    for history, items in zip(histories, prior.tolist(), strict=True):
        known = history.tolist()
        for item in items:
            score = model.weight.detach()[known[-max_length:]].sum(0)
            assert item == max({*range(1, 13)} - {*known}, key=lambda i: score[i].item())
            known.append(item)
        alone = asrep.prior_items(model, np.array([1]), [history], 5, catalogue, max_length, "cpu")
        assert alone.tolist() == [items]  # the padding beside longer histories plays no part


def test_equal_histories_are_no_two_domains(write_data):
    write_data({1: [1, 2, 3], 2: [2, 3, 1]}, "equal.txt")
    with pytest.raises(SystemExit, match="no history is longer than the median"):
        run(domain_distill, "equal.txt --split --out new")
    assert not any(Path().glob("new*"))


def test_short_histories_are_filled_and_know_no_test_item(write_data):
    torch.manual_seed(0)
    generator = Taste(31, 31)

    def filled(histories, order):
        data = evaluate.read_interactions(write_data(histories))
        settings = Namespace(fill=4, order=order, device="cpu")
        longer = asrep.filled_histories(data, asrep.generate(generator, data, 5, settings))
        return dict(zip(histories, np.split(longer.items, longer.starts[1:-1]), strict=True))

    histories = HISTORIES | {99: [*range(1, 31)]}  # so each item occurs, whatever the last ones are
    longer = {order: filled(histories, order) for order in ("clean", "published")}
    for user, history in histories.items():
        train = history[:-2] if len(history) > 2 else history
        k = max(0, 4 - len(train)) * (len(history) > 2)  # others would become users who are evaluated
        prior = asrep.prior_items(
            generator, np.array([user]), [np.array(train[::-1])], k, range(1, 31), 5, "cpu"
        )
        assert longer["clean"][user].tolist() == prior[0, ::-1].tolist() + history
        assert len(longer["clean"][user]) == (max(len(history), 6) if len(history) > 2 else len(history))
        assert len({*prior[0]} - {*train}) == k
    # other validation and test items: the clean generator makes the same items, the published one does not
    evaluated = [user for user in HISTORIES if len(HISTORIES[user]) > 2]
    other = {u: [*HISTORIES[u][:-2], HISTORIES[u][-1] % 30 + 1, HISTORIES[u][-2] % 30 + 1] for u in evaluated}
    for order, same in (("clean", all), ("published", any)):
        again = filled(histories | other, order)
        equal = [np.array_equal(again[u][:-2], longer[order][u][:-2]) for u in evaluated]
        assert same(equal) and (same is all or not all(equal))


def test_what_the_generator_reads(write_data):
    data = evaluate.read_interactions(write_data({4: [1, 2, 3, 8, 9], 7: [5, 6], 9: [1, 2, 3]}))
    # user 4 trains on 1 2 3, user 7 on 5 6, user 9 on 1
    assert asrep.reversed_histories(data).items.tolist() == [3, 2, 1, 8, 9, 6, 5, 1, 2, 3]
    read = [
        [asrep.generator_input(data, u, order).tolist() for u in range(3)] for order in ("clean", "published")
    ]
    assert read == [[[3, 2, 1], [6, 5], [1]], [[3, 2, 1, 8, 9], [6, 5], [1, 2, 3]]]
    longer = asrep.filled_histories(data, [np.array([6, 7]), np.array([], int), np.array([4])])
    assert longer.items.tolist() == [7, 6, 1, 2, 3, 8, 9, 5, 6, 4, 1, 2, 3]
    assert longer.starts.tolist() == [0, 7, 9, 13] and longer.train_end.tolist() == [5, 9, 11]


def test_what_generated_items_know_by_hand(write_data):
    histories = {1: [1, 2, 3, 4, 5], 2: [6, 2, 7, 8, 9], 3: [6, 5, 1, 3, 2], 4: [7, 9], 5: [4, 3, 8]}
    data = evaluate.read_interactions(write_data(histories))
    # training histories: 1 2 3, 6 2 7, 6 5 1, 7 9, 4. The first generated items of users 1 to 3 are 6, 9, 7
    prior = [np.array([6, 8]), np.array([9]), np.array([7]), *[np.array([], int)] * 2]
    shares = asrep.co_occurrence_of_first_item(data, prior)
    # together are 6 and 5, 9 and 9, 7 and 2; of 6 and 3, 9 and 7, 7 and 1 the second; and so on
    by_hand = {"test item": 3, "newest training item": 1, "oldest training item": 2}
    by_hand["test item of another user"] = 2
    assert {name: round(3 * share) for name, share in shares.items()} == by_hand


def test_asrep_from_beginning_to_end(capsys):
    starts = "--start S.pt2", "--start G.pt2", "--start G.pt2 --generator G.pt2 --fill 7"
    for n, start in enumerate(starts):
        run(asrep, "data.txt", start, f"--epochs 2 --learning-rate 0.02 --out {n}.pt2")
    assert load("2.pt2")[1]["stage"] == "asrep" and load("2.pt2")[1]["settings"]["fill"] == 7
    data = evaluate.read_interactions("data.txt")
    prior = asrep.generate(load("G.pt2")[0], data, 5, Namespace(fill=7, order="clean", device="cpu"))
    filled = asrep.filled_histories(data, prior)
    assert np.loadtxt("2.txt", int)[:, 1].tolist() == filled.items.tolist()
    shown = capsys.readouterr().out
    num_generated = [len(items) for items in prior if len(items)]
    assert f"{len(num_generated)} histories filled with {sum(num_generated)} items\n" in shown
    for name, share in asrep.co_occurrence_of_first_item(data, prior).items():
        assert f"{100 * share:6.1f} %  {name}\n" in shown
    run(asrep, "data.txt", starts[2], "--fill 1 --epochs 0 --out none.pt2")
    assert "0 histories filled with 0 items" in capsys.readouterr().out
    assert len({Path(f"{n}.pt2").read_bytes() for n in range(3)}) == 3 and not Path("1.txt").exists()
    run(emd_distill, "data.txt --student 2.pt2 --epochs 1 --out on.pt2")
    capsys.readouterr()
    ranks, evaluated = [], [user for user in HISTORIES if len(HISTORIES[user]) > 2]
    for inputs in ("", "--inputs 2.txt", "--inputs data.txt"):
        run(evaluate, "data.txt 2.pt2 --json --ranks ranks.npy", inputs)
        assert json.loads(capsys.readouterr().out)[0]["users"] == len(evaluated)
        ranks.append(np.load("ranks.npy")[:, 0])
    long = np.array([len(HISTORIES[user]) - 2 >= 7 for user in evaluated])
    assert (ranks[0] == ranks[2]).all() and (ranks[0] == ranks[1])[long].all()
    # a generated item may be ranked: the model reads the longer history, but only the real one is left out
    history, (*seen, target) = read_rows("2.txt")[3], HISTORIES[3]
    _, output, item_vectors = load("2.pt2")[0](torch.tensor([3]), torch.tensor([history[:-1][-5:]]))
    scores = (output[0, -1] @ item_vectors.T).tolist()
    better = sum(scores[i] > scores[target] for i in range(1, 31) if i not in seen)
    assert ranks[1][evaluated.index(3)] == 1 + better


@pytest.mark.parametrize("order", ["clean", "published"])
def test_the_generator_reads_as_much_as_it_can(order, tmp_path):
    save_model(tmp_path, Taste(31, 31), 30, 9, "long.pt2", settings={"reverse": True})  # the student reads 5
    run(
        asrep,
        "data.txt --start S.pt2 --generator long.pt2 --fill 12 --epochs 0 --out 9.pt2",
        f"--order {order}",
    )
    data, arguments = evaluate.read_interactions("data.txt"), Namespace(fill=12, order=order, device="cpu")
    filled = [
        asrep.filled_histories(data, asrep.generate(load("long.pt2")[0], data, length, arguments))
        for length in (9, 5)
    ]
    written = np.loadtxt("9.txt", int)[:, 1].tolist()
    assert written == filled[0].items.tolist() != filled[1].items.tolist()


def softplus(x):
    return np.log1p(np.exp(x))


def test_losses_with_one_negative_by_hand():
    rng = np.random.default_rng(0)
    output, vectors = rng.normal(size=(7, 3)), rng.normal(size=(9, 3))
    target, negative = rng.integers(1, 9, 7), rng.integers(1, 9, 7)
    z = output @ vectors.T
    z_i, z_j = z[np.arange(7), target], z[np.arange(7), negative]
    output, vectors, target, negative = map(torch.from_numpy, (output, vectors, target, negative))
    l_bpr = dt4sr.next_item_bpr_loss(output, vectors, target, negative).item()
    assert l_bpr == pytest.approx(softplus(z_j - z_i).mean())
    l_bce = asrep.bce_loss(output, vectors, target, negative[:, None]).item()
    assert l_bce == pytest.approx((softplus(-z_i) + softplus(z_j)).mean())


BATCHES = [
    (dt4sr, "bpr", "--dropout 0 --max-length 5 --dim 4"),
    (dt4sr, "ce", "--dropout 0 --max-length 5 --dim 4"),
]
BATCHES += [(asrep, loss, "--start S.pt2") for loss in ("bce", "ce")]
BATCHES += [(asrep, "bce", f"--start S.pt2 {more}") for more in ("--reverse", "--generator G.pt2 --fill 4")]


@pytest.mark.parametrize("module, loss, more", BATCHES)
def test_the_loss_of_a_batch(module, loss, more, monkeypatch):
    """Each position has its target, and a negative that its own user has not seen. Lengths are unlike."""
    result, drawn, draw = [], [], module.UnseenItems.draw
    monkeypatch.setattr(module, "with_dropout", lambda part, on: part)
    monkeypatch.setattr(module, "follow", lambda *given: result.extend(given))
    monkeypatch.setattr(module.UnseenItems, "draw", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    run(module, "data.txt --out out.pt2", more, "--loss", loss)
    model = load("out.pt2")[0]  # `follow` has left the weights as they were
    assert module is dt4sr or all(equal_weights(model, load("S.pt2")[0]))
    value, values = result[0](np.arange(10))[0].item(), []
    histories = read_rows("out.txt") if "--generator" in more else HISTORIES
    train = {u: history[:-2] if len(history) > 2 else history for u, history in histories.items()}
    if "--reverse" in more:
        train = {user: history[::-1] for user, history in train.items()}
    users = [user for user in train if len(train[user]) > 1][:10]
    negatives = iter(np.ravel(drawn).tolist())
    for user in users:
        window = train[user][-6:]
        _, output, vectors = model(torch.tensor([user]), torch.tensor([window[:-1]]))
        z = (output[0] @ vectors.T).detach().double().numpy()
        for position, item in enumerate(window[1:]):
            z_i = z[position, item]
            if loss == "ce":
                values.append(np.log(np.exp(z[position, 1:]).sum()) - z_i)
                continue
            negative = next(negatives)
            assert negative not in train[user]
            z_j = z[position, negative]
            values.append(softplus(z_j - z_i) if module is dt4sr else softplus(-z_i) + softplus(z_j))
    assert value == pytest.approx(np.mean(values), rel=1e-5) and not list(negatives)
    for _ in range(0 if loss == "ce" else 20):
        drawn.clear()
        result[0](np.arange(10))
        seen = [train[user] for user in users for _ in train[user][-6:-1]]
        assert not any(item in known for item, known in zip(np.ravel(drawn).tolist(), seen, strict=True))


def test_scores_are_distances_of_gaussians_with_positive_covariances():
    rng = np.random.default_rng(0)
    mu, item_mu = rng.normal(size=(2, 5, 3))
    sigma, item_sigma = np.exp(rng.normal(size=(2, 5, 3)))
    history = dt4sr.history_vector(torch.from_numpy(mu), torch.from_numpy(sigma))
    scores = (history @ dt4sr.item_vector(torch.from_numpy(item_mu), torch.from_numpy(item_sigma)).T).numpy()
    for t in range(5):
        A, distance = np.diag(sigma[t]), []  # the formula for any covariances
        for i in range(5):  # |mu_A - mu_B|^2 + trace(A + B - 2 (A^1/2 B A^1/2)^1/2)
            trace = np.trace(A + (B := np.diag(item_sigma[i])) - 2 * sqrtm(sqrtm(A) @ B @ sqrtm(A))).real
            distance.append(np.sum((mu[t] - item_mu[i]) ** 2) + trace)
        score = scores[t] - np.sum(mu[t] ** 2 + sigma[t])
        np.testing.assert_allclose(score, -np.array(distance), rtol=1e-10, atol=1e-10)
        assert (np.argsort(-scores[t]) == np.argsort(distance)).all()
    x = torch.tensor([-80.0, -20.0, -1.0, 0.0, 3.0], requires_grad=True)
    sigma = dt4sr.positive(x)
    torch.testing.assert_close(sigma, torch.nn.functional.elu(x.double()).float() + 1, rtol=1e-5, atol=1e-7)
    sigma.sqrt().sum().backward()
    assert (sigma > 0).all() and x.grad.isfinite().all() and (x.grad > 0).all()


@pytest.mark.parametrize("score", dt4sr.SCORES)
def test_dt4sr_is_two_towers_and_its_score_by_hand(score):
    torch.manual_seed(0)
    model = dt4sr.DT4SR(30, 9, 6, 2, 2, 0.5, score).double().eval()
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    items, towers = torch.randint(1, 31, (4, 9)), []
    for tower in (0, 1):
        state = 6**0.5 * model.M[tower].weight[items] + model.P[tower]
        for pair in model.blocks:
            state = pair[tower](state)
        towers.append((model.norm[tower](state), model.M[tower].weight))
    (mu_t, mu_i), (sigma_t, sigma_i) = towers
    sigma_t, sigma_i = (torch.nn.functional.elu(x) + 1 for x in (sigma_t, sigma_i))
    _, output, vectors = model(torch.ones(4, dtype=int), items)
    z = output @ vectors.T
    if score == "dot":
        expected = mu_t @ mu_i.T + sigma_t @ sigma_i.T
    else:
        gaps = [a[..., None, :] - b for a, b in ((mu_t, mu_i), (sigma_t.sqrt(), sigma_i.sqrt()))]
        expected = -sum(gap.square().sum(-1) for gap in gaps)
        z, expected = (x - x[..., :1] for x in (z, expected))  # but for a term that depends on t only
    torch.testing.assert_close(z, expected, rtol=1e-8, atol=1e-8)


def test_dropout_is_on_while_dt4sr_trains(monkeypatch):
    result = []
    monkeypatch.setattr(dt4sr, "follow", lambda *given: result.extend(given))
    run(dt4sr, "data.txt --loss ce --dropout 0.9 --out out.pt2")
    assert result[0](np.arange(10))[0].item() != result[0](np.arange(10))[0].item()


@pytest.mark.parametrize("score, size", [("wasserstein", 13), ("dot", 12)])
def test_dt4sr_is_causal_and_learns_like_any_model(score, size, capsys):
    shape = f"--dim 6 --max-length 9 --heads 2 --score {score}"
    run(dt4sr, f"data.txt {shape} --epochs 0 --out new.pt2")
    model, config = load("new.pt2")
    assert (config["layers"], config["dim"], config["stage"]) == (2, 12, "dt4sr")
    assert config["data_sha256"] == evaluate.read_interactions("data.txt").sha256
    items, ids = torch.randint(1, 31, (4, 9)), torch.ones(4, dtype=int)
    later = torch.cat([items[:, :5], items[:, 5:] % 30 + 1], 1)
    (_, output, item_vectors), (_, changed, _) = model(ids, items), model(ids, later)
    torch.testing.assert_close(changed[:, :5], output[:, :5], rtol=0, atol=1e-6)
    assert not torch.allclose(changed[:, 5:], output[:, 5:])
    assert output.shape[2] == item_vectors.shape[1] == size
    run(emd_distill, "data.txt --student new.pt2 --epochs 1 --out on.pt2")
    for loss in ("bpr", "ce"):
        capsys.readouterr()
        run(dt4sr, f"data.txt {shape} --loss {loss} --epochs 8 --learning-rate 0.02 --out {loss}.pt2")
        means = printed("loss", capsys)
        assert len(means) == 8 and means[-1] < means[0] - 0.05
        assert not any(equal_weights(load(f"{loss}.pt2")[0], model))


def test_rrd_is_the_likelihood_summed_over_all_orders_of_the_uninteresting_items():
    z, z_l = np.random.default_rng(0).normal(size=(2, 5, 3)) * 2
    likelihood = np.zeros(5)
    for order in itertools.permutations(
        range(3)
    ):  # Plackett and Luce: who comes next among those that are left
        ranked = np.exp(np.concatenate([z, z_l[:, order]], 1))
        likelihood += np.prod([ranked[:, k] / ranked[:, k:].sum(1) for k in range(6)], 0)
    loss = ranking_distill.rrd_loss(torch.from_numpy(z), torch.from_numpy(z_l))
    assert loss.item() == pytest.approx(-np.log(likelihood).mean())


def test_rrd_draws_ranks_and_the_rest():
    torch.manual_seed(0)
    scores = torch.tensor([[-math.inf, 5.0, 1.0, 4.0, 2.0, -math.inf, 3.0]]).expand(6000, -1)
    best = [1, 3, 6, 4, 2]  # items of rank 1 to 5; items 0 and 5 must not be drawn
    interesting = ranking_distill.draw_interesting(scores, 2, 1.5)
    rest = ranking_distill.draw_uninteresting(scores, interesting, 2)
    p = np.exp(-np.arange(5) / 1.5)
    p /= p.sum()
    expected = {}  # of a pair, drawn one after the other without replacement
    for i, j in itertools.combinations(range(5), 2):
        expected[best[i], best[j]] = 6000 * p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j]))
    drawn = Counter(map(tuple, interesting.tolist()))
    assert drawn.keys() <= expected.keys()  # the teacher's order, no item twice
    assert chisquare([drawn[pair] for pair in expected], [*expected.values()]).pvalue > 1e-3
    others = Counter()
    for pair, items in zip(interesting.tolist(), rest.tolist(), strict=True):
        assert len({*pair, *items}) == 4 and not {0, 5} & {*items}
        others[tuple(sorted(({*best} - {*pair}) - {*items})), tuple(sorted({*best} - {*pair}))] += 1
    for left in {left for _, left in others}:  # which of the three others is left out: each alike
        counts = [others[(item,), left] for item in left]
        assert sum(counts) < 50 or chisquare(counts).pvalue > 1e-4


def test_rrd_draws_far_ranks_as_often_as_it_should():
    torch.manual_seed(0)
    ranks = ranking_distill.draw_interesting(-torch.arange(400.0).expand(4000, -1), 1, 10.0)
    assert (ranks >= 32).float().mean().item() == pytest.approx(math.exp(-3.2), abs=0.012)


def test_rrd_of_a_batch_by_hand(monkeypatch, tmp_path):
    """Each list is after a position that was drawn. It has no item that was read by then or never occurs."""
    result, calls, positions = [], [], set()
    for name in ("T.pt2", "S.pt2"):
        save_model(tmp_path, Taste(31, 31), 30, 5, name)  # scores depend on the user
    draw, rrd_loss = ranking_distill.draw_interesting, ranking_distill.rrd_loss
    draw_rest = ranking_distill.draw_uninteresting
    monkeypatch.setattr(ranking_distill, "with_dropout", lambda part, on: part)
    monkeypatch.setattr(ranking_distill, "follow", lambda *given: result.extend(given))
    monkeypatch.setattr(
        ranking_distill, "draw_interesting", lambda *a: calls.append([a[0], draw(*a)]) or calls[-1][1]
    )
    monkeypatch.setattr(
        ranking_distill, "draw_uninteresting", lambda *a: calls[-1].append(draw_rest(*a)) or calls[-1][-1]
    )
    monkeypatch.setattr(ranking_distill, "rrd_loss", lambda *z: calls[-1].extend(z) or rrd_loss(*z))
    run(ranking_distill, "data.txt", WORDS[ranking_distill], "--weight 0.5")
    models = [load(path)[0] for path in ("T.pt2", "S.pt2")]
    never = {*range(31)} - {item for history in HISTORIES.values() for item in history}
    train = {u: history[:-2] if len(history) > 2 else history for u, history in HISTORIES.items()}
    users = [user for user in train if len(train[user]) > 1]
    windows = [train[user][-6:-1] for user in users]
    last = [history[-1] for history in train.values() if len(history) > 1]
    for _ in range(20):
        loss, terms = result[0](np.arange(10))
        assert loss.item() == pytest.approx(terms["L_CE"].item() + 0.5 * terms["L_RRD"].item(), rel=1e-6)
        scores, interesting, rest, z, z_rest = calls[-1]
        assert interesting.shape == (10, 5) and rest.shape == (10, 6) and terms["L_RRD"].requires_grad
        l_ce = []
        for row, window in enumerate(windows[:10]):
            left_out = {*(scores[row] == -math.inf).nonzero()[:, 0].tolist()}
            (t,) = [t for t in range(len(window)) if left_out == never | {*window[: t + 1]}]
            positions.add((row, t))
            of_both = [model(torch.tensor([users[row]]), torch.tensor([window])) for model in models]
            z_T, z_S = (output[0, t] @ vectors.T for _, output, vectors in of_both)
            others = scores[row] > -math.inf
            torch.testing.assert_close(scores[row][others], z_T[others], rtol=0, atol=1e-5)
            torch.testing.assert_close(z[row], z_S[interesting[row]], rtol=0, atol=1e-5)
            torch.testing.assert_close(z_rest[row], z_S[rest[row]], rtol=0, atol=1e-5)
            assert not {*rest[row].tolist()} & left_out
            z_all = of_both[1][1][0] @ of_both[1][2][1:].T
            target = torch.tensor([*window[1:], last[row]])
            l_ce.append(torch.nn.functional.cross_entropy(z_all, target - 1, reduction="none"))
        assert terms["L_CE"].item() == pytest.approx(torch.cat(l_ce).mean().item(), rel=1e-5)
    assert positions == {(row, t) for row, window in enumerate(windows[:10]) for t in range(len(window))}


def test_rrd_takes_models_of_stage_4(tmp_path):
    run(bidirectional_distill, "data.txt --base bpr --warm-up 2 --epochs 0 --dims 6 3 --out b")
    given = "--teacher b-teacher.pt2 --student b-student.pt2 --interesting 3 --uninteresting 3 --epochs 2"
    run(ranking_distill, "data.txt", given, "--out b-new.pt2")
    assert load("b-new.pt2")[1]["settings"]["base"] == "bpr"
    assert not all(equal_weights(load("b-new.pt2")[0], load("b-student.pt2")[0]))
    more = "--base bpr --teacher b-teacher.pt2 --student b-new.pt2 --warm-up 0 --epochs 1 --out on"
    run(bidirectional_distill, "data.txt", more)


def test_rrd_needs_enough_items_that_occur(tmp_path):
    save_data(tmp_path, {user: [2 * item for item in items] for user, items in HISTORIES.items()}, "even.txt")
    save_model(tmp_path, Sum(61, 61), 60, 5, "even.pt2")
    words = "--teacher even.pt2 --student even.pt2 --interesting 20 --uninteresting 20 --out o.pt2"
    with pytest.raises(SystemExit, match="too few for K and M"):
        run(ranking_distill, "even.txt", words)


@pytest.mark.parametrize("module, loss", [(asrep, "bce"), (dt4sr, "bpr")])
def test_negatives_have_a_seed(module, loss):
    for seed, out in ((1, "a"), (1, "b"), (2, "c")):
        run(module, "data.txt", WORDS[module], f"--loss {loss} --epochs 2 --seed {seed} --out {out}.pt2")
    assert Path("a.pt2").read_bytes() == Path("b.pt2").read_bytes()
    assert not all(equal_weights(load("a.pt2")[0], load("c.pt2")[0]))


def test_negatives_of_a_start_that_is_given_follow_the_seed(tmp_path, monkeypatch):
    losses = []  # of one batch, with the same weights and no dropout
    save_model(tmp_path, Sum(31, 31), 30, 5, "any.pt2")
    monkeypatch.setattr(asrep, "follow", lambda loss_of, *_: losses.append(loss_of(np.arange(10))[0].item()))
    for seed in (1, 1, 2):
        run(asrep, f"data.txt --start any.pt2 --loss bce --seed {seed} --out o.pt2")
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("module, words", [(asrep, "--start any.pt2"), (dt4sr, "")])
def test_who_has_seen_all_is_left_out_where_unseen_items_are_drawn(
    module, words, tmp_path, monkeypatch, capsys
):
    save_model(tmp_path, Sum(31, 31), 30, 5, "any.pt2")
    save_data(tmp_path, HISTORIES | {7: [*range(1, 31), 1, 2]}, "all.txt")
    monkeypatch.setattr(module, "follow", lambda loss_of, weights, histories, args: result.append(histories))
    result = []
    run(module, "all.txt", words, "--out o.pt2")
    assert not (result[0].users == 6).any() and "1 users have seen every item" in capsys.readouterr().err


@six
def test_steps_are_adamw_and_each_position_counts_alike(module, capsys):
    """The loss of a batch is w . mean c_u, so its gradient is known. The histories u have unlike lengths."""
    lengths, c = np.array([1, 2, 3, 9, 5, 1, 4]), np.random.default_rng(0).normal(size=(7, 3))
    w, steps = torch.zeros(3, dtype=torch.float64, requires_grad=True), []

    def loss_of(batch):
        loss = (w * torch.from_numpy(c[batch].mean(0))).sum()
        steps.append((batch, loss.item()))
        return loss, {"L_w": loss}

    histories = module.Histories(np.arange(7), np.zeros(7, int), lengths + 1)
    module.follow(loss_of, [w], histories, Namespace(seed=1, batch_size=3, learning_rate=0.1, epochs=2))
    by_hand, m, v, means = np.zeros(3), 0, 0, [0, 0]
    for t, (batch, loss) in enumerate(steps):
        share = lengths[batch].sum() / lengths.sum()
        means[t // 3] += share * loss
        gradient = 3 * share * c[batch].mean(0)  # 3 batches an epoch
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        step = m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
        by_hand -= 0.1 * (1 - t / 6) * (step + 0.01 * by_hand)
    np.testing.assert_allclose(w.detach(), by_hand, rtol=1e-9)
    epochs = [np.concatenate([batch for batch, _ in steps[k : k + 3]]).tolist() for k in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [*range(7)] and epochs[0] != epochs[1]
    assert printed("L_w", capsys) == [round(mean, 4) for mean in means]


@pytest.mark.parametrize("module", [*FOUR, asrep], ids=lambda module: module.__name__)
def test_dropout_is_on_in_the_student_only_and_off_in_its_file(module):
    for path in ("T.pt2", "S.pt2"):
        rewrite(path, path, training=True)
    seen = {8: set(), 4: set()}  # by d, of the teacher and of the student

    def dropouts(part):
        return {n.args[2] for n in part.graph.nodes if n.target is torch.ops.aten.dropout.default}

    def record(part, inputs):  # also of what follows a layer; but not the example of load_model, a batch of 1
        if isinstance(part, torch.fx.GraphModule) and len(inputs[-1]) > 1:
            seen[part.M.weight.shape[1]].update(dropouts(part))

    with torch.nn.modules.module.register_module_forward_pre_hook(record):
        run(module, "data.txt", WORDS[module], "--epochs 1")
    assert seen == {8: set() if module is asrep else {False}, 4: {True}}
    assert dropouts(torch.export.load("new/out.pt2").graph_module) == {False}


@pytest.mark.parametrize("module", [*TWO, ranking_distill], ids=lambda m: m.__name__)
def test_the_student_learns_and_is_a_model_like_any(module, capsys):
    teacher = Path("T.pt2").read_bytes()
    for out in ("out.pt2", "again.pt2"):
        run(module, "data.txt", WORDS[module], "--epochs 8 --learning-rate 0.02 --out", out)
    l_ce = printed("L_CE", capsys)
    assert len(l_ce) == 16 and l_ce[7] < l_ce[0] - 0.1 and Path("T.pt2").read_bytes() == teacher
    assert Path("out.pt2").read_bytes() == Path("again.pt2").read_bytes()
    model, config = load("out.pt2")
    assert (config["stage"], config["max_length"], config["layers"]) == (module.__name__, 5, 2)
    assert config["data_sha256"] == evaluate.read_interactions("data.txt").sha256
    assert not any(equal_weights(model, load("S.pt2")[0]))
    run(emd_distill, "data.txt --student out.pt2 --epochs 1 --out on.pt2")


@three
def test_the_loss_is_l_ce_and_its_other_terms(module, monkeypatch):
    """L of a batch of unlike lengths by hand; a teacher of 4 layers and a student of 2, without dropout."""
    result, entered, rest_of = [], [], statistics_distill.rest_of
    monkeypatch.setattr(module, "with_dropout", lambda part, on: part)
    monkeypatch.setattr(module, "rest_of", lambda *of: entered.append(of[1]) or rest_of(*of), raising=False)

    monkeypatch.setattr(module, "follow", lambda *given: result.extend(given))
    run(sasrec_teacher, "data.txt --max-length 5 --dim 4 --epochs 5 --learning-rate 0.05 --out S.pt2")
    run(module, "data.txt", WORDS[module], "--search-epochs 0" if module is dfa_distill else "")
    loss_of, (*_, W_1, b_1, W_2, b_2), _, _ = result
    loss, terms = loss_of(np.arange(10))
    assert entered == {statistics_distill: [2, 4], dfa_distill: [2, 1, 4, 2], domain_distill: []}[module]
    (T, _), (S, _) = load("T.pt2"), load("S.pt2")
    train = [history[:-2] if len(history) > 2 else history for history in HISTORIES.values()]
    windows = [torch.tensor(items[-6:]) for items in train if len(items) > 1]  # 5 inputs, 5 targets
    target, means = np.random.default_rng(0).choice(len(windows), 10), []
    for rows in (range(10), target) if module is domain_distill else (range(10),):
        values = defaultdict(list)  # of each term, at each position
        for row in rows:
            history, read = windows[row], (torch.tensor([1]), windows[row][None, :-1])
            (hidden_T, output_T, vectors_T), (hidden, output, vectors) = T(*read), S(*read)
            log_p, log_q = (x[0].log_softmax(1) for x in (output @ vectors[1:].T, output_T @ vectors_T[1:].T))
            label = log_q.argmax(1, keepdim=True) if rows is target else history[1:, None] - 1
            values["CE"].append(-log_p.gather(1, label))
            if module is domain_distill:
                values["output"].append((log_q.exp() * (log_q - log_p)).sum(1))
                values["feature"].append((hidden[-1] @ W_2.T + b_2 - hidden_T[-1])[0].square())
                continue
            for i, (W, b) in enumerate([(W_1, b_1), (W_2, b_2)]):
                projected, state = hidden[i + 1] @ W.T + b, hidden_T[2 * i + 2]
                s, s_T = ((x.var(1, correction=0) + 1e-5).sqrt() for x in (projected, state))
                state = s * (state - state.mean(1)) / s_T + projected.mean(1)
                difference = rest_of(T, 2 * i + 2)(state, *read)[0] - output_T
                if module is dfa_distill:  # the mean of layers 1 and 2, and of 3 and 4
                    difference = projected - hidden_T[2 * i + 1 : 2 * i + 3].mean(0)
                values[i].append(difference[0].square())
        means += [torch.cat(values[name]).mean().item() for name in values]
    assert terms["L_CE"].item() == pytest.approx(means[0], rel=1e-4)
    assert loss.item() == pytest.approx(sum(means), rel=1e-4) and sum(means) - means[0] > 1e-3


def test_a_layers_own_state_put_back_gives_the_same_output():
    edges = [["conv3"], ["mean", "max_pool"]]
    Path("a.json").write_text(json.dumps({"cells": 3, "nodes": 2, "dim": 4, "edges": edges}))
    run(adarec_search, "data.txt --architecture a.json --max-length 5 --out A.json")
    users, items = torch.arange(1, 6), torch.randint(1, 31, (5, 5))
    for path in ("T.pt2", "S.pt2", "A.pt2"):
        module, _ = load(path)
        hidden, *results = module(users, items)
        for layer, state in enumerate(hidden):
            rest = statistics_distill.rest_of(module, layer)
            torch.testing.assert_close(rest(state, users, items), (*results,), rtol=0, atol=0)
            changed = state.detach().clone().requires_grad_()
            rest(changed, users, items)[0].sum().backward()
            assert changed.grad.abs().sum() > 0 and {*rest.parameters()} <= {*module.parameters()}
            assert all(node.users or node.op in ("placeholder", "output") for node in rest.graph.nodes)


def test_statistics_leave_padding_out():
    rng, lengths = np.random.default_rng(0), (6, 1, 4)
    x, real = rng.normal(size=(3, 6, 2)), torch.arange(6) < torch.tensor(lengths)[:, None]
    m, s = statistics_distill.statistics(torch.from_numpy(x), real)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(m[row, 0], x[row, :n].mean(0), rtol=1e-12)
        np.testing.assert_allclose(s[row, 0], np.sqrt(x[row, :n].var(0) + 1e-5), rtol=1e-12)
    m_new, s_new = torch.from_numpy(rng.normal(size=(2, 3, 1, 2)))
    changed = statistics_distill.adain(torch.from_numpy(x), real, m_new, s_new.abs())
    m, s = statistics_distill.statistics(changed, real)
    np.testing.assert_allclose(m, m_new, atol=1e-9)
    np.testing.assert_allclose(s[[0, 2]], s_new.abs()[[0, 2]], rtol=1e-3)  # a single position has none to set


@pytest.mark.parametrize("loss", ["adain", "l2"])
def test_equal_statistics_cost_nothing_and_the_teacher_is_left_alone(loss):
    module = load("T.pt2")[0].requires_grad_(False)
    users, items = torch.arange(1, 6), torch.randint(1, 31, (5, 5))
    items[1, 3:] = 0
    hidden, output, _ = module(users, items)
    rest, compare = statistics_distill.rest_of(module, 2), statistics_distill.STATISTICS_LOSSES[loss]
    # the same statistics in other places: the real positions of each history in another order
    turned = hidden[2].flip(1)
    turned[1, :3] = hidden[2][1, :3].flip(0)
    assert compare(rest, hidden[2], turned, output, users, items) == pytest.approx(0, abs=1e-9)
    other = (2 * hidden[2] + 1).requires_grad_()
    compare(rest, hidden[2], other, output, users, items).backward()
    assert other.grad.abs().sum() > 0.01 and (other.grad[1, 3:] == 0).all()
    assert all(weight.grad is None for weight in module.parameters())


class Planted(torch.nn.Embedding):
    """Four layers: layer `known` (from 1) knows the item that was read last, the others hold only `noise`."""

    def forward(self, users, items):
        read = self.weight[items]
        states = [read] + [noise[: items.shape[1]].expand_as(read) + 0 * read for noise in self.noise]
        states[self.known] = read + 0
        return torch.stack(states), states[4] + states[self.known], self.weight


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_the_layer_that_knows_most_wins(layer, write_data, write_model, capsys):
    torch.manual_seed(layer)
    rng = np.random.default_rng(layer)  # after each item comes the next one
    write_data({u: (rng.integers(12) + np.arange(3 + u % 6)) % 12 + 1 for u in range(1, 61)})
    model = Planted(13, 8)
    model.known, model.noise = layer, torch.nn.Parameter(torch.randn(4, 9, 8))
    write_model(model, 12, 9, "T.pt2")
    run(sasrec_teacher, "data.txt --max-length 9 --dim 8 --blocks 1 --epochs 0 --out S.pt2 --seed", layer)
    run(dfa_distill, "data.txt", FILES, "--epochs 1 --search-epochs 15 --batch-size 8 --seed", layer)
    (shares,) = json.loads(capsys.readouterr().out.split("softmax(alpha) ")[-1].splitlines()[0])
    assert np.argmax(shares) == layer - 1 and max(shares) > 0.5


def test_groups_and_paths_by_hand():
    states, alpha = torch.arange(12.0).view(2, 1, 3, 2), torch.tensor([0.0, np.log(3)]).float()
    torch.testing.assert_close(dfa_distill.aggregate(alpha, states), states[0] / 4 + 3 * states[1] / 4)
    identity, asked = torch.nn.Identity(), []

    def rest(state, users, items):
        asked.append(state)
        return state, torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0]])

    real, target = torch.tensor([[True, True, False]]), torch.tensor([1, 2])
    batch, state = (None, None, real, target), torch.tensor([[[1.0, 2.0], [0.0, 4.0], [7.0, 7.0]]])
    loss = dfa_distill.bridge_loss(alpha, states, state, (identity, identity), (rest, rest), *batch)
    torch.testing.assert_close(asked[1], dfa_distill.aggregate(alpha, states))
    scores = (1, 2), (4, 0), (4.5, 5.5), (7.5, 6.5)  # of the right item and of the wrong one
    l_ce = [np.log(1 + np.exp(wrong - right)) for right, wrong in scores]
    assert loss.item() == pytest.approx(sum(l_ce) / 2, rel=1e-5)


def test_domains_and_their_losses_by_hand():
    source, target = read_rows("d-source.txt"), read_rows("d-target.txt")
    assert source.pop(41) == target.pop(41) == [30]
    assert source | target == HISTORIES and not source.keys() & target.keys()
    assert max(map(len, target.values())) <= min(map(len, source.values()))
    z, z_T = torch.tensor([[0.0, 1.0, 2.0]]).double(), torch.tensor([[2.0, 5.0, 1.0]]).double()
    p, q = (np.exp(x[0].numpy()) / np.exp(x[0].numpy()).sum() for x in (z, z_T))
    l_output = [domain_distill.output_loss(z.repeat(n, 1), z_T.repeat(n, 1)).item() for n in (1, 7)]
    assert l_output == pytest.approx([np.sum(q * np.log(q / p))] * 2)
    assert domain_distill.pseudo_loss(z, z_T).item() == pytest.approx(-np.log(p[1]))
    assert domain_distill.feature_loss(z, z_T).item() == pytest.approx((4 + 16 + 1) / 3)


def test_no_label_of_the_target_is_seen():
    def trained(rows):
        np.savetxt("d-target.txt", rows, "%d")
        run(sasrec_teacher, "d-target.txt --max-length 5 --dim 4 --epochs 0 --out D-S.pt2")  # same weights
        run(domain_distill, DOMAINS, "--epochs 2 --batch-size 8")
        return load("new/out.pt2", "d-target.txt")[0]

    rows, start = np.loadtxt("d-target.txt", int), load("D-S.pt2", "d-target.txt")[0]
    first = trained(rows)
    # the last training item of a history is never read, only a label; so are validation and test items
    for user in np.unique(rows[:-1, 0]):
        at = np.flatnonzero(rows[:, 0] == user)[-3 if (rows[:, 0] == user).sum() > 2 else -1 :]
        rows[at, 1] = rows[at, 1] % 29 + 1
    assert all(equal_weights(first, trained(rows))) and not any(equal_weights(first, start))
    rows[: len(rows) // 2, 1] = rows[: len(rows) // 2, 1] % 29 + 1  # what is read does count
    assert not all(equal_weights(first, trained(rows)))


def test_each_loss_of_domains_plays_a_part(capsys):
    def student(more):
        run(domain_distill, DOMAINS, more)
        model = load("new/out.pt2", "d-target.txt")[0]
        return b"".join(weight.numpy().tobytes() for weight in model.state_dict().values())

    names = "output", "feature", "pseudo"
    students = [student(f"--epochs 1 --losses {losses}") for losses in ("", *names, " ".join(names))]
    assert len({*students}) == 5 and student("--epochs 1 --weight 0") == students[0]
    for name in names:  # each is followed down, not up
        capsys.readouterr()
        student(f"--epochs 6 --losses {name} --weight 9")
        means = printed(f"L_{name}", capsys)
        assert means[-1] < means[0]
