"""Workers of a benchmark: processes that answer requests, one JSON object a line each way.

Every engine under comparison is a process of its own, so that requests can be interleaved and no
engine's threads, libraries or allocations meet another's. Standard library only: a worker may run
under a Python that has nothing of ours.

    {"do": "decode", "steps": 16}   ->   {"seconds": 0.81}    or    {"error": "..."}
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn


class WorkerError(Exception):
    """A worker that failed or could not be started; the message is one line."""


class Worker:
    """The asking side."""

    def __init__(self, name: str, python: str, script: Path) -> None:
        self.name = name
        try:
            self._process = subprocess.Popen(
                [python, str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                process_group=0,  # Ctrl-C is for who asks, who ends it
            )
        except OSError as error:
            raise WorkerError(
                f"{name}: cannot run {python}: {error.strerror}; possible: the path of a Python"
            ) from error

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the end of the answers says so too
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(
                f"{self.name}: ended while asked to {do}, exit {self._process.wait()}"
            )
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise WorkerError(f"{self.name}: no answer to {do}, but {line.strip()!r}") from error
        if "error" in answer:
            raise WorkerError(f"{self.name}: {do}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End it; harmless twice."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with suppress(BrokenPipeError):  # what a worker that ended never read
                    pipe.close()
        self._process.terminate()
        self._process.wait()


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"


def refuse(error: Exception) -> NoReturn:
    """Answer the first request, whatever it is, with what keeps this process from serving."""
    print(json.dumps({"error": told(error)}))
    sys.exit(1)


def serve(methods: object) -> None:
    """Answer requests with the methods of an object until the input ends. What libraries print
    goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(methods, request.pop("do"))(**request)
        except Exception as error:  # told to whoever asked
            answer = {"error": told(error)}
        try:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        except BrokenPipeError:  # whoever asked has ended
            os._exit(0)  # a plain exit would flush once more
