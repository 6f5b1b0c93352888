"""How networks are called, in saved pairs and on the command line: functions, keywords, conditions, coupled samples."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

import fastrefine as fr
from fastrefine import checks
from fastrefine.cli import cli
from fastrefine.production import per_image_selection
from fastrefine.production.configuration import Configuration
from fastrefine.production.worker import Worker
from tests.support.commands import fastrefine, told

HERE = __name__
ROWS = 40
QUICK = ("--max-steps", 2, "--slots", 8, "--shard-size", 8)
SAMPLER = fr.Collaborative(0.1)


class Generator(nn.Module):
    """([(N, 4)], scale) -> (style (N, 4), images (N, 1, 4, 4)); refuses other calls."""

    def __init__(self):
        super().__init__()
        self.style, self.out = nn.Linear(4, 4), nn.Linear(4, 16)

    def forward(self, latents, *, scale):
        style = self.style(latents[0])
        return style, torch.tanh(scale * self.out(torch.relu(style))).view(-1, 1, 4, 4)


class Discriminator(nn.Module):
    """(N, 2, 4, 4) -> {"features": (N, 3), "logit": (N, 1)}."""

    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Linear(32, 3), nn.Linear(3, 1)

    def forward(self, pair, slope=1.0):
        features = torch.tanh(slope * self.features(pair.flatten(1)))
        return {"features": features, "logit": self.head(features)}


def generate(network, z, **_):
    return network([z], scale=0.7)[1]


def brighter(network, z, edges):
    return network([z], scale=0.7)[1] + 0.1 * edges


def discriminate(network, x, edges):
    return network(torch.cat([edges, x], 1))["logit"]


class Coupled(nn.Module):
    """(N, 1, 4, 4) -> (N,), with the standard deviation over groups of 4 consecutive samples."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(32, 1)

    def forward(self, x):
        group = x.view(-1, 4, 16)
        spread = group.std(1, keepdim=True).expand_as(group).reshape(-1, 16)
        return self.out(torch.cat([x.flatten(1), spread], 1))[:, 0]


class Plain(nn.Sequential):
    """(N, 4) -> (N, 1, 4, 4)."""

    def __init__(self):
        super().__init__(nn.Linear(4, 16), nn.Tanh(), nn.Unflatten(1, (1, 4, 4)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair that keeps its calls; the same networks without; conditions of 40 samples; real images."""
    path = tmp_path_factory.mktemp("calls")
    torch.manual_seed(0)
    g, d = Generator(), Discriminator()
    given = {"code": (f"{HERE}:Generator", f"{HERE}:Discriminator"), "prior": fr.Normal(4)}
    fr.save_pair(path / "pair", g, d, **given, at="style", generate=generate, discriminate=f"{HERE}:discriminate")
    fr.save_pair(path / "plain", g, d, **given, at="style")
    edges = np.random.default_rng(0).standard_normal((ROWS, 1, 4, 4)).astype(np.float32)
    np.savez(path / "edges.npz", edges=edges)
    save_file({"edges": edges}, path / "edges.safetensors")
    np.savez(path / "others.npz", edges=edges + 1)
    np.savez(path / "few.npz", edges=edges[:10])
    np.savez(path / "uneven.npz", edges=edges, more=edges[:3])
    np.savez(path / "objects.npz", edges=np.array([{}], dtype=object))
    fr.save_pair(
        path / "coupled", Plain(), Coupled(), code=(f"{HERE}:Plain", f"{HERE}:Coupled"), prior=fr.Normal(4), at="0",
        coupling="lockstep", group_size=4,
    )  # fmt: skip
    np.savez(path / "real.npz", arr_0=np.random.default_rng(1).integers(0, 256, (30, 4, 4, 1), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def typed(folder):
    """The same networks and calls, typed."""
    return ("--pair", folder / "plain", "--generate", f"{HERE}:generate", "--discriminate", f"{HERE}:discriminate")


def merged(run):
    told(fastrefine("merge", run, "--output", f"{run}.npz"))
    return np.load(f"{run}.npz")["arr_0"].transpose(0, 3, 1, 2)


def python(folder, n, **changes):
    """Images in 0 to 255 by the Python call."""
    pair = fr.load_pair(folder / "plain")
    edges = torch.from_numpy(np.load(folder / "edges.npz")["edges"])
    given = {"generate": generate, "discriminate": discriminate, "max_steps": 2, "num_slots": 8, **changes}
    refiner = fr.Refiner(pair.generator, pair.discriminator, SAMPLER, at="style", prior=fr.Normal(4), **given)
    return (refiner.sample(n, conditions={"edges": edges[:n]}).images.numpy() + 1) * 127.5


# --- refine


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("how", ["typed", "pair"])
def test_refine_calls_the_networks_as_the_python_call_does(folder, typed, tmp_path, how, suffix):
    given = typed if how == "typed" else ("--pair", folder / "pair", "--trust-code")
    told(fastrefine("refine", *given, *QUICK, "--ids", "0-19", "--conditions", folder / f"edges.{suffix}",
                    "--outdir", tmp_path / "run"))  # fmt: skip
    assert np.abs(python(folder, 20) - merged(tmp_path / "run")).max() <= 0.51


def test_a_typed_call_wins_over_the_pairs(folder, tmp_path):
    told(fastrefine("refine", "--pair", folder / "pair", "--trust-code", "--generate", f"{HERE}:brighter", *QUICK,
                    "--ids", "0-7", "--conditions", folder / "edges.npz", "--outdir", tmp_path / "run"))  # fmt: skip
    wanted = np.clip(python(folder, 8, generate=brighter), 0, 255)
    assert np.abs(wanted - merged(tmp_path / "run")).max() <= 0.51
    told_ = json.loads((tmp_path / "run" / "manifest.json").read_text())["configuration"]
    assert (told_["generate"], told_["discriminate"]) == (f"{HERE}:brighter", f"{HERE}:discriminate")


def test_keywords_and_an_output_key_are_those_of_the_python_call(folder, tmp_path):
    told(fastrefine(
        "refine", "--pair", folder / "plain", "--generate", f"{HERE}:pair_of_images", "--discriminator-kwargs",
        '{"slope": 2.0}', "--output-key", "logit", *QUICK, "--ids", "0-7", "--outdir", tmp_path / "run",
    ))  # fmt: skip
    pair = fr.load_pair(folder / "plain")
    refiner = fr.Refiner(
        pair.generator, pair.discriminator, SAMPLER, at="style", prior=fr.Normal(4), max_steps=2, num_slots=8,
        generate=pair_of_images, discriminator_kwargs={"slope": 2.0}, output_key="logit",
    )  # fmt: skip
    made = np.concatenate([np.load(file)["arr_0"] for file in sorted((tmp_path / "run").glob("*.npz"))])
    assert np.abs((refiner.sample(8).images.numpy() + 1) * 127.5 - made.transpose(0, 3, 1, 2)).max() <= 0.51


def pair_of_images(network, z):
    return network([z], scale=0.7)[1].expand(-1, 2, -1, -1)


@pytest.mark.parametrize("select", ["none", "mh", "obrs"])
def test_a_sample_has_its_row_for_any_workers_shards_and_range(folder, tmp_path, select, monkeypatch):
    monkeypatch.setattr(per_image_selection, "PILOT", 64)
    base = {"pair": str(folder / "pair"), "conditions": str(folder / "edges.npz"), "max_steps": 2, "num_slots": 8,
            "select": select, "chain_length": 2}  # fmt: skip

    def images(name, workers=1, **more):
        for worker in range(workers):
            made = Worker(Configuration(**base, **more), trust_code=True)
            made.run(tmp_path / name, worker=worker, workers=workers)
        return merged(tmp_path / name)

    whole = images("one", ids="0-39", shard_size=8)
    assert np.array_equal(whole, images("two", 2, ids="0-39", shard_size=8))
    assert np.array_equal(whole, images("large", ids="0-39", shard_size=20))
    assert np.array_equal(whole[[*range(5, 12), 30]], images("part", ids="5-11,30", shard_size=8))
    if select == "none":
        assert np.abs(python(folder, 40) - whole).max() <= 0.51


def test_a_run_is_not_continued_with_other_calls_or_conditions(folder, typed, tmp_path):
    given = ("refine", *typed, *QUICK, "--ids", "0-7", "--outdir", tmp_path / "run")
    told(fastrefine(*given, "--conditions", folder / "edges.npz"))
    for more, name in (
        (("--conditions", folder / "others.npz"), "conditions_sha256"),
        (("--conditions", folder / "edges.npz", "--generate", f"{HERE}:brighter"), "generate"),
        (("--conditions", folder / "edges.npz", "--discriminator-kwargs", '{"slope": 2}'), "discriminator_kwargs"),
        (("--conditions", folder / "edges.npz", "--coupling", "lockstep"), "coupling"),
    ):
        done = fastrefine(*given, *more)
        with pytest.raises(fr.InputError, match=rf"another configuration \(differs in {name}\)"):
            raise done.exception
    (folder / "moved").mkdir(exist_ok=True)
    (folder / "moved" / "c.npz").write_bytes((folder / "edges.npz").read_bytes())
    assert "0 shards made, 1 there already" in told(fastrefine(*given, "--conditions", folder / "moved" / "c.npz"))


@pytest.mark.parametrize(("file", "wanted"), [
    ("few.npz", "has 10 rows, but image 19 is asked for"), ("uneven.npz", "equally many rows"),
    ("objects.npz", "cannot be read as conditions"), ("absent.npz", "cannot be read as conditions"),
    ("edges.csv", "is no file of conditions"),
])  # fmt: skip
def test_conditions_that_do_not_fit_are_told_before_a_folder_is_claimed(folder, typed, tmp_path, file, wanted):
    done = fastrefine("refine", *typed, *QUICK, "--ids", "0-19", "--conditions", folder / file, "--outdir", tmp_path / "run")
    with pytest.raises(fr.InputError, match=wanted):
        raise done.exception
    assert not (tmp_path / "run").exists()


def test_a_function_that_is_none_is_told(folder, tmp_path):
    for code, wanted in (("nosuch:f", "cannot be imported"), (f"{HERE}:ROWS", "a int; wanted module:function"),
                         ("nothing", "wanted package.module")):  # fmt: skip
        done = fastrefine("refine", "--pair", folder / "plain", "--generate", code, *QUICK, "--outdir", tmp_path / "run")
        with pytest.raises(fr.InputError, match=wanted):
            raise done.exception


def test_a_pair_keeps_what_is_held_and_packed(folder, tmp_path):
    given = {"code": (f"{HERE}:Plain", f"{HERE}:Coupled"), "prior": fr.Normal(4), "at": "0"}
    fr.save_pair(tmp_path / "pair", Plain(), Coupled(), **given, coupling="freeze", group_size=4, on_noise="freeze")
    assert fr.load_pair(tmp_path / "pair").calls == {"coupling": "freeze", "group_size": 4, "on_noise": "freeze"}
    fr.save_pair(tmp_path / "packed", Plain(), Coupled(), **given, coupling="lockstep", group_size=4, pack=2)
    assert fr.load_pair(tmp_path / "packed").calls == {"coupling": "lockstep", "group_size": 4, "pack": 2}
    command = ("refine", "--pair", tmp_path / "pair", "--max-steps", 2, "--slots", 8, "--shard-size", 5)
    told(fastrefine(*command, "--ids", "0-22", "--outdir", tmp_path / "run"))
    told(fastrefine(*command, "--ids", "7-9", "--outdir", tmp_path / "some"))
    assert np.array_equal(merged(tmp_path / "run")[7:10], merged(tmp_path / "some"))
    with pytest.raises(fr.InputError, match="on_noise is 'sometimes'"):
        fr.save_pair(tmp_path / "other", Plain(), Coupled(), **given, on_noise="sometimes")


def test_a_pair_keeps_its_groups(folder, tmp_path):
    given = ("refine", "--pair", folder / "coupled", "--max-steps", 2, "--slots", 8, "--ids", "0-22", "--shard-size", 10)
    told(fastrefine(*given, "--outdir", tmp_path / "run"))
    pair = fr.load_pair(folder / "coupled")
    assert pair.calls == {"coupling": "lockstep", "group_size": 4}
    refiner = fr.Refiner(
        pair.generator, pair.discriminator, SAMPLER, at="0", prior=fr.Normal(4), max_steps=2, num_slots=8, **pair.calls
    )
    assert np.abs((refiner.sample(23).images.numpy() + 1) * 127.5 - merged(tmp_path / "run")).max() <= 0.51
    np.savez(tmp_path / "c.npz", none=np.zeros((40, 1), np.float32))
    typed = ("--generate", f"{HERE}:ignore", "--discriminate", f"{HERE}:ignore", "--conditions", tmp_path / "c.npz")
    done = fastrefine(*given, *typed, "--outdir", tmp_path / "other")
    with pytest.raises(fr.InputError, match="shard_size is 10; in lock step .* whole groups of 4"):
        raise done.exception
    told(fastrefine(*given[:-1], 12, *typed, "--outdir", tmp_path / "other"))


def ignore(network, x, **_):
    return network(x)


# --- the other commands


def test_layers_calls_the_generator_as_it_is_told(folder, typed):
    rows = json.loads(told(fastrefine("layers", *typed[:4], "--json")))
    assert [row["name"] for row in rows] == ["input", "style", "out", "output"]
    given = ("--pair", folder / "plain", "--generate", f"{HERE}:brighter", "--conditions", folder / "edges.npz", "--json")
    assert json.loads(told(fastrefine("layers", *given))) == rows
    networks = ("--generator", f"{HERE}:Generator", "--generator-weights", folder / "plain" / "generator.safetensors",
                "--prior", '{"name": "normal", "shape": [4]}', "--generate", f"{HERE}:generate", "--json")  # fmt: skip
    assert json.loads(told(fastrefine("layers", *networks))) == rows


def test_bench_calls_the_networks_as_it_is_told(folder, typed):
    given = ("--steps", 1, "--seconds", 0.01, "--slots", 8, "--precisions", "float32", "--json")
    rows = json.loads(told(fastrefine("bench", *typed, "--conditions", folder / "edges.npz", "--layers", "input,style,output",
                                      *given)))  # fmt: skip
    assert all(row["images_per_second"] > 0 and row["b0_images_per_second"] > 0 for row in rows)


def test_shape_keeps_the_calls_in_the_new_pair(folder, tmp_path):
    out = told(fastrefine(
        "shape", "--pair", folder / "plain", "--generate", f"{HERE}:generate", "--discriminate", f"{HERE}:alone", "--real",
        folder / "real.npz", "--iterations", 2, "--batch-size", 8, "--max-steps", 1, "--outdir", tmp_path / "shaped",
    ))  # fmt: skip
    assert out.splitlines()[-1].endswith(
        f"fastrefine refine --pair {tmp_path / 'shaped'} --real {folder / 'real.npz'} --trust-code --ids 0-999 --outdir run"
    )
    with pytest.raises(fr.InputError, match="--trust-code"):
        fr.load_pair(tmp_path / "shaped")
    pair = fr.load_pair(tmp_path / "shaped", trust_code=True)
    assert pair.calls == {"generate": generate, "discriminate": alone}
    told(fastrefine("refine", "--pair", tmp_path / "shaped", "--trust-code", "--real", folder / "real.npz", *QUICK, "--ids",
                    "0-7", "--outdir", tmp_path / "r"))  # fmt: skip


def alone(network, x):
    return network(x.expand(-1, 2, -1, -1))["logit"]


# --- flags


def flags_of(command):
    return {name for option in cli.commands[command].params for name in option.opts if not getattr(option, "hidden", False)}


def test_commands_show_the_flags_that_mean_something():
    calls = {"--generate", "--generator-kwargs"}
    of_d = {"--discriminate", "--discriminator-kwargs", "--output-key", "--coupling", "--group-size"}
    steps = {"--sampler", "--step-size", "--max-steps", "--stop", "--keep", "--real", "--precision"}
    assert calls | of_d | steps | {"--conditions", "--ids"} <= flags_of("refine")
    assert calls | of_d | steps <= flags_of("shape") and "--conditions" not in flags_of("shape")
    assert calls | of_d | {"--conditions"} <= flags_of("bench") and not flags_of("bench") & steps
    assert calls | {"--conditions", "--pair", "--prior", "--json"} <= flags_of("layers")
    assert not flags_of("layers") & (steps | of_d | {"--discriminator", "--at", "--slots", "--device", "--image-range"})
    (coupling,) = (option for option in cli.commands["refine"].params if option.name == "coupling")
    assert tuple(coupling.type.choices) == checks.COUPLINGS


def test_ids_are_also_understood_as_seeds_which_help_does_not_show(folder, tmp_path):
    shown = told(fastrefine("refine", "--help"))
    assert re.search(r"^  --ids RANGE", shown, re.M) and "--seeds" not in shown
    for name in ("ids", "seeds"):
        told(fastrefine("refine", "--pair", folder / "coupled", f"--{name}", "3-9", *QUICK, "--outdir", tmp_path / name))
        (tmp_path / "c.json").write_text(json.dumps({"pair": str(folder / "coupled"), name: "3-9"}))
        told(fastrefine("refine", "--config", tmp_path / "c.json", *QUICK, "--outdir", tmp_path / f"{name}2"))
        manifests = [json.loads((tmp_path / run / "manifest.json").read_text()) for run in (name, f"{name}2")]
        assert all(there.pop("summary")["images"] == 7 for there in manifests)  # it has the seconds
        assert manifests[0] == manifests[1] and manifests[0]["configuration"]["ids"] == "3-9"


# --- saved pairs


@pytest.mark.parametrize("name", ["generate", "discriminate"])
def test_a_function_without_a_name_to_import_it_by_is_not_saved(folder, tmp_path, name):
    def inner(network, x):
        return network(x)

    owned = type("Owner", (), {"method": lambda self, network, x: network(x)})().method
    running = type(inner)(generate.__code__, {"__name__": "__main__"}, "generate")
    for given in (lambda network, x: network(x), inner, owned, running):
        with pytest.raises(fr.InputError, match=f"{name} is .*cannot be saved: a lambda.*top level of a module"):
            fr.save_pair(
                tmp_path / "pair", Generator(), Discriminator(), code=(f"{HERE}:Generator", f"{HERE}:Discriminator"),
                prior=fr.Normal(4), **{name: given},
            )  # fmt: skip
    assert not (tmp_path / "pair").exists()


@pytest.mark.parametrize(("given", "wanted"), [
    ({"generator_kwargs": {"x": torch.zeros(1)}}, "no object of JSON"), ({"discriminator_kwargs": 3}, "no object of JSON"),
    ({"output_key": lambda raw: raw}, "discriminate is for all else"), ({"coupling": "loose"}, "coupling is 'loose'"),
    ({"group_size": 0}, "group_size is 0"), ({"generate": "nosuch:f"}, "cannot be imported"),
])  # fmt: skip
def test_calls_that_cannot_be_kept_are_told(tmp_path, given, wanted):
    with pytest.raises(fr.InputError, match=wanted):
        fr.save_pair(
            tmp_path / "pair", Plain(), Coupled(), code=(f"{HERE}:Plain", f"{HERE}:Coupled"), prior=fr.Normal(4), **given
        )
    assert not (tmp_path / "pair").exists()


def test_broken_calls_in_a_pair_are_told_with_its_file(folder, tmp_path):
    config = json.loads((folder / "coupled" / "config.json").read_text())
    for name in ("generator", "discriminator"):
        (tmp_path / f"{name}.safetensors").write_bytes((folder / "coupled" / f"{name}.safetensors").read_bytes())
    for name, value in (("generate", 5), ("generator_kwargs", []), ("group_size", "4"), ("output_key", 0.5)):
        (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(fr.InputError, match=rf"config.json: {name} is "):
            fr.load_pair(tmp_path)
