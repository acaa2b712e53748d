"""rope on CUDA: a block a row, a thread a pair of one head's halves or a value to copy.

    for m in M:                          blockIdx.x
        for h, d in Hq + Hkv, D/2:       threadIdx.x, strided
            y[h, d]       = x1 * cos - x2 * sin      x1, x2: halves of the head; products and sum
            y[h, D/2 + d] = x2 * cos + x1 * sin      in float64, rounded once
        y[values] = x[values]

Products of float32 are exact in float64, so an FMA gives the same bits.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.intrin import cuda
from schedules.targets import GpuTarget


def kernel(
    num_heads: int, num_kv_heads: int, head_dim: int, max_positions: int, target: GpuTarget
) -> PrimFunc:
    assert head_dim % 2 == 0, f"rope: head_dim {head_dim} is odd"
    half = head_dim // 2
    rotated = num_heads + num_kv_heads
    width = (rotated + num_kv_heads) * head_dim
    rows = Var("M", "int64")
    num_threads = cuda.threads_for(rotated * half, cuda.MAX_THREADS)

    def rope_row(qkv, cos, sin, positions, y, m, t):
        position = T.bind(positions[m])
        with cuda.strided(rotated * half, t, num_threads) as i:
            d = i % half
            low = i // half * head_dim + d
            x1, x2 = (T.bind(T.cast(qkv[m, at], "float64")) for at in (low, low + half))
            c, s = (T.bind(T.cast(table[position, d], "float64")) for table in (cos, sin))
            cuda.store(y, T.cast(x1 * c - x2 * s, "float32"), m, low)
            cuda.store(y, T.cast(x2 * c + x1 * s, "float32"), m, low + half)
        with cuda.strided(num_kv_heads * head_dim, t, num_threads) as i:
            cuda.store(y, qkv[m, rotated * head_dim + i], m, rotated * head_dim + i)

    @T.prim_func(s_tir=True)
    def rope(
        qkv: T.Buffer((rows, width), "float32"),
        cos: T.Buffer((max_positions, half), "float32"),
        sin: T.Buffer((max_positions, half), "float32"),
        positions: T.Buffer((rows,), "int64"),
        y: T.Buffer((rows, width), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            with cuda.some_rows(rows):
                with cuda.blocks(rows) as m:
                    with cuda.threads(num_threads) as t:
                        rope_row(qkv, cos, sin, positions, y, m, t)

    return rope
