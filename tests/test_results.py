"""results/run.py: its commands are ones that the scripts understand, and its figures by brute force."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

root = Path(__file__).resolve().parent.parent
published = root / "results" / "published"
sys.path.insert(0, str(root / "results"))
import draw  # noqa: E402
import run  # noqa: E402

import evaluate  # noqa: E402


@pytest.mark.parametrize("claim", run.CLAIMS)
def test_every_command_is_understood(claim, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "ROOT", tmp_path)  # where architectures are written
    runs, understood = dict(run.CLAIMS[claim]()), 0
    assert len(runs) == len(list(run.CLAIMS[claim]()))  # each name once
    for commands in runs.values():
        for command in commands:
            script, *argv = shlex.split(command.replace("COST", "0.5").removeprefix(f"{run.TORCHRUN} "))
            if script in ("data/prepare.py", "patch", "-u", run.RECBOLE.split()[0]):  # -u: the peer's
                continue
            module, asked = importlib.import_module(Path(script).stem), []
            for name in ("train", "search", "build", "evaluate", "augment", "split", "write_untrained"):
                monkeypatch.setattr(module, name, asked.append, raising=False)
            if module is evaluate:
                monkeypatch.setattr(module, "print_table", lambda *_: None)
            module.main([*argv, *["--out", "x.json"] * (module is not evaluate and "--out" not in argv)])
            assert len(asked) == 1 and asked[0].data == argv[0]
            understood += 1
    assert understood >= len(runs)


def test_a_run_that_is_not_there_is_no_run_that_is_made(capsys, monkeypatch):
    monkeypatch.setattr(run, "make", None)
    with pytest.raises(SystemExit, match="2"):
        run.main(["teacher", "--only", "gmaes*"])
    assert "gmaes*: no run is named so" in capsys.readouterr().err
    run.main(["bidirectional", "--only", "bpr-start-0"])  # whose JSON is there
    assert "0 runs" in capsys.readouterr().err


@pytest.mark.parametrize("patch", sorted(published.glob("*.patch")), ids=lambda patch: patch.stem)
def test_every_patch_fits(patch, tmp_path):
    script = re.search(r"^--- (\S+)", patch.read_text()).group(1)
    (command,), _ = run.patched(patch.stem, f"{script} DATA")
    assert command.split()[3] == script
    made = subprocess.run(["patch", "--fuzz", "0", "-o", tmp_path / script, root / script, patch])
    assert made.returncode == 0 and (tmp_path / script).read_text() != (root / script).read_text()


def test_operations_are_those_of_the_search():
    assert tuple(importlib.import_module("adarec_search").OPERATIONS) == draw.OPERATIONS


def test_figures_as_the_notebooks_count_them():
    rank = np.array([1, 1, 2, 3, 7, 9, 10, 11, 19, 20, 21, 400])
    found = run.as_published([np.mean(rank <= k) for k in range(1, 41)], (10, 20))
    for k in (10, 20):
        assert found[f"published HR@{k}"] == pytest.approx(np.mean(rank < k))
        assert found[f"published NDCG@{k}"] == pytest.approx(np.mean((rank < k) / np.log2(rank + 2)))


def test_ranks_are_kept_as_characters(monkeypatch, tmp_path):
    rank = np.array([1, 1.5, 2, 10, 50, 50.5, 51, 3000])
    saved = [
        lambda command, **_: np.save(command[-1], np.stack([rank, rank * 0], 1)),
        lambda *_, **__: SimpleNamespace(stdout='[{"NDCG@10": 1}]'),
    ]
    monkeypatch.setattr(run.subprocess, "run", lambda *a, **k: [call(*a, **k) for call in saved][-1])
    found = run.evaluated("data.txt", "model.pt2", [10])
    assert found["NDCG@10"] == 1 and len(found["ranks"]) == len(rank)
    for k in (10, 50):
        expected = np.where(np.ceil(rank) <= k, 1 / np.log2(np.ceil(rank) + 1), 0)
        np.testing.assert_allclose(run.gains(found["ranks"], k), expected)


def test_short_users_are_counted_by_their_training_items(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    lengths = {1: 2, 2: 7, 3: 5, 4: 8}  # of whole histories; user 1 has no test item
    rows = [(user, item + 1) for user, n in lengths.items() for item in range(n)]
    np.savetxt(tmp_path / "data.txt", rows, "%d")
    ranks = "".join(chr(48 + rank) for rank in (1, 3, 1))
    report = dict.fromkeys(("HR@5", "NDCG@5", "MRR@101", "HR@10", "NDCG@10"), 0) | {"ranks": ranks}
    monkeypatch.setattr(run, "evaluated", lambda *_: report)
    found = run.of_neighbour("data.txt", "model.pt2", [])
    assert found["users to 5"] == 2 and found["NDCG@10 to 5"] == pytest.approx((1 + 0.5) / 2)


@pytest.mark.parametrize("page", draw.PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_tables_are_what_the_runs_say(page):
    text = page.read_text()
    assert text.count("<!-- table ") == text.count("<!-- end -->") > 0
    assert draw.filled(text) == text, "python results/draw.py"
    for picture in re.findall(r"\((\S+\.svg)\)", text):
        assert (page.parent / picture).exists()


def test_the_table_of_the_demo_is_what_its_run_says(capsys):
    page, found = (root / "README.md").read_text(), draw.figures("demo", "make-demo")
    shown = {"protocol": "full", "keep_seen": False, "data": "data/ml-100k.txt", "split": "test", "at": [10]}
    shown["compile"] = "ms_per_user_compiled" in found["first"][0]
    evaluate.print_table(found["first"], SimpleNamespace(**shown))
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    block = page[page.index(lines[0]) :]
    assert len(block) > 0 and set(block[: block.index("```")].splitlines()) <= {*lines}
    scores = [f"{report['NDCG@10']:.4f}" for report in found["last"]]
    for kind, (before, alone, bd) in zip(("teacher", "student"), (scores[:3], scores[3:]), strict=True):
        said = f"The {kind}'s NDCG@10 was {before} before, {alone} alone and {bd} with BD."
        assert said in " ".join(page.split())


def test_a_claim_is_drawn_without_the_others(tmp_path):
    shutil.copytree(run.RUNS / "speed", tmp_path / "results" / "runs" / "speed")
    for name in ("draw.py", "run.py"):
        shutil.copy(root / "results" / name, tmp_path / "results" / name)
    show = "import draw, json; print(json.dumps({name: draw.drawn(name) for name in draw.TABLES}))"
    command = [sys.executable, "-c", show]
    made = subprocess.run(command, cwd=tmp_path / "results", capture_output=True, check=True)
    tables = json.loads(made.stdout)
    assert tables.pop("speeds") == draw.drawn("speeds")
    assert len(tables) > 10 and all(draw.MISSING in found for found in tables.values())


def test_p_values_pool_seeds_user_by_user():
    rng = np.random.default_rng(0)
    ranks = {name: [rng.integers(0, 51, 300) for _ in range(3)] for name in ("alone", "other")}
    runs = {
        name: {
            seed: {"student": {"ranks": "".join(chr(48 + r) for r in rank)}} for seed, rank in enumerate(of)
        }
        for name, of in ranks.items()
    }
    gain = {
        name: np.mean([(r > 0) / np.log2(np.maximum(r, 1) + 1.0) for r in of], 0)
        for name, of in ranks.items()
    }
    expected = stats.ttest_rel(gain["other"], gain["alone"]).pvalue
    assert draw.p_value(runs["other"], runs["alone"], "student", 50) == f"{expected:.0e}"
    assert draw.p_value(runs["alone"], runs["alone"], "student", 50) == ""
    del runs["other"][1]["student"]["ranks"]
    assert draw.p_value(runs["other"], runs["alone"], "student", 50) == ""
