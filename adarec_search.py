"""Stage 2: search the architecture of the student for one data set, AdaRec.

Lei Chen, Fajie Yuan, Jiaxi Yang, Min Yang and Chengming Li, "Scene-adaptive Knowledge Distillation for
Sequential Recommendation via Differentiable Architecture Search", arXiv 2107.07173.

A supernet holds every operation on every edge of its cells; which one an edge uses is drawn by `alpha`, and
`alpha` learns with the weights from

    L = (1 - gamma) L_CE + gamma (L_emb + L_hid + L_pred) + beta L_cost

Reads   interactions, `user item` a row (data/README.md), and a teacher (README.md, "The model file");
        without one, gamma is 0.
Writes  OUT, the architecture as JSON; beside it, as .pt2, the student with its searched weights; and
        OUT.log.jsonl, a line an epoch with all of `alpha`.
Shapes  N real positions of a batch; K cells of d_S features, E edges a cell, |O| operations; L_T layers of
        d_T features in the teacher; V items, item 0 padding; B users, T positions.

    python adarec_search.py data/ml-100k.txt --teacher runs/teacher.pt2 --out runs/architecture.json
"""

import argparse
import copy
import functools
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

# the operations O; of a convolution, how many items back each of its taps looks, oldest first
TAPS = {
    "conv3": (2, 1, 0),
    "conv5": (4, 3, 2, 1, 0),
    "dilated_conv3": (4, 2, 0),
    "dilated_conv5": (8, 6, 4, 2, 0),
}
OPERATIONS = (*TAPS, "avg_pool", "max_pool", "skip", "none", "mean")  # the paper's eight, and ours
POOL = 3  # width of the pools
REACH = 8  # items back that the widest operation looks

# ---- The student: cells of one architecture --------------------------------------------------------------
# `edges[j-1][i]` names the operation from node i to node j; node 0 is the cell's input


def earlier(x, places):
    """x [..., T] as it was `back` places ago, 0 before its beginning, for each `back` in `places`."""
    longest = max(places)
    padded = F.pad(x, (longest, 0))
    begins = [longest - back for back in places]
    return [padded[..., b : b + x.shape[-1]] if b < longest else x for b in begins]


def running_mean(x):
    """The mean of x [..., T] up to each place."""
    return x.cumsum(-1) / x.new_ones(x.shape[-1]).cumsum(0)  # ones of x: a file has no other device's


class Operation(nn.Module):
    """One operation o(x) on x [B, d, T], causal: all is padded on the left. The published code pads on both
    sides, which shows position t the item at t + 1 that it has to predict. `mean` is ours: it sees it all.
    """

    def __init__(self, name, dim):
        super().__init__()
        self.name, self.dilation = name, 1 + name.startswith("dilated")
        if name in TAPS:
            self.convolution = nn.Conv1d(dim, dim, len(TAPS[name]), dilation=self.dilation)

    def forward(self, x):
        if self.name in TAPS and self.dilation == 1:
            return self.convolution(F.pad(x, (TAPS[self.name][0], 0)))
        if self.name in TAPS:  # as one product of matrices: torch's own is slow for a single history
            kernel = self.convolution.weight.transpose(1, 2).flatten(1)  # [d, k d]
            return kernel @ torch.cat(earlier(x, TAPS[self.name]), 1) + self.convolution.bias[:, None]
        if self.name == "avg_pool":  # torch's own pools do not export for histories of every length
            return functools.reduce(torch.add, earlier(x, range(POOL))) / POOL
        if self.name == "max_pool":  # x = ReLU(x_i) is nowhere below the padding
            return functools.reduce(torch.maximum, earlier(x, range(POOL)))
        if self.name == "mean":
            return running_mean(x)
        return x if self.name == "skip" else torch.zeros_like(x)


class Cell(nn.Module):
    """x_j = sum_{i<j} o_ij(ReLU(x_i)); returns x_0 + ReLU(LayerNorm(sum_j softmax(w)_j x_j))."""

    def __init__(self, dim, edges):
        super().__init__()
        self.operations = nn.ModuleList(nn.ModuleList(Operation(o, dim) for o in row) for row in edges)
        self.w = nn.Parameter(torch.zeros(len(edges)))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_0):  # [B, T, d]
        x, active = [x_0.transpose(1, 2)], []  # x_i and ReLU(x_i), each [B, d, T]
        for row in self.operations:
            active.append(F.relu(x[-1]))
            used = [o(x_i) for o, x_i in zip(row, active, strict=True) if o.name != "none"]
            x.append(functools.reduce(torch.add, used) if used else torch.zeros_like(x[0]))
        total = (self.w.softmax(0).view(-1, 1, 1, 1) * torch.stack(x[1:])).sum(0)
        return x_0 + F.relu(self.norm(total.transpose(1, 2)))


class Student(nn.Module):
    """Embedding, cells, and scores by the item vectors; `forward` is the contract of a model file."""

    def __init__(self, item_count, max_length, dim, cells, dropout):
        super().__init__()
        self.M = nn.Embedding(item_count + 1, dim, padding_idx=0)  # items, and scores by the same vectors
        self.P = nn.Parameter(0.02 * torch.randn(max_length, dim))  # positions
        self.dropout = nn.Dropout(dropout)
        self.cells = nn.ModuleList(cells)
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.M.weight, std=0.02)
        self.M.weight.data[0] = 0

    def forward(self, users, items, *y):
        """users [B], items [B, T] -> hidden [K+1, B, T, d_S], output [B, T, d_S], item_vectors [V+1, d_S].

        A supernet's cells need `y`, the choice of operations [E, |O|].
        """
        # E_t = sqrt(d) M[s_t] + P_t
        x = math.sqrt(self.M.embedding_dim) * self.M(items) + self.P[: items.shape[1]]
        hidden = [self.dropout(x)]
        for cell in self.cells:
            hidden.append(cell(hidden[-1], *y))
        return torch.stack(hidden), self.norm(self.dropout(hidden[-1])), self.M.weight


def edge_index(i, j):
    """Row of `alpha` and `y` of the edge from i to j: 0-1, 0-2, 1-2, 0-3, ...; (0, n + 1): their number."""
    return j * (j - 1) // 2 + i


def receptive_field(edges, cells=1):
    """How many items the output of `cells` cells depends on; 0 if no node is reached by the cell's input."""
    back = {"avg_pool": POOL - 1, "max_pool": POOL - 1, "skip": 0, "mean": 10**9}
    back |= {o: taps[0] for o, taps in TAPS.items()}
    reach = [0]  # how many items back node i looks; minus infinity where nothing of the input arrives
    for row in edges:
        reach.append(max(r + back.get(o, -math.inf) for o, r in zip(row, reach, strict=True)))
    return 1 + cells * max(reach[1:]) if max(reach[1:]) >= 0 else 0


# ---- The supernet: every operation on every edge (section "Relaxation") ----------------------------------


class MixedEdges(nn.Module):
    """The edges from one node to `targets` later ones, each sum_o y_o o(x). All operations but APART are
    convolutions, so their weighted sum is one, whose kernel is the weighted sum of theirs.
    """

    APART = [OPERATIONS.index("max_pool"), OPERATIONS.index("mean")]

    def __init__(self, dim, targets):
        super().__init__()
        self.widths = [len(taps) for taps in TAPS.values()]
        # the kernels of the convolutions side by side, taps last: [targets, d, d, 3 + 5 + 3 + 5]
        self.kernels = nn.Parameter(torch.empty(targets, dim, dim, sum(self.widths)))
        self.biases = nn.Parameter(torch.empty(targets, len(TAPS), dim))
        for o, kernel in enumerate(self.kernels.data.split(self.widths, -1)):  # as nn.Conv1d starts
            bound = 1 / math.sqrt(dim * self.widths[o])
            kernel.uniform_(-bound, bound)
            self.biases.data[:, o].uniform_(-bound, bound)
        taps = torch.tensor([(o, REACH - back) for o, backs in enumerate(TAPS.values()) for back in backs])
        self.register_buffer("operation", taps[:, 0])  # which operation a tap is of,
        self.register_buffer("place", F.one_hot(taps[:, 1], REACH + 1).float())  # and its place when merged
        self.register_buffer("average", (torch.arange(REACH + 1) > REACH - POOL) / POOL)
        self.register_buffer("eye", torch.eye(dim))  # average pool and skip mix no channels

    def merge(self, y):
        """The one kernel [targets, d, d, REACH + 1] and bias [targets, d] of choice y [targets, |O|]."""
        kernel = (self.kernels * y[:, None, None, self.operation]) @ self.place
        average, skip = (y[:, [OPERATIONS.index(o)]] for o in ("avg_pool", "skip"))
        by_channel = average * self.average + skip * self.place[-1]  # [targets, REACH + 1]
        kernel = kernel + self.eye[:, :, None] * by_channel[:, None, None]
        return kernel, torch.einsum("jo,jod->jd", y[:, : len(TAPS)], self.biases)

    def forward(self, x, y):
        """x [B, d, T], nowhere negative; y [targets, |O|] -> [B, targets, d, T]."""
        kernel, bias = (part.flatten(0, 1) for part in self.merge(y))
        # no operation looks 5 or 7 items back: a convolution of even taps and one of taps 3 and 1 cost less
        linear = F.conv1d(F.pad(x, (REACH, 0)), kernel[..., ::2], bias, dilation=2)
        linear += F.conv1d(F.pad(x, (3, -1)), kernel[..., -4::2], dilation=2)
        y = y[:, self.APART].expand(len(x), -1, -1)  # [B, targets, 2]
        # what no edge has chosen passes nothing to x; a GPU would wait for the answer
        with torch.set_grad_enabled(not y.is_cpu or bool(y.any())):
            apart = torch.stack([F.max_pool1d(F.pad(x, (POOL - 1, 0)), POOL, stride=1), running_mean(x)], 1)
        # linear + y apart, as a product of matrices, so that its gradient is one, too
        total = torch.baddbmm(linear.view(*y.shape[:2], -1), y, apart.flatten(2))
        return total.view(*y.shape[:2], *x.shape[1:])


class MixedCell(nn.Module):
    """A cell as `Cell`, with every operation on every edge, weighted by y [E, |O|]."""

    def __init__(self, dim, nodes):
        super().__init__()
        self.sources = nn.ModuleList(MixedEdges(dim, nodes - i) for i in range(nodes))
        self.w = nn.Parameter(torch.zeros(nodes))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_0, y):  # [B, T, d], [E, |O|]
        nodes = len(self.sources)
        x = [x_0.transpose(1, 2)] + [0] * nodes  # each [B, d, T]
        for i, edges in enumerate(self.sources):
            rows = [edge_index(i, j) for j in range(i + 1, nodes + 1)]
            for j, part in enumerate(edges(F.relu(x[i]), y[rows]).unbind(1), i + 1):
                x[j] = x[j] + part
        total = sum(share * x_j for share, x_j in zip(self.w.softmax(0), x[1:], strict=True))
        return x_0 + F.relu(self.norm(total.transpose(1, 2)))

    def derive(self, edges):
        """The Cell with operations `edges`, and a copy of the weights that they have here."""
        cell = Cell(self.norm.normalized_shape[0], edges)
        cell.w, cell.norm = copy.deepcopy(self.w), copy.deepcopy(self.norm)
        for j, row in enumerate(cell.operations, 1):
            for i, operation in enumerate(row):
                if operation.name in TAPS:
                    o, source = list(TAPS).index(operation.name), self.sources[i]
                    kernel = source.kernels.data[j - i - 1].split(source.widths, -1)[o]
                    operation.convolution.weight.data = kernel.clone()
                    operation.convolution.bias.data = source.biases.data[j - i - 1, o].clone()
        return cell


def choose(alpha, tau, relaxation, rng):
    """y [E, |O|], the choice of an operation for each edge, differentiable in alpha [E, |O|].

    `gumbel`: y = softmax((log_softmax(alpha) + g) / tau), g Gumbel noise, and forward the one-hot vector of
    its largest entry (straight through), so that o is drawn with probability softmax(alpha)_o. `softmax`:
    softmax(alpha), a mixture of all (DARTS, arXiv 1806.09055).
    """
    if relaxation == "softmax":
        return alpha.softmax(-1)
    g = torch.from_numpy(rng.gumbel(size=alpha.shape)).to(alpha)
    soft = ((alpha.log_softmax(-1) + g) / tau).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), alpha.shape[-1]).to(soft)
    return hard + (soft - soft.detach())


def derive(supernet, edges):
    """The student with operations `edges` on a supernet's cells, and a copy of the weights it has there."""
    student = copy.deepcopy(supernet)
    student.cells = nn.ModuleList(cell.derive(edges) for cell in supernet.cells)
    return student


def best_edges(alpha):
    """The architecture of alpha [E, |O|]: edges[j-1][i] is the operation of largest alpha_ij."""
    names, edges = [OPERATIONS[o] for o in alpha.argmax(-1).tolist()], []
    while names:
        edges.append([names.pop(0) for _ in range(len(edges) + 1)])
    return edges


# ---- L_cost ----------------------------------------------------------------------------------------------


def operation_costs(dim, nodes):
    """cost(o) [|O|], float64: half its share of parameters, half its share of multiply-adds, in units of the
    dearest architecture of `nodes` nodes, all of whose edges are the dearest operation (ours). A pool counts
    a multiply-add for each of the items it looks at, the mean, a running sum, one, skip and none nothing.
    """
    kernels = [len(TAPS.get(o, ())) * dim * dim for o in OPERATIONS]
    parameters = [kernel + dim * (o in TAPS) for kernel, o in zip(kernels, OPERATIONS, strict=True)]
    looked = {"avg_pool": POOL, "max_pool": POOL, "mean": 1}
    multiply_adds = [k + dim * looked.get(o, 0) for k, o in zip(kernels, OPERATIONS, strict=True)]
    shares = [torch.tensor(n, dtype=torch.float64) / max(n) for n in (parameters, multiply_adds)]
    return (shares[0] + shares[1]) / 2 / edge_index(0, nodes + 1)


def cost_loss(p, costs):
    """L_cost = sum_edges sum_o p_o cost(o), the expected cost at p = softmax(alpha) [E, |O|]; costs [|O|].

    The paper takes the drawn y for p: the same in the mean, but its gradient is as noisy as that of L_CE.
    """
    return (p * costs).sum()


# ---- L_CE and L_pred, L_emb and L_hid (as in emd_distill.py); L ------------------------------------------


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


def kl_distances(student, teacher):
    """D_ij = KL(softmax(H^T_j) || softmax(H^S_i W_h)) over the features, mean over positions: [L_S, L_T];
    student [L_S, N, d_T], already projected, and teacher [L_T, N, d_T].
    """
    log_p, log_q = student.log_softmax(-1).flatten(1), teacher.log_softmax(-1).flatten(1)
    q = log_q.exp()
    return ((q * log_q).sum(1) - log_p @ q.T) / student.shape[1]


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


def L(student, teacher, target, negatives, W, w, p, costs, args):
    """L = (1 - gamma) L_CE + gamma (L_emb + L_hid + L_pred) + beta L_cost.

    student: hidden [K+1, N, d_S], output [N, d_S], item_vectors [V+1, d_S]; teacher alike, or None: gamma 0;
    target [N]; negatives: () or negatives and log_count [k]; W = W_e, W_h map d_S to d_T; w = w_S [K] and
    w_T [L_T], layer weights; p [E, |O|]; costs [|O|]. Returns L; L_CE, L_cost, L_emb, L_hid, L_pred; the flow
    [K, L_T]; w of the next step.
    """
    hidden, output, item_vectors = student
    hidden_T, output_T, vectors_T = teacher or (None, None, None)
    gamma, l_cost = args.gamma if teacher else 0.0, cost_loss(p, costs)
    # (1 - gamma) L_CE + gamma L_pred, in one pass over the scores
    scored = output, item_vectors, target, output_T, vectors_T, 1 - gamma, gamma
    of_items = sampled_item_losses if negatives else item_losses
    loss, l_ce, l_pred = of_items(*scored, *negatives)
    if not teacher:
        return loss + args.beta * l_cost, [l_ce, l_cost], np.zeros(0), w
    l_emb = F.mse_loss(W[0](hidden[0]), hidden_T[0])
    distance = kl_distances(W[1](hidden[1:]), hidden_T[1:])
    D = mean_of_all(distance, len(output))
    flow = transport(*w, D)
    w = updated_weights(w[0], (flow * D).sum(1)), updated_weights(w[1], (flow * D).sum(0))
    l_hid = emd_loss(distance, flow)
    loss = loss + gamma * (l_emb + l_hid) + args.beta * l_cost
    return loss, [l_ce, l_cost, l_emb, l_hid, l_pred], flow, w


# ---- The search ------------------------------------------------------------------------------------------


def search(args):
    """Search, and write the architecture, the student with the weights it has there, and the log."""
    began = time.time()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    user_ids, starts, items = read_interactions(args.data)
    last_ids, max_length = (int(user_ids.max()), int(items.max())), args.max_length or 50
    teacher, W, w = None, None, None
    if args.teacher and args.gamma > 0:
        teacher, config = load_model(args.teacher, *last_ids, args.data, args.max_length or 1, layers=1)
        max_length = args.max_length or config["max_length"]
    users, begin, end, judged = training_part(args.data, starts, max_length, rng)
    join(args, len(users), len(judged))
    teacher = teacher and module_of(teacher, args.device).requires_grad_(False)
    Q = proposal(items, begin, end) if args.negatives else None
    answers = {} if args.remember else None

    cells = [MixedCell(args.dim, args.nodes) for _ in range(args.cells)]
    model = Student(last_ids[1], max_length, args.dim, cells, args.dropout).to(args.device)
    costs = operation_costs(args.dim, args.nodes).float().to(args.device)
    alpha = torch.tensor([0.0 if o in args.operations else -1e9 for o in OPERATIONS], device=args.device)
    alpha = nn.Parameter(alpha.repeat(edge_index(0, args.nodes + 1), 1))
    learned = list(model.parameters())
    if teacher:
        W = [nn.Linear(args.dim, config["dim"]).to(args.device) for _ in range(2)]  # W_e and W_h
        w = [np.full(layers, 1 / layers) for layers in (args.cells, config["layers"])]
        learned += [*W[0].parameters(), *W[1].parameters()]
    groups = [{"params": learned}, {"params": [alpha], "lr": args.alpha_learning_rate, "weight_decay": 1e-4}]
    optimizer = torch.optim.AdamW(groups, args.learning_rate, weight_decay=5e-4, fused=True)
    print(f"{len(user_ids):,} users, {last_ids[1]:,} items, {len(items):,} interactions; on {args.device}")
    length = end - begin - 1
    steps, positions = math.ceil(len(users) / args.batch_size), int(length.sum())
    trained = model, nn.ParameterList([alpha]), *(W or ()), optimizer
    run, past = load_checkpoint(args, trained)
    log, w = past.get("log", []), [x.numpy() for x in past.get("w", ())] or w
    began -= sum(line["seconds"] for line in log)
    for epoch in range(len(log) + 1, args.epochs + 1):
        tau = 0.8 ** ((epoch - 1) // 5)  # anneals from 1, a fifth less every 5 epochs
        rng, total, flows, tick = random_numbers(args.seed, epoch), 0, 0, time.time()
        for step, batch in enumerate(batches_of_like_length(length, args.batch_size, rng), 1):
            mine = batch[share()]
            ids = torch.from_numpy(user_ids[users[mine]]).to(args.device)
            inputs = pad_batch(items, begin[mine], end[mine] - 1)
            targets = pad_batch(items, begin[mine] + 1, end[mine])
            inputs, real = inputs.to(args.device), inputs > 0
            # at first alpha waits, and y is the mixture of all: kernels learn before they are chosen among
            waits, p = epoch <= args.alpha_warm_up, alpha.softmax(-1)
            y = p.detach() if waits else choose(alpha, tau, args.relaxation, rng)
            made = at_real(model(ids, inputs, y), real)
            drawn = draw_shared(Q, args.negatives, rng) if args.negatives else ()
            target, *negatives = (x.to(args.device) for x in (targets[real], *drawn))
            taught = ask(teacher, ids, inputs, real, mine, answers) if teacher else None
            loss, parts, flow, w = L(made, taught, target, negatives, W, w, p, costs, args)
            optimizer.zero_grad()
            # a mean over positions: weighed by how many, or short histories would count as much as long ones
            (loss * len(target) * steps / positions).backward()
            if waits:
                alpha.grad = None
            add_up([weight.grad for group in groups for weight in group["params"]])
            optimizer.step()
            total = total + len(target) * torch.stack([part.detach().double() for part in parts])
            flows = flows + length[batch].sum() * flow
            if sys.stdout.isatty():
                print(f"epoch {epoch}, {step / steps:.0%}", end="\r", flush=True)
        edges, p = best_edges(alpha), alpha.detach().softmax(-1)
        add_up([total])
        if not total.isfinite().all():
            sys.exit(f"the loss became NaN or infinite in epoch {epoch}; lower --learning-rate")
        means = (total / positions).tolist()
        means = zip(("L_CE", "L_cost", "L_emb", "L_hid", "L_pred"), means, strict=False)
        log += [{"epoch": epoch} | dict(means) | {"tau": tau, "seconds": time.time() - tick}]
        log[-1] |= {"sure": p.max(-1).values.mean().item()}
        log[-1] |= {"edges": edges, "alpha": alpha.tolist(), "flow": (flows / positions).tolist()}
        report(args.out, log, args.epochs - epoch, began, f"  {edges_text(edges)}")
        save_checkpoint(args.out, run, trained, log=log, w=[torch.tensor(x) for x in w or ()])
    save_student(args, derive(model, best_edges(alpha)), best_edges(alpha), max_length)
    complete(args.out)


def edges_text(edges):
    """An architecture in a line: nodes apart by `;`, their edges' operations by `,`."""
    return ";".join(",".join(row) for row in edges)


def random_edges(nodes, operations, costs, cost, rng):
    """Uniformly drawn edges of a cost within 10 % of `cost`, or of any if that is infinite; costs [|O|]."""
    for _ in range(100_000):
        drawn = rng.choice([OPERATIONS.index(o) for o in operations], edge_index(0, nodes + 1))
        edges = best_edges(np.eye(len(OPERATIONS))[drawn])
        if abs(costs[drawn].sum() - cost) <= cost / 10 and receptive_field(edges):
            return edges
    sys.exit(f"--random {cost}: no architecture of such a cost was found; it lies between 0 and 1")


def read_architecture(path):
    """Cells, features and edges in an architecture file; ends unless the edges carry the input somewhere."""
    try:
        found = json.loads(Path(path).read_text())
        cells, dim, edges = int(found["cells"]), int(found["dim"]), found["edges"]
        known = [len(row) == j and set(row) <= set(OPERATIONS) for j, row in enumerate(edges, 1)]
        if min(cells, dim) < 1 or not all(known) or not receptive_field(edges):
            raise ValueError(f"edges[j-1] needs j of {', '.join(OPERATIONS)}, and the input must arrive")
    except (ValueError, TypeError, KeyError) as error:
        sys.exit(f"{path} is no architecture; {type(error).__name__}: {error}")
    return cells, dim, edges


def save_student(args, student, edges, max_length):
    """Write the architecture OUT, and the student beside it, as .pt2."""
    cells, dim = len(student.cells), student.M.embedding_dim
    architecture = {"cells": cells, "nodes": len(edges), "dim": dim, "edges": edges}
    config = {"architecture": architecture, "items": len(student.M.weight) - 1, "max_length": max_length}
    out, program = Path(args.out).with_suffix(".pt2"), export(student.cpu(), max_length)
    save_model(args, out, program, student, None, **config)
    write(args.out, (json.dumps(architecture, indent=1) + "\n").encode())
    cost = operation_costs(dim, len(edges))[[OPERATIONS.index(o) for row in edges for o in row]].sum()
    sees = min(receptive_field(edges, cells), max_length)
    print(f"{args.out}: {edges_text(edges)}; cost {cost:.3f}, sees {sees} items")


def build(args):
    """No search: write --architecture, or one that is drawn by --random, with random weights."""
    if int(os.environ.get("RANK", 0)):
        return  # of torchrun's processes one is enough
    torch.manual_seed(args.seed)
    cells, dim, max_length = args.cells, args.dim, args.max_length or 50
    if args.architecture:
        cells, dim, edges = read_architecture(args.architecture)
    else:
        costs = operation_costs(dim, args.nodes).numpy()
        rng = np.random.default_rng(args.seed)
        edges = random_edges(args.nodes, args.operations, costs, args.random, rng)
    item_count = int(read_interactions(args.data)[2].max())
    student = Student(item_count, max_length, dim, [Cell(dim, edges) for _ in range(cells)], args.dropout)
    save_student(args, student, edges, max_length)


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


# ---- Files ---------------------------------------------------------------------------------------------


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
    """Read the command line, search or build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("data", help="interactions, `user item` a row: .txt or .npy (data/README.md)")
    add("--teacher", help="model file to learn from; none: gamma is 0. Load only trusted ones")
    add("--out", required=True, help="architecture to write, as runs/architecture.json, and .pt2 beside it")
    add("--architecture", help="no search: give this architecture random weights")
    cost = "no search: a random architecture, of any cost or one within 10 %% of COST, with random weights"
    add("--random", type=float, nargs="?", const=math.inf, metavar="COST", help=cost)
    add("--cells", type=int, default=4, help="K: cells, one architecture, weights of their own")
    add("--nodes", type=int, default=3, help="N: nodes of a cell behind its input")
    add("--dim", type=int, default=64, help="d_S: size of hidden states and item vectors")
    add("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="O: what an edge may be")
    add("--max-length", type=int, help="most recent items that the student sees; the teacher's, or 50")
    add("--dropout", type=float, default=0.2, help="share of units dropped before and after the cells")
    add("--gamma", type=float, default=0.5, help="weight of L_emb + L_hid + L_pred; 1 - gamma of L_CE")
    add("--beta", type=float, default=0.3, help="weight of L_cost, which is 1 for the dearest architecture")
    add("--relaxation", choices=["gumbel", "softmax"], default="gumbel", help="softmax falls to `none`")
    add("--alpha-learning-rate", type=float, default=5e-2, help="of AdamW on alpha; 2e-5 as published")
    add("--alpha-warm-up", type=int, default=10, help="epochs in which alpha waits, y mixes all operations")
    add("--learning-rate", type=float, default=5e-3, help="of AdamW on the weights")
    add("--batch-size", type=int, default=32, help="users a step")
    add("--epochs", type=int, default=30, help="passes over all users")
    add("--negatives", type=int, default=0, help="k: items that estimate L_CE and L_pred; 0: all items")
    keep = "keep the teacher's answers in memory: fast from epoch 2 on, for one process"
    add("--remember", action="store_true", help=keep)
    add("--resume", action="store_true", help="go on from OUT.ckpt, which a run that was stopped has left")
    add("--seed", type=int, default=0, help="same seed, data and machine: same files")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    refuse_numbers(parser, args)
    if args.epochs <= args.alpha_warm_up or not args.out.endswith(".json"):
        parser.error("--epochs must be above --alpha-warm-up, and --out end in .json")
    try:
        build(args) if args.architecture or args.random is not None else search(args)
    except OSError as error:  # a file that is not there, or a place that cannot be written
        sys.exit(f"{error.filename or args.out}: {error.strerror}")
    except KeyboardInterrupt:  # files are whole at any time
        more = ", --resume goes on after the last whole epoch" * Path(f"{args.out}.ckpt").exists()
        print(f"stopped{more}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
