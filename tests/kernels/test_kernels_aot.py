"""The kernels compile for GPUs without one, and what is compiled is what the package launches."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastrefine import ops
from fastrefine.ops import slots
from fastrefine.samplers import DOT, Evaluation
from tests.support.step_machine import SAMPLERS, Recorder, bound, device_of

ROOT = Path(__file__).parents[2]


def without_interpreter(*args):
    """Standard output of a fresh Python in which the compiler is on."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


SAMPLE = """
import json
from fastrefine.kernels.aot import specialisations
wanted = json.loads({!r})
for one in specialisations():
    if one.label in wanted:
        assert len(one.compile(80).asm["cubin"]) > 1000
        print(one.label)
"""


def test_a_sample_of_the_kernels_compiles():
    """``make kernels-check`` compiles all of them."""
    labels = [
        "refine_reduce torch.float32, torch.bfloat16 gradient, clip=True",
        "refine_reduce mala torch.float32, torch.bfloat16 view, tile 32",
        "refine_decide hmc torch.float32, options=True",
        "refine_decide backtracking torch.float32, options=True",
        "refine_apply backtracking torch.float32, torch.bfloat16 view, tile 32",
        "copy_rows uint8",
    ]
    assert sorted(without_interpreter("-c", SAMPLE.format(json.dumps(labels))).split("\n")[:-1]) == sorted(labels)


def specialisations():
    return pytest.importorskip("fastrefine.kernels.aot").specialisations()


def test_every_kernel_and_rule_is_compiled():
    kernels = set()
    for path in Path(pytest.importorskip("fastrefine.kernels.aot").__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.decorator_list and not node.name.startswith("_"):
                jit = "triton.jit" in ast.unparse(node.decorator_list[0])
                if jit and any(argument.arg.endswith("_ptr") for argument in node.args.args):
                    kernels.add(node.name)
    every = specialisations()
    assert len(every) > 100
    assert {one.kernel.__name__ for one in every} == kernels
    rules = pytest.importorskip("fastrefine.kernels.rules").RULES
    for part in ("propose", "observe", "start", "sums", "pace"):
        compiled = {one.constants.get(part.upper()) for one in every}
        assert {getattr(rule, part) for rule in rules.values()} <= compiled
    applied = [one.constants for one in every if one.kernel.__name__ == "refine_apply"]
    fixed = pytest.importorskip("fastrefine.kernels.aot").FIXED
    for option in ("NOISE", "CLAMP", "CLIP", "KEEP_BEST", "LATENT"):
        wanted = {(r.propose, on) for name, r in rules.items() for on in (0, 1) if fixed[name].get(option.lower(), on) == on}
        assert {(c["PROPOSE"], c[option]) for c in applied if c["GRAD"]} == wanted


def code(name, constants, types):
    """What selects the code besides options, which are compiled all on and all off."""
    options = ("NOISE", "CLAMP", "CLIP", "KEEP_BEST", "LOCKSTEP", "LATENT", "LANES", "num_warps", "enable_fp_fusion")
    chosen = {k: getattr(v, "__name__", str(v)) for k, v in constants.items() if k not in options}
    if "CHANNEL_TILE" in chosen:
        chosen["CHANNEL_TILE"] = chosen["CHANNEL_TILE"] != "0"
    return name, tuple(sorted(chosen.items())), tuple(sorted((k, str(v)) for k, v in types.items()))


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize(
    ("real", "view", "channels"),
    [(torch.float32, None, 0), (torch.float64, None, 0), (torch.float32, torch.bfloat16, 4)],
    ids=str,
)
def test_what_is_launched_is_compiled(real, view, channels, on, monkeypatch):
    launched, device = set(), device_of("triton")
    launch = pytest.importorskip("fastrefine.kernels.launch")
    fixed = pytest.importorskip("fastrefine.kernels.aot").FIXED

    class Noted(Recorder):
        def __getitem__(self, grid):
            def launch(*args, **constants):
                types = {n: a.dtype for n, a in zip(self.kernel.arg_names, args, strict=False) if n.endswith("_ptr")}
                launched.add(code(self.kernel.__name__, constants, types))

            return launch

    for name in ("refine_reduce", "refine_decide", "refine_apply"):
        monkeypatch.setattr(launch, name, Noted(getattr(launch, name), None))
    for sampler in SAMPLERS.values():
        sampler = bound(sampler, 8, real, device) if on or not isinstance(sampler, DOT) else sampler
        clamped = replace(sampler, clamp=(0.0, 1.0)) if on and hasattr(sampler, "clamp") else sampler
        kernel = clamped.kernel()
        options = {"noise": kernel.noise, "clamp": kernel.clamp is not None, "latent": kernel.latent is not None}
        assert options | fixed[kernel.rule] == options, kernel
        rule = slots.Rule(clamped, 0, on, on, 1.0 if on else None)
        own, pool, outputs = slots.allocate(2, 8, 3, 3, rule, real, torch.device(device), None, view, channels)
        grad = torch.zeros(2, 8, dtype=view or real, device=device)
        for evaluation in (
            None,
            Evaluation(own.threshold, own.threshold, grad),
            Evaluation(own.threshold, own.threshold, None),
        ):
            if evaluation is None or evaluation.grad is not None or not sampler.traits.needs_last_gradient:
                ops.refine_step(own, evaluation, pool, outputs, rule, backend="triton")
    compiled = {code(one.kernel.__name__, one.constants, one.types) for one in specialisations() if one.aligned}
    assert launched and not launched - compiled, launched - compiled
