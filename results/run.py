"""Make the runs that results/README.md rests on; each leaves results/runs/CLAIM/NAME.json.

    python results/run.py adarec                     # what is missing, one run after the other
    python results/run.py adarec --only 'games-*'    # of these names; with --list: show them

Data are sought in --data (data/README.md tells how to make them), models lie in runs/CLAIM/. A run that was
interrupted leaves no JSON and is made again; one whose JSON is there, never: delete it to have it again.
"""

import argparse
import fnmatch
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "results" / "runs"

# ---- AdaRec: a student that is smaller, faster and as good; made for its scene ---------------------------

# per scene: SASRec as the teacher, the search, a student's training; all rates fall to 0
SCENES = {
    "ml-1m": {
        "teacher": "--max-length 200 --blocks 8 --dim 128 --heads 2 --batch-size 32 --epochs 10",
        "shape": "--cells 2 --nodes 2 --dim 96",
        "search": "--dropout 0 --batch-size 64 --beta 0.1 --epochs 12 --alpha-warm-up 4 --learning-rate 2e-3",
        "train": "--learning-rate 2e-3 --dropout 0 --epochs 12",
    },
    "games": {
        "teacher": "--blocks 4 --dim 128 --heads 2 --dropout 0.5 --epochs 20",
        "shape": "--cells 2 --nodes 2 --dim 64",
        "search": "--batch-size 128 --beta 0.03 --epochs 10 --alpha-warm-up 4 --learning-rate 2e-3",
        "train": "--learning-rate 2e-3 --batch-size 128 --epochs 6",
    },
    "beauty": {
        "teacher": "--blocks 4 --dim 128 --heads 2 --dropout 0.5 --epochs 8",
        "shape": "--cells 2 --nodes 2 --dim 64",
        "search": "--batch-size 128 --beta 0.03 --epochs 10 --alpha-warm-up 4 --learning-rate 2e-3",
        "train": "--learning-rate 2e-3 --batch-size 128 --epochs 4",
    },
}
TAUGHT = {"alone": "", "emd": "", "one-to-one": "--mapping one-to-one", "last": "--mapping last"}


def student(scene, name, data, architecture, seed, options):
    """Name and commands of a student of `architecture` that starts from random weights."""
    length = "--max-length 200" if scene == "ml-1m" else ""
    start = f"runs/adarec/{scene}-{name}-{seed}-start"
    build = f"adarec_search.py {data} --architecture {architecture} {length} --seed {seed} --out {start}.json"
    train = (
        f"emd_distill.py {data} --student {start}.pt2 {SCENES[scene]['train']} --final-rate 0 --patience 99"
    )
    return f"{scene}-{name}-{seed}", [build, f"{train} --seed {seed} {options}"]


def moved(scene, other):
    """An architecture file with the edges that were found on `other` and the width of `scene`."""
    files = [ROOT / f"runs/adarec/{name}-search.json" for name in (scene, other)]
    path = f"runs/adarec/{scene}-from-{other}.json"
    if all(file.exists() for file in files):
        mine, theirs = (json.loads(file.read_text()) for file in files)
        (ROOT / path).write_text(json.dumps(theirs | {"dim": mine["dim"]}))
    return path


def adarec(folder):
    """Name and commands of each run, in order: a later one may read what an earlier one found."""
    for scene, options in SCENES.items():
        data, runs = f"{folder}/{scene}.txt", f"runs/adarec/{scene}"
        falling = "--final-rate 0 --patience 99"
        yield f"{scene}-teacher", [f"sasrec_teacher.py {data} {options['teacher']} {falling}"]
        teacher = f"--teacher {runs}-teacher.pt2"
        yield f"{scene}-search", [f"adarec_search.py {data} {teacher} {options['shape']} {options['search']}"]
        for seed in range(3):
            for name, mapping in TAUGHT.items():
                if scene != "beauty" or name in ("alone", "emd"):
                    taught = "" if name == "alone" else f"{teacher} {mapping}"
                    yield student(scene, name, data, f"{runs}-search.json", seed, taught)
        cost = figures("adarec", f"{scene}-search").get("cost", "COST")
        for k in range(5):
            draw = f"--random {cost} --seed {k}" + " --max-length 200" * (scene == "ml-1m")
            yield f"{scene}-random{k}", [f"adarec_search.py {data} {options['shape']} {draw}"]
            for seed in range(2):
                yield student(scene, f"chance{k}", data, f"{runs}-random{k}.json", seed, "")
    for scene in SCENES:  # once all are searched
        for other in SCENES:
            found = moved(scene, other)
            for seed in range(2 * (scene != other)):
                yield student(scene, f"from-{other}", f"{folder}/{scene}.txt", found, seed, "")


def planted(data):
    """Scenes whose truth is known: the next item depends on the item `lag` places back; default options."""
    for lag in (2, 4, 6):
        for seed in range(10):
            d = f"runs/planted/lag-{lag}-{seed}.txt"
            scene = f"data/prepare.py synthetic --scene lag --lag {lag} --seed {seed} --out {d}"
            yield f"lag-{lag}-{seed}", [scene, f"adarec_search.py {d} --cells 1 --nodes 1 --seed {seed}"]


CLAIMS = {"adarec": adarec, "planted": planted}

# ---- One run ---------------------------------------------------------------------------------------------


def figures(claim, name):
    """The JSON of a run, empty if it was not made."""
    path = RUNS / claim / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def make(claim, name, commands, data):
    """Run `commands`, the last of which writes runs/CLAIM/NAME; write their JSON with the model's figures."""
    model = f"runs/{claim}/{name}.pt2"
    out = model.replace(".pt2", ".json") if commands[-1].startswith("adarec_search") else model
    commands = [*commands[:-1], f"{commands[-1]} --out {out}"]
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    found = {"commands": [" ".join(f"python {c}".split()) for c in commands], "commit": git.stdout.strip()}
    tick, peak = time.time(), 0
    (ROOT / model).parent.mkdir(parents=True, exist_ok=True)
    for command in commands:
        with open(ROOT / f"runs/{claim}/{name}.out", "w") as printed:
            process = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=ROOT, stdout=printed)
            _, status, usage = os.wait4(process.pid, 0)
        peak = max(peak, usage.ru_maxrss)
        if status:
            sys.exit(f"{name}: {command} failed")
    found |= {"seconds": round(time.time() - tick), "peak_MiB": peak // 1024, "torch_threads": threads()}
    found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    if out.endswith(".json"):
        architecture = json.loads((ROOT / out).read_text())
        printed = (ROOT / f"runs/{claim}/{name}.out").read_text()
        found["edges"] = ";".join(",".join(row) for row in architecture["edges"])
        found["cost"] = float(printed.split("cost ")[-1].split(",")[0])
    for split in ("valid", "test"):
        command = ["evaluate.py", data, model, "--split", split, "--json"]
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True
        )
        found[split] = {key: json.loads(done.stdout)[0][key] for key in ("HR@10", "NDCG@10")}
    report = json.loads(done.stdout)[0]
    found |= {key: report[key] for key in ("parameters_without_embeddings", "macs")}
    path = RUNS / claim / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{name}: {found['seconds'] / 60:.1f} min, test {found['test']}", flush=True)


def judge(model, data):
    """What evaluate.py says of a model: accuracy in both splits, and size."""
    found = {}
    for split in ("valid", "test"):
        command = ["evaluate.py", data, model, "--split", split, "--json"]
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True
        )
        report = json.loads(done.stdout)[0]
        found[split] = {key: report[key] for key in ("HR@10", "NDCG@10")}
    return found | {key: report[key] for key in ("parameters_without_embeddings", "macs")}


def threads():
    """How many threads torch runs on, as far as the environment says."""
    return int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))


def main(argv=None):
    """Read the command line, make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("claims", nargs="+", choices=CLAIMS)
    parser.add_argument("--only", default="*", help="names of runs, as 'games-*'")
    parser.add_argument("--data", default="data", help="folder of the data files")
    parser.add_argument("--list", action="store_true", help="show what is missing, run nothing")
    args = parser.parse_args(argv)
    for claim in args.claims:
        for name, commands in CLAIMS[claim](args.data):
            if not fnmatch.fnmatch(name, args.only) or figures(claim, name):
                continue
            if args.list:
                print(f"{claim}/{name}", *commands, sep="\n    ")
            else:
                make(claim, name, commands, commands[-1].split()[1])


if __name__ == "__main__":
    main()
