"""Which GPUs run the tests of which rows, without one."""

import pytest

from schedules.targets import TARGETS
from tests.schedules import compiled


@pytest.mark.parametrize(
    "capability, sm80, sm90",
    [
        (None, False, False),
        ((7, 5), False, False),
        ((8, 0), True, False),
        ((8, 9), True, False),
        ((9, 0), True, True),
        ((10, 0), True, False),
        ((12, 0), True, False),
    ],
)
def test_why_not(capability, sm80, sm90, monkeypatch):
    """Code for sm_80 runs on every later GPU by its PTX, also of two digits before the last."""
    monkeypatch.setattr(compiled, "compute_capability", lambda: capability)
    for name, expected in (("cuda-sm80", sm80), ("cuda-sm90", sm90)):
        reason = compiled.why_not(TARGETS[name])
        assert reason is None if expected else reason.startswith("needs a GPU of sm_")
