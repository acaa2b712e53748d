"""embedding against numpy, bit for bit."""

import numpy as np
import pytest

from tests.schedules.compiled import ROWS, compiled, every_target
from tests.schedules.matmul_reference import module

EVERY_TARGET = pytest.mark.parametrize("target", every_target("embedding"))

VOCAB = 300


@EVERY_TARGET
@pytest.mark.parametrize("k", [8, 17, 100, 2560])
def test_matches_definition(k, target):
    rng = np.random.default_rng(k)
    table = rng.integers(-128, 128, (VOCAB, k), dtype=np.int8)
    scale = rng.uniform(1e-4, 1e-2, VOCAB).astype(np.float32)
    run = compiled(module("embedding", target).kernel(VOCAB, k, target), target)
    for m in ROWS:
        tokens = rng.integers(0, VOCAB, m)
        tokens[:1], tokens[1:2] = VOCAB - 1, 0
        y = run(tokens, table, scale, np.full((m, k), np.nan, np.float32))[-1]
        np.testing.assert_array_equal(y, table[tokens].astype(np.float32) * scale[tokens, None])
