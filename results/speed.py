"""Time an epoch of sasrec_teacher.py against something else, in turn, on a machine that does nothing else.

    python results/speed.py peer data/games.txt --max-length 50 --dropout 0.5 --peer SASRec.pytorch/python
    python results/speed.py loss data/ml-1m.txt --max-length 200

`peer`: against pmixer/SASRec.pytorch, run unchanged in its own folder, with SASRec's settings (BCE, d = 50, 2
blocks, 1 head, batch 128). `loss`: the full softmax against matmul and cross_entropy of the same positions,
d = 64. Each run trains two epochs, of which the second counts; the medians of --runs, their ratio.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PLAIN_SOFTMAX = """
import sys, torch, sasrec_teacher
def ce_loss(output, item_vectors, target):
    return torch.nn.functional.cross_entropy(output @ item_vectors[1:].T, target - 1)
sasrec_teacher.LOSSES["ce"] = ce_loss
sys.exit(sasrec_teacher.main())
"""


def ours(data, options, program=(str(ROOT / "sasrec_teacher.py"),)):
    """Seconds of the second epoch of `sasrec_teacher.py data options`, from its log."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.pt2"
        command = [sys.executable, *program, str(data), "--out", str(out), "--epochs", "2", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        return json.loads(Path(f"{out}.log.jsonl").read_text().splitlines()[1])["seconds"]


def peer(data, folder, max_length, dropout):
    """Seconds of the second epoch of the peer's main.py: from the last line of epoch 1 to that of epoch 2."""
    (Path(folder) / "data").mkdir(exist_ok=True)
    name = f"timed-{Path(data).stem}"
    shutil.copyfile(data, Path(folder) / "data" / f"{name}.txt")
    options = {"dataset": name, "train_dir": "timing", "device": "cpu", "maxlen": max_length, "num_epochs": 2}
    options |= {
        "dropout_rate": dropout,
        "hidden_units": 50,
        "num_blocks": 2,
        "num_heads": 1,
        "batch_size": 128,
    }
    command = [sys.executable, "-u", "main.py", *(f"--{key}={value}" for key, value in options.items())]
    ended = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
        for line in process.stdout:
            if found := re.match(r"loss in epoch (\d+) iteration", line):
                ended[int(found[1])] = time.perf_counter()
    return ended[2] - ended[1]


def main(argv=None):
    """Read the command line, time, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("against", choices=["peer", "loss"], help="what to time against")
    parser.add_argument("data", help="interactions, as text")
    parser.add_argument("--max-length", default="50", help="of the histories")
    parser.add_argument("--dropout", default="0.2", help="of both")
    parser.add_argument("--peer", help="the folder of the peer's main.py")
    parser.add_argument("--runs", type=int, default=3, help="of each, in turn")
    args = parser.parse_args(argv)
    options = ["--max-length", args.max_length, "--dropout", args.dropout]
    if args.against == "peer":
        sasrec = [*options, "--loss", "bce", "--dim", "50"]
        sides = [
            lambda: ours(args.data, sasrec),
            lambda: peer(args.data, args.peer, args.max_length, args.dropout),
        ]
    else:
        plain = "-c", PLAIN_SOFTMAX
        sides = [lambda: ours(args.data, options), lambda: ours(args.data, options, plain)]
    seconds = [[side() for side in sides] for _ in range(args.runs)]
    mine, theirs = (statistics.median(column) for column in zip(*seconds, strict=True))
    for row in seconds:
        print("ours {:.2f} s, theirs {:.2f} s".format(*row))
    print(
        f"median: ours {mine:.2f} s, theirs {theirs:.2f} s; ratio {mine / theirs:.3f}, {theirs / mine:.2f}x"
    )


if __name__ == "__main__":
    main()
