"""Draw what benchmarks/gpu.py measured: times of ours and of the rivals, group by group.

    python -m benchmarks.gpu_plot                                benchmarks/gpu.json
    python -m benchmarks.gpu_plot FILE.json -o docs/results/gpu.png

Needs matplotlib.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import Parser

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURED = Path("benchmarks/gpu.json")
DRAWN = Path("docs/results/gpu.png")
COLUMNS = 2
OURS, PUBLISHED = "ours", "Microsoft's, published"


def times(row: dict[str, Any]) -> dict[str, float]:
    """Engine -> us of one row of the file."""
    found = {OURS: row["us"]}
    found |= {name: timing["us"] for name, timing in row.get("rivals", {}).items()}
    if "published_us" in row:
        found[PUBLISHED] = row["published_us"]
    return found


def by_shape(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows named 'SHAPE M=tokens ...' by their shape."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["name"].split(" M=")[0], []).append(row)
    return found


def tokens(row: dict[str, Any]) -> int:
    return int(row["name"].split(" M=")[1].split()[0])


def curves(axes: Any, rows: list[dict]) -> None:
    """TOPS against tokens."""
    sizes = [tokens(row) for row in rows]
    for name in dict.fromkeys(name for row in rows for name in times(row)):
        of_engine = [row for row in rows if name in times(row)]
        tops = [row["tops"] * row["us"] / times(row)[name] for row in of_engine]
        axes.plot([tokens(row) for row in of_engine], tops, "o-", label=name)
    axes.set(xscale="log", xlabel="tokens", ylabel="TOPS")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)


def number(us: float) -> str:
    return f"{us:.3g}" if us < 1000 else f"{us:.0f}"


def batches(axes: Any, rows: list[dict]) -> None:
    """Time over that of one token, of the shapes that have one here."""
    for shape, of_shape in by_shape(rows).items():
        us = {tokens(row): row["us"] for row in of_shape}
        if 1 in us and len(us) > 1:
            axes.plot(list(us), [x / us[1] for x in us.values()], "o-", label=shape)
    axes.axhline(1.5, color="gray", linestyle=":")
    axes.set(xscale="log", xlabel="tokens", ylabel="time over one token's")
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.minorticks_off()


def bars(axes: Any, rows: list[dict]) -> None:
    """Microseconds, horizontally."""
    names = list(dict.fromkeys(name for row in rows for name in times(row)))
    height = 0.8 / len(names)
    for place, name in enumerate(names):
        at = [y for y, row in enumerate(rows) if name in times(row)]
        width = [times(rows[y])[name] for y in at]
        drawn = axes.barh([y + place * height for y in at], width, height, label=name)
        axes.bar_label(drawn, fmt=number, fontsize="x-small", padding=2)
    axes.set_xlabel("us")
    axes.margins(x=0.08)
    middle = height * (len(names) - 1) / 2
    axes.set_yticks([y + middle for y in range(len(rows))], [row["name"] for row in rows])
    axes.invert_yaxis()


def model_panels(measured: dict[str, Any]) -> Iterator[tuple[str, list[dict]]]:
    """Of a whole model, where one was measured: (title, rows)."""
    if step := measured.get("step"):
        rows = [
            {"name": f"{kind['a_step']} x {kind['name']}"[:40], "us": kind["us_a_step"]}
            for kind in step["kinds"]
        ]
        yield f"decode step at {step['context']}: {step['us']:.0f} us", rows
    if prompts := measured.get("prefill"):
        yield (
            "prefill, whole model",
            [
                {
                    "name": f"{row['prompt']} tokens",
                    "us": row["ours_ms"] * 1e3,
                    "rivals": {"PyTorch bf16, compiled": {"us": row["bf16_ms"] * 1e3}},
                }
                for row in prompts
            ],
        )


def draw(measured: dict[str, Any]) -> "Figure":
    """A panel for each group, of bars; batches over one token's time, gemm by shape. ValueError
    where nothing was timed."""
    from matplotlib.figure import Figure

    groups: dict[str, list[dict]] = {}
    for row in measured["rows"]:
        groups.setdefault(row["group"], []).append(row)
    panels: list[tuple[Callable, str, list[dict]]] = []
    one_token, more = groups.pop("gemv", []), groups.pop("batch", [])
    for panel, title, rows in (
        (bars, "one token", one_token),
        (batches, "few tokens", one_token + more if more else []),
    ):
        for bits in ("int8", "int4"):
            of_bits = [row for row in rows if row["name"].endswith(bits)]
            panels += [(panel, f"{title}, {bits}", of_bits)] if of_bits else []
    panels += [(bars, group, rows) for group, rows in groups.items() if group != "gemm"]
    for shape, rows in by_shape(groups.get("gemm", [])).items():
        panels.append((curves, f"gemm {shape}", rows))
    panels += [(bars, title, rows) for title, rows in model_panels(measured)]
    if not panels:
        raise ValueError("it has no timings")
    lines = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(15, 4.5 * lines), layout="constrained")
    dated = f", {measured['date']}" if "date" in measured else ""  # of kernels, not of a model
    figure.suptitle(f"{measured['device']}{dated}, commit {measured['commit']}")
    for place, (panel, title, rows) in enumerate(panels, 1):
        axes = figure.add_subplot(lines, COLUMNS, place)
        panel(axes, rows)
        axes.set_title(title)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(fontsize="small")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").split("\n")[0]
    parser = Parser(prog="python -m benchmarks.gpu_plot", description=summary)
    parser.add_argument("file", type=Path, nargs="?", default=MEASURED)
    parser.add_argument("-o", "--output", type=Path, default=DRAWN, metavar="PNG")
    args = parser.parse_args(argv)
    try:
        figure = draw(json.loads(args.file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, LookupError) as error:
        parser.error(
            f"cannot draw {args.file}: {error}; possible: a file that benchmarks.gpu wrote"
        )
    except ImportError as missing:
        parser.error(f"{missing}; possible: pip install matplotlib")
    try:
        figure.savefig(args.output, dpi=100)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        parser.error(f"cannot write {args.output}: {error}; possible: another -o, as x.png")
    print(args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
