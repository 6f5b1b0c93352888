"""Proposals with a known density ratio, and tests of what is chosen from them."""

import math

import torch
from scipy import stats
from torch import nn

import fastrefine as fr

# Data N(M, S^2), generator N(0, 1): the optimal logit is known, and exp(SUP) bounds the density ratio.
M, S = 0.5, 0.7
SUP = math.log(1 / S) + M * M / (2 * (1 - S * S))
ALPHA = 1e-4  # false-alarm rate of each statistical test, at a fixed seed


def optimal_logit(x):
    return -0.5 * ((x - M) / S) ** 2 - math.log(S) + 0.5 * x**2


def proposals(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def p_value(x):
    return stats.kstest((x.numpy() - M) / S, "norm").pvalue


def acceptance(d, indices):
    """A p-value for: the proposals were accepted independently with probabilities ``d``. 20 bins of equal expectation."""
    order = torch.argsort(d)
    accepted = torch.zeros_like(d).index_fill(0, indices, 1.0)[order]
    probability = d[order]
    bins = (probability.cumsum(0) / probability.sum() * 20).long().clamp(max=19)
    sums = [
        torch.zeros(20, dtype=torch.float64).index_add(0, bins, x)
        for x in (accepted, probability, probability * (1 - probability))
    ]
    known = sums[2] > 0
    return stats.chi2.sf(float(((sums[0] - sums[1])[known] ** 2 / sums[2][known]).sum()), int(known.sum()))


def drs(d, percentile, log_m=None):
    """The acceptance probabilities, one at a time in plain Python."""
    highest, scores = -math.inf if log_m is None else log_m, []
    everything = max(d.tolist())
    for x in d.tolist():
        highest = everything if log_m is None else max(highest, x)
        delta = x - highest
        scores.append(delta - math.log(1 - math.exp(delta - 1e-6)))
    scores = torch.tensor(scores, dtype=torch.float64)
    return torch.sigmoid(scores - torch.quantile(scores, percentile / 100))


def samples(n, m, seed=0):
    """Optimal logits of n real and m generated numbers."""
    return optimal_logit(M + S * proposals(n, seed)), optimal_logit(proposals(m, seed + 1))


# A conditional pair in closed form: G(z, y) = z + CENTRES[y], data of class y N(CENTRES[y] + SHIFTS[y], 1), optimal D(x, y).
CENTRES = torch.tensor([[0.0, 3.0], [2.0, -1.0], [-4.0, 0.0]])
SHIFTS = torch.tensor([[0.5, 0.0], [0.0, -0.5], [-0.3, 0.3]])


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.centre = nn.Embedding.from_pretrained(CENTRES)

    def forward(self, z, labels):
        return z + self.centre(labels)


class Discriminator(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.slope = nn.Embedding.from_pretrained(scale * SHIFTS)
        constant = -(SHIFTS * CENTRES).sum(1) - 0.5 * (SHIFTS**2).sum(1)
        self.constant = nn.Embedding.from_pretrained(scale * constant[:, None])

    def forward(self, x, labels):
        return (x * self.slope(labels)).sum(1) + self.constant(labels)[:, 0]


def conditional(scale=1.0, **options):
    defaults = dict(sampler=fr.Collaborative(0.1), prior=fr.Normal(2), num_slots=256, max_steps=0)
    return fr.Refiner(Generator(), Discriminator(scale), **{**defaults, **options})


def real_images(labels, seed=3):
    noise = torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(seed))
    return CENTRES[labels] + SHIFTS[labels] + noise


def along_the_shift(images, labels):
    """Standard normal where images follow the data of their class."""
    direction = SHIFTS / SHIFTS.norm(dim=1, keepdim=True)
    return ((images - CENTRES[labels] - SHIFTS[labels]) * direction[labels]).sum(1).double().numpy()
