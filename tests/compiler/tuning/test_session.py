"""Tuning for real, of a small kernel with planted faults: what is recorded, chosen, resumed."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tvm.s_tir import meta_schedule as ms

from compiler.config import BuildError
from compiler.kernels import Choice, KernelTable
from compiler.tuning import live, session, space, store
from compiler.tuning.candidates import Builder
from compiler.tuning.lookup import Lookup
from compiler.tuning.under_way import Progress
from schedules.int8_matmul import generic
from tests.compiler.tuning.planted import (
    CRASH,
    HANG,
    HERE,
    NO_BUILD,
    NONE,
    TARGET,
    WRONG,
    N,
    make_task,
    planted,
    results,
    tuned,
)


def test_faults_are_recorded_as_such_and_the_fastest_is_chosen(kernel, tmp_path):
    running = tuned(tmp_path)
    directory = store.read(running.records)
    found = results(directory.records)
    for lanes in (400, 1):
        (wrong,), (crash,), (hang,) = (found[f, lanes] for f in (WRONG, CRASH, HANG))
        assert wrong.startswith("wrong: M=1: ") and crash == "crash: SIGABRT"
        assert hang == "hang: no answer in 3 s"
        assert found[NO_BUILD, lanes] == {"build: cannot select an instruction"}
    assert (NONE, 3) not in found, "a choice that the factory refuses is no candidate"
    best = Choice("generic", (("fault", NONE), ("lanes", 1)))
    assert [r.choice for r in directory.records if r.chosen] == [best, best]
    assert running.progress[0].result.is_real and running.progress[0].failed == 8
    check_build_takes_it(tmp_path, best)
    check_metaschedule_reads_it(running.records, best)
    check_resuming_measures_nothing(tmp_path, directory)


def check_build_takes_it(root: Path, best: Choice) -> None:
    task = make_task()
    table = KernelTable(TARGET, Lookup(TARGET, [root], HERE))
    assert table.choose("int8_matmul", "int8_matmul", task.sizes, task.make).choice == best
    assert table.origin("int8_matmul", task.sizes) == "record"


def check_metaschedule_reads_it(path: Path, best: Choice) -> None:
    """Its own database opens both files, ranks what ran first, and its traces replay."""
    database = ms.database.JSONDatabase(str(path / store.WORKLOADS), str(path / store.RECORDS))
    workload = space.workload("int8_matmul", make_task().sizes, TARGET)
    assert database.has_workload(workload)
    (top,) = database.get_top_k(database.commit_workload(workload), 1)
    replayed = top.as_measure_candidate().sch.mod
    assert space.choice_in(replayed) == best


def check_resuming_measures_nothing(root: Path, before: store.Directory) -> None:
    running = tuned(root, resume=True)
    assert store.read(running.records).records == before.records
    assert running.progress[0].state == "done" and running.progress[0].result.is_real


def test_interrupted_and_resumed(kernel, tmp_path, monkeypatch):
    """Ctrl-C after the first batch: its records stay, and are not measured again."""
    monkeypatch.setattr(session, "BATCH", 2)
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (100, 60, 30, 10, 1)})

    def interrupt(running):
        if running.progress[0].trials:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, interrupt)
    (path,) = store.find_directories(tmp_path)
    first = store.read(path).records
    assert len({record.choice for record in first}) == 2 and not any(r.race for r in first)
    assert not list(Lookup(TARGET, [tmp_path], HERE)("int8_matmul", make_task().sizes))
    running = tuned(tmp_path, resume=True)
    searched = [r for r in store.read(path).records if not r.race and r.rows == 1]
    assert len(searched) == len({record.choice for record in searched}) == 4
    assert running.progress[0].trials == 4
    assert dict(running.progress[0].chosen.knobs) == {"lanes": 1}


def test_resumed_kernels_that_changed_are_checked_anew(kernel, tmp_path, monkeypatch):
    """Only the default's code is that of the first session: the quickest is wrong by now."""
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (400, 60, 1)})
    assert dict(tuned(tmp_path).progress[0].chosen.knobs) == {"lanes": 1}
    (path,) = store.find_directories(tmp_path)
    before = store.read(path)
    store.write(replace(before, records=tuple(r for r in before.records if not r.race)), path)

    def changed(n, k, target, *, lanes=1):
        return planted(n, k, target, fault=NONE if lanes == 400 else WRONG, lanes=lanes)

    monkeypatch.setattr(generic, "kernel", changed)
    assert dict(tuned(tmp_path, resume=True).progress[0].chosen.knobs) == {"lanes": 400}


def test_resumed_with_another_knob_begins_anew(kernel, tmp_path, monkeypatch):
    """The default's code is the same, but the recorded choices are no points of the space."""
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (60, 1)})
    tuned(tmp_path)
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (60, 1), "fault": (NONE,)})
    running = tuned(tmp_path, resume=True)
    assert running.progress[0].trials == 1
    assert dict(running.progress[0].chosen.knobs) == {"lanes": 1, "fault": NONE}


def test_default_that_is_the_best_stays(kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (1, 400)})
    running = tuned(tmp_path)
    assert dict(running.progress[0].chosen.knobs) == {"lanes": 1}
    assert not running.progress[0].result.is_real
    (recorded,) = Lookup(TARGET, [tmp_path], HERE)("int8_matmul", make_task().sizes)
    assert dict(recorded.choice.knobs) == {"lanes": 1}


def test_time_left(kernel, tmp_path, monkeypatch):
    """None before a trial is made, not by those of an earlier session, never above the minutes."""
    monkeypatch.setattr(session, "BATCH", 1)
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (60, 30, 10, 1)})
    tuned(tmp_path, trials=1)
    seen: dict[int, float | None] = {}

    def look(running):
        (progress,) = running.progress
        allotted, progress.allotted = progress.allotted, 10**6
        seen.setdefault(progress.trials, running.seconds_left())
        progress.allotted = allotted

    tuned(tmp_path, look, trials=3, resume=True, minutes=0.5)
    assert seen[0] is seen[1] is None and 0 < seen[2] <= 30


def test_time_is_up(kernel, tmp_path, monkeypatch):
    """No candidate is tried after it, and of a kernel that none was of, nothing is chosen."""
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (2, 1)})
    running = tuned(tmp_path, minutes=1e-6)
    assert running.progress[0].trials == 0 and running.progress[0].state == "not tried"
    assert store.read(running.records).records == () and running.progress[0].chosen is None
    (again,) = tuned(tmp_path, resume=True).progress
    assert again.trials == 1 and again.state == "done" and again.chosen is not None


def test_default_that_fails_is_refused(kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(generic, "KNOBS", {"fault": (WRONG, NONE)})
    with pytest.raises(BuildError, match=r"the default kernel itself fails \(wrong: M=1"):
        tuned(tmp_path)


def test_nothing_is_chosen_of_a_kernel_without_trials(kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (100, 1)})
    running = tuned(tmp_path, tasks=[make_task(), make_task(2 * N)], trials=1)
    by_state = {progress.state: progress for progress in running.progress}
    assert by_state["done"].trials == 1 and by_state["not tried"].chosen is None
    assert len({record.key for record in store.read(running.records).records}) == 1


def test_trials_as_the_table_shows_them():
    """Open until they are shared out; a session that goes on may have had more than it allots."""
    progress = Progress(make_task())
    assert live.row(progress)[2:4] == ["", ""]
    progress.trials, progress.allotted, progress.share = 8, 4, 0.3
    assert live.row(progress)[2:4] == ["30 %", "8/8"]
    progress.allotted = 9
    assert live.row(progress)[3] == "8/9"


def test_full_disk_is_no_candidates_fault(kernel, tmp_path, monkeypatch):
    """Nothing is recorded of a candidate that could not be linked for want of room."""
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (100, 1)})
    build, room = Builder._compile, shutil.disk_usage(tmp_path)

    def compile_(self, kernel, path):
        if path.name != "candidate1.so":  # the default's
            monkeypatch.setattr(shutil, "disk_usage", lambda _: room._replace(free=0))
            raise BuildError("ld: final link failed: No space left on device")
        build(self, kernel, path)

    monkeypatch.setattr(Builder, "_compile", compile_)
    with pytest.raises(BuildError, match="no room for candidates; what is measured is kept"):
        tuned(tmp_path)
    (path,) = store.find_directories(tmp_path)
    assert store.read(path).records == ()
