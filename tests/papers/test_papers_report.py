"""The report on results that are known: what it shows, what it leaves out, and that its form is sound."""

import json
import re

import pytest
from PIL import Image

from benchmarks.papers import report
from benchmarks.papers.catalogue import EXPERIMENTS
from benchmarks.papers.result_file import against, claim
from fastrefine.errors import InputError

NASTY = 'a | b <script>alert("x")</script> & `c` *d*'


def record(**other):
    shares = {"early": 0.25, "shaped": 0.75}
    return {
        "experiment": "swissroll", "seeds": list(range(3, 13)), "reduced": True, "reductions": ["half the samples"],
        "commit": "0123456789abcdef", "hardware": {"cpu": "Some CPU", "cores": 1},
        "rows": [{"seed": s, "name": name, "good": share + s / 100} for name, share in shares.items() for s in (0, 1, 2)],
        "claims": [claim("shaped beats frozen", True, shaped=0.7654), claim("all is well", False, exceptions=[0.1, 3])],
        "comparison": [
            against("shaped", "good", 0.66, [0.71, 0.73, 0.75], "higher", headline=True),
            against("early", "good", None, [0.3333], "higher"),
        ],
        **other,
    }  # fmt: skip


def put(folder, name, content):
    (folder / name).mkdir()
    (folder / name / "result.json").write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def results(tmp_path):
    put(tmp_path, "swissroll", record())
    put(tmp_path, "imbalanced8", record(experiment="imbalanced8"))
    put(tmp_path, "another", record(experiment="another", rows=[{"name": NASTY, "good": 1.0}], claims=[claim(NASTY, True)]))
    Image.new("RGB", (3, 2), "red").save(tmp_path / "swissroll" / "picture.png")
    return tmp_path


def page(folder):
    return report.write(folder).read_text()


def table_rows(markdown):
    return [re.split(r"(?<!\\) \| ", line[2:-2]) for line in markdown.splitlines() if line.startswith("| ")]


# --- what is shown


def test_published_and_ours_stand_side_by_side_with_their_difference(results):
    assert ["shaped", "good", "0.66", "0.73 ± 0.02", "+0.07", "higher", "3"] in table_rows(page(results))


def test_no_cell_shows_a_figure_that_is_not_there(results):
    """What no paper published, the spread of one value, and figures that were not finite or are missing are dashes."""
    rows = [{"seed": 0, "name": "all", "good": 0.5}, {"seed": 0, "name": "none", "good": None}, {"seed": 0, "name": "gone"}]
    put(results, "diagnosis", record(rows=rows, comparison=[{"case": "bare", "metric": "good"}]))
    found = table_rows(page(results))
    assert ["early", "good", "–", "0.3333", "–", "higher", "1"] in found
    assert ["bare", "good", "–", "–", "–", "–", "–"] in found
    assert [row for row in found if row[0] in ("all", "none", "gone")] == [["all", "0.5"], ["none", "–"], ["gone", "–"]]


def test_claims_that_fail_are_shown_as_such(results):
    found = table_rows(page(results))
    assert ["holds", "shaped beats frozen", "shaped 0.7654"] in found
    assert ["FAILS", "all is well", "exceptions 0.1, 3"] in found


def test_each_section_says_how_it_came_about(results):
    markdown = page(results)
    section = markdown[markdown.index("## swissroll") : markdown.index("## another")]
    for said in ("seeds: 3, 4, 5", "commit: 0123456789abcdef", "Some CPU", "half the samples", "reduced: yes", "[CS0] Table 1"):
        assert said in section
    assert "    python -m benchmarks.papers run swissroll --outdir DIR\n" in section


@pytest.mark.parametrize(
    ("name", "other", "options"),
    [
        ("swissroll", {"seeds": list(range(3, 13))}, ""),
        ("swissroll", {"seeds": [4, 7]}, " --seed 4 --seed 7"),
        ("mnist", {"seeds": [0]}, " --data DATA"),
        ("fitted", {"seeds": [0], "data": "mnist"}, " --data DATA"),
        ("fitted", {"seeds": [0], "data": "digits"}, ""),
    ],
)
def test_the_command_repeats_the_run(name, other, options):
    assert report._command(name, record(**other)) == f"python -m benchmarks.papers run {name} --outdir DIR{options}"


def test_experiments_come_in_the_catalogues_order_and_unknown_ones_after(results):
    markdown = page(results)
    sections = [line[3:].partition(":")[0] for line in markdown.splitlines() if line.startswith("## ")]
    assert sections == ["imbalanced8", "swissroll", "another"]
    overview = [row[0] for row in table_rows(markdown)[2 : len(EXPERIMENTS) + 3]]
    assert overview == [*EXPERIMENTS, "another"]


def test_an_experiment_without_a_result_is_not_run(results):
    found = {row[0]: row[3] for row in table_rows(page(results))[2 : len(EXPERIMENTS) + 3]}
    assert found["swissroll"] == "1 of 2 hold" and found["cifar10"] == "not run"
    assert sum(said == "not run" for said in found.values()) == len(EXPERIMENTS) - 2


def test_results_of_older_forms_are_shown_with_what_they_have(tmp_path):
    put(
        tmp_path,
        "corrector",
        {"rows": [{"a": 1}], "seeds": {"training": [0], "sampling": [0, 1]}, "hardware": {"processor": "P"}},
    )
    markdown = page(tmp_path)
    assert "seeds: training 0, sampling 0, 1" in markdown and "cpu: P" in markdown and "Published" not in markdown
    assert "| 0 of 0 hold |" in markdown


# --- the form


def test_text_of_a_result_stands_for_itself(results):
    plain = [re.sub(r"\\(.)", r"\1", row[1]) for row in table_rows(page(results)) if row[0] == "holds"]
    assert NASTY in plain


def test_every_row_of_a_table_has_as_many_cells_as_its_header(results):
    width = None
    for line in page(results).splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert None in (width, cells) or width == cells
        width = cells


def test_pictures_are_linked_from_the_markdown(results):
    (link,) = re.findall(r"!\[.*?\]\(<(.*?)>\)", page(results))
    assert (results / link).is_file()


# --- the summary


def test_the_summary_has_headlines_alone_and_every_experiments_claims(results):
    figures, held = (table_rows(part) for part in report.summary(results).split("\n\n"))
    line = ["shaped", "good", "0.66", "0.73 ± 0.02", "+0.07", "3", "yes"]
    assert figures[2:] == [[name, *line] for name in ("imbalanced8", "swissroll", "another")]
    assert [row[0] for row in held[2:]] == [*EXPERIMENTS, "another"]
    assert ["swissroll", "1 of 2 hold", "0123456"] in held and ["mnist", "not run", "–"] in held


def test_a_commit_of_a_changed_tree_keeps_its_mark(tmp_path):
    put(tmp_path, "steps", record(commit="0123456789abcdef+"))
    assert "| 0123456+ |" in report.summary(tmp_path)


# --- bad input


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"claims": {"text": {"holds": true}}}', '{"rows": [1]}', '{"rows": [{"good": NaN}]}', "\x00"],
)
def test_a_broken_result_is_named(results, content):
    put(results, "steps", content)
    with pytest.raises(InputError, match=r"steps.result\.json"):
        report.write(results)
    assert not (results / "report.md").exists()


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(InputError, match="no NAME/result.json"):
        report.summary(tmp_path)


# --- rows


def test_rows_are_averaged_over_seeds_alone():
    rows = [
        {"set": "a", "control": c, "step_size": z, "seed": s, "good": z + s} for c in "xy" for z in (0.1, 2.0) for s in (0, 2)
    ]
    header, cells, notes = report.table(rows)
    assert header == ["control", "step_size", "good"]
    assert cells[:2] == [["x", "0.1", "1.1 ± 1.4"], ["x", "2", "3 ± 1.4"]] and len(cells) == 4
    assert notes == ["In all rows: set a.", "Mean ± standard deviation over seeds."]


def test_a_sampling_seed_is_a_seed():
    rows = [{"name": n, "seed": 0, "sampling_seed": s, "good": s} for n in "ab" for s in (0, 1)]
    assert report.table(rows)[1] == [["a", "0.5 ± 0.71"], ["b", "0.5 ± 0.71"]]


def test_a_checkpoint_tells_rows_apart_and_a_figure_does_not():
    rows = [{"seed": s, "checkpoint": k, "name": "a", "good": s} for k in (10, 20) for s in (0, 1)]
    header, cells, _ = report.table(rows)
    assert header == ["checkpoint", "good"] and cells == [["10", "0.5 ± 0.71"], ["20", "0.5 ± 0.71"]]


def test_one_missing_figure_leaves_no_mean_of_the_others():
    rows = [{"seed": s, "name": n, "kl": None if (n, s) == ("a", 1) else 1.0 + s} for n in "ab" for s in (0, 1)]
    assert report.table(rows)[1] == [["a", "–"], ["b", "1.5 ± 0.71"]]


def test_a_figure_that_no_seed_changes_has_no_deviation():
    rows = [{"seed": s, "name": n, "steps": 10.0 if n == "a" else s} for n in "ab" for s in (0, 1)]
    assert report.table(rows)[1] == [["a", "10"], ["b", "0.5 ± 0.71"]]


def test_lists_stay_in_the_file_and_what_is_too_much_is_counted():
    rows = [{"name": f"n{i}", "shares": [1], **{f"c{k}": float(i + k) for k in range(13)}} for i in range(45)]
    header, cells, notes = report.table(rows)
    assert header == ["name", *(f"c{k}" for k in range(10))] and len(cells) == 40
    assert notes == ["Further columns in result.json: c10, c11, c12.", "5 more rows in result.json."]


def test_each_set_has_a_table_of_its_own():
    rows = [{"set": "a", "good": 1.0}, {"set": "b", "distance": 2.0}, {"set": "a", "good": 3.0}]
    assert [header for header, _, _ in report.tables(rows)] == [["good"], ["set", "distance"]]


def test_lists_by_seed_are_no_seeds():
    rows = [{"name": "a", "good_by_seed": [0.1, 0.2], "good": 0.15}, {"name": "b", "good_by_seed": [0.3], "good": 0.3}]
    header, cells, _ = report.table(rows)
    assert header == ["name", "good"] and cells == [["a", "0.15"], ["b", "0.3"]]
