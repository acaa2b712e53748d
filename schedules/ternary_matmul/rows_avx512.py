"""Gated ternary_matmul on AVX-512 VNNI: rows_x86.py with codes multiplied where they lie.

64 bytes masked by 3 << 2f are field f's codes times 4**f, of which `vpdpbusd` adds four products to
an int32. The sums of a field are shifted right by 2f at the end. 4 STREAMS registers of sums, 4 of
masks, 4 of qs, and the weights: 32 registers.

|sum| <= 64 * 2 * 128 K: 32 bits hold it for K < 2**17.
"""

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.intrin import avx2, avx512
from schedules.ternary_matmul import rows_x86
from schedules.ternary_matmul.quads_avx512 import masks, sum_row
from schedules.ternary_matmul.rows_x86 import CHUNK, FIELDS, LINE


def join_fields(lanes, first: int) -> Expr:
    """The sum of lanes[first + f] / 4**f, of which each is a multiple"""
    total = avx2.load(lanes[first + FIELDS - 1], 0, lanes=16)
    for f in reversed(range(FIELDS - 1)):
        quarter = T.shift_right(total, T.broadcast(2, 16))
        total = avx2.load(lanes[first + f], 0, lanes=16) + quarter
    return T.Bind(total)


def sums(w, qs, r, rows, later) -> list[Expr]:
    lanes = avx2.registers(FIELDS * len(rows), "int32", 16)
    field_masks = masks()
    with T.serial(w.shape[1]) as c:
        columns = [CHUNK * c + LINE * f for f in range(FIELDS)]
        activations = [T.Bind(avx2.load(qs, r, column, lanes=LINE)) for column in columns]
        for s, row in enumerate(rows):
            bytes_ = T.Bind(avx2.load(w, row, c, 0, lanes=LINE))
            for far in later[s]:
                avx2.prefetch(w, far, c, 0)
            for f, mask in enumerate(field_masks):
                so_far = avx2.load(lanes[FIELDS * s + f], 0, lanes=16)
                total = avx512.dot_bytes(so_far, bytes_ & mask, activations[f])
                avx2.store(lanes[FIELDS * s + f], 0, value=total, lanes=16)
    joined = [join_fields(lanes, FIELDS * s) for s in range(len(rows))]
    if len(rows) != 4:
        return [avx2.sum_lanes(vector) for vector in joined]
    four = T.alloc_buffer((4,), "int32")
    avx2.store(four, 0, value=avx512.sum_four(joined), lanes=4)
    return [four[s] for s in range(4)]


VECTORS = rows_x86.Vectors(sums, sum_row, gates=16, compress=avx512.compress)
