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
from functools import cached_property
from typing import Any

import numpy as np

from runtime import tvm_runtime
from runtime.device import Cpu, Device
from runtime.errors import RuntimeRefusal, require_whole

KV_BITS = (16, 4, 3)
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

    `tensors` is the tuple the compiled functions take, (codes0, scales0, codes1, ...). On a CPU
    the system gives pages as they are first written, so a long context costs only what is used
    of it; a GPU's memory is taken whole.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        context: int,
        kv_heads: int,
        head_dim: int,
        bits: int,
        device: Device | None = None,
    ) -> None:
        """Refuses sizes below 1 and unknown bits. `device` None is the CPU."""
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
        self._wanted = [(np.dtype(t), shape) for _ in range(layers) for t, shape in shapes]
        self.device = device or Cpu()
        self._taken: set[int] = set()

    @cached_property
    def tensors(self) -> Any:
        """Made when first asked for, so that `nbytes` can be weighed before."""
        return tvm_runtime.group(self.device.zeros(self._wanted))

    @property
    def arrays(self) -> list[np.ndarray]:
        """What the tensors hold; on a CPU views of the same memory."""
        return [self.device.fetch(tensor) for tensor in self.tensors]

    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self._wanted)

    def allocate(self) -> int:
        """The lowest free slot, from now on taken; refuses when there is none."""
        if not self.free_slots:
            raise RuntimeRefusal(f"slots: asked for one more; all {self.slots} are taken")
        slot = next(slot for slot in range(self.slots) if slot not in self._taken)
        self._taken.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Give a taken slot back. What it holds is overwritten by the slot's next sequence."""
        if slot not in self._taken:
            raise RuntimeRefusal(f"slots: asked to release {slot}, which is not taken")
        self._taken.remove(slot)

    @property
    def free_slots(self) -> int:
        return self.slots - len(self._taken)
