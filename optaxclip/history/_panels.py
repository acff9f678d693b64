"""The four panels of a figure: each function draws one into axes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from optaxclip.history._tables import printable
from optaxclip.history._thin import Thin, drawable, largest_of, rows_in_sight

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#D55E00")
LINE, LOSS, BAD, AFTER = "#0072B2", "#E69F00", "#D55E00", "#009E73"
LIMITS = ("#000000", "#CC79A7", "#009E73", "#56B4E9")
HATCHED = {"facecolor": "0.9", "hatch": "////", "edgecolor": "0.6", "linewidth": 0}
NAME, NAMES = 26, 30  # characters of a name; names beside the heat map
ABREAST = 4  # entries of a legend beside each other
LEAST_BINS, MOST_BINS = 10, 80  # of the histogram, which has as many as the norms ask for between these
MARKS = 150  # crosses beyond these would hide what they mark


class Mark(NamedTuple):
    """A limit of the whole norm: a number, or one for each update."""

    name: str
    value: np.ndarray


class Counted(NamedTuple):
    """Norms for a histogram: its title, the norms, what they are of, and what each stands for."""

    title: str
    values: np.ndarray
    what: str
    each: str


class Shown(NamedTuple):
    """What all panels draw.

    Attributes:
      history: the recording.
      data: what fits of it.
      limits: limits of the whole norm.
      interval: the bounds of the advised limit, if that is known.
      after: the norm of the whole after the advised clipping, if that is not a limit of the whole.
      histogram: what is counted in the histogram.
      marks: the limits in it.
    """

    history: Any
    data: Thin
    limits: list[Mark]
    interval: tuple[float, float] | None
    after: np.ndarray | None
    histogram: Counted
    marks: list[Mark]


def heat_map(axes: "Axes", shown: Shown) -> None:
    """Heat map, row by update."""
    from matplotlib.colors import LogNorm

    data, history = shown.data, shown.history
    norms, bad, first = rows_in_sight(data)
    seen = norms[norms > 0]
    # What is nearly zero must not take the colours away from the rest.
    low, high = np.percentile(seen, (1, 100)) if seen.size else (0.1, 1)
    scale = LogNorm(low, max(high, 2 * low))
    rows = np.arange(len(first) + 1) - 0.5
    values = np.ma.array(np.where(norms > 0, norms, low / 2), mask=bad)
    axes.patch.set(**HATCHED)
    mesh = axes.pcolormesh(data.edges, rows, values.T, norm=scale, cmap="viridis", rasterized=True)
    bar = axes.figure.colorbar(mesh, ax=axes, extend="min", pad=0.01)
    bar.set_label(f"norm of a group ({history.norm})" if seen.size else "all are zero or not finite")
    if not seen.size:
        bar.set_ticks([])
    unknown = np.isnan(norms).all(axis=1) & ~bad.any(axis=1)
    for k in np.flatnonzero(unknown):
        axes.axvspan(data.edges[k], data.edges[k + 1], color="white", lw=0)
    if bad.any():
        _cross(axes, data.edges, bad)
    ticks = np.arange(0, len(first), -(-len(first) // NAMES))
    axes.set_yticks(ticks, [_label(data, first[k]) for k in ticks], fontsize=7, parse_math=False)
    axes.set_ylim(rows[-1], rows[0])
    prefix = _prefix(data.names)
    axes.set_ylabel(
        f"{data.how or 'group'}{' in ' * bool(prefix)}{printable(prefix, NAME)}", parse_math=False
    )
    said = [f"Norm of each {'layer' if data.how else 'group'}"]
    said += ["neighbours together: the largest"] * (len(first) < len(data.names))
    said += ["not all are named"] * (len(ticks) < len(first))
    said += ["blank: not kept"] * bool(unknown.any())
    _titled(axes, "; ".join([*said, *["hatched: not finite"] * bool(bad.any())]), data)


def _cross(axes: "Axes", edges: np.ndarray, bad: np.ndarray) -> None:
    """Crosses where rows stop being finite, or where each first does if that is too often."""
    starts = bad & ~np.roll(bad, 1, axis=0)
    starts[0] = bad[0]
    if starts.sum() > MARKS:
        starts = bad & (np.cumsum(bad, axis=0) == 1)
    column, row = np.nonzero(starts)
    axes.plot(((edges[:-1] + edges[1:]) / 2)[column], row, "x", color=BAD, ms=5, mew=1.5, clip_on=False)


def _label(data: Thin, row: int) -> str:
    return printable(data.names[row].removeprefix(_prefix(data.names)), NAME)


def _prefix(names: Sequence[str]) -> str:
    """The keys that all names begin with."""
    first, last = min(names).split("/"), max(names).split("/")
    same = 0
    while same < min(len(first), len(last)) - 1 and first[same] == last[same]:
        same += 1
    return "".join(f"{key}/" for key in first[:same])


def _titled(axes: "Axes", title: str, data: Thin) -> None:
    """What panels over updates share."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    many = f" (columns of up to {data.longest:,}: the largest)" if data.longest > 1 else ""
    axes.set(xlabel=f"update{many}", xlim=(data.edges[0], data.edges[-1]))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)


def whole(axes: "Axes", shown: Shown) -> None:
    """The norm of the whole, its limits, and the loss."""
    data, history = shown.data, shown.history
    handles, names = [], []

    def add(handle: Any, name: str) -> None:
        handles.append(handle)
        names.append(name)

    for mark, colour in zip(shown.limits, _colours(len(shown.limits)), strict=True):
        line = _columns(mark.value, data) if mark.value.ndim else drawable(mark.value)
        add(_stairs(axes, line, data, color=colour, ls="--", lw=1.3, zorder=4), mark.name)
    if shown.interval is not None and shown.after is None:
        add(axes.axhspan(*shown.interval, color="0.5", alpha=0.25, lw=0), "its interval")
    exact = np.where(np.arange(len(data.whole)) < data.earlier, np.nan, data.whole)
    if data.earlier:
        add(_stairs(axes, data.whole, data, color=LINE, alpha=0.4, lw=1), "norm, at most")
    add(_stairs(axes, exact, data, color=LINE, lw=1.2), "norm")
    if shown.after is not None:
        after = _columns(shown.after, data)
        add(_stairs(axes, after, data, color=AFTER, lw=1.2), "after the advised clipping")
    _log(axes, data.whole, "y")
    if data.bad.any():
        add(_bad_columns(axes, data), "not finite")
    axes.set_ylabel(f"norm of the whole ({history.norm})", parse_math=False)
    if data.loss is not None and np.isfinite(data.loss).any():
        other = axes.twinx()
        add(_stairs(other, data.loss, data, color=LOSS, lw=1), "loss")
        other.set_ylabel("loss")
        other.tick_params(axis="y", which="both", colors="#8a5f00")
        seen = data.loss[np.isfinite(data.loss)]
        if seen.min() > 0 and seen.max() > 100 * seen.min():
            other.set_yscale("log")
        axes.set_zorder(other.get_zorder() + 1)
        axes.patch.set_visible(False)
    _titled(axes, "Norm of the whole" + " and loss" * ("loss" in names), data)
    _legend_above(axes, handles, names)


def _stairs(axes: "Axes", values: np.ndarray, data: Thin, **style: Any) -> Any:
    """A line that has a level in each column, so that a single one can be seen."""
    values = np.broadcast_to(values, len(data.edges) - 1)
    values = np.where(np.isfinite(values), values, np.nan)
    return axes.stairs(values, data.edges, baseline=None, **style)


def _columns(values: np.ndarray, data: Thin) -> np.ndarray:
    """The largest in each column of what is known for each recorded update."""
    return np.concatenate([np.full(data.earlier, np.nan), drawable(largest_of(values, data.begins))])


def _bad_columns(axes: "Axes", data: Thin) -> Any:
    bad = data.bad.any(axis=1)
    change = np.flatnonzero(np.diff(np.concatenate([[0], bad, [0]])))
    begin, end = data.edges[change[::2]], data.edges[change[1::2]]
    spans = list(zip(begin.tolist(), (end - begin).tolist(), strict=True))
    style = HATCHED | {"linewidth": 0.8, "zorder": 0}
    made = axes.broken_barh(spans, (0, 1), transform=axes.get_xaxis_transform(), **style)
    middle = (begin + data.edges[change[::2] + 1]) / 2
    top = axes.get_xaxis_transform()
    axes.plot(middle, np.ones(len(middle)), "x", color=BAD, transform=top, clip_on=False)
    return made


def _log(axes: "Axes", values: np.ndarray, which: str) -> None:
    """A log scale, if there is anything to show on one."""
    if (values[np.isfinite(values)] > 0).any():
        axes.set(**{f"{which}scale": "log"})


def _colours(count: int) -> list[str]:
    return [LIMITS[k % len(LIMITS)] for k in range(count)]


def shares(axes: "Axes", shown: Shown) -> None:
    """Who dominates: what the foremost rows make up of the whole."""
    data, norm = shown.data, shown.history.norm
    stacked = norm not in ("linf", "spectral")
    means = np.nansum(data.shares, axis=0)
    base, handles, names = np.zeros(len(data.shares)), [], []
    for k, colour in zip(sorted(data.top, key=lambda k: -means[k]), COLOURS, strict=False):
        share = data.shares[:, k]
        under = base if stacked else None
        level = axes.stairs(base + share, data.share_edges, color=colour, baseline=under, fill=stacked)
        handles.append(level)
        base = base + share if stacked else base
        names.append(_label(data, k))
    others = len(data.names) - len(names)
    if others and stacked:
        ones = np.where(np.isnan(base), np.nan, 1)
        handles.append(axes.stairs(ones, data.share_edges, baseline=base, fill=True, color="0.8"))
        names.append(f"{others:,} other{'' if others == 1 else 's'}")
    axes.stairs(np.isnan(data.shares).any(axis=1), data.share_edges, fill=True, **HATCHED)
    axes.set_ylim(0, 1)
    axes.set_ylabel(f"share of the {'squared norm' if norm in ('l2', 'rms') else 'norm'}")
    many = len(shown.history) > len(data.shares)
    title = "Who dominates" + f", last {len(shown.history):,} updates" * bool(data.earlier)
    _titled(axes, title + ", in the largest update of each column" * many, data)
    axes.set(xlabel="update", xlim=(data.share_edges[0], data.share_edges[-1]))
    _legend(axes, handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5))


def histogram(axes: "Axes", shown: Shown) -> None:
    """How often the norm had which size."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    title, values, what, each = shown.histogram
    seen = drawable(values[np.isfinite(values) & (values > 0)])
    handles, names = [], []
    if seen.size:
        logs = np.log2(seen)
        counts, edges = np.histogram(logs, _bins(logs))
        axes.stairs(counts, 2.0**edges, fill=True, color=LINE, alpha=0.8, baseline=0.5)
        axes.set(xscale="log", yscale="log", ylim=(0.5, None))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for mark, colour in zip(shown.marks, _colours(len(shown.marks)), strict=True):
        at = float(np.median(mark.value))
        if not np.isfinite(at):
            continue
        handles.append(axes.axvline(at, color=colour, ls="--", lw=1.3))
        names.append(mark.name + ", median" * bool(mark.value.ndim))
    if shown.interval is not None:
        handles.append(axes.axvspan(*shown.interval, color="0.5", alpha=0.25, lw=0))
        names.append("its interval")
    left_out = values.size - seen.size
    notes = f"; {left_out:,} zero or not finite" if left_out else ""
    axes.set_title(f"{title}{notes}", loc="left", fontsize=10, parse_math=False)
    axes.set_xlabel(what, parse_math=False)
    axes.set_ylabel(each)
    if handles:
        _legend_above(axes, handles, names)


def _bins(values: np.ndarray) -> int:
    """How many bins to count in: by the rule of Freedman and Diaconis, or of Sturges if that has more."""
    if np.ptp(values) == 0:
        return 1
    width = 2 * np.subtract(*np.percentile(values, (75, 25))) / len(values) ** (1 / 3)
    wanted = max(np.log2(len(values)) + 1, np.ptp(values) / width if width > 0 else 0)
    return int(np.ceil(np.clip(wanted, LEAST_BINS, MOST_BINS)))


def _legend_above(axes: "Axes", handles: list[Any], names: list[str]) -> None:
    """A legend that covers nothing, between a panel and its title."""
    _legend(axes, handles, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=ABREAST, borderaxespad=0.2)
    pad = 6 + 14 * -(-len(names) // ABREAST)
    axes.set_title(axes.get_title("left"), loc="left", fontsize=10, parse_math=False, pad=pad)


def _legend(axes: "Axes", handles: list[Any], names: list[str], **where: Any) -> None:
    """A legend that shows every name as it is: with `$`, and with `_` at its beginning."""
    made = axes.legend(handles, list(map(str, range(len(names)))), fontsize=8, frameon=False, **where)
    for text, name in zip(made.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


ALL = (heat_map, whole, shares, histogram)
