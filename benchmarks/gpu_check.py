"""Everything that only a GPU can tell, in one command: ``python -m benchmarks.gpu_check`` (``make gpu-check``).

Steps are processes of their own with a time limit, and none stops the others. They end in
benchmarks/results/gpu-check-<gpu>.json and .md; exit code 1 when one failed (a skipped one has not). --dry-run goes through
them without a GPU, on stand-ins, so that a typing error is not found on rented hardware.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
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
SANITIZER_REFUSES = ("Device not supported", "Unable to find injection library", "not supported on this", "ERR_NVGPUCTRPERM")


@dataclass
class Step:
    """A command and its limit; ``state`` is "ok", "failed" or "skipped" once it ran."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str | None] = field(default_factory=dict)  # None: without this variable
    output: str | None = None  # name of a file that the command leaves in the folder: JSON, or JUnit's XML
    state: str = "not run"
    seconds: float = 0.0
    tail: str = ""
    found: Any = None

    def skip(self, reason: str) -> None:
        self.state, self.tail = "skipped", reason

    def run(self, folder: Path, left: float) -> None:
        """Run within the smaller of the two limits; at its end the whole process group is gone."""
        limit, started = min(self.limit, left), time.perf_counter()
        environment = {**os.environ, **{k: v for k, v in self.environment.items() if v is not None}}
        for name in [k for k, v in self.environment.items() if v is None]:
            environment.pop(name, None)
        log = folder / f"{slug(self.name)}.log"
        with log.open("w") as sink:
            process = subprocess.Popen(
                self.command, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        self.seconds = time.perf_counter() - started
        text = log.read_text(errors="replace")
        log.unlink()
        self.tail = text[-TAIL:]
        self.state = "ok" if code == 0 else "skipped" if code == SKIPPED else "failed"
        if code is None:
            self.tail += f"\n(ended after its limit of {limit:.0f} s)"
        elif code not in (0, SKIPPED):
            self.tail += f"\n(exit code {code})"
        self._judge(text, code)
        self._collect(folder)

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


def planned(folder: Path, gpu: bool, probe: bool) -> list[Step]:
    """The steps in order; without a GPU their stand-ins."""
    python, device = [sys.executable], "cuda" if gpu else "cpu"
    compiled: dict[str, str | None] = {"TRITON_INTERPRET": None, "FASTREFINE_BACKEND": None}

    def module(name: str, *given: str) -> list[str]:
        return [*python, "-W", "ignore", "-m", f"benchmarks.{name}", "--device", device, *given]

    def tests(output: str, *given: str) -> list[str]:
        # what takes time is Triton's compiler, for each specialisation
        parallel = ["-n", "8"] if gpu and importlib.util.find_spec("xdist") else []
        return [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={folder / output}", *parallel, *given]

    collect = [] if gpu else ["--collect-only"]
    parity = ["tests/test_refine_step.py", "tests/test_noise.py", *_existing("tests", "test_kernels_*.py")]
    steps = [
        Step("facts", ["nvidia-smi"], 30),
        Step("nvcc", ["nvcc", "--version"], 30),
        Step("doctor", [*python, "-m", "fastrefine", "doctor"], 60),
        Step("build", [*python, "setup.py", "--quiet", "build_ext", "--inplace"], 180, {"FASTREFINE_BUILD": "cuda"}),
        Step("tests marked cuda", tests("cuda.xml", "-m", "cuda", *collect, "tests"), 150, compiled, "cuda.xml"),
        Step("drivers", module("gpu_parity", "--limit", "120", "--output", str(folder / "parity.json"),
                               *([] if gpu else ["--models", "mlp2d"])), 150, compiled, "parity.json"),
        Step("compiled kernels", tests("kernels.xml", *collect, *parity), 180, compiled, "kernels.xml"),
        Step("census", [*python, "-W", "ignore", "-m", "benchmarks.gpu_small", "--census"], 60, compiled),
    ]  # fmt: skip
    if probe:
        limit = ["--limit", "75", "--output", str(folder / "probe.json")]
        steps.append(Step("probe", module("gpu_probe", *limit), 110, compiled, "probe.json"))
    for tool, driver in itertools.product(("memcheck", "racecheck"), ("host", "graph")):
        options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        small = module("gpu_small", "--driver", driver)
        # torch's allocator keeps freed memory: without it an access beyond a tensor's end is seen
        own = {**compiled, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1" if driver == "host" else None}
        steps.append(Step(f"compute-sanitizer {tool}, {driver}", ["compute-sanitizer", *options, *small], 75, own))
    return steps


def _existing(folder: str, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern))


def execute(steps: Sequence[Step], folder: Path, gpu: bool, total: float, write: Callable[[], None]) -> None:
    """Run the steps in order, ``write`` after each; what cannot run here, or has no time left, says so."""
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
        elif left < 5:
            step.state, step.tail = "failed", "not run: no time left"
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
    parser.add_argument("--total", type=float, default=510, help="seconds for everything (default 510)")
    parser.add_argument("--commit", help="where the files are no git checkout")
    parser.add_argument("--output", type=Path, help="folder of the report (default benchmarks/results; of a dry run build)")
    given = parser.parse_args(arguments)
    gpu = torch.cuda.is_available() and not given.dry_run
    if not gpu and not given.dry_run:
        parser.error("no GPU here; --dry-run goes through the steps on stand-ins")
    device = torch.device("cuda" if gpu else "cpu")
    folder = (given.output or (RESULTS if gpu else ROOT / "build")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    steps = planned(folder, gpu, not given.no_probe)
    steps = [step for step in steps if not given.only or any(word in step.name for word in given.only)]
    machine = facts(device, given.commit)
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
