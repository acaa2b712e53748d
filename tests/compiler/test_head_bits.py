"""Which head a build gets, and what is said of one that it cannot have."""

import pytest

from compiler.config import BuildError
from compiler.head_bits import choose
from model.config import MODELS
from schedules.targets import TARGETS

TINY = MODELS["tiny"]
CASES = [
    ("x86-avx2", TINY, 6),
    ("x86-amx", TINY, 6),
    ("x86-amx", TINY.replace(hidden_size=60), 8),
    ("x86-amx", TINY.with_variant("llama"), 8),
    ("generic", TINY, 8),
    ("arm-i8mm", TINY, 8),
    ("cuda-sm90", TINY, 8),
]


@pytest.mark.parametrize("target, model, expected", CASES)
def test_default(target, model, expected):
    assert choose(None, model, TARGETS[target]) == expected
    assert choose(8, model, TARGETS[target]) == 8


@pytest.mark.parametrize("target, model, expected", CASES)
def test_four_bits_where_there_is_a_kernel(target, model, expected):
    if expected == 6 or target in ("generic", "arm-i8mm"):
        assert choose(4, model, TARGETS[target]) == 4
        return
    with pytest.raises(BuildError, match=r"head-bits: asked for 4 with tiny on .*; possible: 8$"):
        choose(4, model, TARGETS[target])
