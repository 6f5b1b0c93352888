"""As ``budget_cifar10``, for a small residual SNGAN on the hinge loss (Miyato et al. 2018).

Its discriminator is spectrally normalised and has no BatchNorm: the kind of pair that [DDLS] reports on. One update of D for
one of G, of which D learns twice as fast (Heusel et al. 2017). At the end D was behind: of a real and a generated image it
preferred the real one in 62 % of pairs. So it goes on alone, against the generator as it then is, and that is D "as it is".
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.papers import budget_cifar10
from benchmarks.papers.budget import BACKTRACKING, CURVATURE, GLOBAL, OWN, SHAPED
from benchmarks.papers.budget_cifar10 import FITTED, REDUCTIONS, Shaping, claims, comparison, draw, rows
from fastrefine.demo.gan import Training

__all__ = ["FULL", "QUICK", "REDUCTIONS", "claims", "comparison", "draw", "rows"]

# The 4,000 iterations of the GAN took 60 minutes of one shared core.
FULL = replace(
    budget_cifar10.FULL, network="sngan", latent=128, features=(48, 32), checkpoints=(4000,),
    training=Training(64, "adam", (2e-4, 4e-4), (0.0, 0.9)),
).but(
    methods=(BACKTRACKING, CURVATURE), samplers={OWN: ("DDLS", "MALA", GLOBAL, "DGflow"), SHAPED: ("DDLS",)},
    tuning=10, longer={OWN: (25, 50), SHAPED: (25, 50)}, peers=(10, 25, 50), judged_twice=(0, 10, 50),
    budgets=(0, 1, 2, 5, 10, 25, 50), catch_up=200, held_out=(250, (4, 9, 19)),
    shapings=(
        Shaping("blocks.1", CURVATURE, 9, 1e-4, rounds=2), Shaping("output", CURVATURE, 20, 1e-4, rounds=3, start=FITTED),
    ),
    part=replace(
        budget_cifar10.FULL.part, samples=500, shaping=(100, 32, 1e-4), distil=dict(pairs=2000, rounds=1, iterations=600)
    ),
)  # fmt: skip
QUICK = replace(
    budget_cifar10.QUICK, network="sngan", features=(8, 8), checkpoints=(20,), training=Training(32, "adam", (1e-3, 1e-3)),
).but(
    catch_up=5, methods=(CURVATURE,), samplers={OWN: ("DDLS", "MALA"), SHAPED: ()}, further=(0,),
    shapings=(Shaping("blocks.0", CURVATURE, 4, 1e-3),),
)  # fmt: skip
