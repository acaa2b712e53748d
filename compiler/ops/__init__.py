"""The dialect `R.bitnet.*`: importing this package registers every operator."""

from tvm import relax

from compiler.op import OpDef
from compiler.ops.attention import attention
from compiler.ops.embedding import embedding
from compiler.ops.float_matmul import float_matmul
from compiler.ops.glu_matmul import glu_matmul
from compiler.ops.grouped_embedding import grouped_embedding
from compiler.ops.grouped_matmul import grouped_matmul
from compiler.ops.int8_matmul import int8_matmul
from compiler.ops.kv_append import kv_append
from compiler.ops.norm_matmul import norm_glu_matmul, norm_matmul, norm_residual_matmul
from compiler.ops.rms_norm import rms_norm, rms_norm_fp4, rms_norm_int4, rms_norm_int8
from compiler.ops.rms_norm_mask import rms_norm_mask_int8
from compiler.ops.rms_norm_topk import rms_norm_topk_int8
from compiler.ops.rope import rope
from compiler.ops.rope_attention import rope_attention
from compiler.ops.rope_matmul import rope_matmul
from compiler.ops.sparse_ternary_matmul import sparse_ternary_matmul
from compiler.ops.ternary_glu_matmul import ternary_glu_matmul
from compiler.ops.ternary_matmul import ternary_matmul
from compiler.ops.ternary_residual_matmul import ternary_residual_matmul

OPS: dict[str, OpDef] = {
    op.name: op
    for op in (
        embedding,
        grouped_embedding,
        rms_norm,
        rms_norm_int4,
        rms_norm_int8,
        rms_norm_fp4,
        rms_norm_topk_int8,
        ternary_matmul,
        ternary_glu_matmul,
        sparse_ternary_matmul,
        int8_matmul,
        grouped_matmul,
        float_matmul,
        rope,
        kv_append,
        attention,
        norm_matmul,
        norm_glu_matmul,
        norm_residual_matmul,
        glu_matmul,
        rope_matmul,
        rope_attention,
        rms_norm_mask_int8,
        ternary_residual_matmul,
    )
}


def find_op(call: relax.Call) -> OpDef | None:
    """The dialect operator that is called, if it is one."""
    prefix, _, name = getattr(call.op, "name", "").rpartition(".")
    return OPS[name] if prefix == "relax.bitnet" else None
