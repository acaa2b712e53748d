"""grouped_embedding on any CPU: the token's row, a group of 64 columns at a time.

    for m in M:                          parallel when M > 1
        for group, j in K/64, 64:        vectorised by LLVM
            y[m, 64 group + j] = float32(code * group_scale) * table_scale[tokens[m]]

Tokens outside the table are refused by the runtime, before any kernel runs.
Measured: not yet; a row of 2560 columns is 2 KB.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.grouped import GROUP, code, group_scale, row_bytes
from schedules.targets import CpuTarget


def kernel(vocab: int, k: int, bits: int, target: CpuTarget) -> PrimFunc:
    def embed_row(tokens, table, table_scale, y, m):
        token = T.bind(tokens[m])
        with T.serial(k // GROUP) as group, T.serial(GROUP) as j:
            level = code(table, token, k, bits, group, j)
            level = level * group_scale(table, token, group)
            value = T.cast(level, "float32") * table_scale[token]
            T.buffer_store(y, value, [m, GROUP * group + j])

    rows = Var("M", "int64")

    @T.prim_func(s_tir=True)
    def grouped_embedding(
        tokens: T.Buffer((rows,), "int64"),
        table: T.Buffer((vocab, row_bytes(k, bits)), "uint8"),
        table_scale: T.Buffer((vocab,), "float32"),
        y: T.Buffer((rows, k), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            if rows == 1:
                embed_row(tokens, table, table_scale, y, 0)
            else:
                for m in T.parallel(rows):
                    embed_row(tokens, table, table_scale, y, m)

    return grouped_embedding
