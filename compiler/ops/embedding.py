"""embedding: rows of an INT8 table.

y[m, k] = table[tokens[m], k] * table_scale[tokens[m]]        float32

tensor      | shape  | dtype | meaning
tokens      | (M,)   | i64   | 0 <= token < V
table       | (V, K) | int8  |
table_scale | (V,)   | f32   | one a token
y           | (M, K) | f32   |
"""

from compiler.op import OpDef
from compiler.signature import parse

embedding = OpDef(
    name="embedding",
    tensors=parse("tokens i64[M]", "table i8[V, K]", "table_scale f32[V]"),
    results=parse("f32[M, K]"),
    schedules="embedding",
    kernel=lambda schedule, size, _, target: schedule.kernel(size("V"), size("K"), target),
)
