"""Records on the disk: what is read, refused, mended, merged, pruned and found again."""

import errno
import json
import math
import os

import pytest
from record_lines import HERE, SIZES, TARGET, WORKLOAD, command, filled, line

from compiler.kernels import Choice
from compiler.tuning import store
from compiler.tuning.disk import RecordError
from compiler.tuning.lookup import Lookup


def test_round_trip(tmp_path):
    path = filled(tmp_path, line(2, race=7, chosen=1, rows=128), line(1, result="crash: SIGSEGV"))
    directory = store.read(path)
    good, bad = directory.records
    assert (directory.target, directory.machine, directory.problems) == ("generic", HERE, ())
    assert good.choice == Choice("generic", (("streams", 2),))
    assert good.key == ("int8_matmul", (("K", 64), ("N", 32), ("eps", 1e-5)))
    assert (good.rows, good.race, good.chosen, good.seconds) == (128, 7, True, (1e-3, 2e-3))
    assert (bad.result, bad.seconds) == ("crash: SIGSEGV", ())


@pytest.mark.parametrize(
    "damage",
    [
        *("not json", "[]", "[0, [[[], []], [1], {}, []]]", '{"a": 1}', "[" * 10**5),
        json.dumps([-1, line()]),
        json.dumps([math.inf, line()]),
        json.dumps([0, [line()[0], [], *line()[2:]]]),
        json.dumps([0, [line()[0], [math.nan], *line()[2:]]]),
        json.dumps([0, line()]).replace(r'"\"int8_matmul\""', '["int8_matmul"]'),
    ],
    ids=range(10),
)
def test_foreign_line_is_told_and_passed_over(tmp_path, damage):
    path = filled(tmp_path, line())
    with (path / store.RECORDS).open("a") as file:
        file.write(damage + "\n")
    store.Writer(tmp_path, TARGET.name, HERE).add(WORKLOAD, [line(2)])
    directory = store.read(path)
    assert [dict(r.choice.knobs)["streams"] for r in directory.records] == [4, 2]
    (problem,) = directory.problems
    assert problem.startswith(f"{path / store.RECORDS}:2: not a record of this project")


def test_torn_last_line_is_set_aside(tmp_path):
    path = filled(tmp_path, line())
    with (path / store.RECORDS).open("a") as file:
        file.write('[0, [[["GetSBl')
    filled(tmp_path, line(2))
    assert len(store.read(path).records) == 2 and not store.read(path).problems
    assert "GetSBl" in (path / store.RECORDS).with_suffix(".damaged").read_text()


def test_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    path = filled(tmp_path, line())
    before = (path / store.RECORDS).read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = store.Writer(tmp_path, TARGET.name, HERE)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match=r"cannot write \(No space left on device\)"):
        writer.add(WORKLOAD, [line(2), line(1)])
    with pytest.raises(RecordError, match="No space left") as told:
        store.write(store.read(path), path)
    assert str(told.value).startswith(f"{path}/") and "possible: a place with room" in str(
        told.value
    )
    assert (path / store.RECORDS).read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not what compiler.tune writes"),
        ('{"format": 9}', "records of format 9; possible: 1"),
        ('{"format": 1, "target": "generic"}', "is not what compiler.tune writes"),
        ('{"format": 1, "target": "../../generic"}', "is not what compiler.tune writes"),
    ],
)
def test_bad_machine_file(tmp_path, content, message):
    (tmp_path / store.MACHINE).write_text(content)
    with pytest.raises(RecordError, match=message):
        store.read(tmp_path)


OTHER = ["456", "other"]


@pytest.mark.parametrize(
    "damage", [b"foreign", b'["123", "co', b"[1, 2]", b"\xff\xfe\x00", b"", b"{}"], ids=range(6)
)
def test_bad_workload_is_told_and_the_others_are_used(tmp_path, damage, capsys):
    """Its file and line; its records are passed over and nothing is lost."""
    path = filled(tmp_path, line(1, race=1, chosen=1))
    store.Writer(tmp_path, TARGET.name, HERE).add(OTHER, [line(2, race=2)])
    workloads, records_ = path / store.WORKLOADS, path / store.RECORDS
    _, second = workloads.read_bytes().splitlines()
    workloads.write_bytes(damage + b"\n" + second + b"\n")
    before = records_.read_bytes()
    lookup = Lookup(TARGET, [tmp_path], HERE)
    assert list(lookup("int8_matmul", SIZES)) == []
    (note,) = lookup.notes
    assert note.startswith(
        f"{workloads}:1: not a workload of MetaSchedule's, and 1 more such line:"
    )
    assert f"possible: python -m compiler.records prune {path}" in note
    store.Writer(tmp_path, TARGET.name, HERE).add(WORKLOAD, [line(4, race=3, chosen=1)])
    assert records_.read_bytes().startswith(before)
    assert [(r.workload, r.race) for r in store.read(path).records] == [(1, 2), (2, 3)]
    assert command("prune", path, "--dry-run") == 0 and records_.read_bytes().startswith(before)
    assert command("prune", path) == 0
    assert "2 lines set aside in *.damaged" in capsys.readouterr().out
    directory = store.read(path)
    assert not directory.problems and [r.race for r in directory.records] == [3]
    assert [json.loads(text)[0] for text in directory.workloads] == ["123"]
    assert len(workloads.with_suffix(".damaged").read_text().splitlines()) == 1
    assert '"sizes"' in records_.with_suffix(".damaged").read_text()


def test_torn_workload_stays_in_its_line(tmp_path):
    """Else the next workload would become that of its records. A whole one only gets its end."""
    path = filled(tmp_path, line(1))
    workloads = path / store.WORKLOADS
    whole = workloads.read_text()
    workloads.write_text(whole.rstrip())
    filled(tmp_path, line(2))
    assert workloads.read_text() == whole and len(store.read(path).records) == 2
    with workloads.open("a") as file:
        file.write('["456", "ot')
    store.Writer(tmp_path, TARGET.name, HERE).add(OTHER, [line(4)])
    directory = store.read(path)
    assert [record.workload for record in directory.records] == [0, 0, 2]
    assert directory.problems == (f"{workloads}:2: not a workload of MetaSchedule's",)


def test_whole_last_record_is_kept(tmp_path):
    path = filled(tmp_path, line(1))
    (path / store.RECORDS).write_text((path / store.RECORDS).read_text().rstrip())
    filled(tmp_path, line(2))
    assert len(store.read(path).records) == 2


@pytest.mark.parametrize(
    "left, first", [("", store.RECORDS), ('["123", "co', store.WORKLOADS)], ids=["none", "torn"]
)
def test_records_that_lost_their_workload_are_set_aside(tmp_path, left, first):
    """By who writes next, whose workload would else become theirs."""
    path = filled(tmp_path, line(1))
    store.Writer(tmp_path, TARGET.name, HERE).add(OTHER, [line(4)])
    (path / store.WORKLOADS).write_text(left)
    writer = store.Writer(tmp_path, TARGET.name, HERE)
    assert writer.problems.startswith(f"{path / first}:1: not a ")
    writer.add(["789", "third"], [line(2)])
    directory = store.read(path)
    assert [dict(r.choice.knobs)["streams"] for r in directory.records] == [2]
    assert not directory.problems
    assert len((path / store.RECORDS).with_suffix(".damaged").read_text().splitlines()) == 2
