"""ternary_matmul on CUDA's tensor cores: weights are the 16-row operand, tokens the 8 columns.

    for n0, m0 in N/(16 R V), M/T:                   blockIdx.x, blockIdx.y
        for warp in V W:                             threadIdx.y: W runs of K for each of V tiles
            for round in K/(128 D W):
                w[D, R] = 16 bytes a lane            D R loads of 512 bytes in flight
                x[T, 128 D] -> shared                cp.async, the warp's own
                for chunk in D:                      128 columns
                    b = ldmatrix(x)                  8 registers for 8 tokens
                    acc[R, T/8] += (w << 6 - 2i & 0xC0) . b      mma m16n8k32, i in 4
        out[T, 16 R V] = epilogue(sum of acc over W warps / 64)  shared memory

    form         | T  | R      | M
    one token    | 1  | 1      | 1
    some tokens  | 8  | 1 or 2 | 2 to 8
    many tokens  | 16 | 1 or 2 | more

    tile | value                            | bound by
    D    | 2 to 5                           | 32 warps a multiprocessor, all loads in flight
    V    | two blocks a multiprocessor      | what it costs to start a block
    R    | 2 where that fills the chip      | x is read from L2 once for 16 R outputs

A code in the top bits of a byte is 64 w, so a field costs a shift and a mask and the sum is 64
times too large: |acc| < 2^13 K, int32 for K < 2^18.
"""

from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Epilogue
from schedules.intrin import cuda
from schedules.targets import GpuTarget

TILE = 16  # rows of weights of a tensor core's operand
CHUNK = 128  # columns that 16 bytes a lane hold
CHUNK_BYTES = 512
FIELDS = 4
MASK = 0xC0C0C0C0
WEIGHT_BITS = 6  # a weight is multiplied as 2^6 w
MAX_WARPS = 16  # that share a tile's columns
MAX_BLOCK_WARPS = 32
BUSY_WARPS = 32  # of a multiprocessor

# 0 is what `one_token` finds right for the shape
KNOBS = {"chunks_a_warp": (0, 2, 3, 5, 8), "tiles_a_block": (0, 1, 2, 4)}


def layout(act_bits: int, epilogue: str = "scale") -> str:
    return "tiles_2bit"


@dataclass(frozen=True)
class Shape:
    n: int
    k: int

    @property
    def tiles(self) -> int:
        return -(-self.n // TILE)

    @property
    def chunks(self) -> int:
        return -(-self.k // CHUNK)


@dataclass(frozen=True)
class Form:
    """How a block shares its work out."""

    shape: Shape
    tokens: int  # T
    tiles: int  # R
    across: int  # V
    warps: int  # W
    depth: int  # D, chunks a round
    early: bool = False  # launched while the one before it runs, so that it has to wait for it

    @property
    def columns(self) -> int:
        """Groups of 8 tokens."""
        return -(-self.tokens // 8)

    @property
    def chains(self) -> int:
        """Accumulators that take turns: a product waits for the last one on its own."""
        return 2 if self.tokens == 1 else 1

    @property
    def height(self) -> int:
        """Outputs of a block."""
        return self.across * self.tiles * TILE

    @property
    def block_warps(self) -> int:
        return self.across * self.warps

    @property
    def rounds(self) -> int:
        return -(-self.shape.chunks // (self.warps * self.depth))

    @property
    def is_even(self) -> bool:
        return self.rounds * self.warps * self.depth == self.shape.chunks

    @property
    def pitch(self) -> int:
        """Bytes of a token in shared memory; 16 more than a multiple of 128, for the banks."""
        return self.depth * CHUNK + 16

    @property
    def warp_bytes(self) -> int:
        return self.tokens * self.pitch

    @property
    def sums_bytes(self) -> int:
        """int32 of every warp, token and row."""
        return 4 * self.warps * self.tokens * self.height

    @property
    def shared_bytes(self) -> int:
        return max(self.block_warps * self.warp_bytes, self.sums_bytes)

    def launch(self, rows, end: Epilogue, *tensors) -> None:
        launch(self, rows, end, *tensors)


def one_token(shape: Shape, target: GpuTarget, chunks_a_warp: int, tiles_a_block: int) -> Form:
    chip = target.num_multiprocessors
    busy = round(shape.tiles * shape.chunks / (chip * BUSY_WARPS))
    depth = chunks_a_warp or min(5, max(2, busy))
    warps = min(MAX_WARPS, -(-shape.chunks // depth))
    depth = min(8, -(-shape.chunks // warps))
    across = tiles_a_block or -(-shape.tiles // (2 * chip))
    return Form(shape, 1, 1, max(1, min(across, MAX_BLOCK_WARPS // warps)), warps, depth)


def some_tokens(shape: Shape, tokens: int, target: GpuTarget) -> Form:
    chip = target.num_multiprocessors
    tiles = 1 if shape.tiles <= 2 * chip else 2
    warps = min(MAX_WARPS, -(-shape.chunks // 4))
    depth = min(4, -(-shape.chunks // warps))
    across = min(16 // warps, -(-shape.tiles // (2 * chip * tiles)))
    form = Form(shape, tokens, tiles, max(1, across), warps, depth)
    while form.shared_bytes > target.shared_bytes // 2:
        form = replace(form, depth=form.depth - 1)
    return form


class Block:
    """Emits a block's work: rows n0 = 16 R b on, tokens m0 = T c on."""

    def __init__(self, form: Form, q, w, rows, b, c, warp, lane):
        self.form, self.q, self.w, self.rows = form, q, w, rows
        self.n0, self.m0 = T.bind(b * form.height), T.bind(c * form.tokens)
        self.first_tile = T.bind((b * form.across + warp // form.warps) * form.tiles)
        self.warp, self.lane = warp, lane
        self.base = cuda.shared_bytes(form.shared_bytes)
        self.mine = T.bind(self.base + T.cast(warp * form.warp_bytes, "uint32"))
        self.acc = cuda.local("uint32", 4 * form.tiles * form.columns * form.chains)
        self.weights = cuda.local("uint32", 4 * form.depth * form.tiles)
        self.x = cuda.local("uint32", 8)
        for i in range(4 * form.tiles * form.columns * form.chains):
            cuda.store(self.acc, T.uint32(0), i)

    def accumulate(self) -> None:
        form = self.form
        with T.serial(form.rounds) as r:
            first = T.bind((self.warp % form.warps * form.rounds + r) * form.depth)
            self._load_weights(first)
            if form.early:
                cuda.wait_for_launch()
                cuda.let_next_launch()
            self._copy_tokens(first)
            for d in range(form.depth):
                for group in range(form.columns):
                    self._multiply(d, group)
            T.evaluate(T.cuda.warp_sync())

    def _load_weights(self, first) -> None:
        form = self.form
        for d in range(form.depth):
            for r in range(form.tiles):
                chunk, tile = first + d, self.first_tile + r
                inside = []
                if not form.is_even:
                    inside.append(chunk < form.shape.chunks)
                if form.shape.tiles % (form.across * form.tiles):
                    inside.append(tile < form.shape.tiles)
                options = {"pred": tirx.all(*inside)} if inside else {}
                at = T.address_of(self.w[tile, chunk, self.lane * 16])
                cuda.load_16_bytes(self.weights, 4 * (d * form.tiles + r), at, **options)

    def _copy_tokens(self, first) -> None:
        """x[T, 128 D] of the warp's columns; zeros past M and K."""
        form, k = self.form, self.form.shape.k
        pieces = form.depth * CHUNK // 16
        with cuda.strided(form.tokens * pieces, self.lane, cuda.WARP) as i:
            token, column = i // pieces, T.bind(first * CHUNK + i % pieces * 16)
            to = self.mine + T.cast(token * form.pitch + i % pieces * 16, "uint32")
            row = self.m0 + token
            if k % 16 == 0:
                inside = tirx.all(column < k, row < self.rows)
                source = T.address_of(self.q[T.min(row, self.rows - 1), T.min(column, k - 16)])
                cuda.copy_16_bytes(to, source, T.Select(inside, 16, 0))
            else:
                copy_odd_bytes(self.q, self.rows, k, row, column, to)
        cuda.commit_copies()
        cuda.wait_for_copies()
        T.evaluate(T.cuda.warp_sync())

    def _multiply(self, d: int, group: int) -> None:
        form, lane = self.form, self.lane
        token = lane % 8 if form.tokens > 1 else 0
        row = self.mine + T.cast((8 * group + token) * form.pitch, "uint32")
        for v in range(2):
            at = row + T.cast(d * CHUNK + 64 * v + lane // 8 * 16, "uint32")
            cuda.load_matrices(self.x, 4 * v, at)
        for i in range(FIELDS):
            b = self.x[i], self.x[4 + i]
            for r in range(form.tiles):
                first = 4 * (d * form.tiles + r)
                a = [field(self.weights[first + j], i) for j in range(4)]
                cuda.multiply(self.acc, self._register(r, group, i % form.chains), a, b)

    def _register(self, r: int, group: int, chain: int) -> int:
        return 4 * ((chain * self.form.tiles + r) * self.form.columns + group)

    def _sum_address(self, warp, token, row) -> Expr:
        rows = self.form.tiles * TILE
        return self.base + T.cast(((warp * self.form.tokens + token) * rows + row) * 4, "uint32")

    def share(self) -> None:
        """Every warp's sums to shared memory, where x was."""
        form = self.form
        cuda.sync()
        for r in range(form.tiles):
            for group in range(form.columns):
                for i in range(4):
                    row = r * TILE + self.lane // 4 + i // 2 * 8
                    token = 8 * group + self.lane % 4 * 2 + i % 2
                    value = self.acc[self._register(r, group, 0) + i]
                    for chain in range(1, form.chains):
                        value = value + self.acc[self._register(r, group, chain) + i]
                    if form.tokens > 1:
                        cuda.ptx("st.shared.b32", self._sum_address(self.warp, token, row), value)
                    elif i % 2 == 0:
                        with cuda.when(self.lane % 4 == 0):
                            at = self._sum_address(self.warp, 0, row)
                            cuda.ptx("st.shared.b32", at, value)
        cuda.sync()

    def finish(self, end: Epilogue, scale, w_scale, extra, out) -> None:
        form, word, late = self.form, cuda.local("uint32", 1), cuda.local("float32", 2)
        rows = form.tiles * TILE
        t, count = self.warp * cuda.WARP + self.lane, form.tokens * form.height
        with cuda.strided(count, t, form.block_warps * cuda.WARP) as i:
            token, row = i // form.height, i % form.height
            m, n = T.bind(self.m0 + token), T.bind(self.n0 + row)
            with cuda.when(cuda.both(m < self.rows, n < form.shape.n)):
                total = cuda.local("int32", 1)
                cuda.store(total, T.int32(0), 0)
                for warp in range(form.warps):
                    at = self._sum_address(row // rows * form.warps + warp, token, row % rows)
                    cuda.ptx("ld.shared.b32", word[0], at)
                    cuda.store(total, total[0] + T.reinterpret("int32", word[0]), 0)
                cuda.load_in_order(late, 0, scale[m])
                if end.extra:
                    cuda.load_in_order(late, 1, extra[m, n])
                acc = T.shift_right(total[0], WEIGHT_BITS)
                y = end.value(T.cast(acc, "float32"), late[0] * w_scale[n], late[1])
                cuda.store(out, y, m, n)


def field(word: Expr, i: int) -> Expr:
    """2^6 times the weights of field i, a signed byte each."""
    shift = WEIGHT_BITS - 2 * i
    return (word << T.uint32(shift) if shift else word) & T.uint32(MASK)


def copy_odd_bytes(q, rows, k: int, row, column, to) -> None:
    """16 bytes of a row whose length is no multiple of 16; zeros past M and K."""
    for word in range(4):
        value: Any = T.uint32(0)
        for j in range(4):
            at = column + 4 * word + j
            inside = tirx.all(at < k, row < rows)
            byte = T.if_then_else(inside, T.reinterpret("uint8", q[row, at]), T.uint8(0))
            value = value | T.cast(byte, "uint32") << T.uint32(8 * j)
        cuda.ptx("st.shared.b32", to + T.uint32(4 * word), value)


def launch(form: Form, rows, end: Epilogue, q, scale, w, w_scale, extra, out) -> None:
    with cuda.blocks(-(-form.shape.tiles // (form.across * form.tiles))) as b:
        with cuda.blocks(T.ceildiv(rows, form.tokens), "y") as c:
            with cuda.threads(form.block_warps, "y") as warp:
                with cuda.threads(cuda.WARP) as lane:
                    block = Block(form, q, w, rows, b, c, warp, lane)
                    block.accumulate()
                    block.share()
                    block.finish(end, scale, w_scale, extra, out)


def launch_small_batch(
    one: Any, target: GpuTarget, rows, end: Epilogue, *tensors, early: bool = False
) -> None:
    """The form for this many tokens, chosen when the kernel is launched; `one` is that of one."""
    some, many = (
        replace(some_tokens(one.shape, tokens, target), early=early) for tokens in (8, 16)
    )
    with T.If(rows == 1):
        with T.Then():
            one.launch(rows, end, *tensors)
        with T.Else():
            with T.If(rows <= 8):
                with T.Then():
                    with cuda.some_rows(rows):
                        launch(some, rows, end, *tensors)
                with T.Else():
                    launch(many, rows, end, *tensors)


def kernel(
    n: int,
    k: int,
    act_bits: int,
    target: GpuTarget,
    epilogue: str,
    *,
    chunks_a_warp: int = 0,
    tiles_a_block: int = 0,
) -> PrimFunc:
    end = EPILOGUES[epilogue]
    shape, rows = Shape(n, k), Var("M", "int64")
    one = one_token(shape, target, chunks_a_warp, tiles_a_block)

    @T.prim_func(s_tir=True)
    def ternary_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        w: T.Buffer((shape.tiles, shape.chunks, CHUNK_BYTES), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        extra: T.Buffer((rows, n), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            launch_small_batch(one, target, rows, end, q, scale, w, w_scale, extra, out)

    return end.finish(ternary_matmul)
