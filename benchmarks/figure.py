"""The ratios in one figure: a row of panels for each suite, a panel for each tree."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks import report, results
from benchmarks.report import Section
from benchmarks.results import Row

TITLES = {
    "step": "AdamW step, over the\nsame without clipping",
    "alone": "The clip alone,\nover the limit",
    "compile": "Trace and compile,\nover Optax's global",
}
COLOURS = {"float32": "#0072b2", "bfloat16": "#d55e00", "mixed": "#009e73"}
NAMES = {"float32": "float32", "bfloat16": "bfloat16", "mixed": "bfloat16 gradients, float32 parameters"}
OTHERS = ("optax", "torch")
LIMITS = ("c_loop", "copy", "identity", "torch_none")
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
WIDTH = 1200  # pixels, of a figure with all trees
WIDE = 7  # inches, with room for the legend in one line
NARROWEST = 0.7, 2.0  # what each axis shows at least


def draw(rows: Sequence[Row], environment: Mapping[str, Any]) -> Figure:
    """The figure: dots are medians, lines go from the lower quartile to the upper.

    Filled dots are of gradients that are clipped, hollow ones of gradients that need nothing.
    """
    found = {suite: _sections(suite, rows) for suite in TITLES}
    found = {suite: parts for suite, parts in found.items() if parts}
    trees = list(dict.fromkeys(part.head[0] for parts in found.values() for part in parts))
    lines = {suite: _names(parts) for suite, parts in found.items()}
    heights = [len(names) + 2 for names in lines.values()]
    size = max(1.4 * len(trees) + 1.6, 5), 0.21 * sum(heights) + 1.1
    figure = Figure(figsize=size, dpi=min(WIDTH / size[0], 120), layout="constrained")
    if not found:
        return figure
    panels = figure.subplots(len(found), len(trees), squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, (suite, parts) in zip(panels, found.items(), strict=True):
        for panel, tree in zip(line, trees, strict=True):
            own = [
                part for part in parts if part.head[0] == tree and part.head[2] not in ("trace", "compile")
            ]
            _panel(panel, lines[suite], own)
            panel.set_xlim(*_limits([part for part in parts if part.baseline in {x.baseline for x in own}]))
            _grid(panel, lines[suite])
            panel.set_title(_title(tree, own), fontsize=8)
        _label(line[0], lines[suite], TITLES[suite])
    _legend(figure, {part.head[1] for parts in found.values() for part in parts})
    figure.suptitle(_place(environment), fontsize=8)
    return figure


def _sections(suite: str, rows: Sequence[Row]) -> list[Section]:
    """The sections of ratios over what all in a panel are over; PyTorch's steps are over its own."""
    parts = [part for part in report.sections(suite, rows) if part.baseline is not None]
    if suite != "step":
        return parts
    theirs = {part.head: part.rows for part in parts if part.baseline == "torch_none"}
    found = []
    for part in parts:
        if part.baseline not in results.BESIDE:
            own = {name: row for name, row in part.rows.items() if not name.startswith("torch_")}
            found.append(part._replace(rows=own | theirs.get(part.head, {})))
    return found


def _names(parts: Sequence[Section]) -> list[str]:
    """The methods to show, in their usual order."""
    shown = {name for part in parts for name in part.rows if name not in LIMITS}
    return [name for name in report.COLUMNS if name in shown]


def _panel(panel: Axes, names: Sequence[str], parts: Sequence[Section]) -> None:
    panel.set_visible(bool(parts))
    panel.set_xscale("log")
    panel.set_ylim(len(names) - 0.4, -0.6)
    for part, shift in zip(parts, _shifts(len(parts)), strict=True):
        _, dtype, case = part.head
        colour = COLOURS[dtype]
        for place, name in enumerate(names):
            row = part.rows.get(name)
            if row is None or row.ratio is None:
                continue
            ratio = row.ratio
            fill = "white" if case == "idle" else colour
            spread = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
            panel.errorbar(
                ratio.median, place + shift, xerr=spread, color=colour, marker="o", markersize=2.8,
                markerfacecolor=fill, markeredgewidth=0.7, elinewidth=0.8, zorder=3,
            )  # fmt: skip


def _limits(parts: Sequence[Section]) -> tuple[float, float]:
    """Of the axes of all panels whose ratios are over the same."""
    rows = (row for part in parts for name, row in part.rows.items() if name not in LIMITS)
    medians = [row.ratio.median for row in rows if row.ratio is not None]
    return min([NARROWEST[0], *medians]) / 1.15, max([NARROWEST[1], *medians]) * 1.15


def _shifts(count: int) -> list[float]:
    """Where dots of one line are, so that none hides another."""
    return [0.7 * ((k + 0.5) / count - 0.5) for k in range(count)]


def _grid(panel: Axes, names: Sequence[str]) -> None:
    panel.axvline(1, color="0.35", linewidth=0.8, zorder=1)
    for place, name in enumerate(names):
        if name.startswith(OTHERS):
            panel.axhspan(place - 0.5, place + 0.5, color="0.93", zorder=0)
    low, high = panel.get_xlim()
    panel.set_xticks([tick for tick in TICKS if low <= tick <= high])
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(axis="x", color="0.85", linewidth=0.5)
    panel.set_axisbelow(True)
    panel.set_yticks([])
    panel.tick_params(labelsize=7.5, length=2)
    panel.spines[["top", "right", "left"]].set_visible(False)


def _label(panel: Axes, names: Sequence[str], title: str) -> None:
    """The methods, at the first panel of a line, which is shown even if it has no dots."""
    panel.set_visible(True)
    panel.set_yticks(range(len(names)), names)
    panel.tick_params(axis="y", length=0)
    panel.set_ylabel(title, fontsize=8)


def _title(tree: str, parts: Sequence[Section]) -> str:
    limits = {part.baseline for part in parts} & set(LIMITS)
    return tree + (f"\nover {limits.pop()}" if limits else "")


def _legend(figure: Figure, dtypes: set[str]) -> None:
    shown = [
        Line2D([], [], color=colour, marker="o", markersize=3.5, linewidth=1, label=NAMES[dtype])
        for dtype, colour in COLOURS.items()
        if dtype in dtypes
    ]
    for label, fill in (("clips", "0.3"), ("nothing to clip", "white")):
        shown.append(
            Line2D(
                [],
                [],
                color="0.3",
                marker="o",
                markersize=3.5,
                markerfacecolor=fill,
                linewidth=0,
                label=label,
            )
        )
    columns = len(shown) if figure.get_figwidth() > WIDE else 2
    figure.legend(handles=shown, loc="outside lower center", ncols=columns, fontsize=7.5, frameon=False)


def _place(environment: Mapping[str, Any]) -> str:
    names = ("device", "cores", "jax", "optax", "date")
    return ", ".join(f"{name} {environment[name]}" for name in names if name in environment)
