"""Make the runs that the pages of results/ rest on; each leaves results/runs/CLAIM/NAME.json, for draw.py.

    python results/run.py students                     # what is missing, one run after the other
    python results/run.py students --only 'games-*'    # of these names; with --list: show them

results/claims/CLAIM.txt lists the runs of a claim. The head of a run is its name, with the values of its
variables; its commands follow, for the shell. Data lie in data/ (data/README.md), models go to runs/CLAIM/.
An interrupted run leaves no JSON and is made again. A run whose JSON is there is made again with --again, as
teachers need to be where runs/ was lost: --only '*-teacher*' --again.
"""

import argparse
import fnmatch
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "results" / "runs"
CLAIMS = sorted(path.stem for path in (ROOT / "results" / "claims").glob("*.txt"))
TIMED = "speed", "processes"
KINDS = "teacher", "student"
# the python of a command is the one that runs this script
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
PEER = "runs/SASRec.pytorch"
MACHINE = f"{platform.machine()}, {os.cpu_count()} cores"


def runs_of(claim):
    """Name and commands of each run of a claim, in the order of its file."""
    text = (ROOT / "results" / "claims" / f"{claim}.txt").read_text().replace("\\\n", " ")
    for block in re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip().split("\n\n"):
        head, *commands = block.splitlines()
        name, *variables = head.split()
        # each variable as a list of pairs: its place in the text, and a value
        variables = [variable.split("=") for variable in variables]
        pairs = [[(f"{{{key}}}", value) for value in values.split(",")] for key, values in variables]
        for chosen in itertools.product(*pairs):
            lines = [name, *(" ".join(command.split()) for command in commands)]
            for place, value in chosen:
                lines = [line.replace(place, value) for line in lines]
            yield lines[0], lines[1:]


def figures(claim, name):
    """The JSON of a run, empty if it was not made."""
    path = RUNS / claim / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


# ---- One run ---------------------------------------------------------------------------------------------


def output_of(command):
    """The value of --out in a command."""
    found = re.search(r"--out (\S+)", command)
    return found and found[1]


def make(claim, name, commands):
    """Run `commands` and write their JSON, with the figures of the last one."""
    tick, peak, printed = time.time(), 0, ROOT / f"runs/{claim}/{name}.out"
    printed.parent.mkdir(parents=True, exist_ok=True)
    for command in commands:
        checkpoint = ROOT / f"{output_of(command)}.ckpt"
        resume = " --resume" * (checkpoint.exists() and command == commands[-1])
        if not resume:
            checkpoint.unlink(missing_ok=True)
        with open(printed, "w") as file:
            shell = ["bash", "-c", command + resume]
            process = subprocess.Popen(shell, cwd=ROOT, stdout=file, env=ENVIRONMENT)
            _, status, usage = os.wait4(process.pid, 0)
        peak = max(peak, usage.ru_maxrss)
        if status:
            sys.exit(f"{name}: {command} failed")
    found = {"commands": commands, "commit": commit(), "seconds": round(time.time() - tick)}
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    found |= {"peak_MiB": peak // 1024, "torch_threads": threads, "machine": MACHINE}
    found |= figures_of(claim, commands[-1], printed.read_text())
    save(claim, name, found)
    figure = found.get("edges") or found.get("NDCG@10", "")
    print(f"{name}: {found['seconds'] / 60:.1f} min", figure, flush=True)


def save(claim, name, found):
    """Write the JSON of a run."""
    (RUNS / claim).mkdir(parents=True, exist_ok=True)
    (RUNS / claim / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def commit():
    """The commit that is checked out."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip()


def figures_of(claim, command, printed):
    """What `command` has printed, logged and written, and what evaluate.py finds of its model."""
    words = re.sub(r"^\w+=\S+ ", "", command).split()  # without a variable of the shell
    script, data, out = Path(words[1]).name, words[2], output_of(command)
    if script == "evaluate.py":
        reports = json.loads(printed)
        if "--compile" in command:
            kept = r"window|macs|ms_per|parameters|model"
            return {"models": [{k: v for k, v in report.items() if re.match(kept, k)} for report in reports]}
        return {key: reports[0][key] for key in ("HR@10", "NDCG@10")}
    if script == "bidirectional_distill.py":
        return both_models(out, data)
    if script == "supernet.py":
        return {"valid": json.loads(printed.splitlines()[-1])}
    found, log = {}, log_of(out) if (ROOT / f"{out}.log.jsonl").exists() else []
    if log and "alpha" in log[-1]:  # of each epoch, in one line
        found["alpha"] = json.dumps([np.round(line["alpha"], 3).tolist() for line in log])
    built = ROOT / (out if out.endswith(".json") else out.replace(".pt2", "-start.json"))
    if built.exists():
        found["edges"] = ";".join(",".join(row) for row in json.loads(built.read_text())["edges"])
    if out.endswith(".json"):
        return found | {"cost": float(re.search(r"cost ([\d.]+), sees", printed)[1])}
    inputs = ["--inputs", out.replace(".pt2", ".txt")] if "--generator" in command else []
    report = evaluated(data, out, [10], *inputs)
    kept = "HR@10", "NDCG@10", "parameters_without_embeddings", "macs", "ranks"
    found |= {key: report[key] for key in kept}
    if claim in ("teacher", "asrep", "dt4sr"):  # papers that rank among 100 uniform negatives
        report = evaluated(data, out, [5, 10, 101], "--protocol", "uniform", *inputs)
        sampled = "HR@5", "NDCG@5", "HR@10", "NDCG@10", "MRR@101"
        found |= {f"sampled {key}": report[key] for key in sampled} | of_short_users(data, found["ranks"])
    known = re.findall(r"([\d.]+) %  (.+)", printed)  # of related/asrep.py
    found |= {f"together with {name}": float(share) for share, name in known}
    return found | ({"valid": max(line["NDCG@10"] for line in log)} if log else {})


def of_short_users(data, ranks):
    """Number and NDCG@10 of the users with at most 5 training items; `ranks` as `evaluated` makes them."""
    _, counts = np.unique(np.loadtxt(ROOT / data, int)[:, 0], return_counts=True)
    short = counts[counts >= 3] - 2 <= 5
    return {"users to 5": int(short.sum()), "NDCG@10 to 5": gains(ranks, 10)[short].mean()}


def log_of(out):
    """The lines of a run's log."""
    return [json.loads(line) for line in (ROOT / f"{out}.log.jsonl").read_text().splitlines()]


def evaluated(data, model, at, *more):
    """What evaluate.py finds of a model on the test items; and `ranks`, a character for each user: that of
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


# ---- Bidirectional distillation, whose published notebooks count in another way --------------------------


def as_published(hits):
    """NDCG as the notebooks of the paper count it, at K = len(hits); `hits` are our HR at 1, 2, ..., K.

    There a rank has to be below K, and counts 1 / log2(rank + 2). (Their candidates differ, too: the
    validation item is among them, and training items are at score 0.)
    """
    share = np.diff(hits, prepend=0.0)[:-1]  # of users, by rank from 1
    return (share / np.log2(np.arange(len(share)) + 3)).sum()


def both_models(stem, data):
    """Test figures of teacher and student at 10 and 50, and NDCG@50 as the notebooks count it."""
    log = log_of(stem)
    found = {"student_better": [line["student_better"] for line in log if "student_better" in line]}
    for kind in KINDS:
        report = evaluated(data, f"{stem}-{kind}.pt2", range(1, 51))
        found[kind] = {f"{name}@{k}": report[f"{name}@{k}"] for name in ("HR", "NDCG") for k in (10, 50)}
        validated = [line[f"{kind}_NDCG@10"] for line in log if f"{kind}_NDCG@10" in line]
        found[kind] |= {"valid": max(validated), "valid last": validated[-1], "ranks": report["ranks"]}
        found[kind]["validation"] = json.dumps(np.round(validated, 5).tolist())
        hits = [report[f"HR@{k}"] for k in range(1, 51)]
        found[kind]["published NDCG@50"] = as_published(hits)
    return found


# ---- Seconds of an epoch: the last two commands in turn, three times -------------------------------------


def timed(claim, name, commands):
    """Run what comes before, then both sides in turn; write the seconds of each epoch."""
    *before, ours, other = commands
    for command in [f"mkdir -p runs/{claim}", *before]:
        subprocess.run(["bash", "-c", command], cwd=ROOT, check=True)
    found, tick = {"commands": commands, "commit": commit(), "machine": MACHINE}, time.time()
    found["seconds_of_epoch"] = [[seconds_of_epoch(ours), seconds_of_epoch(other)] for _ in range(3)]
    found |= {"seconds": round(time.time() - tick), "torch_threads": 1}
    save(claim, name, found)
    print(f"{name}: {np.median(found['seconds_of_epoch'], 0).round(2)} s", flush=True)


def seconds_of_epoch(command):
    """The seconds of the last epoch by the log; for the peer, between the last lines of its two epochs."""
    if PEER in command and not (ROOT / PEER).exists():  # as it was in November 2026
        clone = f"git clone -q https://github.com/pmixer/SASRec.pytorch {PEER}"
        clone += f" && cp data/*.txt {PEER}/python/data"
        subprocess.run(["bash", "-c", clone], cwd=ROOT, check=True)
    ended, environment = {}, ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    shell = ["bash", "-c", command]
    with subprocess.Popen(shell, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if step := re.match(r"loss in epoch (\d+) iteration", line):
                ended[int(step[1])] = time.perf_counter()
    if process.returncode:
        sys.exit(f"{command} failed")
    return ended[2] - ended[1] if ended else log_of(output_of(command))[-1]["seconds"]


def main(argv=None):
    """Read the command line, make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("claim", choices=CLAIMS, help="a file of results/claims, without .txt")
    parser.add_argument("--only", default="*", help="names of runs, as 'games-*'")
    parser.add_argument("--list", action="store_true", help="show what is missing, run nothing")
    parser.add_argument("--again", action="store_true", help="also runs whose JSON is there")
    args = parser.parse_args(argv)
    chosen = [run for run in runs_of(args.claim) if fnmatch.fnmatch(run[0], args.only)]
    if not chosen:
        parser.error(f"--only {args.only}: no run is named so")
    missing = [run for run in chosen if args.again or not figures(args.claim, run[0])]
    print(f"{len(missing)} of {len(chosen)} runs", file=sys.stderr)
    for name, commands in missing:
        if args.list:
            print(name, *commands, sep="\n    ")
        else:
            (timed if args.claim in TIMED else make)(args.claim, name, commands)


if __name__ == "__main__":
    main()
