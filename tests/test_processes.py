"""torchrun: two processes that share out each batch end with the model of the one that takes it whole."""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sasrec_teacher

ROOT = Path(__file__).resolve().parent.parent
HISTORIES = {u: [(7 * u + t * t) % 25 + 1 for t in range(4 + u % 8)] for u in range(1, 41)}
PAIR = "--teacher teacher.pt2 --student student.pt2"
COMMANDS = {  # without dropout, whose random numbers each process has for itself
    "teacher": ("sasrec_teacher", "--loss ce"),
    "teacher, bce": ("sasrec_teacher", "--loss bce --negatives 3"),
    "teacher, sampled": ("sasrec_teacher", "--loss sampled --negatives 9"),
    "search": ("adarec_search", "--teacher teacher.pt2 --cells 1 --nodes 2 --remember"),
    "distillation": ("emd_distill", f"{PAIR} --negatives 9 --learning-rate 0.01"),
    "bidirectional": ("bidirectional_distill", f"{PAIR} --period 2"),
    "bpr": ("bidirectional_distill", "--base bpr --dims 6 3 --warm-up 1 --period 2"),
}
MORE = {
    "sasrec_teacher": "--max-length 8 --dim 8 --dropout 0 --epochs 3",
    "adarec_search": "--dim 8 --dropout 0 --epochs 3 --alpha-warm-up 1",
    "emd_distill": "--epochs 3",
    "bidirectional_distill": "--epochs 3",
}
PROGRAM = """import contextlib, importlib, io, json, os, sys, torch
from torch import distributed as dist
torch.set_default_dtype(torch.float64)
first, single = dist.init_process_group, torch.Tensor.float
dist.init_process_group = lambda *args: dist.is_initialized() or first(*args)  # one meeting for all commands
for name, script, argv in json.loads(sys.argv[1]):
    # what the search makes by `.float()`
    torch.Tensor.float = torch.Tensor.double if script == "adarec_search" else single
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        importlib.import_module(script).main(argv)
    open(f"{name}.{os.environ['RANK']}", "w").write(said.getvalue())"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data, and a teacher and a student of them in float64."""
    path = tmp_path_factory.mktemp("processes")
    lines = [f"{user} {item}\n" for user, items in HISTORIES.items() for item in items]
    (path / "data.txt").write_text("".join(lines))
    torch.set_default_dtype(torch.float64)
    try:
        for name, dim in (("teacher.pt2", 8), ("student.pt2", 4)):
            new = [str(path / "data.txt"), "--max-length", "8", "--dim", str(dim), "--epochs", "0"]
            sasrec_teacher.main([*new, "--dropout", "0", "--out", str(path / name)])
    finally:
        torch.set_default_dtype(torch.float32)
    return path


def argv_of(name, out):
    """The command line of the command `name`, whose files come to the folder `out`."""
    script, options = COMMANDS[name]
    file = {"adarec_search": "out.json", "bidirectional_distill": "out"}.get(script, "out.pt2")
    options = f"{options} {MORE[script]} --batch-size 7"
    return ["data.txt", *options.split(), "--out", f"{out}/{file}"]


def start(folder, commands, rank, **environment):
    """The `rank`-th process of two that run the commands, each a name, a script and its words."""
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    program = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    environment = os.environ | environment
    return subprocess.Popen(program, cwd=folder, env=environment, text=True, stdout=-1, stderr=-1)


@pytest.fixture(scope="module")
def meeting():
    """Where two processes find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def results(folder):
    """The weights of each model in a folder, and the log without the seconds."""
    weights = {}
    for path in folder.glob("*.pt2"):
        state = torch.export.load(path).state_dict
        weights |= {(path.name, key): weight for key, weight in state.items()}
    (log,) = folder.glob("*.log.jsonl")
    lines = map(json.loads, log.read_text().splitlines())
    return weights, [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]


@pytest.fixture(scope="module")
def by_two(folder, meeting):
    """All commands have been run by two processes."""
    commands = [(name, script, argv_of(name, f"{name} two")) for name, (script, _) in COMMANDS.items()]
    two = [start(folder, commands, rank, **meeting) for rank in (0, 1)]
    said = [process.communicate(timeout=400) for process in two]
    assert [process.returncode for process in two] == [0, 0], said


@pytest.mark.parametrize("name", COMMANDS)
def test_two_processes_end_as_one(folder, name, by_two, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    if name == "search":
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    try:
        importlib.import_module(COMMANDS[name][0]).main(argv_of(name, f"{name} one"))
    finally:
        torch.set_default_dtype(torch.float32)
    said, said_0, said_1 = capsys.readouterr().out, *(Path(f"{name}.{rank}").read_text() for rank in (0, 1))
    assert said_1 == "" and said_0.count("\n") == said.count("\n") > 3  # one process prints
    (weights, log), (other_weights, other_log) = (results(folder / f"{name} {n}") for n in ("one", "two"))
    assert weights and weights.keys() == other_weights.keys() and len(log) == len(other_log) > 2
    for key, weight in weights.items():
        assert weight.dtype == torch.float64 or not weight.is_floating_point()
        torch.testing.assert_close(weight, other_weights[key], rtol=0, atol=1e-6)
    for line, other in zip(log, other_log, strict=True):
        assert line.keys() == other.keys()
        for key, value in line.items():
            if key == "edges":
                assert value == other[key]
            else:
                torch.testing.assert_close(torch.tensor(value), torch.tensor(other[key]), rtol=0, atol=1e-6)


def test_processes_that_cannot_work_are_told(folder, meeting, name="search"):
    command = name, COMMANDS[name][0], argv_of(name, f"{name} bad")
    lonely = start(folder, [command], 0)
    one_user = *command[:2], [*command[2], "--batch-size", "1"]
    two = [start(folder, [one_user], rank, **meeting) for rank in (0, 1)]
    for process, what in ((lonely, "RANK is set"), (two[0], "2 processes are too many"), (two[1], "")):
        said, error = process.communicate(timeout=200)
        assert process.returncode == 1 and not said
        assert what in error and error.count("\n") == 1
    assert not (folder / f"{name} bad").exists()


def test_processes_draw_alike_but_for_torchs_own_numbers(monkeypatch):
    drawn, seeds = [], []
    for share in (slice(None), slice(0, None, 2), slice(1, None, 2)):
        monkeypatch.setattr(sasrec_teacher, "share", lambda share=share: share)
        for epoch in (1, 2):
            drawn.append(sasrec_teacher.random_numbers(5, epoch).random())
            seeds.append(torch.initial_seed())
    assert drawn[:2] == drawn[2:4] == drawn[4:] and drawn[0] != drawn[1]
    assert seeds[:2] == seeds[2:4] and len(set(seeds)) == 4
