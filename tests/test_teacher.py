"""sasrec_teacher.py against independent oracles: formulas in float64, slow loops, planted data."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import evaluate
import sasrec_teacher as teacher

SMALL = ["--dim", "8", "--blocks", "1", "--max-length", "6", "--epochs", "2", "--batch-size", "4"]


@pytest.fixture
def small(write_data):
    """Data of 12 users and 20 items."""
    rng = np.random.default_rng(0)
    return write_data({u: rng.permutation(20)[: 3 + u % 6] + 1 for u in range(1, 13)} | {13: [20, 1, 2]})


def fails(argv, capsys):
    """Run `main` on `argv`; check that it ended with one line and status 2, and return the line."""
    assert teacher.main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("sasrec_teacher.py: ")
    return error


# ---- Data --------------------------------------------------------------------------------------------------


def test_read_interactions(write_data, tmp_path):
    path = write_data({7: [3, 1], 2: [5], 9: [4, 4, 4]})
    for file in (path, tmp_path / "data.npy"):
        user_ids, starts, items = teacher.read_interactions(file if file == path else save_npy(path, file))
        assert user_ids.tolist() == [7, 2, 9] and starts.tolist() == [0, 2, 3, 6]
        assert items.tolist() == [3, 1, 5, 4, 4, 4]
        assert items.dtype == starts.dtype == user_ids.dtype == np.int64


def save_npy(path, to):
    """The text table `path` as an int32 .npy file."""
    np.save(to, np.loadtxt(path, dtype=np.int32))
    return to


def test_blank_lines_tabs_and_windows_line_ends_are_read(tmp_path):
    (tmp_path / "data.txt").write_bytes(b"1\t2\r\n\r\n1 3\n  2   4  \n")
    _, starts, items = teacher.read_interactions(tmp_path / "data.txt")
    assert starts.tolist() == [0, 2, 3] and items.tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "is empty"),
        ("1 2\n1\n", "line 2: '1' is not"),
        ("1 2\n\n1 3 4\n", "line 3: '1 3 4'"),
        ("1 2\n1 word\n", "line 2: '1 word'"),
        ("1 2\n1 -3\n", "line 2: '1 -3'"),
        ("1 2\n1 0\n", "line 2: '1 0'"),
        ("0 2\n1 1\n", "line 1: '0 2'"),
        ("1 2\n1 2.5\n", "line 2: '1 2.5'"),
        ("1 2\n1 99999999999999999999\n", "line 2: '1 9999"),
        ("1 2\n1 100000001\n", "line 2: '1 100000001'"),
        ("1 2\n\n2 3\n1 4\n", "line 4: user 1 again"),
        ("\x00\x01\x02 binary \xff\n", "line 1: "),
    ],
)
def test_bad_data_names_file_and_line(tmp_path, capsys, text, says):
    path = tmp_path / "bad.txt"
    path.write_text(text)
    error = fails([path, "--out", tmp_path / "out.pt2"], capsys)
    assert str(path) in error and says in error
    assert not (tmp_path / "out.pt2").exists()


@pytest.mark.parametrize(
    "table", [[[1, 0], [1, 2]], [[1.0, 2.0]], [1, 2], [[1, 2, 3]], [[1, 2], [2, 2], [1, 3]]]
)
def test_bad_npy_is_told(tmp_path, capsys, table):
    np.save(tmp_path / "bad.npy", np.array(table))
    assert "bad.npy is no integer array" in fails([tmp_path / "bad.npy", "--out", tmp_path / "o.pt2"], capsys)


def test_missing_file_is_told(tmp_path, capsys):
    assert "none.txt: No such file" in fails([tmp_path / "none.txt", "--out", tmp_path / "o.pt2"], capsys)
    (tmp_path / "text.npy").write_text("1 2\n")
    assert "text.npy" in fails([tmp_path / "text.npy", "--out", tmp_path / "o.pt2"], capsys)


def test_leave_one_out_with_short_histories():
    lengths = np.array([1, 2, 3, 5])
    starts = np.append(0, lengths.cumsum())
    train_end, evaluated = teacher.leave_one_out(starts)
    assert (train_end - starts[:-1]).tolist() == [1, 2, 1, 3]  # one and two interactions: all train
    assert evaluated.tolist() == [False, False, True, True]


def test_pad_batch_pads_on_the_right():
    items = np.arange(1, 10)
    batch = teacher.pad_batch(items, np.array([0, 4, 8]), np.array([3, 4, 9]))
    assert batch.tolist() == [[1, 2, 3], [0, 0, 0], [9, 0, 0]] and batch.dtype == torch.int64


def test_batches_hold_every_user_once_and_little_padding():
    rng = np.random.default_rng(0)
    length = rng.integers(1, 200, 1000)
    batches = teacher.batches_of_like_length(length, 32, rng)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    assert max(map(len, batches)) == 32
    computed = sum(len(b) * length[b].max() for b in batches)
    assert computed < 1.25 * length.sum()  # in random batches it is 2 times
    assert [b.tolist() for b in batches] != [
        b.tolist() for b in teacher.batches_of_like_length(length, 32, rng)
    ]


def test_validation_and_test_items_never_train(write_data, tmp_path, monkeypatch):
    # every item stands in one place only, so that its number tells where it came from
    number, histories, held_out = iter(range(1, 1000)), {}, set()
    for user in range(1, 41):
        histories[user] = [next(number) for _ in range(1 + user % 7)]
        held_out |= set(histories[user][-2:]) if len(histories[user]) >= 3 else set()
    data, fed = write_data(histories), set()
    loss = teacher.batch_loss

    def spy(model, inputs, targets, kind, negatives):
        assert torch.equal(inputs > 0, targets > 0)
        assert torch.equal(inputs[:, 1:][targets[:, 1:] > 0], targets[:, :-1][targets[:, 1:] > 0])
        fed.update(inputs.flatten().tolist(), targets.flatten().tolist())
        return loss(model, inputs, targets, kind, negatives)

    monkeypatch.setattr(teacher, "batch_loss", spy)
    assert teacher.main([str(data), "--out", str(tmp_path / "m.pt2"), *SMALL]) == 0
    can_train = {
        item
        for items in histories.values()
        for item in (items if len(items) < 3 else items[:-2])
        if len(items) == 2 or len(items) >= 4  # one item alone makes no pair of input and target
    }
    assert fed - {0} == can_train and not fed & held_out


def test_long_histories_train_on_the_most_recent_items(write_data, tmp_path, monkeypatch):
    seen = []
    loss = teacher.batch_loss
    monkeypatch.setattr(
        teacher,
        "batch_loss",
        lambda m, i, t, *rest: seen.append((i.tolist(), t.tolist())) or loss(m, i, t, *rest),
    )
    data = write_data({1: range(1, 13)})
    assert teacher.main([str(data), "--out", str(tmp_path / "m.pt2"), *SMALL]) == 0
    assert seen[0] == ([[4, 5, 6, 7, 8, 9]], [[5, 6, 7, 8, 9, 10]])


def test_negatives_are_unseen_and_uniform():
    rng = np.random.default_rng(0)
    item_count, histories = 12, [{1, 12}, {5}, set(range(1, 12))]
    seen = np.array(sorted(u * (item_count + 1) + i for u, items in enumerate(histories) for i in items))
    users = np.repeat([0, 1, 2], 6000).reshape(9000, 2)
    drawn = teacher.draw_negatives(users, seen, item_count, rng)
    assert drawn.shape == users.shape
    for user, history in enumerate(histories):
        counts = np.bincount(drawn[users == user], minlength=item_count + 1)
        unseen = [i for i in range(1, item_count + 1) if i not in history]
        assert counts.sum() == counts[unseen].sum() == 6000
        if len(unseen) > 1:
            assert stats.chisquare(counts[unseen]).pvalue > 1e-3


def test_bce_negatives_in_training_are_never_in_the_training_history(write_data, tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    histories = {u: (rng.permutation(8)[: 7 + u % 2] + 1).tolist() for u in range(1, 31)}
    data, checked = write_data(histories), []
    of_inputs = {tuple(items[:-3]): items[:-2] for items in histories.values()}
    assert len(of_inputs) == len(histories)  # so the inputs tell the user
    loss = teacher.batch_loss

    def spy(model, inputs, targets, kind, negatives):
        at = 0
        for row in inputs.tolist():
            row = [item for item in row if item]
            drawn = negatives[at : at + len(row)].flatten().tolist()
            assert len(drawn) == 2 * len(row)
            at += len(row)
            assert not set(drawn) & set(of_inputs[tuple(row)])
            checked.extend(drawn)
        assert at == len(negatives)
        return loss(model, inputs, targets, kind, negatives)

    monkeypatch.setattr(teacher, "batch_loss", spy)
    assert (
        teacher.main(
            [str(data), "--out", str(tmp_path / "m.pt2"), "--loss", "bce", "--negatives", "2", *SMALL]
        )
        == 0
    )
    assert len(checked) > 100


def test_bce_with_a_user_who_has_seen_everything_is_told(write_data, tmp_path, capsys):
    data = write_data({4: [1, 2, 3, 1, 2], 5: [1, 2, 3]})
    assert "user 4 has seen every item" in fails([data, "--out", tmp_path / "m.pt2", "--loss", "bce"], capsys)


# ---- Model -------------------------------------------------------------------------------------------------


def test_no_future_item_changes_an_earlier_output(sasrec):
    items = torch.randint(1, 31, (4, 12))
    hidden, output, _ = sasrec(torch.ones(4), items)
    for t in range(11):
        changed = items.clone()
        changed[:, t + 1 :] = torch.randint(1, 31, (4, 11 - t))
        hidden_2, output_2, _ = sasrec(torch.ones(4), changed)
        torch.testing.assert_close(output[:, : t + 1], output_2[:, : t + 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden[:, :, : t + 1], hidden_2[:, :, : t + 1], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(output[:, t + 1], output_2[:, t + 1])


def test_gradient_from_the_future_is_exactly_zero(sasrec):
    kept = []
    sasrec.M.register_forward_hook(
        lambda module, args, embedded: embedded.retain_grad() or kept.append(embedded)
    )
    for t in range(12):
        _, output, _ = sasrec(torch.ones(2), torch.randint(1, 31, (2, 12)))
        output[:, t].pow(2).sum().backward()
        gradient = kept.pop().grad
        assert (gradient[:, t + 1 :] == 0).all() and (gradient[:, : t + 1].abs().sum(-1) > 0).all()


def test_padding_changes_nothing(sasrec):
    histories = [torch.randint(1, 31, (n,)) for n in (1, 3, 7, 12)]
    alone = [sasrec(torch.ones(1), h[None])[1][0] for h in histories]
    batch = torch.zeros(4, 12, dtype=torch.int64)
    for row, h in zip(batch, histories, strict=True):
        row[: len(h)] = h
    together = sasrec(torch.ones(4), batch)[1]
    for h, out, row in zip(histories, alone, together, strict=True):
        torch.testing.assert_close(row[: len(h)], out, atol=1e-5, rtol=1e-5)
        longer = torch.cat([h, torch.zeros(12 - len(h), dtype=torch.int64)])
        torch.testing.assert_close(
            sasrec(torch.ones(1), longer[None])[1][0, : len(h)], out, atol=1e-5, rtol=1e-5
        )


def test_block_is_the_papers_equations(sasrec):
    def layer_norm(x, norm):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias

    model, items = sasrec.double(), torch.randint(1, 31, (1, 7))
    x = [math.sqrt(8) * model.M.weight[items[0, t]] + model.P[t] for t in range(7)]
    x = torch.stack(x)  # [T, d]
    for block in model.blocks:
        y = layer_norm(x, block.norm_1)
        q, k, v = (y @ block.query_key_value.weight.T + block.query_key_value.bias).split(8, dim=1)
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            rows = []
            for t in range(7):
                score = torch.stack([q[t, h] @ k[s, h] / math.sqrt(4) for s in range(t + 1)])
                rows.append(score.softmax(0) @ v[: t + 1, h])
            heads.append(torch.stack(rows))
        x = x + torch.cat(heads, 1) @ block.projection.weight.T + block.projection.bias
        y = layer_norm(x, block.norm_2)
        y = (y @ block.W_1.weight.T + block.W_1.bias).clamp(min=0) @ block.W_2.weight.T + block.W_2.bias
        x = x + y
    hidden, output, item_vectors = model(torch.ones(1), items)
    torch.testing.assert_close(hidden[-1, 0], x, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(output[0], layer_norm(x, model.norm), atol=1e-8, rtol=1e-8)
    assert hidden.shape == (4, 1, 7, 8) and item_vectors.shape == (31, 8) and (item_vectors[0] == 0).all()


def test_a_scaled_stack_starts_as_the_identity_and_learns():
    model = teacher.SASRec(10, 5, 8, blocks=8, heads=1, dropout=0.0, scaled=True)
    hidden, output, _ = model(torch.ones(2), torch.randint(1, 11, (2, 5)))
    assert all(torch.equal(h, hidden[0]) for h in hidden)
    output.pow(3).sum().backward()
    assert all((block.epsilon.grad != 0).all() for block in model.blocks)


@pytest.mark.parametrize("scaled", [False, True])
def test_exported_program_equals_the_module(tmp_path, scaled):
    torch.manual_seed(0)
    model = teacher.SASRec(30, 12, 8, 2, 2, 0.5, scaled)
    model.train()
    content = teacher.export_model(model, 12, {"items": 30, "max_length": 12})
    assert model.training  # exporting leaves the module as it was
    extra = {"config.json": ""}
    program = torch.export.load(io.BytesIO(content), extra_files=extra).module()
    assert json.loads(extra["config.json"]) == {"items": 30, "max_length": 12}
    model.eval()
    for batch, length in [(1, 1), (1, 12), (2, 12), (3, 5), (64, 1), (7, 2)]:
        users, items = torch.arange(batch), torch.randint(0, 31, (batch, length))
        for ours, theirs in zip(model(users, items), program(users, items), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    with pytest.raises(Exception, match="12"):
        program(torch.ones(1, dtype=torch.int64), torch.ones(1, 13, dtype=torch.int64))


# ---- Losses ------------------------------------------------------------------------------------------------


@pytest.fixture
def scores():
    """Outputs, item vectors and targets in float64; V = 40 items, d = 6, N = 300 positions: three slices."""
    torch.manual_seed(0)
    output = torch.randn(300, 6, dtype=torch.float64, requires_grad=True)
    item_vectors = torch.randn(41, 6, dtype=torch.float64, requires_grad=True)
    return output, item_vectors, torch.randint(1, 41, (300,))


def check_loss(loss, expected, output, item_vectors):
    """`loss` equals `expected`, and so do their gradients."""
    ours = torch.autograd.grad(loss, (output, item_vectors))
    theirs = torch.autograd.grad(expected, (output, item_vectors))
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_ce_loss_is_its_formula(scores):
    output, item_vectors, target = scores
    r = output @ item_vectors.T
    expected = sum(-(r[n, t] - r[n, 1:].exp().sum().log()) for n, t in enumerate(target.tolist())) / 300
    check_loss(teacher.ce_loss(output, item_vectors, target), expected, output, item_vectors)


@pytest.mark.parametrize("k", [1, 3])
def test_bce_loss_is_its_formula(scores, k):
    output, item_vectors, target = scores
    negatives = torch.randint(1, 41, (300, k))
    total = 0
    for f, i, row in zip(output, target.tolist(), negatives.tolist(), strict=True):
        total -= (1 / (1 + (-(f @ item_vectors[i])).exp())).log()
        for j in row:
            total -= (1 - 1 / (1 + (-(f @ item_vectors[j])).exp())).log()
    check_loss(teacher.bce_loss(output, item_vectors, target, negatives), total / 300, output, item_vectors)


def test_sampled_loss_is_its_formula_and_leaves_the_target_out(scores):
    output, item_vectors, target = scores
    negatives = torch.tensor([3, 7, 7, 40, int(target[0])])
    total = 0
    for f, i in zip(output, target.tolist(), strict=True):
        others = [j for j in negatives.tolist() if j != i]
        total -= f @ item_vectors[i] - (f @ item_vectors[[i, *others]].T).exp().sum().log()
    check_loss(
        teacher.sampled_loss(output, item_vectors, target, negatives), total / 300, output, item_vectors
    )


def test_losses_see_real_positions_only(sasrec):
    inputs = torch.tensor([[3, 4, 0, 0], [5, 6, 7, 8]])
    targets = torch.tensor([[4, 9, 0, 0], [6, 7, 8, 2]])
    both = teacher.batch_loss(sasrec, inputs, targets, "ce", None)
    first = teacher.batch_loss(sasrec, inputs[:1, :2], targets[:1, :2], "ce", None)
    second = teacher.batch_loss(sasrec, inputs[1:], targets[1:], "ce", None)
    torch.testing.assert_close(both, (2 * first + 4 * second) / 6)


def test_every_position_counts_alike_whatever_its_batch(write_data, tmp_path, monkeypatch):
    # the loss is a mean over a batch; the epoch's gradient must still be that of the sum over positions
    data, counts, weights = write_data({u: range(1, 4 + u) for u in range(1, 13)}), [], []

    def spy(model, inputs, targets, kind, negatives):
        counts.append(int((inputs > 0).sum()))
        loss = model.P.sum()
        loss.register_hook(lambda gradient: weights.append(gradient.item()))
        return loss

    monkeypatch.setattr(teacher, "batch_loss", spy)
    options = ["--epochs", "1", "--batch-size", "3", "--max-length", "20"]
    assert teacher.main([str(data), "--out", str(tmp_path / "m.pt2"), *options]) == 0
    assert len(set(counts)) > 1
    np.testing.assert_allclose(weights, np.array(counts) / np.mean(counts), rtol=1e-5)


# ---- Training ----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_file(small, tmp_path):
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        argv = [str(small), "--out", str(tmp_path / name / "m.pt2"), "--seed", str(seed), *SMALL]
        assert teacher.main(argv) == 0
    a, b, c = (tmp_path / name / "m.pt2" for name in "abc")
    assert a.read_bytes() == b.read_bytes()
    weights = [torch.export.load(f).state_dict["M.weight"] for f in (a, c)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("loss", ["ce", "bce", "sampled"])
def test_keeps_the_best_epoch_and_logs_every_one(write_data, tmp_path, loss):
    rng = np.random.default_rng(0)
    data = write_data({u: (rng.integers(30) + np.arange(8)) % 30 + 1 for u in range(1, 101)})
    out = tmp_path / "new" / "folder" / "m.pt2"
    argv = [str(data), "--out", str(out), "--loss", loss, "--dim", "8", "--epochs", "60", "--patience", "2"]
    assert teacher.main([*argv, "--learning-rate", "0.03", "--max-length", "5"]) == 0
    log = [json.loads(line) for line in Path(f"{out}.log.jsonl").read_text().splitlines()]
    best = max(log, key=lambda line: line["NDCG@10"])
    program, config = evaluate.load_model(out, 100, 30, "cpu")
    assert config["validation"] == {k: best[k] for k in ("epoch", "HR@10", "NDCG@10")}
    assert [line["epoch"] for line in log] == list(range(1, len(log) + 1))
    assert len(log) == min(60, best["epoch"] + 2)
    assert log[0]["loss"] > log[-1]["loss"] and best["NDCG@10"] > 0.5  # it learns to count
    user_ids, starts, items = evaluate.read_interactions(data)
    args = type("Args", (), {"protocol": "full", "keep_seen": False, "seed": 0, "split": "valid"})
    rank = evaluate.rank_all(
        program, config, (user_ids, starts, items), np.arange(100), starts[1:] - 2, args, "cpu"
    )
    assert evaluate.metrics(rank, 10)[1].mean() == pytest.approx(best["NDCG@10"], abs=1e-6)
    assert config["settings"]["loss"] == loss and len(config["data_sha256"]) == 64


def test_validate_draws_users_when_there_are_many(small, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "VALIDATION_USERS", 5)
    asked = []
    real = teacher.validate
    monkeypatch.setattr(
        teacher, "validate", lambda m, i, begin, *rest: asked.append(len(begin)) or real(m, i, begin, *rest)
    )
    assert teacher.main([str(small), "--out", str(tmp_path / "m.pt2"), *SMALL]) == 0
    assert asked == [5, 5]


# ---- Bad input ---------------------------------------------------------------------------------------------


def test_short_histories_alone_are_told(write_data, tmp_path, capsys):
    data = write_data({1: [1, 2], 2: [3], 3: [4, 5]})
    assert "no user has 3 interactions" in fails([data, "--out", tmp_path / "m.pt2"], capsys)


def test_unwritable_out_is_told_before_training(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(teacher, "SASRec", None)  # training would end in a TypeError
    assert "cannot write" in fails([small, "--out", small / "m.pt2"], capsys)
    assert "is a directory" in fails([small, "--out", tmp_path], capsys)


def test_loss_that_is_not_finite_is_told_and_nothing_overwritten(small, tmp_path, capsys):
    out = tmp_path / "m.pt2"
    out.write_text("old model")
    Path(f"{out}.log.jsonl").write_text("old log")
    error = fails([small, "--out", out, *SMALL, "--learning-rate", "1e30"], capsys)
    assert "the loss became nan" in error and "--learning-rate" in error
    assert out.read_text() == "old model" and Path(f"{out}.log.jsonl").read_text() == "old log"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.txt", "m.pt2", "m.pt2.log.jsonl"]


def test_weights_that_are_not_finite_are_no_best_epoch(small, tmp_path, capsys, monkeypatch):
    real = teacher.validate

    def after_a_last_bad_step(model, *rest):
        model.M.weight.data.fill_(math.nan)
        return real(model, *rest)

    monkeypatch.setattr(teacher, "validate", after_a_last_bad_step)
    assert "scores are not finite" in fails([small, "--out", tmp_path / "m.pt2", *SMALL], capsys)
    assert not (tmp_path / "m.pt2").exists()


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.pt2"
    path.write_text("old")

    def interrupted(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teacher.write_atomically(path, interrupted)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "option, says",
    [
        (["--heads", "3"], "does not divide --dim"),
        pytest.param(
            ["--device", "cuda"],
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_settings_that_do_not_fit_are_told(small, tmp_path, capsys, option, says):
    assert says in fails([small, "--out", tmp_path / "m.pt2", *option], capsys)


@pytest.mark.parametrize(
    "option",
    [
        "--dim=0",
        "--seed=-1",
        "--max-length=1",
        "--dropout=1",
        "--learning-rate=-1",
        "--loss=mse",
        "--epochs=x",
    ],
)
def test_settings_out_of_range_end_with_status_2(small, tmp_path, option):
    with pytest.raises(SystemExit) as end:
        teacher.main([str(small), "--out", str(tmp_path / "m.pt2"), option])
    assert end.value.code == 2


def test_as_a_command_bad_input_leaves_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, teacher.__file__, "none.txt", "--out", "m.pt2"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and done.stdout == ""
    why = "cannot read none.txt: No such file or directory; make it with data/prepare.py"
    assert done.stderr == f"sasrec_teacher.py: {why}\n"
    assert list(tmp_path.iterdir()) == []


# ---- Progress ----------------------------------------------------------------------------------------------


def test_progress_speaks_after_8_seconds_of_silence(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(teacher.time, "time", lambda: now[0])
    progress = teacher.Progress()
    for second in range(1, 25):
        now[0] = 100.0 + second
        progress.show(f"second {second}")
    assert capsys.readouterr().out == "second 9\nsecond 18\n"
