"""Build of the optional C++ extensions; everything else is declared in pyproject.toml.

FASTREFINE_BUILD = auto (default) | none | cpu | cuda
    auto   the C++ step if a compiler is there, the device loop if nvcc is; without them a pure Python install
    none   pure Python install
    cpu    the C++ step; a failure is an error
    cuda   the C++ step and the device loop; a failure is an error
"""

import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("FASTREFINE_BUILD", "auto")
STEP, LOOP = "fastrefine._native", "fastrefine._device_loop"
LOOP_SOURCES = ("csrc/while_graph.cpp", "csrc/while_module.cpp")
LOOP_KERNEL = "csrc/set_condition.cu"
WITHOUT = {STEP: "the C++ step, PyTorch formulas serve instead", LOOP: "the device loop, graph replays serve instead"}
ARCHITECTURES = ("80", "90")  # the last one also as PTX, for what comes after it
OPENMP = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


class BuildNative(build_ext):
    """Portable flags (never -march=native, never -ffast-math), OpenMP where it works, nvcc for the device loop."""

    def run(self) -> None:
        if MODE == "cuda" and shutil.which("nvcc") is None:
            raise SystemExit("FASTREFINE_BUILD=cuda: nvcc is not on PATH")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            ext.include_dirs.append(pybind_include())
            if ext.name == STEP:
                self._add_step_flags(ext)
            else:
                self._add_cuda(ext)
            super().build_extension(ext)
        except Exception as cause:
            if MODE != "auto":
                raise
            print(f"fastrefine: installed without {WITHOUT[ext.name]} ({cause})")

    def _add_step_flags(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "msvc":
            ext.extra_compile_args += ["/O2", "/std:c++17", "/openmp"]
            return
        # Without contraction to FMA every machine gives the same bits, those of the PyTorch formulas.
        ext.extra_compile_args += ["-O3", "-std=c++17", "-fvisibility=hidden", "-g0", "-Wall"]
        ext.extra_compile_args += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
        if self._openmp_works():
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args.append("-fopenmp")

    def _openmp_works(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "openmp.cpp")
            source.write_text(OPENMP)
            try:
                objects = self.compiler.compile([str(source)], folder, extra_postargs=["-fopenmp"])
                self.compiler.link_executable(objects, "openmp", folder, extra_postargs=["-fopenmp"])
            except Exception:
                return False
        return True

    def _add_cuda(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "msvc":
            raise RuntimeError("the device loop is not built on Windows")
        nvcc = shutil.which("nvcc")
        assert nvcc is not None
        ext.extra_objects.append(self._compile_kernel(nvcc))
        home = toolkit(nvcc)
        ext.include_dirs += [str(home / "include"), *map(str, home.glob("targets/*/include"))]
        ext.library_dirs += [str(home / "lib64"), str(home / "lib"), *map(str, home.glob("targets/*/lib"))]
        ext.libraries += ["cudart_static", "rt", "dl", "pthread"]
        ext.extra_compile_args += ["-O2", "-std=c++17", "-fvisibility=hidden", "-g0", "-Wall"]
        # torch loads a CUDA runtime of its own: neither may bind to the symbols of the other.
        ext.extra_link_args.append("-Wl,--exclude-libs,ALL")

    def _compile_kernel(self, nvcc: str) -> str:
        target = Path(self.build_temp, f"{Path(LOOP_KERNEL).stem}.cu.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        codes = [f"arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
        codes.append(f"arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
        flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", *(f"-gencode={code}" for code in codes)]
        subprocess.check_call([nvcc, *flags, "-c", LOOP_KERNEL, "-o", str(target)])
        return str(target)


class Wheel(bdist_wheel):
    """A wheel of this Python and platform where an extension was built, else one for every Python 3 (py3-none-any)."""

    def run(self) -> None:
        self.run_command("build")
        build = self.get_finalized_command("build_ext")
        if not any(Path(build.get_ext_fullpath(ext.name)).is_file() for ext in self.distribution.ext_modules or ()):
            self.distribution.ext_modules, self.root_is_pure = [], True
        super().run()


def pybind_include() -> str:
    """The folder of pybind11's headers: its own, else the copy that comes with torch (builds without a network)."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            if Path(folder, "include", "pybind11", "pybind11.h").is_file():
                return str(Path(folder, "include"))
    raise RuntimeError("the headers of pybind11 are missing: pip install pybind11")


def toolkit(nvcc: str) -> Path:
    """nvcc on PATH may be a wrapper: it knows its own folder."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    return Path(said.partition("TOP=")[2].partition("\n")[0])


def check_setuptools() -> None:
    """Run by hand, setup.py may meet one that cannot read pyproject.toml and says so at length; pip brings its own."""
    if int(setuptools.__version__.partition(".")[0]) < 77:
        raise SystemExit(f"fastrefine: setup.py needs setuptools >= 77, this is {setuptools.__version__}")


def extensions() -> list[Extension]:
    """What this mode builds; in mode "auto" each may fail to."""
    if MODE not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"FASTREFINE_BUILD is {MODE!r}; wanted auto, none, cpu or cuda")
    if MODE == "none":
        return []
    sources = sorted(path.as_posix() for path in Path("csrc").glob("*.cpp"))
    depends = sorted(path.as_posix() for path in Path("csrc").glob("*.h"))
    options = {"depends": depends, "language": "c++", "optional": MODE == "auto"}
    found = [Extension(STEP, [s for s in sources if s not in LOOP_SOURCES], **options)]
    if MODE == "cuda" or (MODE == "auto" and shutil.which("nvcc")):
        found.append(Extension(LOOP, list(LOOP_SOURCES), **options))
    return found


check_setuptools()
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel})
