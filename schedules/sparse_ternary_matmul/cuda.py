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

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Epilogue
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


@dataclass(frozen=True)
class Form:
    n: int
    k: int
    words: int  # S

    @property
    def blocks(self) -> int:
        """Of the layout."""
        return -(-self.n // BLOCK)

    @property
    def groups(self) -> int:
        """G: of columns that a warp takes at once."""
        return cuda.WARP // self.words

    @property
    def height(self) -> int:
        """Outputs of a block."""
        return self.words * WORD_ROWS


class Block:
    """Emits a block's work: outputs 16 S b on of token m."""

    def __init__(self, form: Form, b: Expr, m: Expr, warp: Expr, lane: Expr):
        self.form, self.b, self.m, self.warp, self.lane = form, b, m, warp, lane
        self.acc, self.total = cuda.local("int32", WORD_ROWS), cuda.local("int32", 1)
        self.listed = T.alloc_buffer((form.k,), "int32", scope="shared.dyn")
        self.sums = cuda.shared("int32", WARPS, form.height)
        for i in range(WORD_ROWS):
            cuda.store(self.acc, T.int32(0), i)
        cuda.store(self.total, T.int32(0), 0)
        self.t = T.bind(warp * cuda.WARP + lane)

    def write_list(self, q, index, count: Expr) -> None:
        """listed[i] = column << 8 | q of the i-th listed column, for every i below the count."""
        k = self.form.k
        columns = cuda.local("int32", INDICES)
        with T.serial(-(-k // (THREADS * INDICES))) as part:
            first = T.bind(part * (THREADS * INDICES) + self.t)
            for i in range(min(INDICES, -(-k // THREADS))):
                cuda.store(columns, index[self.m, T.min(first + i * THREADS, k - 1)], i)
            for i in range(min(INDICES, -(-k // THREADS))):
                at = first + i * THREADS
                with cuda.when(at < count):
                    byte = T.cast(T.reinterpret("uint8", q[self.m, columns[i]]), "int32")
                    cuda.store(self.listed, T.shift_left(columns[i], 8) | byte, at)
        cuda.sync()

    def accumulate(self, w, count: Expr) -> None:
        """acc[4p + f] += the lane's columns for row 32f + p of its word; total += their q."""
        form, listed = self.form, self.listed
        stride = WARPS * form.groups * COLUMNS
        last = form.blocks * WORDS - 1
        word = T.bind(T.min(self.b * form.words + self.lane % form.words, last))
        with T.serial(T.ceildiv(count, stride)) as step:
            group = self.warp * form.groups + self.lane // form.words
            first = T.bind(step * stride + group * COLUMNS)
            entries = [
                T.bind(T.if_then_else(first + j < count, listed[first + j], 0))
                for j in range(COLUMNS)
            ]
            words = [T.bind(w[T.shift_right(e, 8), word // WORDS, word % WORDS]) for e in entries]
            x = entries[0] & 255
            for j in range(1, COLUMNS):
                x = x | T.shift_left(entries[j] & 255, 8 * j)
            self._multiply(T.bind(x), words)

    def _multiply(self, x: Expr, words: list[Expr]) -> None:
        """Four columns' q times their words."""
        cuda.store(self.total, cuda.dp4a(x, T.int32(ONES), self.total[0]), 0)
        for p, transposed in enumerate(cuda.transpose_bytes(words)):
            for f, shift in enumerate(SHIFTS):
                field = transposed >> T.uint32(2 * f - shift) & T.uint32(MASK << shift)
                product = cuda.dp4a(x, T.reinterpret("int32", field), self.acc[p * FIELDS + f])
                cuda.store(self.acc, product, p * FIELDS + f)

    def share(self) -> None:
        """sums[warp, word, :] = the warp's sums of q w."""
        for i in range(WORD_ROWS):
            value = T.bind(T.shift_right(self.acc[i], SHIFTS[i % FIELDS]) - self.total[0])
            lanes = self.form.words
            while lanes < cuda.WARP:
                value = T.bind(value + cuda.shuffle_xor(value, lanes))
                lanes *= 2
            with cuda.when(self.lane < self.form.words):
                cuda.store(self.sums, value, self.warp, self.lane * WORD_ROWS + i)
        cuda.sync()

    def finish(self, end: Epilogue, scale, w_scale, extra, out) -> None:
        """A thread an output: of word `at`, i = p * FIELDS + f."""
        form, m, t = self.form, self.m, self.t
        at, i = self.b * form.words + t // WORD_ROWS, t % WORD_ROWS
        j = T.bind(at // WORDS * BLOCK + i % FIELDS * 32 + at % WORDS * 4 + i // FIELDS)
        with cuda.when(t < form.height), cuda.when(j < form.n):
            y = cuda.local("int32", 1)
            cuda.store(y, T.int32(0), 0)
            for other in range(WARPS):
                cuda.store(y, y[0] + self.sums[other, t], 0)
            value = end.value(T.cast(y[0], "float32"), scale[m] * w_scale[j], extra[m, j])
            cuda.store(out, value, m, j)


def kernel(n: int, k: int, target: GpuTarget, *, words_a_block: int = 2) -> PrimFunc:
    end, form, rows = EPILOGUES["residual"], Form(n, k, words_a_block), Var("M", "int64")

    def launch(q, scale, index, count, words, w_scale, extra, out):
        with cuda.some_rows(rows), cuda.blocks(rows) as m:
            with cuda.blocks(form.blocks * WORDS // form.words, "y") as b:
                with cuda.threads(WARPS, "y") as warp, cuda.threads(cuda.WARP) as lane:
                    block, active = Block(form, b, m, warp, lane), T.bind(count[m])
                    block.write_list(q, index, active)
                    block.accumulate(words, active)
                    block.share()
                    block.finish(end, scale, w_scale, extra, out)

    @T.prim_func(s_tir=True)
    def sparse_ternary_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        index: T.Buffer((rows, k), "int32"),
        count: T.Buffer((rows,), "int32"),
        w: T.Buffer((k, form.blocks, 32), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        extra: T.Buffer((rows, n), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            words = T.decl_buffer((k, form.blocks, WORDS), "uint32", data=w.data)
            launch(q, scale, index, count, words, w_scale, extra, out)

    return end.finish(sparse_ternary_matmul)
