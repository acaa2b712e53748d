"""LaunchEarly: on Hopper and later, a kernel is launched while the one before it still runs.

    for blocks, threads:                 for blocks, threads:
        body                                 griddepcontrol.wait     unless the kernel has its own
                                             body

A step is some 180 small launches in a chain. With the attribute of programmatic dependent launch
the blocks of the next kernel take their places, and load what does not depend on the step, before
the last one has ended; `wait` returns once it has, with all that it wrote. A captured graph keeps
these edges.

Measured (H100, decode of 2B-4T shapes at position 512): letting the next launch start at the head
of every kernel made no difference (1.191 ms a step against 1.188).
"""

from typing import Any

import tvm
from tvm.s_tir.stmt import SBlock, SBlockRealize
from tvm.script import tirx as T
from tvm.tirx import AttrStmt, Evaluate, For, IfThenElse, PrimFunc, SeqStmt

from compiler.kernels import in_force
from schedules.intrin.cuda import WAIT, WAITS_ITSELF
from schedules.targets import GpuTarget

LAUNCH_PARAMS = "tirx.kernel_launch_params"
EARLY = "tirx.use_programtic_dependent_launch"  # so spelt


@tvm.transform.module_pass(opt_level=0, name="LaunchEarly")
def launch_early(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    target = in_force().target
    if not isinstance(target, GpuTarget) or not target.can_launch_early:
        return mod
    changed = mod.clone()
    for name, func in mod.functions_items():
        if isinstance(func, PrimFunc):
            if not func.attrs.get(WAITS_ITSELF, False):
                func = func.with_body(add_waits(func.body))
            changed[name] = func.with_attr(LAUNCH_PARAMS, [EARLY])
    return changed


def add_waits(stmt: Any) -> Any:
    """The host's part of a PrimFunc, every launch of which waits first."""
    if isinstance(stmt, SBlockRealize):
        old = stmt.block
        block = SBlock(
            old.iter_vars,
            old.reads,
            old.writes,
            old.name_hint,
            add_waits(old.body),
            old.init,
            old.alloc_buffers,
            old.match_buffers,
            old.annotations,
        )
        return SBlockRealize(stmt.iter_values, stmt.predicate, block)
    if isinstance(stmt, SeqStmt):
        return SeqStmt([add_waits(part) for part in stmt.seq])
    if isinstance(stmt, IfThenElse):
        other = add_waits(stmt.else_case) if stmt.else_case is not None else None
        return IfThenElse(stmt.condition, add_waits(stmt.then_case), other)
    if isinstance(stmt, AttrStmt):
        body = add_waits(stmt.body)
        return AttrStmt(stmt.node, stmt.attr_key, stmt.value, body)
    if isinstance(stmt, For):
        if stmt.thread_binding is None:
            body = add_waits(stmt.body)
        else:
            body = SeqStmt([Evaluate(T.ptx[WAIT]()), stmt.body])
        range_ = stmt.loop_var, stmt.min, stmt.extent
        return For(*range_, stmt.kind, body, stmt.thread_binding, stmt.annotations)
    return stmt
