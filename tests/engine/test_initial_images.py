"""``Result.initial_images`` are the images of a run of no steps, whatever is refined, and wherever the samples come from."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import fastrefine as fr
from fastrefine.networks.generator import PreparedGenerator
from tests.networks.test_draws import Noise, networks
from tests.support.refiners import pair, refiner
from tests.support.selection_laws import Discriminator, Generator


def raw(made, n=21, **given):
    return made.replaced(max_steps=0, stop=None).sample(n, seed=3, **given).images


@pytest.mark.parametrize("at", ["input", "1", "output"])
def test_they_are_the_images_of_a_run_of_no_steps(at):
    made = refiner(at=at)
    out = made.sample(21, seed=3, first_id=5)
    assert out.initial_images.shape == out.images.shape and not torch.equal(out.initial_images, out.images)
    assert torch.equal(out.initial_images, raw(made, first_id=5))
    assert out.initial_images is out.initial_images, "kept after the first access"
    moved = out.logits - out.initial_logits
    assert torch.allclose(made.score(out.initial_images) + moved, out.logits, atol=1e-5)


@pytest.mark.parametrize("at", ["input", "1"])
def test_given_latents(at):
    made, z = refiner(at=at), torch.randn(11, 4)
    out = made.refine(z)
    assert torch.equal(out.initial_images, made.replaced(max_steps=0, stop=None).refine(z).images)
    z += 1
    with pytest.raises(fr.InputError, match="changed in place"):
        _ = made.refine(z).initial_images, z.add_(1), out.select([1]).initial_images


def test_given_images_are_the_initial_ones():
    x = torch.randn(9, 6)
    made = fr.Refiner(None, pair()[1], fr.Collaborative(0.2), at="output", max_steps=3)
    out = made.refine(x)
    assert torch.equal(out.initial_images, x) and not torch.equal(out.images, x)


def conditional():
    made = fr.Refiner(Generator(), Discriminator(), fr.Collaborative(0.1), prior=fr.Normal(2), num_slots=8, max_steps=3)
    return made, dict(labels=torch.arange(21) % 3)


def with_conditions():
    g, d = pair()
    made = refiner(
        (g, d), at="input", generate=lambda g, z, shift: g(z + shift), discriminate=lambda d, x, shift: d(x) + shift[:, :1]
    )
    return made, dict(conditions={"shift": torch.randn(21, 4, generator=torch.Generator().manual_seed(1))})


def with_noise():
    g, d = networks()
    g.append(Noise())
    return fr.Refiner(g, d, fr.Collaborative(0.1), max_steps=2, on_noise="freeze", prior=fr.Normal(4), num_slots=8), {}


def in_groups():
    return refiner(at="input", coupling="lockstep", group_size=4), {}


def distilled():
    g, d = pair()
    made = refiner((g, d), at="1", stop=None, max_steps=3)
    return refiner((fr.distil(made, pairs=64, iterations=20), d), stop=None, max_steps=3), {}


def of_a_split():
    g, d = pair()
    made = fr.Refiner(fr.Split(lambda z: (g[:2](z), ()), lambda a: g[2:](a)), d, fr.Collaborative(0.2), prior=fr.Normal(4))
    return made.replaced(num_slots=8, max_steps=3), {}


@pytest.mark.filterwarnings("ignore:the smallest map costs")
@pytest.mark.parametrize("kind", [conditional, with_conditions, with_noise, in_groups, distilled, of_a_split])
def test_of_every_kind_of_input_and_network(kind):
    made, given = kind()
    out = made.sample(21, seed=3, **given)
    assert torch.equal(out.initial_images, raw(made, **given)) and (out.steps > 0).any()
    assert not torch.equal(out.initial_images, out.images)


def test_selected_and_joined_samples_keep_theirs():
    made = refiner()
    out, expected = made.sample(21, seed=3), raw(refiner())
    rows = torch.tensor([20, 3, 3, 11])
    assert torch.equal(out.select(rows).initial_images, expected[rows])
    parts = list(made.stream(21, seed=3, chunk=6))
    assert torch.equal(fr.Result.concatenate(parts).initial_images, expected)
    assert torch.equal(torch.cat([part.initial_images for part in parts]), expected)
    assert made.sample(0).initial_images.shape == (0, 6)
    with pytest.raises(fr.InputError, match="joined from several runs"):
        _ = fr.Result.concatenate([out, made.sample(2, seed=4)]).initial_images


def test_only_blocks_that_are_asked_for_are_rendered(monkeypatch):
    out, seen = refiner().sample(64, seed=3), []
    render = PreparedGenerator.render
    monkeypatch.setattr(PreparedGenerator, "render", lambda g, a, c: seen.append(len(a)) or render(g, a, c))
    assert out.select([9, 12]).initial_images.shape == (2, 6) and seen == [8]


def test_the_generator_may_be_updated_after_the_run_but_not_what_is_borrowed():
    g, d = pair()
    made = refiner((g, d))
    out, expected = made.sample(9, seed=3), raw(made, 9)
    with torch.no_grad():
        g[0].weight.add_(1)
    assert torch.equal(out.initial_images, expected)
    made, _ = of_a_split()
    out = made.sample(9)
    with torch.no_grad():
        made.generator.prefix.__closure__[0].cell_contents[0].weight.add_(1)
    with pytest.raises(fr.InputError, match="was updated since the run"):
        _ = out.initial_images


def test_a_saved_result_holds_no_network_and_says_so():
    out = refiner().sample(9, seed=3)
    assert torch.equal(copy.deepcopy(out).initial_images, out.initial_images)
    seen, fresh = (saved(result) for result in (out, refiner().sample(9, seed=3)))
    assert torch.equal(seen.initial_images, out.initial_images)
    with pytest.raises(fr.InputError, match="read from a file"):
        _ = fresh.initial_images


def saved(result):
    buffer = io.BytesIO()
    torch.save(result, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def test_fewer_slots_after_memory_ran_out_keep_the_origin(monkeypatch):
    from fastrefine.engine.run import Run

    made, real_parts, failed = refiner(stop=None), Run.parts, []

    def parts(run):
        for part in real_parts(run):
            yield part
            if not failed:
                failed.append(True)
                raise MemoryError

    monkeypatch.setattr(Run, "parts", parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = made.sample(21, seed=3)
    assert failed and out.report["num_slots"] == 4
    assert torch.allclose(out.initial_images, raw(refiner()), atol=1e-6)


def test_modules_are_in_their_modes_and_the_callers_modes_are_kept():
    made = refiner((nn.Sequential(*pair()[0], nn.Dropout(0.5)).eval(), pair()[1]))
    out = made.sample(9, seed=3)
    with torch.inference_mode():
        assert torch.equal(out.initial_images, raw(made, 9)) and torch.is_inference_mode_enabled()
