"""rope_matmul on Hopper: a prompt's qkv projection, ternary_matmul/sm90.py's GEMM, and rope on its
sums.

    for m0, n0 in M/T, N/128:                  blockIdx.y, blockIdx.x
        acc[128, T] = w . x                    64 outputs a warpgroup
        acc -> shared memory                   where the stages were
        x1, x2 = acc * scales                  halves of a head: D/2 outputs apart, so D threads
        out = x1 cos - x2 sin, x2 cos + x1 sin in float64; each of two such threads half the tokens

By itself rope reads and writes all of qkv: 63 MB for 2048 rows of 2B-4T. Two of the GEMM's tiles,
those that such projections take: the others gain nothing there.
"""

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.intrin import cuda
from schedules.targets import GpuTarget
from schedules.ternary_matmul.block_sm90 import Block, exact
from schedules.ternary_matmul.cuda import CHUNK_BYTES, TILE, Shape
from schedules.ternary_matmul.form_sm90 import Form, forms_of
from schedules.ternary_matmul.sm90 import launch_cheapest

TOKENS = (64, 128)  # T
HEAD_SIZES = (32, 64, 128)  # whole ones in a tile, halves of whole warps
GROUP = 8  # tokens of a thread's four sums
AHEAD = 4  # groups for which cosines and sines are loaded at once: 32 registers


@dataclass(frozen=True)
class Heads:
    queries: int
    keys: int
    dim: int

    @property
    def width(self) -> int:
        return (self.queries + 2 * self.keys) * self.dim

    @property
    def turned(self) -> int:
        """Columns of queries and keys."""
        return (self.queries + self.keys) * self.dim

    @property
    def distance(self) -> int:
        """Threads between those of x1 and x2."""
        return self.dim // 2 // TILE * cuda.WARP


def is_possible(head_dim: int, k: int) -> bool:
    """Heads of which a tile has whole ones, rows that cp.async can copy."""
    return head_dim in HEAD_SIZES and k % 16 == 0


def finish(block: Block, heads: Heads, scale, w_scale, cos, sin, positions, out) -> None:
    form, t, last = block.form, block.t, heads.width - 1
    is_second = T.bind(t // heads.distance % 2)
    row = T.bind(block.row - is_second * (heads.dim // 2) + block.lane // 4)
    outputs = [T.bind(block.n0 + row + 8 * i) for i in range(2)]  # of x1
    halves = (0, heads.dim // 2)
    weight_scales = [[T.bind(w_scale[T.min(n + h, last)]) for n in outputs] for h in halves]
    each = form.tokens // GROUP // 2
    first = T.bind(is_second * each)
    row_scales = block.of_tokens(scale, "float32", first, each)
    places = block.of_tokens(positions, "int32", first, each)
    own, pitch = block.put_sums()
    cuda.sync()
    own = T.bind(own - T.cast(is_second * (heads.distance * 16), "uint32"))
    sums = [cuda.local("uint32", 4) for _ in halves]
    tables = [cuda.local("float32", 4 * AHEAD) for _ in range(2)]  # by step, token, output

    def load_tables(step: Expr, at: Expr) -> None:
        for i in range(2):
            for r, n in enumerate(outputs):
                for table, source in zip(tables, (cos, sin), strict=True):
                    value = source[places[2 * step + i], n % (heads.dim // 2)]
                    cuda.store(table, value, 4 * at + 2 * i + r)

    def write(step: Expr, at: Expr) -> None:
        j = T.bind(first + step)
        address = T.bind(own + T.cast(j * pitch, "uint32"))
        for half, words in enumerate(sums):
            four = [words[i] for i in range(4)]
            source = address + T.uint32(half * heads.distance * 16)
            cuda.ptx("ld.shared.v4.b32", *four, source)
        for i in range(2):
            m = T.bind(block.token(j, i))
            for r, n in enumerate(outputs):
                x1, x2 = (
                    T.bind(exact(words[2 * r + i]) * (row_scales[2 * step + i] * scales[r]))
                    for words, scales in zip(sums, weight_scales, strict=True)
                )
                turned = turn(x1, x2, *(table[4 * at + 2 * i + r] for table in tables))
                with cuda.when(cuda.both(m < block.rows, n <= last)):
                    for half, plain in enumerate((x1, x2)):
                        value = T.Select(n < heads.turned, turned[half], plain)
                        cuda.store(out, value, m, n + halves[half])

    with cuda.unrolled(each // AHEAD) as part:
        for emit in (load_tables, write):
            with cuda.unrolled(AHEAD) as at:
                emit(part * AHEAD + at, at)


def turn(x1: Expr, x2: Expr, c: Expr, s: Expr) -> tuple[Expr, Expr]:
    """Products of float32 are exact in float64, so an FMA gives the same bits."""
    x1, x2, c, s = (T.bind(T.cast(value, "float64")) for value in (x1, x2, c, s))
    return T.cast(x1 * c - x2 * s, "float32"), T.cast(x2 * c + x1 * s, "float32")


def launch(form: Form, heads: Heads, rows, q, scale, w, w_scale, *others) -> None:
    with cuda.blocks(form.columns) as b, cuda.blocks(T.ceildiv(rows, form.tokens), "y") as c:
        with cuda.threads(form.threads) as t, cuda.min_blocks(form.blocks):
            block = Block(form, q, (w,), rows, T.int32(0), b, c, t)
            block.multiply()
            finish(block, heads, scale, w_scale, *others)


def kernel(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_positions: int,
    k: int,
    target: GpuTarget,
) -> PrimFunc:
    """(q, scale, w, w_scale, cos, sin, positions, out): weights as ternary_matmul reads them."""
    if not is_possible(head_dim, k):
        raise ValueError(
            f"rope_matmul: heads of {head_dim}, K = {k} asked, possible: heads of "
            f"{', '.join(map(str, HEAD_SIZES))}, multiples of 16"
        )
    heads, rows = Heads(num_heads, num_kv_heads, head_dim), Var("M", "int64")
    shape = Shape(heads.width, k)
    forms = [f for f in forms_of(shape, 0, target) if f.ranks == 1 and f.tokens in TOKENS]

    @T.prim_func(s_tir=True)
    def rope_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        w: T.Buffer((shape.tiles, shape.chunks, CHUNK_BYTES), "uint8"),
        w_scale: T.Buffer((heads.width,), "float32"),
        cos: T.Buffer((max_positions, head_dim // 2), "float32"),
        sin: T.Buffer((max_positions, head_dim // 2), "float32"),
        positions: T.Buffer((rows,), "int64"),
        out: T.Buffer((rows, heads.width), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            tensors = q, scale, w, w_scale, cos, sin, positions, out
            with cuda.some_rows(rows):
                launch_cheapest(
                    forms,
                    target.num_multiprocessors,
                    rows,
                    lambda form: launch(form, heads, rows, *tensors),
                )

    return rope_matmul
