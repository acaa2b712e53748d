"""norm_matmul on Hopper: one token's GEMV with the norm before it inside, a launch fewer; the
weights are on their way while the launch before still runs.

    for n0 in N/(16 P):                              blockIdx.x
        for matrix, tile, warp in G, P, W:           threadIdx.y: W runs of K for each tile
            w[D] = 16 bytes a lane                   D loads of 512 bytes in flight
        wait for the launch before                   which wrote x
        h = (x * rstd) * gain                        every block, the row over all its threads
        q[K] = quantize(h)                           shared memory
        for chunk in D:                              128 columns
            acc += (w << 6 - 2i & 0xC0) . ldmatrix(q)        mma m16n8k32, i in 4
        out[16 P] = epilogue(sums over W warps)      shared memory; with G = 2, of gate and up

    tile | value                        | bound by
    G    | 1, or 2: gate and up         | each row of the GLU needs both
    D    | 2 to 5                       | 32 warps a multiprocessor, all loads in flight
    P    | two blocks a multiprocessor  | every block reads x: 4 K bytes from L2

The row is K columns over the block's threads, four neighbours at a time. Float orders are those of
rms_norm. A code in the top bits of a byte is 64 w, as in cuda.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.epilogue import EPILOGUES
from schedules.intrin import cuda
from schedules.rms_norm.generic import QUANTIZERS, SMALLEST_STAT, write_mean
from schedules.targets import GpuTarget
from schedules.ternary_matmul.cuda import (
    BUSY_WARPS,
    CHUNK,
    CHUNK_BYTES,
    FIELDS,
    MAX_BLOCK_WARPS,
    MAX_WARPS,
    TILE,
    WEIGHT_BITS,
    Shape,
    field,
)

VECTOR = 4  # columns of the row that a thread takes at a time
BUSY_THREADS = 1280  # of a multiprocessor: 48 registers each and more
LARGEST_K = 32768  # q fits into shared memory


@dataclass(frozen=True)
class Form:
    """How a block shares its work out."""

    shape: Shape
    matrices: int  # G
    tiles: int  # P
    warps: int  # W
    depth: int  # D, chunks a round

    @property
    def block_warps(self) -> int:
        return self.matrices * self.tiles * self.warps

    @property
    def threads(self) -> int:
        return self.block_warps * cuda.WARP

    @property
    def rounds(self) -> int:
        return -(-self.shape.chunks // (self.warps * self.depth))

    @property
    def blocks(self) -> int:
        return -(-self.shape.tiles // self.tiles)

    @property
    def blocks_at_once(self) -> int:
        """Of a multiprocessor, whose registers they share."""
        return max(1, min(2, BUSY_THREADS // self.threads))

    @property
    def groups(self) -> int:
        """Of four columns, of a thread; padding up to whole chunks included."""
        return -(-self.rounds * self.warps * self.depth * CHUNK // (VECTOR * self.threads))

    @property
    def row_bytes(self) -> int:
        return self.groups * VECTOR * self.threads

    @property
    def shared_bytes(self) -> int:
        """q; a float64 a warp, twice; sums of every warp."""
        return self.row_bytes + 2 * 8 * cuda.WARP + 4 * TILE * self.block_warps


def is_possible(k: int) -> bool:
    return k % VECTOR == 0 and k <= LARGEST_K


def form_of(shape: Shape, matrices: int, target: GpuTarget) -> Form:
    chip, tiles = target.num_multiprocessors, shape.tiles * matrices
    depth = min(5, max(2, round(tiles * shape.chunks / (chip * BUSY_WARPS))))
    warps = min(MAX_WARPS, -(-shape.chunks // depth))
    depth = min(8, -(-shape.chunks // warps))
    across = max(1, min(-(-shape.tiles // (2 * chip)), MAX_BLOCK_WARPS // (warps * matrices)))
    return Form(shape, matrices, across, warps, depth)


class Block:
    """Emits a block's work: outputs 16 P b on."""

    def __init__(self, form: Form, weights: Sequence[Any], b, warp, lane):
        self.form, self.weights, self.b = form, weights, b
        self.warp, self.lane = warp, lane
        self.t = T.bind(warp * cuda.WARP + lane)
        part = T.bind(warp // form.warps)
        self.matrix = T.bind(part // form.tiles)
        self.tile = T.bind(b * form.tiles + part % form.tiles)
        memory = T.alloc_buffer((form.shared_bytes,), "uint8", scope="shared")
        self.base = T.bind(T.cuda.cvta_generic_to_shared(memory.data))
        self.acc = cuda.local("uint32", 8)  # two chains: a product waits for the last on its own
        self.words = cuda.local("uint32", 4 * form.depth)
        self.q = cuda.local("uint32", 8)
        for i in range(8):
            cuda.store(self.acc, T.uint32(0), i)

    def load(self, round_: Expr | int) -> None:
        """The weights of a round; none past the last."""
        form = self.form
        first = T.bind((self.warp % form.warps * form.rounds + round_) * form.depth)
        for g, weights in enumerate(self.weights):
            with cuda.when(self.matrix == g):
                for d in range(form.depth):
                    inside = [first + d < form.shape.chunks, self.tile < form.shape.tiles]
                    if not isinstance(round_, int):
                        inside.append(round_ < form.rounds)
                    at = T.address_of(weights[self.tile, first + d, self.lane * 16])
                    cuda.load_16_bytes(self.words, 4 * d, at, pred=tirx.all(*inside))

    def load_row(self, source, m) -> Any:
        """Four columns at a time of the row; zeros past K."""
        form, row = self.form, cuda.local("float32", VECTOR * self.form.groups)
        for g in range(form.groups):
            column = T.bind((g * form.threads + self.t) * VECTOR)
            for i in range(VECTOR):
                cuda.store(row, T.float32(0), VECTOR * g + i)
            with cuda.when(column < form.shape.k), T.vectorized(VECTOR) as i:
                value = source[column + i] if m is None else source[m, column + i]
                cuda.store(row, value, VECTOR * g + i)
        return row

    def reduce(self, value: Expr, op: str, use: int) -> Expr:
        """sum or max (of what is not negative) over the block, float64; `use` 0 or 1."""
        warps = self.form.block_warps
        partial = cuda.warp_reduce(value, op)
        scratch = T.bind(self.base + T.uint32(self.form.row_bytes + use * 8 * cuda.WARP))
        with cuda.when(self.lane == 0):
            at = scratch + T.cast(self.warp * 8, "uint32")
            cuda.ptx("st.shared.f64", at, partial)
        cuda.sync()
        of_warp = cuda.local("float64", 1)
        at = scratch + T.cast(T.min(self.lane, warps - 1) * 8, "uint32")
        cuda.ptx("ld.shared.f64", of_warp[0], at)
        return cuda.warp_reduce(T.Select(self.lane < warps, of_warp[0], T.float64(0)), op)

    def normalize(self, x, gain, m, eps: float, quantizer: str) -> Expr:
        """q of the row into shared memory; its scale."""
        form, k = self.form, self.form.shape.k
        write_stat, to_scale, to_factor, to_code = QUANTIZERS[quantizer]
        gains = self.load_row(gain, None)
        cuda.wait_for_launch()
        h = self.load_row(x, m)
        count = VECTOR * form.groups
        squares = T.float64(0)
        for i in range(count):
            squares = squares + T.cast(h[i], "float64") * T.cast(h[i], "float64")
        rms = T.sqrt(self.reduce(squares, "sum", 0) / T.float64(k) + T.float64(eps))
        rstd = T.bind(T.cast(T.float64(1) / rms, "float32"))
        is_mean = write_stat is write_mean
        stat = T.float64(0)
        for i in range(count):
            cuda.store(h, h[i] * rstd * gains[i], i)
        for i in range(count):
            size = T.cast(T.abs(h[i]), "float64")
            stat = stat + size if is_mean else T.max(stat, size)
        stat = self.reduce(stat, "sum" if is_mean else "max", 1)
        stat = T.cast(stat / T.float64(k) if is_mean else stat, "float32")
        stat = T.bind(T.max(stat, T.float32(SMALLEST_STAT)))
        factor = T.bind(to_factor(stat))
        for g in range(form.groups):
            word: Any = T.uint32(0)
            for i in range(VECTOR):
                code = T.reinterpret("uint8", to_code(h[VECTOR * g + i], factor))
                word = word | T.cast(code, "uint32") << T.uint32(8 * i)
            at = self.base + T.cast((g * form.threads + self.t) * VECTOR, "uint32")
            cuda.ptx("st.shared.b32", at, word)
        cuda.sync()
        return T.bind(to_scale(stat))

    def multiply(self, round_: Expr | int) -> None:
        form = self.form
        first = (self.warp % form.warps * form.rounds + round_) * form.depth
        start = T.bind(self.base + T.cast(first * CHUNK + self.lane // 8 * 16, "uint32"))
        for d in range(form.depth):
            for v in range(2):
                cuda.load_matrices(self.q, 4 * v, start + T.uint32(d * CHUNK + 64 * v))
            for i in range(FIELDS):
                a = [field(self.words[4 * d + j], i) for j in range(4)]
                cuda.multiply(self.acc, i % 2 * 4, a, (self.q[i], self.q[4 + i]))

    def _sum_address(self, warp, row) -> Expr:
        start = self.form.row_bytes + 2 * 8 * cuda.WARP
        return self.base + T.cast(start + (warp * TILE + row) * 4, "uint32")

    def share(self) -> None:
        """Every warp's sums to shared memory."""
        for half in range(2):
            value = self.acc[2 * half] + self.acc[4 + 2 * half]
            with cuda.when(self.lane % 4 == 0):
                at = self._sum_address(self.warp, self.lane // 4 + 8 * half)
                cuda.ptx("st.shared.b32", at, value)
        cuda.sync()

    def sum_of(self, matrix: int, row: Expr) -> Expr:
        """float32 of an output's sum; row of the block's 16 P."""
        form, word, total = self.form, cuda.local("uint32", 1), cuda.local("int32", 1)
        cuda.store(total, T.int32(0), 0)
        first = (matrix * form.tiles + row // TILE) * form.warps
        for warp in range(form.warps):
            cuda.ptx("ld.shared.b32", word[0], self._sum_address(first + warp, row % TILE))
            cuda.store(total, total[0] + T.reinterpret("int32", word[0]), 0)
        return T.cast(T.shift_right(total[0], WEIGHT_BITS), "float32")


def launch(form: Form, x, gain, eps, quantizer, weights, w_scales, residual, out) -> None:
    """`weights` and `w_scales` are of one matrix, or of gate and up."""

    def finish(block: Block, scale) -> None:
        height = form.tiles * TILE
        with cuda.strided(height, block.t, form.threads) as row:
            n = T.bind(block.b * height + row)
            with cuda.when(n < form.shape.n):
                sums = [block.sum_of(g, row) for g in range(form.matrices)]
                scales = [T.bind(scale * w_scale[n]) for w_scale in w_scales]
                if form.matrices == 2:
                    gate = T.bind(sums[0] * scales[0])
                    y = EPILOGUES["glu"].value(sums[1], scales[1], gate)
                elif residual is not None:
                    y = EPILOGUES["residual"].value(sums[0], scales[0], residual[0, n])
                else:
                    y = EPILOGUES["scale"].value(sums[0], scales[0], None)
                cuda.store(out, y, 0, n)

    with cuda.blocks(form.blocks) as b:
        threads = cuda.threads(form.block_warps, "y"), cuda.threads(cuda.WARP)
        with threads[0] as warp, threads[1] as lane, cuda.min_blocks(form.blocks_at_once):
            block = Block(form, weights, b, warp, lane)
            block.load(0)
            scale = block.normalize(x, gain, 0, eps, quantizer)
            cuda.let_next_launch()
            if form.rounds == 1:
                block.multiply(0)
            else:
                with T.serial(form.rounds) as round_:
                    block.multiply(round_)
                    block.load(round_ + 1)
            block.share()
            finish(block, scale)


def kernel(
    n: int, k: int, quantizer: str, eps: float, target: GpuTarget, epilogue: str
) -> PrimFunc:
    """scale: (x, gain, w, w_scale, y); residual: (x, gain, w, w_scale, residual, y);
    glu: (x, gain, gate_w, gate_scale, w, w_scale, y)."""
    shape, is_glu = Shape(n, k), epilogue == "glu"
    form = form_of(shape, 2 if is_glu else 1, target)

    def emit(x, gain, gate_w, gate_scale, w, w_scale, extra, y):
        weights, w_scales = ([gate_w, w], [gate_scale, w_scale]) if is_glu else ([w], [w_scale])
        residual = extra if epilogue == "residual" else None
        launch(form, x, gain, eps, quantizer, weights, w_scales, residual, y)

    @T.prim_func(s_tir=True)
    def norm_matmul(
        x: T.Buffer((1, k), "float32"),
        gain: T.Buffer((k,), "float32"),
        gate_w: T.Buffer((shape.tiles, shape.chunks, CHUNK_BYTES), "uint8"),
        gate_scale: T.Buffer((n,), "float32"),
        w: T.Buffer((shape.tiles, shape.chunks, CHUNK_BYTES), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        extra: T.Buffer((1, n), "float32"),
        y: T.Buffer((1, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, cuda.WAITS_ITSELF: True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            emit(x, gain, gate_w, gate_scale, w, w_scale, extra, y)

    unused = {
        "scale": ("gate_w", "gate_scale", "extra"),
        "residual": ("gate_w", "gate_scale"),
        "glu": ("extra",),
    }[epilogue]
    params = [param for param in norm_matmul.params if param.name not in unused]
    return PrimFunc(params, norm_matmul.body, norm_matmul.ret_type, norm_matmul.attrs)
