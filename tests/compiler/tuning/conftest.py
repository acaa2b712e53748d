"""The planted kernel, for the tests of this folder."""

import pytest

from schedules.int8_matmul import generic
from tests.compiler.tuning.planted import CRASH, HANG, NO_BUILD, NONE, WRONG, planted


@pytest.fixture
def kernel(monkeypatch):
    """The planted kernel in the place of generic's; its default is the slowest."""
    monkeypatch.setattr(generic, "kernel", planted)
    monkeypatch.setattr(
        generic,
        "KNOBS",
        {"fault": (NONE, CRASH, HANG, WRONG, NO_BUILD), "lanes": (400, 3, 1)},
        raising=False,
    )
