"""The GPU commands without a GPU: plans, stand-ins, what they write when a row fails or time runs out, table and plot."""

import json
import math
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_bench, gpu_check, gpu_machine, gpu_parity, gpu_probe, gpu_rows, gpu_sides, gpu_table
from benchmarks.gpu_bench import Recorder, run_rows
from benchmarks.gpu_check import Step
from benchmarks.gpu_rows import Budget, Row
from fastrefine.networks.target import Target

# what DESIGN promises of a row
KEYS = [
    "workload",
    "at",
    "sampler",
    "precision",
    "driver",
    "stop",
    "num_slots",
    "images_per_second",
    "ratio_b0",
    "ratio_b1",
    "ratio_b2",
    "floor_fraction",
    "slot_efficiency",
    "greedy_bound",
    "mean_steps",
    "host_syncs_per_step",
    "peak_memory_mb",
    "commit",
    "torch",
    "triton",
    "cuda",
    "gpu",
    "command",
]


def row(workload="mlp2d", precision="float32", stop="none", driver="host"):
    return Row(workload, "first", "collaborative", precision, driver, stop)


def made_up(stop="none", **facts):
    """A row of invented figures."""
    own = {"workload": "dcgan64", "at": "first", "sampler": "collaborative", "precision": "bfloat16", "driver": "graph"}
    own |= dict.fromkeys(("commit", "torch", "triton", "cuda", "gpu", "command"), "made up")
    own |= {"stop": stop, "num_slots": 512, "images_per_second": 1e3, "ratio_b0": 12.0, "ratio_b1": 2.0, "ratio_b2": 1.0}
    own |= {"floor_fraction": 0.4, "slot_efficiency": 0.9, "greedy_bound": 0.95, "mean_steps": 50.0, "K": 50}
    return own | {"host_syncs_per_step": 0.02, "peak_memory_mb": 100.0, "missing": {}, **facts}


def results_of(*rows):
    machine = dict.fromkeys(("commit", "torch", "triton", "cuda", "gpu"), "made up")
    return {
        "machine": machine, "command": "made up", "datetime": "2000-01-01T00:00:00", "stand_in": False, "rows": list(rows),
        "peaks": {"bfloat16": {"flops_per_second": 1e12, "size": 1}}, "failed": [], "not_run": [],
    }  # fmt: skip


class Clock:
    """A clock that only moves when told."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """The command's own file of two rows, measured on a CPU."""
    path = tmp_path_factory.mktemp("results") / "cpu.json"
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    given = ["--device", "cpu", "--workloads", "mlp2d", "--precisions", "float32", "--stops", "none", "median"]
    code = gpu_bench.main([*given, "--output", str(path)])
    torch.backends.cudnn.benchmark = benchmark
    assert torch.get_num_threads() == threads
    return code, gpu_table.load(path)


def test_stand_in_measures_every_row_with_all_keys(stand_in):
    code, results = stand_in
    assert code == 0 and results["failed"] == results["not_run"] == [] and results["stand_in"]
    assert [r["stop"] for r in results["rows"]] == ["none", "median"]
    for found in results["rows"]:
        assert set(KEYS) <= set(found)
        assert found["images_per_second"] > 0 and found["ratio_b1"] > 0 and found["ratio_b0"] > 0
        assert found["ratio_b2"] is None and found["missing"]["b2"]
        assert found["checks"]["b1"]["steps_equal"] == 1 and found["checks"]["b1"]["deviation_median"] < 1e-3


def test_stop_is_reached_by_some_and_its_gain_comes_from_the_same_run(stand_in):
    fixed, stopped = stand_in[1]["rows"]
    assert fixed["mean_steps"] == fixed["K"] and 0 < stopped["mean_steps"] < stopped["K"]
    assert stopped["gain"] == pytest.approx(stopped["images_per_second"] / fixed["images_per_second"])


def test_table_of_a_stand_in_judges_nothing(stand_in):
    text = gpu_table.table(stand_in[1])
    assert "stand-in" in text and "met" not in text.partition("| workload")[2] and "missed" not in text


def test_plan_lists_rows_in_order_without_a_gpu(capsys):
    assert gpu_bench.main(["--dry-run", "--workloads", "mlp2d", "dcgan16", "--precisions", "bfloat16", "float32"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "| first |" in line]
    assert len(lines) == 8
    ranks = [("bfloat16" in line, "none" in line) for line in lines if "mlp2d" in line]
    assert ranks == [(True, True), (True, False), (False, True), (False, False)]


def test_without_a_gpu_the_commands_say_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        gpu_bench.main(["--workloads", "mlp2d"])
    with pytest.raises(SystemExit):
        gpu_check.main([])


def test_rows_that_do_not_fit_the_budget_are_listed(tmp_path):
    clock = Clock()
    rows = [row(), row("dcgan16"), row(stop="median")]
    budget = Budget(2.5 * gpu_rows.expected_seconds(rows[0], 3), clock)

    def measure(one):
        clock.now += 2 * gpu_rows.expected_seconds(one, 3)
        return {**one.facts(), "images_per_second": 1.0, "floor_fraction": 0.0, "row_seconds": 1.0}

    recorder = Recorder(tmp_path / "x.json", {"rows": [], "failed": []})
    run_rows(rows, measure, budget, recorder, 3)
    written = gpu_table.load(recorder.path)
    assert [r["workload"] for r in written["rows"]] == ["mlp2d"]
    assert [(r["workload"], r["stop"]) for r in written["not_run"]] == [("dcgan16", "none"), ("mlp2d", "median")]
    assert all("budget" in r["reason"] for r in written["not_run"])


def test_a_failing_row_is_recorded_and_the_next_one_runs(tmp_path):
    def measure(one):
        if one.precision == "tf32":
            raise RuntimeError("no such kernel")
        return {**one.facts(), "images_per_second": 1.0, "floor_fraction": 0.0, "row_seconds": 1.0}

    recorder = Recorder(tmp_path / "x.json", {"rows": [], "failed": []})
    run_rows([row(precision="tf32"), row()], measure, Budget(1e6, Clock()), recorder, 3)
    written = gpu_table.load(recorder.path)
    assert [r["error"] for r in written["failed"]] == ["RuntimeError: no such kernel"] and len(written["rows"]) == 1


def test_a_lost_device_ends_the_run_with_the_rest_listed(tmp_path):
    def fail(*_):
        raise RuntimeError("illegal memory access")

    recorder = Recorder(tmp_path / "x.json", {"rows": [], "failed": []})
    run_rows([row(), row(stop="median")], fail, Budget(1e6, Clock()), recorder, 3, alive=fail)
    written = gpu_table.load(recorder.path)
    assert len(written["failed"]) == 1 and "device" in written["not_run"][0]["reason"]


def test_compilation_may_take_half_of_the_budget():
    clock = Clock()
    budget = Budget(200, clock)
    assert budget.may_compile() and not budget.may_compile(160)  # the row itself needs the rest
    with budget.compilation():
        clock.now += 60
    assert not budget.may_compile()  # another 60 s would make 120


def test_work_is_counted_from_the_networks():
    own = gpu_rows.work("dcgan16", "first")
    assert own.evaluation == 2 * own.forward and 2.9 * own.forward < own.peers < 3.1 * own.forward
    assert gpu_rows.work("dcgan16", "output").forward < own.forward


class Wrong(gpu_sides.ExpertLoop):
    """Moves images twice as far from where they started."""

    def __call__(self, latents, **stop):
        found = super().__call__(latents, **stop)
        return found._replace(images=2 * found.images - self.tail(self.prefix(latents)).detach())


def test_wrong_results_are_noticed_and_chaos_is_not_called_wrong():
    bench = gpu_sides.Bench(torch.device("cpu"), Budget(100, Clock()), gpu_sides.Scale.stand_in())
    one = row()
    z, start = bench.latents(one, 8), bench.start(one, 8)
    ours, right, wrong = bench.refiner(one).refine(z), bench.loop(gpu_sides.ExpertLoop, one, 8), bench.loop(Wrong, one, 8)
    assert "chaotic" not in bench.check(one, right, ours, right(z), start)
    assert bench.check(one, right, ours, wrong(z), start)["chaotic"]  # different at last, the same after a few steps
    with pytest.raises(gpu_sides.WrongResults):
        bench.check(one, wrong, ours, wrong(z), start)


def test_table_says_met_and_missed_and_what_is_missing():
    failed = {**made_up(), "error": "it broke"}
    results = results_of(made_up(), made_up("median", ideal_gain=2.0, gain=1.7, ratio_b2=None, missing={"b2": "budget"}))
    results["failed"], results["not_run"] = [failed], [{**made_up("median"), "reason": "budget"}]
    text = gpu_table.table(results)
    for verdict in (
        "B0 12 >= 10: met", "B2 1 >= 1.1: **missed**", "floor 0.4 >= 0.35: met", "slots 0.947 >= 0.98: **missed**",
        "syncs 0.02 <= 0.0312: met", "gain 1.7 >= 1.8: **missed**", "failed: it broke", "not run: budget",
    ):  # fmt: skip
        assert verdict in text, verdict


def test_plot_is_drawn_from_a_file(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    source, target = tmp_path / "made-up.json", tmp_path / "plot.svg"
    gpu_table.save(source, results_of(made_up(), made_up("median", ratio_b2=None)))
    assert gpu_bench.main(["--table", str(source), "--plot", str(target)]) == 0
    assert "<svg" in target.read_text() and "| dcgan64 |" in capsys.readouterr().out


def test_check_goes_through_its_steps_without_a_gpu(tmp_path, capsys):
    code = gpu_check.main(["--dry-run", "--only", "build", "census", "sanitizer", "--output", str(tmp_path)])
    report = json.loads((tmp_path / "gpu-check-dry-run.json").read_text())
    assert code == 0 and {step["state"] for step in report["steps"]} == {"skipped"}
    assert "## census: skipped" in (tmp_path / "gpu-check-dry-run.md").read_text()


def test_every_planned_command_exists():
    for gpu in (True, False):
        for step in gpu_check.planned(Path("/folder"), gpu, slow=True, compiling=True):
            if "-m" in step.command and "benchmarks." in step.command[step.command.index("-m") + 1]:
                module = step.command[step.command.index("-m") + 1]
                assert (gpu_machine.ROOT / (module.replace(".", "/") + ".py")).exists()
            assert all((gpu_machine.ROOT / word).exists() for word in step.command if word.startswith("tests/"))


def python(code):
    return [sys.executable, "-c", code]


def test_a_step_that_hangs_is_ended_and_failed(tmp_path):
    step = Step("slow", python("import time; print('began', flush=True); time.sleep(60)"), 2)
    step.run(tmp_path, 100)
    assert step.state == "failed" and "began" in step.tail and "limit" in step.tail and step.seconds < 20


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler], ids=["background", "foreground"])
def test_a_pytest_step_that_hangs_leaves_its_junit_file(tmp_path, monkeypatch, handler):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # it must have begun when its time is over
    (tmp_path / "test_it.py").write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={tmp_path / 'x.xml'}"]
    step = Step("tests", [*command, "--rootdir", str(tmp_path), str(tmp_path / "test_it.py")], 6, output="x.xml")
    before = signal.signal(signal.SIGINT, handler)
    try:
        step.run(tmp_path, 100)
    finally:
        signal.signal(signal.SIGINT, before)
    assert step.state == "failed" and step.found["tests"] >= 1 and "test_it.py:3" in step.tail


def test_steps_without_time_are_skipped_and_listed(tmp_path):
    steps = [Step("one", python("pass"), 20), Step("two", python("pass"), 20, least=1e6)]
    gpu_check.execute(steps, tmp_path, False, 100, lambda: None)
    assert [step.state for step in steps] == ["ok", "skipped"]
    text = gpu_check.markdown({"machine": {"gpu": "none"}, "steps": [vars(step) for step in steps]})
    assert "| two | skipped: no time left |" in text


def test_a_tool_that_does_not_know_an_option_runs_without_it(tmp_path):
    refuses = python("print(\"unrecognised option '--kernel-name'\"); raise SystemExit(1)")
    step = Step("compute-sanitizer memcheck, host", refuses, 20, instead=python("print('all of it')"))
    step.run(tmp_path, 100)
    assert step.state == "ok" and "all of it" in step.tail and "--kernel-name" in step.tail


def test_probe_writes_after_each_part():
    written = []
    gpu_probe.run("cpu", -1.0, lambda found: written.append(json.dumps(found)))
    assert len(written) == 2 and "copies" in written[0] and "not reached" in written[1]


def test_a_step_reports_how_it_ended_and_what_it_left(tmp_path):
    junit = '<testsuite><testcase name="a"/><testcase name="b"><failure/></testcase></testsuite>'
    write = f"open({str(tmp_path / 'x.xml')!r}, 'w').write('{junit}'); raise SystemExit(1)"
    failed, skipped = Step("tests", python(write), 20, output="x.xml"), Step("cannot", python("raise SystemExit(77)"), 20)
    for step in (failed, skipped):
        step.run(tmp_path, 100)
    assert (failed.state, skipped.state) == ("failed", "skipped")
    assert failed.found == {"tests": 2, "failed": 1, "skipped": 0, "names": ["None::b"]}
    refused = Step("compute-sanitizer memcheck, host", python("print('Device not supported'); raise SystemExit(1)"), 20)
    refused.run(tmp_path, 100)
    assert refused.state == "skipped" and list(tmp_path.iterdir()) == []


def test_the_cuda_step_names_the_files_and_what_is_missing_is_told_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpu_check.MODULES, "no_such_module", "no-such-package")
    assert gpu_check.main(["--dry-run", "--only", "build", "--output", str(tmp_path)]) == 0
    told = capsys.readouterr().err
    assert told.startswith("Missing packages:") and "no-such-package" in told
    step = next(s for s in gpu_check.planned(Path("/folder"), True) if s.name.startswith("tests marked cuda"))
    files = {word for word in step.command if word.startswith("tests")}
    assert {"tests/test_drivers_cuda.py", "tests/test_kernels_cuda.py", "tests/test_while_graph_gpu.py"} <= files
    assert "tests/test_engine.py" not in files
    monkeypatch.setattr(gpu_check, "missing", lambda: ["pytest-xdist"])
    alone = next(s for s in gpu_check.planned(Path("/folder"), True) if s.name.startswith("tests marked cuda"))
    assert "no pytest-xdist" in alone.name and alone.limit > step.limit and "-n" not in alone.command


def test_parity_demands_bits_under_deterministic_algorithms_and_else_reports_them():
    case = gpu_parity.Case("mlp2d", "cpu", "float32")
    line, wanted = {"check": "drivers"}, case.run("host")
    assert gpu_parity.compare(line, lambda: case.run("host"), wanted, True)["ok"]
    moved = replace(wanted, logits=wanted.logits + 1e-6)
    assert not gpu_parity.compare(line, lambda: moved, wanted, True)["ok"]
    assert gpu_parity.compare(line, lambda: moved, wanted, False)["ok"]
    broken = gpu_parity.compare(line, lambda: wanted, RuntimeError("no loop"), False)
    assert not broken["ok"] and broken["error"] == "RuntimeError: no loop"


def test_parity_prepares_a_model_once_for_each_kind_of_algorithms(monkeypatch):
    prepared, original = [], Target.prepare
    monkeypatch.setattr(Target, "prepare", lambda self, *given: (prepared.append(self), original(self, *given)))
    checks = gpu_parity.Checks("cpu", ["host"])
    lines = checks.bits("mlp2d", "float32")
    assert len(lines) == 9 and all(line["ok"] for line in lines) and len(prepared) == 2
    case = checks.case("mlp2d", "cpu", "float32")
    stopped = case.run("host", stop=checks.threshold("mlp2d"))
    assert 0 < stopped.steps.double().mean() < gpu_parity.STEPS == case.run("host").steps.min()
    assert len(prepared) == 2
    assert checks.against_float64("mlp2d", "float32")["ok"] and len(prepared) == 4  # the two of the CPU


def test_parity_gives_every_model_its_first_precision_first_and_skips_what_time_does_not_reach(monkeypatch):
    seen = []
    monkeypatch.setattr(gpu_parity.Checks, "bits", lambda self, *given: seen.append(given) or [])
    monkeypatch.setattr(gpu_parity.Checks, "against_float64", lambda self, *given: {"check": "float64", "ok": True})
    gpu_parity.check("cpu", ["a", "b"], ["host"], ["float32", "tf32"], math.inf, lambda lines: None)
    assert seen == [("a", "float32"), ("b", "float32"), ("a", "tf32"), ("b", "tf32")]
    late = gpu_parity.check("cpu", ["a"], ["host"], ["float32"], -math.inf, lambda lines: None)
    assert [line["ok"] for line in late] == [True] and "skipped: time is up" in gpu_parity.table(late)
    assert "SKIPPED, for time was up: a float32" in gpu_parity.summary(late)
