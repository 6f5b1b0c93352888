"""Builds ``_device_loop`` against the fake CUDA runtime of fake_cudart.cpp and drives that fake."""

import ctypes
import fcntl
import functools
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("tests/support/fake_cudart.cpp", "csrc/while_graph.cpp", "csrc/while_module.cpp")
KERNEL, MEMCPY, MEMSET, HOST, CHILD, EMPTY = range(6)  # cudaGraphNodeType


def pybind_include() -> str | None:
    """The folder of pybind11's headers: its own, else the copy that comes with torch."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin and (folder := Path(spec.origin).parent / "include" / "pybind11").is_dir():
            return str(folder.parent)
    return None


@functools.cache  # a second copy in one process would register the same types again
def load(folder: Path) -> "FakeRuntime":
    """Built in a folder that other processes may share, by the first of them; skips the test where it cannot be built."""
    missing = [tool for tool in ("nvcc", "g++") if shutil.which(tool) is None]
    include = pybind_include()
    if missing or include is None:
        pytest.skip(f"the fake CUDA runtime needs {', '.join(missing) or 'the headers of pybind11'}")
    target, part = folder / "_device_loop.so", folder / "_device_loop.part"
    includes = [f"-I{path}" for path in (ROOT / "csrc", include, sysconfig.get_paths()["include"])]
    # No real runtime is linked, and -Bsymbolic binds to the fake even if another library brings the real one.
    flags = ["-std=c++17", "-O0", "-shared", "-cudart", "none", "-Xcompiler", "-fPIC", "-Xlinker", "-Bsymbolic"]
    command = ["nvcc", *flags, *includes, *SOURCES, "-o", str(part)]
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            os.replace(part, target)
    return FakeRuntime(target)


class FakeRuntime:
    """The extension (``module``) and its fake runtime, which lie in one library."""

    def __init__(self, path: Path) -> None:
        loader = importlib.machinery.ExtensionFileLoader("_device_loop", str(path))
        spec = importlib.util.spec_from_loader("_device_loop", loader)
        assert spec is not None
        self.module = importlib.util.module_from_spec(spec)
        loader.exec_module(self.module)
        self.library = ctypes.CDLL(str(path))
        self.library.fake_graph.restype = ctypes.c_void_p
        self.library.fake_read.restype = ctypes.c_char_p
        self.fail_at = self.library.fake_fail_at
        self.counted = self.library.fake_counted
        self.alive = self.library.fake_alive
        self.device = self.library.fake_device
        self.reset()

    def reset(self, driver: int | None = None, step: Callable[[], None] = lambda: None) -> None:
        """Forget everything; ``driver``: of the headers' version, ``step``: what a kernel of the captured step does."""
        self.callback = ctypes.CFUNCTYPE(None)(step)  # kept: the fake holds its address
        self.library.fake_reset(self.library.fake_version() if driver is None else driver, self.callback)

    def graph(self, *types: int, children: tuple[int, ...] = (), cooperative: bool = False) -> int:
        """A captured graph of nodes of these types and of child graphs."""
        graph = self.library.fake_graph(b"step")
        add = functools.partial(self.library.fake_add, ctypes.c_void_p(graph))
        for kind in types:
            add(kind, ctypes.c_bool(cooperative), None)
        for child in children:
            add(CHILD, ctypes.c_bool(False), ctypes.c_void_p(child))
        return graph

    def calls(self) -> list[str]:
        """Recorded since the last time."""
        return self.library.fake_read(False).decode().splitlines()

    def faults(self) -> list[str]:
        """What the real runtime would crash on."""
        return self.library.fake_read(True).decode().splitlines()
