"""Every public name has a docstring with an Example, and the Example runs, or ends with the error that it names."""

import inspect
import re
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastrefine as fr
from fastrefine.datasets import load_digits
from fastrefine.production import hub

EXAMPLE = re.compile(r"^ *Example: ``(.*?)``", re.M)
CLASSES = "from torch import nn\nG = lambda: nn.Sequential(nn.Linear(4, 16), nn.Unflatten(1, (1, 4, 4)))\n" \
          "D = lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 1))\n"  # fmt: skip


def example(name):
    """The code of a name's Example."""
    found = EXAMPLE.search(inspect.getdoc(getattr(fr, name)) or "")
    assert found, f"{name} has no Example"
    return found[1]


class Detached(nn.Flatten):
    """(N, 1, 8, 8) -> (N,); no gradient comes back."""

    def forward(self, x):
        return super().forward(x).detach().sum(1)


@pytest.fixture(scope="module")
def known():
    """What the Examples take as given: the embedded pair, a refiner, its result, real images."""
    pair, real = fr.load_pair("digits"), load_digits().train[:100]
    refiner = fr.Refiner.from_pair(pair, max_steps=3, num_slots=32, real=real)
    coupled = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, track_running_stats=False), nn.Linear(64, 1))
    return {
        "fr": fr, "torch": torch, "warnings": warnings,
        "pair": pair, "g": pair.generator, "d": pair.discriminator, "real": real,
        "refiner": refiner, "out": refiner.sample(64), "real_logits": refiner.score(real), "coupled": coupled,
        "detached": Detached(),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", [name for name in fr.__all__ if name not in ("stopping", "import_pair", "push_pair", "save_pair")]
)
def test_the_example_of_a_name_runs(name, known, tmp_path, monkeypatch):
    code = example(name).replace("pairs=2000", "pairs=64, iterations=4, shaping={'iterations': 0}, progress=False")
    if name == "recalibrate_batch_norm":  # the embedded generator has no BatchNorm
        known = {**known, "g": nn.Sequential(nn.Linear(128, 4), nn.BatchNorm1d(4))}
    monkeypatch.chdir(tmp_path)
    expected = re.search(r"# (\w+Error)\b", code)  # of an error: the code is to end with it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fr.FastrefineWarning)
        if expected:
            with pytest.raises(getattr(fr, expected[1])):
                exec(code, dict(known))
        else:
            exec(code, dict(known))


def test_the_examples_of_files_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mygan.py").write_text(f"{CLASSES}Generator, Discriminator = G, D\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "mygan", None)  # that of another test comes back, and this one's goes
    del sys.modules["mygan"]
    own = {}
    exec(CLASSES, own)
    g, d = own["G"](), own["D"]()
    torch.save({"g": g.state_dict(), "d": d.state_dict()}, "ckpt.pt")
    known = {"fr": fr, "g": g, "d": d}
    for name in ("save_pair", "import_pair"):
        exec(
            example(name).replace("Normal(16)", "Normal(4)").replace("Normal(64)", "Normal(4)").replace('at="1"', 'at="0"'),
            known,
        )
    sent = []
    stand_in = SimpleNamespace(create_repo=lambda name, **more: None, upload_folder=lambda **more: sent.append(more["repo_id"]))
    monkeypatch.setattr(hub, "_hub", lambda what: stand_in)
    exec(example("push_pair"), known)
    assert sent == ["me/my-gan"]


def test_stopping_rules_have_docstrings():
    assert fr.stopping.__doc__ and all(inspect.getdoc(getattr(fr.stopping, kind)) for kind in fr.checks.STOPS.values())
