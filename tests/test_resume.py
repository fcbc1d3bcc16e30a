"""--resume: a run that was stopped anywhere ends with the files of a run that was not stopped."""

import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_data

import sasrec_teacher

ROOT = Path(__file__).resolve().parent.parent
HISTORIES = {u: [(7 * u + t * t) % 25 + 1 for t in range(4 + u % 8)] for u in range(1, 41)}
LEARN = "--epochs 6 --patience 3 --final-rate 0.1"
TEACHER = "--teacher T.pt2"
PAIR = f"{TEACHER} --student S.pt2"
COMMANDS = {
    "sasrec_teacher": f"--out out.pt2 --max-length 8 --dim 8 {LEARN}",
    "adarec_search": f"--out out.json {TEACHER} --cells 1 --nodes 2 --dim 8 --epochs 6 --alpha-warm-up 1",
    "emd_distill": f"--out out.pt2 {PAIR} {LEARN} --negatives 9",
    "bidirectional_distill": "--out out --base cdae --dims 6 3 --warm-up 2 --epochs 4 --period 3",
    "bidirectional_distill, models given": f"--out out {PAIR} --epochs 4 --period 3 --weight-decay 0.01 0.02",
}
SCRIPTS = [name for name in COMMANDS if "," not in name]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with data, a teacher and a student."""
    path = tmp_path_factory.mktemp("inputs")
    data = save_data(path, HISTORIES)
    for name, dim in (("T.pt2", 8), ("S.pt2", 4)):
        sasrec_teacher.main(f"{data} --max-length 8 --dim {dim} --epochs 0 --out {path / name}".split())
    return path


@pytest.fixture
def call(inputs, tmp_path, monkeypatch):
    """A function that runs a command in its own folder, and stops it at the `stop`-th file *`suffix`."""

    def run(name, folder, *more, suffix="", stop=None):
        written, replace = [], Path.replace
        if not (tmp_path / folder).exists():
            shutil.copytree(inputs, tmp_path / folder)

        def interrupted(path, target):
            written.extend([target] * str(target).endswith(suffix))
            if len(written) == stop:  # the file is complete, but not yet at its place
                raise KeyboardInterrupt
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.chdir(tmp_path / folder)
            patch.setattr(Path, "replace", interrupted)
            argv = ["data.txt", *COMMANDS[name].split(), *map(str, more)]
            importlib.import_module(name.split(",")[0]).main(argv)

    return run


def contents(folder):
    """The bytes of each file of a run."""
    return {path.name: path.read_bytes() for path in folder.glob("out*")}


def results(folder):
    """The models of a run, and its log without the seconds. No other file may be left."""
    models = contents(folder)
    (log,) = (models.pop(name) for name in [*models] if name.endswith(".jsonl"))
    assert models and {Path(name).suffix for name in models} <= {".pt2", ".json"}
    lines = [json.loads(line) for line in log.splitlines()]
    return models, [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_stopped_anywhere_and_resumed_is_a_run_that_was_not_stopped(name, call, tmp_path, capsys):
    call(name, "whole")
    whole = results(tmp_path / "whole")
    for suffix, stop in (("", 1), (".ckpt", 2), (".ckpt", 3)):
        folder = tmp_path / f"{suffix}{stop}"
        with pytest.raises(SystemExit, match="^stopped; --resume goes on .*$"):
            call(name, folder, suffix=suffix, stop=stop)
        assert bool(list(folder.glob("*.ckpt"))) == bool(suffix)
        capsys.readouterr()
        call(name, folder, *["--resume"] * bool(suffix))
        assert results(folder) == whole
        first = f"epoch {whole[1][stop - 1]['epoch']:3}  "
        assert capsys.readouterr().out.splitlines()[1].startswith(first)


# Run has the same text in all scripts (test_copies.py): two scripts are enough, one of them in two ways
@pytest.mark.parametrize("name", ["sasrec_teacher", *(name for name in COMMANDS if "bidirectional" in name)])
def test_what_cannot_be_resumed_is_refused(name, call, tmp_path, inputs, monkeypatch, recwarn):
    def refused(*more):
        before = contents(folder)
        with pytest.raises(SystemExit) as end:
            call(name, "run", *more)
        assert contents(folder) == before and "\n" not in end.value.code
        return end.value.code

    module, folder = importlib.import_module(name.split(",")[0]), tmp_path / "run"
    with pytest.raises(SystemExit, match="stopped"):
        call(name, "run", suffix=".ckpt", stop=3)
    program = torch.export.load(inputs / "S.pt2")
    monkeypatch.setattr(module, "export", lambda *_: program)  # saves time: these runs end before they use it
    assert "a run stopped here; give --resume, or remove the file" in refused()
    assert name != "sasrec_teacher" or "a run stopped here" in refused("--epochs", 0)
    assert refused("--resume", "--learning-rate", 0.1).endswith("it is of a run with another learning_rate")
    assert refused("--resume", "--seed", 1).endswith("it is of a run with another seed")
    changes = [(np, "__version__", "1", "numpy"), (torch, "__version__", "1", "torch")]
    changes += [(module, "PROCESSES", 2, "number of processes"), (module, "__file__", __file__, "script")]
    for where, attribute, value, what in changes:
        with monkeypatch.context() as patch:
            patch.setattr(where, attribute, value)
            assert refused("--resume").endswith(f"it is of a run with another {what}")
    (checkpoint,) = folder.glob("*.ckpt")
    whole = checkpoint.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:-1], b"", b"no checkpoint", b"\x80\x04c"):
        checkpoint.write_bytes(broken)
        recwarn.clear()
        assert refused("--resume").endswith("cannot be resumed: it is not a checkpoint") and not recwarn.list
    checkpoint.unlink()
    assert f"{checkpoint.name}: No such file" in refused("--resume")
    checkpoint.write_bytes(whole)
    if TEACHER in COMMANDS[name]:
        shutil.copy(folder / "S.pt2", folder / "T.pt2")
        assert refused("--resume").endswith("it is of a run with another teacher")
    save_data(folder, HISTORIES | {1: [9, 9, 9]})
    message = "was trained on other data" if TEACHER in COMMANDS[name] else "of a run with another data"
    assert message in refused("--resume")


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_disk_that_is_full_leaves_every_file_whole(name, number, call, tmp_path, monkeypatch):
    if number == 1:
        call(name, "run")
    before, write, calls = contents(tmp_path / "run"), Path.write_bytes, []

    def until_it_is_full(path, content):
        calls.append(path)
        write(path, content[: len(content) // 2] if len(calls) == number else content)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="No space left on device$"):
        patch.setattr(Path, "write_bytes", until_it_is_full)
        call(name, "run", "--seed", "1")
    assert len(calls) == number and (number > 1 or contents(tmp_path / "run") == before)
    read = {".pt2": torch.export.load, ".ckpt": torch.load}
    read[".json"] = lambda path: json.loads(path.read_bytes())
    read[".jsonl"] = lambda path: [json.loads(line) for line in path.read_bytes().splitlines()]
    for path in (tmp_path / "run").glob("out*"):
        read[path.suffix](path)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_killed_and_resumed_is_a_run_that_was_not_killed(name, call, inputs, tmp_path):
    longer = ["--epochs", "30", *["--patience", "30"] * ("--patience" in COMMANDS[name])]
    call(name, "whole", *longer)
    whole, (log,) = results(tmp_path / "whole"), (tmp_path / "whole").glob("*.jsonl")
    seconds = sum(json.loads(line)["seconds"] for line in log.read_text().splitlines()[1:])
    # imported, because a model file holds the name of the module that its classes stand in
    code = f"import {name}; {name}.main()"
    argv = [sys.executable, "-c", code, inputs / "data.txt", *COMMANDS[name].split(), *longer]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for kill in map(str, range(int(os.environ.get("KILLS", 1)))):
        folder = shutil.copytree(inputs, tmp_path / kill)
        process = subprocess.Popen(argv, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE)
        next(line for line in process.stdout if line.startswith("epoch"))
        time.sleep(np.random.default_rng().uniform(0, seconds / 2))  # any moment of the first half
        process.kill()
        assert process.wait() == -9
        call(name, kill, *longer, *["--resume"] * bool(list(folder.glob("*.ckpt"))))
        assert results(folder) == whole
