"""One page of all results: every experiment's published figures beside ours, its claims, its rows and its pictures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.papers.catalogue import EXPERIMENTS
from benchmarks.papers.result_file import spread
from fastrefine.errors import InputError

Row = dict[str, Any]
ROWS, FIGURES = 40, 10  # of a table at most
NONE = "–"


def number(value: Any, digits: int = 4) -> str:
    """A figure as text; a dash for one that is missing or no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return NONE
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def mean_sd(mean: Any, sd: Any) -> str:
    """mean ± sd, or the mean alone."""
    return number(mean) + (f" ± {number(sd, 2)}" if NONE not in (number(sd), number(mean)) else "")


def tables(rows: Sequence[Row]) -> list[tuple[list[str], list[list[str]], list[str]]]:
    """A table for each value of the column "set"; one where there is none."""
    return [table([row for row in rows if row.get("set") == name]) for name in dict.fromkeys(row.get("set") for row in rows)]


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]], list[str]]:
    """(header, rows, notes) of rows.

    What tells rows apart are their columns of text, the checkpoint, and of the other columns, in their order, as many as
    rows of one seed need to differ. Rows that differ in columns ``*seed`` alone are averaged; a cell has a dash unless all of
    them have the figure, and no deviation where it is the same in all. Notes say what is the same everywhere, and what is
    left out.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row if not key.endswith("seed")))
    columns = [c for c in columns if not any(isinstance(row.get(c), list | dict) for row in rows)]
    same = [c for c in columns if len(rows) > 1 and len({row.get(c) for row in rows}) == 1]
    columns = [c for c in columns if c not in same]
    keys = _keys(rows, columns)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(c) for c in keys), []).append(row)
    figures = [c for c in columns if c not in keys]
    header = keys + figures[:FIGURES]
    cells = [
        [*map(label, key), *(_average([row.get(c) for row in group]) for c in header[len(keys) :])]
        for key, group in groups.items()
    ]
    notes = []
    if any(len(group) > 1 for group in groups.values()):
        notes.append("Mean ± standard deviation over seeds.")
    if constant := [f"{c} {label(rows[0].get(c))}" for c in same if rows[0].get(c) is not None]:
        notes.insert(0, f"In all rows: {', '.join(constant)}.")
    if left := figures[FIGURES:]:
        notes.append(f"Further columns in result.json: {', '.join(left)}.")
    if len(cells) > ROWS:
        notes.append(f"{len(cells) - ROWS} more rows in result.json.")
    return header, cells[:ROWS], notes


def label(value: Any) -> str:
    """Any value of a result.json as short text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(label, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{k} ({label(v)})" if isinstance(v, dict) else f"{k} {label(v)}" for k, v in value.items())
    return value if isinstance(value, str) else number(value)


def _keys(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """The columns that tell rows apart, in their order."""
    seeds = list(dict.fromkeys(k for row in rows for k, v in row.items() if k.endswith("seed") and not isinstance(v, list)))
    text = [c for c in columns if c == "checkpoint" or any(isinstance(row.get(c), str) for row in rows)]
    others = [c for c in columns if c not in text]
    for count in range(len(others) + 1):
        keys = text + others[:count]
        if len({tuple(row.get(c) for c in seeds + keys) for row in rows}) == len(rows):
            return [c for c in columns if c in keys]
    return text


def _average(values: Sequence[Any]) -> str:
    if len(set(values)) == 1:
        return label(values[0])
    if any(not isinstance(v, int | float) for v in values):
        return NONE
    return mean_sd(*spread([float(v) for v in values]))


Record = dict[str, Any]
TITLE = "fastrefine: the experiments"
_TOLD = ("claim", "holds", "set", "quality", "control")  # keys of a claim that its text says


def write(directory: Path) -> Path:
    """Makes directory/report.md of all directory/NAME/result.json; returns its path.

    Raises InputError where a result.json is none, and where there is not one.
    """
    blocks = _blocks(directory, read(directory))
    part = directory / "report.md.part"
    part.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return part.replace(directory / "report.md")


def summary(directory: Path) -> str:
    """Tables in Markdown: the headline figures of every experiment, and how many of its claims hold."""
    records = read(directory)
    header = ["experiment", "case", "metric", "published", "ours", "difference", "seeds", "reduced"]
    rows = [
        [name, *_compared(row)[:5], label(row.get("seeds")), label(record.get("reduced"))]
        for name, record in records.items() for row in record.get("comparison", []) if row.get("headline")
    ]  # fmt: skip
    held = _table(("experiment", "claims", "commit"), [[n, _held(r), _commit(r)] for n, r in _all(records)])
    return f"{_table(header, rows)}\n\n{held}\n"


def read(directory: Path) -> dict[str, Record]:
    """NAME -> record of every directory/NAME/result.json: those of the catalogue in its order, then the others."""
    found = {path.parent.name: _record(path) for path in sorted(directory.glob("*/result.json"))}
    if not found:
        raise InputError(f"{directory} holds no NAME/result.json; wanted the --outdir of experiments that were run")
    return {name: found[name] for name in (*EXPERIMENTS, *found) if name in found}


def _record(path: Path) -> Record:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{path} holds a {type(record).__name__}; wanted an object")
    for key in ("rows", "claims", "comparison"):
        part = record.get(key, [])
        if not isinstance(part, list) or not all(isinstance(one, dict) for one in part):
            raise InputError(f"{path}: {key} is no list of objects")
    return record


def _all(records: dict[str, Record]) -> Iterator[tuple[str, Record | None]]:
    """Those of the catalogue, run or not, then the others."""
    for name in (*EXPERIMENTS, *(n for n in records if n not in EXPERIMENTS)):
        yield name, records.get(name)


def _blocks(directory: Path, records: dict[str, Record]) -> Iterator[str]:
    header = ("experiment", "title", "source", "claims", "seeds", "reduced", "commit")
    yield f"# {TITLE}"
    yield _table(header, [_overview(name, record) for name, record in _all(records)])
    for name, record in records.items():
        yield from _section(directory, name, record)


def _overview(name: str, record: Record | None) -> list[str]:
    known, held = EXPERIMENTS.get(name), record or {}
    about = [name, known.title, known.source] if known else [name, NONE, NONE]
    return [*about, _held(record), label(held.get("seeds")), label(held.get("reduced")), _commit(record)]


def _section(directory: Path, name: str, record: Record) -> Iterator[str]:
    known = EXPERIMENTS.get(name)
    yield f"## {_plain(f'{name}: {known.title}' if known else name)}"
    hardware = record.get("hardware") or {}
    facts = {
        "source": known.source if known else None, "seeds": record.get("seeds"), "reduced": record.get("reduced"),
        "commit": record.get("commit"), "cpu": hardware.get("cpu") or hardware.get("processor"), "cores": hardware.get("cores"),
        "seconds": record.get("seconds"),
    }  # fmt: skip
    yield _plain("; ".join(f"{key}: {label(value)}" for key, value in facts.items() if value is not None) + ".")
    reductions = record.get("reductions")
    if reductions:
        text = "; ".join(reductions) if isinstance(reductions, list) else label(reductions)
        yield _plain(f"Against the publication: {text}")
    if known:
        yield "    " + _command(name, record)
    if record.get("comparison"):
        yield "### Published and ours"
        header = ("case", "metric", "published", "ours", "difference", "better", "seeds")
        yield _table(
            header, [[*_compared(row), label(row.get("better")), label(row.get("seeds"))] for row in record["comparison"]]
        )
    if record.get("claims"):
        yield f"### Claims: {_held(record)}"
        yield _table(("", "claim", "figures"), [_claim(claim) for claim in record["claims"]])
    if record.get("rows"):
        yield "### Rows"
        for columns, cells, notes in tables(record["rows"]):
            yield from [_plain(" ".join(notes))] * bool(notes)
            yield _table(columns, cells)
    for path in sorted((directory / name).glob("*.png")):
        yield f"![{_plain(path.stem)}](<{path.relative_to(directory).as_posix()}>)"


def _command(name: str, record: Record) -> str:
    """What repeats a result."""
    known, seeds = EXPERIMENTS[name], record.get("seeds")
    parts = [f"python -m benchmarks.papers run {name} --outdir DIR"]
    if isinstance(seeds, list) and tuple(seeds) != known.seeds:
        parts += [f"--seed {seed}" for seed in seeds]
    if known.data and (known.needs_data or record.get("data") not in (None, "digits")):
        parts.append("--data DATA")
    return " ".join(parts)


def _compared(row: Record) -> list[str]:
    """case, metric, published, ours, difference."""
    difference = number(row.get("difference"))
    signed = difference if difference == NONE or difference.startswith("-") else f"+{difference}"
    figures = [number(row.get("published")), mean_sd(row.get("ours"), row.get("sd")), signed]
    return [label(row.get("case")), label(row.get("metric")), *figures]


def _claim(claim: Record) -> list[str]:
    verdict = {True: "holds", False: "FAILS"}.get(claim.get("holds"), NONE)  # type: ignore[arg-type]
    return [verdict, label(claim.get("claim")), label({k: v for k, v in claim.items() if k not in _TOLD})]


def _held(record: Record | None) -> str:
    if record is None:
        return "not run"
    claims: Sequence[Record] = record.get("claims", [])
    return f"{sum(claim.get('holds') is True for claim in claims)} of {len(claims)} hold"


def _commit(record: Record | None) -> str:
    """Seven digits, and "+" where the tree differed from it."""
    commit = (record or {}).get("commit")
    return commit[:7] + "+" * commit.endswith("+") if isinstance(commit, str) else NONE


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[_plain(cell) for cell in row] for row in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text whose characters mean themselves in Markdown, on one line."""
    return re.sub(r"([\\`*<|~])", r"\\\1", " ".join(text.split()))
