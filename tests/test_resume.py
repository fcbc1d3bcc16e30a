"""--resume: a run that was stopped anywhere ends with the files of the run that was not."""

import errno
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import sasrec_teacher

ROOT = str(Path(__file__).resolve().parent.parent)
HISTORIES = {u: [(7 * u + t * t) % 25 + 1 for t in range(4 + u % 8)] for u in range(1, 41)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data, and a teacher and a student of them."""
    path = tmp_path_factory.mktemp("resume")
    lines = [f"{user} {item}\n" for user, items in HISTORIES.items() for item in items]
    (path / "data.txt").write_text("".join(lines))
    for name, dim in (("teacher.pt2", 8), ("student.pt2", 4)):
        new = [str(path / "data.txt"), "--max-length", "8", "--dim", str(dim), "--epochs", "0"]
        sasrec_teacher.main([*new, "--out", str(path / name)])
    return path


COMMANDS = {
    "sasrec_teacher": ("out.pt2", "--max-length 8 --dim 8 --epochs 6 --patience 3 --final-rate 0.1"),
    "adarec_search": (
        "out.json",
        "--teacher teacher.pt2 --cells 1 --nodes 2 --dim 8 --epochs 6 --alpha-warm-up 1",
    ),
    "emd_distill": (
        "out.pt2",
        "--teacher teacher.pt2 --student student.pt2 --epochs 6 --patience 3 --final-rate 0.1 --negatives 9",
    ),
    "bidirectional_distill": ("out", "--base cdae --dims 6 3 --warm-up 2 --epochs 4 --period 3"),
    "bidirectional_distill, models given": (
        "out",
        "--teacher teacher.pt2 --student student.pt2 --epochs 4 --period 3 --weight-decay 0.01 0.02",
    ),
}
MODELS = {"adarec_search": ["out.pt2", "out.json"], "sasrec_teacher": ["out.pt2"], "emd_distill": ["out.pt2"]}


@pytest.fixture
def call(folder, tmp_path, monkeypatch):
    """A function that runs a script in a folder of its own, and stops it at the n-th file of some suffix."""

    def run(script, name, *more, suffix="", stop=None):
        out, options = COMMANDS[script]
        argv = [str(folder / word) if word.endswith(".pt2") else word for word in options.split()]
        argv = [str(folder / "data.txt"), *argv, "--out", str(tmp_path / name / out), *map(str, more)]
        written, replace = [], Path.replace

        def stopped(path, target):
            written.extend([target] * str(target).endswith(suffix))
            if len(written) == stop:  # the file is complete, but not yet at its place
                raise KeyboardInterrupt
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", stopped)
            importlib.import_module(script.split(",")[0]).main(argv)

    return run


def files(folder, script):
    """The models and the log that a run has written, without the seconds in it."""
    out = COMMANDS[script][0]
    models = [
        (folder / name).read_bytes() for name in MODELS.get(script, ["out-teacher.pt2", "out-student.pt2"])
    ]
    lines = [json.loads(line) for line in (folder / f"{out}.log.jsonl").read_text().splitlines()]
    return models, [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines]


def state(folder):
    """Each file's bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("script", COMMANDS)
def test_stopped_anywhere_and_resumed_is_the_run_that_was_not_stopped(script, call, tmp_path, capsys):
    call(script, "whole")
    assert not list((tmp_path / "whole").glob("*.ckpt"))
    for suffix, stop in (("", 1), (".ckpt", 2), (".ckpt", 3)):
        name = f"{suffix}{stop}"
        with pytest.raises(SystemExit) as end:
            call(script, name, suffix=suffix, stop=stop)
        said = capsys.readouterr().err
        assert end.value.code == 130 and said.startswith("stopped") and said.count("\n") == 1
        assert ("--resume goes on" in said) == bool(list((tmp_path / name).glob("*.ckpt"))) == bool(suffix)
        call(script, name, *["--resume"] * bool(suffix))
        epochs = [line["epoch"] for line in files(tmp_path / name, script)[1]]
        assert f"epoch {epochs[stop - 1]:3}" in capsys.readouterr().out or not suffix
        assert files(tmp_path / name, script) == files(tmp_path / "whole", script)
        assert not list((tmp_path / name).glob("*.ckpt"))


# the checks are copies of each other (test_copies.py): two scripts, and both ways of one
@pytest.mark.parametrize(
    "script", ["sasrec_teacher", *(name for name in COMMANDS if "bidirectional" in name)]
)
def test_what_cannot_be_resumed_is_told_and_nothing_touched(
    script, call, tmp_path, folder, monkeypatch, recwarn
):
    def fails(*more):
        before = state(tmp_path / "run")
        with pytest.raises(SystemExit) as end:
            call(script, "run", *more)
        assert state(tmp_path / "run") == before
        assert isinstance(end.value.code, str) and "\n" not in end.value.code
        return end.value.code

    with pytest.raises(SystemExit):
        call(script, "run", suffix=".ckpt", stop=3)
    assert "a run stopped here; --resume it, or remove it" in fails()
    if script == "sasrec_teacher":
        assert "a run stopped here" in fails("--epochs", 0)
    assert "of a run with another learning_rate" in fails("--resume", "--learning-rate", 0.1)
    assert "of a run with another seed" in fails("--resume", "--seed", 1)
    with monkeypatch.context() as patch:
        patch.setattr(np, "__version__", "1")
        assert "of a run with another numpy" in fails("--resume")
        module = importlib.import_module(script.split(",")[0])
        patch.setattr(module, "share", lambda: slice(0, None, 2))
        assert "with another number of processes" in fails("--resume")
        patch.setattr(module, "__file__", str(folder / "student.pt2"))
        assert "of a run with another script" in fails("--resume")
    (checkpoint,) = (tmp_path / "run").glob("*.ckpt")
    whole, data = checkpoint.read_bytes(), (folder / "data.txt").read_text()
    for broken in (whole[: len(whole) // 2], whole[:-1], b"", b"no checkpoint", b"\x80\x04c"):
        checkpoint.write_bytes(broken)
        recwarn.clear()
        assert "cannot be resumed: it is damaged" in fails("--resume") and not recwarn.list
    checkpoint.write_bytes(whole)
    (folder / "data.txt").write_text(data.replace("1 8\n", "1 9\n", 1))
    try:
        other = "with another data" if ".pt2" not in COMMANDS[script][1] else "was trained on other data"
        assert other in fails("--resume")
    finally:
        (folder / "data.txt").write_text(data)
    checkpoint.unlink()
    assert f"{checkpoint.name}: No such file" in fails("--resume")


@pytest.mark.parametrize("script", [script for script in COMMANDS if "," not in script])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_full_disk_is_told_and_every_file_is_whole(script, at, call, tmp_path, monkeypatch):
    if at == 1:
        call(script, "run")
    whole, calls = Path.write_bytes, []

    def until_it_is_full(path, content):
        calls.append(path)
        whole(path, content[: len(content) // 2] if len(calls) == at else content)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")

    before = state(tmp_path / "run") if at == 1 else None
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(Path, "write_bytes", until_it_is_full)
        call(script, "run", "--seed", "1")
    assert str(end.value.code).endswith("No space left on device") and len(calls) == at
    for path in (tmp_path / "run").iterdir():
        if path.suffix == ".pt2":
            torch.export.load(path)
        elif path.suffix == ".ckpt":
            torch.load(path, weights_only=True)
        else:
            assert path.suffix in (".json", ".jsonl")
            [json.loads(line) for line in path.read_text().splitlines() if path.suffix == ".jsonl"]
    assert before in (None, state(tmp_path / "run"))


@pytest.mark.parametrize("script", [script for script in COMMANDS if "," not in script])
def test_killed_at_any_moment_and_resumed_is_the_run_that_was_not(script, folder, tmp_path, monkeypatch):
    def argv(name, *more):
        out, options = COMMANDS[script]
        return ["data.txt", *options.split(), "--epochs", "9", "--out", str(tmp_path / name / out), *more]

    monkeypatch.chdir(folder)
    module, rng, tick = importlib.import_module(script), np.random.default_rng(), time.time()
    module.main(argv("whole"))
    took = time.time() - tick
    for kill in map(str, range(int(os.environ.get("KILLS", 1)))):
        program = f"import sys; sys.path.insert(0, {ROOT!r}); import {script}; {script}.main(sys.argv[1:])"
        process = subprocess.Popen(
            [sys.executable, "-c", program, *argv(kill)], text=True, stdout=subprocess.PIPE
        )
        next(line for line in process.stdout if line.startswith("epoch"))
        time.sleep(rng.uniform(0, took))
        process.kill()
        if process.wait() == -9:  # else it was at its end before
            module.main(argv(kill, *["--resume"] * bool(list((tmp_path / kill).glob("*.ckpt")))))
        assert files(tmp_path / kill, script) == files(tmp_path / "whole", script)
        assert not list((tmp_path / kill).glob("*.ckpt"))
