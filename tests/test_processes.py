"""torchrun: two processes that share each batch end with the model of one process that takes all of it."""

import importlib
import json
import os
import socket
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_data

import sasrec_teacher

ROOT = Path(__file__).resolve().parent.parent
HISTORIES = {u: [(7 * u + t * t) % 25 + 1 for t in range(4 + u % 8)] for u in range(1, 23)}
NEW = "--max-length 8 --dim 8 --dropout 0"  # random numbers of dropout differ between processes
PAIR = "--teacher T.pt2 --student S.pt2"
COMMANDS = {
    "ce": f"sasrec_teacher --loss ce {NEW}",
    "bce": f"sasrec_teacher --loss bce --negatives 3 {NEW}",
    "sampled": f"sasrec_teacher --loss sampled --negatives 9 {NEW}",
    "search": f"adarec_search {NEW} --teacher T.pt2 --cells 1 --nodes 2 --alpha-warm-up 1 --remember",
    "distillation": f"emd_distill {PAIR} --negatives 9 --learning-rate 0.01",
    "sequence": f"bidirectional_distill {PAIR} --period 1",
    "bpr": "bidirectional_distill --base bpr --dims 6 3 --warm-up 1 --period 2",
}
PROGRAM = """import contextlib, importlib, io, json, os, sys, torch
from torch import distributed as dist
torch.set_default_dtype(torch.float64)
init, to_float32 = dist.init_process_group, torch.Tensor.float
dist.init_process_group = lambda *args: dist.is_initialized() or init(*args)  # once for all commands
for name, script, *argv in json.loads(sys.argv[1]):
    # the search makes some of its tensors by `.float()`
    torch.Tensor.float = torch.Tensor.double if script == "adarec_search" else to_float32
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        importlib.import_module(script).main(argv)
    open(f"{name}.{os.environ['RANK']}", "w").write(printed.getvalue())"""


def words(name, folder):
    """Script and options of a command whose files go to `folder`."""
    (script, *options), out = COMMANDS[name].split(), "out.json" if name == "search" else "out.pt2"
    return [script, "data.txt", *options, "--batch-size", "7", "--epochs", "2", "--out", f"{folder}/{out}"]


def environment_of_two():
    """What torchrun sets for both of two processes on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
    return environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data, two models in float64, and what two processes make of each command."""
    path = tmp_path_factory.mktemp("processes")
    data = save_data(path, HISTORIES)
    torch.set_default_dtype(torch.float64)
    for name, dim in (("T.pt2", 8), ("S.pt2", 4)):
        sasrec_teacher.main(f"{data} {NEW} --dim {dim} --epochs 0 --out {path / name}".split())
    torch.set_default_dtype(torch.float32)
    environment = environment_of_two()
    commands = [[name, *words(name, f"two {name}")] for name in COMMANDS]
    argv = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    ranks = ({"RANK": rank, "LOCAL_RANK": rank} for rank in "01")
    two = [subprocess.Popen(argv, cwd=path, env=environment | rank, text=True, stderr=-1) for rank in ranks]
    errors = [process.communicate(timeout=400)[1] for process in two]
    assert [process.returncode for process in two] == [0, 0], errors
    return path


def results(folder):
    """The weights of each model in a folder, and the log without the seconds."""
    states = {path.name: dict(torch.export.load(path).state_dict) for path in folder.glob("*.pt2")}
    (log,) = folder.glob("*.log.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return states, [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]


@pytest.mark.parametrize("name", COMMANDS)
def test_two_processes_end_as_one(folder, name, monkeypatch, capsys, float64):
    monkeypatch.chdir(folder)
    script, *argv = words(name, f"one {name}")
    with monkeypatch.context() as patch:
        if name == "search":
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        importlib.import_module(script).main(argv)
    printed, *of_two = capsys.readouterr().out, *(Path(f"{name}.{rank}").read_text() for rank in (0, 1))
    lines = [text.count("\n") for text in (printed, *of_two)]
    assert lines == [lines[0], lines[0], 0] and lines[0] > 2  # one process prints
    states, log = results(folder / f"one {name}")
    other_states, other_log = results(folder / f"two {name}")
    for line in (*log, *other_log):
        line["edges"] = hash(str(line.get("edges")))  # assert_close compares no strings
    weights = [weight for state in states.values() for weight in state.values()]
    assert all(weight.dtype == torch.float64 for weight in weights if weight.is_floating_point())
    assert weights and len(log) > 1
    torch.testing.assert_close((states, log), (other_states, other_log), rtol=0, atol=1e-6)


def test_processes_that_cannot_work_end_with_one_line(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RANK", "0")
    script, *argv = words("search", "bad")
    module = importlib.import_module(script)
    with pytest.raises(SystemExit, match="^RANK is set, but the processes of torchrun cannot connect: .*$"):
        module.main(argv)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_: None)
    monkeypatch.setattr(module, "PROCESSES", 2)
    for rank in (0, 1):
        monkeypatch.setattr(module, "RANK", rank)
        with pytest.raises(SystemExit, match="^2 processes are too many: .*$"):
            module.main([*argv, "--batch-size", "1"])
    assert not Path("bad").exists()


def test_a_process_whose_partner_has_died_ends_with_one_line(folder, monkeypatch):
    monkeypatch.chdir(folder)
    script, *argv = words("ce", "survivor")
    argv = [sys.executable, ROOT / f"{script}.py", *argv, "--epochs", "100000", "--patience", "100000"]
    environment, ranks = environment_of_two(), ({"RANK": rank, "LOCAL_RANK": rank} for rank in "01")
    survivor, partner = (
        subprocess.Popen(argv, env=environment | rank, stdout=-3, stderr=-1, text=True) for rank in ranks
    )
    while not Path("survivor/out.pt2.log.jsonl").exists() and survivor.poll() is None:
        time.sleep(0.1)
    partner.kill()
    error = survivor.communicate(timeout=100)[1]
    partner.communicate()
    lines = [line for line in error.splitlines() if "Warning" not in line]
    assert survivor.returncode == 1 and lines == ["another process of torchrun has ended"]


def test_processes_draw_the_same_but_for_dropout(monkeypatch):
    drawn, seeds = [], []
    for rank, epoch in product((0, 1), (1, 2)):
        monkeypatch.setattr(sasrec_teacher, "RANK", rank)
        rng, batches = sasrec_teacher.epoch_batches(np.arange(1, 50), 7, 5, epoch)
        drawn.append((rng.random(), [batch.tolist() for batch in batches]))
        seeds.append(torch.initial_seed())
    assert drawn[:2] == drawn[2:] and drawn[0] != drawn[1] and len({*seeds}) == 4
