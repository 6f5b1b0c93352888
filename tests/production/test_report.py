"""``fastrefine grid`` and ``fastrefine report``: pictures and a page about a run, whose numbers follow from its files."""

import html
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastrefine import InputError, pictures
from fastrefine.datasets import load_digits
from fastrefine.metrics import frechet_distance
from fastrefine.production import evaluation, formats, report_page
from fastrefine.production.before_after import BeforeAfter
from fastrefine.production.report import Report
from fastrefine.production.run_folder import Folder
from fastrefine.production.saved_pair import load_pair
from tests.support.commands import fastrefine, told

N = 60
COMMON = ("--ids", f"0-{N - 1}", "--slots", 32)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """raw: of no steps. run: 8 steps of the digits, with other shards than raw. Both are of the embedded pair."""
    folder = tmp_path_factory.mktemp("runs")
    told(fastrefine("refine", "--pair", "digits", *COMMON, "--max-steps", 0, "--outdir", folder / "raw"))
    told(fastrefine("refine", "--pair", "digits", *COMMON, "--max-steps", 8, "--step-size", 0.3, "--stop", 0.1,
                    "--shard-size", 25, "--format", "wds", "--outdir", folder / "run"))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def page(runs):
    patch = pytest.MonkeyPatch()
    patch.setattr(evaluation.trained_features, "__defaults__", (60, 0))
    try:
        said = fastrefine("report", runs / "run", "--baseline", runs / "raw", "--real", "digits",
                          "--output", runs / "report.html")  # fmt: skip
        assert "without" not in told(said), "every section could be made"
        yield (runs / "report.html").read_text()
    finally:
        patch.undo()


def columns(folder):
    parts = [columns for _, columns in Folder.open(folder).parts()]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def figure(page, name):
    return re.search(rf'data-figure="{re.escape(name)}">([^<]*)', page).group(1).strip()


def test_the_page_holds_all_it_needs(page):
    assert page.count("<img") > 50 and page.count("<svg") == 3 and len(page) > 5000
    assert "//" not in re.sub(r"data:image/png;base64,[^\"]*|http://www\.w3\.org/", "", page)
    assert "Not shown" not in page and "{{" not in page and "{%" not in page and ">nan<" not in page
    for section in ("The first images", "changed most", "nearest real", "Scores and steps", "Quality", "believed", "Settings"):
        assert section in page
    assert not re.search(r"\d &gt; -?\d|\d > -?\d", page), "no two numbers look like an inequality"


def test_real_images_that_are_not_there_are_refused(runs, tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=np.zeros((4, 8, 8, 1), np.uint8))
    for real, why in (
        (tmp_path / "no.npz", "is not there"),
        (f"{tmp_path / 'real.npz'}:tset", "has no part 'tset'; wanted :train"),
    ):
        done = fastrefine("report", runs / "run", "--real", real, "--output", tmp_path / "r.html")
        assert why in str(done.exception) and not (tmp_path / "r.html").exists()


def test_its_numbers_follow_from_the_files_of_the_run(page, runs):
    run, raw = columns(runs / "run"), columns(runs / "raw")
    shown = {"mean_steps": run["steps"].mean(), "logit_before": raw["logits"].mean(), "logit_after": run["logits"].mean()}
    report = Report(BeforeAfter(runs / "run", runs / "raw"), "digits")
    shown |= {"logit_real": float(report.real_logits.mean())} | report.reliability[0].figures
    assert "images before refinement. Of those" in page and report.reliability[1]
    for name, value in shown.items():
        assert float(figure(page, name)) == pytest.approx(value, rel=6e-3), name
    assert "Compare it with the scores of real images, whose mean is" in page and "above 0" not in page
    usual = json.loads((runs / "run" / "manifest.json").read_text())["configuration"]
    assert usual["coupling"] == "refuse" and "<td>coupling" not in page and "<td>sampler<" in page, "what is usual is left out"
    assert figure(page, "images") == str(N)
    for code, name in ((0, "REACHED"), (1, "EXHAUSTED")):
        assert figure(page, name) == str((run["status"] == code).sum()) != "0"
    captions = re.findall(r"Image (\d+): score from (\S+) to (\S+), (\d+) steps?, mean change ([\d.]+)%", page)
    after, before = (np.concatenate([p for p, _ in Folder.open(runs / name).parts()]).astype(int) for name in ("run", "raw"))
    change = np.abs(after - before).mean((1, 2, 3)) / 255
    first, largest = captions[:12], captions[12:]
    assert [int(row[0]) for row in first] == list(range(12))
    assert [int(row[0]) for row in largest] == np.argsort(-change, kind="stable")[:12].tolist()
    for row in captions:
        i, expected = int(row[0]), (raw["logits"], run["logits"], run["steps"], 100 * change)
        assert [float(x) for x in row[1:]] == pytest.approx([values[int(i)] for values in expected], abs=0.051)


def test_the_table_of_quality_is_that_of_the_evaluation(page, runs):
    digits = load_digits()
    images = evaluation.images_of(runs / "run")
    features = evaluation.trained_features(digits.train, digits.train_labels)
    name = next(name for name in re.findall(r'data-figure="(frechet[^"]*)"', page))
    expected = frechet_distance(features(images)[0], features(digits.train)[0])
    assert float(figure(page, html.escape(name))) == pytest.approx(expected, rel=1e-2)
    assert features.name in page and f"{N} images against 1,400 real ones" in page


def test_the_command_on_the_page_makes_the_run_again(page, runs, tmp_path):
    words = html.unescape(re.search(r"<pre>(fastrefine refine [^<]*)</pre>", page).group(1)).split()
    told(fastrefine(*words[1:-1], tmp_path / "again"))
    run, again = Folder.open(runs / "run"), Folder.open(tmp_path / "again")
    assert [formats.digest(run.file(s)) for s in run.shards()] == [formats.digest(again.file(s)) for s in again.shards()]


def test_without_a_baseline_the_samples_are_rendered_again(runs):
    given, rendered = BeforeAfter(runs / "run", runs / "raw", 40), BeforeAfter(runs / "run", None, 40)
    assert np.array_equal(given.before.pixels, rendered.before.pixels) and len(given.before.pixels) == 40
    assert np.array_equal(given.logits_before, rendered.logits_before)
    assert not np.array_equal(given.before.pixels, given.after.pixels) and len(given.every["ids"]) == N


def test_a_pair_with_a_stop_rule_of_its_own_is_compared_and_timed_without_its_real_images(tmp_path):
    pair = load_pair("digits")
    pair.saved(
        tmp_path / "pair", discriminator=pair.discriminator, at="act2", sampler={"name": "collaborative"}, stop="median",
        max_steps=4,
    )  # fmt: skip
    common = ("--pair", tmp_path / "pair", "--ids", "0-19")
    told(fastrefine("refine", *common, "--real", "digits", "--outdir", tmp_path / "run"))
    told(fastrefine("refine", *common, "--max-steps", 0, "--outdir", tmp_path / "raw"))
    rendered, given = BeforeAfter(tmp_path / "run"), BeforeAfter(tmp_path / "run", tmp_path / "raw")
    assert np.array_equal(rendered.before.pixels, given.before.pixels)
    assert np.array_equal(rendered.logits_before, given.logits_before)
    assert torch.isfinite(Report(given, "digits").real_logits).all()
    told(fastrefine("grid", tmp_path / "run", "--output", tmp_path / "new" / "grid.png"))
    assert (tmp_path / "new" / "grid.png").is_file()
    quick = ("--layers", "act2", "--precisions", "float32", "--seconds", 0.01, "--steps", 2)
    assert "act2" in told(fastrefine("bench", "--pair", tmp_path / "pair", *quick))


def test_another_discriminators_logits_are_not_taken_for_those_before(runs, tmp_path):
    shutil.copytree(runs / "raw", tmp_path / "raw")
    manifest = json.loads((tmp_path / "raw" / "manifest.json").read_text())
    (tmp_path / "raw" / "manifest.json").write_text(json.dumps(manifest | {"discriminator_sha256": "another"}))
    other = BeforeAfter(runs / "run", tmp_path / "raw", 10)
    other.before.columns["logits"][:] = 7
    assert np.array_equal(other.logits_before, BeforeAfter(runs / "run", runs / "raw", 10).logits_before)


def test_samples_are_paired_by_their_ids(runs, tmp_path):
    told(fastrefine("refine", "--pair", "digits", "--ids", "50-69,500", "--max-steps", 0, "--slots", 32,
                    "--outdir", tmp_path / "raw"))  # fmt: skip
    pairs = BeforeAfter(runs / "run", tmp_path / "raw")
    assert pairs.ids.tolist() == list(range(50, 60)) == pairs.after.columns["ids"].tolist()
    whole = BeforeAfter(runs / "run", runs / "raw")
    assert np.array_equal(pairs.before.pixels, whole.before.pixels[50:])
    told(fastrefine("refine", "--pair", "digits", "--ids", "90-91", "--max-steps", 0, "--outdir", tmp_path / "far"))
    with pytest.raises(InputError, match="no sample ids in common"):
        BeforeAfter(runs / "run", tmp_path / "far")


def test_of_another_seed_there_are_figures_but_no_differences(runs, tmp_path):
    told(fastrefine("refine", "--pair", "digits", *COMMON, "--seed", 1, "--max-steps", 0, "--outdir", tmp_path / "raw"))
    missing = report_page.write(Report(BeforeAfter(runs / "run", tmp_path / "raw", 20)), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "differs in seed" in page and ">difference</div>" not in page and ">before</div>" in page
    assert any("differs in seed" in line for line in missing)
    wrong = fastrefine("grid", runs / "run", "--baseline", tmp_path / "raw", "--output", tmp_path / "grid.png")
    assert "differs in seed" in str(wrong.exception)
    told(fastrefine("grid", runs / "run", "--rows", "refined", "--output", tmp_path / "grid.png"))


def test_where_nothing_is_to_be_had_the_page_says_why(runs, tmp_path):
    shutil.copytree(runs / "run", tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    findings = ["All <b>stood</b> still", {"code": "exhausted", "text": "none reached", "advice": "shape it"}]
    summary = {"seconds": 12.5, "images_per_second": 4.8, "findings": findings}
    manifest |= {"generator_sha256": "another", "summary": summary}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    said = told(fastrefine("report", tmp_path / "run", "--output", tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert "has other weights now" in page and "pass --baseline" in page and "no real images were given" in page
    assert "images before" in said and "quality" in said and page.count("<img") == 12
    assert "All &lt;b&gt;stood" in page and "none reached. What to do: shape it" in page
    assert "12.50 seconds" in page and "4.80 images a second" in page
    refused = fastrefine("grid", tmp_path / "run", "--output", tmp_path / "grid.png")
    assert "pass --baseline" in str(refused.exception)


def test_a_run_with_selection_has_no_single_image_before(tmp_path):
    told(fastrefine("refine", "--pair", "digits", "--ids", "0-5", "--max-steps", 2, "--select", "mh", "--chain-length", 3,
                    "--slots", 16, "--outdir", tmp_path / "run"))  # fmt: skip
    told(fastrefine("report", tmp_path / "run", "--output", tmp_path / "report.html"))
    assert "chooses one of 3 proposals" in (tmp_path / "report.html").read_text()


def test_intervals_are_shown_where_the_evaluation_gives_them(runs, tmp_path, monkeypatch):
    name = "frechet_distance[x, n=20]"
    found = {name: evaluation.Figure(2.0, 1.0, 3.0), "features": "x", "num_samples": 20}
    answers = iter([found, {name: evaluation.Figure(0.5, 0.25, 0.75)}, found, {name: evaluation.Figure(2.5, 2.25, 2.75)}])
    drawn = iter([[0.0, 1.0], [-1.5, -0.5], [0.0, 0.0], [0.5 - 0.5**0.5, 0.5 + 0.5**0.5]])  # the changes deviate by 0 and 1

    def measure(*_, draws=None, **__):
        if draws is not None:
            draws.append(np.array(next(drawn)))
        return next(answers)

    monkeypatch.setattr(evaluation, "measure", measure)
    monkeypatch.setattr(evaluation, "trained_features", lambda *_, **__: evaluation.Features(lambda x: x.flatten(1), "pixels"))
    told = (
        "fell from 2.00 to 0.5. Over the same samples, corrected for their small number, the change is -1.50 "
        "(-1.50 to -1.50). As a set, the images became more like",
        "the change is 0.5 (-1.46 to 2.46). So this may be chance.",
    )
    for words in told:
        report_page.write(Report(BeforeAfter(runs / "run", runs / "raw", 20), "digits"), tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        assert words in page and "1.00 to 3.00" in page and "an interval of about 95 %" in page


def test_sets_of_other_samples_are_not_compared_one_by_one(runs, monkeypatch):
    monkeypatch.setattr(evaluation, "trained_features", lambda *_, **__: evaluation.Features(lambda x: x.flatten(1), "pixels"))
    for unpaired in ("", "the baseline is of other samples"):
        pairs = BeforeAfter(runs / "run", runs / "raw", 20)
        monkeypatch.setattr(type(pairs), "unpaired", property(lambda _, text=unpaired: text))
        found = Report(pairs, "digits").metrics
        assert found.before is not None and (found.change is None) == bool(unpaired)


def test_nearest_real_images_are_nearest_in_the_features(runs, monkeypatch):
    monkeypatch.setattr(evaluation, "trained_features", lambda *_, **__: evaluation.Features(lambda x: x.flatten(1), "pixels"))
    report = Report(BeforeAfter(runs / "run", runs / "raw", N), "digits")
    rows, distances = report.neighbours
    images, real = evaluation.images_of(runs / "run")[:8], report.truth[0]
    every = torch.cdist(images.flatten(1).double(), real.flatten(1).double())
    assert np.array_equal(rows[:, 0], every.argmin(1)) and np.allclose(distances, every.sort(1).values[:, :3])


def test_the_grid_of_a_run_shows_its_first_images(runs, tmp_path):
    said = told(fastrefine("grid", runs / "run", "--baseline", runs / "raw", "--count", 5, "--output", tmp_path / "grid.png"))
    assert "first 5 images" in said
    drawn = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    left, top = pictures.MARGIN + pictures.LABEL, pictures.MARGIN + pictures.CAPTION + pictures.SIDE + pictures.GAP
    tile = drawn[top : top + pictures.SIDE, left : left + pictures.SIDE][4::8, 4::8]
    pixels = next(Folder.open(runs / "run").parts())[0]
    assert np.array_equal(tile, pictures.coloured(pixels[:1])[0])


def test_code_that_a_manifest_names_does_not_run(runs, tmp_path):
    shutil.copytree(runs / "run", tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    trap = {"code": "os:mkdir", "arguments": {"path": str(tmp_path / "trace")}, "weights": "x", "key": ""}
    manifest["configuration"] |= {"pair": "", "generator": trap, "discriminator": trap}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    told(fastrefine("report", tmp_path / "run", "--output", tmp_path / "report.html"))
    assert not (tmp_path / "trace").exists() and "Not shown" in (tmp_path / "report.html").read_text()
    told(fastrefine("report", tmp_path / "run", "--trust-code", "--output", tmp_path / "report.html"))
    assert (tmp_path / "trace").exists(), "the trap works"


def test_the_embedded_pair_still_makes_the_images_of_the_run(runs):
    pair, pairs = load_pair("digits"), BeforeAfter(runs / "run", None, 4)
    z = pairs.worker.refiner.prior.sample(torch.arange(4), 0)
    assert np.abs(pictures.levels(pair.generator(z)).astype(int) - pairs.before.pixels).max() <= 1


def test_report_and_evaluate_compare_with_the_same_real_images(page, runs, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation.trained_features, "__defaults__", (60, 0))

    def found(real):
        asked = ("evaluate", runs / "run", "--real", real, "--baseline", runs / "raw")
        return json.loads(fastrefine(*asked, "--json").stdout), told(fastrefine(*asked))

    (whole, table), (held_out, _) = found("digits"), found("digits:test")
    assert (whole["num_real"], held_out["num_real"]) == (1400, 397)
    told(fastrefine("report", runs / "run", "--baseline", runs / "raw", "--real", "digits:test",
                    "--output", tmp_path / "report.html"))  # fmt: skip
    other = (tmp_path / "report.html").read_text()
    for word in ("was memorised", "it looks better here than it is"):
        assert word in page and word not in other
    assert f"{N} training images</th>" in other and "training images</th>" not in page
    for text, numbers in ((page, whole), (other, held_out)):
        assert f"against {report_page._number(numbers['num_real'])} real ones" in text
        for name, one in numbers["figures"].items():
            assert figure(text, name).startswith(report_page._number(one["value"])), name
            scored = name.startswith("classifier_score")
            assert one["num_real"] == numbers["baseline"][name]["num_real"] == (0 if scored else numbers["num_real"])
    rows = {line.split()[0].partition("[")[0]: line.split()[2] for line in table.splitlines() if "[" in line}
    assert rows == {name: "-" if "score" in name and "f_" not in name else "1400" for name in rows} and len(rows) == 6
    many = {name.partition("[")[0]: evaluation.real_compared(name, 50_000) for name in whole["figures"]}
    assert many["recall"] == evaluation.COVERED and many["frechet_distance"] == 50_000
    assert evaluation.real_compared("inception_score_mean", 50_000) == 0
