"""Every command refuses what it does not know in one line, with exit code 2."""

import ast
import importlib
from pathlib import Path

import pytest

from command_line import Parser

ROOT = Path(__file__).parent.parent
COMMANDS = (
    "benchmarks.arm_counts", "benchmarks.cpu", "benchmarks.gpu",
    "compiler.build", "compiler.records", "compiler.tune",
    "model.random", "model.train",
    "runtime.bench", "runtime.generate",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("options", [["--no-such-option"], ["a", "b", "c", "d"]], ids=len)
def test_refusal_is_one_line(command, options, capsys):
    with pytest.raises(SystemExit) as left:
        importlib.import_module(command).main(options)
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (2, "")
    assert err.startswith(command) and err.count("\n") == 1 and "error: " in err
    assert "possible: " in err


def test_what_was_typed_may_be_anything(capsys):
    with pytest.raises(SystemExit):
        Parser(prog="python -m x.y").error("unknown: a\nb \udcff")
    assert capsys.readouterr().err == (
        "x.y: error: unknown: a b \\udcff; possible: what x.y --help lists\n"
    )


def test_no_command_has_a_parser_of_its_own():
    for folder in ("benchmarks", "compiler", "model", "runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            calls = [
                node.func.attr
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            ]
            assert "ArgumentParser" not in calls, path
