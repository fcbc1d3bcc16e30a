"""sasrec_teacher.py against independent oracles: formulas in float64, slow loops, planted data."""

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


@pytest.fixture
def float64():
    """New tensors are float64, so that a comparison may be sharp."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run(data, options, name="m.pt2"):
    """Train; the weights and the config in the model file, and the lines of the log."""
    out = data.parent / "new" / name
    teacher.main([str(data), "--out", str(out), *options.split()])
    extra, log = {"config.json": ""}, Path(f"{out}.log.jsonl")
    weights = torch.export.load(out, extra_files=extra).state_dict
    lines = log.read_text().splitlines() if log.exists() else []
    return dict(weights), json.loads(extra["config.json"]), [json.loads(line) for line in lines]


def fails(data, options="", out="new/m.pt2"):
    """The one line that `main` ends with, on standard error and with status 1; no file is left."""
    before = sorted(data.parent.rglob("*.*"))
    with pytest.raises(SystemExit) as end:
        teacher.main([str(data), "--out", str(data.parent / out), *options.split()])
    assert "\n" not in end.value.code and sorted(data.parent.rglob("*.*")) == before
    return end.value.code


def test_read_interactions(tmp_path):
    text, array = tmp_path / "data.txt", tmp_path / "data.npy"
    text.write_bytes(b"7\t3\r\n7 1\n\n  2   99999999  \n9 4\n9 4\n9 4")
    np.save(array, np.loadtxt(text, dtype=np.int32))
    for file in (text, array):
        user_ids, starts, items = teacher.read_interactions(file)
        assert user_ids.tolist() == [7, 2, 9] and starts.tolist() == [0, 2, 3, 6]
        assert items.tolist() == [3, 1, 99999999, 4, 4, 4]
        assert items.dtype == starts.dtype == user_ids.dtype == np.int64
    np.save(array, np.load(array).astype(np.int64))  # numpy's own kind of numbers stay in the file
    assert isinstance(teacher.read_interactions(array)[2], np.memmap)


def test_bad_data_are_told_with_file_and_line(write_data, tmp_path):
    bad = {"": ": not `user item`", "1 2\n2 3\n1 4\n": ": a user's rows stand apart"}
    rows = ["1", "1 3 4", "1 x", "1 -3", "1 0", "0 2", "1 2.5", f"1 {10**20}", "1 100000000", "\0\1 \2"]
    text, array = tmp_path / "bad.txt", tmp_path / "bad.npy"
    for content, says in (bad | {f"1 2\n\n{row}\n": f", line 3, {row!r}: not" for row in rows}).items():
        text.write_text(content)
        assert fails(text).startswith(f"{text}{says}")
    for table in ([[1, 0]], [[1.0, 2.0]], [1, 2], [[1, 2, 3]], [[1, 2], [2, 2], [1, 3]], "", "1 2"):
        array.write_text(table) if isinstance(table, str) else np.save(array, np.array(table))
        assert fails(array).startswith(f"{array}: ")
    for histories in ({1: [1, 2], 2: [3]}, {1: [1, 2, 3], 2: [4]}):  # none to validate on, none to train on
        assert "no user has 3 interactions" in fails(write_data(histories))
    data = write_data({4: [1, 2, 3, 1, 2], 5: [1, 2, 3]})
    assert "user 4 has seen every item" in fails(data, "--loss bce")


def test_batches_hold_every_user_once_and_little_padding():
    rng = np.random.default_rng(0)
    length = rng.integers(1, 200, 1000)
    batches, others = (teacher.batches_of_like_length(length, 32, rng) for _ in range(2))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    assert max(map(len, batches)) == len(batches) == 32
    assert sum(len(b) * length[b].max() for b in batches) < 1.25 * length.sum()  # in random batches 2 times
    means = [length[batch].mean() for batch in batches]
    assert means != sorted(means) and {*map(tuple, batches)} != {*map(tuple, others)}


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_validation_and_test_items_never_train(write_data, monkeypatch, loss):
    # whatever stands in the places held out, the weights come out the same, bit for bit
    rng, better, results = np.random.default_rng(0), iter(range(9)), []
    monkeypatch.setattr(teacher, "validate", lambda *_: (0.0, float(next(better))))
    histories = {u: rng.permutation(20)[: 1 + u % 9] + 1 for u in range(1, 31)} | {31: np.arange(20) + 1}
    for _ in range(2):
        results.append(run(write_data(histories), f"{SMALL} --loss {loss}")[0])
        for items in histories.values():
            items[-2:] = items[-2:][::-1] % 20 + 1 if len(items) > 2 else items
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_negatives_are_unseen_and_uniform():
    histories, users = [{1, 12}, {5}, {*range(1, 12)}], np.repeat([0, 1, 2], 6000).reshape(9000, 2)
    seen = np.array(sorted(13 * u + i for u, items in enumerate(histories) for i in items))
    drawn = teacher.draw_negatives(users, seen, 12, np.random.default_rng(0))
    for user, history in enumerate(histories):
        counts, unseen = np.bincount(drawn[users == user], minlength=13), sorted({*range(1, 13)} - history)
        assert counts.sum() == counts[unseen].sum() == 6000
        assert user == 2 or stats.chisquare(counts[unseen]).pvalue > 1e-3


def by_hand(weights, items, heads, dropout=1):
    """Hidden states [L+1, T, d] and output [T, d] of one history; `dropout` is a factor in place of each."""

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def layer_norm(x, name):
        centred = x - x.mean(1, keepdim=True)
        x = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    d, hidden = weights["P"].shape[1], []
    x = [math.sqrt(d) * weights["M.weight"][item] + weights["P"][t] for t, item in enumerate(items)]
    x = dropout * torch.stack(x)
    while f"blocks.{len(hidden)}.W_1.weight" in weights:
        block, attended = f"blocks.{len(hidden)}", []
        hidden.append(x)
        epsilon = dropout * weights.get(f"{block}.epsilon", torch.ones(2))
        q, k, v = linear(layer_norm(x, f"{block}.norm_1"), f"{block}.query_key_value").split(d, 1)
        for t in range(len(items)):
            for h in torch.arange(d).split(d // heads):
                score = k[: t + 1, h] @ q[t, h] / math.sqrt(d / heads)
                attended.append(score.softmax(0) @ v[: t + 1, h])
        x = x + epsilon[0] * linear(torch.cat(attended).view(-1, d), f"{block}.projection")
        inner = linear(layer_norm(x, f"{block}.norm_2"), f"{block}.W_1").clamp(min=0)
        x = x + epsilon[1] * linear(inner, f"{block}.W_2")
    return torch.stack([*hidden, x]), layer_norm(x, "norm")


@pytest.mark.parametrize("scaled", [False, True])
def test_block_is_the_papers_equations(scaled, float64):
    torch.manual_seed(0)
    model, items = teacher.SASRec(30, 12, 8, 3, 2, 0.5, scaled).eval(), torch.randint(1, 31, (1, 7))
    for weight in model.parameters():
        weight.data.normal_(std=0.7)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p == 0.5:
            module.register_forward_hook(lambda module, args, output: 1.5 * output)
    hidden, output, item_vectors = model(torch.ones(1), items)
    expected = by_hand(model.state_dict(), items[0], 2, 1.5)
    assert_close((hidden[:, 0], output[0]), expected, atol=1e-9, rtol=1e-9)
    assert item_vectors is model.M.weight


def test_gradient_from_the_future_is_exactly_zero(sasrec):
    kept = []
    sasrec.M.register_forward_hook(lambda module, args, out: out.retain_grad() or kept.append(out))
    for t in range(12):
        _, output, _ = sasrec(torch.ones(2), torch.randint(1, 31, (2, 12)))
        output[:, t].pow(2).sum().backward()
        gradient = kept.pop().grad
        assert (gradient[:, t + 1 :] == 0).all() and (gradient[:, : t + 1].abs().sum(-1) > 0).all()


def test_a_scaled_stack_starts_as_the_identity_and_learns():
    model = teacher.SASRec(10, 5, 8, blocks=8, heads=1, dropout=0.0, scaled=True)
    hidden, output, _ = model(torch.ones(2), torch.randint(1, 11, (2, 5)))
    assert all(torch.equal(h, hidden[0]) for h in hidden)
    output.pow(3).sum().backward()
    assert all((block.epsilon.grad != 0).all() for block in model.blocks)


def test_exported_program_equals_the_module(tmp_path, sasrec):
    torch.export.save(teacher.export(sasrec.train(), 12), tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2").module()
    sasrec.eval()
    for batch, length in [(1, 1), (1, 12), (2, 12), (3, 5), (64, 1), (7, 2)]:
        users, items = torch.arange(batch), torch.randint(0, 31, (batch, length))
        assert_close(program(users, items), sasrec(users, items), atol=1e-5, rtol=1e-5)
    with pytest.raises(Exception, match="12"):
        program(torch.ones(1, dtype=torch.int64), torch.ones(1, 13, dtype=torch.int64))


def loss_of(r, target, kind, negatives, count=None):
    """The loss at one position from its scores r [V+1] and its negatives, each expected `count` times."""
    if kind == "bce":
        return -r[target].sigmoid().log() - sum((1 - r[j].sigmoid()).log() for j in negatives)
    rivals = range(1, len(r)) if kind == "ce" else negatives
    others = sum(r[j].exp() / (1 if kind == "ce" else count[j]) for j in rivals if j != target)
    return (r[target].exp() + others).log() - r[target]


def check_loss(kind, negatives):
    """The loss and its gradients are those of the formula; V = 40, d = 6, N = 300 positions: three slices."""
    torch.manual_seed(0)
    output, item_vectors = torch.randn(300, 6, requires_grad=True), torch.randn(41, 6, requires_grad=True)
    rows, target = negatives.expand(300, -1).tolist(), torch.randint(1, 41, (300,))
    count = torch.rand(41)
    drawn = {"ce": (), "bce": (negatives,), "sampled": (negatives, count[negatives.long()].log())}[kind]
    loss = teacher.LOSSES[kind](output, item_vectors, target, *drawn)
    scores = zip(output @ item_vectors.T, target.tolist(), rows, strict=True)
    expected = sum(loss_of(r, i, kind, row, count) for r, i, row in scores) / 300
    results = [[x, *torch.autograd.grad(x, (output, item_vectors))] for x in (loss, expected)]
    assert_close(*results, atol=1e-12, rtol=1e-12)


def test_ce_loss_is_its_formula(float64):
    check_loss("ce", torch.zeros(0))


@pytest.mark.parametrize("k", [1, 3])
def test_bce_loss_is_its_formula(k, float64):
    check_loss("bce", torch.randint(1, 41, (300, k)))


def test_sampled_loss_is_its_formula_and_leaves_the_target_out(float64):
    check_loss("sampled", torch.tensor([3, 7, 7, 40, 1]))  # 300 targets among 40 meet them all


def test_shared_negatives_are_drawn_as_often_as_said():
    # user 2's rows, 4 to 7, are not of training
    Q = teacher.proposal(np.array([3, 3, 1, 5, 4, 4, 4]), np.array([0]), np.array([4]))
    np.testing.assert_allclose(Q, [0, 0.1 + 1 / 8, 0.1, 0.1 + 1 / 4, 0.1, 0.1 + 1 / 8])


CASES = [("ce", 0, 4, 2), ("bce", 1, 3, 1), ("bce", 3, 1, 1), ("sampled", 2048, 2, 1)]


@pytest.mark.parametrize("kind, k, blocks, heads", CASES)
def test_two_epochs_are_the_formulas(write_data, monkeypatch, float64, kind, k, blocks, heads):
    """Weights, losses and validation of two epochs of three unlike batches, worked out in float64."""
    rng, real, drawn = np.random.default_rng(0), teacher.LOSSES[kind], []
    lengths = {5: 9, 3: 2, 8: 1, 1: 5, 11: 12, 2: 3, 4: 4, 7: 8, 6: 6}  # of 12 items; the model takes 5
    histories = {user: (rng.permutation(12)[:n] + 1).tolist() for user, n in lengths.items()}
    training = {user: items[:-2] if len(items) > 2 else items for user, items in histories.items()}
    past = {user: items[-6:] for user, items in training.items() if len(items) > 1}
    batches, places, positions = [[3, 11], [5, 4, 7], [1, 6]], list(past), sum(map(len, past.values())) - 7
    indices = [np.array([places.index(user) for user in batch]) for batch in batches]
    monkeypatch.setattr(teacher, "batches_of_like_length", lambda *_: indices)
    monkeypatch.setitem(teacher.LOSSES, kind, lambda o, v, t, *n: drawn.append(n) or real(o, v, t, *n))
    options = f"--loss {kind} --blocks {blocks} --heads {heads} --dim 8 --max-length 5 --dropout 0"
    options += " --batch-size 3 --learning-rate 0.03" + " --negatives 3" * (k == 3)
    options += " --final-rate 0.4 --epochs"
    data = write_data(histories)
    w, config, log = run(data, f"{options} 0")
    assert config["validation"] is None and not log and ("blocks.0.epsilon" in w) == (blocks >= 4)
    final, _, log = run(data, f"{options} 2")
    w = {name: value.requires_grad_() for name, value in w.items()}
    stands = np.bincount([item for items in past.values() for item in items], minlength=13)
    count = k * (stands / stands.sum() + 1 / 12) / 2  # how often an item is expected among the drawn ones
    m, v, step, after = dict.fromkeys(w, 0.0), dict.fromkeys(w, 0.0), 0, []
    for line in log:
        total, ranks = 0.0, []
        for batch in batches:
            negatives, loss, n = drawn[step][0].tolist() if k else [], 0.0, 0
            if kind == "sampled":  # about as often as is said: the rarest is expected 94 times
                assert np.bincount(negatives, minlength=13)[1:] == pytest.approx(count[1:], rel=0.5)
            for user in batch:
                scores = by_hand(w, past[user][:-1], heads)[1] @ w["M.weight"].T
                for r, target in zip(scores, past[user][1:], strict=True):
                    row, n = negatives[n] if kind == "bce" else negatives, n + 1
                    assert kind != "bce" or len(row) == k and not {*row} & {*training[user]}
                    loss = loss + loss_of(r, target, kind, row, count)
            step, total = step + 1, total + loss.item()
            gradient = torch.autograd.grad(loss / (positions / 3), w.values())
            for (name, x), g in zip(w.items(), gradient, strict=True):
                m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.98 * v[name] + 0.02 * g**2
                root = (v[name] / (1 - 0.98**step)).sqrt()
                rate = 0.03 * (1 - 0.6 * (step - 1) / 6)
                x.data -= rate * m[name] / (1 - 0.9**step) / (root + 1e-8)
        for user in (user for user, items in histories.items() if len(items) > 2):
            r = w["M.weight"] @ by_hand(w, training[user][-5:], heads)[1][-1]
            rivals = {*range(1, 13)} - {*training[user]}
            ranks.append(sum(r[item] >= r[histories[user][-2]] for item in rivals).item())
        gain = np.mean([(rank <= 10, (rank <= 10) / math.log2(rank + 1)) for rank in ranks], 0)
        found = line["loss"], line["HR@10"], line["NDCG@10"]
        np.testing.assert_allclose(found, [total / positions, *gain], rtol=1e-8)
        after.append({name: value.detach().clone() for name, value in w.items()})
    assert_close(final, after[int(log[1]["NDCG@10"] > log[0]["NDCG@10"])], atol=1e-7, rtol=1e-7)
    assert step == len(drawn) == 6


def test_dropout_keeps_its_share_and_the_mean():
    torch.manual_seed(0)
    dropout, x = teacher.Dropout(0.2), torch.ones(100, 1000, requires_grad=True)
    kept = dropout(x)
    kept.sum().backward()
    assert torch.equal(x.grad, kept) and kept.unique().tolist() == [0, 1.25]
    for axis in (0, 1):  # of each row and column
        n = x.shape[axis]
        assert ((kept > 0).sum(axis) - 0.8 * n).abs().max() < 5 * (0.16 * n) ** 0.5
    assert abs((kept > 0).sum().item() - 80_000) < 4 * 16_000**0.5
    assert not torch.equal(dropout(x), kept) and torch.equal(dropout.eval()(x), x)


def test_dropout_acts_in_every_epoch_of_training_and_never_in_validation(small):
    # nothing is learnt at a rate of 0, so that dropout alone can make epochs differ
    still = f"{SMALL} --learning-rate 0 --epochs 3 --dropout"
    without, log = run(small, f"{still} 0")[2], run(small, f"{still} 0.5")[2]
    assert {line["NDCG@10"] for line in log} == {line["NDCG@10"] for line in without}
    assert [len({round(line["loss"], 6) for line in lines}) for lines in (without, log)] == [1, 3]


def test_the_file_is_of_the_best_epoch_and_patience_counts_from_it(small, monkeypatch):
    scripted, weights = iter([0.1, 0.5, 0.3, 0.5, 0.2, 0.9]), []
    copy = lambda model: weights.append(model.M.weight.detach().clone())  # noqa: E731
    monkeypatch.setattr(teacher, "validate", lambda model, *_: copy(model) or (0.25, next(scripted)))
    final, config, log = run(small, f"{SMALL} --epochs 9 --patience 3")
    assert [(line["epoch"], line["NDCG@10"]) for line in log] == list(enumerate([0.1, 0.5, 0.3, 0.5, 0.2], 1))
    assert {"epoch", "loss", "HR@10", "NDCG@10", "seconds"} == log[0].keys()
    assert torch.equal(final["M.weight"], weights[1]) and not torch.equal(weights[1], weights[2])
    assert config["validation"]["epoch"] == 2 and config["validation"].items() <= log[1].items()
    assert config["data_sha256"] == hashlib.sha256(small.read_bytes()).hexdigest()
    assert (config["items"], config["max_length"], config["settings"]["patience"]) == (20, 6, 3)


def test_validation_is_that_of_evaluate(write_data, sasrec):
    # users in no order, histories too short or longer than the model takes, two slices; drawn users
    rng = np.random.default_rng(0)
    histories = {int(u): rng.integers(1, 31, rng.integers(1, 20)) for u in rng.permutation(900) + 1}
    user_ids, starts, items = data = teacher.read_interactions(write_data(histories | {999: range(1, 31)}))
    judged, other = (teacher.training_part("", starts, 12, np.random.default_rng(s), 300)[3] for s in (0, 1))
    assert len({*judged}) == 300 and {*judged} != {*other}
    of_user_too = lambda module, args, out: (out[0], out[1] + module.P[args[0] % 12][:, None], out[2])  # noqa: E731
    sasrec.register_forward_hook(of_user_too)
    args = SimpleNamespace(protocol="full", keep_seen=False, seed=0, device="cpu")
    rank = evaluate.rank_all(sasrec, 12, data, data, judged, starts[judged + 1] - 2, args)
    hr, ndcg, _ = evaluate.metrics(rank, 10)
    found = teacher.validate(sasrec, user_ids, starts, items, judged, 12, "cpu")
    assert found == pytest.approx((hr.mean(), ndcg.mean()), abs=1e-9)


def test_the_same_seed_gives_the_same_file(small):
    a, _, c = (run(small, f"{SMALL} --seed {seed}", f"{n}.pt2")[0] for n, seed in enumerate((3, 3, 4)))
    assert (small.parent / "new/0.pt2").read_bytes() == (small.parent / "new/1.pt2").read_bytes()
    assert (a["P"] - c["P"]).abs().max() > 0.02  # further than six steps of 0.001: they began apart


def test_report_tells_the_minutes_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(teacher, "time", SimpleNamespace(time=lambda: 1060.0))
    teacher.report(tmp_path / "m.pt2", [{"loss": 0.5}, {"epoch": 2, "loss": 0.25}], 4, 1000.0, "*")
    assert capsys.readouterr().out == "epoch   2  loss 0.2500*; 2.0 min left\n"


def test_weights_that_are_not_finite_are_told_and_nothing_is_overwritten(small, monkeypatch):
    out, log, real = small.with_name("m.pt2"), small.with_name("m.pt2.log.jsonl"), teacher.validate
    out.write_text("old model")
    log.write_text("old log")
    assert "the loss became nan" in fails(small, f"{SMALL} --learning-rate 1e30", out)
    spoil = lambda model, *rest: model.M.weight.data.fill_(math.nan) is None or real(model, *rest)  # noqa: E731
    monkeypatch.setattr(teacher, "validate", spoil)  # the last step was bad
    assert "scores are not finite" in fails(small, SMALL, out)
    assert out.read_text() == "old model" and log.read_text() == "old log"


def test_a_write_that_fails_leaves_the_old_file(small, monkeypatch):
    for out in ("data.txt/m.pt2", "."):  # below a file, and a folder
        assert str(small.parent) in fails(small, SMALL, out)
    teacher.write(small, b"old")
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: path.write_text("half") / 0)
    with pytest.raises(ZeroDivisionError):
        teacher.write(small, b"new")
    assert small.read_bytes() == b"old"


def test_as_a_command_bad_input_leaves_no_traceback(tmp_path):
    command = [sys.executable, teacher.__file__, "none.txt", "--out", "m.pt2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "none.txt: No such file or directory\n" and list(tmp_path.iterdir()) == []
