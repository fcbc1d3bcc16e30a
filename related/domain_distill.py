"""Domain-adaptive distillation: a teacher of one scene, a student for another, of which no label is known.

Kothandaraman, Nambiar and Mittal, "Domain Adaptive Knowledge Distillation for Driving Scene Semantic
Segmentation", 2020, arXiv 2011.08007; here a domain is a scene: other users of the same items.

    L = L_CE + L_output + L_feature + L_pseudo

L_CE is of the source; L_output = KL(q || p) and L_feature = mean (H^S_L W - H^T_L)^2 are of both scenes;
L_pseudo, of the target, is the cross-entropy with the item that the teacher ranks first.

    python related/domain_distill.py data/ml-100k.txt --split --out runs/scene     # -source.txt, -target.txt
    python related/domain_distill.py runs/scene-target.txt --source runs/scene-source.txt --teacher T.pt2 \
        --student S.pt2 --out runs/s.pt2

Reads interactions (data/README.md) of target and source, a teacher of the source and an untrained student of
the target; writes the student of the last epoch. Of the target it sees what was read, not what came next.
Shapes: B users, T positions, N real ones, d features, V items, item 0 is padding.
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
import torch.nn.functional as F
from torch import nn


def output_loss(z, z_T):
    """L_output = KL(q || p), mean over positions; p of the student's scores z [N, V], q of the teacher's."""
    return F.kl_div(z.log_softmax(1), z_T.log_softmax(1), reduction="batchmean", log_target=True)


def feature_loss(state, state_T):
    """L_feature: mean square difference of the last states [N, d_T], the student's already projected."""
    return F.mse_loss(state, state_T)


def pseudo_loss(z, z_T):
    """L_pseudo: cross-entropy with the teacher's best item for a label; z, z_T [N, V]."""
    return F.cross_entropy(z, z_T.argmax(1))


def split(args):
    """Write two scenes of one data set: the users with the longer histories, the source, and the others.

    A last row of a user of its own in each tells how many items there are.
    """
    user_ids, starts, items = read_interactions(args.data)
    length, last = np.diff(starts), f"{user_ids.max() + 1} {items.max()}\n"
    source = length > np.median(length)
    for name, chosen in (("source", source), ("target", ~source)):
        kept = np.repeat(chosen, length)
        rows = zip(np.repeat(user_ids, length)[kept], items[kept], strict=True)
        Path(f"{args.out}-{name}.txt").write_text("".join(f"{user} {item}\n" for user, item in rows) + last)


def train(args):
    """Train the student for the target, write it."""
    torch.manual_seed(args.seed)
    target, source = (read_interactions(path) for path in (args.data, args.source))
    last_ids = max(target[0].max(), source[0].max()).item(), int(target[2].max())
    if source[2].max() != last_ids[1]:
        sys.exit(f"{args.source} has {source[2].max()} items, {args.data} {last_ids[1]}: not the same ones")
    program, config = load_model(args.student, *last_ids, args.data)
    longest = config["max_length"]
    taught_by, config_T = load_model(args.teacher, *last_ids, args.source, longest)
    student = with_dropout(program.module(), True).to(args.device)
    teacher = with_dropout(taught_by.module(), False).to(args.device).requires_grad_(False)
    W = nn.Linear(config["dim"], config_T["dim"]).to(args.device)
    rows, rows_t = (training_rows(p, d[1], longest) for p, d in ((args.source, source), (args.data, target)))
    rng, zero = np.random.default_rng(args.seed), torch.zeros((), device=args.device)

    def ask(model, ids, inputs, real):
        hidden, output, item_vectors = model(ids, inputs)
        return hidden[-1][real], output[real] @ item_vectors[1:].T

    def loss_of(batch):
        *seen, label = batch_of(source, rows, batch, args.device)
        *unlabelled, _ = batch_of(target, rows_t, rng.choice(len(rows_t[0]), len(batch)), args.device)
        parts = dict.fromkeys(("L_CE", *(f"L_{name}" for name in args.losses)), zero)
        for about in (seen, unlabelled):
            (state, z), (state_T, z_T) = ask(student, *about), ask(teacher, *about)
            if about is seen:
                parts["L_CE"] = F.cross_entropy(z, label - 1)
            elif "pseudo" in args.losses:
                parts["L_pseudo"] = pseudo_loss(z, z_T)
            if "output" in args.losses:
                parts["L_output"] = parts["L_output"] + output_loss(z, z_T)
            if "feature" in args.losses:
                parts["L_feature"] = parts["L_feature"] + feature_loss(W(state), state_T)
        return parts["L_CE"] + args.weight * (sum(parts.values()) - parts["L_CE"]), parts

    follow(loss_of, [*student.parameters(), *W.parameters()], rows, args)
    student.cpu()
    write_student(args, program, config)


def follow(loss_of, learned, rows, args):
    """Follow the gradient of `loss_of(batch)`, a mean, and by name its parts; the rate falls to 0."""
    rng, positions = np.random.default_rng(args.seed), int((rows[2] - rows[1] - 1).sum())
    steps = -(-len(rows[0]) // args.batch_size)
    optimizer = torch.optim.AdamW(learned, args.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps * args.epochs)
    for epoch in range(1, args.epochs + 1):
        means = {}
        for batch in np.array_split(rng.permutation(len(rows[0])), steps):
            loss, parts = loss_of(batch)
            share = int((rows[2] - rows[1] - 1)[batch].sum()) / positions  # positions count alike
            optimizer.zero_grad()
            (loss * share * steps).backward()
            optimizer.step()
            schedule.step()
            means = {name: means.get(name, 0) + part.detach() * share for name, part in parts.items()}
        if not all(mean.isfinite() for mean in means.values()):
            sys.exit(f"the loss became NaN or infinite in epoch {epoch}; lower --learning-rate")
        print(f"epoch {epoch:3}", *(f" {name} {mean:.4f}" for name, mean in means.items()), flush=True)


# ---- As in the stages ------------------------------------------------------------------------------------


def with_dropout(module, on, share=None):
    """`.train()` and `.eval()` for the module of a loaded program, which has neither; returns `module`.

    Dropout stands in its graph as dropout(x, share, on); a GRU or LSTM has the two as well, and on a GPU it
    learns only while it is on. BatchNorm stays as exported.
    """
    aten = torch.ops.aten
    place = {aten.dropout.default: 1, aten.gru.input: 5, aten.lstm.input: 5}  # of `share` among the arguments
    nodes = [node for node in module.graph.nodes if node.target in place]
    if share is not None and not any(node.target is aten.dropout.default or node.args[5] for node in nodes):
        sys.exit("the student was exported without dropout; leave --dropout out")
    for node in nodes:
        k = place[node.target]
        node.args = *node.args[:k], node.args[k] if share is None else share, on, *node.args[k + 2 :]
    module.recompile()
    return module


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


def training_rows(path, starts, max_length):
    """Users [N] with two training items or more, of whom the last max_length + 1 are items[begin:end]."""
    train_end, _ = leave_one_out(starts)
    users = np.flatnonzero(train_end - starts[:-1] >= 2)
    if len(users) < 2:
        sys.exit(f"{path}: fewer than 2 users have 2 interactions to train on")
    return users, np.maximum(starts[users], train_end[users] - max_length - 1), train_end[users]


def pad_batch(items, begin, end):
    """Histories `items[begin[k]:end[k]]` as rows, padded with 0 on the right: int64 tensor [B, T]."""
    rows = begin[:, None] + np.arange(max(1, (end - begin).max()))  # [B, T]
    inside = rows < end[:, None]
    return torch.from_numpy(np.where(inside, items[np.where(inside, rows, 0)], np.int64(0)))


def batch_of(data, rows, batch, device):
    """ids [B], inputs [B, T], which of them are real, and the items that come next, [N], of rows `batch`."""
    (user_ids, _, items), (users, begin, end) = data, (column[batch] for column in rows)
    inputs, target = pad_batch(items, begin, end - 1).to(device), pad_batch(items, begin + 1, end).to(device)
    return torch.from_numpy(user_ids[users]).to(device), inputs, inputs > 0, target[inputs > 0]


def sha256_of(path):
    """SHA-256 of a file, in hexadecimal: a model file names the data it was trained on by it."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


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


def write_student(args, program, config):
    """Write `program` as a model file."""
    made = {key: config.get(key) for key in ("items", "max_length", "architecture")}
    made |= {"stage": Path(__file__).stem, "data_sha256": sha256_of(args.data)}
    buffer, temporary = io.BytesIO(), Path(f"{args.out}.tmp")
    with_dropout(program.graph_module, False)
    torch.export.save(program, buffer, extra_files={"config.json": json.dumps(made)})
    try:
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(args.out)
    finally:
        temporary.unlink(missing_ok=True)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """`--help`: the words at the top of this file as they stand, and each option's default."""


def main(argv=None):
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("data", help="interactions, `user item` a row: .txt or .npy (data/README.md)")
    add("--teacher", help="model file to learn from. Load only trusted ones")
    add("--student", help="untrained model file of the target")
    add("--out", required=True, help="model file to write")
    add("--source", help="interactions of the scene that has labels")
    add("--split", action="store_true", help="write two scenes, of long and of short histories")
    names = "output", "feature", "pseudo"
    add("--losses", nargs="*", choices=names, default=names, help="beside L_CE; none: the source alone")
    add("--weight", type=float, default=1.0, help="of each of the losses beside L_CE")
    add("--learning-rate", type=float, default=5e-3, help="of AdamW; it falls to 0")
    add("--batch-size", type=int, default=32, help="users a step")
    add("--epochs", type=int, default=30, help="passes over all users")
    add("--seed", type=int, default=0, help="same seed, data and machine: same file")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    numbers = [x for x in vars(args).values() if type(x) in (int, float)]
    if min(args.epochs, args.batch_size) < 1 or not all(x >= 0 for x in numbers):
        parser.error("--epochs and --batch-size are counts from 1, and no number is below 0")
    if not args.split and not (args.source and args.teacher and args.student):
        parser.error("give --source, --teacher and --student, or --split")
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        (split if args.split else train)(args)
    except (OSError, KeyboardInterrupt) as error:
        sys.exit(f"{getattr(error, 'filename', args.out)}: {getattr(error, 'strerror', 'stopped')}")


if __name__ == "__main__":
    main()
