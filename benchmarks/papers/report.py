"""One page of all results: every experiment's published figures beside ours, its claims, its rows and its pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.papers import averages
from benchmarks.papers.averages import NONE, label, mean_sd, number
from benchmarks.papers.catalogue import EXPERIMENTS
from fastrefine.errors import InputError

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
    known, said = EXPERIMENTS.get(name), record or {}
    about = [name, known.title, known.source] if known else [name, NONE, NONE]
    return [*about, _held(record), label(said.get("seeds")), label(said.get("reduced")), _commit(record)]


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
        said = "; ".join(reductions) if isinstance(reductions, list) else label(reductions)
        yield _plain(f"Against the publication: {said}")
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
        for columns, cells, notes in averages.tables(record["rows"]):
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
