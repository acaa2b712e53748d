"""few_tokens_sm90.py's copies: what a block brings into shared memory, and who asks for it."""

from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.intrin import bulk_sm90 as bulk
from schedules.intrin import cuda
from schedules.ternary_matmul.cuda import CHUNK, CHUNK_BYTES, TILE
from schedules.ternary_matmul.few_form_sm90 import PIECE, Form

FLOATS = 4  # of a copy
PIECES = CHUNK // PIECE


class Copies:
    """Of a block: `chunks` from `chunk` on of the `count` tiles from `tile` on."""

    def __init__(self, form: Form, rows, number, c, warp, lane):
        """`number`: of the block in its cluster."""
        self.form, self.warp, self.lane = form, warp, lane
        self.rows = cuda.pinned(T.cast(rows, "int32"))
        self.t = cuda.pinned(warp * cuda.WARP + lane)
        self.rank, self.peer = number % form.ranks, number // form.ranks
        shares = self._share(c * form.peers + self.peer, form.shape.tiles, form.shares)
        self.tile, self.count = shares
        self.chunk, self.chunks = self._share(self.rank, form.shape.chunks, form.ranks)
        self.base = cuda.pinned(cuda.shared_bytes(form.shared_bytes))
        self.tokens = self.base + T.uint32(form.weights_bytes)
        self.barriers = self.base + T.uint32(form.barriers)
        self.inbox_barrier = self.barriers + T.uint32(form.across * bulk.BARRIER_BYTES)
        self.scales = self.base + T.uint32(form.scales)
        if form.has_own_tokens:
            self.m, column = cuda.pinned(lane // PIECES), lane % PIECES * PIECE
            self.column = cuda.pinned(warp * CHUNK + column)
            self.to = cuda.pinned(self.tokens + cuda.offset(self.m * form.pitch + self.column))
            # Of q as one row: what is added to it is then part of an instruction
            self.place = cuda.pinned(self.m * form.shape.k + self.chunk * CHUNK + self.column)

    @staticmethod
    def _share(i: Expr, count: int, shares: int) -> tuple[Expr, Expr]:
        """The first of share i and how many it has."""
        if shares == 1:
            return T.int32(0), T.int32(count)
        first = cuda.pinned(T.truncdiv(i * count, shares))
        return first, cuda.pinned(T.max(T.truncdiv((i + 1) * count, shares) - first, 1))

    def barrier_of(self, v: Expr) -> Expr:
        """Of the weights of R tiles."""
        if self.form.across == 1:  # v is a constant, which `cuda.offset` cannot take
            return self.barriers
        return self.barriers + cuda.offset(v * bulk.BARRIER_BYTES)

    def tokens_barrier_of(self, part: Expr) -> Expr:
        first = self.inbox_barrier + T.uint32(bulk.BARRIER_BYTES)
        return first + T.cast(part * bulk.BARRIER_BYTES, "uint32")

    def ask(self, w: Any) -> None:
        """All of the block's weights, by a warp; how much else is to come, too."""
        form, lane = self.form, self.lane
        of_tile = T.bind(self.chunks * CHUNK_BYTES)
        with cuda.when(self.warp == 0):
            with cuda.when(lane == 0):
                self._make_barriers()
            T.evaluate(T.cuda.warp_sync())
            with cuda.when(lane < form.across):
                tiles = T.max(T.min(self.count - lane * form.together, form.together), 0)
                bulk.expect(self.barrier_of(lane), tiles * of_tile)
            with cuda.when(lane < self.count):
                source = w[T.min(self.tile + lane, form.shape.tiles - 1), self.chunk, 0]
                to = self.base + cuda.offset(lane * (form.chunks * CHUNK_BYTES))
                barrier = self.barrier_of(lane // form.together)
                bulk.copy(to, T.address_of(source), of_tile, barrier)

    def _make_barriers(self) -> None:
        form = self.form
        for v in range(form.across):
            bulk.make(self.barriers + T.uint32(v * bulk.BARRIER_BYTES))
        if form.ranks > 1:
            bulk.make(self.inbox_barrier)
            bulk.expect(self.inbox_barrier, self.rows * (form.ranks * form.own_height * 4))
        if not form.has_own_tokens:
            for part in range(form.parts):
                barrier = self.tokens_barrier_of(T.int32(part))
                bulk.make(barrier)
                bulk.expect(barrier, self.rows * self._part_bytes(part))

    def ask_scales(self, w_scale: Any) -> None:
        """Of the block's outputs."""
        form = self.form
        first = T.bind(self.tile * TILE + self.rank * form.own_height)
        self._ask_floats(form.own_height, form.tokens, w_scale, first, form.shape.n)

    def _ask_floats(self, count: int, to: int, source: Any, first: Expr | int, end: Expr | int):
        """`count` of source[first:end] to place `to` of the scales.

        The last ones by themselves: the machine's copy of a part of 16 bytes has an address beyond
        them, which memcheck takes for one that is read.
        """
        with cuda.strided(-(-count // FLOATS), self.t, self.form.threads) as i:
            at, left = T.bind(first + FLOATS * i), T.bind(end - (first + FLOATS * i))
            own = T.bind(self.scales + T.uint32(4 * to) + cuda.offset(i * PIECE))
            with cuda.when(left >= FLOATS):
                cuda.copy_16_bytes(own, T.address_of(source[at]))
            with cuda.when(left < FLOATS):
                for j in range(FLOATS - 1):
                    with cuda.when(j < left):
                        cuda.copy_bytes(own + T.uint32(4 * j), T.address_of(source[at + j]), 4, 4)

    def ask_tokens(self, q: Any, scale: Any) -> None:
        """And their scales, in the last group of this thread's copies."""
        if self.form.has_own_tokens:
            self._ask_own_tokens(q)
        else:
            self._ask_shared_tokens(q)
        self._ask_floats(self.form.tokens, 0, scale, 0, self.rows)
        cuda.commit_copies()

    def _ask_own_tokens(self, q: Any) -> None:
        """Of a warp's chunks, for itself, a group of copies each."""
        form, k = self.form, self.form.shape.k
        for step in range(form.steps):
            if step:
                cuda.commit_copies()
            for row in range(0, form.tokens, cuda.WARP // PIECES):
                ahead = step * form.warps * CHUNK
                inside = [self.m < self.rows - row]
                if not form.is_even:
                    inside.append(self.warp < self.chunks - step * form.warps)
                if k % CHUNK:
                    inside.append(self.column < k - self.chunk * CHUNK - ahead)
                with cuda.when(tirx.all(*inside)):
                    to = self.to + T.uint32(row * form.pitch + ahead)
                    cuda.copy_16_bytes(to, T.address_of(q[0, self.place + (row * k + ahead)]))

    def _part_bytes(self, part: Expr | int) -> Expr:
        """Of a token."""
        form = self.form
        chunks = T.min(self.chunks - part * form.part_chunks, form.part_chunks)
        left = form.shape.k - (self.chunk + part * form.part_chunks) * CHUNK
        return T.bind(T.max(T.min(chunks * CHUNK, left), 0))

    def _ask_shared_tokens(self, q: Any) -> None:
        """Every X-th token for all peers of the block's rank, a warp for each of its copies."""
        form = self.form
        with cuda.strided(form.tokens // form.peers * form.parts, self.warp, form.block_warps) as i:
            m, part = T.bind(i // form.parts * form.peers + self.peer), T.bind(i % form.parts)
            size = self._part_bytes(part)
            with cuda.when(tirx.all(self.lane == 0, m < self.rows, size > 0)):
                column = part * (form.part_chunks * CHUNK)
                to = self.tokens + cuda.offset(m * form.pitch + column)
                source = T.address_of(q[m, self.chunk * CHUNK + column])
                barrier = self.tokens_barrier_of(part)
                if form.peers == 1:
                    bulk.copy(to, source, size, barrier)
                else:
                    bulk.copy_to_all(to, source, size, barrier, self._peers())

    def _peers(self) -> Expr:
        """A bit for each block of the cluster that has the block's rank."""
        form = self.form
        first = T.uint32(sum(1 << form.ranks * i for i in range(form.peers)))
        return first << cuda.offset(self.rank) if form.ranks > 1 else first
