"""The exact TopK mask: which k elements of each row are largest in magnitude.

Ties go to the lower index, and each row has exactly k ones. On a CPU this is a stable sort, the
definition. On CUDA it is a Triton kernel: non-negative IEEE floats order as their bit patterns do,
so the k-th largest |x| is found bit by bit from the top, counting the row each time, with the row
in registers throughout:

    threshold = 0                                   # per row, registers
    for bit in 30 .. 0 (14 .. 0 for 16-bit floats):
        candidate = threshold | 1 << bit
        if count(|x| >= candidate) >= k: threshold = candidate
    ones = |x| > threshold, and the first k - count(|x| > threshold) of |x| == threshold

Self-check and timing on a GPU: `python -m model.topk`.
"""

import sys

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without CUDA
    triton = None

# One warp keeps up to this many elements (64 registers a thread); several short rows share a warp.
WARP_ELEMENTS = 2048
ROWS_ELEMENTS = 1024


def topk_mask(x: Tensor, k: int) -> Tensor:
    """Boolean mask of x's shape with the k largest |x| of each row of the last dimension set."""
    n = x.shape[-1]
    if not 0 < k <= n:
        raise ValueError(f"topk_mask: k {k} is out of range for rows of {n}; has 1 to {n}")
    if x.is_cuda:
        return _topk_mask_cuda(x.detach(), k)
    return topk_mask_sorted(x, k)


def topk_mask_sorted(x: Tensor, k: int) -> Tensor:
    """The definition, by stable sort."""
    order = x.detach().abs().argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    return mask.scatter_(-1, order[..., :k], True)


@torch.library.custom_op("bitnet_train::topk_mask", mutates_args=())
def _topk_mask_cuda(x: Tensor, k: int) -> Tensor:
    if triton is None:
        raise RuntimeError("topk_mask: asked for the CUDA kernel, found no triton package")
    integer_dtype = {4: torch.int32, 2: torch.int16}.get(x.element_size())
    if integer_dtype is None or not x.is_floating_point():
        raise ValueError(f"topk_mask: no kernel for {x.dtype}; has float32, bfloat16, float16")
    rows = x.contiguous().view(-1, x.shape[-1])
    mask = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    count, n = rows.shape
    if count:
        block = triton.next_power_of_2(n)
        rows_per_program = max(1, ROWS_ELEMENTS // block)
        _topk_kernel[(triton.cdiv(count, rows_per_program),)](
            rows.view(integer_dtype),
            mask,
            count,
            n,
            k,
            BLOCK=block,
            ROWS=rows_per_program,
            BITS=x.element_size() * 8 - 1,
            num_warps=min(16, max(1, block // WARP_ELEMENTS)),
        )
    return mask.view(torch.bool).view(x.shape)


@_topk_mask_cuda.register_fake
def _(x: Tensor, k: int) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bool, device=x.device)


if triton is not None:

    @triton.jit
    def _topk_kernel(
        x_bits,
        mask,
        count,
        n,
        k,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
        BITS: tl.constexpr,
    ):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK)
        inside = (row[:, None] < count) & (column[None, :] < n)
        offset = row[:, None].to(tl.int64) * n + column[None, :]
        bits = tl.load(x_bits + offset, mask=inside, other=0).to(tl.int32)
        key = tl.where(inside, bits & ((1 << BITS) - 1), -1)  # padding: below every candidate
        threshold = tl.zeros([ROWS], dtype=tl.int32)
        for step in tl.static_range(BITS):
            candidate = threshold | (1 << (BITS - 1 - step))
            reached = tl.sum((key >= candidate[:, None]).to(tl.int32), axis=1)
            threshold = tl.where(reached >= k, candidate, threshold)
        above = key > threshold[:, None]
        tied = (key == threshold[:, None]).to(tl.int32)
        wanted = k - tl.sum(above.to(tl.int32), axis=1)
        rank = tl.cumsum(tied, axis=1)
        chosen = above | ((tied == 1) & (rank <= wanted[:, None]))
        tl.store(mask + offset, chosen.to(tl.int8), mask=inside)


def _cases(device: str):
    """(name, tensor, k) that a wrong kernel gets wrong."""
    generator = torch.Generator(device=device).manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for n in (1, 7, 64, 100, 512, 1536, 3200, 4096):
            x = torch.randn(257, n, device=device, generator=generator).to(dtype)
            x[1] = 0
            x[2] = x[2].sign()  # all tied
            x[3] = x[3].abs() * 1e30
            x[4] = (x[4] * 2).round()
            x[5] = x[5] * 1e-39
            for k in {1, max(1, n // 2), n}:
                yield f"{dtype} n={n} k={k}", x, k


def _milliseconds(function, repeats: int = 20) -> float:
    function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def main() -> int:
    """Compare the kernel with the stable sort, then time it; exit code 1 on a difference."""
    if not torch.cuda.is_available():
        print("topk: asked for the CUDA kernel, found no CUDA device", file=sys.stderr)
        return 2
    wrong = [
        name
        for name, x, k in _cases("cuda")
        if not torch.equal(topk_mask(x, k), topk_mask_sorted(x, k))
    ]
    print(f"topk: {'DIFFERS: ' + '; '.join(wrong) if wrong else 'equal to the stable sort'}")
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(65536, 512, device="cuda", dtype=dtype)
        ours = _milliseconds(lambda x=x: topk_mask(x, 256))
        theirs = _milliseconds(lambda x=x: torch.topk(x.abs(), 256, dim=-1, sorted=False))
        name = torch.cuda.get_device_name()
        print(f"(65536, 512) {dtype}: {ours:.3f} ms, torch.topk {theirs:.3f} ms, on {name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
