"""BoundRows: tell the memory planner how many rows a step has at most, where memory is a GPU's.

Storage is then of constant size: every call finds the buffers of the last one in the pool, nothing
is allocated while a graph is captured, and what a captured graph writes to is never given back.
A CPU needs none of it: its pool is emptied after a prompt.
"""

import tvm
from tvm import relax

from compiler.kernels import in_force
from schedules.targets import GpuTarget

PROMPT = "prefill"  # how functions of a prompt's rows begin
MAX_WANTED = 64  # r: rows of which the logits are wanted
PLANNER_ATTR = "tir_var_upper_bound"  # read by StaticPlanBlockMemory


@tvm.transform.module_pass(opt_level=0, name="BoundRows")
def bound_rows(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    target = in_force().target
    if not isinstance(target, GpuTarget):
        return mod
    changed = mod.clone()
    for name, func in mod.functions_items():
        if isinstance(func, relax.Function):
            is_prompt = name.name_hint.startswith(PROMPT)
            rows = target.prompt_rows if is_prompt else target.step_rows
            changed[name] = func.with_attr(PLANNER_ATTR, {"m": rows, "r": MAX_WANTED})
    return changed
