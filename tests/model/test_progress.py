"""What a training run shows: a bar on a terminal, lines elsewhere."""

import io
import sys

import pytest

from model import progress
from model.progress import Bar, Lines, Status

STATUS = Status(
    step=50, steps=200, stage="hybrid", loss=3.25, learning_rate=1e-3, tokens_a_second=12_000.0,
    seconds_left=125.0,
)  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_a_terminal_gets_a_bar_with_loss_rate_and_time_left(terminal, capsys):
    with progress.of_run(200, 0, terminal) as shown:
        assert isinstance(shown, Bar)
        shown.advance(49)
        shown.report(STATUS)
    drawn = terminal.getvalue()
    for fact in ("50/200", "hybrid", "loss 3.2500", "12k tok/s", "2m05s left"):
        assert fact in drawn
    assert capsys.readouterr().out == ""


def test_lines_go_to_stdout_while_a_bar_is_shown(terminal, capsys):
    with progress.of_run(200, 0, terminal):
        print("eval 50/200")  # stdout is no terminal here, so this must not land in the bar
    assert capsys.readouterr().out == "eval 50/200\n"
    assert "eval" not in terminal.getvalue()


@pytest.mark.parametrize("missing", [None, "rich.console", "rich.progress"])
def test_without_a_terminal_or_rich_there_are_lines(terminal, monkeypatch, capsys, missing):
    if missing is not None:
        monkeypatch.setitem(sys.modules, missing, None)
    stream = io.StringIO() if missing is None else terminal
    with progress.of_run(200, 0, stream) as shown:
        assert type(shown) is Lines
        shown.advance(49)
        shown.report(STATUS)
    assert capsys.readouterr().out == (
        "step 50/200 hybrid loss 3.2500 lr 1.00e-03 12k tok/s 2m05s left\n"
    )
    assert stream.getvalue() == ""
