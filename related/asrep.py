"""ASReP: a model that is trained backwards in time makes short histories longer.

Liu, Fan, Wang and Yu, "Augmenting Sequential Recommendation with Pseudo-Prior Items via Reversely
Pre-training Transformer", SIGIR 2021, arXiv 2105.00522.

1. --reverse trains a model on reversed histories, so that it predicts the item before a history.
2. With this model as --generator, each short history gets generated items in front: pseudo-prior items.
3. Training goes on forwards, on the filled histories, from the weights of the generator (--start).

The generator reads training items only. In the published code, it also reads the validation and the test
item, right before it generates (--order published). The script prints how often the first generated item
occurs in a training history together with the user's test item. Compare both orders to see the leak.
A generated item can be the test item by chance; evaluate.py --inputs ranks it nevertheless.

    python sasrec_teacher.py data/ml-100k.txt --epochs 0 --out runs/untrained.pt2
    python related/asrep.py data/ml-100k.txt --start runs/untrained.pt2 --reverse --out runs/backward.pt2
    python related/asrep.py data/ml-100k.txt --start runs/backward.pt2 --generator runs/backward.pt2 \
        --fill 40 --out runs/asrep.pt2
    python evaluate.py data/ml-100k.txt runs/asrep.pt2 --inputs runs/asrep.txt

Reads   interactions, `user item` a row (data/README.md), and model files (README.md, "Your own model").
Writes  OUT, the model of the last epoch. With --generator, also the filled histories: OUT with .txt instead
        of .pt2.
Shapes  B users, T positions, N real positions, V items, k negatives. Item 0 is padding.
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
from scipy import sparse
from torch.export.passes import move_to_device_pass

# ---- Reversed and filled histories (sections 3.1 and 3.2) ------------------------------------------------


def reversed_histories(data):
    """`data` with the newest training item of each user first. Validation and test items keep their place."""
    items = data.items.copy()
    for begin, end in zip(data.starts[:-1], data.train_end, strict=True):
        items[begin:end] = items[begin:end][::-1]
    return data._replace(items=items)


def generator_input(data, user, order):
    """The generator's input for one user: the training items, newest first. `user` is an index into user_ids.

    With the order `published`, the validation and then the test item follow.
    """
    begin, end = data.starts[user], data.train_end[user]
    held_out = data.items[end : data.starts[user + 1]] if order == "published" else data.items[:0]
    return np.concatenate([data.items[begin:end][::-1], held_out])


@torch.no_grad()
def prior_items(model, ids, histories, k, catalogue, max_length, device):
    """`k` items before each history, in the order of generation, so the nearest to the history first: [B, k].

    Each is the item of the `catalogue` with the best score that is neither in the history nor generated yet.
    `model` was trained backwards; ids [B]; `histories` are B arrays of items, newest first.
    """
    lengths = np.array([len(history) for history in histories])
    table = np.zeros((len(histories), lengths.max() + k), np.int64)  # a row is a history and its new items
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


def generate(model, data, max_length, args):
    """The pseudo-prior items of each user, in the order of generation: arrays, empty for long histories.

    A history of n < --fill training items gets --fill - n items. A user with less than three items gets none:
    with more items, evaluate.py would evaluate this user.
    """
    missing = np.where(data.evaluated, args.fill - (data.train_end - data.starts[:-1]), 0)
    prior = [data.items[:0] for _ in missing]
    for k in np.unique(missing[missing > 0]):  # users who need equally many items, 256 at a time
        users = np.flatnonzero(missing == k)
        for part in np.array_split(users, math.ceil(len(users) / 256)):
            histories = [generator_input(data, user, args.order) for user in part]
            ids = data.user_ids[part]
            items = prior_items(model, ids, histories, k, data.catalogue, max_length, args.device)
            for user, generated in zip(part, items, strict=True):
                prior[user] = generated
    return prior


def filled_histories(data, prior):
    """`data` with the items prior[u] in front of the history of user u, so that the oldest stands first."""
    histories = np.split(data.items, data.starts[1:-1])
    filled = [np.concatenate([p[::-1], history]) for p, history in zip(prior, histories, strict=True)]
    starts = np.append(0, np.cumsum([len(history) for history in filled]))
    items = np.concatenate(filled)
    return data._replace(items=items, starts=starts, train_end=starts[1:] - 2 * data.evaluated)


def co_occurrence_of_first_item(data, prior):
    """Shares of users whose first generated item occurs together with another item in a training history.

    Users without generated items do not count. The other item is the user's test item, newest or oldest
    training item, or the test item of another user.
    """
    user = np.repeat(np.arange(len(data.user_ids)), np.diff(data.starts))
    in_training = np.arange(len(data.items)) < data.train_end[user]
    pairs = user[in_training], data.items[in_training]
    history = sparse.csr_array((np.ones(len(pairs[0])), pairs), (len(data.user_ids), data.items.max() + 1))
    together = history.T @ history  # [V+1, V+1]: in how many training histories both items are
    users = np.flatnonzero([len(items) for items in prior])
    first, test = np.array([prior[user][0] for user in users]), data.items[data.starts[users + 1] - 1]
    newest, oldest = data.items[data.train_end[users] - 1], data.items[data.starts[users]]
    others = {"test item": test, "newest training item": newest, "oldest training item": oldest}
    others["test item of another user"] = np.roll(test, 1)
    return {name: np.mean(together[first, item] > 0) for name, item in others.items()}


# ---- Losses: means over N positions ----------------------------------------------------------------------


def bce_loss(output, item_vectors, target, negatives):
    """-[log sigma(r_target) + sum_j log(1 - sigma(r_j))], j in `negatives` [N, k] (section III-E).

    The SASRec paper has k = 1. arXiv 2309.07602 shows that more negatives are better.
    """
    # one look-up for all: each look-up has a gradient as large as the table
    items = torch.cat([target[:, None], negatives], 1)
    r = (output[:, None] * F.embedding(items, item_vectors)).sum(-1)  # [N, 1 + k]
    return -(F.logsigmoid(r[:, 0]) + F.logsigmoid(-r[:, 1:]).sum(-1)).mean()


class UnseenItems:
    """Draws items uniformly among those that are not in a user's training history."""

    def __init__(self, data):
        user = np.repeat(np.arange(len(data.user_ids)), np.diff(data.starts))
        training = np.arange(len(data.items)) < data.train_end[user]
        # the pair of a user and an item is one number, user * (V + 1) + item: a look-up is a binary search
        self.catalogue, self.base = data.catalogue, int(data.items.max()) + 1
        self.seen = np.unique((user * self.base + data.items)[training])
        num_seen = np.bincount(self.seen // self.base, minlength=len(data.user_ids))
        self.possible = num_seen < len(self.catalogue)
        if not self.possible.any():
            sys.exit(f"{data.path}: every user has seen every item, so none is left to draw")
        if not self.possible.all():
            num_left_out = (~self.possible).sum()
            print(f"note: {num_left_out} users have seen every item and are left out", file=sys.stderr)

    def draw(self, users, rng):
        """An item for each entry of `users`, indices into data.user_ids: int64 of the same shape."""
        drawn, wrong = np.zeros(users.size, int), np.arange(users.size)
        while len(wrong):
            drawn[wrong] = self.catalogue[rng.integers(len(self.catalogue), size=len(wrong))]
            pair = users.flat[wrong] * self.base + drawn[wrong]
            place = np.minimum(np.searchsorted(self.seen, pair), len(self.seen) - 1)
            wrong = wrong[self.seen[place] == pair]
        return drawn.reshape(users.shape)


# ---- Training --------------------------------------------------------------------------------------------


def train(args):
    """Train the model of --start backwards, forwards, or forwards on filled histories, and write it."""
    torch.manual_seed(args.seed)
    data = read_interactions(args.data)
    model, config = load_model(args.start, data, args.device)
    program = torch.export.load(args.start)  # stays on the CPU, to be saved
    training_data = reversed_histories(data) if args.reverse else data
    if args.generator:
        generator, generator_config = load_model(args.generator, data, args.device)
        if not generator_config.get("settings", {}).get("reverse"):
            sys.exit(f"{args.generator} was not trained with --reverse")
        if args.fill + 2 > len(data.catalogue):
            sys.exit(f"{args.data} has {len(data.catalogue)} items: too few for --fill")
        prior = generate(generator, data, generator_config["max_length"], args)
        training_data = filled_histories(data, prior)
        num_filled = sum(len(items) > 0 for items in prior)
        print(f"{num_filled:,} histories filled with {sum(map(len, prior)):,} items")
        if num_filled:
            print("share of users whose first generated item occurs in a training history together with the")
            for name, share in co_occurrence_of_first_item(data, prior).items():
                print(f"{100 * share:6.1f} %  {name}")
    histories = training_rows(training_data, config["max_length"])
    unseen, rng = UnseenItems(training_data), np.random.default_rng(args.seed)
    histories = Histories(*(column[unseen.possible[histories.users]] for column in histories))
    with_dropout(model, True)

    def loss_of(batch):
        ids, inputs, real, target = batch_of(training_data, histories, batch, args.device)
        _, output, item_vectors = model(ids, inputs)
        if args.loss == "bce":
            users = np.repeat(histories.users[batch], real.sum(1))  # [N]
            negatives = torch.from_numpy(unseen.draw(users[:, None], rng)).to(args.device)  # [N, 1]
            loss = bce_loss(output[real], item_vectors, target, negatives)
        else:
            loss = F.cross_entropy(output[real] @ item_vectors[1:].T, target - 1)
        return loss, {"loss": loss}

    follow(loss_of, [*model.parameters()], histories, args)
    if args.generator:
        user = np.repeat(data.user_ids, np.diff(training_data.starts))
        rows = zip(user.tolist(), training_data.items.tolist(), strict=True)
        write(Path(args.out).with_suffix(".txt"), "".join(f"{u} {i}\n" for u, i in rows).encode())
    write_student(args, data, program, model, config)


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


def last_output(output, items):
    """The output [B, e] after the last item of each history; output [B, T, e], items [B, T]."""
    return output[torch.arange(items.shape[0], device=items.device), (items > 0).sum(1) - 1]


# ---- Files -----------------------------------------------------------------------------------------------

# torchrun sets both: which process this is, and of how many
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


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
    add("--start", required=True, help="model file whose weights the training starts from")
    add("--out", required=True, help="model file to write, such as runs/asrep.pt2")
    add("--reverse", action="store_true", help="train on reversed histories: this makes a generator")
    add("--generator", help="model file of a run with --reverse; without it, histories stay as they are")
    add("--fill", type=count, default=18, help="M: shorter training histories are filled up to M items")
    add("--order", choices=["clean", "published"], default="clean", help="published leaks the test items")
    add("--loss", choices=["ce", "bce"], default="ce", help="bce: as in the paper, 1 negative; ce: softmax")
    add("--learning-rate", type=number(float, 0), default=1e-3, help="of AdamW; falls to 0")
    add("--batch-size", type=count, default=128, help="users a step")
    add("--epochs", type=number(int, 0), default=30, help="passes over all users")
    add("--seed", type=number(int, 0), default=0, help="same seed, data and machine: same file")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    if not args.out.endswith(".pt2"):
        parser.error("--out must end in .pt2")
    if args.reverse and args.generator:
        parser.error("--reverse makes a generator, so it takes no --generator")
    try:
        outputs = [args.out, *[Path(args.out).with_suffix(".txt")] * bool(args.generator)]
        refuse_to_overwrite(outputs, [args.data, args.start, args.generator])
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)  # before the training, in case this fails
        train(args)
    except (OSError, KeyboardInterrupt) as error:  # a file that cannot be read or written, or Ctrl-C
        sys.exit(f"{args.out} is not written: {str(error) or 'stopped'}")


if __name__ == "__main__":
    main()
