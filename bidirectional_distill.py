"""Stage 4: teacher and student train each other, Bidirectional Distillation.

Wonbin Kweon, SeongKu Kang and Hwanjo Yu, "Bidirectional Distillation for Top-K Recommender System", WWW 2021,
arXiv 2106.02870.

A large and a small model of one kind warm up alone, then each learns from the other on items drawn by how
much their rankings disagree: L_T = L_CF(T) + lambda_T L_BD(T;S), and L_S = L_CF(S) + lambda_S L_BD(S;T).

Reads   interactions, `user item` a row (data/README.md).
Writes  OUT-teacher.pt2 and OUT-student.pt2, two model files (README.md, "The model file"), each of the epoch
        whose validation NDCG@10 was best; and OUT.log.jsonl, a line an epoch.

    python bidirectional_distill.py data/ml-100k.txt --out runs/bd
"""

import argparse
import copy
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
from torch import nn

MAX_ID = 10**8  # a table of vectors has a row for every id up to the largest
TOP = 100  # of --sampling top: the other model's best items
SCORES = 2**21  # users x items that are ranked at a time

# settings of the published code (BPR, CDAE), ours (SASRec)
SETTINGS = {
    "sasrec": {
        "teacher_dim": 64,
        "student_dim": 16,
        "learning_rate": 1e-3,
        "temperature": 1.0,
        "epsilon_exp": 1e-3,
        "epsilon_tanh": 1e-2,
        "batch_size": 32,
        "samples": 1,
        "warm_up": 30,
        "epochs": 20,
    },
    "bpr": {
        "teacher_dim": 50,
        "student_dim": 5,
        "learning_rate": 1e-3,
        "temperature": 5.0,
        "epsilon_exp": 1e-4,
        "epsilon_tanh": 1e-2,
        "batch_size": 16,
        "samples": 1,
        "warm_up": 1000,
        "epochs": 100,
    },
    "cdae": {
        "teacher_dim": 50,
        "student_dim": 5,
        "learning_rate": 2e-3,
        "temperature": 2.0,
        "epsilon_exp": 1e-4,
        "epsilon_tanh": 1e-4,
        "batch_size": 128,
        "samples": 5,
        "warm_up": 1000,
        "epochs": 1000,
    },
}


class BadInput(Exception):
    """Something the user can mend: `main` prints it as one line and ends with status 2."""


# ---- Rank-discrepancy-aware sampling (section 3.2) -------------------------------------------------------


def ranks(scores, observed):
    """Rank of each item among the unobserved ones of its row, 1 the best; 0 for an observed one.

    scores [B, V] float32, observed [B, V] bool -> int32 [B, V]. Of equal scores, the smaller id ranks first,
    so that ties are broken alike in both models. It is a radix sort of the scores' bits, 16 by 16, in half
    the time that a sort by comparison takes.
    """
    bits = np.where(observed, np.float32(np.inf), 0 - scores.astype(np.float32)).view(np.uint32)
    bits ^= np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))  # so they order as the floats
    rank, places = np.empty(scores.shape, np.int32), np.arange(1, scores.shape[1] + 1, dtype=np.int32)
    for of_row, low, high in zip(rank, bits.astype(np.uint16), (bits >> 16).astype(np.uint16), strict=True):
        order = np.argsort(low, kind="stable")
        of_row[order[np.argsort(high[order], kind="stable")]] = places
    rank[observed] = 0
    return rank


def rank_discrepancy(rank_A, rank_B):
    """rank_A(i) - rank_B(i): by how many ranks B is ahead of A."""
    return rank_A - rank_B


def p_student_to_teacher(rank_T, rank_S, epsilon):
    """p_{S->T}(i|u), not normalised: exp((rank_T(i) - rank_S(i)) epsilon_e). Items the teacher shall learn.

    Mostly where the student is far ahead, but every unobserved item has its chance.
    """
    exponent = rank_discrepancy(rank_T, rank_S).astype(np.float32) * np.float32(epsilon)
    return np.exp(exponent - exponent.max(-1, keepdims=True, initial=-np.inf)) * (rank_T > 0)


def p_teacher_to_student(rank_T, rank_S, epsilon):
    """p_{T->S}(i|u), not normalised: tanh(max((rank_S(i) - rank_T(i)) epsilon_t, 0)).

    Items the student shall learn: wherever the teacher is ahead, and alike where it is far ahead.
    """
    ahead = np.maximum(rank_discrepancy(rank_S, rank_T).astype(np.float32) * np.float32(epsilon), 0)
    return np.tanh(ahead) * (rank_T > 0)


def weights_of(rank_T, rank_S, args):
    """What the items for the teacher and for the student are drawn in proportion to: two of [B, V].

    --sampling uniform takes all unobserved items alike, top the other model's TOP best ones. --sign published
    turns the discrepancies round: the published code numbers items in ascending order of score.
    """
    if args.sampling == "uniform":
        alike = (rank_T > 0).astype(np.float32)
        return alike, alike
    if args.sampling == "top":
        return tuple(((rank > 0) & (rank <= TOP)).astype(np.float32) for rank in (rank_S, rank_T))
    if args.sign == "published":
        rank_T, rank_S = rank_S, rank_T
    return p_student_to_teacher(rank_T, rank_S, args.epsilon_exp), p_teacher_to_student(
        rank_T, rank_S, args.epsilon_tanh
    )


def draw(weights, count, rng):
    """`count` items with replacement, item i (from 1) with probability weights[i - 1] / sum: int32 [count].

    All 0, which is padding, where no item has any weight.
    """
    cumulated = np.cumsum(weights, dtype=np.float64)
    if cumulated[-1] <= 0:
        return np.zeros(count, np.int32)
    return 1 + np.searchsorted(cumulated, rng.random(count) * cumulated[-1], side="right").astype(np.int32)


# ---- L_BD (section 3.1) ----------------------------------------------------------------------------------


def bd_loss(z_A, z_B, tau):
    """L_BD(A;B) = sum_i BCE(sigma(z^A_i), sigma(z^B_i / tau)) over drawn items; A learns, B does not."""
    return F.binary_cross_entropy_with_logits(z_A, (z_B.detach() / tau).sigmoid(), reduction="sum")


# ---- Base models -----------------------------------------------------------------------------------------
# `learn` gives L_CF, the sum over the observed items of a batch and how many these are, and `represent`s the
# users: z_ui is their product with the item vectors. `forward` is the contract of a model file


class BPR(nn.Module):
    """Matrix factorisation with the pairwise loss of Rendle et al., UAI 2009: z_ui = p_u . q_i."""

    def __init__(self, user_count, item_count, dim, max_length):
        super().__init__()
        self.p = nn.Embedding(user_count + 1, dim)
        self.q = nn.Embedding(item_count + 1, dim, padding_idx=0)
        nn.init.normal_(self.p.weight, std=0.01)
        nn.init.normal_(self.q.weight, std=0.01)
        with torch.no_grad():
            self.q.weight[0] = 0

    def item_vectors(self):
        """[V+1, d]."""
        return self.q.weight

    def represent(self, users, items):
        """users [B], items [B, T] -> [B, d]."""
        return self.p(users)

    def learn(self, users, items, negatives):
        """L_CF = -sum log sigma(z_ui - z_uj), number of i; representation. negatives [B, T, k]."""
        represented = self.p(users)
        z_i = torch.einsum("bd,btd->bt", represented, self.q(items))
        z_j = torch.einsum("bd,btkd->btk", represented, self.q(negatives))
        real = items > 0
        return -F.logsigmoid(z_i[..., None] - z_j)[real].sum(), real.sum(), represented

    def forward(self, users, items):
        """users [B], items [B, T] -> hidden [1, B, T, d], output [B, T, d], item_vectors [V+1, d]."""
        output = self.p(users)[:, None] + torch.zeros_like(items, dtype=torch.float32)[..., None]
        return output[None], output, self.q.weight


class CDAE(nn.Module):
    """Collaborative denoising autoencoder, Wu et al., WSDM 2016.

    z_ui = w'_i . sigma(W^T y_u + v_u + b) + b'_i; y_u is the history as a vector of zeros and ones, half of
    which are dropped in training.
    """

    def __init__(self, user_count, item_count, dim, max_length):
        super().__init__()
        self.W = nn.Embedding(item_count + 1, dim, padding_idx=0)
        self.v = nn.Embedding(user_count + 1, dim)
        self.b = nn.Parameter(torch.zeros(dim))
        self.w_and_b = nn.Parameter(torch.empty(item_count + 1, dim + 1))  # w'_i, and b'_i as the last column
        bound = 1 / math.sqrt(dim)
        nn.init.uniform_(self.W.weight, -1 / math.sqrt(item_count), 1 / math.sqrt(item_count))
        nn.init.uniform_(self.w_and_b, -bound, bound)
        with torch.no_grad():
            self.W.weight[0] = 0

    def item_vectors(self):
        """[V+1, d+1]."""
        return self.w_and_b

    def hidden(self, users, embedded):
        """sigma(W^T y + v_u + b) and a column of ones; embedded [B, ..., d] is W^T y."""
        v = self.v(users)[:, None] if embedded.ndim == 3 else self.v(users)
        h = (embedded + v + self.b).sigmoid()
        return torch.cat([h, torch.ones_like(h[..., :1])], -1)

    def represent(self, users, items):
        """users [B], items [B, T], none twice -> [B, d+1]; in training, half of the items count, doubly."""
        kept = F.dropout(torch.ones_like(items, dtype=torch.float32), 0.5, self.training)
        return self.hidden(users, (self.W(items) * kept[..., None]).sum(1))

    def learn(self, users, items, negatives):
        """L_CF = sum of BCE over observed items and negatives [B, T, k]; number of the observed; h_u."""
        represented = self.represent(users, items)
        z_i = torch.einsum("bd,btd->bt", represented, self.w_and_b[items])
        z_j = torch.einsum("bd,btkd->btk", represented, self.w_and_b[negatives])
        real = items > 0
        return -F.logsigmoid(z_i)[real].sum() - F.logsigmoid(-z_j)[real].sum(), real.sum(), represented

    def forward(self, users, items):
        """users [B], items [B, T] -> hidden [2, B, T, d], output [B, T, d+1], item_vectors [V+1, d+1]."""
        ordered, order = items.sort(dim=1, stable=True)
        again = (ordered == ordered.roll(1, 1)) & (torch.arange(items.shape[1], device=items.device) > 0)
        again = again.scatter(1, order, again)  # y_u is 1 for an item that comes twice
        embedded = self.W(items) * ~again[..., None]
        output = self.hidden(users, embedded.cumsum(1))
        return torch.stack([embedded, output[..., :-1]]), output, self.w_and_b


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


class Sequential(SASRec):
    """SASRec as a base model: z_ui is the score after the user's last item, L_CF its binary cross-entropy."""

    def __init__(self, user_count, item_count, dim, max_length):
        super().__init__(item_count, max_length, dim, 2, 1, 0.2)

    def item_vectors(self):
        """[V+1, d]."""
        return self.M.weight

    def last(self, items, output):
        """The output [B, d] after each history's last item, of output [B, T, d]."""
        return output[torch.arange(len(items), device=items.device), (items > 0).sum(1) - 1]

    def represent(self, users, items):
        """users [B], items [B, T] -> [B, d]."""
        return self.last(items, self.encode(items)[1])

    def learn(self, users, items, negatives):
        """L_CF = -sum [log sigma(r_target) + sum_j log(1 - sigma(r_j))]; number of targets; last output."""
        _, output = self.encode(items)
        real = items[:, 1:] > 0
        target, negatives = items[:, 1:][real], negatives[:, 1:][real]  # [N], [N, k]
        r_target = (output[:, :-1][real] * self.M(target)).sum(-1)
        r_j = torch.einsum("nd,nkd->nk", output[:, :-1][real], self.M(negatives))
        loss = -F.logsigmoid(r_target).sum() - F.logsigmoid(-r_j).sum()
        return loss, real.sum(), self.last(items, output)


BASES = {"sasrec": Sequential, "bpr": BPR, "cdae": CDAE}


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


def draw_negatives(users, seen, item_count, rng):
    """A uniform item that the user has not seen, for each entry of `users`: int64 of the same shape.

    `users` are indices; `seen` the training interactions as sorted numbers user * (item_count + 1) + item: a
    look-up is a binary search, and memory that of the interactions. Every user must have an unseen item.
    """
    drawn, wrong = rng.integers(1, item_count + 1, users.size), np.arange(users.size)
    while len(wrong):
        key = users.flat[wrong] * (item_count + 1) + drawn[wrong]
        wrong = wrong[seen[np.minimum(np.searchsorted(seen, key), len(seen) - 1)] == key]
        drawn[wrong] = rng.integers(1, item_count + 1, len(wrong))
    return drawn.reshape(users.shape)


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


def score_all(model, user_ids, items, begin, end, device):
    """Scores [B, V+1] of all items for users of histories items[begin:end]; column 0 is padding's."""
    users = torch.from_numpy(user_ids).to(device)
    return model.represent(users, pad_batch(items, begin, end).to(device)) @ model.item_vectors().T


@torch.no_grad()
def validation_ndcg(model, user_ids, items, begin, window, end, device):
    """NDCG@10 of the items at items[end], ranked among all that are not in items[begin:end].

    The model sees items[window:end], its last max_length ones.
    """
    model.eval()
    total, size = 0.0, max(1, min(256, 2**22 // len(model.item_vectors())))
    for k in range(0, len(end), size):
        part = slice(k, k + size)
        scores = score_all(model, user_ids[part], items, window[part], end[part], device)
        target = torch.from_numpy(items[end[part]]).to(device)
        rank = rank_of_target(scores, target, pad_batch(items, begin[part], end[part]).to(device))
        total += ((rank <= 10) / torch.log2(rank + 1)).sum().item()
    return total / len(end)


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


# ---- Training --------------------------------------------------------------------------------------------


class Learner:
    """A model with its optimizer and random numbers of its own: alone or with another, it draws the same."""

    def __init__(self, model, args, seed):
        self.model, self.k = model, args.samples
        self.rng = np.random.default_rng(seed)
        self.torch_state = torch.Generator().manual_seed(int(self.rng.integers(2**31))).get_state()
        self.restart(args)

    def restart(self, args):
        """A new optimizer and no best epoch yet, as bidirectional training begins."""
        self.best = self.best_weights = None
        parameters, rate = self.model.parameters(), args.learning_rate
        self.optimizer = torch.optim.Adam(parameters, rate, weight_decay=args.weight_decay, fused=True)

    def forward(self, users, histories, negatives):
        """L_CF of a batch by the number of its observed items, that number, the representation of users."""
        torch.set_rng_state(self.torch_state)
        loss, count, represented = self.model.learn(users, histories, negatives)
        self.torch_state = torch.get_rng_state()
        return loss / count, count, represented

    def logits(self, represented, items):
        """z_ui of items [B, n] for users represented by [B, e]: [B, n]."""
        return torch.einsum("be,bne->bn", represented, F.embedding(items, self.model.item_vectors()))

    def step(self, loss, epoch):
        """Follow the gradient of `loss`."""
        if not math.isfinite(loss.item()):
            raise BadInput(f"the loss became {loss.item()} in epoch {epoch}; lower --learning-rate")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def judge(self, ndcg, epoch):
        """Keep the weights if their validation NDCG@10 is the best so far."""
        if self.best is None or ndcg > self.best["NDCG@10"]:
            self.best = {"epoch": epoch, "NDCG@10": ndcg}
            self.best_weights = copy.deepcopy(self.model.state_dict())


class Data:
    """The training part of an interaction log, as batches of whole histories."""

    def __init__(self, args, rng):
        self.user_ids, self.starts, self.items = read_interactions(args.data)
        self.item_count, self.user_count = int(self.items.max()), int(self.user_ids.max())
        self.end, self.evaluated = leave_one_out(self.starts)
        self.begin, self.device, self.rng = self.starts[:-1], args.device, rng
        self.users = np.flatnonzero(self.end - self.begin >= 2)
        if len(self.users) == 0 or not self.evaluated.any():
            why = "no user has 3 interactions, or none has 2 to train on; take a larger log"
            raise BadInput(f"{args.data}: {why}")
        longest = int((self.end - self.begin).max())
        self.max_length = args.max_length if args.base == "sasrec" else longest + 2  # test histories, too
        self.window = np.maximum(self.begin, self.end - self.max_length)
        owner = np.repeat(np.arange(len(self.user_ids)), np.diff(self.starts))
        known = np.arange(len(self.items)) < self.end[owner]
        self.seen = np.unique(owner[known] * (self.item_count + 1) + self.items[known])
        full = np.flatnonzero(np.bincount(self.seen // (self.item_count + 1)) == self.item_count)
        if len(full):
            raise BadInput(
                f"{args.data}: user {self.user_ids[full[0]]} has seen every item, so there is none to teach; "
                "leave that user out"
            )

    def batches(self, size):
        """Shuffled batches of users, of like length, as indices."""
        order = self.rng.permutation(self.users)
        length = (self.end - self.window)[order]
        order = order[np.argsort(length // 16, kind="stable")]
        batches = [order[k : k + size] for k in range(0, len(order), size)]
        return [batches[k] for k in self.rng.permutation(len(batches))]

    def histories(self, batch):
        """Ids [B] and training histories [B, T] of a batch of users."""
        users = torch.from_numpy(self.user_ids[batch]).to(self.device)
        return users, pad_batch(self.items, self.window[batch], self.end[batch]).to(self.device)

    def negatives(self, batch, width, k, rng):
        """k unseen items beside each observed one: [B, width, k]."""
        owners = np.broadcast_to(batch[:, None, None], (len(batch), width, k))
        drawn = draw_negatives(np.ascontiguousarray(owners), self.seen, self.item_count, rng)
        return torch.from_numpy(drawn).to(self.device)

    def validate(self, learner):
        """Validation NDCG@10 of a learner's model."""
        k = np.flatnonzero(self.evaluated)
        return validation_ndcg(
            learner.model,
            self.user_ids[k],
            self.items,
            self.begin[k],
            self.window[k],
            self.end[k],
            self.device,
        )


@torch.no_grad()
def renew(teacher, student, data, args, epochs, rng):
    """Rank all items by both models, and draw the items of the coming `epochs`, a slice of users at a time.

    Returns for each direction the drawn items, int32 [epochs, total], user k's at offsets[k]:offsets[k + 1]
    (--samples for each training item); and what the paper observed: the share of users whose validation item
    the student ranks better than the teacher, and the mean discrepancy of the items drawn for each.
    """
    teacher.model.eval()
    student.model.eval()
    size = np.zeros(len(data.user_ids), np.int64)
    size[data.users] = (data.end - data.window)[data.users] * args.samples
    offsets = np.append(0, np.cumsum(size))
    drawn = [np.zeros((epochs, offsets[-1]), np.int32) for _ in range(2)]
    better, asked, gap, draws = 0, 0, np.zeros(2), np.zeros(2)
    rows = max(1, min(256, SCORES // data.item_count))
    for first in range(0, len(data.users), rows):
        batch = data.users[first : first + rows]
        observed = np.zeros((len(batch), data.item_count), bool)
        history = pad_batch(data.items, data.begin[batch], data.end[batch]).numpy()
        at = np.nonzero(history)
        observed[at[0], history[at] - 1] = True
        ids, part = data.user_ids[batch], (data.items, data.window[batch], data.end[batch])
        rank_T, rank_S = (
            ranks(score_all(learner.model, ids, *part, data.device)[:, 1:].cpu().numpy(), observed)
            for learner in (teacher, student)
        )
        weights = weights_of(rank_T, rank_S, args)
        for row, user in enumerate(batch):
            ahead = rank_discrepancy(rank_T[row], rank_S[row])  # of the student
            place = slice(offsets[user], offsets[user + 1])
            for side, sign in ((0, 1), (1, -1)):
                items = draw(weights[side][row], epochs * size[user], rng)
                drawn[side][:, place] = items.reshape(epochs, -1)
                real = items[items > 0] - 1
                gap[side], draws[side] = gap[side] + sign * ahead[real].sum(), draws[side] + len(real)
            if data.evaluated[user] and rank_T[row, data.items[data.end[user]] - 1] > 0:
                asked, better = asked + 1, better + (ahead[data.items[data.end[user]] - 1] > 0)
    return drawn, offsets, better / max(1, asked), gap / np.maximum(1, draws)


def drawn_of(drawn, offsets, batch, device):
    """The drawn items of a batch of users, padded with 0: int64 [B, n]."""
    return pad_batch(drawn.astype(np.int64), offsets[batch], offsets[batch + 1]).to(device)


def taught(learner, of_learner, other, of_other, items, tau):
    """L_BD(learner; other) of users represented [B, e] by both, over drawn items [B, n], 0 for padding."""
    real = items > 0
    z_A, z_B = learner.logits(of_learner, items), other.logits(of_other, items)
    return bd_loss(z_A[real], z_B[real], tau)


def train(args):
    """Warm up, train both ways, write both model files and the log. Raises BadInput."""
    began = time.time()
    paths = {kind: f"{args.out}-{kind}.pt2" for kind in ("teacher", "student")}
    log_path = f"{args.out}.log.jsonl"
    for path in (*paths.values(), log_path):
        check_writable(path)
    data, rng = Data(args, np.random.default_rng([args.seed, 0])), np.random.default_rng([args.seed, 1])
    learners = {}
    for number, (kind, dim) in enumerate((("teacher", args.teacher_dim), ("student", args.student_dim))):
        torch.manual_seed(args.seed * 2 + number)
        model = BASES[args.base](data.user_count, data.item_count, dim, data.max_length).to(args.device)
        learners[kind] = Learner(model, args, [args.seed, 2 + number])
    teacher, student = learners["teacher"], learners["student"]
    sizes = [sum(p.numel() for p in learner.model.parameters()) for learner in learners.values()]
    print(
        f"{args.data}: {len(data.user_ids):,} users, {data.item_count:,} items, {len(data.items):,} "
        f"interactions; {args.base}, teacher of {sizes[0]:,} and student of {sizes[1]:,} parameters, "
        f"on {args.device}",
        flush=True,
    )
    if sizes[1] > sizes[0]:
        print("note: the student is larger than the teacher; lower --student-dim", file=sys.stderr)

    data_sha256, log, progress = sha256_of(args.data), [], Progress()
    warm_up = args.warm_up
    if args.warm_up_from:
        load_warm_up(args, learners, data, data_sha256)
        warm_up = 0
    last = warm_up + args.epochs
    drawn = None
    for epoch in range(1, last + 1):
        tick, bd = time.time(), epoch - warm_up  # bd: epoch of bidirectional training
        line, both = {"epoch": epoch}, bd > 0 and args.direction != "none"
        if bd == 1:
            for learner in learners.values():
                learner.restart(args)
        if both and (bd - 1) % args.period == 0:
            coming = min(args.period, args.epochs - bd + 1)
            drawn, offsets, better, gap = renew(teacher, student, data, args, coming, rng)
            line |= {"student_better": better, "gap_to_teacher": gap[0], "gap_to_student": gap[1]}
            line |= {"renewal_seconds": time.time() - tick}
            progress.line(
                f"ranks renewed in {time.time() - tick:.1f} s: the student ranks {better:.1%} of validation "
                f"items better; items drawn for the teacher rank {gap[0]:.0f} better with the student, those "
                f"for the student {gap[1]:.0f} better with the teacher"
            )
        totals, batches = np.zeros(4), data.batches(args.batch_size)
        for learner in learners.values():
            learner.model.train()
        for step, batch in enumerate(batches, 1):
            users, histories = data.histories(batch)
            width, out = histories.shape[1], {}
            for kind, learner in learners.items():
                negatives = data.negatives(batch, width, args.samples, learner.rng)
                out[kind] = learner.forward(users, histories, negatives)
            (l_t, count, of_T), (l_s, _, of_S) = out["teacher"], out["student"]
            l_st = l_ts = torch.zeros((), device=args.device)
            if both and args.direction != "teacher-to-student":
                items = drawn_of(drawn[0][(bd - 1) % args.period], offsets, batch, args.device)
                l_st = taught(teacher, of_T, student, of_S, items, args.temperature) / count
            if both and args.direction != "student-to-teacher":
                items = drawn_of(drawn[1][(bd - 1) % args.period], offsets, batch, args.device)
                l_ts = taught(student, of_S, teacher, of_T, items, args.temperature) / count
            # both losses are made before either model moves
            teacher.step(l_t + args.lambda_teacher * l_st, epoch)
            student.step(l_s + args.lambda_student * l_ts, epoch)
            totals += [part.item() for part in (l_t, l_st, l_s, l_ts)]
            progress.show(f"epoch {epoch} of {last}, batch {step} of {len(batches)}")
        parts = ("L_CF(T)", "L_BD(T;S)", "L_CF(S)", "L_BD(S;T)")
        line |= dict(zip(parts, (totals / len(batches)).tolist(), strict=True))
        # a long warm-up is not judged every epoch: that would take longer than the epoch itself
        if bd > 0 or epoch == last or epoch % args.period == 0:
            tick_of_validation = time.time()
            for kind, learner in learners.items():
                line[f"{kind}_NDCG@10"] = data.validate(learner)
                learner.judge(line[f"{kind}_NDCG@10"], epoch)
            line["validation_seconds"] = time.time() - tick_of_validation
        line["seconds"] = time.time() - tick
        log.append(line)
        if "teacher_NDCG@10" in line:
            progress.line(
                f"epoch {epoch:3} {'warm-up' if bd <= 0 else ''}  "
                + "  ".join(f"{part} {line[part]:.4f}" for part in parts if line[part])
                + f"  validation NDCG@10 teacher {line['teacher_NDCG@10']:.4f} student "
                f"{line['student_NDCG@10']:.4f}  {line['seconds']:.1f} s; "
                f"{(last - epoch) * (time.time() - began) / epoch / 60:.1f} min left"
            )

    for kind, learner in learners.items():
        if learner.best_weights:
            learner.model.load_state_dict(learner.best_weights)
        paths_out = ("data", "out", "warm_up_from")
        config = {
            "items": data.item_count,
            "max_length": data.max_length,
            "stage": "bidirectional_distill",
            "role": kind,
            "settings": {k: v for k, v in vars(args).items() if k not in paths_out},
            "data_sha256": data_sha256,
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
            "validation": learner.best,
        }
        content = export_model(learner.model, data.max_length, config)
        write_atomically(paths[kind], lambda path, content=content: path.write_bytes(content))
        if learner.best:
            print(
                f"{paths[kind]}: epoch {learner.best['epoch']}, validation NDCG@10 "
                f"{learner.best['NDCG@10']:.4f}"
            )
    write_atomically(log_path, lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in log)))
    print(f"{(time.time() - began) / 60:.1f} min")


def load_warm_up(args, learners, data, data_sha256):
    """Give both learners the weights of --warm-up-from. Raises BadInput if these do not fit."""
    for kind, learner in learners.items():
        path = f"{args.warm_up_from}-{kind}.pt2"
        program, config = load_model(path, data.user_count, data.item_count, args.device)
        settings = config.get("settings", {})
        if config.get("stage") != "bidirectional_distill" or settings.get("base") != args.base:
            raise BadInput(f"{path} is no {args.base} model of this script; run without --warm-up-from")
        if config.get("data_sha256") != data_sha256:
            raise BadInput(f"{path} was trained on other data than {args.data}; warm up on these")
        weights = dict(program.state_dict())
        mine = learner.model.state_dict()
        if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in mine.items()}:
            raise BadInput(f"{path} has other sizes; give its --teacher-dim, --student-dim and --max-length")
        learner.model.load_state_dict(weights)


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
        description="Train a large and a small model that learn from each other, Bidirectional Distillation: "
        "L_T = L_CF(T) + lambda_T L_BD(T;S), L_S = L_CF(S) + lambda_S L_BD(S;T). Options without a default "
        "have one for each --base.",
        epilog="example: python bidirectional_distill.py data/ml-100k.txt --out runs/bd",
    )
    add = parser.add_argument
    positive = 1e-12
    by_base = {
        name: ", ".join(f"{SETTINGS[base][name]} {base}" for base in SETTINGS) for name in SETTINGS["bpr"]
    }
    add("data", help="interactions, `user item` a row: .txt or .npy (data/README.md)")
    add("--out", required=True, help="what OUT-teacher.pt2, OUT-student.pt2 and OUT.log.jsonl begin with")
    add("--base", choices=BASES, default="sasrec", help="kind of both models (sasrec)")
    for name, kind, low, what in (
        ("teacher_dim", int, 1, "size of the teacher's vectors"),
        ("student_dim", int, 1, "size of the student's vectors"),
        ("learning_rate", float, positive, "of Adam"),
        ("temperature", float, positive, "tau: the other model's logits are divided by it"),
        ("epsilon_exp", float, positive, "epsilon_e of p_S->T"),
        ("epsilon_tanh", float, positive, "epsilon_t of p_T->S"),
        ("batch_size", int, 1, "users a step"),
        ("samples", int, 1, "uniform negatives, and drawn items of each direction, an observed item"),
        ("warm_up", int, 0, "epochs alone"),
        ("epochs", int, 0, "epochs together; 0 writes the warmed up models"),
    ):
        add(f"--{name.replace('_', '-')}", type=number(kind, low), help=f"{what} ({by_base[name]})")
    add("--lambda-teacher", type=number(float, 0), default=0.5, help="lambda_S->T, weight of L_BD(T;S) (0.5)")
    add("--lambda-student", type=number(float, 0), default=0.5, help="lambda_T->S, weight of L_BD(S;T) (0.5)")
    add("--period", type=number(int, 1), default=10, help="p: epochs between renewals of the ranks (10)")
    directions = ["both", "teacher-to-student", "student-to-teacher", "none"]
    add("--direction", choices=directions, default="both", help="who teaches whom; none: both alone (both)")
    add(
        "--sampling",
        choices=["rank", "uniform", "top"],
        default="rank",
        help=f"of items: by rank discrepancy, all alike, or the {TOP} best of the one who teaches (rank)",
    )
    add(
        "--sign",
        choices=["paper", "published"],
        default="paper",
        help="of the rank discrepancy; the published code has it the other way round (paper)",
    )
    add(
        "--warm-up-from",
        metavar="OUT",
        help="begin with the models that an earlier run wrote under this name",
    )
    add("--max-length", type=number(int, 2), default=50, help="most recent items that sasrec sees (50)")
    add("--weight-decay", type=number(float, 0), default=0.0, help="of Adam (0)")
    add("--seed", type=number(int, 0), default=0, help="same seed, data and machine: same files (0)")
    add(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where (cuda if there is one)",
    )
    args = parser.parse_args(argv)
    for name, value in SETTINGS[args.base].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise BadInput("no CUDA device was found; use --device cpu")
        train(args)
    except BadInput as error:
        print(f"bidirectional_distill.py: {error}", file=sys.stderr)
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
