"""Targets whose laws are known: discriminators as modules, exact laws after K steps, tests of samples against them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

import fastrefine as fr
from tests.support.step_machine import device_of

# Data N(M, S^2), generator N(0, 1). N samples: the variance test has power .999 against 2.3 % more variance, KS alone
# against 7 %, the test of the mean against .016 standard deviations.
M, S, N = 0.5, 0.7, 200_000
ALPHA = 1e-4  # false-alarm rate of each statistical test, at a fixed seed
BACKENDS = ("reference", "cpu")
GRID = 800


class Quadratic(nn.Module):
    """d(x) = sum over elements of square x^2 + slope x."""

    def __init__(self, square: float, slope: float):
        super().__init__()
        self.square, self.slope = square, slope

    def forward(self, x: Tensor) -> Tensor:
        return (self.square * x * x + self.slope * x).flatten(1).sum(1, keepdim=True)


def optimal() -> Quadratic:
    """log N(M, S^2) - log N(0, 1) of every element, up to a constant."""
    return Quadratic(0.5 - 0.5 / S**2, M / S**2)


def flat() -> Quadratic:
    """Constant, but for a gradient that no test can see: none at all is refused."""
    return Quadratic(0.0, 1e-9)


class Sigmoid(nn.Module):
    """s(d) where d is wanted; the constant keeps it from being recognised and refused."""

    def __init__(self, logit: nn.Module):
        super().__init__()
        self.logit = logit

    def forward(self, x: Tensor) -> Tensor:
        return 10 + torch.sigmoid(self.logit(x))


class Gaussians(nn.Module):
    """d = log p_data - log N(0, I) for a mixture of normals in the plane."""

    def __init__(self, mixture: Mixture):
        super().__init__()
        self.sd = mixture.sd
        self.register_buffer("centres", torch.as_tensor(mixture.centres))
        self.register_buffer("log_weights", torch.as_tensor(np.log(mixture.weights)))

    def forward(self, x: Tensor) -> Tensor:
        square = ((x[:, None] - self.centres) ** 2).sum(2)
        return (torch.logsumexp(self.log_weights - square / (2 * self.sd**2), 1) + 0.5 * (x * x).sum(1))[:, None]


class Mixture:
    """25 normals of sd .15 on a 5 x 5 grid of spacing .6, with weights 1 to 3."""

    sd = 0.15
    axis = 0.6 * np.arange(-2, 3)
    centres = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    weights = np.linspace(1, 3, 25) / np.linspace(1, 3, 25).sum()

    def draw(self, n: int, seed: int) -> Tensor:
        rng = np.random.default_rng(seed)
        return torch.from_numpy(self.centres[rng.choice(25, n, p=self.weights)] + self.sd * rng.standard_normal((n, 2)))

    @property
    def shares(self) -> np.ndarray:
        """(25,) mass of the cells around the centres."""
        middles = np.concatenate([[-np.inf], (self.axis[1:] + self.axis[:-1]) / 2, [np.inf]])
        mass = np.diff(stats.norm.cdf((middles - self.axis[:, None]) / self.sd), axis=1)  # (own centre, nearest centre)
        return np.einsum("ij,ik,jl->kl", self.weights.reshape(5, 5), mass, mass).ravel()

    def nearest(self, x: Tensor) -> np.ndarray:
        """(n,) which centre is the nearest."""
        return np.argmin(((x.numpy()[:, None] - self.centres) ** 2).sum(2), 1)

    def p_value(self, x: Tensor) -> float:
        """Smallest p value of: chi-square of the cells around the centres; the squared distance to the nearest centre;
        chi-square of 20 x 20 cells of Rosenblatt's transform (F(x), F(y | x)), which is uniform."""
        nearest, x = self.nearest(x), x.numpy()
        components = stats.chisquare(np.bincount(nearest, minlength=25), self.shares * len(x)).pvalue

        points = np.linspace(-3, 3, 60_001)
        near = np.min(np.abs(points[:, None] - self.axis), 1) ** 2
        density = stats.norm.pdf(points[:, None], self.axis, self.sd)
        by_axis = [self.weights.reshape(5, 5).sum(k) for k in (1, 0)]
        expected = sum(np.sum(near * (density @ w)) * (points[1] - points[0]) for w in by_axis)
        square = ((x - self.centres[nearest]) ** 2).sum(1)
        z = (square.mean() - expected) / (square.std() / math.sqrt(len(x)))

        own = self.weights * stats.norm.pdf(x[:, :1], self.centres[:, 0], self.sd)
        u = (self.weights * stats.norm.cdf(x[:, :1], self.centres[:, 0], self.sd)).sum(1)
        v = (own * stats.norm.cdf(x[:, 1:], self.centres[:, 1], self.sd)).sum(1) / own.sum(1)
        counts = np.histogram2d(u, v, bins=20, range=[[0, 1], [0, 1]])[0]
        return min(components, 2 * stats.norm.sf(abs(z)), stats.chisquare(counts.ravel()).pvalue)


class Law(NamedTuple):
    """A law on the line."""

    cdf: Callable[[np.ndarray], np.ndarray]
    mean: float
    variance: float
    fourth: float  # central moment

    def p_value(self, x: Tensor) -> float:
        """Smallest p value of Kolmogorov-Smirnov, the mean and the variance, of independent samples of any shape."""
        values = x.double().flatten().numpy()
        if not np.isfinite(values).all():
            return 0.0
        mean = (values.mean() - self.mean) / math.sqrt(self.variance / len(values))
        spread = math.sqrt((self.fourth - self.variance**2) / len(values))
        variance = (np.mean((values - self.mean) ** 2) - self.variance) / spread
        method = "asymp" if len(values) >= 1000 else "auto"  # the exact law of the statistic takes a tenth of a second
        return min(stats.kstest(values, self.cdf, method=method).pvalue, *(2 * stats.norm.sf([abs(mean), abs(variance)])))


def gaussian(mean: float, variance: float) -> Law:
    return Law(stats.norm(mean, math.sqrt(variance)).cdf, mean, variance, 3 * variance**2)


def langevin_law(steps: list[tuple[float, float]], d: Quadratic, prior: float = 1.0) -> Law:
    """From N(0, 1), after z <- z + size (d'(z) - prior z) + scale xi for each (size, scale)."""
    mean, variance = 0.0, 1.0
    for size, scale in steps:
        factor = 1 + size * (2 * d.square - prior)
        mean, variance = factor * mean + size * d.slope, factor**2 * variance + scale**2
    return gaussian(mean, variance)


class Line:
    """Laws on an interval by their values at the middles of 800 cells; errors are of the order of (width / 800)^2."""

    def __init__(self, low: float, high: float):
        self.low, self.high, self.step = low, high, (high - low) / GRID
        self.points = low + self.step * (np.arange(GRID) + 0.5)

    def density(self, log_density: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        p = np.exp(log_density(self.points))
        return p / (p.sum() * self.step)

    def law(self, density: np.ndarray) -> Law:
        mass = density * self.step
        edges, cdf = np.linspace(self.low, self.high, GRID + 1), np.concatenate([[0.0], np.cumsum(mass)])
        mean = float(mass @ self.points)
        offset = self.points - mean
        return Law(lambda x: np.interp(x, edges, cdf), mean, float(mass @ offset**2), float(mass @ offset**4))

    def _jumps(self, mean: np.ndarray, sd: float, to: np.ndarray) -> np.ndarray:
        """(GRID, GRID): density of N(mean[i], sd^2) at to[j]."""
        return np.exp(-0.5 * ((to - mean[:, None]) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))

    def folded(self, density: np.ndarray, score: np.ndarray, steps: list[tuple[float, float]]) -> np.ndarray:
        """After z <- fold(z + size score(z) + scale xi) for each (size, scale)."""
        kernels = {}
        for size, scale in steps:
            if (size, scale) not in kernels:
                mean, period = self.points + size * score, 2 * (self.high - self.low)
                reach = math.ceil((np.abs(mean - self.points).max() + 7 * scale) / period)
                turns = [k * period for k in range(-reach, reach + 1)]
                images = [t + image for t in turns for image in (self.points, 2 * self.low - self.points)]
                kernels[size, scale] = sum(self._jumps(mean, scale, image) for image in images)
            density = self.step * (density @ kernels[size, scale])
        return density

    def mala(self, density: np.ndarray, log_target: np.ndarray, score: np.ndarray, size: float, steps: int) -> np.ndarray:
        """After ``steps`` transitions of the Metropolis-adjusted Langevin algorithm; what leaves the interval is rejected."""
        forward = self._jumps(self.points + 0.5 * size * score, math.sqrt(size), self.points)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.exp(log_target[None, :] - log_target[:, None]) * forward.T / forward
        moved = forward * np.minimum(1, np.where(forward > 0, ratio, 0))
        stays = 1 - moved.sum(1) * self.step
        for _ in range(steps):
            density = self.step * (density @ moved) + density * stays
        return density


@contextlib.contextmanager
def serving(backend: str) -> Iterator[None]:
    """The block on this backend; skips the test where the backend is absent."""
    device_of(backend)
    with fr.use_backend(backend):
        yield


def chains(sampler, d, prior, n, steps, *, backend="reference", start=None, seed=0, **options) -> fr.Result:
    """n chains of a latent through G(z) = z in n slots, from the prior or from ``start`` (n, F)."""
    with serving(backend):
        refiner = fr.Refiner(nn.Identity(), d, sampler, prior=prior, num_slots=n, max_steps=steps, **options)
        return refiner.sample(n, seed=seed) if start is None else refiner.refine(start, seed=seed)
