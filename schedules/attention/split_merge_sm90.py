"""split_sm90's end: the shares of a cluster's blocks on one scale, sent to who adds them up.

    own[H, D] = sum over U shares           shared memory, where keys and values were
    inbox[C, H D / C] of every block        st.async from each, counted by a barrier of the receiver
    y[H D / C] = sum over C shares          C neighbouring lanes an output

A block sends and then waits for what it adds up, and for nothing else: its inbox is open before the
launch before has ended. Where shares were read from the blocks that had them, between two barriers
of the cluster, the end took 3.8 us of 8.3 (H100, context 512).
"""

from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.attention.cuda import KEYS
from schedules.attention.split_attend_sm90 import Block
from schedules.attention.split_row_sm90 import BLOCKS, STATE_BYTES, UNITS
from schedules.intrin import bulk_sm90 as bulk
from schedules.intrin import cuda
from schedules.intrin import lanes_cuda as lanes

EACH = 8  # bytes of a float64


class Merge:
    """Emits the end of one block of a cluster for H query heads of row m."""

    def __init__(self, block: Block):
        self.block, self.form = block, block.form
        self.t = T.bind(block.warp * cuda.WARP + block.lane)
        self.own = block.memory
        self.barrier = T.bind(block.exchange + T.uint32(self.form.exchange_bytes))
        self.states = self.barrier + T.uint32(STATE_BYTES)
        self.values = self.states + T.uint32(BLOCKS * STATE_BYTES)

    @property
    def outputs(self) -> int:
        """Of a block."""
        return self.form.heads * self.form.dim // BLOCKS

    def open(self) -> None:
        """Nothing may be sent before; all blocks of the cluster run from here on."""
        with cuda.when(self.t == 0):
            bulk.make(self.barrier)
            bulk.expect(self.barrier, T.int32(BLOCKS * (self.outputs * EACH + STATE_BYTES)))
        cuda.sync_cluster()

    def finish(self, y, m, first_head: Expr) -> None:
        self._share()
        form, block = self.form, self.block
        value, state = cuda.local("float64", 1), cuda.local("float64", 2)
        with cuda.strided(form.heads * form.dim, self.t, form.warps * cuda.WARP) as i:
            self._load_own(value, state, i)
            self._send(value, state, i)
        bulk.wait(self.barrier)
        count = self.outputs * BLOCKS
        with cuda.strided(count, self.t, form.warps * cuda.WARP) as i:
            result = self._sum(T.bind(i // BLOCKS))
            with cuda.when(block.lane % BLOCKS == 0):
                at = first_head * form.dim + block.rank * self.outputs + i // BLOCKS
                cuda.store(y, result, m, at)

    def _share(self) -> None:
        """Every warp's share and its state to shared memory."""
        form, block = self.form, self.block
        cuda.sync()  # nobody reads keys and values any more
        for column in range(form.columns):
            for f in range(form.fields):
                with cuda.when(block.is_byte(column)):
                    at = self._own_at(block.unit, block.group, block.dim_of(column, f))
                    cuda.ptx("st.shared.f64", at, block.o[column * form.fields + f])
        with cuda.when(block.lane == 0):
            at = self._state_at(block.unit, block.h)
            cuda.ptx("st.shared.v2.f64", at, block.state[0], block.state[1])
        cuda.sync()

    def _own_at(self, unit: Expr | int, h: Expr, d: Expr) -> Expr:
        form = self.form
        return self.own + cuda.offset(((unit * form.heads + h) * form.dim + d) * EACH)

    def _state_at(self, unit: Expr, h: Expr) -> Expr:
        form = self.form
        start = self.own + T.uint32(UNITS * form.heads * form.dim * EACH)
        return start + cuda.offset((unit * form.heads + h) * STATE_BYTES)

    def _load_own(self, value: Any, state: Any, i: Expr) -> None:
        """The block's share of output i, (peak, total) of its head; a warp's are of one head."""
        form, block = self.form, self.block
        h, d = T.bind(i // form.dim), T.bind(i % form.dim)
        at = self._state_at(T.bind(block.lane % UNITS), h)
        cuda.ptx("ld.shared.v2.f64", state[0], state[1], at)
        cuda.ptx("ld.shared.f64", value[0], self._own_at(0, h, d))
        peak, total = T.bind(state[0]), T.bind(state[1])
        with T.If(block.seen <= BLOCKS * KEYS):  # one unit has positions
            with T.Then():
                for word, number in enumerate((peak, total)):
                    cuda.store(state, cuda.shuffle(number, 0), word)
            with T.Else():
                self._add_units(value, state, peak, total, h, d)

    def _add_units(self, value, state, peak: Expr, total: Expr, h: Expr, d: Expr) -> None:
        other, top = cuda.local("float64", 1), lanes.max_float64(peak)
        factor = T.bind(T.exp(peak - top))
        factors = [T.bind(cuda.shuffle(factor, u)) for u in range(UNITS)]
        cuda.store(value, value[0] * factors[0], 0)
        for u in range(1, UNITS):
            cuda.ptx("ld.shared.f64", other[0], self._own_at(u, h, d))
            cuda.store(value, value[0] + factors[u] * other[0], 0)
        total_of_warp = lanes.sum_float64(T.bind(factor * total))
        cuda.store(state, top, 0)
        cuda.store(state, total_of_warp * cuda.float64(UNITS / cuda.WARP), 1)

    def _send(self, value: Any, state: Any, i: Expr) -> None:
        rank = T.bind(cuda.offset(i // self.outputs))
        j, own = T.bind(i % self.outputs), self.block.rank
        barrier = self._remote(self.barrier, rank)
        at = self.values + cuda.offset((own * self.outputs + j) * EACH)
        push = "st_async.shared::cluster.mbarrier::complete_tx::bytes"
        bits = T.reinterpret("uint64", value[0])
        cuda.ptx(f"{push}.b64", self._remote(at, rank), bits, barrier)
        with cuda.when(j == 0):
            at = self._remote(self.states + cuda.offset(own * STATE_BYTES), rank)
            bits = [T.bind(T.reinterpret("uint64", state[word])) for word in range(2)]
            cuda.ptx(f"{push}.v2.b64", at, *bits, barrier)

    @staticmethod
    def _remote(address: Expr, rank: Expr) -> Expr:
        there = cuda.local("uint32", 1)
        cuda.ptx("mapa.shared::cluster.u32", there[0], address, rank)
        return T.bind(there[0])

    def _sum(self, j: Expr) -> Expr:
        """float32 of output j, in C neighbouring lanes."""
        found, value = cuda.local("float64", 2), cuda.local("float64", 1)
        source = T.bind(self.block.lane % BLOCKS)
        at = self.states + cuda.offset(source * STATE_BYTES)
        cuda.ptx("ld.shared.v2.f64", found[0], found[1], at)
        at = self.values + cuda.offset((source * self.outputs + j) * EACH)
        cuda.ptx("ld.shared.f64", value[0], at)
        peak = T.bind(found[0])
        factor = T.bind(T.exp(peak - lanes.max_float64(peak)))
        total = lanes.sum_float64(T.bind(factor * found[1])) * cuda.float64(BLOCKS / cuda.WARP)
        total = T.bind(total)
        sum_of_blocks = cuda.warp_reduce(T.bind(factor * value[0]), "sum", BLOCKS)
        return T.bind(T.cast(sum_of_blocks / total, "float32"))
