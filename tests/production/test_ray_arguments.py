"""``fastrefine.ray.refine`` before any cluster is asked."""

import sys
from types import ModuleType

import pytest

import fastrefine as fr


def test_without_ray_the_line_that_installs_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(fr.InputError, match=r"pip install 'fastrefine\[ray\]'"):
        fr.ray.refine({"pair": "digits"}, tmp_path)


@pytest.mark.parametrize(
    "given", [{"num_cpus": 0}, {"num_gpus": -1}, {"num_gpus": 1.5}, {"retries": -2}, {"tasks": 0}, {"tasks": 1.0}]
)
def test_wrong_numbers_start_nothing(monkeypatch, tmp_path, given):
    for name in ("ray", "ray.exceptions"):  # they know nothing: whoever asks them fails
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    ((name, value),) = given.items()
    with pytest.raises(fr.InputError, match=f"{name} is {value}; wanted"):
        fr.ray.refine({"pair": "digits"}, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()
