"""ternary_matmul of one token on Hopper: weights to shared memory by bulk copies, bits times bits.

    for tiles of b: N/16 shared out evenly           blockIdx.x: a block a multiprocessor
        w[G, P, K/128] -> shared memory              one thread asks for all of them
        b[D] = bit planes of a warp's 128 D columns  threadIdx.y; planes_sm90.py
        for matrix, tile in G, P:
            acc = w . b                              mma m16n8k256 of single bits, D times 1 or 2
        out[16 P] = epilogue(sums over W warps)      shared memory

    tile | value                        | bound by
    G    | 1; 2 are gate and up         | each row of norm_matmul's GLU needs both
    P    | what a multiprocessor has    | two launches side by side: half its shared memory each
    W    | up to 20                     | the same: half its registers, 48 a thread
    D    | K / (128 W)                  |

norm_matmul is this with the norm before it inside. H100, cold, launched early, us here, by products
of bytes (cuda.py), and of Microsoft's W2A8 kernel in the same run:

    N x K       | planes | bytes | W2A8     N x K       | planes | bytes | W2A8
    2560x2560   | 1.8    | 3.0   | 5.4      3200x3200   | 2.0    | 3.3   | 6.0
    3840x2560   | 2.0    | 3.7   | 5.3      4800x3200   | 2.3    | 6.1   | 6.1
    13824x2560  | 3.8    | 7.7   | 8.7      20480x3200  | 6.3    | 11.1  | 12.7
    2560x6912   | 2.7    | 3.2   | 10.4     3200x10240  | 4.1    | 5.9   | 14.4
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.epilogue import Epilogue
from schedules.intrin import bulk_sm90 as bulk
from schedules.intrin import cuda
from schedules.targets import GpuTarget
from schedules.ternary_matmul import cuda as small_batch
from schedules.ternary_matmul.cuda import CHUNK, CHUNK_BYTES, TILE, Shape
from schedules.ternary_matmul.planes_sm90 import WORDS_BYTES, Planes

MAX_WARPS = 20
MOST_DEPTH = 4  # of two blocks on a multiprocessor: registers
LARGEST_K = 24576  # two rows of tiles fit into shared memory
VECTOR = 4  # columns of a lane and chunk
ALIGN = 128
GROUP, GAP = 32, 8  # outputs of a warp that lie side by side, and words left between groups


@dataclass(frozen=True)
class Form:
    """How the tiles are shared out, and what lies where in shared memory."""

    shape: Shape
    act_bits: int
    matrices: int  # G
    blocks: int
    scratch_bytes: int = 0  # of the caller's own

    @property
    def tiles(self) -> int:
        """P, at most."""
        return -(-self.shape.tiles // self.blocks)

    @property
    def depth(self) -> int:
        return -(-self.shape.chunks // MAX_WARPS)

    @property
    def warps(self) -> int:
        """Two at least: the number of an only one would be a constant (cuda.offset)."""
        return max(2, -(-self.shape.chunks // self.depth))

    @property
    def threads(self) -> int:
        return self.warps * cuda.WARP

    @property
    def height(self) -> int:
        """Outputs of a block, at most."""
        return self.tiles * TILE

    @property
    def steps(self) -> int:
        """Outputs of a thread."""
        return -(-self.height // self.threads)

    @property
    def blocks_at_once(self) -> int:
        return 2 if self.depth <= MOST_DEPTH else 1

    @property
    def matrix_bytes(self) -> int:
        return self.tiles * self.shape.chunks * CHUNK_BYTES

    @property
    def codes(self) -> int:
        return self.matrices * self.matrix_bytes

    @property
    def barrier(self) -> int:
        return self.codes + self.warps * self.depth * WORDS_BYTES

    @property
    def sums(self) -> int:
        return self.barrier + ALIGN

    @property
    def pitch(self) -> int:
        """Bytes from one warp's sums to the next's."""
        rows = self.matrices * self.height
        return 4 * (rows + -(-rows // GROUP) * GAP)

    @property
    def scratch(self) -> int:
        end = self.sums + self.warps * self.pitch
        return -(-end // ALIGN) * ALIGN

    @property
    def shared_bytes(self) -> int:
        return self.scratch + self.scratch_bytes

    def launch(self, rows, end: Epilogue, q, scale, w, w_scale, extra, out) -> None:
        """A GEMV: `rows` is 1 when it is launched."""
        with cuda.blocks(self.blocks) as b:
            threads = cuda.threads(self.warps, "y"), cuda.threads(cuda.WARP)
            with threads[0] as warp, threads[1] as lane, cuda.min_blocks(self.blocks_at_once):
                block = Block(self, b, warp, lane)
                block.ask([w])
                w_own = block.ask_scales([w_scale])
                cuda.wait_for_launch()
                cuda.let_next_launch()
                words = [block.load_codes(q, d) for d in range(self.depth)]
                own, of_token = None, cuda.local("float32", 1)
                cuda.load_in_order(of_token, 0, scale[0])
                if end.extra:
                    own = block.load_outputs(extra)
                cuda.sync()  # the copies' barrier is made
                block.multiply(words)

                def finish(step: int, row: Expr, n: Expr) -> None:
                    other = None if own is None else own[step]
                    y = end.value(block.sum_of(0, row), of_token[0] * w_own[step], other)
                    cuda.store(out, y, 0, n)

                block.each_output(finish)


def form_of(
    shape: Shape, act_bits: int, target: GpuTarget, matrices: int = 1, scratch_bytes: int = 0
) -> Form:
    """A block a multiprocessor, or several where its tiles would leave none of the shared memory
    to the next launch's."""
    most = max(1, target.shared_bytes // 2 // (matrices * shape.chunks * CHUNK_BYTES))
    blocks = min(target.num_multiprocessors, shape.tiles)
    blocks = min(shape.tiles, blocks * -(-shape.tiles // (blocks * most)))
    return Form(shape, act_bits, matrices, blocks, scratch_bytes)


def is_possible(k: int) -> bool:
    return k % VECTOR == 0 and k <= LARGEST_K


def one_token(
    shape: Shape, act_bits: int, target: GpuTarget, chunks_a_warp: int, tiles_a_block: int
) -> Form | small_batch.Form:
    """By planes, unless a knob asks for a form of the other or K is odd."""
    if is_possible(shape.k) and not (chunks_a_warp or tiles_a_block):
        return form_of(shape, act_bits, target)
    form = small_batch.one_token(shape, target, chunks_a_warp, tiles_a_block)
    return replace(form, early=True)


class Block:
    """Emits a block's work: outputs 16 `tile` on, of `count` tiles."""

    def __init__(self, form: Form, b, warp, lane):
        self.form, self.warp, self.lane = form, warp, lane
        self.t = T.bind(warp * cuda.WARP + lane)
        self.tile = T.bind(T.truncdiv(b * form.shape.tiles, form.blocks))
        end = T.truncdiv((b + 1) * form.shape.tiles, form.blocks)
        self.count = T.bind(T.max(end - self.tile, 1))
        self.base = cuda.shared_bytes(form.shared_bytes)
        self.planes = Planes(form.act_bits, lane)

    def at(self, offset: int) -> Expr:
        return self.base + T.uint32(offset)

    def ask(self, weights: Sequence[Any]) -> None:
        """All of the block's weights."""
        form, barrier = self.form, self.at(self.form.barrier)
        size = T.bind(self.count * (form.shape.chunks * CHUNK_BYTES))
        with cuda.when(self.t == 0):
            bulk.make(barrier)
            bulk.expect(barrier, size * form.matrices)
            for g, w in enumerate(weights):
                source = T.address_of(w[self.tile, 0, 0])
                bulk.copy(self.at(g * form.matrix_bytes), source, size, barrier)

    def ask_scales(self, w_scales: Sequence[Any]) -> Any:
        """Of the thread's outputs; `finish` finds matrix g's of a step at step G + g."""
        own = cuda.local("float32", self.form.steps * self.form.matrices)

        def load(step: int, row: Expr, n: Expr) -> None:
            for g, w_scale in enumerate(w_scales):
                cuda.load_in_order(own, step * self.form.matrices + g, w_scale[n])

        self.each_output(load)
        return own

    def load_outputs(self, extra: Any) -> Any:
        """What else the epilogue takes, of the thread's outputs."""
        own = cuda.local("float32", self.form.steps)
        self.each_output(lambda step, row, n: cuda.load_in_order(own, step, extra[0, n]))
        return own

    def each_output(self, body: Callable[[int, Expr, Expr], None]) -> None:
        """body(step, row of the block, output) for this thread's."""
        for step in range(self.form.steps):
            row = T.bind(self.t + step * self.form.threads)
            n = T.bind(self.tile * TILE + row)
            with cuda.when(cuda.both(row < self.count * TILE, n < self.form.shape.n)):
                body(step, row, n)

    def load_codes(self, q: Any, d: int) -> Expr:
        """A word of four codes, the lane's of the warp's chunk d; zeros past K."""
        word = cuda.local("uint32", 1)
        cuda.store(word, T.uint32(0), 0)
        column = T.bind((self.warp * self.form.depth + d) * CHUNK + self.lane * VECTOR)
        with cuda.when(column < self.form.shape.k):
            cuda.ptx("ld.global.b32", word[0], T.address_of(q[0, column]))
        return word[0]

    def multiply(self, words: Sequence[Expr]) -> None:
        """The warp's share of every sum, to shared memory. Tiles past `count` are of no output."""
        form, planes = self.form, self.planes
        first = T.bind(self.warp * form.depth)
        operands = []
        for d, word in enumerate(words):
            own = cuda.offset((first + d) * WORDS_BYTES)
            operands.append(planes.spread(word, self.at(form.codes) + own))
        bulk.wait(self.at(form.barrier))
        total = form.matrices * form.tiles
        for start in range(0, total, planes.most_tiles):
            self._multiply_tiles(operands, start, min(planes.most_tiles, total - start))
        cuda.sync()

    def _multiply_tiles(self, operands: Sequence[Any], start: int, count: int) -> None:
        """Tiles that share a result."""
        planes, result = self.planes, cuda.local("uint32", 4)
        for i in range(4):
            cuda.store(result, T.uint32(0), i)
        weights = [cuda.local("uint32", 4) for _ in range(planes.tiles)]
        with cuda.unrolled(-(-count // planes.tiles)) as step:
            slot = T.bind(step * planes.tiles)
            for d, operand in enumerate(operands):
                for i, registers in enumerate(weights):
                    tile = T.min(slot + i, count - 1) if count % planes.tiles else slot + i
                    self._load_weights(registers, start + tile, d)
                planes.add(result, weights, slot, operand)

        def store(slot: Expr, row: Expr, value: Expr) -> None:
            with cuda.when(slot < count):
                at = self._sums_of((start + slot) * TILE + row)
                own = cuda.offset(self.warp * self.form.pitch)
                cuda.ptx("st.shared.b32", at + own, T.reinterpret("uint32", value))

        planes.each_sum(result, store)

    def _load_weights(self, registers: Any, tile: Expr, d: int) -> None:
        """A lane's 16 bytes of the warp's chunk d; past K the operand is 0."""
        chunks = self.form.shape.chunks
        chunk = T.min(self.warp * self.form.depth + d, chunks - 1)
        at = (tile * chunks + chunk) * CHUNK_BYTES + self.lane * 16
        four = [registers[j] for j in range(4)]
        cuda.ptx("ld.shared.v4.b32", *four, self.base + cuda.offset(at))

    def _sums_of(self, row: Expr) -> Expr:
        """Of the first warp; the gaps keep the lanes' stores in different banks."""
        return self.at(self.form.sums) + cuda.offset((row + row // GROUP * GAP) * 4)

    def sum_of(self, matrix: int, row: Expr) -> Expr:
        """float32 of an output's sum over the warps."""
        form, word, total = self.form, cuda.local("uint32", 1), cuda.local("int32", 1)
        start = T.bind(self._sums_of(matrix * form.height + row))
        cuda.store(total, T.int32(0), 0)
        for warp in range(form.warps):
            cuda.ptx("ld.shared.b32", word[0], start + T.uint32(warp * form.pitch))
            cuda.store(total, total[0] + T.reinterpret("int32", word[0]), 0)
        return T.cast(total[0], "float32")
