"""FAULTS 25: networks from files: what fits is loaded, anything else is refused with its reason and not executed."""

import io
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

import fastrefine as fr
from fastrefine.errors import InputError
from fastrefine.models import digits as networks
from fastrefine.priors import as_prior, described
from fastrefine.production import saved_pair
from fastrefine.production.configuration import Configuration, Network
from fastrefine.production.named_code import Trust, imported
from fastrefine.production.weights_file import digest, load_weights, read_weights

CODE = ("fastrefine.models.digits:digits_generator", "fastrefine.models.digits:digits_discriminator")
ALL = Trust(everything=True)


def state():
    torch.manual_seed(0)
    return networks.digits_generator().state_dict()


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_are_read_from_both_kinds_of_files(tmp_path, suffix):
    path, weights = tmp_path / f"g{suffix}", state()
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    found = read_weights(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path):
    path, mark = tmp_path / "g.pt", tmp_path / "executed"
    torch.save({"state_dict": Bomb(mark)}, path)
    with pytest.raises(InputError, match="nothing was executed"):
        read_weights(path)
    assert not mark.exists()
    with pytest.raises(InputError):
        read_weights(path, allow_pickle=True)
    assert mark.exists(), "the trap does not spring"


def test_a_bare_pickle_is_refused(tmp_path):
    mark = tmp_path / "executed"
    (tmp_path / "g.pkl").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(InputError):
        read_weights(tmp_path / "g.pkl")
    assert not mark.exists()


def whole_pt():
    buffer = io.BytesIO()
    torch.save(state(), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("g.pt", b"", "is empty"),
        ("g.pt", b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
        ("g.safetensors", b"\n<html>", "HTML page"),
        ("g.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer"),
        ("g.safetensors", b"\x08\0\0\0\0\0\0\0{}", "no complete safetensors"),
        ("g.pt", whole_pt()[:2000], "no torch.save file, or cut short"),
        ("g.pt", b"hello, I am no checkpoint", "no torch.save file, or cut short"),
    ],
)
def test_what_is_no_weights_file_is_named(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason):
        read_weights(tmp_path / name)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(InputError, match="not there"):
        read_weights(tmp_path / "g.pt")


def test_a_cut_safetensors_is_refused(tmp_path):
    path = tmp_path / "g.safetensors"
    save_file(state(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="no complete safetensors"):
        read_weights(path)


def test_a_checkpoint_of_several_asks_which(tmp_path):
    path = tmp_path / "all.pt"
    torch.save({"g": state(), "g_ema": state(), "step": 3}, path)
    with pytest.raises(InputError, match="pass its key: one of g, g_ema"):
        read_weights(path)
    assert set(read_weights(path, "g_ema")) == set(state())
    with pytest.raises(InputError, match="no 'h'; it holds g, g_ema, step"):
        read_weights(path, "h")


def test_the_only_state_dict_of_a_checkpoint_is_taken(tmp_path):
    torch.save({"state_dict": state(), "epoch": 2}, tmp_path / "a.pt")
    assert set(read_weights(tmp_path / "a.pt")) == set(state())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(prefix):
    module, weights = networks.digits_generator(), state()
    load_weights(module, {prefix + name: tensor for name, tensor in weights.items()}, "g.pt")
    assert digest(module) == digest(_loaded(weights))


def _loaded(weights):
    module = networks.digits_generator()
    module.load_state_dict(weights)
    return module


def test_the_other_networks_file_is_refused_with_the_first_names():
    with pytest.raises(InputError, match=r"does not fit Sequential: 2 missing \(logit.weight, logit.bias\), 2 unexpected"):
        load_weights(networks.digits_discriminator(), state(), "g.pt")


def test_shapes_that_differ_are_named():
    weights = state() | {"pixels.bias": torch.zeros(3)}
    with pytest.raises(InputError, match=r"pixels.bias \(3,\), wanted \(64,\)"):
        load_weights(networks.digits_generator(), weights, "g.pt")


def test_a_saved_pair_comes_back_with_its_prior_and_defaults(tmp_path):
    pair = saved_pair.load_pair("digits")
    fr.save_pair(tmp_path / "p", pair.generator, pair.discriminator, code=CODE, prior=fr.Normal(32), at="act2")
    again = fr.load_pair(tmp_path / "p")
    assert digest(again.generator) == digest(pair.generator) and digest(again.discriminator) == digest(pair.discriminator)
    assert repr(again.prior) == repr(fr.Normal(32)) and again.defaults["at"] == "act2"
    assert not again.generator.training


def test_a_pair_that_could_not_be_loaded_is_not_saved(tmp_path):
    pair = saved_pair.load_pair("digits")
    with pytest.raises(InputError, match="does not fit"):
        fr.save_pair(tmp_path / "p", pair.generator, pair.discriminator, code=(CODE[1], CODE[1]), prior=fr.Normal(32))
    assert not (tmp_path / "p" / "config.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"generator": {}}', '{"generator": {"code": "a:b", "wrong": 1}}'])
def test_a_broken_configuration_of_a_pair_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json"):
        fr.load_pair(tmp_path)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("nosuchmodule:G", "cannot be imported"),
        ("torch.nn:NoSuchThing", "cannot be imported"),
        ("torch.nn", "wanted package.module:callable"),
        ("builtins:dict", "wanted a torch.nn.Module class"),
        ("torch.nn:Linear", "does not take"),
    ],
)
def test_code_that_makes_no_network_is_named(code, reason):
    with pytest.raises(InputError, match=reason):
        saved_pair.load_network(Network(code, weights="x"), "generator")


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("torch.nn:Linaer", r"no attribute 'Linaer'\); did you mean (\w+ or )*Linear( or \w+)*\?$"),
        ("torch.nn:Qxyzzy", "wanted the name of a class in that module$"),
        ("torch.nn:Linear.Qx", "wanted the name of a class in that module$"),
        ("nosuchmodule:G", "is its folder on PYTHONPATH"),
    ],
)
@pytest.mark.parametrize("trusted", [True, False])
def test_a_wrong_name_is_told_apart_from_a_module_that_is_not_found(code, hint, trusted):
    if not trusted:
        hint = hint.replace("no attribute 'Linaer'", "no class 'Linaer' in it")
    with pytest.raises(InputError, match=hint):
        imported(code, "generator", Trust(everything=trusted))


def test_a_pair_that_is_not_there_is_told_apart_from_a_folder_without_one(tmp_path):
    for folder, why in ((tmp_path, "has no config.json"), (tmp_path / "p1", "p1 is not there")):
        with pytest.raises(InputError, match=f"{why}; wanted a folder of .*save_pair, .*embedded pair, digits or mnist"):
            fr.load_pair(folder)


def test_an_exported_generator_is_loaded_and_refined_like_its_module(tmp_path):
    pair = saved_pair.load_pair("digits")
    batch = torch.export.Dim("batch", min=1, max=4096)
    for name, module, example in (
        ("g", pair.generator, torch.zeros(4, 32)),
        ("d", pair.discriminator, torch.zeros(4, 1, 8, 8)),
    ):
        torch.export.save(torch.export.export(module, (example,), dynamic_shapes=({0: batch},)), tmp_path / f"{name}.pt2")
    g, d = (saved_pair.load_network(Network(str(tmp_path / f"{name}.pt2")), name, trust=ALL) for name in "gd")
    outs = [
        fr.Refiner(*nets, fr.Collaborative(0.1), prior=fr.Normal(32), max_steps=3, num_slots=8).sample(8).images
        for nets in ((g, d), (pair.generator, pair.discriminator))
    ]
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)


def test_priors_are_written_down_and_made_again():
    for prior in (fr.Normal(3), fr.Uniform(2, 1, low=0.0), fr.TruncatedNormal(4, bound=1.5)):
        again = as_prior(json.loads(json.dumps(described(prior))))
        assert (repr(again), type(again)) == (repr(prior), type(prior))
    with pytest.raises(InputError, match="wanted e.g."):
        as_prior({"name": "gamma", "shape": [3]})


def test_a_configuration_wants_a_pair_or_two_networks():
    with pytest.raises(InputError, match="either a pair"):
        Configuration()
    with pytest.raises(InputError, match="both"):
        Configuration(generator=Network("a:b"))


def test_an_archive_of_one_batch_size_says_how_to_export_it(tmp_path):
    module = saved_pair.load_pair("digits").generator
    torch.export.save(torch.export.export(module, (torch.zeros(4, 32),)), tmp_path / "g.pt2")
    with pytest.raises(InputError, match="takes batches of 4 only; export it with a dynamic batch"):
        saved_pair.load_network(Network(str(tmp_path / "g.pt2")), "generator", trust=ALL)


def test_a_pair_is_not_saved_with_a_layer_that_it_has_not(tmp_path):
    pair, code = (
        saved_pair.load_pair("digits"),
        tuple(f"fastrefine.models.digits:digits_{n}" for n in ("generator", "discriminator")),
    )
    with pytest.raises(InputError, match="at is 'act9', no module of the generator; wanted one of act1, act2"):
        saved_pair.save_pair(tmp_path / "pair", pair.generator, pair.discriminator, code=code, prior=fr.Normal(32), at="act9")
    assert not (tmp_path / "pair").exists()


@pytest.fixture
def saved(tmp_path):
    """A folder that holds a pair."""
    pair = saved_pair.load_pair("digits")
    return fr.save_pair(tmp_path / "p", pair.generator, pair.discriminator, code=CODE, prior=fr.Normal(32))


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def save_another(folder, **more):
    torch.manual_seed(0)
    given = {"code": CODE, "prior": fr.Normal(32), **more}
    fr.save_pair(folder, networks.digits_generator(), networks.digits_discriminator(), **given)


@pytest.mark.parametrize("wrong", [
    {"code": (CODE[0], CODE[0])}, {"prior": torch.zeros(3)}, {"arguments": ({}, {"x": torch.zeros(1)})}, {"arguments": ({},)},
    {"image_range": (1.0, 0.0)}, {"image_range": "x"}, {"num_classes": 2.5}, {"discriminator_output": "score"},
])  # fmt: skip
def test_a_pair_that_cannot_be_saved_leaves_the_earlier_one_as_it_was(saved, wrong):
    before = content(saved)
    with pytest.raises(InputError):
        save_another(saved, **wrong)
    assert content(saved) == before


@pytest.mark.parametrize("file", ["discriminator.safetensors", "config.json"])
def test_a_full_disk_leaves_the_earlier_pair_as_it_was(saved, monkeypatch, file):
    before = content(saved)

    def full(*given):
        raise OSError(28, "No space left on device")

    if file == "config.json":
        monkeypatch.setattr(saved_pair.Path, "write_text", full)
    else:
        usual = saved_pair.save_file
        monkeypatch.setattr(
            saved_pair, "save_file", lambda state, path: (full if "logit.weight" in state else usual)(state, path)
        )
    with pytest.raises(OSError, match="No space"):
        save_another(saved)
    assert content(saved) == before


def test_networks_inside_data_parallel_are_saved_as_themselves(tmp_path):
    pair = saved_pair.load_pair("digits")
    wrapped = [torch.nn.DataParallel(network) for network in (pair.generator, pair.discriminator)]
    fr.save_pair(tmp_path / "p", *wrapped, code=CODE, prior=fr.Normal(32), at="act2")
    again = fr.load_pair(tmp_path / "p")
    assert digest(again.generator) == digest(pair.generator) and digest(again.discriminator) == digest(pair.discriminator)


def test_what_is_no_network_is_not_saved(tmp_path):
    pair = saved_pair.load_pair("digits")
    for given in ((lambda z: z, pair.discriminator), (pair.generator, lambda x: x)):
        with pytest.raises(InputError, match="is a function; wanted a torch.nn.Module"):
            fr.save_pair(tmp_path / "p", *given, code=CODE, prior=fr.Normal(32))
    assert not (tmp_path / "p").exists()
