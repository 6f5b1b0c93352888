"""[CS] Alg. 1 for one sample at a time, with plain autograd and no engine code."""

import math

import torch
import torch.nn.functional as F
from torch import nn

import fastrefine as fr

LOSS = {
    "nonsaturating": lambda d: F.softplus(-d),
    "minimax": lambda d: -F.softplus(d),
    "wasserstein": lambda d: -d,
    "least_squares": lambda d: 0.5 * (d - 1) ** 2,
}
CUTS = {"input": 0, "1": 2, "3": 4, "output": 6}
K = 8


def networks():
    torch.manual_seed(3)
    g = nn.Sequential(nn.Linear(4, 24), nn.BatchNorm1d(24), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 6), nn.Tanh())
    d = nn.Sequential(nn.Linear(6, 24), nn.LeakyReLU(0.2), nn.Linear(24, 24), nn.Softplus(), nn.Linear(24, 1))
    with torch.no_grad():
        g[1].running_mean.normal_()
        g[1].running_var.uniform_(0.5, 2)
        d[4].weight.mul_(6)
    return g.double().eval(), d.double().eval()


def evaluate(tail, d, loss, a):
    a = a.clone().requires_grad_()
    logit = d(tail(a[None]))[0, 0]
    value = LOSS[loss](logit)
    (grad,) = torch.autograd.grad(value, a)
    return logit.item(), value.item(), grad


def refine_one(tail, d, a, sampler, threshold, max_steps, real_score=0.0, reference=None):
    """[CS] Alg. 1 for one activation: (activation, logit, steps), and the optimizers of TARGETS 1.2."""
    step_size, optimizer, clamp = sampler.step_size, sampler.optimizer, sampler.clamp
    project = (lambda x: x) if clamp is None else (lambda x: x.clamp(*clamp))
    logit, value, grad = evaluate(tail, d, sampler.loss, a)
    best, m, v, gap = (a, logit, value, grad), None, None, None
    for k in range(max_steps + 1):
        if logit >= threshold or k == max_steps:
            return a, logit, k
        if sampler.control == "backtracking":
            trial = project(best[0] - step_size * best[3])
            seen = evaluate(tail, d, sampler.loss, trial)
            if seen[1] <= best[2]:
                best, step_size = (trial, *seen), step_size * 1.2
            else:
                step_size = step_size * 0.5
            a, logit = best[0], best[1]
            continue
        if sampler.control == "barzilai_borwein":
            trial = project(best[0] - step_size * best[3])
            seen = evaluate(tail, d, sampler.loss, trial)
            if seen[1] <= best[2]:
                move, change = trial - best[0], seen[2] - best[3]
                bent = float((move * change).sum())
                wanted = float((move * move).sum()) / bent if bent > 0 else 2 * step_size
                best, step_size = (trial, *seen), min(max(wanted, 0.2 * step_size), 5 * step_size)
            else:
                step_size = step_size * 0.5
            a, logit = best[0], best[1]
            continue
        if optimizer == "sgd":
            lead = 1.0
            if sampler.adaptive:
                lead = max(0.0, 1 / (1 + math.exp(-reference)) - 1 / (1 + math.exp(-logit)))
            a = a - step_size * lead * grad
        elif optimizer == "momentum":
            m = step_size * grad if m is None else sampler.momentum * m + step_size * grad
            a = a - m
        elif optimizer == "adam":
            m = 0.1 * grad if m is None else 0.9 * m + 0.1 * grad
            v = 0.001 * grad**2 if v is None else 0.999 * v + 0.001 * grad**2
            a = a - step_size * (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
        else:
            now = real_score - 1 / (1 + math.exp(-logit))
            m = grad if m is None else 0.9 * m + 0.1 * grad
            v = grad**2 if v is None else 0.5 * v + 0.5 * grad**2
            gap = now if gap is None else 0.5 * gap + 0.5 * now
            a = a - step_size * m / (v.sqrt() + 1e-8) * max(gap + 0.5, 0.0) ** 2
        a = project(a)
        logit, _, grad = evaluate(tail, d, sampler.loss, a)
    raise AssertionError


SAMPLERS = {
    "backtracking": fr.Collaborative(step_size=0.3),
    "barzilai_borwein": fr.Collaborative(step_size=0.3, control="barzilai_borwein"),
    "fixed": fr.Collaborative(step_size=0.6, control="fixed"),
    "minimax": fr.Collaborative(step_size=0.6, loss="minimax", control="fixed"),
    "wasserstein": fr.Collaborative(step_size=0.4, loss="wasserstein", control="fixed"),
    "least_squares": fr.Collaborative(step_size=0.2, loss="least_squares", control="fixed"),
    "momentum": fr.Collaborative(step_size=0.3, optimizer="momentum"),
    "adam": fr.Collaborative(step_size=0.02, optimizer="adam"),
    "ladam": fr.Collaborative(step_size=0.2, optimizer="ladam"),
    "adaptive": fr.Collaborative(step_size=2.0, adaptive=True),
    "clamped": fr.Collaborative(step_size=0.3, clamp=(-0.5, 0.0)),
}


class Mixed(fr.stopping.StopRule):
    """A threshold, and a last step drawn per sample: samples retire at all times and for both reasons."""

    def __init__(self, threshold):
        self.threshold = threshold

    def draw(self, ids, seed, max_steps, labels=None):
        threshold, _ = fr.stopping.Threshold(self.threshold).draw(ids, seed, max_steps)
        return threshold, fr.stopping.UniformStep().draw(ids, seed, max_steps)[1]


def oracle(name, at, n):
    g, d = networks()
    sampler = SAMPLERS[name]
    z = fr.Normal(4).sample(torch.arange(n), 5, torch.float64)
    real = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    real_logits = d(real).detach()[:, 0]
    prefix, tail = g[: CUTS[at]], g[CUTS[at] :]
    references = fr.stopping.ReferenceSample(real_logits).draw(torch.arange(n), 5, K)[0]

    threshold = d(g(z)).detach().quantile(0.7).item()
    score = torch.sigmoid(real_logits).mean().item()
    last_steps = Mixed(threshold).draw(torch.arange(n), 5, K)[1].tolist()
    rows = [
        refine_one(tail, d, a, sampler, threshold, last, score, r.item())
        for a, r, last in zip(prefix(z).detach(), references, last_steps, strict=True)
    ]
    images = torch.stack([tail(a[None])[0] for a, _, _ in rows]).detach()
    return (
        g,
        d,
        real,
        threshold,
        images,
        torch.tensor([r[1] for r in rows], dtype=torch.float64),
        torch.tensor([r[2] for r in rows]),
    )
