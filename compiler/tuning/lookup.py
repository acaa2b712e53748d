"""Lookup: what the records say of a kernel, for the machine that a build is for.

First this very machine's, by the order of the roots: --records, this user's, those that ship; then
those of other machines of the same target row, the most alike first. What is passed over, and why,
is one line a directory in `notes`.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from compiler.kernels import Recorded, Sizes
from compiler.tuning import store
from compiler.tuning.disk import RecordError
from compiler.tuning.machine import Machine, this_machine
from schedules.targets import TargetSpec

SHIPPED = Path(__file__).parent / "shipped"


def user_root() -> Path:
    """Where `compiler.tune` writes unless told otherwise."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "bitnet-compiler" / "records"


def default_roots() -> tuple[Path, ...]:
    return user_root(), SHIPPED


class Lookup:
    """Callable as compiler.kernels.Lookup."""

    def __init__(
        self, target: TargetSpec, roots: Sequence[Path], machine: Machine | None = None
    ) -> None:
        self.notes: list[str] = []
        self._machine = machine or this_machine(target)
        exact: list[store.Directory] = []
        nearest: list[store.Directory] = []
        for root in roots:
            for directory in self._readable(root, target.name):
                same = directory.machine == self._machine
                (exact if same else nearest).append(directory)
        nearest.sort(key=lambda found: self._machine.likeness(found.machine), reverse=True)
        self._directories = exact + nearest
        self._tables = [
            *(("record", winners(directory)) for directory in exact),
            *(("nearest", winners(directory)) for directory in nearest),
        ]

    def __call__(self, op: str, sizes: Sizes) -> Iterator[Recorded]:
        key = op, tuple(sorted(sizes.items()))
        for origin, table in self._tables:
            if found := table.get(key):
                yield Recorded(found.choice, found.version, origin)

    def measured(self, op: str, sizes: Sizes) -> Iterator[list[store.Record]]:
        """All records of a kernel, a directory at a time, in the order of calls."""
        key = op, tuple(sorted(sizes.items()))
        for directory in self._directories:
            yield [record for record in directory.records if record.key == key]

    def _readable(self, root: Path, row: str) -> Iterator[store.Directory]:
        """Those below a row of a root that can be read and are of this version of TVM."""
        for path in store.find_directories(root, row):
            try:
                directory = store.read(path)
            except RecordError as error:
                self.notes.append(str(error))
                continue
            if directory.target != row:
                self.notes.append(f"{path}: records of {directory.target}, not of {row}: not used")
                continue
            if directory.machine.tvm != self._machine.tvm:
                self.notes.append(
                    f"{directory.path}: records of TVM {directory.machine.tvm}, "
                    f"this is {self._machine.tvm}: not used"
                )
                continue
            if directory.problems:
                self.notes.append(store.summary(directory))
            yield directory


def winners(directory: store.Directory) -> dict[tuple, store.Record]:
    """(op, sizes) -> the choice of the last comparison that was held."""
    found: dict[tuple, store.Record] = {}
    for record in directory.records:
        if record.chosen and record.race >= found.get(record.key, record).race:
            found[record.key] = record
    return found
