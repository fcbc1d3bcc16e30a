"""Does distillation help, and does the mapping of layers matter? The same student, trained in several ways.

    python results/distill.py data/ml-100k.txt --teacher big.pt2 --architecture a.json -- --epochs 20

Each variant trains from the same random weights, for as many epochs, with the options behind `--`; the epoch
is chosen on validation. Prints HR@10 and NDCG@10 of the test items of each run, mean and deviation of seeds.
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
    "alone": ["--gamma", "0"],
    "last": ["--mapping", "last"],
    "one-to-one": ["--mapping", "one-to-one"],
    "emd": [],
    "emd, mse": ["--distance", "mse"],
}


def script(*command):
    """Standard output of a script of this repository."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def main(argv=None):
    """Read the command line, train, evaluate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="interactions")
    parser.add_argument("--teacher", required=True, help="model file")
    parser.add_argument("--architecture", required=True, help="of the student")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="runs of each variant (0 1 2 3 4)"
    )
    parser.add_argument("--max-length", type=int, default=50, help="items that the student sees (50)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="which ones")
    argv = sys.argv[1:] if argv is None else list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)  # what stands behind `--` is for the script
    args = parser.parse_args(argv[:cut])
    args.options = argv[cut + 1 :]
    reached = {name: [] for name in args.variants}
    data, teacher, architecture = (Path(p).resolve() for p in (args.data, args.teacher, args.architecture))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "student.pt2"
        (report,) = json.loads(script("evaluate.py", data, teacher, "--json"))
        print(f"teacher: HR@10 {report['HR@10']:.4f}, NDCG@10 {report['NDCG@10']:.4f}", flush=True)
        for seed in args.seeds:
            start = Path(folder) / "start.json"
            begin = ["--architecture", architecture, "--max-length", args.max_length, "--out", start]
            script("adarec_search.py", data, *begin, "--seed", seed)
            for name in args.variants:
                common = ["--teacher", teacher, "--student", start.with_suffix(".pt2"), "--seed", seed]
                script("emd_distill.py", data, *common, "--out", out, *args.options, *VARIANTS[name])
                (report,) = json.loads(script("evaluate.py", data, out, "--json"))
                reached[name].append((report["HR@10"], report["NDCG@10"]))
                print(
                    f"{name}, seed {seed}: HR@10 {report['HR@10']:.4f}, NDCG@10 {report['NDCG@10']:.4f}",
                    flush=True,
                )
    for name, pairs in reached.items():
        means = [statistics.mean(column) for column in zip(*pairs, strict=True)]
        spread = statistics.stdev(ndcg for _, ndcg in pairs) if len(pairs) > 1 else 0.0
        print(f"{name}: mean HR@10 {means[0]:.4f}, NDCG@10 {means[1]:.4f}, standard deviation {spread:.4f}")


if __name__ == "__main__":
    main()
