"""ternary_matmul on Hopper: a prompt's GEMM by wgmma; one_token_sm90.py and few_tokens_sm90.py have
the forms of up to 16 tokens.

    for n0, m0 in N/(64 G), M/T:                     blockIdx.y, blockIdx.x
        for p in P:                                  shares of the columns: every P-th chunk
            for chunk in K/128/P:                    S stages in flight
                x[T, 128], w[64 G, 128] -> shared    cp.async; x under the 128-byte swizzle
                a[16] = w << 6 - 2i & 0xC0           registers, while the last chunk multiplies
                acc[64, T] += a . x                  4 wgmma m64nTk32 of each warpgroup of G P
        out[T, 64 G] = epilogue(sum of acc over P / 64)

    G | T   | S | P | blocks a multiprocessor | us of a tile of 54 chunks, alone and by twos
    2 | 160 | 8 | 1 | 1                       | 28.0
    2 | 128 | 5 | 1 | 2                       | 23.7, 39.6
    2 | 64  | 8 | 1 | 2                       | 16.4, 25.9
    1 | 64  | 5 | 2 | 2                       | 13.1, 21.3

    tile  | bound by
    T, G  | registers: 4 warpgroups of 128 or 2 of 255, T / 2 of them acc and 32 a
    S     | shared memory: 24.5, 20.5, 12 and 20 KB a stage
    P     | few tiles: warpgroups share the columns of one

The launch takes the form that `Form.cost` expects to be done first: rounds of tiles over the chip's
multiprocessors times what was measured of one. Two blocks on a multiprocessor multiply at 95 % of
what its tensor cores can, filling the pipeline and writing the results not counted; the results,
float32, are what bounds K of 20 chunks.

A code in the top bits of a byte is 64 w: |acc| < 2^13 K, int32 for K < 2^18.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Epilogue
from schedules.intrin import cuda
from schedules.targets import GpuTarget
from schedules.ternary_matmul import cuda as small_batch
from schedules.ternary_matmul import few_tokens_sm90
from schedules.ternary_matmul.cuda import (
    CHUNK,
    CHUNK_BYTES,
    FIELDS,
    TILE,
    WEIGHT_BITS,
    Shape,
    field,
)
from schedules.ternary_matmul.one_token_sm90 import one_token

# `stages`: S of every form, 0 is the form's own; the others are of the form for one token
KNOBS = {**small_batch.KNOBS, "stages": (0, 4, 6)}
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
    splits: int  # P, warpgroups that share a tile's columns
    blocks: int  # on a multiprocessor
    times: tuple[int, int]  # of a tile: alone on a multiprocessor, with another one

    @property
    def threads(self) -> int:
        """Of a share of the columns."""
        return self.groups * GROUP_THREADS

    @property
    def block_threads(self) -> int:
        return self.splits * self.threads

    @property
    def share_bytes(self) -> int:
        return self.stages * self.stage_bytes

    @property
    def shared_bytes(self) -> int:
        return self.splits * self.share_bytes + SWIZZLE_BYTES

    @property
    def columns(self) -> int:
        """Of tiles: how many have the same tokens."""
        return -(-self.shape.n // (self.groups * GROUP_ROWS))

    def cost(self, rows: Expr, chip: int) -> Expr:
        """Time of all tiles, in the unit of `times`."""
        tiles, (alone, together) = T.ceildiv(rows, self.tokens) * self.columns, self.times
        rounds = T.ceildiv(tiles, self.blocks * chip)
        return T.Select(tiles <= chip, T.int64(alone), rounds * together)

    @property
    def token_bytes(self) -> int:
        """Of a stage, before its weights."""
        return self.tokens * CHUNK

    @property
    def stage_bytes(self) -> int:
        return self.token_bytes + 16 * self.threads

    @property
    def pairs(self) -> int:
        """Steps of two chunks of every share; those past the end meet zeros."""
        return -(-self.shape.chunks // (2 * self.splits))


class Block:
    """Emits a block's work: rows n0 = 64 G b on, tokens m0 = T c on."""

    def __init__(self, form: Form, q, w, rows, b, c, t):
        self.form, self.q, self.w, self.rows = form, q, w, rows
        self.n0, self.m0 = T.bind(b * (form.groups * GROUP_ROWS)), T.bind(c * form.tokens)
        self.split, self.t = T.bind(t // form.threads), T.bind(t % form.threads)
        self.lane = T.bind(t % cuda.WARP)
        # A warp's 16 rows are a tile of the layout
        tile = b * (form.threads // cuda.WARP) + self.t // cuda.WARP
        self.tile = T.bind(T.min(tile, form.shape.tiles - 1))
        address = cuda.shared_bytes(form.shared_bytes)
        aligned = address + T.uint32(SWIZZLE_BYTES - 1) & T.uint32(-SWIZZLE_BYTES % 2**32)
        self.start = T.bind(aligned)
        self.base = T.bind(self.start + T.cast(self.split * form.share_bytes, "uint32"))
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
        if form.splits > 1:
            self._add_shares()

    def _add_shares(self) -> None:
        """acc of the first share: the sum of all, through shared memory where the stages were."""
        form, word = self.form, cuda.local("uint32", 1)
        cuda.wait_for_copies()
        cuda.sync()
        registers = form.tokens // 2
        own = T.bind(self.start + T.cast(self.t * 4, "uint32"))
        with cuda.when(self.split > 0):
            share = T.bind(
                own + T.cast((self.split - 1) * (4 * registers * form.threads), "uint32")
            )
            for i in range(registers):
                cuda.ptx("st.shared.b32", share + T.uint32(4 * i * form.threads), self.acc[i])
        cuda.sync()
        with cuda.when(self.split == 0):
            for other in range(form.splits - 1):
                for i in range(registers):
                    at = own + T.uint32(4 * (other * registers + i) * form.threads)
                    cuda.ptx("ld.shared.b32", word[0], at)
                    cuda.store(self.acc, self.acc[i] + word[0], i)

    def _step(self, chunk: Expr, parity: int) -> None:
        """Multiplies a chunk; meanwhile the next one is unpacked, and a later one on its way."""
        form = self.form
        cuda.wait_for_copies(form.stages - 4)  # the chunk and, for `_unpack`, the next one
        cuda.ptx("fence.proxy.async.shared::cta")  # cp.async wrote what the tensor cores read
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
        chunk = T.bind(chunk * form.splits + self.split)
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
        with cuda.when(self.split == 0):
            self._write(end, scale, w_scale, extra, out)

    def _write(self, end: Epilogue, scale, w_scale, extra, out) -> None:
        """Loads are of the nearest element inside, so that none waits for a condition."""
        row = self.t // cuda.WARP * TILE + self.lane // 4
        outputs = [T.bind(self.n0 + row + 8 * half) for half in range(2)]
        last = self.form.shape.n - 1
        weight_scales = [T.bind(w_scale[T.min(n, last)]) for n in outputs]
        with cuda.unrolled(self.form.tokens // 8) as j:
            for i in range(2):
                m = T.bind(self.m0 + 8 * j + self.lane % 4 * 2 + i)
                near = T.bind(T.min(m, self.rows - 1))
                for half, (n, weight_scale) in enumerate(zip(outputs, weight_scales, strict=True)):
                    acc = T.reinterpret("int32", self.acc[4 * j + (2 * half + i)])
                    acc = T.cast(T.shift_right(acc, WEIGHT_BITS), "float32")
                    other = T.bind(extra[near, T.min(n, last)]) if end.extra else None
                    value = T.bind(end.value(acc, scale[near] * weight_scale, other))
                    with cuda.when(cuda.both(m < self.rows, n <= last)):
                        cuda.store(out, value, m, n)


def launch(form: Form, rows, end: Epilogue, q, scale, w, w_scale, extra, out) -> None:
    with cuda.blocks(T.ceildiv(rows, form.tokens)) as c:
        with cuda.blocks(form.columns, "y") as b:
            with cuda.threads(form.block_threads) as t, cuda.min_blocks(form.blocks):
                cuda.wait_for_launch()
                block = Block(form, q, w, rows, b, c, t)
                block.multiply()
                block.finish(end, scale, w_scale, extra, out)


def launch_cheapest(forms: Sequence[Form], chip: int, rows, end: Epilogue, *tensors) -> None:
    first, *others = forms
    if not others:
        launch(first, rows, end, *tensors)
        return
    cost = first.cost(rows, chip)
    with T.If(tirx.all(*(cost <= other.cost(rows, chip) for other in others))):
        with T.Then():
            launch(first, rows, end, *tensors)
        with T.Else():
            launch_cheapest(others, chip, rows, end, *tensors)


def forms_of(shape: Shape, stages: int, target: GpuTarget) -> list[Form]:
    forms = [
        Form(shape, 2, 160, 8, 1, 1, (280, 280)),
        Form(shape, 2, 128, 5, 1, 2, (237, 396)),
        Form(shape, 2, 64, 8, 1, 2, (164, 259)),
        Form(shape, 1, 64, 5, 2, 2, (131, 213)),
    ]
    if stages:
        forms = [replace(form, stages=stages) for form in forms]
    most = max(form.shared_bytes for form in forms)
    if most > target.shared_bytes:
        raise ValueError(f"ternary_matmul: {stages} stages need {most} bytes of shared memory")
    return forms


def launch_rows(
    shape: Shape, one, stages: int, target: GpuTarget, rows, end: Epilogue, *tensors
) -> None:
    """The form for any number of rows; `one` is that of one token."""
    forms = forms_of(shape, stages, target)
    if shape.k % 16:  # rows that cp.async cannot copy
        small_batch.launch_small_batch(one, target, rows, end, *tensors, early=True)
        return
    few = [few_tokens_sm90.form_of(shape, tokens, target) for tokens in (8, 16)]
    with T.If(rows <= 16):
        with T.Then():
            launch_few([one, *few], [1, 8], rows, end, *tensors)
        with T.Else():
            launch_cheapest(forms, target.num_multiprocessors, rows, end, *tensors)


def launch_few(forms: Sequence, most: Sequence[int], rows, end: Epilogue, *tensors) -> None:
    """The first form for this many rows: form i takes most[i], the last any."""
    if not most:
        forms[0].launch(rows, end, *tensors)
        return
    with T.If(rows <= most[0]):
        with T.Then():
            with cuda.some_rows(rows):
                forms[0].launch(rows, end, *tensors)
        with T.Else():
            launch_few(forms[1:], most[1:], rows, end, *tensors)


def kernel(
    n: int,
    k: int,
    act_bits: int,
    target: GpuTarget,
    epilogue: str,
    *,
    chunks_a_warp: int = 0,
    tiles_a_block: int = 0,
    stages: int = 0,
) -> PrimFunc:
    end, shape, rows = EPILOGUES[epilogue], Shape(n, k), Var("M", "int64")
    one = one_token(shape, act_bits, target, chunks_a_warp, tiles_a_block)

    @T.prim_func(s_tir=True)
    def ternary_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        w: T.Buffer((shape.tiles, shape.chunks, CHUNK_BYTES), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        extra: T.Buffer((rows, n), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, cuda.WAITS_ITSELF: True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            launch_rows(shape, one, stages, target, rows, end, q, scale, w, w_scale, extra, out)

    return end.finish(ternary_matmul)
