"""Large logs and catalogues: time and peak memory of a hundred steps and of 1,000 users' evaluation.

Half an hour: SCALE=table.json OMP_NUM_THREADS=1 python -m pytest tests/test_scale.py writes table.json.
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
STEP, TAUGHT = "--epochs 1 --negatives 256", "--teacher T.pt2"
BUILD = "--dim 32 --max-length 20"
SCRIPTS = {
    "sasrec_teacher": f"DATA --loss sampled {BUILD} {STEP} --out T.pt2",
    "evaluate": "DATA T.pt2 --users 1000 --at 10",
    "adarec_search": f"DATA --cells 1 --nodes 2 --alpha-warm-up 0 {TAUGHT} {BUILD} {STEP} --out S.json",
    "emd_distill": f"DATA --student S.pt2 {TAUGHT} {STEP} --out E.pt2",
    "bidirectional_distill": f"DATA {TAUGHT} --student S.pt2 --direction none --epochs 1 --out B",
}
MAKE = f"""import sys, numpy as np
interactions, items, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
log = np.empty((interactions, 2), np.int64)
log[:, 0] = np.repeat(np.arange(1, interactions // {LENGTH} + 1), {LENGTH})
log[:, 1] = 1 + items * np.random.default_rng(0).random(interactions) ** 3  # the first are frequent
log[-1, 1] = items
np.save(path, log)"""


def measured(*argv, cwd):
    """Seconds and peak MiB of a process that has to end well."""
    tick = time.time()
    process = subprocess.Popen([sys.executable, *argv], cwd=cwd, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return time.time() - tick, usage.ru_maxrss / 1024


@pytest.mark.skipif("SCALE" not in os.environ, reason="takes half an hour, SCALE=FILE runs it")
@pytest.mark.parametrize("interactions, items", SIZES)
def test_scale(tmp_path, interactions, items):
    users, path = interactions // LENGTH, tmp_path / "data.npy"
    # by a process of its own: what this one has once held would count as its children's memory
    subprocess.run([sys.executable, "-c", MAKE, str(interactions), str(items), str(path)], check=True)
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import evaluate as e; e.read_interactions('{path}')"
    )
    rows = {"read_interactions": measured("-c", program, cwd=tmp_path)}
    largest = (interactions, items) == (20 * 10**6, 10**6)
    for script in SCRIPTS if largest else ["sasrec_teacher", "evaluate"]:
        argv = SCRIPTS[script].replace("DATA", path.name).split()
        argv += ["--batch-size", str(users // 100)] * (script != "evaluate")  # a hundred steps an epoch
        rows[script] = measured(ROOT / f"{script}.py", *argv, cwd=tmp_path)
    size = {"interactions": interactions, "items": items}
    new = [size | {"what": name, "seconds": s, "MiB": peak} for name, (s, peak) in rows.items()]
    table = Path(os.environ["SCALE"])
    table.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(table.read_text()) if table.exists() else []
    before = [row for row in before if (row["interactions"], row["items"]) != (interactions, items)]
    table.write_text(json.dumps(before + new, indent=1) + "\n")
    assert all(peak < 8 * 1024 for _, peak in rows.values())
    assert rows["read_interactions"][0] < 30
