"""Every way to share out few tokens' work on Hopper, whichever a launch would take: exact sums."""

import itertools

import numpy as np
import pytest

from schedules.epilogue import EPILOGUES
from schedules.intrin import cuda
from schedules.layouts import LAYOUTS
from schedules.targets import TARGETS
from schedules.ternary_matmul import few_tokens_sm90, sm90
from schedules.ternary_matmul.cuda import CHUNK_BYTES, Shape
from schedules.ternary_matmul.few_form_sm90 import form_of, share_out
from tests.schedules.compiled import compiled, params
from tests.schedules.matmul_reference import (
    activations,
    exact_sum,
    ones,
    ternary_matmul,
    weights,
)

HOPPER = TARGETS["cuda-sm90"]
# Uneven shares of an odd number of columns; more tiles of a block than one warp's; steps of a loop
SHAPES = [(Shape(130, 1424), 4), (Shape(8464, 272), 2), (Shape(8464, 1296), 1)]
FORMS = [
    share_out(shape, tokens, ranks, peers, HOPPER)
    for shape, most_ranks in SHAPES
    for tokens in (8, 16)
    for ranks in (1, 2, 4)
    for peers in (1, 2)
    if ranks <= most_ranks
]


@pytest.mark.parametrize("target", params([HOPPER]))
@pytest.mark.parametrize(
    "form", FORMS, ids=lambda f: f"{f.shape.n}x{f.shape.k}-{f.tokens}-{f.ranks}-{f.peers}"
)
def test_every_form(form, target):
    end, (n, k) = EPILOGUES["scale"], (form.shape.n, form.shape.k)

    def emit(rows, *tensors):
        with cuda.some_rows(rows):
            few_tokens_sm90.launch(form, rows, end, *tensors)

    run = compiled(sm90.prim_func(form.shape, end, emit), target)
    w = weights("random", n, k)
    packed = LAYOUTS["tiles_2bit"].pack(w)
    for m in (1, 3, form.tokens - 1, form.tokens):
        q, (scale, w_scale) = activations("random", m, k, 8, seed=m), ones(m, n)
        out = np.full((m, n), np.nan, np.float32)
        np.testing.assert_array_equal(run(q, scale, packed, w_scale, out)[-1], exact_sum(q, w))


def test_forms_differ():
    """The forms above are of both ways to bring tokens, and of every number of blocks."""
    assert {form.has_own_tokens for form in FORMS} == {True, False}
    assert {form.cluster for form in FORMS} == {1, 2, 4, 8}


@pytest.mark.parametrize("n", [16, 130, 640, 2560, 4800, 13824, 20480, 128256])
@pytest.mark.parametrize("k", [16, 640, 2560, 3200, 6912, 24576])
def test_shared_memory(n, k):
    """Of every form that there is: two launches fit side by side, every tile is someone's, and what
    a warp reads as a tile beyond the last one is inside."""
    shape = Shape(n, k)
    for tokens, ranks, peers in itertools.product((8, 16), (1, 2, 4), (1, 2)):
        form = share_out(shape, tokens, ranks, peers, HOPPER) if ranks <= shape.chunks else None
        if form is None:
            continue
        assert 2 * form.shared_bytes <= HOPPER.shared_bytes
        assert form.threads <= 512
        assert form.shape.tiles <= form.tiles * form.shares < form.shape.tiles + form.tiles * peers
        beyond = form.across * form.together * form.chunks * CHUNK_BYTES
        assert beyond <= form.weights_bytes + form.tokens * form.pitch


def test_choice():
    """Few columns in a block, few tokens read by all."""
    chosen = {
        (n, k, most): (form.ranks, form.peers)
        for n, k in ((2560, 2560), (2560, 6912), (20480, 3200))
        for most in (4, 8, 16)
        if (form := form_of(Shape(n, k), most, HOPPER))
    }
    assert chosen == {
        (2560, 2560, 4): (1, 1),
        (2560, 2560, 8): (1, 1),
        (2560, 2560, 16): (1, 2),
        (2560, 6912, 4): (1, 1),
        (2560, 6912, 8): (2, 1),
        (2560, 6912, 16): (2, 1),
        (20480, 3200, 4): (1, 1),
        (20480, 3200, 8): (1, 1),
        (20480, 3200, 16): (2, 1),
    }


MOST_K = 22528  # of which tokens of a block's chunks leave room for a tile, at 16 tokens


def are_shared_out(k):
    """By the most rows of each launch for few tokens: whether it is few_tokens_sm90.py's."""
    launches, most = sm90.few_launches(Shape(2560, k), HOPPER)
    own = [getattr(launch, "func", None) is few_tokens_sm90.launch for launch in launches]
    return dict(zip(most, own, strict=True))


def test_choice_where_no_tile_fits():
    """16 tokens of one more chunk take the form without clusters; fewer tokens do not."""
    assert are_shared_out(MOST_K)[16]
    assert are_shared_out(MOST_K + 16) == {8: True, 16: False}


@pytest.mark.parametrize("target", params([HOPPER]))
@pytest.mark.parametrize("k", [MOST_K, MOST_K + 16])
def test_both_sides_of_that_choice(k, target):
    n = 130
    run, w = ternary_matmul(target, n, k, 8, "scale"), weights("random", n, k)
    for m in (2, 8, 9, 16):
        q, (scale, w_scale) = activations("random", m, k, 8, seed=m), ones(m, n)
        found = run((q, scale), w, w_scale)
        np.testing.assert_array_equal(found, exact_sum(q, w))
