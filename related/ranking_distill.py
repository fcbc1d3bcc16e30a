"""RRD, relaxed ranking distillation: a student learns the order of its teacher's best items.

Kang, Hwang, Kweon and Yu, "DE-RRD: A Knowledge Distillation Framework for Recommender System", CIKM 2020,
arXiv 2012.04357. This is RRD, not DE, the other half of the paper.

For each history, K interesting items are drawn, mostly among the teacher's best ones. Then, uninteresting
items are drawn uniformly among those that are left. Neither list has an item that the history contains. The
student learns that the interesting items come first, in the teacher's order. The order of the uninteresting
ones does not matter. z_k is the student's score of interesting item k, z_l that of an uninteresting item l:

    loss = L_CE + lambda L_RRD
    L_RRD = - mean over lists of sum_{k=1..K} log( exp(z_k) / (sum_{j=k..K} exp(z_j) + sum_l exp(z_l)) )

The paper has one list per user. A sequence model could have a list after each position. Here, each step draws
one position of each history. This is as cheap as one list per user, and more positions teach. As in L_CE, a
batch counts by its number of positions. L_CE is a softmax over all items, also for the files of
bidirectional_distill.py --base bpr and cdae.

    python related/ranking_distill.py data/ml-100k.txt --teacher runs/four.pt2 --student runs/two.pt2 \
        --out runs/ranking.pt2

Reads   interactions, `user item` a row (data/README.md); a student and its teacher (README.md, "The model
        file").
Writes  OUT, the student of the last epoch.
Shapes  B users, T positions, N real positions, V items, K interesting and M uninteresting items. Item 0 is
        padding.
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
import torch.nn.functional as F
from torch.export.passes import move_to_device_pass

# torchrun sets both: which process this is, and of how many
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# ---- The loss (section 4.2) ------------------------------------------------------------------------------


def rrd_loss(z_interesting, z_uninteresting):
    """L_RRD: z_interesting [B, K] in the teacher's order, best first; z_uninteresting [B, M].

    Each term compares an interesting item with itself, with the interesting items that are ranked below it,
    and with all uninteresting ones.
    """
    from_k_on = z_interesting.flip(1).logcumsumexp(1).flip(1)  # [B, K]: log sum_{j=k..K} exp(z_j)
    uninteresting = z_uninteresting.logsumexp(1, keepdim=True)  # [B, 1]
    return (torch.logaddexp(from_k_on, uninteresting) - z_interesting).sum(1).mean()


# ---- The items (section 4.2) -----------------------------------------------------------------------------


def draw_interesting(scores, K, temperature):
    """K different items [B, K] of each row, best first. p of rank r is proportional to exp(-r / temperature).

    scores [B, V+1] of the teacher; -inf for an item that must not be drawn.
    """
    # one of the K best is always left, and an item 30 temperatures below it is e^-30 < 1e-13 times as likely
    num_best = min(scores.shape[1], K + math.ceil(30 * temperature))
    best = scores.topk(num_best).indices  # sorted, best first
    log_p = -torch.arange(num_best, device=scores.device) / temperature
    log_p = log_p.masked_fill(scores.gather(1, best) == -math.inf, -math.inf)
    # the K largest of log p + Gumbel noise are drawn without replacement, with probabilities p
    gumbel = -torch.empty_like(log_p).exponential_().log()
    ranks = (log_p + gumbel).topk(K).indices.sort().values
    return best.gather(1, ranks)


def draw_uninteresting(scores, interesting, M):
    """M different items [B, M] of each row, uniformly among the items that are not `interesting` [B, K].

    Items with the score -inf are not drawn either.
    """
    p = (scores > -math.inf).float().scatter(1, interesting, 0.0)
    return p.multinomial(M)


# ---- Training --------------------------------------------------------------------------------------------


def train(args):
    """Train the student beside its teacher, and write the student."""
    torch.manual_seed(args.seed)
    data = read_interactions(args.data)
    student, config = load_model(args.student, data, args.device)
    program = torch.export.load(args.student)  # stays on the CPU, to be saved
    teacher, config_T = load_model(args.teacher, data, args.device)
    if config_T["max_length"] < config["max_length"] or config_T["items"] != config["items"]:
        sys.exit("a teacher must read {max_length} items and be for {items} items".format(**config))
    if args.interesting + args.uninteresting + config["max_length"] > len(data.catalogue):
        sys.exit(f"{args.data} has {len(data.catalogue)} items: too few for K and M and a history")
    student, teacher = with_dropout(student, True), teacher.requires_grad_(False)
    histories = training_rows(data, config["max_length"])
    never = np.setdiff1d(np.arange(config["items"] + 1), data.catalogue)  # padding and items that never occur

    def loss_of(batch):
        ids, inputs, real, target = batch_of(data, histories, batch, args.device)
        _, output, item_vectors = student(ids, inputs)
        l_ce = F.cross_entropy(output[real] @ item_vectors[1:].T, target - 1)
        # one position of each history, and the items that the models have read by then
        rows, position = torch.arange(len(batch)), real.float().multinomial(1)[:, 0]
        later = torch.arange(inputs.shape[1]) > position[:, None]
        read = inputs.masked_fill(later.to(args.device), 0)
        _, output_T, vectors_T = teacher(ids, inputs)
        scores_T = (output_T[rows, position] @ vectors_T.T).scatter(1, read, -math.inf)  # [B, V+1]
        scores_T[:, never] = -math.inf
        interesting = draw_interesting(scores_T, args.interesting, args.temperature)
        uninteresting = draw_uninteresting(scores_T, interesting, args.uninteresting)
        scores = output[rows, position] @ item_vectors.T  # [B, V+1] of the student
        l_rrd = rrd_loss(scores.gather(1, interesting), scores.gather(1, uninteresting))
        return l_ce + args.weight * l_rrd, {"L_CE": l_ce, "L_RRD": l_rrd}

    follow(loss_of, [*student.parameters()], histories, args)
    args.base = config.get("settings", {}).get("base", "sequence")  # bidirectional_distill.py asks for it
    write_student(args, data, program, student, config)


def follow(loss_of, weights, histories, args):
    """Minimise a loss with AdamW. The learning rate falls to 0. Print the terms of the loss, a line an epoch.

    loss_of(batch) returns the loss, a mean over the positions of a batch, and its terms by name.
    """
    lengths = histories.end - histories.begin - 1
    num_positions, num_batches = int(lengths.sum()), math.ceil(len(lengths) / args.batch_size)
    optimizer = torch.optim.AdamW(weights, args.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, args.epochs * num_batches)
    for epoch in range(1, args.epochs + 1):
        means, (_, batches) = {}, epoch_batches(lengths, args.batch_size, args.seed, epoch)
        for batch in batches:
            loss, terms = loss_of(batch)
            share = int(lengths[batch].sum()) / num_positions  # of the positions of the epoch
            optimizer.zero_grad()
            (loss * share * num_batches).backward()  # each position of the epoch counts alike
            optimizer.step()
            schedule.step()
            means = {name: means.get(name, 0) + term.detach() * share for name, term in terms.items()}
        if not all(mean.isfinite() for mean in means.values()):
            sys.exit(f"the loss is NaN or infinite in epoch {epoch}; lower --learning-rate")
        print(f"epoch {epoch:3}", *(f" {name} {mean:.4f}" for name, mean in means.items()), flush=True)


def epoch_batches(lengths, batch_size, seed, epoch):
    """The random generator and the batches (arrays of indices) of this epoch, the same in every process.

    Also seeds torch for this epoch. Histories are shuffled, cut into groups, and sorted by `lengths` within a
    group, so that batches have little padding. A group has 64 batches, or a quarter of all if that is less.
    """
    rng = np.random.default_rng([seed, epoch])
    torch.manual_seed(int(rng.integers(2**62)) + RANK)  # dropout differs between processes
    order = rng.permutation(len(lengths))
    group = batch_size * max(1, min(64, len(lengths) // batch_size // 4))
    groups = [order[k : k + group] for k in range(0, len(order), group)]
    order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in groups])
    batches = np.array_split(order, math.ceil(len(order) / batch_size))
    if min(map(len, batches)) < PROCESSES:
        sys.exit(f"{PROCESSES} processes are too many: some would get no rows of a batch")
    return rng, [batches[k] for k in rng.permutation(len(batches))]


# ---- Data: read, split by leave-one-out, pad -------------------------------------------------------------

# The history of user_ids[u] is items[starts[u]:starts[u + 1]], oldest first. Leave-one-out: user u trains on
# items[starts[u]:train_end[u]]. A user with 3 interactions or more is `evaluated`: the validation item stands
# at train_end[u], the test item after it. `catalogue` are the items that occur; `sha256` is of the table.
Interactions = namedtuple("Interactions", "path sha256 user_ids starts items train_end evaluated catalogue")
# Users, indices into user_ids, and for each of them the window items[begin:end]: int64 [N]
Histories = namedtuple("Histories", "users begin end")


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


def training_rows(data, max_length):
    """Histories to train on: the last max_length + 1 training items of each user who has two or more."""
    users = np.flatnonzero(data.train_end - data.starts[:-1] >= 2)  # two items: an input and its target
    if len(users) < 2:
        sys.exit(f"{data.path}: fewer than 2 users have 2 interactions to train on; use a larger log")
    end = data.train_end[users]
    return Histories(users, np.maximum(data.starts[users], end - max_length - 1), end)


def pad_batch(items, begin, end):
    """Histories items[begin[b]:end[b]] as rows, padded with 0 on the right: int64 tensor [B, T]."""
    places = begin[:, None] + np.arange(max(1, (end - begin).max()))  # [B, T]
    inside = places < end[:, None]
    return torch.from_numpy(np.where(inside, items[np.where(inside, places, 0)], np.int64(0)))


def batch_of(data, histories, batch, device):
    """User ids [B], inputs [B, T], which inputs are real [B, T] (on the CPU), and the next items [N]."""
    users, begin, end = (column[batch] for column in histories)
    inputs, targets = pad_batch(data.items, begin, end - 1), pad_batch(data.items, begin + 1, end)
    real, ids = inputs > 0, torch.from_numpy(data.user_ids[users])
    return ids.to(device), inputs.to(device), real, targets[real].to(device)


# ---- Files -----------------------------------------------------------------------------------------------


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
            found = [list(result.shape) for result in (hidden, output, vectors)]
            needed = f"[L+1, 1, 1, d], [1, 1, e], [{config['items'] + 1}, e]"
            raise ValueError(f"for one item, its results have the shapes {found}, and should have {needed}")
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


def write_student(args, data, program, student, config):
    """Write `program`, with the weights of `student` and dropout off, as a model file."""
    with_dropout(program.graph_module, False)
    for name, weight in student.state_dict().items():
        program.state_dict[name].data.copy_(weight)
    kept = {"items", "max_length", "sees", "architecture"} & config.keys()
    paths = "data", "out", "teacher", "student", "source", "start", "generator"
    settings = {name: value for name, value in vars(args).items() if name not in paths}
    config = {name: config[name] for name in sorted(kept)} | {"settings": settings}
    config |= {"stage": Path(__file__).stem, "data_sha256": data.sha256}
    buffer, temporary = io.BytesIO(), Path(f"{args.out}.tmp")
    torch.export.save(program, buffer, extra_files={"config.json": json.dumps(config)})
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(args.out)  # no reader ever finds half a file


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
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add, count = parser.add_argument, number(int, 1)
    add("data", help="interactions, `user item` a row: .txt or .npy (data/README.md)")
    add("--teacher", required=True, help="model file to learn from. Load only files you trust")
    add("--student", required=True, help="model file to train")
    add("--out", required=True, help="model file to write, such as runs/ranking.pt2")
    add("--interesting", type=count, default=40, help="K: items of a list that the teacher ranks high")
    add("--uninteresting", type=count, default=40, help="M: items of a list from the rest")
    add("--temperature", type=number(float, 1e-3), default=10.0, help="in ranks; higher: worse items, too")
    add("--weight", type=number(float, 0), default=0.02, help="lambda; 0: L_CE alone")
    add("--learning-rate", type=number(float, 0), default=5e-3, help="of AdamW; falls to 0")
    add("--batch-size", type=count, default=32, help="users a step")
    add("--epochs", type=count, default=30, help="passes over all users")
    add("--seed", type=number(int, 0), default=0, help="same seed, data and machine: same file")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    try:
        refuse_to_overwrite([args.out], [args.data, args.teacher, args.student])
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)  # before the training, in case this fails
        train(args)
    except (OSError, KeyboardInterrupt) as error:  # a file that cannot be read or written, or Ctrl-C
        sys.exit(f"{args.out} is not written: {str(error) or 'stopped'}")


if __name__ == "__main__":
    main()
