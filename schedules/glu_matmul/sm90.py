"""glu_matmul on Hopper: gate and up of a prompt in one GEMM, ternary_matmul/sm90.py's.

    for m0, n0 in M/T, N/64:                   blockIdx.y, blockIdx.x
        acc[2][64, T] = w . x                  one of two warpgroups the gate's rows, the other up's
        acc -> shared memory                   where the stages were
        g = max(acc[0] * gate scales, 0)       each warpgroup for half of the tokens
        out[T, 64] = (g * g) * (acc[1] * scales)

By themselves the two write and read the gates: 8 bytes of memory an output, 57 MB each way for 2048
rows of 6912. Few rows take it too: a prompt's are as many as it has.
"""

from dataclasses import replace

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES
from schedules.intrin import cuda
from schedules.targets import GpuTarget
from schedules.ternary_matmul.block_sm90 import Block, exact
from schedules.ternary_matmul.cuda import CHUNK_BYTES, Shape
from schedules.ternary_matmul.form_sm90 import Form, forms_of
from schedules.ternary_matmul.sm90 import launch_cheapest


def is_possible(k: int) -> bool:
    """Rows that cp.async can copy."""
    return k % 16 == 0


def finish(block: Block, scale, gate_scale, w_scale, out) -> None:
    form, halves = block.form, 2
    plain, glu = EPILOGUES["scale"], EPILOGUES["glu"]
    block.outputs = [T.bind(block.n0 + block.row + block.lane // 4 + 8 * i) for i in range(2)]
    block.last = form.shape.n - 1
    gate_scales, weight_scales = block.own(gate_scale), block.own(w_scale)
    each, half = form.tokens // 8 // halves, T.bind(block.t // (form.threads // halves))
    row_scales = block.of_tokens(scale, "float32", half * each, each)
    own, pitch = block.put_sums()
    cuda.sync()
    first = own - T.cast(half * (8 * form.threads), "uint32")
    sums = [cuda.local("uint32", 4) for _ in range(2)]
    with cuda.unrolled(each) as step:
        j = T.bind(half * each + step)
        at = T.bind(first + T.cast(j * pitch, "uint32"))
        for matrix, words in enumerate(sums):
            four = [words[i] for i in range(4)]
            source = at + T.uint32(matrix * 8 * form.threads)
            cuda.ptx("ld.shared.v4.b32", *four, source)
        for i in range(2):
            m, row_scale = T.bind(block.token(j, i)), row_scales[2 * step + i]
            for row, n in enumerate(block.outputs):
                gate, up = (exact(words[2 * row + i]) for words in sums)
                gate = T.bind(plain.value(gate, row_scale * gate_scales[row], None))
                value = T.bind(glu.value(up, row_scale * weight_scales[row], gate))
                with cuda.when(cuda.both(m < block.rows, n <= block.last)):
                    cuda.store(out, value, m, n)


def launch(form: Form, rows, q, scale, gate, gate_scale, w, w_scale, out) -> None:
    with cuda.blocks(form.columns) as b, cuda.blocks(T.ceildiv(rows, form.tokens), "y") as c:
        with cuda.threads(form.threads) as t, cuda.min_blocks(form.blocks):
            block = Block(form, q, (gate, w), rows, T.int32(0), b, c, t)
            block.multiply()
            finish(block, scale, gate_scale, w_scale, out)


def kernel(n: int, k: int, target: GpuTarget) -> PrimFunc:
    """(q, scale, gate, gate_scale, w, w_scale, out): weights as ternary_matmul reads them."""
    if not is_possible(k):
        raise ValueError(f"glu_matmul: K = {k} asked, possible: multiples of 16")
    shape, rows = Shape(n, k), Var("M", "int64")
    forms = [replace(f, matrices=2) for f in forms_of(shape, 0, target) if f.ranks == 1]
    weights = shape.tiles, shape.chunks, CHUNK_BYTES

    @T.prim_func(s_tir=True)
    def glu_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        gate: T.Buffer(weights, "uint8"),
        gate_scale: T.Buffer((n,), "float32"),
        w: T.Buffer(weights, "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            tensors = q, scale, gate, gate_scale, w, w_scale, out
            with cuda.some_rows(rows):
                launch_cheapest(
                    forms,
                    target.num_multiprocessors,
                    rows,
                    lambda form: launch(form, rows, *tensors),
                )

    return glu_matmul
