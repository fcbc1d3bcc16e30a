"""ASReP: pseudo-prior items in front of short histories.

Liu, Fan, Wang and Yu, "Augmenting Sequential Recommendation with Pseudo-Prior Items via Reversely
Pre-training Transformer", SIGIR 2021, arXiv 2105.00522.

A model that is trained backwards in time predicts the item before a history. The items that it generates make
short histories longer. Then its weights are trained forwards, on the longer histories. sasrec_teacher.py and
emd_distill.py train. This script reverses the histories and generates the items.

The reversed histories contain no validation or test item. In the published code they do.

    python related/asrep.py data/beauty.txt --out runs/reversed.txt
    python sasrec_teacher.py runs/reversed.txt --out runs/backward.pt2
    python related/asrep.py data/beauty.txt --backward runs/backward.pt2 --out runs/asrep.txt
    python emd_distill.py runs/asrep.txt --student runs/asrep.pt2 --out runs/forward.pt2
    python evaluate.py data/beauty.txt runs/forward.pt2 --inputs runs/asrep.txt

Reads   interactions, `user item` a row (data/README.md); with --backward, also the model that was trained on
        the reversed histories (README.md, "The model file").
Writes  OUT, interactions. With --backward, also this model as a model of the new data: OUT with .pt2 instead
        of .txt.
Shapes  B users, T positions, V items. Item 0 is padding.
"""

import argparse
import hashlib
import io
import json
import logging
import math
import os
import re
import sys
import warnings
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from torch.export.passes import move_to_device_pass

# ---- The method (sections 3.1 and 3.2) -------------------------------------------------------------------


def reversed_histories(data):
    """Training histories, newest item first, as rows `user item` [n, 2].

    A last row holds the largest item id, so the number of items stays. Its user has no other interaction, and
    so is neither trained on nor evaluated.
    """
    bounds = zip(data.user_ids, data.starts[:-1], data.train_end, strict=True)
    rows = [(user, item) for user, begin, end in bounds for item in data.items[begin:end][::-1]]
    return np.array([*rows, (data.user_ids.max() + 1, data.items.max())])


@torch.no_grad()
def prior_items(model, ids, histories, k, catalogue, max_length, device):
    """`k` items before each history, the latest of them first: [B, k].

    Each is the item of the `catalogue` with the best score that is neither in the history nor generated yet.
    `model` was trained backwards; ids [B]; `histories` are B arrays of items, newest first.
    """
    lengths = np.array([len(history) for history in histories])
    table = np.zeros((len(histories), lengths.max() + k), np.int64)  # a history and its items a row
    for row, history in zip(table, histories, strict=True):
        row[: len(history)] = history
    first = np.arange(len(table)) * table.shape[1]  # index of each row in table.ravel()
    for n in range(k):
        end = first + lengths + n
        window = pad_batch(table.ravel(), np.maximum(first, end - max_length), end).to(device)
        _, output, item_vectors = model(torch.from_numpy(ids).to(device), window)
        scores = last_output(output, window) @ item_vectors.T  # [B, V+1]
        scores.scatter_(1, torch.from_numpy(table).to(device), -math.inf)
        scores[:, np.setdiff1d(np.arange(scores.shape[1]), catalogue)] = -math.inf
        table.ravel()[end] = scores.argmax(1).cpu().numpy()
    return np.take_along_axis(table, lengths[:, None] + np.arange(k), 1)


def lengthened_histories(model, data, max_length, args):
    """All interactions, with --items pseudo-prior items before each short history: rows `user item` [n, 2].

    A short history has fewer than --shorter-than training items. A user who is not evaluated gets no items,
    because the new data would evaluate this user.
    """
    is_short = data.evaluated & (data.train_end - data.starts[:-1] < args.shorter_than)
    short, prior = np.flatnonzero(is_short), {}
    known_end = data.starts[1:] if args.whole else data.train_end
    for n in range(0, len(short), 256):
        users = short[n : n + 256]
        known = [data.items[data.starts[user] : known_end[user]][::-1] for user in users]
        of_users = model, data.user_ids[users], known, args.items, data.catalogue
        items = prior_items(*of_users, max_length, args.device)
        prior |= zip(users.tolist(), items[:, ::-1].tolist(), strict=True)  # oldest first
    rows = []
    for user, history in enumerate(np.split(data.items, data.starts[1:-1])):
        rows += [(data.user_ids[user], item) for item in (*prior.get(user, ()), *history)]
    return np.array(rows)


def checksum(rows):
    """The `sha256` of Interactions for the rows `user item` [n, 2]."""
    return hashlib.sha256(np.ascontiguousarray(rows, "<i8")).hexdigest()


def augment(args):
    """Write reversed histories, or with --backward the lengthened ones and the model to train on them."""
    data = read_interactions(args.data)
    rows, report = reversed_histories(data), args.out
    if args.backward:
        model, config = load_model(args.backward, data, args.device, any_data=True)
        if config.get("data_sha256", checksum(rows)) != checksum(rows):
            sys.exit(f"{args.backward} was trained on other data than the reversed histories of {args.data}")
        if args.items + args.shorter_than + 2 > len(data.catalogue):
            sys.exit(f"{args.data} has {len(data.catalogue)} items: too few for --shorter-than and --items")
        rows = lengthened_histories(model, data, config["max_length"], args)
        config = {name: config[name] for name in ("items", "max_length")}
        config |= {"stage": Path(__file__).stem, "data_sha256": checksum(rows)}
        config["settings"] = {name: vars(args)[name] for name in ("shorter_than", "items", "whole")}
        buffer, program = io.BytesIO(), torch.export.load(args.backward)  # on the CPU
        torch.export.save(program, buffer, extra_files={"config.json": json.dumps(config)})
        write(Path(args.out).with_suffix(".pt2"), buffer.getvalue())
        report = f"{args.out}: {len(rows):,} interactions, {len(data.items):,} of them real"
    write(args.out, "".join(f"{user} {item}\n" for user, item in rows).encode())
    print(report)


# ---- Data: read, split by leave-one-out, pad -------------------------------------------------------------

# The history of user_ids[u] is items[starts[u]:starts[u + 1]], oldest first. Leave-one-out: user u trains on
# items[starts[u]:train_end[u]]. A user with 3 interactions or more is `evaluated`: the validation item stands
# at train_end[u], the test item after it. `catalogue` are the items that occur; `sha256` is of the table.
Interactions = namedtuple("Interactions", "path sha256 user_ids starts items train_end evaluated catalogue")


def read_interactions(path):
    """Read a data file: `user item` per row, a user's rows together and in time order (data/README.md).

    Returns Interactions, with users in the order of the file. Ids go from 1 to 99,999,999.
    """
    is_text = not str(path).endswith(".npy")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of an empty file
            table = np.loadtxt(file, int, comments=None, ndmin=2) if is_text else np.load(path, mmap_mode="r")
        users, items = table.T
        if table.ndim != 2 or table.dtype.kind not in "iu" or not 0 < table.min() <= table.max() < 10**8:
            raise ValueError
    except OSError:
        raise
    except Exception:  # numpy raises many kinds, so look for the first bad line
        lines = enumerate(Path(path).read_text(errors="replace").splitlines() if is_text else [], 1)
        good = re.compile(r"\s*(0*[1-9]\d{0,7}\s+0*[1-9]\d{0,7}\s*)?").fullmatch
        bad = next((f", line {n}, {line[:40]!r}" for n, line in lines if not good(line)), "")
        sys.exit(f"{path}{bad}: a row must be `user item`, two ids from 1 (data/README.md)")
    first = np.append(0, 1 + np.flatnonzero(np.diff(users)))  # rows where another user begins
    if len(np.unique(users[first])) < len(first):
        sys.exit(f"{path}: the rows of a user must stand together, oldest first")
    sha256 = hashlib.sha256(np.ascontiguousarray(table, "<i8")).hexdigest()
    user_ids, starts = users[first].astype(int), np.append(first, len(users))
    items, evaluated, catalogue = items.astype(int, copy=is_text), np.diff(starts) >= 3, np.unique(items)
    if gaps := catalogue[-1] - len(catalogue):
        note = f"{path}: {gaps:,} item ids below {catalogue[-1]:,} never occur; data/prepare.py renumbers"
        sys.exit(note) if gaps > 10**6 + 100 * len(catalogue) else print(f"note: {note}", file=sys.stderr)
    train_end = starts[1:] - 2 * evaluated
    return Interactions(path, sha256, user_ids, starts, items, train_end, evaluated, catalogue)


def pad_batch(items, begin, end):
    """Histories items[begin[b]:end[b]] as rows, padded with 0 on the right: int64 tensor [B, T]."""
    places = begin[:, None] + np.arange(max(1, (end - begin).max()))  # [B, T]
    inside = places < end[:, None]
    return torch.from_numpy(np.where(inside, items[np.where(inside, places, 0)], np.int64(0)))


def last_output(output, items):
    """The output [B, e] after the last item of each history; output [B, T, e], items [B, T]."""
    return output[torch.arange(items.shape[0], device=items.device), (items > 0).sum(1) - 1]


# ---- Files -----------------------------------------------------------------------------------------------

# torchrun sets both: which process this is, and of how many
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def write(path, content):
    """Write the bytes `content` to `path`. Write a temporary file first: no reader ever finds half a file."""
    if RANK:  # one process writes
        return
    path = Path(path).resolve()  # the target of a link
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # after a full disk or Ctrl-C


def with_dropout(module, on):
    """Switch the dropout of a loaded program `on` or off: its module has no working .train() and .eval().

    Dropout stands in the graph as dropout(x, p, on). A GRU or an LSTM has the same two arguments. BatchNorm
    stays as it was exported. Returns `module`.
    """
    aten = torch.ops.aten
    place = {aten.dropout.default: 2, aten.gru.input: 6, aten.lstm.input: 6}  # of `on` among the arguments
    for node in module.graph.nodes:
        if node.target in place:
            node.update_arg(place[node.target], on)
    module.recompile()
    return module


def load_model(path, data, device, any_data=False):
    """The module of a model file on `device`, with dropout off, and its config.

    This adds to the config `layers`, L, and `dim`, d, of the hidden states, and `window`, how many recent
    items the output depends on. The run ends if the file is damaged, or is no model for the ids of `data`. It
    also ends if the model was trained on other data, unless `any_data`.
    """
    logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # it logs a traceback for a bad file
    file, extra, num_items = io.BytesIO(Path(path).read_bytes()), {"config.json": ""}, data.items.max()
    try:
        if damaged := zipfile.ZipFile(file).testzip():
            raise ValueError(f"{damaged} in it is damaged")
        file.seek(0)
        program = torch.export.load(file, extra_files=extra)
        with_dropout(program.graph_module, False)
        config = json.loads(extra["config.json"])
        if config["items"] < num_items:
            raise ValueError(f"it is for {config['items']} items, the data have ids up to {num_items}")
        if min(config["max_length"], config.get("sees", 1)) < 1:
            raise ValueError("its max_length or sees is below 1")
        example = torch.tensor([data.user_ids.max()]), torch.tensor([[num_items]])
        hidden, output, vectors = program.module()(*example)
        shapes = *vectors.shape, *hidden.shape[1:3]
        if shapes != (config["items"] + 1, output.shape[2], 1, 1):
            raise ValueError("its results do not have the shapes of a model file")
        if not any_data and config.get("data_sha256", data.sha256) != data.sha256:
            raise ValueError("it was trained on other data and may know their test items")
        # without `sees`, the output depends on all items
        longest, window = config["max_length"], min(config["max_length"], config.get("sees", 10**9))
        items = torch.randint(1, num_items + 1, (1, longest), generator=torch.Generator().manual_seed(0))
        whole, cut = (program.module()(example[0], items[:, -n:])[1][:, -1] for n in (longest, window))
        if not torch.allclose(whole, cut, rtol=1e-3, atol=1e-4):
            raise ValueError(f"its output depends on more than the last {window} items, which `sees` says")
        module = move_to_device_pass(program, device).module()
    except Exception as error:  # whatever unpickling meets in another file
        sys.exit(f"{path} is no model file for these data; {type(error).__name__}: {error}".splitlines()[0])
    return module, config | {"layers": len(hidden) - 1, "dim": hidden.shape[3], "window": window}


# ---- The command line ------------------------------------------------------------------------------------

# --help shows the text at the top of this file as it stands, and the default of each option
Help = type("Help", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {})


def number(kind, low, high=1e30):
    """The `type` of an option: a number of `kind`, int or float, from `low` to `high`."""

    def convert(text):
        if not low <= kind(text) <= high:  # NaN fails, too
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return kind(text)

    convert.__name__ = kind.__name__
    return convert


def refuse_to_overwrite(outputs, inputs):
    """End if one of the files `outputs` is one of the `inputs`, or is there and is no regular file."""
    for path in map(Path, outputs):
        is_input = path.exists() and any(path.samefile(other) for other in inputs if other)
        if is_input or path.exists() and not path.is_file():
            sys.exit(f"{path} cannot be written: it is an input, or not a regular file")


def main(argv=None):
    """Read the command line, and write the interactions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add, count = parser.add_argument, number(int, 1)
    add("data", help="interactions, `user item` a row: .txt or .npy (data/README.md)")
    add("--out", required=True, help="interactions to write, .txt")
    add("--backward", help="model trained on the reversed histories; without it, they are written")
    add("--shorter-than", type=count, default=20, help="M: histories of fewer training items get longer")
    add("--items", type=count, default=17, help="k: pseudo-prior items of each of these histories")
    add("--whole", action="store_true", help="generate also from validation and test items, as published")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    if not args.out.endswith(".txt"):
        parser.error("--out must end in .txt")
    try:
        outputs = [args.out, Path(args.out).with_suffix(".pt2")]
        refuse_to_overwrite(outputs[: 1 + bool(args.backward)], [args.data, args.backward])
        augment(args)
    except OSError as error:  # a file that cannot be read or written
        sys.exit(f"{error.filename or args.out}: {error.strerror}")


if __name__ == "__main__":
    main()
