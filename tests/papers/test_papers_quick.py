"""Every experiment of the catalogue: its command line, and its quick run, whose main claims hold."""

import json
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.papers.catalogue import EXPERIMENTS
from fastrefine.errors import InputError

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
KEYS = {"experiment", "rows", "seeds", "recipe", "reduced", "reductions", "commit", "hardware", "claims", "comparison"}
# What a quick run must show: parts of the claims' texts. The other claims are of full runs.
MAIN = {
    "imbalanced8": ("refine, median stop by a shaped D gives more good", "collaborative, median stop has a lower JS"),
    "gaussians25": ("mean energy comes nearer to the law's",),
    "gaussians8": ("with the shaped D is lower than with D as it is or tuned", "with the shaped D is higher than"),
    "swissroll": ("with the shaped D is lower than with D as it is or tuned", "with the shaped D is higher than"),
    "diagnosis": ("the Brier score goes",),
    "mnist": ("refined by the shaped D, distance and score beat", "the shaped D refines to a lower distance than D as it is"),
    "cifar10": ("has a lower Frechet distance and a higher classifier score than",),
    "translation": ("refine, shaped: ",),
    "steps": ("Frechet distance, backtracking: the largest K for all is worse than the median stop",
              "Frechet distance, median stop: backtracking is within"),
    "folder": ("has a lower Frechet distance than the generator",),
    "step_control": ("good samples: at no step size is backtracking worse than fixed steps",
                     "ring, good samples: fixed steps' worst is worse"),
    "budget": ("is within 5 % of backtracking", "it costs at most 1/5"),
    "budget_cifar10": ("own classifier: Barzilai-Borwein, D shaped, lowers the distance",),
    "budget_sngan": (),
    "corrector": ("are better than raw",),
    "fitted": ("refines to a lower Frechet distance",),
}  # fmt: skip


WITHOUT_TORCH = """
import json, runpy, sys
for arguments in json.loads({!r}):
    sys.argv[1:] = arguments
    print("---", flush=True)
    try:
        runpy.run_module("benchmarks.papers", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print(end.code, "torch" in sys.modules, flush=True)
"""


def fresh(*commands):
    """(exit code, what was printed, whether torch was imported) of each command, one after the other in a fresh Python."""
    program = WITHOUT_TORCH.format(json.dumps(commands))
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    for part in done.stdout.split("---\n")[1:]:
        *printed, last = part.splitlines()
        code, torch = last.split()
        yield int(code), "\n".join(printed), torch == "True"


@pytest.fixture
def command(monkeypatch, capsys):
    """arguments -> (exit code, stdout, stderr) of ``python -m benchmarks.papers``, in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmarks.papers", *map(str, arguments)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            runpy.run_module("benchmarks.papers", run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


# --- the command line


def test_list_help_and_usage_errors_answer_without_torch():
    commands = [("list",), ("--help",), ("run", "--help"), ("report", "--help"), ("run", "swisroll", "--outdir", ".")]
    answers = list(fresh(*commands))
    assert [code for code, *_ in answers] == [0, 0, 0, 0, 2]
    assert all(printed and not torch for _, printed, torch in answers)
    assert all(name in answers[-1][1] for name in EXPERIMENTS), "an unknown name is told the choices"


def test_the_list_names_every_experiment(command):
    _, out, _ = command("list")
    assert [line.split()[0] for line in out.splitlines()] == list(EXPERIMENTS)


def test_run_asks_for_a_folder(command):
    code, _, err = command("run", "steps")
    assert code == 2 and "--outdir" in err


@pytest.mark.parametrize(
    ("name", "options", "said"), [("mnist", (), "mnist needs --data"), ("imbalanced8", ("--data", "."), "leave --data out")]
)
def test_data_missing_or_not_taken_is_one_line(command, tmp_path, name, options, said):
    code, _, err = command("run", name, "--outdir", tmp_path, *options)
    assert code == 1 and said in err and err.count("\n") == 1


def test_a_broken_result_is_one_line_of_the_report(command, tmp_path):
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "result.json").write_text("{")
    code, _, err = command("report", tmp_path)
    assert code == 1 and err.count("\n") == 1 and "result.json" in err


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_an_experiment_has_what_a_run_needs_and_says_what_data_it_takes(experiment, tmp_path):
    paper = experiment.paper()
    assert paper.FULL != paper.QUICK and all(callable(getattr(paper, n)) for n in ("rows", "claims", "comparison", "draw"))
    assert experiment.seeds and experiment.minutes > 0 and (experiment.data or not experiment.needs_data)
    if experiment.needs_data:
        with pytest.raises(InputError, match=f"{experiment.name} needs --data"):
            experiment.run(tmp_path)
    if not experiment.data:
        with pytest.raises(InputError, match="leave --data out"):
            experiment.run(tmp_path, data=tmp_path)


# --- quick runs


@pytest.fixture(scope="module", params=EXPERIMENTS.values(), ids=EXPERIMENTS)
def quick(request, quick_run):
    """(experiment, folder, record) of a quick run with one seed."""
    folder, record = quick_run(request.param.name)
    return request.param, folder.parent, record


def strict(path: Path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def made(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "cells" in str(path.parent)}


def test_a_quick_run_leaves_a_whole_record(quick):
    experiment, folder, record = quick
    found = strict(folder / experiment.name / "result.json")
    assert found == json.loads(json.dumps(record)) and found.keys() >= KEYS
    assert found["experiment"] == experiment.name and found["reduced"] is True
    assert found["rows"] and all(isinstance(row, dict) for row in found["rows"])
    assert found["claims"] and all(isinstance(claim["holds"], bool) and claim["claim"] for claim in found["claims"])
    for row in found["comparison"]:
        assert {"case", "metric", "published", "ours", "sd", "seeds", "difference", "better", "headline"} <= row.keys()


def test_a_quick_run_draws_small_pictures(quick):
    experiment, folder, _ = quick
    for path in (folder / experiment.name).glob("*.png"):
        assert path.stat().st_size < 200_000
        low, high = Image.open(path).convert("L").getextrema()
        assert low < high, f"{path.name} is blank"


def test_the_main_claims_hold_in_a_quick_run(quick, request):
    experiment, _, record = quick
    if experiment.name == "mnist":
        request.getfixturevalue("reference_torch")
    for part in MAIN[experiment.name]:
        about = [claim for claim in record["claims"] if part in claim["claim"]]
        assert about, f"no claim says {part!r}"
        assert [claim["claim"] for claim in about if not claim["holds"]] == []


def test_a_second_quick_run_is_served_from_what_the_first_left(quick, tmp_path):
    experiment, first, record = quick
    folder = shutil.copytree(first, tmp_path / "again")  # the second run writes its own record, and tests run in any order
    before = made(folder)
    again = experiment.run(folder, seeds=experiment.seeds[:1], quick=True)
    assert before and made(folder) == before
    assert again["rows"] == record["rows"] and again["claims"] == record["claims"]
