"""Rows of the package ex2mcmc (Samsonov et al., NeurIPS 2022), where it is installed, beside those of ``budget_cifar10``.

It samples the same law p0(z) exp(d(G(z))) from the same start, with the step size that ``fr.MALA`` has there: its MALA, and its
local-global kernel with 3 candidates and one local step. Both as they are in the package, which keeps the gradient of the last
local step after a global one has moved the chain.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.papers.budget import OWN, Curves
from benchmarks.papers.result_file import Row
from benchmarks.zoo_pairs import imports

PEER = "ex2mcmc"
CANDIDATES = 3  # of a global move, the present sample among them
NOT_NEEDED = ("pyro", "pyro.infer")  # of what its samplers import


def rows(curves: Curves, step_size: float, budgets: Sequence[int]) -> Iterator[Row]:
    """Of both kernels at each budget; none where the package is not installed. step_size: as ``fr.MALA`` takes it."""
    package = importlib.util.find_spec(PEER)
    if package is None or package.origin is None:
        return
    with imports(Path(package.origin).parent.parent, NOT_NEEDED, bare=(PEER,)):
        samplers: Any = importlib.import_module(f"{PEER}.samplers")
    pair, part, seed = curves.pair, curves.part, curves.table.seed
    latent, size = int(pair.prior.shape[0]), step_size / 2  # theirs is half of ours
    normal = torch.distributions.MultivariateNormal(torch.zeros(latent), torch.eye(latent))
    target = _Law(lambda z: normal.log_prob(z) + pair.discriminator(pair.generator(z)).flatten())

    def mala(start: Tensor, budget: int) -> tuple[Tensor, int]:
        steps = budget - 1
        return samplers.mala(start, target, normal, 1, steps - 1, step_size=size)[0][-1], steps + 1

    def both(start: Tensor, budget: int) -> tuple[Tensor, int]:
        """One evaluation first; a move evaluates the candidates, the place that it came to, and the local proposal."""
        moves = (budget - 1) // (CANDIDATES + 2)
        chain = samplers.ex2mcmc(start, target, normal, 1, moves - 1, step_size=size, n_particles=CANDIDATES)[0]
        return chain[-1], moves * (CANDIDATES + 2) + 1

    for name, kernel in (("mala", mala), ("ex2mcmc", both)):
        facts = {"pair": pair.name, "method": f"{PEER}: {name}", "discriminator": OWN}

        def make(kernel: Callable[[Tensor, int], tuple[Tensor, int]] = kernel) -> tuple[dict[str, Tensor], Row]:
            points = []
            for budget in budgets:
                torch.manual_seed(seed)  # the package draws from torch's generator
                start = pair.prior.sample(torch.arange(part.samples), seed)
                parts = [kernel(z, budget) for z in start.split(pair.num_slots)]
                with torch.no_grad():
                    images = torch.cat([pair.generator(z.detach()) for z, _ in parts])
                evaluations = float(parts[0][1])
                points.append({
                    "budget": budget, "most_steps": budget - 1, "evaluations": evaluations, "gradients": evaluations - 1,
                    **pair.measured(images, curves.run.recipe.resamples), **pair.also(budget, images),
                })  # fmt: skip
            return {}, {"points": points}

        for point in curves.table.kept(facts, make)["points"]:
            yield {"seed": seed, **facts, **point, "relative": point["value"] / curves.raw}


class _Law:
    """A target as the package wants it: log_prob of (..., latent)."""

    def __init__(self, log_density: Callable[[Tensor], Tensor]):
        self.log_density = log_density

    def log_prob(self, z: Tensor) -> Tensor:
        return self.log_density(z.reshape(-1, z.shape[-1])).view(z.shape[:-1])
