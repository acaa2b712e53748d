"""A model of four lines with the signatures of a real one, compiled: what the runtime is tested on.

    first[m]     = the token that stands at position 0 of row m's slot, read from the cache
    logits[m, v] = 8 · [v == (tokens[m] + 1 + first[m]) mod V] + norm[v]

So a sequence that starts with <bos> = 0 counts upwards, one that starts with token 3 counts in
fours, and a slot or position mixed up, a cache or parameter not passed shows in the tokens.
"""

import tvm
from tvm import relax
from tvm.script import tirx as T

V, LAYERS, KV_HEADS, HEAD_DIM, CONTEXT = 258, 2, 2, 8, 64
PEAK = 8.0


def append_kernel(codes_dtype: str):
    """Write each token to its slot's codes, at the element numbered by its position."""

    @T.prim_func(s_tir=True)
    def append(codes_: T.handle, tokens_: T.handle, slots_: T.handle, positions_: T.handle):
        S, B, M = T.int64(), T.int64(), T.int64()
        codes = T.match_buffer(codes_, (S, KV_HEADS, 2, B), codes_dtype)
        tokens = T.match_buffer(tokens_, (M,), "int64")
        slots = T.match_buffer(slots_, (M,), "int64")
        positions = T.match_buffer(positions_, (M,), "int64")
        for m in range(M):
            with T.sblock("append"):
                vm = T.axis.opaque(M, m)
                codes[slots[vm], 0, 0, positions[vm]] = T.Cast(codes_dtype, tokens[vm])

    return append


def logits_kernel(codes_dtype: str):
    """The formula above, threads over the rows."""

    @T.prim_func(s_tir=True)
    def logits(
        tokens_: T.handle, slots_: T.handle, rows_: T.handle, codes_: T.handle,
        norm: T.Buffer((V,), "float32"), out_: T.handle,
    ):  # fmt: skip
        S, B, M, R = T.int64(), T.int64(), T.int64(), T.int64()
        tokens = T.match_buffer(tokens_, (M,), "int64")
        slots = T.match_buffer(slots_, (M,), "int64")
        rows = T.match_buffer(rows_, (R,), "int64")
        codes = T.match_buffer(codes_, (S, KV_HEADS, 2, B), codes_dtype)
        out = T.match_buffer(out_, (R, V), "float32")
        for r in T.parallel(R):
            for v in range(T.int64(V)):
                with T.sblock("logits"):
                    vr, vv = T.axis.remap("SS", [r, v])
                    out[vr, vv] = norm[vv] + T.Select(
                        vv
                        == (tokens[rows[vr]] + 1 + T.Cast("int64", codes[slots[rows[vr]], 0, 0, 0]))
                        % V,
                        T.float32(PEAK),
                        T.float32(0),
                    )

    return logits


def every_row_kernel():
    """0..M-1: the rows whose logits a decode step wants."""

    @T.prim_func(s_tir=True)
    def every_row(tokens_: T.handle, rows_: T.handle):
        M = T.int64()
        tokens = T.match_buffer(tokens_, (M,), "int64")
        rows = T.match_buffer(rows_, (M,), "int64")
        for m in range(M):
            with T.sblock("row"):
                vm = T.axis.spatial(M, m)
                T.reads(tokens[vm])
                rows[vm] = vm

    return every_row


def sparsity_kernel():
    """Layer i: a share of i/10 zeros at o_proj, of i/10 + 1/2 at down_proj."""

    @T.prim_func(s_tir=True)
    def shares(out: T.Buffer((LAYERS, 2), "float32")):
        for i, j in T.grid(LAYERS, 2):
            with T.sblock("share"):
                vi, vj = T.axis.remap("SS", [i, j])
                out[vi, vj] = T.Cast("float32", vi) * T.float32(0.1) + T.Cast(
                    "float32", vj
                ) * T.float32(0.5)

    return shares


def add_function(builder: relax.BlockBuilder, kind: str, bits: int) -> None:
    """`prefill_kv{bits}`, `decode_kv{bits}` or `decode_sparsity_kv{bits}`."""
    M, R, S = (tvm.tirx.Var(name, "int64") for name in "MRS")
    codes_dtype = "float16" if bits == 16 else "uint8"

    def ints(name: str, size: tvm.tirx.Var) -> relax.Var:
        return relax.Var(name, relax.TensorType((size,), "int64"))

    def kernel(function: tvm.tirx.PrimFunc, what: str) -> relax.GlobalVar:
        name = f"{what}_of_{kind}_kv{bits}"
        return builder.add_func(function.with_attr("global_symbol", name), name)

    codes_type = relax.TensorType((S, KV_HEADS, 2, tvm.tirx.Var("B", "int64")), codes_dtype)
    scales_type = relax.TensorType((S, KV_HEADS, 2, tvm.tirx.Var("T", "int64")), "float16")
    tokens, slots, positions = ints("tokens", M), ints("slots", M), ints("positions", M)
    rows = ints("rows", R)
    caches = relax.Var("caches", relax.TupleType([codes_type, scales_type] * LAYERS))
    unused = relax.TensorType(dtype="uint8", ndim=2)  # of any size
    params = relax.Var("params", relax.TupleType([unused, relax.TensorType((V,), "float32")]))
    arguments = [tokens, slots, positions, *([rows] * (kind == "prefill")), caches, params]
    with builder.function(f"{kind}_kv{bits}", arguments):
        append = kernel(append_kernel(codes_dtype), "append")
        if kind == "decode":
            function = kernel(every_row_kernel(), "every_row")
            rows = builder.emit(relax.call_tir(function, [tokens], tokens.ty))
        codes = builder.emit(relax.TupleGetItem(caches, 0))
        codes = builder.emit(
            relax.op.call_tir_inplace(append, [codes, tokens, slots, positions], [0], codes_type)
        )
        norm = builder.emit(relax.TupleGetItem(params, 1))
        if kind == "decode_sparsity":
            function = kernel(sparsity_kernel(), "shares")
            result_type = relax.TensorType((LAYERS, 2), "float32")
            out = builder.emit(relax.call_tir(function, [], result_type))
        else:
            function = kernel(logits_kernel(codes_dtype), "logits")
            result_type = relax.TensorType((M if kind == "decode" else R, V), "float32")
            inputs = [tokens, slots, rows, codes, norm]
            out = builder.emit(relax.call_tir(function, inputs, result_type))
        builder.emit_func_output(out)


def compile_to(path: str) -> None:
    """The whole module as a shared library; the sparsity is there at 16 bits alone."""
    builder = relax.BlockBuilder()
    for bits in (16, 4, 3):
        for kind in ("prefill", "decode"):
            add_function(builder, kind, bits)
    add_function(builder, "decode_sparsity", 16)
    target = tvm.target.Target({"kind": "llvm"})
    tvm.compile(builder.get(), target=target).export_library(path)
