"""FAULTS 9 and 10: networks that are not repeatable, or whose samples are not independent."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrefine as fr
from tests.support.fault_networks import LATENT, discriminator, generator, refiner, same_result, told

N = 9


class Noise(nn.Module):
    """A noise layer that ignores the mode."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


class Deviation(nn.Module):
    """Minibatch standard deviation: one more feature, the same for the whole batch (Karras et al. 2018)."""

    def forward(self, x):
        spread = x.std(0, correction=0).mean()
        return torch.cat([x, spread.expand(len(x), 1)], 1)


class BatchMean(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Around(nn.Module):
    """A function applied inside forward, outside any leaf module."""

    def __init__(self, function, module):
        super().__init__()
        self.function, self.module = function, module

    def forward(self, x):
        return self.module(self.function(x))


def with_deviation():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), Deviation(), nn.Linear(9, 1))


def trainable_pair():
    torch.manual_seed(4)
    g = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    d = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Tanh(), nn.utils.spectral_norm(nn.Linear(8, 1)))
    g(torch.randn(20, 4)), d(torch.randn(20, 3))  # statistics and power iterations
    return g, d


def test_networks_in_train_mode_are_evaluated_in_eval_mode_and_stay_in_train_mode():
    """FAULTS 9"""
    g, d = trainable_pair()
    g[4].eval()  # a mixed state comes back as it was
    modes = [m.training for m in (*g.modules(), *d.modules())]
    weights = {**g.state_dict(prefix="g."), **d.state_dict(prefix="d.")}
    weights = {name: value.clone() for name, value in weights.items()}
    out = refiner(g, d, at="2").sample(N)
    assert modes == [m.training for m in (*g.modules(), *d.modules())]
    after = {**g.state_dict(prefix="g."), **d.state_dict(prefix="d.")}
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert same_result(out, refiner(g.eval(), d.eval(), at="2").sample(N))


def test_modules_that_a_given_function_reads_are_put_back_also_after_an_exception():
    """FAULTS 9"""
    g, _ = trainable_pair()
    split = fr.Split(lambda z: (g[:2](z), ()), lambda a: g[2:](a))
    seen = []
    refiner(split, callback=lambda _: seen.append(g.training)).sample(N)
    assert seen and g.training and g[3].training

    def stop(_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        refiner(split, callback=stop).sample(N)
    assert g.training and g[1].training and g[3].training


def test_methods_given_as_halves_run_in_eval_mode_and_any_precision():
    """FAULTS 9, 20"""

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = trainable_pair()[0]

        def encode(self, z):
            return self.body[:2](z), ()

        def decode(self, a):
            return self.body[2:](a)

    g = Halves()
    out = refiner(fr.Split(g.encode, g.decode)).sample(N)
    assert g.body[3].training
    assert torch.allclose(out.images, refiner(g.body, at="1").sample(N).images, atol=1e-6)
    low = refiner(fr.Split(g.encode, g.decode), precision="bfloat16").sample(N)
    assert torch.allclose(low.images, out.images, atol=0.1)
    exact = refiner(fr.Split(g.encode, g.decode), precision="float64").sample(N)
    assert torch.allclose(exact.images.float(), out.images, atol=1e-5)
    assert g.body[4].weight.dtype == torch.float32


@pytest.mark.parametrize(("side", "at"), [("generator", "input"), ("generator", "0"), ("discriminator", "output")])
def test_noise_layers_are_named(side, at):
    """FAULTS 9"""
    networks = {"g": generator(), "d": discriminator()}
    networks[side[0]].insert(2, Noise())
    with pytest.raises(fr.CouplingError, match=side + r" module '2' \(Noise\) gives different outputs for the same"):
        refiner(**networks, at=at).sample(N)


def test_noise_in_a_function_is_put_down_to_the_module_that_calls_it():
    """FAULTS 9"""
    noisy = nn.Sequential(Around(lambda x: F.dropout(x, 0.5), nn.Linear(3, 8)), nn.Tanh(), nn.Linear(8, 1))
    with pytest.raises(fr.CouplingError, match=r"discriminator module '0' \(Around\) gives different outputs"):
        refiner(d=noisy).sample(N)


def test_dropout_that_obeys_the_mode_is_no_noise():
    """FAULTS 9"""
    g, d = trainable_pair()
    a, b = (refiner(g, d).sample(N) for _ in range(2))
    assert same_result(a, b)


def test_minibatch_deviation_is_named_and_refused():
    """FAULTS 10"""
    with pytest.raises(fr.CouplingError, match=r"discriminator module '2' \(Deviation\) mixes the samples.*lockstep"):
        refiner(d=with_deviation()).sample(N)


@pytest.mark.parametrize("at", ["input", "0", "output"])
def test_coupling_in_the_generator_is_named_and_refused(at):
    """FAULTS 10"""
    g = nn.Sequential(nn.Linear(LATENT, 8), BatchMean(), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(fr.CouplingError, match=r"generator module '1' \(BatchMean\) mixes the samples"):
        refiner(g, at=at).sample(N)


def test_batch_norm_without_running_statistics_is_coupling():
    """FAULTS 10"""
    g = nn.Sequential(nn.Linear(LATENT, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3))
    with pytest.raises(fr.CouplingError, match=r"'1' \(BatchNorm1d\) mixes the samples"):
        refiner(g).sample(N)


def test_coupling_in_a_function_is_put_down_to_the_module_that_calls_it():
    """FAULTS 10"""
    d = nn.Sequential(nn.Linear(3, 8), Around(lambda x: x / x.norm(), nn.Linear(8, 1)))
    with pytest.raises(fr.CouplingError, match=r"discriminator module '1' \(Around\) mixes the samples"):
        refiner(d=d).sample(N)


def test_dependence_on_the_place_in_the_batch_is_coupling():
    """FAULTS 10"""

    class Counting(nn.Module):
        def forward(self, x):
            return x + torch.arange(len(x))[:, None]

    with pytest.raises(fr.CouplingError, match="mixes the samples"):
        refiner(d=nn.Sequential(nn.Linear(3, 8), Counting(), nn.Linear(8, 1))).sample(N)


def groups(g, d, first, last, size, steps, rate):
    """Images of ids first ... last - 1 by a plain loop over the groups that hold them."""
    found = {}
    for base in range(first // size * size, last, size):
        ids = torch.arange(base, base + size)
        a = fr.Normal(LATENT).sample(ids, 0, torch.float64)
        for _ in range(steps):
            leaf = a.clone().requires_grad_()
            a = a - rate * torch.autograd.grad(F.softplus(-d(g(leaf))).sum(), leaf)[0]
        found |= dict(zip(ids.tolist(), g(a).detach(), strict=True))
    return torch.stack([found[i] for i in range(first, last)])


@pytest.mark.parametrize("coupled", ["discriminator", "generator"])
def test_lockstep_equals_a_plain_loop_over_fixed_groups(coupled):
    """FAULTS 10: results depend neither on n nor on first_id."""
    g, d = generator().double(), discriminator().double()
    if coupled == "discriminator":
        d = with_deviation().double()
    else:
        g.insert(1, BatchMean())
    sampler = fr.Collaborative(0.3, control="fixed")
    options = {"coupling": "lockstep", "precision": "float64", "max_steps": 3}
    r = refiner(g, d, sampler, **options)
    for first_id, n in ((0, 8), (0, 5), (3, 4), (6, 1)):
        out = r.sample(n, first_id=first_id)
        expected = groups(g, d, first_id, first_id + n, 4, 3, 0.3)
        assert len(out) == n and torch.equal(out.ids, torch.arange(first_id, first_id + n))
        assert torch.allclose(out.images, expected, atol=1e-12), (first_id, n)


@pytest.mark.parametrize("coupled", ["discriminator", "generator"])
def test_lockstep_with_a_stop_rule_does_not_depend_on_n_or_first_id(coupled):
    """FAULTS 10: who retires early stays in its group as it is."""
    g, d = generator(), discriminator()
    if coupled == "discriminator":
        d = with_deviation()
    else:
        g.insert(1, BatchMean())
    start = refiner(g, d, max_steps=0, coupling="lockstep").sample(16).logits
    r = refiner(g, d, fr.Collaborative(0.5), coupling="lockstep", stop=float(start.median()) + 0.02, max_steps=4)
    whole = r.sample(16)
    assert len(whole.steps.unique()) > 1
    for first, n in ((0, 5), (5, 3), (7, 6), (15, 1)):
        assert same_result(r.sample(n, first_id=first), whole.select(slice(first, first + n)))
    parts = fr.Result.concatenate(list(r.stream(16, chunk=3)))
    assert same_result(parts, whole)


def test_lockstep_still_refuses_noise_and_works_without_coupling():
    """FAULTS 9, 10"""
    d = discriminator()
    with told() as warned:
        a, b = refiner(d=d, coupling="lockstep").sample(N), refiner(d=d).sample(N)
    assert not warned and torch.allclose(a.images, b.images, atol=1e-6)
    d.insert(1, Noise())
    with pytest.raises(fr.CouplingError, match="different outputs"):
        refiner(d=d, coupling="lockstep").sample(N)
