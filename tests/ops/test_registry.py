"""The table of backends: what is chosen, what is an error, and that absent is not broken."""

import functools
import sys
from types import ModuleType

import pytest
import torch

from fastrefine import BackendError
from fastrefine.ops import registry

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh():
    """Every test sees a table that has loaded nothing, and leaves one behind."""
    registry._load.cache_clear()
    yield
    registry._load.cache_clear()


@pytest.fixture
def module(monkeypatch):
    """Make the import of a backend's module give a module with these RULES, or raise."""

    def give(backend, content):
        name = registry._MODULES[backend]

        def load(asked):
            assert asked == name
            if isinstance(content, Exception):
                raise content
            loaded = ModuleType(name)
            loaded.RULES = content
            return loaded

        monkeypatch.setattr(registry.importlib, "import_module", load)

    return give


def test_an_unknown_backend_is_an_error_that_names_the_known_ones():
    with pytest.raises(BackendError, match="'fpga' is not known; choose one of reference, cpu, triton, cuda"):
        registry.use_backend("fpga").__enter__()


def test_the_name_cuda_is_kept_and_refused_with_its_reason():
    with pytest.raises(BackendError, match="'cuda' is not available: this version holds no kernels in CUDA; 'triton' serves"):
        registry.use_backend("cuda").__enter__()


def test_an_absent_backend_asked_for_by_name_is_an_error_with_its_reason(module):
    module("cpu", registry.Absent("fastrefine._native is not built"))
    with pytest.raises(BackendError, match=r"'cpu' is not available: fastrefine\._native is not built"):
        registry.use_backend("cpu").__enter__()


def test_an_absent_backend_is_passed_over_when_nobody_asked_for_it(module):
    module("cpu", registry.Absent("not built"))
    assert registry.choose(CPU, "sgd") == "reference"


def test_a_broken_backend_is_an_error_even_when_nobody_asked_for_it(module):
    module("cpu", BackendError("fastrefine._native exists but does not load: undefined symbol"))
    with pytest.raises(BackendError, match="undefined symbol"):
        registry.choose(CPU, "sgd")


def test_available_tells_absent_broken_and_ok_apart(monkeypatch):
    states = {"cpu": ModuleType("loaded"), "triton": "triton is not installed", "cuda": BackendError("no driver")}

    def load(name):
        if isinstance(states[name], BackendError):
            raise states[name]
        return states[name]

    monkeypatch.setattr(registry, "_load", functools.cache(load))
    wanted = {"reference": "ok", "cpu": "ok", "triton": "triton is not installed", "cuda": "no driver"}
    assert registry.available() == wanted


def test_a_rule_without_kernel_runs_on_the_reference_and_is_an_error_when_forced(module):
    module("cpu", frozenset({"sgd"}))
    assert registry.choose(CPU, "sgd") == "cpu"
    assert registry.choose(CPU, None) == registry.choose(CPU, "mala") == "reference"
    with registry.use_backend("cpu"), pytest.raises(BackendError, match="no kernel for the rule 'mala'"):
        registry.choose(CPU, "mala")


def test_use_backend_holds_inside_the_block_only(module):
    module("cpu", frozenset({"sgd"}))
    with registry.use_backend("reference"):
        assert registry.choose(CPU, "sgd") == "reference"
        with registry.use_backend("cpu"):
            assert registry.choose(CPU, "sgd") == "cpu"
        assert registry.choose(CPU, "sgd") == "reference"
    assert registry.choose(CPU, "sgd") == "cpu"


def test_the_environment_names_a_backend_and_a_block_wins_over_it(module, monkeypatch):
    module("cpu", frozenset({"sgd"}))
    monkeypatch.setenv("FASTREFINE_BACKEND", "reference")
    assert registry.choose(CPU, "sgd") == "reference"
    with registry.use_backend("cpu"):
        assert registry.choose(CPU, "sgd") == "cpu"
    monkeypatch.setenv("FASTREFINE_BACKEND", "gpu")
    with pytest.raises(BackendError, match="'gpu' is not known"):
        registry.choose(CPU, "sgd")


def test_a_backend_of_another_device_is_an_error(module, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module("cpu", frozenset({"sgd"}))
    with registry.use_backend("cpu"), pytest.raises(BackendError, match="'cpu' runs on cpu tensors, these are on cuda"):
        registry.choose(CUDA, "sgd")
    registry._load.cache_clear()
    module("triton", frozenset({"sgd"}))
    with registry.use_backend("triton"), pytest.raises(BackendError, match="'triton' runs on cuda tensors"):
        registry.choose(CPU, "sgd")


def test_triton_that_is_not_installed_is_absent(module):
    module("triton", ModuleNotFoundError("No module named 'triton'", name="triton"))
    assert registry._load("triton") == "triton is not installed"


def test_a_backend_that_misses_another_module_is_not_called_absent(module):
    module("cpu", ModuleNotFoundError("No module named 'numpy'", name="numpy"))
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        registry._load("cpu")


def test_an_extension_that_does_not_load_is_reported_with_its_cause(monkeypatch, tmp_path):
    import fastrefine

    monkeypatch.delenv("FASTREFINE_BUILD", raising=False)  # "none" would not even look for it

    before = {name: sys.modules.pop(name, None) for name in ("fastrefine._native", "fastrefine.ops.native")}
    (tmp_path / "_native.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    monkeypatch.setattr(fastrefine, "__path__", [str(tmp_path), *fastrefine.__path__])
    try:
        with pytest.raises(BackendError, match=r"exists but does not load: libgomp\.so\.1"):
            registry._load("cpu")
        assert "libgomp" in registry.available()["cpu"]
    finally:
        sys.modules.pop("fastrefine.ops.native", None)
        sys.modules.update({name: old for name, old in before.items() if old is not None})
