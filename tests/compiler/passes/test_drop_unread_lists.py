"""DropUnreadLists: Hopper's prompts make no lists; what reads them elsewhere keeps them."""

import pytest

from tests.compiler.passes.test_fuse_one_row import HOPPER, kernels, lower


@pytest.fixture(scope="module")
def lowered():
    return lower(HOPPER)


@pytest.mark.parametrize("function", ["prefill_kv3", "decode_kv3_step"])
def test_a_prompt_makes_no_lists(lowered, function):
    called = kernels(lowered[function])
    assert called.count("rms_norm_mask_int") == 1 and called.count("ternary_residual_matmul") == 2
    assert (
        called.count("rms_norm_int") == 4
    )  # attention's and the GLU's, down_proj's and the head's
    assert not {"rms_norm_topk_int", "sparse_ternary_matmul"} & set(called)


def test_the_probe_keeps_its_counts(lowered):
    called = kernels(lowered["decode_sparsity_kv3"])
    assert called.count("rms_norm_topk_int") == 2 and "rms_norm_mask_int" not in called


def test_rows_that_walk_columns_keep_their_lists():
    called = kernels(lower("cuda-sm80")["prefill_kv3"])
    assert called.count("sparse_ternary_matmul") == called.count("rms_norm_topk_int") == 2
