"""Divergences between p = softmax(teacher / T) and q = softmax(student / T), from logits, sparse teachers or hidden states."""

import math

import torch

from oracles.relations import MINUS_INFINITY

KINDS = ("forward_kl", "reverse_kl", "skew_kl", "jsd", "tvd", "soft_ce", "mse")


def kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def mixture(log_p, log_q, weight):
    """log(weight p + (1 - weight) q)"""
    return torch.logaddexp(log_p + (math.log(weight) if weight else -math.inf), log_q + math.log(1 - weight))


def compare(log_p, log_q, kind, beta, alpha):
    m = mixture(log_p, log_q, beta if kind == "jsd" else alpha)
    return {
        "forward_kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "skew_kl": lambda: kl(log_p, m),  # DistiLLM
        "jsd": lambda: beta * kl(log_p, m) + (1 - beta) * kl(log_q, m),  # GKD
        "tvd": lambda: (log_p.exp() - log_q.exp()).abs().sum(-1) / 2,
        "soft_ce": lambda: -(log_p.exp() * log_q).sum(-1),
    }[kind]()


def divergence(student, teacher, kind, temperature, t_squared, beta, alpha):
    """Logits [..., V] -> [...]. What is -inf on both sides does not exist."""
    if kind == "mse":
        return (
            torch.where((student == teacher).detach(), 0 * student.nan_to_num(neginf=0), student - teacher)
            .square()
            .sum(-1)
        )
    log_q, log_p = (torch.log_softmax(x.clamp_min(MINUS_INFINITY) / temperature, -1) for x in (student, teacher))
    return compare(log_p, log_q, kind, beta, alpha) * (temperature**2 if t_squared else 1)


def sparse_divergence(student, indices, log_probs, tail, kind, temperature, t_squared, beta, alpha):
    """k tokens of the teacher's, and the others as one more token: without mass (tail None), or with the tail's."""
    log_q = torch.log_softmax(student / temperature, -1)
    others = torch.ones_like(log_q).scatter(-1, indices, 0) == 0
    rest = log_q.masked_fill(others, MINUS_INFINITY).logsumexp(-1, keepdim=True)
    log_q = torch.cat([log_q.gather(-1, indices), rest], -1)  # [..., k + 1]
    if tail is None:
        left = torch.full_like(rest, MINUS_INFINITY)
    else:
        left = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp_min(0).log() if tail is True else tail[..., None]
    log_p = torch.cat([log_probs, left.clamp_min(MINUS_INFINITY)], -1).to(log_q)
    log_p = log_p if tail is None else torch.log_softmax(log_p, -1)
    return compare(log_p, log_q, kind, beta, alpha) * (temperature**2 if t_squared else 1)


def logits(hidden, head, bias, scale=1.0, cap=None):
    x = hidden @ head.T + (0 if bias is None else bias)
    return x * scale if cap is None else cap * torch.tanh(x * scale / cap)


def cross_entropy(student, labels):
    return -torch.log_softmax(student, -1).gather(-1, labels[..., None])[..., 0]
