"""Large logs and catalogues: time and peak memory of 100 steps and of the evaluation of 1,000 users.

SCALE=table.json OMP_NUM_THREADS=1 python -m pytest tests/test_scale.py writes table.json in half an hour.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 20  # interactions a user
SIZES = [(millions * 10**6, 100_000) for millions in (1, 2, 5, 10, 20)]
SIZES += [(5 * 10**6, 10_000), (5 * 10**6, 10**6), (20 * 10**6, 10**6)]
NEW, EPOCH, TEACHER = "--dim 32 --max-length 20", "--epochs 1 --negatives 256", "--teacher T.pt2"
COMMANDS = {
    "sasrec_teacher": f"--loss sampled {NEW} {EPOCH} --out T.pt2",
    "evaluate": "T.pt2 --users 1000 --at 10",
    "adarec_search": f"--cells 1 --nodes 2 --alpha-warm-up 0 {TEACHER} {NEW} {EPOCH} --out S.json",
    "emd_distill": f"--student S.pt2 {TEACHER} {EPOCH} --out E.pt2",
    "bidirectional_distill": f"{TEACHER} --student S.pt2 --direction none --epochs 1 --out B",
}
MAKE = f"""import sys, numpy as np
interactions, items, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
log = np.empty((interactions, 2), np.int64)
log[:, 0] = np.repeat(np.arange(1, interactions // {LENGTH} + 1), {LENGTH})
log[:, 1] = 1 + items * np.random.default_rng(0).random(interactions) ** 3  # the first are frequent
log[-1, 1] = items
np.save(path, log)"""
READ = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import evaluate; evaluate.read_interactions('data.npy')"


def measured(*argv, cwd):
    """Seconds and peak MiB of a process, which must end with status 0."""
    start = time.time()
    process = subprocess.Popen([sys.executable, *argv], cwd=cwd, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return time.time() - start, usage.ru_maxrss / 1024


@pytest.mark.skipif("SCALE" not in os.environ, reason="takes half an hour; SCALE=FILE runs it")
@pytest.mark.parametrize("interactions, items", SIZES)
def test_scale(tmp_path, interactions, items):
    num_users, size = interactions // LENGTH, {"interactions": interactions, "items": items}
    # in a process of its own: what this process ever held would count as memory of its children
    measured("-c", MAKE, str(interactions), str(items), "data.npy", cwd=tmp_path)
    rows = {"read_interactions": measured("-c", READ, cwd=tmp_path)}
    largest = (interactions, items) == (20 * 10**6, 10**6)
    for script in COMMANDS if largest else ["sasrec_teacher", "evaluate"]:
        argv = [ROOT / f"{script}.py", "data.npy", *COMMANDS[script].split()]
        argv += ["--batch-size", str(num_users // 100)] * (script != "evaluate")  # 100 steps an epoch
        rows[script] = measured(*argv, cwd=tmp_path)
    new = [size | {"what": name, "seconds": seconds, "MiB": peak} for name, (seconds, peak) in rows.items()]
    table = Path(os.environ["SCALE"])
    table.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(table.read_text()) if table.exists() else []
    old = [row for row in old if (row["interactions"], row["items"]) != (interactions, items)]
    table.write_text(json.dumps(old + new, indent=1) + "\n")
    assert all(peak < 8 * 1024 for _, peak in rows.values())
    assert rows["read_interactions"][0] < 30
