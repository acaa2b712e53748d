"""List, show, merge, export, import and prune tuning records.

    python -m compiler.records list                          all roots: this user's and the shipped
    python -m compiler.records show PATH                     one machine's: what was chosen, by op
    python -m compiler.records merge FROM ... --into ROOT    add roots' records to those of another
    python -m compiler.records export FILE [--records ROOT]  a .tar.gz of a root
    python -m compiler.records import FILE [--records ROOT]  and back, checked line by line
    python -m compiler.records prune PATH [--dry-run]        drop failures, old races, old versions
    python -m compiler.records prune PATH --final            and the search: to ship, not to resume

A root holds <target>/<machine>/ directories. Nothing is written before everything that is read
has been checked; a directory is replaced in one step, by one process at a time (what compiler.tune
writes to is refused). Exit code 2: refused, in one line.
"""

import argparse
import errno
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from command_line import Parser, refuse
from compiler.config import BuildError
from compiler.tuning import store
from compiler.tuning.disk import RecordError, held
from compiler.tuning.lookup import default_roots, user_root, winners
from compiler.tuning.machine import cpu_identity, tvm_version


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        kept = "every directory is whole, as it was or as it was to be"
        print(f"compiler.records: interrupted; {kept}", file=sys.stderr)
        return 130
    except OSError as error:
        return refuse(
            "compiler.records", f"{error.filename or 'records'}: {error.strerror or error}"
        )
    except BuildError as error:
        return refuse("compiler.records", error)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m compiler.records", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, help_: str) -> Parser:
        one = commands.add_parser(name, help=help_, description=help_)
        one.set_defaults(run=run)
        return one

    one = command("list", list_, "machines that there are records of")
    one.add_argument("--records", type=Path, metavar="ROOT", help="only this root")
    one = command("show", show, "what was chosen for one machine, by op and shape")
    one.add_argument("path", type=Path, help="a machine's directory, as list names it")
    one = command("merge", merge, "add the records of roots to those of another")
    one.add_argument("sources", type=Path, nargs="+", metavar="FROM")
    one.add_argument("--into", type=Path, required=True, metavar="ROOT")
    one = command("export", export, "write a root to one file")
    one.add_argument("file", type=Path)
    one.add_argument("--records", type=Path, metavar="ROOT", help="default: this user's")
    one = command("import", import_, "add an exported file to a root")
    one.add_argument("file", type=Path)
    one.add_argument("--records", type=Path, metavar="ROOT", help="default: this user's")
    one = command("prune", prune, "drop what no build can use: failures, old races and versions")
    one.add_argument("path", type=Path, help="a machine's directory, or a root")
    one.add_argument("--dry-run", action="store_true", help="only say what would be dropped")
    one.add_argument(
        "--final",
        action="store_true",
        help="keep the last races alone, which builds read; what --resume reads goes too",
    )
    return parser.parse_args(argv)


def list_(arguments: argparse.Namespace) -> None:
    roots = [arguments.records] if arguments.records else default_roots()
    table = Table("target", "processor", "threads", "TVM", "kernels", "records", "where", box=None)
    for root in roots:
        for path in store.find_directories(root):
            try:
                directory = read(path)
            except RecordError as error:  # the others are listed all the same
                refuse("compiler.records", error)
                continue
            machine = directory.machine
            table.add_row(
                directory.target,
                machine.processor + (" (this one)" if machine.processor == cpu_identity() else ""),
                str(machine.threads),
                machine.tvm + ("" if machine.tvm == tvm_version() else " (not this one)"),
                str(len(winners(directory))),
                str(len(directory.records)),
                str(path),
            )
    if not table.rows:
        places = ", ".join(map(str, roots))
        raise BuildError(f"list: no records in {places}; possible: python -m compiler.tune")
    print_table(table)


def show(arguments: argparse.Namespace) -> None:
    directory = read(arguments.path)
    table = Table("op", "shape", "chosen", "M: median us", "trials", "failed", box=None)
    for key in sorted({record.key for record in directory.records}):
        records = [record for record in directory.records if record.key == key]
        won = winners(directory).get(key)
        times = ""
        if won:
            same = (r for r in records if r.race == won.race and r.choice == won.choice)
            times = ", ".join(f"{r.rows}: {median_us(r):.0f}" for r in same)
        table.add_row(
            key[0],
            " ".join(f"{name}={value}" for name, value in key[1]),
            describe(won.choice) if won else "nothing yet: --resume",
            times,
            str(len({record.choice for record in records})),
            str(len({record.choice for record in records if record.result != store.OK})),
        )
    print_table(table)


def median_us(record: store.Record) -> float:
    return sorted(record.seconds)[len(record.seconds) // 2] * 1e6


def describe(choice) -> str:
    return " ".join([choice.family, *(f"{name}={value}" for name, value in choice.knobs)])


def merge(arguments: argparse.Namespace) -> None:
    sources = [read(path) for root in arguments.sources for path in directories(root)]
    print(f"{add(sources, arguments.into)} records added to {arguments.into}")


def add(sources: Sequence[store.Directory], root: Path) -> int:
    """Those records of `sources` that `root` does not have; how many they were."""
    with ExitStack() as stack:
        for path in sorted({place(source, root) for source in sources}):
            stack.enter_context(held(path))
        before, after = {}, {}
        for source in sources:
            path = place(source, root)
            if path not in after:
                is_there = (path / store.MACHINE).exists()
                before[path] = after[path] = read(path) if is_there else replace(source, records=())
            after[path] = union(after[path], source)
        added = {path: len(after[path].records) - len(before[path].records) for path in after}
        for path, count in added.items():
            if count:
                store.write(after[path], path)
        return sum(added.values())


def place(source: store.Directory, root: Path) -> Path:
    return root / source.target / source.machine.slug


def union(first: store.Directory, second: store.Directory) -> store.Directory:
    """Both's records, the first's before; a record that both have, once."""
    workloads = list(first.workloads)
    seen = {(workloads[record.workload], content(record)) for record in first.records}
    records = list(first.records)
    for record in second.records:
        workload = second.workloads[record.workload]
        if (workload, content(record)) in seen:
            continue
        if workload not in workloads:
            workloads.append(workload)
        records.append(replace(record, workload=workloads.index(workload)))
    return replace(first, records=tuple(records), workloads=tuple(workloads))


def content(record: store.Record) -> str:
    """A record's line without the number of its workload."""
    return record.line.partition(",")[2].strip()


def export(arguments: argparse.Namespace) -> None:
    root = arguments.records or user_root()
    found = [read(path) for path in directories(root)]
    target = arguments.file.absolute()
    if target.exists() and not target.is_file():  # a device or pipe would be replaced
        raise BuildError(f"{arguments.file}: is no file; possible: a file's name")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            whole, written = Path(scratch) / "archive", Path(scratch) / "records"
            with tarfile.open(whole, "w:gz") as archive:
                for directory in found:  # as it was read: without lines that import would refuse
                    inside = Path(directory.target) / directory.path.name
                    store.write(directory, written / inside)
                    archive.add(written / inside, str(inside))
            whole.replace(target)
    except (OSError, RecordError) as error:
        raise BuildError(
            f"{arguments.file}: cannot write ({reason(error)}); possible: a place with room"
        ) from error
    print(f"{sum(len(directory.records) for directory in found)} records to {arguments.file}")


def reason(error: BaseException) -> str | None:
    """The system's, of what an error was made from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error.strerror if isinstance(error, OSError) else str(error)


EXPORTED = "possible: a file that compiler.records export wrote"


def import_(arguments: argparse.Namespace) -> None:
    root = arguments.records or user_root()
    with tempfile.TemporaryDirectory(prefix="records-") as scratch:
        try:
            with tarfile.open(arguments.file) as archive:
                archive.extractall(scratch, filter="data")
        except (tarfile.TarError, EOFError) as error:
            raise BuildError(f"{arguments.file}: not an exported file; {EXPORTED}") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise BuildError(
                    f"{scratch}: cannot unpack there ({error.strerror}); possible: TMPDIR on a "
                    "disk with room"
                ) from error
            raise BuildError(
                f"{arguments.file}: cannot be read ({error.strerror}); {EXPORTED}"
            ) from error
        if not (paths := store.find_directories(Path(scratch))):
            raise BuildError(f"{arguments.file}: no records; {EXPORTED}")
        try:
            sources = [store.read(path) for path in paths]
            if problems := [problem for source in sources for problem in source.problems]:
                raise RecordError(problems[0])
        except RecordError as error:
            problem = str(error).replace(scratch, str(arguments.file))
            raise BuildError(f"{problem}; nothing is imported") from error
        print(f"{add(sources, root)} records added to {root}")


def prune(arguments: argparse.Namespace) -> None:
    with ExitStack() as stack:
        paths = directories(arguments.path)
        if not arguments.dry_run:
            for path in paths:
                stack.enter_context(held(path))
        for directory in [read(path) for path in paths]:
            kept = [r for r in useful(directory) if r.race or not arguments.final]
            all_, bad = len(directory.records), len(directory.problems)
            dropped = all_ - len(kept)
            if (dropped or bad) and not arguments.dry_run:
                store.write(replace(directory, records=tuple(kept)), directory.path)
            aside = (
                f", {bad} line{'s' if bad > 1 else ''} set aside in *{store.DAMAGED}" if bad else ""
            )
            print(f"{dropped} of {all_} records dropped, {len(kept)} kept{aside}: {directory.path}")


def useful(directory: store.Directory) -> list[store.Record]:
    """The last race of each kernel, and what the search measured against the same default."""
    won = winners(directory)
    return [
        record
        for record in directory.records
        if record.result == store.OK
        and (record.key not in won or is_current(record, won[record.key]))
    ]


def is_current(record: store.Record, winner: store.Record) -> bool:
    same_default = record.version.split("-")[0] == winner.version.split("-")[0]
    return same_default and record.race in (0, winner.race)


def directories(root: Path) -> Sequence[Path]:
    """Of machines: this one, or those below a root; BuildError where there are none."""
    if (root / store.MACHINE).exists():
        return [root]
    if found := store.find_directories(root):
        return found
    raise BuildError(
        f"{root}: no records; possible: a root as compiler.tune writes it, or a machine's directory"
    )


def read(path: Path) -> store.Directory:
    """Bad lines are told, and left out of what is written anew."""
    directory = store.read(path)
    if directory.problems:
        print(f"compiler.records: {store.summary(directory)}", file=sys.stderr)
    return directory


def print_table(table: Table) -> None:
    wide = None if sys.stdout.isatty() else 240
    Console(width=wide).print(table, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
