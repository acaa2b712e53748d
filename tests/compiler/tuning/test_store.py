"""Records on the disk: what is read, refused, mended, merged, pruned and found again."""

import errno
import json
import math
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from compiler import records, tune
from compiler.kernels import Choice
from compiler.tuning import store
from compiler.tuning.disk import RecordError, held
from compiler.tuning.lookup import Lookup
from compiler.tuning.machine import Machine, this_machine
from schedules.targets import TARGETS

TARGET = TARGETS["generic"]
HERE = Machine("CPU 1", ("a", "b"), 2, "0.27")
WORKLOAD = ["123", "code"]


def line(streams=4, race=0, chosen=0, result="ok", rows=1, version="d-c", seconds=(1e-3, 2e-3)):
    """What MetaSchedule's as_json() gives."""

    def annotate(key, value):
        text = f'"{value}"' if isinstance(value, str) else value
        return ["Annotate", ["b0", text], [key], []]

    instructions = [
        ["GetSBlock", [], ["kernel", "main"], ["b0"]],
        annotate("family", "generic"),
        ["SampleCategorical", [], [[4, 2, 1], [0.3, 0.3, 0.3]], ["v1"]],
        ["Annotate", ["b0", "v1"], ["knob.streams"], []],
        annotate("op", "int8_matmul"),
        annotate("sizes", "K=64 N=32 eps=1e-05"),
        annotate("version", version),
        annotate("result", result),
        annotate("race", race),
        annotate("chosen", chosen),
    ]
    trace = [instructions, [[2, [4, 2, 1].index(streams)]]]
    times = list(seconds) if result == "ok" else [1e10]
    return [trace, times, {"kind": "llvm"}, [["TENSOR", "int8", [rows, 64]]]]


def filled(root: Path, *lines, machine=HERE) -> Path:
    writer = store.Writer(root, TARGET.name, machine)
    writer.add(WORKLOAD, lines)
    return writer.path


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
    with pytest.raises(RecordError, match="No space left"):
        store.write(store.read(path), path)
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


SIZES = {"N": 32, "K": 64, "eps": 1e-5}


def found(roots, machine=HERE) -> list[tuple]:
    lookup = Lookup(TARGET, roots, machine)
    return [(dict(r.choice.knobs)["streams"], r.origin) for r in lookup("int8_matmul", SIZES)]


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
    assert note.startswith(f"{workloads}:1: not a workload of MetaSchedule's, and 1 more such line")
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


def command(*arguments) -> int:
    return records.main([str(argument) for argument in arguments])


def test_merge_adds_what_is_new_once(tmp_path, capsys):
    one, two, into = tmp_path / "one", tmp_path / "two", tmp_path / "into"
    filled(one, line(1), line(2))
    filled(two, line(2), line(4))
    writer = store.Writer(two, TARGET.name, HERE)
    writer.add(["456", "other"], [line(4)])
    assert command("merge", one, two, "--into", into) == 0
    assert "4 records added" in capsys.readouterr().out
    assert command("merge", one, two, "--into", into) == 0
    assert "0 records added" in capsys.readouterr().out
    merged = store.read(into / TARGET.name / HERE.slug)
    assert [json.loads(text)[0] for text in merged.workloads] == ["123", "456"]
    assert [record.workload for record in merged.records] == [0, 0, 0, 1]


def test_export_and_import(tmp_path, capsys):
    root, file, there = tmp_path / "root", tmp_path / "file.tar.gz", tmp_path / "there"
    path = filled(root, line(1, race=1, chosen=1), line(2))
    assert command("export", file, "--records", root) == 0
    assert command("import", file, "--records", there) == 0
    copy = there / path.relative_to(root)
    assert [r.line for r in store.read(copy).records] == [r.line for r in store.read(path).records]
    assert "2 records added" in capsys.readouterr().out


def test_export_that_fails_leaves_nothing(tmp_path, capsys, monkeypatch):
    path, place = filled(tmp_path / "root", line(1)), tmp_path / "place"
    place.mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert command("export", tmp_path / "pipe", "--records", tmp_path / "root") == 2
    assert (tmp_path / "pipe").is_fifo() and "pipe: is no file" in capsys.readouterr().err
    assert command("export", place, "--records", tmp_path / "root") == 2
    assert command("export", place / "no" / "file", "--records", tmp_path / "root") == 2

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile.TarFile, "add", full)
    assert command("export", place / "file", "--records", tmp_path / "root") == 2
    monkeypatch.undo()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"compiler.records: {place}: is no file; possible: a file's name"
    assert "file: cannot write (No such file or directory)" in lines[1]
    assert "file: cannot write (No space left on device)" in lines[2] and len(lines) == 3
    assert {entry.name for entry in tmp_path.iterdir()} == {"root", "place", "pipe"}
    assert not list(place.iterdir())
    (path / store.RECORDS).unlink()
    assert command("export", place / "file", "--records", tmp_path / "root") == 0
    assert (place / "file").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_import_refuses_a_foreign_file(tmp_path, capsys):
    (tmp_path / "text").write_text("no archive")
    for name, problem in (
        ("text", "not an exported file"),
        ("none", "cannot be read (No such file or directory)"),
    ):
        assert command("import", tmp_path / name, "--records", tmp_path / "root") == 2
        assert capsys.readouterr().err == (
            f"compiler.records: {tmp_path / name}: {problem}; possible: a file that "
            "compiler.records export wrote\n"
        )
    path = filled(tmp_path / "root", line(1))
    (path / store.RECORDS).write_text("[1]\n")
    assert command("export", tmp_path / "bad.tar.gz", "--records", tmp_path / "root") == 0
    capsys.readouterr()
    assert command("import", tmp_path / "bad.tar.gz", "--records", tmp_path / "there") == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"compiler.records: {tmp_path}/bad.tar.gz/") and "nothing is" in told
    assert not (tmp_path / "there").exists()


def test_prune_keeps_what_a_build_can_use(tmp_path, capsys):
    path = filled(
        tmp_path,
        line(1, race=9, chosen=1, version="d-c"),
        line(4, race=9, version="d-d"),
        line(2, version="d-e"),
        line(2, result="hang: 3 s"),
        line(2, race=5, chosen=1, version="d-e"),
        line(2, version="old-e"),
    )
    before = (path / store.RECORDS).read_text()
    assert command("prune", tmp_path, "--dry-run") == 0
    assert (path / store.RECORDS).read_text() == before
    assert command("prune", tmp_path) == 0
    assert "3 of 6 records dropped, 3 kept" in capsys.readouterr().out
    assert [(r.race, r.version) for r in store.read(path).records] == [
        (9, "d-c"),
        (9, "d-d"),
        (0, "d-e"),
    ]
    assert found([tmp_path]) == [(1, "record")]


def test_rewriting_keeps_what_is_no_record(tmp_path, capsys):
    path = filled(tmp_path, line(1), line(1, race=9, chosen=1))
    with (path / store.RECORDS).open("a") as file:
        file.write("somebody's\n")
    kept = (path / store.RECORDS).with_suffix(".damaged")
    kept.write_text("torn\n")
    assert command("prune", tmp_path, "--final") == 0
    assert kept.read_text() == "torn\nsomebody's\n"
    directory = store.read(path)
    assert len(directory.records) == 1 and not directory.problems


def test_interrupt_between_the_renames_keeps_the_old_records(tmp_path, monkeypatch):
    path, rename = filled(tmp_path, line(1)), Path.rename

    def interrupted(self, target):
        if self.suffix == ".new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write(replace(store.read(path), records=()), path)
    assert len(store.read(path).records) == 1
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_prune_to_the_final_races(tmp_path):
    path = filled(tmp_path, line(1), line(2), line(1, race=9, chosen=1), line(4, race=9))
    assert command("prune", tmp_path, "--final") == 0
    assert [record.race for record in store.read(path).records] == [9, 9]


def test_list_and_show(tmp_path, capsys):
    path = filled(tmp_path, line(2, race=9, chosen=1), line(1, result="wrong: M=1: all differ"))
    assert command("list", "--records", tmp_path) == 0
    listed = capsys.readouterr().out
    assert "CPU 1" in listed and "0.27 (not this one)" in listed and str(path) in listed
    assert command("show", path) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "int8_matmul K=64 N=32 eps=1e-05 generic streams=2 1: 2000 2 1" in shown


def test_a_machines_directory_is_merged_and_a_file_is_none(tmp_path, capsys):
    path = filled(tmp_path / "root", line(1))
    assert command("merge", path, "--into", tmp_path / "there") == 0
    assert len(store.read(tmp_path / "there" / path.relative_to(tmp_path / "root")).records) == 1
    capsys.readouterr()
    assert command("show", path / store.MACHINE) == 2
    assert "machine.json: no machine.json; possible: a machine's" in capsys.readouterr().err


def test_list_goes_on_after_a_bad_directory(tmp_path, capsys):
    bad = filled(tmp_path, line(1))
    (bad / store.MACHINE).write_text("{")
    without = filled(tmp_path, line(1), machine=replace(HERE, threads=3))
    (without / store.MACHINE).unlink()
    good = filled(tmp_path, line(1), machine=replace(HERE, threads=4))
    assert command("list", "--records", tmp_path) == 0
    out, err = capsys.readouterr()
    assert str(good) in out and str(bad) not in out and str(without) not in out
    assert sorted(err.splitlines()) == sorted(
        [
            f"compiler.records: {bad / store.MACHINE}: is not what compiler.tune writes",
            f"compiler.records: {without}: no machine.json; possible: a machine's directory, as "
            "compiler.records list names it",
        ]
    )


HOLD = """
import sys, time
from pathlib import Path
from compiler.tuning.disk import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_writer_at_a_time(tmp_path, capsys, monkeypatch):
    """Who comes second is refused and changes nothing; a holder that is killed holds no more."""
    root, more, file = tmp_path / "root", tmp_path / "more", tmp_path / "file.tar.gz"
    path = filled(root, line(1), line(2, result="crash: SIGSEGV"))
    filled(more, line(4))
    assert command("export", file, "--records", more) == 0
    before = (path / store.RECORDS).read_bytes()
    machine = SimpleNamespace(target=TARGET, machine=HERE, workers=[], cold_bytes=0, linker="")
    monkeypatch.setattr(tune, "open_site", lambda *_: machine)
    monkeypatch.setattr(tune, "choose_tasks", lambda *_: [])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        capsys.readouterr()
        assert command("prune", root) == command("merge", more, "--into", root) == 2
        assert command("import", file, "--records", root) == 2
        assert tune.main(["--model", "tiny", "--records", str(root)]) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 4 and all(f"{path}: another compiler.tune or " in t for t in told)
        assert command("prune", root, "--dry-run") == 0 and command("list", "--records", root) == 0
        assert (path / store.RECORDS).read_bytes() == before
    finally:
        holder.kill()
        holder.wait()
    assert command("prune", root) == command("merge", more, "--into", root) == 0
    assert len(store.read(path).records) == 2
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_killed_between_the_renames(tmp_path):
    """The next one that writes takes the old directory up, and the half-made one away."""
    path = filled(tmp_path, line(1))
    path.rename(path.with_name(f".{path.name}.1234.old"))
    path.with_name(f".{path.name}.1234.new").mkdir()
    with held(path):
        assert len(store.read(path).records) == 1
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "arguments",
    [("list", "--records", "/nowhere"), ("show", "/nowhere"), ("prune", "/nowhere")],
    ids=lambda arguments: arguments[0],
)
def test_nothing_there(arguments, capsys):
    assert command(*arguments) == 2
    assert "/nowhere" in capsys.readouterr().err


def test_this_machine():
    """Exact to itself; its name is one path component."""
    machine = this_machine(TARGETS["generic"])
    assert machine == this_machine(TARGETS["generic"]) != this_machine(TARGETS["generic"], 99)
    assert machine == Machine.from_dict(json.loads(json.dumps(vars(machine))))
    assert "/" not in machine.slug and machine.slug == machine.slug.strip("-")
