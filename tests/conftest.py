"""One thread, and the Triton interpreter where there is no GPU: both before anything imports triton."""

import os
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when @triton.jit runs
os.environ.pop("FASTREFINE_BACKEND", None)

# Where tests/ stands alone (make test-wheel), what needs more of the checkout than the installed package is left out.
if not Path(__file__).parents[1].joinpath("fastrefine").exists():
    import fastrefine

    assert Path(fastrefine.__file__).is_relative_to(sys.prefix), f"{fastrefine.__file__} is not what was installed"
    collect_ignore = [
        "benchmarks", "papers", "engine/test_drivers_precision.py", "engine/test_while_graph.py",
        "engine/test_while_graph_gpu.py", "test_build.py", "test_docs.py", "test_examples.py", "test_house.py", "test_logs.py",
        "test_notebooks.py", "test_packaging.py", "test_quickstart.py", "test_results_page.py", "test_site.py",
    ]  # fmt: skip


def patch_once_a_launch():
    """Triton's interpreter patches its language at every call within a kernel, a third of its time: once a launch is enough.

    These are private names of triton 3.8; where another version has not got them all, nothing is changed.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
        from triton.runtime.interpreter import GridExecutor, _LangPatchScope, _patch_lang
    except ImportError:
        return
    patched, launch = set(), GridExecutor.__call__

    def patch(function):
        modules = {id(module) for module in function.__globals__.values() if module is tl or module is tl.core}
        if modules <= patched:
            return _LangPatchScope()
        patched.update(modules)
        return _patch_lang(function)

    def call(self, *args, **options):
        patched.clear()
        launch(self, *args, **options)

    interpreter._patch_lang, GridExecutor.__call__ = patch, call


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_once_a_launch()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder of all workers of this session."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Classifiers that tests train are kept for this session, and not in the user's cache."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture
def runtime(monkeypatch):
    """The CPU stand-in for CUDA's graphs, for refiners made with driver="graph" or "loop" while the test runs."""
    from fastrefine.engine import drivers
    from tests.support.stand_in import KINDS, Runtime

    stand_in = Runtime()
    original = drivers.choose

    def choose(name, device):
        return KINDS[name](stand_in) if name in KINDS else original(name, device)

    monkeypatch.setattr(drivers, "choose", choose)
    return stand_in
