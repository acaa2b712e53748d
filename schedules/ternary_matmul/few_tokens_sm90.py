"""ternary_matmul of 2 to 16 tokens on Hopper: a cluster of blocks shares out K of some tiles.

    for tiles of c: N/16 shared out evenly           blockIdx.y
        for peer in X: the same again                blockIdx.x: the blocks of a cluster,
            for rank in S: K/(128 S) chunks          X S of them
                w[P, C] -> shared                    a bulk copy a tile, before the wait
                x[T, 128 C] -> shared                after it, and in part for all peers
                for warp in V W:                     threadIdx.y: R tiles, every W-th chunk
                    b = ldmatrix(x)                  8 registers for 8 tokens
                    acc[R, T/8] += (w << 6 - 2i & 0xC0) . b      mma m16n8k32, i in 4
            sums over W warps -> inboxes             shared memory, then st.async
            out[T, 16 P / S] = epilogue(sum of S shares / 64)

    tile | value                       | bound by
    T    | 8 or 16                     | the product's columns
    S    | 1, 2 or 4                   | a block's columns of tokens: 8192 of 4, 4096 of more
    X    | 2 of 16 tokens and S = 1    | the same: read from L2 once for both
    P    | what X S blocks have        | half of their shared memory: two launches side by side
    R    | P, or 2                     | b is read once for R tiles; T R / 2 registers
    V, W | 16 warps, few of them idle  | the same: half of the registers

Weights and their scales do not depend on the launch before: all are asked for before it has ended;
what addresses need is worked out before that, too (`cuda.pinned`). Where all of a block's tiles are
one warp's, that brings the tokens of its chunks itself (cp.async) and waits for nobody; elsewhere a
block brings every X-th token to all peers (a bulk copy for each W chunks).
A block sends each other one of its ranks its share of that one's outputs, and waits for what it
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
from schedules.ternary_matmul.few_copies_sm90 import Copies
from schedules.ternary_matmul.few_form_sm90 import MOST_STEPS, Form

QUAD = 4  # sums of a message
MOST_LATE = 2  # registers of the epilogue's own inputs while sums are made


def launch(form: Form, rows, end: Epilogue, q, scale, w, w_scale, extra, out) -> None:
    share = cuda.cluster(form.cluster) if form.cluster > 1 else cuda.blocks(1)
    with share as number, cuda.blocks(form.clusters, "y") as c:
        threads = cuda.threads(form.block_warps, "y"), cuda.threads(cuda.WARP)
        with threads[0] as warp, threads[1] as lane, cuda.min_blocks(2):
            block = Block(form, rows, number, c, warp, lane)
            block.ask(w)
            block.ask_scales(w_scale)
            if form.cluster > 1:
                cuda.sync_cluster()  # its barriers are made, inboxes are open
            else:
                cuda.sync()
            cuda.wait_for_launch()
            cuda.let_next_launch()
            block.ask_tokens(q, scale)
            late = block.load(extra) if end.extra and form.rounds <= MOST_LATE else None
            block.multiply()
            if end.extra and late is None:
                late = block.load(extra)
            if form.ranks > 1:
                block.send()

            def finish(step: int, m: Expr, n: Expr, acc: Expr, s: Expr) -> None:
                other = late[step] if late is not None else None
                cuda.store(out, end.value(acc, s, other), m, n)

            block.receive(finish)


class Block(Copies):
    """Emits the work of a block."""

    def __init__(self, form: Form, rows, number, c, warp, lane):
        super().__init__(form, rows, number, c, warp, lane)
        self.outputs = [self._output(step) for step in range(form.rounds)]
        self.acc = cuda.local("uint32", 4 * form.together * form.groups)
        self.weights = cuda.local("uint32", 4 * form.together)
        self.x = cuda.local("uint32", 8 * form.groups)
        for i in range(4 * form.together * form.groups):
            cuda.store(self.acc, T.uint32(0), i)

    def _output(self, step: int) -> tuple[Expr, Expr, Expr]:
        """A thread's: token, row of the block, output or -1 where there is none."""
        form = self.form
        i = self.t + step * form.threads
        m = cuda.pinned(T.truncdiv(i, form.own_height))
        row = cuda.pinned(i - m * form.own_height)
        height = self.rank * form.own_height + row
        n = self.tile * TILE + height
        exists = tirx.all(m < self.rows, height < self.count * TILE, n < form.shape.n)
        return m, row, cuda.pinned(T.Select(exists, n, -1))

    def each_output(self, body: Callable[[int, Expr, Expr, Expr], None]) -> None:
        """body(step, token, row, output) for those of this thread."""
        for step, (m, row, n) in enumerate(self.outputs):
            with cuda.when(n >= 0):
                body(step, m, row, n)

    def load(self, extra: Any) -> Any:
        """Of this thread's outputs."""
        own = cuda.local("float32", self.form.rounds)
        self.each_output(lambda step, m, row, n: cuda.load_in_order(own, step, extra[m, n]))
        return own

    def multiply(self) -> None:
        """Every warp's sums to shared memory, where weights and tokens were."""
        form = self.form
        v, w = T.bind(self.warp // form.warps), T.bind(self.warp % form.warps)
        bulk.wait(self.barrier_of(v))
        if form.has_own_tokens:
            for step in range(form.steps):
                cuda.wait_for_copies(form.steps - 1 - step)
                T.evaluate(T.cuda.warp_sync())
                self._multiply_chunk(step, v, w)
        else:
            if form.parts == 1:
                bulk.wait(self.tokens_barrier_of(T.int32(0)))
            is_short = form.steps <= MOST_STEPS
            with cuda.unrolled(form.steps) if is_short else T.serial(form.steps) as step:
                if form.parts > 1:
                    bulk.wait(self.tokens_barrier_of(step))
                self._multiply_chunk(step, v, w)
            cuda.wait_for_copies()  # of scales
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

    def _multiply_chunk(self, step: Expr | int, v: Expr, w: Expr) -> None:
        chunk = T.bind(step * self.form.warps + w)
        if self.form.is_even:
            self._multiply(chunk, v)
        else:
            with cuda.when(chunk < self.chunks):
                self._multiply(chunk, v)

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
                to = quad // own + self.peer * form.ranks
                self._push(T.bind(cuda.offset(T.bind(to))), at, total)

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

        def add(step: int, m: Expr, row: Expr, n: Expr) -> None:
            if form.ranks > 1:
                i = m * form.own_height + row
                shares = [self._inbox_of(rank, i) for rank in range(form.ranks)]
            else:
                shares = [self._sums_of(w, m, row) for w in range(form.warps)]
            cuda.store(total, T.uint32(0), 0)
            for share in shares:
                cuda.ptx("ld.shared.b32", word[0], share)
                cuda.store(total, total[0] + word[0], 0)
            acc = T.shift_right(T.reinterpret("int32", total[0]), WEIGHT_BITS)
            for j, place in enumerate((m, form.tokens + row)):
                cuda.ptx("ld.shared.f32", scale[j], self.scales + cuda.offset(4 * place))
            finish(step, m, n, T.cast(acc, "float32"), scale[0] * scale[1])

        self.each_output(add)
