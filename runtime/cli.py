"""What the commands share: exit codes, arguments of several commands, numbers for the reader.

Exit codes: 0; 2 refused, one line on stderr; 130 interrupted by Ctrl-C; 141 the reader of stdout
went away. The last two say nothing, as shell tools do.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence

from command_line import refuse
from runtime.errors import RuntimeRefusal

INTERRUPTED, PIPE_CLOSED = 130, 141


def run(command: str, body: Callable[[], None]) -> int:
    """Run a command's body; its exit code, with the refusal on stderr if there is one."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a model may say what the terminal cannot
        sys.stdout.reconfigure(errors="replace")
    try:
        body()
        sys.stdout.flush()
    except RuntimeRefusal as refusal:
        return refuse(command, refusal)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return PIPE_CLOSED
    except OSError as error:  # reading is checked where it is done: stdout is left
        _discard_stdout()
        return refuse(
            command,
            f"output: cannot write it: {error.strerror or error}; possible: a file or pipe that "
            "takes it",
        )
    return 0


def _discard_stdout() -> None:
    """The interpreter flushes stdout once more at exit: give it somewhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_engine_arguments(parser: argparse.ArgumentParser, *, several_threads: bool = False) -> None:
    """The arguments of `Engine.load`; `several_threads` leaves -t a text such as '1,2'."""
    parser.add_argument("artifact", metavar="DIR", help="artifact directory of compiler.build")
    parser.add_argument(
        "-t", "--threads", type=str if several_threads else int,
        metavar="N,N" if several_threads else "N",
        help="threads (default: all usable CPUs)",
    )  # fmt: skip
    parser.add_argument(
        "--kv-bits", type=int, metavar="BITS", help="KV cache: 16, 4 or 3 (default: the artifact's)"
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of context (default: the artifact's)"
    )


def rate(count: int, seconds: float) -> float:
    """Tokens a second; 0 where nothing ran."""
    return count / seconds if seconds > 0 else 0.0


def whole_numbers(name: str, text: str) -> Sequence[int]:
    """'128,512' -> (128, 512), each at least 0."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise RuntimeRefusal(
            f"{name}: asked for {text!r}; possible: whole numbers between commas, such as 128,512"
        ) from error
    if min(numbers) < 0:
        raise RuntimeRefusal(f"{name}: asked for {min(numbers)}; possible: at least 0")
    return numbers
