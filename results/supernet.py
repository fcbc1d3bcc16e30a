"""What a search thinks of given architectures: validation NDCG@10 with the weights of its supernet.

    python results/supernet.py A.json B.json -- data/ml-100k.txt --cells 1 --nodes 2 --out runs/supernet.json

After `--` stand the arguments of adarec_search.py, which searches as usual. At its end, each architecture
takes its weights from the supernet and is validated without training. Prints a JSON object: NDCG@10 by edges.
PYTHONPATH can name a folder with another adarec_search.py, such as one changed by a patch of results/ideas/.
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import adarec_search
import emd_distill

paths, argv = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
derive, scores = adarec_search.derive, {}
MAX_LENGTH = int(argv[argv.index("--max-length") + 1]) if "--max-length" in argv else 50


def derive_all(supernet, edges):
    """The student of `edges`, as adarec_search.derive makes it; validates the other architectures first."""
    data = adarec_search.read_interactions(argv[0])
    _, users = adarec_search.training_part(data, MAX_LENGTH, seed=0)
    for path in paths:
        rows = json.loads(Path(path).read_text())["edges"]
        student = derive(supernet, rows).eval()
        _, ndcg = emd_distill.validate(student, data, users, MAX_LENGTH, "cpu")
        scores[";".join(map(",".join, rows))] = ndcg
    return derive(supernet, edges)


adarec_search.derive = derive_all
adarec_search.main(argv)
print(json.dumps(scores))
