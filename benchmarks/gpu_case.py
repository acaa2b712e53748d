"""What benchmarks/gpu_cases.py and gpu_attention_cases.py build their cases of."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


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
    cold: tuple[int, ...] = ()  # inputs that come from memory; none: all, and the results


def integers(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8, device="cuda")


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


def empty(*shape: int, dtype=torch.float32) -> torch.Tensor:
    """A result, poisoned."""
    poison = float("nan") if dtype.is_floating_point else 99
    return torch.full(shape, poison, dtype=dtype, device="cuda")


def int8(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 absmax; tensors divide where PyTorch would multiply by the reciprocal of a number."""
    gamma = h.abs().amax(1).clamp_min(1e-5)
    limit = torch.full_like(gamma, 127)
    q = (h * (limit / gamma)[:, None]).round().clamp(-128, 127)
    return q.to(torch.int8), gamma / limit
