"""What ``make bench-compare`` times: each function prepares a run and returns it. A run takes about a tenth of a second."""

from collections.abc import Callable
from typing import Any

import torch

import fastrefine as fr
from fastrefine.models.dcgan import dcgan_discriminator, dcgan_generator

torch.set_num_threads(1)


def bench_digits() -> Callable[[], Any]:
    """Collaborative sampling of the embedded pair, with step control."""
    pair = fr.load_pair("digits")
    refiner = fr.Refiner.from_pair(pair, sampler=fr.Collaborative(0.3), max_steps=40)
    return lambda: refiner.sample(500, seed=0)


def bench_digits_ddls() -> Callable[[], Any]:
    """Langevin on the latent of the embedded pair."""
    refiner = fr.Refiner.from_pair(fr.load_pair("digits"), sampler=fr.DDLS(0.01), at="input", max_steps=20)
    return lambda: refiner.sample(300, seed=0)


def bench_dcgan32() -> Callable[[], Any]:
    """A DCGAN of 32 x 32 with untrained weights, refined after its first block, of which samples leave one by one."""
    torch.manual_seed(0)
    g, d = dcgan_generator(features=8), dcgan_discriminator(features=8)
    d(g(torch.randn(64, 100)))  # in training mode: BatchNorm gets statistics
    sampler, stop = fr.Collaborative(10.0, control="fixed"), fr.stopping.UniformStep()
    refiner = fr.Refiner(g, d, sampler, at="2", max_steps=5, prior=fr.Normal(100), stop=stop, num_slots=32)
    return lambda: refiner.sample(64, seed=0)
