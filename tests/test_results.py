"""results/run.py: its commands are ones that the scripts understand, and its figures by brute force."""

import fnmatch
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import save_data
from scipy import stats

root = Path(__file__).resolve().parent.parent
patches = sorted((root / "results").glob("*/*.patch"))
sys.path.insert(0, str(root / "results"))
import draw  # noqa: E402
import run  # noqa: E402

import evaluate  # noqa: E402


@pytest.mark.parametrize("claim", run.CLAIMS)
def test_every_command_is_understood(claim, monkeypatch):
    runs, understood = list(run.runs_of(claim)), 0
    assert len({name for name, _ in runs}) == len(runs) > 0  # each name once
    for name, commands in runs:
        assert "{" not in name and not any(re.search(r"\{\w+\}", command) for command in commands)
        for command in commands:
            command = command.replace(" -m torch.distributed.run --standalone --nproc-per-node=2", "")
            if not command.startswith("python ") or re.search("prepare|supernet", command):
                continue
            _, script, *argv = shlex.split(command)
            module, asked = importlib.import_module(Path(script).stem), []
            for function in ("train", "search", "build", "evaluate", "split"):
                monkeypatch.setattr(module, function, asked.append, raising=False)
            monkeypatch.setattr(module, "refuse_to_overwrite", lambda *_: None, raising=False)
            if module is evaluate:
                monkeypatch.setattr(module, "print_table", lambda *_: None)
            module.main(argv)
            assert len(asked) == 1 and asked[0].data == argv[0]
            understood += 1
        output = run.output_of(commands[-1])  # what comes after makes use of it
        assert output is None or f"runs/{claim}/{name}" in output
    assert understood >= len(runs)


def test_every_run_that_was_made_is_listed():
    kept = {"make-demo"}  # by make demo itself
    for claim in run.CLAIMS:
        names = {path.stem for path in (run.RUNS / claim).glob("*.json")}
        assert names - kept <= {name for name, _ in run.runs_of(claim)}, claim


def test_variables_of_a_claim_take_all_their_values(monkeypatch, tmp_path):
    (tmp_path / "results" / "claims").mkdir(parents=True)
    text = "# words\n\na-{x}-{y}  x=1,2  y=p,q\n    one {x} \\\n        more\n    two {y}\n"
    text += "\n# words\nb\n    three\n"
    (tmp_path / "results" / "claims" / "some.txt").write_text(text)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    runs = dict(run.runs_of("some"))
    assert list(runs) == ["a-1-p", "a-1-q", "a-2-p", "a-2-q", "b"]
    assert runs["a-2-q"] == ["one 2 more", "two q"] and runs["b"] == ["three"]


def test_a_run_is_made_once_and_leaves_its_figures(monkeypatch, tmp_path, capsys):
    (tmp_path / "results" / "claims").mkdir(parents=True)
    report = '[{"HR@10": 0.5, "NDCG@10": 0.25}]'
    command = f"python evaluate.py data.txt m.pt2 --json && echo '{report}'"
    (tmp_path / "results" / "claims" / "some.txt").write_text(f"a\n    echo x > made\n    {command}\n")
    (tmp_path / "evaluate.py").write_text("")
    for name, value in (("ROOT", tmp_path), ("RUNS", tmp_path / "results" / "runs"), ("CLAIMS", ["some"])):
        monkeypatch.setattr(run, name, value)
    with pytest.raises(SystemExit, match="2"):
        run.main(["some", "--only", "b*"])
    assert "b*: no run is named so" in capsys.readouterr().err
    run.main(["some"])
    found = run.figures("some", "a")
    assert found["NDCG@10"] == 0.25 and found["commands"] == ["echo x > made", command]
    assert (tmp_path / "made").read_text() == "x\n"
    monkeypatch.setattr(run, "make", None)
    run.main(["some"])
    assert "0 of 1 runs" in capsys.readouterr().err
    (tmp_path / "results" / "claims" / "some.txt").write_text("c\n    false\n")
    monkeypatch.undo()


def test_a_supernet_validates_an_architecture_as_its_search_leaves_it(tmp_path):
    histories = {u: [(7 * u + t * t) % 25 + 1 for t in range(4 + u % 8)] for u in range(1, 41)}
    data, out, given = save_data(tmp_path, histories), tmp_path / "out.json", tmp_path / "given.json"
    argv = f"{data} --max-length 6 --cells 1 --nodes 2 --dim 8 --epochs 3 --alpha-warm-up 2 --beta 0"
    argv = f"{argv} --operations conv3 skip --out {out}".split()
    subprocess.run([sys.executable, root / "adarec_search.py", *argv], check=True)
    shutil.copy(out, given)
    evaluate_it = [sys.executable, root / "evaluate.py", data, out.with_suffix(".pt2"), "--split", "valid"]
    report = json.loads(subprocess.run([*evaluate_it, "--json"], capture_output=True, check=True).stdout)[0]

    def validated(folder):
        """NDCG@10 of the architecture `given` in the supernet of the adarec_search.py of `folder`."""
        command = [sys.executable, root / "results" / "supernet.py", given, "--", *argv]
        environment = os.environ | {"PYTHONPATH": str(folder)}
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        shown = "PYTHONPATH=x python results/supernet.py given.json -- data.txt"
        (ndcg,) = run.figures_of("students", shown, found.stdout)["valid"].values()
        return ndcg

    # the student that the search writes has the weights of its supernet
    assert validated(root) == pytest.approx(report["NDCG@10"], abs=1e-6)
    shutil.copy(root / "adarec_search.py", tmp_path)
    patch = ["patch", "adarec_search.py", root / "results" / "ideas" / "paths.patch"]
    subprocess.run(patch, cwd=tmp_path, check=True)
    assert validated(tmp_path) != pytest.approx(report["NDCG@10"], abs=1e-6)


@pytest.mark.parametrize("patch", patches, ids=lambda patch: patch.stem)
def test_every_patch_fits(patch, tmp_path):
    script = re.search(r"^--- (\S+)", patch.read_text()).group(1)
    commands = [command for claim in run.CLAIMS for _, commands in run.runs_of(claim) for command in commands]
    assert any(f" {script} {patch.relative_to(root)}" in command for command in commands)
    (tmp_path / script).parent.mkdir(exist_ok=True)
    made = subprocess.run(["patch", "--fuzz", "0", "-o", tmp_path / script, root / script, patch])
    assert made.returncode == 0 and (tmp_path / script).read_text() != (root / script).read_text()


def test_figures_as_the_notebooks_count_them():
    rank = np.array([1, 1, 2, 3, 7, 9, 10, 11, 19, 20, 21, 400])
    for k in (10, 20):
        found = run.as_published([np.mean(rank <= cut) for cut in range(1, k + 1)])
        assert found == pytest.approx(np.mean((rank < k) / np.log2(rank + 2)))


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
    found = run.of_short_users("data.txt", "".join(chr(48 + rank) for rank in (1, 3, 1)))
    assert found["users to 5"] == 2 and found["NDCG@10 to 5"] == pytest.approx((1 + 0.5) / 2)


@pytest.mark.parametrize("page", draw.PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_tables_are_what_the_runs_say(page):
    text = page.read_text()
    assert text.count("<!-- table ") == text.count("<!-- end -->")
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
    assert f"{scores[3]} before, {scores[4]} after more epochs alone, and {scores[5]} after as many" in page
    assert f"The larger one has {scores[0]} in all three cases" in page
    assert len(set(scores[:3])) == 1


def test_a_claim_is_drawn_without_the_others(monkeypatch, tmp_path):
    shown = draw.drawn("speeds")
    shutil.copytree(run.RUNS / "speed", tmp_path / "speed")
    monkeypatch.setattr(run, "RUNS", tmp_path)
    tables = {name: draw.drawn(name) for name in draw.TABLES}
    assert tables.pop("speeds") == shown != draw.MISSING
    assert len(tables) > 10 and {*tables.values()} == {draw.MISSING}


def test_p_values_pool_seeds_user_by_user():
    rng = np.random.default_rng(0)
    ranks = {name: rng.integers(0, 51, (3, 300)) for name in ("alone", "other")}
    strings = {
        name: {seed: "".join(chr(48 + r) for r in row) for seed, row in enumerate(rows)}
        for name, rows in ranks.items()
    }
    alone, other = (
        np.mean((rows > 0) / np.log2(np.maximum(rows, 1) + 1.0), 0)
        for rows in (ranks["alone"], ranks["other"])
    )
    assert (
        draw.p_value(strings["other"], strings["alone"], 50) == f"{stats.ttest_rel(other, alone).pvalue:.1g}"
    )
    assert draw.p_value(strings["alone"], strings["alone"], 50) == ""
    assert (
        draw.p_value({0: strings["alone"][0]}, {1: strings["other"][1]}, 50) == ""
    )  # no seed that both have


def test_an_architecture_that_was_drawn_twice_counts_once(monkeypatch):
    edges = ["conv3;none,skip", "mean;none,skip", "conv3;none,skip"]
    shown = {f"random{k}-{s}": {"edges": edges[k], "NDCG@10": k % 2 + s} for k in range(3) for s in range(2)}
    shown["random3-0"] = {"edges": "skip;none,skip", "NDCG@10": 3}  # its other seed was not run
    monkeypatch.setattr(draw, "figures", lambda claim, name: shown.get(name.removeprefix("games-"), {}))
    ndcg, names = draw.random_runs("games")
    assert names == edges[:2] and ndcg.tolist() == [[0, 1], [1, 2]]


def test_figures_of_filled_histories_are_of_filled_histories(monkeypatch):
    asked = []
    monkeypatch.setattr(run, "evaluated", lambda *given: asked.append(given) or defaultdict(str))
    monkeypatch.setattr(run, "of_short_users", lambda *_: {})
    run.figures_of("asrep", "python related/asrep.py d.txt --generator g.pt2 --out o.pt2", "")
    assert [given[-2:] for given in asked] == [("--inputs", "o.txt")] * 2


def test_validation_figures_of_both_models(monkeypatch):
    log = [{"teacher_NDCG@10": 0.1, "student_NDCG@10": 0.4}, {"teacher_NDCG@10": 0.3, "student_NDCG@10": 0.2}]
    monkeypatch.setattr(run, "log_of", lambda stem: log)
    monkeypatch.setattr(run, "evaluated", lambda *_: defaultdict(float))
    found = run.both_models("stem", "data.txt")
    assert [(found[kind]["valid"], found[kind]["valid last"]) for kind in run.KINDS] == [
        (0.3, 0.3),
        (0.4, 0.2),
    ]


def test_what_each_p_compares(monkeypatch):
    made = {
        "NDCG@10": 1.0,
        "ms_per_user_compiled": 1.0,
        "ms_per_1000_users_compiled": 1.0,
        "macs": 1,
        "parameters": 1,
    }
    monkeypatch.setattr(draw, "figures", lambda claim, name: made | {"models": [made] * 3, "ranks": name})
    monkeypatch.setattr(draw, "values", lambda *_, **__: np.ones(2))
    monkeypatch.setattr(draw, "gains", lambda *_: np.ones(2))
    monkeypatch.setattr(draw, "p_value", lambda one, other, k=10: f"{one.get(0)} / {other.get(0)}")
    ways = draw.ways().splitlines()[2:]
    assert all(f"beauty5-{way}-0 / beauty5-alone-0" in ways[row] for row, way in ((4, "emd"), (7, "rrd")))
    assert "games-rrd-0 / games-alone-0" in ways[7]
    front = draw.front()
    assert (
        "p, against the teacher | ml-1m-128-taught-0 / ml-1m-teacher | games-64-taught-0 / games-teacher |"
        in front
    )
    assert "games-64-taught-0 / games-64-alone-0" in front
    rows = [row.strip("| ").split(" | ") for row in draw.taught().splitlines()[2:]]
    assert rows[4][4] == "citeulike-cdae-rrd-0 / citeulike-cdae-softmax-0"
    assert rows[2][2] == "citeulike-bpr-published-uniform-0 / citeulike-bpr-alone-0"
    parts = draw.neighbour("asrep", {"a": "A", "b": "B"}, {"x": "X", "y": "Y"}).splitlines()[2:]
    assert [row.strip("| ").split(" | ")[-1] for row in parts] == [
        "a-0 / a-0",
        "b-0 / a-0",
        "x-0 / x-0",
        "y-0 / x-0",
    ]


def test_a_moved_architecture_stands_in_the_row_of_its_data_and_the_column_of_the_other(monkeypatch):
    moved = {"ml-1m-from-games": 0.1, "games-from-with": 0.2}
    monkeypatch.setattr(draw, "values", lambda claim, name, **_: np.full(2, moved.get(name, 0)))
    rows = [row.strip("| ").split(" | ") for row in draw.transfer().splitlines()[2:]]
    assert [[float(cell.split()[0]) for cell in row[1:]] for row in rows] == [
        [0, 0, 0],
        [0.1, 0.2, 0],
        [0, 0, 0],
    ]


def test_what_a_search_can_gain_by_hand(monkeypatch):
    edges = ["conv3;none,skip", "mean;none,skip", "none;none,skip", "skip;none,skip"]
    ndcg = {"random0": 0.10, "random1": 0.20, "random2": 0.30, "random3": 0.40}  # mean 0.25, deviation 0.129
    ndcg |= {"from-with": 0.28, "from-paths": 0.05, "from-held-out": 0.50}
    shown = {f"{name}-{s}": {"NDCG@10": ndcg[name] + 0.02 * s - 0.01} for name in ndcg for s in range(2)}
    for k, one in enumerate(edges):
        shown |= {f"random{k}-{s}": shown[f"random{k}-{s}"] | {"edges": one} for s in range(2)}
    scores = {"": [1, 2, 4, 3], "-paths": [4, 3, 2, 1], "-held-out": [1, 2, 3, 4]}
    shown |= {
        f"supernet{way}": {"valid": dict(zip(edges, score, strict=True))} for way, score in scores.items()
    }
    monkeypatch.setattr(draw, "SETS", {"games": "games"})
    monkeypatch.setattr(draw, "figures", lambda claim, name: shown.get(name.removeprefix("games-"), {}))
    monkeypatch.setattr(draw, "alpha_score", lambda data, one: -edges.index(one) % 4)  # 0, 3, 2, 1
    cells = dict(line.strip("| ").split(" | ") for line in draw.architectures().splitlines()[2:])
    cells |= dict(line.strip("| ").split(" | ") for line in draw.architectures(idea=True).splitlines()[2:])
    assert cells == {
        "mean of random architectures": "0.2500",
        "deviation between them": "0.1291",
        "deviation between seeds": "0.0141",
        "the best of them": "0.4000, +60.0 %",
        "the one of them that the supernet ranks first": "0.3000, +20.0 %, above 2 of 4",
        "the searched one": "0.2800, +12.0 %, above 2 of 4",
        "searched, idea 1": "0.0500, -80.0 %, above 0 of 4",
        "searched, idea 2": "0.5000, +100.0 %, above 4 of 4",
        "rank correlation of NDCG@10 and `alpha` (p)": "0.20 (0.80)",
        "rank correlation of NDCG@10 and the supernet (p)": "0.80 (0.20)",
        "rank correlation of NDCG@10 and the supernet, idea 1 (p)": "-1.00 (0.00)",
        "rank correlation of NDCG@10 and the supernet, idea 2 (p)": "1.00 (0.00)",
    }


@pytest.mark.parametrize("page", draw.PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_each_claim_on_a_page_has_runs(page):
    for claim, _, only in re.findall(r"run\.py (\w+)( --only '([^']+)')?`", page.read_text()):
        if claim != "CLAIM":
            assert any(fnmatch.fnmatch(name, only or "*") for name, _ in run.runs_of(claim)), (claim, only)


def test_alpha_scores_an_architecture_by_its_operations(monkeypatch):
    alpha = np.random.default_rng(0).normal(size=(3, len(list(draw.OPERATIONS))))
    monkeypatch.setattr(
        draw, "made", lambda *_: {"alpha": json.dumps([(alpha * 0).tolist(), alpha.tolist()])}
    )
    p = np.exp(alpha) / np.exp(alpha).sum(1, keepdims=True)
    chosen = [list(draw.OPERATIONS).index(name) for name in ("conv3", "none", "max_pool")]
    expected = np.log(p[[0, 1, 2], chosen]).sum()
    assert draw.alpha_score("games", "conv3;none,max_pool") == pytest.approx(expected)
