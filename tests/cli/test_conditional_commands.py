"""Networks that take labels, on the command line: each command end to end, what is missing said before a folder is claimed."""

import json
import shlex

import numpy as np
import pytest
import torch
from torch import nn

import fastrefine as fr
from fastrefine.production import per_image_selection
from fastrefine.production.configuration import Configuration
from fastrefine.production.worker import Worker
from fastrefine.stopping import RealLogits
from tests.support.commands import fastrefine, told

CLASSES = 3
QUICK = ("--max-steps", 3, "--slots", 16, "--ids", "0-29")


class Generator(nn.Module):
    """(N, 4), (N,) -> (N, 1, 4, 4), around the value of the class."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.out = nn.Embedding(CLASSES, 4), nn.Linear(4, 16), nn.Linear(16, 16)

    def forward(self, z, labels):
        return torch.tanh(self.out(torch.relu(self.hidden(z + self.embedding(labels))))).view(-1, 1, 4, 4)


class Discriminator(nn.Module):
    """(N, 1, 4, 4), (N,) -> (N, 1); classes differ in their mean logit."""

    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(CLASSES, 1), nn.Linear(16, 1)

    def forward(self, x, labels):
        return self.out(x.flatten(1)) + 5 * self.embedding(labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair; real.npz, images of every class; two.npz, of two classes; plain.npz, without labels."""
    path = tmp_path_factory.mktemp("conditional")
    torch.manual_seed(0)
    fr.save_pair(
        path / "pair", Generator(), Discriminator(), code=(f"{__name__}:Generator", f"{__name__}:Discriminator"),
        prior=fr.Normal(4), at="hidden", num_classes=CLASSES,
    )  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 1), dtype=np.uint8)
    labels = np.arange(60) % CLASSES
    np.savez(path / "real.npz", arr_0=pixels, arr_1=labels)
    np.savez(path / "two.npz", arr_0=pixels[labels < 2], arr_1=labels[labels < 2])
    np.savez(path / "plain.npz", arr_0=pixels)
    return path


@pytest.mark.parametrize("select", ["none", "mh", "drs", "obrs"])
def test_refine_makes_the_images_of_random_classes_that_the_python_call_makes(folder, tmp_path, select):
    given = ("--pair", folder / "pair", "--real", folder / "real.npz", "--stop", "median", "--class", "random")
    told(fastrefine("refine", *given, "--select", select, "--chain-length", 2, *QUICK, "--outdir", tmp_path / "run"))
    told(fastrefine("merge", tmp_path / "run", "--output", tmp_path / "run.npz"))
    made = np.load(tmp_path / "run.npz")
    assert made["arr_0"].shape == (30, 4, 4, 1) and set(made["arr_1"]) == set(range(CLASSES))
    if select == "none":
        pair, real = fr.load_pair(folder / "pair"), np.load(folder / "real.npz")
        refiner = fr.Refiner(
            pair.generator, pair.discriminator, fr.Collaborative(0.1), at="hidden", max_steps=3, num_slots=16,
            stop=fr.stopping.MedianOfReal(), prior=fr.Normal(4),
            real=torch.from_numpy(real["arr_0"].transpose(0, 3, 1, 2)) / 127.5 - 1, real_labels=real["arr_1"],
        )  # fmt: skip
        wanted = refiner.sample(30, labels=made["arr_1"]).images
        assert np.abs((wanted.numpy() + 1) * 127.5 - made["arr_0"].transpose(0, 3, 1, 2)).max() <= 0.51


def test_balanced_classes_take_turns_also_over_several_workers(folder, tmp_path):
    given = ("--pair", folder / "pair", "--real", folder / "real.npz", "--class", "balanced", "--shard-size", 10)
    for worker in range(2):
        told(fastrefine("refine", *given, *QUICK, "--outdir", tmp_path / "run", "--shard-id", worker, "--num-shards", 2))
    told(fastrefine("merge", tmp_path / "run", "--output", tmp_path / "run.npz"))
    assert np.load(tmp_path / "run.npz")["arr_1"].tolist() == [i % CLASSES for i in range(30)]


def test_a_class_for_all_and_several_workers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(per_image_selection, "PILOT", 64)
    configuration = Configuration(
        pair=str(folder / "pair"), classes="random", ids="0-39", shard_size=10, num_slots=16, max_steps=2, select="obrs",
        chain_length=2,
    )  # fmt: skip
    for name, workers in (("one", 1), ("two", 2)):
        for worker in range(workers):
            Worker(configuration).run(tmp_path / name, worker=worker, workers=workers)
        told(fastrefine("merge", tmp_path / name, "--output", tmp_path / f"{name}.npz"))
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    told(fastrefine("refine", "--pair", folder / "pair", "--class", 2, *QUICK, "--outdir", tmp_path / "run"))
    assert set(np.load(next((tmp_path / "run").glob("*.npz")))["labels"]) == {2}


@pytest.mark.parametrize(("flags", "message"), [
    ((), "need labels: pass --class 3, or --class balanced"),
    (("--class", 3), "label 3 is out of range"),
    (("--class", "random", "--num-classes", 9), "label 8 is out of range"),
    (("--class", 0, "--real", "plain.npz"), "take labels, and .*plain.npz has none"),
    (("--class", "random", "--real", "two.npz"), "two.npz has no image of class 2"),
])  # fmt: skip
def test_what_is_missing_is_said_before_a_folder_is_claimed(folder, tmp_path, flags, message):
    flags = [folder / flag if str(flag).endswith(".npz") else flag for flag in flags]
    done = fastrefine("refine", "--pair", folder / "pair", *flags, *QUICK, "--outdir", tmp_path / "run")
    with pytest.raises(fr.InputError, match=message):
        raise done.exception
    assert not (tmp_path / "run").exists()


def test_random_classes_of_a_pair_that_does_not_tell_how_many_need_the_number(tmp_path):
    with pytest.raises(fr.InputError, match="random classes need --num-classes"):
        Worker(Configuration(pair="digits", classes="random"))


def test_shape_trains_on_the_labels_of_the_real_images(folder, tmp_path):
    given = ("--iterations", 2, "--batch-size", 8, "--max-steps", 2)
    told(fastrefine("shape", "--pair", folder / "pair", "--real", folder / "real.npz", *given, "--outdir", tmp_path / "shaped"))
    said = told(
        fastrefine("shape", "--pair", folder / "pair", "--real", folder / "real.npz", *given, "--outdir", tmp_path / "again")
    )
    command = said.partition("to refine with it: fastrefine ")[2].splitlines()[0].replace("0-999", "0-9")
    told(fastrefine(*shlex.split(command)[:-1], tmp_path / "run", "--max-steps", 1))
    before, after = (fr.load_pair(path).discriminator.embedding.weight for path in (folder / "pair", tmp_path / "shaped"))
    assert (before != after).all()  # every class was seen
    done = fastrefine("shape", "--pair", folder / "pair", "--real", folder / "plain.npz", *given, "--outdir", tmp_path / "no")
    with pytest.raises(fr.InputError, match="plain.npz has none: wanted class folders"):
        raise done.exception


def test_check_and_the_command_that_it_ends_in_give_labels(folder, tmp_path):
    given = ("--pair", folder / "pair", "--sampler-args", '{"loss": "wasserstein"}', "--slots", 16)
    for real in (("--real", folder / "real.npz"), ()):
        found = json.loads(
            fastrefine("check", *given, *real, "--samples", 30, "--refined", 6, "--max-steps", 2, "--json").stdout
        )
        assert found["scores"]["raw"]["count"] == 30 and ("real" in found["scores"]) == bool(real)
        assert "labels" not in found["verdict"]
    liked = (fr.load_pair(folder / "pair").discriminator.out.weight.detach().view(1, 4, 4, 1) > 0).byte().numpy() * 255
    np.savez(tmp_path / "liked.npz", arr_0=np.repeat(liked, 30, 0), arr_1=np.arange(30) % CLASSES)
    fine = ("--real", tmp_path / "liked.npz", "--stop", -99, "--max-steps", 0)
    out = told(fastrefine("check", *given, *fine, "--samples", 30))
    command = next(part for part in out.split("`") if part.startswith("fastrefine refine "))
    words = shlex.split(command)[1:-1]
    assert words[-7:-1] == ["--class", "random", "--num-classes", "3", "--ids", "0-999"]
    told(fastrefine(*words, tmp_path / "run", "--ids", "0-29"))


def test_a_calibration_reads_the_labels_of_the_held_out_images(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(per_image_selection, "PILOT", 64)
    given = ("refine", "--pair", folder / "pair", "--real", folder / "real.npz", "--class", "random", "--select", "drs",
             "--chain-length", 2, *QUICK, "--calibrate", "platt")  # fmt: skip
    told(fastrefine(*given, "--held-out", folder / "real.npz", "--outdir", tmp_path / "run"))
    done = fastrefine(*given, "--held-out", folder / "plain.npz", "--outdir", tmp_path / "no")
    with pytest.raises(fr.InputError, match="plain.npz has none"):
        raise done.exception


def test_bench_gives_labels_to_the_networks_that_take_them(folder):
    given = ("--steps", 1, "--seconds", 0.01, "--slots", 8, "--precisions", "float32", "--json")
    rows = json.loads(told(fastrefine("bench", "--pair", folder / "pair", "--layers", "input,hidden,output", *given)))
    assert [row["at"] for row in rows] == ["input", "hidden", "output"]
    assert all(row["images_per_second"] > 0 and row["b0_images_per_second"] > 0 for row in rows)


# --- selection class by class


def test_chains_start_from_real_logits_of_the_images_class():
    real = RealLogits(torch.tensor([-50.0, 50.0]).double(), torch.tensor([0, 1]))
    chooser = per_image_selection.Chooser(Configuration(pair="digits", select="mh", chain_length=2), {}, real)
    logits, images, labels = torch.zeros(20, 2), torch.arange(20), torch.arange(20) % 2
    _, moved = chooser.choose(logits, images, labels)
    assert torch.equal(moved, labels == 0)  # no proposal of class 1 is better than its start


@pytest.mark.parametrize("select", ["drs", "obrs"])
def test_rejection_is_that_of_each_class_by_itself(select):
    configuration = Configuration(pair="digits", select=select, chain_length=1, budget=0.3)
    d = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(4000) % 2
    shifted = d + torch.tensor([0.0, 30.0], dtype=torch.float64)[labels]
    chosen = [
        per_image_selection.Chooser.piloted(configuration, x, labels).choose(x.view(-1, 1), torch.arange(4000), labels)[1]
        for x in (d, shifted)
    ]
    assert torch.equal(*chosen)  # what one class has in advance is no reason to take it
    pooled = per_image_selection.Chooser.piloted(configuration, shifted).choose(shifted.view(-1, 1), torch.arange(4000))[1]
    assert chosen[1][labels == 0].any() and not pooled[labels == 0].any()
