"""Train RecBole's SASRec for one epoch on one thread; run.py runs it where RecBole is, and reads its seconds.

runs/recbole/bin/python results/recbole_epoch.py data/citeulike.txt
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
from recbole.quick_start import run_recbole

SETTINGS = {  # those of --max-length 50 --dim 50 --dropout 0.5; each position is a row of a batch
    "MAX_ITEM_LIST_LENGTH": 50,
    "hidden_size": 50,
    "inner_size": 50,
    "n_layers": 2,
    "n_heads": 1,
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.5,
    "attn_dropout_prob": 0.0,
    "loss_type": "CE",
    "train_neg_sample_args": None,
    "train_batch_size": 2048,
    "epochs": 1,
    "eval_step": 0,
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "show_progress": False,
    "use_gpu": False,
}

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    rows = Path(sys.argv[1]).read_text().splitlines()
    table = [f"{row}\t{time}".replace(" ", "\t") for time, row in enumerate(rows)]
    (Path(folder) / "x").mkdir()
    head = "user_id:token\titem_id:token\ttimestamp:float"
    (Path(folder) / "x/x.inter").write_text("\n".join([head, *table]) + "\n")
    os.chdir(folder)  # where it leaves logs
    run_recbole("SASRec", "x", config_dict=SETTINGS | {"data_path": folder}, saved=False)
