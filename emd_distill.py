r"""Stage 3: train the student with many-to-many distillation, mapped by Earth Mover's Distance.

Lei Chen, Fajie Yuan, Jiaxi Yang, Min Yang and Chengming Li, "Scene-adaptive Knowledge Distillation for
Sequential Recommendation via Differentiable Architecture Search", arXiv 2107.07173; the mapping of layers is
that of Li et al., "BERT-EMD", EMNLP 2020, arXiv 2010.06133.

L = (1 - gamma) L_CE + gamma (L_emb + L_hid + L_pred). L_hid moves the student's layers onto the teacher's:
the cheapest flow from layers to layers, a linear program, says which of them should become alike.

Reads   interactions, `user item` a row (data/README.md), a teacher (README.md, "The model file") and an
        architecture (README.md, "The architecture").
Writes  OUT, the student as a model file, of the epoch whose validation NDCG@10 was best; and OUT.log.jsonl, a
        line an epoch with the flow and the weights of the layers.

    python emd_distill.py data/ml-100k.txt --teacher runs/teacher.pt2 \
        --architecture runs/architecture.json --out runs/student.pt2
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


# ---- L_hid: transport between layers ---------------------------------------------------------------------


def kl_distances(student, teacher):
    """D_ij = KL(softmax(H^T_j) || softmax(H^S_i W_h)) over the features, mean over positions: [L_S, L_T].

    student [L_S, N, d_T], already projected; teacher [L_T, N, d_T].
    """
    log_p, log_q = student.log_softmax(-1).flatten(1), teacher.log_softmax(-1).flatten(1)
    q = log_q.exp()
    return ((q * log_q).sum(1) - log_p @ q.T) / student.shape[1]


def mse_distances(student, teacher):
    """D_ij = mean of (H^S_i W_h - H^T_j)^2 over positions and features: [L_S, L_T] (BERT-EMD).

    student [L_S, N, d_T], already projected; teacher [L_T, N, d_T].
    """
    s, t = student.flatten(1), teacher.flatten(1)
    squares = s.square().sum(1)[:, None] + t.square().sum(1) - 2 * s @ t.T
    return squares.clamp(min=0) / s.shape[1]  # rounding may leave a tiny negative number


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


def fixed_flow(mapping, student_layers, teacher_layers):
    """A flow [L_S, L_T] that is given, for comparison with the transported one.

    `one-to-one`: student layer i (from 1) learns from teacher layer i L_T / L_S, rounded up, 1 / L_S each.
    `last`: the last layer learns from the last one, and nothing else.
    """
    flow = np.zeros((student_layers, teacher_layers))
    if mapping == "last":
        flow[-1, -1] = 1
        return flow
    for i in range(student_layers):
        flow[i, math.ceil((i + 1) * teacher_layers / student_layers) - 1] = 1 / student_layers
    return flow


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


# ---- L_emb, L_CE and L_pred ------------------------------------------------------------------------------


def embedding_loss(projected, teacher):
    """L_emb = MSE(E^S W_e, E^T); both [N, d_T]."""
    return F.mse_loss(projected, teacher)


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


# ---- The student: cells of one architecture, or a small SASRec -------------------------------------------
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


class Block(nn.Module):
    """x <- x + Dropout(g(LayerNorm(x))); g is causal self-attention, then the feed-forward network.

    With `scaled`, x + epsilon * Dropout(g(LayerNorm(x))), epsilon learned from 0: a deep stack starts as the
    identity and so can be trained (AdaRec's teacher).
    """

    def __init__(self, dim, heads, dropout, scaled):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value, self.projection = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.W_1, self.W_2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.epsilon = nn.Parameter(torch.zeros(2)) if scaled else None

    def attention(self, x):
        """softmax(Q K^T / sqrt(d/heads)) V, position t seeing positions up to t alone (section III-B)."""
        per_head = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, h, d/h]
        q, k, v = per_head.permute(2, 0, 3, 1, 4)  # each [B, h, T, d/h]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.projection(attended.transpose(1, 2).flatten(2))  # [B, T, d]

    def feed_forward(self, x):
        """ReLU(x W_1 + b_1) W_2 + b_2 (section III-B)."""
        return self.W_2(F.relu(self.W_1(x)))

    def forward(self, x):
        update = self.dropout(self.attention(self.norm_1(x)))
        x = x + (update if self.epsilon is None else self.epsilon[0] * update)
        update = self.dropout(self.feed_forward(self.norm_2(x)))
        return x + (update if self.epsilon is None else self.epsilon[1] * update)


class SASRec(nn.Module):
    """Self-attentive sequential recommender; `forward` is the contract of a model file.

    Item 0 is padding. Histories are padded on the right: a causal model needs no mask for what comes later.
    """

    def __init__(self, item_count, max_length, dim, blocks, heads, dropout, scaled=False):
        super().__init__()
        self.M = nn.Embedding(item_count + 1, dim, padding_idx=0)  # items, and scores by the same vectors
        self.P = nn.Parameter(torch.empty(max_length, dim))  # positions
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout, scaled) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)  # small: at first, what comes in passes on nearly unchanged
        with torch.no_grad():
            self.M.weight[0] = 0

    def encode(self, items):
        """items [B, T] -> states of embedding layer and blocks, a list of [B, T, d]; output [B, T, d]."""
        # E_t = sqrt(d) M[s_t] + P_t
        x = math.sqrt(self.M.embedding_dim) * self.M(items) + self.P[: items.shape[1]]
        hidden = [self.dropout(x)]
        for block in self.blocks:
            hidden.append(block(hidden[-1]))
        return hidden, self.norm(hidden[-1])

    def forward(self, users, items):
        """users [B], items [B, T] -> hidden [L+1, B, T, d], output [B, T, d], item_vectors [V+1, d]."""
        hidden, output = self.encode(items)
        return torch.stack(hidden), output, self.M.weight


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


def sha256_of(path):
    """SHA-256 of a file, in hexadecimal: a model file names the data it was trained on by it."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


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


def read_architecture(path):
    """The architecture in a file: cells, nodes, dim and edges. Raises BadInput naming what does not fit."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        why = error.strerror or error
        raise BadInput(f"cannot read {path}: {why}; make it with adarec_search.py") from None
    except ValueError as error:
        raise BadInput(f"{path} is no JSON: {error}; make it with adarec_search.py") from None
    if not isinstance(found, dict) or not {"cells", "nodes", "dim", "edges"} <= found.keys():
        raise BadInput(f"{path} must have the keys cells, nodes, dim and edges")
    for key in ("cells", "nodes", "dim"):
        if type(found[key]) is not int or found[key] < 1:
            raise BadInput(f"{path}: {key} is {found[key]!r}; it must be an integer from 1")
    edges = found["edges"]
    if not isinstance(edges, list) or not all(isinstance(row, list) for row in edges):
        raise BadInput(f"{path}: edges must be a list with a list of operations for each node")
    if len(edges) != found["nodes"]:
        raise BadInput(f"{path}: edges for {len(edges)} nodes, but nodes is {found['nodes']}")
    check_edges(edges, path)
    return {key: found[key] for key in ("cells", "nodes", "dim", "edges")}


def load_start(student, path, architecture, max_length, user_count, item_count):
    """Give `student` the weights of model file `path`. Raises BadInput if that is of another architecture."""
    program, config = load_model(path, user_count, item_count, "cpu")
    if config.get("architecture") != architecture:
        raise BadInput(f"{path} has another architecture; give the file that came with it, or --from-scratch")
    if config["max_length"] != max_length:
        raise BadInput(f"{path} reads {config['max_length']} items, not {max_length}; use --from-scratch")
    student.load_state_dict(program.state_dict())


# ---- Training --------------------------------------------------------------------------------------------


def map_layers(student, teacher, w_S, w_T, distance, mapping):
    """L_hid, its flow [L_S, L_T], both next layer weights w_S [L_S] and w_T [L_T], and seconds in the solver.

    student [L_S, N, d_T], projected, and teacher [L_T, N, d_T], at the N real positions.
    """
    distances = {"kl": kl_distances, "mse": mse_distances}[distance](student, teacher)
    if mapping != "emd":
        flow = fixed_flow(mapping, len(student), len(teacher))
        return emd_loss(distances, flow), flow, w_S, w_T, 0.0
    tick = time.perf_counter()
    D = distances.detach().double().cpu().numpy()
    flow = transport(w_S, w_T, D)
    w_S, w_T = updated_weights(w_S, (flow * D).sum(1)), updated_weights(w_T, (flow * D).sum(0))
    return emd_loss(distances, flow), flow, w_S, w_T, time.perf_counter() - tick


def train(args):
    """Train the student, stop early, write the model file and its log. Raises BadInput."""
    began = time.time()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    user_ids, starts, items = read_interactions(args.data)
    user_count, item_count = int(user_ids.max()), int(items.max())
    train_end, evaluated = leave_one_out(starts)
    log_path = f"{args.out}.log.jsonl"
    check_writable(args.out)
    check_writable(log_path)

    program, max_length, data_sha256 = None, args.max_length or 50, sha256_of(args.data)
    if args.gamma > 0:
        program, max_length, layers, teacher_dim = load_teacher(args, user_count, item_count, data_sha256)
    users, begin, end, chosen = training_part(args.data, starts, train_end, evaluated, max_length, rng)

    architecture, start = None, None
    if args.student == "sasrec":
        scaled = args.blocks >= 4
        model = SASRec(item_count, max_length, args.dim, args.blocks, args.heads, args.dropout, scaled)
        student_layers, dim = args.blocks, args.dim
    else:
        architecture = read_architecture(args.architecture)
        student_layers, dim, edges = architecture["cells"], architecture["dim"], architecture["edges"]
        cells = [Cell(dim, edges) for _ in range(student_layers)]
        model = Student(item_count, max_length, dim, cells, args.dropout)
        beside = Path(args.architecture).with_suffix(".pt2")
        start = args.start or (beside if beside.exists() and not args.from_scratch else None)
        if start:
            load_start(model, start, architecture, max_length, user_count, item_count)
    model.to(args.device)
    learned = list(model.parameters())
    if program:
        W_e, W_h = (nn.Linear(dim, teacher_dim).to(args.device) for _ in range(2))  # W_h is of all layers
        learned += [*W_e.parameters(), *W_h.parameters()]
        w_S, w_T = np.full(student_layers, 1 / student_layers), np.full(layers, 1 / layers)
    optimizer = torch.optim.AdamW(learned, args.learning_rate, weight_decay=args.weight_decay, fused=True)
    final = args.learning_rate if args.final_learning_rate is None else args.final_learning_rate
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer,
        1.0,
        final / args.learning_rate,
        total_iters=args.epochs * math.ceil(len(users) / args.batch_size),
    )
    print(
        f"{args.data}: {len(user_ids):,} users, {item_count:,} items, {len(items):,} interactions; "
        f"student of {sum(p.numel() for p in model.parameters()):,} parameters, started from "
        f"{start or 'scratch'}, on {args.device}",
        flush=True,
    )

    mean_count = (end - begin - 1).sum() / math.ceil(len(users) / args.batch_size)  # positions a batch
    best, best_weights, log, progress = None, None, [], Progress()
    names = ["L_CE", "L_emb", "L_hid", "L_pred"]
    for epoch in range(1, args.epochs + 1):
        model.train()
        total, positions, flows, solving, tick = np.zeros(len(names)), 0, 0, 0.0, time.time()
        batches = batches_of_like_length(end - begin, args.batch_size, rng)
        for step, batch in enumerate(batches, 1):
            inputs = pad_batch(items, begin[batch], end[batch] - 1).to(args.device)
            targets = pad_batch(items, begin[batch] + 1, end[batch]).to(args.device)
            real = inputs > 0
            count = int(real.sum())
            hidden, output = model.encode(inputs)
            teacher_output = teacher_vectors = None
            l_emb = l_hid = torch.zeros((), device=args.device)
            if program:
                with torch.no_grad():
                    ids = torch.from_numpy(user_ids[users[batch]]).to(args.device)
                    teacher_hidden, teacher_output, teacher_vectors = program(ids, inputs)
                    teacher_hidden, teacher_output = teacher_hidden[:, real], teacher_output[real]
                l_emb = embedding_loss(W_e(hidden[0][real]), teacher_hidden[0])
                student = W_h(torch.stack([h[real] for h in hidden[1:]]))  # [L_S, N, d_T]
                l_hid, flow, w_S, w_T, seconds = map_layers(
                    student, teacher_hidden[1:], w_S, w_T, args.distance, args.mapping
                )
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
            optimizer.zero_grad()
            # the losses sum over positions: a batch of short histories must not count as one of long ones
            (loss * count / mean_count).backward()
            optimizer.step()
            schedule.step()
            total += count * np.array([part.item() for part in (l_ce, l_emb, l_hid, l_pred)])
            positions += count
            if not math.isfinite(loss.item()):
                raise BadInput(f"the loss became {loss.item()} in epoch {epoch}; lower --learning-rate")
            progress.show(f"epoch {epoch}, batch {step} of {len(batches)}: L_CE {total[0] / positions:.4f}")
        hr, ndcg = validate(model, items, starts[chosen], train_end[chosen], max_length, args.device)
        seconds = time.time() - tick
        mean = dict(zip(names, (total / positions).tolist(), strict=True))
        log.append({"epoch": epoch} | mean | {"HR@10": hr, "NDCG@10": ndcg, "seconds": seconds})
        if program:
            log[-1] |= {"flow": (flows / positions).tolist(), "student_weights": w_S.tolist()}
            log[-1] |= {"teacher_weights": w_T.tolist(), "transport_seconds": solving}
        if best is None or ndcg > best["NDCG@10"]:
            best, best_weights = log[-1], copy.deepcopy(model.state_dict())
        left = min(args.epochs, best["epoch"] + args.patience) - epoch
        minutes = left * (time.time() - began) / epoch / 60
        progress.line(
            f"epoch {epoch:3}  {'  '.join(f'{n} {v:.4f}' for n, v in mean.items() if v)}  "
            f"validation HR@10 {hr:.4f} NDCG@10 {ndcg:.4f}{'*' if best is log[-1] else ' '}  "
            f"{seconds:.1f} s; {minutes:.1f} min left if none gets better"
        )
        if left == 0:
            break

    model.load_state_dict(best_weights)
    paths = ("data", "out", "teacher", "architecture", "start")
    config = {
        "items": item_count,
        "max_length": max_length,
        "stage": "emd_distill",
        "settings": {k: v for k, v in vars(args).items() if k not in paths} | {"max_length": max_length},
        "architecture": architecture,
        "data_sha256": data_sha256,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "validation": {k: best[k] for k in ("epoch", "HR@10", "NDCG@10")},
    }
    content = export_model(model, max_length, config)
    write_atomically(args.out, lambda path: path.write_bytes(content))
    write_atomically(log_path, lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in log)))
    if program:
        print_flow(np.array(log[-1]["flow"]), w_S, w_T)
    print(
        f"{args.out}: epoch {best['epoch']}, validation HR@10 {best['HR@10']:.4f} "
        f"NDCG@10 {best['NDCG@10']:.4f}; {(time.time() - began) / 60:.1f} min"
    )


def print_flow(flow, w_S, w_T):
    """Print the flow [L_S, L_T] as a table, student layer by teacher layer, with the weights of both."""
    print("flow of the last epoch, from student layer (down) to teacher layer (across)")
    print("         " + "".join(f"{j:>7}" for j in range(1, len(w_T) + 1)) + "   weight")
    for i, row in enumerate(flow, 1):
        print(f"{i:>9}" + "".join(f"{f:7.3f}" for f in row) + f"  {w_S[i - 1]:7.3f}")
    print("   weight" + "".join(f"{w:7.3f}" for w in w_T))


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
    """Read the command line and train; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Train a student to be like its teacher, layers matched by Earth Mover's Distance: "
        "L = (1 - gamma) L_CE + gamma (L_emb + L_hid + L_pred).",
        epilog="example: python emd_distill.py data/ml-100k.txt --teacher runs/teacher.pt2 "
        "--architecture runs/architecture.json --out runs/student.pt2",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("data", help="interactions, `user item` a row: .txt or .npy (data/README.md)")
    add("--teacher", help="model file to learn from; not needed with --gamma 0. Load only trusted ones")
    add("--architecture", help="of the student, as adarec_search.py writes it")
    no_default = {"required": True, "default": argparse.SUPPRESS}
    add("--out", **no_default, help="model file to write, as runs/student.pt2; the log goes to OUT.log.jsonl")
    add(
        "--student", choices=["cells", "sasrec"], default="cells", help="of --architecture, or a small SASRec"
    )
    add("--dim", type=number(int, 1), default=64, help="d_S of --student sasrec")
    add("--blocks", type=number(int, 1), default=2, help="of --student sasrec")
    add("--heads", type=number(int, 1), default=1, help="of --student sasrec; must divide --dim")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument(
        "--start", help="model file to start from; the .pt2 beside --architecture if there is one"
    )
    begin.add_argument("--from-scratch", action="store_true", help="start from random weights")
    add(
        "--gamma",
        type=number(float, 0, math.nextafter(1, 2)),
        default=0.5,
        help="weight of L_KD; 1 - gamma is L_CE's",
    )
    parts = {
        "embedding": "L_emb, MSE of the embeddings",
        "hidden": "L_hid, EMD of the layers",
        "prediction": "L_pred, KL of the item distributions",
    }
    for part, what in parts.items():
        add(f"--{part}-weight", type=number(float, 0), default=1.0, help=f"weight in L_KD of {what}")
    add(
        "--distance", choices=["kl", "mse"], default="kl", help="D_ij between layers: AdaRec's, or BERT-EMD's"
    )
    add(
        "--mapping",
        choices=["emd", "one-to-one", "last"],
        default="emd",
        help="emd: by transport; one-to-one: to evenly spaced teacher layers; last: of the last layer alone",
    )
    add(
        "--max-length",
        type=number(int, 2),
        help="most recent items that the student sees; the teacher's if not given, 50 without one",
    )
    add("--dropout", type=number(float, 0, 1), default=0.2, help="share of units dropped in training")
    add("--learning-rate", type=number(float, 1e-12), default=5e-3, help="of AdamW")
    add(
        "--final-learning-rate",
        type=number(float, 0),
        help="rate after the last of --epochs, reached evenly; --learning-rate if not given",
    )
    add("--weight-decay", type=number(float, 0), default=5e-4, help="of AdamW")
    add("--batch-size", type=number(int, 1), default=32, help="users a step")
    add("--epochs", type=number(int, 1), default=30, help="passes over all users, at most")
    add(
        "--patience",
        type=number(int, 1),
        default=10,
        help="epochs without a better validation NDCG@10 to stop after",
    )
    add("--seed", type=number(int, 0), default=0, help="same seed, data and machine: same file")
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
            raise BadInput("--teacher is missing; give one, or --gamma 0 to train without distillation")
        if args.student == "cells" and not args.architecture:
            raise BadInput(
                "--architecture is missing; make one with adarec_search.py, or use --student sasrec"
            )
        if args.student == "sasrec" and args.start:
            raise BadInput("--start is for students of an --architecture; leave it out")
        if (args.final_learning_rate or 0) > args.learning_rate:
            raise BadInput(f"--final-learning-rate is above --learning-rate {args.learning_rate:g}; lower it")
        if args.dim % args.heads:
            raise BadInput(f"--heads {args.heads} does not divide --dim {args.dim}; change one of them")
        train(args)
    except BadInput as error:
        print(f"emd_distill.py: {error}", file=sys.stderr)
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
