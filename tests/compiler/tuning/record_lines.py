"""Records as MetaSchedule writes them, and directories that hold them."""

from pathlib import Path

from compiler import records
from compiler.tuning import store
from compiler.tuning.lookup import Lookup
from compiler.tuning.machine import Machine
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


SIZES = {"N": 32, "K": 64, "eps": 1e-5}


def found(roots, machine=HERE) -> list[tuple]:
    lookup = Lookup(TARGET, roots, machine)
    return [(dict(r.choice.knobs)["streams"], r.origin) for r in lookup("int8_matmul", SIZES)]


def command(*arguments) -> int:
    """`python -m compiler.records`: its exit code."""
    return records.main([str(argument) for argument in arguments])
