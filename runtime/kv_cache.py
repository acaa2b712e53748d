"""The KV cache: keys and values of every slot, packed at 16, 4 or 3 bits, and who has which slot.

Layout (docs/architecture.md, "KV cache"), for each layer: codes [S, Hkv, 2, B] and scales
f16[S, Hkv, 2, T], S slots, T positions (the context), axis 2 = keys, values.

| bits | codes | B | scales |
|---|---|---|---|
| 16 | f16 | T·D | f16[S, Hkv, 2, 1], unused |
| 4 | u8 | T·D/2 | f16[S, Hkv, 2, T] |
| 3 | u8 | D/2 + (T-1)·3D/8: position 0, the bos token, has 4 bits | f16[S, Hkv, 2, T] |
"""

import math
import mmap
from typing import Any

import numpy as np

from runtime import tvm_runtime
from runtime.errors import RuntimeRefusal, require_whole

KV_BITS = (16, 4, 3)
PAGE_BYTES = 4096
MOST_LAYERS = 10_000


def row_elements(bits: int, context: int, head_dim: int) -> int:
    """B: elements of one head's keys, or values, over the whole context."""
    if bits == 16:
        return context * head_dim
    if bits == 4:
        return context * head_dim // 2
    return head_dim // 2 + (context - 1) * 3 * head_dim // 8


class KVCache:
    """Zeroed codes and scales of `layers` layers, and which slots are taken.

    `tensors` is the tuple the compiled functions take, (codes0, scales0, codes1, ...); `arrays`
    are numpy views of the same memory. The system gives pages as they are first written, so a
    long context costs only what is used of it.
    """

    def __init__(
        self, layers: int, slots: int, context: int, kv_heads: int, head_dim: int, bits: int
    ) -> None:
        """Refuses sizes below 1, unknown bits, and more memory than the system grants."""
        if bits not in KV_BITS:
            raise RuntimeRefusal(f"kv-bits: asked for {bits}; possible: 16, 4, 3")
        if bits < 16 and head_dim % 8:
            raise RuntimeRefusal(
                f"kv-bits: {bits} needs a head_dim that is a multiple of 8, found {head_dim}; "
                "possible: 16"
            )
        require_whole("layers", layers, 1, MOST_LAYERS)
        self.slots = require_whole("slots", slots, 1)
        self.context = require_whole("context", context, 1)
        self.bits = bits
        head = (slots, kv_heads, 2)
        shapes = (
            (
                np.float16 if bits == 16 else np.uint8,
                (*head, row_elements(bits, context, head_dim)),
            ),
            (np.float16, (*head, 1 if bits == 16 else context)),
        )
        self.arrays = _zeros([(np.dtype(t), shape) for _ in range(layers) for t, shape in shapes])
        self._tensors: Any = None
        self._free = list(range(slots))[::-1]

    @property
    def tensors(self) -> Any:
        """The caches as one argument of a compiled function."""
        if self._tensors is None:
            self._tensors = tvm_runtime.group(tvm_runtime.share(array) for array in self.arrays)
        return self._tensors

    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(array.nbytes for array in self.arrays)

    def allocate(self) -> int:
        """A free slot, from now on taken; refuses when there is none."""
        if not self._free:
            raise RuntimeRefusal(f"slots: asked for one more; all {self.slots} are taken")
        return self._free.pop()

    def release(self, slot: int) -> None:
        """Give a taken slot back. What it holds is overwritten by the slot's next sequence."""
        if not 0 <= slot < self.slots or slot in self._free:
            raise RuntimeRefusal(f"slots: asked to release {slot}, which is not taken")
        self._free.append(slot)

    @property
    def free_slots(self) -> int:
        return len(self._free)


def _zeros(wanted: list[tuple[np.dtype, tuple[int, ...]]]) -> list[np.ndarray]:
    """Zeroed arrays in one anonymous mapping, each on a page of its own."""
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in wanted]
    padded = [-(-size // PAGE_BYTES) * PAGE_BYTES for size in sizes]
    try:
        memory = mmap.mmap(-1, sum(padded), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise RuntimeRefusal(
            f"KV cache: asked for {sum(padded)} bytes, the system says: {error}; possible: fewer "
            "slots, a shorter context, fewer kv-bits"
        ) from error
    arrays, offset = [], 0
    for (dtype, shape), size, room in zip(wanted, sizes, padded, strict=True):
        flat = np.frombuffer(memory, dtype, size // dtype.itemsize, offset)
        arrays.append(flat.reshape(shape))
        offset += room
    return arrays
