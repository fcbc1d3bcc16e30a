"""Make the runs that results/README.md rests on; each leaves results/runs/CLAIM/NAME.json, for draw.py.

    python results/run.py adarec                     # what is missing, one run after the other
    python results/run.py adarec --only 'games-*'    # of these names; with --list: show them

Data lie in data/: the published files that README.md names, and ml-100k.txt. Models go to runs/CLAIM/. A run
that was interrupted leaves no JSON and is made again; one whose JSON is there, only with --again, as teachers
need to be where runs/ was lost: --only '*-teacher*' --again.
"""

import argparse
import fnmatch
import itertools
import json
import os
import platform
import pstats
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "results" / "runs"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}

# ---- AdaRec: a student that is smaller, faster and as good; made for its scene ---------------------------

SEARCH = "--beta 0.1 --epochs 8 --alpha-warm-up 3 --learning-rate 2e-3"
FALLING = "--final-rate 0 --patience 99"
SHAPE = "--cells 2 --nodes 2 --dim 64"
# per scene: SASRec as the teacher, whose rate falls twice; the student's search, once with the teacher and
# once without; and its training, `short` where many students that have no teacher are compared
SCENES = {
    "ml-1m": {
        "teacher": "--max-length 200 --blocks 8 --dim 128 --heads 2 --batch-size 32 --epochs 10",
        "restart": "--learning-rate 1e-3 --epochs 8",
        "build": "--max-length 200 --dropout 0.1",
        "with": "--batch-size 64 --beta 0.05 --epochs 6 --alpha-warm-up 2 --learning-rate 2e-3",
        "without": f"--batch-size 16 {SEARCH} --negatives 512",
        "train": "--learning-rate 4e-3 --epochs 8 --negatives 512",
        "short": "--learning-rate 4e-3 --epochs 6 --negatives 512",
    },
    "games": {
        "teacher": "--blocks 4 --dim 128 --heads 2 --dropout 0.5 --loss sampled --epochs 12",
        "restart": "--learning-rate 1e-3 --batch-size 128 --negatives 2048 --epochs 6",
    },
    "beauty": {
        "teacher": "--blocks 4 --dim 128 --heads 2 --dropout 0.5 --loss sampled --epochs 8",
        "restart": "--learning-rate 1e-3 --batch-size 128 --negatives 2048 --epochs 5",
    },
}
AMAZON = "--learning-rate 2e-3 --batch-size 128 --negatives 2048"
for options in (SCENES["games"], SCENES["beauty"]):
    options["with"] = options["without"] = f"{SEARCH} --batch-size 128 --negatives 2048"
    options |= {"build": "", "train": f"--epochs 8 {AMAZON}", "short": f"--epochs 4 {AMAZON}"}
TAUGHT = {"emd": "", "none": "", "one-to-one": "--mapping one-to-one", "last": "--mapping last"}


def student(scene, name, path, seed, options):
    """Name and commands of a student of the architecture at `path` that starts from random weights."""
    start = f"runs/adarec/{scene}-{name}-{seed}-start"
    source = f"--architecture {path} {SCENES[scene]['build']} --seed {seed}"
    build = f"adarec_search.py data/{scene}.txt {source} --out {start}.json"
    train = f"emd_distill.py data/{scene}.txt --student {start}.pt2 {options} {FALLING} --seed {seed}"
    return f"{scene}-{name}-{seed}", [build, train]


def architecture(path, edges, dim=64):
    """Write the architecture file `path`, of edges as a run's JSON has them; its path."""
    if edges:
        rows = [row.split(",") for row in edges.split(";")]
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(json.dumps({"cells": 2, "nodes": 2, "dim": dim, "edges": rows}))
    return path


def chosen(scene):
    """The search, "with" its teacher or "without", whose student validates better when trained alone."""
    valid = {n: figures("adarec", f"{scene}-search-{n}-alone-0").get("valid", 0) for n in ("with", "without")}
    return max(valid, key=valid.get)


def edges_of(scene, name=None):
    """The edges that a search found; of both, those that were chosen; None if it was not made."""
    return figures("adarec", f"{scene}-search-{name or chosen(scene)}").get("edges")


def adarec():
    """Name and commands of each run, in order: a later one may read what an earlier one found."""
    for scene, options in SCENES.items():
        data, runs = f"data/{scene}.txt", f"runs/adarec/{scene}"
        yield f"{scene}-teacher-1", [f"sasrec_teacher.py {data} {options['teacher']} {FALLING}"]
        again = f"--student {runs}-teacher-1.pt2 {options['restart']} {FALLING}"
        yield f"{scene}-teacher", [f"emd_distill.py {data} {again}"]
        taught = f"--teacher {runs}-teacher.pt2 --remember"
        for name, teacher in (("with", taught), ("without", "")):
            search = f"{teacher} {options['build']} {SHAPE} {options[name]}"
            yield f"{scene}-search-{name}", [f"adarec_search.py {data} {search}"]
            tried = architecture(f"{runs}-search-{name}.json", edges_of(scene, name))
            yield student(scene, f"search-{name}-alone", tried, 0, options["short"])
        found = architecture(f"{runs}-search.json", edges_of(scene))
        for seed in range(3):
            for name, mapping in TAUGHT.items():
                how = options["train"] + ("" if name == "none" else f" {taught} {mapping}")
                if scene != "beauty":
                    yield student(scene, name, found, seed, how)
    for seed in range(2):  # without a teacher: what was searched against chance, and against other scenes
        for scene, options in SCENES.items():
            data, runs, short = f"data/{scene}.txt", f"runs/adarec/{scene}", options["short"]
            if seed:
                yield student(scene, f"search-{chosen(scene)}-alone", f"{runs}-search.json", seed, short)
            cost = figures("adarec", f"{scene}-search-{chosen(scene)}").get("cost", "COST")
            for k in range(5):
                draw = f"{options['build']} {SHAPE} --random {cost} --seed {k}"
                name, commands = student(scene, f"chance{k}", f"{runs}-chance{k}.json", seed, short)
                draw = f"adarec_search.py {data} {draw} --out {runs}-chance{k}.json"
                yield name, [draw, *commands]
            for other in SCENES:
                moved = architecture(f"{runs}-from-{other}.json", edges_of(other))
                if other != scene:
                    yield student(scene, f"from-{other}", moved, seed, short)


# ---- AdaRec with students of today, which have no position vectors ---------------------------------------

TEACHER = "--dim 128 --heads 2 --final-rate 0 --patience 99"
# of each data set: the teacher, and what its search, all its students and the short runs need
SETS = {
    "ml-1m": {
        "teacher": "--max-length 200 --blocks 8 --batch-size 32 --epochs 16",
        "build": "--max-length 200",
    },
    "games": {"teacher": "--blocks 4 --dropout 0.5 --loss sampled --epochs 18", "build": ""},
    "beauty5": {
        "teacher": "--blocks 4 --dropout 0.5 --loss sampled --batch-size 64 --epochs 40",
        "build": "",
    },
}
RECIPE = "--batch-size 64 --learning-rate 4e-3 --negatives 2048 --final-rate 0 --patience 99"
LONG, BRIEF = f"{RECIPE} --epochs 24", f"{RECIPE} --epochs 6"


def student_of(data, name, path, seed, options):
    """Name and commands of a student of the architecture at `path`, from random weights."""
    start, build = f"runs/students/{data}-{name}-{seed}-start", SETS[data]["build"]
    built = f"adarec_search.py data/{data}.txt --architecture {path} {build} --seed {seed} --out {start}.json"
    train = f"emd_distill.py data/{data}.txt --student {start}.pt2 {options} --seed {seed}"
    return f"{data}-{name}-{seed}", [built, train]


def better_search(data):
    """The edges of the search, with its teacher or without, whose student validates better trained alone."""
    found = [figures("students", f"{data}-search-{how}") for how in ("with", "without")]
    valid = [figures("students", f"{data}-from-{how}-0").get("valid", 0) for how in ("with", "without")]
    return found[int(np.argmax(valid))].get("edges")


def students():
    """A teacher for each data set; searches; students of three widths, with the teacher and alone; chance."""
    for data, options in SETS.items():
        file, runs = f"data/{data}.txt", f"runs/students/{data}"
        yield f"{data}-teacher", [f"sasrec_teacher.py {file} {options['teacher']} {TEACHER}"]
        taught = f"--teacher {runs}-teacher.pt2 --remember"
        for how, teacher in (("with", taught), ("without", "")):
            search = f"adarec_search.py {file} {teacher} {options['build']} {SHAPE} {SEARCH}"
            yield f"{data}-search-{how}", [f"{search} --batch-size 64 --negatives 2048"]
            path = architecture(
                f"{runs}-{how}.json", figures("students", f"{data}-search-{how}").get("edges")
            )
            yield student_of(data, f"from-{how}", path, 0, BRIEF)
        for seed, dim in itertools.product(range(3), (64, 128, 32)):
            path = architecture(f"{runs}-{dim}.json", better_search(data), dim)
            for name, teacher in (("taught", taught), ("alone", "")):
                yield student_of(data, f"{dim}-{name}", path, seed, f"{LONG} {teacher}")
        commands, models = [], f"{runs}-teacher.pt2"
        for dim in (64, 128, 32):  # untrained, since training does not change the time
            path = architecture(f"{runs}-{dim}.json", better_search(data), dim)
            build = f"adarec_search.py {file} --architecture {path} {options['build']}"
            commands.append(f"{build} --out {runs}-{dim}-untrained.json")
            models += f" {runs}-{dim}-untrained.pt2"
        yield f"{data}-latency", [*commands, f"evaluate.py {file} {models} --users 100 --compile --json"]
        cost = figures("students", f"{data}-search-with").get("cost", "COST")
        for k, seed in itertools.product(range(12), range(2)):
            path = f"{runs}-random{k}.json"
            draw = (
                f"adarec_search.py {file} {options['build']} {SHAPE} --random {cost} --seed {k} --out {path}"
            )
            name, commands = student_of(data, f"random{k}", path, seed, BRIEF)
            yield name, [draw, *commands]


def demo():
    """That of `make demo`, with three seeds."""
    for seed in range(3):
        data, runs, same = "data/ml-100k.txt", "runs/demo/", f"--seed {seed}"
        yield f"teacher-{seed}", [f"sasrec_teacher.py {data} {same}"]
        taught = f"--teacher {runs}teacher-{seed}.pt2 --remember"
        yield f"search-{seed}", [f"adarec_search.py {data} {taught} --cells 1 --nodes 2 --dim 32 {same}"]
        start = f"{runs}start-{seed}"
        source = f"--architecture {runs}search-{seed}.json {same} --out {start}.json"
        for name, teacher in (("student", taught), ("alone", "")):
            train = f"--student {start}.pt2 {teacher} --epochs 30 {FALLING} {same}"
            build = f"adarec_search.py {data} {source}"
            yield f"{name}-{seed}", [build, f"emd_distill.py {data} {train}"]


def planted():
    """Scenes whose truth is known: the next item depends on the item `lag` places back; default options."""
    for lag in (2, 4, 6):
        for seed in range(10):
            d = f"runs/planted/lag-{lag}-{seed}.txt"
            scene = f"data/prepare.py synthetic --scene lag --lag {lag} --seed {seed} --out {d}"
            yield f"lag-{lag}-{seed}", [scene, f"adarec_search.py {d} --cells 1 --nodes 1 --seed {seed}"]


# ---- Bidirectional distillation: do both models gain? -----------------------------------------------------

PUBLISHED = "--sign published --negatives drawn"
TOGETHER = {  # how both models go on from the same warm-up; drawn negatives are published for BPR alone
    "alone": "--direction none",
    "published": PUBLISHED,
    "published-half": f"{PUBLISHED} --temperature inf",
    "published-lambda-0": f"{PUBLISHED} --lambda-teacher 0 --lambda-student 0",
    "published-uniform": "--sign published",
    "published-uniform-half": "--sign published --temperature inf",
    "published-tau-10": f"{PUBLISHED} --temperature 10",  # published are 5 of BPR and 2 of CDAE
    "published-uniform-tau-10": "--sign published --temperature 10",
    "paper": "",
    "paper-half": "--temperature inf",
    "top": "--sampling top",
    "published-gentle": f"{PUBLISHED} --lambda-teacher 0.05",
    "top-lambda-0": "--sampling top --negatives drawn --lambda-teacher 0 --lambda-student 0",
    "alone-knowing": "--direction none",  # negatives are never validation or test items, as published
}
# a decay of the student while both train, on the published sums and on our means: one is chosen on validation
DECAYS = {"1e-3": 7.8e-6, "1e-2": 7.8e-5, "1e-1": 7.8e-4}
DECAYED = {
    f"{name}-decay-{decay}": f"{TOGETHER[name]} --weight-decay 0 {ours}"
    for name in ("alone", "published")
    for decay, ours in DECAYS.items()
}
# the same of CDAE, alone, where both have one
DECAYED_BOTH = {
    f"alone-both-decay-{decay}": f"--direction none --weight-decay {ours} {ours}"
    for decay, ours in {"1e-4": 3.4e-8, "1e-3": 3.4e-7, "1e-2": 3.4e-6}.items()
}
EARLY = {0: 110, 1: 130, 2: 150}  # the epochs of the warm-up in which CDAE's teacher validated best
# two sizes of SASRec by binary cross-entropy, and how they go on
BCE = "--negatives 8 --final-rate 0.1 --learning-rate 2e-3 --patience 99"
PAIRS = {
    "ml-1m": f"{BCE} --max-length 200 --epochs 100",
    "games": f"{BCE} --dropout 0.5 --epochs 30",
}
GENTLE, NO_BD = (f"--lambda-teacher {weight} --lambda-student {weight}" for weight in (0.05, 0))
KINDS = "teacher", "student"
SEQUENCES = {name: TOGETHER[name] for name in ("alone", "paper", "paper-half", "top")}
SEQUENCES |= {  # the other's best items as negatives of L_CF; and beside them, gently, its labels
    "published-uniform": TOGETHER["published-uniform"],
    "sampled-uniform": "--sampling uniform",
    "paper-gentle": GENTLE,
    "top-gentle": f"--sampling top {GENTLE}",
    "top-half": "--sampling top --temperature inf",
    "drawn-top": "--sampling top --negatives drawn",
    "drawn-top-gentle": f"--sampling top --negatives drawn {GENTLE}",
    "drawn-top-lambda-0": f"--sampling top --negatives drawn {NO_BD}",
    "drawn-lambda-0": f"--negatives drawn {NO_BD}",
}


def patched(name, command):
    """Commands that make a copy of a script with results/published/NAME.patch, and that run it instead."""
    script, _, options = command.partition(" ")
    copy = f"runs/published/{name}/{script}"
    (ROOT / copy).parent.mkdir(parents=True, exist_ok=True)
    return [f"patch -o {copy} {script} results/published/{name}.patch"], f"{copy} {options}".strip()


def bidirectional():
    """BPR and CDAE on citeulike in the published regime: a warm-up, and each way to go on from it."""
    for base, seed in (("bpr", 0), ("bpr", 1), ("bpr", 2), ("cdae", 0), ("cdae", 1), ("cdae", 2)):
        script = f"bidirectional_distill.py data/citeulike.txt --base {base} --seed {seed}"
        runs = "runs/bidirectional"
        teacher = f"--teacher {runs}/{base}-start-{seed}-teacher.pt2"
        yield f"{base}-start-{seed}", [f"{script} --epochs 0"]
        if base == "cdae":
            yield f"cdae-early-{seed}", [f"{script} --warm-up {EARLY[seed]} --epochs 0"]
        for name, options in {**TOGETHER, **(DECAYED if base == "bpr" else DECAYED_BOTH)}.items():
            knows = name == "alone-knowing"
            patch, how = patched("negatives", script) if knows else ([], script)
            student = f"--student {runs}/{base}-start-{seed}-student.pt2"
            if base == "bpr":
                # beside a student that goes on alone with a decay stands the same without: it is small
                other = (
                    student.replace("--student", "--teacher") if name.startswith("alone-decay") else teacher
                )
                yield f"{base}-{name}-{seed}", [*patch, f"{how} {other} {student} {options}"]
            elif "drawn" not in options:
                yield f"{base}-{name}-{seed}", [*patch, f"{how} {teacher} {student} {options} --epochs 200"]
    for scene, options in PAIRS.items():
        for seed in range(3):
            data, runs, same = f"data/{scene}.txt", f"runs/bidirectional/{scene}", f"--seed {seed}"
            for kind, dim in (("teacher", 64), ("student", 16)):
                how = f"--loss bce --dim {dim} {options} {same}"
                yield f"{scene}-{kind}-{seed}", [f"sasrec_teacher.py {data} {how}"]
            pair = f"--teacher {runs}-teacher-{seed}.pt2 --student {runs}-student-{seed}.pt2 {same}"
            few = ("alone", "paper", "top", "top-gentle")
            for name, how in SEQUENCES.items() if scene == "ml-1m" else [(n, SEQUENCES[n]) for n in few]:
                how += " --epochs 10 --samples 8 --batch-size 128"
                yield f"{scene}-{name}-{seed}", [f"bidirectional_distill.py {data} {pair} {how}"]


# ---- The teacher, beside published figures; and what the cost loss is worth ------------------------------

LARGE = "--max-length 200 --blocks 8 --dim 128 --heads 2 --batch-size 32 --epochs 16"
WIDE = "--loss bce --dropout 0.6 --dim 128 --heads 2 --final-rate 0"
TEACHERS = {
    "ml-1m": f"{LARGE} --patience 16",
    "ml-1m-falling": f"{LARGE} {FALLING}",
    "games-64": "--loss bce --negatives 64 --dropout 0.6 --learning-rate 2e-3 --epochs 60 --final-rate 0",
    "games-8-wide": f"{WIDE} --negatives 8 --epochs 60",
    "games-16-wide": f"{WIDE} --negatives 16 --epochs 60",
    "games-32-wide": f"{WIDE} --negatives 32 --epochs 80 --patience 80",
}
BEAUTY = "--dim 64 --max-length 100 --dropout 0.5"
BETAS = "0", "0.03", "0.1", "0.3", "1", "3"


def teacher():
    """SASRec on the data of published figures; games also among 100 uniform negatives, as there."""
    for seed in range(3):
        for name, options in TEACHERS.items():
            data = "-".join(name.split("-")[: 1 + name.startswith("ml")])
            yield f"{name}-{seed}", [f"sasrec_teacher.py data/{data}.txt {options} --seed {seed}"]
        data, start = "data/beauty.txt", f"runs/teacher/beauty-{seed}-start.pt2"
        build = f"sasrec_teacher.py {data} --epochs 0 {BEAUTY} --seed {seed} --out {start}"
        train = f"--epochs 16 --learning-rate 2e-3 --negatives 2048 --batch-size 128 {FALLING}"
        yield f"beauty-{seed}", [build, f"emd_distill.py {data} --student {start} {train} --seed {seed}"]


def cost():
    """The weight beta of the cost loss: size and accuracy of what a search on games finds."""
    for seed in range(2):
        for beta in BETAS:
            options, runs = SCENES["games"]["without"], "runs/cost/games"
            options = options.replace("--beta 0.1", f"--beta {beta}")
            search = f"adarec_search.py data/games.txt {SHAPE} {options} --seed {seed}"
            yield f"games-{beta}-{seed}", [search]
            start = f"{runs}-{beta}-alone-{seed}-start"
            source = f"--architecture {runs}-{beta}-{seed}.json --seed {seed} --out {start}.json"
            train = f"--student {start}.pt2 {SCENES['games']['short']} {FALLING} --seed {seed}"
            build = f"adarec_search.py data/games.txt {source}"
            yield f"games-{beta}-alone-{seed}", [build, f"emd_distill.py data/games.txt {train}"]


# ---- Where the published code departs from its paper: a patch of our script puts each back ---------------


def published():
    """The demo's search and student as published; what BD's code does is among `bidirectional`."""
    data = "data/ml-100k.txt"
    for seed in range(3):
        runs, same = "runs/published", f"--seed {seed}"
        taught = f"--teacher runs/demo/teacher-{seed}.pt2 --remember"
        shape, train = f"{taught} --cells 1 --nodes 2 --dim 32 {same}", f"--epochs 30 {FALLING} {same}"
        for name, options in {"leak": "", "cost": "--beta 8", "rate": "--alpha-learning-rate 2e-5"}.items():
            patch, script = [], "adarec_search.py"
            if name != "rate":
                patch, script = patched(name, script)
            out = f"{runs}/{name}-{seed}"
            search = f"{script} {data} {shape} {options} --out {out}-found.json"
            build = f"{script} {data} --architecture {out}-found.json {same} --out {out}-start.json"
            learn = f"emd_distill.py {data} --student {out}-start.pt2 {taught} {train}"
            yield f"{name}-{seed}", [*patch, search, build, learn]
        patch, script = patched("kl", "emd_distill.py")
        student = f"--student runs/demo/start-{seed}.pt2"
        yield f"kl-{seed}", [*patch, f"{script} {data} {student} {taught} {train}"]
        patch, script = patched("history", "evaluate.py")
        yield f"history-{seed}", [*patch, f"{script} {data} runs/demo/student-{seed}.pt2 --json"]


# ---- The neighbours of related/ ---------------------------------------------------------------------------

LOSSES = "", "output", "output feature", "output pseudo", "output feature pseudo"
# SASRec and training as ASReP's authors have them, but 50 epochs and a rate that falls from 2e-3 to 0
OF_ASREP = "--dim 128 --heads 4 --max-length 100 --dropout 0.7"
ASREP = "--loss bce --learning-rate 2e-3 --epochs 50"
ROWS = {  # the weights that forward training starts from, and more options
    "sasrec": ("untrained", ""),
    "backwards": ("backward", ""),
    "clean": ("backward", "--generator"),
    "scratch": ("untrained", "--generator"),
    "published": ("backward", "--order published --generator"),
}
OF_DT4SR = "--dim 32 --blocks 1 --heads 2 --dropout 0.5 --epochs 40"
# ways to learn from one teacher, with the same epochs; `emd` and those below are options of emd_distill.py
SAME = "--batch-size 64 --learning-rate 4e-3 --epochs 8"
WAYS = {
    "statistics": "statistics_distill.py",
    "dfa": "dfa_distill.py",
    "rrd": "ranking_distill.py",
    "alone": "",
    "none": "--mapping none",
    "last": "--mapping last",
    "one-to-one": "--mapping one-to-one",
    "emd": "--mapping emd",
}


def related():
    """From one domain to another, on ml-100k."""
    data, runs = "data/ml-100k.txt", "runs/related"
    scene = f"{runs}/scene-target.txt", f"{runs}/scene-source.txt"
    for seed in range(3):
        same, source, target = f"--seed {seed}", f"{runs}/source-{seed}.pt2", f"{runs}/target-{seed}.pt2"
        yield (
            f"source-{seed}",
            [
                f"related/domain_distill.py {data} --split --out {runs}/scene",
                f"sasrec_teacher.py {scene[0]} --dim 32 --epochs 0 {same} --out {target}",
                f"sasrec_teacher.py {scene[1]} --epochs 30 {same} --out {source}",
                f"evaluate.py {scene[0]} {source} --json",
            ],
        )
        for losses in LOSSES:
            how = f"--source {scene[1]} --teacher {source} --student {target} --losses {losses} {same}"
            name = "-".join(["domain", *losses.split(), str(seed)])
            yield name, [f"related/domain_distill.py {scene[0]} {how}"]


def asrep():
    """SASRec; trained backwards first; and with pseudo-prior items, on Beauty 5-core."""
    data, runs = "data/beauty5.txt", "runs/asrep"
    for seed in range(3):
        start = f"{runs}/untrained-{seed}.pt2"
        build = f"sasrec_teacher.py {data} --epochs 0 {OF_ASREP} --seed {seed} --out {start}"
        backward = f"related/asrep.py {data} --start {start} --reverse {ASREP} --seed {seed}"
        yield f"backward-{seed}", [build, backward]
        for name, (weights, more) in ROWS.items():
            more += f" {runs}/backward-{seed}.pt2" if more else ""
            how = f"--start {runs}/{weights}-{seed}.pt2 {more} {ASREP} --seed {seed}"
            yield f"{name}-{seed}", [f"related/asrep.py {data} {how}"]


def dt4sr():
    """A product or a distance of Gaussians, under BPR and under a softmax, on Beauty 5-core."""
    for seed, score, loss in itertools.product(range(3), ("dot", "wasserstein"), ("bpr", "ce")):
        how = f"--score {score} --loss {loss} {OF_DT4SR} --seed {seed}"
        yield f"{score}-{loss}-{seed}", [f"related/dt4sr.py data/beauty5.txt {how}"]


def ways():
    """Ways to distil: the teachers and the students, 64 wide, are those of `students`."""
    for seed, data, (name, how) in itertools.product(range(3), ("beauty5", "games"), WAYS.items()):
        file, start = f"data/{data}.txt", f"runs/ways/{data}-{name}-{seed}-start"
        path = architecture(f"runs/students/{data}-64.json", better_search(data))
        build = f"adarec_search.py {file} --architecture {path} --seed {seed} --out {start}.json"
        teacher = f"--teacher runs/students/{data}-teacher.pt2"
        if not how.endswith(".py"):
            teacher = f"{teacher} {how} --remember" if how else ""
            how, teacher = "../emd_distill.py", f"{teacher} {FALLING}"
        train = f"related/{how} {file} --student {start}.pt2 {teacher} {SAME} --seed {seed}"
        yield f"{data}-{name}-{seed}", [build, train.replace("related/../", "")]


# ---- Speed: both sides in turn, seconds of an epoch by their logs ----------------------------------------

LIKE_PEER = "--loss bce --dim 50 --dropout 0.5 --epochs 2"
PEER = "-u main.py --train_dir=x --device=cpu --hidden_units=50 --num_epochs=2 --dropout_rate=0.5"
LIKE_RECBOLE = "--max-length 50 --dim 50 --dropout 0.5 --batch-size 256 --epochs 2"
RECBOLE = "runs/recbole/bin/python results/recbole_epoch.py"
OF_RECBOLE = "recbole==1.2.1 torch==2.13.0 setuptools<81 numpy<2 scipy<1.14 pandas<2.3 scikit-learn<1.6"
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node=2"


def speed():
    """The teacher beside pmixer/SASRec.pytorch and RecBole's SASRec, which has a row for each position; the
    loss over all items, and the supernet, as is usual.
    """
    for scene, length in (("games", 50), ("ml-1m", 200)):
        teacher = f"sasrec_teacher.py data/{scene}.txt --max-length {length}"
        yield f"peer-{scene}", [f"{teacher} {LIKE_PEER}", f"{PEER} --dataset={scene} --maxlen={length}"]
    teacher = f"sasrec_teacher.py data/citeulike.txt {LIKE_RECBOLE}"
    yield "recbole-citeulike", [teacher, f"{RECBOLE} data/citeulike.txt"]
    teacher = "sasrec_teacher.py data/ml-1m.txt --max-length 200"
    patch, other = patched("softmax", f"{teacher} --epochs 2")
    yield "softmax", [f"{teacher} --epochs 2", *patch, other]
    shape = "--max-length 200 --cells 2 --nodes 2 --epochs 1 --alpha-warm-up 0"
    search = f"adarec_search.py data/ml-1m.txt {shape}"
    patch, other = patched("operations", search)
    yield "operations", [search, *patch, other]


def processes():
    """An epoch of ml-1m in two processes of one thread against one, and what a checkpoint adds to it."""
    data, T = "data/ml-1m.txt", "runs/processes/sasrec_teacher-0.pt2"
    for script, options in {
        "sasrec_teacher": "--max-length 200",
        "adarec_search": f"--teacher {T} --cells 1 --nodes 2 --batch-size 64 --alpha-warm-up 0",
        "emd_distill": f"--student {T} --teacher {T} --batch-size 64",
        "bidirectional_distill": f"--teacher {T} --student {T} --batch-size 128",
    }.items():
        command = f"{script}.py {data} {options} --epochs 1"
        yield script, [command, f"{TORCHRUN} {command}"]


def long_histories(data, least):
    """Write the users of `data` who have `least` interactions or more, and return the path."""
    path, source = f"data/{data}-long.txt", ROOT / f"data/{data}.txt"
    if source.exists() and not (ROOT / path).exists():
        rows = np.loadtxt(source, int)
        np.savetxt(ROOT / path, rows[np.bincount(rows[:, 0])[rows[:, 0]] >= least], "%d")
    return path


def serving():
    """Latency and multiply-adds of a request: untrained models, each on the items that it needs, compiled."""
    shapes = {"ml-1m": "--max-length 200 --blocks 8", "games": "--blocks 4", "beauty5": "--blocks 4"}
    for data, shape in shapes.items():
        runs, file, longest = f"runs/serving/{data}", f"data/{data}.txt", ""
        if data == "ml-1m":
            longest = "--max-length 200"
        teacher = f"sasrec_teacher.py {file} {shape} --dim 128 --heads 2 --epochs 0"
        commands, models = [f"{teacher} --out {runs}-teacher.pt2"], f"{runs}-teacher.pt2"
        for dim in (32, 64, 128):
            path = architecture(f"{runs}-{dim}.json", "conv5;conv5,avg_pool", dim)
            build = f"adarec_search.py {file} --architecture {path} {longest}"
            commands.append(f"{build} --out {runs}-student-{dim}.json")
            models += f" {runs}-student-{dim}.pt2"
        yield data, [*commands, f"evaluate.py {file} {models} --users 100 --compile --json"]
        if data == "ml-1m":  # and requests of whole length
            long = long_histories(data, 200)
            yield f"{data}-long", [f"evaluate.py {long} {models} --users 100 --compile --json"]


TIMED = {"speed": speed, "processes": processes}
CLAIMS = {"teacher": teacher, "cost": cost, "adarec": adarec, "demo": demo, "planted": planted}
CLAIMS |= {
    "students": students,
    "bidirectional": bidirectional,
    "published": published,
    "related": related,
    "asrep": asrep,
    "dt4sr": dt4sr,
    "ways": ways,
    "serving": serving,
}
CLAIMS |= TIMED

NUMBERS = {  # sections of results/README.md, and what they need
    "1": ["teacher", "adarec", "related"],
    "2": ["adarec"],
    "3": ["adarec"],
    "4": ["planted", "adarec", "demo"],
    "5": ["adarec", "related"],
    "6": ["cost"],
    "7": ["bidirectional"],
    "8": ["speed"],
    "9": ["processes"],
    "10": ["demo", "published"],
    "11": ["related", "asrep", "dt4sr", "ways"],
}

# ---- One run ---------------------------------------------------------------------------------------------


def figures(claim, name):
    """The JSON of a run, empty if it was not made."""
    path = RUNS / claim / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def words(command, python):
    """The words of a command; those of a script begin with `python`."""
    return [python] * (not command.startswith("patch ")) + shlex.split(command)


def seconds_of_epoch(command, out):
    """Run `command`, one of ours with --out `out`; the seconds of its last epoch."""
    if command.startswith(PEER[:10]):
        return seconds_of_pmixer(command)
    if command.startswith(RECBOLE):
        return seconds_of_recbole(command)
    (ROOT / f"{out}.ckpt").unlink(missing_ok=True)  # of a run that was interrupted
    argv = words(f"{command} --out {out}", sys.executable)
    subprocess.run(argv, cwd=ROOT, check=True, stdout=2, env=ONE_THREAD)
    return log_of(out)[-1]["seconds"]


def seconds_of_pmixer(command):
    """The same of pmixer/SASRec.pytorch, which is fetched once; it tells when a step ends."""
    if not (ROOT / "runs/SASRec.pytorch").exists():
        clone = "git clone -q https://github.com/pmixer/SASRec.pytorch runs/SASRec.pytorch"
        subprocess.run(shlex.split(clone), cwd=ROOT, check=True)  # as it was in November 2026
    peer = ROOT / "runs/SASRec.pytorch/python"
    ended, data = {}, re.search(r"dataset=(\S+)", command)[1]
    shutil.copy(ROOT / f"data/{data}.txt", peer / f"data/{data}.txt")
    split = words(command, sys.executable)
    with subprocess.Popen(split, stdout=subprocess.PIPE, text=True, cwd=peer, env=ONE_THREAD) as process:
        for line in process.stdout:
            if step := re.match(r"loss in epoch (\d+) iteration", line):
                ended[int(step[1])] = time.perf_counter()
    return ended[2] - ended[1]


def seconds_of_recbole(command):
    """The same of RecBole, in an environment of its own, which is made once; it tells seconds."""
    if not (ROOT / "runs/recbole/ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "runs/recbole"], cwd=ROOT, check=True)
        install = ["runs/recbole/bin/python", "-m", "pip", "install", "-q", *OF_RECBOLE.split()]
        subprocess.run(install, cwd=ROOT, check=True)
        (ROOT / "runs/recbole/ready").touch()
    shown = subprocess.run(
        shlex.split(command), cwd=ROOT, check=True, capture_output=True, text=True, env=ONE_THREAD
    )
    return float(re.search(r"training \[time: ([\d.]+)s", shown.stdout + shown.stderr)[1])


def seconds_of_checkpoint(command):
    """Seconds that the log and the checkpoint of an epoch take, by Python's profiler."""
    with tempfile.NamedTemporaryFile() as file:
        profiler = f"-m cProfile -o {file.name} {command}"
        subprocess.run(words(profiler, sys.executable), cwd=ROOT, check=True, stdout=2, env=ONE_THREAD)
        calls = pstats.Stats(file.name).stats
    return next(call[3] / call[0] for (*_, name), call in calls.items() if name == "end_epoch")


def timed(claim, name, commands):
    """Run the two sides of `commands` in turn, three times; write seconds of an epoch, and their ratio."""
    found, tick = {"commands": commands, "commit": commit(), "machine": machine()}, time.time()
    for folder in (RUNS / claim, ROOT / "runs" / claim):
        folder.mkdir(parents=True, exist_ok=True)
    for patch in commands[1:-1]:
        subprocess.run(words(patch, ""), cwd=ROOT, check=True, stdout=2)
    end = ".json" if "adarec_search" in commands[0] else ".pt2"
    outs = [f"runs/{claim}/{name}-{n}{end}" for n in (0, 1)]
    sides = list(zip((commands[0], commands[-1]), outs, strict=True))
    found["seconds_of_epoch"] = [[seconds_of_epoch(*side) for side in sides] for _ in range(3)]
    ours, other = np.median(found["seconds_of_epoch"], 0)
    if claim == "processes":
        two_epochs = commands[0].replace("--epochs 1", "--epochs 2")  # the last one leaves none
        found["checkpoint_seconds"] = seconds_of_checkpoint(f"{two_epochs} --out {outs[0]}")
    found |= {"seconds": round(time.time() - tick), "torch_threads": 1}
    (RUNS / claim / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{name}: {ours:.2f} s, {other:.2f} s", flush=True)


def commit():
    """The commit that is checked out."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip()


def machine():
    """What it is measured on."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {os.cpu_count()} cores{gpu}"


def make(claim, name, commands, data):
    """Run `commands`, the last of which writes runs/CLAIM/NAME; write their JSON with the model's figures."""
    model = f"runs/{claim}/{name}.pt2"
    out = model.replace(".pt2", ".json") if commands[-1].startswith("adarec_search") else model
    stem = out.removesuffix(".pt2") if "bidirectional_distill.py" in commands[-1] else out
    if "evaluate.py" not in commands[-1]:
        commands = [*commands[:-1], f"{commands[-1]} --out {stem}"]
    found = {"commands": [" ".join(words(c, "python")) for c in commands], "commit": commit()}
    tick, peak = time.time(), 0
    (ROOT / model).parent.mkdir(parents=True, exist_ok=True)
    for stopped in re.findall(r"--out (\S+)", " ".join(commands[:-1])):
        (ROOT / f"{stopped}.ckpt").unlink(missing_ok=True)
    for command in commands:
        if (ROOT / f"{stem}.ckpt").exists() and command == commands[-1]:
            command += " --resume"  # its seconds are then those of what was left
        with open(ROOT / f"runs/{claim}/{name}.out", "w") as printed:
            process = subprocess.Popen(words(command, sys.executable), cwd=ROOT, stdout=printed)
            _, status, usage = os.wait4(process.pid, 0)
        peak = max(peak, usage.ru_maxrss)
        if status:
            sys.exit(f"{name}: {command} failed")
    found |= {"seconds": round(time.time() - tick), "peak_MiB": peak // 1024, "torch_threads": threads()}
    found |= {"machine": machine()} | figures_of(claim, name, commands[-1], out, data)
    path = RUNS / claim / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"{name}: {found['seconds'] / 60:.1f} min", found.get("edges") or found.get("NDCG@10", ""), flush=True
    )


def figures_of(claim, name, command, out, data):
    """What `command` has printed, logged and written to `out`, and what evaluate.py finds of it."""
    printed = (ROOT / f"runs/{claim}/{name}.out").read_text()
    if "evaluate.py" in command:
        if "--compile" in command:
            kept = r"window|macs|ms_per|parameters|model"
            return {
                "models": [{k: v for k, v in r.items() if re.match(kept, k)} for r in json.loads(printed)]
            }
        report = json.loads(printed)[0]
        return {key: report[key] for key in ("HR@10", "NDCG@10")}
    if command.startswith("related/"):
        found = of_neighbour(
            data, out, ["--inputs", out.replace(".pt2", ".txt")] * ("--generator" in command)
        )
        known = re.findall(r"([\d.]+) %  (.+)", printed)  # of asrep.py
        return found | {f"together with {name}": float(share) for share, name in known}
    if "bidirectional_distill.py" in command:
        return both_models(out.removesuffix(".pt2"), data)
    log, found = log_of(out), {}
    for key in ("alpha", "flow"):  # of each epoch, in one line
        if key in log[-1]:
            found[key] = json.dumps([np.round(line[key], 3).tolist() for line in log if key in line])
    built = ROOT / (out if out.endswith(".json") else out.replace(".pt2", "-start.json"))
    if built.exists():
        found["edges"] = ";".join(",".join(row) for row in json.loads(built.read_text())["edges"])
    if out.endswith(".json"):
        return found | {"cost": float(re.search(r"cost ([\d.]+), sees", printed)[1])}
    report = evaluated(data, out, [10])
    found |= {key: report[key] for key in ("HR@10", "NDCG@10", "parameters_without_embeddings", "macs")}
    if claim == "ways" or claim == "students" and re.search("taught|alone|teacher", name):
        found["ranks"] = report["ranks"]
    if claim == "teacher" and "games" in data:
        report = evaluated(data, out, [10], "--protocol", "uniform")
        found |= {f"sampled {key}": report[key] for key in ("HR@10", "NDCG@10")}
    return found | {"valid": max(line["NDCG@10"] for line in log)}


def of_neighbour(data, out, inputs):
    """Test figures in full ranking, among 100 uniform negatives, and of users with short histories."""
    report = evaluated(data, out, [10], *inputs)
    sampled = evaluated(data, out, [5, 101], "--protocol", "uniform", *inputs)
    found = {key: report[key] for key in ("HR@10", "NDCG@10", "ranks")}
    found |= {f"sampled {key}": sampled[key] for key in ("HR@5", "NDCG@5", "MRR@101")}
    _, counts = np.unique(np.loadtxt(ROOT / data, int)[:, 0], return_counts=True)
    short = counts[counts >= 3] - 2 <= 5
    return found | {"users to 5": int(short.sum()), "NDCG@10 to 5": gains(report["ranks"], 10)[short].mean()}


def log_of(out):
    """The lines of a run's log."""
    return [json.loads(line) for line in (ROOT / f"{out}.log.jsonl").read_text().splitlines()]


def evaluated(data, model, at, *more):
    """What evaluate.py finds of a model on the test items; and of each user the rank, a character: that of
    code 48 + rank, or "0" for a rank above 50.
    """
    command = [sys.executable, "evaluate.py", data, model, "--at", *map(str, at), *more, "--json"]
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        command += ["--ranks", file.name]
        found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)[0]
        ranks = np.ceil(np.load(file.name)[:, 0]).astype(int)
    return found | {"ranks": "".join(chr(48 + rank * (rank <= 50)) for rank in ranks.tolist())}


def gains(ranks, k):
    """NDCG@k of each user, k at most 50, of the characters that `evaluated` makes of ranks."""
    rank = np.array([ord(rank) - 48 for rank in ranks])
    return ((rank > 0) & (rank <= k)) / np.log2(rank + 1.0 + (rank == 0))


def as_published(hits, cuts):
    """HR and NDCG as the notebooks of the paper count them, of `hits`, our HR at 1, 2, 3 and so on.

    There a rank has to be below K, and counts 1 / log2(rank + 2). (Their candidates differ, too: the
    validation item is among them, and training items are at score 0.)
    """
    share = np.diff(hits, prepend=0.0)  # of users, by rank from 1
    gain, found = share / np.log2(np.arange(len(share)) + 3), {}
    for k in cuts:
        found |= {f"published HR@{k}": share[: k - 1].sum(), f"published NDCG@{k}": gain[: k - 1].sum()}
    return found


def both_models(stem, data):
    """Test figures of teacher and student at 10, 50, 100 and 200, and as the notebooks count them."""
    log = log_of(stem)
    better = [line["student_better"] for line in log if "student_better" in line]
    found, cuts = {"student_better": better}, (50, 100, 200)
    for kind in ("teacher", "student"):
        report = evaluated(data, f"{stem}-{kind}.pt2", range(1, max(cuts) + 1))
        found[kind] = {f"{name}@{k}": report[f"{name}@{k}"] for name in ("HR", "NDCG") for k in (10, *cuts)}
        validated = [line[f"{kind}_NDCG@10"] for line in log if f"{kind}_NDCG@10" in line]
        found[kind]["valid"], found[kind]["valid last"] = max(validated), validated[-1]
        found[kind]["validation"] = json.dumps(np.round(validated, 5).tolist())
        found[kind]["ranks"] = report["ranks"]
        found[kind] |= as_published([report[f"HR@{k}"] for k in range(1, max(cuts) + 1)], cuts)
    return found


def threads():
    """How many threads torch runs on, as far as the environment says."""
    return int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))


def expected(claim, name):
    """Seconds that a run took when its JSON was last committed; None if it never was."""
    show = ["git", "show", f"HEAD:results/runs/{claim}/{name}.json"]
    shown = subprocess.run(show, cwd=ROOT, capture_output=True, text=True).stdout
    return json.loads(shown).get("seconds") if shown else None


def main(argv=None):
    """Read the command line, make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("claims", nargs="+", choices=[*CLAIMS, *NUMBERS], help="or sections of README.md")
    parser.add_argument("--only", default="*", help="names of runs, as 'games-*'")
    parser.add_argument("--list", action="store_true", help="show what is missing, run nothing")
    parser.add_argument("--again", action="store_true", help="also runs whose JSON is there")
    args = parser.parse_args(argv)
    claims = list(dict.fromkeys(claim for given in args.claims for claim in NUMBERS.get(given, [given])))

    def missing(claim):  # anew each time: later commands may depend on what earlier runs found
        for name, commands in CLAIMS[claim]():
            if fnmatch.fnmatch(name, args.only) and (args.again or not figures(claim, name)):
                yield name, commands

    if not any(fnmatch.fnmatch(name, args.only) for claim in claims for name, _ in CLAIMS[claim]()):
        parser.error(f"--only {args.only}: no run is named so")
    times = [expected(claim, name) for claim in claims for name, _ in missing(claim)]
    hours = sum(filter(None, times)) / 3600
    print(f"{len(times)} runs, {hours:.1f} hours and what {times.count(None)} of them take", file=sys.stderr)
    for claim in claims:
        for name, commands in missing(claim):
            if args.list:
                print(f"{claim}/{name}", *commands, sep="\n    ")
            elif claim in TIMED:
                try:
                    timed(claim, name, commands)
                except subprocess.CalledProcessError as error:  # a peer that cannot be fetched, too
                    sys.exit(f"{name}: {' '.join(map(str, error.cmd))} failed")
            else:
                make(claim, name, commands, commands[-1].split()[1])


if __name__ == "__main__":
    main()
