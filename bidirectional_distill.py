"""Stage 4: teacher and student train each other, Bidirectional Distillation.

Wonbin Kweon, SeongKu Kang and Hwanjo Yu, "Bidirectional Distillation for Top-K Recommender System", WWW 2021,
arXiv 2106.02870.

A large and a small model of one kind warm up alone, then each learns from the other on items drawn by how
much their rankings disagree:

    L_T = L_CF(T) + lambda_S->T L_BD(T;S)        L_S = L_CF(S) + lambda_T->S L_BD(S;T)

Reads   interactions, `user item` a row (data/README.md); two model files (README.md, "The model file"): any
        two sequence models that were trained already, or with --base bpr or cdae two that this script wrote.
Writes  OUT-teacher.pt2 and OUT-student.pt2, each of the epoch whose validation NDCG@10 was best: of those in
        which both trained, and of how they came or warmed up; and OUT.log.jsonl, a line an epoch.
Shapes  B users (bpr: pairs of user and item), T positions, e features of an output, V items, item 0 padding;
        for each observed item k negatives, and k drawn items in each direction.

    python bidirectional_distill.py data/ml-100k.txt --teacher T.pt2 --student S.pt2 --out runs/bd
    python bidirectional_distill.py data/ml-100k.txt --base bpr --out runs/bpr
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
from torch import distributed as dist
from torch import nn
from torch.fx.node import map_aggregate

TOP = 100  # of --sampling top, the other model's best items; and where z is 0 with --base softmax
KINDS = "teacher", "student"

# ---- Rank-discrepancy-aware sampling (section 3.2) -------------------------------------------------------


def ranks(scores, observed):
    """Rank of each item among the unobserved ones of its row, 1 the best; 0 for an observed one.

    scores [B, V] float32, observed [B, V] bool -> int32 [B, V]. Of equal scores, the smaller id ranks first,
    so that ties are broken alike in both models.
    """
    bits = np.where(observed, np.float32(np.inf), 0 - scores).view(np.int32).astype(np.int64)
    # as whole numbers in the floats' order, each with its column below: three times as fast as a stable sort
    keys = (bits ^ (bits >> 31 & 0x7FFFFFFF)) << 32 | np.arange(scores.shape[1])
    keys.sort(1)
    rank = np.zeros(scores.shape, np.int32)
    np.put_along_axis(rank, keys & 0xFFFFFFFF, np.arange(1, scores.shape[1] + 1, dtype=np.int32)[None], 1)
    return np.where(observed, 0, rank)


def p_student_to_teacher(rank_T, rank_S, epsilon):
    """p_{S->T}(i|u), not normalised: exp((rank_T(i) - rank_S(i)) epsilon_e). Items the teacher shall learn.

    Mostly where the student is far ahead, but every unobserved item has its chance. Ranks and p [B, V].
    """
    exponent = (rank_T - rank_S).astype(np.float32) * np.float32(epsilon)
    return np.exp(exponent - exponent.max(-1, keepdims=True, initial=-np.inf)) * (rank_T > 0)


def p_teacher_to_student(rank_T, rank_S, epsilon):
    """p_{T->S}(i|u), not normalised: tanh(max((rank_S(i) - rank_T(i)) epsilon_t, 0)).

    Items the student shall learn: wherever the teacher is ahead, and alike where it is far ahead.
    """
    ahead = np.maximum((rank_S - rank_T).astype(np.float32) * np.float32(epsilon), 0)
    return np.tanh(ahead) * (rank_T > 0)


def probabilities(rank_T, rank_S, args):
    """What the items for the teacher and for the student are drawn in proportion to: two of [B, V].

    --sampling uniform takes all unobserved items alike, top the other model's TOP best ones. --sign published
    turns the discrepancies round: the published code numbers items in ascending order of score.
    """
    if args.sampling == "uniform":
        return (rank_T > 0).astype(np.float32), (rank_T > 0).astype(np.float32)
    if args.sampling == "top":
        return tuple(((rank > 0) & (rank <= TOP)).astype(np.float32) for rank in (rank_S, rank_T))
    if args.sign == "published":
        rank_T, rank_S = rank_S, rank_T
    for_student = p_teacher_to_student(rank_T, rank_S, args.epsilon_tanh)
    return p_student_to_teacher(rank_T, rank_S, args.epsilon_exp), for_student


def draw(p, size, rng):
    """Items with replacement, item i (from 1) with probability p[i - 1] / sum: int32 of shape `size`.

    All 0, which is padding, where no item has any probability. p [V].
    """
    cumulated = np.cumsum(p, dtype=np.float64)
    if cumulated[-1] <= 0:
        return np.zeros(size, np.int32)
    return 1 + np.searchsorted(cumulated, rng.random(size) * cumulated[-1], side="right").astype(np.int32)


# ---- L_BD (section 3.1), L_CF and L ----------------------------------------------------------------------
# sums over the observed items of a batch; negatives [B, T, k] stand beside `items` [B, T]; ids are on the CPU


def bd_loss(z_A, z_B, tau):
    """L_BD(A;B) = sum_i BCE(sigma(z^A_i), sigma(z^B_i / tau)) over drawn items; A learns, B does not."""
    return F.binary_cross_entropy_with_logits(z_A, (z_B.detach() / tau).sigmoid(), reduction="sum")


def logits(states, item_vectors, items):
    """z = states . item_vectors: states [..., e], items [..., n] -> [..., n]."""
    vectors = F.embedding(items.to(item_vectors.device), item_vectors)
    return torch.einsum("...e,...ne->...n", states, vectors)


def last_state(output, items):
    """The output [B, e] after the last item of each history: what validation ranks by, and L_BD teaches."""
    return output[torch.arange(len(items)), (items > 0).sum(1) - 1]


def both_logits(states, item_vectors, items, negatives):
    """z_i [N, 1] of the N observed `items`, z_j [N, k] of their negatives; states [B, T, e] score `items`."""
    asked, real = torch.cat([items[..., None], negatives], -1), items > 0
    z = logits(states[real], item_vectors, asked[real])  # one look-up: its gradient is as large as the table
    return z[:, :1], z[:, 1:]


def pairwise(output, item_vectors, items, negatives):
    """L_CF of BPR (Rendle et al., UAI 2009): -sum log sigma(z_ui - z_uj)."""
    z_i, z_j = both_logits(output, item_vectors, items, negatives)
    return -F.logsigmoid(z_i - z_j).sum()


def pointwise(states, item_vectors, items, negatives):
    """-sum [log sigma(z_i) + sum_j log(1 - sigma(z_j))]."""
    z_i, z_j = both_logits(states, item_vectors, items, negatives)
    return -F.logsigmoid(z_i).sum() - F.logsigmoid(-z_j).sum()


def of_user(output, item_vectors, items, negatives):
    """L_CF of CDAE: point-wise, all observed items of a user scored by what the whole history gives."""
    states = last_state(output, items)[:, None].expand(*items.shape, -1)
    return pointwise(states, item_vectors, items, negatives)


def next_item(output, item_vectors, items, negatives):
    """L_CF of a sequence model: point-wise, an item scored by what the items before it give."""
    return pointwise(output[:, :-1], item_vectors, items[:, 1:], negatives[:, 1:])


def next_of_all(output, item_vectors, items, negatives):
    """L_CF of a sequence model that was trained with a softmax over all items: -sum log p_i."""
    real = items[:, 1:] > 0
    z = output[:, :-1][real] @ item_vectors[1:].T
    return F.cross_entropy(z, items[:, 1:][real].to(z.device) - 1, reduction="sum")


L_CF = {"bpr": pairwise, "cdae": of_user, "sequence": next_item, "softmax": next_of_all}


def zero_of(base, state, item_vectors):
    """What counts as z = 0 in L_BD: 0; with a softmax, which is blind to a constant, the user's own score at
    rank TOP of all items (ours). state [B, e] -> [B, 1].
    """
    if base != "softmax":
        return torch.zeros_like(state[:, :1])
    scores = state.detach() @ item_vectors.detach()[1:].T
    return scores.topk(min(TOP, scores.shape[1])).values[:, -1:]


def L(l_cf, weight, l_bd):
    """L_T = L_CF(T) + lambda_S->T L_BD(T;S), and L_S = L_CF(S) + lambda_T->S L_BD(S;T)."""
    return l_cf + weight * l_bd


# ---- The paper's bases; `forward` is the contract of a model file ----------------------------------------


class BPR(nn.Module):
    """Matrix factorisation: z_ui = p_u . q_i."""

    def __init__(self, user_count, item_count, dim):
        super().__init__()
        self.p = nn.Embedding(user_count + 1, dim)  # starts from N(0, 1), as published
        self.q = nn.Embedding(item_count + 1, dim, padding_idx=0)

    def forward(self, users, items):
        """users [B], items [B, T] -> hidden [1, B, T, d], output [B, T, d], item_vectors [V+1, d]."""
        output = self.p(users)[:, None] + torch.zeros_like(items, dtype=torch.float32)[..., None]
        return output[None], output, self.q.weight


class CDAE(nn.Module):
    """Collaborative denoising autoencoder, Wu et al., WSDM 2016.

    z_ui = w'_i . sigma(W^T y_u + v_u + b) + b'_i; y_u is the history as a vector of zeros and ones, half of
    which are dropped in training, and the others count doubly.
    """

    def __init__(self, user_count, item_count, dim):
        super().__init__()
        self.W = nn.Embedding(item_count + 1, dim, padding_idx=0)
        self.v = nn.Embedding(user_count + 1, dim)
        self.b = nn.Parameter(torch.empty(dim))
        self.w_and_b = nn.Parameter(torch.empty(item_count + 1, dim + 1))  # w'_i, and b'_i as the last column
        for weights, inputs in ((self.W.weight, item_count), (self.b, item_count), (self.w_and_b, dim)):
            nn.init.uniform_(weights, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))
        self.W.weight.data[0] = 0

    def forward(self, users, items):
        """users [B], items [B, T] -> hidden [2, B, T, d], output [B, T, d+1], item_vectors [V+1, d+1]."""
        ordered, order = items.sort(dim=1, stable=True)  # y_u is 1 for an item that comes twice
        twice = (ordered == ordered.roll(1, 1)) & (torch.arange(items.shape[1], device=items.device) > 0)
        kept = F.dropout(1.0 - twice.scatter(1, order, twice).float(), 0.5, self.training)
        embedded = self.W(items) * kept[..., None]
        h = (embedded.cumsum(1) + self.v(users)[:, None] + self.b).sigmoid()
        return torch.stack([embedded, h]), torch.cat([h, torch.ones_like(h[..., :1])], -1), self.w_and_b


BASES = {"bpr": BPR, "cdae": CDAE}

# ---- Training --------------------------------------------------------------------------------------------


class Learner:
    """A program that is trained: its two modules, and the optimizer."""

    def __init__(self, program, args, side):
        # both share the parameters of `program`: `judge` judges what `model` learns, and `program` is saved
        self.program, self.model = program, with_dropout(module_of(program, args.device), True)
        with_dropout(program.graph_module, False)  # should it have been exported in training
        self.judge, decay = module_of(program, args.device), args.warm_up_weight_decay[side]
        weights, rate = self.model.parameters(), args.learning_rate
        self.adam = torch.optim.Adam(weights, rate, weight_decay=decay, fused=True)

    def step(self, loss):
        """Follow the gradient of `loss`."""
        self.adam.zero_grad()
        loss.backward()
        add_up([weight.grad for weight in self.model.parameters()])
        self.adam.step()


@torch.no_grad()
def renew(teacher, student, data, users, begin, end, args, epochs, rng):
    """Rank all items by both models, and draw the items of the coming `epochs`, a slice of users at a time.

    `data` is what `read_interactions` gives; both learners see items[begin:end] of `users` [N]. Returns the
    items drawn for each, int32 [2, epochs, n k], those beside items[t] at [t k, (t + 1) k); and, as the paper
    does, the share of users whose validation item the student ranks better than the teacher.
    """
    user_ids, starts, items = data
    (_, evaluated), item_count, k, better = leave_one_out(starts), items.max(), args.samples, np.zeros(2)
    drawn = np.zeros((2, epochs, len(items) * k), np.int32)
    rows = max(1, min(256, 2**21 // item_count))
    mine = range(0, len(users), rows)[share()]
    for batch in (slice(i, i + rows) for i in range(0, len(users), rows)):
        if batch.start not in mine:  # another process's: as many numbers are drawn there
            rng.bit_generator.advance(2 * epochs * k * int((end - begin)[batch].sum()))
            continue
        history = pad_batch(items, starts[users[batch]], end[batch]).numpy()
        observed = np.zeros((len(history), item_count + 1), bool)
        np.put_along_axis(observed, history, True, 1)
        ids, window = torch.from_numpy(user_ids[users[batch]]), pad_batch(items, begin[batch], end[batch])
        both = []
        for learner in (teacher, student):
            _, output, item_vectors = learner.judge(ids.to(args.device), window.to(args.device))
            scores = (last_state(output, window) @ item_vectors[1:].T).float().cpu().numpy()
            both.append(ranks(scores, observed[:, 1:]))
        for row, p in enumerate(zip(*probabilities(*both, args), strict=True)):
            b, e = begin[batch][row], end[batch][row]
            for side in (0, 1):
                drawn[side, :, b * k : e * k] = draw(p[side], (epochs, (e - b) * k), rng)
            rank_T, rank_S = (rank[row, items[e] - 1] if evaluated[users[batch][row]] else 0 for rank in both)
            better += rank_S < rank_T, rank_T > 0
    drawn, better = torch.from_numpy(drawn), torch.from_numpy(better)
    add_up([drawn])
    add_up([better])
    return drawn, (better[0] / better[1].clamp(min=1)).item()


def losses(both, ids, history, negatives, taught, args):
    """L_CF(T), L_BD(T;S), L_CF(S) and L_BD(S;T) of a batch: ids [B], history [B, T], and for each side
    `negatives` [2, B, T, k] and, unless None, the items that are `taught` [2, B, T k].
    """
    found, states = [], []
    for learner, others in zip(both, negatives, strict=True):
        _, output, item_vectors = learner.model(ids.to(args.device), history.to(args.device))
        found += [L_CF[args.base](output, item_vectors, history, others), output.new_zeros(())]
        state = last_state(output, history), item_vectors
        states.append((state, zero_of(args.base, *state)))
    for side, weight in enumerate((args.lambda_teacher, args.lambda_student)):
        if taught is not None and weight:
            drawn, pair = taught[side], (states[side], states[1 - side])
            z_A, z_B = ((logits(*state, drawn) - zero)[drawn > 0] for state, zero in pair)
            found[2 * side + 1] = bd_loss(z_A, z_B, args.temperature)
    return found


def train(args):
    """Warm up, train both ways, write both model files and the log."""
    began = time.time()
    torch.manual_seed(args.seed)
    data = user_ids, starts, items = read_interactions(args.data)
    last_ids, k = (int(user_ids.max()), int(items.max())), args.samples
    max_length = max(2, int(np.diff(starts).max()))
    if args.teacher:
        given = [load_model(path, *last_ids, args.data) for path in (args.teacher, args.student)]
        programs, configs = zip(*given, strict=True)
        max_length = min(max_length, *(config["max_length"] for config in configs))
    else:
        programs = [export(BASES[args.base](*last_ids, dim), max_length) for dim in args.dims]
    rng = np.random.default_rng(args.seed)
    users, begin, end, judged = training_part(args.data, starts, max_length - 1, rng)
    seen = seen_in_training(user_ids, starts, items)
    rows = users, begin, end  # what a batch is of: histories, or with bpr pairs, each a history of one item
    if args.base == "bpr":
        pairs = np.concatenate([np.arange(b, e) for b, e in zip(begin, end, strict=True)])
        rows = np.repeat(users, end - begin), pairs, pairs + 1
    join(args, len(rows[0]), len(judged))
    both = [Learner(program, args, side) for side, program in enumerate(programs)]
    observed = (rows[2] - rows[1] - (args.base in ("sequence", "softmax"))).sum()
    print(f"{len(user_ids):,} users, {last_ids[1]:,} items, {len(items):,} interactions; on {args.device}")
    last, weights = args.warm_up + args.epochs, (args.lambda_teacher, args.lambda_student)
    draws = args.direction == "both" and (any(weights) or args.negatives == "drawn")
    parts = [part for learner in both for part in (learner.model, learner.adam)]
    run, past = load_checkpoint(args, parts)
    log, best, drawn = past.get("log", []), past.get("best", {}), past.get("drawn")
    began -= sum(line["seconds"] for line in log)
    # models that are given are judged as they came, in epoch 0
    for epoch in range(len(log) + (not args.teacher), last + 1):
        tick, line, bd = time.time(), {"epoch": epoch}, epoch - args.warm_up - 1  # bd: from 0 when both train
        if bd == 0:
            for learner, decay in zip(both, args.weight_decay, strict=True):
                learner.adam.state.clear()  # a new optimizer
                learner.adam.param_groups[0]["weight_decay"] = decay
        if bd >= 0 and draws and bd % args.period == 0:
            coming, drawing = min(args.period, args.epochs - bd), np.random.default_rng([args.seed, epoch, 1])
            drawn, line["student_better"] = renew(*both, data, users, begin, end, args, coming, drawing)
            line["renewal_seconds"] = time.time() - tick
        rng, total = random_numbers(args.seed, epoch), torch.zeros(4, dtype=torch.float64, device=args.device)
        batches = batches_of_like_length(rows[2] - rows[1], args.batch_size, rng) if epoch else []
        for step, batch in enumerate(batches, 1):
            owner, b, e = (column[batch] for column in rows)
            ids, history, taught = torch.from_numpy(user_ids[owner]), pad_batch(items, b, e), None
            asked = np.broadcast_to(owner[:, None, None], (2, *history.shape, k))
            negatives = torch.from_numpy(draw_negatives(asked, seen, last_ids[1], rng))
            if drawn is not None:
                epochs_items = drawn[:, bd % args.period].numpy()
                taught = torch.stack([pad_batch(side, b * k, e * k) for side in epochs_items])
                if args.negatives == "drawn":
                    beside = taught.view_as(negatives)
                    negatives = torch.where(beside > 0, beside, negatives)
                taught = taught[:, share()]
            found = losses(both, ids[share()], history[share()], negatives[:, share()], taught, args)
            for side, learner in enumerate(both):
                loss = L(found[2 * side], weights[side], found[2 * side + 1])
                # a sum, by the mean number of observed items: each counts alike, whatever its batch
                learner.step(loss * len(batches) / observed)
            total += torch.stack(found).detach()
            if sys.stdout.isatty():
                print(f"epoch {epoch}, {step / len(batches):.0%}", end="\r", flush=True)
        if epoch:
            add_up([total])
            if not total.isfinite().all():
                sys.exit(f"the loss became NaN or infinite in epoch {epoch}; lower --learning-rate")
            names = "L_CF(T)", "L_BD(T;S)", "L_CF(S)", "L_BD(S;T)"
            line |= zip(names, (total / observed).tolist(), strict=True)
        line["seconds"] = time.time() - tick
        log.append(line)
        # a long warm-up is not judged every epoch: that would take longer than the epoch itself
        if bd >= -1 or epoch % args.period == 0:
            for kind, learner in zip(KINDS, both, strict=True):
                about = user_ids, starts, items, judged, max_length, args.device
                line[f"{kind}_HR@10"], line[f"{kind}_NDCG@10"] = hr, ndcg = validate(learner.judge, *about)
                # bidirectional training goes on from the end of the warm-up, as published, not from its best
                if kind not in best or bd < 0 or ndcg > best[kind]["NDCG@10"]:
                    best[kind] = {"epoch": epoch, "HR@10": hr, "NDCG@10": ndcg}
                    made = f"{args.out}-{kind}.pt2", learner.program, learner.model, best[kind]
                    save_model(args, *made, role=kind, items=last_ids[1], max_length=max_length)
            report(args.out, log, last - epoch, began)
        save_checkpoint(args.out, run, parts, log=log, best=best, drawn=drawn)
    complete(args.out)


# ---- Loaded programs -------------------------------------------------------------------------------------


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


def seen_in_training(user_ids, starts, items):
    """The training interactions as sorted numbers user * (V + 1) + item, each once; users are indices."""
    owner, base = np.repeat(np.arange(len(user_ids)), np.diff(starts)), items.max() + 1
    training = np.arange(len(items)) < leave_one_out(starts)[0][owner]
    seen = np.unique((owner * base + items)[training])
    full = np.bincount(seen // base) == base - 1
    if full.any():
        sys.exit(f"user {user_ids[full.argmax()]} has seen every item: none is left to draw; leave it out")
    return seen


def draw_negatives(users, seen, item_count, rng):
    """A uniform item that the user has not seen, for each entry of `users`, indices: int64 of the same shape.

    `seen` is what `seen_in_training` gives: a look-up is a binary search.
    """
    drawn, wrong = rng.integers(1, item_count + 1, users.size), np.arange(users.size)
    while len(wrong):
        key = users.flat[wrong] * (item_count + 1) + drawn[wrong]
        wrong = wrong[seen[np.minimum(np.searchsorted(seen, key), len(seen) - 1)] == key]
        drawn[wrong] = rng.integers(1, item_count + 1, len(wrong))
    return drawn.reshape(users.shape)


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


def export(model, max_length):
    """The program of `model`, with its parameters, for any number of users and up to `max_length` items."""
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=max_length)
    example = torch.ones(2, dtype=torch.int64), torch.ones(2, max_length, dtype=torch.int64)
    return torch.export.export(model.eval(), example, dynamic_shapes=({0: batch}, {0: batch, 1: length}))


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

SETTINGS = {  # for bpr (notebook's cells 8, 9, 11) and cdae (8, 9, 12) as published, for sequence models ours
    "learning_rate": (float, 1e-3, 2e-3, 1e-3, "of Adam"),
    "temperature": (float, 5.0, 2.0, 1.0, "tau, divides the other's logits; inf: its label is 1/2"),
    "epsilon_exp": (float, 1e-4, 1e-4, 1e-3, "epsilon_e of p_S->T"),
    "epsilon_tanh": (float, 1e-2, 1e-4, 1e-2, "epsilon_t of p_T->S"),
    "batch_size": (int, 128, 128, 32, "observed pairs a step with bpr, else users"),
    "warm_up_weight_decay": (float, (7.8e-6, 0.0), (3.4e-7, 3.4e-7), (0.0, 0.0), "of Adam; 1e-3 for sums"),
    "samples": (int, 1, 5, 1, "k: negatives, and drawn items in each direction, for each observed one"),
    "warm_up": (int, 1000, 1000, 0, "epochs alone, where no models are given"),
    "epochs": (int, 100, 1000, 20, "epochs together; if 0, the warmed up models are written"),
}


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
    add("--teacher", help="trained model to go on from, with --student. Load only trusted ones")
    add("--student", help="trained model to go on from, with --teacher")
    add("--out", required=True, help="what OUT-teacher.pt2, OUT-student.pt2 and OUT.log.jsonl begin with")
    add("--base", choices=L_CF, default="sequence", help="of both; the last two: trained models")
    pair = {"nargs": 2, "metavar": ("TEACHER", "STUDENT")}
    add("--dims", **pair, type=int, default=[50, 5], help="sizes of the vectors of a new bpr or cdae")
    for name, (kind, *defaults, what) in SETTINGS.items():
        options = pair if isinstance(defaults[0], tuple) else {}
        what += "; {}, {}, {} of bpr, cdae, sequence models".format(*defaults)
        add(f"--{name.replace('_', '-')}", **options, type=kind, default=argparse.SUPPRESS, help=what)
    add("--lambda-teacher", type=float, default=0.5, help="lambda_S->T, weight of L_BD(T;S)")
    add("--lambda-student", type=float, default=0.5, help="lambda_T->S, weight of L_BD(S;T)")
    add("--weight-decay", **pair, type=float, default=[0.0, 0.0], help="of Adam while both train")
    add("--period", type=int, default=10, help="p: epochs between renewals of the ranks")
    add("--direction", choices=["both", "none"], default="both", help="none: both go on alone")
    add("--sampling", choices=["rank", "uniform", "top"], default="rank", help="of the items that are taught")
    add("--sign", choices=["paper", "published"], default="paper", help="of the rank discrepancy")
    add("--negatives", choices=["uniform", "drawn"], default="uniform", help="of L_CF; drawn: what is taught")
    add("--resume", action="store_true", help="go on from OUT.ckpt, which a run that was stopped has left")
    add("--seed", type=int, default=0, help="same seed, data and machine: same files")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    if bool(args.teacher) != bool(args.student) or (args.base not in BASES and not args.teacher):
        parser.error("give --teacher and --student, two trained models, or --base bpr or cdae")
    for name, (_, *defaults, _) in SETTINGS.items():
        if name not in args:
            given = name == "warm_up" and args.teacher
            setattr(args, name, 0 if given else defaults[min(2, list(L_CF).index(args.base))])
    refuse_numbers(parser, args)
    if not args.teacher and args.warm_up + args.epochs == 0:
        parser.error("--warm-up and --epochs are 0: nothing to train")
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
