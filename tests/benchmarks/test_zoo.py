"""The zoo's harness on a tiny checkout: how it is imported, what a row holds, and that its loops compute the same."""

import copy
import dataclasses
import functools
import importlib
import json
import sys

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from benchmarks import zoo
from benchmarks.baselines import ExpertLoop, Hooked, PeersLoop
from benchmarks.zoo_pairs import ZooPair, checkout_of, classes_of, imports

NETWORKS = """
import torch
from torch import nn
import nowhere.training  # a package for training, which is not installed
from utils import width


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 4)
        self.first = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.LeakyReLU(0.2))
        self.calls = 0
        self.last = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 12))
        self.first.register_forward_hook(self.count)

    def count(self, *_):
        self.calls += 1

    def forward(self, z, embedded):
        return self.last(self.first(torch.cat([z, embedded], 1))).view(-1, 3, 2, 2)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 8, 1)), nn.LeakyReLU(0.2, inplace=True))
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, x, y):
        return torch.sigmoid(self.head(self.body(x)) + y.view(-1, 1, 1, 1) / 3)
"""


def make(folder):
    own = importlib.import_module("model")
    return own.Generator(), own.Discriminator()


class Deviating(nn.Module):
    """Adds the deviation over the batch."""

    def __init__(self, discriminator):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, x, y):
        return torch.sigmoid(torch.logit(self.discriminator(x, y)) + x.flatten(1).std(0).mean())


def make_coupled(folder):
    generator, discriminator = make(folder)
    return generator, Deviating(discriminator)


PAIR = ZooPair(
    "tiny", "someone+tiny", (4,), "first", make, lambda G, z, labels: G(z, G.embed(labels)), classes=3, output="probability",
    absent=("nowhere",),
)  # fmt: skip


@pytest.fixture
def checkouts(tmp_path):
    (tmp_path / "someone+tiny").mkdir()
    (tmp_path / "someone+tiny" / "model.py").write_text(NETWORKS)
    (tmp_path / "someone+tiny" / "utils.py").write_text("width = 6")
    return tmp_path


@pytest.fixture
def networks(checkouts):
    generator, discriminator = PAIR.load(checkouts)
    return generator.double(), discriminator.double()


def loop(kind, networks, at, steps=3):
    cut = functools.partial(Hooked, generate=PAIR.generate, discriminate=PAIR.logits, names=("labels",))
    return kind(*copy.deepcopy(networks), at, 0.5, steps, 4, cut=cut)


@pytest.mark.parametrize("at", ["input", "first", "output"])
def test_loops_by_hooks_are_gradient_descent_on_the_loss(networks, at):
    z, labels = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    g, d = networks
    found, careful = loop(PeersLoop, networks, at)(z, labels), loop(ExpertLoop, networks, at)(z, labels)
    a = {"input": z, "first": g.first(torch.cat([z, g.embed(labels)], 1)), "output": PAIR.generate(g, z, labels)}[at].detach()

    def image(a):
        if at == "input":
            return PAIR.generate(g, a, labels)
        return a if at == "output" else g.last(a).view(-1, 3, 2, 2)

    for _ in range(3):
        a.requires_grad_()
        logits = torch.logit(d(image(a), labels)).flatten(1)
        a = (a - 0.5 * torch.autograd.grad(nn.functional.softplus(-logits).mean(1).sum(), a)[0]).detach()
    for theirs in (found, careful):
        torch.testing.assert_close(theirs.images, image(a).detach())
    assert (image(a) - PAIR.generate(g, z, labels)).abs().max() > 1e-3


def test_what_is_before_the_place_runs_once_a_batch_and_the_pair_stays(networks):
    g, _ = networks
    before = {name: value.clone() for name, value in g.state_dict().items()}
    theirs = loop(ExpertLoop, networks, "first")
    theirs(torch.randn(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.long))
    theirs.pair.generator.calls = 0
    theirs(torch.randn(8, 4, dtype=torch.float64), torch.zeros(8, dtype=torch.long))
    own = [name for name, module in theirs.pair.generator.named_modules() if module in theirs.pair.once]
    assert {"embed", "first"} <= set(own) and "last" not in own
    assert isinstance(theirs.pair.generator.last[1], nn.Identity) and isinstance(g.last[1], nn.BatchNorm1d)
    assert isinstance(theirs.pair.generator.first[1], nn.BatchNorm1d | nn.Identity)
    assert all(torch.equal(value, before[name]) for name, value in g.state_dict().items())


def test_an_import_leaves_nothing_behind(checkouts):
    before, path = set(sys.modules), list(sys.path)
    generator, _ = PAIR.load(checkouts)
    assert type(generator).__module__ == "model" and generator.first[0].in_features == 8
    assert not {name for name in set(sys.modules) - before if name.partition(".")[0] in ("model", "utils", "nowhere")}
    assert sys.path == path
    with pytest.raises(ModuleNotFoundError), imports(checkouts / "someone+tiny"):
        importlib.import_module("model")  # without its stand-in
    with pytest.raises(FileNotFoundError, match="no checkout someone\\+other"):
        checkout_of(checkouts, "someone+other")


def test_classes_of_a_script_are_taken_without_running_it(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import nowhere\nraise SystemExit\nclass G(nn.Module):\n    size = wide\n")
    assert classes_of(script, wide=7).G.size == 7


def test_the_command_writes_rows_and_what_failed(checkouts, monkeypatch, tmp_path):
    gone = ZooPair("gone", "someone+gone", (4,), "first", make)
    monkeypatch.setattr(zoo, "PUBLIC", (gone, PAIR))
    monkeypatch.setattr(zoo, "OURS", ())
    path = tmp_path / "zoo.json"
    given = [str(checkouts), "--steps", "2", "--seconds", "0.01", "--n", "5", "--n", "70", "--output", str(path)]
    threads = torch.get_num_threads()
    done = CliRunner().invoke(zoo.main, given, catch_exceptions=False)
    torch.set_num_threads(threads)
    record = json.loads(path.read_text())
    assert done.exit_code == 0 and [row["pair"] for row in record["failed"]] == ["gone"]
    assert {row["at"] for row in record["rows"]} == {"input", "first", "output"}
    assert str(checkouts) not in record["command"]
    for row in record["rows"]:
        assert row["off"] < 1e-3 and row["ratio_b0"] > 0 and row["ratio_b1"] > 0 and row["K"] == 2
        assert row["wanted_n"] in (5, 70) and 5 <= row["n"] <= 70 and row["num_slots"] >= 8
        assert row["preparation_seconds"] >= 0 and any(entry["rung"] == "step recorded" for entry in row["ladder"])
        assert all(len(row["seconds"][name]) >= 3 for name in ("b0", "b1", "ours"))
    (stopped,) = (row["stopped"] for row in record["rows"] if "stopped" in row)  # at the inner place, once
    assert stopped["ratio_b1"] > 0 and stopped["b1_mean_steps"] == stopped["mean_steps"] < stopped["K"]
    assert done.output.count(" images/s ") == len(record["rows"]) and "no checkout someone+gone" in done.output


def test_rows_that_are_measured_again_take_the_place_of_those_before(checkouts, monkeypatch, tmp_path):
    held = dataclasses.replace(PAIR, name="held", coupling="freeze", make=make_coupled)
    monkeypatch.setattr(zoo, "PUBLIC", (PAIR, held))
    monkeypatch.setattr(zoo, "OURS", ())
    path, threads = tmp_path / "zoo.json", torch.get_num_threads()
    records = []
    for more in (["--n", "5", "--n", "6"], ["--n", "5", "--pair", PAIR.name, "--at", "first"]):
        given = [str(checkouts), "--steps", "2", "--seconds", "0.01", "--output", str(path), *more]
        assert CliRunner().invoke(zoo.main, given, catch_exceptions=False).exit_code == 0
        records.append(json.loads(path.read_text()))
    torch.set_num_threads(threads)
    before, after = ({(row["at"], row["n"]): row for row in record["rows"]} for record in records)
    assert before.keys() == after.keys() and len(before) == 6
    assert {key for key in before if before[key] != after[key]} == {("first", 5)}
    for record in records:  # of a held pair only what a threshold saves
        assert [row["pair"] for row in record["held"]] == ["held"] and record["held"][0]["stopped"]["factor"] > 0
        assert "ratio_b1" not in record["held"][0]["stopped"]  # the loops do not hold what is coupled


def test_results_that_differ_are_an_error_and_not_a_ratio(networks):
    wrong = loop(PeersLoop, networks, "first", steps=0)
    z, labels = torch.randn(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    right = loop(PeersLoop, networks, "first")(z, labels)
    assert zoo.difference(right, right) == {"off": 0, "off_median": 0}
    assert zoo.difference(wrong(z, labels), right)["off_median"] > 1e-3
