"""FusePrompts: in functions of prompts, two dialect calls become one.

    ternary_matmul(gate) -> ternary_glu_matmul(up)               glu_matmul
    ternary_matmul(qkv) -> rope                                  rope_matmul

Where the target has its kernel and the weights lie as it reads them. The call before is left to
DeadCodeElimination. Steps of few rows keep theirs, which are for them.
"""

from collections.abc import Mapping

import tvm
from tvm import relax

from compiler.kernels import families_of, find_module, in_force
from compiler.op import OpDef
from compiler.ops import find_op
from compiler.ops.glu_matmul import glu_matmul
from compiler.ops.norm_matmul import LAYOUT
from compiler.ops.rope_matmul import rope_matmul
from compiler.ops.ternary_matmul import ternary_matmul
from compiler.passes.bound_rows import PROMPT
from compiler.rebuild import rebuild
from compiler.signature import same_shape

Values = Mapping[relax.Var, relax.Expr]


@tvm.transform.module_pass(opt_level=0, name="FusePrompts")
def fuse_prompts(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    changed = mod.clone()
    for name, func in mod.functions_items():
        if name.name_hint.startswith(PROMPT):
            changed[name] = fuse(func)
    return changed


def fuse(func: relax.Function) -> relax.Function:
    values = {b.var: b.value for block in func.body.blocks for b in block.bindings}

    def one_call(call: relax.Call) -> relax.Call:
        rule = RULES.get(op.name) if (op := find_op(call)) else None
        fused = rule(call, values) if rule else None
        return call if fused is None else fused

    return rebuild(func, {}, one_call)


def fuse_gate(call: relax.Call, values: Values) -> relax.Call | None:
    q, scale, w, w_scale, gate, _ = call.args
    before = matmul_of(gate, values)
    if before is None or not is_tiled(w, w_scale, q):
        return None
    gate_q, gate_row_scale, gate_w, gate_scale, _ = before.args
    if not (gate_q.same_as(q) and gate_row_scale.same_as(scale)):
        return None
    kernels = kernels_of(glu_matmul)
    if kernels is None or not kernels.is_possible(int(q.ty.shape[1])):
        return None
    return glu_matmul(q, scale, gate_w, gate_scale, w, w_scale)


def fuse_rope(call: relax.Call, values: Values) -> relax.Call | None:
    qkv, cos, sin, positions, num_heads, num_kv_heads = call.args
    before = matmul_of(qkv, values)
    if before is None:
        return None
    q, scale, w, w_scale, _ = before.args
    kernels, head_dim = kernels_of(rope_matmul), 2 * int(cos.ty.shape[1])
    if kernels is None or not kernels.is_possible(head_dim, int(q.ty.shape[1])):
        return None
    return rope_matmul(q, scale, w, w_scale, cos, sin, positions, num_heads, num_kv_heads)


RULES = {"ternary_glu_matmul": fuse_gate, "rope": fuse_rope}


def matmul_of(var: relax.Expr, values: Values) -> relax.Call | None:
    """The ternary_matmul that made it, of weights in the fused kernels' layout."""
    call = values.get(var)
    if not isinstance(call, relax.Call) or find_op(call) is not ternary_matmul:
        return None
    q, _, w, w_scale, _ = call.args
    return call if is_tiled(w, w_scale, q) else None


def is_tiled(w: relax.Expr, w_scale: relax.Expr, q: relax.Expr) -> bool:
    n, k = int(w_scale.ty.shape[0]), int(q.ty.shape[1])
    return same_shape(w.ty.shape, LAYOUT.packed_shape(n, k))


def kernels_of(op: OpDef):
    """The target's module of the operator, if it has one."""
    families = families_of(op.schedules, in_force().target.families)
    return find_module(op.schedules, families[0]) if families else None
