"""What every sampler promises: pure functions over slots that know nothing of each other, and traits that are true."""

import dataclasses
import inspect
import math

import pytest
import torch

import fastrefine as fr
from fastrefine import samplers
from fastrefine.noise import Noise
from fastrefine.samplers import Evaluation, Sample, Sampler, Traits
from tests.support.step_machine import SAMPLERS, bound

S, F, SEED = 6, 5, 2**40 + 7
DTYPE = torch.float64
EVERY = SAMPLERS | {
    "minimax": fr.Collaborative(0.3, "minimax", clamp=(-2.0, 2.0)),
    "ddls, no noise": fr.DDLS(0.3, 0.0),
    "mala, as it is": fr.MALA(0.3),
    "hmc, one length": fr.HMC(0.3, leapfrog=3, jitter=0),
    "flow, no noise": fr.DGflow(0.3, "JS", gamma=0.0),
    "dot, none": fr.DOT(0.3, lipschitz=2.0, projection="none"),
}
every_sampler = pytest.mark.parametrize("name", EVERY)
METHODS = ("bind", "with_loss_error", "init", "observe", "propose", "position", "kernel")
CLASSES = sorted({type(sampler) for sampler in EVERY.values()}, key=lambda cls: cls.__name__)


def sampler_of(name, **changes):
    """The sampler as a Refiner would bind it."""
    return bound(dataclasses.replace(EVERY[name], **changes), F, DTYPE, "cpu")


def activations(seed=0):
    """Inside every prior's box."""
    return (0.5 * torch.randn(S, F, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)).clamp(-0.9, 0.9)


def sample():
    return Sample(torch.arange(S) + 3, None, torch.linspace(0, 2, S, dtype=DTYPE))


def evaluate(sampler, a, weight=1.0, **changes):
    """A quadratic loss, and the prior where the sampler knows one."""
    loss = 0.5 * weight * (a * a).sum(1)
    found = Evaluation(-loss, loss, weight * a)
    if sampler.latent is not None:
        found = found._replace(log_prior=sampler.latent.log_prob(a), prior_score=sampler.latent.score(a))
    return found._replace(**changes)


def noise(step, seed=SEED):
    return Noise(seed, sample().id, step, F, DTYPE)


def step_of(k):
    return torch.full((S,), k, dtype=torch.int32)


def run(sampler, a, steps, evaluation=None, seed=SEED):
    """[(activation, state)] of a chain of evaluations: what was proposed, and the state after it was observed."""
    state, seen = sampler.init(a, sample()), []
    for k in range(steps + 1):
        given = (evaluation or evaluate)(sampler, a)
        observed = sampler.observe(a, given, state, step_of(k), noise(step_of(k), seed))
        state = {**state, **observed}
        seen.append((a, state))
        a, after = sampler.propose(state, step_of(k), noise(step_of(k), seed))
        state = {**state, **after}
    return seen


def copies(*given):
    """Clones of the tensors in tuples and dicts, in order."""
    flat = [t for x in given for t in (x.values() if isinstance(x, dict) else x if isinstance(x, tuple) else [x])]
    return [t.clone() for t in flat if isinstance(t, torch.Tensor)]


def equal(ours, theirs):
    return all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(ours, theirs, strict=True))


# The sampler as a value


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cls", CLASSES)
def test_methods_take_what_the_protocol_says(cls, method):
    assert list(inspect.signature(getattr(cls, method)).parameters) == list(
        inspect.signature(getattr(Sampler, method)).parameters
    )


@every_sampler
def test_a_sampler_is_a_frozen_value(name):
    sampler = EVERY[name]
    twin = dataclasses.replace(sampler)
    assert sampler == twin and hash(sampler) == hash(twin)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.step_size = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.traits.rejects = True
    assert sampler != dataclasses.replace(sampler, step_size=0.25)


@every_sampler
def test_its_representation_evaluates_to_it(name):
    known = {"latent": None, "schedule": None}
    assert eval(repr(EVERY[name]), vars(samplers) | known) == EVERY[name]


def test_its_representation_names_what_is_not_usual():
    assert repr(samplers.Collaborative(0.1, loss="minimax")) == "Collaborative(step_size=0.1, loss='minimax')"
    assert repr(samplers.Collaborative()) == "Collaborative()" and repr(samplers.DOT(0.1)) == "DOT(step_size=0.1)"
    assert repr(samplers.HMC(0.1, leapfrog=3, target=0.8)) == "HMC(step_size=0.1, target=0.8, leapfrog=3)"
    for control in ("backtracking", "barzilai_borwein", "fixed"):
        one = samplers.Collaborative(0.1, control=control)
        assert eval(repr(one), vars(samplers)) == one and ("control" in repr(one)) == (control != "backtracking")


# Pure functions


@every_sampler
def test_equal_inputs_give_equal_outputs_and_stay_as_they_are(name):
    sampler, a = sampler_of(name), activations()
    chain = run(sampler, a, 3)
    assert equal(copies(*(x for pair in chain for x in pair)), copies(*(x for pair in run(sampler, a, 3) for x in pair)))
    for k, (a, state) in enumerate(chain):
        step, given, own = step_of(k), evaluate(sampler, a), sample()
        before = copies(a, given, state, step, own.id, own.reference_logit)
        for call in (
            lambda a=a, own=own: sampler.init(a, own),
            lambda a=a, given=given, state=state, step=step: sampler.observe(a, given, state, step, noise(step)),
            lambda state=state, step=step: sampler.propose(state, step, noise(step)),
            lambda state=state: sampler.position(state),
        ):
            call()
        assert equal(before, copies(a, given, state, step, own.id, own.reference_logit))


@every_sampler
def test_slots_do_not_know_of_each_other(name):
    """Bit by bit, whatever the neighbours: other numbers, and such as are not finite."""
    sampler, a, slot = sampler_of(name), activations(), 2
    other = torch.where(torch.arange(S)[:, None] == slot, a, 3 * activations(1))

    def poisoned(sampler, a):
        given = evaluate(sampler, a)
        bad = torch.arange(S) > slot
        return given._replace(
            logit=given.logit.masked_fill(bad, -math.inf), loss=given.loss.masked_fill(bad, math.inf),
            grad=given.grad.masked_fill(bad[:, None], math.nan),
        )  # fmt: skip

    for (ours, state), (theirs, others) in zip(run(sampler, a, 4), run(sampler, other, 4, poisoned), strict=True):
        assert torch.equal(ours[slot], theirs[slot])
        assert equal([x[slot] for x in state.values()], [others[key][slot] for key in state])


@every_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_state_is_of_a_row_for_each_slot_in_the_activations_dtype(name, dtype):
    sampler, a = bound(EVERY[name], F, dtype, "cpu"), activations().to(dtype)
    own = sample()._replace(reference_logit=sample().reference_logit.to(dtype))
    state = sampler.init(a, own)
    assert list(state)[:2] == ["position", "logit"] and torch.equal(sampler.position(state), a)
    for k in range(3):
        source = Noise(SEED, own.id, step_of(k), F, dtype)
        state = {**state, **sampler.observe(a, evaluate(sampler, a), state, step_of(k), source)}
        a, state = sampler.propose(state, step_of(k), source)
        assert a.shape == (S, F) and a.dtype == dtype
        assert all(len(entry) == S and entry.dtype == dtype for entry in state.values())


@every_sampler
def test_the_kernel_names_the_state_in_its_order(name):
    sampler, a = sampler_of(name), activations()
    state, kernel = sampler.init(a, sample()), sampler.kernel()
    own = {key: value.dim() for key, value in state.items() if key not in ("position", "logit")}
    assert kernel.scalars == tuple(key for key, dim in own.items() if dim == 1)
    assert kernel.vectors == tuple(key for key, dim in own.items() if dim == 2)
    assert len(kernel.hyper) <= 8 and all(math.isfinite(number) for number in kernel.hyper)
    assert set(sampler.traits.reports) <= set(kernel.scalars)


# Traits, each seen from outside


def moves(sampler, **kind):
    """(where it was, the trial) of the first transition, and the state that comes of it."""
    length = sampler.traits.transition_steps
    chain = run(sampler, activations(), length, **kind)
    return chain[0][0], chain[length][0], chain[length][1]


@every_sampler
def test_stochastic_samplers_alone_read_noise(name):
    sampler = sampler_of(name)
    (*_, ours), (*_, theirs) = moves(sampler), moves(sampler, seed=SEED + 1)
    proposals = (sampler.propose(state, step_of(0), noise(step_of(0), seed))[0] for state, seed in ((ours, 1), (ours, 2)))
    assert sampler.traits.stochastic == (not torch.equal(*proposals))
    assert sampler.traits.stochastic or torch.equal(ours["position"], theirs["position"])


@every_sampler
def test_samplers_that_reject_stay_where_a_trial_is_not_finite(name):
    sampler = sampler_of(name)
    length = sampler.traits.transition_steps
    *_, (_, state) = run(sampler, activations(), length - 1)
    trial, after = sampler.propose(state, step_of(length - 1), noise(step_of(length - 1)))
    bad = evaluate(
        sampler, trial, logit=torch.full((S,), -math.inf), loss=torch.full((S,), math.inf), grad=torch.zeros_like(trial)
    )
    found = sampler.observe(trial, bad, {**state, **after}, step_of(length), noise(step_of(length)))
    if sampler.traits.rejects:
        assert torch.equal(found["position"], state["position"]) and found["logit"].isfinite().all()
    else:
        assert torch.equal(found["position"], trial)


@every_sampler
def test_the_last_gradient_decides_only_where_that_is_said(name):
    """Whether the trial is accepted; with a gradient at 0 the reverse density, or the last kick, is another."""
    sampler = sampler_of(name, **({"step_size": 0.9} if EVERY[name].traits.needs_last_gradient else {}))
    length = sampler.traits.transition_steps
    chain = run(sampler, activations(), 8 * length - 1)
    differ = False
    for k in range(length, 8 * length, length):
        (_, state), step = chain[k - 1], step_of(k)
        trial, after = sampler.propose(state, step_of(k - 1), noise(step_of(k - 1)))
        given = evaluate(sampler, trial)
        found = [
            sampler.observe(trial, given._replace(grad=grad), {**state, **after}, step, noise(step))
            for grad in (given.grad, 0 * given.grad, 9 * given.grad)
        ]
        differ |= any(not torch.equal(found[0][key], x[key]) for x in found[1:] for key in ("position", "logit"))
    assert differ == sampler.traits.needs_last_gradient


@every_sampler
def test_what_is_reported_is_the_reached_step_size_and_the_accepted_trials(name):
    sampler = sampler_of(name)
    *_, (_, state) = run(sampler, activations(), 4 * sampler.traits.transition_steps)
    reports = {key: state[key] for key in sampler.traits.reports}
    assert reports.keys() <= {"step_size", "accepted"} and all(value.shape == (S,) for value in reports.values())
    assert ("accepted" in reports) == sampler.traits.targets_density & sampler.traits.rejects
    if "accepted" in reports:
        assert (reports["accepted"] >= 0).all() and (reports["accepted"] <= 4).all()


@pytest.mark.parametrize("name", [name for name, sampler in EVERY.items() if sampler.traits.rejects])
def test_a_tiny_step_is_accepted_and_a_huge_one_rejected(name):
    start, trial, state = moves(sampler_of(name, step_size=1e-6))
    assert torch.equal(state["position"], trial) and not (trial == start).all(1).any()
    huge = 4.0 if isinstance(EVERY[name], fr.PCN) else 1e3
    start, trial, state = moves(sampler_of(name, step_size=huge), evaluation=lambda *of: evaluate(*of, weight=1e3))
    assert torch.equal(state["position"], start) and not (trial == start).all(1).any()


# The checks above can fail.


class Forgetful(fr.DGflow):
    """Each of these breaks one promise."""

    def observe(self, a, evaluation, state, step, noise):
        a -= a.mean(0)  # of all slots, in place
        return super().observe(a, evaluation, state, step, noise)

    @property
    def traits(self):
        return Traits(rejects=True)


@pytest.mark.parametrize(
    "check",
    [
        test_equal_inputs_give_equal_outputs_and_stay_as_they_are,
        test_slots_do_not_know_of_each_other,
        test_stochastic_samplers_alone_read_noise,
        test_samplers_that_reject_stay_where_a_trial_is_not_finite,
    ],
)
def test_a_sampler_that_breaks_its_promises_is_found(check, monkeypatch):
    monkeypatch.setitem(EVERY, "broken", Forgetful(0.3, gamma=0.5))
    with pytest.raises(AssertionError):
        check("broken")
