"""The equations of L in float64, without code of the scripts, for test_search.py and test_distill.py."""

import numpy as np
import torch


def training_windows(histories, max_length):
    """Each user's last max_length + 1 training items. The last two of three items or more are held out."""
    training = {user: items[:-2] if len(items) > 2 else items for user, items in histories.items()}
    return {u: torch.tensor(items[-max_length - 1 :]) for u, items in training.items() if len(items) > 1}


def inputs_and_targets(windows):
    """Inputs [B, T], padded with 0 on the right, and the next item of each input [N]."""
    inputs = torch.nn.utils.rnn.pad_sequence([items[:-1] for items in windows], batch_first=True)
    return inputs, torch.cat([items[1:] for items in windows])


def negative_probabilities(windows, num_items):
    """Q [V+1]: half the share of the training items, half uniform."""
    counts = np.bincount(torch.cat(windows), minlength=num_items + 1)
    return (counts / counts.sum() + np.append(0, np.full(num_items, 1 / num_items))) / 2


def items_of_softmax(k, Q, rng):
    """The items of a softmax beside the target: all, or k from Q. The expected count of each item [V+1]."""
    return (rng.choice(len(Q), k, p=Q).tolist(), k * Q) if k else (range(1, len(Q)), np.ones(len(Q)))


def cheapest_flow(w_S, w_T, D):
    """The cheapest flow [2, L_T] from two student layers, without a solver."""
    first = np.zeros(len(w_T))
    for j in np.argsort(D[0] - D[1]):  # layer 1 first takes what is cheapest for it against layer 2
        first[j] = min(w_T[j], w_S[0] - first.sum())
    return np.stack([first, w_T - first])


def updated_weights(w, paid):
    """Cost attention: softmax_i of (sum_k c_k / c_i) / 10. c_i counts as a hundredth of the sum at least."""
    c = paid / w
    if not c.any():
        return np.full(len(w), 1 / len(w))
    exp = np.exp(c.sum() / np.maximum(c, c.sum() / 100) / 10)
    return exp / exp.sum()


def probabilities(output, vectors, items, counts):
    """The softmax over the scores of `items`, each of which stands for 1 / counts."""
    weight = (output @ vectors[items].T).exp() / counts
    return weight / weight.sum()


def loss_terms(student, teacher, inputs, target, items, counts, W, w, distance="kl", flow_of=cheapest_flow):
    """L_CE, L_emb, L_hid and L_pred; the flow; the layer weights after it. Without a teacher, only L_CE.

    student and teacher: hidden [L+1, B, T, d], output [B, T, e] and item vectors [V+1, e], at inputs [B, T].
    The softmax is over the target and the `items` that differ from it. An item stands for 1 / counts[item].
    """
    real, l_ce, l_pred = inputs > 0, 0, 0
    for n, own in enumerate(target.tolist()):
        negatives = [item for item in items if item != own]
        scored = [own, *negatives], torch.tensor([1.0, *counts[negatives]])
        p = probabilities(student[1][real][n], student[2], *scored)
        l_ce = l_ce - p[0].log() / len(target)
        if teacher:
            q = probabilities(teacher[1][real][n], teacher[2], *scored)
            l_pred = l_pred + (q * (q / p).log()).sum() / len(target)
    if not teacher:
        return [l_ce], np.zeros(0), w
    (W_e, W_h), (w_S, w_T), hidden, hidden_T = W, w, student[0][:, real], teacher[0][:, real]
    l_emb = (hidden[0] @ W_e.weight.T + W_e.bias - hidden_T[0]).pow(2).mean()
    H, H_T = (hidden[1:] @ W_h.weight.T + W_h.bias)[:, None], hidden_T[None, 1:]
    p, q = H.softmax(-1), H_T.softmax(-1)
    D = (q * (q / p).log()).sum(-1).mean(-1) if distance == "kl" else (H - H_T).pow(2).mean((2, 3))
    cost = D.detach().numpy()
    flow = flow_of(w_S, w_T, cost)
    w = updated_weights(w_S, (flow * cost).sum(1)), updated_weights(w_T, (flow * cost).sum(0))
    return [l_ce, l_emb, (torch.tensor(flow) * D).sum(), l_pred], flow, w
