"""setup.py in its four modes, and the script that compiles the kernels without a GPU."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(mode: str, folder: Path, *, nvcc: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """``setup.py build_ext`` into folder/lib; ``nvcc``: a shell script in its place."""
    tools = folder / "bin"
    tools.mkdir()
    if nvcc is not None:
        (tools / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
        (tools / "nvcc").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", **environment, "FASTREFINE_BUILD": mode}
    command = ["setup.py", "build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def built(folder: Path) -> list[str]:
    return sorted(path.name.split(".")[0] for path in (folder / "lib").rglob("*.so"))


def test_build_modes_are_checked(tmp_path):
    done = build("fast", tmp_path)
    assert done.returncode != 0
    assert "FASTREFINE_BUILD is 'fast'; wanted auto, none, cpu or cuda" in done.stderr


def test_none_builds_nothing(tmp_path):
    done = build("none", tmp_path, nvcc="exit 1", CC="false", CXX="false")
    assert done.returncode == 0 and built(tmp_path) == []


def test_auto_says_in_a_line_what_it_goes_without(tmp_path):
    done = build("auto", tmp_path, nvcc="exit 1", CC="false", CXX="false")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("fastrefine: installed without")]
    assert len(said) == 2 and "the C++ step, PyTorch" in said[0] and "the device loop, graph replays" in said[1], said


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_what_was_asked_for_and_does_not_compile_is_an_error(tmp_path, mode):
    assert build(mode, tmp_path, nvcc="exit 1", CC="false", CXX="false").returncode != 0


def test_cuda_without_nvcc_is_an_error_that_says_so(tmp_path):
    done = build("cuda", tmp_path, PATH=str(tmp_path))
    assert done.returncode != 0 and "FASTREFINE_BUILD=cuda: nvcc is not on PATH" in done.stderr


def test_a_failing_nvcc_does_not_cost_the_step(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; : > "$2"\n')
    compiler.chmod(0o755)
    done = build("auto", tmp_path, nvcc="exit 1", CC=str(compiler), CXX=str(compiler), LDSHARED=str(compiler))
    assert done.returncode == 0 and built(tmp_path) == ["_native"], done.stdout
    assert "installed without the device loop" in done.stdout


@pytest.mark.parametrize(("mode", "compiles", "pure"), [("auto", True, False), ("auto", False, True), ("none", True, True)])
def test_a_wheel_without_extensions_is_for_every_python(tmp_path, mode, compiles, pure):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; : > "$2"\n' if compiles else "#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    (tmp_path / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvcc").chmod(0o755)
    environment = {**os.environ, "FASTREFINE_BUILD": mode, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), str(compiler))
    commands = [
        "egg_info", "--egg-base", tmp_path, "build", "--build-base", tmp_path / "build",
        "bdist_wheel", "--dist-dir", tmp_path, "--bdist-dir", tmp_path / "wheel",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *map(str, commands)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl") == pure
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert any(".so" in name for name in names) != pure and "fastrefine/production/report.html" in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"fastrefine"}


@pytest.mark.slow
def test_the_device_loop_builds_and_loads_without_a_gpu_or_the_package_pybind11(tmp_path):
    if shutil.which("nvcc") is None or shutil.which("g++") is None:
        pytest.skip("no nvcc or no g++")
    (tmp_path / "pybind11.py").touch()  # found first, and holds no headers: those of torch serve
    quick = tmp_path / "g++"  # of the loop alone, for an installation compiles the step; the last level wins
    quick.write_text(f"""#!/bin/sh
case "$*" in *csrc/while_*) exec {shutil.which("g++")} "$@" -O0;; esac
while [ "$1" != -o ]; do shift; done
: > "$2"
""")
    quick.chmod(0o755)
    done = build("cuda", tmp_path, PYTHONPATH=str(tmp_path), CC=str(quick), CXX=str(quick))
    assert done.returncode == 0 and built(tmp_path) == ["_device_loop", "_native"], done.stderr[-2000:]
    assert f"-I{tmp_path}" not in done.stdout and "torch/include" in done.stdout
    code = "import _device_loop; print(type(_device_loop.unavailable()).__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "lib" / "fastrefine", capture_output=True, text=True)
    assert done.stdout.strip() == "str", done.stderr


@pytest.fixture
def kernels_check(monkeypatch, tmp_path):
    """.ci/kernels_check.py, whose Python and nvcc are scripts that the test writes."""
    spec = importlib.util.spec_from_file_location("kernels_check", ROOT / ".ci" / "kernels_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def tool(name: str, script: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    module.tool = tool
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(module.shutil, "which", lambda name: str(path) if (path := tmp_path / name).exists() else None)
    return module


COUNTS = "echo one; echo 'sm_80: 152 kernels, sm_90: 151 kernels'"


def test_kernels_check_ends_with_the_counts(kernels_check, capfd):
    kernels_check.tool("python", COUNTS)
    kernels_check.main(["80", "90"])
    skipped = "CUDA sources skipped (nvcc is not on PATH)"
    last = f"kernels-check: sm_80: 152 Triton kernels, {skipped}; sm_90: 151 Triton kernels, {skipped}"
    assert capfd.readouterr().out.splitlines()[-1] == last
    kernels_check.tool("nvcc", 'while [ "$1" != -o ]; do shift; done; echo cubin > "$2"')
    kernels_check.main(["80", "90"])
    last = "kernels-check: sm_80: 152 Triton kernels, 1 CUDA source; sm_90: 151 Triton kernels, 1 CUDA source"
    assert capfd.readouterr().out.splitlines()[-1] == last


def test_kernels_check_without_triton_says_so(kernels_check, monkeypatch, capfd):
    monkeypatch.setattr(kernels_check.importlib.util, "find_spec", lambda name: None)
    kernels_check.main(["90"])
    said = "sm_90: Triton kernels skipped (triton is not installed), CUDA sources skipped (nvcc is not on PATH)"
    assert capfd.readouterr().out.splitlines() == [f"kernels-check: {said}"]


@pytest.mark.parametrize(
    ("python", "nvcc", "reason"),
    [
        (f"{COUNTS}; exit 1", "true", "fastrefine.kernels.aot 80 90 failed"),
        ("echo 'sm_80: 152 kernels, sm_90: 0 kernels'", "true", "no kernels for one of 80, 90"),
        ("echo 'sm_80: 152 kernels'", "true", "no kernels for one of 80, 90"),
        ("true", "true", "or no count of them"),
        (COUNTS, "exit 1", "csrc/set_condition.cu does not compile for sm_80"),
    ],
)
def test_kernels_check_fails_with_its_compilers(kernels_check, python, nvcc, reason):
    kernels_check.tool("python", python)
    kernels_check.tool("nvcc", nvcc)
    with pytest.raises(SystemExit, match=reason):
        kernels_check.main(["80", "90"])
