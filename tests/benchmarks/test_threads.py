"""The benchmark of threads: both numbers are timed, and torch's own comes back."""

import torch

from benchmarks import threads


def test_a_row_has_both_numbers_of_threads():
    before = torch.get_num_threads()
    row = threads.row("mlp2d", n=8, steps=2, rounds=2)
    assert {count: len(seconds) for count, seconds in row["seconds"].items()} == {1: 2, 2: 2}
    assert row["used"] == 1 and row["ratio"] > 0  # so small a network takes one of the two
    assert torch.get_num_threads() == before
