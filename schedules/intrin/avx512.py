"""AVX-512 instructions used from TVMScript, one function each; 64 bytes unless a name says other.

What works on any number of lanes (`load`, `store`, `sum_lanes`, ...) is in avx2.py.
https://www.intel.com/content/www/us/en/docs/intrinsics-guide
"""

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.intrin import avx2

LINE = 64  # bytes of a register and of a cache line


def dot_bytes(sums: Expr, unsigned: Expr, signed: Expr) -> Expr:
    """vpdpbusd (VNNI): int32 out[j] = sums[j] + sum over i < 4 of u[4j+i] * s[4j+i], wrapping."""
    return T.call_llvm_pure_intrin(
        "int32x16", "llvm.x86.avx512.vpdpbusd.512", sums, unsigned, signed
    )


def dot_words(sums: Expr, a: Expr, b: Expr) -> Expr:
    """vpdpwssd (VNNI): int32 out[j] = sums[j] + a[2j] * b[2j] + a[2j+1] * b[2j+1], wrapping."""
    return T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpwssd.512", sums, a, b)


def multiply_add_bytes(unsigned: Expr, signed: Expr) -> Expr:
    """vpmaddubsw: int16 out[j] = u[2j] * s[2j] + u[2j+1] * s[2j+1], saturating."""
    return T.call_llvm_pure_intrin("int16x32", "llvm.x86.avx512.pmaddubs.w.512", unsigned, signed)


def add_bytes(a: Expr, b: Expr) -> Expr:
    """vpaddusb, for sums below 256: LLVM re-trees plain additions, which costs registers."""
    return T.call_llvm_pure_intrin("uint8x64", "llvm.uadd.sat", a, b)


def blend_bits(where: int, a: Expr, b: Expr) -> Expr:
    """vpternlog: the bits of `where` in each byte from a, the others from b. As and, or LLVM finds
    it for one blend, not for a blend of blends."""
    mask = T.broadcast(T.uint8(where), LINE)
    operands = [T.reinterpret("int64x8", operand) for operand in (mask, a, b)]
    a_or_b = T.int32(0xCA)  # the truth table of mask ? a : b
    blended = T.call_llvm_pure_intrin(
        "int64x8", "llvm.x86.avx512.pternlog.q.512", *operands, a_or_b
    )
    return T.reinterpret("uint8x64", blended)


def permute_bytes(bytes_: Expr, index: Expr) -> Expr:
    """vpermb (VBMI): out[j] = bytes_[index[j] % 64]."""
    name = "llvm.x86.avx512.permvar.qi.512"
    return T.call_llvm_pure_intrin(str(bytes_.ty.dtype), name, bytes_, index)


def select_bits(bytes_: Expr, first: Expr) -> Expr:
    """vpmultishiftqb (VBMI): out[j] = the 8 bits from bit first[j] % 64 on of the 64, cyclic, that
    byte j belongs to."""
    return T.call_llvm_pure_intrin("uint8x64", "llvm.x86.avx512.pmultishift.qb.512", first, bytes_)


def repeat(part: Expr) -> Expr:
    """16 or 32 bytes, side by side until the register is full; a broadcast load of memory."""
    while (lanes := 2 * part.ty.dtype.lanes) <= LINE:
        part = T.vectorcombine(f"uint8x{lanes}", part, part)
    return part


def rotate_right(bytes_: Expr, bits: list[int]) -> Expr:
    """vprorvq: bits[i] in part i of the register's equal parts. Within a quarter of a register
    bits of neighbouring bytes enter: mask them off."""
    quads = T.reinterpret("uint64x8", bytes_)
    amounts = avx2.constant("uint64", [b for b in bits for _ in range(8 // len(bits))])
    rotated = T.call_llvm_pure_intrin("uint64x8", "llvm.fshr", quads, quads, amounts)
    return T.reinterpret("uint8x64", rotated)


def biased(signed: Expr) -> Expr:
    """a + 128 as unsigned bytes, by flipping the sign bit."""
    return T.reinterpret("uint8x64", signed) ^ T.broadcast(T.uint8(128), 64)


def interleave(a: Expr, b: Expr, unit: int) -> tuple[Expr, Expr]:
    """vpunpckl and vpunpckh of elements of `unit` bytes: a[0], b[0], a[1], b[1], ... of the lower
    and of the upper half of each 128-bit lane."""
    lanes, half = LINE // unit, 16 // unit // 2
    starts = [range(lane, lanes, 2 * half) for lane in (0, half)]
    return tuple(
        T.Shuffle([a, b], [i for s in part for j in range(s, s + half) for i in (j, lanes + j)])
        for part in starts
    )


def even_and_odd(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """vshufi32x4: 128-bit lanes 0 and 2 of a, then of b; and lanes 1 and 3 of both."""
    quarters = [range(4 * q, 4 * q + 4) for q in range(8)]
    return tuple(
        T.Shuffle([a, b], [i for q in (odd, odd + 2, odd + 4, odd + 6) for i in quarters[q]])
        for odd in (0, 1)
    )


def transpose(rows: list[Expr]) -> list[Expr]:
    """Sixteen registers of 64 bytes -> sixteen: 32 bits j of result i are 32 bits i of rows[j]."""
    fours = []  # [group of four rows][column of a lane]: that column of each lane, four rows of it
    for i in range(0, 16, 4):
        quads = [T.Bind(T.reinterpret("int32x16", row)) for row in rows[i : i + 4]]
        low, high = (interleave(quads[j], quads[j + 1], 4) for j in (0, 2))
        pairs = [
            [T.Bind(T.reinterpret("int64x8", T.Bind(half))) for half in both]
            for both in zip(low, high, strict=True)
        ]
        columns = [T.Bind(column) for pair in pairs for column in interleave(pair[0], pair[1], 8)]
        fours.append([T.Bind(T.reinterpret("int32x16", column)) for column in columns])
    found = [None] * 16
    for column in range(4):
        # lanes 0 and 2, or 1 and 3, of rows 0 to 7, and of rows 8 to 15
        halves = [
            [T.Bind(part) for part in even_and_odd(fours[i][column], fours[i + 1][column])]
            for i in (0, 2)
        ]
        for odd, both in enumerate(zip(*halves, strict=True)):
            for pair, line in enumerate(even_and_odd(*both)):
                found[4 * (odd + 2 * pair) + column] = T.Bind(T.reinterpret("uint8x64", line))
    return found


def sum_four(vectors: list[Expr]) -> Expr:
    """int32x4: the sum of all lanes of each of four int32x16."""
    pairs = [
        T.Bind(T.reinterpret("int64x8", sum(interleave(vectors[i], vectors[i + 1], 4))))
        for i in (0, 2)
    ]
    low, high = (T.reinterpret("int32x16", half) for half in interleave(pairs[0], pairs[1], 8))
    lanes = T.Bind(low + high)
    eight = T.Bind(sum(avx2.halves(lanes, "int32x8")))
    return sum(avx2.halves(eight, "int32x4"))


def compress(values: Expr, mask: Expr) -> Expr:
    """vpcompressd: those lanes of an int32x16 for which the mask holds, then zeros."""
    zeros = T.broadcast(T.int32(0), 16)
    return T.call_llvm_pure_intrin(
        "int32x16", "llvm.experimental.vector.compress", values, mask, zeros
    )


def columns_to_quads(columns: list[Expr]) -> list[Expr]:
    """Four registers of 64 bytes -> four of 16 quads: quad 4l + e of result i is byte 16l + 4i + e
    of each column."""
    a, b, c, d = columns
    found = []
    for ab, cd in zip(interleave(a, b, 1), interleave(c, d, 1), strict=True):
        first, second = (T.reinterpret("uint16x32", T.Bind(half)) for half in (ab, cd))
        quads = interleave(first, second, 2)
        found += [T.Bind(T.reinterpret("uint8x64", quad)) for quad in quads]
    return found
