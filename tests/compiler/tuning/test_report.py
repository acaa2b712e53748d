"""The report: default against tuned in one table, choices moved to other shapes, what hangs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from compiler.config import BuildError
from compiler.toolchain import find_linker
from compiler.tuning import page, report
from compiler.tuning.lookup import Lookup
from compiler.tuning.tasks import Task
from schedules.int8_matmul import generic
from tests.compiler.tuning.planted import (
    CRASH,
    HERE,
    NONE,
    TARGET,
    make_task,
    one_worker,
    planted,
    tuned,
)


def test_report(kernel, tmp_path, monkeypatch):
    """Default against tuned in one table, with TVM's own; a plot; a gain that is there."""
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (400, 1)})
    tuned(tmp_path / "records", trials=2)
    rows, text = reported(tmp_path, [make_task()])
    assert rows[0].gain("both").low > 1
    assert "| int8_matmul | N=32 K=24 | 1 |" in text and "| record |" in text
    assert "One shape an op: nothing to transfer." in text
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    kernels = json.loads((tmp_path / "out" / "report.json").read_text())["kernels"]
    assert kernels[0]["seconds"].keys() == {"tvm", "default", "tuned"}


def reported(folder: Path, tasks: list[Task]) -> tuple[list[report.Row], str]:
    """What a report finds by folder/records, and its page in folder/out."""
    with one_worker() as worker:
        lookup = Lookup(TARGET, [folder / "records"], HERE)
        at = report.Measuring(worker, find_linker(TARGET), 2**16, "both", lookup)
        rows = list(report.measure(tasks, at))
    return rows, page.write(folder / "out", "planted", rows, "both", None).read_text()


def test_report_moves_choices_where_every_default_stays(kernel, tmp_path, monkeypatch):
    """The quickest besides it of each shape, on the other: one is slower, one cannot be built."""

    def refusing(n, k, target, *, lanes=1):
        if n == 48 and lanes == 60:
            raise ValueError("no 60 lanes of 48")
        return planted(n, k, target, lanes=lanes)

    monkeypatch.setattr(generic, "kernel", refusing)
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (1, 400, 60)})
    tasks = [make_task(32), make_task(48)]
    tuned(tmp_path / "records", tasks=tasks, trials=4)
    rows, text = reported(tmp_path, tasks)
    assert [row.choice for row in rows] == [task.default for task in tasks]
    moved = [{shape: dict(m.choice.knobs) for shape, m in row.moved.items()} for row in rows]
    assert moved[0] == moved[1] == {"N=32 K=24": {"lanes": 60}, "N=48 K=24": {"lanes": 400}}
    assert "2 choices moved to another shape: 0 quicker, 1 slower, 0 neither, 1 not run." in text
    refused = "not built: no 60 lanes of 48"
    assert f"| N=48 K=24 | N=32 K=24 | generic lanes=60 | {refused} | |" in text
    assert "| N=32 K=24 | itself | generic lanes=60 | 0." in text
    bare = [replace(row, moved={}) for row in rows]
    text = page.write(tmp_path / "bare", "planted", bare, "both", None).read_text()
    assert "Nothing besides the defaults was measured" in text


def test_report_tells_what_hangs(kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(generic, "KNOBS", {"fault": (CRASH, NONE)})
    with pytest.raises(BuildError, match=r"report: int8_matmul N=32 K=24 .*: crash: SIGABRT"):
        reported(tmp_path, [make_task()])


@pytest.mark.parametrize(
    "slowest, expected", [(1.2, "| 1.20x | 1.20 to 1.30 |"), (0.9, "| none |")]
)
def test_whole_models_gain_is_judged_too(slowest, expected):
    speeds = [100.0] * report.BENCH_TURNS
    tuned = [slowest * 100, 130.0, *[120.0] * (report.BENCH_TURNS - 2)]
    found = {
        build: [[{"test": "tg64", "tokens_per_second": speed}] for speed in of]
        for build, of in {"default": speeds, "tuned": tuned}.items()
    }
    assert expected in page.bench_table(found)[-1]
