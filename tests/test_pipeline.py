"""The whole path on a small scene whose truth is known, as a user runs it: command after command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command):
    """Standard output of a script; it must end with status 0."""
    argv = [sys.executable, *map(str, command)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A `markov` scene, the best NDCG@10 possible on it, and a teacher trained on it."""
    folder = tmp_path_factory.mktemp("scene")
    data, model = folder / "markov.txt", folder / "runs" / "teacher.pt2"
    size = ["--users", 1500, "--items", 60, "--length", 15]
    said = run("data/prepare.py", "synthetic", "--scene", "markov", *size, "--seed", 0, "--out", data)
    best = float(re.search(r"NDCG@10 ([\d.]+)", said)[1])
    shape = ["--dim", 32, "--max-length", 15, "--dropout", 0.1]
    run(
        "sasrec_teacher.py",
        data,
        "--out",
        model,
        *shape,
        "--learning-rate",
        3e-3,
        "--epochs",
        40,
        "--patience",
        5,
    )
    return data, model, best


def test_the_teacher_reaches_nine_tenths_of_what_is_possible(scene):
    data, model, best = scene
    (report,) = json.loads(run("evaluate.py", data, model, "--json"))
    assert 0.9 * best <= report["NDCG@10"] <= 1.05 * best  # nothing much better than the truth is true


def test_table_and_recommendations_are_printed(scene):
    data, model, _ = scene
    table = run("evaluate.py", data, model)
    assert "NDCG@10" in table and "teacher" in table
    assert "recommends" in run("evaluate.py", data, model, "--recommend", 1)


def test_the_log_has_a_line_an_epoch(scene):
    log = [json.loads(line) for line in Path(f"{scene[1]}.log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == list(range(1, len(log) + 1))
    assert {"epoch", "loss", "HR@10", "NDCG@10", "seconds"} == log[0].keys()


def test_all_four_stages_end_in_one_table(scene):
    data, teacher, best = scene
    folder, shape = teacher.parent, ["--cells", 2, "--nodes", 1, "--dim", 32, "--epochs", 6, "--beta", 0.1]
    run("adarec_search.py", data, "--teacher", teacher, "--out", folder / "searched.json", *shape)
    learned = ["--teacher", teacher, "--student", folder / "searched.pt2"]
    run("emd_distill.py", data, *learned, "--out", folder / "student.pt2", "--epochs", 4)
    for name, dim in [("large", 16), ("small", 8)]:
        shape = ["--dim", dim, "--max-length", 15, "--loss", "bce", "--epochs", 3]
        run("sasrec_teacher.py", data, "--out", folder / f"{name}.pt2", *shape)
    both = ["--teacher", folder / "large.pt2", "--student", folder / "small.pt2", "--epochs", 2]
    run("bidirectional_distill.py", data, *both, "--out", folder / "bd")
    both = ["--base", "bpr", "--dims", 16, 8, "--warm-up", 2, "--epochs", 2]
    run("bidirectional_distill.py", data, *both, "--out", folder / "bpr")
    names = ["teacher", "searched", "student", "large", "small"]
    names += ["bd-teacher", "bd-student", "bpr-teacher", "bpr-student"]
    reports = json.loads(run("evaluate.py", data, *(folder / f"{name}.pt2" for name in names), "--json"))
    assert [Path(report["model"]).stem for report in reports] == names
    by_name = dict(zip(names, reports, strict=True))
    assert 0.8 * best <= by_name["student"]["NDCG@10"] <= 1.05 * best
    assert by_name["student"]["macs"] < by_name["teacher"]["macs"]
    assert len({report["users"] for report in reports}) == 1
