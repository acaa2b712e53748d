"""The layers of docs/architecture.md, read from the import statements."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {"command_line"}  # below all layers that have commands; imports nothing of ours
OURS = {"compiler", "model", "runtime", "schedules"} | COMMANDS
MAY_IMPORT = {
    "model": {"model"} | COMMANDS,
    "schedules": {"schedules"},
    "compiler": {"compiler", "model", "schedules"} | COMMANDS,
    "runtime": {"runtime"} | COMMANDS,
}
NEEDS_TORCH = {"model", "compiler"}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("layer", sorted(MAY_IMPORT))
def test_imports_point_downwards(layer):
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    for path in files:
        found = imports(path)
        assert found & OURS <= MAY_IMPORT[layer], path
        if layer not in NEEDS_TORCH:
            assert "torch" not in found, path


def test_the_commands_parser_imports_nothing_of_ours():
    assert not imports(ROOT / "command_line.py") & (OURS | {"torch", "tvm"})


def test_every_module_has_a_docstring():
    for layer in MAY_IMPORT:
        for path in (ROOT / layer).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert not tree.body or ast.get_docstring(tree), path


def test_only_targets_py_looks_at_a_target_name():
    for layer in ("compiler", "schedules"):
        for path in (ROOT / layer).rglob("*.py"):
            if path.name == "targets.py":
                continue
            text = path.read_text(encoding="utf-8")
            assert ".kind.name" not in text and "mcpu" not in text, path
