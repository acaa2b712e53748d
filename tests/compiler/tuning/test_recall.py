"""What a session finds in the records of one that was stopped."""

from dataclasses import replace

import pytest

from compiler.kernels import Choice
from compiler.tuning.recall import recall
from compiler.tuning.store import Record
from tests.compiler.tuning.planted import make_task

MEASURED = Record(
    "int8_matmul", (("K", 64), ("N", 48)), Choice("generic", ()), 1, (1e-3, 1e-3), "ok", "d-c", 0,
    False, None, 0, "",
)  # fmt: skip


def lanes(value: int) -> Choice:
    return Choice("generic", (("lanes", value),))


@pytest.fixture
def task():
    return make_task()


def test_shares_and_failures(task):
    """Seconds of another session do not compare: the share that was recorded counts."""
    known = [
        replace(MEASURED, choice=lanes(2), rows=rows, seconds=(9.0,), share=0.5)
        for rows in (1, 128)
    ]
    known.append(replace(MEASURED, choice=lanes(4), seconds=(), result="crash: SIGSEGV"))
    found = recall(task, known, "both")
    assert found.shares == {lanes(2): 0.5} and found.failed == {lanes(4)}
    assert found.chosen is None and found.result is None


def test_last_race(task):
    """The winner of the last whole race, and its gain; one that was cut off is none."""
    known = [
        replace(MEASURED, choice=choice, rows=rows, seconds=(seconds,) * 9, race=race, chosen=won)
        for race, winner in ((5, lanes(8)), (7, lanes(2)))
        for choice, seconds in ((task.default, 2.0), (winner, 1.0))
        for rows in (1, 128)
        for won in (choice == winner,)
    ]
    found = recall(task, known, "both")
    assert found.chosen == lanes(2) and found.result.ratio == pytest.approx(2)
    assert found.quickest() == [lanes(2), task.default]
    cut_off = [r for r in known if r.rows == 1]
    assert recall(task, cut_off, "both").chosen is None
    assert recall(task, known, "decode").chosen is None  # of both, in which another may win


def test_shares_of_another_mix_do_not_count(task):
    """A decode step's say nothing of prompts; where both were measured, the last counts."""
    decode = [replace(MEASURED, choice=lanes(value), share=0.5) for value in (2, 4)]
    both = [replace(MEASURED, choice=lanes(4), rows=rows, share=0.9) for rows in (1, 128)]
    assert recall(task, [*decode, *both], "both").shares == {lanes(4): 0.9}
    assert recall(task, decode, "decode").shares == {lanes(2): 0.5, lanes(4): 0.5}
