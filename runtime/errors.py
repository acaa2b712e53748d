"""Refusals: one line for the user that says what was asked, what was found and what is possible."""


class RuntimeRefusal(ValueError):
    """Something the runtime cannot do; the message is one line for the user."""


class ArtifactError(RuntimeRefusal):
    """An artifact directory that cannot be used; the message is one line for the user."""


def require_whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high], or a refusal that names it."""
    possible = f"at least {low}" if high is None else f"{low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise RuntimeRefusal(f"{name}: asked for {value!r}; possible: whole numbers, {possible}")
    if value < low or (high is not None and value > high):
        raise RuntimeRefusal(f"{name}: asked for {value}; possible: {possible}")
    return value
