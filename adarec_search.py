"""Stage 2: search the student's architecture, AdaRec.

Lei Chen, Fajie Yuan, Jiaxi Yang, Min Yang and Chengming Li, "Scene-adaptive Knowledge Distillation for
Sequential Recommendation via Differentiable Architecture Search", arXiv 2107.07173.

A supernet holds every operation on every edge of its cells; which one an edge uses is drawn by `alpha`, and
`alpha` learns with the weights from L = (1 - gamma) L_CE + gamma L_KD + beta L_cost.

Reads   interactions, `user item` a row (data/README.md), and a teacher (README.md, "The model file").
Writes  OUT, the architecture as JSON; beside it the student with its searched weights as a model file (.pt2),
        a picture of the cell (.md), and OUT.log.jsonl, a line an epoch with all of `alpha`.

    python adarec_search.py data/ml-100k.txt --teacher runs/teacher.pt2 --out runs/architecture.json
"""

import argparse
import copy
import functools
import hashlib
import io
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from scipy.optimize import linprog
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

MAX_ID = 10**8  # a table of vectors has a row for every id up to the largest
VALIDATION_USERS = 10_000  # enough to choose an epoch by; ranking every user of a large log each epoch is not

# the operations O; of a convolution, how many items back each of its taps looks, oldest first
TAPS = {
    "conv3": (2, 1, 0),
    "conv5": (4, 3, 2, 1, 0),
    "dilated_conv3": (4, 2, 0),
    "dilated_conv5": (8, 6, 4, 2, 0),
}
OPERATIONS = (*TAPS, "avg_pool", "max_pool", "skip", "none")
POOL = 3  # width of the pools


class BadInput(Exception):
    """Something the user can mend: `main` prints it as one line and ends with status 2."""


# ---- Data: read, split by leave-one-out, pad -------------------------------------------------------------


def read_interactions(path):
    """Read a data file: `user item` a row, a user's rows together and in time order (data/README.md).

    Returns int64 arrays `user_ids` [U], in file order, `starts` [U+1] and `items` [n]: the history of user
    `user_ids[k]` is `items[starts[k]:starts[k+1]]`, oldest first. Raises BadInput naming file and line.
    """
    try:
        if str(path).endswith(".npy"):
            table = np.load(path, mmap_mode="r")
        else:
            with open(path, "rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of an empty file, which is told below
                table = np.loadtxt(file, dtype=np.int64, comments=None, ndmin=2)
    except OSError as error:
        why = error.strerror or error
        raise BadInput(f"cannot read {path}: {why}; make it with data/prepare.py") from None
    except (ValueError, OverflowError, EOFError):
        table = np.zeros((1, 1))
    if table.size == 0:
        raise BadInput(f"{path} is empty; put `user item` on each line")
    good = table.ndim == 2 and table.shape[1] == 2 and table.dtype.kind in "iu"
    if not good or table.min() < 1 or table.max() > MAX_ID:
        raise BadInput(first_bad_row(path))
    users = np.asarray(table[:, 0])
    first = np.append(0, 1 + np.flatnonzero(np.diff(users)))  # rows where another user begins
    if len(np.unique(users[first])) < len(first):
        raise BadInput(first_bad_row(path))
    return users[first].astype(np.int64), np.append(first, len(users)), table[:, 1].astype(np.int64)


def first_bad_row(path):
    """What is wrong with the first bad row of `path`, read slowly, as a sentence that names the row."""
    if str(path).endswith(".npy"):
        return f"{path} is no integer array [n, 2], ids from 1, a user's rows together; see data/README.md"
    done, user = set(), None
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.split()
            if fields and not (
                len(fields) == 2 and all(f.isdecimal() and 0 < int(f) <= MAX_ID for f in fields)
            ):
                return (
                    f"{path}, line {number}: {line.strip()[:40]!r} is not `user item`, two integers from 1; "
                    "mend the line, or make ids with data/prepare.py convert"
                )
            if fields and fields[0] != user:
                if fields[0] in done:
                    return (
                        f"{path}, line {number}: user {fields[0]} again; put a user's rows together, by time"
                    )
                user = fields[0]
                done.add(user)
    return f"{path} is no table of two integers, `user item`"


def leave_one_out(starts):
    """The split (shared by every stage): last item test, the one before validation, the rest training.

    `starts` [U+1] as `read_interactions` gives it. Returns `train_end` [U] and `evaluated` [U]: user k trains
    on `items[starts[k]:train_end[k]]`; where `evaluated[k]`, that is with three interactions or more, the
    validation item stands at `train_end[k]`, the test item behind it. Shorter histories only train.
    """
    evaluated = np.diff(starts) >= 3
    return starts[1:] - 2 * evaluated, evaluated


def pad_batch(items, begin, end):
    """Histories `items[begin[k]:end[k]]` as rows, padded with 0 on the right: int64 tensor [B, T]."""
    steps = np.arange(max(1, (end - begin).max()))
    rows = begin[:, None] + steps  # [B, T]
    inside = rows < end[:, None]
    return torch.from_numpy(np.where(inside, items[np.where(inside, rows, 0)], 0))


def batches_of_like_length(length, batch_size, rng):
    """Shuffled batches of indices whose histories are about equally long, so that little padding is computed.

    `length` [U]. Within each 64 shuffled batches (a quarter of all, where that is less: batches should differ
    from epoch to epoch) the histories are sorted by length; then the batches are shuffled.
    """
    order = rng.permutation(len(length))
    window = batch_size * max(1, min(64, len(length) // batch_size // 4))
    chunks = [order[k : k + window] for k in range(0, len(order), window)]
    order = np.concatenate([chunk[np.argsort(length[chunk], kind="stable")] for chunk in chunks])
    batches = [order[k : k + batch_size] for k in range(0, len(order), batch_size)]
    return [batches[k] for k in rng.permutation(len(batches))]


def training_part(path, starts, train_end, evaluated, max_length, rng):
    """What training reads: `users` [N] with two training items or more, the last max_length + 1 of which are
    items[begin:end]; and `chosen`, users to validate with, drawn where there are many. Raises BadInput.
    """
    users = np.flatnonzero(train_end - starts[:-1] >= 2)  # two items make one pair of input and target
    if len(users) == 0 or not evaluated.any():
        raise BadInput(f"{path}: no user has 3 interactions, or none has 2 to train on; take a larger log")
    chosen = np.flatnonzero(evaluated)
    if len(chosen) > VALIDATION_USERS:
        chosen = np.sort(rng.choice(chosen, VALIDATION_USERS, replace=False))
    return users, np.maximum(starts[users], train_end[users] - max_length - 1), train_end[users], chosen


# ---- The student: cells of one architecture --------------------------------------------------------------
# `edges[j-1][i]` names the operation from node i to node j; node 0 is the cell's input


def earlier(x, places):
    """x [..., T] as it was `back` places ago, 0 before its beginning, for each `back` in `places`."""
    longest = max(places)
    padded = F.pad(x, (longest, 0))
    return [padded[..., longest - back : longest - back + x.shape[-1]] for back in places]


class Operation(nn.Module):
    """One operation o(x) on x [B, d, T], causal: position t sees t and earlier alone.

    The published code pads convolutions and pools on both sides, which shows position t the item at t + 1
    that it has to predict. Here everything is padded on the left.
    """

    def __init__(self, name, dim):
        super().__init__()
        self.name = name
        if name in TAPS:
            self.dilation = TAPS[name][-2]
            self.convolution = nn.Conv1d(dim, dim, len(TAPS[name]), dilation=self.dilation)

    def forward(self, x):
        if self.name in TAPS and (self.training or self.dilation == 1):
            return self.convolution(F.pad(x, (TAPS[self.name][0], 0)))
        if self.name in TAPS:  # the same as one product of matrices: torch's own is slow for a single history
            kernel = self.convolution.weight.transpose(1, 2).flatten(1)  # [d, k d]
            return kernel @ torch.cat(earlier(x, TAPS[self.name]), 1) + self.convolution.bias[:, None]
        if self.name == "avg_pool":  # torch's own pools do not export for histories of every length
            return sum(earlier(x, range(POOL))) / POOL
        if self.name == "max_pool":  # x = ReLU(x_i) is nowhere below the padding
            return functools.reduce(torch.maximum, earlier(x, range(POOL)))
        return x if self.name == "skip" else torch.zeros_like(x)


class Cell(nn.Module):
    """x_j = sum_{i<j} o_ij(ReLU(x_i)); returns x_0 + ReLU(LayerNorm(sum_j softmax(w)_j x_j))."""

    def __init__(self, dim, edges):
        super().__init__()
        self.operations = nn.ModuleList(nn.ModuleList(Operation(o, dim) for o in row) for row in edges)
        self.w = nn.Parameter(torch.zeros(len(edges)))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_0):  # [B, T, d]
        active = [F.relu(x_0).transpose(1, 2)]  # ReLU(x_i), each [B, d, T]
        total = 0
        for row, share in zip(self.operations, self.w.softmax(0), strict=True):
            used = [o(x) for o, x in zip(row, active, strict=True) if o.name != "none"]
            x_j = sum(used) if used else torch.zeros_like(active[0])
            total = total + share * x_j
            active.append(F.relu(x_j))
        return x_0 + F.relu(self.norm(total.transpose(1, 2)))


class Student(nn.Module):
    """Embedding, cells, and scores by the item vectors; `forward` is the contract of a model file.

    Item 0 is padding. Histories are padded on the right: a causal model needs no mask for what comes later.
    """

    def __init__(self, item_count, max_length, dim, cells, dropout):
        super().__init__()
        self.M = nn.Embedding(item_count + 1, dim, padding_idx=0)  # items, and scores by the same vectors
        self.P = nn.Parameter(torch.empty(max_length, dim))  # positions
        self.dropout = nn.Dropout(dropout)
        self.cells = nn.ModuleList(cells)
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.P, std=0.02)
        nn.init.normal_(self.M.weight, std=0.02)
        with torch.no_grad():
            self.M.weight[0] = 0

    def encode(self, items, *y):
        """items [B, T] -> states of embedding layer and cells, a list of [B, T, d]; output [B, T, d].

        A supernet's cells need `y`, the choice of operations [E, |O|].
        """
        # E_t = sqrt(d) M[s_t] + P_t
        x = math.sqrt(self.M.embedding_dim) * self.M(items) + self.P[: items.shape[1]]
        hidden = [self.dropout(x)]
        for cell in self.cells:
            hidden.append(cell(hidden[-1], *y))
        return hidden, self.norm(self.dropout(hidden[-1]))

    def forward(self, users, items):
        """users [B], items [B, T] -> hidden [K+1, B, T, d], output [B, T, d], item_vectors [V+1, d]."""
        hidden, output = self.encode(items)
        return torch.stack(hidden), output, self.M.weight


def edge_index(i, j):
    """Row of `alpha` and `y` that belongs to the edge from node i to node j: 0-1, 0-2, 1-2, 0-3, ..."""
    return j * (j - 1) // 2 + i


def receptive_field(edges, cells=1):
    """How many items, itself included, an output of `cells` cells depends on; 0 if the input reaches none."""
    reach = [0]  # how many items back node i looks; None where nothing of the input arrives
    for row in edges:
        back = {"avg_pool": POOL - 1, "max_pool": POOL - 1, "skip": 0} | {
            o: taps[0] for o, taps in TAPS.items()
        }
        ways = [r + back[o] for o, r in zip(row, reach, strict=True) if o != "none" and r is not None]
        reach.append(max(ways, default=None))
    arrived = [r for r in reach[1:] if r is not None]
    return 1 + cells * max(arrived) if arrived else 0


# ---- The supernet: every operation on every edge (section "Relaxation") ----------------------------------


class MixedEdges(nn.Module):
    """The edges from one node to `targets` later ones, each sum_o y_o o(x), with |O| operations at once.

    Convolutions, average pool, skip and none are linear and alike at every position, so their weighted sum is
    one convolution, whose kernel is the weighted sum of theirs. Max pooling alone stands apart.
    """

    REACH = max(taps[0] for taps in TAPS.values())

    def __init__(self, dim, targets):
        super().__init__()
        widths = [len(taps) for taps in TAPS.values()]
        self.widths = widths
        # the kernels of the convolutions side by side, taps last: [targets, d, d, 3 + 5 + 3 + 5]
        self.kernels = nn.Parameter(torch.empty(targets, dim, dim, sum(widths)))
        self.biases = nn.Parameter(torch.empty(targets, len(TAPS), dim))
        with torch.no_grad():  # as nn.Conv1d has it
            for o, kernel in enumerate(self.kernels.split(widths, -1)):
                bound = 1 / math.sqrt(dim * widths[o])
                kernel.uniform_(-bound, bound)
                self.biases[:, o].uniform_(-bound, bound)
        place = torch.zeros(sum(widths), self.REACH + 1)  # where in the merged kernel a tap belongs
        for row, back in enumerate(back for taps in TAPS.values() for back in taps):
            place[row, self.REACH - back] = 1
        identity = torch.zeros(2, self.REACH + 1)  # average pool and skip, which mix no channels
        identity[0, -POOL:], identity[1, -1] = 1, 1
        self.register_buffer("place", place)
        self.register_buffer("identity", identity)
        self.register_buffer(
            "operation", torch.repeat_interleave(torch.arange(len(TAPS)), torch.tensor(widths))
        )
        self.register_buffer("eye", torch.eye(dim))

    def merge(self, y):
        """The one kernel [targets, d, d, REACH + 1] and bias [targets, d] of choice y [targets, |O|]."""
        kernel = (self.kernels * y[:, None, None, self.operation]) @ self.place
        average, skip = (y[:, [OPERATIONS.index(o)]] for o in ("avg_pool", "skip"))
        by_channel = average / POOL * self.identity[0] + skip * self.identity[1]  # [targets, REACH + 1]
        kernel = kernel + self.eye[:, :, None] * by_channel[:, None, None]
        return kernel, torch.einsum("jo,jod->jd", y[:, : len(TAPS)], self.biases)

    def forward(self, x, y):
        """x [B, d, T], nowhere negative; y [targets, |O|] -> [B, targets, d, T]."""
        kernel, bias = self.merge(y)
        kernel = kernel.flatten(0, 1)
        # no operation looks 5 or 7 items back: a convolution of even taps and one of taps 3 and 1 cost less
        linear = F.conv1d(F.pad(x, (self.REACH, 0)), kernel[..., ::2], bias.flatten(), dilation=2)
        linear += F.conv1d(F.pad(x, (3, -1)), kernel[..., -4::2], dilation=2)
        y_max = y[:, [OPERATIONS.index("max_pool")]].expand(len(x), -1, -1)  # [B, targets, 1]
        with torch.set_grad_enabled(
            bool(y_max.any())
        ):  # a pool that no edge has chosen passes nothing on to x
            pooled = F.max_pool1d(F.pad(x, (POOL - 1, 0)), POOL, stride=1)
        # linear + y_max pooled, as a product of matrices, so that its gradient is one, too
        total = torch.baddbmm(linear.view(len(x), len(y), -1), y_max, pooled.flatten(1)[:, None])
        return total.view(len(x), len(y), *x.shape[1:])

    def operation_weights(self, target, name):
        """Weight [d, d, k] and bias [d] of convolution `name` on the edge to the `target`-th later node."""
        o = list(TAPS).index(name)
        return self.kernels.split(self.widths, -1)[o][target], self.biases[target, o]


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
        """The Cell with operations `edges`, and their weights as they are here."""
        cell = Cell(self.norm.normalized_shape[0], edges)
        cell.w.data, cell.norm = self.w.data.clone(), copy.deepcopy(self.norm)
        for j, row in enumerate(cell.operations, 1):
            for i, operation in enumerate(row):
                if operation.name in TAPS:
                    weight, bias = self.sources[i].operation_weights(j - i - 1, operation.name)
                    operation.convolution.weight.data = weight.detach().clone()
                    operation.convolution.bias.data = bias.detach().clone()
        return cell


def choose(alpha, tau, relaxation):
    """y [E, |O|], the choice of an operation for each edge, differentiable in alpha [E, |O|].

    `gumbel`: y = softmax((log_softmax(alpha) + g) / tau), g Gumbel noise, and forward the one-hot vector of
    its largest entry (straight through), so that o is drawn with probability softmax(alpha)_o. `softmax`:
    softmax(alpha), a mixture of all (DARTS, arXiv 1806.09055).
    """
    if relaxation == "softmax":
        return alpha.softmax(-1)
    g = -torch.empty_like(alpha).exponential_().log()
    soft = ((alpha.log_softmax(-1) + g) / tau).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), alpha.shape[-1]).to(soft)
    return hard + (soft - soft.detach())


def temperature(start, epoch):
    """tau in `epoch` (from 1): from `start`, times 0.8 every 5 epochs."""
    return start * 0.8 ** ((epoch - 1) // 5)


def derive(supernet, edges, dropout):
    """The student with operations `edges` on a supernet's cells, and the weights it has there."""
    cells = [cell.derive(edges) for cell in supernet.cells]
    student = Student(len(supernet.M.weight) - 1, len(supernet.P), supernet.M.embedding_dim, cells, dropout)
    student.M, student.P, student.norm = (
        copy.deepcopy(part) for part in (supernet.M, supernet.P, supernet.norm)
    )
    return student.to(supernet.P.device)


def best_edges(alpha):
    """The architecture of alpha [E, |O|]: edges[j-1][i] is the operation of largest alpha_ij."""
    names, edges = [OPERATIONS[o] for o in alpha.argmax(-1).tolist()], []
    while names:
        edges.append([names.pop(0) for _ in range(len(edges) + 1)])
    return edges


# ---- L_cost ----------------------------------------------------------------------------------------------


def operation_costs(dim, nodes):
    """cost(o) [|O|], float64: half its share of parameters, half its share of multiply-adds, in units of the
    dearest architecture of `nodes` nodes, all of whose edges are the dearest operation (METHODS: ours).

    A pool counts a multiply-add for each of the items it looks at, skip and none nothing.
    """
    parameters = [len(TAPS[o]) * dim * dim + dim if o in TAPS else 0 for o in OPERATIONS]
    multiply_adds = [
        len(TAPS[o]) * dim * dim if o in TAPS else POOL * dim * o.endswith("pool") for o in OPERATIONS
    ]
    shares = [torch.tensor(n, dtype=torch.float64) / max(n) for n in (parameters, multiply_adds)]
    return (shares[0] + shares[1]) / 2 / edge_index(0, nodes + 1)


def cost_loss(y, costs):
    """L_cost = sum_edges sum_o y_o cost(o), y [E, |O|], costs [|O|]."""
    return (y * costs).sum()


# ---- L_CE and L_pred -------------------------------------------------------------------------------------


class ItemLosses(torch.autograd.Function):
    """What `item_losses` computes, a slice of positions at a time: the [N, V] scores are never kept."""

    @staticmethod
    def forward(
        ctx, output, item_vectors, target, teacher_output, teacher_item_vectors, weight_ce, weight_pred
    ):
        count, vectors = len(output), item_vectors[1:]
        rows = max(1, min(128, 2**23 // len(vectors)))  # a slice of at most 32 MiB
        d_output, d_item_vectors = torch.empty_like(output), torch.zeros_like(item_vectors)
        l_ce, l_pred = output.new_zeros((), dtype=torch.float64), output.new_zeros((), dtype=torch.float64)
        for k in range(0, count, rows):
            part, here = slice(k, k + rows), target[k : k + rows, None] - 1
            log_p = (output[part] @ vectors.T).log_softmax(1)  # the student's
            l_ce -= log_p.gather(1, here).sum()
            d_scores = log_p.exp().mul_(weight_ce + weight_pred)
            if teacher_output is not None:
                log_q = (teacher_output[part] @ teacher_item_vectors[1:].T).log_softmax(1)  # the teacher's
                q = log_q.exp()
                l_pred += log_q.sub_(log_p).mul_(q).sum()
                d_scores.sub_(q, alpha=weight_pred)
            d_scores.scatter_add_(1, here, torch.full_like(here, -weight_ce, dtype=d_scores.dtype))
            d_output[part] = d_scores @ vectors
            d_item_vectors[1:].addmm_(d_scores.T, output[part])
        ctx.save_for_backward(d_output.div_(count), d_item_vectors.div_(count))
        l_ce, l_pred = l_ce / count, l_pred / count
        ctx.mark_non_differentiable(l_ce, l_pred)
        return (weight_ce * l_ce + weight_pred * l_pred).to(output.dtype), l_ce, l_pred

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, *_):
        d_output, d_item_vectors = ctx.saved_tensors
        return d_loss * d_output, d_loss * d_item_vectors, None, None, None, None, None


def item_losses(output, item_vectors, target, teacher_output, teacher_item_vectors, weight_ce, weight_pred):
    """weight_ce L_CE + weight_pred L_pred, and both by themselves, for the log.

    L_CE = -log p_target, L_pred = KL(q || p) = sum_i q_i log(q_i / p_i), means over the N real positions; p
    is the student's softmax over the items, q the teacher's. output [N, d], item_vectors [V+1, d], target
    [N]; the teacher's [N, e] and [V+1, e], or None for weight_pred = 0.
    """
    teacher = (teacher_output, teacher_item_vectors) if weight_pred else (None, None)
    return ItemLosses.apply(output, item_vectors, target, *teacher, weight_ce, weight_pred)


# ---- L_emb and L_hid -------------------------------------------------------------------------------------


def embedding_loss(projected, teacher):
    """L_emb = MSE(E^S W_e, E^T); both [N, d_T]."""
    return F.mse_loss(projected, teacher)


def kl_distances(student, teacher):
    """D_ij = KL(softmax(H^T_j) || softmax(H^S_i W_h)) over the features, mean over positions: [L_S, L_T].

    student [L_S, N, d_T], already projected; teacher [L_T, N, d_T].
    """
    log_p, log_q = student.log_softmax(-1).flatten(1), teacher.log_softmax(-1).flatten(1)
    q = log_q.exp()
    return ((q * log_q).sum(1) - log_p @ q.T) / student.shape[1]


@functools.cache  # the same in every step, and as slow to make as the program is to solve
def row_and_column_sums(rows, columns):
    """The matrix that maps a flow, as a vector row by row, to its row sums and all but the last column sum.

    That one follows from the others. Sparse [rows + columns - 1, rows columns].
    """
    row_sums = sparse.kron(sparse.eye_array(rows), np.ones((1, columns)))
    column_sums = sparse.kron(np.ones((1, rows)), sparse.eye_array(columns))
    return sparse.vstack([row_sums, column_sums.tocsr()[:-1]]).tocsr()


def transport(student_weights, teacher_weights, distance):
    """The flow F [L_S, L_T] of least cost: min sum_ij F_ij D_ij, F >= 0, rows sum to w^S, columns to w^T.

    Weights [L_S] and [L_T], each of sum 1; distance [L_S, L_T]; float64 arrays. Raises BadInput when a
    distance is not finite or the solver fails.
    """
    if not np.isfinite(distance).all():
        raise BadInput("a distance between layers is not finite; lower --learning-rate")
    solved = linprog(
        distance.ravel() / max(np.abs(distance).max(), 1e-300),  # of a size that suits the solver's tolerance
        A_eq=row_and_column_sums(*distance.shape),
        b_eq=np.concatenate([student_weights, teacher_weights[:-1]]),
        method="highs",
    )
    if solved.status != 0:
        raise BadInput(f"the transport between layers could not be solved: {solved.message}")
    return solved.x.reshape(distance.shape)


def emd_loss(distance, flow):
    """L_hid = sum_ij F_ij D_ij. F is held constant: the gradient of the least cost with respect to D is F."""
    return (torch.as_tensor(flow).to(distance) * distance).sum()


def updated_weights(weights, paid, tau_w=10.0):
    """Cost attention: w_i <- softmax_i((sum_k c_k / c_i) / tau_w), with unit cost c_i = paid_i / w_i.

    weights [L] positive, paid [L] = sum_j F_ij D_ij. Cheap layers get more weight. A c_i below a hundredth of
    the sum counts as that: with 0 the quotient would have no value, and with less all other weights none.
    """
    c = paid / weights
    if c.sum() <= 0:
        return np.full(len(weights), 1 / len(weights))
    quotient = c.sum() / np.maximum(c, c.sum() / 100) / tau_w
    e = np.exp(quotient - quotient.max())
    return e / e.sum()


# ---- Validation ------------------------------------------------------------------------------------------


def rank_of_target(scores, target, seen):
    """rho = 1 + #{better} + #{equal} / 2 of each row's target among the items not in `seen`; float64 [B].

    scores [B, V+1], overwritten; target [B]; seen [B, H], 0 for padding. Ties count by halves against the
    target: a model that scores all items alike gets what chance gets. The target itself always takes part.
    Raises BadInput when its score is not finite, for nothing would rank above a NaN.
    """
    own = scores.gather(1, target[:, None])  # [B, 1]
    if not own.isfinite().all():
        raise BadInput("the model's scores are not finite; train it again with a lower --learning-rate")
    scores.scatter_(1, seen, -math.inf)
    scores[:, 0] = -math.inf
    scores.scatter_(1, target[:, None], own)
    better, equal = (scores > own).sum(1, dtype=torch.int32), (scores == own).sum(1, dtype=torch.int32)
    return 1 + better.double() + (equal.double() - 1) / 2


@torch.no_grad()
def validate(model, items, begin, end, max_length, device):
    """HR@10 and NDCG@10 of the items at `items[end]` after the histories `items[begin:end]`, full ranking."""
    model.eval()
    ranks = []
    slices = math.ceil(len(end) * len(model.M.weight) / 2**22)  # of 16 MiB of scores or less
    for chosen in np.array_split(np.argsort(end - begin), max(slices, math.ceil(len(end) / 256))):
        b, e = begin[chosen], end[chosen]
        window = pad_batch(items, np.maximum(b, e - max_length), e).to(device)
        _, output = model.encode(window)
        last = torch.from_numpy(np.minimum(e - b, max_length) - 1).to(device)
        scores = output[torch.arange(len(e), device=device), last] @ model.M.weight.T  # [B, V+1]
        target = torch.from_numpy(items[e]).to(device)
        ranks.append(rank_of_target(scores, target, pad_batch(items, b, e).to(device)).cpu())
    rank = torch.cat(ranks)
    hit = (rank <= 10).double()
    return hit.mean().item(), (hit / torch.log2(rank + 1)).mean().item()


# ---- Files -----------------------------------------------------------------------------------------------


def write_atomically(path, write):
    """Make `path` by `write(temporary path)` and a rename: an interrupted run leaves no half file.

    Parents are created. Raises BadInput when the place cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}; choose another --out") from None


def check_writable(path):
    """Raise BadInput now, rather than after training, if `path` cannot be written."""
    probe = Path(f"{path}.probe")
    write_atomically(probe, Path.touch)
    probe.unlink()
    if Path(path).is_dir():
        raise BadInput(f"cannot write {path}: it is a directory; choose another --out")


def load_model(path, user_count, item_count, device):
    """The program in model file `path`, as a function of `users` [B] and `items` [B, T], and its config.

    Raises BadInput when the file is no model, or not one for ids up to `user_count` and `item_count`.
    """
    extra = {"config.json": ""}
    try:
        with open(path, "rb") as file:
            program = torch.export.load(file, extra_files=extra).module().to(device)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # whatever unpickling meets in a file of another kind
        raise BadInput(
            f"{path} is no model file as torch.export saves it; make one with a training script"
        ) from None
    try:
        config = json.loads(extra["config.json"])
        items, max_length = int(config["items"]), int(config["max_length"])
    except (ValueError, KeyError, TypeError):
        raise BadInput(
            f"{path} has no config.json with `items` and `max_length`; export it with both"
        ) from None
    if items != item_count:
        raise BadInput(
            f"{path} was made for {items:,} items, the data have {item_count:,}; give it its own data"
        )
    last_ids = torch.tensor([[user_count, item_count]], device=device)
    try:
        with torch.no_grad():
            _, output, item_vectors = program(last_ids[:, 0], last_ids[:, 1:])
    except (IndexError, RuntimeError):
        raise BadInput(f"{path} does not take user {user_count}; give it the data it was made from") from None
    if output.shape[:2] != (1, 1) or item_vectors.shape != (items + 1, output.shape[-1]):
        raise BadInput(
            f"{path}: output {list(output.shape)} and item vectors {list(item_vectors.shape)} do not fit"
        )
    if not item_vectors.isfinite().all():
        raise BadInput(f"{path}: item vectors are not finite; train it again with a lower learning rate")
    return program, config | {"max_length": max_length}


def export_model(model, max_length, config):
    """The bytes of a model file: the program with dynamic batch and length, and `config` as config.json."""
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=max_length)
    example = torch.ones(2, dtype=torch.int64), torch.ones(2, max(2, max_length), dtype=torch.int64)
    program = torch.export.export(
        copy.deepcopy(model).cpu().eval(), example, dynamic_shapes=({0: batch}, {0: batch, 1: length})
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"config.json": json.dumps(config)})
    return buffer.getvalue()


def load_teacher(args, user_count, item_count, data_sha256):
    """The frozen program of --teacher, the length of history, its layers behind the embedding, its width.

    Raises BadInput unless it was trained on these data (it could know their test items), reads --max-length
    items and has a layer.
    """
    program, config = load_model(args.teacher, user_count, item_count, args.device)
    if config.get("data_sha256", data_sha256) != data_sha256:
        raise BadInput(f"{args.teacher} was trained on other data than {args.data}; train one on these")
    max_length = args.max_length or config["max_length"]
    if config["max_length"] < max_length:
        raise BadInput(f"{args.teacher} reads {config['max_length']} items; lower --max-length to that")
    with torch.no_grad():
        one = torch.ones(1, 1, dtype=torch.int64, device=args.device)
        states, _, _, dim = program(one[0], one)[0].shape
    if states < 2:
        raise BadInput(f"{args.teacher} has no layer behind its embedding to learn from; use another teacher")
    return program.requires_grad_(False), max_length, states - 1, dim


def parse_edges(text):
    """edges[j-1][i] from `--edges`: nodes apart by `;`, their edges' operations by `,`. Raises BadInput."""
    edges = [[o.strip() for o in row.split(",")] for row in text.split(";")]
    check_edges(edges, f"--edges {text!r}")
    return edges


def check_edges(edges, where):
    """Raise BadInput, naming `where`, unless edges[j-1][i] are operations that carry the input somewhere."""
    for j, row in enumerate(edges, 1):
        if len(row) != j:
            raise BadInput(
                f"{where}: node {j} needs {j} operations, from the nodes before it; it has {len(row)}"
            )
        for o in row:
            if o not in OPERATIONS:
                raise BadInput(f"{where}: unknown operation {o!r}; there are {', '.join(OPERATIONS)}")
    if not receptive_field(edges):
        raise BadInput(f"{where}: nothing of the input arrives at any node; replace a `none`")


def random_edges(nodes, costs, low, rng):
    """A random architecture whose cost lies in [low, low + 0.1]: each edge's operation is drawn uniformly.

    Raises BadInput if a million draws have none.
    """
    for _ in range(100):
        drawn = rng.integers(len(OPERATIONS), size=(10_000, edge_index(0, nodes + 1)))
        cost = costs[drawn].sum(1)
        for row in drawn[(cost >= low - 1e-9) & (cost <= low + 0.1)]:
            edges = best_edges(F.one_hot(torch.from_numpy(row), len(OPERATIONS)))
            if receptive_field(edges):
                return edges
    raise BadInput(f"--random {low}: no architecture of such a cost was found; it lies between 0 and 1")


def edges_text(edges):
    """An architecture as `--edges` reads it."""
    return ";".join(",".join(row) for row in edges)


def count(cell):
    """Parameters of a Cell's operations, and their multiply-adds an item, as torch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        cell(torch.zeros(1, 1, *cell.norm.normalized_shape, device=cell.w.device))
    return sum(p.numel() for p in cell.operations.parameters()), counter.get_total_flops() // 2


def describe(student, edges, expected_cost):
    """Lines of text on a student of architecture `edges`: its cell, what it costs; and a mermaid chart."""
    cells, dim, shares = len(student.cells), student.M.embedding_dim, student.cells[0].w.softmax(0).tolist()
    lines = []
    for j, row in enumerate(edges, 1):
        parts = [f"{o}(x_{i})" for i, o in enumerate(row) if o != "none"]
        lines.append(f"x_{j} = {' + '.join(parts) or '0'}")
    total = " + ".join(f"{share:.2f} x_{j}" for j, share in enumerate(shares, 1))
    lines.append(f"out = x_0 + ReLU(LayerNorm({total}))   shares of the first of {cells} cells")
    mine = count(student.cells[0])
    most = count(Cell(dim, [["conv5"] * len(row) for row in edges]))
    costs = dict(zip(OPERATIONS, operation_costs(dim, len(edges)).tolist(), strict=True))
    lines.append(f"parameters of the operations {cells * mine[0]:,} of at most {cells * most[0]:,}")
    lines.append(f"multiply-adds an item {cells * mine[1]:,} of at most {cells * most[1]:,}")
    counted = sum(m / n for m, n in zip(mine, most, strict=True)) / 2
    expected = "" if expected_cost is None else f", expected of the last alpha {expected_cost:.3f}"
    lines.append(f"cost {sum(costs[o] for row in edges for o in row):.3f}, counted {counted:.3f}{expected}")
    lines.append(f"receptive field {receptive_field(edges, cells)} items")
    chart = ["flowchart LR", "    x0[x_0: input]"]
    chart += [
        f"    x{i} -- {o} --> x{j}[x_{j}]"
        for j, row in enumerate(edges, 1)
        for i, o in enumerate(row)
        if o != "none"
    ]
    chart += [f"    x{j}[x_{j}] -- {share:.2f} --> out" for j, share in enumerate(shares, 1)]
    return lines, [*chart, "    x0 --> out[output]"]


def sha256_of(path):
    """SHA-256 of a file, in hexadecimal: a model file names the data it was trained on by it."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ---- Training --------------------------------------------------------------------------------------------


def layer_losses(hidden, teacher_hidden, W_e, W_h, w_S, w_T):
    """L_emb, L_hid, the flow, both next layer weights w_S [L_S] and w_T [L_T], and seconds in the solver.

    hidden [L_S+1, N, d_S] and teacher_hidden [L_T+1, N, d_T], at the N real positions; the embedding first.
    """
    l_emb = embedding_loss(W_e(hidden[0]), teacher_hidden[0])
    distance = kl_distances(W_h(hidden[1:]), teacher_hidden[1:])
    D = distance.detach().double().cpu().numpy()
    tick = time.perf_counter()
    flow = transport(w_S, w_T, D)
    w_S, w_T = updated_weights(w_S, (flow * D).sum(1)), updated_weights(w_T, (flow * D).sum(0))
    return l_emb, emd_loss(distance, flow), flow, w_S, w_T, time.perf_counter() - tick


def train(args):
    """Search, or train one architecture; write architecture, student, picture and log. Raises BadInput."""
    began = time.time()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    user_ids, starts, items = read_interactions(args.data)
    user_count, item_count = int(user_ids.max()), int(items.max())
    train_end, evaluated = leave_one_out(starts)
    out = Path(args.out)
    paths = out, out.with_suffix(".pt2"), out.with_suffix(".md"), Path(f"{out}.log.jsonl")
    for path in paths:
        check_writable(path)

    program, max_length, data_sha256 = None, args.max_length or 50, sha256_of(args.data)
    if args.gamma > 0:
        program, max_length, layers, teacher_dim = load_teacher(args, user_count, item_count, data_sha256)
    users, begin, end, chosen = training_part(args.data, starts, train_end, evaluated, max_length, rng)

    edges = None if args.edges is None else parse_edges(args.edges)
    nodes = len(edges) if edges else args.nodes
    costs = operation_costs(args.dim, nodes)
    if args.random is not None:
        if args.random < 0:  # not given: what the search starts from
            args.random = costs.mean().item() * edge_index(0, nodes + 1)
        edges = random_edges(nodes, costs.numpy(), args.random, rng)
    search, alpha = edges is None, None
    cells = [MixedCell(args.dim, nodes) if search else Cell(args.dim, edges) for _ in range(args.cells)]
    model = Student(item_count, max_length, args.dim, cells, args.dropout).to(args.device)
    groups = [{"params": list(model.parameters())}]
    if search:
        alpha = nn.Parameter(torch.zeros(edge_index(0, nodes + 1), len(OPERATIONS), device=args.device))
        groups.append({"params": [alpha], "lr": args.alpha_learning_rate, "weight_decay": 1e-4})
    if program:
        W_e, W_h = (nn.Linear(args.dim, teacher_dim).to(args.device) for _ in range(2))
        groups[0]["params"] += [*W_e.parameters(), *W_h.parameters()]
        w_S, w_T = np.full(args.cells, 1 / args.cells), np.full(layers, 1 / layers)
    optimizer = torch.optim.AdamW(groups, args.learning_rate, weight_decay=5e-4, fused=True)
    costs = costs.float().to(args.device)
    what = "search over" if search else "training"
    print(
        f"{args.data}: {len(user_ids):,} users, {item_count:,} items, {len(items):,} interactions; {what} "
        f"{args.cells} cells of {nodes} nodes, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"on {args.device}",
        flush=True,
    )

    mean_count = (end - begin - 1).sum() / math.ceil(len(users) / args.batch_size)  # positions a batch
    best, best_student, log, progress = None, None, [], Progress()
    names = ["L_CE", "L_emb", "L_hid", "L_pred", "L_cost"]
    for epoch in range(1, args.epochs + 1):
        model.train()
        tau, tick, solving = temperature(args.temperature, epoch), time.time(), 0.0
        total, positions, flows = np.zeros(len(names)), 0, 0
        batches = batches_of_like_length(end - begin, args.batch_size, rng)
        for step, batch in enumerate(batches, 1):
            inputs = pad_batch(items, begin[batch], end[batch] - 1).to(args.device)
            targets = pad_batch(items, begin[batch] + 1, end[batch]).to(args.device)
            real = inputs > 0
            count = int(real.sum())
            y = (choose(alpha, tau, args.relaxation),) if search else ()
            hidden, output = model.encode(inputs, *y)
            teacher_output = teacher_vectors = None
            l_emb = l_hid = l_cost = torch.zeros((), device=args.device)
            if program:
                with torch.no_grad():
                    ids = torch.from_numpy(user_ids[users[batch]]).to(args.device)
                    teacher_hidden, teacher_output, teacher_vectors = program(ids, inputs)
                hidden = torch.stack([h[real] for h in hidden])
                l_emb, l_hid, flow, w_S, w_T, seconds = layer_losses(
                    hidden, teacher_hidden[:, real], W_e, W_h, w_S, w_T
                )
                teacher_output = teacher_output[real]
                flows, solving = flows + flow * count, solving + seconds
            loss, l_ce, l_pred = item_losses(
                output[real],
                model.M.weight,
                targets[real],
                teacher_output,
                teacher_vectors,
                1 - args.gamma,
                args.gamma * args.prediction_weight,
            )
            loss = loss + args.gamma * (args.embedding_weight * l_emb + args.hidden_weight * l_hid)
            if search:
                l_cost = cost_loss(y[0], costs)
                loss = loss + args.beta * l_cost
            optimizer.zero_grad()
            # the losses sum over positions: a batch of short histories must not count as one of long ones
            (loss * count / mean_count).backward()
            if search and epoch <= args.alpha_warm_up:
                # a convolution must learn before it can beat a pool, which need not: all are drawn alike
                alpha.grad = None
            optimizer.step()
            total += count * np.array([part.item() for part in (l_ce, l_emb, l_hid, l_pred, l_cost)])
            positions += count
            if not math.isfinite(loss.item()):
                raise BadInput(f"the loss became {loss.item()} in epoch {epoch}; lower --learning-rate")
            progress.show(f"epoch {epoch}, batch {step} of {len(batches)}: L_CE {total[0] / positions:.4f}")
        student = derive(model, best_edges(alpha), args.dropout) if search else model
        hr, ndcg = validate(student, items, starts[chosen], train_end[chosen], max_length, args.device)
        seconds = time.time() - tick
        mean = dict(zip(names, (total / positions).tolist(), strict=True))
        log.append({"epoch": epoch} | mean | {"HR@10": hr, "NDCG@10": ndcg, "seconds": seconds})
        if program:
            log[-1] |= {"flow": (flows / positions).tolist(), "student_weights": w_S.tolist()}
            log[-1] |= {"teacher_weights": w_T.tolist(), "transport_seconds": solving}
        if search:
            p = alpha.detach().softmax(-1)
            log[-1] |= {"alpha": alpha.tolist(), "tau": tau, "expected_cost": cost_loss(p, costs).item()}
            log[-1] |= {"sure": p.max(-1).values.mean().item(), "edges": best_edges(alpha)}
        if search or best is None or ndcg > best["NDCG@10"]:  # the last of a search, the best of a training
            best, best_student = log[-1], copy.deepcopy(student)
        left = (args.epochs - epoch) * (time.time() - began) / epoch / 60
        progress.line(
            f"epoch {epoch:3}  {'  '.join(f'{n} {v:.4f}' for n, v in mean.items() if v)}  "
            f"validation HR@10 {hr:.4f} NDCG@10 {ndcg:.4f}  {seconds:.1f} s; {left:.1f} min left"
        )
        if search:
            print(
                "    {}  sure {sure:.2f}, tau {tau:.2f}, expected cost {expected_cost:.3f}".format(
                    edges_text(log[-1]["edges"]), **log[-1]
                ),
                flush=True,
            )
        if program:
            print(
                "    flow, a student layer a bracket:",
                *(f"[{' '.join(f'{f:.2f}' for f in row)}]" for row in log[-1]["flow"]),
                flush=True,
            )

    edges = best["edges"] if search else edges
    architecture = {"cells": args.cells, "nodes": nodes, "dim": args.dim, "edges": edges}
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "out", "teacher")}
    config = {
        "items": item_count,
        "max_length": max_length,
        "stage": "adarec_search",
        "settings": settings | {"max_length": max_length},
        "architecture": architecture,
        "data_sha256": data_sha256,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "validation": {name: best[name] for name in ("epoch", "HR@10", "NDCG@10")},
    }
    report, chart = describe(best_student, edges, best.get("expected_cost"))
    contents = (
        (json.dumps(architecture, indent=1) + "\n").encode(),
        export_model(best_student, max_length, config),
        "\n".join(["```", *report, "```", "", "```mermaid", *chart, "```", ""]).encode(),
        "".join(json.dumps(line) + "\n" for line in log).encode(),
    )
    for path, content in zip(paths, contents, strict=True):
        write_atomically(path, lambda temporary, content=content: temporary.write_bytes(content))
    print("\n".join(report))
    if not receptive_field(edges):
        print(
            "note: nothing of the input arrives at any node; search again with a lower --beta",
            file=sys.stderr,
        )
    print(
        f"{args.out}: {edges_text(edges)}; {paths[1].name}: epoch {best['epoch']}, validation HR@10 "
        f"{best['HR@10']:.4f} NDCG@10 {best['NDCG@10']:.4f}; {(time.time() - began) / 60:.1f} min"
    )


class Progress:
    """What happens now: one line written over on a terminal, else a new line each 8 s of silence."""

    def __init__(self):
        self.terminal, self.last = sys.stdout.isatty(), time.time()

    def show(self, text):
        """Show `text`, if it is time to."""
        if time.time() - self.last > (0.2 if self.terminal else 8):
            print(f"\r\033[K{text}" if self.terminal else text, end="" if self.terminal else "\n", flush=True)
            self.last = time.time()

    def line(self, text):
        """Print `text` to stay."""
        print(f"\r\033[K{text}" if self.terminal else text, flush=True)
        self.last = time.time()


def main(argv=None):
    """Read the command line, search or train; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Search the architecture of a student for one data set, AdaRec: "
        "L = (1 - gamma) L_CE + gamma L_KD + beta L_cost.",
        epilog="example: python adarec_search.py data/ml-100k.txt --teacher runs/teacher.pt2 "
        "--out runs/architecture.json",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("data", help="interactions, `user item` a row: .txt or .npy (data/README.md)")
    no_default = {"default": argparse.SUPPRESS}
    add("--teacher", help="model file to learn from; not needed with --gamma 0. Load only trusted ones")
    add(
        "--out",
        required=True,
        **no_default,
        help="architecture to write, as runs/architecture.json; the student with its weights (.pt2) and the "
        "drawn cell (.md) stand beside it, the log in OUT.log.jsonl",
    )
    add("--cells", type=number(int, 1), default=4, help="K: cells, one architecture, weights of their own")
    add("--nodes", type=number(int, 1), default=3, help="N: nodes of a cell behind its input")
    add("--dim", type=number(int, 1), default=64, help="d_S: size of hidden states and item vectors")
    add(
        "--max-length",
        type=number(int, 2),
        help="most recent items that the student sees; the teacher's if not given",
    )
    add(
        "--dropout",
        type=number(float, 0, 1),
        default=0.2,
        help="share of units dropped before and after the cells",
    )
    add(
        "--gamma",
        type=number(float, 0, math.nextafter(1, 2)),
        default=0.5,
        help="weight of L_KD; that of L_CE is 1 - gamma",
    )
    add(
        "--beta",
        type=number(float, 0),
        default=0.3,
        help="weight of L_cost: the loss accepted for the dearest architecture",
    )
    for part, what in (
        ("embedding", "L_emb, MSE of the embeddings"),
        ("hidden", "L_hid, EMD of the layers"),
        ("prediction", "L_pred, KL of the item distributions"),
    ):
        add(f"--{part}-weight", type=number(float, 0), default=1.0, help=f"weight in L_KD of {what}")
    add(
        "--relaxation",
        choices=["gumbel", "softmax"],
        default="gumbel",
        help="gumbel: one operation an edge and step, drawn; softmax: DARTS's mixture of all",
    )
    add(
        "--temperature",
        type=number(float, 1e-6),
        default=1.0,
        help="tau of the Gumbel-softmax at first; times 0.8 every 5 epochs",
    )
    add(
        "--alpha-learning-rate",
        type=number(float, 0),
        default=5e-2,
        help="of AdamW on alpha; 2e-5 in the published code, where alpha stays near its start",
    )
    add(
        "--alpha-warm-up",
        type=number(int, 0),
        default=10,
        help="epochs before alpha begins to learn, in which all operations are drawn alike",
    )
    add("--learning-rate", type=number(float, 1e-12), default=5e-3, help="of AdamW on the weights")
    add("--batch-size", type=number(int, 1), default=32, help="users a step")
    add("--epochs", type=number(int, 1), default=30, help="passes over all users")
    fixed = parser.add_mutually_exclusive_group()
    fixed.add_argument(
        "--edges",
        metavar="TEXT",
        help='no search, train this: in "conv3;skip,none" node 1 is conv3 of node 0, node 2 is node 0',
    )
    fixed.add_argument(
        "--random",
        type=number(float, 0, 1),
        nargs="?",
        const=-1.0,
        metavar="COST",
        help="no search, train a random architecture whose cost lies in [COST, COST + 0.1]; without COST, "
        "from the mean of all on",
    )
    add("--seed", type=number(int, 0), default=0, help="same seed, data and machine: same files")
    add(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where",
    )
    args = parser.parse_args(argv)
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise BadInput("no CUDA device was found; use --device cpu")
        if args.gamma > 0 and not args.teacher:
            raise BadInput("--teacher is missing; give one, or --gamma 0 to search without distillation")
        if Path(args.out).suffix != ".json":
            raise BadInput(f"--out {args.out}: give a name that ends in .json; .pt2 and .md come beside it")
        train(args)
    except BadInput as error:
        print(f"adarec_search.py: {error}", file=sys.stderr)
        return 2
    return 0


def number(kind, low, below=math.inf):
    """A reader of `kind` numbers from `low` up to, but not, `below`, for argparse."""

    def number(text):
        if not low <= kind(text) < below:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low:g}, {below:g})")
        return kind(text)

    return number


if __name__ == "__main__":
    sys.exit(main())
