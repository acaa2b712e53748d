"""rope on any CPU: rotate_half of every query and key head, the values copied.

    for m in M:                          parallel when M > 1
        for h in Hq + Hkv:
            y[h, :D/2] = x1 * cos - x2 * sin     x1, x2: halves of the head; products and sum in
            y[h, D/2:] = x2 * cos + x1 * sin     float64, rounded once
        y[values] = x[values]

    tile | value     | bound by
    L    | lanes(32) | one float32 vector, two of float64: 12 in flight for the six operands

Products of float32 are exact in float64, so an FMA gives the same bits.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.intrin.vector import each, store
from schedules.targets import CpuTarget


def kernel(
    num_heads: int, num_kv_heads: int, head_dim: int, max_positions: int, target: CpuTarget
) -> PrimFunc:
    assert head_dim % 2 == 0, f"rope: head_dim {head_dim} is odd"
    half, lanes = head_dim // 2, target.lanes(32)
    rotated = num_heads + num_kv_heads
    width = (rotated + num_kv_heads) * head_dim

    def rotate_head(qkv, cos, sin, y, m, position, start):
        def rotate(i, j):
            low, high = (T.bind(T.cast(qkv[m, start + d], "float64")) for d in (i, half + i))
            c, s = (T.bind(T.cast(table[position, i], "float64")) for table in (cos, sin))
            store(y, (m, start + i), T.cast(low * c - high * s, "float32"))
            store(y, (m, start + half + i), T.cast(high * c + low * s, "float32"))

        each(half, lanes, rotate)

    @T.inline
    def rope_row(qkv, cos, sin, positions, y, m):
        position: T.let = positions[m]
        for h in T.serial(rotated):
            rotate_head(qkv, cos, sin, y, m, position, h * head_dim)
        each(width, lanes, lambda i, j: store(y, (m, i), qkv[m, i]), start=rotated * head_dim)

    @T.prim_func(s_tir=True)
    def rope(
        qkv_: T.handle,
        cos: T.Buffer((max_positions, half), "float32"),
        sin: T.Buffer((max_positions, half), "float32"),
        positions_: T.handle,
        y_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        qkv = T.match_buffer(qkv_, (rows, width), "float32")
        positions = T.match_buffer(positions_, (rows,), "int64")
        y = T.match_buffer(y_, (rows, width), "float32")
        with T.sblock("root"):
            if rows == 1:
                rope_row(qkv, cos, sin, positions, y, 0)
            else:
                for m in T.parallel(rows):
                    rope_row(qkv, cos, sin, positions, y, m)

    return rope
