"""Small pairs of networks, refiners of them, and what equal results are."""

import heapq

import torch
from torch import nn

import fastrefine as fr

K = 10


def pair(width=16, dtype=torch.float32):
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 6))
    d = nn.Sequential(nn.Linear(6, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))
    return g.to(dtype), d.to(dtype)


def convolutional_pair():
    torch.manual_seed(0)
    g = fr.models.dcgan_generator(size=32, latent=8, features=4)
    d = fr.models.dcgan_discriminator(size=32, features=4)
    return g.eval(), d.eval()


def refiner(networks=None, **options):
    g, d = networks or pair()
    defaults = dict(
        sampler=fr.Collaborative(step_size=0.2), at="1", max_steps=K, prior=fr.Normal(4), num_slots=8,
        stop=fr.stopping.UniformStep(),
    )  # fmt: skip
    return fr.Refiner(g, d, **{**defaults, **options})


FIELDS = ("images", "logits", "initial_logits", "steps", "status", "ids", "latents", "activations", "logit_falls")


def same(a, b):
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("acceptance", "step_sizes"):
        ours, theirs = getattr(a, name), getattr(b, name)
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs)), name
    assert a.snapshots.keys() == b.snapshots.keys()
    for step, snapshot in a.snapshots.items():
        for name, tensor in vars(snapshot).items():
            assert torch.equal(tensor, getattr(b.snapshots[step], name)), (step, name)


def greedy_slot_steps(evaluations, slots):
    """Slot-steps of list scheduling: the next id goes to the first slot that is free."""
    free = [0] * slots
    for e in evaluations:
        heapq.heappush(free, heapq.heappop(free) + e)
    return slots * max(free)


def conditional(**options):
    torch.manual_seed(0)
    g, d = fr.models.SNGANGenerator(latent=8, features=8, num_classes=3), fr.models.SNGANDiscriminator(8, num_classes=3)
    return refiner((g.eval(), d.eval()), prior=fr.Normal(8), at="blocks.0", max_steps=4, **options)
