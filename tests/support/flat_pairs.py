"""A small pair of images of 4x4 in a folder, whose discriminator's taste is known, and real images for it."""

import numpy as np
import torch
from torch import nn

import fastrefine as fr


class Generator(nn.Sequential):
    """(N, 4) -> (N, 1, 4, 4), values within about -0.3 to 0.3."""

    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 16), nn.Tanh(), nn.Unflatten(1, (1, 4, 4)))


class Discriminator(nn.Module):
    """Likes images whose mean square is near ``liked``: 0 as the generator makes them, 1 as the real ones are."""

    def __init__(self, liked=1.0):
        super().__init__()
        self.liked = nn.Parameter(torch.tensor(liked))

    def forward(self, x):
        return 1 - (x.square().mean((1, 2, 3)) - self.liked).abs() * 4


def real_images(n=60):
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(0)).sign() * 0.95


def networks(liked=1.0):
    torch.manual_seed(0)
    g = Generator()
    with torch.no_grad():
        g[2].weight.mul_(0.3)
    return g.eval(), Discriminator(liked).eval()


def saved(folder, liked=1.0):
    """(folder of the pair, file of the real images)."""
    g, d = networks(liked)
    code = (f"{__name__}:Generator", f"{__name__}:Discriminator")
    fr.save_pair(folder / "pair", g, d, code=code, arguments=({}, {"liked": liked}), prior=fr.Normal(4), at="2")
    np.save(folder / "real.npy", real_images().numpy())
    return folder / "pair", folder / "real.npy"


def refiner(liked=1.0, **options):
    g, d = networks(liked)
    given = dict(sampler=fr.Collaborative(0.1), at="2", max_steps=4, prior=fr.Normal(4), real=real_images(), num_slots=8,
                 stop=fr.stopping.MedianOfReal())  # fmt: skip
    return fr.Refiner(g, d, **given | options)
