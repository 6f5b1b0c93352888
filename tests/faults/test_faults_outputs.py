"""FAULTS 4 to 8: what a discriminator may return, and what it may not."""

import dataclasses
import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastrefine as fr
from tests.support.fault_networks import IMAGE, Returning, discriminator, generator, refiner, same_result, told

N = 7


class Patches(nn.Module):
    """(N, 3, 8, 8) -> a map (N, 1, 4, 4)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.conv = nn.Conv2d(3, 1, 3, 2, 1)

    def forward(self, x):
        return self.conv(x)


def image_generator():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3 * 64), nn.Unflatten(1, (3, 8, 8)), nn.Tanh())


def test_a_map_means_its_mean_and_that_is_said_once():
    """FAULTS 4"""
    with told() as warned:
        r = refiner(image_generator(), Patches())
        out = r.sample(N)
        r.sample(N, first_id=N)
        r.score(out.images)
    assert len([text for text in warned if "map of 16 patches" in text]) == 1
    mean = Patches()(out.images).flatten(1).mean(1)
    assert torch.allclose(out.logits, mean, atol=1e-6) and (out.logits > out.initial_logits).all()


def test_the_loss_of_a_map_is_the_mean_of_its_patches_losses():
    """FAULTS 4"""
    g, d = image_generator().double(), Patches().double()
    with told():
        z = refiner(g, d, max_steps=0, precision="float64").sample(N).latents
        out = refiner(g, d, fr.Collaborative(0.5, control="fixed"), max_steps=1, precision="float64").refine(z)
    leaf = z.clone().requires_grad_()
    loss = nn.functional.softplus(-d(g(leaf))).mean((1, 2, 3)).sum()
    assert torch.allclose(out.activations, z - 0.5 * torch.autograd.grad(loss, leaf)[0], atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out.expand(-1, 2), r"returned shape \(4, 2\); wanted \(N,\), \(N, 1\) or a map \(N, 1, h, w\)"),
        (lambda out: out.t(), r"one value per sample, got shape \(1, 4\) for 4 samples"),
        (lambda out: out.repeat(3, 1), r"one value per sample, got shape \(12, 1\) for 4 samples"),
        (lambda out: out[:0], r"one value per sample, got shape \(0, 1\)"),
    ],
)
def test_other_shapes_are_refused(change, message):
    """FAULTS 4"""
    with pytest.raises(fr.InputError, match=message):
        refiner(d=Returning(change)).sample(N)


@pytest.mark.parametrize("change", [lambda out: out.mean(), lambda out: out.sum()])
def test_one_scalar_for_the_batch_is_refused(change):
    """FAULTS 5"""
    with pytest.raises(fr.InputError, match=r"one value per sample, got shape \(\) for 4 samples"):
        refiner(d=Returning(change)).sample(N)
    with pytest.raises(fr.InputError, match=r"one value per sample, got shape \(\)"):
        refiner(d=Returning(change)).score(torch.zeros(5, IMAGE))


def test_a_squeeze_is_no_batch_mean_where_the_batch_has_one_sample():
    """FAULTS 5"""
    squeezing = Returning(lambda out: out.squeeze())
    assert same_result(refiner(d=squeezing, num_slots=1).sample(3), refiner(num_slots=1).sample(3))
    x = refiner(max_steps=0).sample(5).images  # a block of four and one of one
    assert torch.allclose(refiner(d=squeezing).score(x), discriminator()(x)[:, 0])
    assert torch.allclose(refiner(d=squeezing).score(x[:1]), discriminator()(x[:1])[:, 0])


@dataclasses.dataclass
class Output:
    logit: Tensor
    features: Tensor


class Pair(NamedTuple):
    features: Tensor
    logit: Tensor


STRUCTURED = {
    "tuple": (lambda out: (out * 0, out), 1, r"a tuple of 2 \(indices 0 to 1; shapes 0: "),
    "dict": (lambda out: {"features": out * 0, "logit": out}, "logit", r"a dict with keys \['features', 'logit'\]"),
    "object": (lambda out: Output(out, out * 0), "logit", r"object of type Output with .* \['logit', 'features'\]"),
    "named": (lambda out: Pair(out * 0, out), "logit", r"a Pair of 2 .*names \['features', 'logit'\]"),
}


@functools.cache
def plain_result():
    return refiner().sample(N)


@pytest.mark.parametrize("kind", STRUCTURED)
def test_structured_output_is_refused_with_its_keys_and_read_with_one(kind):
    """FAULTS 6"""
    change, key, names = STRUCTURED[kind]
    with pytest.raises(fr.InputError, match=names + ".*output_key"):
        refiner(d=Returning(change)).sample(N)
    missing = 5 if isinstance(key, int) else "logits"
    with pytest.raises(fr.InputError, match=f"output_key={missing!r} is not in .*" + names):
        refiner(d=Returning(change), output_key=missing).sample(N)
    assert same_result(refiner(d=Returning(change), output_key=key).sample(N), plain_result())
    pick = (lambda raw: raw[key]) if kind != "object" and kind != "named" else (lambda raw: raw.logit)
    assert same_result(refiner(d=Returning(change), output_key=pick).sample(N), plain_result())


@pytest.mark.parametrize(("other", "hint"), [(lambda out: out.expand(-1, 3), True), (lambda out: out * 0, False)])
def test_the_one_entry_of_a_logits_shape_is_named(other, hint):
    with pytest.raises(fr.InputError) as error:
        refiner(d=Returning(lambda out: (other(out), out))).sample(N)
    assert ("output_key=1 has the shape of a logit" in str(error.value)) == hint


def test_a_callable_reduces_what_has_no_single_logit():
    """FAULTS 6"""
    d = Returning(lambda out: out.expand(-1, 3))
    out = refiner(d=d, output_key=lambda raw: raw.mean(1)).sample(N)
    assert torch.allclose(out.logits, plain_result().logits, atol=1e-6)
    with pytest.raises(fr.InputError, match="the discriminator returned an object of type str"):
        refiner(d=d, output_key=lambda raw: "logit").sample(N)


def ends(how):
    d = discriminator()
    if how == "module":
        return nn.Sequential(*d, nn.Sigmoid())
    if how == "module then view":
        return Returning(lambda out: out.view(-1), nn.Sequential(*d, nn.Sigmoid()))
    if how == "last of a tuple":
        return Returning(lambda out: (torch.sigmoid(out), out * 2), d)
    return Returning({"function": torch.sigmoid, "method": lambda out: out.sigmoid().squeeze(1)}[how], d)


@pytest.mark.parametrize("how", ["module", "module then view", "function", "method", "last of a tuple"])
@pytest.mark.parametrize("scale", ["logit", "critic"])
def test_a_final_sigmoid_that_was_not_declared_is_found(how, scale):
    """FAULTS 7"""
    key = 0 if how == "last of a tuple" else None
    sampler = fr.Collaborative(0.1, loss="wasserstein")
    with pytest.raises(fr.InputError, match=f"ends in a sigmoid.*{scale!r} was declared; pass .*'probability'"):
        refiner(d=ends(how), sampler=sampler, discriminator_output=scale, output_key=key).sample(N)


@pytest.mark.parametrize("how", ["module", "module then view", "function", "method", "last of a tuple"])
def test_a_declared_sigmoid_is_cut_and_large_logits_survive(how):
    """FAULTS 7"""
    key = 0 if how == "last of a tuple" else None
    d = ends(how)
    layers = d if isinstance(d, nn.Sequential) else d.module
    layers[2].bias.data.fill_(60.0)
    plain = discriminator()
    plain[2].bias.data.fill_(60.0)
    with told() as warned:
        out = refiner(d=d, discriminator_output="probability", output_key=key).sample(N)
    expected = refiner(d=plain).sample(N)
    assert (
        not [text for text in warned if "sigmoid" in text]
        and torch.allclose(out.logits, expected.logits)
        and (out.logits > 50).all()
    )
    assert out.logits.isfinite().all() and torch.allclose(out.images, expected.images)


def test_logits_declared_as_probabilities_are_found():
    """FAULTS 7"""
    d = discriminator()
    d[2].bias.data.fill_(5.0)
    with pytest.raises(fr.InputError, match="'probability' was declared, but .* from .* pass 'logit' or 'critic'"):
        refiner(d=d, discriminator_output="probability").sample(N)


def test_a_probability_without_a_sigmoid_is_inverted_and_told():
    """FAULTS 7"""
    d = Returning(lambda out: 0.5 + torch.atan(out) / torch.pi)
    with told() as warned:
        out = refiner(d=d, discriminator_output="probability").sample(N)
    assert [text for text in warned if "sigmoid could not be found" in text]
    assert torch.allclose(torch.sigmoid(out.logits), d(out.images)[:, 0], atol=1e-5)


def test_a_gate_by_the_same_module_is_not_cut_with_the_final_sigmoid():
    """FAULTS 7"""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.act = discriminator(), nn.Sigmoid()

        def forward(self, x):
            return self.act(self.module(x * self.act(x)))

    out = refiner(d=Gated(), discriminator_output="probability").sample(N)
    with torch.no_grad():
        assert torch.allclose(torch.sigmoid(out.logits), Gated()(out.images)[:, 0], atol=1e-5)


def test_logits_that_happen_to_lie_between_0_and_1_are_logits():
    """FAULTS 7"""
    d = discriminator()
    d[2].weight.data.mul_(0.01)
    d[2].bias.data.fill_(0.5)
    with told() as warned:
        out = refiner(d=d).sample(N)
    assert all("hardly moved" in text for text in warned)  # of the tiny weights; nothing is said of probabilities
    assert torch.allclose(out.logits, d(out.images)[:, 0].detach())


def test_a_critics_result_carries_its_scale_and_selection_refuses_it():
    """FAULTS 8"""
    sampler = fr.Collaborative(0.1, loss="wasserstein", control="fixed")
    out = refiner(sampler=sampler, discriminator_output="critic").sample(N)
    assert out.scale == "critic" and refiner().sample(N).scale == "logit"
    for part in refiner(sampler=sampler, discriminator_output="critic").stream(N, chunk=3):
        assert part.scale == "critic"
    with pytest.raises(fr.InputError, match="critic"):
        fr.metropolis_hastings(out, chain_length=2)
    assert len(fr.metropolis_hastings(out.logits, chain_length=2).indices) == N // 2


def test_a_loss_that_reads_a_critic_as_a_logit_is_warned_of():
    """FAULTS 8"""
    with told() as warned:
        refiner(sampler=fr.Collaborative(0.1), discriminator_output="critic")
    assert [text for text in warned if "use 'wasserstein'" in text]
    with pytest.raises(fr.InputError, match="compare probabilities"):
        adaptive = fr.Collaborative(0.1, adaptive=True, loss="wasserstein")
        real = generator()(torch.randn(8, 4)).detach()
        refiner(sampler=adaptive, discriminator_output="critic", real=real).sample(N)
