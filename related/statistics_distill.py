"""AdaIN distillation: the teacher judges the means and standard deviations of the student's states.

Yang, Martinez, Bulat and Tzimiropoulos, "Knowledge distillation via adaptive instance normalization", 2020,
arXiv 2003.04289.

Each channel of a layer's state has a mean and a standard deviation over the positions of a history. AdaIN
gives the student's two statistics to the teacher's state. The rest of the teacher turns this state into an
output, and the loss is the change of the output:

    L = L_CE + lambda sum_i L_i,    L_i = mean (rest_j(AdaIN(H^T_j; H^S_i W_i)) - output^T)^2

Student layer i is matched with teacher layer j = floor(i L_T / L_S).

Reads   interactions, `user item` a row (data/README.md); a student and its teacher (README.md, "The model
        file").
Writes  OUT, the student of the last epoch.
Shapes  B users, T positions, N real positions, V items, L_S and L_T layers after the embedding and d_S and
        d_T features of student and teacher, e features of an output. Item 0 is padding.

    python related/statistics_distill.py data/ml-100k.txt --teacher runs/four.pt2 --student runs/two.pt2 \
        --out runs/statistics.pt2
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
from torch import nn
from torch.export.passes import move_to_device_pass

# torchrun sets both: which process this is, and of how many
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# ---- The statistics and the losses -----------------------------------------------------------------------


def statistics(x, real):
    """Mean and standard deviation of each channel over the real positions of a history.

    x [B, T, d], real [B, T] -> two tensors [B, 1, d]. Each variance is raised by 1e-5: otherwise the
    deviation of a single position, 0, would have no gradient.
    """
    weight = (real.to(x) / real.sum(1, keepdim=True))[..., None]  # [B, T, 1]
    m = (weight * x).sum(1, keepdim=True)
    return m, ((weight * (x - m).square()).sum(1, keepdim=True) + 1e-5).sqrt()


def adain(x, real, m, s):
    """AdaIN(x) = s (x - m_x) / s_x + m: x [B, T, d] with the mean m and the deviation s, both [B, 1, d]."""
    m_x, s_x = statistics(x, real)
    return s * (x - m_x) / s_x + m


def adain_loss(rest, state_T, state_S, output_T, users, items):
    """L_i: mean square change of the teacher's output when its state has the student's statistics.

    state_T and state_S [B, T, d_T], the student's already projected; output_T [B, T, e]. `rest` is what the
    teacher computes from state_T.
    """
    real = items > 0
    output, _ = rest(adain(state_T, real, *statistics(state_S, real)), users, items)
    return nn.functional.mse_loss(output[real], output_T[real])


def l2_loss(rest, state_T, state_S, output_T, users, items):
    """The baseline of the paper: mean square difference of the means, and of the standard deviations."""
    return sum(map(nn.functional.mse_loss, statistics(state_S, items > 0), statistics(state_T, items > 0)))


STATISTICS_LOSSES = {"adain": adain_loss, "l2": l2_loss}


def rest_of(module, layer):
    """The model after the state of `layer`, as a module: (state, users, items) -> output, item_vectors.

    It has the same parameters as `module`, the module of a loaded program. The first result of the program
    must be the torch.stack of the states of its layers.
    """
    graph = torch.fx.Graph()
    state = graph.placeholder("state")
    hidden, output, item_vectors = graph.graph_copy(module.graph, {})
    if hidden.target is not torch.ops.aten.stack.default:
        sys.exit("the first result of a model is not a torch.stack of its layers' states, as it must be here")
    hidden.args[0][layer].replace_all_uses_with(state)
    graph.output((output, item_vectors))
    # the dropout before `layer` goes, too; by default, torch keeps what is random
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return torch.fx.GraphModule(module, graph)


# ---- Training --------------------------------------------------------------------------------------------


def train(args):
    """Train the student beside its teacher, and write the student."""
    torch.manual_seed(args.seed)
    data = read_interactions(args.data)
    student, config = load_model(args.student, data, args.device)
    program = torch.export.load(args.student)  # stays on the CPU, to be saved
    teacher, config_T = load_model(args.teacher, data, args.device)
    if not 1 <= config["layers"] <= config_T["layers"] or config_T["max_length"] < config["max_length"]:
        sys.exit("a teacher must have {layers} layers (min. 1) and read {max_length} items".format(**config))
    student, teacher = with_dropout(student, True), teacher.requires_grad_(False)
    matched = [i * config_T["layers"] // config["layers"] for i in range(1, config["layers"] + 1)]
    rests = [rest_of(teacher, j) for j in matched]
    W = nn.ModuleList(nn.Linear(config["dim"], config_T["dim"]) for _ in matched).to(args.device)
    histories = training_rows(data, config["max_length"])

    def loss_of(batch):
        ids, inputs, real, target = batch_of(data, histories, batch, args.device)
        hidden, output, item_vectors = student(ids, inputs)
        hidden_T, output_T, _ = teacher(ids, inputs)
        l_ce = nn.functional.cross_entropy(output[real] @ item_vectors[1:].T, target - 1)
        projected = [W_i(state) for W_i, state in zip(W, hidden[1:], strict=True)]
        layers = zip(rests, hidden_T[matched], projected, strict=True)
        l_statistics = sum(STATISTICS_LOSSES[args.loss](*layer, output_T, ids, inputs) for layer in layers)
        return l_ce + args.weight * l_statistics, {"L_CE": l_ce, f"L_{args.loss}": l_statistics}

    follow(loss_of, [*student.parameters(), *W.parameters()], histories, args)
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
    add("--student", required=True, help="model file to train; it has as many layers or fewer")
    add("--out", required=True, help="model file to write, such as runs/statistics.pt2")
    add("--loss", choices=STATISTICS_LOSSES, default="adain", help="l2 compares the statistics themselves")
    add("--weight", type=number(float, 0), default=1.0, help="lambda; 0: L_CE alone")
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
