"""Stage 3: train a student to be like its teacher. Earth Mover's Distance matches their layers.

Chen, Yuan, Yang, Yang and Li, "Scene-adaptive Knowledge Distillation for Sequential Recommendation via
Differentiable Architecture Search", arXiv 2107.07173. The mapping of layers is that of Li et al., "BERT-EMD",
EMNLP 2020, arXiv 2010.06133.

    L = (1 - gamma) L_CE + gamma (L_emb + L_hid + L_pred)

Reads   interactions, `user item` a row (data/README.md); a student, and a teacher to learn from (README.md,
        "The model file"). Without a teacher, this is plain training: L = L_CE.
Writes  OUT, the student of the epoch with the best validation NDCG@10; epoch 0 is the student as it was read.
        OUT.log.jsonl, a line an epoch.
Shapes  B users, T positions, N real positions, V items, L_S and L_T layers after the embedding and d_S and
        d_T features of student and teacher, k negatives. Item 0 is padding.

    python emd_distill.py data/ml-100k.txt --teacher runs/teacher.pt2 --student runs/architecture.pt2 \
        --out runs/student.pt2
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

# ---- L_hid: transport between layers ---------------------------------------------------------------------


def kl_distances(student, teacher):
    """D_ij = KL(softmax(H^T_j) || softmax(H^S_i W_h)) over the features, mean over positions: [L_S, L_T].

    student [L_S, N, d_T] is already projected; teacher [L_T, N, d_T].
    """
    log_p, log_q = student.log_softmax(-1).flatten(1), teacher.log_softmax(-1).flatten(1)
    q = log_q.exp()
    return ((q * log_q).sum(1) - log_p @ q.T) / student.shape[1]


def mse_distances(student, teacher):
    """D_ij = mean of (H^S_i W_h - H^T_j)^2 over positions and features: [L_S, L_T] (BERT-EMD).

    student [L_S, N, d_T] is already projected; teacher [L_T, N, d_T].
    """
    return (student[:, None] - teacher).square().mean((2, 3))


DISTANCES = {"kl": kl_distances, "mse": mse_distances}


def transport(student_weights, teacher_weights, distance):
    """The cheapest flow [L_S, L_T]: min sum_ij F_ij D_ij, F >= 0, with row sums w^S and column sums w^T.

    student_weights [L_S] and teacher_weights [L_T] sum to 1. distance [L_S, L_T]. All are float64 arrays.
    """
    if not np.isfinite(distance).all():
        sys.exit("a distance between layers is not finite; lower --learning-rate")
    rows, columns = distance.shape
    # A maps the flow, row after row, to its row sums and column sums; the last one follows from the others
    A = np.vstack([np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))[:-1]])
    sums = np.concatenate([student_weights, teacher_weights[:-1]])
    scale = max(np.abs(distance).max(), 1e-300)
    solution = linprog(distance.ravel() / scale, A_eq=A, b_eq=sums, method="highs")
    if solution.status != 0:
        sys.exit(f"the transport between layers could not be solved: {solution.message}")
    return solution.x.reshape(distance.shape)


def one_to_one(student_weights, teacher_weights, distance):
    """A fixed flow: student layer i, from 1, learns from teacher layer ceil(i L_T / L_S), 1 / L_S each."""
    num_layers, num_teacher_layers = distance.shape
    i = np.arange(1, num_layers + 1)
    j = np.ceil(i * num_teacher_layers / num_layers).astype(int)
    return np.eye(num_teacher_layers)[j - 1] / num_layers


# `last`: the last student layer learns from the last teacher layer, and nothing else
MAPPINGS = {
    "emd": transport,
    "one-to-one": one_to_one,
    "last": lambda w_S, w_T, distance: np.outer(np.eye(len(w_S))[-1], np.eye(len(w_T))[-1]),
}


def emd_loss(distance, flow):
    """L_hid = sum_ij F_ij D_ij with a constant flow F: at the optimum F is the gradient with respect to D."""
    return (torch.as_tensor(flow).to(distance) * distance).sum()


def updated_weights(weights, paid, tau_w=10.0):
    """Cost attention: w_i <- softmax_i((sum_k c_k / c_i) / tau_w), with the unit cost c_i = paid_i / w_i.

    weights [L] are positive, paid [L] = sum_j F_ij D_ij. Cheap layers get more weight. c_i counts as 1/100 of
    the sum at least: 0 would divide by zero, and a tiny c_i would take all the weight.
    """
    c = paid / weights
    if c.sum() <= 0:
        return np.full(len(weights), 1 / len(weights))
    return special.softmax(c.sum() / np.maximum(c, c.sum() / 100) / tau_w)


# ---- L_CE, L_pred, L_emb, and L --------------------------------------------------------------------------


class ItemLosses(torch.autograd.Function):
    """weight_ce L_CE + weight_pred L_pred over all items; and L_CE and L_pred alone, for the log.

    z and z_T are the scores [N, V] of student and teacher: z = output item_vectors^T. Then

        L_CE = F.cross_entropy(z, target - 1)
        L_pred = F.kl_div(z.log_softmax(1), z_T.softmax(1), reduction="batchmean")    KL(teacher || student)

    The scores never exist at once. A slice of rows gives its part of the losses and of their gradient.
    """

    @staticmethod
    def forward(ctx, output, item_vectors, target, output_T, vectors_T, weight_ce, weight_pred):
        """output [N, d], item_vectors [V+1, d], target [N]; output_T [N, e], vectors_T [V+1, e] or None."""
        vectors, N = item_vectors[1:], len(output)
        d_output, d_vectors = torch.zeros_like(output), torch.zeros_like(item_vectors)
        l_ce, l_pred = output.new_zeros(2, dtype=torch.float64)
        rows = max(1, min(64, 2**23 // len(vectors)))  # a slice is at most 32 MiB, and fits the cache
        for part in (slice(n, n + rows) for n in range(0, N, rows)):
            one = target[part, None] - 1
            log_p = (output[part] @ vectors.T).log_softmax(1)  # of the student
            l_ce -= log_p.gather(1, one).sum()
            # dL/dz = (weight_ce + weight_pred) p - weight_ce onehot(target) - weight_pred q
            d_z = (weight_ce + weight_pred) * log_p.exp()
            d_z.scatter_add_(1, one, torch.full_like(one, -weight_ce, dtype=d_z.dtype))
            if weight_pred:
                log_q = (output_T[part] @ vectors_T[1:].T).log_softmax(1)  # of the teacher
                q = log_q.exp()
                l_pred += (q * (log_q - log_p)).sum()
                d_z -= weight_pred * q
            d_output[part] = d_z @ vectors
            d_vectors[1:] += d_z.T @ output[part]
        ctx.save_for_backward(d_output / N, d_vectors / N)
        ctx.mark_non_differentiable(l_ce, l_pred)
        return ((weight_ce * l_ce + weight_pred * l_pred) / N).to(output), l_ce / N, l_pred / N

    @staticmethod
    def backward(ctx, d_loss, *_):
        return *(d_loss * gradient for gradient in ctx.saved_tensors), None, None, None, None, None


def sampled_log_softmax(output, item_vectors, target, negatives, log_count):
    """Log-probabilities [N, 1 + k] of the target, in column 0, and of the `negatives` [k] of a batch.

    A negative stands for the items that are not drawn. So its score is lowered by `log_count` [k], the log of
    its expected count among the k (Bengio and Senecal, 2008). A negative that is the target does not count.
    """
    target_score = (output * F.embedding(target, item_vectors)).sum(1, keepdim=True)
    scores = output @ F.embedding(negatives, item_vectors).T - log_count.to(output)
    scores = scores.masked_fill(target[:, None] == negatives, -1e9)  # not -inf: KL has 0 (-inf - -inf) = NaN
    return torch.cat([target_score, scores], 1).log_softmax(1)


def distillation_loss(student, teacher, target, negatives, W, layer_weights, gamma, distances, flow_of):
    """(1 - gamma) L_CE + gamma (L_emb + L_hid + L_pred); without a teacher, L_CE.

    student: hidden [L_S+1, N, d_S], output [N, e], item_vectors [V+1, e]; teacher the same, or None. target
    [N]. negatives: () for all items, or negatives [k] and log_count [k]. W: W_e and W_h, from d_S to d_T.
    layer_weights: w^S [L_S] and w^T [L_T]. flow_of(w^S, w^T, D) is the flow at distances D = distances(H^S,
    H^T). Returns the loss; its terms by name; the flow [L_S, L_T]; the layer weights of the next step.
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
        loss = (1 - gamma) * l_ce + gamma * l_pred
    else:
        scored = output, item_vectors, target, output_T, vectors_T
        loss, l_ce, l_pred = ItemLosses.apply(*scored, 1 - gamma, gamma)
    if not teacher:
        return loss, {"L_CE": l_ce}, np.zeros(0), layer_weights
    W_e, W_h = W
    l_emb = F.mse_loss(W_e(hidden[0]), hidden_T[0])
    D = distances(W_h(hidden[1:]), hidden_T[1:])
    # the mean over the positions of all processes, as a float64 array
    sums = [D.detach().double().cpu() * len(target), torch.tensor(len(target), dtype=torch.float64)]
    sum_over_processes(sums)
    cost = (sums[0] / sums[1]).numpy()
    flow = flow_of(*layer_weights, cost)
    l_hid = emd_loss(D, flow)
    paid = (flow * cost).sum(1), (flow * cost).sum(0)
    layer_weights = [updated_weights(*pair) for pair in zip(layer_weights, paid, strict=True)]
    terms = {"L_CE": l_ce, "L_emb": l_emb, "L_hid": l_hid, "L_pred": l_pred}
    return loss + gamma * (l_emb + l_hid), terms, flow, layer_weights


def fit_projections(W, hidden, hidden_T):
    """Start W_e and W_h at the least squares of a batch: hidden [L_S+1, N, d_S] to hidden_T [L_T+1, N, d_T].

    Layers are mapped one-to-one. Ours: random projections would undo what the student has learnt.
    """
    flow = one_to_one(None, None, np.empty((len(hidden) - 1, len(hidden_T) - 1)))
    pairs = (hidden[:1], hidden_T[:1]), (hidden[1:], hidden_T[flow.argmax(1) + 1])
    for projection, (H, H_T) in zip(W, pairs, strict=True):
        # in float64, since LAPACK rounds by the alignment of memory, which the seed does not decide
        X = F.pad(H, (0, 1), value=1.0).flatten(0, 1).cpu().double()  # the last column is for the bias
        normal_equations = [X.T @ X, X.T @ H_T.flatten(0, 1).cpu().double()]
        sum_over_processes(normal_equations)
        solution = torch.linalg.lstsq(*normal_equations, driver="gelsd").solution
        projection.weight.data.copy_(solution[:-1].T)
        projection.bias.data.copy_(solution[-1])


# ---- Training --------------------------------------------------------------------------------------------


class SharedNegatives:
    """Draws negatives that a whole batch shares.

    Q [V+1] is the probability of each item: half its share of the training items, half uniform.
    """

    def __init__(self, data, histories):
        items = np.concatenate([data.items[b:e] for b, e in zip(histories.begin, histories.end, strict=True)])
        num_items = data.items.max()
        self.Q = (np.bincount(items, minlength=num_items + 1) / len(items) + 1 / num_items) / 2
        self.Q[0] = 0  # padding

    def draw(self, k, rng):
        """`k` items, with replacement, and the log of their expected counts: tensors [k]."""
        drawn = rng.choice(len(self.Q), k, p=self.Q)
        return torch.from_numpy(drawn), torch.from_numpy(np.log(k * self.Q[drawn]))


def ask_teacher(teacher, ids, inputs, real, batch, answers):
    """hidden [L_T+1, N, d_T], output [N, e] and item vectors of the teacher, at the `real` positions.

    With a dictionary `answers`, it keeps the answers by user, and asks no second time for users it knows.
    """
    if answers is not None and answers.keys() >= set(batch):
        hidden, output = zip(*(answers[user] for user in batch), strict=True)
        return torch.cat(hidden, 1), torch.cat(output), answers["item_vectors"]
    hidden, output, item_vectors = teacher(ids, inputs)
    hidden, output = hidden[:, real], output[real]
    if answers is not None:
        lengths, answers["item_vectors"] = real.sum(1).tolist(), item_vectors
        answers |= zip(batch, zip(hidden.split(lengths, 1), output.split(lengths), strict=True), strict=True)
    return hidden, output, item_vectors


def with_dropout(module, on):
    """`.train()` or `.eval()` for the module of a loaded program, which has neither. Returns `module`.

    Dropout stands in the graph as dropout(x, p, on). A GRU or an LSTM has the same two arguments. BatchNorm
    stays as it was exported.
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
    data = read_interactions(args.data)
    student, config = load_model(args.student, data, args.device)
    program = torch.export.load(args.student)  # stays on the CPU, to be saved
    with_dropout(program.graph_module, False)
    histories, validation_users = training_part(data, config["max_length"], args.seed)
    join_processes(args, len(histories.users), len(validation_users))
    torch.manual_seed(args.seed)
    teacher, W, layer_weights = None, nn.ModuleList(), []
    if args.teacher and args.gamma > 0:
        teacher, config_T = load_model(args.teacher, data, args.device)
        teacher.requires_grad_(False)
        if config_T["max_length"] < config["max_length"] or config_T["layers"] < 1:
            sys.exit(
                f"{args.teacher} must read {config['max_length']} items and have a layer after the embedding"
            )
        W = nn.ModuleList(nn.Linear(config["dim"], config_T["dim"]) for _ in range(2)).to(args.device)
        layer_weights = [np.full(layers, 1 / layers) for layers in (config["layers"], config_T["layers"])]
    return data, histories, validation_users, student, program, config, teacher, W, layer_weights


def train(args):
    """Train the student with AdamW, stop early, and write the best student and the log."""
    data, histories, validation_users, student, program, config, teacher, W, layer_weights = set_up(args)
    lengths = histories.end - histories.begin - 1  # targets of each history
    num_positions, num_batches = int(lengths.sum()), math.ceil(len(lengths) / args.batch_size)
    weights = [*student.parameters(), *W.parameters()]
    optimizer = torch.optim.AdamW(weights, args.learning_rate, weight_decay=args.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, args.final_rate, args.epochs * num_batches)
    shared = SharedNegatives(data, histories) if args.negatives else None
    answers = {} if args.remember else None
    config = {name: config.get(name) for name in ("items", "max_length", "architecture")}
    run = Run(args, data, [student, W, optimizer, schedule])
    best = run.state.get("best")
    layer_weights = [np.array(weights) for weights in run.state.get("layer_weights", layer_weights)]
    for epoch in range(len(run.log), args.epochs + 1):  # epoch 0 validates the student as it was read
        start, total, flows, line = time.time(), 0, 0, {"epoch": epoch}
        rng, batches = epoch_batches(lengths, args.batch_size, args.seed, epoch)
        with_dropout(student, True)
        for batch in batches if epoch else []:
            local = batch[RANK::PROCESSES]  # the rows of this process
            ids, inputs, real, target = batch_of(data, histories, local, args.device)
            negatives = [x.to(args.device) for x in shared.draw(args.negatives, rng)] if shared else ()
            taught = ask_teacher(teacher, ids, inputs, real, local, answers) if teacher else None
            hidden, output, item_vectors = student(ids, inputs)
            learner = hidden[:, real], output[real], item_vectors
            if teacher and epoch == 1 and batch is batches[0]:
                fit_projections(W, learner[0].detach(), taught[0])
            settings = W, layer_weights, args.gamma, DISTANCES[args.distance], MAPPINGS[args.mapping]
            loss, terms, flow, layer_weights = distillation_loss(
                learner, taught, target, negatives, *settings
            )
            optimizer.zero_grad()
            # the loss is a mean over the batch: with this factor each position of the epoch counts alike
            (loss * len(target) * num_batches / num_positions).backward()
            sum_over_processes([weight.grad for weight in weights])
            optimizer.step()
            schedule.step()
            total = total + len(target) * torch.stack([term.detach().double() for term in terms.values()])
            flows = flows + lengths[batch].sum() * flow
        if epoch:
            sum_over_processes([total])
            if not total.isfinite().all():
                sys.exit(f"the loss is NaN or infinite in epoch {epoch}; lower --learning-rate")
            line |= zip(terms, (total / num_positions).tolist(), strict=True)
            line["flow"] = (flows / num_positions).tolist()
        judged = data, validation_users, config["max_length"], args.device
        line["HR@10"], line["NDCG@10"] = validate(with_dropout(student, False), *judged)
        line["seconds"] = time.time() - start
        if best is None or line["NDCG@10"] > best["NDCG@10"]:
            best = {name: line[name] for name in ("epoch", "HR@10", "NDCG@10")}
            run.save_model(args.out, program, student, best, **config)
        epochs_left = min(args.epochs, best["epoch"] + args.patience) - epoch
        state = {"best": best, "layer_weights": [weights.tolist() for weights in layer_weights]}
        run.end_epoch(line, epochs_left, "*" * (best["epoch"] == epoch), **state)
        if epochs_left == 0:
            break
    if teacher and best["epoch"]:
        flow = np.round(run.log[best["epoch"]]["flow"], 3)
        print("flow, a row per student layer, a column per teacher layer:", flow, sep="\n")


# ---- Data: read, split by leave-one-out, pad -------------------------------------------------------------

# The history of user_ids[u] is items[starts[u]:starts[u + 1]], oldest first. Leave-one-out: user u trains on
# items[starts[u]:train_end[u]]. A user with 3 interactions or more is `evaluated`: the validation item stands
# at train_end[u], the test item behind it. `sha256` is the checksum of the table.
Interactions = namedtuple("Interactions", "path sha256 user_ids starts items train_end evaluated")
# Users, indices into user_ids, and for each of them the window items[begin:end]: int64 [N]
Histories = namedtuple("Histories", "users begin end")


def read_interactions(path):
    """Read a data file: `user item` a row, a user's rows together and in time order (data/README.md).

    Returns Interactions, with users in the order of the file. Ids go from 1 to 99,999,999.
    """
    is_text = not str(path).endswith(".npy")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of an empty file
            table = np.loadtxt(file, int, comments=None, ndmin=2) if is_text else np.load(path, mmap_mode="r")
        users, items = table.T
        if table.dtype.kind not in "iu" or not 0 < table.min() <= table.max() < 10**8:
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
    items, evaluated = items.astype(int, copy=is_text), np.diff(starts) >= 3
    return Interactions(path, sha256, user_ids, starts, items, starts[1:] - 2 * evaluated, evaluated)


def training_part(data, max_length, seed, most=10_000):
    """Histories to train on, and the users [W] to validate on, indices into user_ids.

    A history is the last max_length + 1 training items of a user who has two or more. If there are more than
    `most` users to validate on, `most` of them are drawn.
    """
    users = np.flatnonzero(data.train_end - data.starts[:-1] >= 2)  # two items: an input and its target
    validation_users = np.flatnonzero(data.evaluated)
    if len(users) == 0 or len(validation_users) == 0:
        sys.exit(f"{data.path}: no user has 3 interactions, or none has 2 to train on; use a larger log")
    if len(validation_users) > most:
        rng = np.random.default_rng(seed)
        validation_users = np.sort(rng.choice(validation_users, most, replace=False))
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
    """The generator of this epoch, the same in every process, and the epoch's batches, arrays of indices.

    Histories of a batch have similar `lengths` [N], so there is little padding. To this end groups of 64
    shuffled batches (at most a quarter of all, so that epochs differ) are sorted by length.
    """
    rng = np.random.default_rng([seed, epoch])
    torch.manual_seed(int(rng.integers(2**62)) + RANK)  # dropout differs between processes
    order = rng.permutation(len(lengths))
    group = batch_size * max(1, min(64, len(lengths) // batch_size // 4))
    groups = [order[k : k + group] for k in range(0, len(order), group)]
    order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in groups])
    batches = np.array_split(order, math.ceil(len(order) / batch_size))
    return rng, [batches[k] for k in rng.permutation(len(batches))]


# ---- Several processes (torchrun): each takes its part of every batch, gradients are added up ------------

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes(args, num_histories, num_validation_users):
    """Join the processes that torchrun has started. Without torchrun, do nothing."""
    if "RANK" not in os.environ:
        return
    try:
        if args.device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.startswith("cuda") else "gloo")
    except (KeyError, ValueError, RuntimeError) as error:
        sys.exit(f"RANK is set, but the processes of torchrun do not meet: {error}".splitlines()[0])
    smallest_batch = num_histories // math.ceil(num_histories / args.batch_size)
    if min(smallest_batch, num_validation_users) < PROCESSES:
        sys.exit(f"{PROCESSES} processes are too many: some would get nothing of a batch")
    if RANK:
        sys.stdout = io.StringIO()  # one process prints


def sum_over_processes(tensors):
    """Replace each tensor by its sum over all processes. The tensors have one type. None stays None."""
    tensors = [tensor for tensor in tensors if tensor is not None]
    if dist.is_initialized() and tensors:
        total = nn.utils.parameters_to_vector(tensors)  # one all_reduce instead of one per tensor
        dist.all_reduce(total)
        nn.utils.vector_to_parameters(total, tensors)


# ---- Validation ------------------------------------------------------------------------------------------


def rank_of_target(scores, target, seen):
    """rho = 1 + #{better} + #{equal} / 2 of each row's target, among the items not in `seen`: float64 [B].

    scores [B, V+1] are overwritten; target [B]; seen [B, H], 0 for padding. A tie counts half: this is the
    expected rank under random tie-breaking.
    """
    target_score = scores.gather(1, target[:, None])  # [B, 1]
    if not target_score.isfinite().all():  # nothing would rank above a NaN
        sys.exit("the scores of the model are not finite; train it again with a lower --learning-rate")
    scores.scatter_(1, seen, -math.inf)[:, 0] = -math.inf
    scores.scatter_(1, target[:, None], target_score)
    better = (scores > target_score).sum(1, dtype=torch.int32)
    equal = (scores == target_score).sum(1, dtype=torch.int32)  # the target itself is one of them
    return 1 + better.double() + (equal.double() - 1) / 2


def last_output(output, items):
    """The output [B, e] after the last item of each history; output [B, T, e], items [B, T]."""
    return output[torch.arange(len(items), device=items.device), (items > 0).sum(1) - 1]


@torch.no_grad()
def validate(model, data, users, max_length, device):
    """HR@10 and NDCG@10 of the validation items of `users` [W], ranked among all items they have not seen."""
    users, ranks = users[RANK::PROCESSES], []
    begin, end = data.starts[users], data.train_end[users]
    # slices of at most 256 users and 16 MiB of scores
    num_slices = math.ceil(max(len(users) * min(1, data.items.max() / 2**22), len(users) / 256))
    for part in np.array_split(np.argsort(end - begin), num_slices):
        b, e = begin[part], end[part]
        window = pad_batch(data.items, np.maximum(b, e - max_length), e).to(device)
        _, output, item_vectors = model(torch.from_numpy(data.user_ids[users[part]]).to(device), window)
        target, seen = torch.from_numpy(data.items[e]).to(device), pad_batch(data.items, b, e).to(device)
        ranks.append(rank_of_target(last_output(output, window) @ item_vectors.T, target, seen).cpu())
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
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # after a full disk or Ctrl-C


def load_model(path, data, device, any_data=False):
    """The module of a model file on `device`, with dropout off, and its config.

    The config also gets `layers`, L, and `dim`, d, of the hidden states. Ends if the model is for other items
    or users than `data`, or was trained on other data, unless `any_data`.
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
        example = torch.tensor([data.user_ids.max()]), torch.tensor([[num_items]])
        hidden, output, vectors = program.module()(*example)
        shapes = config["items"], *vectors.shape, *hidden.shape[1:3]
        if shapes != (num_items, num_items + 1, output.shape[2], 1, 1) or config["max_length"] < 1:
            raise ValueError(f"it is for {config['items']} items, the data have {num_items}")
        if not any_data and config.get("data_sha256", data.sha256) != data.sha256:
            raise ValueError("it was trained on other data and may know their test items")
        module = move_to_device_pass(program, device).module()
    except Exception as error:  # whatever unpickling meets in another file
        sys.exit(f"{path} is no model file for these data; {type(error).__name__}: {error}".splitlines()[0])
    return module, config | {"layers": len(hidden) - 1, "dim": hidden.shape[3]}


class Run:
    """The files of a run: models, the log OUT.log.jsonl, and the checkpoint OUT.ckpt, which --resume reads.

    `parts` are the modules and optimizers whose states the checkpoint holds. `state` is the rest of what the
    checkpoint holds: tensors and plain values, by name.
    """

    def __init__(self, args, data, parts=()):
        self.out, self.parts, self.log, self.state = args.out, parts, [], {}
        paths = ("data", "out", "teacher", "student", "architecture", "resume")
        settings = {name: value for name, value in vars(args).items() if name not in paths}
        versions = {"torch": str(torch.__version__), "numpy": np.__version__}
        self.made_by = {"stage": Path(__file__).stem, "settings": settings, "versions": versions}
        self.made_by["data_sha256"] = data.sha256
        # a resumed run must have all this in common with the run that was stopped
        files = [("script", __file__)] + [(name, vars(args).get(name)) for name in ("teacher", "student")]
        sums = {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files if file}
        self.common = settings | versions | sums | {"data": data.sha256, "number of processes": PROCESSES}
        path = Path(f"{args.out}.ckpt")
        if path.exists() and not args.resume:
            sys.exit(f"{path}: a run stopped here; give --resume, or remove the file")
        if args.resume:
            content = io.BytesIO(path.read_bytes())
            try:
                common, states, self.log, self.state = torch.load(content, "cpu", weights_only=True)
            except Exception:  # whatever unpickling meets in another file
                sys.exit(f"{path} cannot be resumed: it is not a checkpoint")
            if changed := [name for name in self.common if common.get(name) != self.common[name]]:
                sys.exit(f"{path} cannot be resumed: it is of a run with another {', '.join(changed)}")
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
        print(f"{len(data.user_ids):,} users, {data.items.max():,} items, {len(data.items):,} interactions")

    def save_model(self, path, program, module, validation=None, **config):
        """Write `program`, with the weights of `module`, as a model file. Its config says how it was made."""
        for name, weight in module.state_dict().items():
            program.state_dict[name].data.copy_(weight)
        buffer, config = io.BytesIO(), config | self.made_by | {"validation": validation}
        torch.export.save(program, buffer, extra_files={"config.json": json.dumps(config)})
        write(path, buffer.getvalue())

    def end_epoch(self, line, epochs_left, mark="", **state):
        """Print `line` and add it to the log. Renew the checkpoint, or remove it after the last epoch."""
        self.log.append(line)
        figures = [f"{name} {value:.4f}" for name, value in line.items() if isinstance(value, float)]
        seconds = np.mean([line["seconds"] for line in self.log]) * epochs_left
        left = f"at least {seconds / 60:.1f} min left"
        print(f"epoch {line['epoch']:3}", *figures, mark, left, sep="  ", flush=True)
        write(f"{self.out}.log.jsonl", "".join(json.dumps(line) + "\n" for line in self.log).encode())
        if epochs_left:
            buffer, states = io.BytesIO(), [part.state_dict() for part in self.parts]
            torch.save((self.common, states, self.log, state), buffer)
            write(f"{self.out}.ckpt", buffer.getvalue())
        elif not RANK:
            Path(f"{self.out}.ckpt").unlink(missing_ok=True)


# ---- The command line ------------------------------------------------------------------------------------

# --help shows the text at the top of this file as it stands, and the default of each option
Help = type("Help", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {})


def number(kind, low, high=math.inf):
    """The `type` of an option: a number of `kind`, int or float, from `low` to `high`."""

    def convert(text):
        if not low <= kind(text) <= high:  # nor is NaN
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return kind(text)

    convert.__name__ = kind.__name__
    return convert


def main(argv=None):
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add, count, fraction = parser.add_argument, number(int, 1), number(float, 0, 1)
    add("data", help="interactions, `user item` a row: .txt or .npy (data/README.md)")
    add("--student", required=True, help="model file to train further. Load only files you trust")
    add("--teacher", help="model file to learn from; without it, plain training. Load only files you trust")
    add("--out", required=True, help="model file to write, such as runs/student.pt2")
    add("--gamma", type=fraction, default=0.5, help="weight of L_emb + L_hid + L_pred; L_CE has 1 - gamma")
    add("--distance", choices=DISTANCES, default="kl", help="D_ij: kl of AdaRec, mse of BERT-EMD")
    add("--mapping", choices=MAPPINGS, default="emd", help="of student to teacher layers")
    add("--learning-rate", type=number(float, 0), default=5e-3, help="of AdamW")
    add("--final-rate", type=fraction, default=1.0, help="last rate / first rate; falls linearly")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="of AdamW")
    add("--batch-size", type=count, default=32, help="users a step")
    add("--epochs", type=count, default=30, help="passes over all users, at most")
    add("--patience", type=count, default=10, help="stop after so many epochs without a better NDCG@10")
    add("--negatives", type=number(int, 0), default=0, help="k: items in the softmax; 0: all items")
    add("--remember", action="store_true", help="keep the teacher's answers in memory: faster, needs memory")
    add("--resume", action="store_true", help="go on from OUT.ckpt, the checkpoint of a run that was stopped")
    add("--seed", type=number(int, 0), default=0, help="same seed, data and machine: same file")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    try:
        train(args)
    except OSError as error:  # a file that cannot be read or written
        sys.exit(f"{error.filename or args.out}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume goes on after the last whole epoch, if there is one")


if __name__ == "__main__":
    main()
