"""Code that a text names, "package.module:name", and which of it may run: SECURITY.md has the rule in words."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from fastrefine import checks
from fastrefine.errors import InputError

OWN = "fastrefine.models."  # whose functions make networks or call them, and do nothing else
HOW = "If you trust it, pass --trust-code, in Python the argument trust_code"


@dataclass(frozen=True)
class Trust:
    """Which texts may name any code: all of them (``trust_code=True``), or those that the user typed.

    file: where the other texts come from; None where they were given from Python. checkout: the folder in which the modules lie
    by what the file says; imported from only where everything is trusted.
    """

    everything: bool = False
    typed: frozenset[str] = frozenset()
    file: Path | None = None
    checkout: str = ""

    def __str__(self) -> str:
        return "the configuration" if self.file is None else str(self.file)

    def covers(self, text: str) -> bool:
        """Whether the user vouches for what this text names."""
        return self.everything or text in self.typed


UNTRUSTED = Trust()


def check_inside(path: str, file: Path, *folders: Path, otherwise: str = "") -> None:
    """Raise InputError where a path that ``file`` names leads out of all of the folders, also by way of a link.

    A path that is not absolute is one from the first folder.
    """
    try:
        target = (folders[0] / path).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have, a link to itself
        raise InputError(f"{file} names {checks.shown(path)}, which is no path ({error})") from error
    if not any(target.is_relative_to(folder.resolve()) for folder in folders):
        raise InputError(f"{file} names {path!r}, which leads out of {file.parent}; wanted a file in that folder{otherwise}")


def imported(code: str, what: str, trust: Trust) -> Any:
    """What "package.module:name" names. what: what it is named for, for errors.

    Unless the text is trusted, modules are imported only where the file did not bring them, and names are looked up without
    running anything. Raises InputError.
    """
    module_name, _, path = code.partition(":")
    names, attributes = module_name.split("."), path.split(".")
    if not all(part.isidentifier() for part in (*names, *attributes)):
        raise InputError(f"the {what} is {code!r}; wanted package.module:callable, or a torch.export archive (.pt2)")
    trusted = trust.covers(code)
    try:
        if not trusted:
            _import_carefully(names, code, trust)
        elif trust.checkout and trust.checkout not in sys.path:
            sys.path.insert(0, trust.checkout)
        target: Any = importlib.import_module(module_name)
        for part in attributes:
            target = getattr(target, part) if trusted else _entry(target, part)
    except (ImportError, AttributeError) as error:
        hint = "is its folder on PYTHONPATH? In that folder: PYTHONPATH=. fastrefine ..."
        if isinstance(error, AttributeError):
            hint = _near(sys.modules.get(module_name), attributes[0])
        if trust.checkout and not trusted:
            hint = f"it was saved with modules in {trust.checkout}: PYTHONPATH={trust.checkout} fastrefine ... . {HOW}"
        raise InputError(f"the {what}'s code {code!r} cannot be imported ({error}); {hint}") from error
    if trusted and trust.checkout:
        _check_checkout(sys.modules[module_name], trust.checkout)
    return target


def _near(module: ModuleType | None, name: str) -> str:
    """What a module has that is named like this, in words; nothing runs."""
    if module is None:
        return "its import raised this"
    near = difflib.get_close_matches(name, [entry for entry, value in vars(module).items() if callable(value)])
    return f"did you mean {' or '.join(near)}?" if near and name not in near else "wanted the name of a class in that module"


def _check_checkout(module: ModuleType, checkout: str) -> None:
    """InputError where a module was imported from elsewhere before, and the checkout has one of that name."""
    top = module.__name__.partition(".")[0]
    there = [Path(checkout) / name for name in (top, f"{top}.py")]
    file = getattr(module, "__file__", None) or ""
    if any(place.exists() for place in there) and not Path(file).resolve().is_relative_to(Path(checkout).resolve()):
        raise InputError(
            f"module {module.__name__!r} of {checkout} is wanted, but {file} was imported as that before; use another process"
        )


def function(code: str, what: str, trust: Trust) -> Any:
    """The function "module:function" of the caller that is named for ``what``; InputError where the text is not trusted."""
    found = imported(code, what, trust) if trust.covers(code) or code.startswith(OWN) else None
    if not trust.covers(code) and not _is_own(found):
        raise InputError(
            f"{trust} names {code!r} as {what}, and a file may name no function: it was not imported; wanted it typed, as "
            f"--{what} {code}. {HOW}"
        )
    if not callable(found):
        raise InputError(f"{what} is {code!r}, a {type(found).__name__}; wanted module:function")
    return found


def text_of(given: Any, what: str) -> str:
    """The text "module:function" that names a function; InputError where no other process could import it by that."""
    text = given if isinstance(given, str) else f"{getattr(given, '__module__', '')}:{getattr(given, '__qualname__', '')}"
    everything = Trust(everything=True)
    if isinstance(given, str):
        function(text, what, everything)
        return text
    try:
        same = not text.startswith("__main__:") and imported(text, what, everything) is given
    except InputError:
        same = False
    if not same:
        raise InputError(
            f"{what} is {given!r}, which cannot be saved: a lambda, a function inside another one or one of the running "
            "program has no name to import it by; wanted a function at the top level of a module, e.g. mynetworks.py"
        )
    return text


def network_code(code: str, what: str, trust: Trust) -> Any:
    """What makes a network: a class that is a torch.nn.Module, or where the text is trusted any callable or a module."""
    target = imported(code, what, trust)
    is_class = issubclass(type(target), type) and issubclass(target, nn.Module)
    if not trust.covers(code) and not is_class and not _is_own(target):
        raise InputError(
            f"{trust} names {code!r} as the {what}, a {type(target).__name__}, which was not called; wanted a torch.nn.Module "
            f"class: a file may name no other code. {HOW}"
        )
    return target


def _is_own(target: Any) -> bool:
    return type(target) is FunctionType and target.__module__.startswith(OWN)


def _import_carefully(names: list[str], code: str, trust: Trust) -> None:
    """Import a module, parent before child; InputError before one that may have come with the file."""
    for depth, name in enumerate(names):
        full = ".".join(names[: depth + 1])
        if full in sys.modules:
            continue
        spec = importlib.util.find_spec(full)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {full!r}")
        file = [Path(spec.origin)] if spec.has_location and spec.origin else []
        places = [Path(place) for place in spec.submodule_search_locations or ()] or file
        why = ""
        if names[0] in sys.stdlib_module_names or name == "__main__":
            why = "a program or a part of Python, which holds no networks"
        elif trust.file is not None and any(_inside(place, trust.file.parent) for place in (*places, *file)):
            why = f"in {trust.file.parent}, beside the file that names it"
        elif depth == 0 and not _is_on_pythonpath(Path.cwd()) and any(_is_in(place, Path.cwd()) for place in places):
            why = "in the current directory, which PYTHONPATH does not name"
        if why:
            raise InputError(
                f"{trust} names {code!r}, and module {full!r} is {why}; importing it would run it, so it was not imported. "
                f"Import it in your own program first. {HOW}"
            )
        importlib.import_module(full)


def _entry(target: Any, name: str) -> Any:
    """An entry of a module or a class as it stands there: no property, ``__getattr__`` or descriptor runs."""
    kind = next((kind for kind in (ModuleType, type) if issubclass(type(target), kind)), None)
    if kind is None:
        raise AttributeError(f"{type(target).__name__} is neither a module nor a class")
    entries = vars(kind)["__dict__"].__get__(target)
    if name not in entries:
        raise AttributeError(f"no class {name!r} in it")
    return entries[name]


def _ways(place: Path) -> tuple[Path, Path]:
    """Where a file is, and where it leads if it is a link."""
    return place.absolute().parent.resolve() / place.name, place.resolve()


def _inside(place: Path, folder: Path) -> bool:
    return any(way.is_relative_to(folder.resolve()) for way in _ways(place))


def _is_in(place: Path, folder: Path) -> bool:
    return any(way.parent == folder.resolve() for way in _ways(place))


def _is_on_pythonpath(folder: Path) -> bool:
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return any(Path(entry).resolve() == folder.resolve() for entry in entries if entry)
