"""A step's request and its reply, in memory that host and GPU both see: a token costs no copy.

    request i64[8]   token, slot, position | temperature f64 | top_k | top_p f64, uniform f64
    reply   i64[1]   a token; below 0: the host draws, from the logits

The host writes the request and launches the step, whose first kernel reads it (schedules/request/),
then waits for the step to end and reads the reply. Each of them copied took 13 to 17 us of a token,
and the host its time between them (H100: docs/log.md).
"""

import struct
from typing import Any

from runtime import tvm_runtime

FIELDS = "token", "slot", "position", "temperature", "top_k", "top_p", "uniform"
FORMAT = "=qqqdqdd"  # of FIELDS
WORDS = 8
INT32_MAX = 2**31 - 1


class Mailbox:
    """`tensors`: (request, reply), the same at every step, as a captured graph asks for."""

    def __init__(self, gpu: tvm_runtime.Gpu) -> None:
        self._gpu = gpu
        array, request = gpu.page_locked(WORDS)
        self._request = array.data.cast("B")
        self._reply, reply = gpu.page_locked(1)
        self.tensors: tuple[Any, Any] = request, reply
        self._is_asked = False  # what may still be read: Ctrl-C can come before `wait`

    def ask(
        self, row: tuple[int, int, int], temperature: float, top_k: int, top_p: float,
        uniform: float,
    ) -> None:  # fmt: skip
        """What the next step is to do, once the last has ended. row: token, slot, position."""
        if self._is_asked:
            self.wait()
        self._is_asked = True
        top_k = min(top_k, INT32_MAX)  # the kernel's; the vocabulary is smaller
        struct.pack_into(FORMAT, self._request, 0, *row, temperature, top_k, top_p, uniform)

    def wait(self) -> int:
        """The reply, once the step has ended. RuntimeError: it did not end well."""
        self._gpu.wait()
        self._is_asked = False
        return int(self._reply[0])
