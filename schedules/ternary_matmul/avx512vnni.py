"""ternary_matmul on AVX-512 VNNI: all rows of weights, or of a gated one those that it needs.

A gate makes two thirds of the rows needless, others for every row of activations: they are a run of
memory each, and are multiplied one by one. Without a gate 64 rows are multiplied at once, each in a
lane of its own, which needs no sum over lanes and shares weights among rows of activations.
"""

from tvm.tirx import PrimFunc

from schedules.epilogue import EPILOGUES
from schedules.targets import CpuTarget
from schedules.ternary_matmul import quads_avx512, rows_avx512, rows_x86

KNOBS = {
    "streams": (4, 2, 1),
    "prefetch": (2048, 0, 4096),
    "rows": (6, 4, 2),
    "blocks_a_task": (1, 8, 64),
}


def layout(act_bits: int, epilogue: str = "scale") -> str:
    return (rows_x86 if EPILOGUES[epilogue].is_gated else quads_avx512).LAYOUT


def refuse_rows(rows: int) -> None:
    """Rows by gate are walked for one row of activations at a time."""
    if rows != KNOBS["rows"][0]:
        raise ValueError("ternary_matmul: rows by gate have no such choice")


def kernel(
    n: int,
    k: int,
    act_bits: int,
    target: CpuTarget,
    epilogue: str,
    *,
    streams: int = 4,
    prefetch: int = 2048,
    rows: int = 6,
    blocks_a_task: int = 1,
) -> PrimFunc:
    walk = {"streams": streams, "prefetch": prefetch, "blocks_a_task": blocks_a_task}
    if not EPILOGUES[epilogue].is_gated:
        return quads_avx512.kernel(n, k, target, epilogue, rows=rows, **walk)
    refuse_rows(rows)
    return rows_x86.kernel(n, k, target, epilogue, rows_avx512.VECTORS, **walk)
