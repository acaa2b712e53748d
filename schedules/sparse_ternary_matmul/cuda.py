"""sparse_ternary_matmul on CUDA: only the listed columns are read; a block 128 outputs of a token.

    for b, m in N/128, M:                            blockIdx.x, blockIdx.y
        for warp in W:                               every W-th group of 16 listed columns each
            lane (c, word) in 4, 8:                  a column's 32 bytes are 8 lanes' words
                a[4] = words of columns 4c .. 4c+3   four loads in flight a group, D groups
                transpose to four bytes of a row     8 byte permutations
                acc[16] += dp4a(q, a & 3 << 2f)      16 outputs; fields 1, 2 are 4, 16 too large
        out[128] = residual + (sum over warps and c - sum of q) * scale

    tile | value | bound by
    W    | 16    | loads in flight: 20 blocks at N = 2560
    D    | 2     | registers: 8 words, 16 accumulators

The codes are w + 1. |acc| < 2^14 K: int32 holds K < 2^17.
"""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES
from schedules.intrin import cuda
from schedules.targets import GpuTarget

BLOCK = 128  # outputs whose weights of one column are 32 bytes
WORDS = 8
COLUMNS = 4  # of a lane and group
GROUP = 16  # listed columns that a warp takes at once
WARPS = 16
FIELDS = 4
SHIFTS = (0, 2, 4, 0)  # of a field as it is multiplied: the last one's codes are no signed bytes
MASK = 0x03030303
ONES = 0x01010101


def layout() -> str:
    return "columns_2bit"


def listed(q, index, m, first: Expr, count: Expr) -> tuple[list[Expr], Expr]:
    """Four listed columns from `first` on, and their activations in a word; zero past the list."""
    columns, packed = [], T.uint32(0)
    for j in range(COLUMNS):
        is_listed = first + j < count
        column = T.bind(T.if_then_else(is_listed, index[m, first + j], 0))
        byte = T.if_then_else(is_listed, T.reinterpret("uint8", q[m, column]), T.uint8(0))
        packed = packed | T.cast(byte, "uint32") << T.uint32(8 * j)
        columns.append(column)
    return columns, T.bind(packed)


def kernel(n: int, k: int, target: GpuTarget) -> PrimFunc:
    end = EPILOGUES["residual"]
    blocks = -(-n // BLOCK)
    rows = Var("M", "int64")

    def accumulate(acc, total, q, index, w, m, b, count, warp, lane):
        """acc[4p + f] += the lane's columns for output 32f + 4 word + p; total += their q."""
        with T.serial(T.ceildiv(count, GROUP * WARPS)) as step:
            first = (step * WARPS + warp) * GROUP + lane // WORDS * COLUMNS
            columns, x = listed(q, index, m, first, count)
            words = [T.bind(w[column, b, lane % WORDS]) for column in columns]
            cuda.store(total, cuda.dp4a(T.reinterpret("int32", x), T.int32(ONES), total[0]), 0)
            for p, word in enumerate(cuda.transpose_bytes(words)):
                for f, shift in enumerate(SHIFTS):
                    field = word >> T.uint32(2 * f - shift) & T.uint32(MASK << shift)
                    a, b = (T.reinterpret("int32", v) for v in (x, field))
                    cuda.store(acc, cuda.dp4a(a, b, acc[p * FIELDS + f]), p * FIELDS + f)

    def share(acc, total, sums, warp, lane):
        """sums[warp, :] = the warp's 128 sums of q w."""
        for i in range(4 * FIELDS):
            value = T.bind(T.shift_right(acc[i], SHIFTS[i % FIELDS]) - total[0])
            for step in (WORDS, 2 * WORDS):
                value = T.bind(value + cuda.shuffle_xor(value, step))
            with cuda.when(lane < WORDS):
                cuda.store(sums, value, warp, 32 * (i % FIELDS) + 4 * lane + i // FIELDS)
        cuda.sync()

    def block(q, scale, index, count, words, w_scale, extra, out, b, m, warp, lane):
        acc, total = cuda.local("int32", 4 * FIELDS), cuda.local("int32", 1)
        sums = cuda.shared("int32", WARPS, BLOCK)
        for i in range(4 * FIELDS):
            cuda.store(acc, T.int32(0), i)
        cuda.store(total, T.int32(0), 0)
        accumulate(acc, total, q, index, words, m, b, T.bind(count[m]), warp, lane)
        share(acc, total, sums, warp, lane)
        t = T.bind(warp * cuda.WARP + lane)
        j = T.bind(b * BLOCK + t)
        with cuda.when(t < BLOCK), cuda.when(j < n):
            y = cuda.local("int32", 1)
            cuda.store(y, T.int32(0), 0)
            with T.unroll(WARPS) as i:
                cuda.store(y, y[0] + sums[i, t], 0)
            value = end.value(T.cast(y[0], "float32"), scale[m] * w_scale[j], extra[m, j])
            cuda.store(out, value, m, j)

    @T.prim_func(s_tir=True)
    def sparse_ternary_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        index: T.Buffer((rows, k), "int32"),
        count: T.Buffer((rows,), "int32"),
        w: T.Buffer((k, blocks, 32), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        extra: T.Buffer((rows, n), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            words = T.decl_buffer((k, blocks, WORDS), "uint32", data=w.data)
            with cuda.some_rows(rows):
                with cuda.blocks(rows) as m:
                    with cuda.blocks(blocks, "y") as b:
                        with cuda.threads(WARPS, "y") as warp:
                            with cuda.threads(cuda.WARP) as lane:
                                block(
                                    q, scale, index, count, words, w_scale, extra, out,
                                    b, m, warp, lane,
                                )  # fmt: skip

    return end.finish(sparse_ternary_matmul)
