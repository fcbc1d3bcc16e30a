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

# per scene: SASRec as the teacher, its last epochs at a falling rate, the search, a student's training
SCENES = {
    "ml-1m": {
        "teacher": "--max-length 200 --blocks 8 --dim 128 --heads 2 --batch-size 32 --epochs 16",
        "finish": "--learning-rate 1e-3 --epochs 8",
        "search": "--batch-size 64 --beta 0.03 --epochs 14 --alpha-warm-up 5 --learning-rate 2e-3",
        "train": "--learning-rate 2e-3 --epochs 28",
    },
    "games": {
        "teacher": "--blocks 4 --dim 128 --heads 2 --dropout 0.5 --epochs 20 --patience 3",
        "finish": "--learning-rate 1e-3 --batch-size 128 --epochs 4",
        "search": "--batch-size 128 --beta 0.03 --epochs 14 --alpha-warm-up 5 --learning-rate 2e-3",
        "train": "--learning-rate 2e-3 --batch-size 128 --epochs 10",
    },
    "beauty": {
        "teacher": "--blocks 4 --dim 128 --heads 2 --dropout 0.5 --epochs 20 --patience 3",
        "finish": "--learning-rate 1e-3 --batch-size 128 --epochs 3",
        "search": "--batch-size 128 --beta 0.03 --epochs 14 --alpha-warm-up 5 --learning-rate 2e-3",
        "train": "--learning-rate 2e-3 --batch-size 128 --epochs 8",
    },
}
SHAPE = "--cells 2 --nodes 2 --dim 64"
TAUGHT = {"emd": "", "one-to-one": "--mapping one-to-one", "last": "--mapping last"}


def adarec(data):
    """Name, and commands of each run; `runs` is the folder of its models."""
    runs = "runs/adarec"
    for scene, s in SCENES.items():
        d = f"{data}/{scene}.txt"
        teacher, search = f"{runs}/{scene}-teacher.pt2", f"{runs}/{scene}-search"
        yield f"{scene}-teacher-constant", [f"sasrec_teacher.py {d} {s['teacher']}"]
        finish = f"--student {runs}/{scene}-teacher-constant.pt2 {s['finish']} --final-rate 0"
        yield f"{scene}-teacher", [f"emd_distill.py {d} {finish}"]
        yield f"{scene}-search", [f"adarec_search.py {d} --teacher {teacher} {SHAPE} {s['search']}"]

        length = "--max-length 200" if scene == "ml-1m" else ""

        def train(name, start, seed, options, d=d, s=s, runs=runs, length=length):
            start = f"adarec_search.py {d} {start} {length} --seed {seed} --out {runs}/{name}-start.json"
            train = f"emd_distill.py {d} --student {runs}/{name}-start.pt2 {s['train']} --final-rate 0"
            return name, [start, f"{train} --patience 99 {options} --seed {seed}"]

        own = f"--architecture {search}.json"
        for seed in range(3):
            yield train(f"{scene}-alone-{seed}", own, seed, "")
            for name, mapping in TAUGHT.items():
                if scene != "beauty" or name == "emd":
                    yield train(f"{scene}-{name}-{seed}", own, seed, f"--teacher {teacher} {mapping}")
        cost = figures("adarec", f"{scene}-search").get("cost", "COST")
        for k in range(5):
            yield f"{scene}-random-{k}", [f"adarec_search.py {d} {SHAPE} --random {cost} --seed {k} {length}"]
        others = {f"random-{k}": f"{scene}-random-{k}" for k in range(5)}
        others |= {f"from-{other}": f"{other}-search" for other in SCENES if other != scene}
        for name, architecture in others.items():
            for seed in range(2):
                yield train(f"{scene}-{name}-{seed}", f"--architecture {runs}/{architecture}.json", seed, "")


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
