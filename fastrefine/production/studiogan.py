"""Networks of PyTorch-StudioGAN, made by the user's checkout of it from a configuration. A pair that names them needs trust."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def generator(configuration: Mapping[str, Any]) -> nn.Module:
    """The generator of a configuration, as its .yaml file has it. The checkout's folder ``src`` is on the Python path."""
    return _networks(configuration)[0]


def discriminator(configuration: Mapping[str, Any]) -> nn.Module:
    """The discriminator of a configuration."""
    return _networks(configuration)[3]


def generate(network: nn.Module, z: Tensor) -> Tensor:
    """A generator without classes, which wants labels all the same."""
    return network(z, torch.zeros(len(z), dtype=torch.int64, device=z.device))


def discriminate(network: nn.Module, x: Tensor) -> Tensor:
    """A discriminator without classes."""
    return network(x, torch.zeros(len(x), dtype=torch.int64, device=x.device))["adv_output"]


def _networks(configuration: Mapping[str, Any]) -> tuple[nn.Module, ...]:
    config, model = importlib.import_module("config"), importlib.import_module("models.model")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "configuration.yaml"
        file.write_text(json.dumps(configuration))  # JSON is YAML
        c = config.Configurations(str(file))
    c.RUN.mixed_precision = False  # which its command line sets; the weights are the same
    return model.load_generator_discriminator(
        c.DATA, c.OPTIMIZATION, c.MODEL, c.STYLEGAN, c.MODULES, c.RUN, device="cpu", logger=None
    )
