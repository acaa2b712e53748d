"""kv_append on any CPU: each new key and value head is quantised in registers and L1, then packed.

    for m in M:                                  parallel when M > 1
        for kv, h in 2, Hkv:
            amax[L] = max |x|                    L lanes
            scale = float16(amax / qmax), in 2^-14 .. 65504
            code[:] = rint(x / scale) + qmax     D bytes of scratch
            codes[slot, h, kv, row] = planes of code, vectors of bytes

    tile | value     | bound by
    L    | lanes(32) | one float32 vector; a head is at most 16 of them, so there is no second level

The caches are the first two buffers and the only ones written. A step's rows of a slot stand at
different positions, so no two threads write the same bytes.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.intrin.vector import each, fill, fold, rounded, store
from schedules.targets import CpuTarget

LARGEST_SCALE = 65504.0  # of float16; the codes of a larger head saturate
SMALLEST_SCALE = 2.0**-14  # the smallest normal float16
BOS_BITS = 4  # of position 0 in a 3-bit cache


def kernel(
    num_heads: int, num_kv_heads: int, head_dim: int, kv_bits: int, target: CpuTarget
) -> PrimFunc:
    write = STORES[kv_bits](head_dim, target)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    code_dtype = "float16" if kv_bits == 16 else "uint8"

    @T.inline
    def append_row(codes, scales, qkv, slots, positions, m):
        for kv, h in T.grid(2, num_kv_heads):
            start: T.let = (num_heads + kv * num_kv_heads + h) * head_dim
            write(codes, scales, qkv, slots[m], h, kv, positions[m], m, start)

    @T.prim_func(s_tir=True)
    def kv_append(
        codes_: T.handle,
        scales_: T.handle,
        qkv_: T.handle,
        slots_: T.handle,
        positions_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        num_slots = T.int64()
        size = T.int64()
        scale_size = T.int64()
        codes = T.match_buffer(codes_, (num_slots, num_kv_heads, 2, size), code_dtype)
        scales = T.match_buffer(scales_, (num_slots, num_kv_heads, 2, scale_size), "float16")
        qkv = T.match_buffer(qkv_, (rows, width), "float32")
        slots = T.match_buffer(slots_, (rows,), "int64")
        positions = T.match_buffer(positions_, (rows,), "int64")
        with T.sblock("root"):
            if rows == 1:
                append_row(codes, scales, qkv, slots, positions, 0)
            else:
                for m in T.parallel(rows):
                    append_row(codes, scales, qkv, slots, positions, m)

    return kv_append


def _half_store(head_dim: int, target: CpuTarget):
    def write(codes, scales, qkv, slot, h, kv, position, m, start):
        def narrow(i, j):
            at = (slot, h, kv, position * head_dim + i)
            store(codes, at, T.cast(qkv[m, start + i], "float16"))

        each(head_dim, target.lanes(32), narrow)

    return write


def _packed_store(bits: int, head_dim: int, target: CpuTarget):
    """write() of one head's row whose bytes begin at `base`."""
    assert head_dim % 8 == 0, f"kv_append: head_dim {head_dim} is no multiple of 8"
    lanes = target.lanes(32)
    qmax = 2 ** (bits - 1) - 1
    pack = {4: _pack_4bit, 3: _pack_3bit}[bits]

    def write(codes, scales, qkv, slot, h, kv, position, m, start, base):
        peaks = T.alloc_buffer((lanes,), "float32", scope="local")
        code = T.alloc_buffer((head_dim,), "uint8", scope="local")

        def max_abs(i, j):
            store(peaks, (j,), T.max(peaks[j], T.abs(qkv[m, start + i])))

        fill(lanes, peaks, T.float32(0))
        each(head_dim, lanes, max_abs)
        fold(lanes, peaks, T.max)
        ratio = T.min(peaks[0] / T.float32(qmax), T.float32(LARGEST_SCALE))
        half = T.cast(T.cast(ratio, "float16"), "float32")
        scale = T.bind(T.max(half, T.float32(SMALLEST_SCALE)))
        store(scales, (slot, h, kv, position), T.cast(scale, "float16"))
        each(
            head_dim,
            lanes,
            lambda i, j: store(code, (i,), quantized(qkv[m, start + i] / scale, qmax)),
        )
        pack(head_dim, target.lanes(8), code, codes, slot, h, kv, base)

    return write


def quantized(x, qmax: int):
    return T.cast(rounded(x, -qmax, qmax) + qmax, "uint8")


def _4bit_store(head_dim: int, target: CpuTarget):
    write_4bit = _packed_store(4, head_dim, target)

    def write(codes, scales, qkv, slot, h, kv, position, m, start):
        base = T.bind(position * (head_dim // 2))
        write_4bit(codes, scales, qkv, slot, h, kv, position, m, start, base)

    return write


def _3bit_store(head_dim: int, target: CpuTarget):
    write_bos = _packed_store(BOS_BITS, head_dim, target)
    write_3bit = _packed_store(3, head_dim, target)

    def write(codes, scales, qkv, slot, h, kv, position, m, start):
        row = (codes, scales, qkv, slot, h, kv, position, m, start)
        with T.If(position == 0):
            with T.Then():
                write_bos(*row, 0)
            with T.Else():
                base = T.bind(head_dim // 2 + (position - 1) * (3 * head_dim // 8))
                write_3bit(*row, base)

    return write


def _pack_4bit(head_dim: int, lanes: int, code, codes, slot, h, kv, base) -> None:
    def nibbles(i, j):
        byte = gathered(code, head_dim, 2, i, lambda c: c)
        store(codes, (slot, h, kv, base + i), byte)

    each(head_dim // 2, lanes, nibbles)


def _pack_3bit(head_dim: int, lanes: int, code, codes, slot, h, kv, base) -> None:
    def low_bits(i, j):
        byte = gathered(code, head_dim, 4, i, lambda c: c & T.uint8(3))
        store(codes, (slot, h, kv, base + i), byte)

    def high_bit(i, j):
        byte = gathered(code, head_dim, 8, i, lambda c: c >> T.uint8(2))
        store(codes, (slot, h, kv, base + head_dim // 4 + i), byte)

    each(head_dim // 4, lanes, low_bits)
    each(head_dim // 8, lanes, high_bit)


def gathered(code, head_dim: int, planes: int, i, field):
    """Byte i of a plane: the fields of code[i], code[i + head_dim / planes], ..., low first."""
    byte = field(code[i])
    for f in range(1, planes):
        byte = byte | field(code[i + f * head_dim // planes]) << T.uint8(f * 8 // planes)
    return byte


STORES = {16: _half_store, 4: _4bit_store, 3: _3bit_store}
