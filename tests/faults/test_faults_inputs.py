"""FAULTS 17, 19, 20 and 21: values out of range, real images, dtypes, latents and labels that do not fit."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import fastrefine as fr
from fastrefine import stopping
from tests.support.fault_networks import IMAGE, LATENT, Calls, discriminator, generator, refiner, same, same_result, seeded

N = 6
NUMBERS = (math.nan, math.inf, -math.inf, "0.1", None, True, [0.1], 1j)
POSITIVE = (*NUMBERS, 0.0, -1.0)
COUNTS = (-1, 2.5, math.nan, "3", None, True, 2**70)

HYPER_PARAMETERS = [
    (lambda v: fr.Collaborative(v, control="fixed"), POSITIVE),
    (lambda v: fr.Collaborative(0.1, loss=v), ("hinged", None, 3, ["minimax"])),
    (lambda v: fr.Collaborative(0.1, optimizer=v), ("rmsprop", None, 3)),
    (lambda v: fr.Collaborative(0.1, optimizer="momentum", momentum=v), (*NUMBERS, -0.1, 1.1)),
    (lambda v: fr.Collaborative(0.1, clamp=v), (1.0, (0,), (1, 0), (0, math.nan), (-math.inf, 0), "ab", (0, 1, 2))),
    (lambda v: fr.Collaborative(0.1, control=v), ("line search", 1, False)),
    (lambda v: fr.Collaborative(0.1, control="backtracking", optimizer=v), ("momentum", "adam", "ladam")),
    (lambda v: fr.Collaborative(0.1, control="backtracking", adaptive=v), (True,)),
    (lambda v: fr.Collaborative(0.1, adaptive=True, optimizer=v), ("momentum", "adam", "ladam")),
    (lambda v: fr.DGflow(v), POSITIVE),
    (lambda v: fr.DGflow(0.1, gamma=v), (*NUMBERS, -0.01)),
    (lambda v: fr.DGflow(0.1, divergence=v), ("kl", "chi2", None)),
    (lambda v: fr.Normal(v), (0, -1, 2.0, "64", None, True, (3,))),
    (lambda v: fr.Normal(*v), ((), (3, 0), (3, "x"))),
    (lambda v: fr.Uniform(4, low=v), (*NUMBERS, 1.0, 2.0)),
    (lambda v: fr.Uniform(4, high=v), (*NUMBERS, -1.0)),
    (lambda v: fr.TruncatedNormal(4, bound=v), POSITIVE),
    (lambda v: fr.Product(fr.Normal(4), v), (4, None, "Normal(4)")),
    (lambda v: stopping.Threshold(v), NUMBERS),
    (lambda v: stopping.MedianOfReal(v), ([], [math.nan], [1.0, math.inf], "logits")),
    (lambda v: stopping.ReferenceSample(v), ([], [math.nan], "logits")),
    (lambda v: stopping.Hazard(v), (*POSITIVE, 1.5)),
]  # fmt: skip


@pytest.mark.parametrize("k", range(len(HYPER_PARAMETERS)))
def test_hyper_parameters_out_of_range_are_value_errors(k):
    """FAULTS 17"""
    make, values = HYPER_PARAMETERS[k]
    for value in values:
        with pytest.raises(ValueError, match="wanted|wants|for optimizer=") as caught:
            make(value)
        assert isinstance(caught.value, fr.InputError), value


REFINER = {
    "max_steps": (*COUNTS, 2**31), "num_slots": (-1, 0, 2.5, "3", True),
    "precision": ("fp32", torch.float32, None),
    "keep": ("first", None), "driver": ("cuda graph", None), "coupling": ("allow", None, True),
    "on_nonfinite": ("ignore", None), "max_grad_norm": [v for v in POSITIVE if v is not None],
    "discriminator_output": ("prob", None, 0), "stop": (math.nan, math.inf, "mean", True, stopping.MedianOfReal),
    "prior": (64, torch.randn, fr.Normal), "sampler": (0.1, "adam", fr.Collaborative), "at": (3, None, nn.ReLU()),
    "device": ("gpu", 3.5), "output_device": ("nowhere",), "generator_kwargs": ("truncation", [1]),
    "discriminator_kwargs": (3,), "output_key": (1.5, [0]), "callback": ("print", 3), "discriminator": (None, print),
    "generator": ("G", torch.nn.Linear, print), "real": (torch.zeros(0, IMAGE), torch.zeros(()), "images"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFINER)
def test_refiner_arguments_out_of_range_are_value_errors_before_any_compute(name):
    """FAULTS 17"""
    g, d = Calls(generator()), Calls(discriminator())
    for value in REFINER[name]:
        given = {"generator": g, "discriminator": d, "sampler": fr.Collaborative(0.1), "prior": fr.Normal(LATENT)}
        with pytest.raises(ValueError, match=r"wanted|without|needs|must") as caught:
            fr.Refiner(**given | {name: value})
        assert isinstance(caught.value, fr.InputError), value
    assert g.calls == d.calls == [0]


CALLS = [
    (lambda r, v: r.sample(v), COUNTS),
    (lambda r, v: r.stream(v), COUNTS),
    (lambda r, v: r.stream(5, chunk=v), (*COUNTS, 0)),
    (lambda r, v: r.sample(5, first_id=v), COUNTS),
    (lambda r, v: r.sample(5, first_id=v), (2**32 - 4,)),
    (lambda r, v: r.sample(5, seed=v), (-1, 2**64, 1.5, math.nan, "7", None, True)),
    (lambda r, v: r.refine(v), (None, "z", 3.0, torch.zeros(4, LATENT, dtype=torch.int64), torch.zeros(()))),
    (lambda r, v: r.score(v), (None, "x", torch.zeros(5, IMAGE, dtype=torch.uint8))),
    (lambda r, v: r.sample(5, labels=v), ([1, 2], 1.5, "cat", [0.5] * 5, torch.zeros(5, dtype=torch.bool))),
]


@pytest.mark.parametrize("k", range(len(CALLS)))
def test_arguments_of_a_call_out_of_range_are_value_errors_before_any_compute(k):
    """FAULTS 17"""
    g, d = Calls(generator()), Calls(discriminator())
    r = refiner(g, d)
    call, values = CALLS[k]
    for value in values:
        with pytest.raises(fr.InputError):
            call(r, value)
    assert g.calls == d.calls == [0]


def test_numbers_of_numpy_are_numbers():
    """FAULTS 17"""
    out = refiner(num_slots=np.int64(4), max_steps=np.int32(5)).sample(np.int64(N))
    assert same_result(out, refiner().sample(N))


def test_without_a_prior_there_is_nothing_to_sample():
    """FAULTS 17"""
    with pytest.raises(fr.InputError, match="no prior to draw latents from: pass prior="):
        refiner(prior=None).sample(N)
    with pytest.raises(fr.InputError, match="only images can be refined: pass at='output'"):
        fr.Refiner(None, discriminator(), fr.Collaborative(0.1))


def test_a_rule_that_reads_real_logits_needs_real_images():
    """FAULTS 17"""
    for options in ({"stop": stopping.MedianOfReal()}, {"sampler": fr.Collaborative(0.1, adaptive=True)}):
        with pytest.raises(fr.InputError, match="reads real logits: pass real=images"):
            refiner(**options)
    with pytest.raises(fr.InputError, match="real_labels were given without `real`"):
        refiner(real_labels=[0, 1])


def image_pair(last):
    with seeded(3):
        g = nn.Sequential(nn.Linear(4, 3 * 64), last, nn.Unflatten(1, (3, 8, 8)))
        nn.init.normal_(g[0].bias)
        return g, nn.Sequential(nn.Conv2d(3, 1, 8), nn.Flatten())


def real_images(low, high, size=8):
    with seeded(0):
        return low + (high - low) * torch.rand(6, 3, size, size)


@pytest.mark.parametrize(
    ("last", "real", "message"),
    [
        (nn.Tanh(), real_images(0, 255), r"real images lie in 0\.\d+ to 25\d.*, generated ones in -0.* 0\.\.255\?"),
        (nn.Tanh(), real_images(0, 1), r"real images lie in .* to 0\.99.* 0\.\.1\? Scale them .* 2 x - 1"),
        (nn.Sigmoid(), real_images(-1, 1), r"real images lie in -0\.99.* -1\.\.1\? Scale them .* \(x \+ 1\) / 2"),
        (nn.Tanh(), real_images(-1, 1, 9), r"real images have shape \(3, 9, 9\), but the generator makes \(3, 8, 8\)"),
        (nn.Tanh(), real_images(-1, 1)[:, 0], r"real images have shape \(8, 8\), but the generator makes \(3, 8, 8\)"),
    ],
)
def test_real_images_of_another_size_or_range_are_an_error_that_says_which(last, real, message):
    """FAULTS 19"""
    g, d = image_pair(last)
    with pytest.raises(fr.InputError, match=message):
        refiner(g, d, real=real, stop=stopping.MedianOfReal()).sample(N)


def test_empty_or_whole_number_real_images_are_an_error():
    """FAULTS 19"""
    g, d = image_pair(nn.Tanh())
    with pytest.raises(fr.InputError, match="`real` is empty"):
        refiner(g, d, real=torch.zeros(0, 3, 8, 8))
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    pixels[0, 0, 0, 0], pixels[0, 0, 0, 1] = 0, 255
    with pytest.raises(fr.InputError, match=r"real must be floating point .* 0 to 255; .* real.float\(\) / 127.5 - 1"):
        refiner(g, d, real=pixels)


@pytest.mark.parametrize(("last", "low"), [(nn.Tanh(), -1), (nn.Sigmoid(), 0)])
def test_real_images_in_the_generators_range_are_taken(last, low):
    """FAULTS 19"""
    g, d = image_pair(last)
    r = refiner(g, d, real=real_images(low, 1), stop=stopping.MedianOfReal())
    assert len(r.sample(N)) == N


@pytest.mark.parametrize("at", ["input", "1"])
def test_networks_and_latents_of_other_dtypes_are_cast(at):
    """FAULTS 20"""
    z = (torch.arange(N * LATENT) / 16 - 1).view(N, LATENT)  # exact in half precision
    expected = refiner(at=at).refine(z)
    assert expected.images.dtype == torch.float32
    for g, d in ((generator().double(), discriminator()), (generator(), discriminator().double())):
        r = refiner(g, d, at=at)
        for latents in (z, z.half(), z.double(), z.bfloat16(), z.numpy(), z.tolist()):
            assert same_result(r.refine(latents), expected)
        assert {p.dtype for p in (*g.parameters(), *d.parameters())} == {torch.float32, torch.float64}
    low = refiner(generator().half(), discriminator().bfloat16(), at=at).refine(z)
    assert torch.allclose(low.images, expected.images, atol=0.02)
    exact = refiner(at=at, precision="float64").refine(z)
    assert exact.images.dtype == exact.logits.dtype == torch.float64
    assert torch.allclose(exact.images.float(), expected.images, atol=1e-5)


def test_images_to_score_are_cast():
    """FAULTS 20"""
    x = torch.linspace(-1, 1, 5 * IMAGE).view(5, IMAGE).half()
    assert same(refiner().score(x), refiner().score(x.float()))


@pytest.mark.parametrize("at", ["input", "0", "output"])
def test_latents_of_the_wrong_width_are_an_error_that_names_both(at):
    """FAULTS 21"""
    message = rf"the generator failed on a batch of shape \(4, 7\), torch.float32: .*4x7 and {LATENT}x8"
    with pytest.raises(fr.InputError, match=message):
        refiner(at=at).refine(torch.zeros(N, 7))
    with pytest.raises(fr.InputError, match=message):
        refiner(at=at, prior=fr.Normal(7)).sample(N)
    with pytest.raises(fr.InputError, match=r"the discriminator failed on a batch of shape \(4, 2\)"):
        fr.Refiner(None, discriminator(), fr.Collaborative(0.1), at="output").refine(torch.zeros(N, 2))


def test_images_of_the_wrong_size_are_an_error_in_score():
    """FAULTS 21"""
    r = refiner()
    for _ in range(2):  # before and after the discriminator was prepared
        with pytest.raises(fr.InputError, match=r"the discriminator failed on a batch of shape \(\d, 2\)"):
            r.score(torch.zeros(3, 2))
        r.sample(2)


CLASSES = 3


class ByClass(nn.Module):
    """Labels through an embedding, a table, as one-hot or given vectors; and an embedding of something else."""

    def __init__(self, inputs, outputs, how):
        super().__init__()
        with seeded(5):
            self.body, self.embed = nn.Linear(inputs, outputs), nn.Embedding(CLASSES, inputs)
            self.position = nn.Embedding(2, inputs)
        self.how = how

    def forward(self, x, labels):
        if self.how == "embedding":
            x = x + self.embed(labels)
        elif self.how == "table":
            x = x + self.embed.weight[labels]
        elif self.how == "one-hot":
            x = x + nn.functional.one_hot(labels, CLASSES).to(x.dtype) @ self.embed.weight
        else:
            x = x + labels @ self.embed.weight
        return torch.tanh(self.body(x + self.position(torch.ones(len(x), dtype=torch.long, device=x.device))))


@pytest.mark.parametrize("side", ["generator", "discriminator", "both"])
@pytest.mark.parametrize("at", ["input", "output"])
def test_labels_out_of_range_are_found_on_the_host_wherever_they_stand(side, at):
    """FAULTS 21"""
    g = ByClass(LATENT, IMAGE, "embedding") if side != "discriminator" else generator()
    d = ByClass(IMAGE, 1, "embedding") if side != "generator" else discriminator()
    r = refiner(g, d, at=at)
    labels = torch.zeros(30, dtype=torch.long)
    labels[25] = CLASSES
    for _ in range(2):  # before and after the networks were prepared
        with pytest.raises(fr.InputError, match="label 3 is out of range: the network knows classes 0 to 2"):
            r.sample(30, labels=labels)
        with pytest.raises(fr.InputError, match="labels must not be negative, got -1"):
            r.sample(30, labels=labels - 1)
        assert len(r.sample(30, labels=2)) == 30


@pytest.mark.parametrize("how", ["table", "one-hot"])
def test_labels_out_of_range_of_other_tables_are_an_error_of_ours(how):
    """FAULTS 21"""
    with pytest.raises(fr.InputError, match="the generator failed"):
        refiner(ByClass(LATENT, IMAGE, how)).sample(N, labels=CLASSES)
    assert len(refiner(ByClass(LATENT, IMAGE, how)).sample(N, labels=CLASSES - 1)) == N


def test_label_vectors_travel_with_their_sample():
    """FAULTS 21"""
    g, classes = ByClass(LATENT, IMAGE, "vector"), torch.tensor([0, 1, 2, 2, 1, 0])
    vectors = nn.functional.one_hot(classes, CLASSES).float()
    r = refiner(g)
    out = r.sample(N, labels=vectors)
    assert same_result(out, refiner(ByClass(LATENT, IMAGE, "embedding")).sample(N, labels=classes))
    with pytest.raises(fr.InputError, match="the generator failed"):
        r.sample(N, labels=torch.zeros(N, CLASSES + 1))
    with pytest.raises(fr.InputError, match="the generator failed"):
        r.sample(N, labels=classes)
    assert same_result(r.sample(N, labels=vectors), out)


def test_missing_labels_are_asked_for():
    """FAULTS 21"""
    with pytest.raises(fr.InputError, match="the generator needs labels: pass labels="):
        refiner(ByClass(LATENT, IMAGE, "embedding")).sample(N)
    with pytest.raises(fr.InputError, match="the discriminator needs labels: pass labels="):
        refiner(d=ByClass(IMAGE, 1, "embedding")).sample(N)
    with pytest.raises(fr.InputError, match="the discriminator needs labels"):
        refiner(d=ByClass(IMAGE, 1, "embedding")).score(torch.zeros(3, IMAGE))
    r = refiner(d=ByClass(IMAGE, 1, "embedding"), real=torch.zeros(3, IMAGE), stop=stopping.MedianOfReal())
    with pytest.raises(fr.InputError, match="the discriminator takes labels: pass real_labels="):
        r.sample(N, labels=1)


def test_unexpected_labels_are_refused():
    """FAULTS 21"""
    with pytest.raises(fr.InputError, match="neither the generator nor the discriminator takes them"):
        refiner().sample(N, labels=1)
    with pytest.raises(fr.InputError, match="labels were given, but the discriminator takes none"):
        refiner().score(torch.zeros(3, IMAGE), labels=[0, 1, 2])


def test_an_option_after_the_images_is_no_label():
    """FAULTS 21"""

    class WithOption(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = discriminator()

        def forward(self, x, return_features=False):
            return (self.module(x), x) if return_features is not False else self.module(x)

    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    g = ByClass(LATENT, IMAGE, "embedding")
    assert same_result(refiner(g, WithOption()).sample(N, labels=labels), refiner(g).sample(N, labels=labels))


def test_labels_do_not_go_into_an_optional_argument_that_is_noise():
    """FAULTS 21"""

    class WithNoise(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = generator()

        def forward(self, z, noise=None):
            return self.module(z if noise is None else z + noise[:, None])

    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    d = ByClass(IMAGE, 1, "embedding")
    assert same_result(refiner(WithNoise(), d).sample(N, labels=labels), refiner(d=d).sample(N, labels=labels))


def test_scoring_by_class_and_real_images_by_class():
    """FAULTS 21"""
    d, x, y = ByClass(IMAGE, 1, "embedding"), torch.linspace(-1, 1, 6 * IMAGE).view(6, IMAGE), [0, 1, 2, 0, 1, 2]
    r = refiner(d=d, real=x, real_labels=y, stop=stopping.MedianOfReal())
    assert torch.allclose(r.score(x, y), d(x, torch.tensor(y))[:, 0])
    assert len(r.sample(N, labels=y)) == N
    with pytest.raises(fr.InputError, match="label 9 is out of range"):
        r.score(x, 9)
    partial = refiner(d=d, real=x[:2], real_labels=y[:2], stop=stopping.MedianOfReal())
    with pytest.raises(fr.InputError, match="no real image has label 2"):
        partial.sample(N, labels=2)
