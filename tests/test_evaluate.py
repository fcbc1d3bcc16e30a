"""evaluate.py against hand-computed ranks, a slow second implementation, and models whose answer is known."""

import hashlib
import io
import json
import math
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import evaluate
import sasrec_teacher as teacher


class Scorer(nn.Module):
    """Scores all items by the sum of the tables' rows for the items it reads, and for the user: [_, V+1]."""

    def __init__(self, by_item, by_user):
        super().__init__()
        self.by_item, self.by_user = nn.Parameter(by_item.float()), nn.Parameter(by_user.float())
        self.item_vectors = nn.Parameter(torch.eye(by_item.shape[1]))

    def forward(self, users, items):
        output = self.by_item[items].cumsum(1) + self.by_user[users][:, None]
        return output[None], output, self.item_vectors


def in_order(item_count, user_count):
    """A model that scores item 1 above 2 above 3, whatever it reads; padding stands above all."""
    by_user = -torch.arange(item_count + 1).expand(user_count + 1, -1)
    return Scorer(torch.zeros(item_count + 1, item_count + 1), by_user)


def report(capsys, *argv):
    """What `main` prints with --json."""
    evaluate.main([*map(str, argv), "--json"])
    return json.loads(capsys.readouterr().out)


def fails(capfd, *argv):
    """The one line that `main` ends with, on standard error and with status 1; nothing else is said."""
    with pytest.raises(SystemExit) as end:
        evaluate.main([*map(str, argv)])
    assert "\n" not in end.value.code and capfd.readouterr() == ("", "")
    return end.value.code


def test_rank_by_hand():
    # padding's 9 takes no part, nor does what was seen, not even in a tie; a target seen before does
    cases = {(9, 5, 4, 3, 2): [(1, [], 1), (4, [], 4), (4, [1, 2], 2), (3, [3, 1], 2)]}
    cases[9, 5, 5, 3, 2] = [(2, [], 1.5), (2, [1], 1)]
    cases[0, 1, 1, 1, 1] = [(3, [], 2.5), (3, [4, 4, 0], 2)]
    for scores, target, seen, rank in ((scores, *case) for scores, of in cases.items() for case in of):
        given = torch.tensor([scores]).float(), torch.tensor([target]), torch.tensor([[*seen, 0]])
        assert evaluate.rank_of_target(*given).item() == rank
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(SystemExit, match="not finite"):
            scores = torch.tensor([[0.0, 1, 2], [0, 1, value]])
            evaluate.rank_of_target(scores, torch.tensor([2, 2]), torch.tensor([[0], [0]]))


def test_metrics_by_hand():
    hr, ndcg, mrr = evaluate.metrics(np.array([1, 2, 3.5, 10, 10.5, 11]), 10)
    assert hr.tolist() == [1, 1, 1, 1, 0, 0]
    np.testing.assert_allclose(ndcg, [1, 0.6309297536, 0.4608453970, 0.2890648263, 0, 0], atol=1e-9)
    np.testing.assert_allclose(mrr, [1, 0.5, 1 / 3.5, 0.1, 0, 0])


def slow_rank(scores, target, seen):
    """The mean place of the target over all ways to order ties, by sorting."""
    rivals = sorted({*range(1, len(scores))} - {*seen} | {target}, key=lambda i: -scores[i])
    return np.mean([place for place, i in enumerate(rivals, 1) if scores[i] == scores[target]])


def slow_metrics(rank, k):
    """HR@k, NDCG@k and MRR@k of one user."""
    return [float(rank <= k), (rank <= k) * math.log(2) / math.log(rank + 1), (rank <= k) / rank]


def test_ranks_and_metrics_equal_a_slow_implementation_in_1000_cases():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        item_count, k = rng.integers(2, 40), int(rng.integers(1, 12))
        scores = rng.integers(0, rng.integers(1, 50), item_count + 1).astype(np.float32)  # with many ties
        seen = rng.integers(0, item_count + 1, rng.integers(1, 20))
        target = int(rng.integers(1, item_count + 1))
        given = torch.tensor(scores)[None], torch.tensor([target]), torch.tensor(seen)[None]
        rank, expected = evaluate.rank_of_target(*given), slow_rank(scores, target, seen)
        assert rank.item() == expected
        found = [values.item() for values in evaluate.metrics(rank.numpy(), k)]
        assert found == pytest.approx(slow_metrics(expected, k), abs=1e-12)


@pytest.mark.parametrize("split, seen", [("test", []), ("test", ["--keep-seen"]), ("valid", [])])
def test_all_figures_of_accuracy_equal_a_slow_implementation(write_data, write_model, capsys, split, seen):
    rng, ndcg = np.random.default_rng(0), []
    lengths = {int(user): 1 + n % 12 for n, user in enumerate(rng.permutation(150)[:90] + 1)}
    histories = {u: rng.integers(1, 26, n).tolist() for u, n in lengths.items()} | {200: [25, 1, 2, 3]}
    data, table = write_data(histories), lambda rows: torch.from_numpy(rng.integers(0, 4, (rows, 26)))
    scorers = {n: Scorer(table(26), table(201)) for n in (3, 7)}  # integers: with many ties
    paths = [write_model(scorer, 25, n, f"{n}.pt2", stage=f"of {n}") for n, scorer in scorers.items()]
    results = report(capsys, data, *paths, "--at", 1, 4, 10, "--split", split, *seen)
    for result, (n, scorer), path in zip(results, scorers.items(), paths, strict=True):
        ranks = []
        for user, items in histories.items():
            if len(items) >= 3:
                *history, target = items if split == "test" else items[:-1]
                scores = scorer.by_item[history[-n:]].sum(0) + scorer.by_user[user]
                ranks.append(slow_rank(scores.tolist(), target, [] if seen else history))
        for k in (1, 4, 10):
            expected = np.mean([slow_metrics(rank, k) for rank in ranks], 0)
            assert [result[f"{name}@{k}"] for name in ("HR", "NDCG", "MRR")] == pytest.approx(expected)
        about = {"model": str(path), "stage": f"of {n}", "users": len(ranks), "split": split}
        assert about.items() <= result.items()
        ndcg.append(np.array([slow_metrics(rank, 10)[1] for rank in ranks]))
        interval = ndcg[-1].mean() + np.array([-1.96, 1.96]) * ndcg[-1].std() / math.sqrt(len(ranks))
        assert result["NDCG@10_interval"] == pytest.approx(interval, abs=0.02)
    difference = ndcg[1] - ndcg[0]
    t = difference.mean() / difference.std(ddof=1) * math.sqrt(len(difference))
    assert results[0]["p_value"] == 1
    assert results[1]["p_value"] == pytest.approx(2 * stats.t.sf(abs(t), len(difference) - 1))


def test_candidates_are_unseen_different_and_follow_their_weights():
    taken = torch.tensor([[1, 2, 0]]).expand(4000, -1)
    drawn = evaluate.draw_candidates(torch.ones(11), taken, 3, torch.Generator().manual_seed(0))
    assert (drawn >= 3).all() and all(len({*row}) == 3 for row in drawn.tolist())
    for place in range(3):
        assert stats.chisquare(np.bincount(drawn[:, place], minlength=11)[3:]).pvalue > 1e-3
    weight, taken = torch.tensor([7.0, 1, 2, 3, 0, 4, 5]), torch.tensor([[3]]).expand(20000, -1)
    drawn = evaluate.draw_candidates(weight, taken, 1, torch.Generator().manual_seed(0))[:, 0]
    counts = np.bincount(drawn, minlength=7)
    assert counts[[0, 3, 4]].sum() == 0
    assert stats.chisquare(counts[[1, 2, 5, 6]], np.array([1, 2, 4, 5]) / 12 * 20000).pvalue > 1e-3


@pytest.mark.parametrize("protocol", ["uniform", "popularity"])
def test_sampled_protocols_rank_among_the_drawn_items(write_data, write_model, capfd, protocol):
    rng, chance = np.random.default_rng(0), 1 / np.arange(1, 31)
    draw = lambda: rng.choice(30, 5, replace=False, p=chance / chance.sum()) + 1  # noqa: E731
    histories = {user: draw().tolist() for user in range(1, 400)} | {400: [30, *range(1, 30)][:5]}
    data, counts = write_data(histories), np.bincount(sum(histories.values(), []), minlength=31)
    models = [write_model(in_order(30, 400), 30, n, f"{n}.pt2") for n in (5, 2)]
    sampled = [data, *models, "--protocol", protocol, "--at", 1, 10, "--negatives"]
    # against one drawn item, the target wins as often as the items behind it are drawn
    weight, wins = counts if protocol == "popularity" else np.ones(31), []
    for *history, target in histories.values():
        rivals = np.array([item for item in range(1, 31) if item not in (*history, target)])
        wins.append(weight[rivals[rivals > target]].sum() / weight[rivals].sum())
    first, second = report(capfd, *sampled, 1)
    error = math.sqrt(np.mean(np.array(wins) * (1 - np.array(wins))) / 400)
    assert first["HR@1"] == pytest.approx(np.mean(wins), abs=3.5 * error)
    assert first["NDCG@10"] == second["NDCG@10"]  # the same items for both
    assert report(capfd, *sampled, 1, "--seed", 1)[0]["HR@1"] != first["HR@1"]
    everything, full = report(capfd, *sampled, 25), report(capfd, data, *models)
    assert everything[1]["MRR@10"] == full[1]["MRR@10"]  # all unseen items drawn: the full ranking
    for count in (26, 70):
        assert f"fewer than {count} unseen items" in fails(capfd, *sampled, count)
    alike = write_model(Scorer(torch.zeros(31, 31), torch.zeros(401, 31)), 30, 5)
    assert report(capfd, data, alike, *sampled[3:], 10)[0]["MRR@10"] == pytest.approx(1 / 6)  # middle of 11


def test_bootstrap_interval_is_of_95_percent():
    values = np.random.default_rng(0).random(400)
    found = np.array(evaluate.bootstrap_interval(values, seed=0, resamples=40_000))
    np.testing.assert_allclose((found - values.mean()) / values.std() * 20, [-1.96, 1.96], atol=0.04)


def test_size_and_speed_in_json_and_in_the_table(write_data, write_model, capsys, monkeypatch, tmp_path):
    rng, n, paths = np.random.default_rng(0), {16: 10, 8: 5}, []
    data = write_data({u: rng.permutation(50)[: 3 + u % 20] + 1 for u in range(1, 41)} | {41: [50, 1, 2]})
    for d in n:
        paths.append(write_model(teacher.SASRec(50, n[d], d, 2, 2, 0.0), 50, n[d], f"{d}.pt2"))
    # a batch takes as many milliseconds as the model reads items, one of 256 users 32 times as many
    spent = lambda model, data, n, device, batch, repeats: n * {1: 1, 256: 32}[batch]  # noqa: E731
    monkeypatch.setattr(evaluate, "milliseconds", spent)
    results = report(capsys, data, *paths, "--split", "valid", "--ranks", tmp_path / "ranks.npy")
    ranks = np.load(tmp_path / "ranks.npy")
    assert ranks.shape == (41, 2)
    assert [r["MRR@20"] for r in results] == pytest.approx(((ranks <= 20) / ranks).mean(0))
    report(capsys, data, *paths, "--split", "valid", "--users", 9, "--ranks", tmp_path / "some.npy")
    some, rows = np.load(tmp_path / "some.npy"), iter(ranks.tolist())
    assert some.shape == (9, 2) and all(row in rows for row in some.tolist())  # of 9 users, in their order
    for result, (d, length) in zip(results, n.items(), strict=True):
        block = 4 * d * d + 4 * d + 2 * d * d + 2 * d + 4 * d  # attention, feed-forward, two norms
        small = 2 * block + 2 * d + length * d  # final norm, positions
        assert (result["parameters"], result["parameters_without_embeddings"]) == (small + 51 * d, small)
        macs = 2 * (length * 6 * d * d + 2 * length**2 * d)  # linear maps; Q K^T and its use
        assert (result["macs"], result["macs_item_scores"]) == (macs, 50 * d)
        assert (result["ms_per_user"], result["ms_per_1000_users"]) == (length, length * 125)
        assert result["speed_up"] == 10 / length
    evaluate.main([str(data), *map(str, paths), "--split", "valid"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert f"{data}: valid items of 41 users, ranked" in first and len({*map(len, lines)}) == 1
    names = [f"{name}@{k}" for name in ("HR", "NDCG", "MRR") for k in (5, 10, 20)]
    counts = ("parameters", "parameters_without_embeddings", "macs", "macs_item_scores")
    shown = dict.fromkeys(names, "{:.4f}") | {"NDCG@10_interval": "{0[0]:.4f}-{0[1]:.4f}"}
    shown |= {"p_value": "{:.2g}"} | dict.fromkeys(counts, "{:,}")
    shown |= {"ms_per_user": "{:.3f}", "ms_per_1000_users": "{:.1f}", "speed_up": "{:.2f}x"}
    rows = [[form.format(r[name]) for r in results] for name, form in shown.items()]
    assert [line[29:].split() for line in lines] == [["16", "8"], *rows]
    assert [line[:29].strip() for line in lines[1:10]] == names


def test_milliseconds_are_the_median_of_batches_after_the_first(monkeypatch):
    now, taken, asked = [0.0], iter([100.0, 3, 1, 8] * 2), []
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def model(users, windows):
        now[0] += next(taken)
        asked.append((users.tolist(), windows.tolist()))
        return None, torch.zeros(*windows.shape, 1), torch.ones(6, 1)

    data = np.arange(11, 19), np.arange(0, 41, 5), np.arange(1, 41)  # 8 users of 5 items
    assert [evaluate.milliseconds(model, data, 3, "cpu", 2, 3) for _ in range(2)] == [3000, 3000]
    assert asked[:4] == asked[4:] and sorted(sum((users for users, _ in asked[:4]), [])) == [*range(11, 19)]
    for users, windows in asked:
        assert windows == [[5 * (user - 10) - k for k in (2, 1, 0)] for user in users]


def test_recommend_prints_history_and_best_unseen_items_with_titles(write_data, write_model, capfd):
    data, lines = write_data({3: range(1, 13), 7: [9, 2, 5]}), lambda: capfd.readouterr().out.splitlines()
    data.with_name("data.txt.items.tsv").write_text("2\tTwo (1995)\n3\tThree\n", encoding="utf-8")
    model = in_order(12, 7)
    model.by_item.data[5, 3], model.by_item.data[9, 4], model.by_user.data[7, 8] = 100, 200, 50
    argv = [str(data), str(write_model(model, 12, 2)), "--recommend"]  # it reads two items, no longer 9
    evaluate.main([*argv, "7"])
    title, *history, name = (printed := lines())[:5]
    assert title == "user 7: the last of 3 items, oldest first" and name == f"{argv[1]} recommends"
    assert history == ["          9", "          2  Two (1995)", "          5"]
    assert [line.split()[0] for line in printed[5:]] == ["3", "8", "1", "4", "6", "7", "10", "11", "12"]
    evaluate.main([*argv, "7", "--keep-seen"])
    assert [line.split() for line in lines()[5:9]] == [["3", "Three"], ["8"], ["1"], ["2", "Two", "(1995)"]]
    evaluate.main([*argv, "3"])
    assert [line.split()[0] for line in lines()[1:-1]] == [*map(str, range(3, 13))]  # has seen every item
    assert "has no user 8" in fails(capfd, *argv, 8)


@pytest.fixture
def data(write_data):
    """Data of 3 users and 9 items."""
    return write_data({1: [3, 4, 1], 2: [5, 1, 3], 9: [1, 2, 9]})


def test_what_is_no_model_is_told_in_one_line(data, tmp_path, write_model, capfd):
    bad, good = tmp_path / "bad.pt2", write_model(in_order(9, 9), 9, 4)
    program, archive, other = files = [io.BytesIO() for _ in range(3)]
    torch.export.save(torch.export.load(good), program)  # without config.json
    torch.save({"a": 1}, other)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("notes/readme.txt", "no model")
    half = good.read_bytes()[: good.stat().st_size // 2]
    for content in (half, b"", b"no model", data.read_bytes(), *(file.getvalue() for file in files)):
        bad.write_bytes(content)
        assert f"{bad} is no model file" in fails(capfd, data, good, bad)
    assert "none.pt2: No such file" in fails(capfd, data, good, tmp_path / "none.pt2")
    # of the last content, torch itself would log a traceback
    done = subprocess.run([sys.executable, evaluate.__file__, data, bad], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1


def test_model_that_does_not_fit_is_told(data, write_model, capfd):
    modules = [in_order(9, 8), in_order(8, 9)]  # too few users, or items
    for place, bend in enumerate((lambda h: h[0], lambda o: o[..., 1:], lambda v: v[1:])):
        modules.append(in_order(9, 9))
        bent = lambda module, args, out, n=place, bend=bend: (*out[:n], bend(out[n]), *out[n + 1 :])  # noqa: E731
        modules[-1].register_forward_hook(bent)
    for module in modules:
        assert "is no model file for these data" in fails(capfd, data, write_model(module, 9, 4))
    for config in ({"items": 8}, {"items": None}, {"max_length": 0}, {"max_length": None}):
        model = write_model(in_order(9, 9), 9, 4, **config)
        assert "is no model file for these data" in fails(capfd, data, model)


def test_a_model_of_other_data_is_noted(data, write_model, capsys):
    own = hashlib.sha256(data.read_bytes()).hexdigest()
    for noted, config in [(False, {}), (False, {"data_sha256": own}), (True, {"data_sha256": "0" * 64})]:
        model = write_model(in_order(9, 9), 9, 4, **config)
        evaluate.main([str(data), str(model)])
        assert capsys.readouterr().err == f"note: {model} was trained on other data than {data}\n" * noted
    with pytest.raises(SystemExit, match="may know their test items"):
        evaluate.load_model(model, 9, 9, data)


def test_bad_data_and_options_are_told(data, write_data, tmp_path, write_model, capfd):
    model = write_model(in_order(9, 9), 9, 4)
    (tmp_path / "bad.txt").write_text("1 2\n1 x\n")
    assert "bad.txt, line 2" in fails(capfd, tmp_path / "bad.txt", model)
    assert "none.txt: No such file" in fails(capfd, tmp_path / "none.txt", model)
    assert "no user has 3 interactions" in fails(capfd, write_data({1: [9], 2: [1, 2]}), model)
    for option in ("--at=0", "--negatives=0"):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main([str(data), str(model), option])
