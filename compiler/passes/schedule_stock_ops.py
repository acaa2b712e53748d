"""ScheduleStockOps: vectorise what TVM's own legalisation and fusion left.

These are the gather of the wanted rows and, in the FP4 and float variants, sums and products of
activations: element-wise over (m, K) with K constant.

    for m in M:
        for k0, k1 in K/L, L:        vectorised over k1

They stay serial: at M = 1 a parallel region costs 8 us (2 cores) and the 2560 elements of a 2B
model's row take under 1 us. A GPU gets TVM's own schedules: a thread an element, a block a sum.
"""

import tvm
from tvm import tirx
from tvm.s_tir import Schedule, dlight
from tvm.tirx import PrimFunc

from compiler.kernels import in_force
from schedules.targets import CpuTarget, GpuTarget


@tvm.transform.module_pass(opt_level=0, name="ScheduleStockOps")
def schedule_stock_ops(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    target, scheduled = in_force().target, mod.clone()
    if isinstance(target, GpuTarget):
        return dlight.ApplyDefaultSchedule(dlight.gpu.GeneralReduction(), dlight.gpu.Fallback())(
            mod
        )
    assert isinstance(target, CpuTarget)
    for name, func in mod.functions_items():
        if isinstance(func, PrimFunc) and not func.attrs.get("tirx.is_scheduled", False):
            scheduled[name] = vectorize(func, target.lanes(32)).with_attr("tirx.is_scheduled", True)
    return scheduled


def vectorize(func: PrimFunc, lanes: int) -> PrimFunc:
    schedule = Schedule(func)
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    if any(schedule.get(block).init is not None for block in blocks):
        return func  # a sum, of ProbeSparsity: a few numbers, outside of what is timed
    # 1. Fuse: what is not stored for others is computed where it is read
    outputs = {schedule.get(block).name_hint for block in schedule.get_output_blocks("root")}
    for block in blocks:
        if schedule.get(block).name_hint not in outputs:
            schedule.compute_inline(block)
    # 2. Vectorise by the widest vector that divides K
    for block in schedule.get_output_blocks("root"):
        loops = schedule.get_loops(block)
        width = dividing_width(schedule.get(loops[-1]).extent, lanes) if loops else 1
        if width > 1:
            _, inner = schedule.split(loops[-1], [None, width])
            schedule.vectorize(inner)
    return schedule.mod["main"]


def dividing_width(extent: tvm.ir.Expr, lanes: int) -> int:
    if not isinstance(extent, tirx.IntImm):
        return 1
    while int(extent) % lanes:
        lanes //= 2
    return lanes
