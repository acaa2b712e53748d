"""grouped_matmul: INT8 activations times a table of 6- or 4-bit codes in groups, the head.

    acc[m, n] = sum_k q[m, k] code[n, k] group[n, k // 64]      exact, int32
    y[m, n]   = acc * (scale[m] * w_scale[n])                   float32

    tensor  | shape  | dtype | meaning
    q       | (M, K) | int8  | activations, K a multiple of 64
    scale   | (M,)   | f32   | one a row of q
    w       | (N, B) | uint8 | rows packed as schedules/grouped.py says
    w_scale | (N,)   | f32   | one an output
    y       | (M, N) | f32   |

|acc| <= 128 * 2**(bits - 1) * 63 K: int32 holds every K to 8321 at 6 bits, to 33288 at 4.
"""

from compiler.op import OpDef, Statics
from compiler.signature import Match, parse
from schedules import grouped


def check(match: Match, statics: Statics) -> None:
    check_row(match, match.static("K"), int(statics["bits"]))


def check_row(match: Match, k: int, bits: int) -> None:
    """B against the size of a packed row."""
    if problem := grouped.why_not(k, bits):
        match.refuse(problem)
    if match.static("B") != grouped.row_bytes(k, bits):
        match.refuse(
            f"{match.source['B']} has rows of {match.static('B')} bytes, expected "
            f"{grouped.row_bytes(k, bits)} for {k} columns at {bits} bits"
        )


grouped_matmul = OpDef(
    name="grouped_matmul",
    tensors=parse("q i8[M, K]", "scale f32[M]", "w u8[N, B]", "w_scale f32[N]"),
    statics={"bits": grouped.BITS},
    results=parse("f32[M, N]"),
    schedules="grouped_matmul",
    kernel=lambda schedule, size, static, target: schedule.kernel(
        size("N"), size("K"), static["bits"], target
    ),
    check=check,
)
