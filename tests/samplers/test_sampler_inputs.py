"""What samplers refuse before anything is computed, and with which words."""

import math

import pytest
import torch
from torch import nn

import fastrefine as fr
from tests.support.closed_forms import serving
from tests.support.fault_networks import LATENT, Calls, discriminator, generator

BAD_STEPS = [0, 0.0, -0.1, math.nan, math.inf, "0.1", None, True]


@pytest.mark.parametrize("value", BAD_STEPS, ids=repr)
@pytest.mark.parametrize("sampler", [fr.Collaborative, fr.DDLS, fr.MALA, fr.HMC, fr.DGflow, fr.DOT])
def test_a_step_size_that_is_no_positive_number_is_refused(sampler, value):
    fixed = {"control": "fixed"} if sampler is fr.Collaborative else {}  # whose other controls find a size that is left out
    with pytest.raises(fr.InputError, match="step_size is"):
        sampler(value, **fixed)


REFUSED = {
    "empty schedule": (lambda: fr.DDLS(()), "step_size is empty"),
    "empty list": (lambda: fr.DDLS(0.1, []), "noise_scale is empty"),
    "a zero in a schedule": (lambda: fr.DDLS((0.1, 0.0)), "step_size is 0.0"),
    "a NaN in a schedule": (lambda: fr.DDLS([0.1, math.nan]), "step_size is nan"),
    "a word in a schedule": (lambda: fr.DDLS((0.1, "a")), "step_size is 'a'"),
    "negative noise": (lambda: fr.DDLS(0.1, -0.1), "noise_scale is -0.1"),
    "NaN noise": (lambda: fr.DDLS(0.1, math.nan), "noise_scale is nan"),
    "negative noise in a schedule": (lambda: fr.DDLS(0.1, (1.0, -1.0)), "noise_scale is -1.0"),
    "a word for noise": (lambda: fr.DDLS(0.1, "1"), "noise_scale is '1'"),
    "ddls, logit scale 0": (lambda: fr.DDLS(0.1, logit_scale=0), "logit_scale is 0"),
    "mala, logit scale below 0": (lambda: fr.MALA(0.1, logit_scale=-1.0), "logit_scale is -1.0"),
    "hmc, logit scale NaN": (lambda: fr.HMC(0.1, logit_scale=math.nan), "logit_scale is nan"),
    "no leapfrog step": (lambda: fr.HMC(0.1, leapfrog=0), "leapfrog is 0"),
    "half a leapfrog step": (lambda: fr.HMC(0.1, leapfrog=2.5), "leapfrog is 2.5"),
    "true leapfrog steps": (lambda: fr.HMC(0.1, leapfrog=True), "leapfrog is True"),
    "jitter of a whole step": (lambda: fr.HMC(0.1, jitter=1), "jitter is 1; wanted a finite number at least 0 and less than 1"),
    "jitter below 0": (lambda: fr.HMC(0.1, jitter=-0.1), "jitter is -0.1"),
    "jitter NaN": (lambda: fr.HMC(0.1, jitter=math.nan), "jitter is nan"),
    "true jitter": (lambda: fr.HMC(0.1, jitter=True), "jitter is True"),
    "adaptation below 0": (lambda: fr.MALA(0.1, adapt=-1), "adapt is -1"),
    "adaptation NaN": (lambda: fr.HMC(0.1, adapt=math.nan), "adapt is nan"),
    "target 0": (lambda: fr.MALA(0.1, target=0), "target is 0"),
    "target above 1": (lambda: fr.HMC(0.1, target=1.01), "target is 1.01"),
    "gamma below 0": (lambda: fr.DGflow(0.1, gamma=-0.1), "gamma is -0.1"),
    "an unknown divergence": (lambda: fr.DGflow(0.1, "kl"), "divergence is 'kl'; wanted one of 'KL'"),
    "an unknown projection": (lambda: fr.DOT(0.1, projection="orthogonal"), "projection is 'orthogonal'; wanted one of"),
    "an unknown optimizer": (lambda: fr.DOT(0.1, "momentum"), "optimizer is 'momentum'; wanted one of 'adam', 'sgd'"),
    "lipschitz 0": (lambda: fr.DOT(0.1, lipschitz=0), "lipschitz is 0"),
    "lipschitz below 0": (lambda: fr.DOT(0.1, lipschitz=-2.0), "lipschitz is -2.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_out_of_range_are_named(case):
    call, text = REFUSED[case]
    with pytest.raises(fr.InputError, match=text):
        call()


def test_schedules_may_be_lists_and_tensors():
    sizes = torch.tensor([0.25, 0.125])
    assert fr.DDLS(sizes).step_size == fr.DDLS([0.25, 0.125]).step_size == (0.25, 0.125)
    assert fr.DDLS(0.1, torch.tensor([1.0, 0.0])).traits.stochastic
    assert not fr.DDLS(0.1, [0.0, 0.0]).traits.stochastic


NEED_PRIOR = [fr.DDLS(0.1), fr.MALA(0.1), fr.HMC(0.1, 2)]


def counted(**options):
    """A Refiner that must not be made: the calls of its networks are counted."""
    g, d = Calls(generator()), Calls(discriminator())
    g, d = options.pop("generator", g), options.pop("discriminator", d)
    try:
        return fr.Refiner(g, d, max_steps=options.pop("max_steps", 4), num_slots=4, **options)
    finally:
        assert not any(sum(module.calls) for module in (g, d) if isinstance(module, Calls))


@pytest.mark.parametrize("sampler", NEED_PRIOR, ids=repr)
def test_samplers_of_a_latent_law_are_refused_elsewhere(sampler):
    prior = fr.Normal(LATENT)
    with pytest.raises(fr.InputError, match="at='input', got at='output'"):
        counted(sampler=sampler, at="output", prior=prior)
    with pytest.raises(fr.InputError, match="at='input', got at='0'"):
        counted(sampler=sampler, at="0", prior=prior)
    with pytest.raises(fr.InputError, match="at='input', got at='output'"):
        counted(sampler=sampler, at="output", generator=None)
    with pytest.raises(fr.InputError, match=r"pass prior=, e.g. fastrefine.Normal"):
        counted(sampler=sampler)


@pytest.mark.parametrize("sampler", NEED_PRIOR, ids=repr)
def test_samplers_of_a_latent_law_are_refused_on_a_split(sampler):
    with pytest.raises(fr.InputError, match="got a Split"):
        counted(sampler=sampler, generator=fr.Split(nn.Identity(), nn.Identity()), prior=fr.Normal(LATENT))


def test_dot_does_not_clip_the_activation_of_a_split_to_the_priors_box():
    sampler, prior = fr.DOT(0.5, lipschitz=0.05), fr.Uniform(LATENT)
    with serving("reference"):
        options = dict(prior=prior, max_steps=8, num_slots=4)
        split = fr.Split(lambda z: (3 * z, ()), generator())
        refiner = fr.Refiner(split, discriminator(), sampler, **options)
        assert refiner.sample(8).activations.abs().max() > 1


@pytest.mark.parametrize("max_steps", [1, 7, 11])
def test_max_steps_that_end_within_a_trajectory_are_refused(max_steps):
    with pytest.raises(fr.InputError, match=rf"max_steps is {max_steps}, but one transition of HMC takes 5 steps") as error:
        counted(sampler=fr.HMC(0.1, 5), prior=fr.Normal(LATENT), max_steps=max_steps)
    assert f"wanted a multiple, {({1: 0, 7: 5, 11: 10})[max_steps]} or" in str(error.value)
    for fits in (0, 5, 10):
        counted(sampler=fr.HMC(0.1, 5), prior=fr.Normal(LATENT), max_steps=fits)


@pytest.mark.parametrize("sampler", [*NEED_PRIOR, fr.DOT(0.1, lipschitz=1.0)], ids=repr)
def test_latents_that_are_not_of_the_prior_are_refused(sampler):
    refiner = fr.Refiner(generator(), discriminator(), sampler, prior=fr.Normal(LATENT + 1), max_steps=4, num_slots=4)
    with pytest.raises(fr.InputError, match=rf"latents of shape .* do not fit Normal\({LATENT + 1}\)"):
        refiner.refine(torch.zeros(3, LATENT))


@pytest.mark.parametrize("steps", ["10", 5, (1, 2.5), (-1,), (5,), (True,)], ids=repr)
def test_snapshots_that_are_no_steps_of_the_run_are_refused(steps):
    refiner = counted(sampler=fr.DDLS(0.1), prior=fr.Normal(LATENT))
    with pytest.raises(fr.InputError, match="snapshots"):
        refiner.sample(2, snapshots=steps)


def test_latents_outside_the_box_come_in_or_stay():
    """DDLS folds them, HMC and MALA never leave a point of probability 0 for another; none returns NaN."""
    z = torch.full((3, LATENT), 1.5)
    found = {}
    for sampler in (fr.DDLS(0.1), fr.MALA(0.1), fr.HMC(0.1, 2)):
        with serving("reference"):
            refiner = fr.Refiner(generator(), discriminator(), sampler, prior=fr.Uniform(LATENT), max_steps=8, num_slots=4)
            found[type(sampler)] = refiner.refine(z).latents
    assert all(latents.isfinite().all() for latents in found.values())
    assert (found[fr.DDLS].abs() <= 1).all()
