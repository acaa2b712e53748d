"""The `keep` largest |h| of a row on CUDA, by a histogram: five barriers, whatever the row holds.

    bins[b] += 1 for every |h|               b: exponent and 7 bits of mantissa below gamma's
    edge: the bin with the keep-th largest   sums of four bins a thread, a scan in one warp
    listed = (|h|, column) in that bin       some ten of a Gaussian row; all, where all are equal
    kept: above it, or fewer than keep       ties to the lower column
          in front in the list

Bit patterns of non-negative floats order as they do, so bins of equal ratios need no scale: 128 of
them halve |h|, and what is below gamma / 2^16 shares the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.intrin import cuda
from schedules.rms_norm_topk.generic import MAGNITUDE

BINS = 2048
BIN_SHIFT = 16  # bits of a float32 that a bin leaves out
EACH = 4  # bins of a thread's 16-byte load
TOTALS_BYTES = 4 * cuda.WARP  # of each group of 128 bins
EDGE, ABOVE, LISTED = 29, 30, 31  # words of the totals that no group has
ENTRY_BYTES = 8


@dataclass(frozen=True)
class Selection:
    """Emits it for a row of K columns over a block's threads."""

    k: int
    keep: int
    t: Expr
    threads: int
    memory: Expr  # shared, of `size_of(k)` bytes

    @property
    def totals(self) -> Expr:
        return self.memory + T.uint32(4 * BINS)

    @property
    def entries(self) -> Expr:
        return self.totals + T.uint32(TOTALS_BYTES)

    def clear(self) -> None:
        """Before `mask`, with a barrier between."""
        zero = T.uint32(0)
        with cuda.strided(BINS // EACH + TOTALS_BYTES // 16, self.t, self.threads) as i:
            at = self.memory + cuda.offset(16 * i)
            cuda.ptx("st.shared.v4.b32", at, zero, zero, zero, zero)

    def mask(self, h: Any, columns: Sequence[Expr], gamma: Expr) -> None:
        """h[i] = 0 of those that are not kept; column i past K is none."""
        lowest = T.bind(T.shift_right(T.reinterpret("int32", gamma), BIN_SHIFT) - (BINS - 1))
        bits = [T.bind(T.reinterpret("int32", value) & MAGNITUDE) for value in elements(h)]
        bins = [T.bind(self._bin(value, lowest)) for value in bits]
        for column, of_bin in zip(columns, bins, strict=True):
            with cuda.when(column < self.k):
                at = self.memory + cuda.offset(4 * of_bin)
                cuda.ptx("red.shared.add.u32", at, T.uint32(1))
        cuda.sync()
        self._find_edge()
        cuda.sync()
        edge, above = (self._total(word) for word in (EDGE, ABOVE))
        for value, column, of_bin in zip(bits, columns, bins, strict=True):
            with cuda.when(cuda.both(of_bin == edge, column < self.k)):
                self._list(value, column)
        cuda.sync()
        count = self._total(LISTED)
        for i, (value, column, of_bin) in enumerate(zip(bits, columns, bins, strict=True)):
            with cuda.when(of_bin < edge):
                cuda.store(h, T.float32(0), i)
            with cuda.when(of_bin == edge):
                with cuda.when(above + self._in_front(value, column, count) >= self.keep):
                    cuda.store(h, T.float32(0), i)

    @staticmethod
    def _bin(bits: Expr, lowest: Expr) -> Expr:
        return T.max(T.min(T.shift_right(bits, BIN_SHIFT) - lowest, BINS - 1), 0)

    def _total(self, word: int) -> Expr:
        return load(self.totals + T.uint32(4 * word))

    def _find_edge(self) -> None:
        """The bin that `keep` falls into, and how many are above it."""
        groups = BINS // EACH // cuda.WARP  # of 128 bins, the highest first
        counts = cuda.local("uint32", EACH)
        warp, lane, warps = self.t // cuda.WARP, self.t % cuda.WARP, self.threads // cuda.WARP
        with T.serial(-(-groups // warps)) as step:
            group = T.bind(step * warps + warp)
            with cuda.when(group < groups):
                self._load_group(counts, group, lane)
                total = cuda.warp_count(count_of(counts))
                with cuda.when(lane == 0):
                    at = self.totals + cuda.offset(4 * group)
                    cuda.ptx("st.shared.b32", at, T.reinterpret("uint32", total))
        cuda.sync()
        own = load(self.totals + cuda.offset(4 * T.min(lane, groups - 1)))
        total = T.bind(T.Select(lane < groups, own, 0))
        with T.serial(-(-groups // warps)) as step:
            group = T.bind(step * warps + warp)
            before = cuda.warp_count(T.Select(lane < group, total, 0))
            reached = before + cuda.warp_count(T.Select(lane == group, total, 0))
            with cuda.when(tirx.all(group < groups, before < self.keep, reached >= self.keep)):
                self._load_group(counts, group, lane)
                own = T.bind(count_of(counts))
                self._write_edge(counts, group, lane, T.bind(before + scan(own, lane) - own))

    def _load_group(self, counts: Any, group: Expr, lane: Expr) -> None:
        """counts[3] is of the highest of the lane's four bins."""
        quad = T.max(BINS // EACH - 1 - (group * cuda.WARP + lane), 0)
        at = self.memory + cuda.offset(16 * quad)
        cuda.ptx("ld.shared.v4.b32", *elements(counts), at)

    def _write_edge(self, counts: Any, group: Expr, lane: Expr, before: Expr) -> None:
        quad = T.bind(T.max(BINS // EACH - 1 - (group * cuda.WARP + lane), 0))
        for i in reversed(range(EACH)):
            reached = T.bind(before + T.cast(counts[i], "int32"))
            with cuda.when(cuda.both(before < self.keep, reached >= self.keep)):
                for word, value in ((EDGE, EACH * quad + i), (ABOVE, before)):
                    at = self.totals + T.uint32(4 * word)
                    cuda.ptx("st.shared.b32", at, T.reinterpret("uint32", value))
            before = reached

    def _list(self, bits: Expr, column: Expr) -> None:
        place = cuda.local("uint32", 1)
        cuda.ptx("atom.shared.add.u32", place[0], self.totals + T.uint32(4 * LISTED), T.uint32(1))
        at = self.entries + place[0] * T.uint32(ENTRY_BYTES)
        words = (T.reinterpret("uint32", word) for word in (bits, column))
        cuda.ptx("st.shared.v2.b32", at, *words)

    def _in_front(self, bits: Expr, column: Expr, count: Expr) -> Expr:
        """How many of those listed are larger, or as large and of a lower column."""
        front, entry = cuda.local("int32", 1), cuda.local("uint32", 2)
        cuda.store(front, T.int32(0), 0)
        with T.serial(count) as i:
            at = self.entries + cuda.offset(ENTRY_BYTES * i)
            cuda.ptx("ld.shared.v2.b32", entry[0], entry[1], at)
            other, place = (T.cast(entry[j], "int32") for j in range(2))
            first = T.Or(other > bits, T.And(other == bits, place < column))
            cuda.store(front, front[0] + T.cast(first, "int32"), 0)
        return front[0]


def size_of(k: int) -> int:
    """Bytes of shared memory: bins, totals, and all columns listed at worst."""
    return 4 * BINS + TOTALS_BYTES + ENTRY_BYTES * k


def elements(buffer: Any) -> list[Expr]:
    return [buffer[i] for i in range(int(buffer.shape[0]))]


def count_of(counts: Any) -> Expr:
    total = T.cast(counts[0], "int32")
    for i in range(1, EACH):
        total = total + T.cast(counts[i], "int32")
    return total


def load(address: Expr) -> Expr:
    word = cuda.local("uint32", 1)
    cuda.ptx("ld.shared.b32", word[0], address)
    return T.bind(T.cast(word[0], "int32"))


def scan(value: Expr, lane: Expr) -> Expr:
    """Sum of the values of the warp's lanes up to this one."""
    running = cuda.local("int32", 1)
    cuda.store(running, value, 0)
    for step in (1, 2, 4, 8, 16):
        other = T.bind(cuda.shuffle_up(running[0], step))
        with cuda.when(lane >= step):
            cuda.store(running, running[0] + other, 0)
    return running[0]
