"""ternary_matmul on CUDA's tensor cores of any arch: a prompt's GEMM by mma.sync, INT4 as nibbles.

Up to 16 tokens are cuda.py's forms, which wait for memory whatever the tensor cores do.

    for n0, m0 in N/(16 R W), M/T:                   blockIdx.y, blockIdx.x
        for chunk in K/128:
            x[T, 128] -> shared                      through registers, a chunk ahead; two buffers
            w[R] -> shared                           cp.async, S stages, a thread's own 16 bytes
            for step in 2 or 4:                      columns of one product
                a[R] = w << s & mask                 registers
                for group in T/8:
                    b = ldmatrix(x)                  4 registers for 16 tokens
                    acc[R, group] += a . b           mma
        out[T, 16 R W] = epilogue(acc / 2^s)

    operands | activations          | a chunk of x     | weights       | mma         | where
    nibbles  | INT4                 | 64 bytes a token | 4 w, a nibble | m16n8k64 s4 | INT4 units
    bytes    | INT8, INT4 elsewhere | 128              | 64 w, a byte  | m16n8k32 s8 | every arch

A nibble's two fields lie 32 columns apart in both operands: x[c] | x[c + 32] << 4, and w's fields
i, i + 2 as they are. So 16 weights take 3 instructions where bytes take 7, and half the products.

    form  | W | R | M
    wide  | 8 | 2 | where its blocks fill the chip
    small | 4 | 1 | less

    tile | value | bound by
    T    | 64    | registers: 4 R T/8 sums, two blocks a multiprocessor
    S    | 3     | shared memory: 43 KB a block, two in the 100 KB of sm_86; the knob `stages`

|acc| < 2^13 K of bytes, 2^5 K of nibbles: int32 for K < 2^18.
"""

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Epilogue
from schedules.intrin import cuda
from schedules.targets import GpuTarget
from schedules.ternary_matmul import cuda as small_batch
from schedules.ternary_matmul.cuda import CHUNK, CHUNK_BYTES, TILE, Shape

KNOBS = {**small_batch.KNOBS, "stages": (3, 2, 4)}  # S; the others: of the form for one token
layout = small_batch.layout
TOKENS = 64  # T
WARPS = 16  # of a multiprocessor: 128 registers a thread
PAIRS = 4  # of a token's 16-byte pieces in a chunk, 32 columns apart
LOW_NIBBLES = 0x0F0F0F0F


@dataclass(frozen=True)
class Operands:
    """How a chunk's 128 columns become operands of mma."""

    is_nibbles: bool

    @property
    def steps(self) -> int:
        return 2 if self.is_nibbles else 4

    @property
    def weight_bits(self) -> int:
        """A weight is multiplied as 2^bits w."""
        return 2 if self.is_nibbles else 6

    @property
    def run_bytes(self) -> int:
        """Of a token's 64 columns in shared memory; a step has 16 of them."""
        return 16 * self.steps

    @property
    def pitch(self) -> int:
        """Bytes of a token; 16 more than its chunk, for the banks."""
        return 2 * self.run_bytes + 16

    def weights(self, word: Expr, step: int) -> Expr:
        mask, shift = T.uint32(0xCCCCCCCC if self.is_nibbles else 0xC0C0C0C0), 2 * step
        shift = self.weight_bits - shift
        return (word << T.uint32(shift) if shift else word) & mask

    def multiply(self, acc, first: int, a, b) -> None:
        (cuda.multiply_int4 if self.is_nibbles else cuda.multiply)(acc, first, a, b)


@dataclass(frozen=True)
class Form:
    shape: Shape
    operands: Operands
    warps: int  # W
    tiles: int  # R
    stages: int  # S

    @property
    def threads(self) -> int:
        return self.warps * cuda.WARP

    @property
    def height(self) -> int:
        """Outputs of a block."""
        return self.warps * self.tiles * TILE

    @property
    def blocks(self) -> int:
        return -(-self.shape.n // self.height)

    @property
    def pairs(self) -> int:
        """Of pieces that a thread brings to shared memory."""
        return TOKENS * PAIRS // self.threads

    @property
    def token_bytes(self) -> int:
        return TOKENS * self.operands.pitch

    @property
    def stage_bytes(self) -> int:
        return self.warps * self.tiles * CHUNK_BYTES

    @property
    def shared_bytes(self) -> int:
        return 2 * self.token_bytes + self.stages * self.stage_bytes


class Block:
    """Emits a block's work: rows n0 = 16 R W b on, tokens m0 = T c on."""

    def __init__(self, form: Form, q, w, rows, b, c, warp, lane):
        self.form, self.q, self.w, self.rows = form, q, w, rows
        self.m0, self.lane = T.bind(c * TOKENS), lane
        self.t = T.bind(warp * cuda.WARP + lane)
        self.tile = T.bind((b * form.warps + warp) * form.tiles)
        self.base = cuda.shared_bytes(form.shared_bytes)
        self.acc = cuda.local("uint32", 4 * form.tiles * TOKENS // 8)
        self.pieces = cuda.local("uint32", 8 * form.pairs)
        self.words = cuda.local("uint32", 4 * form.tiles)
        self.a = cuda.local("uint32", 4 * form.tiles)
        self.b = cuda.local("uint32", 4)

    def multiply(self) -> None:
        for i in range(4 * self.form.tiles * TOKENS // 8):
            cuda.store(self.acc, T.uint32(0), i)
        for chunk in range(self.form.stages - 1):
            self._copy_weights(chunk)
        self._load_tokens(0)
        with T.serial(self.form.shape.chunks) as chunk:
            self._place_tokens(chunk)  # in the buffer that was read two chunks ago
            cuda.wait_for_copies(self.form.stages - 2)
            cuda.sync()
            self._load_tokens(chunk + 1)
            self._copy_weights(chunk + self.form.stages - 1)
            self._read_weights(chunk)
            for step in range(self.form.operands.steps):
                self._multiply(chunk, step)

    def _piece(self, i: int) -> tuple[Expr, Expr, Expr]:
        """(token, 64-column run, which of its two pairs) of the thread's i-th pair."""
        pair = i * self.form.threads + self.t
        return pair // PAIRS, pair % PAIRS // 2, pair % 2

    def _load_tokens(self, chunk: Expr | int) -> None:
        """To registers. Past K any columns do: their weights are zero."""
        k = self.form.shape.k
        for i in range(self.form.pairs):
            token, run, pair = self._piece(i)
            row = T.bind(T.min(self.m0 + token, self.rows - 1))
            for half in range(2):
                column = chunk * CHUNK + run * 64 + half * 32 + pair * 16
                at = T.address_of(self.q[row, T.min(column, k - 16)])
                cuda.load_16_bytes(self.pieces, 8 * i + 4 * half, at)

    def _place_tokens(self, chunk: Expr) -> None:
        """From registers to shared memory, nibbles packed on the way."""
        operands = self.form.operands
        for i in range(self.form.pairs):
            token, run, pair = self._piece(i)
            at = token * operands.pitch + run * operands.run_bytes + pair * 16
            address = T.bind(self._tokens(chunk) + T.cast(at, "uint32"))
            low, high = ([self.pieces[8 * i + 4 * h + j] for j in range(4)] for h in range(2))
            if operands.is_nibbles:
                packed = [T.bind(pack(*words)) for words in zip(low, high, strict=True)]
                cuda.ptx("st.shared.v4.b32", address, *packed)
            else:
                cuda.ptx("st.shared.v4.b32", address, *low)
                cuda.ptx("st.shared.v4.b32", address + T.uint32(32), *high)

    def _tokens(self, chunk: Expr) -> Expr:
        return self.base + T.cast(chunk % 2 * self.form.token_bytes, "uint32")

    def _own_words(self, chunk: Expr | int, r: int) -> Expr:
        """Where a thread's 16 bytes of a tile are: it copies and reads them itself."""
        form = self.form
        at = 2 * form.token_bytes + chunk % form.stages * form.stage_bytes
        return self.base + T.cast(at + (r * form.threads + self.t) * 16, "uint32")

    def _copy_weights(self, chunk: Expr | int) -> None:
        shape = self.form.shape
        for r in range(self.form.tiles):
            tile = T.min(self.tile + r, shape.tiles - 1)
            source = self.w[tile, T.min(chunk, shape.chunks - 1), self.lane * 16]
            cuda.copy_16_bytes(self._own_words(chunk, r), T.address_of(source))
        cuda.commit_copies()

    def _read_weights(self, chunk: Expr) -> None:
        for r in range(self.form.tiles):
            four = [self.words[4 * r + i] for i in range(4)]
            cuda.ptx("ld.shared.v4.b32", *four, self._own_words(chunk, r))

    def _multiply(self, chunk: Expr, step: int) -> None:
        """Two groups of 8 tokens at a time: lane l gives row l % 8 of the matrix l / 8."""
        form, operands = self.form, self.form.operands
        for i in range(4 * form.tiles):
            cuda.store(self.a, operands.weights(self.words[i], step), i)
        for two in range(TOKENS // 16):
            token = 16 * two + self.lane // 16 * 8 + self.lane % 8
            run = self.lane // 8 % 2
            at = token * operands.pitch + run * operands.run_bytes + 16 * step
            cuda.load_matrices(self.b, 0, self._tokens(chunk) + T.cast(at, "uint32"))
            for half in range(2):
                b = self.b[2 * half], self.b[2 * half + 1]
                for r in range(form.tiles):
                    a = [self.a[4 * r + i] for i in range(4)]
                    operands.multiply(self.acc, self._register(r, 2 * two + half), a, b)

    def _register(self, r: int, group: int) -> int:
        return 4 * (r * TOKENS // 8 + group)

    def finish(self, end: Epilogue, scale, w_scale, extra, out) -> None:
        """Register 2h + i of a group: row g + 8h of the tile, token 2 (lane % 4) + i."""
        for r in range(self.form.tiles):
            for half in range(2):
                n = T.bind((self.tile + r) * TILE + self.lane // 4 + 8 * half)
                with cuda.when(n < self.form.shape.n):
                    weight_scale = T.bind(w_scale[n])
                    for group in range(TOKENS // 8):
                        for i in range(2):
                            register = self.acc[self._register(r, group) + 2 * half + i]
                            m = T.bind(self.m0 + 8 * group + self.lane % 4 * 2 + i)
                            with cuda.when(m < self.rows):
                                other = extra[m, n] if end.extra else None
                                y = end.value(self._sum(register), scale[m] * weight_scale, other)
                                cuda.store(out, y, m, n)

    def _sum(self, register: Expr) -> Expr:
        bits = self.form.operands.weight_bits
        return T.cast(T.shift_right(T.reinterpret("int32", register), bits), "float32")


def pack(low: Expr, high: Expr) -> Expr:
    """Four signed bytes in [-8, 7] of each: nibbles, those of `high` on top."""
    return low & T.uint32(LOW_NIBBLES) | (high << T.uint32(4)) & T.uint32(LOW_NIBBLES << 4)


def kernel(
    n: int,
    k: int,
    act_bits: int,
    target: GpuTarget,
    epilogue: str,
    *,
    chunks_a_warp: int = 0,
    tiles_a_block: int = 0,
    stages: int = 3,
) -> PrimFunc:
    if k % 16:  # rows that are not read by 16 bytes
        knobs = {"chunks_a_warp": chunks_a_warp, "tiles_a_block": tiles_a_block}
        return small_batch.kernel(n, k, act_bits, target, epilogue, **knobs)
    end, shape, rows = EPILOGUES[epilogue], Shape(n, k), Var("M", "int64")
    one = small_batch.one_token(shape, target, chunks_a_warp, tiles_a_block)
    operands = Operands(act_bits == 4 and target.has_int4_units)
    small, wide = (Form(shape, operands, *size, stages) for size in ((4, 1), (8, 2)))
    fills_chip = (-(-target.num_multiprocessors // wide.blocks) - 1) * TOKENS

    def launch(form: Form, q, scale, w, w_scale, extra, out):
        with cuda.blocks(T.ceildiv(rows, TOKENS)) as c:
            with cuda.blocks(form.blocks, "y") as b:
                with cuda.threads(form.warps, "y") as warp:
                    with cuda.threads(cuda.WARP) as lane, cuda.min_blocks(WARPS // form.warps):
                        block = Block(form, q, w, rows, b, c, warp, lane)
                        block.multiply()
                        block.finish(end, scale, w_scale, extra, out)

    def by_rows(*tensors):
        with T.If(rows <= 16):
            with T.Then():
                small_batch.launch_small_batch(one, target, rows, end, *tensors)
            with T.Else():
                with T.If(rows <= fills_chip):
                    with T.Then():
                        launch(small, *tensors)
                    with T.Else():
                        launch(wide, *tensors)

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
            by_rows(q, scale, w, w_scale, extra, out)

    return end.finish(ternary_matmul)
