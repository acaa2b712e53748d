"""ternary_matmul on Hopper: a prompt's GEMM by wgmma; up to 16 tokens are cuda.py's forms.

    for n0, m0 in N/(64 G), M/T:                     blockIdx.y, blockIdx.x
        for chunk in K/128:                          S stages in flight
            x[T, 128], w[64 G, 128] -> shared        cp.async; x under the 128-byte swizzle
            a[16] = w << 6 - 2i & 0xC0               registers, while the last chunk multiplies
            acc[64, T] += a . x                      4 wgmma m64nTk32 of each warpgroup G
        out[T, 64 G] = epilogue(acc / 64)

    form  | G | T   | S | M
    wide  | 2 | 128 | 5 | more than 128
    small | 1 | 64  | 8 | 17 to 128: blocks enough for the multiprocessors at N = 2560

    tile  | bound by
    G T   | two blocks a multiprocessor, one stores while the other multiplies: 128 registers
    S     | shared memory: 20 KB a stage of the wide form; loads in flight: 10 KB a stage

A code in the top bits of a byte is 64 w: |acc| < 2^13 K, int32 for K < 2^18.
"""

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Epilogue
from schedules.intrin import cuda
from schedules.targets import GpuTarget
from schedules.ternary_matmul import cuda as small_batch
from schedules.ternary_matmul.cuda import (
    CHUNK,
    CHUNK_BYTES,
    FIELDS,
    TILE,
    WEIGHT_BITS,
    Shape,
    field,
)

KNOBS = small_batch.KNOBS  # of the form for one token
layout = small_batch.layout
GROUP_ROWS = 64  # of weights, of a warpgroup
GROUP_THREADS = 128
SWIZZLE_BYTES = 1024  # what the 128-byte swizzle repeats after: 8 rows


@dataclass(frozen=True)
class Form:
    shape: Shape
    groups: int  # G
    tokens: int  # T
    stages: int  # S

    @property
    def threads(self) -> int:
        return self.groups * GROUP_THREADS

    @property
    def token_bytes(self) -> int:
        """Of a stage, before its weights."""
        return self.tokens * CHUNK

    @property
    def stage_bytes(self) -> int:
        return self.token_bytes + 16 * self.threads

    @property
    def pairs(self) -> int:
        """Steps of two chunks; an odd last one meets zeros."""
        return -(-self.shape.chunks // 2)


class Block:
    """Emits a block's work: rows n0 = 64 G b on, tokens m0 = T c on."""

    def __init__(self, form: Form, q, w, rows, b, c, t):
        self.form, self.q, self.w, self.rows = form, q, w, rows
        self.n0, self.m0 = T.bind(b * (form.groups * GROUP_ROWS)), T.bind(c * form.tokens)
        self.t, self.lane = t, T.bind(t % cuda.WARP)
        # A warp's 16 rows are a tile of the layout
        tile = b * (form.threads // cuda.WARP) + t // cuda.WARP
        self.tile = T.bind(T.min(tile, form.shape.tiles - 1))
        size = form.stages * form.stage_bytes + SWIZZLE_BYTES
        address = cuda.shared_bytes(size)
        aligned = address + T.uint32(SWIZZLE_BYTES - 1) & T.uint32(-SWIZZLE_BYTES % 2**32)
        self.base = T.bind(aligned)
        self.acc = cuda.local("uint32", form.tokens // 2)
        self.words = cuda.local("uint32", 4)
        self.a = cuda.local("uint32", 2 * 4 * FIELDS)

    def multiply(self) -> None:
        form = self.form
        for i in range(form.tokens // 2):
            cuda.store(self.acc, T.uint32(0), i)
        for chunk in range(form.stages - 2):
            self._copy(chunk)
        cuda.wait_for_copies(form.stages - 3)
        self._unpack(0, 0)
        with T.serial(form.pairs) as pair:
            for parity in range(2):
                self._step(2 * pair + parity, parity)
        cuda.ptx("wgmma.wait_group.sync.aligned", 0)

    def _step(self, chunk: Expr, parity: int) -> None:
        """Multiplies a chunk; meanwhile the next one is unpacked, and a later one on its way."""
        form = self.form
        cuda.wait_for_copies(form.stages - 4)  # the chunk and, for `_unpack`, the next one
        cuda.ptx("fence.proxy.async")  # cp.async wrote what the tensor cores read
        cuda.sync()
        cuda.ptx("wgmma.fence.sync.aligned")
        stage = self._stage(chunk)
        for step in range(4):
            self._wgmma(stage, parity, step)
        cuda.ptx("wgmma.commit_group.sync.aligned")
        cuda.ptx("wgmma.wait_group.sync.aligned", 1)
        self._copy(chunk + form.stages - 2)  # where the chunk before the last one was
        self._unpack(chunk + 1, 1 - parity)

    def _stage(self, chunk: Expr | int) -> Expr:
        form = self.form
        return T.bind(self.base + T.cast(chunk % form.stages * form.stage_bytes, "uint32"))

    def _wgmma(self, stage: Expr, parity: int, step: int) -> None:
        """acc[64, T] += a[64, 32] . x[T, 32]: columns 32 step on of the chunk."""
        tokens = self.form.tokens
        acc = [self.acc[i] for i in range(tokens // 2)]
        first = parity * 4 * FIELDS + 4 * step
        a = [self.a[first + i] for i in range(4)]
        x = cuda.swizzled_matrix(stage + T.uint32(32 * step))
        instruction = f"wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.s8.s8"
        cuda.ptx(instruction, *acc, *a, x, T.ptx.pred(True))

    def _own_words(self, stage: Expr) -> Expr:
        """Where a thread's 16 bytes of weights are: it copies and reads them itself."""
        return stage + T.uint32(self.form.token_bytes) + T.cast(self.t * 16, "uint32")

    def _unpack(self, chunk: Expr | int, parity: int) -> None:
        """a[parity, step, 4] of the chunk: a step is two fields of a 64-column run."""
        four = [self.words[i] for i in range(4)]
        cuda.ptx("ld.shared.v4.b32", *four, self._own_words(self._stage(chunk)))
        for step in range(4):
            for i in range(4):  # rows g, g + 8 of the first 16 columns, then of the others
                word = self.words[step // 2 * 2 + i % 2]
                value = field(word, step % 2 * 2 + i // 2)
                cuda.store(self.a, value, (parity * 4 + step) * FIELDS + i)

    def _copy(self, chunk: Expr | int) -> None:
        """Tokens and weights of a chunk to its stage; zeros past M and K.

        The 16 bytes p of a token r lie at p ^ r % 8.
        """
        form, k = self.form, self.form.shape.k
        stage = self._stage(chunk)
        at = T.min(chunk, form.shape.chunks - 1)
        weights = T.address_of(self.w[self.tile, at, self.lane * 16])
        cuda.copy_16_bytes(self._own_words(stage), weights)
        pieces = CHUNK // 16
        piece = self.t % pieces  # of every row that the thread copies
        column = T.bind(chunk * CHUNK + piece * 16)
        for i in range(form.tokens * pieces // form.threads):
            row = i * (form.threads // pieces) + self.t // pieces
            m = self.m0 + row
            to = stage + T.cast(row * CHUNK + T.bitwise_xor(piece, row % 8) * 16, "uint32")
            source = self.q[T.min(m, self.rows - 1), T.min(column, k - 16)]
            valid = T.Select(cuda.both(column < k, m < self.rows), 16, 0)
            cuda.copy_16_bytes(to, T.address_of(source), valid)
        cuda.commit_copies()

    def finish(self, end: Epilogue, scale, w_scale, extra, out) -> None:
        """Register 4j + 2h + i holds row g + 8h of the warp and token 8j + 2 (lane % 4) + i."""
        form = self.form
        for half in range(2):
            row = self.t // cuda.WARP * TILE + self.lane // 4 + 8 * half
            n = T.bind(self.n0 + row)
            with cuda.when(n < form.shape.n):
                weight_scale = T.bind(w_scale[n])
                for j in range(form.tokens // 8):
                    for i in range(2):
                        m = T.bind(self.m0 + 8 * j + self.lane % 4 * 2 + i)
                        with cuda.when(m < self.rows):
                            acc = T.reinterpret("int32", self.acc[4 * j + 2 * half + i])
                            acc = T.cast(T.shift_right(acc, WEIGHT_BITS), "float32")
                            other = extra[m, n] if end.extra else None
                            cuda.store(out, end.value(acc, scale[m] * weight_scale, other), m, n)


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
    if k % 16:  # rows that cp.async cannot copy
        knobs = {"chunks_a_warp": chunks_a_warp, "tiles_a_block": tiles_a_block}
        return small_batch.kernel(n, k, act_bits, target, epilogue, **knobs)
    end, shape, rows = EPILOGUES[epilogue], Shape(n, k), Var("M", "int64")
    one = small_batch.one_token(shape, target, chunks_a_warp, tiles_a_block)

    def launch(form: Form, q, scale, w, w_scale, extra, out):
        with cuda.blocks(T.ceildiv(rows, form.tokens)) as c:
            with cuda.blocks(-(-n // (form.groups * GROUP_ROWS)), "y") as b:
                with cuda.threads(form.threads) as t, cuda.min_blocks(2):
                    block = Block(form, q, w, rows, b, c, t)
                    block.multiply()
                    block.finish(end, scale, w_scale, extra, out)

    def by_rows(*tensors):
        with T.If(rows <= 16):
            with T.Then():
                small_batch.launch_small_batch(one, target, rows, end, *tensors)
            with T.Else():
                with T.If(rows <= 128):
                    with T.Then():
                        launch(Form(shape, 1, 64, 8), *tensors)
                    with T.Else():
                        launch(Form(shape, 2, 128, 5), *tensors)

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
