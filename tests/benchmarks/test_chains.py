"""The benchmark against torchebm: both sides compute the same, and a side that does not is found."""

from dataclasses import replace

import pytest

from benchmarks import chains
from benchmarks.zoo_pairs import OURS

pytest.importorskip("torchebm", reason="torchebm is not installed")
PAIR = next(pair for pair in OURS if pair.name == "mlp2d")


def test_a_row_has_both_sides():
    row = chains.row(PAIR, PAIR.load(None), n=8, steps=2, rounds=1)
    assert row["off"] < 1e-3 and row["ratio"] > 0
    assert {name: len(seconds) for name, seconds in row["seconds"].items()} == {"torchebm": 1, "ours": 1}


def test_another_energy_is_found(monkeypatch):
    made = chains.peer
    other = replace(PAIR, discriminate=lambda D, x: 2 * D(x))
    monkeypatch.setattr(chains, "peer", lambda pair, networks, noise: made(other, networks, noise))
    with pytest.raises(chains.WrongResults, match="differ"):
        chains.row(PAIR, PAIR.load(None), n=8, steps=2, rounds=1)
