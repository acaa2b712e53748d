"""Which cases of a kernel's tables run: all on this host's best row, a share on the others.

Every test keeps at least one case on every row; which ones is fixed by their names. `--every-case`
runs all, as `make test-all` does: on two cores that takes half an hour, most of it emulated ARM.
"""

import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterable

from schedules.targets import TARGETS, CpuTarget, find
from tests.schedules.compiled import is_emulated

EMULATED_SHARE, OTHER_SHARE = 12, 6  # one case in so many


def pytest_collection_modifyitems(config, items):
    if config.getoption("--every-case"):
        return
    rows = {item: row_of(item) for item in items}
    cases = [((item.path, item.originalname, rows[item]), item.name) for item in items]
    wanted = choose(cases, lambda group: share_of(group[0].name, group[2]))
    kept, left = [], []
    for item, case in zip(items, cases, strict=True):
        (kept if case in wanted else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def row_of(item) -> str | None:
    params = getattr(item, "callspec", None)
    target = params.params.get("target", params.params.get("target_name")) if params else None
    return target if isinstance(target, str) or target is None else target.name


def share_of(file: str, name: str | None) -> int:
    row = TARGETS.get(name or "")
    if not isinstance(row, CpuTarget) or row.name == find("native").name:
        return 1
    if is_emulated(row):
        return EMULATED_SHARE
    return 1 if file == "test_knobs.py" else OTHER_SHARE  # one case a family as it is


def choose(cases: Iterable[tuple[Hashable, str]], share) -> set[tuple[Hashable, str]]:
    """(group, name) of one case in share(group), rounded up, of each group."""
    groups = defaultdict(list)
    for group, name in cases:
        groups[group].append(name)
    return {
        (group, name)
        for group, names in groups.items()
        for name in sorted(names, key=lambda name: zlib.crc32(name.encode()))[
            : -(-len(names) // share(group))
        ]
    }
