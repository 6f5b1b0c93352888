"""Checkpoints of others become pairs; nothing in a file runs without --allow-pickle, and then in another process."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastrefine as fr
from fastrefine.production.weights_file import load_weights, read_weights
from tests.support import checkpoint_files as files
from tests.support.commands import fastrefine, told

HERE = __name__
ARGS = {"generator": f"{HERE}:Generator", "discriminator": f"{HERE}:Discriminator", "prior": fr.Normal(4)}


class Generator(nn.Module):
    """(N, 4) -> (N, 1, 4, 4)."""

    def __init__(self, width=8):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 16)

    def forward(self, z):
        return torch.tanh(self.last(self.norm(self.first(z)))).unflatten(1, (1, 4, 4))


class Square(Generator):
    """(N, 2, 2) -> (N, 1, 4, 4)."""

    def forward(self, z):
        (n, _, _) = z.shape
        return super().forward(z.view(n, 4))


class Discriminator(nn.Sequential):
    """(N, 1, 4, 4) -> (N, 1)."""

    def __init__(self, width=4):
        super().__init__(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 1))


def networks():
    torch.manual_seed(0)
    g, ema, d = Generator(), Generator(), Discriminator()
    for own in (g, ema):
        nn.init.uniform_(own.norm.running_var, 0.5, 2)
        nn.init.uniform_(own.norm.running_mean)
    return g.state_dict(), ema.state_dict(), d.state_dict()


def behind(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def parameters(state):
    return {name: tensor for name, tensor in state.items() if "running" not in name and "num_batches" not in name}


G, EMA, D = networks()
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


@pytest.fixture
def path():
    """The Python path, and modules that a checkout brought, as they were."""
    before, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = before
    for name in set(sys.modules) - modules:
        if not name.startswith(("fastrefine", "torch", "numpy")):
            del sys.modules[name]


def same(module, state):
    own = module.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in state)


# --- state dicts in their usual wrappings


@pytest.mark.parametrize(("content", "generator"), [
    ({"netG": G, "netD": D}, G),
    ({"g": G, "d": D, "g_ema": EMA, "g_optim": OPTIMIZER, "d_optim": OPTIMIZER, "iter": 3}, EMA),
    ({"G": behind("module.", G), "G_ema": behind("module.", EMA), "D": behind("module._orig_mod.", D), "epoch": 1}, EMA),
    ({"generator": G, "discriminator": D, "generator_ema": {"shadow": parameters(EMA), "decay": 0.9}}, parameters(EMA)),
    ({"model": {"netG": G, "netD": D}, "ema": {"netG": EMA}, "optimizer": OPTIMIZER}, EMA),
    ({"state_dict": behind("generator.", G) | behind("discriminator.", D), "optimizer_states": [OPTIMIZER]}, G),
    ({"state_dict": behind("net.G_ema.", EMA) | behind("net.G.", G) | behind("net.D.", D) | {"n": torch.zeros(1)}}, EMA),
    ({"gen": behind("online_model.", G) | behind("ema_model.", EMA) | {"initted": torch.ones(1)}, "disc": D}, EMA),
    ({"gen_avg": behind("module.", EMA) | {"n_averaged": torch.tensor(3)}, "dis": D, "loss": np.float64(1.5)}, EMA),
    ({"G_state_dict": G, "D_state_dict": D, "best": np.float32(2), "step": np.int64(4)}, G),
])  # fmt: skip
def test_usual_wrappings_are_found(tmp_path, content, generator):
    torch.save(content, tmp_path / "c.pt")
    pair = fr.load_pair(fr.import_pair(tmp_path / "c.pt", tmp_path / "p", **ARGS))
    assert same(pair.discriminator, D)
    assert same(pair.generator, generator if len(generator) == len(G) else G | generator)


def test_two_files_and_keys_and_arguments(tmp_path):
    g, d = Generator(6), Discriminator(7)
    torch.save({"a": {"x": g.state_dict()}, "b": EMA}, tmp_path / "g.pt")
    save_file(d.state_dict(), tmp_path / "d.safetensors")
    done = fastrefine(
        "import", tmp_path / "g.pt", "--outdir", tmp_path / "p", "--generator", ARGS["generator"], "--generator-key", "a.x",
        "--generator-args", '{"width": 6}', "--discriminator", ARGS["discriminator"], "--discriminator-args", '{"width": 7}',
        "--discriminator-weights", tmp_path / "d.safetensors", "--prior", '{"name": "uniform", "shape": [4]}', "--at", "first",
        "--discriminator-output", "critic", "--image-range", 0, 1,
    )  # fmt: skip
    assert "to go on: fastrefine check --pair" in told(done).lower() and "--trust-code" not in done.output
    pair = fr.load_pair(tmp_path / "p")
    assert same(pair.generator, g.state_dict()) and same(pair.discriminator, d.state_dict())
    assert (repr(pair.prior), pair.at, pair.discriminator_output, pair.image_range) == (
        "Uniform(4, low=-1, high=1)", "first", "critic", (0, 1)
    )  # fmt: skip


@pytest.mark.parametrize(("content", "change", "why"), [
    ({"g": G, "d": D}, {"generator": ""}, "does not say which class its generator is of; pass --generator"),
    ({"g": G, "d": D}, {"prior": None}, "does not say what its latents are; pass --prior .*: \\[4\\]}', whose shape it takes"),
    ({"g": G, "d": D}, {"prior": None, "generator": f"{HERE}:Square"}, "latents are; pass e.g. --prior .*, as a DCGAN does"),
    ({"g": G, "d": D}, {"prior": fr.Normal(5)}, "do not work as a pair, and nothing was written.*generator failed"),
    ({"g": D, "d": G}, {}, "does not fit Generator: .* missing"),
    ({"one": G, "two": EMA, "d": D}, {}, "pass its key: one of one, two, d"),
    ({"s": behind("a.", G) | behind("b.", G), "d": D}, {}, "names of this network more than once, behind [ab]., [ab]."),
    ({"g": G, "d": D}, {"at": "second"}, "at is 'second', no module of the generator"),
])  # fmt: skip
def test_what_cannot_be_a_pair_is_named_and_nothing_is_written(tmp_path, content, change, why):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(fr.InputError, match=why):
        fr.import_pair(tmp_path / "c.pt", tmp_path / "p", **ARGS | change)
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]


class Judge(Discriminator):
    """(N, 1, 4, 4) -> probabilities (N, 1)."""

    def forward(self, x):
        return super().forward(x).sigmoid()


def test_place_and_sigmoid_are_found_where_nothing_is_said(tmp_path):
    torch.save({"g": G, "d": D}, tmp_path / "c.pt")
    lines, judge = [], {"discriminator": f"{HERE}:Judge"}
    pair = fr.load_pair(fr.import_pair(tmp_path / "c.pt", tmp_path / "p", tell=lines.append, **ARGS | judge))
    assert (pair.at, pair.discriminator_output) == ("norm", "probability")  # the linear layers do 1/5 and 4/5 of the work
    assert {"at: norm", "discriminator_output: probability"} <= set(lines)
    own = pair.generator, pair.discriminator, "collaborative"
    plain = fr.Refiner(*own, at="norm", prior=fr.Normal(4), discriminator_output="probability", max_steps=2).sample(4)
    assert torch.equal(fr.Refiner.from_pair(pair, max_steps=2, sampler="collaborative").sample(4).images, plain.images)
    pair = fr.load_pair(fr.import_pair(tmp_path / "c.pt", tmp_path / "q", at="input", **ARGS))
    assert (pair.at, pair.discriminator_output) == ("input", "logit")
    with pytest.raises(fr.InputError, match="ends in a sigmoid"):
        fr.import_pair(tmp_path / "c.pt", tmp_path / "r", discriminator_output="logit", **ARGS | judge)


def test_an_earlier_pair_is_not_written_over(tmp_path):
    torch.save({"g": G, "d": D}, tmp_path / "c.pt")
    fr.import_pair(tmp_path / "c.pt", tmp_path / "p", **ARGS)
    for source, why in ((tmp_path / "c.pt", "is there already and not empty"), (tmp_path / "p", "is a saved pair already")):
        with pytest.raises(fr.InputError, match=why):
            fr.import_pair(source, tmp_path / ("p" if source.suffix else "q"), **ARGS)


def factory():
    return Generator()


def test_the_command_says_what_a_pair_of_a_function_needs(tmp_path):
    torch.save({"g": G, "d": D}, tmp_path / "c.pt")
    done = fastrefine(
        "import", tmp_path / "c.pt", "--outdir", tmp_path / "p", "--generator", f"{HERE}:factory", "--discriminator",
        ARGS["discriminator"], "--prior", '{"name": "normal", "shape": [4]}', "--no-check",
    )  # fmt: skip
    assert f"check --pair {tmp_path / 'p'} --trust-code" in told(done)


def test_refine_chooses_a_network_of_a_checkpoint_by_its_role(tmp_path):
    torch.save({"g": G, "g_ema": EMA, "d": D}, tmp_path / "c.pt")
    load_weights(one := Generator(), read_weights(tmp_path / "c.pt", role="generator"), "c.pt", "generator")
    assert same(one, EMA)
    load_weights(other := Discriminator(), read_weights(tmp_path / "c.pt", role="discriminator"), "c.pt", "discriminator")
    assert same(other, D)


# --- pickles of NVlabs


@pytest.mark.usefixtures("path")
def test_a_pickle_of_persistent_classes_becomes_a_pair_without_pickles(tmp_path):
    checkout = files.style_checkout(tmp_path / "checkout", "style")
    ema, d = files.style_pickle(checkout, "style", tmp_path / "net.pkl", c_dim=3)
    with (checkout / "style_training" / "networks.py").open("a") as module:
        module.write("\n# of today\n")  # the text in the pickle is an older one
    told(fastrefine("import", tmp_path / "net.pkl", "--outdir", tmp_path / "p", "--allow-pickle", "--code", checkout))
    run_here = [module.__source__ for name, module in sys.modules.items() if name.startswith("_imported_")]
    assert run_here and all("# of today" in text for text in run_here)  # copies of networks run the checkout's, as at NVlabs
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert config["generator"] == {
        "code": "style_training.networks:Generator", "arguments": {"z_dim": 5, "c_dim": 3}, "weights": "generator.safetensors",
    }  # fmt: skip
    assert config["checkout"] == str(checkout)
    assert {file.suffix for file in (tmp_path / "p").iterdir()} == {".json", ".safetensors"}
    pair = fr.load_pair(tmp_path / "p", trust_code=True)
    assert same(pair.generator, ema) and same(pair.discriminator, d) and repr(pair.prior) == "Normal(5)"
    labels = torch.arange(8) % 3
    out = fr.Refiner.from_pair(pair, max_steps=3).sample(8, labels=labels)
    z, c = pair.prior.sample(torch.arange(8), 0), torch.eye(3)[labels]
    first = pair.generator(z, c, noise_mode="const", force_fp32=True)
    torch.testing.assert_close(out.initial_logits, pair.discriminator(first, c, force_fp32=True)[:, 0].detach())
    assert (out.logits > out.initial_logits).all() and pair.num_classes == 3
    told(fastrefine("refine", "--pair", tmp_path / "p", "--trust-code", "--ids", "0-7", "--max-steps", 2, "--class", "random",
                    "--outdir", tmp_path / "run"))  # fmt: skip


@pytest.mark.usefixtures("path")
def test_the_checkout_of_a_pair_is_imported_only_where_it_is_trusted(tmp_path):
    checkout, trace = files.style_checkout(tmp_path / "checkout", "trusted"), tmp_path / "trace"
    files.style_pickle(checkout, "trusted", tmp_path / "net.pkl")
    fr.import_pair(tmp_path / "net.pkl", tmp_path / "p", allow_pickle=True, code=checkout)
    files.forget("trusted")
    sys.path.remove(str(checkout))
    with (checkout / "trusted_training" / "networks.py").open("a") as module:
        module.write(f"\nopen({str(trace)!r}, 'w')\n")
    with pytest.raises(fr.InputError, match=f"PYTHONPATH={checkout} fastrefine .*--trust-code"):
        fr.load_pair(tmp_path / "p")
    assert not trace.exists() and str(checkout) not in sys.path
    out = fr.Refiner.from_pair(fr.load_pair(tmp_path / "p", trust_code=True), max_steps=2).sample(4)
    assert trace.exists() and out.images.shape == (4, 3, 8, 8)
    files.style_checkout(tmp_path / "another", "trusted")
    config = (tmp_path / "p" / "config.json").read_text()
    (tmp_path / "p" / "config.json").write_text(config.replace(str(checkout), str(tmp_path / "another")))
    with pytest.raises(fr.InputError, match="was imported as that before; use another process"):
        fr.load_pair(tmp_path / "p", trust_code=True)


def test_a_pickle_without_its_checkout_says_what_to_pass(tmp_path):
    checkout = files.style_checkout(tmp_path / "checkout", "gone")
    files.style_pickle(checkout, "gone", tmp_path / "net.pkl")
    with pytest.raises(fr.InputError, match="No module named 'gone_utils'.*pass --code PATH"):
        fr.import_pair(tmp_path / "net.pkl", tmp_path / "p", allow_pickle=True)


def test_a_malicious_pickle_runs_only_when_it_may_and_never_here(tmp_path):
    file, trace = tmp_path / "net.pkl", tmp_path / "trace"
    files.malicious(file, trace)
    arguments = (
        "--generator", "torch.nn:Linear", "--generator-args", '{"in_features": 3, "out_features": 2}',
        "--discriminator", "torch.nn:Linear", "--discriminator-args", '{"in_features": 2, "out_features": 1}',
        "--prior", '{"name": "normal", "shape": [3]}', "--outdir", tmp_path / "p",
    )  # fmt: skip
    done = fastrefine("import", file, "--outdir", tmp_path / "p", "--code", tmp_path)
    assert isinstance(done.exception, fr.InputError) and "nothing was executed" in str(done.exception)
    assert not trace.exists() and not (tmp_path / "p").exists()
    told(fastrefine("import", file, "--allow-pickle", *arguments))
    assert int(trace.read_text()) != os.getpid()  # it ran, in another process
    content = b"".join(part.read_bytes() for part in (tmp_path / "p").iterdir())
    assert b"getpid" not in content and load_file(tmp_path / "p" / "generator.safetensors")["weight"].shape == (2, 3)
    trace.unlink()
    fr.load_pair(tmp_path / "p")
    assert not trace.exists()


# --- folders


@pytest.fixture
def biggan(tmp_path):
    """A run of BigGAN-PyTorch and its checkout: weights/EXPERIMENT/*.pth with the configuration in state_dict.pth."""
    checkout = files.write(tmp_path / "checkout", {"BigGAN.py": files.BIGGAN})
    namespace = {}
    exec(files.BIGGAN, namespace)
    activation = nn.ReLU(inplace=True)
    config = {"model": "BigGAN", "G_ch": 5, "D_ch": 6, "dim_z": 7, "n_classes": 3, "G_activation": activation,
              "D_activation": activation, "no_optim": False, "batch_size": 50, "weights_root": "weights"}  # fmt: skip
    run = tmp_path / "weights" / "experiment"
    run.mkdir(parents=True)
    torch.manual_seed(0)
    g, ema, d = (namespace[name](**config) for name in ("Generator", "Generator", "Discriminator"))
    for name, network in (("G", g), ("G_ema", ema), ("D", d)):
        torch.save(network.state_dict(), run / f"{name}.pth")
    torch.save(d.optim.state_dict(), run / "D_optim.pth")
    torch.save({"itr": 5, "best_IS": np.float64(2.5), "best_FID": 99999, "config": config}, run / "state_dict.pth")
    return checkout, run, ema, d


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("level", [0, 1])
def test_a_run_of_biggan_becomes_a_pair(tmp_path, biggan, level):
    checkout, run, ema, d = biggan
    fr.import_pair((run, run.parent)[level], tmp_path / "p", code=checkout)
    pair = fr.load_pair(tmp_path / "p", trust_code=True)
    assert same(pair.generator, ema.state_dict()) and same(pair.discriminator, d.state_dict())
    assert repr(pair.prior) == "Normal(7)" and pair.num_classes == 3 and not hasattr(pair.generator, "optim")
    y = torch.tensor([0, 1, 2, 1])
    out = fr.Refiner.from_pair(pair, max_steps=0).sample(4, labels=y)
    z = pair.prior.sample(torch.arange(4), 0)
    torch.testing.assert_close(out.images, ema(z, ema.shared(y)).detach())
    torch.testing.assert_close(out.logits, d(out.images, y)[:, 0].detach())


@pytest.mark.usefixtures("path")
def test_a_run_of_biggan_whose_configuration_cannot_be_read(tmp_path, biggan):
    checkout, run, *_ = biggan
    torch.save({"config": files.Bomb(tmp_path / "trace")}, run / "state_dict.pth")
    with pytest.raises(fr.InputError, match="no configuration can be read from state_dict.pth: pass --generator-args"):
        fr.import_pair(run, tmp_path / "p", code=checkout)
    sizes = {"dim_z": 7, "n_classes": 3, "G_ch": 5}, {"n_classes": 3, "D_ch": 6}
    fr.import_pair(run, tmp_path / "p", code=checkout, arguments=sizes)
    assert not (tmp_path / "trace").exists()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("model", ["elsewhere", "os.path", "../elsewhere", "helpers"])
def test_a_run_does_not_choose_what_is_imported(tmp_path, biggan, monkeypatch, model):
    checkout, run, *_ = biggan
    trace = tmp_path / "trace"
    text = f"open({str(trace)!r}, 'w')\n"
    files.write(tmp_path, {"elsewhere.py": text, "checkout/helpers.py": f"def Generator(**arguments):\n    {text}"})
    monkeypatch.syspath_prepend(tmp_path)
    content = torch.load(run / "state_dict.pth", weights_only=False)
    content["config"]["model"] = model
    torch.save(content, run / "state_dict.pth")
    with pytest.raises(fr.InputError, match="not imported|not called|wanted package.module"):
        fr.import_pair(run, tmp_path / "p", code=checkout)
    assert not trace.exists()
    fr.import_pair(run, tmp_path / "p", code=checkout, generator="BigGAN:Generator", discriminator="BigGAN:Discriminator")


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("conditional", [True, False])
def test_a_run_of_studiogan_becomes_a_pair(tmp_path, conditional):
    pytest.importorskip("yaml")
    checkout = files.write(
        tmp_path / "src", {"config.py": files.CONFIG, "models/model.py": files.MODEL, "models/__init__.py": ""}
    )
    namespace = {}
    exec(files.MODEL, namespace)
    torch.manual_seed(0)
    g, old, ema, d = (
        namespace["Generator"](6, 4),
        namespace["Generator"](6, 4),
        namespace["Generator"](6, 4),
        namespace["Discriminator"](4),
    )
    run = tmp_path / "checkpoints" / "run"
    run.mkdir(parents=True)
    for name, network in (("G-best", g), ("G_ema-current", old), ("G_ema-best", ema), ("D-best", d)):
        states = {"state_dict": network.state_dict(), "optimizer": OPTIMIZER, "best_fid": np.float64(3.0), "run_name": "x"}
        torch.save(states, run / f"model={name}-weights-step=100.pth")
    condition = "  g_cond_mtd: cBN\n  d_cond_mtd: PD\n" if conditional else ""
    (tmp_path / "c.yaml").write_text(f"DATA:\n  num_classes: 4\nMODEL:\n  z_dim: 6\n  backbone: resnet\n{condition}")
    with pytest.raises(fr.InputError, match="pass --config FILE"):
        fr.import_pair(tmp_path / "checkpoints", tmp_path / "p", code=checkout)
    fr.import_pair(tmp_path / "checkpoints", tmp_path / "p", code=checkout, config=tmp_path / "c.yaml")
    with pytest.raises(fr.InputError, match="--trust-code"):
        fr.load_pair(tmp_path / "p")
    pair = fr.load_pair(tmp_path / "p", trust_code=True)
    assert same(pair.generator, ema.state_dict()) and same(pair.discriminator, d.state_dict())
    y = torch.tensor([0, 3, 2, 1]) if conditional else torch.zeros(4, dtype=torch.int64)
    out = fr.Refiner.from_pair(pair, max_steps=0).sample(4, labels=y if conditional else None)
    torch.testing.assert_close(out.logits, d(out.images, y)["adv_output"].detach())
    assert pair.num_classes == (4 if conditional else 0)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(fr.InputError, match="is no run that is known: wanted G.pth and D.pth"):
        fr.import_pair(tmp_path / "x", tmp_path / "p")
