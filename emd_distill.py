"""Stage 3: train a student to be like its teacher. Earth Mover's Distance matches their layers.

Chen, Yuan, Yang, Yang and Li, "Scene-adaptive Knowledge Distillation for Sequential Recommendation via
Differentiable Architecture Search", arXiv 2107.07173. The mapping of layers is that of Li et al., "BERT-EMD",
EMNLP 2020, arXiv 2010.06133.

    L = (1 - gamma) L_CE + gamma (L_emb + L_hid + L_pred)

Reads   interactions, `user item` per row (data/README.md); a student, and a teacher to learn from (README.md,
        "Your own model"). Without a teacher, this is plain training: L = L_CE.
Writes  OUT, the student of the epoch with the best validation NDCG@10; epoch 0 is before training.
        OUT.log.jsonl, a line per epoch.
Shapes  B users, T positions, N real positions, V items, k negatives. Item 0 is padding.
        Student and teacher have L_S and L_T layers after the embedding, of d_S and d_T features.

    python emd_distill.py data/ml-100k.txt --teacher runs/teacher.pt2 --student runs/architecture.pt2 \
        --out runs/student.pt2
"""

import argparse
import fcntl
import hashlib
import io
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
import warnings
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special
from scipy.optimize import linprog
from torch import distributed as dist
from torch import nn
from torch.export.passes import move_to_device_pass

# torchrun sets both: which process this is, and of how many
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# ---- L_hid: transport between layers ---------------------------------------------------------------------


def kl_distances(student, teacher):
    """D_ij = KL(softmax(H^T_j) || softmax(H^S_i W_h)) [L_S, L_T]: KL over features, mean over positions.

    student [L_S, N, d_T] are its layers after W_h; teacher [L_T, N, d_T].
    """
    log_p, log_q = student.log_softmax(-1).flatten(1), teacher.log_softmax(-1).flatten(1)
    q = log_q.exp()
    return ((q * log_q).sum(1) - log_p @ q.T) / student.shape[1]


def mse_distances(student, teacher):
    """D_ij = mean of (H^S_i W_h - H^T_j)^2 over positions and features: [L_S, L_T] (BERT-EMD).

    student [L_S, N, d_T] are its layers after W_h; teacher [L_T, N, d_T].
    """
    return (student[:, None] - teacher).square().mean((2, 3))


DISTANCES = {"kl": kl_distances, "mse": mse_distances}


def transport(w_S, w_T, distance):
    """The flow [L_S, L_T] >= 0 of least cost sum_ij flow_ij D_ij, with row sums w^S and column sums w^T.

    w^S [L_S] and w^T [L_T] say how much each layer of student and teacher takes part. Each sums to 1. The
    arguments and `distance`, D [L_S, L_T], are float64 arrays.
    """
    if not np.isfinite(distance).all():
        sys.exit("a distance between layers is NaN or infinite; lower --learning-rate")
    num_rows, num_columns = distance.shape
    row_sums = np.eye(num_rows).repeat(num_columns, axis=1)  # [L_S, L_S L_T]
    column_sums = np.tile(np.eye(num_columns), num_rows)[:-1]  # the other sums determine the last one
    A, b = np.vstack([row_sums, column_sums]), np.concatenate([w_S, w_T[:-1]])
    # the solver's tolerances are absolute. With a median of 1, costs may differ by a factor of 1e9.
    scale = np.median(distance[distance > 0]) if (distance > 0).any() else 1
    tolerances = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    solution = linprog(distance.ravel() / scale, A_eq=A, b_eq=b, method="highs", options=tolerances)
    if solution.status != 0:
        sys.exit(f"the transport between layers could not be solved: {solution.message}")
    return solution.x.reshape(distance.shape)


def matched_layers(num_layers, num_teacher_layers):
    """One-to-one: student layer i = 1..L_S has teacher layer ceil(i L_T / L_S). Returns indices from 0."""
    i = np.arange(1, num_layers + 1)
    return np.ceil(i * num_teacher_layers / num_layers).astype(int) - 1


# Each entry makes a flow of w^S, w^T and D. `emd` uses their values, the others only their sizes.
MAPPINGS = {
    "emd": transport,
    "one-to-one": lambda w_S, w_T, D: np.eye(len(w_T))[matched_layers(*D.shape)] / len(w_S),
    "last": lambda w_S, w_T, D: np.outer(np.eye(len(w_S))[-1], np.eye(len(w_T))[-1]),  # last layers only
    "none": lambda w_S, w_T, D: np.zeros(D.shape),  # L_hid = 0
}


def emd_loss(distance, flow):
    """L_hid = sum_ij flow_ij D_ij. The flow is a constant: at the optimum, dL_hid/dD is the flow."""
    return (torch.as_tensor(flow).to(distance) * distance).sum()


def updated_weights(weights, cost, tau_w=10.0):
    """Cost attention: w_i <- softmax_i((sum_k c_k / c_i) / tau_w), with the unit cost c_i = cost_i / w_i.

    weights w [L] are positive; cost [L] = sum_j flow_ij D_ij. Cheap layers get more weight. Not in the paper:
    c_i is raised to 1 % of the sum, so that no layer takes all the weight. If all c_i are 0, w is uniform.
    """
    c = cost / weights
    if c.sum() <= 0:
        return np.full(len(weights), 1 / len(weights))
    return special.softmax(c.sum() / np.maximum(c, c.sum() / 100) / tau_w)


# ---- L_CE, L_pred, L_emb, and L --------------------------------------------------------------------------


class ItemLosses(torch.autograd.Function):
    """(1 - gamma) L_CE + gamma L_pred over all items, and the two terms without gradient, for the log.

    z and z_T are the scores [N, V] of student and teacher: z = output item_vectors^T. Then

        L_CE = F.cross_entropy(z, target - 1)
        L_pred = F.kl_div(z.log_softmax(1), z_T.softmax(1), reduction="batchmean")    KL(teacher || student)

    The scores are never stored whole. A slice of rows gives its part of the losses and of their gradient.
    """

    @staticmethod
    def forward(ctx, output, item_vectors, target, output_T, vectors_T, gamma):
        """output [N, e], item_vectors [V+1, e], target [N]; of the teacher, or None if gamma is 0."""
        vectors, N = item_vectors[1:], len(output)  # padding, item 0, has no score
        d_output, d_vectors = torch.zeros_like(output), torch.zeros_like(item_vectors)
        l_ce, l_pred = output.new_zeros(2, dtype=torch.float64)
        slice_size = max(1, min(64, 2**23 // len(vectors)))  # rows whose scores fit the cache
        for rows in (slice(n, n + slice_size) for n in range(0, N, slice_size)):
            column = target[rows, None] - 1
            log_p = (output[rows] @ vectors.T).log_softmax(1)  # of the student
            l_ce -= log_p.gather(1, column).sum() / N
            # dL/dz = p - (1 - gamma) onehot(target) - gamma q
            d_z = log_p.exp()
            d_z.scatter_add_(1, column, torch.full_like(column, gamma - 1, dtype=d_z.dtype))
            if gamma:
                log_q = (output_T[rows] @ vectors_T[1:].T).log_softmax(1)  # of the teacher
                q = log_q.exp()
                l_pred += (q * (log_q - log_p)).sum() / N
                d_z -= gamma * q
            d_output[rows] = d_z @ vectors / N
            d_vectors[1:] += d_z.T @ output[rows] / N
        ctx.save_for_backward(d_output, d_vectors)
        ctx.mark_non_differentiable(l_ce, l_pred)
        return ((1 - gamma) * l_ce + gamma * l_pred).to(output), l_ce, l_pred

    @staticmethod
    def backward(ctx, d_loss, *_):
        # None: target and what belongs to the teacher
        return *(d_loss * gradient for gradient in ctx.saved_tensors), None, None, None, None


def sampled_log_softmax(output, item_vectors, target, negatives, log_count):
    """Log-probabilities [N, 1 + k]: of the target in column 0, then of the `negatives` [k] of the batch.

    Frequent items are drawn more often. To correct this, each score is lowered by `log_count` [k], the log of
    the item's expected count among the k (Bengio and Senecal, 2008). A negative that is the target is masked.
    """
    target_score = (output * F.embedding(target, item_vectors)).sum(1, keepdim=True)
    scores = output @ F.embedding(negatives, item_vectors).T - log_count.to(output)
    scores = scores.masked_fill(target[:, None] == negatives, -1e9)  # with -inf, a KL would be NaN
    return torch.cat([target_score, scores], 1).log_softmax(1)


def distillation_loss(
    student, teacher, target, negatives, layer_weights, projections, gamma, distance_function, flow_function
):
    """(1 - gamma) L_CE + gamma (L_emb + L_hid + L_pred); without a teacher, L_CE.

    student        hidden [L_S+1, N, d_S], output [N, e], item_vectors [V+1, e]; hidden[0] is the embedding
    teacher        the same of the teacher, or None
    target         [N], the next items
    negatives      () for all items; or negative items [k] and log_count [k]
    layer_weights  w^S [L_S] and w^T [L_T]
    projections    W_e and W_h, from d_S to d_T
    distance_function(layers of the student after W_h, layers of the teacher) -> D [L_S, L_T]
    flow_function(w^S, w^T, D) -> flow [L_S, L_T]

        L_emb = mean of (E^S W_e - E^T)^2, with E = hidden[0]        L_hid = sum_ij flow_ij D_ij

    Returns the loss; its terms by name; the flow; the layer weights of the next step.
    """
    hidden, output, item_vectors = student
    hidden_T, output_T, vectors_T = teacher or (None, None, None)
    gamma = gamma if teacher else 0.0
    if negatives:
        log_p = sampled_log_softmax(output, item_vectors, target, *negatives)
        l_ce, l_pred = -log_p[:, 0].mean(), torch.zeros(())
        if teacher:
            log_q = sampled_log_softmax(output_T, vectors_T, target, *negatives)
            l_pred = (log_q.exp() * (log_q - log_p)).sum(1).mean()
        item_loss = (1 - gamma) * l_ce + gamma * l_pred
    else:
        item_loss, l_ce, l_pred = ItemLosses.apply(output, item_vectors, target, output_T, vectors_T, gamma)
    if not teacher:
        return item_loss, {"L_CE": l_ce}, np.zeros(0), layer_weights
    (W_e, W_h), (w_S, w_T) = projections, layer_weights
    l_emb = F.mse_loss(W_e(hidden[0]), hidden_T[0])
    D = distance_function(W_h(hidden[1:]), hidden_T[1:])  # [L_S, L_T]
    # the mean over the positions of all processes, in float64
    sums = [D.detach().double().cpu() * len(target), torch.tensor(len(target), dtype=torch.float64)]
    sum_over_processes(sums)
    mean_D = (sums[0] / sums[1]).numpy()
    flow = flow_function(w_S, w_T, mean_D)
    l_hid = emd_loss(D, flow)
    cost = flow * mean_D  # [L_S, L_T]
    layer_weights = [updated_weights(w_S, cost.sum(1)), updated_weights(w_T, cost.sum(0))]
    terms = {"L_CE": l_ce, "L_emb": l_emb, "L_hid": l_hid, "L_pred": l_pred}
    return item_loss + gamma * (l_emb + l_hid), terms, flow, layer_weights


def fit_projections(projections, hidden, hidden_T):
    """Fit W_e and W_h to one batch by least squares: hidden [L_S+1, N, d_S] gives hidden_T [L_T+1, N, d_T].

    Layers are matched one-to-one. Not in the paper: with random projections, the first steps would undo what
    the student has learnt.
    """
    matched = 1 + matched_layers(len(hidden) - 1, len(hidden_T) - 1)  # layer 0 is the embedding
    pairs = (hidden[:1], hidden_T[:1]), (hidden[1:], hidden_T[matched])
    for projection, (H, H_T) in zip(projections, pairs, strict=True):
        # in float64: LAPACK rounds by the alignment of memory, so in float32 equal runs would differ
        X = F.pad(H, (0, 1), value=1.0).flatten(0, 1).cpu().double()  # the last column is for the bias
        normal_equations = [X.T @ X, X.T @ H_T.flatten(0, 1).cpu().double()]
        sum_over_processes(normal_equations)
        solution = torch.linalg.lstsq(*normal_equations, driver="gelsd").solution
        projection.weight.data.copy_(solution[:-1].T)
        projection.bias.data.copy_(solution[-1])


# ---- Training --------------------------------------------------------------------------------------------


class SharedNegatives:
    """Draws negatives that a whole batch shares.

    Q [V+1] is the probability of each item. It is the mean of two distributions: the items of training, and
    uniform over the items that occur.
    """

    def __init__(self, data, histories):
        items = np.concatenate([data.items[b:e] for b, e in zip(histories.begin, histories.end, strict=True)])
        self.Q = np.bincount(items, minlength=data.items.max() + 1) / len(items) / 2
        self.Q[data.catalogue] += 1 / len(data.catalogue) / 2

    def draw(self, k, rng):
        """`k` items, with replacement, and the log of their expected counts: tensors [k]."""
        drawn = rng.choice(len(self.Q), k, p=self.Q)
        return torch.from_numpy(drawn), torch.from_numpy(np.log(k * self.Q[drawn]))


def ask_teacher(teacher, ids, inputs, real, batch, cache):
    """hidden [L_T+1, N, d_T], output [N, e] and item vectors of the teacher, at the `real` positions.

    With a dictionary `cache`, the answer for each history of `batch` is computed once and then reused.
    """
    if cache is not None and cache.keys() >= set(batch):
        hidden, output = zip(*(cache[history] for history in batch), strict=True)
        return torch.cat(hidden, 1), torch.cat(output), cache["item_vectors"]
    hidden, output, item_vectors = teacher(ids, inputs)
    hidden, output = hidden[:, real], output[real]
    if cache is not None:
        lengths, cache["item_vectors"] = real.sum(1).tolist(), item_vectors
        cache |= zip(batch, zip(hidden.split(lengths, 1), output.split(lengths), strict=True), strict=True)
    return hidden, output, item_vectors


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


def set_up(args):
    """Data, histories, validation users, student, its program and config, teacher, W, layer weights."""
    join_processes(args.device)
    data = read_interactions(args.data)
    student, config = load_model(args.student, data, args.device)
    program = torch.export.load(args.student)  # stays on the CPU, to be saved
    with_dropout(program.graph_module, False)
    histories, validation_users = training_part(data, config["max_length"], args.seed)
    torch.manual_seed(args.seed)
    teacher, W, layer_weights = None, nn.ModuleList(), []
    if args.teacher:
        teacher, config_T = load_model(args.teacher, data, args.device)
        teacher.requires_grad_(False)
        if config_T["max_length"] < config["max_length"] or config_T["layers"] < 1:
            needs = f"must read {config['max_length']} items and have a layer after the embedding"
            sys.exit(f"{args.teacher} {needs}")
        if config_T["items"] != config["items"]:
            sys.exit(f"{args.teacher} is for {config_T['items']} items, the student for {config['items']}")
        W = nn.ModuleList(nn.Linear(config["dim"], config_T["dim"]) for _ in range(2)).to(args.device)
        layer_weights = [np.full(layers, 1 / layers) for layers in (config["layers"], config_T["layers"])]
    return data, histories, validation_users, student, program, config, teacher, W, layer_weights


def train(args):
    """Train the student with AdamW, stop early, and write the best student and the log."""
    data, histories, validation_users, student, program, config, teacher, W, layer_weights = set_up(args)
    lengths = histories.end - histories.begin - 1  # targets of each history
    num_positions, num_batches = int(lengths.sum()), math.ceil(len(lengths) / args.batch_size)
    parameters = [*student.parameters(), *W.parameters()]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=args.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, args.final_rate, args.epochs * num_batches)
    sampler = SharedNegatives(data, histories) if args.negatives else None
    settings = {"projections": W, "gamma": args.gamma}
    settings |= {"distance_function": DISTANCES[args.distance], "flow_function": MAPPINGS[args.mapping]}
    teacher_cache = {} if args.remember else None
    kept = {"items", "max_length", "sees", "architecture"} & config.keys()
    run = Run(args, data, [args.out], [student, W, optimizer, schedule])
    best = run.state.get("best")
    layer_weights = [np.array(weights) for weights in run.state.get("layer_weights", layer_weights)]
    for epoch in range(len(run.log), args.epochs + 1):  # epoch 0 only validates
        start, total, flows, line = time.time(), 0, 0, {"epoch": epoch}
        rng, batches = epoch_batches(lengths, args.batch_size, args.seed, epoch)
        with_dropout(student, True)
        for batch in batches if epoch else []:
            local = batch[RANK::PROCESSES]  # the rows of this process
            ids, inputs, real, target = batch_of(data, histories, local, args.device)
            negatives = [x.to(args.device) for x in sampler.draw(args.negatives, rng)] if sampler else ()
            hidden, output, item_vectors = student(ids, inputs)
            of_both = [(hidden[:, real], output[real], item_vectors), None]  # of student and teacher
            if teacher:
                of_both[1] = ask_teacher(teacher, ids, inputs, real, local, teacher_cache)
                if epoch == 1 and batch is batches[0]:
                    fit_projections(W, hidden[:, real].detach(), of_both[1][0])
            results = distillation_loss(*of_both, target, negatives, layer_weights, **settings)
            loss, terms, flow, layer_weights = results
            optimizer.zero_grad()
            # the loss is a mean over these rows; this factor gives all positions of the epoch equal weight
            (loss * len(target) * num_batches / num_positions).backward()
            sum_over_processes([parameter.grad for parameter in parameters])
            optimizer.step()
            schedule.step()
            total = total + len(target) * torch.stack([term.detach().double() for term in terms.values()])
            flows = flows + lengths[batch].sum() * flow  # all processes have the same flow
        if epoch:
            sum_over_processes([total])
            if not total.isfinite().all():
                sys.exit(f"the loss of epoch {epoch} is not finite; remove OUT.ckpt, lower --learning-rate")
            line |= zip(terms, (total / num_positions).tolist(), strict=True)
            line["flow"] = (flows / num_positions).tolist()
        with_dropout(student, False)
        accuracy = validate(student, data, validation_users, config["window"], args.device)
        line["HR@10"], line["NDCG@10"] = accuracy
        line["seconds"] = time.time() - start
        if best is None or line["NDCG@10"] > best["NDCG@10"]:
            best = {name: line[name] for name in ("epoch", "HR@10", "NDCG@10")}
            run.save_model(args.out, program, student, best, **{name: config[name] for name in sorted(kept)})
        epochs_left = min(args.epochs, best["epoch"] + args.patience) - epoch
        state = {"best": best, "layer_weights": [weights.tolist() for weights in layer_weights]}
        run.end_epoch(line, epochs_left, "*" * (best["epoch"] == epoch), **state)
        if epochs_left == 0:
            break
    if teacher and best["epoch"]:  # line n of the log is epoch n
        print("flow, a row per student layer:", np.round(run.log[best["epoch"]]["flow"], 3), sep="\n")


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


def training_part(data, max_length, seed, limit=10_000):
    """Histories to train on, and the users to validate on, an array of indices into user_ids.

    A history is the last max_length + 1 training items of a user who has two or more. At most `limit` users
    are validated on, drawn at random.
    """
    users = np.flatnonzero(data.train_end - data.starts[:-1] >= 2)  # two items: an input and its target
    validation_users = np.flatnonzero(data.evaluated)
    if len(users) == 0 or len(validation_users) == 0:
        sys.exit(f"{data.path}: no user has 3 interactions, or none has 2 to train on; use a larger log")
    if len(validation_users) < PROCESSES:
        sys.exit(f"{PROCESSES} processes are too many: only {len(validation_users)} users are validated on")
    if len(validation_users) > limit:
        rng = np.random.default_rng(seed)
        validation_users = np.sort(rng.choice(validation_users, limit, replace=False))
    end = data.train_end[users]
    return Histories(users, np.maximum(data.starts[users], end - max_length - 1), end), validation_users


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


# ---- Several processes (torchrun): each takes its part of every batch, gradients are added up ------------


def join_processes(device):
    """Join the processes that torchrun has started. Without torchrun, do nothing."""
    if "RANK" not in os.environ:
        return
    try:
        if device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    except (KeyError, ValueError, RuntimeError) as error:
        sys.exit(f"RANK is set, but the processes of torchrun cannot connect: {error}".splitlines()[0])
    if RANK:
        sys.stdout = io.StringIO()  # one process prints


def sum_over_processes(tensors):
    """Replace each tensor by its sum over all processes. Entries that are None are left out. One dtype."""
    tensors = [tensor for tensor in tensors if tensor is not None]
    if dist.is_initialized() and tensors:
        total = nn.utils.parameters_to_vector(tensors)  # one all_reduce instead of one per tensor
        try:
            dist.all_reduce(total)
        except RuntimeError:
            print("another process of torchrun has ended", file=sys.stderr)
            os._exit(1)  # after sys.exit, a thread of gloo that still runs can abort Python
        nn.utils.vector_to_parameters(total, tensors)


# ---- Validation ------------------------------------------------------------------------------------------


def rank_of_target(scores, target, seen, catalogue):
    """rho = 1 + #{better} + #{equal} / 2 of each target among `catalogue` without `seen`: float64 [B].

    scores [B, V+1]; target [B]; seen: an array of items for each row; catalogue: the items that occur. A tie
    counts half: this is the expected rank under random tie-breaking.
    """
    target_score = scores.gather(1, torch.from_numpy(target)[:, None].to(scores.device))  # [B, 1]
    if scores.sum().isnan() or not target_score.isfinite().all():  # a NaN compares false with everything
        sys.exit("the scores of the model are not finite; train it again with a lower --learning-rate")
    ranked = np.zeros(scores.shape, bool)
    ranked[:, catalogue] = True
    for row, items, item in zip(ranked, seen, target, strict=True):
        row[items], row[item] = False, True
    ranked = torch.from_numpy(ranked).to(scores.device)
    better = (ranked & (scores > target_score)).sum(1)
    equal = (ranked & (scores == target_score)).sum(1) - 1  # beside the target itself
    return 1 + better.double() + equal.double() / 2


def last_output(output, items):
    """The output [B, e] after the last item of each history; output [B, T, e], items [B, T]."""
    return output[torch.arange(items.shape[0], device=items.device), (items > 0).sum(1) - 1]


@torch.no_grad()
def validate(model, data, users, window, device):
    """HR@10 and NDCG@10 of the validation items of `users` [W], ranked among all items they have not seen.

    The model reads the last `window` items of each history.
    """
    users, ranks = users[RANK::PROCESSES], []
    begin, end = data.starts[users], data.train_end[users]
    rows = max(1, min(256, 2**22 // data.items.max()))  # users per slice: at most 16 MiB of scores
    for part in np.array_split(np.argsort(end - begin), math.ceil(len(users) / rows)):
        b, e = begin[part], end[part]
        items = pad_batch(data.items, np.maximum(b, e - window), e).to(device)
        _, output, item_vectors = model(torch.from_numpy(data.user_ids[users[part]]).to(device), items)
        scores = last_output(output, items) @ item_vectors.T
        seen = [data.items[history] for history in map(slice, b, e)]
        target = data.items[e]  # the validation item stands behind the training items
        ranks.append(rank_of_target(scores, target, seen, data.catalogue).cpu())
    rank = torch.cat(ranks)
    hit = (rank <= 10).double()
    sums = torch.stack([hit.sum(), (hit / torch.log2(rank + 1)).sum(), torch.tensor(len(rank)).double()])
    sum_over_processes([sums])
    return (sums[0] / sums[2]).item(), (sums[1] / sums[2]).item()


# ---- Files -----------------------------------------------------------------------------------------------


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


class Run:
    """The files of a run: models, the log OUT.log.jsonl, and the checkpoint OUT.ckpt, which --resume reads.

    `parts` are the modules and optimizers whose states the checkpoint holds. `state` has what else the last
    `end_epoch` of a resumed run has stored, by name; it is empty for a new run.
    """

    def __init__(self, args, data, models, parts=()):
        self.out, self.parts, self.log, self.state = args.out, parts, [], {}
        checkpoint = Path(f"{args.out}.ckpt")
        inputs = [vars(args).get(name) for name in ("data", "teacher", "student", "architecture")]
        # OUT need not be one of `models`
        for path in map(Path, [args.out, *models, f"{args.out}.log.jsonl", checkpoint]):
            is_input = path.exists() and any(path.samefile(other) for other in inputs if other)
            if is_input or path.exists() and not path.is_file():
                sys.exit(f"{path} cannot be written: it is an input, or not a regular file")
        out_hash = hashlib.sha256(str(Path(args.out).resolve()).encode()).hexdigest()
        lock = os.open(Path(tempfile.gettempdir(), f"{out_hash}-{RANK}.lock"), os.O_CREAT | os.O_RDWR)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until this process ends
        except OSError:
            sys.exit(f"{args.out}: another run is writing it")
        paths = ("data", "out", "teacher", "student", "architecture", "resume")
        settings = {name: value for name, value in vars(args).items() if name not in paths}
        versions = {"torch": str(torch.__version__), "numpy": np.__version__}
        self.origin = {"stage": Path(__file__).stem, "settings": settings, "versions": versions}
        self.origin["data_sha256"] = data.sha256
        # a resumed run must have the same values as the run that was stopped
        files = [("script", __file__)] + [(name, vars(args).get(name)) for name in ("teacher", "student")]
        sha256 = {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files if file}
        must_match = settings | versions | sha256 | {"data": data.sha256, "number of processes": PROCESSES}
        self.must_match = must_match
        if checkpoint.exists() and not args.resume:
            sys.exit(f"{checkpoint}: a run stopped here; give --resume, or remove the file")
        if args.resume:
            content = io.BytesIO(checkpoint.read_bytes())
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch warns of some damaged files
                    saved, states, self.log, self.state = torch.load(content, "cpu", weights_only=True)
            except Exception:  # whatever unpickling meets in another file
                sys.exit(f"{checkpoint} cannot be resumed: it is not a checkpoint")
            names = saved.keys() | must_match.keys()
            if changed := sorted(name for name in names if saved.get(name) != must_match.get(name)):
                sys.exit(f"{checkpoint} cannot be resumed: it is of a run with another {', '.join(changed)}")
            # stages 1, 3 and 4 store the `best` epoch, whose models are written
            if self.state.get("best") and not all(Path(model).exists() for model in models):
                sys.exit(f"{checkpoint} cannot be resumed: a model that the run wrote is missing")
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
        counts = map(len, (data.user_ids, data.catalogue, data.items))
        print("{:,} users, {:,} items, {:,} interactions".format(*counts))

    def save_model(self, path, program, module, validation=None, **config):
        """Write `program`, with the weights of `module`, as a model file. Its config says how it was made."""
        if RANK:  # one process writes
            return
        for name, weight in module.state_dict().items():
            program.state_dict[name].data.copy_(weight)
        buffer, config = io.BytesIO(), config | self.origin | {"validation": validation}
        torch.export.save(program, buffer, extra_files={"config.json": json.dumps(config)})
        write(path, buffer.getvalue())

    def end_epoch(self, line, epochs_left, mark="", **state):
        """Print `line` and `mark`, and log `line`. Renew the checkpoint, or remove it after the last epoch.

        `line` has at least `epoch` and `seconds`. The time left is a lower bound: where a stage stops early,
        a better epoch restarts the patience.
        """
        self.log.append(line)
        figures = [f"{name} {value:.4f}" for name, value in line.items() if isinstance(value, float)]
        seconds = np.mean([earlier["seconds"] for earlier in self.log]) * epochs_left
        left = f"at least {seconds / 60:.1f} min left"
        print(*filter(None, [f"epoch {line['epoch']:3}", *figures, mark, left]), sep="  ", flush=True)
        write(f"{self.out}.log.jsonl", "".join(json.dumps(logged) + "\n" for logged in self.log).encode())
        if epochs_left:
            buffer, states = io.BytesIO(), [part.state_dict() for part in self.parts]
            torch.save((self.must_match, states, self.log, state), buffer)
            write(f"{self.out}.ckpt", buffer.getvalue())
        elif not RANK:
            Path(f"{self.out}.ckpt").unlink(missing_ok=True)


# ---- The command line ------------------------------------------------------------------------------------

DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
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


def main(argv=None):
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add, count, fraction = parser.add_argument, number(int, 1), number(float, 0, 1)
    add("data", help="interactions, `user item` per row: .txt or .npy (data/README.md)")
    add("--student", required=True, help="model file to train further. Load only files you trust")
    add("--teacher", help="model file to learn from; without it, plain training. Load only files you trust")
    add("--out", required=True, help="model file to write, such as runs/student.pt2")
    add("--gamma", type=fraction, default=0.5, help="weight of L_emb + L_hid + L_pred; L_CE has 1 - gamma")
    add("--distance", choices=DISTANCES, default="kl", help="D_ij: kl of AdaRec, mse of BERT-EMD")
    add("--mapping", choices=MAPPINGS, default="emd", help="of student to teacher layers")
    add("--learning-rate", type=number(float, 0), default=5e-3, help="of AdamW")
    add("--final-rate", type=fraction, default=1.0, help="last rate / first rate; falls linearly")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="of AdamW")
    add("--batch-size", type=count, default=32, help="users per batch")
    add("--epochs", type=count, default=30, help="passes over all users, at most")
    add("--patience", type=count, default=10, help="stop after so many epochs without a better NDCG@10")
    add("--negatives", type=number(int, 0), default=0, help="k: sampled negatives; 0: softmax over all items")
    add("--remember", action="store_true", help="keep the teacher's answers in memory: faster, needs memory")
    add("--resume", action="store_true", help="go on from OUT.ckpt, the checkpoint of a run that was stopped")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="same seed, data and machine: same file")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to compute")
    args = parser.parse_args(argv)
    if args.teacher and args.gamma == 0:
        parser.error("--gamma 0 ignores the teacher: leave --teacher out")
    try:
        train(args)
    except OSError as error:  # a file that cannot be read or written
        sys.exit(f"{error.filename or args.out}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume goes on after the last whole epoch, if there is one")


if __name__ == "__main__":
    main()
