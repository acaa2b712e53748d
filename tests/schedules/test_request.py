"""request on a GPU: what runtime/mailbox.py packs comes out field by field."""

import struct

import numpy as np
import pytest

from runtime import mailbox
from schedules.request.cuda import FIELDS, WORDS, kernel
from tests.schedules.compiled import compiled, every_gpu, params


def test_the_runtime_packs_what_the_kernel_reads():
    assert tuple(FIELDS) == mailbox.FIELDS and mailbox.WORDS == WORDS
    assert struct.calcsize(mailbox.FORMAT) == 8 * len(FIELDS) <= 8 * WORDS
    codes = mailbox.FORMAT.removeprefix("=")
    assert [code == "d" for code in codes] == [d.startswith("float") for d in FIELDS.values()]


@pytest.mark.parametrize("target", params(every_gpu("request")))
def test_fields(target):
    values = (128255, 3, 2**40, 0.8, 1000, 0.95, 0.1234567890123)
    words = np.zeros(WORDS, np.int64)
    struct.pack_into(mailbox.FORMAT, words, 0, *values)
    found = compiled(kernel(target), target)(words, *(np.zeros(1, d) for d in FIELDS.values()))[1:]
    assert [a.dtype.name for a in found] == list(FIELDS.values())
    wanted = [np.array([v], d) for v, d in zip(values, FIELDS.values(), strict=True)]
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
