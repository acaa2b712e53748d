"""request on CUDA: what the host asks of a step, from its memory into tensors of the GPU.

    request i64[8], FIELDS in order: token, slot and position are whole numbers, top_k too; the
    other three are the bits of a float64

It lies in page-locked memory of the host, which the GPU reads where it is: once, here, for all
launches behind. A copy to the GPU for each number that changed took the host 13 us (H100).
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.intrin import cuda
from schedules.targets import GpuTarget

FIELDS = {
    "token": "int64",
    "slot": "int64",
    "position": "int64",
    "temperature": "float32",
    "top_k": "int32",
    "top_p": "float32",
    "uniform": "float64",
}
WORDS = 8


def kernel(target: GpuTarget) -> PrimFunc:
    """(request, token, slot, position, temperature, top_k, top_p, uniform)"""

    def emit(words, fields, t):
        word = cuda.local("int64", 1)  # as it is now: the host writes it between two steps
        address = T.address_of(words[T.min(t, WORDS - 1)])
        cuda.ptx("ld.relaxed.sys.global.b64", word[0], address)
        for i, (field, dtype) in enumerate(zip(fields, FIELDS.values(), strict=True)):
            is_float = dtype.startswith("float")
            value = T.reinterpret("float64", word[0]) if is_float else word[0]
            with cuda.when(t == i):
                cuda.store(field, T.cast(value, dtype), 0)

    @T.prim_func(s_tir=True)
    def request(
        words: T.Buffer((WORDS,), "int64"),
        token: T.Buffer((1,), "int64"),
        slot: T.Buffer((1,), "int64"),
        position: T.Buffer((1,), "int64"),
        temperature: T.Buffer((1,), "float32"),
        top_k: T.Buffer((1,), "int32"),
        top_p: T.Buffer((1,), "float32"),
        uniform: T.Buffer((1,), "float64"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            with cuda.blocks(1), cuda.threads(cuda.WARP) as t:
                fields = token, slot, position, temperature, top_k, top_p, uniform
                emit(words, fields, t)

    return request
