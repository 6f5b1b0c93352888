"""What the report says in short: the distance, and precision or recall where they fell."""

from fastrefine.production.evaluation import Figure
from fastrefine.production.report_page import _verdict


def row(name, before, after, width=0.01):
    figures = [None if x is None else (x, x - width, x + width) for x in (before, after)]
    return {"name": f"{name}[x, n=9]", "before": figures[0], "after": figures[1]}


def test_what_fell_is_told_beside_the_distance():
    better = row("frechet_distance", 9.0, 5.0)
    said = _verdict([better, row("precision", 0.8, 0.6), row("recall", 0.2, 0.5)])
    assert "fell from 9.00 to 5.00. As a set, the images became more like the real ones." in said
    assert (
        said.endswith("Precision fell from 0.8 to 0.6: fewer images look like a real one than before.") and "Recall" not in said
    )
    said = _verdict([better, row("precision", 0.8, 0.79, 0.1), row("recall", 0.5, 0.2)])
    assert "Precision fell from 0.8 to 0.79, which may be chance." in said
    assert "Recall fell from 0.5 to 0.2: fewer real images have one like them" in said
    assert "Precision" not in _verdict([better, row("precision", 0.6, 0.8)])


def test_without_images_before_nothing_is_compared():
    assert _verdict([]) == _verdict([row("frechet_distance", None, 5.0), row("precision", None, 0.5)]) == ""


def test_the_change_sample_by_sample_decides_where_it_is_known():
    alike = row("frechet_distance", 9.0, 8.8, width=0.5)
    assert "from 9.00 to 8.80. The intervals overlap, so this may be chance." in _verdict([alike])
    said = _verdict([alike], Figure(-0.2, -0.25, -0.15))
    assert "from 9.00 to 8.80. Over the same samples" in said and "the change is -0.2 (-0.25 to -0.15). As a set" in said
    assert "the change is -0.2 (-0.5 to 0.1). So this may be chance." in _verdict([alike], Figure(-0.2, -0.5, 0.1))
    worse = _verdict([alike], Figure(0.3, 0.1, 0.5))
    assert "fell from 9.00 to 8.80" in worse and "became less like the real ones" in worse
    assert _verdict([row("frechet_distance", 5.0, 5.0)]).startswith("The Fréchet distance is 5.00 before and after. ")
