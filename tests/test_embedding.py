"""A Refiner inside other people's programs: threads, DataLoaders, pickles, cancellation."""

import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fastrefine as fr
from fastrefine import refiner as refiner_module
from fastrefine.networks import copies
from fastrefine.production import saved_pair


def refiner(**options):
    pair = saved_pair.load_pair("digits")
    given = dict(at="act2", prior=fr.Normal(32), max_steps=3, num_slots=16)
    return fr.Refiner(pair.generator, pair.discriminator, fr.Collaborative(0.1), **given | options)


def test_threads_that_share_a_refiner_get_the_samples_of_one_alone():
    shared, found = refiner(), {}
    before = torch.get_num_threads()

    def work(seed):
        found[seed] = shared.sample(40, seed=seed).images

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and torch.get_num_threads() == before
    for seed, images in found.items():
        assert torch.equal(images, refiner().sample(40, seed=seed).images)


def test_streams_of_one_refiner_may_be_interleaved():
    one = refiner()
    streams = [one.stream(40, seed=seed, chunk=10) for seed in (0, 1)]
    parts = [[next(stream).images for stream in streams] for _ in range(4)]
    for seed in (0, 1):
        assert torch.equal(torch.cat([part[seed] for part in parts]), refiner().sample(40, seed=seed).images)


def test_a_used_refiner_is_pickled_without_what_it_prepared():
    one = refiner(stop=fr.stopping.UniformStep())
    expected = one.sample(20).images
    again = pickle.loads(pickle.dumps(one))
    assert again._networks.target is None and one._networks.target is not None
    assert torch.equal(again.sample(20).images, expected)


def test_a_refiner_with_another_discriminator_still_shares_the_cut():
    one = refiner()
    one.sample(4)
    other = one.with_discriminator(one.discriminator)
    assert other._networks.prepared_generator is one._networks.prepared_generator is not None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_gives_every_sample_once_whatever_the_workers(workers):
    labels = torch.arange(50) % 10
    one = refiner()
    items = [item for batch in DataLoader(one.dataset(50, seed=3, chunk=16), batch_size=8, num_workers=workers)
             for item in zip(batch["id"].tolist(), batch["image"], batch["logit"], strict=True)]  # fmt: skip
    expected = one.sample(50, seed=3)
    assert sorted(number for number, *_ in items) == list(range(50)) and len(labels) == 50
    for number, image, logit in items:
        assert torch.equal(image, expected.images[number]) and logit == expected.logits[number]


def test_a_stream_that_is_closed_leaves_the_refiner_usable():
    one = refiner()
    stream = one.stream(400, seed=1, chunk=10)
    first = next(stream)
    stream.close()
    assert torch.equal(one.sample(10, seed=1).images, first.images)


def test_a_callback_that_raises_cancels_and_leaves_the_refiner_usable():
    class Cancelled(Exception):
        pass

    def cancel(progress):
        if progress["finished"] >= 16:
            raise Cancelled

    one = refiner(callback=cancel)
    with pytest.raises(Cancelled):
        one.sample(400)
    one = one.replaced(callback=None)
    assert torch.equal(one.sample(20).images, refiner().sample(20).images)


def test_weights_updated_by_way_of_data_or_replaced_are_noticed():
    made = refiner()
    first = made.sample(20).logits
    made.discriminator[-1].bias.data.add_(5.0)  # as the average of a generator's weights is kept in many codes
    assert float((made.sample(20).logits - first).mean()) > 3
    made.discriminator[-1].bias = nn.Parameter(torch.full_like(made.discriminator[-1].bias, -5.0))
    assert float((made.sample(20).logits - first).mean()) < -3


def test_weights_that_nobody_updated_are_the_same_for_any_number_of_threads_and_kind_of_tensor():
    module = nn.Linear(1024, 1024)
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    module.register_buffer("narrow", torch.ones(3, dtype=torch.float8_e4m3fn))
    module.register_buffer("mask", torch.ones(3, dtype=torch.bool))
    module.register_buffer("phase", torch.ones(3, dtype=torch.complex64))
    before, threads = copies.Weights(module), torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert copies.Weights(module) == before
    finally:
        torch.set_num_threads(threads)
    for value in (module.weight, module.mask, module.phase):
        value.data[0] = 0
        assert copies.Weights(module) != before
        before = copies.Weights(module)


def test_what_cannot_be_replaced_is_named():
    assert refiner().replaced(max_steps=0, stop=0.5).max_steps == 0
    with pytest.raises(fr.InputError, match="maxsteps: a Refiner has no such option"):
        refiner().replaced(maxsteps=4)


@pytest.mark.parametrize("name", ["sampler", "stop", "at", "precision", "prior", "real"])
def test_what_networks_were_prepared_by_is_not_set_in_silence(name):
    with pytest.raises(fr.InputError, match=f"{name} of a Refiner cannot be set: make another one"):
        setattr(refiner(), name, None)


def test_a_part_of_a_stream_owns_its_memory():
    for part in refiner().stream(20, chunk=3):
        assert part.images.untyped_storage().nbytes() == part.images.numel() * part.images.element_size()


def test_a_forked_process_is_told_that_it_cannot_use_a_refiner_of_a_gpu(monkeypatch):
    made = refiner()
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(refiner_module, "get_worker_info", lambda: SimpleNamespace(id=0, num_workers=2))
    items = made.dataset(4)
    assert len(list(items)) > 0  # on a CPU it may
    object.__setattr__(made.options, "device", torch.device("cuda"))
    with pytest.raises(fr.InputError, match="num_workers=0"):
        next(iter(items))
