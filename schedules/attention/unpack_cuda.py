"""A block of 64 packed keys or values into levels, bytes in shared memory that `ldmatrix` reads.

    keys     row 8 (t % 8) + t / 8: D bytes      a thread two words of every field
    values   row d: 64 bytes, transposed         a thread 4 positions of 4 D/64 columns

Both come as the cache has them: fields (docs/architecture.md, "KV cache") of words. A lane of the
scores' product then has 8 neighbouring positions, 8 g on for lanes 4 g .. 4 g + 3, whose bytes
reach the values' product by `transpose_matrix`: byte 16 j + 4 c + 2 e + i of a value's row is that
of position 16 c + 8 e + 2 j + i.
"""

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.attention.softmax_cuda import KEYS
from schedules.intrin import cuda

ONES = 0x01010101
SIGNS = 0x80808080
QUADS = KEYS // 4
GROUP_BYTES = 32


@dataclass(frozen=True)
class Packed:
    """A block's rows of one kind, as they lie in shared memory."""

    dim: int
    bits: int

    @property
    def row_bytes(self) -> int:
        return self.dim * self.bits // 8

    @property
    def block_bytes(self) -> int:
        return KEYS * self.row_bytes

    @property
    def fields(self) -> int:
        """Of a byte of the first plane."""
        return 2 if self.bits == 4 else 4

    @property
    def words(self) -> int:
        """Of the first plane of a row."""
        return self.dim // self.fields // 4

    def load(self, row: Expr, word: Expr) -> tuple[Expr, Expr | None]:
        """A word of the first plane and, shifted to its first field, that of the second."""
        low = T.bind(load_word(row + T.cast(4 * word, "uint32")))
        if self.bits == 4:
            return low, None
        second = self.dim // 32  # words of the plane of high bits
        at = row + T.cast(self.dim // 4 + 4 * (word % second), "uint32")
        return low, T.bind(load_word(at) >> T.cast(word // second, "uint32"))

    def levels(self, low: Expr, high: Expr | None, f: Expr | int) -> Expr:
        """Four signed levels of field f."""
        shift = T.cast(f, "uint32")
        if high is None:
            code = low >> shift * T.uint32(4) & T.uint32(0x0F0F0F0F)
        else:
            code = low >> shift * T.uint32(2) & T.uint32(0x03030303)
            third = (high >> shift * T.uint32(2) & T.uint32(ONES)) << T.uint32(2)
            code = code | third
        return T.bind(signed(code, self.bits))

    def first_byte(self, block: Expr) -> Expr:
        """Of a block in the cache. The bos row of a 3-bit one is longer; its end comes along."""
        return block * self.block_bytes + (0 if self.bits == 4 else self.dim // 8)

    @property
    def piece(self) -> int:
        """Bytes that a copy moves: every block begins at a multiple of it."""
        return 16 if self.bits == 4 else min(16, self.dim // 8)


def signed(code: Expr, bits: int) -> Expr:
    qmax = 2 ** (bits - 1) - 1
    return (code | T.uint32(SIGNS)) - T.uint32(qmax * ONES) ^ T.uint32(SIGNS)


def load_word(address: Expr) -> Expr:
    word = cuda.local("uint32", 1)
    cuda.ptx("ld.shared.b32", word[0], address)
    return word[0]


def store_word(address: Expr, word: Expr) -> None:
    cuda.ptx("st.shared.b32", address, word)


def key_row(row: Expr | int, pitch: int) -> Expr | int:
    """Where a row of keys begins: a group of 8 rows 32 bytes further on, for the banks."""
    return row * pitch + row // 8 * GROUP_BYTES


def unpack_keys(packed: Packed, source: Expr, to: Expr, pitch: int, t: Expr, threads: int) -> None:
    """64 rows at `source` -> rows of `pitch` bytes at `to`."""
    with cuda.strided(KEYS * packed.words, t, threads) as i:
        position, word = T.bind(i // packed.words), T.bind(i % packed.words)
        low, high = packed.load(source + T.cast(position * packed.row_bytes, "uint32"), word)
        row = T.bind(key_row(position % 8 * 8 + position // 8, pitch) + 4 * word)
        for f in range(packed.fields):
            at = row + 4 * packed.words * f
            store_word(to + T.cast(at, "uint32"), packed.levels(low, high, f))


def unpack_values(packed: Packed, source: Expr, to: Expr, pitch: int, t: Expr) -> None:
    """256 threads; 64 rows at `source` -> D rows of `pitch` bytes at `to`, one a column."""
    units = QUADS * packed.words
    word, quad = T.bind(t % units % packed.words), T.bind(t % units // packed.words)
    first = quad % 4 * 16 + quad // 4 * 2
    rows = T.bind(source + T.cast(first * packed.row_bytes, "uint32"))
    planes = [
        packed.load(rows + T.uint32(packed.row_bytes * position), word) for position in (0, 1, 8, 9)
    ]
    for i in range(packed.dim // 64):
        f = T.bind(t // units * (packed.dim // 64) + i)
        levels = [packed.levels(low, high, f) for low, high in planes]
        for j, column in enumerate(cuda.transpose_bytes(levels)):
            at = (4 * (word + packed.words * f) + j) * pitch + 4 * quad
            store_word(to + T.cast(at, "uint32"), column)


def unpack_bos(
    dim: int, words, where: tuple, keys: Expr, values: Expr, pitch: int, t: Expr
) -> None:
    """Position 0 of a 3-bit cache, 4 bits a level, over what `unpack_*` made of it."""
    with cuda.when(t < dim // 4):
        for kv in range(2):
            shift = T.cast(t // (dim // 8) * 4, "uint32")
            code = words[(*where, kv, t % (dim // 8))] >> shift & T.uint32(0x0F0F0F0F)
            levels = T.bind(signed(code, 4))
            if kv == 0:
                store_word(keys + T.cast(4 * t, "uint32"), levels)
            else:
                for j in range(4):
                    at = values + T.cast((4 * t + j) * pitch, "uint32")
                    cuda.ptx("st.shared.b8", at, T.cast(levels >> T.uint32(8 * j), "uint8"))
