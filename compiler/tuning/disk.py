"""Disk: files of records written whole or not at all, and by one process at a time.

held          a directory for this process alone
append        all lines or none
write_whole   a file replaced in one step
staged        a directory replaced in one step
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from compiler.config import BuildError
from compiler.replacing import OLD, taking_the_place_of

ELSEWHERE = "possible: a place with room that may be written to"
NEW = ".new"  # the suffix of what is to take a directory's place


class RecordError(BuildError):
    """Records that cannot be read or written; the message is one line."""


@contextmanager
def held(path: Path) -> Iterator[None]:
    """RecordError where another process holds `path`, a machine's directory.

    The lock is flock's, of a file beside the directory, as that is replaced as a whole. The system
    ends it with the process, however that ends.
    """
    lock = path.with_name(f".{path.name}.lock")
    handle = take(lock, path)
    try:
        recover(path)
        yield
    finally:
        lock.unlink(missing_ok=True)  # still held: whoever opened it meanwhile sees that it is gone
        os.close(handle)


def take(lock: Path, path: Path) -> int:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise RecordError(
                f"{path}: cannot write there ({error.strerror}); possible: another directory"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(lock, handle):
                return handle
        except BlockingIOError as error:
            os.close(handle)
            raise RecordError(
                f"{path}: another compiler.tune or compiler.records writes there; "
                "possible: again when that is done"
            ) from error
        except OSError as error:
            os.close(handle)
            raise RecordError(
                f"{path}: cannot be locked ({error.strerror}); possible: another file system"
            ) from error
        os.close(handle)  # the one that held it removed it meanwhile


def is_at(path: Path, handle: int) -> bool:
    """Whether an open file is the one of this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def recover(path: Path) -> None:
    """Undoes what a process left that was killed in `staged`."""
    for left in path.parent.iterdir():
        if left.stem.rpartition(".")[0] != f".{path.name}":
            continue
        if left.suffix == OLD and not path.exists():
            left.rename(path)
        elif left.suffix in (OLD, NEW):
            shutil.rmtree(left)


def read_lines(path: Path) -> list[str]:
    """Empty where the file is missing. What is not UTF-8 is escaped, by which JSON it is none."""
    try:
        text = path.read_bytes().decode("utf-8", "backslashreplace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from error
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


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


def write_whole(path: Path, text: str) -> None:
    """Replaces the file in one step, or leaves it as it was."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise RecordError(f"{path}: cannot write ({error.strerror}); {ELSEWHERE}") from error
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's is private
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise RecordError(
            f"{path}: cannot write ({error.strerror}); it is as it was; {ELSEWHERE}"
        ) from error


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A new directory that takes the place of `path` when the block ends without an exception."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=NEW, dir=path.parent))
    except OSError as error:
        raise RecordError(
            f"{path}: cannot write beside it ({error.strerror}); {ELSEWHERE}"
        ) from error
    with taking_the_place_of(path, stage):
        try:
            yield stage
        except RecordError as error:  # in the words of who asked
            raise RecordError(str(error).replace(str(stage), str(path))) from error
