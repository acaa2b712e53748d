"""Microsoft's W2A8 GEMV as a rival: the libbitnet.so of microsoft/BitNet's gpu/bitnet_kernels, of
the user's build, called in the same run as ours.

    void bitlinear_int8xint2(int8_t* x, int8_t* weights, bfloat16* out, bfloat16* scale,
                             bfloat16* weight_scales, int M, int N, int K, cudaStream_t stream)

It has M = 1 and the shapes of gpu_cases.MICROSOFT. Its weights are random bytes: what they are
changes nothing about its time.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

FUNCTION = "bitlinear_int8xint2"
WEIGHT_SCALES = 6  # of the projections that one matrix may hold


class LibraryError(RuntimeError):
    """A file that is not that library; one line."""


def load(path: Path) -> Callable:
    """The library's function; refuses what cannot be loaded or does not have it."""
    try:
        function = getattr(ctypes.CDLL(str(path.resolve())), FUNCTION)
    except (OSError, AttributeError) as error:
        raise LibraryError(
            f"w2a8: {path}: {error}; possible: the libbitnet.so that compile.sh makes in "
            "microsoft/BitNet's gpu/bitnet_kernels"
        ) from error
    function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int] * 3 + [ctypes.c_void_p]
    function.restype = None
    return function


def rival(function: Callable, n: int, k: int, copies: int) -> Callable[[object], None]:
    """A call with cold weights, each time the next of `copies`; its other arguments stay."""
    weights = torch.randint(-128, 128, (copies, n * k // 4), dtype=torch.int8, device="cuda")
    x = torch.randint(-128, 128, (k,), dtype=torch.int8, device="cuda")
    out = torch.empty(n, dtype=torch.bfloat16, device="cuda")
    scales = torch.ones(1 + WEIGHT_SCALES, dtype=torch.bfloat16, device="cuda")
    turn = iter(range(10**9))

    def call(_: object) -> None:
        tensors = x, weights[next(turn) % copies], out, scales[:1], scales[1:]
        stream = torch.cuda.current_stream().cuda_stream
        function(*(tensor.data_ptr() for tensor in tensors), 1, n, k, stream)

    return call
