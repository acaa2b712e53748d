"""head_bits: how the head's table is stored, unless the user says it.

Six bits cost nothing that shows and are three quarters of the bytes (docs/log.md); they are the
default where a kernel was written for them. Where it would be `generic`'s, INT8's is quicker.
"""

from compiler.config import BuildError
from compiler.kernels import families_of
from model.config import ModelConfig
from model.grouped import BITS, TABLE_BITS, why_not
from schedules.targets import TargetSpec

PREFERRED = 6


def possible(model: ModelConfig, target: TargetSpec) -> list[int]:
    """Those that the model's shape allows and the target has kernels for."""
    if not (model.is_ternary and families_of("grouped_matmul", target.families)):
        return [8]
    return [b for b in TABLE_BITS if b not in BITS or not why_not(model.hidden_size, b)]


def choose(asked: int | None, model: ModelConfig, target: TargetSpec) -> int:
    """Bits of the head; BuildError where they cannot be had."""
    can = possible(model, target)
    if asked is None:
        families = families_of("grouped_matmul", target.families)
        return PREFERRED if PREFERRED in can and families[0] != "generic" else 8
    if asked not in can:
        raise BuildError(
            f"head-bits: asked for {asked} with {model.name} on {target.name}; "
            f"possible: {', '.join(map(str, can))}"
        )
    return asked
