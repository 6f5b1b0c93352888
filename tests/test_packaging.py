"""What the kernels and samplers import, what an import costs, what a build carries."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastrefine"
KERNELS = ROOT / "kernels"
FILES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])


def module_name(path: Path) -> str:
    """ "fastrefine.noise"; a package is named by its folder."""
    parts = ("fastrefine", *path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path: Path, *, module_level: bool = False) -> set[str]:
    """Full names of what a file imports at run time, everywhere or at module level only."""
    found: set[str] = set()
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]

    def visit(node: ast.AST) -> None:
        if is_type_checking(node) or (module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found.update(f"{base}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def beneath(name: str, *packages: str) -> bool:
    return f"{name}.".startswith(tuple(f"{package}." for package in packages))


def test_samplers_import_only_torch_checks_and_each_other():
    allowed = ("torch", "fastrefine.samplers", "fastrefine.errors", "fastrefine.checks", *sys.stdlib_module_names)
    files = sorted((PACKAGE / "samplers").glob("*.py"))
    assert files and not {(f.name, n) for f in files for n in imports(f) if not beneath(n, *allowed)}


def test_only_ops_touch_the_kernels_and_the_native_module():
    closed = ("fastrefine.kernels", "fastrefine._native", "fastrefine.ops.native", "triton", "kernels")
    others = [path for path in FILES if not (path.is_relative_to(KERNELS) or path.is_relative_to(PACKAGE / "ops"))]
    assert others and not {(module_name(f), n) for f in others for n in imports(f) if beneath(n, *closed)}


def test_only_its_owner_touches_the_device_loop():
    assert [module_name(path) for path in FILES if "_device_loop" in path.read_text()] == ["fastrefine.engine.while_graph"]


def test_kernels_import_torch_triton_and_the_op_table_only():
    allowed = ("torch", "triton", "fastrefine.kernels", "fastrefine.ops", "fastrefine.samplers.base")
    files = sorted(KERNELS.glob("*.py"))
    assert files and not {(f.name, n) for f in files for n in imports(f) if not beneath(n, *allowed, *sys.stdlib_module_names)}


def python(code: str) -> str:
    """Output of a fresh interpreter in the checkout."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_load_nothing_that_is_not_used():
    code = """
import sys
def show(*unused):
    own = {"fastrefine.kernels", "fastrefine._native", "fastrefine._device_loop", "matplotlib", "sklearn"}
    print((own | {*unused}) & {*sys.modules})
import fastrefine as fr
show("torch", "triton", "scipy", "numpy")
fr.ops, fr.samplers, fr.use_backend
show("triton")
fr.Refiner
show()
"""
    assert python(code).split() == ["set()"] * 3


@pytest.mark.parametrize(("code", "expected"), [
    ("import fastrefine", {"fastrefine"}),
    ("from fastrefine.cli import cli; cli(['--help'], standalone_mode=False)", {"fastrefine", "click"}),
    ("from fastrefine.cli import cli; cli(['refine', '--help'], standalone_mode=False)", {"fastrefine", "click"}),
    ("import fastrefine as fr; fr.InputError, dir(fr)", {"fastrefine"}),
])  # fmt: skip
def test_an_import_and_help_load_no_package_but_these(code, expected):
    shown = "print({name.partition('.')[0] for name in {*sys.modules} - before} - {*sys.stdlib_module_names})"
    last = python(f"import sys; before = {{*sys.modules}}\n{code}\n{shown}").splitlines()[-1]
    assert ast.literal_eval(last) == expected


def test_kernels_are_found_in_this_installation():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    assert "backtracking" in importlib.import_module("fastrefine.kernels").RULES


def test_pyproject_names_every_package():
    text = (ROOT / "pyproject.toml").read_text()
    folders = {module_name(path) for path in PACKAGE.rglob("__init__.py")} | {"fastrefine.kernels"}
    folders |= {module_name(path).rpartition(".")[0] for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert not [name for name in folders if f'"{name}"' not in text]
