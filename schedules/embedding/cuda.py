"""embedding on CUDA: a block a token, a thread a run of neighbouring columns.

    for m in M:                          blockIdx.x
        y[m, :] = table[tokens[m], :] * table_scale[tokens[m]]      VECTOR columns a thread

    tile   | value         | bound by
    VECTOR | 4, 1 if K % 4 | 16 bytes stored by a thread

Tokens outside the table are refused by the runtime, before any kernel runs.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.intrin import cuda
from schedules.targets import GpuTarget


def kernel(vocab: int, k: int, target: GpuTarget) -> PrimFunc:
    vector = 1 if k % 4 else 4
    rows = Var("M", "int64")
    num_threads = cuda.threads_for(k // vector, 256)

    def embed_row(tokens, table, table_scale, y, m, t):
        token = T.bind(tokens[m])
        scale = T.bind(table_scale[token])
        with cuda.strided(k // vector, t, num_threads) as i, T.vectorized(vector) as v:
            column = i * vector + v
            cuda.store(y, T.cast(table[token, column], "float32") * scale, m, column)

    @T.prim_func(s_tir=True)
    def embedding(
        tokens: T.Buffer((rows,), "int64"),
        table: T.Buffer((vocab, k), "int8"),
        table_scale: T.Buffer((vocab,), "float32"),
        y: T.Buffer((rows, k), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            with cuda.some_rows(rows):
                with cuda.blocks(rows) as m:
                    with cuda.threads(num_threads) as t:
                        embed_row(tokens, table, table_scale, y, m, t)

    return embedding
