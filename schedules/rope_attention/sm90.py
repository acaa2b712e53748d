"""rope_attention on Hopper: attention/split_sm90.py, which turns and appends the row first."""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.attention import split_sm90
from schedules.attention.cuda import words_of
from schedules.intrin import cuda
from schedules.targets import GpuTarget


def is_possible(num_heads: int, num_kv_heads: int, head_dim: int, kv_bits: int) -> bool:
    return split_sm90.Form(num_heads, num_kv_heads, head_dim, kv_bits).can_turn


def kernel(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_positions: int,
    kv_bits: int,
    target: GpuTarget,
) -> PrimFunc:
    """(qkv, cos, sin, codes, scales, slots, positions, y) of one row."""
    form = split_sm90.Form(num_heads, num_kv_heads, head_dim, kv_bits)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    num_slots, size, scale_size = (Var(v, "int64") for v in ("num_slots", "size", "scale_size"))

    @T.prim_func(s_tir=True)
    def rope_attention(
        qkv: T.Buffer((1, width), "float32"),
        cos: T.Buffer((max_positions, head_dim // 2), "float32"),
        sin: T.Buffer((max_positions, head_dim // 2), "float32"),
        codes: T.Buffer((num_slots, num_kv_heads, 2, size), "uint8"),
        scales: T.Buffer((num_slots, num_kv_heads, 2, scale_size), "float16"),
        slots: T.Buffer((1,), "int64"),
        positions: T.Buffer((1,), "int64"),
        y: T.Buffer((1, num_heads * head_dim), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, cuda.WAITS_ITSELF: True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            words = words_of(codes)
            split_sm90.launch(form, 1, qkv, words, scales, slots, positions, y, (cos, sin))

    return rope_attention
