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
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.intrin import cuda

BITS = "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
EACH_BYTE = 0x01010101
HALVES = 2  # of 64 columns: a register of the operand each
WORDS_BYTES = 4 * cuda.WARP  # a chunk's codes


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

    def clear(self, acc: Any) -> None:
        for i in range(4 * self.products):
            cuda.store(acc, T.uint32(0), i)

    def multiply(self, acc: Any, weights: Any, operand: Any) -> None:
        """acc += the products of a lane's 16 bytes"""
        a = [weights[i] for i in range(4)]
        for high in range(self.products):
            c = [acc[4 * high + i] for i in range(4)]
            b = [T.bind(operand[half] << T.uint32(high)) for half in range(HALVES)]
            cuda.ptx(BITS, *c, *a, *b, *c)

    def sums(self, acc: Any) -> Sequence[Expr]:
        """int32 of rows lane / 4 and 8 + lane / 4, in all four lanes of each."""
        found = []
        pair = T.bind(self.lane % 4)  # of columns
        first = T.bind(self._weight(pair))
        for row in range(2):
            values = []
            for i in range(2):
                value = T.reinterpret("int32", acc[2 * row + i])
                if self.products == 2:
                    value = value - 2 * T.reinterpret("int32", acc[4 + 2 * row + i])
                values.append(value)
            sign = T.if_then_else(self._ends_with_sign(pair), -2, 2)
            total = T.bind(first * (values[0] + sign * values[1]))
            for lanes in (1, 2):
                total = T.bind(total + cuda.shuffle_xor(total, lanes))
            found.append(total)
        return found

    def _weight(self, pair: Expr) -> Expr:
        """What bit plane 2 pair of the operand stands for."""
        if self.act_bits == 8:
            return T.shift_left(T.int32(1), 2 * pair)
        low = T.shift_left(T.int32(1), pair % 2 * 2)
        return T.if_then_else(pair >= 2, -2 * low, low)

    def _ends_with_sign(self, pair: Expr) -> Expr:
        """The odd plane of a pair counts twice the even one, the sign's downwards."""
        return pair % (self.act_bits // 2) == self.act_bits // 2 - 1
