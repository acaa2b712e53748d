"""Reading `triples_5bit` with AVX-512 VBMI: 64 rows' indexes of three weights, or their codes.

`vpermb` takes six bits of each byte of its index and ignores two, so that with a table of 32
entries, held twice, it looks up the low five bits of a byte whatever the others are. Five of a
group's eight triples are thus read as they lie; the other three take 11 instructions.
"""

from collections.abc import Iterator

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.intrin import avx2, avx512

LINE = avx512.LINE
BLOCK = 64  # rows of weights in a block of the layout
HALF = 4  # triples of three quads; a group is two halves
LINES = 5  # of a group
QUADS = 3  # of a half
FIELDS = 4  # sixteens of a block's rows
QUADS_A_LINE = 16  # of columns in 64 activations

INDEXES = [i % 32 if i % 32 < 27 else 0 for i in range(LINE)]
DIGITS = [[i // power % 3 for i in INDEXES] for power in (9, 3, 1)]


def indexes(w, b, g, half: int) -> list[Expr]:
    """Of four triples of group g, for 64 rows of block b: each in the low five bits"""
    lines = [avx2.load(w, b, g, LINE * r, lanes=LINE) for r in range(LINES)]
    if half == 0:
        return [T.Bind(line) for line in lines[:HALF]]
    lines = [T.Bind(line) for line in lines]
    pairs = [
        avx512.blend_bits(0b111, avx2.shift_bytes(lines[i], -5), avx2.shift_bytes(lines[i + 1], -3))
        for i in (0, 2)
    ]
    last = avx512.blend_bits(0b111, avx2.shift_bytes(lines[4], -5), avx2.shift_bytes(lines[1], -2))
    last = avx512.blend_bits(0b10000, avx2.shift_bytes(lines[3], -1), last)
    return [lines[4], *(T.Bind(index) for index in (*pairs, last))]


def quads(w, b, g, half: int) -> Iterator[list[Expr]]:
    """The half's quads of columns, in order: the codes {0, 1, 2} of rows 16 f to 16 f + 15 of block
    b, four bytes a row, for each f"""
    codes = [a | b << 2 | c << 4 for a, b, c in zip(*DIGITS, strict=True)]
    of_three = avx2.constant("uint8", codes)
    found = indexes(w, b, g, half)
    for quad in range(QUADS):
        of_fourth = avx2.constant("uint8", [digit << 6 for digit in DIGITS[quad]])
        three, fourth = (
            avx512.permute_bytes(table, index)
            for table, index in ((of_three, found[quad]), (of_fourth, found[3]))
        )
        rows = T.Bind(three | fourth)  # four codes a byte, a row each
        yield [T.Bind(spread(rows, f)) for f in range(FIELDS)]


def spread(rows: Expr, f: int) -> Expr:
    """Bytes 2f and 2f + 1 of every eight to four bytes each, of their codes"""
    first = [8 * (2 * f + j // 4) + 2 * (j % 4) for j in range(8)] * 8
    selected = avx512.select_bits(rows, avx2.constant("uint8", first))
    return selected & T.broadcast(T.uint8(3), LINE)


def num_lines(w) -> int:
    """Lines of 64 columns that the unpacked groups of w reach into."""
    return -(-int(w.shape[1]) * 2 * QUADS // QUADS_A_LINE)


def unpack(codes, w, b):
    """codes[quad // 16, f, quad % 16] = `quads` of block b"""
    with T.serial(w.shape[1]) as g:
        for half in (0, 1):
            for i, fields in enumerate(quads(w, b, g, half)):
                quad = QUADS * (2 * g + half) + i
                at, row = T.floordiv(quad, QUADS_A_LINE), T.floormod(quad, QUADS_A_LINE)
                for f, value in enumerate(fields):
                    avx2.store(codes, at, f, row, 0, value=value, lanes=LINE)


def clear_end(codes):
    """The last line, of which the last group may leave some: it meets zeros, but TVM cuts a buffer
    down to what it sees written"""
    zeros = T.broadcast(T.uint8(0), LINE)
    with T.serial(FIELDS) as f, T.serial(QUADS_A_LINE) as row:
        avx2.store(codes, codes.shape[0] - 1, f, row, 0, value=zeros, lanes=LINE)
