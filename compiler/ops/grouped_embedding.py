"""grouped_embedding: rows of a table of 6- or 4-bit codes in groups.

y[m, k] = (code[tokens[m], k] * group[tokens[m], k // 64]) * table_scale[tokens[m]]     float32

tensor      | shape  | dtype | meaning
tokens      | (M,)   | i64   | 0 <= token < V
table       | (V, B) | uint8 | rows packed as schedules/grouped.py says
table_scale | (V,)   | f32   | one a token
y           | (M, K) | f32   | K = k
"""

from compiler.op import OpDef, Statics
from compiler.ops.grouped_matmul import check_row
from compiler.signature import Match, parse
from schedules import grouped


def check(match: Match, statics: Statics) -> None:
    check_row(match, int(statics["k"]), int(statics["bits"]))
    match.bind("K", int(statics["k"]), "k")


grouped_embedding = OpDef(
    name="grouped_embedding",
    tensors=parse("tokens i64[M]", "table u8[V, B]", "table_scale f32[V]"),
    statics={"k": int, "bits": grouped.BITS},
    results=parse("f32[M, K]"),
    schedules="grouped_embedding",
    kernel=lambda schedule, size, static, target: schedule.kernel(
        size("V"), static["k"], static["bits"], target
    ),
    check=check,
)
