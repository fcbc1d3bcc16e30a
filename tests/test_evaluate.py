"""evaluate.py against ranks by hand, a slow second implementation, and models whose answer is known."""

import hashlib
import io
import itertools
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
import sasrec_teacher


class Scorer(nn.Module):
    """A score is the sum of the tables' rows for the items of the history, and for the user: [_, V+1]."""

    def __init__(self, by_item, by_user):
        super().__init__()
        self.by_item, self.by_user = nn.Parameter(by_item.float()), nn.Parameter(by_user.float())
        self.item_vectors = nn.Parameter(torch.eye(by_item.shape[1]))

    def forward(self, users, items):
        output = self.by_item[items].cumsum(1) + self.by_user[users][:, None]
        return output[None], output, self.item_vectors


def in_order(num_items, num_users):
    """A model that scores item 1 above item 2 above item 3, and padding above all, after any history."""
    by_user = -torch.arange(num_items + 1).expand(num_users + 1, -1)
    return Scorer(torch.zeros(num_items + 1, num_items + 1), by_user)


def report(capsys, *argv):
    """What `main` prints with --json."""
    evaluate.main([*map(str, argv), "--json"])
    return json.loads(capsys.readouterr().out)


def fails(capfd, message, *argv):
    """Check that `main` ends with one line, which contains `message`, and prints nothing else."""
    with pytest.raises(SystemExit) as end:
        evaluate.main([*map(str, argv)])
    assert message in end.value.code and "\n" not in end.value.code and capfd.readouterr() == ("", "")


def test_rank_by_hand():
    # padding, with score 9, has no rank; neither has a seen item, unless it is the target
    cases = [((9, 5, 4, 3, 2), *case) for case in ((1, [], 1), (4, [], 4), (4, [1, 2], 2), (3, [3, 1], 2))]
    cases += [((9, 5, 5, 3, 2), *case) for case in ((2, [], 1.5), (2, [1], 1))]
    cases += [((0, 1, 1, 1, 1), *case) for case in ((3, [], 2.5), (3, [4, 4, 0], 2))]
    for scores, target, seen, rank in cases:
        arguments = torch.tensor([scores]).float(), np.array([target]), [np.array(seen, int)]
        assert evaluate.rank_of_target(*arguments, np.arange(1, 5)).item() == rank
    rank = evaluate.rank_of_target(torch.tensor([[9.0, 1, 5, 4]]), np.array([1]), [[]], np.array([1, 3]))
    assert rank.item() == 2  # item 2 never occurs
    for target, value in ((2, math.nan), (2, math.inf), (2, -math.inf), (1, math.nan)):
        with pytest.raises(SystemExit, match="not finite"):
            scores = torch.tensor([[0.0, 1, 2], [0, 1, value]])
            evaluate.rank_of_target(scores, np.array([target, target]), [[], []], np.array([1, 2]))


def test_metrics_by_hand():
    ranks = np.array([1, 2, 3.5, 10, 10.5, 11])
    hr, ndcg, mrr = (evaluate.METRICS[name](ranks, 10) for name in ("HR", "NDCG", "MRR"))
    assert hr.tolist() == [1, 1, 1, 1, 0, 0]
    np.testing.assert_allclose(ndcg, [1, 0.6309297536, 0.4608453970, 0.2890648263, 0, 0], atol=1e-9)
    np.testing.assert_allclose(mrr, [1, 0.5, 1 / 3.5, 0.1, 0, 0])


def slow_rank(scores, target, seen):
    """The mean place of the target over all orders of equal scores, by sorting."""
    rivals = sorted({*range(1, len(scores))} - {*seen} | {target}, key=lambda i: -scores[i])
    return np.mean([place for place, i in enumerate(rivals, 1) if scores[i] == scores[target]])


def slow_metrics(rank, k):
    """HR@k, NDCG@k and MRR@k of one user."""
    hit = float(rank <= k)
    return {"HR": hit, "NDCG": hit * math.log(2) / math.log(rank + 1), "MRR": hit / rank}


def slow_p_value(values, reference):
    """The two-sided p-value of a paired t-test, from its statistic; 1 if there is no difference."""
    difference = values - reference
    t = difference.mean() / max(difference.std(ddof=1), 1e-300) * math.sqrt(len(difference))
    return pytest.approx(2 * stats.t.sf(abs(t), len(difference) - 1))


def test_ranks_and_metrics_equal_a_slow_implementation_in_1000_cases():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        num_items, k = rng.integers(2, 40), int(rng.integers(1, 12))
        scores = rng.integers(0, rng.integers(1, 50), num_items + 1).astype(np.float32)  # with many ties
        seen = rng.integers(1, num_items + 1, rng.integers(0, 20))
        target = int(rng.integers(1, num_items + 1))
        arguments = torch.tensor(scores)[None], np.array([target]), [seen], np.arange(1, num_items + 1)
        rank, expected = evaluate.rank_of_target(*arguments).numpy(), slow_rank(scores, target, seen)
        assert rank == expected
        for name, value in slow_metrics(expected, k).items():
            assert evaluate.METRICS[name](rank, k) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("split, options", [("test", []), ("test", ["--keep-seen"]), ("valid", [])])
def test_all_figures_of_accuracy_equal_a_slow_implementation(write_data, write_model, capsys, split, options):
    rng, reference = np.random.default_rng(0), {}  # values of the first model
    lengths = {int(user): 1 + n % 12 for n, user in enumerate(rng.permutation(150)[:90] + 1)}
    histories = {u: rng.integers(1, 26, n).tolist() for u, n in lengths.items()} | {200: [25, 1, 2, 3]}
    data, table = write_data(histories), lambda rows: torch.from_numpy(rng.integers(0, 4, (rows, 26)))
    scorers = {n: Scorer(table(26), table(201)) for n in (3, 7, 5)}  # integers, so there are many ties
    paths = [write_model(scorer, 25, n, f"{n}.pt2", stage=f"of {n}") for n, scorer in scorers.items()]
    results = report(capsys, data, *paths, "--at", 1, 4, 10, "--split", split, *options)
    for result, (n, scorer), path in zip(results, scorers.items(), paths, strict=True):
        ranks = []
        for user, items in histories.items():
            if len(items) >= 3:
                *history, target = items if split == "test" else items[:-1]
                scores = scorer.by_item[history[-n:]].sum(0) + scorer.by_user[user]
                ranks.append(slow_rank(scores.tolist(), target, [] if options else history))
        header = {"model": str(path), "stage": f"of {n}", "users": len(ranks), "split": split}
        assert header.items() <= result.items()
        for name, k in itertools.product(("HR", "MRR", "NDCG"), (1, 4, 10)):
            values = np.array([slow_metrics(rank, k)[name] for rank in ranks])
            assert result[f"{name}@{k}"] == pytest.approx(values.mean())
            p_value = slow_p_value(values, reference.setdefault((name, k), values))
            assert result[f"{name}@{k}_p_value"] == p_value
        assert result["p_value"] == p_value  # the last values are NDCG@10
        interval = values.mean() + np.array([-1.96, 1.96]) * values.std() / math.sqrt(len(ranks))
        assert result["NDCG@10_interval"] == pytest.approx(interval, abs=0.02)


def test_candidates_are_unseen_different_and_follow_their_weights():
    weight, seen, target = torch.tensor([0.0, *[1] * 10]), [np.array([1])] * 4000, [2] * 4000
    drawn = evaluate.draw_candidates(weight, seen, target, 3, torch.Generator().manual_seed(0))
    assert (drawn >= 3).all() and all(len({*row}) == 3 for row in drawn.tolist())
    for column in drawn.T:
        assert stats.chisquare(np.bincount(column, minlength=11)[3:]).pvalue > 1e-3
    weight, target = torch.tensor([0.0, 1, 2, 3, 0, 4, 5]), [3] * 20000
    drawn = evaluate.draw_candidates(weight, [[]] * 20000, target, 1, torch.Generator().manual_seed(0))[:, 0]
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
    # against one drawn item, the target wins as often as an item behind it is drawn
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
        fails(capfd, f"fewer than {count} unseen items", *sampled, count)
    constant = write_model(Scorer(torch.zeros(31, 31), torch.zeros(401, 31)), 30, 5)
    tied = report(capfd, data, constant, *sampled[3:], 10)[0]
    assert tied["MRR@10"] == pytest.approx(1 / 6)  # in the middle of 11


def test_bootstrap_interval_is_of_95_percent():
    values = np.random.default_rng(0).random(400)
    interval = np.array(evaluate.bootstrap_interval(values, seed=0, resamples=40_000))
    np.testing.assert_allclose((interval - values.mean()) / values.std() * 20, [-1.96, 1.96], atol=0.04)


def test_table_shows_size_speed_and_a_new_metric(write_data, write_model, capsys, monkeypatch, tmp_path):
    rng, lengths, paths = np.random.default_rng(0), {16: 10, 8: 5, 4: 2}, []
    data = write_data({u: rng.permutation(50)[: 3 + u % 20] + 1 for u in range(1, 41)} | {41: [50, 1, 2]})
    for d, length in lengths.items():
        model = sasrec_teacher.SASRec(50, length, d, num_blocks=2, num_heads=2, dropout=0.0)
        paths.append(write_model(model, 50, length, f"{d}.pt2"))
    # a batch takes as many milliseconds as the model reads items, one of 256 users 32 times as many
    milliseconds = lambda model, data, n, device, batch_size, repeats: n * {1: 1, 256: 32}[batch_size]  # noqa: E731
    monkeypatch.setattr(evaluate, "milliseconds", milliseconds)
    monkeypatch.setitem(evaluate.METRICS, "MR", lambda rank, k: np.minimum(rank, k))  # an entry adds a metric
    options = [data, *paths, "--split", "valid", "--ranks"]
    results, ranks = report(capsys, *options, tmp_path / "all.npy"), np.load(tmp_path / "all.npy")
    assert ranks.shape == (41, 3)
    report(capsys, *options, tmp_path / "some.npy", "--users", 9)
    some, rows = np.load(tmp_path / "some.npy"), iter(ranks.tolist())
    assert some.shape == (9, 3) and all(row in rows for row in some.tolist())  # of 9 users, in their order
    for result, rank, (d, length) in zip(results, ranks.T, lengths.items(), strict=True):
        assert result["MRR@20"] == pytest.approx(((rank <= 20) / rank).mean())
        for k in (5, 10, 20):
            values, of_first = np.minimum(rank, k), np.minimum(ranks[:, 0], k)
            assert result[f"MR@{k}"] == pytest.approx(values.mean())
            assert result[f"MR@{k}_p_value"] == slow_p_value(values, of_first)
        block = 4 * d * d + 4 * d + 2 * d * d + 2 * d + 4 * d  # attention, feed-forward, two norms
        small = 2 * block + 2 * d + length * d  # final norm, positions
        assert (result["parameters"], result["parameters_without_embeddings"]) == (small + 51 * d, small)
        macs = 2 * (length * 6 * d * d + 2 * length**2 * d)  # linear maps; Q K^T and its use
        assert (result["macs"], result["macs_item_scores"]) == (macs, 50 * d)
        assert (result["ms_per_user"], result["ms_per_1000_users"]) == (length, length * 125)
        for name in ("ms_per_user", "ms_per_1000_users"):
            assert result[f"{name}_speed_up"] == 10 / length  # against the first model
    evaluate.main([str(data), *map(str, paths), "--split", "valid"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert f"{data}: valid items of 41 users, ranked" in first and len({*map(len, lines)}) == 1
    names = [f"{name}@{k}" for name in ("HR", "NDCG", "MRR", "MR") for k in (5, 10, 20)]
    sizes = ("parameters", "parameters_without_embeddings", "window", "macs", "macs_item_scores")
    forms = dict.fromkeys(names, "{:.4f}") | {"NDCG@10_interval": "{0[0]:.4f}-{0[1]:.4f}"}
    forms |= {"p_value": "{:.2g}"} | dict.fromkeys(sizes, "{:,}")
    for name, form in {"ms_per_user": "{:.3f}", "ms_per_1000_users": "{:.1f}"}.items():
        forms |= {name: form, f"{name}_speed_up": "{:.2f}x"}
    rows = [[form.format(result[name]) for result in results] for name, form in forms.items()]
    assert [line[29:].split() for line in lines] == [["16", "8", "4"], *rows]
    assert [line[:29].strip() for line in lines[1:13]] == names


def test_milliseconds_are_the_median_of_batches_after_the_first(monkeypatch):
    now, durations, batches = [0.0], iter([100.0, 3, 1, 8] * 2), []
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def model(users, items):
        now[0] += next(durations)
        batches.append((users.tolist(), items.tolist()))
        return torch.zeros(len(users), 6)

    data = SimpleNamespace(user_ids=np.arange(11, 19), starts=np.arange(0, 41, 5), items=np.arange(1, 41))
    assert [evaluate.milliseconds(model, data, 3, "cpu", 2, 3) for _ in range(2)] == [3000, 3000]
    users = sum((users for users, _ in batches[:4]), [])
    assert batches[:4] == batches[4:] and sorted(users) == list(data.user_ids)
    for users, items in batches:
        assert items == [[5 * (user - 10) - k for k in (2, 1, 0)] for user in users]


def test_recommend_prints_history_and_best_unseen_items_with_titles(write_data, write_model, capfd):
    data, lines = write_data({3: range(1, 13), 7: [9, 2, 5]}), lambda: capfd.readouterr().out.splitlines()
    data.with_name("data.txt.items.tsv").write_text("2\tTwo (1995)\n3\tThree\n", encoding="utf-8")
    model = in_order(12, 7)
    model.by_item.data[5, 3], model.by_item.data[9, 4], model.by_user.data[7, 8] = 100, 200, 50
    argv = [str(data), str(write_model(model, 12, 2)), "--recommend"]  # it reads two items, no longer item 9
    evaluate.main([*argv, "7"])
    title, *history, name = (printed := lines())[:5]
    assert title == "user 7: the last of 3 items, oldest first" and name == f"{argv[1]} recommends"
    assert history == ["          9", "          2  Two (1995)", "          5"]
    assert [line.split()[0] for line in printed[5:]] == ["3", "8", "1", "4", "6", "7", "10", "11", "12"]
    evaluate.main([*argv, "7", "--keep-seen"])
    assert [line.split() for line in lines()[5:9]] == [["3", "Three"], ["8"], ["1"], ["2", "Two", "(1995)"]]
    evaluate.main([*argv, "3"])
    seen = [line.split()[0] for line in lines()[1:-1]]
    assert seen == [str(item) for item in range(3, 13)]  # nothing is left to recommend
    fails(capfd, "has no user 8", *argv, 8)


@pytest.fixture
def data(write_data):
    """Data of 3 users and 9 items."""
    return write_data({1: [6, 3, 4, 1], 2: [7, 5, 1, 3], 9: [8, 1, 2, 9]})


def test_bad_data_and_model_files_end_with_one_line(data, write_data, write_model, tmp_path, capfd):
    bad, good = tmp_path / "bad.pt2", write_model(in_order(9, 9), 9, 4, "good.pt2")
    (tmp_path / "bad.txt").write_text("1 2\n1 x\n")
    fails(capfd, "bad.txt, line 2", tmp_path / "bad.txt", good)
    fails(capfd, "none.txt: No such file", tmp_path / "none.txt", good)
    fails(capfd, "no user has 3 interactions", write_data({u: [u] for u in range(1, 10)}, "short.txt"), good)
    for option in ("--at=0", "--negatives=0"):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main([str(data), str(good), option])
    capfd.readouterr()
    fails(capfd, "none.pt2: No such file", data, good, tmp_path / "none.pt2")
    program, archive, pickle = files = [io.BytesIO() for _ in range(3)]
    torch.export.save(torch.export.load(good), program)  # without config.json
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("notes/readme.txt", "no model")
    torch.save({"a": 1}, pickle)
    whole = good.read_bytes()
    half, other = whole[: len(whole) // 2], whole.replace(b"\0\0\x80?", b"\0\0\0@")  # weights of 1 become 2
    contents = half, other, b"", b"no model", data.read_bytes(), *(file.getvalue() for file in files)
    for content in contents:
        bad.write_bytes(content)
        fails(capfd, f"{bad} is no model file", data, good, bad)
    # for the last content, torch itself would log a traceback
    script = subprocess.run([sys.executable, evaluate.__file__, data, bad], capture_output=True, text=True)
    assert script.returncode == 1 and script.stdout == "" and script.stderr.count("\n") == 1


def test_a_model_that_does_not_fit_ends_with_one_line(data, write_model, capfd):
    models = [(in_order(9, 8), {}), (in_order(8, 9), {"items": 8})]  # too few users, or items
    for place, change in enumerate((lambda h: h[0], lambda o: o[..., 1:], lambda v: v[1:])):
        models.append((in_order(9, 9), {}))
        hook = lambda model, _, out, n=place, change=change: (*out[:n], change(out[n]), *out[n + 1 :])  # noqa: E731
        models[-1][0].register_forward_hook(hook)
    configs = {"items": 8}, {"items": None}, {"max_length": 0}, {"max_length": None}
    for model, config in models + [(in_order(9, 9), config) for config in configs]:
        fails(capfd, "is no model file for these data", data, write_model(model, 9, 4, **config))


def test_a_model_of_other_data_is_noted(data, write_model, capsys):
    own = hashlib.sha256(np.loadtxt(data, "<i8").tobytes()).hexdigest()
    for noted, config in [(False, {}), (False, {"data_sha256": own}), (True, {"data_sha256": "0" * 64})]:
        model = write_model(in_order(9, 9), 9, 4, **config)
        evaluate.main([str(data), str(model)])
        assert capsys.readouterr().err == f"note: {model} was trained on other data than {data}\n" * noted
    with pytest.raises(SystemExit, match="may know their test items"):
        evaluate.load_model(model, evaluate.read_interactions(data), "cpu")


def test_targets_that_are_no_news_are_counted(write_data, write_model, capsys):
    data = write_data({1: [1, 2, 3, 1], 2: [1, 2, 3, 4], 3: [5, 6, 5, 7]})
    model = write_model(in_order(7, 3), 7, 5)
    evaluate.main([str(data), str(model)])
    assert "note: 1 of 3 targets occur in their histories" in capsys.readouterr().err
    evaluate.main([str(data), str(model), "--split", "valid"])
    assert "note: 1 of 3 targets" in capsys.readouterr().err
