"""Stage 4: teacher and student train each other, Bidirectional Distillation.

Kweon, Kang and Yu, "Bidirectional Distillation for Top-K Recommender System", WWW 2021, arXiv 2106.02870.

A large and a small model of one kind are trained alone first (warm-up). Then each learns from the other, on
items drawn by how much their rankings disagree:

    L_T = L_CF(T) + lambda_S->T L_BD(T;S)        L_S = L_CF(S) + lambda_T->S L_BD(S;T)

Reads   interactions, `user item` per row (data/README.md), and two model files (README.md, "Your own model").
        The files are of trained sequence models, or of an earlier run. --base bpr and cdae need no files.
Writes  OUT-teacher.pt2 and OUT-student.pt2, each at its best validation NDCG@10: after an epoch of joint
        training, or before it. OUT.log.jsonl, a line per epoch.
Shapes  B users (bpr: pairs of user and item), T positions, N observed items of a batch. V items, e features
        of an output, k samples, n interactions. Item 0 is padding.

    python bidirectional_distill.py data/ml-100k.txt --teacher T.pt2 --student S.pt2 --out runs/bd
    python bidirectional_distill.py data/ml-100k.txt --base bpr --out runs/bpr
"""

import argparse
import copy
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
from torch import distributed as dist
from torch import nn
from torch.export.passes import move_to_device_pass

# torchrun sets both: which process this is, and of how many
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
TOP = 100  # --sampling top draws from this many best items; --base softmax has z = 0 at this rank

# ---- Rank-discrepancy-aware sampling (section 3.2) -------------------------------------------------------


def rank_items(scores, observed):
    """The rank of each item among the unobserved items of its row, 1 for the best; 0 for an observed item.

    scores [B, V] float32, observed [B, V] bool -> int32 [B, V]. Of equal scores, the smaller id ranks first,
    so both models break ties alike.
    """
    num_items = scores.shape[1]
    unobserved = np.where(observed, -np.inf, scores)
    # order = np.argsort(-unobserved, axis=1, kind="stable"), but faster: quicksort, then equal scores by id
    order = np.argsort(-unobserved, axis=1)
    in_order = np.take_along_axis(unobserved, order, 1)
    group = np.cumsum(in_order[:, 1:] != in_order[:, :-1], axis=1)  # equal scores are a group
    group = np.pad(group, ((0, 0), (1, 0)))
    order = np.sort(group * num_items + order, axis=1) % num_items
    rank = np.zeros(scores.shape, np.int32)
    np.put_along_axis(rank, order, np.arange(1, num_items + 1, dtype=np.int32)[None], 1)
    return np.where(observed, 0, rank)


def p_student_to_teacher(rank_T, rank_S, epsilon):
    """p_{S->T}(i|u), not normalised: exp((rank_T(i) - rank_S(i)) epsilon_e). Ranks and p are [B, V].

    These items teach the teacher: mostly those where the student is far ahead, sometimes any unobserved one.
    """
    exponent = (rank_T - rank_S).astype(np.float32) * np.float32(epsilon)
    # the factor exp(-max) avoids overflow and cancels
    return np.exp(exponent - exponent.max(-1, keepdims=True, initial=-np.inf)) * (rank_T > 0)


def p_teacher_to_student(rank_T, rank_S, epsilon):
    """p_{T->S}(i|u), not normalised: tanh(max((rank_S(i) - rank_T(i)) epsilon_t, 0)). Ranks and p are [B, V].

    These items teach the student: those where the teacher is ahead, nearly alike once it is far ahead.
    """
    ahead = np.maximum((rank_S - rank_T).astype(np.float32) * np.float32(epsilon), 0)
    return np.tanh(ahead) * (rank_T > 0)


def sampling_weights(rank_T, rank_S, args):
    """The weights [B, V] by which items are drawn, for the teacher and for the student.

    `uniform` takes all unobserved items alike, `top` the TOP best items of the other model. The sign
    `published` swaps the ranks: in the published code the best item has the largest, which turns differences.
    """
    if args.sampling == "uniform":
        return (rank_T > 0).astype(np.float32), (rank_T > 0).astype(np.float32)
    if args.sampling == "top":
        return tuple(((rank > 0) & (rank <= TOP)).astype(np.float32) for rank in (rank_S, rank_T))
    if args.sign == "published":
        rank_T, rank_S = rank_S, rank_T
    for_student = p_teacher_to_student(rank_T, rank_S, args.epsilon_tanh)
    return p_student_to_teacher(rank_T, rank_S, args.epsilon_exp), for_student


def draw_items(p, size, rng):
    """Draw items with replacement: i of 1..V with probability p[i - 1] / sum(p). p [V] -> int32 of `size`.

    If all of p is 0, all items are 0, which is padding.
    """
    cumulated = np.cumsum(p, dtype=np.float64)
    if cumulated[-1] <= 0:
        return np.zeros(size, np.int32)
    return 1 + np.searchsorted(cumulated, rng.random(size) * cumulated[-1], side="right").astype(np.int32)


# ---- L_BD (section 3.1), a sum over drawn items, and L_CF, a sum over the observed items of a batch ------
# items [B, T], 0 for padding, with k negatives [B, T, k] each. output [B, T, e] is a model's; row t of states
# [B, T, e] scores item t.


def bd_loss(z_A, z_B, tau):
    """L_BD(A;B) = sum_i BCE(sigma(z^A_i), sigma(z^B_i / tau)) over drawn items. A learns, B is constant."""
    return F.binary_cross_entropy_with_logits(z_A, (z_B.detach() / tau).sigmoid(), reduction="sum")


def last_output(output, items):
    """The output [B, e] after the last item of each history; output [B, T, e], items [B, T]."""
    return output[torch.arange(items.shape[0], device=items.device), (items > 0).sum(1) - 1]


def logits(states, item_vectors, items):
    """z = states . item_vectors: states [..., e], items [..., n] -> [..., n]."""
    return torch.einsum("...e,...ne->...n", states, F.embedding(items.to(item_vectors.device), item_vectors))


def observed_logits(states, item_vectors, items, negatives):
    """z_i [N, 1] of the observed `items`, and z_j [N, k] of their negatives."""
    real = items > 0
    # one look-up for both, because the gradient of a look-up is as large as the table
    z = logits(states[real], item_vectors, torch.cat([items[..., None], negatives], -1)[real])
    return z[:, :1], z[:, 1:]


def bpr_loss(output, item_vectors, items, negatives):
    """L_CF of BPR, pair-wise (Rendle et al., UAI 2009): -sum log sigma(z_ui - z_uj)."""
    z_i, z_j = observed_logits(output, item_vectors, items, negatives)
    return -F.logsigmoid(z_i - z_j).sum()


def pointwise_loss(states, item_vectors, items, negatives):
    """Binary cross-entropy, -sum [log sigma(z_i) + sum_j log(1 - sigma(z_j))]."""
    z_i, z_j = observed_logits(states, item_vectors, items, negatives)
    return -F.logsigmoid(z_i).sum() - F.logsigmoid(-z_j).sum()


def cdae_loss(output, item_vectors, items, negatives):
    """L_CF of CDAE: point-wise. The state after the whole history scores all its items."""
    states = last_output(output, items)[:, None].expand(*items.shape, -1)
    return pointwise_loss(states, item_vectors, items, negatives)


def next_item_loss(output, item_vectors, items, negatives):
    """L_CF of a sequence model: point-wise. The output after items 1 to t - 1 scores item t."""
    return pointwise_loss(output[:, :-1], item_vectors, items[:, 1:], negatives[:, 1:])


def softmax_loss(output, item_vectors, items, negatives):
    """L_CF of a sequence model that was trained with a softmax over all items: -sum log p_i."""
    real = items[:, 1:] > 0
    z = output[:, :-1][real] @ item_vectors[1:].T
    return F.cross_entropy(z, items[:, 1:][real].to(z.device) - 1, reduction="sum")


def zero_logit(base, state, item_vectors):
    """The score [B, 1] that is subtracted from all scores of a user to obtain the z of L_BD; state [B, e].

    A softmax does not change if a constant is added to all scores, so it has no zero. With --base softmax the
    user's score at rank TOP among all items counts as 0 (not in the paper).
    """
    if base != "softmax":
        return torch.zeros_like(state[:, :1])
    scores = state.detach() @ item_vectors.detach()[1:].T
    return scores.topk(min(TOP, scores.shape[1])).values[:, -1:]


# ---- Base models of the paper. `forward` is the contract of a model file ---------------------------------


class BPR(nn.Module):
    """Matrix factorisation: z_ui = p_u . q_i."""

    def __init__(self, num_users, num_items, dim):
        super().__init__()
        self.p = nn.Embedding(num_users + 1, dim)  # starts from N(0, 1), as published
        self.q = nn.Embedding(num_items + 1, dim, padding_idx=0)

    def forward(self, users, items):
        """users [B], items [B, T] -> hidden [1, B, T, d], output [B, T, d], item_vectors [V+1, d]."""
        output = self.p(users)[:, None] + torch.zeros_like(items, dtype=torch.float32)[..., None]
        return output[None], output, self.q.weight


class CDAE(nn.Module):
    """Collaborative denoising autoencoder (Wu et al., WSDM 2016).

    z_ui = w'_i . sigma(W^T y_u + v_u + b) + b'_i. y_u is the history as a vector of zeros and ones. Training
    drops half of the ones and doubles the others.
    """

    def __init__(self, num_users, num_items, dim):
        super().__init__()
        self.W = nn.Embedding(num_items + 1, dim, padding_idx=0)
        self.v = nn.Embedding(num_users + 1, dim)
        self.b = nn.Parameter(torch.empty(dim))
        self.w_and_b = nn.Parameter(torch.empty(num_items + 1, dim + 1))  # w'_i, and b'_i as last column
        for weights, inputs in ((self.W.weight, num_items), (self.b, num_items), (self.w_and_b, dim)):
            nn.init.uniform_(weights, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))
        self.W.weight.data[0] = 0

    def forward(self, users, items):
        """users [B], items [B, T] -> hidden [2, B, T, d], output [B, T, d+1], item_vectors [V+1, d+1]."""
        ordered, order = items.sort(dim=1, stable=True)
        repeated = (ordered == ordered.roll(1, 1)) & (torch.arange(items.shape[1], device=items.device) > 0)
        y = 1.0 - repeated.scatter(1, order, repeated).float()  # y_u is 1 for an item that comes twice
        embedded = self.W(items) * F.dropout(y, 0.5, self.training)[..., None]
        h = (embedded.cumsum(1) + self.v(users)[:, None] + self.b).sigmoid()
        return torch.stack([embedded, h]), torch.cat([h, torch.ones_like(h[..., :1])], -1), self.w_and_b


# Default options of the bases. Those of bpr and cdae are in the published notebooks (cells 8, 9, 11 and 8, 9,
# 12). Their weight decay of 1e-3 is for losses summed over a batch. Here losses are means, so it is divided
# by the observed items of a batch: 128 with bpr.
OPTIONS = "learning_rate temperature epsilon_exp epsilon_tanh batch_size warm_up_weight_decay"
OPTIONS += " samples warm_up epochs"
Defaults = namedtuple("Defaults", OPTIONS)
BPR_DEFAULTS = Defaults(1e-3, 5.0, 1e-4, 1e-2, 128, [7.8e-6, 0.0], samples=1, warm_up=1000, epochs=100)
CDAE_DEFAULTS = Defaults(2e-3, 2.0, 1e-4, 1e-4, 128, [3.4e-7] * 2, samples=5, warm_up=1000, epochs=1000)
SEQUENCE_DEFAULTS = Defaults(1e-3, 1.0, 1e-3, 1e-2, 32, [0.0, 0.0], samples=1, warm_up=0, epochs=20)
# A base: the class of a new model (None: models must be given), L_CF, and default options
Base = namedtuple("Base", "model loss defaults")
BASES = {
    "bpr": Base(BPR, bpr_loss, BPR_DEFAULTS),
    "cdae": Base(CDAE, cdae_loss, CDAE_DEFAULTS),
    "sequence": Base(None, next_item_loss, SEQUENCE_DEFAULTS),
    "softmax": Base(None, softmax_loss, SEQUENCE_DEFAULTS),
}

# ---- Training. A list of two has the teacher first, then the student -------------------------------------


@torch.no_grad()
def renew(modules, windows, data, histories, args, epoch, num_epochs):
    """Rank all items by both models, and draw the items of `num_epochs` epochs from `epoch` on.

    Returns int32 [2, num_epochs, n k]: the items drawn for teacher and student. Those for the interaction
    items[t] stand at [t k, (t + 1) k). Also returns what the paper measures: the share of evaluated users
    whose validation item the student ranks better.
    """
    num_items, k, better = data.items.max(), args.samples, torch.zeros(2, dtype=torch.float64)
    drawn = np.zeros((2, num_epochs, len(data.items) * k), np.int32)
    rows = max(1, min(256, 2**21 // num_items))  # users per slice, for the memory
    slices = [slice(n, n + rows) for n in range(0, len(histories.users), rows)]
    for part in slices[RANK::PROCESSES]:
        users, begin, end = (column[part] for column in histories)
        known = pad_batch(data.items, data.starts[users], end).numpy()
        observed = np.ones((len(users), num_items + 1), bool)
        observed[:, data.catalogue] = False  # items that never occur are never drawn
        np.put_along_axis(observed, known, True, 1)
        ids, ranks = torch.from_numpy(data.user_ids[users]).to(args.device), []
        for module, window in zip(modules, windows, strict=True):
            items = pad_batch(data.items, np.maximum(begin, end - window), end).to(args.device)
            _, output, item_vectors = module(ids, items)
            scores = last_output(output, items) @ item_vectors[1 : num_items + 1].T
            ranks.append(rank_items(scores.float().cpu().numpy(), observed[:, 1:]))
        weights = sampling_weights(*ranks, args)
        for row, user in enumerate(users):
            b, e, rng = begin[row], end[row], np.random.default_rng([args.seed, epoch, 1, user])
            for side in (0, 1):
                drawn[side, :, b * k : e * k] = draw_items(weights[side][row], (num_epochs, (e - b) * k), rng)
            if data.evaluated[user]:  # rank 0: the user has had the item before
                rank_T, rank_S = (rank[row, data.items[e] - 1] for rank in ranks)
                better += torch.tensor([rank_S < rank_T, rank_T > 0])
    drawn = torch.from_numpy(drawn)
    sum_over_processes([drawn])
    sum_over_processes([better])
    return drawn, (better[0] / better[1].clamp(min=1)).item()


def losses(modules, ids, history, negatives, drawn, args):
    """L_CF of T and S, and L_BD(T;S) and L_BD(S;T): two lists. All are sums over the batch.

    ids [B], history [B, T], negatives [2, B, T, k]. drawn [2, B, T k]: the items that teach each model, with
    0 for padding. Or drawn is None, and no model teaches.
    """
    l_cf, sides = [], []
    for module, of_module in zip(modules, negatives, strict=True):
        _, output, item_vectors = module(ids.to(args.device), history.to(args.device))
        l_cf.append(BASES[args.base].loss(output, item_vectors, history, of_module))
        state = last_output(output, history.to(args.device))
        sides.append((state, item_vectors, zero_logit(args.base, state, item_vectors)))
    l_bd = [torch.zeros_like(loss) for loss in l_cf]
    # lambda_S->T, then lambda_T->S: A learns from the other model
    for A, weight in enumerate((args.lambda_teacher, args.lambda_student)):
        if drawn is not None and weight:
            z = [logits(state, vectors, drawn[A]) - zero for state, vectors, zero in sides]
            l_bd[A] = bd_loss(z[A][drawn[A] > 0], z[1 - A][drawn[A] > 0], args.temperature)
    return l_cf, l_bd


def joint_batch(data, rows, batch, unseen, drawn, args, rng):
    """User ids [B], histories [B, T], negatives [2, B, T, k] and items that teach [2, B, T k] of a batch.

    drawn [2, n k] are the items that teach in this epoch, or None. All processes draw for the whole batch,
    then each keeps its rows.
    """
    users, begin, end = (column[batch] for column in rows)
    history, k, teaching = pad_batch(data.items, begin, end), args.samples, None
    negatives = torch.zeros((2, *history.shape, k), dtype=torch.int64)
    if unseen:
        negatives = torch.from_numpy(unseen.draw(np.broadcast_to(users[:, None, None], negatives.shape), rng))
    if drawn is not None:
        # the k of items[t] stand at [t k, (t + 1) k); 0 is padding, or a user for whom nothing was drawn
        teaching = torch.stack([pad_batch(items, begin * k, end * k) for items in drawn.numpy()])
        if args.negatives == "drawn":
            negatives = torch.where(teaching > 0, teaching, negatives.flatten(2)).view_as(negatives)
        teaching = teaching[:, RANK::PROCESSES]
    ids = torch.from_numpy(data.user_ids[users])
    return ids[RANK::PROCESSES], history[RANK::PROCESSES], negatives[:, RANK::PROCESSES], teaching


def set_up(args):
    """Data, histories, batch rows, validation users, UnseenItems, configs, programs, modules, optimizers."""
    join_processes(args.device)
    torch.manual_seed(args.seed)
    data, programs, modules, sees, optimizers = read_interactions(args.data), [], [], [], []
    max_length = max(2, int(np.diff(data.starts).max()))
    for path, dim in zip((args.teacher, args.student), args.dims, strict=True):
        if path:
            module, config = load_model(path, data, args.device)
            program = torch.export.load(path)  # stays on the CPU, to be saved
            with_dropout(program.graph_module, False)
            max_length = min(max_length, config["max_length"])
            sees.append(config.get("sees"))
            base = config.get("settings", {}).get("base", "sequence")
            if (base in ("bpr", "cdae") or args.base in ("bpr", "cdae")) and base != args.base:
                sys.exit(f"{path} is a model of --base {base}, not of --base {args.base}")
        else:
            sees.append(None)
            model = BASES[args.base].model(int(data.user_ids.max()), int(data.items.max()), dim)
            program = export(model, max_length)
            module = move_to_device_pass(export(model, max_length), args.device).module()
        programs.append(program)
        modules.append(module)
    for module, decay in zip(modules, args.warm_up_weight_decay, strict=True):
        weights = module.parameters()
        optimizers.append(torch.optim.Adam(weights, args.learning_rate, weight_decay=decay, fused=True))
    histories, validation_users = training_part(data, max_length - 1, args.seed)
    unseen = UnseenItems(data) if args.base != "softmax" else None  # the softmax is over all items
    if unseen:
        histories = Histories(*(column[unseen.possible[histories.users]] for column in histories))
    rows = histories
    if args.base == "bpr":  # a row is a pair of user and item: a history of one item
        places = np.concatenate([np.arange(b, e) for _, b, e in zip(*histories, strict=True)])
        rows = Histories(np.repeat(histories.users, histories.end - histories.begin), places, places + 1)
    configs = [{"items": int(data.items.max()), "max_length": max_length} for _ in modules]
    for config, reach in zip(configs, sees, strict=True):
        config |= {"sees": reach} if reach and reach < max_length else {}
    return data, histories, rows, validation_users, unseen, configs, programs, modules, optimizers


def train(args):
    """Warm up, train both ways, and write both models and the log."""
    data, histories, rows, validation_users, unseen, configs, programs, modules, optimizers = set_up(args)
    windows = [config.get("sees", config["max_length"]) for config in configs]
    lambdas = args.lambda_teacher, args.lambda_student
    # a sequence model, whose base has no class, has no loss for the first item
    num_observed = (rows.end - rows.begin - (BASES[args.base].model is None)).sum()
    teaches = args.direction == "both" and (any(lambdas) or args.negatives == "drawn")
    models = [f"{args.out}-teacher.pt2", f"{args.out}-student.pt2"]
    run = Run(args, data, models, [*modules, *optimizers])
    best, drawn, last_epoch = run.state.get("best", {}), run.state.get("drawn"), args.warm_up + args.epochs
    for epoch in range(len(run.log) + (not args.teacher), last_epoch + 1):  # epoch 0 validates given models
        start, line, joint = time.time(), {"epoch": epoch}, epoch - args.warm_up - 1  # joint epochs, from 0
        if joint == 0:
            for optimizer, decay in zip(optimizers, args.weight_decay, strict=True):
                optimizer.state.clear()  # a new optimizer
                optimizer.param_groups[0]["weight_decay"] = decay
        if joint >= 0 and teaches and joint % args.period == 0:
            num_epochs = min(args.period, args.epochs - joint)
            drawn, line["student_better"] = renew(modules, windows, data, histories, args, epoch, num_epochs)
            line["renewal_seconds"] = time.time() - start
        drawn_now = None if drawn is None else drawn[:, joint % args.period]  # [2, n k]
        rng, batches = epoch_batches(rows.end - rows.begin, args.batch_size, args.seed, epoch)
        total = torch.zeros(4, dtype=torch.float64, device=args.device)
        for module in modules:
            with_dropout(module, True)
        for batch in batches if epoch else []:
            inputs = joint_batch(data, rows, batch, unseen, drawn_now, args, rng)
            l_cf, l_bd = losses(modules, *inputs, args)
            for side, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
                loss = l_cf[side] + lambdas[side] * l_bd[side]  # L_T, then L_S
                optimizer.zero_grad()
                # the loss is a sum; this factor gives all observed items of the epoch equal weight
                (loss * len(batches) / num_observed).backward()
                sum_over_processes([weight.grad for weight in module.parameters()])
                optimizer.step()
            total += torch.stack(l_cf + l_bd).detach()
        for module in modules:
            with_dropout(module, False)
        sum_over_processes([total])
        if not total.isfinite().all():
            sys.exit(f"the loss of epoch {epoch} is not finite; remove OUT.ckpt, lower --learning-rate")
        if epoch:
            names = "L_CF(T)", "L_CF(S)", "L_BD(T;S)", "L_BD(S;T)"
            line |= zip(names, (total / num_observed).tolist(), strict=True)
        line["seconds"] = time.time() - start
        # the warm-up is validated every --period epochs only: validation takes longer than an epoch
        # joint -1 is the end of the warm-up, or the given models
        if joint >= -1 or epoch % args.period == 0:
            for side, kind in enumerate(("teacher", "student")):
                hr, ndcg = validate(modules[side], data, validation_users, windows[side], args.device)
                line |= {f"{kind}_HR@10": hr, f"{kind}_NDCG@10": ndcg}
                # in the warm-up the latest model is saved: joint training starts from it, as published
                if kind not in best or joint < 0 or ndcg > best[kind]["NDCG@10"]:
                    best[kind] = {"epoch": epoch, "HR@10": hr, "NDCG@10": ndcg}
                    config = configs[side] | {"role": kind}
                    run.save_model(models[side], programs[side], modules[side], best[kind], **config)
        run.end_epoch(line, last_epoch - epoch, best=best, drawn=drawn)


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


def pad_batch(items, begin, end):
    """Histories items[begin[b]:end[b]] as rows, padded with 0 on the right: int64 tensor [B, T]."""
    places = begin[:, None] + np.arange(max(1, (end - begin).max()))  # [B, T]
    inside = places < end[:, None]
    return torch.from_numpy(np.where(inside, items[np.where(inside, places, 0)], np.int64(0)))


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


def export(model, max_length):
    """The program of `model`, with a copy of its weights. It takes histories of up to `max_length` items."""
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=max_length)
    example = torch.ones(2, dtype=torch.int64), torch.ones(2, max_length, dtype=torch.int64)
    shapes = {0: batch}, {0: batch, 1: length}
    return torch.export.export(copy.deepcopy(model).eval(), example, dynamic_shapes=shapes)


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
    add, count, positive = parser.add_argument, number(int, 1), number(float, 0)
    pair = {"nargs": 2, "metavar": ("TEACHER", "STUDENT")}
    add("data", help="interactions, `user item` per row: .txt or .npy (data/README.md)")
    add("--teacher", help="trained model to start from, with --student. Load only files you trust")
    add("--student", help="trained model to start from, with --teacher")
    add("--out", required=True, help="start of the names OUT-teacher.pt2, OUT-student.pt2, OUT.log.jsonl")
    add("--base", choices=BASES, default="sequence", help="kind of model; sequence and softmax need two")
    add("--dims", **pair, type=count, default=[50, 5], help="sizes of the vectors of a new bpr or cdae")
    add("--learning-rate", type=positive, help="of Adam")
    tau = number(float, 1e-6, math.inf)
    add("--temperature", type=tau, help="tau, divides the other's logits; inf: each label is 1/2")
    add("--epsilon-exp", type=positive, help="epsilon_e of p_S->T")
    add("--epsilon-tanh", type=positive, help="epsilon_t of p_T->S")
    add("--batch-size", type=count, help="users per batch; with bpr, observed pairs")
    add("--warm-up-weight-decay", **pair, type=positive, help="of Adam, in the warm-up")
    add("--samples", type=count, help="k: negatives per observed item, and as many that teach")
    add("--warm-up", type=number(int, 0), help="epochs alone; 0 if models are given")
    add("--epochs", type=number(int, 0), help="epochs of joint training; 0 writes the models after warm-up")
    add("--lambda-teacher", type=positive, default=0.5, help="lambda_S->T, weight of L_BD(T;S)")
    add("--lambda-student", type=positive, default=0.5, help="lambda_T->S, weight of L_BD(S;T)")
    add("--weight-decay", **pair, type=positive, default=[0.0, 0.0], help="of Adam, in joint training")
    add("--period", type=count, default=10, help="p: epochs between renewals of the ranks")
    add("--direction", choices=["both", "none"], default="both", help="none: both models train on alone")
    add("--sampling", choices=["rank", "uniform", "top"], default="rank", help="of the items that teach")
    add("--sign", choices=["paper", "published"], default="paper", help="published: with both ranks swapped")
    sources = ["uniform", "drawn"]
    add("--negatives", choices=sources, default="uniform", help="of L_CF; drawn: the items that teach")
    add("--resume", action="store_true", help="go on from OUT.ckpt, the checkpoint of a run that was stopped")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="same seed, data and machine: same files")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to compute")
    parser.set_defaults(**SEQUENCE_DEFAULTS._asdict())
    parser.epilog = f"defaults of --base bpr and cdae:\n{BPR_DEFAULTS}\n{CDAE_DEFAULTS}"
    args, _ = parser.parse_known_args(argv)  # --base decides the defaults of the others
    parser.set_defaults(**BASES[args.base].defaults._asdict() | ({"warm_up": 0} if args.teacher else {}))
    args = parser.parse_args(argv)
    if bool(args.teacher) != bool(args.student) or not (BASES[args.base].model or args.teacher):
        parser.error("give --teacher and --student, two trained models, or --base bpr or cdae")
    if args.negatives == "drawn" and (args.direction == "none" or args.base == "softmax"):
        parser.error("--negatives drawn needs --direction both and a base with negatives, not softmax")
    if not args.teacher and args.warm_up + args.epochs == 0:
        parser.error("--warm-up and --epochs are 0: nothing to train")
    try:
        train(args)
    except OSError as error:  # a file that cannot be read or written
        sys.exit(f"{error.filename or args.out}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume goes on after the last whole epoch, if there is one")


if __name__ == "__main__":
    main()
