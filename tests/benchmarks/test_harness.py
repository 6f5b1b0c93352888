"""The speed harness in little: rows with all keys, what is written when a row fails or time runs out, records and tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import measure, profiling, report, rows
from benchmarks.measure import Bench, Budget
from benchmarks.rows import TINY, Row

ROOT = Path(__file__).parent.parent.parent
CPU, GPU = {"kind": "cpu", "device": "X", "commit": "0" * 40, "torch": "2", "threads": 1}, {"kind": "cuda"}
KEYS = {
    "workload", "cut", "sampler", "precision", "driver", "stop", "num_slots", "images_per_second", "ratio_b0", "ratio_b1",
    "ratio_b2", "floor_fraction", "slot_efficiency", "greedy_bound", "mean_steps", "host_syncs_per_step", "peak_memory_mb",
}  # fmt: skip


def made_up(**facts):
    """A row of invented figures."""
    own = Row("dcgan64", precision="bfloat16", driver="graph", num_slots=512).facts()
    own |= {"images_per_second": 1e3, "refine_steps_per_second": 5e4, "ratio_b0": 12.0, "ratio_b1": 2.0, "ratio_b2": 1.0}
    own |= {"floor_fraction": 0.4, "slot_efficiency": 0.9, "greedy_bound": 0.95, "mean_steps": 50.0, "K": 50}
    return own | {"host_syncs_per_step": 0.02, "peak_memory_mb": 100.0, "missing": {}, "row_seconds": 1.0, **facts}


def a_record(*found, **more):
    own = {"kind": report.KIND, "machine": {**CPU, **GPU}, "command": "made up", "datetime": "2000-01-01T00:00:00"}
    return own | {"rows": list(found), "peaks": {"bfloat16": 1e12}, "failed": [], "not_run": [], **more}


class Clock:
    """A clock that only moves when told."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The command's own record of two rows and a profile, measured in little on a CPU."""
    path = tmp_path_factory.mktemp("results") / "speed.json"
    given = ["run", "--device=cpu", "--tiny", "--workload=mlp2d", "--stop=none", "--stop=median", "--profile"]
    benchmark = torch.backends.cudnn.benchmark
    theirs = f"--pytest-benchmark={path.parent / 'theirs.json'}"
    found = CliRunner().invoke(command.main, [*given, f"--output={path}", theirs], catch_exceptions=False)
    torch.backends.cudnn.benchmark = benchmark
    return found, path


def test_every_row_is_measured_with_all_keys_and_told_as_it_comes(measured):
    found, path = measured
    record = report.load(path)
    assert found.exit_code == 0 and record["failed"] == record["not_run"] == [] and record["tiny"]
    assert [row["stop"] for row in record["rows"]] == ["none", "median"]
    for row in record["rows"]:
        assert set(row) >= KEYS and row["label"] in found.output
        assert row["images_per_second"] > 0 and row["ratio_b0"] > 0 and row["ratio_b1"] > 0
        assert row["ratio_b2"] is None and row["missing"]["b2"]
        assert row["checks"]["b1"]["steps_equal"] == 1 and row["checks"]["b1"]["deviation_median"] < 1e-3
    text = report.table(record)
    assert "stand-in" in text and "met" not in text.partition("| workload")[2]  # nothing tiny is judged


def test_the_rows_are_also_written_as_pytest_benchmark_writes_them(measured):
    found, path = measured
    theirs = path.parent / "theirs.json"
    assert f"Written: {theirs}" in found.output
    own, again = report.load(path), report.load(theirs)
    assert [row["seconds"] for row in again["rows"]] == [row["seconds"] for row in own["rows"]]
    assert again["machine"]["device"] == own["machine"]["device"] and again["machine"]["commit"] == own["machine"]["commit"]
    for entry, row in zip(json.loads(theirs.read_text())["benchmarks"], own["rows"], strict=True):
        assert entry["stats"]["min"] == min(row["seconds"]) and entry["stats"]["rounds"] == len(row["seconds"])
    pytest.importorskip("pytest_benchmark")
    other = path.parent / "other.json"
    other.write_text(theirs.read_text())
    done = subprocess.run([Path(sys.executable).parent / "pytest-benchmark", "compare", theirs, other], cwd=path.parent,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and "bench_refine[mlp2d" in done.stdout, done.stderr


def test_a_stop_is_reached_by_some_and_its_gain_is_raced(measured):
    fixed, stopped = report.load(measured[1])["rows"]
    assert fixed["mean_steps"] == fixed["K"] and 0 < stopped["mean_steps"] < stopped["K"]
    for row, ratio, name in ((fixed, "ratio_b1", "b1"), (stopped, "ratio_b0", "b0"), (stopped, "gain", "fixed")):
        (seconds,) = row[f"{name}_seconds"]  # one round
        assert row[ratio] == pytest.approx(row["images_per_second"] * seconds / row[f"{name}_images"])
    assert stopped["ideal_gain"] == (stopped["K"] + 1) / (stopped["mean_steps"] + 1)


def test_the_profile_of_the_worst_row_lies_beside(measured):
    found = json.loads(measured[1].with_name("profile.json").read_text())
    assert found["kernels"]["by_time"] and found["drivers"]["host"] > 0
    assert "mlp2d" in profiling.table(found)


def test_going_on_leaves_out_what_the_record_has(measured, tmp_path):
    record = json.loads(measured[1].read_text())
    record["failed"] = [{**record["rows"].pop(), "error": "it did not end"}]
    path = tmp_path / "speed.json"
    path.write_text(json.dumps(record))
    given = ["run", "--device=cpu", "--tiny", "--workload=mlp2d", "--stop=none", "--stop=median", "--go-on"]
    CliRunner().invoke(command.main, [*given, f"--output={path}"], catch_exceptions=False)
    again = report.load(path)
    assert (again["rows"], again["failed"]) == (record["rows"], record["failed"])


def fake(row):
    return made_up(**row.facts())


def test_rows_that_do_not_fit_the_budget_are_listed(tmp_path):
    clock = Clock()
    budget = Budget(50, clock)

    def slow(row):
        clock.now += 20
        budget.longest_row = 20
        return fake(row)

    record = a_record()
    wanted = [Row("mlp2d"), Row("dcgan16"), Row("mlp2d", stop="median")]
    command.run_rows(wanted, slow, budget, record, tmp_path / "x.json")
    written = report.load(tmp_path / "x.json")
    assert [row["workload"] for row in written["rows"]] == ["mlp2d", "dcgan16"]
    assert [(row["stop"], "10 s are left" in row["reason"]) for row in written["not_run"]] == [("median", True)]


def test_a_failing_row_is_recorded_and_the_next_one_runs(tmp_path):
    path = tmp_path / "x.json"

    def measure(row):
        assert report.load(path)["failed"][-1]["error"] == "it did not end"  # what a crash would leave
        if row.precision == "tf32":
            raise RuntimeError("no such kernel")
        return fake(row)

    command.run_rows([Row("mlp2d", precision="tf32"), Row("mlp2d")], measure, Budget(1e6), a_record(), path)
    written = report.load(path)
    assert [row["error"] for row in written["failed"]] == ["RuntimeError: no such kernel"] and len(written["rows"]) == 1


def test_a_lost_device_ends_the_run_with_the_rest_listed(tmp_path):
    def fail(*_):
        raise RuntimeError("illegal memory access")

    record = a_record()
    assert command.run_rows([Row("mlp2d"), Row("dcgan16")], fail, Budget(1e6), record, tmp_path / "x.json", fail)
    assert len(record["failed"]) == 1 and "device" in record["not_run"][0]["reason"]


def test_compilation_may_take_half_of_the_budget():
    clock = Clock()
    budget = Budget(200, clock)
    assert budget.may_compile()
    budget.compiled(60)
    assert not budget.may_compile()  # another 60 s would make 120
    clock.now = 190
    assert not budget.has_room_for_a_row()


def test_a_gpu_measures_what_stands_behind_the_goals_first():
    found = rows.gpu_rows()
    first = [(row.workload, row.precision, row.stop, row.num_slots) for row in found[:4]]
    precisions, stops = ("bfloat16", "float32"), ("none", "median")
    assert first == [("dcgan64", precision, stop, 512) for precision in precisions for stop in stops]
    assert found[0].rivals == ("b0", "b1", "b2") and found[1].rivals == ("b0", "b1", "b2", "fixed")
    assert any("graph" in row.rivals for row in found if row.driver == "loop")
    assert len({row.label for row in found}) == len(found)


def test_work_is_counted_from_the_networks():
    own = rows.work("dcgan16", "first")
    assert own.evaluation == 2 * own.forward and rows.work("dcgan16", "output").forward < own.forward
    assert rows.work("stylegan16", "first").evaluation > 0


class Wrong(measure.ExpertLoop):
    """Moves images twice as far from where they started."""

    def __call__(self, latents, **stop):
        found = super().__call__(latents, **stop)
        return found._replace(images=2 * found.images - self.pair(self.pair.prefix(latents))[0].detach())


def test_wrong_results_are_noticed_and_chaos_is_not_called_wrong():
    bench, row = Bench(torch.device("cpu"), TINY, Budget(100)), Row("mlp2d", driver="host")
    z = bench.latents(row, 8)
    ours = bench.refiner(row).refine(z)
    right, wrong = bench.loop(measure.ExpertLoop, row, 8), bench.loop(Wrong, row, 8)
    assert "chaotic" not in bench.check(row, right, ours, right(z))
    assert bench.check(row, right, ours, wrong(z))["chaotic"]  # different at last, the same after a few steps
    with pytest.raises(measure.WrongResults):
        bench.check(row, wrong, ours, wrong(z))


def test_table_says_met_and_missed_and_what_is_missing():
    stopped = made_up(stop="median", ideal_gain=2.0, gain=1.7, ratio_b2=None, missing={"b2": "budget"}, ratio_graph=1.01)
    failed, left = [{**made_up(), "error": "it broke"}], [{**made_up(stop="median"), "reason": "no time"}]
    record = a_record(made_up(), stopped, failed=failed, not_run=left)
    text = report.table(record)
    for verdict in (
        "B0 12 >= 10: met", "B2 1 >= 1.1: **missed**", "floor 0.4 >= 0.35: met", "slots 0.947 >= 0.98: **missed**",
        "syncs 0.02 <= 0.0312: met", "gain 1.7 >= 1.8: **missed**", "replays 1.01 >= 1.05: **missed**", "failed: it broke",
        "not run: no time", "b2: budget: dcgan64",
    ):  # fmt: skip
        assert verdict in text, verdict
    assert report.worst(record) is record["rows"][0] and report.worst(a_record()) is None


@pytest.mark.parametrize("path", report.committed(), ids=lambda path: path.stem)
def test_committed_records_are_read_with_their_figures(path):
    raw, record = json.loads(path.read_text()), report.load(path)
    wanted = [entry["extra_info"] for entry in raw["benchmarks"]] if "benchmarks" in raw else raw["rows"]
    assert wanted and all(row.items() >= known.items() for row, known in zip(record["rows"], wanted, strict=True))
    text = report.table(record)
    assert all(f"| {report._number(row['images_per_second'])} |" in text for row in wanted)


def test_another_file_is_refused():
    with pytest.raises(ValueError, match="wanted a record"):
        report.load(ROOT / "benchmarks" / "results" / "production-cpu.json")


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU here" in CliRunner().invoke(command.main, ["run"]).output
    assert "dcgan64" in CliRunner().invoke(command.main, ["run", "--plan"]).output


def test_a_step_that_hangs_is_ended_and_its_output_kept(tmp_path):
    code = "import time; print('began', flush=True); time.sleep(60)"
    assert command.ended([sys.executable, "-c", code], 2, tmp_path / "x.log") == 124
    assert "began" in (tmp_path / "x.log").read_text()


def test_gpu_check_is_given_every_file_with_tests_for_a_gpu():
    make = ["make", "-n", "gpu-check", f"PYTHON={sys.executable}", "CHECKED=x"]
    told = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = ("test_kernels_cuda", "test_kernels_replay", "test_drivers_cuda", "test_while_graph_gpu", "test_workloads_cuda")
    assert all(f"{name}.py" in told for name in files) and "test_engine.py" not in told and "--junitxml=x/check.xml" in told
