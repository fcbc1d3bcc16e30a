"""Stage 2: search the architecture of the student for one data set, AdaRec.

Chen, Yuan, Yang, Yang and Li, "Scene-adaptive Knowledge Distillation for Sequential Recommendation via
Differentiable Architecture Search", arXiv 2107.07173.

A supernet has every operation on every edge of its cells. `alpha` decides which operation an edge uses. The
search trains `alpha` and the weights together, on

    L = (1 - gamma) L_CE + gamma (L_emb + L_hid + L_pred) + beta L_cost

Reads   interactions, `user item` per row (data/README.md), and a teacher (README.md, "Your own model").
        Without a teacher, gamma is 0.
Writes  OUT, the architecture as JSON. Beside it, as .pt2, the student with the weights that the search found.
        OUT.log.jsonl, a line per epoch.
Shapes  B users, T positions, N real positions, V items, k negatives. Item 0 is padding.
        The student has K cells of d_S features, with E edges and |O| operations an edge.
        The teacher has L_T layers of d_T features.

    python adarec_search.py data/ml-100k.txt --teacher runs/teacher.pt2 --out runs/architecture.json
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
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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

# ---- The operations O ------------------------------------------------------------------------------------
# All are causal: they pad on the left. The published code pads on both sides, so position t sees its target.


def last_three(x):
    """x [B, d, T] delayed by two, one and no positions: [3, B, d, T]. torch's pools export for one T."""
    return torch.stack([F.pad(x, (2, 0))[..., :-2], F.pad(x, (1, 0))[..., :-1], x])


def running_mean(x):
    """The mean of x [B, d, T] up to each position. Not in the paper."""
    return x.cumsum(-1) / x.new_ones(x.shape[-1]).cumsum(0)


class Operation(NamedTuple):
    """An entry of OPERATIONS: a convolution with a learned kernel, or a `function` of x [B, d, T]."""

    width: int = 0  # of a convolution: its taps, `dilation` positions apart
    dilation: int = 1
    function: Callable | None = None
    function_looks_back: float = 0  # how many positions; -inf: the function ignores x
    multiply_adds: int = 0  # of a function, for each position and channel

    @property
    def looks_back(self):
        """How many positions back the operation looks."""
        return self.function_looks_back if self.function else self.dilation * (self.width - 1)


OPERATIONS = {
    "conv3": Operation(width=3),
    "conv5": Operation(width=5),
    "dilated_conv3": Operation(width=3, dilation=2),
    "dilated_conv5": Operation(width=5, dilation=2),
    "avg_pool": Operation(function=lambda x: last_three(x).mean(0), function_looks_back=2, multiply_adds=3),
    # x = ReLU(x_i) is not negative, so the padding is never the maximum
    "max_pool": Operation(
        function=lambda x: last_three(x).max(0).values, function_looks_back=2, multiply_adds=3
    ),
    "skip": Operation(function=lambda x: x),
    "none": Operation(function=torch.zeros_like, function_looks_back=-math.inf),
    "mean": Operation(function=running_mean, function_looks_back=math.inf, multiply_adds=1),
}

# ---- The student: K cells of one architecture ------------------------------------------------------------
# edges[j-1][i] names the operation from node i to node j: [[0-1], [0-2, 1-2], [0-3, 1-3, 2-3]]. Node 0 is the
# input of the cell. Histories are padded on the right; the operations are causal, so no mask is needed.


class Edge(nn.Module):
    """The operation o(x) of one edge, on x [B, d, T]."""

    def __init__(self, name, dim):
        super().__init__()
        self.name, self.operation = name, OPERATIONS[name]
        if not self.operation.function:
            self.convolution = nn.Conv1d(dim, dim, self.operation.width, dilation=self.operation.dilation)

    def forward(self, x):
        if self.operation.function:
            return self.operation.function(x)
        return self.convolution(F.pad(x, (self.operation.looks_back, 0)))


class Cell(nn.Module):
    """x_j = sum_{i<j} o_ij(ReLU(x_i)). The cell returns x_0 + ReLU(LayerNorm(sum_j softmax(w)_j x_j))."""

    def __init__(self, dim, edges):
        super().__init__()
        self.edges = nn.ModuleList(nn.ModuleList(Edge(name, dim) for name in row) for row in edges)
        self.w = nn.Parameter(torch.zeros(len(edges)))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_0):  # [B, T, d]
        x, relu_x = [x_0.transpose(1, 2)], []  # x_i and ReLU(x_i), each [B, d, T]
        for row in self.edges:
            relu_x.append(F.relu(x[-1]))
            x.append(sum(edge(relu_x_i) for edge, relu_x_i in zip(row, relu_x, strict=True)))
        total = torch.einsum("j,jbdt->btd", self.w.softmax(0), torch.stack(x[1:]))
        return x_0 + F.relu(self.norm(total))


class Student(nn.Module):
    """Embedding, cells, and scores by the item vectors; with MixedCells, the supernet.

    `forward` has the signature of a model file. There are no position vectors, as in the published code:
    convolutions know the order.
    """

    def __init__(self, num_items, dim, cells, dropout):
        super().__init__()
        self.M = nn.Embedding(num_items + 1, dim, padding_idx=0)  # item vectors, for input and for scores
        self.dropout = nn.Dropout(dropout)
        self.cells = nn.ModuleList(cells)
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.M.weight, std=0.02)
        self.M.weight.data[0] = 0

    def forward(self, users, items, *y):
        """users [B], items [B, T] -> hidden [K+1, B, T, d_S], output [B, T, d_S], item_vectors [V+1, d_S].

        In a supernet, `y` [E, |O|] weights the operations of each edge.
        """
        hidden = [self.dropout(math.sqrt(self.M.embedding_dim) * self.M(items))]
        for cell in self.cells:
            hidden.append(cell(hidden[-1], *y))
        return torch.stack(hidden), self.norm(self.dropout(hidden[-1])), self.M.weight


def receptive_field(edges, num_cells=1):
    """How many items the output of `num_cells` cells depends on. 0: the input of a cell reaches no node."""
    looks_back = [0]  # of each node; -inf if each path from the input has a `none`
    for row in edges:  # of node j: the edges from nodes 0..j-1
        paths = zip(row, looks_back, strict=True)
        looks_back.append(max(OPERATIONS[name].looks_back + before for name, before in paths))
    widest = max(looks_back[1:])
    return 1 + num_cells * widest if widest >= 0 else 0


# ---- The supernet: every operation on every edge (section "Relaxation") ----------------------------------


class MixedEdges(nn.Module):
    """The edges from one node to `num_targets` later nodes. Each edge computes sum_o y_o o(x).

    A weighted sum of convolutions is one convolution, with the weighted sum of their kernels. One merged
    convolution takes half the time of all of them one by one.
    """

    def __init__(self, dim, num_targets):
        super().__init__()
        # one nn.Conv1d has the kernels of all targets: weight [targets * d, d, width]
        widths = {name: o.width for name, o in OPERATIONS.items() if not o.function}
        self.convolutions = nn.ModuleDict(
            {name: nn.Conv1d(dim, num_targets * dim, width) for name, width in widths.items()}
        )

    def forward(self, x, y):
        """x [B, d, T], not negative; y [targets, |O|] -> [B, targets, d, T]."""
        functions, weights, sizes = [], [], (len(y), x.shape[1])  # [targets, d]
        longest = max(OPERATIONS[name].looks_back for name in self.convolutions)
        kernel, bias = x.new_zeros(*sizes, x.shape[1], longest + 1), x.new_zeros(sizes)
        for y_o, (name, operation) in zip(y.T, OPERATIONS.items(), strict=True):
            if operation.function:
                functions.append(operation.function(x))
                weights.append(y_o)
            else:
                convolution = self.convolutions[name]
                # the newest tap is the last one; looks_back is dilation * (width - 1)
                taps = slice(longest - operation.looks_back, None, operation.dilation)
                kernel[..., taps] += y_o[:, None, None, None] * convolution.weight.unflatten(0, sizes)
                bias += y_o[:, None] * convolution.bias.unflatten(0, sizes)
        convolved = F.conv1d(F.pad(x, (longest, 0)), kernel.flatten(0, 1), bias.flatten())
        weighted = torch.einsum("oj,obdt->bjdt", torch.stack(weights), torch.stack(functions))
        return convolved.unflatten(1, sizes) + weighted


class MixedCell(nn.Module):
    """A cell as `Cell`, with every operation on every edge, weighted by y [E, |O|]."""

    def __init__(self, dim, num_nodes):
        super().__init__()
        self.sources = nn.ModuleList(MixedEdges(dim, num_nodes - i) for i in range(num_nodes))
        self.w = nn.Parameter(torch.zeros(num_nodes))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_0, y):  # [B, T, d], [E, |O|]
        num_nodes = len(self.sources)
        x = [x_0.transpose(1, 2)] + [0] * num_nodes  # each [B, d, T]
        for i, edges in enumerate(self.sources):
            # rows of y: edges 0-1, 0-2, 1-2, 0-3, ...; the targets are j = i + 1, i + 2, ...
            rows = [j * (j - 1) // 2 + i for j in range(i + 1, num_nodes + 1)]
            for j, part in enumerate(edges(F.relu(x[i]), y[rows]).unbind(1), i + 1):
                x[j] = x[j] + part
        total = torch.einsum("j,jbdt->btd", self.w.softmax(0), torch.stack(x[1:]))
        return x_0 + F.relu(self.norm(total))


def choose(alpha, tau, relaxation, rng):
    """y [E, |O|], the choice of an operation for each edge, differentiable in alpha [E, |O|].

    `gumbel`: y = softmax((log_softmax(alpha) + g) / tau) with Gumbel noise g. The forward pass has the
    one-hot vector of its largest entry (straight-through). So o is drawn with probability softmax(alpha)_o.
    `softmax`: y = softmax(alpha), a mixture of all operations (DARTS, arXiv 1806.09055).
    """
    if relaxation == "softmax":
        return alpha.softmax(-1)
    g = torch.from_numpy(rng.gumbel(size=alpha.shape)).to(alpha)  # the same in all processes
    soft = ((alpha.log_softmax(-1) + g) / tau).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), alpha.shape[-1]).to(soft)
    return hard + (soft - soft.detach())


def best_edges(alpha):
    """The architecture of alpha [E, |O|]: edges[j-1][i] is the operation with the largest alpha_ij."""
    chosen, edges = [list(OPERATIONS)[o] for o in alpha.argmax(-1).tolist()], []
    while chosen:
        edges.append([chosen.pop(0) for _ in range(len(edges) + 1)])
    return edges


def derive(supernet, edges):
    """The student with the operations `edges`. It copies their weights from the supernet."""
    student, dim = copy.deepcopy(supernet), supernet.M.embedding_dim
    for k, mixed in enumerate(supernet.cells):
        cell = Cell(dim, edges)
        cell.w, cell.norm = copy.deepcopy(mixed.w), copy.deepcopy(mixed.norm)
        for j, row in enumerate(cell.edges, 1):
            for i, edge in enumerate(row):
                if not edge.operation.function:
                    # channels of source: d for node i + 1, then d for node i + 2, ...
                    source = mixed.sources[i].convolutions[edge.name]
                    target_channels = slice((j - i - 1) * dim, (j - i) * dim)
                    edge.convolution.weight.data = source.weight.data[target_channels].clone()
                    edge.convolution.bias.data = source.bias.data[target_channels].clone()
        student.cells[k] = cell
    return student


# ---- L_cost ----------------------------------------------------------------------------------------------


def operation_costs(dim, num_nodes, max_length):
    """cost(o) [|O|] = (parameters(o) / max + multiply_adds(o) / max + reach(o) / max) / 3 / num_edges.

    Each maximum is over the operations, so no architecture costs more than 1. The reach, how many positions
    an operation looks back, is not in the paper. A student with a short reach is served on few items.
    """
    operations = OPERATIONS.values()  # the width of a function is 0
    parameters = [operation.width * dim * dim + dim * (not operation.function) for operation in operations]
    multiply_adds = [operation.width * dim * dim + dim * operation.multiply_adds for operation in operations]
    reach = [min(max(operation.looks_back, 0), max_length - 1) for operation in operations]
    shares = [torch.tensor(n, dtype=torch.float64) / max(n) for n in (parameters, multiply_adds, reach)]
    num_edges = num_nodes * (num_nodes + 1) // 2
    return sum(shares) / 3 / num_edges


def cost_loss(p, costs):
    """L_cost = sum_edges sum_o p_o cost(o), the expected cost at p = softmax(alpha) [E, |O|]; costs [|O|].

    The paper uses the drawn y. The mean of y is p, and p has no sampling noise.
    """
    return (p * costs).sum()


# ---- L_CE, L_pred, L_emb and L_hid, as in emd_distill.py -------------------------------------------------


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


def kl_distances(student, teacher):
    """D_ij = KL(softmax(H^T_j) || softmax(H^S_i W_h)) [L_S, L_T]: KL over features, mean over positions.

    student [L_S, N, d_T] are its layers after W_h; teacher [L_T, N, d_T].
    """
    log_p, log_q = student.log_softmax(-1).flatten(1), teacher.log_softmax(-1).flatten(1)
    q = log_q.exp()
    return ((q * log_q).sum(1) - log_p @ q.T) / student.shape[1]


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


# ---- The search ------------------------------------------------------------------------------------------


def set_up(args):
    """Data, training histories, teacher, supernet, alpha, projections W, layer weights and optimizer."""
    join_processes(args.device)
    torch.manual_seed(args.seed)
    data, teacher, config = read_interactions(args.data), None, {"max_length": 50}
    if args.teacher:
        teacher, config = load_model(args.teacher, data, args.device)
        teacher.requires_grad_(False)
    max_length = args.max_length or config["max_length"]
    if teacher and (config["max_length"] < max_length or config["layers"] < 1):
        sys.exit(f"{args.teacher} must read {max_length} items and have a layer after the embedding")
    histories, _ = training_part(data, max_length, args.seed)
    cells = [MixedCell(args.dim, args.nodes) for _ in range(args.cells)]
    num_items = config.get("items", int(data.items.max()))
    supernet = Student(num_items, args.dim, cells, args.dropout).to(args.device)
    start = [0.0 if name in args.operations else -1e9 for name in OPERATIONS]
    num_edges = args.nodes * (args.nodes + 1) // 2
    alpha = nn.Parameter(torch.tensor([start] * num_edges, device=args.device))
    W, layer_weights = nn.ModuleList(), []
    if teacher:
        W = nn.ModuleList(nn.Linear(args.dim, config["dim"]) for _ in range(2)).to(args.device)
        layer_weights = [np.full(layers, 1 / layers) for layers in (args.cells, config["layers"])]
    groups = [{"params": [*supernet.parameters(), *W.parameters()]}]
    groups += [{"params": [alpha], "lr": args.alpha_learning_rate, "weight_decay": 1e-4}]
    optimizer = torch.optim.AdamW(groups, args.learning_rate, weight_decay=5e-4, fused=True)
    return data, histories, max_length, teacher, supernet, alpha, W, layer_weights, optimizer


def search(args):
    """Train `alpha` and the weights; write the architecture, the student with its weights, and the log."""
    data, histories, max_length, teacher, supernet, alpha, W, layer_weights, optimizer = set_up(args)
    costs = operation_costs(args.dim, args.nodes, max_length).float().to(args.device)
    lengths = histories.end - histories.begin - 1  # targets of each history
    num_positions, num_batches = int(lengths.sum()), math.ceil(len(lengths) / args.batch_size)
    sampler = SharedNegatives(data, histories) if args.negatives else None
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    settings = {"projections": W, "gamma": args.gamma}
    settings |= {"distance_function": kl_distances, "flow_function": transport}
    teacher_cache = {} if args.remember else None
    models = [Path(args.out).with_suffix(".pt2")]
    run = Run(args, data, models, [supernet, nn.ParameterList([alpha]), W, optimizer])
    layer_weights = [np.array(weights) for weights in run.state.get("layer_weights", layer_weights)]
    for epoch in range(len(run.log) + 1, args.epochs + 1):
        start, total, flows = time.time(), 0, 0
        tau = 0.8 ** ((epoch - 1) // 5)  # starts at 1, and is multiplied by 0.8 every 5 epochs
        alpha_waits = epoch <= args.alpha_warm_up
        rng, batches = epoch_batches(lengths, args.batch_size, args.seed, epoch)
        for batch in batches:
            local = batch[RANK::PROCESSES]  # the rows of this process
            ids, inputs, real, target = batch_of(data, histories, local, args.device)
            # warm-up: every edge mixes all operations, so that all kernels learn; alpha does not change
            p = alpha.softmax(-1)
            y = p.detach() if alpha_waits else choose(alpha, tau, args.relaxation, rng)
            hidden, output, item_vectors = supernet(ids, inputs, y)
            of_both = [(hidden[:, real], output[real], item_vectors), None]  # of student and teacher
            if teacher:
                of_both[1] = ask_teacher(teacher, ids, inputs, real, local, teacher_cache)
            negatives = [x.to(args.device) for x in sampler.draw(args.negatives, rng)] if sampler else ()
            results = distillation_loss(*of_both, target, negatives, layer_weights, **settings)
            loss, terms, flow, layer_weights = results
            terms["L_cost"] = cost_loss(p, costs)
            loss = loss + args.beta * terms["L_cost"]
            optimizer.zero_grad()
            # the loss is a mean over these rows; this factor gives all positions of the epoch equal weight
            (loss * len(target) * num_batches / num_positions).backward()
            if alpha_waits:
                alpha.grad = None
            sum_over_processes([parameter.grad for parameter in parameters])
            optimizer.step()
            total = total + len(target) * torch.stack([term.detach().double() for term in terms.values()])
            flows = flows + lengths[batch].sum() * flow  # all processes have the same flow
        sum_over_processes([total])
        if not total.isfinite().all():
            sys.exit(f"the loss of epoch {epoch} is not finite; remove OUT.ckpt, lower --learning-rate")
        line = {"epoch": epoch, **dict(zip(terms, (total / num_positions).tolist(), strict=True)), "tau": tau}
        line |= {"seconds": time.time() - start, "mean_max_p": alpha.softmax(-1).amax(-1).mean().item()}
        edges = best_edges(alpha)
        if epoch == args.epochs and not receptive_field(edges):
            sys.exit("the search ends in cells that ignore their input; remove OUT.ckpt and lower --beta")
        line |= {"edges": edges, "alpha": alpha.tolist(), "flow": (flows / num_positions).tolist()}
        if epoch == args.epochs:
            save_student(args, run, derive(supernet, edges), edges, max_length)
        weights = [weights.tolist() for weights in layer_weights]
        run.end_epoch(line, args.epochs - epoch, ";".join(map(",".join, edges)), layer_weights=weights)


def save_student(args, run, student, edges, max_length):
    """Write the architecture OUT, and the student beside it, as .pt2."""
    num_cells, dim = len(student.cells), student.M.embedding_dim
    architecture = {"cells": num_cells, "nodes": len(edges), "dim": dim, "edges": edges}
    config = {"architecture": architecture, "items": len(student.M.weight) - 1, "max_length": max_length}
    sees = min(receptive_field(edges, num_cells), max_length)
    if sees < max_length:
        config["sees"] = sees  # the output depends on so many most recent items
    program = export(student.cpu(), max_length)
    run.save_model(Path(args.out).with_suffix(".pt2"), program, student, **config)
    write(args.out, (json.dumps(architecture, indent=1) + "\n").encode())
    costs = dict(zip(OPERATIONS, operation_costs(dim, len(edges), max_length).tolist(), strict=True))
    cost = sum(costs[name] for row in edges for name in row)  # each is divided by the number of edges
    print(f"{args.out}: {';'.join(map(','.join, edges))}; cost {cost:.3f}, sees {sees} items")


def random_edges(num_nodes, names, costs, cost, rng):
    """Random edges, with a cost within 10 % of `cost`, or any if `cost` is infinite; costs [|O|]."""
    choices = [o for o, name in enumerate(OPERATIONS) if name in names and costs[o] <= 1.1 * cost]
    for _ in range(100_000):
        drawn = rng.choice(choices, num_nodes * (num_nodes + 1) // 2)  # an operation for each edge
        edges = best_edges(np.eye(len(OPERATIONS))[drawn])  # a one-hot row has its argmax at `drawn`
        if abs(costs[drawn].sum() - cost) <= cost / 10 and receptive_field(edges):
            return edges
    sys.exit(f"--random {cost}: no architecture of this cost was found; costs lie between 0 and 1")


def build(args):
    """No search: write the architecture --architecture, or one of --random, with random weights."""
    if RANK:  # one process is enough
        return
    torch.manual_seed(args.seed)
    data, num_cells, dim = read_interactions(args.data), args.cells, args.dim
    if args.architecture:
        try:
            architecture = json.loads(Path(args.architecture).read_text())
            num_cells, dim = int(architecture["cells"]), int(architecture["dim"])
            edges, names = architecture["edges"], set(OPERATIONS)
            known = all(len(row) == j and set(row) <= names for j, row in enumerate(edges, 1))
            if min(num_cells, dim) < 1 or not known or not receptive_field(edges):
                rule = f"edges[j-1] needs j of {', '.join(OPERATIONS)}; one path must start at node 0"
                raise ValueError(rule)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            sys.exit(f"{args.architecture} is no architecture; {type(error).__name__}: {error}")
    else:
        costs = operation_costs(dim, args.nodes, args.max_length or 50).numpy()
        rng = np.random.default_rng(args.seed)
        edges = random_edges(args.nodes, args.operations, costs, args.random, rng)
    cells = [Cell(dim, edges) for _ in range(num_cells)]
    student = Student(int(data.items.max()), dim, cells, args.dropout)
    run = Run(args, data, [Path(args.out).with_suffix(".pt2")])
    save_student(args, run, student, edges, args.max_length or 50)


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
    """Read the command line, then search or build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add, count, fraction = parser.add_argument, number(int, 1), number(float, 0, 1)
    add("data", help="interactions, `user item` per row: .txt or .npy (data/README.md)")
    add("--teacher", help="model file to learn from; without it, gamma is 0. Load only files you trust")
    add("--out", required=True, help="architecture to write, such as runs/architecture.json")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--architecture", help="no search: write this architecture, with random weights")
    random_help = "no search: write a random architecture, of any cost or within 10 %% of COST, 0 to 1"
    add("--random", type=number(float, 0), nargs="?", const=math.inf, metavar="COST", help=random_help)
    add = parser.add_argument
    add("--cells", type=count, default=4, help="K: cells, one architecture, each with its own weights")
    add("--nodes", type=count, default=3, help="nodes of a cell after its input")
    add("--dim", type=count, default=64, help="d_S: size of hidden states and item vectors")
    names = list(OPERATIONS)
    add("--operations", nargs="+", choices=names, default=names, metavar="O", help="what an edge may use")
    add("--max-length", type=number(int, 2), help="most recent items used; else the teacher's, or 50")
    add("--dropout", type=number(float, 0, 0.99), default=0.2, help="probability that training drops a unit")
    add("--gamma", type=fraction, default=0.5, help="weight of L_emb + L_hid + L_pred; L_CE has 1 - gamma")
    add("--beta", type=number(float, 0), default=0.3, help="weight of L_cost, which is 1 at most")
    kinds = ["gumbel", "softmax"]
    add("--relaxation", choices=kinds, default="gumbel", help="how an edge chooses; softmax tends to `none`")
    add("--alpha-learning-rate", type=number(float, 0), default=5e-2, help="of alpha; published: 2e-5")
    add("--alpha-warm-up", type=number(int, 0), default=10, help="first epochs, in which alpha is fixed")
    add("--learning-rate", type=number(float, 0), default=5e-3, help="of AdamW on the weights")
    add("--batch-size", type=count, default=32, help="users per batch")
    add("--epochs", type=count, default=30, help="passes over all users")
    add("--negatives", type=number(int, 0), default=0, help="k: sampled negatives; 0: softmax over all items")
    add("--remember", action="store_true", help="keep the teacher's answers in memory: faster, needs memory")
    add("--resume", action="store_true", help="go on from OUT.ckpt, the checkpoint of a run that was stopped")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="same seed, data and machine: same files")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to compute")
    args = parser.parse_args(argv)
    searches = not args.architecture and args.random is None
    if args.teacher and (args.gamma == 0 or not searches):
        parser.error("--gamma 0, --architecture and --random use no --teacher")
    if not args.out.endswith(".json") or (searches and args.epochs <= args.alpha_warm_up):
        parser.error("--out must end in .json; --epochs must be above --alpha-warm-up")
    try:
        search(args) if searches else build(args)
    except OSError as error:  # a file that cannot be read or written
        sys.exit(f"{error.filename or args.out}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume goes on after the last whole epoch, if there is one")


if __name__ == "__main__":
    main()
