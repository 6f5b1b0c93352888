"""The site: every page stands in its navigation, every public name in its reference."""

import importlib.util
import re
from pathlib import Path

import fastrefine as fr

ROOT = Path(__file__).parents[1]
NAVIGATION = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]


def test_every_page_of_docs_is_in_the_navigation_once():
    listed = re.findall(r"docs/[\w-]+\.md", NAVIGATION)
    assert sorted(listed) == sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


def test_every_public_name_is_in_the_reference(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site.py")
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    monkeypatch.setattr(site, "SOURCE", tmp_path)
    site.reference()
    pages = {f"api/{path.name}": path.read_text() for path in (tmp_path / "api").iterdir()}
    assert set(pages) == set(re.findall(r"api/[\w-]+\.md", NAVIGATION))
    names = re.findall(r"^::: fastrefine\.(?:\w+\.)*(\w+)$", "\n".join(pages.values()), re.M)
    assert sorted(names) == sorted([*fr.__all__, "refine"])  # of fastrefine.ray
