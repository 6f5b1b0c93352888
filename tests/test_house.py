"""The rooms of the package and their order: an import points to the own room or to one above it, and there is no cycle."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE, KERNELS = ROOT / "fastrefine", ROOT / "kernels"

# From top to bottom. A room imports from itself and from the rooms above it, also under TYPE_CHECKING and in functions.
ROOMS = (
    ("errors", "checks", "extras", "noise", "progress", "models"),
    ("samplers",),
    ("ops",),
    ("kernels",),
    ("priors", "stopping"),
    ("options",),
    ("networks",),
    ("pictures", "result", "diagnosis", "selection"),
    ("engine",),
    ("refiner",),
    ("training",),
    ("metrics", "datasets"),
    ("production",),
    ("ray",),
    ("demo", "cli", "__main__"),
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def module_name(path: Path) -> str:
    """ "fastrefine.ops.slots"; a package is named by its folder."""
    parts = ("fastrefine", *path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])}


def imported(name: str, source: str, modules: set[str]) -> set[str]:
    """The modules among ``modules`` that a file imports anywhere, TYPE_CHECKING and functions included."""
    package = name if FILES.get(name, Path()).name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    inside = {n if n in modules else n.rpartition(".")[0] for n in found if n.split(".")[0] == "fastrefine"}
    return inside - {name}


def faults(sources: dict[str, str]) -> list[str]:
    """Every import in the wrong direction, and the first cycle; ``sources``: module -> its text."""
    modules = set(sources)
    graph = {name: imported(name, text, modules) for name, text in sources.items() if name != "fastrefine"}
    wrong = []
    for name, others in graph.items():
        own = FLOOR[name.split(".")[1]]
        for other in others:
            room = other.split(".")[1] if "." in other else None
            # ``import fastrefine`` reaches every room by its names: only the rooms that use the public API may have it
            if own < (FLOOR[room] if room else FLOOR["production"]):
                wrong.append(f"{name} imports {other}")
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            wrong.append("cycle: " + " -> ".join([*above[above.index(name) :], name]))
        elif name in graph and name not in done:
            for other in sorted(graph[name] - {n for n in above if name.startswith(f"{n}.")}):
                walk(other, (*above, name))
            done.add(name)

    for name in sorted(graph):
        walk(name, ())
    return wrong


def texts() -> dict[str, str]:
    return {name: path.read_text() for name, path in FILES.items()}


def test_every_module_stands_in_a_room():
    assert not [name for name in FILES if name != "fastrefine" and name.split(".")[1] not in FLOOR]


def test_imports_point_one_way_and_never_in_a_circle():
    assert faults(texts()) == []


@pytest.mark.parametrize(("module", "line", "found"), [
    ("fastrefine.samplers.base", "from fastrefine.refiner import Refiner", "samplers.base imports fastrefine.refiner"),
    ("fastrefine.ops.slots", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fastrefine.engine import run",
     "ops.slots imports fastrefine.engine.run"),
    ("fastrefine.networks.target", "def late():\n    import fastrefine.engine.run", "target imports fastrefine.engine.run"),
    ("fastrefine.engine.run", "import fastrefine as fr", "engine.run imports fastrefine"),
    ("fastrefine.engine.proposals", "from fastrefine.engine import run", "cycle: "),
])  # fmt: skip
def test_an_import_in_the_wrong_direction_is_found(module, line, found):
    sources = texts()
    sources[module] += f"\n{line}\n"
    assert any(found in fault for fault in faults(sources))
