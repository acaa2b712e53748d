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

norm_matmul is this with the norm before it inside. A GEMV by itself, with nothing to load ahead of,
gains where a multiprocessor has four tiles and more: H100, cold, us here and by products of bytes
(cuda.py): 13824x2560 6.5 and 7.6, but 3840x2560 3.6 and 3.6, 2560x6912 4.6 and 4.4; 20480x3200 11.8
and 11.4, as nothing is multiplied before the last of 125 KB is there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
LEAST_TILES, MOST_BYTES = 4, 80 * 1024  # of a block, for a GEMV by itself
ALIGN = 128


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
        """Bytes from one output's sums to the next's."""
        return 4 * self.warps

    @property
    def scratch(self) -> int:
        end = self.sums + self.matrices * self.height * self.pitch
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
                words = [block.load_codes(q, d) for d in range(self.depth)]
                cuda.sync()  # the copies' barrier is made
                block.multiply(words)

                def finish(step: int, row: Expr, n: Expr) -> None:
                    other = extra[0, n] if end.extra else None
                    y = end.value(block.sum_of(0, row), scale[0] * w_own[step], other)
                    cuda.store(out, y, 0, n)

                block.each_output(finish)


def form_of(
    shape: Shape, act_bits: int, target: GpuTarget, matrices: int = 1, scratch_bytes: int = 0
) -> Form:
    room = target.shared_bytes // 2 // (matrices * shape.chunks * CHUNK_BYTES)
    blocks = max(min(target.num_multiprocessors, shape.tiles), -(-shape.tiles // max(1, room)))
    return Form(shape, act_bits, matrices, blocks, scratch_bytes)


def is_possible(k: int) -> bool:
    return k % VECTOR == 0 and k <= LARGEST_K


def one_token(
    shape: Shape, act_bits: int, target: GpuTarget, chunks_a_warp: int, tiles_a_block: int
) -> Form | small_batch.Form:
    """By planes where that measured faster, unless a knob asks for a form of the other."""
    form = form_of(shape, act_bits, target)
    is_faster = form.tiles >= LEAST_TILES and form.matrix_bytes <= MOST_BYTES
    if is_possible(shape.k) and is_faster and not (chunks_a_warp or tiles_a_block):
        return form
    return small_batch.one_token(shape, target, chunks_a_warp, tiles_a_block)


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
            bulk.expect(barrier, size * form.matrices)
            for g, w in enumerate(weights):
                source = T.address_of(w[self.tile, 0, 0])
                bulk.copy(self.at(g * form.matrix_bytes), source, size, barrier)

    def ask_scales(self, w_scales: Sequence[Any]) -> Any:
        """Of the thread's outputs; `finish` finds matrix g's of a step at step G + g."""
        own = cuda.local("float32", self.form.steps * self.form.matrices)

        def load(step: int, row: Expr, n: Expr) -> None:
            for g, w_scale in enumerate(w_scales):
                cuda.store(own, w_scale[n], step * self.form.matrices + g)

        self.each_output(load)
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
        acc, weights = cuda.local("uint32", 4 * planes.products), cuda.local("uint32", 4)
        with cuda.unrolled(form.matrices * form.tiles) as i:
            planes.clear(acc)
            for d, operand in enumerate(operands):  # past K the operand is 0
                chunk = T.min(first + d, form.shape.chunks - 1)
                at = (i * form.shape.chunks + chunk) * CHUNK_BYTES + self.lane * 16
                four = [weights[j] for j in range(4)]
                cuda.ptx("ld.shared.v4.b32", *four, self.base + cuda.offset(at))
                planes.multiply(acc, weights, operand)
            for half, total in enumerate(planes.sums(acc)):
                with cuda.when(self.lane % 4 == 0):
                    row = i * TILE + T.shift_right(self.lane, 2) + 8 * half
                    to = self._sums_of(row) + cuda.offset(self.warp * 4)
                    cuda.ptx("st.shared.b32", to, T.reinterpret("uint32", total))
        cuda.sync()

    def _sums_of(self, row: Expr) -> Expr:
        return self.at(self.form.sums) + cuda.offset(row * self.form.pitch)

    def sum_of(self, matrix: int, row: Expr) -> Expr:
        """float32 of an output's sum over the warps."""
        form, words, total = self.form, cuda.local("uint32", 4), cuda.local("int32", 1)
        start = T.bind(self._sums_of(matrix * form.height + row))
        cuda.store(total, T.int32(0), 0)
        width = 4 if form.warps % 4 == 0 else 1
        for first in range(0, form.warps, width):
            some = [words[i] for i in range(width)]
            vector = ".v4" if width == 4 else ""
            cuda.ptx(f"ld.shared{vector}.b32", *some, start + T.uint32(4 * first))
            for word in some:
                cuda.store(total, total[0] + T.reinterpret("int32", word), 0)
        return T.cast(total[0], "float32")
