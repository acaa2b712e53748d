"""command_line: how every command of the project refuses: one line on stderr, exit code 2.

argparse prints its usage above an error, some fifteen lines for the larger commands here; what was
wrong then stands last. A layer of its own below all others: the runtime ships without the compiler.
"""

import argparse
import sys
from typing import NoReturn

REFUSED = 2


def one_line(text: object) -> str:
    """As it can be printed: an argument that is not UTF-8 holds surrogates, which cannot."""
    return " ".join(str(text).split()).encode("utf-8", "backslashreplace").decode("utf-8")


def refuse(command: str, problem: object) -> int:
    """Say on stderr what was asked, what was found and what is possible; the exit code."""
    print(f"{command}: error: {one_line(problem)}", file=sys.stderr)
    return REFUSED


class Parser(argparse.ArgumentParser):
    """`prog` is how the command is typed: 'python -m ' and its name."""

    @property
    def command(self) -> str:
        return self.prog.removeprefix("python -m ")

    def error(self, message: str) -> NoReturn:
        if "possible:" not in message:
            message += f"; possible: what {self.command} --help lists"
        self.exit(refuse(self.command, message))
