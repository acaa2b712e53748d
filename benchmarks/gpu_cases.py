"""The kernels that benchmarks/gpu.py checks and times: inputs, PyTorch's results, rivals.

Inputs and results are computed where they are used; integers are exact in float64, and floats
follow the orders of docs/architecture.md. Sizes are those of BitNet b1.58 2B4T.
"""

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.gpu_attention_cases import append, attention, rope
from benchmarks.gpu_case import Case, empty, floats, int8, integers
from compiler.kernels import Schedule, default_choice, families_of
from schedules.layouts import LAYOUTS
from schedules.targets import GpuTarget

COLD_BYTES = 160 * 2**20  # that one replay walks over: three times an H100's L2
# (N, K): us of Microsoft's W2A8 GEMV on an H100 80GB, cold weights in a CUDA graph, measured
# 2026-11 from microsoft/BitNet's gpu/ folder; its whole list of shapes
MICROSOFT = {
    (2560, 2560): 5.5,
    (3840, 2560): 5.5,
    (13824, 2560): 9.3,
    (2560, 6912): 10.7,
    (3200, 3200): 6.2,
    (4800, 3200): 6.4,
    (20480, 3200): 13.7,
    (3200, 10240): 14.9,
}
ONE_TOKEN = *MICROSOFT, (6912, 2560)  # that one, too, is in 2B4T: gate or up alone
GROUPS = ("gemv", "batch", "gemm", "sparse", "head", "rows", "attention")
EPS = 1e-5


def packed(layout: str, w: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(LAYOUTS[layout].pack(w.cpu().numpy())).cuda()


def exact(q: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """float32 of the int32 sums."""
    return (q.double() @ w.double().T).int().float()


def matmul(group: str, n: int, k: int, m: int, act_bits: int = 8, rivals: bool = True) -> Case:
    limit = (-8, 7) if act_bits == 4 else (-128, 127)
    w = integers(-1, 1, n, k)

    def inputs():
        scale, w_scale = torch.rand(m, device="cuda"), torch.rand(n, device="cuda")
        return [integers(*limit, m, k), scale, packed("tiles_2bit", w), w_scale, empty(m, n)]

    def expected(arrays):
        return [exact(arrays[0], w) * (arrays[1][:, None] * arrays[3])]

    return Case(
        group,
        f"{n}x{k} M={m} int{act_bits}",
        "ternary_matmul",
        (n, k, act_bits),
        inputs,
        1,
        expected,
        read_bytes=n * k // 4 if m <= 16 else 0,
        operations=2 * m * n * k if m > 16 else 0,
        rivals=torch_matmuls(n, k, m) if rivals else {},
        published_us=MICROSOFT.get((n, k)) if m == 1 else None,
        kernel_end=("scale",),
        cold=(2, 3),
    )


def gated(n: int, k: int, m: int) -> Case:
    """A prompt's gate and up projection in one."""
    gate, w = integers(-1, 1, n, k), integers(-1, 1, n, k)

    def inputs():
        scales = torch.rand(m, device="cuda"), *torch.rand(2, n, device="cuda").unbind()
        weights = packed("tiles_2bit", gate), packed("tiles_2bit", w)
        q = integers(-8, 7, m, k)
        return [q, scales[0], weights[0], scales[1], weights[1], scales[2], empty(m, n)]

    def expected(arrays):
        q, scale, _, gate_scale, _, w_scale, _ = arrays
        g = (exact(q, gate) * (scale[:, None] * gate_scale)).clamp_min(0)
        return [g * g * (exact(q, w) * (scale[:, None] * w_scale))]

    name, operations = f"gate and up 2 x {n}x{k} M={m} int4", 4 * m * n * k
    return Case("gemm", name, "glu_matmul", (n, k), inputs, 1, expected, operations=operations)


def torch_matmuls(n: int, k: int, m: int) -> dict:
    """cuBLAS on as many copies as are cold, whatever ours has."""
    copies = max(1, min(20, -(-COLD_BYTES // (2 * n * k))))
    state: dict[str, list] = {}

    def prepare(dtype):
        if str(dtype) not in state:
            state[str(dtype)] = [
                (integers(-8, 7, m, k).to(dtype), integers(-1, 1, n, k).to(dtype).T)
                for _ in range(copies)
            ]
        return state[str(dtype)]

    turn = iter(range(10**9))

    def bf16(_):
        a, b = prepare(torch.bfloat16)[next(turn) % copies]
        return a @ b

    def int8(_):
        a, b = prepare(torch.int8)[next(turn) % copies]
        return torch._int_mm(a, b)

    return {"bf16": bf16} | ({"int8": int8} if m > 16 else {})


def sparse(target: GpuTarget, n: int, k: int, zeros: float, m: int = 1) -> Case:
    folder, w = "sparse_ternary_matmul", integers(-1, 1, n, k)
    layout = Schedule(folder, default_choice(folder, target.families)).layout()

    def inputs():
        keep = torch.rand(m, k, device="cuda") >= zeros
        q = torch.where(keep, integers(1, 127, m, k), 0).to(torch.int8)
        count = (q != 0).sum(1).int()
        index = torch.sort((q == 0).to(torch.uint8), dim=1, stable=True).indices.int()
        scales = torch.rand(m, device="cuda"), torch.rand(n, device="cuda")
        weights = packed(layout, w)
        return [q, scales[0], index, count, weights, scales[1], floats(m, n), empty(m, n)]

    def expected(arrays):
        q, scale, _, _, _, w_scale, residual, _ = arrays
        product = exact(q, w).double() * (scale[:, None] * w_scale).double()
        return [(residual.double() + product).float()]

    name = f"{n}x{k} M={m} {zeros:.0%} zeros"
    read = round(n * k / 4 * (1 - zeros)) if m == 1 else 0
    case = Case("sparse", name, folder, (n, k), inputs, 1, expected, read_bytes=read)
    case.cold = 4, 5
    return case


def head(n: int, k: int, m: int) -> Case:
    def inputs():
        scales = torch.rand(m, device="cuda"), torch.rand(n, device="cuda")
        weights = integers(-127, 127, n, k)
        return [integers(-127, 127, m, k), scales[0], weights, scales[1], empty(m, n)]

    def expected(arrays):
        q, scale, w, w_scale, _ = arrays
        return [exact(q, w) * (scale[:, None] * w_scale)]

    name, read = f"{n}x{k} M={m}", n * k if m <= 16 else 0
    case = Case("head", name, "int8_matmul", (n, k), inputs, 1, expected, read_bytes=read)
    case.cold = 2, 3
    return case


def norm(k: int, m: int, quantizer: str = "int4") -> Case:
    def inputs():
        codes = empty(m, k, dtype=torch.int8), empty(m)
        return [floats(m, k), torch.rand(k, device="cuda") + 0.5, *codes]

    def expected(arrays):
        h = normed(*arrays[:2])
        if quantizer == "int8":
            return list(int8(h))
        beta = (h.abs().double().sum(1) / k).float().clamp_min(1e-5)
        root = torch.tensor(np.float32(np.sqrt(7.0)), device="cuda")
        q = (h * (root / beta)[:, None]).round().clamp(-8, 7)
        return [q.to(torch.int8), beta / root]

    name = f"rms_norm_{quantizer} {k} M={m}"
    return Case("rows", name, "rms_norm", (quantizer, k, EPS), inputs, 2, expected)


def normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    mean_square = x.double().square().sum(1, keepdim=True) / x.shape[1]
    return x * (1 / torch.sqrt(mean_square + EPS)).float() * gain


def masked(h: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 absmax of the `keep` largest of a row, ties to the lower index; else 0."""
    q, scale = int8(h)
    order = torch.sort(h.abs(), dim=1, descending=True, stable=True).indices[:, :keep]
    return torch.where(torch.zeros_like(q, dtype=torch.bool).scatter(1, order, True), q, 0), scale


def topk(k: int, keep: int, m: int) -> Case:
    def inputs():
        lists = empty(m, k, dtype=torch.int32), empty(m, dtype=torch.int32)
        gain = torch.rand(k, device="cuda") + 0.5
        return [floats(m, k), gain, empty(m, k, dtype=torch.int8), empty(m), *lists]

    def expected(arrays):
        q, scale = masked(normed(*arrays[:2]), keep)
        count = (q != 0).sum(1).int()
        listed = torch.arange(k, device="cuda") < count[:, None]
        rising = torch.sort((q == 0).to(torch.uint8), dim=1, stable=True).indices.int()
        return [q, scale, torch.where(listed, rising, arrays[4]), count]

    name = f"topk {keep} of {k} M={m}"
    return Case("rows", name, "rms_norm_topk", (k, keep, EPS), inputs, 4, expected)


def mask(k: int, keep: int, m: int) -> Case:
    """`topk` without its lists."""

    def expected(arrays):
        return list(masked(normed(*arrays[:2]), keep))

    name, inputs = f"mask {keep} of {k} M={m}", topk(k, keep, m).inputs
    args = k, keep, EPS
    case = Case("rows", name, "rms_norm_topk", args, lambda: inputs()[:4], 2, expected)
    case.kernel_end = (False,)
    return case


def cases(target: GpuTarget) -> Iterator[Case]:
    for n, k in ONE_TOKEN:
        yield matmul("gemv", n, k, 1)
    for n, k in ONE_TOKEN:
        yield matmul("gemv", n, k, 1, act_bits=4, rivals=False)
    for act_bits in (8, 4):
        for m in (2, 4, 8, 16):
            for n, k in ONE_TOKEN:
                yield matmul("batch", n, k, m, act_bits, rivals=False)
    for m in (128, 256, 512, 1024, 2048, 4096):
        for n, k in ((13824, 2560), (2560, 6912), (3840, 2560)):
            yield matmul("gemm", n, k, m)
    if families_of("glu_matmul", target.families):
        for m in (512, 2048):
            yield gated(6912, 2560, m)
    for m in (1, 2048):
        yield sparse(target, 2560, 6912, 0.84, m)
        yield sparse(target, 2560, 2560, 0.5, m)
    yield head(128256, 2560, 1)
    yield head(128256, 2560, 4)
    for m in (1, 2048):
        yield norm(2560, m)
        yield rope(m)
        yield topk(2560, 1280, m)
        yield append(m)
    yield mask(2560, 1280, 2048)
    yield norm(6912, 1)
    yield norm(6912, 2048, "int8")
    yield topk(6912, 6912, 1)
    yield attention(1, 512)
    yield attention(1, 4096)
    yield attention(256, 512)
    yield attention(256, 2048)
    yield attention(2048, 2048)
