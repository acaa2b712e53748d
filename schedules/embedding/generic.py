"""embedding on any CPU: one pass over the token's int8 row, widened and scaled.

    for m in M:                          parallel when M > 1
        y[m, :] = table[tokens[m], :] * table_scale[tokens[m]]      vectors of L

    tile | value    | bound by
    L    | lanes(8) | one int8 vector read, four float32 vectors written

Tokens outside the table are refused by the runtime, before any kernel runs.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.intrin.vector import each, store
from schedules.targets import CpuTarget


def kernel(vocab: int, k: int, target: CpuTarget) -> PrimFunc:
    @T.inline
    def embed_row(tokens, table, table_scale, y, m):
        token: T.let = tokens[m]
        each(
            k,
            target.lanes(8),
            lambda i, j: store(y, (m, i), T.cast(table[token, i], "float32") * table_scale[token]),
        )

    @T.prim_func(s_tir=True)
    def embedding(
        tokens_: T.handle,
        table: T.Buffer((vocab, k), "int8"),
        table_scale: T.Buffer((vocab,), "float32"),
        y_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        tokens = T.match_buffer(tokens_, (rows,), "int64")
        y = T.match_buffer(y_, (rows, k), "float32")
        with T.sblock("root"):
            if rows == 1:
                embed_row(tokens, table, table_scale, y, 0)
            else:
                for m in T.parallel(rows):
                    embed_row(tokens, table, table_scale, y, m)

    return embedding
