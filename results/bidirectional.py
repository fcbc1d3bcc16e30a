"""Does bidirectional distillation help, which items should be drawn, and who should teach whom?

    python results/bidirectional.py data/citeulike.txt --at 50 100 200 -- --base bpr --warm-up 100 --epochs 50
    python results/bidirectional.py data/ml-100k.txt --models T.pt2 S.pt2

For each seed both models warm up once (or are --models, two sequence models that were trained already); each
variant then trains them on from there, for as many epochs, with the options behind `--`. `alone` is the fair
baseline: no bidirectional distillation. The epoch is chosen on validation. Prints HR and NDCG of the test
items of each run, and mean and standard deviation over seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "alone": ["--direction", "none"],
    "paper": [],
    "published sign": ["--sign", "published"],
    "uniform": ["--sampling", "uniform"],
    "top": ["--sampling", "top"],
    "teacher-to-student": ["--direction", "teacher-to-student"],
    "student-to-teacher": ["--direction", "student-to-teacher"],
}


def script(*command):
    """Standard output of a script of this repository."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def measured(data, models, at):
    """Metrics of the test items of two model files: two dictionaries."""
    return json.loads(script("evaluate.py", data, *models, "--at", *at, "--json"))


def text(of_teacher, of_student):
    """Both models' metrics on one line."""
    parts = [
        f"{kind} " + " ".join(f"{key} {value:.4f}" for key, value in values.items())
        for kind, values in (("teacher", of_teacher), ("student", of_student))
    ]
    return "; ".join(parts)


def main(argv=None):
    """Read the command line, train, evaluate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="interactions")
    parser.add_argument("--models", nargs=2, metavar=("T", "S"), help="model files to start from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="runs of each variant (0)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="which ones")
    parser.add_argument("--at", type=int, nargs="+", default=[10], help="K of HR@K and NDCG@K (10)")
    argv = sys.argv[1:] if argv is None else list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)  # what stands behind `--` is for the script
    args = parser.parse_args(argv[:cut])
    options, data = argv[cut + 1 :], Path(args.data).resolve()
    keys = [f"{metric}@{k}" for metric in ("HR", "NDCG") for k in args.at]
    reached = {name: [] for name in ("warm-up", *args.variants)}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            out, start = f"{folder}/out", args.models
            if not start:
                begin = ["--out", f"{folder}/start", *options, "--seed", seed, "--epochs", 0]
                script("bidirectional_distill.py", data, *begin)
                start = [f"{folder}/start-{kind}.pt2" for kind in ("teacher", "student")]
            start = [Path(path).resolve() for path in start]
            for name in reached:
                models = start
                if name != "warm-up":
                    more = ["--teacher", start[0], "--student", start[1], *options, "--warm-up", 0]
                    more += ["--seed", seed, *VARIANTS[name]]
                    script("bidirectional_distill.py", data, "--out", out, *more)
                    models = [f"{out}-{kind}.pt2" for kind in ("teacher", "student")]
                both = measured(data, models, args.at)
                reached[name].append([{key: of_one[key] for key in keys} for of_one in both])
                print(f"{name}, seed {seed}: {text(*reached[name][-1])}", flush=True)
    for name, runs in reached.items():
        both = list(zip(*runs, strict=True))
        print(
            f"{name}: {text(*({k: statistics.mean(r[k] for r in of_one) for k in keys} for of_one in both))}"
        )
        if len(runs) > 1:
            spread = ({k: statistics.stdev(r[k] for r in of_one) for k in keys} for of_one in both)
            print(f"    standard deviations: {text(*spread)}")


if __name__ == "__main__":
    main()
