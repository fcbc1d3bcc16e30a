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
    size = ["--users", 1000, "--items", 40, "--length", 12]
    said = run("data/prepare.py", "synthetic", "--scene", "markov", *size, "--seed", 0, "--out", data)
    best = float(re.search(r"NDCG@10 ([\d.]+)", said)[1])
    options = ["--loss", "bce", "--dim", 32, "--dropout", 0.1, "--max-length", 12, "--learning-rate", 3e-3]
    run("sasrec_teacher.py", data, "--out", model, *options, "--epochs", 40, "--patience", 5)
    return data, model, best


def test_the_log_has_a_line_an_epoch(scene):
    log = [json.loads(line) for line in Path(f"{scene[1]}.log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == list(range(1, len(log) + 1))
    assert {"epoch", "loss", "HR@10", "NDCG@10", "seconds"} == log[0].keys()


def test_all_four_stages_end_in_one_table(scene):
    data, teacher, best = scene
    folder, shape = teacher.parent, ["--cells", 2, "--nodes", 1, "--dim", 32, "--epochs", 6, "--beta", 0.1]
    shape += ["--alpha-warm-up", 2]
    run("adarec_search.py", data, "--teacher", teacher, "--out", folder / "searched.json", *shape)
    learned = ["--teacher", teacher, "--student", folder / "searched.pt2"]
    run("emd_distill.py", data, *learned, "--out", folder / "student.pt2", "--epochs", 4)
    shape = ["--dim", 8, "--max-length", 12, "--loss", "bce", "--epochs", 5]
    run("sasrec_teacher.py", data, "--out", folder / "small.pt2", *shape)
    both = ["--teacher", teacher, "--student", folder / "small.pt2", "--epochs", 2]
    run("bidirectional_distill.py", data, *both, "--out", folder / "bd")
    both = ["--base", "bpr", "--dims", 16, 8, "--warm-up", 2, "--epochs", 2]
    run("bidirectional_distill.py", data, *both, "--out", folder / "bpr")
    names = ["teacher", "searched", "student", "small"]
    names += ["bd-teacher", "bd-student", "bpr-teacher", "bpr-student"]
    title, *table = run("evaluate.py", data, *(folder / f"{name}.pt2" for name in names)).splitlines()
    rows = {line[:29].strip(): line[29:].split() for line in table}
    assert "1,000 users" in title and rows[""] == names
    accuracy = dict(zip(names, map(float, rows["NDCG@10"]), strict=True))
    assert 0.9 * best <= accuracy["teacher"] <= 1.05 * best  # nothing much better than the truth is true
    assert 0.8 * best <= accuracy["student"] <= 1.05 * best
    macs = [int(count.replace(",", "")) for count in rows["multiply-adds, one history"]]
    assert macs[names.index("student")] < macs[names.index("teacher")]
