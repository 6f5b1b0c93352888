"""Samplers at their edges: what a call must not change, priors and samplers of one's own, warnings that must not come."""

import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fastrefine as fr
from fastrefine.priors import Prior
from fastrefine.samplers import Sampler
from fastrefine.samplers.base import per_slot


class Conditional(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.table, self.out = nn.Embedding(10, width), nn.Linear(width, out)

    def forward(self, x, labels):
        return self.out(torch.tanh(x + 3 * self.table(labels)))


def conditional(**options):
    torch.manual_seed(0)
    g, d = Conditional(4, 6), Conditional(6, 1)
    return fr.Refiner(g, d, **{"sampler": fr.DOT(0.05), "prior": fr.Normal(4), "max_steps": 5, "num_slots": 16, **options})


def networks():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), nn.Sequential(
        nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)
    )


def told(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("options", [{}, {"sampler": fr.Collaborative(1.0), "precision": "bfloat16"}], ids=["dot", "slack"])
def test_a_sample_does_not_depend_on_the_labels_of_others_or_on_earlier_calls(options):
    labels = torch.arange(96) // 10
    whole = conditional(**options).sample(96, labels=labels)
    part = conditional(**options).sample(48, first_id=48, labels=labels[48:])
    used = conditional(**options)
    used.sample(1, seed=9, labels=9)
    later = used.sample(48, first_id=48, labels=labels[48:])
    assert torch.equal(part.images, whole.images[48:]) and torch.equal(later.images, whole.images[48:])


class Upward(nn.Module):
    """d(x) = |x|^2 / 4: laws of sharpened priors have less of it."""

    def forward(self, x):
        return 0.25 * x.square().sum(1)


@pytest.mark.parametrize("noise_scale", [0.0, 0.1])
def test_langevin_with_less_noise_may_lose_logit_without_a_warning(noise_scale):
    sampler = fr.DDLS(0.01, noise_scale=noise_scale)
    refiner = fr.Refiner(nn.Identity(), Upward(), sampler, prior=fr.Normal(8), max_steps=100, num_slots=64)
    assert told(lambda: refiner.sample(64)) == []
    out = refiner.sample(64)
    assert out.logits.mean() < out.initial_logits.mean() and fr.diagnose_steps(out, sampler).stable


def test_a_few_samples_prove_nothing():
    g, d = networks()
    for seed in range(20):
        refiner = fr.Refiner(g, d, fr.DDLS(0.1), prior=fr.Normal(4), max_steps=5, num_slots=2)
        assert told(lambda seed=seed, refiner=refiner: refiner.sample(2, seed=seed)) == []


@pytest.mark.parametrize(
    ("sampler", "warned"), [(fr.DDLS(0.1), True), (fr.MALA(0.1), False), (fr.DGflow(0.1), False)], ids=repr
)
def test_clipping_warns_where_it_changes_the_law(sampler, warned):
    found = told(lambda: fr.Refiner(*networks(), sampler, prior=fr.Normal(4), max_grad_norm=0.5))
    assert bool([text for text in found if "max_grad_norm" in text and "not exact" in text]) is warned


def test_adaptation_is_not_advised_where_it_is_used():
    g, d = networks()
    found = told(lambda: fr.Refiner(g, d, fr.MALA(1e6, adapt=3), prior=fr.Normal(4), max_steps=3).sample(64))
    assert any("adapt for longer" in text for text in found)


def own_prior(table=None):
    class Mine(Prior):
        shape = (4,)

        def sample(self, ids, seed, dtype=torch.float32, stream=2):
            return fr.Normal(4).sample(ids, seed, dtype, stream)

    if table is not None:
        Mine.table = lambda self: table
    return Mine()


def test_a_prior_without_a_table_serves_what_does_not_read_it():
    for sampler in (fr.DOT(0.1), fr.DGflow(0.1), fr.Collaborative(0.1)):
        out = fr.Refiner(*networks(), sampler, prior=own_prior(), max_steps=3).sample(5)
        assert out.images.isfinite().all()
    with pytest.raises(fr.InputError, match=r"no table\(\)"):
        fr.Refiner(*networks(), fr.MALA(0.1), prior=own_prior(), max_steps=3).sample(5)


def test_a_table_may_be_a_view_in_the_states_own_dtype():
    column = torch.tensor([[1.0], [-2.0], [2.0]])
    for sampler in (fr.DDLS(0.5), fr.HMC(0.5, leapfrog=1), fr.DOT(0.5)):
        options = dict(sampler=sampler, max_steps=5, num_slots=8)
        out = fr.Refiner(*networks(), prior=own_prior(column.expand(3, 4)), **options).sample(20)
        wanted = fr.Refiner(*networks(), prior=own_prior(column.expand(3, 4).double().clone()), **options).sample(20)
        assert torch.equal(out.images, wanted.images) and out.latents.abs().max() <= 5


@pytest.mark.parametrize("column", [(1.0, 0.0, torch.inf), (1.0, 2.0, 1.0)], ids=["one wall", "order"])
def test_bounds_that_cannot_be_folded_are_refused(column):
    table = torch.tensor(column)[:, None].repeat(1, 4)
    with pytest.raises(fr.InputError, match="two finite bounds"):
        fr.Refiner(*networks(), fr.DDLS(0.1), prior=own_prior(table), max_steps=1).sample(2)
    with pytest.raises(fr.InputError, match=r"wanted \(3, 4\)"):
        fr.Refiner(*networks(), fr.DDLS(0.1), prior=own_prior(table[:, :2]), max_steps=1).sample(2)


def test_priors_judge_latents_in_their_own_shape():
    prior = fr.Normal(6, 1, 1)
    z = prior.sample(torch.arange(5), 0)
    assert torch.equal(prior.log_prob(z), fr.Normal(6).log_prob(z.flatten(1))) and prior.log_prob(z).shape == (5,)
    assert torch.equal(prior.score(z), -z)
    with pytest.raises(fr.InputError, match="6 elements"):
        prior.log_prob(torch.zeros(5, 7))


@dataclass(frozen=True)
class Mean(Sampler):
    """Returns the running mean of its iterates; keeps a matrix for each sample, and forgets to return it."""

    rate: float | None = None

    def bind(self, networks):
        return Mean(0.1)

    def init(self, a, sample):
        count = self.rate * a.new_zeros(len(a), 2, 3)
        return {**super().init(a, sample), "mean": torch.zeros_like(a), "matrix": count}

    def observe(self, a, evaluation, state, step, noise):
        k = per_slot(step.to(a.dtype))
        mean = (k * state["mean"] + a) / (k + 1)
        return {"position": a, "logit": evaluation.logit, "grad": evaluation.grad, "mean": mean}

    def propose(self, state, step, noise):
        return state["position"] - self.rate * state["grad"], {**state, "matrix": state["matrix"] + 1 + step[:, None, None]}

    def position(self, state):
        return state["mean"]


@pytest.mark.parametrize("num_slots", [3, 4])
def test_a_sampler_of_ones_own_keeps_what_it_likes(num_slots):
    def run(max_steps, n=10, **call):
        return fr.Refiner(*networks(), Mean(), prior=fr.Normal(4), max_steps=max_steps, num_slots=num_slots).sample(n, **call)

    out = run(8, snapshots=(3,))
    assert torch.equal(out.snapshots[3].images, run(3).images)
    assert not torch.equal(out.snapshots[3].images, out.images)
    assert run(8, n=0).images.shape == (0, 3)


def test_arguments_stand_in_the_order_of_their_importance():
    assert fr.MALA(0.1, 2.0) == fr.MALA(step_size=0.1, logit_scale=2.0)
    assert fr.HMC(0.1, 5, 2.0) == fr.HMC(step_size=0.1, leapfrog=5, logit_scale=2.0)
    assert fr.DDLS(0.1, 0.5, 2.0) == fr.DDLS(step_size=0.1, noise_scale=0.5, logit_scale=2.0)
    assert fr.DDLS(torch.tensor(0.5)).step_size == (0.5,)


def test_parts_with_other_snapshots_are_not_joined():
    refiner = fr.Refiner(*networks(), fr.DGflow(0.1), prior=fr.Normal(4), max_steps=3)
    with pytest.raises(fr.InputError, match="different numbers of steps"):
        fr.Result.concatenate([refiner.sample(2, snapshots=(1,)), refiner.sample(2)])
    with pytest.raises(fr.InputError, match="wanted a Result"):
        fr.diagnose_steps(3, refiner.sampler)


def test_a_sampler_is_bound_once_for_each_discriminator(monkeypatch):
    g, d = networks()
    bound = []
    monkeypatch.setattr(fr.DOT, "bind", lambda self, networks, bind=fr.DOT.bind: bound.append(1) or bind(self, networks))
    stop = fr.stopping.MedianOfReal()
    refiner = fr.Refiner(g, d, fr.DOT(0.1), prior=fr.Normal(4), max_steps=3, real=torch.randn(50, 3), stop=stop, num_slots=8)
    refiner.sample(4)
    assert len(bound) == 1
    refiner._networks.refresh(networks()[1])
    assert len(bound) == 2
