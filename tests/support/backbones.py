"""A small pretrained network's stand-in, and a discriminator of one's own on it, as a user would write them."""

import torch
from torch import nn

from fastrefine.models import ProjectedDiscriminator


class Stages(nn.Module):
    """(N, 3, h, w) -> (N, 6, h, w), (N, 8, h/2, w/2), by weights of a seed; sha256: as a named backbone has it."""

    sha256 = "abc"

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU6())
            self.second = nn.Sequential(nn.Conv2d(6, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.Dropout(0.5))
            for norm in (self.first[1], self.second[1]):
                norm.running_mean.normal_(0.0, 0.1)

    def forward(self, images):
        a = self.first(images)
        return a, self.second(a)


class OnStages(ProjectedDiscriminator):
    """Heads on Stages."""

    def __init__(self, width=8):
        super().__init__((3, 8, 8), Stages(), width=width)
