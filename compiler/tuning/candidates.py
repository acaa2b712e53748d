"""Candidates: a choice built into a library, in this process.

MetaSchedule's own builder starts a worker that imports every tensor intrinsic, 41 s of CPU a build,
past its limit; the same kernel compiles here in a fraction of a second.
"""

from dataclasses import dataclass
from pathlib import Path

import tvm
from tvm.tirx import PrimFunc

from compiler.kernels import Choice, version
from compiler.pipeline import compile_library
from compiler.tuning import space
from compiler.tuning.tasks import Task
from compiler.tuning.worker import ENTRY

UNPACKED = "unpacked"  # the name for the layout of weights that are not packed


@dataclass(frozen=True)
class Candidate:
    choice: Choice
    version: str
    library: Path
    layout: str


class Builder:
    """Builds a task's candidates into a directory; refuses what is none."""

    def __init__(self, task: Task, directory: Path, linker: str) -> None:
        self._task, self.directory, self._linker = task, directory, linker
        self._module = space.workload(task.op.name, task.sizes, task.target)
        self._default = task.make(task.schedule(task.default))
        self._count = 0
        self._versions: dict[Choice, str] = {}

    @property
    def workload(self) -> tvm.IRModule:
        return self._module

    def version_of(self, choice: Choice) -> str:
        """Of a choice whose kernel cannot be made, the default's alone."""
        if choice not in self._versions:
            try:
                kernel = self._task.make(self._task.schedule(choice))
            except RuntimeError:
                return version(self._default, self._default)
            self._versions[choice] = version(self._default, kernel)
        return self._versions[choice]

    def build(self, choice: Choice) -> Candidate | None:
        """None where the factory refuses the choice, or makes a kernel that was built before."""
        scheduled = space.schedule_of(self._module, self._task.folder, choice)
        chosen = space.choice_in(scheduled.mod)
        try:
            kernel = self._task.make(self._task.schedule(chosen))
            layout = self._task.layout(chosen) or UNPACKED
        except ValueError:
            return None
        name = version(self._default, kernel)
        if any(name == known for other, known in self._versions.items() if other != chosen):
            return None
        self._versions[chosen] = name
        self._count += 1
        path = self.directory / f"candidate{self._count}.so"
        self._compile(kernel, path)
        return Candidate(chosen, name, path, layout)

    def _compile(self, kernel: PrimFunc, path: Path) -> None:
        module = tvm.IRModule({ENTRY: kernel.with_attr("global_symbol", ENTRY)})
        with self._task.target.to_tvm():
            compile_library(module, self._task.target, path, self._linker)
