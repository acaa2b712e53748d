"""Store: MetaSchedule's two files of records for one machine, read and added to line by line.

    <machine>/machine.json                    target, Machine, format
    <machine>/database_workload.json          a line: [hash, the workload, encoded by TVM]
    <machine>/database_tuning_record.json     a line: [workload, [trace, seconds, target, args]]

`ms.database.JSONDatabase` opens both; `space.py` says what a trace holds. Reading here needs no
TVM, so that a build, a listing or a merge is quick and tells which line is bad. A record is
appended whole or not at all (disk.py): what a full disk cut off is taken back. Who writes holds the
directory (disk.held).
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compiler.kernels import Choice
from compiler.tuning.disk import NEW, RecordError, append, read_lines, staged, write_whole
from compiler.tuning.machine import Machine

WORKLOADS, RECORDS = "database_workload.json", "database_tuning_record.json"
MACHINE = "machine.json"
FORMAT = 1
DAMAGED = ".damaged"  # of the files that keep what is no record
KNOB = "knob."  # what a knob's annotation begins with
OK = "ok"  # the result of a candidate that computes the reference's bits
ROW = re.compile(r"\w+(-\w+)*")  # how the name of a target row looks
# what reading JSON of another structure may raise
NO_RECORD = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
FAILED_SECONDS = 1e10  # what MetaSchedule writes for a candidate that was not measured


@dataclass(frozen=True)
class Record:
    """One candidate at one number of rows, or its failure."""

    op: str
    sizes: tuple[tuple[str, int | float], ...]  # sorted by name
    choice: Choice
    rows: int  # M
    seconds: tuple[float, ...]  # one a round; empty where it failed
    result: str  # OK, or why it failed
    version: str  # kernels.version_of what was compared
    race: int  # Unix time of the final comparison it ran in; 0: of the search
    chosen: bool  # won that comparison, at every number of rows together
    share: float | None  # in the search: of the default's time in the same rounds, all rows
    workload: int  # the workload's line
    line: str

    @property
    def key(self) -> tuple:
        return self.op, self.sizes


@dataclass(frozen=True)
class Directory:
    """Records of one machine, as they lie on the disk."""

    path: Path
    target: str
    machine: Machine
    records: tuple[Record, ...]
    workloads: tuple[str, ...]  # lines
    problems: tuple[str, ...] = ()  # lines that are none, each told in one line


def find_directories(root: Path, row: str = "*") -> list[Path]:
    """Of machines, below a root of records; also those without all of their files."""
    found = (path for name in (MACHINE, RECORDS) for path in root.glob(f"{row}/*/{name}"))
    return sorted({path.parent for path in found if path.parent.suffix != NEW})


def read(path: Path) -> Directory:
    """RecordError where the directory holds no records; a bad line among good ones is a problem."""
    target, machine = read_machine(path)
    workloads, records = read_lines(path / WORKLOADS), []
    hashes = [hash_of(line) for line in workloads]
    problems = [
        f"{path / WORKLOADS}:{number}: not a workload of MetaSchedule's"
        for number, known in enumerate(hashes, 1)
        if known is None
    ]
    for number, line in enumerate(read_lines(path / RECORDS), 1):
        record = parse(line, hashes)
        if isinstance(record, Record):
            records.append(record)
        else:
            problems.append(f"{path / RECORDS}:{number}: not a record of this project ({record})")
    return Directory(path, target, machine, tuple(records), tuple(workloads), tuple(problems))


def read_machine(path: Path) -> tuple[str, Machine]:
    try:
        values = json.loads((path / MACHINE).read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise RecordError(f"{path}: records of format {values['format']}; possible: {FORMAT}")
        if not ROW.fullmatch(values["target"]):  # it becomes a directory's name
            raise ValueError(values["target"])
        return values["target"], Machine.from_dict(values["machine"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RecordError(
            f"{path}: no {MACHINE}; possible: a machine's directory, as compiler.records list "
            "names it"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path / MACHINE}: cannot be read ({error})") from error
    except RecordError:
        raise
    except NO_RECORD as error:
        raise RecordError(f"{path / MACHINE}: is not what compiler.tune writes") from error


def hash_of(line: str) -> str | None:
    """A workload's; None where the line is none."""
    try:
        name, code = json.loads(line)
    except NO_RECORD:
        return None
    return name if isinstance(name, str) and isinstance(code, str) else None


def parse(line: str, hashes: Sequence[str | None]) -> Record | str:
    """A record of one of the workloads, or why the line is none."""
    try:
        record = parse_record(line)
        if not 0 <= record.workload < len(hashes):
            raise ValueError(f"of workload {record.workload + 1}, {WORKLOADS} has {len(hashes)}")
        if hashes[record.workload] is None:
            raise ValueError(f"of {WORKLOADS}:{record.workload + 1}, which is none")
        return record
    except NO_RECORD as error:
        return str(error) if type(error) is ValueError else type(error).__name__


def parse_record(line: str) -> Record:
    """NO_RECORD where the line is not one of ours."""
    workload, ((instructions, decisions), seconds, _, arguments) = json.loads(line)
    facts = annotations(instructions, dict(decisions))
    if not all(isinstance(facts[name], str) for name in ("op", "family", "result", "version")):
        raise TypeError("a name is no string")
    failed = facts["result"] != OK
    times = () if failed else tuple(float(value) for value in seconds)
    if not failed and not (times and all(0 < time < math.inf for time in times)):
        raise ValueError("no times")
    return Record(
        op=facts["op"],
        sizes=parse_sizes(facts["sizes"]),
        choice=choice_of(facts),
        rows=int(arguments[0][2][0]),
        seconds=times,
        result=facts["result"],
        version=facts["version"],
        race=int(facts["race"]),
        chosen=bool(facts["chosen"]),
        share=float(facts["share"]) if facts.get("share") else None,
        workload=int(workload),
        line=line,
    )


def annotations(instructions: Sequence[Any], decisions: dict[int, int]) -> dict[str, Any]:
    """What a trace writes on its block: constants, and the values sampled."""
    sampled, found = {}, {}
    for index, (kind, inputs, attributes, outputs) in enumerate(instructions):
        if kind == "SampleCategorical":
            sampled[outputs[0]] = attributes[0][decisions[index]]
        elif kind == "Annotate":
            value = inputs[1]
            if isinstance(value, str):
                value = value[1:-1] if value.startswith('"') else sampled[value]
            found[attributes[0]] = value
    return found


def parse_sizes(text: str) -> tuple[tuple[str, int | float], ...]:
    pairs = (part.split("=") for part in text.split())
    return tuple((name, int(v) if v.lstrip("-").isdecimal() else float(v)) for name, v in pairs)


def choice_of(facts: dict[str, Any]) -> Choice:
    knobs = ((k.removeprefix(KNOB), int(v)) for k, v in facts.items() if k.startswith(KNOB))
    return Choice(facts["family"], tuple(knobs))


def summary(directory: Directory) -> str:
    """Its problems in one line."""
    more = len(directory.problems) - 1
    others = f", and {more} more such line{'s' if more > 1 else ''}" if more else ""
    lines = directory.problems[0] + others
    mend = f"python -m compiler.records prune {directory.path}"
    return f"{lines}: not used, the others are; possible: {mend}, which sets such lines aside"


class Writer:
    """Adds records to the directory of a machine, which it makes if there is none; to be held."""

    def __init__(self, root: Path, target: str, machine: Machine) -> None:
        self.path = root / target / machine.slug
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordError(
                f"records: asked for {root}, cannot write there ({error.strerror}); "
                "possible: --records DIR"
            ) from error
        if not (self.path / MACHINE).exists():
            facts = {"format": FORMAT, "target": target, "machine": asdict(machine)}
            write_whole(self.path / MACHINE, json.dumps(facts, indent=1) + "\n")
        mend_tails(self.path)
        found = read(self.path)
        self.problems = summary(found) if found.problems else ""
        # The next workload would become that of a record which lost its own.
        named = [workload_of(line) for line in read_lines(self.path / RECORDS)]
        if max(named, default=-1) >= len(found.workloads):
            write(found, self.path)
        self._hashes = [hash_of(line) for line in read_lines(self.path / WORKLOADS)]

    def add(self, workload: list, records: Iterable[list]) -> None:
        """`as_json()` of a MetaSchedule workload and of tuning records of it."""
        if workload[0] not in self._hashes:
            append(self.path / WORKLOADS, [json.dumps(workload)])
            self._hashes.append(workload[0])
        index = self._hashes.index(workload[0])
        append(self.path / RECORDS, [json.dumps([index, record]) for record in records])


def mend_tails(path: Path) -> None:
    """Ends last lines without an end, of a process that was killed. What is no record goes to a
    file beside it; a workload stays where it is, as records count its line."""
    for file in (path / WORKLOADS, path / RECORDS):
        if not file.exists() or not (data := file.read_bytes()) or data.endswith(b"\n"):
            continue
        start = data.rfind(b"\n") + 1
        tail = data[start:].decode("utf-8", "backslashreplace")
        if file.name == RECORDS and workload_of(tail) < 0:
            append(file.with_suffix(DAMAGED), [tail])
            os.truncate(file, start)
        else:
            append(file, [""])


def workload_of(line: str) -> int:
    """That a record names; -1 where the line is none."""
    try:
        return parse_record(line).workload
    except NO_RECORD:
        return -1


def write(directory: Directory, path: Path) -> None:
    """All of a directory's records, and of its workloads those they are of, to `path`."""
    used = sorted({record.workload for record in directory.records})
    place = {old: new for new, old in enumerate(used)}
    lines = []
    for record in directory.records:
        _, rest = json.loads(record.line)
        lines.append(json.dumps([place[record.workload], rest]))
    facts = {"format": FORMAT, "target": directory.target, "machine": asdict(directory.machine)}
    with staged(path) as stage:
        write_whole(stage / MACHINE, json.dumps(facts, indent=1) + "\n")
        write_whole(stage / WORKLOADS, "".join(f"{directory.workloads[i]}\n" for i in used))
        write_whole(stage / RECORDS, "".join(f"{line}\n" for line in lines))
        keep_rest(path, stage)


def keep_rest(path: Path, stage: Path) -> None:
    """What `path` holds besides records: other files, and the lines that are none."""
    if not path.is_dir():
        return
    for file in path.iterdir():
        if file.name in (MACHINE, WORKLOADS, RECORDS):
            continue
        if file.is_dir() and not file.is_symlink():
            shutil.copytree(file, stage / file.name, symlinks=True)
        else:
            shutil.copy2(file, stage, follow_symlinks=False)
    workloads = read_lines(path / WORKLOADS)
    hashes = [hash_of(line) for line in workloads]
    keep_lines(
        stage / WORKLOADS,
        [line for line, known in zip(workloads, hashes, strict=True) if known is None],
    )
    lines = read_lines(path / RECORDS)
    keep_lines(stage / RECORDS, [line for line in lines if isinstance(parse(line, hashes), str)])


def keep_lines(file: Path, lines: Sequence[str]) -> None:
    if lines:
        append(file.with_suffix(DAMAGED), lines)
