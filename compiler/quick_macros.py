"""Quick macros: parse TVMScript's inlined calls without reading every caller's source.

For each `T.inline` call TVM 0.27 looks for its parser with `inspect.getouterframes`, which reads
the source around every frame of the stack; only their globals are wanted. Building the kernels of
the tiny model took 11.7 s with it and takes 2.5 s without (2 cores of a Xeon).
"""

import inspect

from tvm.script.parser.core.parser import Parser, ScriptMacro


def find_parser(macro: ScriptMacro) -> Parser:
    """What ScriptMacro._find_parser_def returns."""
    frame = inspect.currentframe()
    while frame is not None:
        if parser := frame.f_globals.get(ScriptMacro.parser_object_name):
            return parser
        frame = frame.f_back
    raise RuntimeError(f"{ScriptMacro.parser_object_name} not available")


def install() -> None:
    ScriptMacro._find_parser_def = find_parser
