"""sparse_ternary_matmul on Hopper: the dense matmul of tensor cores, or a walk over the columns.

    skip_zeros | layout         | kernel
    0          | `tiles_2bit`   | ternary_matmul/sm90.py, the residual added; q is zero off the list
    1          | `columns_2bit` | cuda.py: a row's listed columns

A step is bound by launches and latency, and a prompt by products: the walk gives up the tensor
cores and has to wait for the list before the first weight. At 84 % zeros of 2560x6912 on an H100 it
took 5.3 us where the dense kernel takes 4.3; for 256 rows 1.1 ms (docs/log.md).
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES
from schedules.intrin import cuda
from schedules.sparse_ternary_matmul import cuda as columns
from schedules.targets import GpuTarget
from schedules.ternary_matmul import sm90 as dense
from schedules.ternary_matmul.cuda import CHUNK_BYTES, Shape
from schedules.ternary_matmul.one_token_sm90 import one_token

KNOBS = {"skip_zeros": (0, 1), **columns.KNOBS, "stages": dense.KNOBS["stages"]}


def layout(*, skip_zeros: int = 0) -> str:
    return columns.layout() if skip_zeros else dense.layout(8)


def kernel(
    n: int,
    k: int,
    target: GpuTarget,
    *,
    skip_zeros: int = 0,
    words_a_block: int = 2,
    stages: int = 0,
) -> PrimFunc:
    if skip_zeros:
        return columns.kernel(n, k, target, words_a_block=words_a_block)
    end, shape, rows = EPILOGUES["residual"], Shape(n, k), Var("M", "int64")
    one = one_token(shape, 8, target, 0, 0)

    @T.prim_func(s_tir=True)
    def sparse_ternary_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        index: T.Buffer((rows, k), "int32"),
        count: T.Buffer((rows,), "int32"),
        w: T.Buffer((shape.tiles, shape.chunks, CHUNK_BYTES), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        residual: T.Buffer((rows, n), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, cuda.WAITS_ITSELF: True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            tensors = q, scale, w, w_scale, residual, out
            dense.launch_rows(shape, one, stages, target, rows, end, *tensors)

    return sparse_ternary_matmul
