"""Build of the optional C++ extension; everything else is declared in pyproject.toml.

FASTREFINE_BUILD = auto (default) | none | cpu | cuda
    auto   the C++ step if a compiler is there, else a pure Python install
    none   pure Python install
    cpu    the C++ step; a failure is an error
    cuda   the C++ step and, with nvcc, the CUDA sources; a failure is an error
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("FASTREFINE_BUILD", "auto")
ARCHITECTURES = ("80", "90")  # the last one also as PTX, for what comes after it
OPENMP = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


class BuildNative(build_ext):
    """Portable flags (never -march=native, never -ffast-math), OpenMP where it works, nvcc for csrc/*.cu."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11

            ext.include_dirs.append(pybind11.get_include())
            if self.compiler.compiler_type == "msvc":
                ext.extra_compile_args += ["/O2", "/std:c++17", "/openmp"]
            else:
                # Without contraction to FMA every machine gives the same bits, those of the PyTorch formulas.
                ext.extra_compile_args += ["-O3", "-std=c++17", "-fvisibility=hidden", "-g0", "-Wall"]
                ext.extra_compile_args += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
                if self._openmp_works():
                    ext.extra_compile_args.append("-fopenmp")
                    ext.extra_link_args.append("-fopenmp")
            if MODE == "cuda":
                self._add_cuda(ext)
            super().build_extension(ext)
        except Exception as cause:
            if MODE != "auto":
                raise
            print(f"fastrefine: installed without the C++ step, PyTorch formulas serve instead ({cause})")

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
        sources = sorted(Path("csrc").glob("*.cu"))
        if not sources:
            raise SystemExit("FASTREFINE_BUILD=cuda: csrc/ holds no CUDA source; use FASTREFINE_BUILD=cpu")
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise SystemExit("FASTREFINE_BUILD=cuda: nvcc is not on PATH")
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        codes = [f"arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
        codes.append(f"arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
        flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-cudart", "static"]
        flags += [f"-gencode={code}" for code in codes]
        for source in sources:
            target = folder / f"{source.stem}.cu.o"
            subprocess.check_call([nvcc, *flags, "-c", str(source), "-o", str(target)])
            ext.extra_objects.append(str(target))
        said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        home = Path(said.partition("TOP=")[2].partition("\n")[0])  # nvcc may be a wrapper: it knows its own folder
        ext.library_dirs += [str(home / "lib64"), str(home / "lib"), *map(str, home.glob("targets/*/lib"))]
        ext.libraries += ["cudart_static", "rt", "dl", "pthread"]
        ext.define_macros.append(("FASTREFINE_CUDA", "1"))


def extensions() -> list[Extension]:
    """The native module, or nothing; in mode "auto" it may fail to build."""
    if MODE not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"FASTREFINE_BUILD is {MODE!r}; wanted auto, none, cpu or cuda")
    if MODE == "none":
        return []
    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    depends = sorted(str(path) for path in Path("csrc").glob("*.h"))
    return [Extension("fastrefine._native", sources, depends=depends, language="c++", optional=MODE == "auto")]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
