"""FuseOneRow: in functions for one row, chains of dialect calls become one call each.

    rms_norm_int4 -> ternary_matmul                              norm_matmul
    rms_norm_int4 -> ternary_matmul, ternary_glu_matmul          norm_glu_matmul
    rms_norm_topk_int8 -> sparse_ternary_matmul                  norm_residual_matmul
    rope -> kv_append -> attention                               rope_attention

The calls before are left to DeadCodeElimination. A chain stays where no kernel of the target can
serve it: another layout of the weights, a cache of 16 bits.
"""

from typing import ClassVar

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from compiler.kernels import families_of, find_module, in_force
from compiler.op import OpDef
from compiler.ops import find_op
from compiler.ops.norm_matmul import LAYOUT, norm_glu_matmul, norm_matmul, norm_residual_matmul
from compiler.ops.rope_attention import rope_attention
from compiler.passes.specialize_one_row import ONE
from compiler.signature import same_shape

ACT_BITS = {"rms_norm_int4": 4, "rms_norm_int8": 8}


@tvm.transform.module_pass(opt_level=0, name="FuseOneRow")
def fuse_one_row(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    changed = mod.clone()
    for name, func in mod.functions_items():
        if name.name_hint.startswith(ONE):
            values = {b.var: b.value for block in func.body.blocks for b in block.bindings}
            changed[name] = _Fuser(values).visit_expr(func)
    return changed


def arguments(op: OpDef, call: relax.Call) -> dict[str, relax.Expr]:
    return dict(zip(op.argument_names, call.args, strict=True))


@mutator
class _Fuser(PyExprMutator):
    def __init__(self, values: dict[relax.Var, relax.Expr]) -> None:
        super().__init__()
        self.values = values

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        op = find_op(call)
        fused = None
        if op and op.name in self.RULES:
            fused = self.RULES[op.name](self, arguments(op, call))
        return super().visit_call_(call) if fused is None else super().visit_expr(fused)

    def producer(self, var: relax.Expr, *names: str) -> tuple[str, dict[str, relax.Expr]] | None:
        """The dialect call of one of these operators whose result, or a field of it, `var` is."""
        value = self.values.get(var)
        if isinstance(value, relax.TupleGetItem):
            value = self.values.get(value.tuple_value)
        op = find_op(value) if isinstance(value, relax.Call) else None
        return (op.name, arguments(op, value)) if op and op.name in names else None

    def norm(self, args: dict[str, relax.Expr]) -> tuple | None:
        """(x, gain), (eps, act_bits) of the norm that made q, if w is as the fused kernel reads."""
        found = self.producer(args["q"], *ACT_BITS)
        if found is None or not is_tiled(args["w"], args["w_scale"], args["q"]):
            return None
        name, norm = found
        return (norm["x"], norm["gain"]), (norm["eps"], relax.prim_value(ACT_BITS[name]))

    def fuse_matmul(self, args: dict[str, relax.Expr]) -> relax.Expr | None:
        norm = self.norm(args)
        if norm is None:
            return None
        tensors, statics = norm
        return norm_matmul(*tensors, args["w"], args["w_scale"], *statics)

    def fuse_glu(self, args: dict[str, relax.Expr]) -> relax.Expr | None:
        norm, found = self.norm(args), self.producer(args["gate"], "ternary_matmul")
        if norm is None or found is None or not found[1]["q"].same_as(args["q"]):
            return None
        gate, (tensors, statics) = found[1], norm
        weights = gate["w"], gate["w_scale"], args["w"], args["w_scale"]
        return norm_glu_matmul(*tensors, *weights, *statics)

    def fuse_residual(self, args: dict[str, relax.Expr]) -> relax.Expr | None:
        found = self.producer(args["q"], "rms_norm_topk_int8")
        if found is None or not is_tiled(args["w"], args["w_scale"], args["q"]):
            return None
        norm = found[1]
        sizes = int(args["q"].ty.shape[1]), int(norm["k"].value)
        if not kernel_of(norm_residual_matmul).is_possible(*sizes):
            return None
        tensors = norm["x"], norm["gain"], args["w"], args["w_scale"], args["residual"]
        return norm_residual_matmul(*tensors, norm["eps"], norm["k"])

    def fuse_attention(self, args: dict[str, relax.Expr]) -> relax.Expr | None:
        append = self.producer(args["codes"], "kv_append")
        rope = self.producer(args["qkv"], "rope")
        if append is None or rope is None or not append[1]["qkv"].same_as(args["qkv"]):
            return None
        heads = args["num_heads"], args["num_kv_heads"]
        if not can_attend(args):
            return None
        tables = (rope[1][name] for name in ("qkv", "cos", "sin"))
        cache = (append[1][name] for name in ("codes", "scales", "slots", "positions"))
        call = rope_attention(*tables, *cache, *heads, args["kv_bits"])
        return relax.TupleGetItem(self.builder_.emit(self.visit_expr(call)), 0)

    RULES: ClassVar = {
        "ternary_matmul": fuse_matmul,
        "ternary_glu_matmul": fuse_glu,
        "sparse_ternary_matmul": fuse_residual,
        "attention": fuse_attention,
    }


def is_tiled(w: relax.Expr, w_scale: relax.Expr, q: relax.Expr) -> bool:
    """Whether the weights are in the fused kernels' layout, and rows of a size they take."""
    n, k = int(w_scale.ty.shape[0]), int(q.ty.shape[1])
    if not kernel_of(norm_matmul).is_possible(k):
        return False
    return str(w.ty.dtype) == "uint8" and same_shape(w.ty.shape, LAYOUT.packed_shape(n, k))


def can_attend(args: dict[str, relax.Expr]) -> bool:
    num_heads, num_kv_heads = (int(args[name].value) for name in ("num_heads", "num_kv_heads"))
    head_dim = int(args["qkv"].ty.shape[1]) // (num_heads + 2 * num_kv_heads)
    sizes = num_heads, num_kv_heads, head_dim, int(args["kv_bits"].value)
    return kernel_of(rope_attention).is_possible(*sizes)


def kernel_of(op: OpDef):
    """The target's module of schedules/ for an operator that not every target has."""
    return find_module(op.schedules, families_of(op.schedules, in_force().target.families)[0])
