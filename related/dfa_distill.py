"""DFA, "Differentiable Feature Aggregation Search for Knowledge Distillation" (ECCV 2020, arXiv 2008.00506).

The teacher's layers fall into groups, one for each layer of the student. F_g, the feature of a group, is the
mean of its layers' states with weights softmax(alpha_g). First alpha is searched, on one half of the users,
while weights learn on the other, by a bridge of two paths: H^S_g through a connector into the rest of the
teacher (does it say enough?), and F_g through another into the rest of the student (can it be learnt?):

    L_bridge = L_CE + sum_g (L_CE of the one path + L_CE of the other)
    L = L_CE + lambda sum_g mean (H^S_g W_g - F_g)^2, by which the student then learns anew

    python related/dfa_distill.py data/ml-100k.txt --teacher T.pt2 --student S.pt2 --out runs/s.pt2

Reads interactions and two model files (README.md), writes the student of the last epoch. Shapes: B users, T
positions, N real ones, d features, V items, item 0 is padding. In the paper both paths pull at alpha; here
alpha is in the second, and the first keeps the student's states to what the teacher can use.
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


def aggregate(alpha, states):
    """sum_k softmax(alpha)_k H_k: alpha [K], states [K, B, T, d] -> [B, T, d]."""
    return torch.einsum("k,kbtd->btd", alpha.softmax(0), states)


def cross_entropy(output, item_vectors, real, target):
    """L_CE: output [B, T, e], item_vectors [V+1, e], real [B, T], target [N] at the real positions."""
    return F.cross_entropy(output[real] @ item_vectors[1:].T, target - 1)


def bridge_loss(alpha, hidden_T, hidden, connectors, rests, about):
    """Both paths of a group: hidden [B, T, d_S], hidden_T [K, B, T, d_T]; pairs: to teacher, to student."""
    states = connectors[0](hidden), connectors[1](aggregate(alpha, hidden_T))
    made = (rest(state, *about[:2]) for rest, state in zip(rests, states, strict=True))
    return sum(cross_entropy(*of, *about[2:]) for of in made)


def search(student, teacher, groups, dims, data, rows, args):
    """alpha of each group; in the second half of --search-epochs it and weights take turns (DARTS)."""
    rng, half = np.random.default_rng(args.seed), len(rows[0]) // 2
    alpha = [torch.zeros(len(group), device=args.device, requires_grad=True) for group in groups]
    rests = [(rest_of(teacher, group[-1]), rest_of(student, g)) for g, group in enumerate(groups, 1)]
    links = nn.ModuleList(nn.ModuleList([nn.Linear(*dims), nn.Linear(*dims[::-1])]) for _ in groups)
    weights = torch.optim.AdamW(
        [*student.parameters(), *links.to(args.device).parameters()], args.learning_rate
    )
    of_alpha = torch.optim.AdamW(alpha, 5e-2)
    halves, steps = np.split(rng.permutation(len(rows[0])), [half]), -(-half // args.batch_size)
    for epoch in range(1, args.search_epochs + 1):
        order = [np.array_split(rng.permutation(users), steps) for users in halves]
        batches = [batch for pair in zip(*order, strict=True) for batch in pair]
        late = epoch > args.search_epochs // 2  # alpha waits until weights have learnt something
        for optimizer, batch in zip([weights, of_alpha if late else weights] * steps, batches, strict=True):
            about = batch_of(data, rows, batch, args.device)
            hidden_T, (hidden, *made) = teacher(*about[:2])[0], student(*about[:2])
            loss = cross_entropy(*made, *about[2:])
            for g, group in enumerate(groups):
                loss = loss + bridge_loss(alpha[g], hidden_T[group], hidden[g + 1], links[g], rests[g], about)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        shares = [[round(share, 3) for share in a.softmax(0).tolist()] for a in alpha]
        print(f"search {epoch:3}  L_bridge {loss:.4f}  softmax(alpha) {shares}", flush=True)
    return [a.detach() for a in alpha]


def train(args):
    """Search alpha, train the student from the beginning, write it."""
    torch.manual_seed(args.seed)
    data = user_ids, starts, items = read_interactions(args.data)
    last_ids = int(user_ids.max()), int(items.max())
    program, config = load_model(args.student, *last_ids, args.data, layers=1)
    longest, L_S = config["max_length"], config["layers"]
    taught_by, config_T = load_model(args.teacher, *last_ids, args.data, longest, L_S)
    teacher = with_dropout(taught_by.module(), False).to(args.device).requires_grad_(False)
    groups = [group.tolist() for group in np.array_split(np.arange(1, config_T["layers"] + 1), L_S)]
    rows, dims = training_rows(args.data, starts, longest), (config["dim"], config_T["dim"])
    searched = with_dropout(load_model(args.student, *last_ids)[0].module(), True).to(args.device)
    alpha = search(searched, teacher, groups, dims, data, rows, args)
    student = with_dropout(program.module(), True).to(args.device)
    W = nn.ModuleList(nn.Linear(*dims) for _ in groups).to(args.device)

    def loss_of(batch):
        ids, inputs, real, target = batch_of(data, rows, batch, args.device)
        hidden_T, (hidden, output, item_vectors) = teacher(ids, inputs)[0], student(ids, inputs)
        l_ce = cross_entropy(output, item_vectors, real, target)
        F_g = [aggregate(alpha[g], hidden_T[group])[real] for g, group in enumerate(groups)]
        l_feature = sum(F.mse_loss(W_g(h[real]), f) for W_g, h, f in zip(W, hidden[1:], F_g, strict=True))
        return l_ce + args.weight * l_feature, {"L_CE": l_ce, "L_feature": l_feature}

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


def rest_of(module, layer):
    """What a model does from the state of `layer` on: a module (state, users, items) -> output, item_vectors,
    which has the same parameters. What a model gives first is the stack of its layers' states.
    """
    graph = torch.fx.Graph()
    hidden, output, item_vectors = graph.graph_copy(module.graph, {})
    if hidden.target is not torch.ops.aten.stack.default:
        sys.exit("a model whose first result is no stack of its layers' states cannot be entered there")
    state = hidden.args[0][layer]
    with graph.inserting_before(next(iter(graph.nodes))):
        state.replace_all_uses_with(graph.placeholder("state"))
    graph.output((output, item_vectors))
    graph.eliminate_dead_code(
        lambda node: node.op in ("placeholder", "output")
    )  # dropout, too, is dead before
    return torch.fx.GraphModule(module, graph)


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
    add("--teacher", required=True, help="model file to learn from. Load only trusted ones")
    add("--student", required=True, help="model file to train, of as many layers or fewer")
    add("--out", required=True, help="model file to write")
    add("--search-epochs", type=int, default=10, help="of alpha; 0: the mean of a group")
    add("--weight", type=float, default=1.0, help="lambda; 0: L_CE alone")
    add("--learning-rate", type=float, default=5e-3, help="of AdamW; it falls to 0")
    add("--batch-size", type=int, default=32, help="users a step")
    add("--epochs", type=int, default=30, help="passes over all users")
    add("--seed", type=int, default=0, help="same seed, data and machine: same file")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    numbers = [x for x in vars(args).values() if type(x) in (int, float)]
    if min(args.epochs, args.batch_size) < 1 or not all(x >= 0 for x in numbers):
        parser.error("--epochs and --batch-size are counts from 1, and no number is below 0")
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        train(args)
    except (OSError, KeyboardInterrupt) as error:
        sys.exit(f"{getattr(error, 'filename', args.out)}: {getattr(error, 'strerror', 'stopped')}")


if __name__ == "__main__":
    main()
