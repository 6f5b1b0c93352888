"""The notebooks of docs/: their committed outputs are whole and small, have pictures, and are what the cells give today."""

import base64
import contextlib
import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from tests.test_quickstart import fits

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
ALL = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(content):
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def printed(cell):
    """The lines that a cell printed on stdout."""
    texts = [output["text"] for output in cell["outputs"] if output.get("name") == "stdout"]
    return "".join("".join(text) for text in texts).splitlines()


def pictures(cell):
    return [output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})]


def assert_equal(shown, found):
    """Lines of a committed output against those of now: the same words, figures within 30 % or .02."""
    assert len(shown) == len(found), (shown, found)
    assert [(a, b) for a, b in zip(shown, found, strict=True) if not fits(a, b, 0.02)] == []


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["first-steps", "reading-a-law", "your-own-gan"]


@ALL
def test_committed_outputs_are_whole_and_small_and_have_pictures(path):
    assert path.stat().st_size < 300_000
    cells = code(json.loads(path.read_text()))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))  # run once, from top to bottom
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    for cell in cells:
        drawn = pictures(cell)
        assert bool(drawn) == any(line.startswith(("show(", "plt.show(")) for line in source(cell).splitlines())
        for picture in drawn:
            image = Image.open(io.BytesIO(base64.b64decode(picture)))
            assert min(image.size) > 100 and len(image.convert("L").getcolors()) > 50  # not a blank one


def test_the_cells_print_what_is_committed(monkeypatch):
    """In this process, one notebook: all three in ``make test-whole``."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib")
    pyplot.switch_backend("agg")
    monkeypatch.setattr(pyplot, "show", lambda: pyplot.close("all"))
    namespace = {}
    for cell in code(json.loads((FOLDER / "your-own-gan.ipynb").read_text())):
        with contextlib.redirect_stdout(io.StringIO()) as found:
            exec(compile(source(cell), "your-own-gan", "exec"), namespace)
        assert_equal(printed(cell), found.getvalue().splitlines())


@pytest.mark.whole
@ALL
def test_a_notebook_runs_in_a_kernel_and_gives_what_is_committed(path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(path, 4)
    committed = json.loads(path.read_text())
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3").execute()
    for shown, found in zip(code(committed), code(book), strict=True):
        assert_equal(printed(shown), printed(found))
        assert len(pictures(shown)) == len(pictures(found))
