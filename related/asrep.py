"""ASReP: pseudo-prior items in front of short histories.

Zhiwei Liu, Ziwei Fan, Yu Wang and Philip S. Yu, "Augmenting Sequential Recommendation with Pseudo-Prior Items
via Reversely Pre-training Transformer", SIGIR 2021, arXiv 2105.00522.

A model that is trained backwards in time says what may have come before. It makes short histories longer, and
the same weights then learn forwards on these. Training is what sasrec_teacher.py and emd_distill.py do; here
histories are turned round, and what was generated is put in front. Of a reversed history, too, the last two
items, which are the oldest, are held out: as in the published code, which however reverses the whole history.

    python related/asrep.py data/beauty.txt --out runs/reversed.txt
    python sasrec_teacher.py runs/reversed.txt --out runs/backward.pt2
    python related/asrep.py data/beauty.txt --backward runs/backward.pt2 --out runs/asrep.txt
    python emd_distill.py runs/asrep.txt --student runs/asrep.pt2 --out runs/forward.pt2
    python evaluate.py data/beauty.txt runs/forward.pt2 --inputs runs/asrep.txt

Reads   interactions, `user item` a row (data/README.md); with --backward a model of reversed ones.
Writes  interactions; with --backward also that model, as one of the new data, OUT with .pt2 for .txt.
Shapes  B users, T positions, V items, item 0 is padding.
"""

import argparse
import hashlib
import io
import json
import logging
import re
import sys
import warnings
import zipfile
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from torch import distributed as dist
from torch.fx.node import map_aggregate

# ---- The method: section 3.1 and 3.2 ---------------------------------------------------------------------


def backwards(user_ids, starts, items):
    """Training histories, newest item first, as rows `user item` [n, 2].

    A last row, of a user of its own, who is neither trained on nor judged, holds the last item's id: the
    catalogue stays as large as it is, also where that item is in no training history.
    """
    train_end, _ = leave_one_out(starts)
    parts = zip(user_ids, starts, train_end, strict=False)
    rows = [(user, item) for user, b, e in parts for item in items[b:e][::-1]]
    return np.array([*rows, (user_ids.max() + 1, items.max())])


@torch.no_grad()
def prior_items(model, ids, histories, k, max_length, device):
    """`k` items that came before each history [B, k], the nearest first: each time the best-scored item which
    is not in the history, nor generated before.

    `model` was trained backwards; ids [B]; `histories` are B arrays of items, newest first.
    """
    length = np.array([len(history) for history in histories])
    rows = np.zeros((len(histories), length.max() + k), np.int64)
    for row, history in zip(rows, histories, strict=True):
        row[: len(history)] = history
    begin = np.arange(len(rows)) * rows.shape[1]
    for n in range(k):
        end = begin + length + n
        window = pad_batch(rows.ravel(), np.maximum(begin, end - max_length), end).to(device)
        _, output, item_vectors = model(torch.from_numpy(ids).to(device), window)
        last = output[torch.arange(len(end)), (window > 0).sum(1) - 1]
        scores = (last @ item_vectors.T).scatter(1, torch.from_numpy(rows).to(device), -torch.inf)
        scores[:, 0] = -torch.inf
        rows.ravel()[end] = scores.argmax(1).cpu().numpy()
    return rows.ravel()[begin[:, None] + length[:, None] + np.arange(k)]


def lengthened(model, data, args, max_length):
    """All interactions [n, 2], with --items pseudo-prior ones, oldest first, in front of each history with
    fewer than --shorter-than training items; but not of a user who has no test item, and would get one.
    """
    user_ids, starts, items = data
    train_end, evaluated = leave_one_out(starts)
    short = np.flatnonzero(evaluated & (train_end - starts[:-1] < args.shorter_than))
    known_end, before = starts[1:] if args.whole else train_end, {}
    for users in np.array_split(short, -(-len(short) // 256)) if len(short) else []:
        known = [items[starts[user] : known_end[user]][::-1] for user in users]
        made = prior_items(model, user_ids[users], known, args.items, max_length, args.device)
        before |= zip(users.tolist(), made[:, ::-1].tolist(), strict=True)
    rows = []
    for user, history in enumerate(np.split(items, starts[1:-1])):
        rows += [(user_ids[user], item) for item in (*before.get(user, ()), *history)]
    return np.array(rows)


def text(rows):
    """A data file of `rows`, as bytes."""
    return "".join(f"{user} {item}\n" for user, item in rows).encode()


def augment(args):
    """Write reversed histories, or with --backward the lengthened ones and the model to train on them."""
    data = user_ids, starts, items = read_interactions(args.data)
    if not args.backward:
        rows = backwards(*data)
    else:
        program, config = load_model(args.backward, int(user_ids.max()) + 1, int(items.max()))
        known = hashlib.sha256(text(backwards(*data))).hexdigest()
        if config.get("data_sha256", known) != known:
            sys.exit(f"{args.backward} was trained on other data than the reversed histories of {args.data}")
        if args.items + args.shorter_than + 2 > items.max():
            sys.exit(f"{args.data} has {items.max()} items: too few for --shorter-than and --items")
        module = module_of(program, args.device)
        rows = lengthened(module, data, args, config["max_length"])
        module.cpu()  # whoever reads the file may have no other device
    content = text(rows)
    if args.backward:
        made = {"stage": Path(__file__).stem, "data_sha256": hashlib.sha256(content).hexdigest()}
        made |= {"settings": {name: vars(args)[name] for name in ("shorter_than", "items", "whole")}}
        buffer, kept = io.BytesIO(), {key: config[key] for key in ("items", "max_length")}
        torch.export.save(program, buffer, extra_files={"config.json": json.dumps(kept | made)})
        write(Path(args.out).with_suffix(".pt2"), buffer.getvalue())
    write(args.out, content)
    print(
        f"{args.out}: {len(rows):,} interactions, {len(items):,} of them real" if args.backward else args.out
    )


# ---- Data and files, as the stages have them -------------------------------------------------------------


def read_interactions(path):
    """Read a data file: `user item` a row, a user's rows together and in time order (data/README.md).

    Returns int64 `user_ids` [U], in file order, `starts` [U+1] and `items` [n]: the history of user_ids[k] is
    items[starts[k]:starts[k+1]], oldest first. Ids go from 1 to 99,999,999.
    """
    array = str(path).endswith(".npy")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an empty file, which is told below
            table = np.load(path, mmap_mode="r") if array else np.loadtxt(file, int, comments=None, ndmin=2)
        users, items = table.T
        first = np.append(0, 1 + np.flatnonzero(np.diff(users)))  # rows where another user begins
        if table.dtype.kind not in "iu" or not 0 < table.min() <= table.max() < 10**8:
            raise ValueError
    except (ValueError, OverflowError, EOFError, SyntaxError, TokenError):  # numpy's own words are few
        lines = enumerate([] if array else Path(path).read_text(errors="replace").splitlines(), 1)
        pair = re.compile(r"\s*(0*[1-9]\d{0,7}\s+0*[1-9]\d{0,7}\s*)?")
        bad = next((f", line {n}, {line[:40]!r}" for n, line in lines if not pair.fullmatch(line)), "")
        sys.exit(f"{path}{bad}: not `user item`, two ids from 1, a line (see data/README.md)")
    if len(np.unique(users[first])) < len(first):
        sys.exit(f"{path}: a user's rows stand apart; put them together, oldest first")
    return users[first].astype(int), np.append(first, len(users)), items.astype(int, copy=not array)


def leave_one_out(starts):
    """`train_end` and `evaluated` [U]: user k trains on items[starts[k]:train_end[k]]; with 3 interactions or
    more, `evaluated`, the validation item stands at train_end[k], and the test item behind it.
    """
    evaluated = np.diff(starts) >= 3
    return starts[1:] - 2 * evaluated, evaluated


def pad_batch(items, begin, end):
    """Histories `items[begin[k]:end[k]]` as rows, padded with 0 on the right: int64 tensor [B, T]."""
    rows = begin[:, None] + np.arange(max(1, (end - begin).max()))  # [B, T]
    inside = rows < end[:, None]
    return torch.from_numpy(np.where(inside, items[np.where(inside, rows, 0)], np.int64(0)))


def share():
    """Which of a batch's rows are this process's: all, unless torchrun has started several."""
    return slice(dist.get_rank(), None, dist.get_world_size()) if dist.is_initialized() else slice(None)


def sha256_of(path):
    """SHA-256 of a file, in hexadecimal: a model file names the data it was trained on by it."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write(path, content):
    """Write the bytes `content` to `path`, under another name first: no reader ever finds half a file."""
    if share().start:  # one process writes
        return
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk, Ctrl-C: half a file is of no use


def load_model(path, user_count, item_count, data=None, max_length=1, layers=0):
    """Program, and config with `layers` L and `dim` d of its hidden states, of a model file; ends unless it
    takes ids up to these counts, was trained on `data`, if given, and has this length and layers or more.
    """
    logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # of a bad file it would log a traceback
    file, extra = io.BytesIO(Path(path).read_bytes()), {"config.json": ""}
    try:
        if damaged := zipfile.ZipFile(file).testzip():
            raise ValueError(f"{damaged} in it is damaged")
        file.seek(0)
        program = torch.export.load(file, extra_files=extra)
        config = json.loads(extra["config.json"])
        hidden, output, vectors = program.module()(torch.tensor([user_count]), torch.tensor([[item_count]]))
        found = config["items"], *vectors.shape, *hidden.shape[1:3]
        if found != (item_count, item_count + 1, output.shape[2], 1, 1):
            raise ValueError(f"it is for {config['items']} items, the data have {item_count}")
        if config["max_length"] < max_length or len(hidden) <= layers:
            raise ValueError(f"it must read {max_length} items and have {layers} layers or more")
        if data and config.get("data_sha256", sha256_of(data)) != sha256_of(data):
            raise ValueError("it was trained on other data and may know their test items")
    except Exception as error:  # whatever unpickling meets in a file of another kind
        sys.exit(f"{path} is no model file for these data; {type(error).__name__}: {error}".splitlines()[0])
    return program, config | {"layers": len(hidden) - 1, "dim": hidden.shape[3]}


def module_of(program, device):
    """The module of a loaded program, on `device`, where it then makes its constants, too."""
    module = program.module().to(device)

    def there(x):
        return torch.device(device) if isinstance(x, torch.device) else x

    for part in module.modules():
        vars(part).update({k: x.to(device) for k, x in vars(part).items() if isinstance(x, torch.Tensor)})
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.args, node.kwargs = map_aggregate(node.args, there), map_aggregate(node.kwargs, there)
            part.recompile()
    return module


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """`--help`: the words at the top of this file as they stand, and each option's default."""


def main(argv=None):
    """Read the command line, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("data", help="interactions, `user item` a row: .txt or .npy (data/README.md)")
    add("--out", required=True, help="interactions to write, .txt")
    add("--backward", help="model trained on the reversed histories; none: write these")
    add("--shorter-than", type=int, default=20, help="M: lengthen histories of fewer training items")
    add("--items", type=int, default=17, help="k: pseudo-prior items for each")
    add("--whole", action="store_true", help="generate from validation and test items, too, as published")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    if min(args.shorter_than, args.items) < 1 or not args.out.endswith(".txt"):
        parser.error("--shorter-than and --items are counts from 1, and --out ends in .txt")
    if args.backward and Path(args.out).with_suffix(".pt2") == Path(args.backward):
        parser.error(f"--out would overwrite {args.backward}")
    try:
        augment(args)
    except OSError as error:
        sys.exit(f"{error.filename or args.out}: {error.strerror}")


if __name__ == "__main__":
    main()
