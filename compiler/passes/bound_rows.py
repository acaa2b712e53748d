"""BoundRows: tell the memory planner how many rows a step has at most, where memory is a GPU's.

Storage is then of constant size: every call finds the buffers of the last one in the pool, nothing
is allocated while a graph is captured, and what a captured graph writes to is never given back.
A CPU needs none of it: its pool is emptied after a prompt.
"""

import tvm
from tvm import relax

from compiler.kernels import in_force
from schedules.targets import GpuTarget

MAX_ROWS = 256  # m: rows of a step; the runtime's chunks of a prompt are no longer
MAX_WANTED = 64  # r: rows of which the logits are wanted
PLANNER_ATTR = "tir_var_upper_bound"  # read by StaticPlanBlockMemory


@tvm.transform.module_pass(opt_level=0, name="BoundRows")
def bound_rows(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    if not isinstance(in_force().target, GpuTarget):
        return mod
    bounds, changed = {"m": MAX_ROWS, "r": MAX_WANTED}, mod.clone()
    for name, func in mod.functions_items():
        if isinstance(func, relax.Function):
            changed[name] = func.with_attr(PLANNER_ATTR, bounds)
    return changed
