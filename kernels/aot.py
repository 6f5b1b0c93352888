"""Compile the Triton kernels without a GPU: ``python -m fastrefine.kernels.aot [80 90] [--jobs N] [--verbose]``.

Finds what the interpreter does not: types and operations that do not compile. Covers every rule, dtype, view and kind
of step that the package launches; options that a rule may or may not have are all on or all off. Run it without
TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from . import philox
from .copy_context import TURN, WORDS, copy_rows
from .refine_step import refine_apply, refine_decide, refine_reduce
from .rules import RULES
from .variants import VIEWS, Variant, warps

LANES = 256  # of refine_decide: 256 slots
CHANNEL_TILE = 32
NAMES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32",
}  # fmt: skip
# What the pointers of the step kernels point to, where it is not the state's type
LONG = {"sample_id_ptr", "source_ptr", "counters_ptr", "plan_ptr", "seed_ptr"}
INTEGER = {
    "step_ptr", "last_step_ptr", "logit_falls_ptr", "pool_last_step_ptr", "out_steps_ptr", "out_falls_ptr",
    "out_status_ptr",
}  # fmt: skip
DOUBLE = {"norm_ptr", "hyper_ptr", "sums_ptr"}
# Options that a rule always or never has; all else may be on or off
_DESCENT = {"noise": False, "latent": False}
_DESCENTS = ("backtracking", "barzilai_borwein", "adaptive", "momentum", "adam", "ladam")
_CHAIN = {"noise": True, "clamp": False, "latent": True}
_DOT = {"noise": False, "clamp": False}
FIXED: dict[str, dict[str, bool]] = {
    "sgd": {"latent": False}, **dict.fromkeys(_DESCENTS, _DESCENT),
    "ddls": {"clamp": False, "latent": True}, "mala": _CHAIN, "pcn": _CHAIN, "hmc": _CHAIN, "dot_adam": _DOT, "dot_sgd": _DOT,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Specialisation:
    """One kernel for one set of argument types and constants."""

    label: str
    kernel: JITFunction
    types: dict[str, torch.dtype]  # of what the pointers point to
    constants: dict[str, Any]
    num_warps: int = 4
    aligned: bool = True  # pointers, and the integers that are specialised, are multiples of 16

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal code."""
        constants = tuple(sorted((name, getattr(value, "__name__", str(value))) for name, value in self.constants.items()))
        types = tuple(sorted((name, str(dtype)) for name, dtype in self.types.items()))
        return self.kernel.__name__, constants, types, self.num_warps, self.aligned

    def compile(self, capability: int) -> Any:
        """The compiled kernel, with PTX and cubin, for one compute capability (80, 90, ...)."""
        names = list(self.kernel.arg_names)
        signature = {name: self._type(name) for name in names}
        specialised = [p.name for p in self.kernel.params if not p.do_not_specialize and p.name not in self.constants]
        attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in specialised} if self.aligned else {}
        constants = {(names.index(n),): value for n, value in self.constants.items()}
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attrs)
        options = {"enable_fp_fusion": False, "num_warps": self.num_warps}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    def _type(self, name: str) -> str:
        if name in self.constants:
            return "constexpr"
        return f"*{NAMES[self.types[name]]}" if name in self.types else "i64" if name == "seed" else "i32"


def _step(
    label: str, kernel: JITFunction, real: torch.dtype, constants: dict[str, Any], view: torch.dtype | None = None, **more: Any
) -> Specialisation:
    types = {name: real for name in kernel.arg_names if name.endswith("_ptr")}
    for names, dtype in ((LONG, torch.int64), (INTEGER, torch.int32), (DOUBLE, torch.float64)):
        types |= dict.fromkeys(names & types.keys(), dtype)
    types |= dict.fromkeys({"grad_ptr", "view_ptr"} & types.keys(), view or real)
    constants = {"DTYPE": philox.real_type(real), **constants}
    if kernel is refine_decide:
        constants["LANES"], more["num_warps"] = LANES, warps(LANES)
    return Specialisation(label, kernel, types, constants, **more)


def _variant(rule: str, on: bool, **more: Any) -> Variant:
    """A rule with all options on or off that it may have or not."""
    options = dict(noise=on, clamp=on, clip=on, keep_best=on, lockstep=on, latent=on)
    return Variant(rule, **{**options, **FIXED[rule]}, **more)


def _steps() -> Iterator[Specialisation]:
    for real, views in VIEWS.items():
        for view in views:
            for clip in (False, True):
                reduce = Variant("sgd", clip=clip).reduce
                yield _step(f"refine_reduce {real}, {view} gradient, clip={clip}", refine_reduce, real, reduce, view)
        for rule in RULES:
            fewer = real == torch.float64 and FIXED[rule].get("latent", True)  # these take the longest
            for on in (True,) if fewer else (False, True):
                yield from _kinds(f"{rule} {real}, options={on}", real, None, _variant(rule, on))
            for view, tile in itertools.product(views, (0, CHANNEL_TILE)):
                # What a view adds does not depend on the rule: one in every dtype and order, the rest in one
                variant = _variant(rule, True, view=True, channel_tile=tile)
                label = f"{rule} {real}, {view} view, tile {tile}"
                if rule == "backtracking" or (view, tile) == (torch.bfloat16, CHANNEL_TILE):
                    yield from _kinds(label, real, view, variant)
                elif rule == "mala":
                    yield _step(f"refine_reduce {label}", refine_reduce, real, variant.reduce, view)
    # What alignment and a constant change: pointers into other tensors, and a sample of one feature
    for rule in ("backtracking", "hmc"):
        all_on = _variant(rule, True, view=True, channel_tile=CHANNEL_TILE)
        for kernel, constants in ((refine_reduce, all_on.reduce), (refine_decide, all_on.decide), (refine_apply, all_on.apply)):
            label = f"{kernel.__name__} {rule} unaligned"
            yield _step(label, kernel, torch.float32, constants, torch.bfloat16, aligned=False)
    for rule in ("sgd", "hmc"):
        all_on = _variant(rule, True)
        for kernel, constants in ((refine_reduce, all_on.reduce), (refine_apply, all_on.apply)):
            label = f"{kernel.__name__} {rule} one feature"
            yield _step(label, kernel, torch.float32, {"features": 1, **constants})


def _kinds(label: str, real: torch.dtype, view: torch.dtype | None, variant: Variant) -> Iterator[Specialisation]:
    """The steps of a run: with a gradient, forward only, refill only."""
    for kind, given in (("", {}), (", forward", {"grad": False}), (", refill", {"grad": False, "evaluated": False})):
        step = Variant(**{**vars(variant), **given})
        if RULES[step.rule].tests and step.evaluated and not step.grad:
            continue  # its last gradient is read
        if step.reduces and RULES[step.rule].terms:
            yield _step(f"refine_reduce {label}{kind}", refine_reduce, real, step.reduce, view)
        yield _step(f"refine_decide {label}{kind}", refine_decide, real, step.decide)
        yield _step(f"refine_apply {label}{kind}", refine_apply, real, step.apply, view)


def _others() -> Iterator[Specialisation]:
    for word in WORDS.values():
        types = {"table_ptr": torch.int64, "source_ptr": torch.int64}
        yield Specialisation(f"copy_rows {word}", copy_rows, types, {"WORD": word, "BLOCK": TURN})


@functools.cache
def specialisations() -> tuple[Specialisation, ...]:
    """All that the package launches, each code once."""
    found: dict[tuple[Any, ...], Specialisation] = {}
    for one in (*_steps(), *_others()):
        found.setdefault(one.key, one)
    return tuple(found.values())


def _compile(index: int, capability: int) -> tuple[float, int, str]:
    """(seconds, bytes of cubin, what went wrong) of one specialisation, in a process of its own."""
    began = time.perf_counter()
    try:
        size = len(specialisations()[index].compile(capability).asm["cubin"])
    except Exception as cause:  # whatever the compiler raises is the finding
        return 0.0, 0, f"{type(cause).__name__}: {cause}"
    return time.perf_counter() - began, size, ""


def main(capabilities: list[int], jobs: int, verbose: bool) -> None:
    """Compile all; SystemExit with the label of the first that does not compile."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("the compiler is off under TRITON_INTERPRET=1: unset it")
    every = specialisations()
    work = [(capability, index) for capability in capabilities for index in range(len(every))]
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as processes:
        pending = [processes.submit(_compile, index, capability) for capability, index in work]
        for (capability, index), result in zip(work, pending, strict=True):
            seconds, size, wrong = result.result()
            if wrong:
                processes.shutdown(wait=False, cancel_futures=True)
                sys.exit(f"sm_{capability} {every[index].label}: {wrong}")
            if verbose:
                print(f"sm_{capability} {every[index].label}: {size} bytes, {seconds:.2f} s", flush=True)
    print(", ".join(f"sm_{capability}: {len(every)} kernels" for capability in capabilities))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m fastrefine.kernels.aot", description="Compile every Triton kernel.")
    parser.add_argument("capabilities", nargs="*", type=int, default=[80, 90], help="80 90")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--verbose", action="store_true", help="a line for each kernel")
    given = parser.parse_args()
    main(given.capabilities, given.jobs, given.verbose)
