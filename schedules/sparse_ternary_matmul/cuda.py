"""sparse_ternary_matmul on CUDA: only the listed columns are read; a block 32 outputs of a token.

    for b, m in N/(16 S), M:                         blockIdx.y, blockIdx.x
        list[count] = column, q                      shared; every index of the row is asked for at
                                                     once, before the count is known
        for warp in 16:                              every 16th group of 4 G listed columns each
            lane (g, word) in G = 32/S, S:           S words of a column
                a[4] = words of columns 4g .. 4g+3   four loads in flight
                transpose to four bytes of a row     8 byte permutations
                acc[16] += dp4a(q, a & 3 << 2f)      16 outputs; fields 1, 2 are 4, 16 too large
        out[16 S] = residual + (sum over warps and g - sum of q) * scale

    tile | value | bound by
    S    | 2     | 80 blocks at N = 2560; each reads 8 of a column's 32 bytes, L2 keeps the rest
    warp | 16    | one or two rounds for a thousand columns

The codes are w + 1. |acc| < 2^14 K: int32 holds K < 2^17.
"""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES
from schedules.intrin import cuda
from schedules.targets import GpuTarget

BLOCK = 128  # outputs whose weights of one column are 32 bytes
WORDS = 8  # of a block: word i has rows 32f + 4i + p
WORD_ROWS = 16
COLUMNS = 4  # of a lane and group
WARPS = 16
THREADS = WARPS * cuda.WARP
INDICES = 16  # that a thread asks for at once
FIELDS = 4
SHIFTS = (0, 2, 4, 0)  # of a field as it is multiplied: the last one's codes are no signed bytes
MASK = 0x03030303
ONES = 0x01010101

KNOBS = {"words_a_block": (2, 4, 8)}


def layout() -> str:
    return "columns_2bit"


def write_list(listed, q, index, m, k: int, count: Expr, t: Expr) -> None:
    """listed[i] = column << 8 | q of the i-th listed column; zero past the count."""
    columns = cuda.local("int32", INDICES)
    with T.serial(-(-k // (THREADS * INDICES))) as part:
        first = T.bind(part * (THREADS * INDICES) + t)
        for i in range(min(INDICES, -(-k // THREADS))):
            cuda.store(columns, index[m, T.min(first + i * THREADS, k - 1)], i)
        for i in range(min(INDICES, -(-k // THREADS))):
            at = first + i * THREADS
            with cuda.when(at < count):
                byte = T.cast(T.reinterpret("uint8", q[m, columns[i]]), "int32")
                cuda.store(listed, T.shift_left(columns[i], 8) | byte, at)


def kernel(n: int, k: int, target: GpuTarget, *, words_a_block: int = 2) -> PrimFunc:
    end = EPILOGUES["residual"]
    blocks, words_of = -(-n // BLOCK), words_a_block
    groups = cuda.WARP // words_of  # of columns that a warp takes at once
    height = words_of * WORD_ROWS
    rows = Var("M", "int64")

    def accumulate(acc, total, listed, w, word, count, warp, lane):
        """acc[4p + f] += the lane's columns for row 32f + p of the word; total += their q."""
        stride = WARPS * groups * COLUMNS
        with T.serial(T.ceildiv(count, stride)) as step:
            first = T.bind(step * stride + (warp * groups + lane // words_of) * COLUMNS)
            entries = [
                T.bind(T.if_then_else(first + j < count, listed[first + j], 0))
                for j in range(COLUMNS)
            ]
            words = [T.bind(w[T.shift_right(e, 8), word // WORDS, word % WORDS]) for e in entries]
            x = entries[0] & 255
            for j in range(1, COLUMNS):
                x = x | T.shift_left(entries[j] & 255, 8 * j)
            x = T.bind(x)
            cuda.store(total, cuda.dp4a(x, T.int32(ONES), total[0]), 0)
            for p, transposed in enumerate(cuda.transpose_bytes(words)):
                for f, shift in enumerate(SHIFTS):
                    field = transposed >> T.uint32(2 * f - shift) & T.uint32(MASK << shift)
                    product = cuda.dp4a(x, T.reinterpret("int32", field), acc[p * FIELDS + f])
                    cuda.store(acc, product, p * FIELDS + f)

    def share(acc, total, sums, warp, lane):
        """sums[warp, word, :] = the warp's sums of q w."""
        for i in range(WORD_ROWS):
            value = T.bind(T.shift_right(acc[i], SHIFTS[i % FIELDS]) - total[0])
            lanes = words_of
            while lanes < cuda.WARP:
                value = T.bind(value + cuda.shuffle_xor(value, lanes))
                lanes *= 2
            with cuda.when(lane < words_of):
                cuda.store(sums, value, warp, lane * WORD_ROWS + i)
        cuda.sync()

    def block(q, scale, index, count, words, w_scale, extra, out, b, m, warp, lane):
        acc, total = cuda.local("int32", WORD_ROWS), cuda.local("int32", 1)
        listed = T.alloc_buffer((k,), "int32", scope="shared.dyn")
        sums = cuda.shared("int32", WARPS, height)
        for i in range(WORD_ROWS):
            cuda.store(acc, T.int32(0), i)
        cuda.store(total, T.int32(0), 0)
        t = T.bind(warp * cuda.WARP + lane)
        active = T.bind(count[m])
        write_list(listed, q, index, m, k, active, t)
        cuda.sync()
        word = T.bind(T.min(b * words_of + lane % words_of, blocks * WORDS - 1))
        accumulate(acc, total, listed, words, word, active, warp, lane)
        share(acc, total, sums, warp, lane)
        at = b * words_of + t // WORD_ROWS
        i = t % WORD_ROWS  # p * FIELDS + f
        j = T.bind(at // WORDS * BLOCK + i % FIELDS * 32 + at % WORDS * 4 + i // FIELDS)
        with cuda.when(t < height), cuda.when(j < n):
            y = cuda.local("int32", 1)
            cuda.store(y, T.int32(0), 0)
            for other in range(WARPS):
                cuda.store(y, y[0] + sums[other, t], 0)
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
                    with cuda.blocks(blocks * WORDS // words_of, "y") as b:
                        with cuda.threads(WARPS, "y") as warp:
                            with cuda.threads(cuda.WARP) as lane:
                                block(
                                    q, scale, index, count, words, w_scale, extra, out,
                                    b, m, warp, lane,
                                )  # fmt: skip

    return end.finish(sparse_ternary_matmul)
