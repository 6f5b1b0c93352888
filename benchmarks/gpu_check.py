"""Everything that only a GPU can tell, in one command: ``python -m benchmarks.gpu_check`` (``make gpu-check``).

Steps are processes of their own with a time limit, and none stops the others, a failing build neither. They end in
benchmarks/results/gpu-check-<gpu>.json and .md; exit code 1 when one failed (a skipped one has not: its line says why).
--dry-run goes through them without a GPU, on stand-ins, so that a typing error is not found on rented hardware.

python -m benchmarks.gpu_check                                   within 540 seconds, the most important first
python -m benchmarks.gpu_check --commit SHA --output FOLDER      no .git here, results elsewhere
python -m benchmarks.gpu_check --slow --compile --total 800      what takes minutes too
python -m benchmarks.gpu_check --dry-run --output FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_machine import ROOT, device_name, facts, slug
from benchmarks.gpu_small import SKIPPED

RESULTS = Path(__file__).parent / "results"
TAIL = 4000  # characters of a step's output that are kept
NO_TESTS = 5  # exit code of pytest when nothing was collected
GRACE = 8  # seconds between asking a step to end and ending it
NO_TIME = "no time left"
# what tests import, by the name of the package
MODULES = {
    "tqdm": "tqdm", "click": "click", "safetensors": "safetensors", "scipy": "scipy", "PIL": "pillow", "xdist": "pytest-xdist",
}  # fmt: skip
MARKS = ("mark.cuda", "needs_gpu")  # by which a test file marks tests as cuda
OURS = ("refine_", "follow_")  # what the names of the step's kernels begin with
SANITIZER_REFUSES = ("Device not supported", "Unable to find injection library", "not supported on this", "ERR_NVGPUCTRPERM")


@dataclass
class Step:
    """A command and its limit; ``state`` is "ok", "failed" or "skipped" once it ran."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str | None] = field(default_factory=dict)  # None: without this variable
    output: str | None = None  # name of a file that the command leaves in the folder: JSON, or JUnit's XML
    least: float = 5  # seconds without which it is not begun
    instead: list[str] | None = None  # the command for a tool that does not know an option of the first one
    state: str = "not run"
    seconds: float = 0.0
    tail: str = ""
    found: Any = None

    def skip(self, reason: str) -> None:
        self.state, self.tail = "skipped", reason

    def run(self, folder: Path, left: float) -> None:
        """Run within the smaller of the two limits, GRACE apart; at its end the whole process group is gone."""
        limit, started = min(self.limit, left), time.perf_counter()
        code, text = self._execute(self.command, limit, folder)
        if self.instead and code not in (0, None) and "unrecogni" in text.lower():
            again, text = text, ""
            code, text = self._execute(self.instead, max(limit - (time.perf_counter() - started), 5), folder)
            text = f"{again[-500:]}\n(once more without that option)\n{text}"
        self.seconds = time.perf_counter() - started
        self.tail = text[-TAIL:]
        self.state = "ok" if code == 0 else "skipped" if code == SKIPPED else "failed"
        if code is None:
            whose = "its limit of" if limit == self.limit else "what was left of the total,"
            self.tail += f"\n(ended after {whose} {limit:.0f} s)"
        elif code not in (0, SKIPPED):
            self.tail += f"\n(exit code {code})"
        self._judge(text, code)
        self._collect(folder)

    def _execute(self, command: list[str], limit: float, folder: Path) -> tuple[int | None, str]:
        """(exit code, None for one that was ended; what it printed)."""
        environment = {**os.environ, **{k: v for k, v in self.environment.items() if v is not None}}
        for name in [k for k, v in self.environment.items() if v is None]:
            environment.pop(name, None)
        log = folder / f"{slug(self.name)}.log"
        with log.open("w") as sink:
            process = subprocess.Popen(
                command, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
            )  # fmt: skip
            code: int | None = None
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGINT)  # pytest then says where it was, and writes its JUnit file
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            finally:
                if code is None:
                    with contextlib.suppress(ProcessLookupError):  # what it started may outlive it
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        text = log.read_text(errors="replace")
        log.unlink()
        return code, text

    def _judge(self, text: str, code: int | None) -> None:
        if "pytest" in self.command and code == NO_TESTS:
            self.state = "skipped"
        if self.name.startswith("compute-sanitizer") and code != 0 and any(said in text for said in SANITIZER_REFUSES):
            self.state = "skipped"

    def _collect(self, folder: Path) -> None:
        """What the command left in its file, read and removed."""
        path = folder / self.output if self.output else None
        if path is None or not path.exists():
            return
        try:
            self.found = counts(path) if path.suffix == ".xml" else json.loads(path.read_text())
        except (ElementTree.ParseError, ValueError) as error:  # the command was ended while it wrote
            self.found = {"error": str(error)}
        path.unlink()


def counts(junit: Path) -> dict[str, Any]:
    """Numbers of tests and the names of those that failed."""
    cases = list(ElementTree.parse(junit).getroot().iter("testcase"))

    def named(*kinds: str) -> list[str]:
        return [f"{c.get('classname')}::{c.get('name')}" for c in cases if any(c.find(kind) is not None for kind in kinds)]

    failed, skipped = named("failure", "error"), named("skipped")
    return {"tests": len(cases), "failed": len(failed), "skipped": len(skipped), "names": failed[:40]}


def missing() -> list[str]:
    """Packages that are not here; without them tests fail at import, or run in one process."""
    return [package for module, package in MODULES.items() if importlib.util.find_spec(module) is None]


def planned(folder: Path, gpu: bool, probe: bool = True, slow: bool = False, compiling: bool = False) -> list[Step]:
    """The steps, the most important first; without a GPU their stand-ins. Limits up to the census add up to 470 s."""
    python, device = [sys.executable], "cuda" if gpu else "cpu"
    compiled: dict[str, str | None] = {"TRITON_INTERPRET": None, "FASTREFINE_BACKEND": None}
    exact = {**compiled, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # torch demands it of deterministic algorithms

    def module(name: str, *given: str) -> list[str]:
        return [*python, "-W", "ignore", "-m", f"benchmarks.{name}", "--device", device, *given]

    def tests(output: str, *given: str) -> list[str]:
        # what takes time is Triton's compiler, for each specialisation
        hung = ["-o", "faulthandler_timeout=60"]  # a test that takes longer says where it is
        parallel = ["-n", "8"] if gpu and "pytest-xdist" not in missing() else []
        return [
            *python,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *hung,
            f"--junitxml={folder / output}",
            *parallel,
            *given,
        ]

    alone = "pytest-xdist" in missing()
    collect = [] if gpu else ["--collect-only"]
    marked = [name for name in _existing("tests", "test_*.py") if any(m in (ROOT / name).read_text() for m in MARKS)]
    parity = ["tests/test_refine_step.py", "tests/test_noise.py", *_existing("tests", "test_kernels_*.py")]

    def probing(output: str, limit: int, *given: str) -> list[str]:
        return module("gpu_probe", "--limit", str(limit), "--output", str(folder / output), *given)

    steps = [
        Step("facts", ["nvidia-smi"], 10),
        Step("nvcc", ["nvcc", "--version"], 10),
        Step("doctor", [*python, "-m", "fastrefine", "doctor"], 25),
        Step("build", [*python, "setup.py", "--quiet", "build_ext", "--inplace"], 60, {"FASTREFINE_BUILD": "cuda"}),
        Step("tests marked cuda" + " (in one process: no pytest-xdist)" * alone,
             tests("cuda.xml", "-m", "cuda and not slow", *collect, *marked), 160 if alone else 100, exact, "cuda.xml"),
        Step("drivers", module("gpu_parity", "--limit", "150", "--output", str(folder / "parity.json"),
                               *([] if gpu else ["--models", "mlp2d"])), 170, compiled, "parity.json"),
        Step("compiled kernels", tests("kernels.xml", "-m", "not slow and not cuda", *collect, *parity), 70, compiled,
             "kernels.xml"),  # without those that the step before ran, and those that compile without a GPU
        Step("census", [*python, "-W", "ignore", "-m", "benchmarks.gpu_small", "--census"], 25, compiled),
        *(sanitizer(tool, "host", module, compiled) for tool in ("memcheck", "racecheck")),
    ]  # fmt: skip
    if probe:
        steps.append(Step("probe", probing("probe.json", 60), 80, compiled, "probe.json", 20))
    steps += [sanitizer(tool, "graph", module, compiled) for tool in ("memcheck", "racecheck")]
    if slow:
        command = tests("slow.xml", "-m", "cuda and slow", *collect, *marked)
        steps.append(Step("slow tests marked cuda", command, 150, exact, "slow.xml"))
    if compiling:
        steps.append(Step("probe, compiled", probing("compiled.json", 200, "--compile"), 240, compiled, "compiled.json", 20))
    return steps


def sanitizer(tool: str, driver: str, module: Callable[..., list[str]], environment: dict[str, str | None]) -> Step:
    """A step of compute-sanitizer on our kernels alone: a few of PyTorch's take it minutes, and are not ours to mend."""
    options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    if tool == "memcheck":  # torch asks the driver for what may fail, and goes on
        options += ["--report-api-errors", "no"]
    names = [word for name in OURS for word in ("--kernel-name", f"kns={name}")]  # kns: part of the name
    small = module("gpu_small", "--driver", driver)
    # torch's allocator keeps freed memory: without it an access beyond a tensor's end is seen
    own = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1" if driver == "host" else None}
    command, every = (["compute-sanitizer", *options, *some, *small] for some in (names, []))
    return Step(f"compute-sanitizer {tool}, {driver}", command, 120, own, least=20, instead=every)


def _existing(folder: str, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern))


def execute(steps: Sequence[Step], folder: Path, gpu: bool, total: float, write: Callable[[], None]) -> None:
    """Run the steps in order, ``write`` after each; what cannot run here, or has no time left, is skipped and says so."""
    deadline = time.perf_counter() + total
    for step in steps:
        left = deadline - time.perf_counter()
        built = all(importlib.util.find_spec(f"fastrefine.{name}") for name in ("_native", "_device_loop"))
        if step.name == "build" and (built or not gpu):
            step.skip("both extensions are there" if built else "no GPU: what is there is used")
        elif shutil.which(step.command[0]) is None:
            step.skip(f"{step.command[0]} is not here")
        elif not gpu and step.command[0] in ("nvidia-smi", "compute-sanitizer"):
            step.skip("no GPU")
        elif left < step.least:
            step.skip(NO_TIME)
        else:
            print(f"{step.name} ...", end=" ", file=sys.stderr, flush=True)
            step.run(folder, left)
            print(f"{step.state}, {step.seconds:.0f} s", file=sys.stderr, flush=True)
        write()


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    machine = report["machine"]
    lines = [
        f"# GPU check: {machine['gpu']}", "",
        ", ".join(f"{name} {value}" for name, value in machine.items() if name != "gpu"), "",
        "| step | state | seconds | found |", "|---|---|---|---|",
    ]  # fmt: skip
    for step in report["steps"]:
        found = step["found"] if isinstance(step["found"], dict) and "tests" in step["found"] else {}
        told = f"{found['tests']} tests, {found['failed']} failed, {found['skipped']} skipped" if found else ""
        state = step["state"] if step["state"] != "failed" else "**failed**"
        if state == "skipped":
            state += f": {(step['tail'].strip().splitlines() or ['no reason'])[-1]}"
        lines.append(f"| {step['name']} | {state} | {step['seconds']:.0f} | {told} |")
    for step in report["steps"]:
        lines += ["", f"## {step['name']}: {step['state']}", "", "```", step["tail"].strip(), "```"]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, on stand-ins")
    parser.add_argument("--no-probe", action="store_true", help="without the timings")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="only steps whose name holds one of these words")
    parser.add_argument("--slow", action="store_true", help="also, at last, the tests marked cuda and slow (150 s)")
    parser.add_argument("--compile", action="store_true", help="also, at last, the step with compile=True (240 s)")
    parser.add_argument("--total", type=float, default=540, help="seconds for everything (default 540); then steps are skipped")
    parser.add_argument("--commit", metavar="SHA", help="what the report names as commit: needed where the files have no .git")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="of the report (default benchmarks/results; of a dry run build)"
    )
    given = parser.parse_args(arguments)
    gpu = torch.cuda.is_available() and not given.dry_run
    if not gpu and not given.dry_run:
        parser.error("no GPU here; --dry-run goes through the steps on stand-ins")
    device = torch.device("cuda" if gpu else "cpu")
    folder = (given.output or (RESULTS if gpu else ROOT / "build")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    steps = planned(folder, gpu, not given.no_probe, given.slow, given.compile)
    steps = [step for step in steps if not given.only or any(word in step.name for word in given.only)]
    absent = ", ".join(missing()) or "none"
    print(f"Missing packages: {absent}", file=sys.stderr)
    machine = {**facts(device, given.commit), "missing packages": absent}
    name = f"gpu-check-{slug(device_name(device))}" if gpu else "gpu-check-dry-run"

    def write() -> None:  # after every step: what is cut short loses nothing
        report = {"kind": "fastrefine gpu_check", "dry_run": not gpu, "machine": machine, "steps": [asdict(s) for s in steps]}
        (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        (folder / f"{name}.md").write_text(markdown(report))

    execute(steps, folder, gpu, given.total, write)
    for step in steps:
        print(f"{step.state:8} {step.name}" + (f": {step.tail.strip().splitlines()[-1]}" if step.tail.strip() else ""))
    print(f"Written: {folder / name}.json and .md")
    return 1 if any(step.state == "failed" for step in steps) else 0


if __name__ == "__main__":
    sys.exit(main())
