"""What users get wrong: no file is lost, no number is silently wrong, and each error is one line."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_data, save_model

import bidirectional_distill as bd
import emd_distill as distill
import evaluate
import sasrec_teacher as teacher

HISTORIES = {u: [(7 * u + t * t) % 20 + 1 for t in range(5 + u % 6)] for u in range(1, 41)} | {
    41: range(1, 21)
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A test runs in its own folder, with data and a small untrained model."""
    monkeypatch.chdir(tmp_path)
    save_data(tmp_path, HISTORIES)
    save_model(tmp_path, teacher.SASRec(20, 8, 8, 1, 1, 0.5), 20, 8, "T.pt2")


def run(command):
    """Call the main function of a script."""
    script, *argv = command.split()
    importlib.import_module(script).main(argv)


def fails(command, message, capsys):
    """Check that a command ends with one line which contains `message`, and changes no file."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as end:
        run(command)
    line = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert end.value.code and message in line and "\n" not in line
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


TRAIN = "sasrec_teacher data.txt --dim 8 --max-length 8 --epochs 1 --out"
OVERWRITING = [f"{TRAIN} data.txt", f"{TRAIN} ./data.txt", f"{TRAIN} link.txt", f"{TRAIN} hard.txt"]
OVERWRITING += ["adarec_search data.txt --teacher T.pt2 --out T.json"]
OVERWRITING += ["emd_distill data.txt --student T.pt2 --out T.pt2"]
OVERWRITING += ["bidirectional_distill data.txt --teacher T-teacher.pt2 --student T.pt2 --out T"]
OVERWRITING += ["evaluate ranks.npy T.pt2 --ranks ranks.npy", "dt4sr data.txt --out data.txt"]
OVERWRITING += ["asrep data.txt --start T.pt2 --out T.pt2"]
OVERWRITING += ["asrep data.txt --start T.pt2 --generator S.pt2 --out data.pt2"]
OVERWRITING += [
    f"{name}_distill data.txt --teacher T.pt2 --student S.pt2 --out S.pt2"
    for name in ("dfa", "statistics", "ranking")
]
OVERWRITING += ["domain_distill t-source.txt --split --out t"]


@pytest.mark.parametrize("command", OVERWRITING)
def test_an_output_that_is_an_input_is_refused(command, capsys):
    Path("link.txt").symlink_to("data.txt")
    os.link("data.txt", "hard.txt")
    for copy in ("T-teacher.pt2", "S.pt2"):
        Path(copy).write_bytes(Path("T.pt2").read_bytes())
    Path("t-source.txt").write_bytes(Path("data.txt").read_bytes())
    np.save("ranks.npy", np.loadtxt("data.txt", int))
    fails(command, "is an input", capsys)


def test_a_special_file_is_refused_and_a_link_is_written_through(capsys):
    os.mkfifo("pipe.pt2")
    Path("folder.pt2").mkdir()
    for out in ("pipe.pt2", "folder.pt2"):
        fails(f"{TRAIN} {out}", "not a regular file", capsys)
    Path("target").mkdir()
    Path("link.pt2").symlink_to("target/m.pt2")
    run(f"{TRAIN} link.pt2")
    assert Path("link.pt2").is_symlink() and Path("target/m.pt2").stat().st_size > 1000


def test_a_second_run_on_the_same_files_is_refused(capsys):
    command = [sys.executable, teacher.__file__, "data.txt", *f"{TRAIN} m.pt2 --epochs 999".split()[2:]]
    with subprocess.Popen([*command, "--patience", "999"], stdout=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if line.startswith("epoch"))
        with pytest.raises(SystemExit, match="another run is writing it"):
            run(f"{TRAIN} ./m.pt2 --resume")
        process.kill()


def test_a_resumed_run_needs_its_model_and_no_path(capsys, monkeypatch):
    command = "emd_distill data.txt --student T.pt2 --epochs 3 --out new/m.pt2"
    end_epoch = distill.Run.end_epoch

    def stop_in_epoch_2(self, line, *args, **state):
        if line["epoch"] == 2:
            raise KeyboardInterrupt
        end_epoch(self, line, *args, **state)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped"):
        patch.setattr(distill.Run, "end_epoch", stop_in_epoch_2)
        run(command)
    saved = Path("new/m.pt2").read_bytes()
    Path("new/m.pt2").unlink()
    fails(f"{command} --resume", "a model that the run wrote is missing", capsys)
    Path("new/m.pt2").write_bytes(saved)
    monkeypatch.chdir("new")
    run("emd_distill ../data.txt --student ../T.pt2 --epochs 3 --out m.pt2 --resume")
    assert not Path("m.pt2.ckpt").exists()


IGNORED = {  # commands, and what the error says
    "sasrec_teacher data.txt --out m.pt2 --loss ce --negatives 7": "--negatives",
    "sasrec_teacher data.txt --out m.pt2 --loss bce --negatives 0": "--negatives",
    "sasrec_teacher data.txt --out m.pt2 --max-length 1": "--max-length",
    "sasrec_teacher data.txt --out m.pt2 --dropout 1": "--dropout",
    "sasrec_teacher data.txt --out m.pt2 --device nowhere": "--device",
    f"sasrec_teacher data.txt --out m.pt2 --seed {2**64}": "--seed",
    "adarec_search data.txt --out a.json --gamma 0 --teacher nosuch.pt2": "--gamma 0",
    "adarec_search data.txt --out a.json --random --teacher T.pt2": "--random",
    "adarec_search data.txt --out a.json --random 1 --architecture a.json": "not allowed with",
    "adarec_search data.txt --out a.json --beta inf": "--beta",
    "emd_distill data.txt --out m.pt2 --student T.pt2 --gamma 0 --teacher T.pt2": "--gamma 0",
    "bidirectional_distill data.txt --out b --base bpr --temperature 0": "--temperature",
    "bidirectional_distill data.txt --out b --base bpr --epsilon-exp inf": "--epsilon-exp",
    "bidirectional_distill data.txt --out b --base=bpr --direction=none --negatives=drawn": "needs --direc",
    "bidirectional_distill data.txt --out b --base bpr --teacher T.pt2 --student T.pt2": "a model of --",
    "evaluate data.txt T.pt2 --recommend 99": "no user 99",
}


@pytest.mark.parametrize("command", IGNORED)
def test_an_option_without_effect_or_sense_is_refused(command, capsys):
    fails(command, IGNORED[command], capsys)


STAGE_3 = "emd_distill data.txt --student S.pt2 --out new.pt2"
STAGE_4 = "bidirectional_distill data.txt --teacher T.pt2 --student S.pt2 --samples 1 --out new"


@pytest.mark.parametrize("command, out", [(STAGE_3, "new.pt2"), (STAGE_4, "new-student.pt2")])
def test_a_student_exported_in_training_is_written_with_dropout_off(command, out):
    save_model(Path(), teacher.SASRec(20, 8, 8, 1, 1, 0.5), 20, 8, "S.pt2", training=True)
    run(f"{command} --epochs 1 --learning-rate 0")  # the start stays the best
    program, ids = torch.export.load(out), torch.ones(5, dtype=int)
    first, second = (program.module()(ids, torch.arange(1, 41).view(5, 8) % 20 + 1)[1] for _ in range(2))
    assert torch.equal(first, second)


def test_a_search_that_ends_without_a_path_from_the_input_fails(capsys):
    command = (
        "adarec_search data.txt --operations none --cells 1 --nodes 1 --dim 4 --epochs 1 --alpha-warm-up 0"
    )
    with pytest.raises(SystemExit, match="ignore their input"):
        run(f"{command} --out a.json")
    assert not Path("a.json").exists() and not Path("a.pt2").exists()


def test_a_random_architecture_of_cost_0_is_found():
    run("adarec_search data.txt --random 0 --nodes 4 --cells 1 --dim 4 --out a.json")
    assert {name for row in json.loads(Path("a.json").read_text())["edges"] for name in row} <= {
        "skip",
        "none",
    }


def test_items_that_never_occur_are_no_negatives_candidates_or_recommendations(tmp_path, capsys):
    gaps = {user: [50 * item for item in items] for user, items in HISTORIES.items()}
    data = teacher.read_interactions(save_data(tmp_path, gaps))
    assert "980 item ids below 1,000 never occur" in capsys.readouterr().err
    assert set(data.catalogue) == {*range(50, 1001, 50)}
    users, rng = np.arange(5).repeat(200), np.random.default_rng(0)
    assert not set(teacher.UnseenItems(data).draw(users, rng)) - {*data.catalogue}
    histories, _ = teacher.training_part(data, 8, 0)
    assert not set(teacher.SharedNegatives(data, histories).draw(500, rng)[0].tolist()) - {*data.catalogue}
    # the ranks are those of the same data without gaps, whatever the model says of the other ids
    torch.manual_seed(0)
    model = teacher.SASRec(1000, 8, 8, 1, 1, 0.0)
    save_model(tmp_path, model, 1000, 8, "gaps.pt2")
    model.M = torch.nn.Embedding.from_pretrained(model.M.weight[::50].clone(), freeze=False)
    save_model(tmp_path, model, 20, 8, "dense.pt2")
    run("evaluate data.txt gaps.pt2 --ranks gaps.npy --protocol uniform --negatives 3")
    run("evaluate data.txt gaps.pt2 --recommend 1")
    recommended = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()[-10:]]
    assert all(item % 50 == 0 for item in recommended)
    run("evaluate data.txt gaps.pt2 --ranks gaps.npy")
    save_data(tmp_path, HISTORIES)
    run("evaluate data.txt dense.pt2 --ranks dense.npy")
    assert np.array_equal(np.load("gaps.npy"), np.load("dense.npy"))
    capsys.readouterr()
    run("evaluate data.txt gaps.pt2 --users 1 --json")  # more items than the data have; one user
    json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_items_that_never_occur_teach_no_model(tmp_path, monkeypatch):
    save_data(tmp_path, {user: [2 * item for item in items] for user, items in HISTORIES.items()})
    weights, draw = [], bd.draw_items
    monkeypatch.setattr(bd, "draw_items", lambda p, size, rng: weights.append(p) or draw(p, size, rng))
    options = "--base bpr --dims 3 2 --warm-up 1 --epochs 1 --sampling uniform --out b"
    run(f"bidirectional_distill data.txt {options}")
    weights = np.stack(weights)
    assert weights[:, 1::2].any() and not weights[:, ::2].any()  # odd items never occur; item i is p[i - 1]


def test_a_user_who_has_seen_every_item_is_left_out_and_counted(tmp_path, capsys):
    save_data(tmp_path, HISTORIES | {7: [*range(1, 21), 1, 2]})
    run(f"{TRAIN} m.pt2 --loss bce")
    run("bidirectional_distill data.txt --base cdae --dims 3 2 --warm-up 1 --epochs 1 --out b")
    assert capsys.readouterr().err.count("note: 1 users have seen every item and are left out") == 2
    save_data(tmp_path, {u: [1, 2, 3, 1, 2] for u in range(1, 9)})
    fails(f"{TRAIN} n.pt2 --loss bce", "every user has seen every item", capsys)


def test_parameters_of_tables_are_those_that_the_program_looks_up(tmp_path):
    # 64 items and 64 users, as wide as the model: no shape tells a table from a weight
    save_model(tmp_path, teacher.SASRec(64, 8, 64, 1, 1, 0.0), 64, 8, "wide.pt2")
    save_model(tmp_path, bd.BPR(64, 64, 3), 64, 8, "bpr.pt2")
    data = teacher.read_interactions(save_data(tmp_path, {u: range(1, 65) for u in range(1, 65)}))
    for name, outside in (("wide.pt2", 8 * 64 + 6 * 64**2 + 6 * 64 + 6 * 64), ("bpr.pt2", 0)):
        module, _ = evaluate.load_model(name, data, "cpu")
        assert evaluate.count_parameters(module)[1] == outside


@pytest.mark.parametrize("ratio", [1e6, 1e7, 1e8, 1e9])
def test_transport_is_optimal_when_costs_differ_much(ratio):
    rng = np.random.default_rng(0)
    for n in range(30):
        w_S, w_T = rng.dirichlet(np.ones(2)), rng.dirichlet(np.ones(5))
        D = rng.exponential(size=(2, 5)) if n % 2 else ratio ** -rng.random((2, 5))
        D[rng.integers(2), rng.integers(5)] *= ratio if n % 2 else 1
        first, cheapest = (
            np.zeros(5),
            np.argsort(D[0] - D[1]),
        )  # of two layers, the first takes what is cheapest
        for j in cheapest:
            first[j] = min(w_T[j], w_S[0] - first.sum())
        best = (np.stack([first, w_T - first]) * D).sum()
        assert (distill.transport(w_S, w_T, D) * D).sum() == pytest.approx(best, rel=1e-7)


def test_one_long_history_needs_little_memory(tmp_path):
    def peak(histories):
        save_data(tmp_path, histories)
        program = "import resource, sys, sasrec_teacher; sasrec_teacher.main(sys.argv[1:]);"
        program += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        argv = f"data.txt --dim 8 --max-length 10 --epochs 1 --out {len(histories[1])}.pt2".split()
        environment = os.environ | {"PYTHONPATH": str(Path(teacher.__file__).parent)}
        done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, env=environment)
        return int(done.stdout.split()[-1])

    short = {u: [(7 * u + t) % 100 + 1 for t in range(10)] for u in range(1, 301)}
    assert peak(short | {1: [*range(1, 101)] * 3000}) < 1.5 * peak(short)


def test_titles_that_are_no_text_and_equal_file_names_are_no_problem(tmp_path, capsys):
    Path("data.txt.items.tsv").write_bytes(b"1\tCaf\xe9\n2 no tab\n")
    run("evaluate data.txt T.pt2 --recommend 1")
    Path("other").mkdir()
    Path("other/T.pt2").write_bytes(Path("T.pt2").read_bytes())
    run("evaluate data.txt T.pt2 other/T.pt2")
    assert "other/T.pt2" in capsys.readouterr().out
    command = [sys.executable, evaluate.__file__, "data.txt", "T.pt2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        # no traceback: the data have repeats, which one line notes
        assert re.fullmatch(rb"note: .*\n", process.stderr.read()) and not math.isnan(process.wait())


def test_scores_that_are_nan_are_not_recommended(tmp_path, capsys):
    model = teacher.SASRec(20, 8, 8, 1, 1, 0.0)
    model.M.weight.data[3] = math.nan
    save_model(tmp_path, model, 20, 8, "nan.pt2")
    for options in ("--recommend 1", "", "--protocol uniform --negatives 3"):
        fails(f"evaluate data.txt nan.pt2 {options}", "not finite", capsys)
