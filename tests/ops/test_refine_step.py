"""The step: every backend against the reference, the reference against one sample at a time in plain Python."""

import math
from dataclasses import fields, replace

import pytest
import torch

from fastrefine import ops
from fastrefine.noise import Noise, Stream, normal
from fastrefine.ops import slots
from fastrefine.samplers import DDLS, HMC, MALA, Collaborative, DGflow, Evaluation, Latent, dot
from fastrefine.samplers.metropolis import MetropolisSampler
from tests.support.step_machine import SAMPLERS, Options, bound, compare, device_of, drive, driven

BACKENDS = ("cpu", "triton")
RUNS = [
    ((1, 1), Options(keep_best=True)),
    ((5, 7), Options(lockstep=True, max_grad_norm=1.0)),
    ((2, 1025), Options(max_grad_norm=20.0, keep_best=True)),  # Triton works in blocks of 1024 features
]
# Every rule meets every run and both dtypes, every run meets both dtypes.
MET = [(rule, run, (r + run) % 2) for r, rule in enumerate(SAMPLERS) for run in range(len(RUNS))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rule", "run", "double"), MET)
def test_backends_equal_the_reference(backend, rule, run, double):
    shape, options = RUNS[run]
    args = (SAMPLERS[rule], shape, torch.float64 if double else torch.float32, options)
    compare(drive(backend, *args), driven("reference", *args))


# Of the eight ways to switch three options, each rule meets four that hold every pair of switches; the next rule the others.
SWITCHED = [(r, a, b, (a + b + i) % 2) for i, r in enumerate(SAMPLERS) for a in (0, 1) for b in (0, 1)]


@pytest.mark.parametrize(("rule", "norm", "lockstep", "keep_best"), SWITCHED)
def test_options_do_not_interfere(rule, norm, lockstep, keep_best):
    options = Options(bool(keep_best), bool(lockstep), 0.5 if norm else None, seed=3, pool_rows=5)
    args = (SAMPLERS[rule], (4, 5), torch.float32, options, 24)
    compare(drive("cpu", *args), drive("reference", *args))


CLAMPED = [name for name, sampler in SAMPLERS.items() if hasattr(sampler, "clamp")]
BOUNDS = [(0.0, 0.25), (-0.5, 0.0)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rule", "clamp"), [(rule, BOUNDS[r % 2]) for r, rule in enumerate(CLAMPED)], ids=str)
def test_a_clamp_bound_of_zero_is_a_bound(backend, rule, clamp):
    args = (replace(SAMPLERS[rule], clamp=clamp), (3, 7), torch.float32)
    records = drive(backend, *args)
    compare(records, driven("reference", *args))
    moved = torch.cat([r["slots.activation"][(r["slots.step"] > 0) & (r["slots.sample_id"] >= 0)] for r in records])
    assert len(moved) and moved.min() >= clamp[0] and moved.max() <= clamp[1]


BOX = Latent(torch.tensor([[1, 0], [-8, -8], [8, 8]]))  # no proposal of the script lies outside
WIDE = [MALA(0.01, adapt=3, latent=BOX), HMC(0.05, leapfrog=2, adapt=4, latent=BOX)]  # steps that are accepted at times


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("sampler", "dtype"), [(WIDE[0], torch.float64), (WIDE[1], torch.float32)], ids=["mala", "hmc"])
def test_tests_with_sums_over_many_features_equal_the_reference(backend, sampler, dtype):
    args = (sampler, (2, 1025), dtype, Options(max_grad_norm=20.0), 15)
    expected = driven("reference", *args)
    compare(drive(backend, *args), expected)
    tests = torch.cat([r["slots.step"][r["slots.sample_id"] >= 0] for r in expected]) // sampler.traits.transition_steps
    accepted = torch.cat([r["state.accepted"] for r in expected])
    assert (accepted > 0).any() and (accepted < tests).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_langevin_steps_without_noise_equal_the_reference(backend):
    args = (DDLS(0.3, 0.0), (3, 7), torch.float64)
    compare(drive(backend, *args), drive("reference", *args))


def served(before, after):
    """Slots that the step between two records served; fewer than live where the others waited."""
    return after["pool.counters"][slots.EVALUATIONS] - before["pool.counters"][slots.EVALUATIONS]


def test_the_script_meets_every_case():
    """What the parity tests compare is worth comparing: every status, refills, falls, rejected and idle slots."""
    records = drive("reference", SAMPLERS["backtracking"], (5, 7), torch.float64, steps=60)
    met = torch.cat([r["outputs.status"] for r in records]).unique().tolist()
    assert met == [slots.PENDING, slots.REACHED, slots.EXHAUSTED, slots.NONFINITE, slots.STALLED]
    assert any((r["slots.sample_id"] < 0).any() for r in records[1:])
    assert records[-1]["outputs.logit_falls"].max() > 0
    assert any((r["state.step_size"] < 0.3).any() for r in records)
    assert any(r["pool.counters"][slots.SHORTEST] < r["pool.counters"][slots.LONGEST] for r in records)
    assert any(0 < served(a, b) < a["pool.counters"][slots.LIVE] for a, b in zip(records, records[1:], strict=False))
    assert records[-1]["pool.counters"][slots.FINISHED] > 40


# Mutants: the parity tests can fail.


@pytest.mark.parametrize("rule", SAMPLERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flipped_sign_is_found(backend, rule):
    def flip(evaluation):
        return evaluation if evaluation.grad is None else evaluation._replace(grad=-evaluation.grad)

    args = (SAMPLERS[rule], (2, 3), torch.float32, Options(), 4)
    expected = drive("reference", *args)
    with pytest.raises(AssertionError, match=r"slots\.activation"):
        compare(drive(backend, *args, mutate=flip), expected)


@pytest.mark.parametrize("wrong", [{"gamma": 0.5 * 1.05**2}, {"step_size": 0.3003}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_five_percent_too_much_noise_and_a_wrong_step_size_are_found(backend, wrong):
    args = ((2, 3), torch.float32, Options(), 4)
    expected = drive("reference", SAMPLERS["noise"], *args)
    with pytest.raises(AssertionError, match=r"slots\.activation"):
        compare(drive(backend, replace(SAMPLERS["noise"], **wrong), *args), expected)


TEST, FOLD, UNIFORM, JITTER = MetropolisSampler.test, Latent.fold, Noise.uniform, Noise.jitter
FREE = Latent(torch.tensor([[0.0], [-torch.inf], [torch.inf]]))
FIELDS = {  # what the sampler of the reference may have wrong
    "ddls": [{"step_size": (0.3, 0.3)}, {"noise_scale": (1.0, 0.5)}, {"latent": FREE}],
    "mala": [{"target": 0.6}, {"adapt": 4}, {"step_size": 0.3003}, {"latent": FREE}],
    "mala_global": [{"global_every": 3}, {"global_every": None}],
    "pcn": [{"target": 0.6}, {"adapt": 4}, {"step_size": 0.3003}],
    "hmc": [{"target": 0.7}, {"adapt": 2}, {"leapfrog": 1}, {"leapfrog": 3}, {"latent": FREE}, {"jitter": 0.501}],
    "dot_adam": [{"projection": "none"}, {"lipschitz": 2.01}, {"step_size": 0.3003}],
    "dot_sgd": [{"projection": "radial"}, {"lipschitz": 2.01}],
    "dot_clip": [{"latent": FREE}],
}
TESTED = "mala", "mala_global", "pcn", "hmc"
FORMULAS = {  # and what may be wrong of its formulas: where, by what, for whom
    "a uniform of another stream": (Noise, "uniform", lambda own: UNIFORM(own, Stream.PROPOSAL), TESTED),
    "a jitter of another stream": (Noise, "jitter", lambda own, ago: 2 * UNIFORM(own).double() - 1, ("hmc",)),
    "a jitter of each step": (Noise, "jitter", lambda own, ago: JITTER(own, 0), ("hmc",)),
    "no correction of the ratio": (MetropolisSampler, "test", lambda *x: TEST(*x[:4], 0 * x[4], *x[5:]), TESTED),
    "clipped for folded": (Latent, "fold", lambda own, a: (a.clamp(*own.table[1:]), FOLD(own, a)[1]), ("ddls", "hmc")),
    "momenta that never turn": (Latent, "fold", lambda own, a: (FOLD(own, a)[0], torch.zeros_like(a).bool()), ("hmc",)),
    "no prior score": (Latent, "score", lambda own, a: torch.zeros_like(a), ("ddls", "mala", "hmc")),
    "another shift": (dot, "SHIFT", 2e-3, ("dot_adam", "dot_sgd", "dot_clip")),
}


MUTANT_RUN = (4, 5), torch.float32, Options(), 20


def differs(ours, expected):
    with pytest.raises(AssertionError, match=r"step \d+, "):
        compare(ours, expected)


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [(r, w) for r, found in FIELDS.items() for w in found],
    ids=lambda x: x if isinstance(x, str) else str(*x),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_field_is_found(backend, rule, wrong):
    mutant = replace(SAMPLERS[rule], **wrong)
    differs(driven(backend, SAMPLERS[rule], *MUTANT_RUN), drive("reference", mutant, *MUTANT_RUN))


@pytest.mark.parametrize(("rule", "name"), [(rule, name) for name, found in FORMULAS.items() for rule in found[3]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_formula_is_found(backend, rule, name, monkeypatch):
    ours = driven(backend, SAMPLERS[rule], *MUTANT_RUN)
    monkeypatch.setattr(*FORMULAS[name][:3])
    differs(ours, drive("reference", SAMPLERS[rule], *MUTANT_RUN))


@pytest.mark.parametrize("rule", FIELDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_not_clipped_is_found(backend, rule):
    clipped = replace(MUTANT_RUN[2], max_grad_norm=1.0)
    ours, (shape, dtype, _, steps) = driven(backend, SAMPLERS[rule], *MUTANT_RUN), MUTANT_RUN
    differs(ours, drive("reference", SAMPLERS[rule], shape, dtype, clipped, steps))


# The reference against its specification: one sample at a time, in plain Python floats.

TARGET = (0.5, -1.0, 2.0)


def evaluate(a):
    """A quadratic logit with its non-saturating loss, row by row; NaN where a[0] > 3."""
    d = 1 - ((a - torch.tensor(TARGET, dtype=a.dtype)) ** 2).sum(1)
    d = torch.where(a[:, 0] > 3, torch.nan, d)
    slope = -torch.sigmoid(-d)  # dL/dd
    return Evaluation(d, torch.nn.functional.softplus(-d), slope[:, None] * -2 * (a - torch.tensor(TARGET, dtype=a.dtype)))


def oracle(sampler, sample_id, start, last_step, threshold, seed):
    """(position, logit, steps, falls, status) of one sample: the loop of docs/design.md."""
    a, position, standing, falls = list(start), list(start), math.nan, 0
    best_loss, best_grad, size = math.inf, [], sampler.step_size
    velocity = [0.0] * len(a)
    for step in range(last_step + 1):
        seen = evaluate(torch.tensor([a], dtype=torch.float64))
        d, loss, g = float(seen.logit), float(seen.loss), seen.grad[0].tolist()
        falls += step > 0 and d < standing
        finite = math.isfinite(d)
        if not finite and (step == 0 or not sampler.traits.rejects):
            return position, d if step == 0 else standing, step, falls, slots.NONFINITE
        if sampler.traits.rejects:
            accept = step == 0 or (finite and loss <= best_loss)
            if step > 0:
                size = min(size * 1.2, 1e6 * sampler.step_size) if accept else size * 0.5
            if accept:
                position, standing, best_loss, best_grad = list(a), d, loss, g
        else:
            position, standing, best_grad = list(a), d, g
        if standing >= threshold:
            return position, standing, step, falls, slots.REACHED
        if step == last_step:
            return position, standing, step, falls, slots.EXHAUSTED
        if getattr(sampler, "optimizer", "") == "momentum":
            velocity = [sampler.momentum * v + size * s for v, s in zip(velocity, best_grad, strict=True)]
            a = [x - v for x, v in zip(position, velocity, strict=True)]
        else:
            a = [x - size * s for x, s in zip(position, best_grad, strict=True)]
        if sampler.traits.stochastic:
            ids, steps = torch.tensor([sample_id]), torch.tensor([step])
            xi = normal(seed, ids, steps, len(a), 0, torch.float64)[0].tolist()
            a = [x + math.sqrt(2 * sampler.step_size * sampler.gamma) * n for x, n in zip(a, xi, strict=True)]
    raise AssertionError("unreachable")


def refine_all(sampler, starts, last_step, threshold, seed, num_slots, backend="reference"):
    """Every proposal through the slots until all are finished; the outputs by id."""
    count, features = starts.shape
    rule = slots.Rule(sampler, seed)
    own, pool, outputs = slots.allocate(num_slots, features, count, count, rule, torch.float64, torch.device("cpu"))
    pool.activation.copy_(starts)
    pool.last_step.copy_(last_step)
    pool.threshold.copy_(threshold)
    pool.counters[slots.END] = count
    ops.refine_step(own, None, pool, outputs, rule, backend=backend)
    while pool.counters[slots.LIVE] > 0:
        ops.refine_step(own, evaluate(own.activation), pool, outputs, rule, backend=backend)
    assert pool.counters[slots.FINISHED] == count
    return outputs


PLAIN = [SAMPLERS["sgd"], SAMPLERS["momentum"], Collaborative(4.0), DGflow(0.2, gamma=0.3)]


@pytest.mark.parametrize("num_slots", [1, 4, 50])
@pytest.mark.parametrize("sampler", PLAIN, ids=["sgd", "momentum", "backtracking", "noise"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_each_sample_goes_its_own_way_whatever_its_neighbours(backend, sampler, num_slots):
    device_of(backend)
    generator = torch.Generator().manual_seed(0)
    starts = 2 * torch.randn(30, 3, dtype=torch.float64, generator=generator)
    last_step = torch.randint(9, (30,), dtype=torch.int32, generator=generator)
    threshold = torch.where(torch.rand(30, generator=generator) < 0.5, 0.3, torch.inf).double()
    outputs = refine_all(sampler, starts, last_step, threshold, 2**40 + 1, num_slots, backend)
    for i in range(30):
        wanted = oracle(sampler, i, starts[i].tolist(), int(last_step[i]), float(threshold[i]), 2**40 + 1)
        position, logit, *counts = wanted
        assert [int(outputs.steps[i]), int(outputs.logit_falls[i]), int(outputs.status[i])] == counts, i
        torch.testing.assert_close(outputs.activation[i], torch.tensor(position, dtype=torch.float64), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            outputs.logit[i], torch.tensor(logit, dtype=torch.float64), rtol=1e-9, atol=1e-9, equal_nan=True
        )
    assert len(outputs.status[:-1].unique()) >= 2


# Edges, each backend.


def machine(sampler, backend, num_slots=2, features=3, count=6, last_step=4, **options):
    """A filled machine of float64 and a function that steps it with the same numbers for every slot."""
    device = device_of(backend)
    rule = slots.Rule(bound(sampler, features, torch.float64, device), 0, **options)
    own, pool, outputs = slots.allocate(num_slots, features, count, count, rule, torch.float64, torch.device(device))
    pool.activation.copy_(torch.arange(count, dtype=torch.float64)[:, None] + 1)
    pool.last_step.copy_(torch.tensor(last_step))
    pool.threshold.fill_(torch.inf)
    pool.counters[slots.END] = count

    def step(logit=0.0, loss=0.0, grad=0.5):
        s = own.activation.new_full((num_slots,), 1.0)
        g = None if grad is None else torch.full_like(own.activation, grad)
        ops.refine_step(own, Evaluation(s * logit, s * loss, g), pool, outputs, rule, backend=backend)

    ops.refine_step(own, None, pool, outputs, rule, backend=backend)
    return own, pool, outputs, step


every_backend = pytest.mark.parametrize("backend", ["reference", *BACKENDS])


@every_backend
def test_refill_resets_momentum(backend):
    own, _, _, step = machine(SAMPLERS["momentum"], backend, last_step=1)
    step()
    assert (own.state["velocity"] != 0).all()
    step()
    assert own.sample_id.tolist() == [2, 3] and own.source.tolist() == [2, 3] and own.step.tolist() == [0, 0]
    assert (own.state["velocity"] == 0).all() and own.state["logit"].isnan().all()


@every_backend
def test_a_nonfinite_trial_ends_the_sample_where_it_stood(backend):
    own, _, outputs, step = machine(SAMPLERS["sgd"], backend)
    step(logit=1.0)
    step(logit=math.nan)
    assert outputs.status[:2].tolist() == [slots.NONFINITE] * 2 and outputs.steps[:2].tolist() == [1, 1]
    assert outputs.activation[:2, 0].tolist() == [1.0, 2.0] and outputs.logit[:2].tolist() == [1.0, 1.0]
    assert own.sample_id.tolist() == [2, 3]


@every_backend
def test_backtracking_rejects_a_nonfinite_trial_and_halves_the_step(backend):
    own, _, _, step = machine(Collaborative(0.5), backend)
    step()
    assert own.activation[0].tolist() == [0.75] * 3
    step(loss=math.inf)
    assert own.activation[0].tolist() == [0.875] * 3 and own.state["step_size"].tolist() == [0.25] * 2


@every_backend
@pytest.mark.parametrize("grad", [math.nan, None])
def test_the_gradient_of_a_last_evaluation_is_never_read(backend, grad):
    _, _, outputs, step = machine(SAMPLERS["adam"], backend, last_step=0)
    step(logit=2.0, grad=grad)
    assert outputs.status[:2].tolist() == [slots.EXHAUSTED] * 2 and outputs.steps[:2].tolist() == [0, 0]
    assert outputs.activation[:2, 0].tolist() == [1.0, 2.0]


@every_backend
@pytest.mark.parametrize(("grad", "accepted"), [(math.nan, 0.0), (0.5, 1.0)])
def test_a_metropolis_test_reads_the_gradient_of_the_last_evaluation(backend, grad, accepted):
    _, _, outputs, step = machine(MALA(0.3, latent=BOX), backend, last_step=1)
    step()
    step(logit=100.0, loss=-100.0, grad=grad)
    assert outputs.status[:2].tolist() == [slots.EXHAUSTED] * 2 and outputs.scalars[2, :2].tolist() == [accepted] * 2
    assert outputs.logit[:2].tolist() == [100 * accepted] * 2
    assert ((outputs.activation[:2, 0].cpu() == torch.tensor([1.0, 2.0])) == (accepted == 0)).all()


@every_backend
def test_counters_tell_the_least_and_most_updates_that_live_slots_have_left(backend):
    own, pool, _, step = machine(SAMPLERS["sgd"], backend, num_slots=3, count=4, last_step=[1, 5, 7, 9])
    seen = [pool.counters[slots.SHORTEST :].tolist()]
    for _ in range(3):
        step()
        seen.append(pool.counters[slots.SHORTEST :].tolist())
    assert seen == [[1, 7], [0, 6], [3, 9], [2, 8]]
    assert own.sample_id.tolist() == [3, 1, 2]


@every_backend
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "backtracking", "noise", "ddls", "dot_adam"])
def test_a_slot_that_waits_goes_the_same_way_as_without_the_extra_evaluation(backend, rule):
    """Slot 0 gets its last evaluation without a gradient, in a step of its own, or together with slot 1."""

    def run(wait):
        own, pool, outputs, step = machine(SAMPLERS[rule], backend, count=2, last_step=[1, 4], keep_best=True)
        step(logit=0.5)
        if wait:
            step(logit=7.0, loss=-3.0, grad=None)  # would be the best of slot 1
            assert own.sample_id.tolist() == [-1, 1] and pool.counters.tolist() == [2, 2, 1, 1, 3, 2, 3, 3]
        for logit in (0.25, 1.0, 0.75, 0.5):
            step(logit=logit, loss=-logit)
        counters = pool.counters.tolist()
        assert counters == [2, 2, 0, 2, 7, 5 + wait, 0, 0]
        rows = {f.name: getattr(outputs, f.name) for f in fields(outputs)}
        return {name: tensor[:, 1] if name == "scalars" else tensor[1] for name, tensor in rows.items()}

    straight = run(False)
    for name, tensor in run(True).items():
        assert torch.equal(tensor, straight[name]), name


@every_backend
def test_slots_without_a_sample_stay_empty_and_keep_their_activation(backend):
    own, pool, outputs, step = machine(SAMPLERS["sgd"], backend, num_slots=4, count=3, last_step=0)
    assert own.sample_id.tolist() == [0, 1, 2, -1]
    step()
    assert own.sample_id.tolist() == [-1] * 4 and pool.counters.tolist() == [3, 3, 0, 3, 3, 1, 0, 0]
    assert own.activation[:3, 0].tolist() == [1.0, 2.0, 3.0]
    step()
    assert pool.counters.tolist() == [3, 3, 0, 3, 3, 2, 0, 0] and outputs.status[:3].tolist() == [slots.EXHAUSTED] * 3


@every_backend
def test_best_is_kept_when_the_last_iterate_is_worse(backend):
    _, _, outputs, step = machine(SAMPLERS["sgd"], backend, last_step=2, keep_best=True)
    for logit in (0.0, 3.0, 1.0):
        step(logit=logit)
    assert outputs.logit[:2].tolist() == [3.0] * 2 and outputs.logit_falls[:2].tolist() == [1, 1]
    torch.testing.assert_close(outputs.activation[:2, 0].cpu(), torch.tensor([0.85, 1.85], dtype=torch.float64))


@pytest.mark.parametrize("rule", ["noise", "ddls", "mala", "hmc", "dot_adam", "dot_sgd"])
def test_threads_change_no_bit(rule, monkeypatch):
    device_of("cpu")
    args = (SAMPLERS[rule], (40, 5000), torch.float32, Options(max_grad_norm=30.0), 6)
    one = drive("cpu", *args)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    three = drive("cpu", *args)
    for a, b in zip(one, three, strict=True):
        assert all(torch.equal(a[k].nan_to_num(9), b[k].nan_to_num(9)) for k in a)
