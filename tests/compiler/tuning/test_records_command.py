"""`python -m compiler.records`: merge, export, import, prune, list, show; one writer at a time."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from record_lines import HERE, TARGET, command, filled, found, line

from compiler import tune
from compiler.tuning import store
from compiler.tuning.disk import held


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

    for where, what in ((tarfile.TarFile, "add"), (os, "fsync")):
        monkeypatch.setattr(where, what, full)
        assert command("export", place / "file", "--records", tmp_path / "root") == 2
        monkeypatch.undo()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"compiler.records: error: {place}: is no file; possible: a file's name"
    assert "file: cannot write (No such file or directory)" in lines[1]
    assert len(lines) == 4
    assert all(f"{place}/file: cannot write (No space left on device)" in x for x in lines[2:])
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
            f"compiler.records: error: {tmp_path / name}: {problem}; possible: a file that "
            "compiler.records export wrote\n"
        )
    path = filled(tmp_path / "root", line(1))
    (path / store.RECORDS).write_text("[1]\n")
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as archive:
        archive.add(path, path.relative_to(tmp_path / "root"))
    assert command("import", tmp_path / "bad.tar.gz", "--records", tmp_path / "there") == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert (
        told.startswith(f"compiler.records: error: {tmp_path}/bad.tar.gz/") and "nothing is" in told
    )
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


def test_export_leaves_out_what_import_would_refuse(tmp_path, capsys):
    path = filled(tmp_path / "root", line(1), line(2))
    with (path / store.RECORDS).open("a") as file:
        file.write("somebody's\n")
    file = tmp_path / "records.tar.gz"
    assert command("export", file, "--records", tmp_path / "root") == 0
    assert command("import", file, "--records", tmp_path / "there") == 0
    assert "2 records added" in capsys.readouterr().out
    assert (path / store.RECORDS).read_text().endswith("somebody's\n")
    shutil.copytree(path, path.with_name("copy"))  # of the same machine: both are in the file
    assert command("export", file, "--records", tmp_path / "root") == 0
    with tarfile.open(file) as archive:
        assert {f"generic/{name}/{store.RECORDS}" for name in (path.name, "copy")} <= set(
            archive.getnames()
        )


def test_unpacking_onto_a_full_disk(tmp_path, capsys, monkeypatch):
    filled(tmp_path / "root", line(1))
    file = tmp_path / "records.tar.gz"
    assert command("export", file, "--records", tmp_path / "root") == 0

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    assert command("import", file, "--records", tmp_path / "there") == 2
    assert "cannot unpack there (No space left on device); possible: TMPDIR" in (
        capsys.readouterr().err
    )


def test_rewriting_keeps_what_is_no_record(tmp_path, capsys):
    path = filled(tmp_path, line(1), line(1, race=9, chosen=1))
    with (path / store.RECORDS).open("a") as file:
        file.write("somebody's\n")
    kept = (path / store.RECORDS).with_suffix(".damaged")
    kept.write_text("torn\n")
    (path / "notes").mkdir()
    (path / "notes" / "mine").write_text("x")
    (path / "link").symlink_to("nowhere")
    assert command("prune", tmp_path, "--final") == 0
    assert kept.read_text() == "torn\nsomebody's\n"
    assert (path / "notes" / "mine").read_text() == "x" and (path / "link").is_symlink()
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
            f"compiler.records: error: {bad / store.MACHINE}: is not what compiler.tune writes",
            f"compiler.records: error: {without}: no machine.json; possible: a machine's "
            "directory, as compiler.records list names it",
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
