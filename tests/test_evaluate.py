"""evaluate.py against hand-computed ranks, a slow second implementation, and models whose answer is known."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import evaluate
import sasrec_teacher as teacher


class Counting(nn.Module):
    """Scores item `last + step` 1 and all others 0: right where histories count in steps of `step`."""

    def __init__(self, item_count, step=1):
        super().__init__()
        self.item_vectors = nn.Parameter(torch.eye(item_count + 1))
        self.step = step

    def forward(self, users, items):
        output = self.item_vectors[(items + self.step).clamp(max=len(self.item_vectors) - 1)]
        return output[None], output, self.item_vectors


class Constant(nn.Module):
    """Scores all items alike."""

    def __init__(self, item_count):
        super().__init__()
        self.item_vectors = nn.Parameter(torch.ones(item_count + 1, 1))

    def forward(self, users, items):
        output = torch.ones_like(items)[..., None].float()
        return output[None], output, self.item_vectors


class Popularity(nn.Module):
    """Scores items by a fixed number each, and user u's favourite u far above: it looks at `users` alone."""

    def __init__(self, item_count, users=9):
        super().__init__()
        self.favourite = nn.Parameter(torch.eye(users + 1, item_count + 1))
        vectors = torch.cat([torch.eye(item_count + 1), -torch.arange(item_count + 1.0)[:, None]], 1)
        self.item_vectors = nn.Parameter(vectors)  # a bias is one more column

    def forward(self, users, items):
        favourite = 1000 * self.favourite[users]  # [B, V+1]
        output = torch.cat([favourite, torch.ones_like(favourite[:, :1])], 1)
        output = output[:, None].expand(-1, items.shape[1], -1) + 0 * items[..., None]
        return output[None], output, self.item_vectors


def report(argv, capsys):
    """What `main` prints with --json."""
    assert evaluate.main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def fails(argv, capsys):
    """Run `main` on `argv`; check that it ended with one line and status 2, and return the line."""
    assert evaluate.main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("evaluate.py: ")
    return captured.err


# ---- Ranks and metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores, target, seen, rank",
    [
        ([9, 5, 4, 3, 2], 1, [], 1),  # padding's 9 takes no part
        ([0, 5, 4, 3, 2], 4, [], 4),
        ([0, 5, 4, 3, 2], 4, [1, 2], 2),
        ([0, 5, 5, 3, 2], 2, [], 1.5),
        ([0, 5, 5, 3, 2], 2, [1], 1),  # what was seen does not tie either
        ([0, 1, 1, 1, 1], 3, [], 2.5),  # (1 + 2 + 3 + 4) / 4
        ([0, 1, 1, 1, 1], 3, [4, 4, 0], 2),
        ([0, 5, 4, 3, 2], 3, [3, 1], 2),  # a target that was seen before takes part all the same
    ],
)
def test_rank_by_hand(scores, target, seen, rank):
    scores, seen = torch.tensor([scores], dtype=torch.float32), torch.tensor([[*seen, 0]])
    assert evaluate.rank_of_target(scores, torch.tensor([target]), seen).item() == rank


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_has_no_rank(value):
    scores = torch.tensor([[0.0, 1, 2], [0, 1, value]])
    with pytest.raises(evaluate.BadInput, match="not finite"):
        evaluate.rank_of_target(scores, torch.tensor([2, 2]), torch.tensor([[0], [0]]))


def test_metrics_by_hand():
    hr, ndcg, mrr = evaluate.metrics(np.array([1, 2, 3.5, 10, 10.5, 11]), 10)
    assert hr.tolist() == [1, 1, 1, 1, 0, 0]
    np.testing.assert_allclose(ndcg, [1, 0.6309297536, 0.4608453970, 0.2890648263, 0, 0], atol=1e-9)
    np.testing.assert_allclose(mrr, [1, 0.5, 1 / 3.5, 0.1, 0, 0])


def slow_rank(scores, target, seen):
    """The mean place of the target over all ways to order ties, by sorting."""
    candidates = sorted(
        {i for i in range(1, len(scores)) if i not in seen} | {target}, key=lambda i: -scores[i]
    )
    places = [place for place, i in enumerate(candidates, 1) if scores[i] == scores[target]]
    return sum(places) / len(places)


def test_ranks_and_metrics_equal_a_slow_implementation_in_1000_cases():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        item_count, k = rng.integers(2, 40), int(rng.integers(1, 12))
        scores = rng.integers(0, rng.integers(1, 50), item_count + 1).astype(np.float32)  # with many ties
        seen = rng.integers(0, item_count + 1, rng.integers(1, 20))
        target = int(rng.integers(1, item_count + 1))
        expected = slow_rank(scores.tolist(), target, set(seen.tolist()))
        rank = evaluate.rank_of_target(
            torch.tensor(scores)[None], torch.tensor([target]), torch.tensor(seen)[None]
        )
        assert rank.item() == expected
        hr, ndcg, mrr = (values.item() for values in evaluate.metrics(rank.numpy(), k))
        inside = 1 if expected <= k else 0
        assert hr == inside and mrr == inside / expected
        assert ndcg == pytest.approx(inside * math.log(2) / math.log(expected + 1))


def test_a_constant_scorer_gets_what_chance_gets(write_data, write_model, capsys):
    rng = np.random.default_rng(0)
    data = write_data({u: rng.permutation(30)[: 3 + u % 10] + 1 for u in range(1, 60)} | {60: [30, 1, 2]})
    model = write_model(Constant(30), 30, 20)
    evaluate_rank = [1 + (30 - (2 + u % 10) - 1) / 2 for u in range(1, 60)] + [1 + 27 / 2]
    (full,) = report([data, model, "--at", 10, 14], capsys)
    for k in (10, 14):
        assert full[f"HR@{k}"] == pytest.approx(np.mean([r <= k for r in evaluate_rank]))
        assert full[f"MRR@{k}"] == pytest.approx(np.mean([(r <= k) / r for r in evaluate_rank]))
    (sampled,) = report([data, model, "--protocol", "uniform", "--negatives", 10], capsys)
    assert sampled["MRR@10"] == pytest.approx(1 / 6) and sampled["HR@5"] == 0  # the middle of 11


# ---- The protocol, through the command ---------------------------------------------------------------------


def test_history_is_all_before_the_target(write_data, write_model, capsys):
    # from each item to the validation item it is one step, from that to the test item two
    data = write_data({u: [u, u + 1, u + 2, u + 4] for u in range(1, 8)} | {8: [11], 9: [9, 10]})
    for step, right, wrong in [(1, "valid", "test"), (2, "test", "valid")]:
        model = write_model(Counting(11, step), 11, 5)
        (result,) = report([data, model, "--split", right], capsys)
        assert result["HR@5"] == result["NDCG@10"] == result["MRR@20"] == 1 and result["users"] == 7
        assert report([data, model, "--split", wrong], capsys)[0]["MRR@20"] < 0.6
    assert report([data, model], capsys)[0]["split"] == "test"


def test_a_history_longer_than_the_model_takes_is_cut_but_still_left_out(write_data, write_model, capsys):
    data = write_data({1: [1, 2, 3, 4, 5, 6, 7, 8, 9]})
    model = write_model(Constant(9), 9, 3)
    (result,) = report([data, model], capsys)
    assert result["MRR@5"] == 1  # the other eight items are in the history
    (result,) = report([data, model, "--keep-seen"], capsys)
    assert result["MRR@5"] == pytest.approx(1 / 5)


def test_a_model_of_users_with_a_bias_column(write_data, write_model, capsys):
    data = write_data({1: [3, 4, 1], 2: [5, 1, 3], 9: [1, 2, 9]})
    (result,) = report([data, write_model(Popularity(9), 9, 4)], capsys)
    # user 1: its favourite; user 2: 2 is first, then 3; user 9: its favourite
    assert result["MRR@5"] == pytest.approx((1 + 1 / 2 + 1) / 3)


def test_candidates_are_unseen_different_and_uniform():
    generator = torch.Generator().manual_seed(0)
    taken = torch.tensor([[1, 2, 0]]).expand(4000, -1)
    drawn = evaluate.draw_candidates(torch.ones(11), taken, 3, generator)
    assert (drawn >= 3).all() and all(len(set(row)) == 3 for row in drawn.tolist())
    for place in range(3):
        assert stats.chisquare(np.bincount(drawn[:, place], minlength=11)[3:]).pvalue > 1e-3


def test_candidates_by_popularity_follow_their_weights():
    generator = torch.Generator().manual_seed(0)
    weight = torch.tensor([7.0, 1, 2, 3, 0, 4, 5])
    drawn = evaluate.draw_candidates(weight, torch.tensor([[3]]).expand(20000, -1), 1, generator)[:, 0]
    counts = np.bincount(drawn, minlength=7)
    assert counts[[0, 3, 4]].sum() == 0
    assert stats.chisquare(counts[[1, 2, 5, 6]], np.array([1, 2, 4, 5]) / 12 * 20000).pvalue > 1e-3


@pytest.mark.parametrize("protocol", ["uniform", "popularity"])
def test_sampled_protocols_rank_among_the_drawn_items(write_data, write_model, capsys, protocol):
    rng = np.random.default_rng(0)
    data = write_data({u: rng.permutation(60)[:6] + 1 for u in range(1, 200)} | {200: [60, 1, 2, 3, 4, 5]})
    by_number = Popularity(60, users=200)
    with torch.no_grad():
        by_number.favourite.zero_()  # no favourites: item 1 before 2 before 3 ...
    model = write_model(by_number, 60, 5)
    argv = [data, model, model, "--protocol", protocol, "--negatives", 20]
    first, second = report(argv, capsys)
    assert first["NDCG@10"] == second["NDCG@10"]  # the same items for both
    assert report([*argv, "--seed", 1], capsys)[0]["NDCG@10"] != first["NDCG@10"]
    assert abs(first["HR@10"] - 10 / 21) < 0.11  # about chance: 3 standard errors
    (everything,) = report([data, model, "--protocol", protocol, "--negatives", 54], capsys)
    (full,) = report([data, model], capsys)
    assert everything["MRR@10"] == full["MRR@10"]  # all unseen items drawn: the full ranking


# ---- Statistics --------------------------------------------------------------------------------------------


def test_bootstrap_interval_is_about_two_standard_errors():
    values = np.random.default_rng(0).random(4000)
    low, high = evaluate.bootstrap_interval(values, seed=0)
    error = values.std() / math.sqrt(4000)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_paired_p_value_agrees_with_a_permutation_test():
    rng = np.random.default_rng(0)
    a = rng.random(300)
    b = a + rng.normal(0.02, 0.2, 300)
    difference = a - b
    flipped = np.abs((difference * rng.choice([-1, 1], (20000, 300))).mean(1))
    expected = (flipped >= abs(difference.mean())).mean()
    assert 0.01 < expected < 0.9
    assert evaluate.paired_p_value(a, b) == pytest.approx(expected, abs=0.02)
    assert evaluate.paired_p_value(a, a) == 1


# ---- Size and speed ----------------------------------------------------------------------------------------


@pytest.fixture
def two_models(write_data, tmp_path):
    """Data of 40 users and 50 items, and two SASRec of different size."""
    rng = np.random.default_rng(0)
    data = write_data({u: rng.permutation(50)[: 3 + u % 20] + 1 for u in range(1, 41)} | {41: [50, 1, 2]})
    paths = []
    for name, dim in [("large", 16), ("small", 8)]:
        model = teacher.SASRec(50, 10, dim, 2, 2, 0.0)
        paths.append(tmp_path / f"{name}.pt2")
        paths[-1].write_bytes(teacher.export_model(model, 10, {"items": 50, "max_length": 10, "stage": name}))
    return data, paths


def test_parameters_and_multiply_adds_are_counted(two_models, capsys):
    data, paths = two_models
    large, small = report([data, *paths], capsys)
    for result, d in [(large, 16), (small, 8)]:
        block = 4 * d * d + 4 * d + 2 * d * d + 2 * d + 4 * d  # attention, feed-forward, two norms
        assert result["parameters_without_embeddings"] == 2 * block + 2 * d + 10 * d  # final norm, positions
        assert result["parameters"] == result["parameters_without_embeddings"] + 51 * d
        assert result["macs"] == 2 * (10 * 6 * d * d + 2 * 10 * 10 * d)  # linear maps; Q K^T and its use
        assert result["macs_item_scores"] == 50 * d


def test_json_has_every_figure(two_models, capsys):
    data, paths = two_models
    large, small = report([data, *paths, "--at", 1, 10], capsys)
    accuracy = {f"{m}@{k}" for m in ("HR", "NDCG", "MRR") for k in (1, 10)}
    others = {
        "model",
        "stage",
        "users",
        "split",
        "NDCG@10_interval",
        "p_value",
        "parameters",
        "macs",
        "speed_up",
    }
    others |= {"parameters_without_embeddings", "macs_item_scores", "ms_per_user", "ms_per_1000_users"}
    assert large.keys() == small.keys() == accuracy | others
    assert large["model"] == str(paths[0]) and large["users"] == 41 and large["stage"] == "large"
    assert large["speed_up"] == 1 and large["p_value"] == 1
    assert small["speed_up"] == pytest.approx(large["ms_per_user"] / small["ms_per_user"])
    for result in (large, small):
        assert result["NDCG@10_interval"][0] <= result["NDCG@10"] <= result["NDCG@10_interval"][1]
        assert result["ms_per_user"] > 0 and result["ms_per_1000_users"] > 0


def test_table_has_a_column_a_model(two_models, capsys):
    data, paths = two_models
    (expected, _) = report([data, *paths], capsys)
    assert evaluate.main([str(data), *map(str, paths)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "41 users" in lines[0] and lines[1].split() == ["large", "small"]
    rows = {line[:29].strip(): line[29:].split() for line in lines[2:]}
    assert rows["NDCG@10"][0] == f"{expected['NDCG@10']:.4f}" and len(rows["NDCG@10"]) == 2
    assert rows["parameters"][0] == f"{expected['parameters']:,}"
    assert rows["p-value against first"][0] == "-" and rows["speed-up, one by one"][0] == "1.00x"


def test_milliseconds_grow_with_the_work(write_data, write_model):
    class Busy(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.work = nn.Parameter(torch.ones(size, size))
            self.item_vectors = nn.Parameter(torch.ones(6, 1))

        def forward(self, users, items):
            output = torch.ones_like(items)[..., None] * (self.work @ self.work).mean()
            return output[None], output, self.item_vectors

    data = evaluate.read_interactions(write_data({1: [1, 2, 3], 2: [3, 4, 5]}))
    light, heavy = (
        evaluate.load_model(write_model(Busy(size), 5, 4, f"{size}.pt2"), 2, 5, "cpu")[0] for size in (2, 800)
    )
    times = [evaluate.milliseconds(program, data, 4, "cpu", 1, 9) for program in (light, heavy)]
    assert times[1] > 2 * times[0]


# ---- Recommendations ---------------------------------------------------------------------------------------


def test_recommend_prints_history_and_unseen_items_with_titles(write_data, write_model, capsys):
    data = write_data({3: range(1, 13), 7: [5, 2]})
    data.with_name("data.txt.items.tsv").write_text("2\tTwo (1995)\n3\tThree\n", encoding="utf-8")
    model = write_model(Counting(12), 12, 4)
    assert evaluate.main([str(data), str(model), "--recommend", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "user 7: the last of 2 items, oldest first"
    assert [line.split() for line in lines[1:3]] == [["5"], ["2", "Two", "(1995)"]]
    assert lines[3] == f"{model} recommends" and lines[4].split() == ["3", "Three"]
    recommended = [int(line.split()[0]) for line in lines[4:]]
    assert len(recommended) == 10 and not {0, 2, 5} & set(recommended)
    assert evaluate.main([str(data), str(model), "--recommend", "7", "--keep-seen"]) == 0
    assert evaluate.main([str(data), str(model), "--recommend", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{model} recommends"  # user 3 has seen every item


# ---- Bad input ---------------------------------------------------------------------------------------------


@pytest.fixture
def data(write_data):
    """Data of 3 users and 9 items."""
    return write_data({1: [3, 4, 1], 2: [5, 1, 3], 9: [1, 2, 9]})


def test_unknown_user_is_told(data, write_model, capsys):
    error = fails([data, write_model(Counting(9), 9, 4), "--recommend", 8], capsys)
    assert "has no user 8; its ids go from 1 to 9" in error


def test_model_of_other_data_is_told(data, write_model, write_data, capsys):
    error = fails([data, write_model(Popularity(9, users=8), 9, 4)], capsys)
    assert "does not take user 9" in error
    error = fails([data, write_model(Counting(8), 8, 4)], capsys)
    assert "was made for 8 items, the data have 9" in error
    assert evaluate.main([str(data), str(write_model(Counting(9), 9, 4, data_sha256="0" * 64))]) == 0
    assert "was trained on other data" in capsys.readouterr().err


def test_no_model_is_told(data, tmp_path, capsys):
    for content in (b"", b"no model", data.read_bytes()):
        (tmp_path / "no.pt2").write_bytes(content)
        assert "no.pt2 is no model file" in fails([data, tmp_path / "no.pt2"], capsys)
    torch.save({"a": 1}, tmp_path / "other.pt2")
    assert "other.pt2 is no model file" in fails([data, tmp_path / "other.pt2"], capsys)
    assert "cannot read" in fails([data, tmp_path / "none.pt2"], capsys)


def test_model_that_breaks_the_contract_is_told(data, write_model, tmp_path, capsys):
    error = fails([data, write_model(Counting(9), 9, 4, items=None)], capsys)
    assert "no config.json with `items` and `max_length`" in error
    too_few = Counting(9)
    too_few.item_vectors = nn.Parameter(torch.eye(9))
    assert "do not fit" in fails([data, write_model(too_few, 9, 4)], capsys)
    for value in (math.nan, math.inf):
        wild = Counting(9)
        with torch.no_grad():
            wild.item_vectors[3, 3] = value
        assert "not finite" in fails([data, write_model(wild, 9, 4)], capsys)

    class Wild(Constant):
        def forward(self, users, items):
            hidden, output, item_vectors = super().forward(users, items)
            return hidden, output / (items[..., None] != 2), item_vectors

    assert "not finite" in fails([data, write_model(Wild(9), 9, 4)], capsys)


def test_bad_data_is_told(write_data, tmp_path, write_model, capsys):
    model = write_model(Counting(9), 9, 4)
    (tmp_path / "bad.txt").write_text("1 2\n1 x\n")
    assert "bad.txt, line 2" in fails([tmp_path / "bad.txt", model], capsys)
    assert "No such file" in fails([tmp_path / "none.txt", model], capsys)
    short = write_data({1: [9], 2: [1, 2]})
    assert "no user has 3 interactions" in fails([short, model], capsys)


def test_too_many_negatives_are_told(data, write_model, capsys):
    error = fails([data, write_model(Counting(9), 9, 4), "--protocol", "uniform", "--negatives", 7], capsys)
    assert "fewer than 7 unseen items" in error
    error = fails([data, write_model(Counting(9), 9, 4), "--protocol", "uniform", "--negatives", 70], capsys)
    assert "lower --negatives" in error


@pytest.mark.parametrize("option", ["--seed=-1", "--at=0", "--negatives=0", "--split=train"])
def test_settings_out_of_range_end_with_status_2(data, option):
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(data), "model.pt2", option])
    assert end.value.code == 2


def test_as_a_command(data, write_model):
    command = [sys.executable, evaluate.__file__, data, write_model(Counting(9), 9, 4), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and len(json.loads(done.stdout)) == 1


def test_a_reader_that_stops_reading_gets_no_traceback(data, write_model):
    command = [sys.executable, evaluate.__file__, data, write_model(Counting(9), 9, 4)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
    process.stderr.close()
