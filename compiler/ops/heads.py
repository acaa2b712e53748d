"""Attention heads and their KV cache: sizes that rope, kv_append and attention agree on.

    kv_bits | codes                                  | scales
    16      | f16[S, Hkv, 2, T D]                    | f16[S, Hkv, 2, 1], unused
    4       | u8[S, Hkv, 2, T D/2]                   | f16[S, Hkv, 2, T]
    3       | u8[S, Hkv, 2, D/2 + (T - 1) 3D/8]      | f16[S, Hkv, 2, T]

S slots, T positions and the size of the codes' last axis are symbols; axis 2 is keys, values.
"""

from compiler.op import Statics
from compiler.signature import Match, show_type

KV_BITS = (16, 4, 3)


def code_dtype(kv_bits: int) -> str:
    return "float16" if kv_bits == 16 else "uint8"


def possible_kv_bits(d: int) -> list[int]:
    """Heads of size d are packed only into whole bytes: 3-bit rows have 3d/8 of them."""
    return [bits for bits in KV_BITS if bits == 16 or d % 8 == 0]


def head_dim(match: Match, statics: Statics) -> int:
    """D, a letter from here on: the width of qkv by the number of heads."""
    heads, kv_heads = int(statics["num_heads"]), int(statics["num_kv_heads"])
    if heads % kv_heads:
        match.refuse(f"num_heads is {heads}, expected a multiple of num_kv_heads = {kv_heads}")
    width, total = match.static("W"), heads + 2 * kv_heads
    if width % total or (width // total) % 2:
        match.refuse(
            f"qkv has {width} columns, expected an even head size for "
            f"{total} heads ({heads} queries, {kv_heads} keys, {kv_heads} values)"
        )
    match.bind("D", width // total, "qkv")
    return width // total


def check_cache(match: Match, statics: Statics) -> None:
    """The cache's dtype and head count against kv_bits and num_kv_heads."""
    d, kv_bits = head_dim(match, statics), int(statics["kv_bits"])
    if kv_bits not in possible_kv_bits(d):
        match.refuse(f"kv_bits is {kv_bits}, possible for a head of {d}: 16")
    codes = match.types["codes"]
    if str(codes.dtype) != code_dtype(kv_bits):
        match.refuse(
            f"codes is {show_type(codes)}, expected {code_dtype(kv_bits)} as kv_bits is {kv_bits}"
        )
    if match.static("G") != statics["num_kv_heads"]:
        match.refuse(
            f"codes is {show_type(codes)}, expected {statics['num_kv_heads']} heads "
            f"on axis 1 as num_kv_heads says"
        )
