"""What a build finds in the records: the machine's own before the nearest, the last race."""

import json
from dataclasses import replace

from record_lines import HERE, SIZES, TARGET, filled, found, line

from compiler.tuning import store
from compiler.tuning.lookup import Lookup
from compiler.tuning.machine import Machine, this_machine
from schedules.targets import TARGETS


def test_exact_machine_comes_before_the_nearest(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    other_cpu = replace(HERE, processor="CPU 2", flags=("a",))
    more_threads = replace(HERE, threads=8)
    filled(one, line(1, race=1, chosen=1), machine=other_cpu)
    filled(one, line(2, race=1, chosen=1), machine=more_threads)
    filled(two, line(4, race=1, chosen=1))
    assert found([one, two]) == [(4, "record"), (2, "nearest"), (1, "nearest")]
    assert found([one, two], replace(HERE, threads=16))[0] == (2, "nearest")
    assert found([]) == []


def test_last_race_counts_and_the_search_does_not(tmp_path):
    filled(tmp_path, line(1, race=9, chosen=1), line(2, race=5, chosen=1), line(4))
    assert found([tmp_path]) == [(1, "record")]
    assert list(Lookup(TARGET, [tmp_path], HERE)("int8_matmul", SIZES | {"N": 64})) == []


def test_other_version_of_tvm_is_told_and_not_used(tmp_path):
    filled(tmp_path, line(1, race=1, chosen=1), machine=replace(HERE, tvm="0.26"))
    lookup = Lookup(TARGET, [tmp_path], HERE)
    assert list(lookup("int8_matmul", SIZES)) == []
    (note,) = lookup.notes
    assert note.endswith("records of TVM 0.26, this is 0.27: not used")


def test_records_of_another_row_are_told_and_not_used(tmp_path):
    """Copied below the wrong row."""
    path = filled(tmp_path, line(1, race=1, chosen=1))
    path.parent.rename(tmp_path / "x86-avx2")
    lookup = Lookup(TARGETS["x86-avx2"], [tmp_path], HERE)
    assert list(lookup("int8_matmul", SIZES)) == []
    assert lookup.notes == [
        f"{tmp_path / 'x86-avx2' / path.name}: records of generic, not of x86-avx2: not used"
    ]


def test_unreadable_directory_does_not_stop_a_build(tmp_path):
    path = filled(tmp_path, line(1, race=1, chosen=1))
    (path / store.RECORDS).write_bytes(b"\xff\xfe\x00")
    lookup = Lookup(TARGET, [tmp_path], HERE)
    assert list(lookup("int8_matmul", SIZES)) == []
    assert f"{path / store.RECORDS}:1: not a record of this project" in lookup.notes[0]
    (path / store.RECORDS).unlink()
    (path / store.RECORDS).mkdir()
    (note,) = Lookup(TARGET, [tmp_path], HERE).notes
    assert note == f"{path / store.RECORDS}: cannot be read (Is a directory)"


def test_this_machine():
    """Exact to itself; its name is one path component."""
    machine = this_machine(TARGETS["generic"])
    assert machine == this_machine(TARGETS["generic"]) != this_machine(TARGETS["generic"], 99)
    assert machine == Machine.from_dict(json.loads(json.dumps(vars(machine))))
    assert "/" not in machine.slug and machine.slug == machine.slug.strip("-")
