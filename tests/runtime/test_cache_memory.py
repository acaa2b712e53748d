"""The cache's bytes are those on paper, its memory is the tensors', its slots are lent once."""

import numpy as np
import pytest

from runtime import KVCache, RuntimeRefusal, tvm_runtime

SHAPES = [(2, 1, 64, 2, 8), (3, 4, 100, 5, 128), (1, 2, 1, 1, 64), (30, 1, 2048, 5, 128)]


def paper_bytes(layers, slots, context, kv_heads, head_dim, bits) -> int:
    """Keys and values of each position: head_dim codes of `bits`, and one float16 scale."""
    positions = layers * slots * kv_heads * 2 * context
    heads = layers * slots * kv_heads * 2
    if bits == 16:
        return positions * head_dim * 2 + heads * 2
    bos = heads * head_dim // 8 if bits == 3 else 0  # one more bit for each code of position 0
    return positions * head_dim * bits // 8 + bos + positions * 2


@pytest.mark.parametrize("bits", [16, 4, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes(shape, bits):
    assert KVCache(*shape, bits).nbytes() == paper_bytes(*shape, bits)


def test_2b4t_at_3_bits_is_what_the_page_says():
    assert KVCache(30, 1, 2048, 5, 128, 3).nbytes() == 30_724_800


@pytest.mark.parametrize("bits", [16, 4, 3])
def test_tensors_share_the_arrays_memory(bits):
    cache = KVCache(2, 3, 16, 2, 8, bits)
    assert len(cache.tensors) == 4
    for tensor, array in zip(cache.tensors, cache.arrays, strict=True):
        assert not array.any() and array.ctypes.data % 64 == 0
        array[2, 1, 1, -1] = 7
        shared = tvm_runtime.view(tensor)
        assert shared.shape == array.shape and shared.dtype == array.dtype
        assert shared[2, 1, 1, -1] == 7 and np.count_nonzero(shared) == 1


def test_slots():
    cache = KVCache(1, 3, 4, 1, 8, 4)
    taken = [cache.allocate() for _ in range(3)]
    assert sorted(taken) == [0, 1, 2] and cache.free_slots == 0
    with pytest.raises(RuntimeRefusal, match="all 3 are taken"):
        cache.allocate()
    cache.release(1)
    assert cache.allocate() == 1
    cache.release(2)
    for slot in (2, 3, -1):
        with pytest.raises(RuntimeRefusal, match="not taken"):
            cache.release(slot)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1, 1, 4, 1, 8, 5), "kv-bits: asked for 5; possible: 16, 4, 3"),
        ((1, 1, 4, 1, 100, 3), "multiple of 8, found 100; possible: 16"),
        ((1, 0, 4, 1, 8, 4), "slots: asked for 0"),
        ((1, 1, -4, 1, 8, 4), "context: asked for -4"),
        ((1, 1 << 40, 1 << 20, 1, 8, 4), "possible: fewer slots"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(RuntimeRefusal, match=message):
        KVCache(*arguments).tensors  # noqa: B018 a property that takes the memory
