"""The list of places where a generator can be cut, and the modules inside wrappers."""

import pytest
import torch
from torch import nn

from fastrefine.errors import InputError
from fastrefine.models import SNGANGenerator, dcgan_generator, mlp_generator
from fastrefine.networks.copies import unwrap
from fastrefine.networks.cut import layers

torch.set_num_threads(1)


class Repeated(nn.Module):
    """Runs one of its layers twice."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.unused = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 6)

    def forward(self, latents):
        return self.last(self.first(self.first(latents)))


class Constant(nn.Module):
    """Adds the output of a module that has no batch."""

    def __init__(self):
        super().__init__()
        self.identity, self.value = nn.Identity(), nn.Parameter(torch.randn(1, 6))

    def forward(self, latents):
        return latents + self.identity(self.value)


def test_layers_run_from_input_to_output_with_falling_cost():
    found = layers(dcgan_generator(32, 10, 4), torch.randn(4, 10))
    assert [str(layer) for layer in found] == ["input", *map(str, range(11)), "output"]
    assert found[0].shape == (10,) and found[1].shape == (16, 4, 4) and found[-1].shape == (3, 32, 32)
    shares = [layer.tail_share for layer in found]
    assert shares[0] == 1 and shares[-1] == 0 and shares == sorted(shares, reverse=True)


def test_layers_count_the_flops_of_the_tail():
    found = {str(layer): layer for layer in layers(mlp_generator(hidden=(8, 16)), torch.randn(4, 2))}
    assert found["input"].tail_flops == 2 * (2 * 8 + 8 * 16 + 16 * 2) and found["2"].tail_flops == 2 * 16 * 2


def test_layers_leave_out_what_cannot_be_cut():
    assert [str(layer) for layer in layers(Repeated(), torch.randn(4, 6))] == ["input", "last", "output"]
    assert [str(layer) for layer in layers(Constant(), torch.randn(1, 6))] == ["input", "output"]


def test_layers_puts_modes_back_after_an_exception():
    generator = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(5, 5)))
    generator[1].eval()
    with pytest.raises(RuntimeError, match="shapes"):
        layers(generator, torch.randn(4, 6))
    assert generator.training and generator[0].training and not generator[1][0].training
    assert not any(module._forward_hooks for module in generator.modules())


def test_unwrap_finds_the_module_inside_wrappers():
    generator = nn.Linear(2, 2)
    assert unwrap(torch.compile(nn.DataParallel(generator))) is generator and unwrap(generator) is generator


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_refused_with_advice():
    with pytest.raises(InputError, match="give the nn.Module it was made from"):
        unwrap(torch.jit.script(nn.Linear(2, 2)))


def test_layers_take_labels_and_work_in_inference_mode():
    generator = SNGANGenerator(32, 8, 4, 3)
    with torch.inference_mode():
        names = [str(layer) for layer in layers(generator, torch.randn(2, 8), torch.tensor([0, 2]))]
    assert "blocks.1" in names and "blocks.0.norm1.gain" in names and generator.training


def test_layers_of_one_sample_are_those_of_many():
    generator = dcgan_generator(32, 10, 4)
    assert layers(generator, torch.randn(1, 10)) == layers(generator, torch.randn(6, 10))


@pytest.mark.parametrize(("latents", "got"), [
    (16, "got int"), ((4, 16), "got tuple"), (torch.tensor(1.0), r"got shape \(\)"), (torch.randn(0, 6), r"got shape \(0, 6\)"),
])  # fmt: skip
def test_what_are_no_latents_is_named(latents, got):
    with pytest.raises(InputError, match=rf"latents: wanted a tensor \(N, \.\.\.\), {got}"):
        layers(nn.Linear(6, 6), latents)


def test_what_is_no_generator_is_named():
    with pytest.raises(InputError, match="wanted a torch.nn.Module, got str"):
        layers("generator", torch.randn(4, 6))
