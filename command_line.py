"""command_line: an argument parser that refuses in one line, for every command of the project.

argparse prints its usage above an error, some fifteen lines for the larger commands here; what was
wrong then stands last. A layer of its own below all others: the runtime ships without the compiler.
"""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """`prog` is how the command is typed, with or without 'python -m '."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("python -m ")
        # An argument that is not UTF-8 holds surrogates, which cannot be printed as they are.
        line = " ".join(message.split()).encode("utf-8", "backslashreplace").decode("utf-8")
        if "possible:" not in line:
            line += f"; possible: what {command} --help lists"
        self.exit(2, f"{command}: error: {line}\n")
