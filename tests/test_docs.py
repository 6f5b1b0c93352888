"""The code blocks of the documentation run, each page's in one namespace from top to bottom."""

import re
import warnings
from pathlib import Path

import pytest

PAGES = [Path(__file__).parents[1] / "docs" / name for name in ("samplers.md",)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_snippets_of_a_page_run(page, capsys):
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert snippets
    namespace = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for snippet in snippets:
            exec(compile(snippet, str(page), "exec"), namespace)
    assert capsys.readouterr().out
