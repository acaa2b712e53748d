"""One token's products with ternary weights as they lie in memory: bits times bits, on Hopper.

    q[c] = sum of +-2^p q_p[c]               bit planes of two's complement: 4 or 8
    w[n, c] = low[n, c] - 2 high[n, c]       a weight's two bits: `tiles_2bit` has w & 3

    acc[n, p] = sum of bits of w[n, :] & b[:, p]     mma m16n8k256 of single bits, and, popcount
    sum over c of w q = sum of +-2^p (low[n, p] - 2 high[n, p])

A lane's 16 bytes are the operand of 16 rows and 128 columns as they come: nothing is unpacked. The
8 columns of the other operand, of which a product of bytes leaves 7 idle for one token, are planes
of q; in b a plane stands at the even bits for low, at the odd ones for high.

    act_bits | columns of the operand        | products for 128 columns
    4        | 4 planes low, 4 planes high   | 1, where bytes take 4 and 16 masks
    8        | 8 planes low; 8 planes high   | 2

The sum over planes is a product too, mma m16n8k16: counts of 128 columns are bytes, four a lane,
times what each plane stands for. A tile's sums are a column of it, so tiles share the result:

    act_bits | tiles of a product | tiles of a result
    4        | 2                  | 8, a column each
    8        | 1                  | 4, two columns each: high of plane 7 stands for 256 = 4 . 64
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.intrin import cuda

ADD = "mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32"
BITS = "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
EACH_BYTE = 0x01010101
HALVES = 2  # of 64 columns: a register of the operand each
WORDS_BYTES = 4 * cuda.WARP  # a chunk's codes
QUARTER_OF_256 = 64 << 24  # as a byte of the high bits of plane 7


@dataclass(frozen=True)
class Planes:
    """Emits the operand of q and the products of one warp."""

    act_bits: int
    lane: Expr

    @property
    def products(self) -> int:
        """Of 128 columns."""
        return 1 if self.act_bits == 4 else 2

    def spread(self, word: Expr, memory: Expr) -> Any:
        """The operand of 128 columns; `word` is four codes of the columns 4 lane on, `memory` of
        WORDS_BYTES, the warp's own. A byte's bits 2 i are of columns 64 h + 16 i + 4 (lane % 4)."""
        lane, operand = self.lane, cuda.local("uint32", HALVES)
        place = (lane & 16) + lane % 4 * 4 + T.shift_right(lane, 2) % 4
        cuda.ptx("st.shared.b32", memory + cuda.offset(4 * place), word)
        T.evaluate(T.cuda.warp_sync())
        column = T.shift_right(lane, 2)
        plane = T.bind(cuda.offset(column % self.act_bits))
        words = cuda.local("uint32", 4)
        for half in range(HALVES):
            at = memory + cuda.offset(64 * half + lane % 4 * 16)
            cuda.ptx("ld.shared.v4.b32", *(words[i] for i in range(4)), at)
            bits: Any = T.uint32(0)
            for i in range(4):
                plane_bits = (words[i] >> plane) & T.uint32(EACH_BYTE)
                bits = bits | plane_bits << T.uint32(2 * i)
            if self.act_bits == 4:  # the upper columns meet the high bits
                bits = bits << cuda.offset(T.shift_right(column, 2))
            cuda.store(operand, bits, half)
        return operand

    @property
    def tiles(self) -> int:
        """Of one `add`."""
        return 2 if self.act_bits == 4 else 1

    @property
    def most_tiles(self) -> int:
        """That share a result of four registers."""
        return 8 if self.act_bits == 4 else 4

    def add(self, result: Any, weights: Sequence[Any], slot: Expr | int, operand: Any) -> None:
        """result += a chunk's products; `weights`: a lane's 16 bytes of each of `tiles`, which are
        the slots from `slot` on."""
        counts = [self._count(of_tile, operand) for of_tile in weights]
        a = []
        for row in range(2):
            if self.act_bits == 4:
                words = [count[2 * row + i] for count in counts for i in range(2)]
            else:
                words = [counts[0][4 * high + 2 * row + i] for high in range(2) for i in range(2)]
            pairs = [
                T.bind(cuda.byte_permute(words[i], words[i + 1], 0x0040))
                for i in range(0, len(words), 2)
            ]
            a.append(T.bind(cuda.byte_permute(pairs[0], pairs[-1], 0x5410)))
        d = [result[i] for i in range(4)]
        cuda.ptx(ADD, *d, *a, self._values(slot), *d)

    def _count(self, weights: Any, operand: Any) -> Any:
        """How many bits a tile's rows and each plane have in common."""
        counts, none = cuda.local("uint32", 4 * self.products), [T.uint32(0)] * 4
        a = [weights[i] for i in range(4)]
        for high in range(self.products):
            c = [counts[4 * high + i] for i in range(4)]
            b = [T.bind(operand[half] << T.uint32(high)) for half in range(HALVES)]
            cuda.ptx(BITS, *c, *a, *b, *none)
        return counts

    def _values(self, slot: Expr | int) -> Expr:
        """The operand of `add`: four values in column lane / 4, of the planes of lane % 4."""
        column, zero = T.bind(T.shift_right(self.lane, 2)), T.uint32(0)
        if self.act_bits == 4:
            own = T.bind(self._of_pair([value_of(4, pair) for pair in range(4)]))
            second = T.Select(column == slot + 1, own << T.uint32(16), zero)
            return T.bind(T.Select(column == slot, own, second))
        own = T.bind(self._of_pair([value_of(8, pair) for pair in range(4)]))
        rest = T.Select(self.lane % 4 == 3, T.uint32(QUARTER_OF_256), zero)
        second = T.Select(column == 2 * slot + 1, rest, zero)
        return T.bind(T.Select(column == 2 * slot, own, second))

    def _of_pair(self, words: Sequence[int]) -> Expr:
        pair, chosen = self.lane % 4, T.uint32(words[3])
        for i in reversed(range(3)):
            chosen = T.Select(pair == i, T.uint32(words[i]), chosen)
        return chosen

    def each_sum(self, result: Any, body: Callable[[Expr, Expr, Expr], None]) -> None:
        """body(slot, row of the tile, int32) of the lane's sums."""
        first, pair = T.shift_right(self.lane, 2), self.lane % 4
        for half in range(2):
            two = [T.reinterpret("int32", result[2 * half + i]) for i in range(2)]
            row = first + 8 * half
            if self.act_bits == 4:
                body(2 * pair, row, two[0])
                body(2 * pair + 1, row, two[1])
            else:
                body(pair, row, two[0] + 4 * two[1])


def value_of(act_bits: int, pair: int) -> int:
    """Bytes of what planes 2 pair and 2 pair + 1 stand for; of 8 bits, low ones then high ones,
    without 256."""
    plane = [(-1 if p == act_bits - 1 else 1) << p for p in range(act_bits)]
    columns = [*plane, *(-2 * value for value in plane)]
    if act_bits == 4:
        values = columns[2 * pair : 2 * pair + 2]
    else:
        values = [columns[8 * high + 2 * pair + i] for high in range(2) for i in range(2)]
    kept = [0 if value == 256 else value for value in values]
    return int.from_bytes(bytes(value & 0xFF for value in kept), "little")
