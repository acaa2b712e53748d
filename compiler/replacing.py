"""A directory that is written beside another takes its place in one step, or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OLD = ".old"  # the suffix of what was there, meanwhile


@contextmanager
def taking_the_place_of(destination: Path, new: Path) -> Iterator[None]:
    """`new` becomes `destination` when the block ends without an exception; else it is removed and
    what was there stays."""
    old = new.with_suffix(OLD)
    try:
        yield
        new.chmod(0o755)  # mkdtemp's is private
        try:
            if destination.exists():
                destination.rename(old)
            new.rename(destination)
        except BaseException:  # an interrupt, too
            if old.exists() and not destination.exists():
                old.rename(destination)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
