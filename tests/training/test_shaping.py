"""Shaping, tuning and fitting of discriminators; and that nothing of the caller's changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrefine as fr
from fastrefine.networks import recording
from fastrefine.networks.prepared import Networks


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
    from fastrefine.training.batches import RealBatches

    x, _ = RealBatches(REAL, 16, 5).batch(0)
    d = copy.deepcopy(one.discriminator)
    loss = F.softplus(-d(x)).mean() + F.softplus(d(batch.images)).mean()
    loss.backward()
    for p, q in zip(d.parameters(), shaped.parameters(), strict=True):
        torch.testing.assert_close(q.detach(), p.detach() - 0.01 * p.grad)


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_a_refreshed_refiner_equals_a_new_one_with_the_same_discriminator(batch_norm, monkeypatch):
    traces = []
    original = recording.record

    def trace(step, given, modules):
        traces.append(len(given[0]))
        return original(step, given, modules)

    monkeypatch.setattr(recording, "record", trace)
    networks = pair(batch_norm=True)
    one = refiner(networks)
    seen = []
    fr.shape_discriminator(one, REAL, 6, 16, 0.01, batch_norm=batch_norm, seed=2, callback=seen.append)
    assert traces.count(16) == 1, "the step is recorded once, and weights are copied in place afterwards"
    assert [s["iteration"] for s in seen] == list(range(6))
    twin = one.with_discriminator(copy.deepcopy(networks[1]))
    before = twin.sample(20)
    _, other = pair(batch_norm=True)
    with torch.no_grad():
        other[0].weight.mul_(3)
        other[1].running_mean.fill_(0.4)
    twin._networks.refresh(other)
    after, fresh = twin.sample(20), one.with_discriminator(other).sample(20)
    torch.testing.assert_close(after.images, fresh.images)
    assert not torch.allclose(before.images, after.images)


def test_shaping_teaches_the_discriminator_where_refinement_must_end():
    g, d = pair()
    with torch.no_grad():
        d[2].weight.mul_(0.1)
    one = refiner((g, d), max_steps=30, sampler=fr.Collaborative(0.5))
    shaped = fr.shape_discriminator(one, REAL, 60, 32, 5e-3, seed=0)
    distance = {
        name: float((r.sample(300, seed=9).images - torch.tensor([1.0, -1.0])).norm(dim=1).mean())
        for name, r in (("as it is", one), ("shaped", one.with_discriminator(shaped)))
    }
    assert distance["shaped"] < 0.5 * distance["as it is"]


def test_shaping_scores_a_part_of_many_real_images_for_its_stop_rule(monkeypatch):
    monkeypatch.setattr("fastrefine.training.shape._JUDGED", 40)
    bind, seen = fr.stopping.MedianOfReal.bind, []
    monkeypatch.setattr(fr.stopping.MedianOfReal, "bind", lambda own, real: seen.append(len(real.logits)) or bind(own, real))
    one = refiner(real=REAL, stop="median")
    fr.shape_discriminator(one, REAL, 3, 16, 1e-3, stop=one.stop)
    assert set(seen) == {40} and len(seen) >= 3
    assert len(one.real) == 400


def test_tuning_trains_on_raw_samples():
    one = refiner()
    tuned = fr.tune_discriminator(one, REAL, 1, 16, 0.01, optimizer="sgd", seed=5)
    from fastrefine.training.batches import RealBatches

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
    for real in (REAL, Images(labelled), torch.utils.data.DataLoader(Images(labelled), 200)):
        assert isinstance(fr.shape_discriminator(one, real, 3, 200, 0.01), nn.Module)  # more than all images
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
    fitted = fr.fit_discriminator(g, REAL, 150, prior=fr.Normal(2), check_every=50, learning_rate=4e-3, seed=1)
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


def test_what_is_no_refiner_no_network_or_has_nothing_to_train_is_named():
    with pytest.raises(fr.InputError, match="refiner is a NoneType"):
        fr.shape_discriminator(None, REAL, 1, 8, 0.1)
    with pytest.raises(fr.InputError, match="generator is a function"):
        fr.fit_discriminator(lambda z: z, REAL, 1, prior=fr.Normal(2))
    with pytest.raises(fr.InputError, match="has no parameters to train"):
        fr.shape_discriminator(refiner((pair()[0], nn.Sequential(nn.Flatten(), nn.AvgPool1d(2)))), REAL, 1, 8, 0.1)


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Conditional(nn.Module):
    """A generator or discriminator with an embedding of three classes, whose last layer is linear."""

    def __init__(self, outputs):
        super().__init__()
        self.embedding, self.body = nn.Embedding(3, 4), nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, outputs))

    def forward(self, x, y):
        return self.body(torch.cat([x, self.embedding(y)], 1))


CLASSES = torch.arange(len(REAL)) % 3


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["inference", "bf16"]
)
@pytest.mark.parametrize("penalty", [None, 1.0])
def test_modes_of_the_caller_change_nothing(mode, penalty):
    options = dict(gradient_penalty=penalty, real_labels=CLASSES)
    torch.manual_seed(0)
    networks = Conditional(2), Conditional(1)
    plain = fr.shape_discriminator(refiner(networks), REAL, 2, 16, 0.01, **options)
    fitted = fr.fit_discriminator(pair()[0], REAL, 2, prior=fr.Normal(2))
    with mode():
        real = REAL.clone()
        assert equal(plain, fr.shape_discriminator(refiner(networks), real, 2, 16, 0.01, **options))
        assert equal(fitted, fr.fit_discriminator(pair()[0], real, 2, prior=fr.Normal(2)))


def test_dropout_is_drawn_by_the_seed_and_not_from_the_callers_numbers():
    g, d = pair()
    d = nn.Sequential(d[0], nn.Dropout(), d[1:])

    def shaped(torch_seed, seed=3):
        torch.manual_seed(torch_seed)
        before = torch.random.get_rng_state()
        found = fr.shape_discriminator(refiner((g, d)), REAL, 3, 16, 0.01, batch_norm="train", seed=seed)
        assert torch.equal(before, torch.random.get_rng_state())
        return found

    assert equal(shaped(1), shaped(2)) and not equal(shaped(1), shaped(1, seed=4))


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm], ids=["old", "new"])
def test_a_spectral_norm_follows_the_weights_while_all_else_keeps_still(norm):
    modes = []

    class Notes(nn.Module):
        def forward(self, x):
            modes.append(self.training)
            return x

    layers = [nn.BatchNorm1d(16), nn.Dropout(0.5), nn.ReLU(), Notes()]
    d = nn.Sequential(norm(nn.Linear(2, 16)), *layers, norm(nn.Linear(16, 1)))
    shaped = fr.shape_discriminator(refiner((pair()[0], d), max_steps=2), REAL, 50, 16, 2e-2)
    assert not any(modes)
    for layer in (shaped[0], shaped[-1]):
        assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) < 1.1
    assert torch.equal(shaped[1].running_mean, d[1].running_mean)


def test_a_float64_refiner_trains_a_float32_discriminator():
    shaped = fr.shape_discriminator(refiner(precision="float64"), REAL.double(), 2, 16, 0.01)
    assert {p.dtype for p in shaped.parameters()} == {torch.float32}
    g, d = pair()
    double = fr.shape_discriminator(refiner((g, d.double())), REAL, 2, 16, 0.01)
    assert {p.dtype for p in double.parameters()} == {torch.float64}


def test_labels_reach_networks_that_take_them_and_no_others():
    torch.manual_seed(0)
    g, d = Conditional(2), Conditional(1)
    data = torch.utils.data.TensorDataset(REAL, CLASSES)
    unconditional = fr.Split(pair()[0], nn.Identity())
    assert equal(
        fr.shape_discriminator(refiner((unconditional, pair()[1]), at="input"), data, 2, 16, 0.01),
        fr.shape_discriminator(refiner((unconditional, pair()[1]), at="input"), REAL, 2, 16, 0.01),
    )
    one = refiner((g, d))
    expected = fr.shape_discriminator(one, data, 2, 16, 0.01)
    assert equal(expected, fr.shape_discriminator(one, REAL.numpy(), 2, 16, 0.01, real_labels=CLASSES.numpy()))
    assert equal(expected, fr.shape_discriminator(one, Images(False), 2, 16, 0.01, real_labels=CLASSES))
    by_split = refiner((fr.Split(lambda z, y: (g(z, y), ()), nn.Identity()), pair()[1]), at="input")
    for bad in (one, by_split):
        with pytest.raises(fr.InputError, match="needs labels: give `real`"):
            fr.shape_discriminator(bad, REAL, 1, 16, 0.01)


def test_latents_follow_a_loader_whose_last_batch_is_short():
    g, d = Conditional(2), Conditional(1)
    one = fr.Refiner(g, d, fr.Collaborative(0.1), at="output", max_steps=3, num_slots=8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(REAL[:20], CLASSES[:20]), 16)
    seen = []
    for batch_size in (16, 10):
        fr.shape_discriminator(one, loader, 3, batch_size, 0.01, latents=torch.randn(50, 2), callback=seen.append)
    assert len(seen) == 6


@pytest.mark.parametrize("stop", [None, fr.stopping.MedianOfReal()])
def test_tuning_scores_real_images_once_if_no_rule_reads_them(stop, monkeypatch):
    scored = []
    original = Networks._score
    monkeypatch.setattr(Networks, "_score", lambda own, d, x, y: scored.append(len(x)) or original(own, d, x, y))
    fr.tune_discriminator(
        refiner(real=REAL, stop=fr.stopping.MedianOfReal()), REAL, 4, 16, 0.01, **({"stop": stop} if stop else {})
    )
    assert len(scored) == (5 if stop else 1)


def test_a_conditional_generator_is_fitted_with_the_labels_of_the_real_images():
    torch.manual_seed(0)
    g = Conditional(2)
    for d in (None, Conditional(1)):
        options = dict(prior=fr.Normal(2), discriminator=d, check_every=2)
        fitted = fr.fit_discriminator(g, torch.utils.data.TensorDataset(REAL, CLASSES), 4, **options)
        assert equal(fitted, fr.fit_discriminator(g, REAL, 4, real_labels=CLASSES, **options))
        with pytest.raises(fr.InputError, match="needs labels: give `real`"):
            fr.fit_discriminator(g, REAL, 4, **options)


def test_a_discriminator_that_ends_in_a_sigmoid_is_fitted_as_a_probability():
    g, d = pair()
    options = dict(prior=fr.Normal(2), check_every=2, discriminator=nn.Sequential(d, nn.Sigmoid()))
    fitted = fr.fit_discriminator(g, REAL, 4, discriminator_output="probability", **options)
    plain = fr.fit_discriminator(g, REAL, 4, **{**options, "discriminator": d})
    torch.testing.assert_close(fitted(REAL), plain(REAL).sigmoid(), atol=1e-4, rtol=1e-3)
    with pytest.raises(fr.InputError, match="ends in a sigmoid"):
        fr.fit_discriminator(g, REAL, 4, **options)
    with pytest.raises(fr.InputError, match="discriminator_output"):
        fr.fit_discriminator(g, REAL, 4, discriminator_output="critic", **options)


@pytest.mark.parametrize(("images", "held"), [(2, 1), (20, 10), (100, 16), (400, 40)])
def test_fitting_holds_out_a_sensible_number_of_images(images, held, monkeypatch):
    asked = []
    original = fr.Refiner.score
    monkeypatch.setattr(fr.Refiner, "score", lambda self, x, **given: asked.append(len(x)) or original(self, x, **given))
    fr.fit_discriminator(pair()[0], REAL[:images], 1, prior=fr.Normal(2), batch_size=4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(REAL[:images]), 4)
    fr.fit_discriminator(pair()[0], loader, 1, prior=fr.Normal(2), batch_size=4)
    assert asked == [held, held, images, images]
    with pytest.raises(fr.InputError, match="none can be held out"):
        fr.fit_discriminator(pair()[0], REAL[:1], 1, prior=fr.Normal(2))


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_the_bar_is_shown_where_it_is_asked_for(progress, shown, capsys):
    fr.shape_discriminator(refiner(), REAL, 1, 8, 0.01, progress=progress)
    assert ("shaping" in capsys.readouterr().err) == shown


def test_the_penalty_on_a_logit_is_the_weight_of_the_squared_gradient():
    one = refiner()
    found = []
    for weight in (0.0, 2.0):
        fr.shape_discriminator(one, REAL, 1, 16, 0.01, gradient_penalty=weight, callback=found.append)
    from fastrefine.training.batches import RealBatches

    x = RealBatches(REAL, 16, 0).batch(0)[0].requires_grad_()
    (grad,) = torch.autograd.grad(one.discriminator(x).sum(), x)
    assert found[1]["loss"] - found[0]["loss"] == pytest.approx(2.0 * float(grad.square().sum(1).mean()), rel=1e-3)


@pytest.mark.parametrize(("squash", "low"), [(nn.Tanh(), 0.0), (nn.Sigmoid(), -1.0)])
def test_real_images_in_another_range_than_the_generators_are_refused_before_any_update(squash, low, monkeypatch):
    """FAULTS 19"""
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(2, 16), nn.Unflatten(1, (1, 4, 4)), nn.BatchNorm2d(1), squash).eval()
    d = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    nn.init.normal_(g[0].weight, std=3.0)
    real = torch.rand(200, 1, 4, 4) * (1 - low) + low
    one = refiner((g, d), max_steps=1)
    monkeypatch.setattr("fastrefine.training.shape.Trainer.update", None)
    for call in (
        lambda: fr.shape_discriminator(one, real, 3, 16, 0.01),
        lambda: fr.tune_discriminator(one, real, 3, 16, 0.01),
        lambda: fr.fit_discriminator(g, real, 3, prior=fr.Normal(2), discriminator=d),
    ):
        with pytest.raises(fr.InputError, match=r"are the real images 0\.\.1" if low == 0 else r"are the real images -1\.\.1"):
            call()
    monkeypatch.undo()
    right = 2 * real - 1 if low == 0 else (real + 1) / 2
    assert isinstance(fr.shape_discriminator(one, right, 1, 16, 0.01), nn.Module)
