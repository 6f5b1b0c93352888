"""As ``budget_cifar10``, for a small residual SNGAN on the hinge loss (Miyato et al. 2018).

Its discriminator is spectrally normalised and has no BatchNorm: the kind of pair that [DDLS] reports on. One update of D for
one of G, of which D learns twice as fast (Heusel et al. 2017).
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.papers import budget_cifar10
from benchmarks.papers.budget import CURVATURE, GLOBAL, OWN, SAMPLERS, SHAPED
from benchmarks.papers.budget_cifar10 import REDUCTIONS, Shaping, claims, comparison, draw, rows
from fastrefine.demo.gan import Training

__all__ = ["FULL", "QUICK", "REDUCTIONS", "claims", "comparison", "draw", "rows"]

# The 4,000 iterations of the GAN took 47 minutes of one shared core.
FULL = replace(
    budget_cifar10.FULL, network="sngan", latent=128, features=(48, 32), checkpoints=(4000,),
    training=Training(64, "adam", (2e-4, 4e-4), (0.0, 0.9)),
).but(
    samplers={OWN: tuple(SAMPLERS), SHAPED: ("DDLS", GLOBAL, "DGflow")}, longer=(50, 200), peers=(25, 50, 200),
    judged_twice=(0, 25, 50),
    shapings=(Shaping("blocks.0", CURVATURE, 20, 1e-4, rounds=3), Shaping("blocks.1", CURVATURE, 9, 1e-4, rounds=2)),
)  # fmt: skip
QUICK = replace(
    budget_cifar10.QUICK, network="sngan", features=(8, 8), checkpoints=(20,), training=Training(32, "adam", (1e-3, 1e-3)),
).but(
    methods=(CURVATURE,), samplers={OWN: ("MALA",), SHAPED: ()}, further=(0,),
    shapings=(Shaping("blocks.0", CURVATURE, 4, 1e-3),),
)  # fmt: skip
