"""ternary_matmul of 2 to 16 tokens on Hopper: a cluster of blocks shares out K of some tiles.

    for tiles of c: N/16 shared out evenly           blockIdx.y
        for rank in S: K/(128 S) chunks              blockIdx.x: the blocks of a cluster
            w[P, C] -> shared                        a bulk copy a tile, before the wait
            x[T, 128 C] -> shared                    cp.async, after it
            for warp in V W:                         threadIdx.y: R tiles, every W-th chunk
                b = ldmatrix(x)                      8 registers for 8 tokens
                acc[R, T/8] += (w << 6 - 2i & 0xC0) . b      mma m16n8k32, i in 4
            sums over W warps -> inboxes             shared memory, then st.async
            out[T, 16 P / S] = epilogue(sum of S shares / 64)

    tile | value                       | bound by
    T    | 8 or 16                     | the product's columns
    S    | 1, 2 or 4                   | a block's tokens, 32 KB: read from L2 by every cluster
    P    | what S multiprocessors have | half of their shared memory: two launches side by side
    R    | 2                           | b is read once for two tiles
    V, W | 16 warps, few of them idle  | the same: half of the registers

Weights and their scales do not depend on the launch before: all are asked for before it has ended.
A block sends each other one of its cluster its share of that one's outputs, and waits for what it
adds up itself: inboxes are open before the launch before has ended; one block alone adds up its
warps' sums. A code in the top bits of a byte is 64 w:
|acc| < 2^13 K, int32 for K < 2^18.
"""

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.epilogue import Epilogue
from schedules.intrin import bulk_sm90 as bulk
from schedules.intrin import cuda
from schedules.ternary_matmul.cuda import CHUNK, CHUNK_BYTES, FIELDS, TILE, WEIGHT_BITS, field
from schedules.ternary_matmul.few_form_sm90 import PIECE, Form

QUAD = 4  # sums of a message
MOST_LATE = 2  # registers of the epilogue's own inputs while sums are made


def launch(form: Form, rows, end: Epilogue, q, scale, w, w_scale, extra, out) -> None:
    share = cuda.cluster(form.ranks) if form.ranks > 1 else cuda.blocks(1)
    with share as rank, cuda.blocks(form.clusters, "y") as c:
        threads = cuda.threads(form.block_warps, "y"), cuda.threads(cuda.WARP)
        with threads[0] as warp, threads[1] as lane, cuda.min_blocks(2):
            block = Block(form, rows, rank, c, warp, lane)
            block.ask(w)
            block.ask_scales(w_scale)
            if form.ranks > 1:
                cuda.sync_cluster()  # inboxes are open
            cuda.wait_for_launch()
            cuda.let_next_launch()
            block.ask_tokens(q, scale)
            cuda.commit_copies()
            late = block.load(extra) if end.extra and form.steps <= MOST_LATE else None
            cuda.wait_for_copies()
            cuda.sync()
            block.multiply()
            if end.extra and late is None:
                late = block.load(extra)
            if form.ranks > 1:
                block.send()

            def finish(step: int, m: Expr, n: Expr, acc: Expr, s: Expr) -> None:
                other = late[step] if late is not None else None
                cuda.store(out, end.value(acc, s, other), m, n)

            block.receive(finish)


class Block:
    """Emits the work of a block: `chunks` from `chunk` on of the `count` tiles from `tile` on."""

    def __init__(self, form: Form, rows, rank, c, warp, lane):
        self.form, self.rank, self.warp, self.lane = form, rank, warp, lane
        self.rows = T.bind(T.cast(rows, "int32"))
        self.t = T.bind(warp * cuda.WARP + lane)
        self.tile, self.count = self._share(c, form.shape.tiles, form.clusters)
        self.chunk, self.chunks = self._share(rank, form.shape.chunks, form.ranks)
        self.base = cuda.shared_bytes(form.shared_bytes)
        self.tokens = self.base + T.uint32(form.weights_bytes)
        self.barriers = self.base + T.uint32(form.barriers)
        self.inbox_barrier = self.barriers + T.uint32(form.across * bulk.BARRIER_BYTES)
        self.scales = self.base + T.uint32(form.scales)
        self.acc = cuda.local("uint32", 4 * form.together * form.groups)
        self.weights = cuda.local("uint32", 4 * form.together)
        self.x = cuda.local("uint32", 8 * form.groups)
        for i in range(4 * form.together * form.groups):
            cuda.store(self.acc, T.uint32(0), i)

    @staticmethod
    def _share(i: Expr, count: int, shares: int) -> tuple[Expr, Expr]:
        """The first of share i and how many it has."""
        first = T.bind(T.truncdiv(i * count, shares))
        return first, T.bind(T.max(T.truncdiv((i + 1) * count, shares) - first, 1))

    def _barrier_of(self, v: Expr) -> Expr:
        if self.form.across == 1:  # v is a constant, which `cuda.offset` cannot take
            return self.barriers
        return self.barriers + cuda.offset(v * bulk.BARRIER_BYTES)

    def ask(self, w: Any) -> None:
        """All of the block's weights, by a warp; how much is to come to the inbox, too."""
        form, lane = self.form, self.lane
        of_tile = T.bind(self.chunks * CHUNK_BYTES)
        with cuda.when(self.warp == 0):
            with cuda.when(lane == 0):
                for v in range(form.across):
                    bulk.make(self.barriers + T.uint32(v * bulk.BARRIER_BYTES))
                if form.ranks > 1:
                    bulk.make(self.inbox_barrier)
                    of_token = form.ranks * form.own_height * 4
                    bulk.expect(self.inbox_barrier, self.rows * of_token)
            T.evaluate(T.cuda.warp_sync())
            with cuda.when(lane < form.across):
                tiles = T.max(T.min(self.count - lane * form.together, form.together), 0)
                bulk.expect(self._barrier_of(lane), tiles * of_tile)
            with cuda.when(lane < self.count):
                source = w[T.min(self.tile + lane, form.shape.tiles - 1), self.chunk, 0]
                to = self.base + cuda.offset(lane * (form.chunks * CHUNK_BYTES))
                barrier = self._barrier_of(lane // form.together)
                bulk.copy(to, T.address_of(source), of_tile, barrier)

    def ask_scales(self, w_scale: Any) -> None:
        """Of the block's outputs."""
        form = self.form
        first = T.bind(self.tile * TILE + self.rank * form.own_height)
        self._ask_floats(form.own_height, form.tokens, w_scale, first, form.shape.n)

    def _ask_floats(self, count: int, to: int, source: Any, first: Expr | int, end: Expr | int):
        """`count` of source[first:end] to place `to` of the scales."""
        with cuda.strided(-(-count // QUAD), self.t, self.form.threads) as i:
            at, left = T.bind(first + QUAD * i), self.scales + T.uint32(4 * to)
            valid = T.bind(T.min(end - at, QUAD))
            with cuda.when(valid > 0):
                to_own = left + cuda.offset(i * PIECE)
                cuda.copy_16_bytes(to_own, T.address_of(source[at]), valid * 4)

    def ask_tokens(self, q: Any, scale: Any) -> None:
        form, pieces = self.form, self.form.chunks * (CHUNK // PIECE)
        self._ask_floats(form.tokens, 0, scale, 0, self.rows)
        with cuda.strided(form.tokens * pieces, self.t, form.threads) as i:
            m, column = T.bind(i // pieces), T.bind(i % pieces * PIECE)
            k = T.bind(self.chunk * CHUNK + column)
            inside = tirx.all(m < self.rows, column < self.chunks * CHUNK, k < form.shape.k)
            with cuda.when(inside):
                to = self.tokens + cuda.offset(m * form.pitch + column)
                cuda.copy_16_bytes(to, T.address_of(q[m, k]))

    def each_output(self, body: Callable[[int, Expr, Expr, Expr], None]) -> None:
        """body(step, token, output, which of the block's sums) for those of this thread."""
        form = self.form
        for step in range(form.steps):
            i = T.bind(self.t + step * form.threads)
            m, row = T.bind(i // form.own_height), i % form.own_height
            row = T.bind(self.rank * form.own_height + row)
            n = T.bind(self.tile * TILE + row)
            is_output = tirx.all(m < self.rows, row < self.count * TILE, n < form.shape.n)
            with cuda.when(is_output):
                body(step, m, n, i)

    def load(self, extra: Any) -> Any:
        """Of this thread's outputs."""
        own = cuda.local("float32", self.form.steps)
        self.each_output(lambda step, m, n, i: cuda.load_in_order(own, step, extra[m, n]))
        return own

    def multiply(self) -> None:
        """Every warp's sums to shared memory, where weights and tokens were."""
        form = self.form
        v, w = T.bind(self.warp // form.warps), T.bind(self.warp % form.warps)
        bulk.wait(self._barrier_of(v))
        with T.serial(-(-form.chunks // form.warps)) as step:
            chunk = T.bind(step * form.warps + w)
            with cuda.when(chunk < self.chunks):
                self._multiply(chunk, v)
        cuda.sync()
        first = T.bind(v * (form.together * TILE) + self.lane // 4)
        for r in range(form.together):
            for group in range(form.groups):
                for i in range(4):
                    token = 8 * group + self.lane % 4 * 2 + i % 2
                    at = self._sums_of(w, token, first + r * TILE + i // 2 * 8)
                    value = self.acc[4 * (r * form.groups + group) + i]
                    cuda.ptx("st.shared.b32", at, value)
        cuda.sync()

    def _multiply(self, chunk: Expr, v: Expr) -> None:
        form, lane = self.form, self.lane
        matrix = lane // 8  # an operand's two halves, 64 columns apart, in neighbouring registers
        column = chunk * CHUNK + matrix % 2 * 64 + matrix // 2 * 16
        for group in range(form.groups):
            at = T.bind((8 * group + lane % 8) * form.pitch + column)
            for two in range(2):
                there = self.tokens + cuda.offset(at + 32 * two)
                cuda.load_matrices(self.x, 8 * group + 4 * two, there)
        for r in range(form.together):
            tile = v * form.together + r
            at = self.base + cuda.offset((tile * form.chunks + chunk) * CHUNK_BYTES + lane * 16)
            four = [self.weights[4 * r + j] for j in range(4)]
            cuda.ptx("ld.shared.v4.b32", *four, at)
        for r in range(form.together):
            for i in range(FIELDS):
                a = [T.bind(field(self.weights[4 * r + j], i)) for j in range(4)]
                for group in range(form.groups):
                    b = self.x[8 * group + 2 * i], self.x[8 * group + 2 * i + 1]
                    cuda.multiply(self.acc, 4 * (r * form.groups + group), a, b)

    def _sums_of(self, w: Expr | int, token: Expr, row: Expr) -> Expr:
        at = (w * self.form.tokens + token) * self.form.sums_pitch + row * 4
        return self.base + cuda.offset(at)

    def send(self) -> None:
        """Four neighbouring outputs' sums over the warps, to the block that has these outputs."""
        form, word, total = self.form, cuda.local("uint32", QUAD), cuda.local("uint32", QUAD)
        quads, own = form.height // QUAD, form.own_height // QUAD
        with cuda.strided(form.tokens * quads, self.t, form.threads) as i:
            m, quad = T.bind(i // quads), T.bind(i % quads)
            with cuda.when(m < self.rows):
                at = self._sums_of(0, m, quad * QUAD)
                cuda.ptx("ld.shared.v4.b32", *(total[j] for j in range(QUAD)), at)
                for w in range(1, form.warps):
                    at = self._sums_of(w, m, quad * QUAD)
                    cuda.ptx("ld.shared.v4.b32", *(word[j] for j in range(QUAD)), at)
                    for j in range(QUAD):
                        cuda.store(total, total[j] + word[j], j)
                at = self._inbox_of(self.rank, m * form.own_height + quad % own * QUAD)
                self._push(T.bind(cuda.offset(quad // own)), at, total)

    def _push(self, rank: Expr, at: Expr, words: Any) -> None:
        there = cuda.local("uint32", 2)
        for i, address in enumerate((at, self.inbox_barrier)):
            cuda.ptx("mapa.shared::cluster.u32", there[i], address, rank)
        push = "st_async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32"
        cuda.ptx(push, there[0], *(words[j] for j in range(QUAD)), there[1])

    def _inbox_of(self, rank: Expr | int, i: Expr) -> Expr:
        """Where a rank's share of the block's sum i lies."""
        form = self.form
        at = (rank * (form.tokens * form.own_height) + i) * 4
        return self.base + T.uint32(form.inbox) + cuda.offset(at)

    def receive(self, finish: Callable[[int, Expr, Expr, Expr, Expr], None]) -> None:
        """finish(step, token, output, float32 of its sum, its scale) for this thread's."""
        form, word, total = self.form, cuda.local("uint32", 1), cuda.local("uint32", 1)
        scale = cuda.local("float32", 2)
        if form.ranks > 1:
            bulk.wait(self.inbox_barrier)

        def add(step: int, m: Expr, n: Expr, i: Expr) -> None:
            if form.ranks > 1:
                shares = [self._inbox_of(rank, i) for rank in range(form.ranks)]
            else:
                row = n - self.tile * TILE
                shares = [self._sums_of(w, m, row) for w in range(form.warps)]
            cuda.store(total, T.uint32(0), 0)
            for share in shares:
                cuda.ptx("ld.shared.b32", word[0], share)
                cuda.store(total, total[0] + word[0], 0)
            acc = T.shift_right(T.reinterpret("int32", total[0]), WEIGHT_BITS)
            for j, place in enumerate((m, form.tokens + i % form.own_height)):
                cuda.ptx("ld.shared.f32", scale[j], self.scales + cuda.offset(4 * place))
            finish(step, m, n, T.cast(acc, "float32"), scale[0] * scale[1])

        self.each_output(add)
