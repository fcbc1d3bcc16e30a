"""sasrec_teacher.py against formulas in float64, slow loops and data with a known answer."""

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch.testing import assert_close

import evaluate
import sasrec_teacher as teacher

SMALL = "--dim 8 --blocks 1 --max-length 6 --epochs 2 --batch-size 4"


@pytest.fixture
def small(write_data):
    """Data of 13 users and 20 items."""
    rng = np.random.default_rng(0)
    return write_data({u: rng.permutation(20)[: 3 + u % 6] + 1 for u in range(1, 13)} | {13: [20, 1, 2]})


def run(data, options, name="m.pt2"):
    """Train. Returns the weights and the config in the model file, and the lines of the log."""
    out, extra = data.parent / "new" / name, {"config.json": ""}
    teacher.main([str(data), "--out", str(out), *options.split()])
    log = Path(f"{out}.log.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return dict(torch.export.load(out, extra_files=extra).state_dict), json.loads(extra["config.json"]), lines


def fails(data, options="", out="new/m.pt2"):
    """The line that `main` ends with, on standard error and with status 1. No file is added or removed."""
    before = sorted(data.parent.rglob("*.*"))
    with pytest.raises(SystemExit) as end:
        teacher.main([str(data), "--out", str(data.parent / out), *options.split()])
    assert "\n" not in end.value.code and sorted(data.parent.rglob("*.*")) == before
    return end.value.code


def test_read_interactions(tmp_path):
    text, array = tmp_path / "data.txt", tmp_path / "data.npy"
    table = np.array([[7, 3], [7, 1], [2, 999999], [9, 4], [9, 4], [9, 4]], np.int32)
    text.write_bytes(b"7\t3\r\n7 1\n\n  2   999999  \n9 4\n9 4\n9 4")
    np.save(array, table)
    for path in (text, array):
        data = teacher.read_interactions(path)
        assert data.path == path and data.sha256 == hashlib.sha256(table.astype("<i8")).hexdigest()
        expected = [7, 2, 9], [0, 2, 3, 6], [3, 1, 999999, 4, 4, 4], [2, 3, 4], [False, False, True]
        expected = *expected, [1, 3, 4, 999999]
        assert [column.tolist() for column in data[2:]] == list(expected)
        assert all(x.dtype == np.int64 for x in (data.user_ids, data.starts, data.items, data.train_end))
    np.save(array, table.astype(int))  # as in memory, so the items stay in the file
    assert not teacher.read_interactions(array).items.flags.owndata


def test_an_error_in_the_data_names_file_and_line(write_data, tmp_path):
    bad = {"": ": a row must be `user item`", "1 2\n2 3\n1 4\n": ": the rows of a user must stand together"}
    rows = ["1", "1 3 4", "1 x", "1 -3", "1 0", "0 2", "1 2.5", f"1 {10**20}", "1 100000000", "\0\1 \2"]
    text, array = tmp_path / "bad.txt", tmp_path / "bad.npy"
    for content, message in (bad | {f"1 2\n\n{row}\n": f", line 3, {row!r}: a row" for row in rows}).items():
        text.write_text(content)
        assert fails(text).startswith(f"{text}{message}")
    for table in ([[1, 0]], [[1.0, 2.0]], [1, 2], [[1, 2, 3]], [[1, 2], [2, 2], [1, 3]], "", "1 2"):
        array.write_text(table) if isinstance(table, str) else np.save(array, np.array(table))
        assert fails(array).startswith(f"{array}: ")
    for histories in ({1: [1, 2], 2: [3]}, {1: [1, 2, 3], 2: [4]}):  # none to validate on, none to train on
        assert "no user has 3 interactions" in fails(write_data(histories))


def test_batches_hold_every_history_once_and_little_padding():
    lengths = np.random.default_rng(0).integers(1, 200, 1000)
    batches, others = (teacher.epoch_batches(lengths, 32, seed=5, epoch=epoch)[1] for epoch in (1, 2))
    assert sorted(np.concatenate(batches)) == [*range(1000)] and max(map(len, batches)) == len(batches) == 32
    assert sum(len(b) * lengths[b].max() for b in batches) < 1.25 * lengths.sum()  # random batches: 2 times
    means = [lengths[batch].mean() for batch in batches]
    assert means != sorted(means) and {*map(tuple, batches)} != {*map(tuple, others)}


def test_of_10001_users_10000_validate_drawn_by_the_seed(tmp_path):
    np.save(tmp_path / "data.npy", np.arange(1, 10_002).repeat(4)[:, None].repeat(2, 1))
    data = teacher.read_interactions(tmp_path / "data.npy")
    first, again, other = (teacher.training_part(data, 5, seed)[1].tolist() for seed in (0, 0, 1))
    assert len({*first}) == len(first) == len(other) == 10_000 and first == again != other
    assert teacher.training_part(data, 5, 0, limit=10_001)[1].tolist() == [*range(10_001)]


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_validation_and_test_items_never_train(write_data, monkeypatch, loss):
    # with other items in the places that are held out, the weights are equal bit for bit
    rng, better, results = np.random.default_rng(0), iter(range(9)), []
    monkeypatch.setattr(teacher, "validate", lambda *_: (0.0, float(next(better))))
    histories = {u: rng.permutation(20)[: 1 + u % 9] + 1 for u in range(1, 31)} | {31: np.arange(20) + 1}
    for _ in range(2):
        results.append(run(write_data(histories), f"{SMALL} --loss {loss}")[0])
        for items in histories.values():
            items[-2:] = items[-2:][::-1] % 20 + 1 if len(items) > 2 else items
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_negatives_are_unseen_and_uniform(write_data):
    # the last two items of each user are held out: they may be drawn
    data = teacher.read_interactions(write_data({7: [1, 12, 3, 4], 3: [5, 5, 6], 8: [*range(1, 12), 12, 1]}))
    users = np.repeat([0, 1, 2], 6000).reshape(9000, 2)
    drawn = teacher.UnseenItems(data).draw(users, np.random.default_rng(0))
    for user, seen in enumerate([{1, 12}, {5}, {*range(1, 12)}]):
        counts, unseen = np.bincount(drawn[users == user], minlength=13), sorted({*range(1, 13)} - seen)
        assert counts.sum() == counts[unseen].sum() == 6000
        assert user == 2 or stats.chisquare(counts[unseen]).pvalue > 1e-3


def by_hand(weights, items, heads, dropout=1):
    """Hidden states [L+1, T, d] and output [T, d] of one history. Each dropout is the factor `dropout`."""
    (T, d), hidden = (len(items), weights["P"].shape[1]), []
    pair = lambda name: (weights[f"{name}.weight"], weights[f"{name}.bias"])  # noqa: E731
    x = dropout * (math.sqrt(d) * weights["M.weight"][items] + weights["P"][:T])
    while f"blocks.{len(hidden)}.W_1.weight" in weights:
        block, attended = f"blocks.{len(hidden)}", []
        hidden.append(x)
        epsilon = dropout * weights.get(f"{block}.epsilon", torch.ones(2))
        normal = F.layer_norm(x, [d], *pair(f"{block}.norm_1"))
        q, k, v = F.linear(normal, *pair(f"{block}.query_key_value")).split(d, 1)
        for t in range(T):
            for h in torch.arange(d).split(d // heads):
                score = k[: t + 1, h] @ q[t, h] / math.sqrt(d / heads)
                attended.append(score.softmax(0) @ v[: t + 1, h])
        x = x + epsilon[0] * F.linear(torch.cat(attended).view(T, d), *pair(f"{block}.projection"))
        inner = F.linear(F.layer_norm(x, [d], *pair(f"{block}.norm_2")), *pair(f"{block}.W_1"))
        x = x + epsilon[1] * F.linear(inner.clamp(min=0), *pair(f"{block}.W_2"))
    return torch.stack([*hidden, x]), F.layer_norm(x, [d], *pair("norm"))


@pytest.mark.parametrize("scaled", [False, True])
def test_block_is_the_papers_equations(scaled, float64):
    torch.manual_seed(0)
    model, items = teacher.SASRec(30, 12, 8, 3, 2, 0.5, scaled).eval(), torch.randint(1, 31, (1, 7))
    for weight in model.parameters():
        weight.data.normal_(std=0.7)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p == 0.5:
            module.register_forward_hook(lambda module, args, output: 1.5 * output)
    hidden, output, _ = model(torch.ones(1), items)
    expected = by_hand(model.state_dict(), items[0], heads=2, dropout=1.5)
    assert_close((hidden[:, 0], output[0]), expected, atol=1e-9, rtol=1e-9)


def test_gradient_from_the_future_is_exactly_zero(sasrec):
    kept = []
    sasrec.M.register_forward_hook(lambda module, args, out: out.retain_grad() or kept.append(out))
    for t in range(12):
        _, output, _ = sasrec(torch.ones(2), torch.randint(1, 31, (2, 12)))
        output[:, t].pow(2).sum().backward()
        gradient = kept.pop().grad
        assert (gradient[:, t + 1 :] == 0).all() and (gradient[:, : t + 1].abs().sum(-1) > 0).all()


def test_a_scaled_stack_starts_as_the_identity_and_learns():
    model = teacher.SASRec(10, 5, 8, num_blocks=8, num_heads=1, dropout=0.0, scaled=True)
    hidden, output, item_vectors = model(torch.ones(2), torch.randint(1, 11, (2, 5)))
    assert all(torch.equal(h, hidden[0]) for h in hidden) and item_vectors is model.M.weight
    output.pow(3).sum().backward()
    assert all((block.epsilon.grad != 0).all() for block in model.blocks)


def test_exported_program_equals_the_module(tmp_path, sasrec):
    torch.export.save(teacher.export(sasrec.train(), 12), tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2").module()
    for batch, length in [(1, 1), (1, 12), (2, 12), (3, 5), (64, 1), (7, 2)]:
        users, items = torch.arange(batch), torch.randint(0, 31, (batch, length))
        assert_close(program(users, items), sasrec.eval()(users, items), atol=1e-5, rtol=1e-5)
    with pytest.raises(Exception, match="12"):
        program(torch.ones(1, dtype=torch.int64), torch.ones(1, 13, dtype=torch.int64))


def loss_of(kind, scores, target, negatives, count):
    """The mean loss; scores [N, V+1], negatives [N, k], count [V+1]: how often to expect an item among k."""
    r, others = scores.gather(1, target[:, None]), scores.gather(1, negatives)
    if kind == "ce":
        return (scores[:, 1:].exp().sum(1, keepdim=True).log() - r).mean()
    if kind == "bce":
        return -(r.sigmoid().log().sum() + (1 - others.sigmoid()).log().sum()) / len(target)
    others = others.exp() / count[negatives] * (negatives != target[:, None])
    return ((r.exp() + others.sum(1, keepdim=True)).log() - r).mean()


@pytest.mark.parametrize("kind, k", [("ce", 0), ("bce", 1), ("bce", 3), ("sampled", 5)])
def test_a_loss_and_its_gradient_are_the_formula(kind, k, float64):
    torch.manual_seed(0)  # V = 40 and N = 300 positions: three slices
    output, item_vectors = torch.randn(300, 6, requires_grad=True), torch.randn(41, 6, requires_grad=True)
    target, count, shared = torch.randint(1, 41, (300,)), torch.rand(41), torch.tensor([3, 7, 7, 40, 1])
    negatives = shared.expand(300, 5) if kind == "sampled" else torch.randint(1, 41, (300, k))
    drawn = {"ce": (), "bce": (negatives,), "sampled": (shared, count[shared].log())}[kind]
    assert {*shared.tolist()} <= {*target.tolist()}  # so a negative is the target at times
    loss = teacher.LOSSES[kind](output, item_vectors, target, *drawn)
    expected = loss_of(kind, output @ item_vectors.T, target, negatives, count)
    results = [[x, *torch.autograd.grad(x, (output, item_vectors))] for x in (loss, expected)]
    assert_close(*results, atol=1e-12, rtol=1e-12)


def test_shared_negatives_are_drawn_in_proportion_to_Q():
    items = np.array([3, 3, 1, 5, 4, 4, 4])  # training has the first four; 2 and 6 never occur
    data = SimpleNamespace(items=items, catalogue=np.unique(items))
    histories = teacher.Histories(np.array([7, 8]), np.array([0, 1]), np.array([1, 4]))
    shared, Q = teacher.SharedNegatives(data, histories), np.array([0, 0.25, 0, 0.375, 0.125, 0.25])
    np.testing.assert_allclose(shared.Q, Q)  # 1/8 for each of the four items, and half of 1/4, 1/2 and 1/4
    drawn, log_count = shared.draw(9000, np.random.default_rng(0))
    np.testing.assert_allclose(log_count, np.log(9000 * Q[drawn]))
    counts = np.bincount(drawn, minlength=6)
    assert counts[2] == 0 and stats.chisquare(counts[Q > 0], 9000 * Q[Q > 0]).pvalue > 1e-3


@pytest.mark.parametrize("kind, k", [("ce", 0), ("bce", 1), ("bce", 3), ("sampled", 2048)])
def test_two_epochs_are_the_formulas(write_data, monkeypatch, float64, kind, k):
    """Weights, losses and validation of two epochs of three batches of unlike size, computed in float64."""
    blocks, heads = (4, 2) if kind == "ce" else (2, 1)
    drawn, loss, epoch_batches = [], teacher.LOSSES[kind], teacher.epoch_batches
    lengths = {5: 9, 3: 2, 8: 1, 1: 5, 11: 12, 2: 3, 4: 4, 7: 8, 6: 6}  # of 12 items; the model takes 5
    histories = {u: (np.random.default_rng(u).permutation(12)[:n] + 1).tolist() for u, n in lengths.items()}
    training = {user: items[:-2] if len(items) > 2 else items for user, items in histories.items()}
    window = {user: items[-6:] for user, items in training.items() if len(items) > 1}
    batches, num_positions = [[3, 11], [5, 4, 7], [1, 6]], sum(len(items) - 1 for items in window.values())
    indices = [np.array([[*window].index(user) for user in batch]) for batch in batches]
    monkeypatch.setattr(teacher, "epoch_batches", lambda *args: (epoch_batches(*args)[0], indices))
    monkeypatch.setitem(teacher.LOSSES, kind, lambda o, v, t, *n: drawn.append(n) or loss(o, v, t, *n))
    options = f"--loss {kind} --blocks {blocks} --heads {heads} --dim 8 --max-length 5 --dropout 0"
    options += " --batch-size 3 --learning-rate 0.03 --final-rate 0.4" + " --negatives 3" * (k == 3)
    w, config, log = run(write_data(histories), f"{options} --epochs 0")
    assert config["validation"] is None and not log and ("blocks.0.epsilon" in w) == (blocks >= 4)
    final, _, log = run(write_data(histories), f"{options} --epochs 2")
    frequency = torch.tensor([item for items in window.values() for item in items]).bincount(minlength=13)
    count = k * (frequency / frequency.sum() + 1 / 12) / 2  # of each item, expected among k
    optimizer = torch.optim.Adam([x.requires_grad_() for x in w.values()], betas=(0.9, 0.98))
    after, steps = [], 0
    for line in log:
        total, ranks = 0.0, []
        for batch in batches:
            scores = torch.cat([by_hand(w, window[user][:-1], heads)[1] for user in batch]) @ w["M.weight"].T
            target = torch.tensor([item for user in batch for item in window[user][1:]])
            negatives, *log_count = drawn[steps] or [torch.zeros(len(target), 0).long()]
            assert negatives.shape[-1] == k
            if kind == "bce":
                seen = [{*training[user]} for user in batch for _ in window[user][1:]]
                assert not any(items & {*row} for items, row in zip(seen, negatives.tolist(), strict=True))
            elif kind == "sampled":
                assert_close(log_count[0].exp(), count[negatives])
            mean = loss_of(kind, scores, target, negatives.expand(len(target), -1), count)
            optimizer.zero_grad()
            (mean * len(target) * 3 / num_positions).backward()
            optimizer.param_groups[0]["lr"] = 0.03 * (1 - 0.6 * steps / 6)
            optimizer.step()
            steps, total = steps + 1, total + mean.item() * len(target) / num_positions
        for user in (user for user, items in histories.items() if len(items) > 2):
            r = w["M.weight"] @ by_hand(w, training[user][-5:], heads)[1][-1]
            unseen = [*{*range(1, 13)} - {*training[user]}]
            ranks.append((r[unseen] >= r[histories[user][-2]]).sum().item())
        metrics = np.mean([(rank <= 10, (rank <= 10) / math.log2(rank + 1)) for rank in ranks], 0)
        assert (line["loss"], line["HR@10"], line["NDCG@10"]) == pytest.approx((total, *metrics), rel=1e-8)
        after.append({name: value.detach().clone() for name, value in w.items()})
    assert_close(final, after[int(log[1]["NDCG@10"] > log[0]["NDCG@10"])], atol=1e-7, rtol=1e-7)
    assert steps == len(drawn) == 6


def test_dropout_acts_in_every_epoch_of_training_and_never_in_validation(small):
    still = f"{SMALL} --learning-rate 0 --epochs 3 --dropout"  # so only dropout can make epochs differ
    without, log = run(small, f"{still} 0")[2], run(small, f"{still} 0.5")[2]
    assert {line["NDCG@10"] for line in log} == {line["NDCG@10"] for line in without}
    assert [len({round(line["loss"], 6) for line in lines}) for lines in (without, log)] == [1, 3]


def test_the_file_is_of_the_best_epoch_and_patience_counts_from_it(small, monkeypatch, capsys):
    ndcg, weights, clock = iter([0.1, 0.5, 0.3, 0.5, 0.2, 0.9]), [], iter(60.0 * n * n for n in range(99))
    monkeypatch.setattr(teacher, "time", SimpleNamespace(time=lambda: next(clock)))  # 1, 5, 9, ... minutes
    copy = lambda model: weights.append(model.M.weight.detach().clone())  # noqa: E731
    monkeypatch.setattr(teacher, "validate", lambda model, *_: copy(model) or (0.25, next(ndcg)))
    final, config, log = run(small, f"{SMALL} --epochs 9 --patience 3")
    assert [(line["epoch"], line["NDCG@10"]) for line in log] == list(enumerate([0.1, 0.5, 0.3, 0.5, 0.2], 1))
    assert torch.equal(final["M.weight"], weights[1]) and not torch.equal(weights[1], weights[2])
    assert config["validation"]["epoch"] == 2 and config["validation"].items() <= log[1].items()
    made_by = config["items"], config["max_length"], config["settings"]["patience"], config["data_sha256"]
    assert made_by == (20, 6, 3, teacher.read_interactions(small).sha256)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "13 users, 20 items, 69 interactions"
    marks = [("*" in line, float(line.split()[-3])) for line in lines]  # the best so far, the minutes left
    assert marks == [(True, 3), (True, 9), (False, 10), (False, 7), (False, 0)]
    second = f"epoch 2 loss {log[1]['loss']:.4f} seconds 300.0000 HR@10 0.2500 NDCG@10 0.5000 * at least 9.0"
    assert lines[1].split() == f"{second} min left".split()


def test_validation_is_that_of_evaluate(write_data, sasrec):
    # users in no order, histories shorter and longer than the model takes, two slices, drawn users
    rng = np.random.default_rng(0)
    histories = {int(u): rng.integers(1, 31, rng.integers(1, 20)) for u in rng.permutation(900) + 1}
    data = teacher.read_interactions(write_data(histories | {999: range(1, 31)}))
    users = teacher.training_part(data, 12, 0, 300)[1]
    with_user = lambda module, args, out: (out[0], out[1] + module.P[args[0] % 12][:, None], out[2])  # noqa: E731
    sasrec.register_forward_hook(with_user)
    args = SimpleNamespace(protocol="full", keep_seen=False, seed=0, device="cpu")
    rank = evaluate.rank_all(evaluate.Scorer(sasrec), 12, data, data, users, data.train_end[users], args)
    expected = [evaluate.METRICS[name](rank, 10).mean() for name in ("HR", "NDCG")]
    assert teacher.validate(sasrec, data, users, 12, "cpu") == pytest.approx(expected, abs=1e-9)


def test_the_same_seed_gives_the_same_file(small):
    a, _, c = (run(small, f"{SMALL} --seed {seed}", f"{n}.pt2")[0] for n, seed in enumerate((3, 3, 4)))
    assert (small.parent / "new/0.pt2").read_bytes() == (small.parent / "new/1.pt2").read_bytes()
    assert (a["P"] - c["P"]).abs().max() > 0.02  # more than six steps of 0.001 can change


def test_a_run_that_fails_leaves_the_old_files(small, monkeypatch):
    out, log, validate = small.with_name("m.pt2"), small.with_name("m.pt2.log.jsonl"), teacher.validate
    for path in (out, log):
        teacher.write(path, b"old")
    for bad_out in ("data.txt/m.pt2", "."):  # below a file, and a folder
        assert str(small.parent) in fails(small, SMALL, bad_out)
    assert "the loss of epoch 1 is nan; remove" in fails(small, f"{SMALL} --learning-rate 1e30", out)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Path, "write_bytes", lambda path, content: path.write_text("half") / 0)
        teacher.write(out, b"new")
    spoil = lambda model, *rest: model.M.weight.data.fill_(math.nan) is None or validate(model, *rest)  # noqa: E731
    monkeypatch.setattr(teacher, "validate", spoil)  # as after a last step to NaN
    assert "scores of the model are not finite" in fails(small, SMALL, out)
    assert out.read_bytes() == log.read_bytes() == b"old"


def test_as_a_command_bad_input_leaves_no_traceback(tmp_path):
    command = [sys.executable, teacher.__file__, "none.txt", "--out", "m.pt2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "none.txt: No such file or directory\n" and list(tmp_path.iterdir()) == []
