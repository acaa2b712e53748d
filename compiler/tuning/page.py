"""Page: a report as tables (report.md), a plot (report.png) and all figures (report.json)."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from compiler.records import describe
from compiler.tuning.report import Row
from compiler.tuning.statistics import gain, spread
from compiler.tuning.transfer import Moved


def cell(times: dict[int, list[float]], rows: int) -> str:
    return f"{median(times[rows]) * 1e6:.0f} ± {100 * spread(times[rows]):.0f} %"


def table(rows: Sequence[Row], weigh: str) -> list[str]:
    lines = [
        "| op | shape | M | TVM's default, us | template default, us | tuned, us | gain "
        "| 99 % interval | chosen | from |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for m in row.task.rows(weigh):
            sizes = [cell(times, m) for times in (row.tvm, row.default)]
            if row.choice == row.task.default:  # nothing to be compared
                tuned = "the default | none | "
            else:
                of = gain(row.default[m], row.tuned[m])
                tuned = f"{cell(row.tuned, m)} | {of} | {of.low:.2f} to {of.high:.2f}"
            lines.append(
                f"| {row.task.op.name} | {row.task.shape} | {m} | {' | '.join(sizes)} "
                f"| {tuned} | {describe(row.choice)} | {row.origin} |"
            )
    return lines


def transfers(rows: Sequence[Row], weigh: str) -> list[str]:
    """A line a shape and pick, and how many of those from other shapes gain and lose."""
    names = [row.task.op.name for row in rows]
    rows = [row for row in rows if names.count(row.task.op.name) > 1]
    if not rows:
        return ["One shape an op: nothing to transfer."]
    if not any(row.moved for row in rows):
        return [
            f"Nothing besides the defaults was measured of these kernels for `--weigh {weigh}`: "
            "nothing to transfer. `python -m compiler.tune` measures other choices."
        ]
    lines, counts = [], {"quicker": 0, "slower": 0, "neither": 0, "not run": 0}
    for row in rows:
        for shape, moved in row.moved.items():
            cells, verdict = judge(row, moved, weigh)
            is_own = shape == row.task.shape
            counts[verdict] += not is_own
            whose = "itself" if is_own else shape
            what = " | ".join([row.task.op.name, row.task.shape, whose, describe(moved.choice)])
            lines.append(f"| {what} | {cells} |")
    return [
        "Each shape's choice, or, where that is the default, the quickest besides it that was "
        "measured, on its own shape and on the op's others, against the default there. "
        f"Of {sum(counts.values())} choices moved to another shape: "
        + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        + ".",
        "",
        "| op | run on | best for | choice | against the default here | 99 % interval |",
        "|---|---|---|---|---|---|",
        *lines,
    ]


def judge(row: Row, moved: Moved, weigh: str) -> tuple[str, str]:
    """(two cells, the verdict) of a pick against the default of the shape that it ran on."""
    if isinstance(moved.found, str):
        return f"{moved.found} |", "not run"
    default, costs = (row.task.costs(times, weigh) for times in (row.default, moved.found))
    of, back = gain(default, costs), gain(costs, default)
    verdict = "quicker" if of.is_real else "slower" if back.is_real else "neither"
    return f"{of} | {of.low:.2f} to {of.high:.2f}", verdict


def totals(rows: Sequence[Row]) -> list[str]:
    """All tuned kernels' calls in a step and in a prompt, from the medians."""
    lines = ["| | TVM's default, ms | template default, ms | tuned, ms |", "|---|---|---|---|"]
    for weigh, name in (("decode", "a decode step"), ("prefill", "a prompt of 128")):
        sums = [
            sum(
                row.task.seconds({m: median(seconds) for m, seconds in times(row).items()}, weigh)
                for row in rows
            )
            for times in (lambda r: r.tvm, lambda r: r.default, lambda r: r.tuned)
        ]
        lines.append(f"| {name} | " + " | ".join(f"{1e3 * s:.2f}" for s in sums) + " |")
    return lines


def bench_table(found: dict[str, list]) -> list[str]:
    """tokens/s: medians of the turns, and the gain of turns side by side."""
    lines = [
        "| test | template default, tokens/s | tuned, tokens/s | gain | 99 % interval |",
        "|---|---|---|---|---|",
    ]
    names = [row["test"] for row in found["default"][0]]
    for i, name in enumerate(names):
        cells, times = [], []
        for build in ("default", "tuned"):
            speeds = [turn[i]["tokens_per_second"] for turn in found[build]]
            cells.append(f"{median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f})")
            times.append([1 / speed for speed in speeds])
        of = gain(*times)
        cells += [str(of), f"{of.low:.2f} to {of.high:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def write(
    directory: Path, title: str, rows: Sequence[Row], weigh: str, benched: dict | None
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    whole = bench_table(benched) if benched else ["No weights: only kernels are measured."]
    lines = [
        f"# Tuning: {title}",
        "",
        f"{time.strftime('%Y-%m-%d')}. Cold weights; medians of interleaved rounds ± half of the "
        "range between the quartiles; TVM's default apart. A gain is of the template's default, "
        "by M; transfer weighs them together.",
        "",
        *table(rows, weigh),
        "",
        "## The model: sum of these kernels' calls",
        "",
        *totals(rows),
        "",
        "## The model, run",
        "",
        *whole,
        "",
        "## Transfer from shape to shape",
        "",
        *transfers(rows, weigh),
        "",
    ]
    path = directory / "report.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    figures = [
        {
            "op": row.task.op.name,
            "sizes": dict(row.task.sizes),
            "chosen": describe(row.choice),
            "from": row.origin,
            "seconds": {"tvm": row.tvm, "default": row.default, "tuned": row.tuned},
            "transfers": {
                shape: {"choice": describe(moved.choice), "seconds": moved.found}
                for shape, moved in row.moved.items()
            },
        }
        for row in rows
    ]
    content = {"title": title, "kernels": figures, "bench": benched}
    (directory / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plot(directory / "report.png", title, rows, weigh)
    return path


def plot(path: Path, title: str, rows: Sequence[Row], weigh: str) -> None:
    """Speed relative to the template's default, a panel for each M; whiskers: the quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = sorted({m for row in rows for m in row.task.rows(weigh)})
    figure, panels = pyplot.subplots(
        len(counts), 1, figsize=(9, 1.5 + 2.6 * len(counts)), squeeze=False
    )
    for panel, m in zip(panels[:, 0], counts, strict=True):
        here = [row for row in rows if m in row.task.rows(weigh)]
        bars = (("TVM's default", "tvm"), ("template default", "default"), ("tuned", "tuned"))
        for offset, (label, name) in enumerate(bars):
            times = [getattr(row, name)[m] for row in here]
            base = [median(row.default[m]) for row in here]
            height = [b / median(t) for b, t in zip(base, times, strict=True)]
            whisker = [h * spread(t) for h, t in zip(height, times, strict=True)]
            at = [i + 0.27 * (offset - 1) for i in range(len(here))]
            panel.bar(at, height, 0.25, yerr=whisker, label=label)
        names = [f"{row.task.op.name}\n{row.task.shape}" for row in here]
        panel.set_xticks(range(len(here)), names, fontsize=6)
        panel.set_ylabel(f"speed at M = {m},\ndefault = 1", fontsize=8)
        panel.axhline(1, color="black", linewidth=0.5)
    panels[0, 0].legend(fontsize=7)
    panels[0, 0].set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
