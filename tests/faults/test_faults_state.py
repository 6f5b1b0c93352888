"""FAULTS 15 and 16: the caller's modes, modules, flags and random state."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fastrefine as fr
from tests.support.fault_networks import IMAGE, LATENT, discriminator, generator, refiner, same, same_result

N = 6
MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def run(g, d, z, at):
    real = torch.linspace(-1, 1, 5 * IMAGE).view(5, IMAGE)
    r = refiner(g, d, at=at, real=real, stop=fr.stopping.MedianOfReal())
    return r.refine(z), r.score(real), next(r.stream(N, chunk=2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", ["1", "output"])
def test_results_are_the_same_in_any_mode_of_the_caller(mode, at):
    """FAULTS 15"""
    z = torch.linspace(-1, 1, N * LATENT).view(N, LATENT)
    plain = run(generator(), discriminator(), z, at)
    with MODES[mode]():
        inside = run(generator(), discriminator(), z, at)
    assert same_result(plain[0], inside[0]) and same(plain[1], inside[1]) and same_result(plain[2], inside[2])
    assert not inside[0].images.requires_grad


def normalised():
    """Every kind of normalised weight, and a tensor that is neither parameter nor buffer."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.full((8,), 0.5)

        def forward(self, x):
            return x * self.scale

    torch.manual_seed(11)
    return nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(LATENT, 8)), nn.BatchNorm1d(8), Scaled(), nn.Tanh(),
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh(), nn.utils.spectral_norm(nn.Linear(8, IMAGE)),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("at", ["input", "3"])
@pytest.mark.parametrize("later", [False, True])
def test_models_and_latents_made_under_inference_mode_work(at, later):
    """FAULTS 15: ``later``: used inside or outside of it."""
    with torch.inference_mode():
        g, d, z = normalised(), discriminator(), torch.linspace(-1, 1, N * LATENT).view(N, LATENT)
        inside = None if later else run(g, d, z, at)
    found = run(g, d, z, at) if inside is None else inside
    expected = run(normalised(), discriminator(), torch.linspace(-1, 1, N * LATENT).view(N, LATENT), at)
    assert same_result(found[0], expected[0]) and same(found[1], expected[1])


class Snapshot:
    """Everything of the caller's that refining could disturb."""

    def __init__(self, *modules):
        self.modules = modules
        self.seen = self.look()

    def look(self):
        tensors, facts = {}, {}
        for i, network in enumerate(self.modules):
            for name, module in network.named_modules():
                hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
                facts[i, name, "module"] = module.training, type(module), set(module.__dict__), tuple(map(tuple, hooks))
                plain = {key: value for key, value in module.__dict__.items() if isinstance(value, torch.Tensor)}
                tensors |= {(i, name, key): value for key, value in plain.items()}
            for name, p in network.named_parameters(remove_duplicate=False):
                facts[i, name] = p.requires_grad, p.data_ptr(), p._version, p.grad is None
                tensors[i, name, "grad"] = p.grad
            tensors |= {(i, name): value for name, value in network.state_dict().items()}
        facts["modes"] = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        facts["flags"] = (
            torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision,
            torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision,
            torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.get_default_dtype(), len(warnings.filters),
        )  # fmt: skip
        tensors["random"] = torch.get_rng_state()
        return facts, {key: None if t is None else t.detach().clone() for key, t in tensors.items()}

    def check(self):
        (facts, tensors), (facts_now, tensors_now) = self.seen, self.look()
        assert {k: (v, facts_now.get(k)) for k, v in facts.items() if facts_now.get(k) != v} == {}
        assert facts.keys() == facts_now.keys() and tensors.keys() == tensors_now.keys()
        changed = [k for k, t in tensors.items() if (t is None) != (tensors_now[k] is None)]
        changed += [k for k, t in tensors.items() if t is not None and not same(t, tensors_now[k])]
        assert changed == []


def used_pair():
    """Networks in the middle of somebody's training."""
    g = normalised().train()
    d = nn.Sequential(nn.Linear(IMAGE, 8), nn.Dropout(0.5), nn.Tanh(), nn.utils.spectral_norm(nn.Linear(8, 1)))
    g[0].bias.requires_grad_(False)
    d[0].register_forward_hook(lambda module, args, output: None)
    d(g(torch.randn(20, LATENT))).mean().backward()
    d[3].train(False)
    return g, d


def draws_for_nothing():
    """A network whose noise has strength 0 (a fresh StyleGAN2): repeatable, but it advances torch's generator."""

    class Silent(nn.Module):
        def forward(self, x):
            return x + 0.0 * torch.randn_like(x)

    return nn.Sequential(nn.Linear(LATENT, 8), Silent(), nn.Tanh(), nn.Linear(8, IMAGE))


@pytest.fixture
def settings(request):
    """Flags that differ from what a run wants."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(("settings", "at"), [("highest", "input"), ("high", "3"), ("medium", "output")], indirect=["settings"])
@pytest.mark.usefixtures("settings")
def test_a_run_leaves_everything_of_the_callers_as_it_was(at):
    """FAULTS 16, P4"""
    g, d = used_pair()
    z = torch.randn(N, LATENT, requires_grad=True)
    z.grad = torch.ones_like(z)
    real = torch.randn(5, IMAGE)
    before = Snapshot(g, d)
    r = refiner(g, d, at=at, real=real, stop=fr.stopping.MedianOfReal(), precision="tf32")
    r.refine(z)
    r.sample(3)
    r.score(real)
    r.with_discriminator(copy.deepcopy(discriminator())).sample(2)
    before.check()
    assert z.requires_grad and torch.equal(z.grad, torch.ones_like(z))


@pytest.mark.parametrize("deterministic", [False, True])
def test_between_parts_of_a_stream_the_callers_state_is_in_force(deterministic):
    """FAULTS 16, P4"""
    g, d = used_pair()
    torch.set_num_threads(2)
    before = Snapshot(g, d)
    r = refiner(g, d, deterministic=deterministic)
    for k, part in enumerate(r.stream(10, chunk=3)):
        before.check()
        if k == 1:
            torch.randn(3)  # the caller draws: that is the state to come back to
            before = Snapshot(g, d)
        if part.ids[-1] > 6:
            break  # a stream that is given up
    before.check()
    torch.set_num_threads(1)


def test_a_stream_may_be_consumed_in_another_mode_than_it_was_made_in():
    """FAULTS 15, 16"""
    whole = refiner().sample(N)
    stream = refiner().stream(N, chunk=1)
    first = next(stream)
    with torch.inference_mode():
        second = next(stream)
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    rest = list(stream)
    assert same_result(fr.Result.concatenate([first, second, *rest]), whole)


class Stopped(Exception):
    pass


class Fails(nn.Module):
    """Raises at the k-th call of any of its copies that follows ``arm``."""

    def __init__(self):
        super().__init__()
        self.left = [10**9]

    def forward(self, x):
        self.left[0] -= 1
        if self.left[0] < 0 or float(x.detach().sum()) > 1e9:  # to read a value prevents tracing: every step calls
            raise Stopped
        return x

    def __deepcopy__(self, memo):
        twin = Fails()
        twin.left = self.left
        return twin


def after_callbacks(count):
    calls = []

    def callback(facts):
        calls.append(facts)
        if len(calls) == count:
            raise Stopped

    return callback


@pytest.mark.parametrize("mode", ["no_grad", "enable_grad", "inference_mode", "autocast"])
def test_an_exception_in_the_middle_of_a_run_leaves_everything_as_it_was(mode):
    """FAULTS 16, P4"""
    g, d = used_pair()
    before = Snapshot(g, d)
    r = refiner(g, d, at="3", callback=after_callbacks(4), deterministic=True)
    with MODES[mode]():
        inside = Snapshot(g, d)
        with pytest.raises(Stopped):
            r.sample(20)
        inside.check()
    before.check()
    r = r.replaced(callback=None)
    assert same_result(r.sample(N), refiner(g, d, at="3").sample(N)), "and the refiner can be used again"


@pytest.mark.parametrize("call", [1, 3, 6, 10, 20, 40])
def test_an_exception_in_a_network_leaves_everything_as_it_was(call):
    """FAULTS 16, P4: at any stage: probing, preparing, stepping, rendering."""
    g, d = used_pair()
    fails = Fails()
    d.insert(1, fails)
    before = Snapshot(g, d)
    fails.left[0] = call
    with pytest.raises((Stopped, fr.InputError)):
        refiner(g, d, coupling="lockstep").sample(2000)
    fails.left[0] = 10**9
    before.check()
    assert len(refiner(g, d).sample(N)) == N


def test_an_error_of_ours_leaves_everything_as_it_was():
    """FAULTS 16, P4: refused by the probe, which had to run the noise."""
    g, d = used_pair()
    d.append(nn.Identity())
    d[-1].forward = lambda x: x + torch.randn_like(x)
    before = Snapshot(g, d)
    with pytest.raises(fr.CouplingError):
        refiner(g, d).sample(N)
    before.check()


@pytest.mark.parametrize("at", ["input", "2", "output"])
def test_a_network_that_draws_numbers_for_nothing_does_not_advance_the_callers_generator(at):
    """FAULTS 16, P1, P4"""
    g = draws_for_nothing()
    state = torch.get_rng_state()
    a = refiner(g, at=at).sample(N)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert same_result(refiner(g, at=at).sample(N), a), "nor do results depend on it"


@pytest.mark.parametrize(("place", "value"), [("matmul", "tf32"), ("cudnn.conv", "ieee"), ("mkldnn.matmul", "bf16")])
def test_the_newer_precision_switches_of_torch_come_back(place, value):
    """FAULTS 16: torch raises where its older switches are read after these were set."""
    home = torch.backends.cuda if place == "matmul" else torch.backends
    for name in place.split("."):
        home = getattr(home, name)
    was = home.fp32_precision
    try:
        home.fp32_precision = value
        refiner().sample(2)
        with pytest.raises(Stopped):
            refiner(callback=after_callbacks(1)).sample(2)
        assert home.fp32_precision == value
    finally:
        home.fp32_precision = was


def test_hooks_of_the_user_are_part_of_the_function():
    """FAULTS 16"""
    d, doubled = discriminator(), discriminator()
    d[0].register_forward_hook(lambda module, args, output: 2 * output)
    doubled[0].weight.data.mul_(2), doubled[0].bias.data.mul_(2)
    assert torch.allclose(refiner(d=d).sample(N).images, refiner(d=doubled).sample(N).images, atol=1e-6)
    assert len(d[0]._forward_hooks) == 1
