"""Shaping, tuning and fitting of discriminators; and that nothing of the caller's changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrefine as fr
from fastrefine.target import Target


def pair(batch_norm=False):
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    norm = [nn.BatchNorm1d(32)] if batch_norm else []
    d = nn.Sequential(nn.Linear(2, 32), *norm, nn.LeakyReLU(0.2), nn.Linear(32, 1))
    return g, d


REAL = torch.randn(400, 2, generator=torch.Generator().manual_seed(1)) * 0.2 + torch.tensor([1.0, -1.0])


def refiner(networks=None, **options):
    g, d = networks or pair()
    defaults = dict(sampler=fr.Collaborative(0.1), at="output", max_steps=8, prior=fr.Normal(2), num_slots=32)
    return fr.Refiner(g, d, **{**defaults, **options})


def test_one_iteration_equals_algorithm_2_written_out():
    one = refiner()
    shaped = fr.shape_discriminator(one, REAL, 1, 16, 0.01, optimizer="sgd", seed=5, stop=fr.stopping.UniformStep())
    batch = fr.Refiner(
        one.generator, one.discriminator, one.sampler, at="output", max_steps=8, prior=fr.Normal(2), num_slots=16,
        stop=fr.stopping.UniformStep(),
    ).sample(16, seed=5)  # fmt: skip
    from fastrefine.batches import RealBatches

    x, _ = RealBatches(REAL, 16, 5).batch(0)
    d = copy.deepcopy(one.discriminator)
    loss = F.softplus(-d(x)).mean() + F.softplus(d(batch.images)).mean()
    loss.backward()
    for p, q in zip(d.parameters(), shaped.parameters(), strict=True):
        torch.testing.assert_close(q.detach(), p.detach() - 0.01 * p.grad)


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_a_refreshed_refiner_equals_a_new_one_with_the_same_discriminator(batch_norm, monkeypatch):
    traces = []
    original = Target._trace
    monkeypatch.setattr(Target, "_trace", lambda self, a, c: traces.append(len(a)) or original(self, a, c))
    networks = pair(batch_norm=True)
    one = refiner(networks)
    seen = []
    fr.shape_discriminator(one, REAL, 6, 16, 0.01, batch_norm=batch_norm, seed=2, callback=seen.append)
    assert traces.count(16) == 1, "the step is traced once, and weights are copied in place afterwards"
    assert [s["iteration"] for s in seen] == list(range(6))
    twin = one.with_discriminator(copy.deepcopy(networks[1]))
    before = twin.sample(20)
    _, other = pair(batch_norm=True)
    with torch.no_grad():
        other[0].weight.mul_(3)
        other[1].running_mean.fill_(0.4)
    twin._refresh(other)
    after, fresh = twin.sample(20), one.with_discriminator(other).sample(20)
    torch.testing.assert_close(after.images, fresh.images)
    assert not torch.allclose(before.images, after.images)


def test_shaping_teaches_the_discriminator_where_refinement_must_end():
    g, d = pair()
    with torch.no_grad():
        d[2].weight.mul_(0.1)
    one = refiner((g, d), max_steps=30, sampler=fr.Collaborative(0.5))
    shaped = fr.shape_discriminator(one, REAL, 300, 64, 2e-3, seed=0)
    distance = {
        name: float((r.sample(300, seed=9).images - torch.tensor([1.0, -1.0])).norm(dim=1).mean())
        for name, r in (("as it is", one), ("shaped", one.with_discriminator(shaped)))
    }
    assert distance["shaped"] < 0.5 * distance["as it is"]


def test_tuning_trains_on_raw_samples():
    one = refiner()
    tuned = fr.tune_discriminator(one, REAL, 1, 16, 0.01, optimizer="sgd", seed=5)
    from fastrefine.batches import RealBatches

    x, _ = RealBatches(REAL, 16, 5).batch(0)
    raw = refiner(max_steps=0, num_slots=16).sample(16, seed=5).images
    d = copy.deepcopy(one.discriminator)
    (F.softplus(-d(x)).mean() + F.softplus(d(raw)).mean()).backward()
    for p, q in zip(d.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(q.detach(), p.detach() - 0.01 * p.grad)


def test_equal_seeds_give_equal_discriminators_and_leave_torch_and_the_networks_alone():
    g, d = pair(batch_norm=True)
    for p in d.parameters():
        p.requires_grad_(False)
    one = refiner((g, d))
    d.train()
    state, rng = copy.deepcopy(d.state_dict()), torch.random.get_rng_state()
    shaped = [fr.shape_discriminator(one, REAL, 3, 16, 0.01, seed=4, batch_norm="train") for _ in range(2)]
    for a, b in zip(*(s.state_dict().values() for s in shaped), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(rng, torch.random.get_rng_state()) and d.training
    assert all(torch.equal(v, state[k]) for k, v in d.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in d.parameters())
    assert not torch.equal(shaped[0].state_dict()["0.weight"], state["0.weight"])


class Images(torch.utils.data.Dataset):
    def __init__(self, labelled):
        self.labelled = labelled

    def __len__(self):
        return len(REAL)

    def __getitem__(self, i):
        return (REAL[i], i % 2) if self.labelled else REAL[i]


@pytest.mark.parametrize("labelled", [False, True])
def test_real_images_come_as_tensor_dataset_or_loader(labelled):
    one = refiner()
    for real in (REAL, Images(labelled), torch.utils.data.DataLoader(Images(labelled), 16)):
        assert isinstance(fr.shape_discriminator(one, real, 30, 16, 0.01), nn.Module)
    a = fr.shape_discriminator(one, REAL, 2, 16, 0.01)
    b = fr.shape_discriminator(one, Images(labelled), 2, 16, 0.01)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def test_critics_are_shaped_with_a_gradient_penalty_and_probabilities_with_their_sigmoid():
    g, d = pair()
    critic = refiner((g, d), sampler=fr.Collaborative(0.05, "wasserstein"), discriminator_output="critic")
    shaped = fr.shape_discriminator(critic, REAL, 60, 32, 2e-3)
    x = REAL.clone().requires_grad_()
    slopes = torch.autograd.grad(shaped(x).sum(), x)[0].norm(dim=1)
    assert 0.5 < slopes.mean() < 1.5
    logit = fr.shape_discriminator(refiner((g, d)), REAL, 3, 16, 0.01)
    probability = fr.shape_discriminator(
        refiner((g, nn.Sequential(d, nn.Sigmoid())), discriminator_output="probability"), REAL, 3, 16, 0.01
    )
    for p, q in zip(logit.parameters(), probability.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)


def test_given_latents_serve_where_there_is_no_prior():
    g, d = pair()
    one = fr.Refiner(g, d, fr.Collaborative(0.1), at="output", max_steps=3, num_slots=8)
    with pytest.raises(fr.InputError, match="no prior: pass latents"):
        fr.shape_discriminator(one, REAL, 1, 8, 0.01)
    assert isinstance(fr.shape_discriminator(one, REAL, 2, 8, 0.01, latents=torch.randn(50, 2)), nn.Module)


def test_fitted_discriminator_tells_real_from_generated_and_keeps_its_best():
    g, _ = pair()
    state = torch.random.get_rng_state()
    fitted = fr.fit_discriminator(g, REAL, 300, prior=fr.Normal(2), check_every=50, learning_rate=2e-3, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    fakes = g(torch.randn(400, 2, generator=torch.Generator().manual_seed(3))).detach()
    assert fr.diagnose(fitted(REAL), fitted(fakes)).brier < 0.1


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 8, 8), (7,), (3, 64, 48)])
def test_default_discriminator_gives_one_logit_per_sample_for_any_shape(shape):
    d = fr.models.default_discriminator(shape, width=8)
    assert d(torch.randn(2, *shape)).shape == (2,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(iterations=-1), "iterations"), (dict(batch_size=0), "batch_size"), (dict(learning_rate=0.0), "learning_rate"),
        (dict(optimizer="lion"), "optimizer"), (dict(batch_norm="maybe"), "batch_norm"), (dict(real=REAL[:0]), "empty"),
        (dict(real=3), "wanted a tensor"), (dict(gradient_penalty=-1.0), "gradient_penalty"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(options, message):
    given = {"real": REAL, "iterations": 1, "batch_size": 8, "learning_rate": 0.1, **options}
    with pytest.raises(fr.InputError, match=message):
        fr.shape_discriminator(refiner(), **given)
