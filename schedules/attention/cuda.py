"""attention on CUDA, a query head at a time: the context is split over a block's warps.

    for m, head in M, Hq:                    blockIdx.x, blockIdx.y
        q8 = quantize(q)                     shared; float64 at 16 bits
        for b in warp, warp + W, ...:        threadIdx.y: blocks of 64 positions, online softmax
            s[2] = q8 . k[t]                 two positions a lane, dp4a on the packed row's fields
            p[64] = softmax step             float64, warp shuffles for peak, total and unit
            o[D/32] = o * rescale + (sum of p[t] v[t]) * unit     a lane every 32nd column
        y = (sum of o over warps) / total    shared, float64

    tile | value | bound by
    64   |       | the definition: the positions that share a unit
    W    | 8     | one round up to a context of 512; a warp's shared memory is 8 D bytes
    rows | 8     | of values whose loads are in flight at once: registers

Integers and float64 give the definition's bits in any order (docs/architecture.md, "Attention").
The dot product of levels is that of codes less qmax times the sum of q8. Rows of D no multiple of
32 are read byte by byte.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.attention import prompt_cuda, prompt_tile_cuda
from schedules.attention.softmax import SMALLEST_UNIT
from schedules.intrin import cuda
from schedules.intrin.exp import nearest
from schedules.rms_norm.generic import SMALLEST_STAT, int8_code, int8_factor, int8_scale
from schedules.targets import GpuTarget

KEYS = 64
WARPS = 8
ROWS = 8  # of values that are loaded before the first is used
LOWEST = -1e300  # a score that counts for nothing


@dataclass(frozen=True)
class Head:
    """A slot's keys or values of one head: its packed codes and its scales."""

    codes: Any  # u8 or f16 [S, Hkv, 2, B]
    words: Any  # the same as u32
    scales: Any
    where: tuple  # slot, head
    dim: int
    kv_bits: int

    def scale(self, kv: int, t: Expr) -> Expr:
        if self.kv_bits == 16:
            return T.float64(1)
        half = self.scales[(*self.where, kv, t)]
        return T.cast(T.cast(half, "float32"), "float64")

    def value(self, kv: int, t: Expr, d: Expr) -> Expr:
        half = self.codes[(*self.where, kv, t * self.dim + d)]
        return T.cast(T.cast(half, "float32"), "float64")

    def by_bits(self, t: Expr, body: Callable[[int, Expr], None]) -> None:
        """body(bits, first byte of row t): a 3-bit cache has one row of 4 bits, the bos."""
        if self.kv_bits == 4:
            body(4, t * (self.dim // 2))
            return
        with T.If(t == 0):
            with T.Then():
                body(4, T.int64(0))
            with T.Else():
                body(3, self.dim // 2 + (t - 1) * (3 * self.dim // 8))

    def code(self, kv: int, bits: int, base: Expr, d: Expr) -> Expr:
        """Unsigned code of column d, int32."""

        def field(planes: int, offset: int, width: int) -> Expr:
            plane = self.dim // planes
            byte = self.codes[(*self.where, kv, base + offset + d % plane)]
            shift = d // plane * (8 // planes)
            return T.shift_right(T.cast(byte, "int32"), shift) & ((1 << width) - 1)

        if bits == 4:
            return field(2, 0, 4)
        return field(4, 0, 2) | T.shift_left(field(8, self.dim // 4, 1), 2)

    def dot(self, kv: int, bits: int, base: Expr, q, dot) -> None:
        """dot[0] += q . codes of the row: fields of whole words, or column by column."""
        if self.dim % 32:
            with T.serial(self.dim) as d:
                byte = T.shift_right(q[d // 4], d % 4 * 8)
                signed = T.cast(T.cast(byte & 255, "int8"), "int32")
                cuda.store(dot, dot[0] + signed * self.code(kv, bits, base, d), 0)
            return
        planes = ((2, 0, 0x0F0F0F0F, 0),) if bits == 4 else ((4, 0, 0x03030303, 0), (8, 1, ONES, 2))
        for fields, second, mask, weight in planes:
            part = cuda.local("int32", 1)
            cuda.store(part, T.int32(0), 0)
            count = self.dim // fields // 4
            for i in range(count):
                at = T.floordiv(base, 4) + (second * (self.dim // 16) + i)
                word = T.bind(self.words[(*self.where, kv, at)])
                for f in range(fields):
                    codes = word >> T.uint32(f * 8 // fields) & T.uint32(mask)
                    product = cuda.dp4a(q[f * count + i], T.reinterpret("int32", codes), part[0])
                    cuda.store(part, product, 0)
            cuda.store(dot, dot[0] + T.shift_left(part[0], weight), 0)


ONES = 0x01010101


def qmax(bits: int) -> int:
    return 2 ** (bits - 1) - 1


class Query:
    """One query head of one row, in shared memory; emits what a block's warps do with it."""

    def __init__(self, head: Head, qkv, m, first, warp, lane):
        self.head, self.dim = head, head.dim
        self.warp, self.lane = warp, lane
        self.is_quantized = head.kv_bits < 16
        self.columns = -(-self.dim // cuda.WARP)  # of a lane
        self.words = -(-self.dim // 4)
        self.q = cuda.shared("int32" if self.is_quantized else "float64", self._size())
        self.p = cuda.local("int32", 2)
        self.shared_o = cuda.shared("float64", WARPS, self.dim)
        self.shared_state = cuda.shared("float64", 2, WARPS)  # peak, total
        self.o = cuda.local("float64", self.columns)
        self.state = cuda.local("float64", 2)
        self.sum_q = cuda.local("int32", 1)
        self.factor = self._load(lambda d: qkv[m, first + d])

    def _size(self) -> int:
        return self.words if self.is_quantized else self.dim

    def _load(self, value: Callable[[Expr], Expr]) -> Expr:
        """q into shared memory; what a dot product is multiplied with."""
        root = cuda.float64(self.dim**-0.5)
        t = self.warp * cuda.WARP + self.lane
        if not self.is_quantized:
            with cuda.strided(self.dim, t, WARPS * cuda.WARP) as d:
                cuda.store(self.q, T.cast(value(d), "float64"), d)
            cuda.sync()
            return root
        peak = cuda.local("float32", 1)  # every warp finds it for itself
        cuda.store(peak, T.float32(SMALLEST_STAT), 0)
        with cuda.strided(self.dim, self.lane, cuda.WARP) as d:
            cuda.store(peak, T.max(peak[0], T.abs(value(d))), 0)
        amax = cuda.warp_reduce(peak[0], "max")
        factor = T.bind(int8_factor(amax))
        with cuda.strided(self.words, t, WARPS * cuda.WARP) as i:
            word: Any = T.int32(0)
            for j in range(4):
                d = T.min(4 * i + j, self.dim - 1)
                byte = T.cast(int8_code(value(d), factor), "int32") & 255
                if self.dim % 4:
                    byte = T.Select(4 * i + j < self.dim, byte, 0)
                word = word | T.shift_left(byte, 8 * j)
            cuda.store(self.q, word, i)
        cuda.sync()
        cuda.store(self.sum_q, T.int32(0), 0)
        with T.serial(self.words) as i:
            cuda.store(self.sum_q, cuda.dp4a(self.q[i], T.int32(ONES), self.sum_q[0]), 0)
        return T.bind(T.cast(int8_scale(amax), "float64") * root)

    def score(self, t: Expr) -> Expr:
        score = cuda.local("float64", 1)
        if not self.is_quantized:
            cuda.store(score, T.float64(0), 0)
            with T.serial(self.dim) as d:
                cuda.store(score, score[0] + self.q[d] * self.head.value(0, t, d), 0)
            return score[0] * self.factor
        dot = cuda.local("int32", 1)

        def multiply(bits: int, base: Expr) -> None:
            cuda.store(dot, -qmax(bits) * self.sum_q[0], 0)
            self.head.dot(0, bits, base, self.q, dot)

        self.head.by_bits(t, multiply)
        return T.cast(dot[0], "float64") * (self.head.scale(0, t) * self.factor)

    def attend(self, seen: Expr) -> None:
        """This warp's blocks of the positions below `seen`."""
        for i in range(self.columns):
            cuda.store(self.o, T.float64(0), i)
        cuda.store(self.state, cuda.float64(LOWEST), 0)
        cuda.store(self.state, T.float64(0), 1)
        blocks = T.ceildiv(seen, KEYS)
        with T.serial(T.ceildiv(blocks - self.warp, WARPS)) as step:
            first = T.bind((step * WARPS + self.warp) * KEYS)
            self._attend_block(first, T.bind(T.min(seen - first, KEYS)))

    def _attend_block(self, first: Expr, count: Expr) -> None:
        scores, weights = cuda.local("float64", 2), cuda.local("float64", 2)
        for half in range(2):
            j = self.lane + half * cuda.WARP
            cuda.store(scores, cuda.float64(LOWEST), half)
            with cuda.when(j < count):
                cuda.store(scores, self.score(first + j), half)
        top = cuda.warp_reduce(T.max(scores[0], scores[1]), "max")
        peak = T.bind(T.max(self.state[0], top))
        rescale = T.bind(T.exp(self.state[0] - peak))
        cuda.store(self.state, peak, 0)
        for half in range(2):
            j = self.lane + half * cuda.WARP
            e = T.if_then_else(j < count, T.exp(scores[half] - peak), T.float64(0))
            cuda.store(scores, e, half)
            scale = T.if_then_else(j < count, self.head.scale(1, first + j), T.float64(0))
            cuda.store(weights, scores[half] * scale, half)
        total = cuda.warp_reduce(scores[0] + scores[1], "sum")
        cuda.store(self.state, self.state[1] * rescale + total, 1)
        unit = self._quantize(weights)
        self._add_values(first, count, weights, rescale, unit)

    def _quantize(self, weights) -> Expr:
        """weights become whole numbers of the unit, which is returned."""
        if not self.is_quantized:
            return T.float64(1)
        top = cuda.warp_reduce(T.max(weights[0], weights[1]), "max")
        unit = T.bind(top / T.float64(255))
        divisor = T.bind(T.max(unit, cuda.float64(SMALLEST_UNIT)))
        for half in range(2):
            p = T.cast(nearest(weights[half] / divisor), "int32")
            cuda.store(self.p, p, half)
        return unit

    def _add_values(self, first: Expr, count: Expr, weights, rescale: Expr, unit: Expr) -> None:
        """o = o * rescale + (sum of p[t] v[t]) * unit, eight rows in flight."""
        p = self.p if self.is_quantized else weights
        sums = cuda.local("int32" if self.is_quantized else "float64", self.columns)
        bias = self._start_sums(sums, first, p)
        for half in range(2):
            start = T.bind(first + half * cuda.WARP)
            here = T.bind(T.max(T.min(count - half * cuda.WARP, cuda.WARP), 0))
            with T.serial(T.ceildiv(here, ROWS)) as group:
                at = T.bind(start + group * ROWS)
                with T.If(group * ROWS + ROWS <= here):
                    with T.Then():
                        self._add_rows(sums, p[half], group * ROWS, at)
                    with T.Else():
                        last = T.bind(first + count - 1)
                        self._add_rows(sums, p[half], group * ROWS, at, last)
        for i in range(self.columns):
            weighted = T.cast(sums[i] - bias, "float64") * unit
            cuda.store(self.o, self.o[i] * rescale + weighted, i)

    def _start_sums(self, sums, first: Expr, p) -> Expr:
        """The bos row of a 3-bit cache, which leaves p; qmax times the sum of p."""
        for i in range(self.columns):
            cuda.store(sums, T.cast(0, sums.dtype), i)
        if not self.is_quantized:
            return T.float64(0)
        bits = self.head.kv_bits
        if bits == 3:
            with cuda.when(first == 0):
                weight = T.bind(cuda.shuffle(p[0], 0))
                for i in range(self.columns):
                    level = self.head.code(1, 4, T.int64(0), self._column(i)) - qmax(4)
                    cuda.store(sums, weight * level, i)
                cuda.store(p, T.Select(self.lane == 0, 0, p[0]), 0)
        return cuda.warp_reduce(p[0] + p[1], "sum") * qmax(bits)

    def _column(self, i: int) -> Expr:
        return T.min(self.lane + i * cuda.WARP, self.dim - 1)

    def _add_rows(self, sums, p: Expr, j: Expr, at: Expr, last: Expr | None = None) -> None:
        """sums += p of lane j + r times the codes of row at + r; p is 0 beyond `last`."""
        terms = []
        for r in range(ROWS):
            weight = T.bind(cuda.shuffle(p, j + r))
            t = at + r if last is None else T.min(at + r, last)
            for i in range(self.columns):
                terms.append((i, weight, T.bind(self._term(t, self._column(i)))))
        for i, weight, term in terms:
            cuda.store(sums, sums[i] + weight * term, i)

    def _term(self, t: Expr, d: Expr) -> Expr:
        if not self.is_quantized:
            return self.head.value(1, t, d)
        bits = self.head.kv_bits
        if bits == 4:
            return self.head.code(1, 4, t * (self.dim // 2), d)
        base = self.dim // 2 + (T.max(t, 1) - 1) * (3 * self.dim // 8)
        return self.head.code(1, 3, base, d)

    def finish(self, out, m, first) -> None:
        """y of the head: the warps' shares on one scale, over the total."""
        cuda.sync()  # TVM may give these the memory of q
        for i in range(self.columns):
            d = self.lane + i * cuda.WARP
            with cuda.when(d < self.dim):
                cuda.store(self.shared_o, self.o[i], self.warp, d)
        with cuda.when(self.lane == 0):
            for i in range(2):
                cuda.store(self.shared_state, self.state[i], i, self.warp)
        cuda.sync()
        peak = self.shared_state[0, 0]
        for warp in range(1, WARPS):
            peak = T.max(peak, self.shared_state[0, warp])
        peak = T.bind(peak)
        share = [T.bind(T.exp(self.shared_state[0, warp] - peak)) for warp in range(WARPS)]
        total = T.float64(0)
        for warp in range(WARPS):
            total = total + share[warp] * self.shared_state[1, warp]
        total = T.bind(total)
        with cuda.strided(self.dim, self.warp * cuda.WARP + self.lane, WARPS * cuda.WARP) as d:
            o = T.float64(0)
            for warp in range(WARPS):
                o = o + share[warp] * self.shared_o[warp, d]
            cuda.store(out, T.cast(o / total, "float32"), m, first + d)


def launch_few(
    num_heads: int, num_kv_heads: int, head_dim: int, kv_bits: int, rows, *tensors
) -> None:
    """(qkv, codes, words, scales, slots, positions, y): a block a row and head."""
    qkv, codes, words, scales, slots, positions, y = tensors

    def attend(m, head, warp, lane):
        where = T.bind(slots[m]), T.bind(head // (num_heads // num_kv_heads))
        cache = Head(codes, words, scales, where, head_dim, kv_bits)
        query = Query(cache, qkv, m, head * head_dim, warp, lane)
        query.attend(T.bind(positions[m] + 1))
        query.finish(y, m, head * head_dim)

    with cuda.some_rows(rows), cuda.blocks(rows) as m, cuda.blocks(num_heads, "y") as head:
        with cuda.threads(WARPS, "y") as warp, cuda.threads(cuda.WARP) as lane:
            attend(m, head, warp, lane)


def words_of(codes) -> Any:
    """The cache's bytes by fours."""
    *outer, size = codes.shape
    return T.decl_buffer((*outer, size // 4), "uint32", data=codes.data)


def kernel(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kv_bits: int,
    target: GpuTarget,
    launch_few: Callable[..., None] = launch_few,
    launch_many: Callable[..., None] = prompt_cuda.launch,
) -> PrimFunc:
    """`launch_few` is for fewer rows than `launch_many` takes."""
    width = (num_heads + 2 * num_kv_heads) * head_dim
    code_dtype = "float16" if kv_bits == 16 else "uint8"
    rows, num_slots = Var("M", "int64"), Var("num_slots", "int64")
    size, scale_size = Var("size", "int64"), Var("scale_size", "int64")
    heads = num_heads, num_kv_heads, head_dim, kv_bits

    def by_rows(*tensors):
        prompt = prompt_tile_cuda.Form(*heads)
        if not prompt.is_possible:
            launch_few(*heads, rows, *tensors)
            return
        with T.If(rows < prompt_tile_cuda.FEWEST):
            with T.Then():
                launch_few(*heads, rows, *tensors)
            with T.Else():
                launch_many(prompt, *tensors, rows)

    @T.prim_func(s_tir=True)
    def attention(
        qkv: T.Buffer((rows, width), "float32"),
        codes: T.Buffer((num_slots, num_kv_heads, 2, size), code_dtype),
        scales: T.Buffer((num_slots, num_kv_heads, 2, scale_size), "float16"),
        slots: T.Buffer((rows,), "int64"),
        positions: T.Buffer((rows,), "int64"),
        y: T.Buffer((rows, num_heads * head_dim), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            words = words_of(codes)
            by_rows(qkv, codes, words, scales, slots, positions, y)

    return attention
