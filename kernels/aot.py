"""Compile every specialisation of the step kernels without a GPU: ``python -m fastrefine.kernels.aot [80 90]``.

Finds what the interpreter does not: types and operations that do not compile. Run it without TRITON_INTERPRET.
"""

import sys
import time
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from .launch import BLOCK
from .refine_step import refine_apply, refine_decide, refine_reduce
from .rules import RULES

LANES = 256
LONG = {"sample_id_ptr", "source_ptr", "counters_ptr", "plan_ptr", "seed_ptr"}
INTEGER = {
    "step_ptr", "last_step_ptr", "logit_falls_ptr", "pool_last_step_ptr", "out_steps_ptr", "out_falls_ptr",
    "out_status_ptr",
}  # fmt: skip
DOUBLE = {"norm_ptr", "hyper_ptr"}


def _type(name: str, real: tl.dtype) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    for names, kind in ((LONG, "*i64"), (INTEGER, "*i32"), (DOUBLE, "*fp64")):
        if name in names:
            return kind
    return f"*{real}"


def specialisations() -> Iterator[tuple[str, JITFunction, tl.dtype, dict[str, Any]]]:
    """(label, kernel, state's type, constexpr arguments): every rule, with all options and with none."""
    for real in (tl.float32, tl.float64):
        for clip in (False, True):
            yield f"reduce clip={clip}", refine_reduce, real, {"CLIP": clip, "BLOCK": BLOCK}
        for name, rule in RULES.items():
            for on in (False, True):
                options = {"SCALARS": rule.scalars, "NOISE": on, "CLIP": on, "KEEP_BEST": on}
                decide = {"OBSERVE": rule.observe, "START": rule.start, "REJECTS": rule.rejects, "LOCKSTEP": on}
                decide |= {"EVALUATED": True, "LANES": LANES, **options}
                apply = {"PROPOSE": rule.propose, "VECTORS": rule.vectors, "CLAMP": on, "GRAD": True, "BLOCK": BLOCK}
                apply |= options
                yield f"decide {name} options={on}", refine_decide, real, decide
                yield f"apply {name} options={on}", refine_apply, real, apply
            refill = {**decide, "EVALUATED": False}
            yield f"decide {name} refill", refine_decide, real, refill


def compile_one(kernel: JITFunction, real: tl.dtype, constants: dict[str, Any], capability: int) -> Any:
    """The compiled kernel, with PTX and cubin, for one compute capability (80, 90, ...)."""
    constants = {**constants, "DTYPE": real}
    names = list(kernel.arg_names)
    signature = {n: "constexpr" if n in constants else _type(n, real) for n in names}
    aligned = [n for n in names if n.endswith("_ptr") or n == "features"]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()}, attrs=attrs
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})


def main(capabilities: list[int]) -> None:
    """Compile all and print a line for each; raises at the first that does not compile."""
    for capability in capabilities:
        for label, kernel, real, constants in specialisations():
            began = time.perf_counter()
            compiled = compile_one(kernel, real, constants, capability)
            size = len(compiled.asm["cubin"])
            print(f"sm_{capability} {real} {label}: {size} bytes, {time.perf_counter() - began:.2f} s")


if __name__ == "__main__":
    main([int(c) for c in sys.argv[1:]] or [80, 90])
