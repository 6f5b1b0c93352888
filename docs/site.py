"""Puts the site's pages together for mkdocs: README, docs/, what they link to, and a page for each room of the public API.

``python docs/site.py``, then ``mkdocs build --strict``: ``make docs`` does both.
"""

import re
import shutil
from pathlib import Path

import fastrefine

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "build" / "site-source"
LINK = re.compile(r"\]\(<?([^)>#\s]+)")
OTHER_PAGE = re.compile(r"(\]\([^):]+)\.(?:md|ipynb)\)")
TITLES = {
    "refiner": "Refiner", "result": "Results", "samplers": "Samplers", "priors": "Priors", "selection": "Selection",
    "diagnosis": "Diagnosis", "training": "Training", "networks": "Networks", "production": "Pairs and checkpoints",
    "ops": "Backends", "errors": "Errors",
}  # fmt: skip


def copied(page: Path) -> None:
    """A page, and every file that it links to, at the places that they have in the checkout."""
    target = SOURCE / page.relative_to(ROOT)
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(page, target)
    if page.suffix not in (".md", ".ipynb"):
        return
    if page.suffix == ".ipynb":  # whose links mkdocs leaves as they are
        target.write_text(OTHER_PAGE.sub(r"\1.html)", page.read_text()))
    for link in LINK.findall(page.read_text()):
        other = (page.parent / link).resolve()
        if not link.startswith(("http", "mailto:")) and other.is_file():
            copied(other)
        elif other.is_dir():  # no page: said as text
            target.write_text(re.sub(rf"\[([^\]]+)\]\({re.escape(link)}\)", r"\1", target.read_text()))


def reference() -> None:
    """api/ROOM.md with every public name that lives in the room."""
    rooms: dict[str, list[str]] = {room: [] for room in TITLES}
    for home, names in fastrefine._HOMES.items():
        rooms[home.partition(".")[0]] += [f"fastrefine.{home}.{name}" for name in names]
    (SOURCE / "api").mkdir()
    for room, names in rooms.items():
        entries = "\n".join(f"::: {name}\n" for name in names)
        (SOURCE / "api" / f"{room}.md").write_text(f"# {TITLES[room]}\n\n{entries}")
    (SOURCE / "api" / "stopping.md").write_text("# Stop rules\n\n::: fastrefine.stopping\n")
    (SOURCE / "api" / "ray.md").write_text("# Runs on Ray\n\n::: fastrefine.ray.refine\n")


if __name__ == "__main__":
    shutil.rmtree(SOURCE, ignore_errors=True)
    pages = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("notebooks/*.ipynb"))]
    for each in [ROOT / "README.md", ROOT / "docs" / "site.css", *pages]:
        copied(each)
    reference()
