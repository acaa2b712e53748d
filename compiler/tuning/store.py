"""Store: MetaSchedule's two files of records for one machine, read and added to line by line.

    <machine>/machine.json                    target, Machine, format
    <machine>/database_workload.json          a line: [hash, the workload, encoded by TVM]
    <machine>/database_tuning_record.json     a line: [workload, [trace, seconds, target, args]]

`ms.database.JSONDatabase` opens both; `space.py` says what a trace holds. Reading here needs no
TVM, so that a build, a listing or a merge is quick and tells which line is bad. A record is
appended whole or not at all: what a full disk cut off is taken back.
"""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compiler.config import BuildError
from compiler.kernels import Choice
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


class RecordError(BuildError):
    """Records that cannot be read or written; the message is one line."""


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


def find_directories(root: Path) -> list[Path]:
    """Of machines, below a root of records."""
    return sorted(path.parent for path in root.glob(f"*/*/{MACHINE}"))


def read(path: Path) -> Directory:
    """RecordError where the directory holds no records; a bad line among good ones is a problem."""
    target, machine = read_machine(path)
    workloads = read_lines(path / WORKLOADS)
    problems, records = [], []
    for number, line in enumerate(read_lines(path / RECORDS), 1):
        record = parse(line, len(workloads))
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
    except FileNotFoundError as error:
        raise RecordError(f"{path}: no records: {MACHINE} is missing") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path / MACHINE}: cannot be read ({error})") from error
    except RecordError:
        raise
    except NO_RECORD as error:
        raise RecordError(f"{path / MACHINE}: is not what compiler.tune writes") from error


def read_lines(path: Path) -> list[str]:
    """Whole lines; none where the file is missing."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read ({error})") from error


def parse(line: str, workloads: int) -> Record | str:
    """A record of one of so many workloads, or why the line is none."""
    try:
        record = parse_record(line)
        if not 0 <= record.workload < workloads:
            raise ValueError(f"workload {record.workload} of {workloads}")
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


def summary(problems: Sequence[str]) -> str:
    more = len(problems) - 1
    return problems[0] + (f", and {more} more such lines" if more else "")


class Writer:
    """Adds records to the directory of a machine, which it makes if there is none."""

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
        for name in (WORKLOADS, RECORDS):
            mend_tail(self.path / name)
        self._workloads = [json.loads(line) for line in read_lines(self.path / WORKLOADS)]

    def add(self, workload: list, records: Iterable[list]) -> None:
        """`as_json()` of a MetaSchedule workload and of tuning records of it."""
        hashes = [known[0] for known in self._workloads]
        if workload[0] not in hashes:
            append(self.path / WORKLOADS, [json.dumps(workload)])
            self._workloads.append(workload)
            hashes.append(workload[0])
        index = hashes.index(workload[0])
        append(self.path / RECORDS, [json.dumps([index, record]) for record in records])


def append(path: Path, lines: Sequence[str]) -> None:
    """All lines, on the disk when this returns; none of them where that fails."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab", buffering=0) as file:
            data = "".join(f"{line}\n" for line in lines).encode()
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
    except OSError as error:
        if path.exists():
            os.truncate(path, size)
        raise RecordError(
            f"{path}: cannot write ({error.strerror}); the {size} bytes before are kept; "
            "possible: free space, then --resume"
        ) from error


def mend_tail(path: Path) -> None:
    """A last line without an end, of a process that was killed, goes to a file beside it."""
    if not path.exists() or not (data := path.read_bytes()) or data.endswith(b"\n"):
        return
    whole = data.rfind(b"\n") + 1
    append(path.with_suffix(DAMAGED), [data[whole:].decode(errors="replace")])
    os.truncate(path, whole)


def write_whole(path: Path, text: str) -> None:
    """Replaces the file in one step, or leaves it as it was."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise RecordError(f"{path}: cannot write ({error.strerror})") from error
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's is private
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise RecordError(f"{path}: cannot write ({error.strerror}); it is as it was") from error


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
        if file.name not in (MACHINE, WORKLOADS, RECORDS):
            shutil.copy2(file, stage)
    workloads = len(read_lines(path / WORKLOADS))
    lines = read_lines(path / RECORDS)
    if rest := [line for line in lines if isinstance(parse(line, workloads), str)]:
        append((stage / RECORDS).with_suffix(DAMAGED), rest)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A new directory that takes the place of `path` when the block ends without an exception."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent))
    except OSError as error:
        raise RecordError(f"{path}: cannot write beside it ({error.strerror})") from error
    old = stage.with_suffix(".old")
    try:
        yield stage
        stage.chmod(0o755)  # mkdtemp's is private
        try:
            if path.exists():
                path.rename(old)
            stage.rename(path)
        except BaseException:  # an interrupt, too
            if old.exists() and not path.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
