"""Stage 3: train a student, any model file, to be like its teacher, layers matched by Earth Mover's Distance.

Lei Chen, Fajie Yuan, Jiaxi Yang, Min Yang and Chengming Li, "Scene-adaptive Knowledge Distillation for
Sequential Recommendation via Differentiable Architecture Search", arXiv 2107.07173; layers are mapped as by
Li et al., "BERT-EMD", EMNLP 2020, arXiv 2010.06133.

    L = (1 - gamma) L_CE + gamma (L_emb + L_hid + L_pred)

Reads   interactions, `user item` a row (data/README.md); a student, and a teacher to learn from (README.md,
        "The model file"). Without a teacher it is plain training, L = L_CE.
Writes  OUT, the student with the weights of the epoch whose validation NDCG@10 was best; and OUT.log.jsonl, a
        line an epoch.
Shapes  N real positions of a batch; L_S, L_T layers behind the embedding and d_S, d_T features of student and
        teacher; V items, item 0 padding; B users, T positions.

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
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import distributed as dist
from torch import nn
from torch.fx.node import map_aggregate

# ---- L_hid: transport between layers ---------------------------------------------------------------------


def kl_distances(student, teacher):
    """D_ij = KL(softmax(H^T_j) || softmax(H^S_i W_h)) over the features, mean over positions: [L_S, L_T];
    student [L_S, N, d_T], already projected, and teacher [L_T, N, d_T].
    """
    log_p, log_q = student.log_softmax(-1).flatten(1), teacher.log_softmax(-1).flatten(1)
    q = log_q.exp()
    return ((q * log_q).sum(1) - log_p @ q.T) / student.shape[1]


def mse_distances(student, teacher):
    """D_ij = mean of (H^S_i W_h - H^T_j)^2 over positions and features: [L_S, L_T] (BERT-EMD);
    student [L_S, N, d_T], already projected, and teacher [L_T, N, d_T].
    """
    s, t = student.flatten(1), teacher.flatten(1)
    squares = s.square().sum(1)[:, None] + t.square().sum(1) - 2 * s @ t.T
    return squares.clamp(min=0) / s.shape[1]  # rounding may leave a tiny negative number


DISTANCES = {"kl": kl_distances, "mse": mse_distances}


def transport(student_weights, teacher_weights, distance):
    """The flow F [L_S, L_T] of least cost: min sum_ij F_ij D_ij, F >= 0, rows sum to w^S, columns to w^T;
    weights [L_S] and [L_T], each of sum 1, distance [L_S, L_T], float64 arrays.
    """
    if not np.isfinite(distance).all():
        sys.exit("a distance between layers is not finite; lower --learning-rate")
    rows, columns = distance.shape
    # sums of the flow, row after row: its rows, and its columns but the last, which follows from the others
    A = np.vstack([np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))[:-1]])
    b = np.concatenate([student_weights, teacher_weights[:-1]])
    solved = linprog(distance.ravel() / max(np.abs(distance).max(), 1e-300), A_eq=A, b_eq=b, method="highs")
    if solved.status != 0:
        sys.exit(f"the transport between layers could not be solved: {solved.message}")
    return solved.x.reshape(distance.shape)


def fixed_flow(mapping, student_layers, teacher_layers):
    """A flow [L_S, L_T] that is given, for comparison with the transported one.

    `one-to-one`: student layer i (from 1) learns from teacher layer i L_T / L_S, rounded up, 1 / L_S each.
    `last`: the last layer learns from the last one, and nothing else.
    """
    flow, i = np.zeros((student_layers, teacher_layers)), np.arange(1, student_layers + 1)
    if mapping == "last":
        flow[-1, -1] = 1
    else:
        flow[i - 1, np.ceil(i * teacher_layers / student_layers).astype(int) - 1] = 1 / student_layers
    return flow


def emd_loss(distance, flow):
    """L_hid = sum_ij F_ij D_ij. F is held constant: the gradient of the least cost with respect to D is F."""
    return (torch.as_tensor(flow).to(distance) * distance).sum()


def updated_weights(weights, paid, tau_w=10.0):
    """Cost attention: w_i <- softmax_i((sum_k c_k / c_i) / tau_w), with unit cost c_i = paid_i / w_i;
    weights [L] positive, paid [L] = sum_j F_ij D_ij. Cheap layers get more weight. c_i is taken as a
    hundredth of the sum at least: 0 would divide by zero, and a tiny one would take all the weight.
    """
    c = paid / weights
    if c.sum() <= 0:
        return np.full(len(weights), 1 / len(weights))
    quotient = c.sum() / np.maximum(c, c.sum() / 100) / tau_w
    e = np.exp(quotient - quotient.max())
    return e / e.sum()


def map_layers(D, w_S, w_T, mapping):
    """The flow of `mapping` at distances D [L_S, L_T], and the next layer weights w_S [L_S] and w_T [L_T]."""
    if mapping != "emd":
        return fixed_flow(mapping, *D.shape), (w_S, w_T)
    flow = transport(w_S, w_T, D)
    return flow, (updated_weights(w_S, (flow * D).sum(1)), updated_weights(w_T, (flow * D).sum(0)))


# ---- L_emb, L_CE and L_pred; L ---------------------------------------------------------------------------


def item_losses(output, item_vectors, target, output_T, vectors_T, weight_ce, weight_pred):
    """weight_ce L_CE + weight_pred L_pred, and both by themselves, for the log.

    L_CE = -log p_target, L_pred = KL(q || p) = sum_i q_i log(q_i / p_i), means over the N real positions; p
    is the student's softmax over the items, q the teacher's. output [N, d], item_vectors [V+1, d], target
    [N]; output_T [N, e] and vectors_T [V+1, e] are read if weight_pred is not 0. The [N, V] scores are never
    kept: a slice of positions at a time gives the loss and, in the same pass, its gradient.
    """
    states, vectors = output.detach(), item_vectors.detach()[1:]
    d_output, d_item_vectors = torch.zeros_like(output), torch.zeros_like(item_vectors)
    l_ce, l_pred = output.new_zeros(2, dtype=torch.float64)
    rows = max(1, min(64, 2**23 // len(vectors)))  # a slice of at most 32 MiB, and small enough for a cache
    for part in (slice(k, k + rows) for k in range(0, len(output), rows)):
        here, z = target[part, None] - 1, states[part] @ vectors.T
        p = z.softmax(1)  # the student's
        log_sum = z.amax(1) - p.amax(1).log()  # of exp(z): log p = z - log_sum
        l_ce += (log_sum - z.gather(1, here)[:, 0]).sum()
        d_scores = p.mul_(weight_ce + weight_pred)
        if weight_pred:
            z_T = output_T[part] @ vectors_T[1:].T
            q = z_T.softmax(1)  # the teacher's
            log_sum_T = z_T.amax(1) - q.amax(1).log()
            l_pred += (z_T.sub_(z).mul_(q).sum(1) + log_sum - log_sum_T).sum()
            d_scores.sub_(q, alpha=weight_pred)
        d_scores.scatter_add_(1, here, torch.full_like(here, -weight_ce, dtype=d_scores.dtype))
        d_output[part] = d_scores @ vectors
        d_item_vectors[1:].addmm_(d_scores.T, states[part])
    # a number whose gradients are d_output and d_item_vectors; below it is given the value of the loss
    loss = (output * d_output.div_(len(output))).sum()
    loss = loss + (item_vectors * d_item_vectors.div_(len(output))).sum()
    l_ce, l_pred = l_ce / len(output), l_pred / len(output)
    return loss + (weight_ce * l_ce + weight_pred * l_pred - loss.detach()).to(loss), l_ce, l_pred


def sampled_item_losses(
    output, item_vectors, target, output_T, vectors_T, weight_ce, weight_pred, negatives, log_count
):
    """`item_losses` estimated by the target and `negatives` [k] alone, which a batch shares.

    Each stands for the items that are not drawn, so its score is lowered by `log_count` [k], the log of how
    often it is expected among the k (Bengio and Senecal, 2008). The position's target is left out there.
    """

    def log_softmax(output, vectors):  # the target first: [N, 1 + k]
        own = (output * F.embedding(target, vectors)).sum(1, keepdim=True)
        others = output @ F.embedding(negatives, vectors).T - log_count.to(output)
        others = others.masked_fill(target[:, None] == negatives, -1e9)  # of 0 - 0 inf, L_pred would be NaN
        return torch.cat([own, others], 1).log_softmax(1)

    log_p = log_softmax(output, item_vectors)
    l_ce, l_pred = -log_p[:, 0].mean(), log_p.new_zeros(())
    if weight_pred:
        log_q = log_softmax(output_T, vectors_T)
        l_pred = (log_q.exp() * (log_q - log_p)).sum(1).mean()
    return weight_ce * l_ce + weight_pred * l_pred, l_ce.detach(), l_pred.detach()


def fit(W, hidden, hidden_T):
    """Start W = W_e, W_h at the least squares of a batch, hidden [L_S+1, N, d_S] to hidden_T [L_T+1, N, d_T],
    layers one-to-one. Ours: random projections would tear at a student that has learnt already.
    """
    one_to_one = fixed_flow("one-to-one", len(hidden) - 1, len(hidden_T) - 1).argmax(1) + 1
    pairs = (hidden[:1], hidden_T[:1]), (hidden[1:], hidden_T[one_to_one])
    for projection, (H, H_T) in zip(W, pairs, strict=True):
        # in float64: LAPACK rounds by where its memory begins, which the same seed does not decide
        X = F.pad(H, (0, 1), value=1.0).flatten(0, 1).cpu().double()  # a column of ones for the bias
        normal = [X.T @ X, X.T @ H_T.flatten(0, 1).cpu().double()]
        add_up(normal)
        solution = torch.linalg.lstsq(*normal, driver="gelsd").solution
        projection.weight.data.copy_(solution[:-1].T)
        projection.bias.data.copy_(solution[-1])


def L(student, teacher, target, negatives, W, w, args):
    """L = (1 - gamma) L_CE + gamma (L_emb + L_hid + L_pred).

    student: hidden [L_S+1, N, d_S], output [N, e], item_vectors [V+1, e]; teacher alike, or None: L = L_CE;
    target [N]; negatives: () or negatives and log_count [k]; W = W_e, W_h map d_S to d_T; w = w_S [L_S] and
    w_T [L_T], layer weights. Returns L; L_CE, L_emb, L_hid, L_pred; the flow [L_S, L_T]; w of the next step.
    """
    hidden, output, item_vectors = student
    hidden_T, output_T, vectors_T = teacher or (None, None, None)
    gamma = args.gamma if teacher else 0.0
    # (1 - gamma) L_CE + gamma L_pred, in one pass over the scores
    scored = output, item_vectors, target, output_T, vectors_T, 1 - gamma, gamma
    of_items = sampled_item_losses if negatives else item_losses
    loss, l_ce, l_pred = of_items(*scored, *negatives)
    if not teacher:
        return loss, [l_ce], np.zeros(0), w
    l_emb = F.mse_loss(W[0](hidden[0]), hidden_T[0])
    D = DISTANCES[args.distance](W[1](hidden[1:]), hidden_T[1:])
    flow, w = map_layers(mean_of_all(D, len(output)), *w, args.mapping)
    l_hid = emd_loss(D, flow)
    return loss + gamma * (l_emb + l_hid), [l_ce, l_emb, l_hid, l_pred], flow, w


# ---- Training a loaded program ---------------------------------------------------------------------------


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


def at_real(made, real):
    """hidden [L+1, N, d], output [N, e] and item vectors of a batch, of its N real positions alone."""
    hidden, output, item_vectors = made
    return hidden[:, real], output[real], item_vectors


def proposal(items, begin, end):
    """Q [V+1], how likely an item is drawn as a negative that a batch shares: half of Q is uniform, half as
    the item is frequent in items[begin[k]:end[k]], the training histories.
    """
    training = np.concatenate([items[b:e] for b, e in zip(begin, end, strict=True)])
    Q = (np.bincount(training, minlength=items.max() + 1) / len(training) + 1 / items.max()) / 2
    Q[0] = 0
    return Q


def draw_shared(Q, k, rng):
    """`k` items drawn from Q, with replacement, and the log of how often each is expected among them: [k]."""
    drawn = rng.choice(len(Q), k, p=Q)
    return torch.from_numpy(drawn), torch.from_numpy(np.log(k * Q[drawn]))


def ask(teacher, ids, inputs, real, batch, answers):
    """What the teacher says at the `real` positions of users `batch`: hidden states, output, item vectors.

    If `answers` is a dictionary, it keeps them, user by user, and a batch of known users is not asked again.
    """
    if answers is None:
        return at_real(teacher(ids, inputs), real)
    if not answers.keys() >= set(batch):
        hidden, output, answers["item_vectors"] = at_real(teacher(ids, inputs), real)
        lengths = real.sum(1).tolist()
        answers |= zip(batch, zip(hidden.split(lengths, 1), output.split(lengths), strict=True), strict=True)
    hidden, output = zip(*(answers[user] for user in batch), strict=True)
    return torch.cat(hidden, 1), torch.cat(output), answers["item_vectors"]


def train(args):
    """Train the student, stop early, write the model file and its log."""
    began = time.time()
    rng = np.random.default_rng(args.seed)
    user_ids, starts, items = read_interactions(args.data)
    last_ids = int(user_ids.max()), int(items.max())
    program, config = load_model(args.student, *last_ids, args.data)
    max_length = config["max_length"]
    users, begin, end, judged = training_part(args.data, starts, max_length, rng)
    join(args, len(users), len(judged))
    Q = proposal(items, begin, end) if args.negatives else None
    answers = {} if args.remember else None
    # both share the parameters of `program`: `judge` judges what `student` learns, and `program` is saved
    student = with_dropout(module_of(program, args.device), True, args.dropout)
    with_dropout(program.graph_module, False)  # should it have been exported in training
    judge = module_of(program, args.device)

    torch.manual_seed(args.seed)
    learned, teacher, W, w = list(student.parameters()), None, None, None
    if args.teacher and args.gamma > 0:
        taught_by, config_T = load_model(args.teacher, *last_ids, args.data, max_length, layers=1)
        teacher = with_dropout(module_of(taught_by, args.device), False).requires_grad_(False)
        W = [nn.Linear(config["dim"], config_T["dim"]).to(args.device) for _ in range(2)]  # W_e and W_h
        w = [np.full(layers, 1 / layers) for layers in (config["layers"], config_T["layers"])]
        learned += [*W[0].parameters(), *W[1].parameters()]
    length = end - begin - 1
    steps, positions = math.ceil(len(users) / args.batch_size), int(length.sum())
    optimizer = torch.optim.AdamW(learned, args.learning_rate, weight_decay=args.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, args.final_rate, args.epochs * steps)
    print(f"{len(user_ids):,} users, {last_ids[1]:,} items, {len(items):,} interactions; on {args.device}")
    contract = {key: config.get(key) for key in ("items", "max_length", "architecture")}
    trained = student, *(W or ()), optimizer, schedule
    run, past = load_checkpoint(args, trained)
    best, log, w = past.get("best"), past.get("log", []), [x.numpy() for x in past.get("w", ())] or w
    began -= sum(line["seconds"] for line in log)
    for epoch in range(len(log), args.epochs + 1):  # in epoch 0 the student is judged as it came
        rng, total, flows, tick = random_numbers(args.seed, epoch), 0, 0, time.time()
        batches = batches_of_like_length(length, args.batch_size, rng) if epoch else []
        for step, batch in enumerate(batches, 1):
            mine = batch[share()]
            ids = torch.from_numpy(user_ids[users[mine]]).to(args.device)
            inputs = pad_batch(items, begin[mine], end[mine] - 1)
            targets = pad_batch(items, begin[mine] + 1, end[mine])
            inputs, real = inputs.to(args.device), inputs > 0
            drawn = draw_shared(Q, args.negatives, rng) if args.negatives else ()
            target, *negatives = (x.to(args.device) for x in (targets[real], *drawn))
            taught = ask(teacher, ids, inputs, real, mine, answers) if teacher else None
            made = at_real(student(ids, inputs), real)
            if teacher and epoch == step == 1:
                fit(W, made[0].detach(), taught[0])
            loss, parts, flow, w = L(made, taught, target, negatives, W, w, args)
            optimizer.zero_grad()
            # a mean over positions: weighed by how many, or short histories would count as much as long ones
            (loss * len(target) * steps / positions).backward()
            add_up([weight.grad for weight in learned])
            optimizer.step()
            schedule.step()
            total = total + len(target) * torch.stack([part.detach().double() for part in parts])
            flows = flows + length[batch].sum() * flow
            if sys.stdout.isatty():
                print(f"epoch {epoch}, {step / steps:.0%}", end="\r", flush=True)
        log += [{"epoch": epoch}]
        if epoch:
            add_up([total])
            if not total.isfinite().all():
                sys.exit(f"the loss became NaN or infinite in epoch {epoch}; lower --learning-rate")
            log[-1] |= zip(("L_CE", "L_emb", "L_hid", "L_pred"), (total / positions).tolist(), strict=False)
            log[-1]["flow"] = (flows / positions).tolist()
        hr, ndcg = validate(judge, user_ids, starts, items, judged, max_length, args.device)
        log[-1] |= {"HR@10": hr, "NDCG@10": ndcg, "seconds": time.time() - tick}
        if best is None or ndcg > best["NDCG@10"]:
            best = {"epoch": epoch, "HR@10": hr, "NDCG@10": ndcg}
            if epoch:
                save_model(args, args.out, program, student, best, **contract)
        left = min(args.epochs, best["epoch"] + args.patience) - epoch
        report(args.out, log, left, began, "*" if best["epoch"] == epoch else "")
        if left == 0:
            break
        save_checkpoint(args.out, run, trained, best=best, log=log, w=[torch.tensor(x) for x in w or ()])
    if best["epoch"] == 0:  # none was better than the start, which is there again
        program, _ = load_model(args.student, *last_ids, args.data)
        with_dropout(program.graph_module, False)
        save_model(args, args.out, program, program.module(), best, **contract)
    elif teacher:
        flow = np.round(log[best["epoch"]]["flow"], 3)
        print("flow, student layers down, teacher layers across:", flow, sep="\n")
    complete(args.out)


# ---- Data: read, split by leave-one-out, pad -------------------------------------------------------------


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


def training_part(path, starts, max_length, rng, judges=10_000):
    """What training reads: users [N] with two training items or more, of whom the last max_length + 1 are
    items[begin:end]; and the users that validation ranks, `judges` drawn ones where there are more.
    """
    train_end, evaluated = leave_one_out(starts)
    users = np.flatnonzero(train_end - starts[:-1] >= 2)  # two items make one pair of input and target
    judged = np.flatnonzero(evaluated)
    if len(users) == 0 or len(judged) == 0:
        sys.exit(f"{path}: no user has 3 interactions, or none has 2 to train on; take a larger log")
    if len(judged) > judges:
        judged = np.sort(rng.choice(judged, judges, replace=False))
    return users, np.maximum(starts[users], train_end[users] - max_length - 1), train_end[users], judged


def pad_batch(items, begin, end):
    """Histories `items[begin[k]:end[k]]` as rows, padded with 0 on the right: int64 tensor [B, T]."""
    rows = begin[:, None] + np.arange(max(1, (end - begin).max()))  # [B, T]
    inside = rows < end[:, None]
    return torch.from_numpy(np.where(inside, items[np.where(inside, rows, 0)], np.int64(0)))


def batches_of_like_length(length, batch_size, rng):
    """Shuffled batches of indices whose histories, of `length` [U], are about equally long: each 64 shuffled
    batches (a quarter of all, if less: epochs should differ) are sorted by length, for little padding.
    """
    order = rng.permutation(len(length))
    window = batch_size * max(1, min(64, len(length) // batch_size // 4))
    chunks = [order[k : k + window] for k in range(0, len(order), window)]
    order = np.concatenate([chunk[np.argsort(length[chunk], kind="stable")] for chunk in chunks])
    batches = np.array_split(order, math.ceil(len(order) / batch_size))
    return [batches[k] for k in rng.permutation(len(batches))]


# ---- Random numbers, and the processes of torchrun -------------------------------------------------------


def random_numbers(seed, epoch):
    """Those of an epoch, for what all processes draw alike; torch's own, for dropout, are not alike."""
    rng = np.random.default_rng([seed, epoch])
    torch.manual_seed(int(rng.integers(2**62)) + (share().start or 0))
    return rng


def join(args, rows, judged):
    """Join the processes that torchrun has started, if it has: each takes its share of each batch, and they
    add up their gradients. There are `rows` to make batches of, and `judged` users to validate on.
    """
    if "RANK" not in os.environ:
        return
    try:
        if args.device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.startswith("cuda") else "gloo")
    except (KeyError, ValueError, RuntimeError) as error:
        sys.exit(f"RANK is set, but torchrun's processes do not meet: {error}".splitlines()[0])
    if dist.get_world_size() > min(rows // math.ceil(rows / args.batch_size), judged):
        sys.exit(f"{dist.get_world_size()} processes are too many: some would get nothing of a batch")
    if dist.get_rank():
        sys.stdout = io.StringIO()  # one process prints


def share():
    """Which of a batch's rows are this process's: all, unless torchrun has started several."""
    return slice(dist.get_rank(), None, dist.get_world_size()) if dist.is_initialized() else slice(None)


def add_up(tensors):
    """Add up each of `tensors`, of one type, over all processes, in place; None stays None."""
    tensors = [tensor for tensor in tensors if tensor is not None]
    if dist.is_initialized() and tensors:
        total = torch.cat([tensor.flatten() for tensor in tensors])  # one message: each has to be waited for
        dist.all_reduce(total)
        for tensor, part in zip(tensors, total.split([x.numel() for x in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def mean_of_all(mean, count):
    """The mean over all processes' positions, of this one's `mean` over its `count`: a float64 array."""
    sums = [mean.detach().double().cpu() * count, torch.tensor(float(count), dtype=torch.float64)]
    add_up(sums)
    return (sums[0] / sums[1]).numpy()


# ---- Validation and files --------------------------------------------------------------------------------


def rank_of_target(scores, target, seen):
    """rho = 1 + #{better} + #{equal} / 2 of each row's target among the items not in `seen`; float64 [B].

    scores [B, V+1], overwritten; target [B]; seen [B, H], 0 for padding. By the halves, rho is
    what chance gives in the mean among items that are scored alike.
    """
    own = scores.gather(1, target[:, None])  # [B, 1]
    if not own.isfinite().all():  # nothing ranks above a NaN
        sys.exit("the model's scores are not finite; train it again with a lower --learning-rate")
    scores.scatter_(1, seen, -math.inf)[:, 0] = -math.inf
    scores.scatter_(1, target[:, None], own)
    better, equal = (scores > own).sum(1, dtype=torch.int32), (scores == own).sum(1, dtype=torch.int32)
    return 1 + better.double() + (equal.double() - 1) / 2


@torch.no_grad()
def validate(model, user_ids, starts, items, judged, max_length, device):
    """HR@10 and NDCG@10 of the validation items of users `judged`, ranked among all unseen items."""
    judged = judged[share()]
    ranks, begin, end = [], starts[judged], leave_one_out(starts)[0][judged]
    slices = math.ceil(max(len(end) * min(1, items.max() / 2**22), len(end) / 256))  # of 16 MiB of scores
    for chosen in np.array_split(np.argsort(end - begin), slices):
        b, e = begin[chosen], end[chosen]
        window = pad_batch(items, np.maximum(b, e - max_length), e).to(device)
        _, output, item_vectors = model(torch.from_numpy(user_ids[judged[chosen]]).to(device), window)
        last = output[torch.arange(len(e), device=device), (window > 0).sum(1) - 1]
        target, seen = torch.from_numpy(items[e]).to(device), pad_batch(items, b, e).to(device)
        ranks.append(rank_of_target(last @ item_vectors.T, target, seen).cpu())
    rank = torch.cat(ranks)
    hit = (rank <= 10).double()
    users, hr, ndcg = sums = torch.stack([torch.ones_like(hit), hit, hit / torch.log2(rank + 1)]).sum(1)
    add_up([sums])
    return (hr / users).item(), (ndcg / users).item()


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


def save_model(args, out, program, module, validation, **config):
    """Write `program`, which has the parameters of `module`, as a model file that tells how it was made."""
    paths = ("data", "out", "teacher", "student", "architecture", "resume")
    config["settings"] = {name: value for name, value in vars(args).items() if name not in paths}
    config["versions"] = {"torch": torch.__version__, "numpy": np.__version__}
    config |= {"stage": Path(__file__).stem, "data_sha256": sha256_of(args.data), "validation": validation}
    buffer = io.BytesIO()
    module.cpu()  # whoever reads the file may have no other device
    torch.export.save(program, buffer, extra_files={"config.json": json.dumps(config)})
    module.to(args.device)
    write(out, buffer.getvalue())


def run_of(args):
    """What a run has in common with the one that it goes on from: its settings, data, code and versions."""
    files = {"data": sha256_of(args.data), "script": sha256_of(__file__), "number of processes": share().step}
    return vars(args) | files | {"resume": None, "torch": str(torch.__version__), "numpy": np.__version__}


def save_checkpoint(out, run, parts, **rest):
    """Write OUT.ckpt, from which --resume goes on: the states of `parts`, modules and optimizers, and `rest`,
    tensors and plain values.
    """
    buffer = io.BytesIO()
    torch.save({"run": run, "states": [part.state_dict() for part in parts], "rest": rest}, buffer)
    write(f"{out}.ckpt", buffer.getvalue())


def load_checkpoint(args, parts):
    """What `run_of` says now, and the `rest` of OUT.ckpt, whose states `parts` then have; without --resume
    {}. Ends where there is none, or another run's, and without --resume where a run has stopped.
    """
    path, run = Path(f"{args.out}.ckpt"), run_of(args)
    if path.exists() and not args.resume:
        sys.exit(f"{path}: a run stopped here; --resume it, or remove it")
    if not args.resume:
        return run, {}
    file = io.BytesIO(path.read_bytes())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(file, "cpu", weights_only=True)
        if other := [name for name in run if found["run"].get(name) != run[name]]:
            sys.exit(f"{path} cannot be resumed: it is of a run with another {', '.join(other)}")
        for part, state in zip(parts, found["states"], strict=True):
            part.load_state_dict(state)
        return run, found["rest"]
    except Exception:  # whatever unpickling meets in a file of another kind
        sys.exit(f"{path} cannot be resumed: it is damaged")


def complete(out):
    """Remove OUT.ckpt, when all processes have come to the end of the run."""
    if dist.is_initialized():
        dist.barrier()
    if not share().start:
        Path(f"{out}.ckpt").unlink(missing_ok=True)


def report(out, log, left, began, mark=""):
    """Print the last line of `log`, and how long the epochs `left` will take; write all to OUT.log.jsonl."""
    figures = "  ".join(f"{name} {value:.4f}" for name, value in log[-1].items() if isinstance(value, float))
    minutes = (time.time() - began) / len(log) * left / 60
    print(f"epoch {log[-1]['epoch']:3}  {figures}{mark}; {minutes:.1f} min left", flush=True)
    write(f"{out}.log.jsonl", "".join(json.dumps(line) + "\n" for line in log).encode())


# ---- The command line ------------------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """`--help`: the words at the top of this file as they stand, and each option's default."""


def refuse_numbers(parser, args):
    """End with one line if an option is a number that cannot be: below 0, a count of 0, a share above 1."""
    may_be_0 = "epochs", "negatives", "warm_up", "alpha_warm_up", "seed", "recommend"
    for name, value in vars(args).items():
        for x in value if isinstance(value, list) else [value]:
            low = type(x) in (int, float) and not x >= 0  # or NaN
            low |= type(x) is int and x == 0 and name not in may_be_0
            if low or (name in ("dropout", "gamma", "final_rate") and x is not None and x > 1):
                parser.error(f"--{name.replace('_', '-')} cannot be {x}")


def main(argv=None):
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("data", help="interactions, `user item` a row: .txt or .npy (data/README.md)")
    add("--student", required=True, help="model file to train on from its weights. Load only trusted ones")
    add("--teacher", help="model file to learn from; none: plain training. Load only trusted ones")
    add("--out", required=True, help="model file to write, as runs/student.pt2; the log is OUT.log.jsonl")
    add("--gamma", type=float, default=0.5, help="weight of L_emb + L_hid + L_pred; 1 - gamma of L_CE")
    add("--distance", choices=DISTANCES, default="kl", help="D_ij between layers: AdaRec's, or BERT-EMD's")
    add("--mapping", choices=["emd", "one-to-one", "last"], default="emd", help="student to teacher layers")
    add("--dropout", type=float, help="share of units dropped in training; the student's own if not given")
    add("--learning-rate", type=float, default=5e-3, help="of AdamW")
    add("--final-rate", type=float, default=1.0, help="share of --learning-rate at the end, reached evenly")
    add("--weight-decay", type=float, default=5e-4, help="of AdamW")
    add("--batch-size", type=int, default=32, help="users a step")
    add("--epochs", type=int, default=30, help="passes over all users, at most")
    add("--patience", type=int, default=10, help="epochs without a better validation NDCG@10 to stop after")
    add("--negatives", type=int, default=0, help="k: items that estimate L_CE and L_pred; 0: all items")
    keep = "keep the teacher's answers in memory: fast from epoch 2 on, for one process"
    add("--remember", action="store_true", help=keep)
    add("--resume", action="store_true", help="go on from OUT.ckpt, which a run that was stopped has left")
    add("--seed", type=int, default=0, help="same seed, data and machine: same file")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    refuse_numbers(parser, args)
    try:
        train(args)
    except OSError as error:  # a file that is not there, or a place that cannot be written
        sys.exit(f"{error.filename or args.out}: {error.strerror}")
    except KeyboardInterrupt:  # files are whole at any time
        more = ", --resume goes on after the last whole epoch" * Path(f"{args.out}.ckpt").exists()
        print(f"stopped{more}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
