"""One right call of every dialect operator, for the tests to make, to print and to spoil."""

from dataclasses import dataclass, field, replace

import tvm
from tvm import relax, tirx

from compiler.ops import OPS
from schedules.layouts import LAYOUTS

M, S, T, B = "m", "s", "t", "b"  # symbols
HEADS, KV_HEADS, D = 4, 2, 8
WIDTH = (HEADS + 2 * KV_HEADS) * D


@dataclass(frozen=True)
class Case:
    """Argument name -> (dtype, shape); static argument -> value."""

    op: str
    tensors: dict[str, tuple[str, tuple[int | str, ...]]]
    statics: dict[str, int | float] = field(default_factory=dict)

    def but(self, **changes) -> "Case":
        """The same call with other tensors or static arguments."""
        statics = {k: v for k, v in changes.items() if k in self.statics}
        tensors = {k: v for k, v in changes.items() if k not in self.statics}
        return replace(self, tensors=self.tensors | tensors, statics=self.statics | statics)

    def call(self) -> relax.Call:
        """With its type inferred."""
        return relax.BlockBuilder().normalize(OPS[self.op](*self.variables(), *self.values()))

    def module(self) -> tvm.IRModule:
        """A function of that call alone."""
        variables = self.variables()
        builder = relax.BlockBuilder()
        with builder.function("main", variables):
            with builder.dataflow():
                call = OPS[self.op](*variables, *self.values())
                result = builder.emit_output(builder.normalize(call))
            builder.emit_func_output(result)
        return builder.get()

    def values(self) -> list[int | float]:
        return list(self.statics.values())

    def variables(self) -> list[relax.Var]:
        letters = {letter for _, shape in self.tensors.values() for letter in shape}
        symbols = {s: tirx.Var(s, "int64") for s in letters if isinstance(s, str)}
        return [
            relax.Var(name, relax.TensorType([symbols.get(size, size) for size in shape], dtype))
            for name, (dtype, shape) in self.tensors.items()
        ]


NORM = {"x": ("float32", (M, 48)), "gain": ("float32", (48,))}
QUANTIZED = {"q": ("int8", (M, 48)), "scale": ("float32", (M,))}
WEIGHT = {"w": ("int8", (64, 48)), "w_scale": ("float32", (64,))}
ONE_ROW = {"norm_matmul", "norm_glu_matmul", "norm_residual_matmul", "rope_attention"}
# One row, and (64, 48) in the layout that its kernels read
ROW = {"x": ("float32", (1, 48)), "gain": ("float32", (48,))}
TILED = {"w": ("uint8", (4, 1, 512)), "w_scale": ("float32", (64,))}
ROWS = {"slots": ("int64", (M,)), "positions": ("int64", (M,))}
QKV = {"qkv": ("float32", (M, WIDTH))}
CACHE = {
    "codes": ("uint8", (S, KV_HEADS, 2, B)),
    "scales": ("float16", (S, KV_HEADS, 2, T)),
}
COUNTS = {"num_heads": HEADS, "num_kv_heads": KV_HEADS}
TABLE = ("float32", (256, D // 2))

CASES = {
    case.op: case
    for case in (
        Case(
            "embedding",
            {
                "tokens": ("int64", (M,)),
                "table": ("int8", (512, 48)),
                "table_scale": ("float32", (512,)),
            },
        ),
        Case(
            "grouped_embedding",
            {
                "tokens": ("int64", (M,)),
                "table": ("uint8", (512, 256)),
                "table_scale": ("float32", (512,)),
            },
            {"k": 128, "bits": 6},
        ),
        Case("rms_norm", NORM, {"eps": 1e-5}),
        Case("rms_norm_int4", NORM, {"eps": 1e-5}),
        Case("rms_norm_int8", NORM, {"eps": 1e-5}),
        Case("rms_norm_fp4", NORM, {"eps": 1e-5}),
        Case("rms_norm_topk_int8", NORM, {"eps": 1e-5, "k": 24}),
        Case("rms_norm_mask_int8", NORM, {"eps": 1e-5, "k": 24}),
        Case("ternary_matmul", QUANTIZED | WEIGHT, {"act_bits": 4}),
        Case(
            "ternary_glu_matmul",
            QUANTIZED | WEIGHT | {"gate": ("float32", (M, 64))},
            {"act_bits": 4},
        ),
        Case(
            "ternary_residual_matmul",
            QUANTIZED | WEIGHT | {"residual": ("float32", (M, 64))},
        ),
        Case(
            "sparse_ternary_matmul",
            {
                **QUANTIZED,
                "index": ("int32", (M, 48)),
                "count": ("int32", (M,)),
                **WEIGHT,
                "residual": ("float32", (M, 64)),
            },
        ),
        Case("int8_matmul", QUANTIZED | WEIGHT),
        Case(
            "grouped_matmul",
            {
                "q": ("int8", (M, 128)),
                "scale": ("float32", (M,)),
                "w": ("uint8", (64, 256)),
                "w_scale": ("float32", (64,)),
            },
            {"bits": 6},
        ),
        Case("float_matmul", {"x": ("float32", (M, 48)), "w": ("float16", (64, 48))}),
        Case(
            "glu_matmul",
            QUANTIZED | {"gate": TILED["w"], "gate_scale": TILED["w_scale"]} | TILED,
        ),
        Case(
            "rope_matmul",
            {
                **QUANTIZED,
                "w": ("uint8", LAYOUTS["tiles_2bit"].packed_shape(WIDTH, 48)),
                "w_scale": ("float32", (WIDTH,)),
                "cos": TABLE,
                "sin": TABLE,
                "positions": ("int64", (M,)),
            },
            COUNTS,
        ),
        Case("norm_matmul", ROW | TILED, {"eps": 1e-5, "act_bits": 4}),
        Case(
            "norm_glu_matmul",
            ROW | {"gate": TILED["w"], "gate_scale": TILED["w_scale"]} | TILED,
            {"eps": 1e-5, "act_bits": 4},
        ),
        Case(
            "norm_residual_matmul",
            ROW | TILED | {"residual": ("float32", (1, 64))},
            {"eps": 1e-5, "k": 24},
        ),
        Case(
            "rope_attention",
            {
                "qkv": ("float32", (1, WIDTH)),
                "cos": TABLE,
                "sin": TABLE,
                **CACHE,
                "slots": ("int64", (1,)),
                "positions": ("int64", (1,)),
            },
            COUNTS | {"kv_bits": 4},
        ),
        Case("rope", {**QKV, "cos": TABLE, "sin": TABLE, "positions": ("int64", (M,))}, COUNTS),
        Case("kv_append", CACHE | QKV | ROWS, COUNTS | {"kv_bits": 4}),
        Case("attention", QKV | CACHE | ROWS, COUNTS | {"kv_bits": 4}),
    )
}
