"""The four stages one after the other, on synthetic data for which the best possible NDCG@10 is known."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import evaluate


def test_all_four_stages_end_in_one_table(tmp_path, monkeypatch, capsys):
    def run(command):
        script, *argv = command.split()
        importlib.import_module(script).main(argv)

    monkeypatch.chdir(tmp_path)
    run("prepare synthetic --scene markov --users 1000 --items 40 --length 12 --seed 0 --out data.txt")
    best = float(re.search(r"NDCG@10 ([\d.]+)", capsys.readouterr().out)[1])
    options = "--loss bce --max-length 12 --dim 32 --dropout 0.1 --learning-rate 3e-3 --epochs 20"
    run(f"sasrec_teacher data.txt --out T.pt2 {options}")
    log = [json.loads(line) for line in Path("T.pt2.log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == list(range(1, len(log) + 1))
    assert {"epoch", "loss", "HR@10", "NDCG@10", "seconds"} == log[0].keys()
    options = "--cells 2 --nodes 1 --dim 32 --epochs 6 --beta 0.1 --alpha-warm-up 2"
    run(f"adarec_search data.txt --teacher T.pt2 --out searched.json {options}")
    run("emd_distill data.txt --teacher T.pt2 --student searched.pt2 --out student.pt2 --epochs 4")
    run("sasrec_teacher data.txt --out small.pt2 --dim 8 --max-length 12 --loss bce --epochs 5")
    run("bidirectional_distill data.txt --teacher T.pt2 --student small.pt2 --epochs 2 --out bd")
    run("bidirectional_distill data.txt --base bpr --dims 16 8 --warm-up 2 --epochs 2 --out bpr")
    names = ["T", "searched", "student", "small", "bd-teacher", "bd-student", "bpr-teacher", "bpr-student"]
    # the last script as a user runs it
    argv = [sys.executable, evaluate.__file__, "data.txt", *(f"{name}.pt2" for name in names)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    title, *table = done.stdout.splitlines()
    rows = {line[:29].strip(): line[29:].split() for line in table}
    assert "1,000 users" in title and rows[""] == names
    accuracy = dict(zip(names, map(float, rows["NDCG@10"]), strict=True))
    assert 0.9 * best <= accuracy["T"] <= 1.05 * best  # a model can be little better than the best possible
    assert 0.8 * best <= accuracy["student"] <= 1.05 * best
    macs = [int(count.replace(",", "")) for count in rows["multiply-adds, one request"]]
    assert macs[names.index("student")] < macs[names.index("T")]
