"""ternary_matmul of 2 to 16 tokens on Hopper: weights and tokens to shared memory by bulk copies.

    for tiles of b: N/16 shared out evenly           blockIdx.x: a block a multiprocessor
        for stage in K/(128 W):                      B of them on their way, a barrier each
            w[P, W], x[T, 128 W] -> shared           a copy a tile and a token
            for warp in V W:                         threadIdx.y: R tiles, a chunk of the stage
                b = ldmatrix(x)                      8 registers for 8 tokens
                acc[R, T/8] += (w << 6 - 2i & 0xC0) . b      mma m16n8k32, i in 4
        out[T, 16 P] = epilogue(sum of acc over W warps / 64)    shared memory

    tile | value                         | bound by
    T    | 8 or 16                       | the product's columns
    P    | what a multiprocessor has     | every tile of a block shares its tokens
    R    | 2                             | b is read once for two tiles
    W, V | 16 warps, few of them idle    | two launches side by side: half its registers each
    B    | two or more, as many as fit   | the same: half its shared memory

Weights do not depend on the launch before: the first B stages of them are asked for before it has
ended. A code in the top bits of a byte is 64 w: |acc| < 2^13 K, int32 for K < 2^18.
"""

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.epilogue import Epilogue
from schedules.intrin import bulk_sm90 as bulk
from schedules.intrin import cuda
from schedules.targets import GpuTarget
from schedules.ternary_matmul.cuda import (
    CHUNK,
    CHUNK_BYTES,
    FIELDS,
    TILE,
    WEIGHT_BITS,
    Shape,
    field,
)

GROUP = 8  # tokens of a product
MAX_WARPS = 16
MOST_TILES = 16  # of a block
ALIGN = 128
GAP = 16  # bytes between rows of tokens, 4 words between rows of sums: for the banks


@dataclass(frozen=True)
class Form:
    """How tiles and columns are shared out, and what lies where in shared memory."""

    shape: Shape
    tokens: int  # T
    blocks: int
    room: int  # bytes of shared memory for the stages

    @property
    def tiles(self) -> int:
        """P, at most."""
        return -(-self.shape.tiles // self.blocks)

    @property
    def together(self) -> int:
        """R"""
        return min(2, self.tiles)

    @property
    def across(self) -> int:
        """V"""
        return -(-self.tiles // self.together)

    @property
    def stages(self) -> int:
        return -(-self.shape.chunks // (MAX_WARPS // self.across))

    @property
    def warps(self) -> int:
        """W: chunks of a stage. Two at least: the number of an only one would be a constant."""
        return max(2, -(-self.shape.chunks // self.stages))

    @property
    def block_warps(self) -> int:
        return self.across * self.warps

    @property
    def groups(self) -> int:
        return self.tokens // GROUP

    @property
    def columns(self) -> int:
        """Of a stage."""
        return self.warps * CHUNK

    @property
    def pitch(self) -> int:
        return self.columns + GAP

    @property
    def weights_bytes(self) -> int:
        """Of a stage, before its tokens."""
        return self.tiles * self.warps * CHUNK_BYTES

    @property
    def stage_bytes(self) -> int:
        return -(-(self.weights_bytes + self.tokens * self.pitch) // ALIGN) * ALIGN

    @property
    def buffers(self) -> int:
        """B"""
        return min(self.stages, max(2, self.room // self.stage_bytes))

    @property
    def sums_pitch(self) -> int:
        """Bytes from one token's sums to the next's."""
        return 4 * self.tiles_height + GAP

    @property
    def tiles_height(self) -> int:
        """Rows of all warps' tiles."""
        return self.across * self.together * TILE

    @property
    def barriers(self) -> int:
        sums = self.warps * self.tokens * self.sums_pitch
        return -(-max(self.buffers * self.stage_bytes, sums) // ALIGN) * ALIGN

    @property
    def shared_bytes(self) -> int:
        return self.barriers + self.buffers * bulk.BARRIER_BYTES

    def launch(self, rows, end: Epilogue, q, scale, w, w_scale, extra, out) -> None:
        with cuda.blocks(self.blocks) as b:
            threads = cuda.threads(self.block_warps, "y"), cuda.threads(cuda.WARP)
            with threads[0] as warp, threads[1] as lane, cuda.min_blocks(2):
                block = Block(self, q, w, rows, b, warp, lane)
                block.start()
                block.accumulate()
                block.share()
                block.finish(end, scale, w_scale, extra, out)


def form_of(shape: Shape, tokens: int, target: GpuTarget) -> Form:
    blocks = min(target.num_multiprocessors, shape.tiles)
    blocks *= -(-shape.tiles // (blocks * MOST_TILES))
    return Form(shape, tokens, blocks, target.shared_bytes // 2 - 2 * ALIGN)


class Block:
    """Emits a block's work: `count` tiles from `tile` on."""

    def __init__(self, form: Form, q, w, rows, b, warp, lane):
        self.form, self.q, self.w = form, q, w
        self.rows = T.bind(T.cast(rows, "int32"))
        self.warp, self.lane = warp, lane
        self.t = T.bind(warp * cuda.WARP + lane)
        self.tile = T.bind(T.truncdiv(b * form.shape.tiles, form.blocks))
        end = T.truncdiv((b + 1) * form.shape.tiles, form.blocks)
        self.count = T.bind(T.max(end - self.tile, 1))
        self.base = cuda.shared_bytes(form.shared_bytes)
        self.acc = cuda.local("uint32", 4 * form.together * form.groups)
        self.weights = cuda.local("uint32", 4 * form.together)
        self.x = cuda.local("uint32", 8 * form.groups)
        for i in range(4 * form.together * form.groups):
            cuda.store(self.acc, T.uint32(0), i)

    def _stage(self, stage: Expr | int) -> Expr:
        if isinstance(stage, int):
            return self.base + T.uint32(stage * self.form.stage_bytes)
        return T.bind(self.base + cuda.offset(stage * self.form.stage_bytes))

    def _barrier(self, stage: Expr | int) -> Expr:
        start = self.base + T.uint32(self.form.barriers)
        if isinstance(stage, int):
            return start + T.uint32(stage * bulk.BARRIER_BYTES)
        return T.bind(start + cuda.offset(stage * bulk.BARRIER_BYTES))

    def start(self) -> None:
        """The first stages: weights at once, tokens after the launch before."""
        form = self.form
        with cuda.when(self.warp == 0):
            for stage in range(form.buffers):
                with cuda.when(self.lane == 0):
                    bulk.make(self._barrier(stage))
                self._ask_weights(stage, stage)
        cuda.wait_for_launch()
        cuda.let_next_launch()
        with cuda.when(self.warp == 0):
            for stage in range(form.buffers):
                self._ask_tokens(stage, stage)
        cuda.sync()  # the barriers are made

    def _sizes(self, stage: Expr | int) -> tuple[Expr, Expr]:
        """Bytes of a tile and of a token."""
        form, least = self.form, min if isinstance(stage, int) else T.min
        chunks = least(form.shape.chunks - stage * form.warps, form.warps)
        columns = least(form.shape.k - stage * form.columns, form.columns)
        if isinstance(stage, int):
            return T.int32(chunks * CHUNK_BYTES), T.int32(columns)
        return T.bind(chunks * CHUNK_BYTES), T.bind(columns)

    def _ask_weights(self, stage: Expr | int, buffer: Expr | int) -> None:
        """By one warp, which says how much is to come."""
        form, barrier = self.form, self._barrier(buffer)
        of_tile, of_token = self._sizes(stage)
        with cuda.when(self.lane == 0):
            bulk.expect(barrier, self.count * of_tile + self.rows * of_token)
        T.evaluate(T.cuda.warp_sync())
        with cuda.when(self.lane < self.count):
            source = self.w[
                T.min(self.tile + self.lane, form.shape.tiles - 1), stage * form.warps, 0
            ]
            to = self._stage(buffer) + cuda.offset(self.lane * (form.warps * CHUNK_BYTES))
            bulk.copy(to, T.address_of(source), of_tile, barrier)

    def _ask_tokens(self, stage: Expr | int, buffer: Expr | int) -> None:
        form, (_, of_token) = self.form, self._sizes(stage)
        with cuda.when(self.lane < self.rows):
            source = self.q[self.lane, stage * form.columns]
            to = self._stage(buffer) + T.uint32(form.weights_bytes)
            own = cuda.offset(self.lane * form.pitch)
            bulk.copy(to + own, T.address_of(source), of_token, self._barrier(buffer))

    def accumulate(self) -> None:
        form = self.form
        chunk, v = T.bind(self.warp % form.warps), T.bind(self.warp // form.warps)
        if form.stages == 1:
            bulk.wait(self._barrier(0))
            with cuda.when(chunk < form.shape.chunks):
                self._multiply(self._stage(0), chunk, v)
            return
        repeats = form.buffers < form.stages
        with T.serial(form.stages) as stage:
            buffer = T.bind(stage % form.buffers)
            bulk.wait(self._barrier(buffer), stage // form.buffers % 2 if repeats else 0)
            with cuda.when(stage * form.warps + chunk < form.shape.chunks):
                self._multiply(self._stage(buffer), chunk, v)
            if repeats:
                cuda.sync()  # the stage has been read
                following = T.bind(stage + form.buffers)
                with cuda.when(tirx.all(self.warp == 0, following < form.stages)):
                    self._ask_weights(following, buffer)
                    self._ask_tokens(following, buffer)

    def _multiply(self, start: Expr, chunk: Expr, v: Expr) -> None:
        form, lane = self.form, self.lane
        tokens = start + T.uint32(form.weights_bytes) + cuda.offset(chunk * CHUNK)
        for group in range(form.groups):
            row = cuda.offset((8 * group + lane % 8) * form.pitch + lane // 8 * 16)
            for half in range(2):
                at = tokens + row + T.uint32(64 * half)
                cuda.load_matrices(self.x, 8 * group + 4 * half, at)
        for r in range(form.together):
            tile = v * form.together + r
            at = start + cuda.offset((tile * form.warps + chunk) * CHUNK_BYTES + lane * 16)
            four = [self.weights[4 * r + j] for j in range(4)]
            cuda.ptx("ld.shared.v4.b32", *four, at)
        for r in range(form.together):
            for i in range(FIELDS):
                a = [T.bind(field(self.weights[4 * r + j], i)) for j in range(4)]
                for group in range(form.groups):
                    b = self.x[8 * group + i], self.x[8 * group + 4 + i]
                    cuda.multiply(self.acc, 4 * (r * form.groups + group), a, b)

    def _sums_of(self, chunk: Expr | int, token: Expr, row: Expr) -> Expr:
        at = (chunk * self.form.tokens + token) * self.form.sums_pitch + row * 4
        return self.base + cuda.offset(at)

    def share(self) -> None:
        """Every warp's sums to shared memory, where the stages were."""
        form = self.form
        cuda.sync()
        first = T.bind(self.warp // form.warps * (form.together * TILE) + self.lane // 4)
        for r in range(form.together):
            for group in range(form.groups):
                for i in range(4):
                    token = 8 * group + self.lane % 4 * 2 + i % 2
                    at = self._sums_of(self.warp % form.warps, token, first + r * TILE + i // 2 * 8)
                    value = self.acc[4 * (r * form.groups + group) + i]
                    cuda.ptx("st.shared.b32", at, value)
        cuda.sync()

    def finish(self, end: Epilogue, scale, w_scale, extra, out) -> None:
        form, word, total = self.form, cuda.local("uint32", 1), cuda.local("int32", 1)
        late = cuda.local("float32", 2)  # of the launch before
        height = form.tiles * TILE
        with cuda.strided(form.tokens * height, self.t, form.block_warps * cuda.WARP) as i:
            m, row = T.bind(i // height), T.bind(i % height)
            n = T.bind(self.tile * TILE + row)
            is_output = tirx.all(m < self.rows, row < self.count * TILE, n < form.shape.n)
            with cuda.when(is_output):
                cuda.load_in_order(late, 0, scale[m])
                if end.extra:
                    cuda.load_in_order(late, 1, extra[m, n])
                cuda.store(total, T.int32(0), 0)
                for chunk in range(form.warps):
                    cuda.ptx("ld.shared.b32", word[0], self._sums_of(chunk, m, row))
                    cuda.store(total, total[0] + T.reinterpret("int32", word[0]), 0)
                acc = T.cast(T.shift_right(total[0], WEIGHT_BITS), "float32")
                cuda.store(out, end.value(acc, late[0] * w_scale[n], late[1]), m, n)
