"""BuildConfig: what is asked of one build."""

from dataclasses import dataclass
from pathlib import Path

DEFAULT_MODEL = "novels-42m"
NO_RECORDS = "none"  # every kernel at its default


class BuildError(ValueError):
    """A build that cannot be done; the message is one line: asked, found, possible."""


@dataclass(frozen=True)
class BuildConfig:
    model: str = DEFAULT_MODEL  # a shipped model's name, or a checkpoint directory
    target: str = "native"  # a row of schedules/targets.py, native, or cuda
    output: Path | None = None  # default: dist/<model>-<target>
    debug_dump: Path | None = None  # where the IR between phases is written
    head_bits: int | None = None  # of the head's table; default: compiler/head_bits.py
    records: str | None = None  # tuning records to look into first, or NO_RECORDS
