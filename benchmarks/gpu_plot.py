"""Draw what benchmarks/gpu.py measured: times of ours and of the rivals, group by group.

    python -m benchmarks.gpu_plot                                benchmarks/gpu.json
    python -m benchmarks.gpu_plot FILE.json -o docs/results/gpu.png

Needs matplotlib.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_line import Parser

MEASURED = Path("benchmarks/gpu.json")
DRAWN = Path("docs/results/gpu.png")
COLUMNS = 2
OURS, PUBLISHED = "ours", "Microsoft's, published"


def times(row: dict[str, Any]) -> dict[str, float]:
    """Engine -> us of one row of the file."""
    found = {OURS: row["us"]}
    found |= {name: timing["us"] for name, timing in row["rivals"].items()}
    if "published_us" in row:
        found[PUBLISHED] = row["published_us"]
    return found


def draw(measured: dict[str, Any], output: Path) -> None:
    """One panel of horizontal bars for each group, of microseconds."""
    from matplotlib.figure import Figure

    groups: dict[str, list[dict]] = {}
    for row in measured["rows"]:
        groups.setdefault(row["group"], []).append(row)
    lines = math.ceil(len(groups) / COLUMNS)
    figure = Figure(figsize=(15, 4.5 * lines), layout="constrained")
    figure.suptitle(f"{measured['device']}, {measured['date']}, commit {measured['commit']}")
    for place, (group, rows) in enumerate(groups.items(), 1):
        axes = figure.add_subplot(lines, COLUMNS, place)
        names = list(dict.fromkeys(name for row in rows for name in times(row)))
        height = 0.8 / len(names)
        for number, name in enumerate(names):
            at = [y for y, row in enumerate(rows) if name in times(row)]
            width = [times(rows[y])[name] for y in at]
            bars = axes.barh([y + number * height for y in at], width, height, label=name)
            axes.bar_label(bars, fmt="%.3g", fontsize="x-small", padding=2)
        axes.set(title=group, xlabel="us")
        axes.margins(x=0.08)
        middle = height * (len(names) - 1) / 2
        axes.set_yticks([y + middle for y in range(len(rows))], [row["name"] for row in rows])
        axes.invert_yaxis()
        axes.legend(fontsize="small")
    figure.savefig(output, dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").split("\n")[0]
    parser = Parser(prog="python -m benchmarks.gpu_plot", description=summary)
    parser.add_argument("file", type=Path, nargs="?", default=MEASURED)
    parser.add_argument("-o", "--output", type=Path, default=DRAWN, metavar="PNG")
    args = parser.parse_args(argv)
    try:
        draw(json.loads(args.file.read_text(encoding="utf-8")), args.output)
    except (OSError, ValueError, KeyError) as error:
        parser.error(
            f"cannot draw {args.file}: {error}; possible: a file that benchmarks.gpu wrote"
        )
    except ImportError as missing:
        parser.error(f"{missing}; possible: pip install matplotlib")
    print(args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
