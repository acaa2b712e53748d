"""Whether builds take the tuning records that ship; exit code 1 where they are of other kernels.

    python tests/release/shipped_records.py

To be run before a release, on any machine: an edit of a kernel makes its records those of another,
which a build passes over, until `compiler.tune` has run again on a machine of that kind.
"""

import sys

from compiler import head_bits
from compiler.kernels import KernelTable
from compiler.tuning.lookup import SHIPPED, Lookup
from compiler.tuning.tasks import extract
from model.config import MODELS
from schedules import targets

MODEL = MODELS["bitnet-b1.58-2b-4t"].with_variant("a4.8")  # whose shapes are tuned


def check(target: targets.TargetSpec) -> bool:
    """Prints a line a kernel: where its choice comes from."""
    lookup = Lookup(target, (SHIPPED,))
    table = KernelTable(target, lookup)
    model = MODEL.replace(head_bits=head_bits.choose(None, MODEL, target))
    origins = []
    for task in extract(model, target):
        table.choose(task.op.name, task.folder, task.sizes, task.make)
        origins.append(table.origin(task.op.name, task.sizes))
        print(f"{target.name}  {task.op.name}  {task.shape}  {origins[-1]}", flush=True)
    for note in lookup.notes:
        print(f"{target.name}  {note}")
    return not lookup.notes and "default" not in origins


def main() -> int:
    rows = [targets.find(folder.name) for folder in sorted(SHIPPED.iterdir()) if folder.is_dir()]
    return 0 if all([check(row) for row in rows]) else 1


if __name__ == "__main__":
    sys.exit(main())
