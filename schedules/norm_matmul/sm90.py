"""norm_matmul on Hopper: one token's GEMV with the norm before it inside; the weights are on their
way while the launch before still runs.

    blocks and tiles as in ternary_matmul/one_token_sm90.py
        w -> shared memory                   bulk copies
        wait for the launch before           which wrote x; let the next one start
        q = quantize((x * rstd) * gain)      every block, the row over all its warps: row_sm90.py
        out = epilogue(w . q)                with two matrices, of gate and up

A block's row costs it 4 K bytes of L2 and two or three barriers, where a launch of its own costs a
microsecond. Float orders are those of rms_norm and rms_norm_topk.
"""

from collections.abc import Sequence

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.epilogue import EPILOGUES
from schedules.intrin import cuda
from schedules.norm_matmul.row_sm90 import PARTIALS_BYTES, Row
from schedules.rms_norm_topk.histogram_cuda import Selection, size_of
from schedules.targets import GpuTarget
from schedules.ternary_matmul import one_token_sm90
from schedules.ternary_matmul.cuda import CHUNK_BYTES, Shape
from schedules.ternary_matmul.one_token_sm90 import Block, Form, form_of

LARGEST_SELECTED = 8192  # a list of all columns fits beside the weights


def is_possible(k: int, keep: int | None = None) -> bool:
    selects = keep is not None and keep < k
    return one_token_sm90.is_possible(k) and not (selects and k > LARGEST_SELECTED)


def codes_of(block: Block, x, gain, eps: float, quantizer: str, keep: int, residual) -> tuple:
    """(the lane's words of codes, the scale, the thread's residuals) of the row that the launch
    before wrote. Whatever is read behind the next launch's weights takes as long as they do."""
    form, partials = block.form, T.bind(block.at(block.form.scratch))
    row = Row(form.shape.k, form.depth, form.warps, block.warp, block.lane, partials)
    selection = None
    if keep < form.shape.k:
        memory = T.bind(partials + T.uint32(2 * PARTIALS_BYTES))
        selection = Selection(form.shape.k, keep, block.t, form.threads, memory)
        selection.clear()
    gains = row.load(lambda column: gain[column])
    cuda.sync()  # the copies' barrier is made, the selection's memory is clear
    cuda.wait_for_launch()
    own = None if residual is None else block.load_outputs(residual)
    cuda.let_next_launch()
    codes = row.quantize(lambda column: x[0, column], gains, eps, quantizer, selection)
    return *codes, own


def finish(block: Block, scale: Expr, w_own, own, out) -> None:
    """`own`: the thread's residuals."""
    matrices = block.form.matrices

    def write(step: int, row: Expr, n: Expr) -> None:
        sums = [block.sum_of(g, row) for g in range(matrices)]
        scales = [T.bind(scale * w_own[step * matrices + g]) for g in range(matrices)]
        if matrices == 2:
            gate = T.bind(sums[0] * scales[0])
            y = EPILOGUES["glu"].value(sums[1], scales[1], gate)
        elif own is not None:
            y = EPILOGUES["residual"].value(sums[0], scales[0], own[step])
        else:
            y = EPILOGUES["scale"].value(sums[0], scales[0], None)
        cuda.store(out, y, 0, n)

    block.each_output(write)


def launch(
    form: Form, x, gain, eps: float, quantizer: str, keep: int, weights: Sequence,
    w_scales: Sequence, residual, out,
) -> None:  # fmt: skip
    """`weights` and `w_scales` are of one matrix, or of gate and up."""
    with cuda.blocks(form.blocks) as b:
        threads = cuda.threads(form.warps, "y"), cuda.threads(cuda.WARP)
        with threads[0] as warp, threads[1] as lane, cuda.min_blocks(form.blocks_at_once):
            block = Block(form, b, warp, lane)
            block.ask(weights)
            w_own = block.ask_scales(w_scales)
            words, scale, own = codes_of(block, x, gain, eps, quantizer, keep, residual)
            block.multiply(words)
            finish(block, scale, w_own, own, out)


def kernel(
    n: int,
    k: int,
    quantizer: str,
    eps: float,
    target: GpuTarget,
    epilogue: str,
    keep: int | None = None,
) -> PrimFunc:
    """scale: (x, gain, w, w_scale, y); residual: (x, gain, w, w_scale, residual, y);
    glu: (x, gain, gate_w, gate_scale, w, w_scale, y). `keep`: of the row's largest; None is all."""
    shape, is_glu, keep = Shape(n, k), epilogue == "glu", k if keep is None else keep
    scratch_bytes = 2 * PARTIALS_BYTES + (size_of(k) if keep < k else 0)
    act_bits = 4 if quantizer == "int4" else 8
    form = form_of(shape, act_bits, target, 2 if is_glu else 1, scratch_bytes)

    def emit(x, gain, gate_w, gate_scale, w, w_scale, extra, y):
        weights, w_scales = ([gate_w, w], [gate_scale, w_scale]) if is_glu else ([w], [w_scale])
        residual = extra if epilogue == "residual" else None
        launch(form, x, gain, eps, quantizer, keep, weights, w_scales, residual, y)

    @T.prim_func(s_tir=True)
    def norm_matmul(
        x: T.Buffer((1, k), "float32"),
        gain: T.Buffer((k,), "float32"),
        gate_w: T.Buffer((shape.tiles, shape.chunks, CHUNK_BYTES), "uint8"),
        gate_scale: T.Buffer((n,), "float32"),
        w: T.Buffer((shape.tiles, shape.chunks, CHUNK_BYTES), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        extra: T.Buffer((1, n), "float32"),
        y: T.Buffer((1, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, cuda.WAITS_ITSELF: True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            emit(x, gain, gate_w, gate_scale, w, w_scale, extra, y)

    unused = {
        "scale": ("gate_w", "gate_scale", "extra"),
        "residual": ("gate_w", "gate_scale"),
        "glu": ("extra",),
    }[epilogue]
    params = [param for param in norm_matmul.params if param.name not in unused]
    return PrimFunc(params, norm_matmul.body, norm_matmul.ret_type, norm_matmul.attrs)
