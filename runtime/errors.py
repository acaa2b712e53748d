"""Refusals: one line for the user that says what was asked, what was found and what is possible."""

from collections.abc import Sequence

import numpy as np

Numbers = Sequence[int] | np.ndarray


class RuntimeRefusal(ValueError):
    """Something the runtime cannot do; the message is one line for the user."""


class ArtifactError(RuntimeRefusal):
    """An artifact directory that cannot be used; the message is one line for the user."""

    def __init__(self, message: str) -> None:
        possible = "" if "possible:" in message else "; possible: build it again"
        super().__init__(message + possible)


def require_whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high], or a refusal that names it."""
    possible = f"at least {low}" if high is None else f"{low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise RuntimeRefusal(f"{name}: asked for {value!r}; possible: whole numbers, {possible}")
    if value < low or (high is not None and value > high):
        raise RuntimeRefusal(f"{name}: asked for {value}; possible: {possible}")
    return value


def whole_array(name: str, values: Numbers, limit: int) -> np.ndarray:
    """`values` as i64[M], each in [0, limit)."""
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RuntimeRefusal(f"{name}: expected a flat sequence of whole numbers")
    if array.min() < 0 or array.max() >= limit:
        wrong = array[(array < 0) | (array >= limit)][0]
        raise RuntimeRefusal(f"{name}: asked for {wrong}; possible: 0 to {limit - 1}")
    return array.astype(np.int64)
