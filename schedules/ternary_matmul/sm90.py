"""ternary_matmul on Hopper: a prompt's GEMM by wgmma; one_token_sm90.py and few_tokens_sm90.py have
the forms of up to 16 tokens.

    for n0, m0 in N/(64 G), M/T:                     blockIdx.z, blockIdx.y
        for rank in C:                               blockIdx.x, a cluster: every C-th chunk
            for chunk in K/128/C:                    S stages in flight
                x[T, 128], w[64 G, 128] -> shared    cp.async; x under the 128-byte swizzle
                a[16] = w << 6 - 2i & 0xC0           registers, while the last chunk multiplies
                acc[64, T] += a . x                  4 wgmma m64nTk32 of each of G warpgroups
            residual[T, 64 G] -> shared              with the last chunks, where stages are free
            out[T / C, 64 G] = epilogue(sum / 64)    over the ranks: their shared memory

    G | T   | S | C    | blocks a multiprocessor | taken, of N x K, for M
    2 | 160 | 8 | 1    | 1                       | 2560x6912: 2048, just two rounds of tiles
    2 | 128 | 5 | 1    | 2                       | 13824x2560: 256 on; 3840x2560: 1024 on
    2 | 96  | 6 | 1    | 2                       | 2560x6912: 512, 1024
    2 | 64  | 8 | 1    | 2                       | 13824x2560: 64, 128; the others: 256
    2 | 96  | 8 | 2    | 1                       | 2560x6912: 256
    2 | 64  | 8 | 2, 4 | 2                       | 2560x6912: 128, 64; 3840x2560: 64
    2 | 32  | 8 | 1, 4 | 2                       | 3840x2560: 128; 32

    tile  | bound by
    T, G  | registers: 4 warpgroups of 128 or 2 of 255, T / 2 of them acc and 32 a
    S     | shared memory: 4 KB a stage and T / 8 more
    C     | few tiles: the sums cost some 3 us of the cluster's shared memory

The launch takes the form that `Form.cost` expects to be done first, from what was measured of a
tile. What bounds a full chip is mostly x, read from L2 once for 128 outputs, at 5 to 6 TB/s.

A code in the top bits of a byte is 64 w: |acc| < 2^13 K, int32 for K < 2^18.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Epilogue
from schedules.intrin import cuda
from schedules.targets import GpuTarget
from schedules.ternary_matmul import cuda as small_batch
from schedules.ternary_matmul import few_form_sm90, few_tokens_sm90
from schedules.ternary_matmul.block_sm90 import Block
from schedules.ternary_matmul.cuda import CHUNK_BYTES, Shape
from schedules.ternary_matmul.form_sm90 import Form, forms_of
from schedules.ternary_matmul.one_token_sm90 import one_token

# `stages`: S of every form, 0 is the form's own; the others are of the form for one token
KNOBS = {**small_batch.KNOBS, "stages": (0, 4, 6)}
layout = small_batch.layout


def launch(form: Form, rows, end: Epilogue, q, scale, w, w_scale, extra, out) -> None:
    tokens = T.ceildiv(rows, form.tokens)
    with share(form) as rank, cuda.blocks(tokens, "y") as c, cuda.blocks(form.columns, "z") as b:
        with cuda.threads(form.threads) as t, cuda.min_blocks(form.blocks):
            cuda.wait_for_launch()
            early = extra if end.extra == "residual" else None  # prompts have no gate
            block = Block(form, q, (w,), rows, rank, b, c, t, early)
            block.multiply()
            block.finish(end, scale, w_scale, extra, out)


def share(form: Form):
    """The rank of a block in its cluster; one block needs none."""
    return cuda.cluster(form.ranks) if form.ranks > 1 else cuda.blocks(1)


def launch_cheapest(forms: Sequence[Form], chip: int, rows, emit: Callable[[Form], None]) -> None:
    """emit(form) for the form that costs least, chosen when the kernel is launched."""
    first, *others = forms
    if not others:
        emit(first)
        return
    cost = first.cost(rows, chip)
    with T.If(tirx.all(*(cost <= other.cost(rows, chip) for other in others))):
        with T.Then():
            emit(first)
        with T.Else():
            launch_cheapest(others, chip, rows, emit)


def launch_rows(
    shape: Shape, one, stages: int, target: GpuTarget, rows, end: Epilogue, *tensors
) -> None:
    """The form for any number of rows; `one` is that of one token."""
    forms = forms_of(shape, stages, target)
    if shape.k % 16:  # rows that cp.async cannot copy
        small_batch.launch_small_batch(one, target, rows, end, *tensors, early=True)
        return
    few, most = few_launches(shape, target)
    with T.If(rows <= 16):
        with T.Then():
            launch_few([one.launch, *few], [1, *most[:-1]], rows, end, *tensors)
        with T.Else():
            chip = target.num_multiprocessors
            launch_cheapest(forms, chip, rows, lambda form: launch(form, rows, end, *tensors))


def few_launches(shape: Shape, target: GpuTarget) -> tuple[list[Callable[..., None]], list[int]]:
    """What launches 2 to 16 tokens, and the most tokens of each."""
    launches: list[Callable[..., None]] = []
    last: dict[tuple, int] = {}
    for most in few_form_sm90.MOST_COLUMNS:
        tokens = few_form_sm90.tokens_of(most)
        last[tokens, few_form_sm90.form_of(shape, most, target)] = most  # of equal ones
    for tokens, form in last:
        if form:
            launches.append(partial(few_tokens_sm90.launch, form))
        else:
            plain = replace(small_batch.some_tokens(shape, tokens, target), early=True)
            launches.append(plain.launch)
    return launches, [*last.values()]


def launch_few(
    launches: Sequence[Callable[..., None]], most: Sequence[int], rows, end: Epilogue, *tensors
) -> None:
    """The first for this many rows: launch i is for most[i], the last for any."""
    if not most:
        launches[0](rows, end, *tensors)
        return
    with T.If(rows <= most[0]):
        with T.Then():
            with cuda.some_rows(rows):
                launches[0](rows, end, *tensors)
        with T.Else():
            launch_few(launches[1:], most[1:], rows, end, *tensors)


def prim_func(shape: Shape, end: Epilogue, emit: Callable[..., None]) -> PrimFunc:
    """emit(rows, q, scale, w, w_scale, extra, out) as a kernel."""
    n, k, rows = shape.n, shape.k, Var("M", "int64")

    @T.prim_func(s_tir=True)
    def ternary_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        w: T.Buffer((shape.tiles, shape.chunks, CHUNK_BYTES), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        extra: T.Buffer((rows, n), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, cuda.WAITS_ITSELF: True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            emit(rows, q, scale, w, w_scale, extra, out)

    return end.finish(ternary_matmul)


def kernel(
    n: int,
    k: int,
    act_bits: int,
    target: GpuTarget,
    epilogue: str,
    *,
    chunks_a_warp: int = 0,
    tiles_a_block: int = 0,
    stages: int = 0,
) -> PrimFunc:
    end, shape = EPILOGUES[epilogue], Shape(n, k)
    one = one_token(shape, act_bits, target, chunks_a_warp, tiles_a_block)

    def emit(rows, *tensors) -> None:
        launch_rows(shape, one, stages, target, rows, end, *tensors)

    return prim_func(shape, end, emit)
