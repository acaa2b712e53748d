"""SpecializeKVCache on a function of one layer's cache calls."""

import pytest
import tvm

from compiler.passes.specialize_kv_cache import specialize_kv_cache


def step(name: str, code_dtype: str, positions: str, bits: int) -> str:
    """TVMScript of a step that appends to the one layer's cache and attends to it."""
    caches = (
        f'R.Tuple(R.Tensor((s, 2, 2, b), "{code_dtype}"), '
        f'R.Tensor((s, 2, 2, {positions}), "float16"))'
    )
    return f"""
    @R.function
    def {name}(qkv: R.Tensor((m, 64), "float32"), slots: R.Tensor((m,), "int64"),
               caches: {caches}) -> R.Tensor((m, 32), "float32"):
        with R.dataflow():
            codes = caches[0]
            scales = caches[1]
            cache = R.bitnet.kv_append(codes, scales, qkv, slots, slots, 4, 2, {bits})
            new_codes = cache[0]
            new_scales = cache[1]
            y = R.bitnet.attention(qkv, new_codes, new_scales, slots, slots, 4, 2, {bits})
            R.output(y)
        return y
"""


def module(*functions: str) -> tvm.IRModule:
    header = "".join(f'{letter} = TypeVar("{letter}")\n' for letter in "mstb")
    return tvm.script.from_source(f"{header}@I.ir_module\nclass Module:\n{''.join(functions)}")


WIDTHS = {16: ("float16", "1"), 4: ("uint8", "t"), 3: ("uint8", "t")}


def test_copies_for_every_width():
    before = module(step("decode", "float16", "1", 16))
    after = specialize_kv_cache(list(WIDTHS))(before)
    expected = module(*(step(f"decode_kv{bits}", *WIDTHS[bits], bits) for bits in WIDTHS))
    tvm.ir.assert_structural_equal(after, expected)


@pytest.mark.parametrize("bits", WIDTHS)
def test_type_of_the_caches(bits):
    after = specialize_kv_cache([bits])(module(step("decode", "float16", "1", 16)))
    codes, scales = after[f"decode_kv{bits}"].params[-1].ty.fields
    assert str(codes.dtype) == WIDTHS[bits][0]
    assert (str(scales.shape[3]) == "t") == (bits != 16)
