"""The VAE and the flow, and small runs of the experiments with correctors and with fitted discriminators."""

import pytest
import torch
from PIL import Image
from torch.func import jacrev, vmap

import fastrefine as fr
from benchmarks.papers import corrector
from benchmarks.papers.likelihood import VAE, Flow
from fastrefine.demo.gan import build

IMAGES = torch.rand(60, 1, 2, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1


def flow():
    """A flow whose couplings are not the identity."""
    model = build(lambda: Flow(IMAGES, layers=4, width=16), 1).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def test_the_flow_maps_latents_to_images_and_back():
    model, z = flow(), torch.randn(5, 6, dtype=torch.float64)
    images = model(z)
    assert images.shape == (5, 1, 2, 3)
    assert float((images.flatten(1) - model.mean - model.scale * z).detach().abs().max()) > 0.1
    torch.testing.assert_close(model.inverse(images)[0], z)


def test_the_flows_log_determinant_is_that_of_its_jacobian():
    model, images = flow(), IMAGES[:4].double()
    jacobian = vmap(jacrev(lambda x: model.inverse(x[None])[0][0]))(images).reshape(4, 6, 6)
    torch.testing.assert_close(model.inverse(images)[1], torch.linalg.slogdet(jacobian)[1])


def test_the_flow_learns_a_correlation_that_its_scaling_alone_does_not_hold():
    a = torch.randn(2000, 1, generator=torch.Generator().manual_seed(3)) * 0.3
    pair = torch.cat([a, a], 1).view(-1, 1, 1, 2)
    model = build(lambda: Flow(pair, layers=4, width=16), 0)

    def correlation():
        with torch.no_grad():
            x = model(torch.randn(2000, 2, generator=torch.Generator().manual_seed(4))).flatten(1)
        return float(torch.corrcoef(x.T)[0, 1])

    before = correlation()
    corrector.train_base(model, pair, steps=150, learning_rate=5e-3)
    assert abs(before) < 0.15 and correlation() > 0.8


def test_the_vaes_loss_is_misfit_plus_divergence():
    model = build(lambda: VAE((1, 2, 3), latent=2, width=8, noise=0.5), 0)
    mean, log_variance = model.encoder(IMAGES).chunk(2, 1)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    z = mean + posterior.scale * torch.randn(mean.shape, generator=torch.Generator().manual_seed(7))
    misfit = -torch.distributions.Normal(model(z), 0.5).log_prob(IMAGES).flatten(1).sum(1)
    constant = 6 * torch.log(torch.tensor(0.5 * (2 * torch.pi) ** 0.5))
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(model.loss(IMAGES, torch.Generator().manual_seed(7)), (misfit - constant + kl).mean())


@pytest.mark.parametrize("factory", [lambda: VAE((1, 2, 3), 2, 8), lambda: Flow(IMAGES, 2, 8)])
def test_training_repeats_its_bits_and_leaves_torchs_random_state(factory):
    state, models = torch.random.get_rng_state(), [build(factory, 0) for _ in range(3)]
    for model, steps in zip(models, (5, 5, 0), strict=True):
        corrector.train_base(model, IMAGES, steps=steps, seed=1)
    a, b, untrained = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(a, b) and not torch.equal(a, untrained)
    assert torch.equal(state, torch.random.get_rng_state()) and not models[0].training


@pytest.mark.parametrize("model", [VAE((1, 2, 3), 2, 8), Flow(IMAGES, 2, 8)])
def test_both_are_refined_on_the_flat_route(model):
    d = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    latent = 2 if isinstance(model, VAE) else 6
    out = fr.Refiner(model, d, fr.DGflow(0.1, gamma=0.0), prior=fr.Normal(latent), max_steps=5, num_slots=8).sample(8)
    assert out.report["route"] == "flat" and (out.logits > out.initial_logits).all()


def test_the_corrector_experiment_has_a_row_for_every_stage_and_a_picture(quick_run):
    folder, found = quick_run("corrector")
    stages = [(row["seed"], row["model"], row["stage"]) for row in found["rows"]]
    bases = [(0, model, stage) for model in ("vae", "flow") for stage in ("raw", "uncorrected", "refined")]
    assert stages == [(0, "data", "training images"), (0, "gan", "raw"), *bases]
    assert found["reduced"] and found["seeds"] == [0] and found["hardware"]["cores"] == 1
    assert len({row["frechet_distance"] for row in found["rows"]}) == len(stages), "every stage has samples of its own"
    assert Image.open(folder / "picture.png").width > 1000


def test_claims_hold_only_where_both_figures_are_better_for_every_seed():
    def rows(better):
        return [
            {"seed": seed, "model": model, "stage": stage, "frechet_distance": fd, "classifier_score": cs}
            for seed in (0, 1)
            for model in ("vae", "flow")
            for stage, fd, cs in (("raw", 10.0, 7.0), ("refined", *better.get((seed, model), (5.0, 8.0))))
        ]

    assert [c["holds"] for c in corrector.claims(rows({}))] == [True, True]
    assert [c["holds"] for c in corrector.claims(rows({(1, "vae"): (5.0, 6.9)}))] == [False, True]
    assert [c["holds"] for c in corrector.claims(rows({(0, "flow"): (10.1, 8.0)}))] == [True, False]


def test_the_fitted_experiment_has_a_row_for_every_stage_and_a_picture(quick_run):
    folder, found = quick_run("fitted")
    assert [row["stage"] for row in found["rows"]] == ["raw", "fitted", "fitted, shaped"]
    steps = [row["mean_steps"] for row in found["rows"]]
    assert steps[0] == 0 and min(steps[1:]) > 0
    assert [c["holds"] for c in found["claims"]] == [
        found["rows"][2]["frechet_distance"] < found["rows"][0]["frechet_distance"]
    ]
    assert found["data"] == "digits" and Image.open(folder / "picture.png").width > 1000
