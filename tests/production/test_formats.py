"""What a run writes of sound, tables, volumes and images of 1, 3 and 4 channels; what merge keeps."""

import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastrefine as fr
from fastrefine.errors import InputError
from fastrefine.production import evaluation, formats, run_folder
from fastrefine.production.configuration import Configuration
from fastrefine.production.images import load_labelled
from fastrefine.production.worker import Worker
from tests.support.commands import fastrefine, told

SHAPES = {
    "grey": (1, 4, 5), "colour": (3, 4, 5), "rgba": (4, 4, 5), "sound": (2, 30), "mono": (30,), "table": (3,),
    "volume": (1, 3, 4, 2),
}  # fmt: skip
HOLDS = {
    "npz": SHAPES, "safetensors": SHAPES, "png": ("grey", "colour", "rgba"), "wds": ("grey", "colour", "rgba"),
    "wav": ("sound", "mono", "table"), "parquet": ("mono", "table"),
}  # fmt: skip


class Make(torch.nn.Module):
    """(N, 4) -> (N, *shape) in -1 to 1."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.out = tuple(shape), torch.nn.Linear(4, int(np.prod(shape)))

    def forward(self, z):
        return torch.tanh(self.out(z)).view(-1, *self.shape)


class Judge(torch.nn.Sequential):
    """(N, *shape) -> (N, 1)."""

    def __init__(self, shape):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(int(np.prod(shape)), 1))


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """A function: shape's name -> its worker, of one shard of 6 and one of 4."""
    made = {}

    def worker(name):
        if name not in made:
            torch.manual_seed(0)
            parts, arguments = (Make(SHAPES[name]), Judge(SHAPES[name])), {"shape": list(SHAPES[name])}
            pair = fr.save_pair(tmp_path_factory.mktemp(name) / "pair", *parts, code=(f"{__name__}:Make", f"{__name__}:Judge"),
                                arguments=(arguments, arguments), prior=fr.Normal(4), num_classes=3)  # fmt: skip
            made[name] = Worker(Configuration(pair=str(pair), ids="0-9", shard_size=6, max_steps=2, num_slots=4))
        return made[name]

    return worker


def run(worker, kind, path, **more):
    """A run's folder with the samples of a worker in a format."""
    for needed in {"wav": ["soundfile"], "parquet": ["pyarrow"]}.get(kind, []):
        pytest.importorskip(needed)
    worker.configuration = replace(worker.configuration, format=kind, **more)
    worker.run(path)
    assert run_folder.verify(path).complete
    return path


def joined(path):
    parts = list(run_folder.Folder.open(path).parts())
    return np.concatenate([values for values, _ in parts]), {
        name: np.concatenate([columns[name] for _, columns in parts]) for name in parts[0][1]
    }


def outputs(name):
    """The files that samples merge into, and of which format a run must be."""
    images = SHAPES[name] in ((1, 4, 5), (3, 4, 5), (4, 4, 5))
    return ["m.npz", *(["m.tar", "m"] if images else []), *(["m.parquet"] if name in ("table", "mono") else [])]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in HOLDS.items() for name in names])
def test_a_run_holds_its_samples_and_merge_keeps_all_that_is_known_of_them(workers, tmp_path, kind, name):
    worker = workers(name)
    expected = worker.refiner.sample(10, seed=0)
    values, columns = joined(run(worker, kind, tmp_path / "run"))
    x = expected.images.numpy()
    if x.ndim == 4:
        assert np.array_equal(values, np.floor(127.5 * x.transpose(0, 2, 3, 1) + 128).clip(0, 255).astype(np.uint8))
    elif kind == "wav":
        assert values.dtype == np.float32 and np.abs(values - x.reshape(values.shape)).max() <= 0.501 / 32768
    else:
        assert values.dtype == np.float32 and np.array_equal(values, x)
    known = {"ids": list(range(10)), "steps": expected.steps.tolist(), "logits": expected.logits.tolist(),
             "status": expected.status.tolist()}  # fmt: skip
    assert {key: column.tolist() for key, column in columns.items()} == known
    for output in ["m.npz", "m"] if kind == "wav" else outputs(name):
        if output == "m.parquet":
            pytest.importorskip("pyarrow")
        assert run_folder.merge(tmp_path / "run", tmp_path / output) == 10
        found, kept = read(tmp_path / output)
        assert np.array_equal(found, values) and {key: list(column) for key, column in kept.items()} == known, output


def read(path):
    """(samples, columns) of a merged file, by what others read it with."""
    if path.suffix == ".npz":
        content = dict(np.load(path))
        return content.pop("arr_0"), {name: x.tolist() for name, x in content.items()}
    if path.suffix == ".tar":
        with tarfile.open(path) as archive:
            rows = [json.load(archive.extractfile(m)) for m in archive if m.name.endswith("json")]
        pixels = (load_labelled(path)[0] * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        return pixels, {name: [row[name] for row in rows] for name in rows[0]}
    if path.suffix == ".parquet":
        content = pytest.importorskip("pyarrow.parquet").read_table(path).to_pydict()
        features = [name for name in content if name.startswith("x")]
        return np.array([content.pop(name) for name in features], np.float32).T, content
    columns = json.loads((path / "columns.json").read_text())
    samples, _ = load_labelled(path, images_only=False)
    return (samples * 127.5 + 127.5).round().byte().permute(
        0, 2, 3, 1
    ).numpy() if samples.ndim == 4 else samples.numpy(), columns


@pytest.mark.parametrize(
    ("kind", "name"), [("wav", "mono"), ("wav", "sound"), ("parquet", "table"), ("npz", "volume"), ("png", "rgba")]
)
def test_a_run_that_grows_has_the_bytes_of_one_in_one_go(workers, tmp_path, kind, name):
    worker = workers(name)
    run(worker, kind, tmp_path / "whole")
    for ids in ("0-3", "0-9"):
        run(worker, kind, tmp_path / "grown", ids=ids)
    a, b = ({shard.index: formats.digest(folder.file(shard)) for shard in folder.shards()}
            for folder in map(run_folder.Folder.open, (tmp_path / "whole", tmp_path / "grown")))  # fmt: skip
    assert a == b


def test_sound_is_written_at_its_rate_and_range(workers, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    worker = workers("sound")
    pair = worker.configuration.pair
    given = ["--pair", pair, "--format", "wav", "--sample-rate", "44100", "--image-range", "-2", "2", "--ids", "0-3"]
    told(fastrefine("refine", *given, "--max-steps", "2", "--outdir", tmp_path / "run"))
    told(fastrefine("merge", tmp_path / "run", "--output", tmp_path / "out"))
    x, rate = soundfile.read(tmp_path / "out" / "000000" / "000003.wav", dtype="float32")
    assert rate == 44100 and x.shape == (30, 2)
    assert np.abs(x.T * 2 - worker.refiner.sample(4, seed=0).images[3].numpy()).max() < 1e-4


def test_values_beyond_the_range_are_clipped(tmp_path):
    pytest.importorskip("soundfile")
    x = torch.tensor([[-3.0, -1.0, 0.0, 1.0, 3.0]])
    batch = formats.Batch(x, {"ids": np.arange(1)}, (-1.0, 1.0))
    formats.write("wav", tmp_path / "s", batch, 100)
    assert (formats.read("wav", tmp_path / "s", (-1.0, 1.0))[0] * 32768).tolist() == [[[-32768, -32768, 0, 32767, 32767]]]


@pytest.mark.parametrize(("kind", "name", "holds"), [
    ("png", "sound", r"images \(C, H, W\) of 1, 3 or 4 channels, got samples of shape \(2, 30\)"),
    ("wds", "table", "images"), ("wav", "colour", r"sound \(T,\) or \(C, T\)"), ("parquet", "volume", "rows of a table"),
])  # fmt: skip
def test_a_format_refuses_other_samples_before_a_folder_is_claimed(workers, tmp_path, kind, name, holds):
    configuration = replace(workers(name).configuration, format=kind)
    with pytest.raises(InputError, match=f"the {kind} format holds {holds}"):
        Worker(configuration).run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_for_images_refuses_other_samples(workers, tmp_path):
    path = run(workers("table"), "npz", tmp_path / "run")
    for output in ("m.tar", "m"):
        with pytest.raises(InputError, match="holds images"):
            run_folder.merge(path, tmp_path / output)
        assert not (tmp_path / output).exists()
    with pytest.raises(InputError, match=r"is a run of samples of shape \(3,\); this is for images"):
        evaluation.images_of(path)
    assert isinstance(fastrefine("grid", path, "--output", tmp_path / "g.png").exception, InputError)


def test_a_table_stops_at_the_median_of_real_rows(workers, tmp_path):
    np.save(tmp_path / "real.npy", np.random.RandomState(0).randn(50, 3).astype(np.float32) * 5)
    given = ["--pair", workers("table").configuration.pair, "--real", tmp_path / "real.npy", "--stop", "median"]
    told(fastrefine("refine", *given, "--ids", "0-9", "--outdir", tmp_path / "run"))
    assert joined(tmp_path / "run")[0].shape == (10, 3)


def test_images_with_alpha_are_drawn_and_judged(workers, tmp_path):
    path = run(workers("rgba"), "png", tmp_path / "run")
    told(fastrefine("grid", path, "--output", tmp_path / "g.png", "--count", "4"))
    real = np.random.RandomState(0).randint(0, 256, (20, 4, 5, 4), np.uint8)
    np.savez(tmp_path / "real.npz", real, np.arange(20) % 2)
    images, truth = evaluation.images_of(path), load_labelled(tmp_path / "real.npz")[0]
    assert images.shape == (10, 4, 4, 5) and truth.shape == (20, 4, 4, 5)
    evaluation.check(images, truth)
