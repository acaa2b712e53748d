"""The kernels that benchmarks/gpu.py checks and times: inputs, PyTorch's results, rivals.

Inputs and results are computed where they are used; integers are exact in float64, and floats
follow the orders of docs/architecture.md. Sizes are those of BitNet b1.58 2B4T.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from compiler.kernels import Schedule, default_choice
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
GROUPS = ("gemv", "batch", "gemm", "sparse", "head", "rows", "attention")
HEADS = (20, 5, 128)  # queries, keys, size: BitNet b1.58 2B4T
EPS = 1e-5


@dataclass
class Case:
    """One kernel on one set of inputs."""

    group: str
    name: str
    folder: str  # of schedules/
    kernel_args: tuple
    inputs: Callable[[], list[torch.Tensor]]  # the results, to be overwritten, come last
    results: int
    expected: Callable[[list[torch.Tensor]], list[torch.Tensor]]
    read_bytes: int = 0  # that cannot be cached
    operations: int = 0
    rivals: dict[str, Callable[[list[torch.Tensor]], object]] = field(default_factory=dict)
    published_us: float | None = None
    kernel_end: tuple = ()


def integers(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8, device="cuda")


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


def empty(*shape: int, dtype=torch.float32) -> torch.Tensor:
    """A result, poisoned."""
    poison = float("nan") if dtype.is_floating_point else 99
    return torch.full(shape, poison, dtype=dtype, device="cuda")


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
    )


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
    return Case("sparse", name, folder, (n, k), inputs, 1, expected, read_bytes=read)


def head(n: int, k: int, m: int) -> Case:
    def inputs():
        scales = torch.rand(m, device="cuda"), torch.rand(n, device="cuda")
        weights = integers(-127, 127, n, k)
        return [integers(-127, 127, m, k), scales[0], weights, scales[1], empty(m, n)]

    def expected(arrays):
        q, scale, w, w_scale, _ = arrays
        return [exact(q, w) * (scale[:, None] * w_scale)]

    name, read = f"{n}x{k} M={m}", n * k if m <= 16 else 0
    return Case("head", name, "int8_matmul", (n, k), inputs, 1, expected, read_bytes=read)


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


def int8(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 absmax; tensors divide where PyTorch would multiply by the reciprocal of a number."""
    gamma = h.abs().amax(1).clamp_min(1e-5)
    limit = torch.full_like(gamma, 127)
    q = (h * (limit / gamma)[:, None]).round().clamp(-128, 127)
    return q.to(torch.int8), gamma / limit


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
    return Case("rows", name, "rms_norm_mask", args, lambda: inputs()[:4], 2, expected)


def rope(m: int) -> Case:
    heads, kv_heads, dim = HEADS
    positions = 4096

    def inputs():
        at = torch.randint(0, positions, (m,), device="cuda")
        tables = floats(positions, dim // 2), floats(positions, dim // 2)
        qkv = floats(m, (heads + 2 * kv_heads) * dim)
        return [qkv, *tables, at, empty(*qkv.shape)]

    def expected(arrays):
        qkv, cos, sin, at, _ = arrays
        x = qkv.reshape(m, -1, dim).double()
        low, high = x.chunk(2, dim=-1)
        c, s = cos[at][:, None].double(), sin[at][:, None].double()
        turned = torch.cat([low * c - high * s, high * c + low * s], -1)
        rotated = torch.arange(heads + 2 * kv_heads, device="cuda") < heads + kv_heads
        return [torch.where(rotated[:, None], turned, x).float().reshape(m, -1)]

    args = heads, kv_heads, dim, positions
    return Case("rows", f"rope M={m}", "rope", args, inputs, 1, expected)


def levels(codes: torch.Tensor) -> torch.Tensor:
    """A 3-bit cache u8[S, Hkv, 2, B] -> f64[S, Hkv, 2, T, D]."""
    dim = HEADS[2]
    bos, rest = codes[..., : dim // 2], codes[..., dim // 2 :]
    bos = torch.cat([bos & 15, bos >> 4], -1)[..., None, :].double() - 7
    rest = rest.reshape(*rest.shape[:-1], -1, 3 * dim // 8)
    low, high = rest[..., : dim // 4], rest[..., dim // 4 :]
    code = torch.cat([low >> 2 * f & 3 for f in range(4)], -1)
    code = code | torch.cat([high >> f & 1 for f in range(8)], -1) << 2
    return torch.cat([bos, code.double() - 3], -2)


def attention(m: int, context: int) -> Case:
    """m rows of one slot, the last of them at the context's end; keys and values at 3 bits."""
    heads, kv_heads, dim = HEADS
    size = dim // 2 + (context - 1) * 3 * dim // 8

    def inputs():
        codes = torch.randint(0, 256, (1, kv_heads, 2, size), dtype=torch.uint8, device="cuda")
        scales = torch.rand(1, kv_heads, 2, context, device="cuda").half() / 4
        at = torch.arange(context - m, context, device="cuda")
        qkv = floats(m, (heads + 2 * kv_heads) * dim)
        return [qkv, codes, scales, torch.zeros_like(at), at, empty(m, heads * dim)]

    def expected(arrays):
        qkv, codes, scales, _, at, found = arrays
        q = qkv[:, : heads * dim].reshape(m, heads, dim).swapaxes(0, 1)
        q8, q_scale = (part.reshape(heads, m, -1).double() for part in int8(q.reshape(-1, dim)))
        kv = levels(codes)[0].repeat_interleave(heads // kv_heads, 0)
        scale = scales[0].double().repeat_interleave(heads // kv_heads, 0)
        dots = q8 @ kv[:, 0].mT
        scores = dots * scale[:, None, 0] * q_scale / np.sqrt(dim)
        scores.masked_fill_(torch.arange(context, device="cuda") > at[:, None], -torch.inf)
        e = (scores - scores.amax(-1, keepdim=True)).exp()
        total, y = e.sum(-1, keepdim=True), 0
        for t in range(0, context, 64):
            w = e[..., t : t + 64] * scale[:, None, 1, t : t + 64]
            unit = w.amax(-1, keepdim=True) / 255
            p = (w / torch.where(unit > 0, unit, 1)).round()
            y = y + unit * (p @ kv[:, 1, t : t + 64])
        y = (y / total).float().swapaxes(0, 1).reshape(m, heads * dim)
        # exp and the float64 sums are free in their last bits: so is one ulp in ten thousand here
        near = (y.view(torch.int32) - found.view(torch.int32)).abs() <= 1
        assert (y != found).sum() <= y.numel() / 10_000, f"{(y != found).sum()} elements differ"
        return [torch.where(near, found, y)]

    name = f"attention M={m} context {context}, 3 bits"
    case = Case("attention", name, "attention", (*HEADS, 3), inputs, 1, expected)
    case.rivals = {"SDPA bf16": scaled_dot_product(m, context)}
    return case


def scaled_dot_product(m: int, context: int) -> Callable:
    heads, kv_heads, dim = HEADS
    sizes = (1, heads, m, dim), (1, kv_heads, context, dim), (1, kv_heads, context, dim)
    state: list[torch.Tensor] = []

    def call(_):
        if not state:
            state.extend(floats(*size).bfloat16() for size in sizes)
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*state, is_causal=m == context, enable_gqa=True)

    return call


def append(m: int) -> Case:
    """Checked through the cache: levels times scales are within half a step of the values."""
    heads, kv_heads, dim = HEADS
    size = dim // 2 + (4096 - 1) * 3 * dim // 8

    def inputs():
        at = torch.arange(m, device="cuda")
        qkv = floats(m, (heads + 2 * kv_heads) * dim)
        codes = torch.zeros((1, kv_heads, 2, size), dtype=torch.uint8, device="cuda")
        scales = torch.zeros((1, kv_heads, 2, 4096), dtype=torch.float16, device="cuda")
        return [codes, scales, qkv, torch.zeros_like(at), at]

    def expected(arrays):
        codes, scales, qkv = arrays[:3]
        x = qkv[:, heads * dim :].reshape(m, 2, kv_heads, dim).permute(2, 1, 0, 3).double()
        scale = scales[0, :, :, :m].double()[..., None]
        error = (levels(codes)[0, :, :, :m] * scale - x).abs()
        assert (error <= 0.51 * scale).all()
        return []

    return Case("rows", f"kv_append M={m}, 3 bits", "kv_append", (*HEADS, 3), inputs, 0, expected)


def cases(target: GpuTarget) -> Iterator[Case]:
    for n, k in MICROSOFT:
        yield matmul("gemv", n, k, 1)
    yield matmul("gemv", 6912, 2560, 1, act_bits=4)
    for m in (2, 4, 8, 16):
        for n, k in ((2560, 2560), (13824, 2560), (2560, 6912)):
            yield matmul("batch", n, k, m, rivals=False)
    for m in (128, 512, 2048, 4096):
        for n, k in ((13824, 2560), (2560, 6912), (3840, 2560)):
            yield matmul("gemm", n, k, m)
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
