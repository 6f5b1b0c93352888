"""distil: a generator that does by itself what refinement did, is exported, saved, and refined further."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastrefine as fr
from fastrefine.errors import FastrefineWarning, InputError
from fastrefine.production.saved_pair import DISTILLED

pytestmark = pytest.mark.filterwarnings("ignore:the smallest map costs:fastrefine.errors.FastrefineWarning")
SMALL = dict(iterations=150, batch_size=64)


class Vector(nn.Module):
    """(N, 4) -> (N, 1, 4, 4) by way of a vector (16,), a sequence (4, 8) of tokens, a map (8, 2, 2)."""

    def __init__(self, hidden: int = 16):
        super().__init__()
        self.vector, self.tokens, self.map = nn.Linear(4, hidden), nn.Linear(4, 8), nn.Identity()
        self.up, self.gain = nn.ConvTranspose2d(8, 1, 4, 2, 1), nn.Parameter(torch.ones(()))

    def forward(self, z, shift=0.0):
        tokens = self.tokens(torch.tanh(self.vector(z)).unflatten(1, (4, -1)))
        image = self.up(self.map(tokens.transpose(1, 2).unflatten(2, (2, 2))).relu_())
        return torch.tanh(self.gain * image + shift)


class Labelled(nn.Module):
    """(N, 4), (N,) -> (N, 8)."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.out = nn.Embedding(3, 4), nn.Linear(4, 12), nn.Linear(12, 8)

    def forward(self, z, labels):
        return self.out(torch.tanh(self.hidden(z + self.embedding(labels))))


class LabelledD(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.embedding = nn.Linear(8, 8), nn.Embedding(3, 8)

    def forward(self, x, labels):
        return (torch.tanh(self.body(x)) * self.embedding(labels)).sum(1)


def shifted(generator, z, shift):
    """A generate function, with a condition (N, 1)."""
    return generator(z, shift=shift[:, :, None, None])


def shifting(discriminator, x, shift):
    return discriminator(x - shift[:, :, None, None])


def refiner(at, **options):
    torch.manual_seed(0)
    g, d = Vector(), nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    return fr.Refiner(
        g, d, **{**dict(sampler=fr.Collaborative(), at=at, max_steps=4, prior=fr.Normal(4), num_slots=64), **options}
    )


def labelled():
    torch.manual_seed(1)
    return fr.Refiner(Labelled(), LabelledD(), fr.Collaborative(), at="hidden", max_steps=4, prior=fr.Normal(4), num_slots=64)


def mean_logit(one, images, **inputs):
    return float(one.score(images, **inputs).mean())


@pytest.mark.parametrize("at", ["input", "vector", "tokens", "map", "output"])
def test_the_map_does_what_refinement_does_on_samples_it_has_not_seen(at):
    one = refiner(at)
    g = fr.distil(one, 600, **SMALL)
    assert isinstance(g, fr.DistilledGenerator) and not g.training and not any(p.requires_grad for p in g.parameters())
    raw, out = one.replaced(max_steps=0).sample(200), one.sample(200)
    images = g(raw.latents)
    assert mean_logit(one, images) > mean_logit(one, raw.images)
    assert (images - out.images).square().mean() < 0.7 * (raw.images - out.images).square().mean()
    assert 0 < g.report["held_out_error"] < 0.7 and g.report["at"] == at and g.report["pairs"] == 600
    assert torch.equal(copy.deepcopy(g)(raw.latents), images)
    later = fr.Refiner(g, one.discriminator, one.sampler, at=g.refined_at, max_steps=2, prior=one.prior).sample(200)
    torch.testing.assert_close(later.initial_logits, one.score(images), rtol=1e-4, atol=1e-4)
    assert (later.logits >= later.initial_logits - 1e-5).all() and later.activations.shape == out.activations.shape
    names = {layer.name for layer in fr.layers(one.generator, raw.latents)}
    assert names <= {layer.name for layer in fr.layers(g, raw.latents)}, "modules keep their names"


def test_equal_seeds_give_equal_weights_and_leave_the_random_state_alone():
    one = refiner("vector")
    before = torch.get_rng_state()
    a, b, other = (fr.distil(one, 200, iterations=40, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert not torch.equal(a["distilled_map.inlet.weight"], other["distilled_map.inlet.weight"])


def test_before_training_it_is_the_generator():
    one = refiner("map")
    g = fr.DistilledGenerator(one.generator, "map", (8, 2, 2), 8)
    z = torch.randn(5, 4)
    assert torch.equal(g(z), one.generator(z))
    assert torch.equal(copy.deepcopy(g).double()(z.double()), copy.deepcopy(one.generator).double()(z.double()))
    assert g.train()._own.training and not g.eval()._own.training


def test_labels_are_read_and_pass_an_export():
    one = labelled()
    y = torch.arange(600) % 3
    g = fr.distil(one, 600, labels=y, **SMALL)
    raw, out = one.replaced(max_steps=0).sample(90, labels=y[:90]), one.sample(90, labels=y[:90])
    images = g(raw.latents, y[:90])
    assert mean_logit(one, images, labels=y[:90]) > mean_logit(one, raw.images, labels=y[:90])
    assert (images - out.images).square().mean() < 0.7 * (raw.images - out.images).square().mean()
    again = fr.Refiner(g, one.discriminator, one.sampler, at="hidden", max_steps=0, prior=one.prior)
    torch.testing.assert_close(again.sample(90, labels=y[:90]).images, images)
    program = torch.export.export(g, (raw.latents, y[:90]))
    torch.testing.assert_close(program.module()(raw.latents, y[:90]), images)
    with pytest.raises(InputError, match="labels not given"):
        g(raw.latents)
    with pytest.raises(InputError, match="labels"):
        fr.distil(one, 100)


def test_labels_of_the_pairs_come_from_the_real_images():
    one = labelled().replaced(real=torch.randn(40, 8), real_labels=torch.arange(40) % 3)
    g = fr.distil(one, 200, iterations=30)
    assert g.arguments["classes"] == 3 and g.call.names == ("labels",)


def with_conditions():
    one = refiner("vector", generate=shifted, discriminate=shifting)
    shift = torch.linspace(-0.5, 0.5, 400)[:, None]
    return one, shift, fr.distil(one, 400, conditions={"shift": shift}, **SMALL)


def test_conditions_and_the_generate_function_go_with_it(tmp_path):
    one, shift, g = with_conditions()
    given = {"shift": shift[:50]}
    raw = one.replaced(max_steps=0).sample(50, conditions=given)
    images = g(raw.latents, **given)
    assert g.reads == ("shift",) and mean_logit(one, images, conditions=given) > mean_logit(one, raw.images, conditions=given)
    again = fr.Refiner(
        g, one.discriminator, one.sampler, at="vector", max_steps=0, prior=one.prior, generate=shifted, discriminate=shifting
    )
    torch.testing.assert_close(again.sample(50, conditions=given).images, images)
    save(tmp_path, g, one, generate=shifted, discriminate=shifting)
    pair = fr.load_pair(tmp_path, trust_code=True)
    assert torch.equal(pair.generator(raw.latents, **given), images) and pair.generator.own_generate is pair.calls["generate"]
    with pytest.raises(InputError, match="may name no function"):
        fr.load_pair(tmp_path)


def test_a_condition_that_is_no_vector_is_ignored_and_that_is_said():
    one = refiner("vector", generate=lambda g, z, edges: g(z), discriminate=lambda d, x, edges: d(x + edges))
    with pytest.warns(FastrefineWarning, match="does not read edges"):
        g = fr.distil(one, 200, conditions={"edges": torch.randn(200, 1, 4, 4) / 9}, iterations=60)
    assert g.report["ignored"] == ["edges"] and g(torch.randn(2, 4), edges=torch.zeros(2, 1, 4, 4)).shape == (2, 1, 4, 4)


class Twice(nn.Module):
    """One module is called twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, z):
        return self.layer(torch.tanh(self.layer(z)))


def test_the_place_may_be_the_second_call_of_a_module():
    torch.manual_seed(0)
    one = fr.Refiner(Twice(), nn.Linear(4, 1), fr.Collaborative(0.5), at="layer#1", max_steps=4, prior=fr.Normal(4))
    g = fr.distil(one, 300, **SMALL)
    z = torch.randn(64, 4)
    for _ in range(2):
        torch.testing.assert_close(g(z), g._modules["distilled_map"](one.generator(z)))
    assert mean_logit(one, g(z)) > mean_logit(one, one.generator(z).detach())


def test_an_export_runs_where_there_is_no_fastrefine(tmp_path):
    g = fr.distil(refiner("map"), 200, iterations=30)
    z = torch.randn(6, 4)
    program = torch.export.export(g, (z[:4],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "g.pt2")
    torch.save(z, tmp_path / "z.pt")
    code = (
        "import sys; sys.modules['fastrefine'] = None; import torch; "
        "x = torch.export.load('g.pt2').module()(torch.load('z.pt')); torch.save(x.detach(), 'x.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    torch.testing.assert_close(torch.load(tmp_path / "x.pt"), g(z))


def save(folder, g, one, **calls):
    code = (f"{__name__}:{type(one.generator).__name__}", f"{__name__}:discriminator_of_test")
    return fr.save_pair(folder, g, one.discriminator, code=code, prior=one.prior, at="vector", **calls)


def discriminator_of_test():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))


def test_a_pair_keeps_it_and_the_inner_code_is_under_the_rule_of_named_code(tmp_path):
    one = refiner("vector")
    g = fr.distil(one, 200, iterations=30)
    save(tmp_path / "pair", g, one)
    written = json.loads((tmp_path / "pair" / "config.json").read_text())["generator"]
    assert written["code"] == DISTILLED and written["arguments"]["generator"]["code"] == f"{__name__}:Vector"
    with pytest.raises(InputError, match="may name no other code"):  # the discriminator is a function
        fr.load_pair(tmp_path / "pair")
    pair = fr.load_pair(tmp_path / "pair", trust_code=True)
    z = torch.randn(4, 4)
    assert torch.equal(pair.generator(z), g(z)) and pair.generator.report == g.report
    spec = pair.specs[0]
    fr.save_pair(tmp_path / "again", pair.generator, pair.discriminator, code=(spec.code, pair.specs[1].code),
                 arguments=(spec.arguments, {}), prior=one.prior)  # fmt: skip
    assert torch.equal(fr.load_pair(tmp_path / "again", trust_code=True).generator(z), g(z))
    file = tmp_path / "pair" / "config.json"
    text = file.read_text().replace(f"{__name__}:discriminator_of_test", "torch.nn:Linear")
    file.write_text(text.replace(f"{__name__}:Vector", f"{__name__}:discriminator_of_test"))
    with pytest.raises(InputError, match="discriminator_of_test.*as the generator"):
        fr.load_pair(tmp_path / "pair")


def test_rounds_shape_the_discriminator_on_what_the_map_gives():
    with pytest.raises(InputError, match="rounds=2.*real"):
        fr.distil(refiner("input"), 100, rounds=2)
    one = refiner("input", real=torch.rand(64, 1, 4, 4) - 0.5)
    g = fr.distil(one, 200, rounds=2, iterations=40, shaping={"iterations": 2})
    assert g.report["rounds"] == 2 and g(torch.randn(3, 4)).shape == (3, 1, 4, 4)
    old, new = one.discriminator.state_dict(), g.discriminator.state_dict()
    assert g.report["shaped"] and all(not torch.equal(old[name], value) for name, value in new.items())
    assert not any(name.startswith("discriminator") for name in g.state_dict())
    assert copy.deepcopy(g).discriminator is not None


def test_what_is_finished_is_handed_over_and_the_work_is_told_before(capfd):
    one, seen = refiner("input", real=torch.rand(64, 1, 4, 4) - 0.5), []
    given = dict(pairs=200, rounds=2, iterations=40, shaping={"iterations": 3})
    g = fr.distil(one, **given, progress=None, callback=lambda *done: seen.append(done))
    assert [tuple(facts.values()) for _, facts in seen] == [(1, 2, False), (1, 2, True), (2, 2, False), (2, 2, True)]
    plain = fr.distil(one, **given, progress=False)
    z, told = torch.randn(3, 4), capfd.readouterr().err
    assert torch.equal(g(z), plain(z)) and torch.equal(seen[-1][0](z), g(z)) and not torch.equal(seen[0][0](z), g(z))
    first, shaped = (part.discriminator.state_dict() for part, _ in seen[:2])
    assert all(torch.equal(value, one.discriminator.state_dict()[name]) for name, value in first.items())
    assert not all(torch.equal(value, first[name]) for name, value in shaped.items())
    assert [part.report["shaped"] for part, _ in seen] == [False, True, True, True]
    plan = (
        "distil: round 1 of 2: refine 200 samples, train the map for at most 40 iterations, then shape the discriminator for 3"
    )
    assert plan in told and "(about 0 s)" in told and "distil: round 1 of 2 took" in told and "left" in told
    assert told.count("distil: round") == 3, "nothing is told where progress is False"


def test_without_real_images_or_shaping_the_discriminator_stays():
    bare, known = refiner("vector"), refiner("vector", real=torch.rand(64, 1, 4, 4) - 0.5)
    for one, options in ((bare, {}), (known, {"shaping": {"iterations": 0}})):
        g = fr.distil(one, 200, iterations=40, **options)
        assert g.discriminator is one.discriminator and not g.report["shaped"]


def test_bad_arguments_of_shaping_are_told_before_pairs_are_made(monkeypatch):
    monkeypatch.setattr("fastrefine.training.distil.Pairs.made", None)
    with pytest.raises(InputError, match="learning_rate"):
        fr.distil(refiner("vector", real=torch.rand(64, 1, 4, 4) - 0.5), 100, shaping={"learning_rate": -1.0})


def test_what_cannot_be_learned_is_said_in_words():
    one = refiner("vector")
    d = one.discriminator
    split = fr.Split(lambda z: (z, ()), lambda a: a.view(-1, 1, 4, 4))
    prior = fr.Normal(4)
    cases = [
        (fr.Refiner(split, d, one.sampler, prior=fr.Normal(16)), {}, "has a Split"),
        (fr.Refiner(None, d, one.sampler, at="output"), {}, "no generator"),
        (fr.Refiner(one.generator, d, one.sampler, at="vector"), {}, "no prior"),
        (fr.Refiner(one.generator, d, fr.DDLS(0.1), prior=prior), {}, "DDLS samples a law"),
        (one, {"pairs": 63}, "pairs is 63"),
        (one, {"flops": 0}, "flops is 0"),
        (one.replaced(max_steps=0), {}, "changes no sample"),
        (one, {"learning_rate": 1e-30}, "no nearer"),
        ("refiner", {}, "wanted a fastrefine.Refiner"),
    ]
    for given, options, words in cases:
        with pytest.raises(InputError, match=words):
            fr.distil(given, **{"pairs": 100, "iterations": 3, **options})
    bad = fr.Refiner(one.generator, Blind(), fr.Collaborative(0.1), at="output", max_steps=2, prior=prior)
    with pytest.raises(InputError, match="0 of 100 refined samples are finite"):
        fr.distil(bad, 100)
    with pytest.raises(InputError, match="distilled already"):
        g = fr.distil(one, 100, iterations=30)
        fr.distil(fr.Refiner(g, d, one.sampler, at="vector", prior=prior), 100)


class Blind(nn.Module):
    """Its logits are not finite."""

    def forward(self, x):
        return x.flatten(1).sum(1) + torch.where(x.flatten(1).abs().sum(1) > 0, torch.nan, 0.0)


def test_a_sampler_with_noise_and_a_small_generator_are_warned_of():
    one = refiner("vector").replaced(sampler=fr.DGflow(0.1))
    with pytest.warns(FastrefineWarning) as seen:
        fr.distil(one, 300, iterations=100, flops=1e-6)
    assert {"DGflow adds noise" in str(w.message) or "the smallest map costs" in str(w.message) for w in seen} == {True}
