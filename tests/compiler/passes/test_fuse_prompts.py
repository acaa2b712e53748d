"""FusePrompts: prompts on Hopper have one call for gate and up, and one for qkv and rope."""

import pytest

from tests.compiler.passes.test_fuse_one_row import HOPPER, kernels, lower


@pytest.fixture(scope="module")
def lowered():
    return lower(HOPPER)


def test_a_prompt_has_one_call(lowered):
    called = kernels(lowered["prefill_kv3"])
    assert called.count("glu_matmul") == 1 and "ternary_glu_matmul" not in called
    assert called.count("rope_matmul") == 1 and not {"rope", "ternary_matmul"} & set(called)


def test_steps_of_few_rows_keep_theirs(lowered):
    called = kernels(lowered["decode_kv3_step"])
    assert called.count("ternary_glu_matmul") == 1 and "glu_matmul" not in called
    assert called.count("rope") == 1 and "rope_matmul" not in called


def test_other_rows_keep_theirs():
    called = kernels(lower("cuda-sm80")["prefill_kv3"])
    assert called.count("ternary_glu_matmul") == 1 and "glu_matmul" not in called
    assert called.count("rope") == 1 and "rope_matmul" not in called
