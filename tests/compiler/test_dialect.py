"""The dialect: every operator prints and parses, and refuses what is wrong by name."""

import pytest
import tvm
from dialect_calls import CASES, HEADS, KV_HEADS, ONE_ROW, WIDTH, B, D, M, S, T
from tvm import relax

from compiler.ops import OPS
from schedules.layouts import LAYOUTS


def test_a_case_for_every_operator():
    assert CASES.keys() == OPS.keys()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_tvmscript_round_trip(case):
    module = case.module()
    script = module.script(show_meta=False)
    assert f"R.bitnet.{case.op}(" in script
    tvm.ir.assert_structural_equal(tvm.script.from_source(script), module)


@pytest.mark.parametrize("op", sorted(CASES.keys() - ONE_ROW))
def test_rows_stay_symbolic(op):
    case = CASES[op]
    function = case.module()["main"]
    result = function.ret_ty
    fields = result.fields if isinstance(result, relax.TupleType) else [result]
    symbol = S if OPS[case.op].inplace else M
    assert all(field.shape[0].name == symbol for field in fields)


REFUSED = [
    (
        CASES["ternary_matmul"].but(w=("int8", (64, 32))),
        "ternary_matmul: w is int8 (64, 32), expected (64, 48) to match q (m, 48)",
    ),
    (
        CASES["ternary_matmul"].but(w=("uint8", (64, 13))),
        "ternary_matmul: w is uint8 (64, 13), expected int8 (64, 48) or uint8 packed as "
        "rows_2bit (64, 12), pair_nibble (1, 28, 32), columns_2bit (48, 1, 32), "
        "columns_256 (48, 1, 64), quads_2bit (1, 16, 64), rows_256 (64, 1, 64), "
        "tiles_2bit (4, 1, 512), triples_5bit (1, 2, 320), quads_signed (2, 12, 32)",
    ),
    (
        CASES["ternary_matmul"].but(scale=("float32", ("n",))),
        "ternary_matmul: scale is float32 (n,), expected (m,) to match q (m, 48)",
    ),
    (
        CASES["ternary_matmul"].but(scale=("float16", (M,))),
        "ternary_matmul: scale is float16 (m,), expected float32 (m,)",
    ),
    (
        CASES["ternary_matmul"].but(q=("int8", (1, M, 48))),
        "ternary_matmul: q is int8 (1, m, 48), expected int8 (M, K)",
    ),
    (
        CASES["ternary_matmul"].but(act_bits=5),
        "ternary_matmul: act_bits is 5, possible: 4, 8",
    ),
    (
        CASES["ternary_glu_matmul"].but(gate=("float32", (M, 65))),
        "ternary_glu_matmul: gate is float32 (m, 65), expected (m, 64) to match w_scale (64,)",
    ),
    (
        CASES["sparse_ternary_matmul"].but(index=("int32", (M, 24))),
        "sparse_ternary_matmul: index is int32 (m, 24), expected (m, 48) to match q (m, 48)",
    ),
    (
        CASES["int8_matmul"].but(w=("uint8", (64, 12))),
        "int8_matmul: w is uint8 (64, 12), expected int8 (N, 48)",
    ),
    (
        CASES["grouped_matmul"].but(w=("uint8", (64, 128))),
        "grouped_matmul: w has rows of 128 bytes, expected 256 for 128 columns at 6 bits",
    ),
    (
        CASES["grouped_embedding"].but(k=100),
        "grouped_embedding: K is 100, expected a multiple of 64",
    ),
    (
        CASES["grouped_matmul"].but(q=("int8", (M, 8384))),
        "grouped_matmul: K is 8384, int32 sums hold 8322 columns at 6 bits",
    ),
    (
        CASES["rms_norm_topk_int8"].but(k=49),
        "rms_norm_topk_int8: k is 49, possible: 1 to K = 48",
    ),
    (CASES["rms_norm"].but(eps=0.0), "rms_norm: eps is 0.0, expected float above 0"),
    (
        CASES["rope"].but(cos=("float32", (256, 8)), sin=("float32", (256, 8))),
        "rope: cos has 8 columns, expected 4, half a head of qkv",
    ),
    (
        CASES["rope"].but(num_heads=3),
        "rope: num_heads is 3, expected a multiple of num_kv_heads = 2",
    ),
    (
        CASES["attention"].but(qkv=("float32", (M, WIDTH + 1))),
        "attention: qkv has 65 columns, expected an even head size for 8 heads "
        "(4 queries, 2 keys, 2 values)",
    ),
    (
        CASES["attention"].but(codes=("float16", (S, KV_HEADS, 2, B))),
        "attention: codes is float16 (s, 2, 2, b), expected uint8 as kv_bits is 4",
    ),
    (CASES["kv_append"].but(kv_bits=2), "kv_append: kv_bits is 2, possible: 16, 4, 3"),
    (
        CASES["kv_append"].but(codes=("uint8", (S, 1, 2, B)), scales=("float16", (S, 1, 2, T))),
        "kv_append: codes is uint8 (s, 1, 2, b), expected 2 heads on axis 1 as num_kv_heads says",
    ),
    (
        CASES["kv_append"].but(qkv=("float32", (M, (HEADS + 2 * KV_HEADS) * (D + 2)))),
        "kv_append: kv_bits is 4, possible for a head of 10: 16",
    ),
]


@pytest.mark.parametrize("case, message", REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_refusal(case, message):
    with pytest.raises(TypeError) as refused:
        case.call()
    assert str(refused.value) == message


def test_argument_count():
    with pytest.raises(TypeError, match="rms_norm: got 1 arguments, takes 3: x, gain, eps"):
        x = relax.Var("x", relax.TensorType((1, 8), "float32"))
        relax.BlockBuilder().normalize(OPS["rms_norm"](x))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_packed_weight_is_accepted(layout):
    packed = ("uint8", layout.packed_shape(64, 48))
    CASES["ternary_matmul"].but(w=packed).call()
