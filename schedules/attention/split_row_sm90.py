"""split_sm90's sizes, a layer's cache, and a row of the projections, turned as rope does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.attention.cuda import KEYS
from schedules.intrin import cuda

BLOCKS = 8  # C
UNITS = 4  # U
HEADS = (2, 1)  # H: they divide C, so that a block's outputs are of one head
LARGEST_TILE = 40 * 1024  # of 48 KB that a block has unasked
STATE_BYTES = 16  # a share's peak and total, float64
EXCHANGE_BYTES = 352  # a head's dot products, weights and factors for 64 positions


@dataclass(frozen=True)
class Form:
    """Sizes that a kernel is built for."""

    num_heads: int
    num_kv_heads: int
    dim: int
    kv_bits: int

    @property
    def is_possible(self) -> bool:
        """Whether rows are whole words in every plane of bits."""
        return self.kv_bits < 16 and self.dim % 32 == 0 and self.tile_bytes < LARGEST_TILE

    @property
    def can_turn(self) -> bool:
        """Whether the halves of a head lie a shuffle or a register apart."""
        return self.is_possible and self.dim in (64, 128)

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def heads(self) -> int:
        """H"""
        return next(h for h in HEADS if self.group % h == 0)

    @property
    def warps(self) -> int:
        return UNITS * self.heads

    @property
    def words(self) -> int:
        """Of a head's q8."""
        return self.dim // 4

    @property
    def slots(self) -> int:
        """Words of q8 of a lane."""
        return -(-self.words // cuda.WARP)

    @property
    def row_words(self) -> int:
        """Of a key or value in the cache."""
        return self.dim * self.kv_bits // 32

    @property
    def pitch(self) -> int:
        """Words of a row in shared memory: odd, for the banks."""
        return self.row_words | 1

    @property
    def tile_bytes(self) -> int:
        return UNITS * 2 * KEYS * self.pitch * 4

    @property
    def exchange_bytes(self) -> int:
        """Behind the tile: what a unit's warps exchange."""
        return UNITS * self.heads * EXCHANGE_BYTES

    @property
    def inbox_bytes(self) -> int:
        """Behind that: a barrier, the cluster's states and shares of the block's outputs."""
        return STATE_BYTES * (1 + BLOCKS) + 8 * self.heads * self.dim

    @property
    def fields(self) -> int:
        """Codes that share a byte of the (low) plane."""
        return 2 if self.kv_bits == 4 else 4

    @property
    def plane(self) -> int:
        """Bytes of the (low) plane."""
        return self.dim // self.fields

    @property
    def columns(self) -> int:
        """Bytes of the plane that a lane sums."""
        return -(-self.plane // cuda.WARP)

    @property
    def loads(self) -> int:
        """Words of K and V that a thread brings in a round."""
        return 2 * -(-KEYS * self.row_words // (self.heads * cuda.WARP))

    @property
    def bos_words(self) -> int:
        """Of the bos row of a 3-bit cache, which has 4."""
        return self.dim // 8

    def row_start(self, t: Expr) -> Expr:
        """The first word of row t; below 0 for a row of 3 bits at position 0, which is none."""
        if self.kv_bits == 3:
            return self.bos_words + (t - 1) * self.row_words
        return t * self.row_words

    def field(self, words: Sequence[Expr], f: int) -> Expr:
        """The codes of field f, a byte each, from a word of each plane."""
        if self.kv_bits == 4:
            return words[0] >> T.uint32(4 * f) & T.uint32(0x0F0F0F0F)
        low = words[0] >> T.uint32(2 * f) & T.uint32(0x03030303)
        shift = 2 - 2 * f
        high = words[1] << T.uint32(shift) if shift > 0 else words[1] >> T.uint32(-shift)
        return low | high & T.uint32(0x04040404)


@dataclass(frozen=True)
class Cache:
    """One layer's cache and a row's place in it."""

    words: Any  # u32 [S, Hkv, 2, B/4]
    scales: Any
    head: tuple[Expr, Expr]  # slot, key and value head
    position: Expr


@dataclass(frozen=True)
class Rope:
    cos: Any
    sin: Any


@dataclass(frozen=True)
class Row:
    """Row m of the projections."""

    form: Form
    qkv: Any
    m: Expr
    position: Expr

    def load(self, first: Expr, lane: Expr) -> Any:
        """x[4 s + j]: columns 4 (lane + 32 s) + j of a head; lanes past the head repeat it."""
        form, x = self.form, cuda.local("float32", 4 * self.form.slots)
        for slot in range(form.slots):
            word = T.bind(self.word_of(slot, lane))
            cuda.load_in_order(x, 4 * slot, self.qkv[self.m, first + 4 * word], 4)
        return x

    def word_of(self, slot: int, lane: Expr) -> Expr:
        return (lane + slot * cuda.WARP) % self.form.words

    def ask_tables(self, rope: "Rope", lane: Expr) -> list[Any]:
        """The lane's cosines and sines."""
        form, tables = self.form, [cuda.local("float32", 4 * self.form.slots) for _ in range(2)]
        for slot in range(form.slots):
            column = T.bind(4 * (self.word_of(slot, lane) % (form.words // 2)))
            for table, source in zip(tables, (rope.cos, rope.sin), strict=True):
                with T.vectorized(4) as j:
                    cuda.store(table, source[self.position, column + j], 4 * slot + j)
        return tables

    def turn(self, x, tables: list[Any], lane: Expr, is_turned: Expr | None = None) -> Any:
        """Halves x1, x2 of the head: x1 cos - x2 sin, x2 cos + x1 sin, as rope does."""
        form, turned = self.form, cuda.local("float32", 4 * self.form.slots)
        half = form.words // 2
        for slot in range(form.slots):
            is_low = self.word_of(slot, lane) < half
            for j in range(4):
                own, at = x[4 * slot + j], 4 * (slot ^ half // cuda.WARP) + j
                other = T.bind(x[at] if half >= cuda.WARP else cuda.shuffle_xor(own, half))
                signed = T.Select(is_low, -other, other)
                c, s = (T.cast(table[4 * slot + j], "float64") for table in tables)
                y = T.cast(own, "float64") * c + T.cast(signed, "float64") * s
                y = T.cast(y, "float32")
                value = y if is_turned is None else T.Select(is_turned, y, own)
                cuda.store(turned, value, 4 * slot + j)
        return turned
