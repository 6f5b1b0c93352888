"""A page of headings, tables and pictures, written as Markdown and as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CSS = """body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
h2 { border-top: 2px solid #ddd; margin-top: 2.5rem; padding-top: 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 13px; margin: .8rem 0; }
th, td { border: 1px solid #ddd; padding: .2rem .5rem; text-align: left; vertical-align: top; }
th { background: #f4f4f4; }
tr:nth-child(even) td { background: #fafafa; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.FAILS { color: #b00020; font-weight: bold; }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; }
img { max-width: 100%; border: 1px solid #eee; }"""
_NUMBER = re.compile(r"^[+-]?[\d.]+(e[+-]?\d+)?( ± [\d.]+(e[+-]?\d+)?)?$")


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the page's title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Code:
    """Commands, a line each."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells as text, a row as long as the header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG file."""

    path: Path


Block = Heading | Text | Code | Table | Picture


def markdown(blocks: Sequence[Block], folder: Path) -> str:
    """The page as Markdown; pictures are links from ``folder``."""
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_plain(block.text)}"
        case Text():
            return _plain(block.text)
        case Code():
            return "\n".join("    " + line for line in block.text.splitlines())
        case Table():
            lines = [[_plain(cell) for cell in row] for row in (block.header, *block.rows)]
            lines.insert(1, ["---"] * len(block.header))
            return "\n".join("| " + " | ".join(line) + " |" for line in lines)
        case Picture():
            link = block.path.relative_to(folder).as_posix()
            return f"![{_plain(block.path.stem)}](<{link}>)"


def _plain(text: str) -> str:
    """Text whose characters mean themselves in Markdown, on one line."""
    return re.sub(r"([\\`*<|~])", r"\\\1", " ".join(text.split()))


def page(blocks: Sequence[Block], title: str) -> str:
    """The page as HTML without anything from outside: pictures are in it, there are no scripts."""
    body = "\n".join(map(_html, blocks))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>\n{CSS}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
        case Text():
            return f"<p>{html.escape(block.text)}</p>"
        case Code():
            return f"<pre>{html.escape(block.text)}</pre>"
        case Table():
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.header)
            rows = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in block.rows)
            return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
        case Picture():
            data = base64.b64encode(block.path.read_bytes()).decode()
            return f'<p><img alt="{html.escape(block.path.stem)}" src="data:image/png;base64,{data}"></p>'


def _cell(text: str) -> str:
    kind = ' class="number"' if _NUMBER.match(text) else ' class="FAILS"' if text == "FAILS" else ""
    return f"<td{kind}>{html.escape(text)}</td>"
