"""A `History` in words and numbers: the statistics of each row, a table for the terminal, a short text."""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from optaxclip.history._rows import norm_called

if TYPE_CHECKING:
    from rich.table import Table

MISSING = "–"  # what stands where there is no number


class Line(NamedTuple):
    """What is known of the norms of a group; of the finite ones, where there is no other word.

    Attributes:
      name: its name.
      entries: how many entries it has; NaN if that is not known.
      median: of the recorded updates; NaN if none was finite, and so the others.
      p90: the 90th percentile.
      p99: the 99th percentile.
      largest: the largest norm, of the whole run where that is known.
      largest_step: the update it belongs to; -1 if there is none.
      share: the median share in the whole, see `shares`.
      nonfinite: in how many updates the norm was NaN or infinite; of the whole run where that is known.
    """

    name: str
    entries: float
    median: float
    p90: float
    p99: float
    largest: float
    largest_step: int
    share: float
    nonfinite: int


class Lines(NamedTuple):
    """The groups that were chosen, in the order of the recording; the whole; how many were left out."""

    groups: list[Line]
    whole: Line
    left_out: int


def shares(history: Any) -> Float[np.ndarray, "steps rows"]:
    """What each row makes up of the whole, from 0 to 1.

    It is the share of the squared norm for `l2` and `rms`, of the p-th power for `lp`, of the sum for `l1`;
    for `linf` and `spectral`, which do not add up, the norm over the largest. NaN where the whole is 0 or not
    finite.
    """
    norm = norm_called(history.norm)
    largest = norm.combine == "max"
    lengths = history.norms if history.norm != "rms" else history.norms * np.sqrt(history.sizes)
    lengths = np.where(np.isfinite(lengths).all(axis=1, keepdims=True), lengths, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        part = (lengths / lengths.max(axis=1, keepdims=True, initial=0)) ** (1 if largest else norm.degree)
        return part if largest else part / part.sum(axis=1, keepdims=True)


def live(history: Any) -> int:
    """How many updates there are up to the last that is finite; all, if none is.

    After it there may be zeros, of units that pass no gradient on where they met a NaN.
    """
    finite = np.flatnonzero(np.isfinite(history.whole))
    return int(finite[-1]) + 1 if len(finite) else len(history)


def lines(history: Any, most: int | None = None) -> Lines:
    """The statistics of the groups, or of the `most` foremost ones, and of the whole."""
    steps, run, of_whole = history.steps, history.run, shares(history)
    sizes = np.full(len(history.names), np.nan) if history.sizes is None else history.sizes
    found, alive = [], live(history)
    for k, name in enumerate(history.names):
        norms = history.norms[:, k]
        line = _line(name, sizes[k], norms[:alive], steps, of_whole[:, k])
        line = line._replace(nonfinite=int((~np.isfinite(norms)).sum()))
        if run is not None:
            largest = run.largest[k] if run.largest_step[k] >= 0 else np.nan
            line = line._replace(
                largest=float(largest),
                largest_step=int(run.largest_step[k]),
                nonfinite=int(run.nonfinite[k]),
            )
        found.append(line)
    whole = _line("whole", sizes.sum(), history.whole, steps, np.ones(len(history)))
    kept = foremost(found, len(found) if most is None else most)
    return Lines([found[k] for k in kept], whole, len(found) - len(kept))


def foremost(found: Sequence[Line], most: int) -> list[int]:
    """The places of the rows worth showing: by turns the largest in ordinary updates and in the worst."""
    if len(found) <= most:
        return list(range(len(found)))
    share = np.nan_to_num([line.share for line in found])
    worst = [np.inf if line.nonfinite else np.nan_to_num(line.largest) for line in found]
    orders = (np.argsort(-np.asarray(order), kind="stable") for order in (share, worst))
    by_turns = dict.fromkeys(itertools.chain.from_iterable(zip(*orders, strict=True)))
    return sorted(int(k) for k in itertools.islice(by_turns, most))


def _line(name: str, entries: float, norms: np.ndarray, steps: np.ndarray, share: np.ndarray) -> Line:
    finite = np.isfinite(norms)
    seen, share = norms[finite], share[np.isfinite(share)]
    quantiles = np.quantile(seen, (0.5, 0.9, 0.99)) if len(seen) else np.full(3, np.nan)
    at = int(np.argmax(np.where(finite, norms, -1))) if len(seen) else -1
    return Line(
        name,
        float(entries),
        *map(float, quantiles),
        largest=float(norms[at]) if len(seen) else np.nan,
        largest_step=int(steps[at]) if len(seen) else -1,
        share=float(np.median(share)) if len(share) else np.nan,
        nonfinite=int((~finite).sum()),
    )


def number(value: float) -> str:
    """A norm in three digits; `MISSING` for NaN."""
    return MISSING if np.isnan(value) else f"{value:.3g}"


def printable(name: str, most: int | None = None) -> str:
    """A name without what is not printable, and cut in the middle to `most` characters."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    if most is None or len(name) <= most:
        return name
    tail = (most - 1) * 2 // 3  # the end tells more: roots are alike
    return f"{name[: most - 1 - tail]}…{name[len(name) - tail :]}"


def _count(value: float) -> str:
    return MISSING if np.isnan(value) or value < 0 else f"{value:,.0f}"


# The columns of the table: the head, the cell, and which go first where a terminal is narrow (0: none does).
COLUMNS: tuple[tuple[str, Callable[[Line], str], int], ...] = (
    ("entries", lambda line: _count(line.entries), 1),
    ("median", lambda line: number(line.median), 0),
    ("90 %", lambda line: number(line.p90), 2),
    ("99 %", lambda line: number(line.p99), 3),
    ("largest", lambda line: number(line.largest), 0),
    ("at\nupdate", lambda line: _count(line.largest_step), 4),
    ("share", lambda line: MISSING if np.isnan(line.share) else f"{line.share:.1%}", 5),
    ("not\nfinite", lambda line: _count(line.nonfinite), 0),
)
NAME_WIDTH, LEAST_NAME = 48, 8


def heading(history: Any) -> str:
    """What was recorded, in a few words."""
    count, rows = len(history), len(history.names)
    span = f", {history.steps[0]:,} to {history.steps[-1]:,}" if count else ""
    updates = f"{count:,} update{'' if count == 1 else 's'}{span}"
    if history.run is not None and history.run.updates > count:
        updates = f"the last {updates}"
    return f"Norms ({history.norm}) of {rows:,} group{'' if rows == 1 else 's'}, {updates}"


def notes(history: Any, found: Lines) -> list[str]:
    """What a reader of the statistics must know, in sentences."""
    said = []
    if found.left_out:
        said.append(f"{found.left_out:,} groups are left out: those shown have the largest shares and norms.")
    power = norm_called(history.norm)
    if power.combine == "max":
        said.append("Share: the median of the norm over the whole.")
    else:
        what = "squared norm" if power.degree == 2 else "norm" if power.degree == 1 else "norm's power"
        said.append(f"Share: the median of what the {what} is of the whole's.")
    alive = live(history)
    if alive < len(history):
        said.append(
            f"Norms and shares are of the updates up to {history.steps[alive - 1]:,}, the last finite one."
        )
    if history.run is not None and history.run.updates > len(history):
        said.append(
            f"Of groups, the largest norm and what is not finite are of all {history.run.updates:,} updates."
        )
    return said


def table(history: Any, most: int = 20, width: int | None = None) -> "Table":
    """The statistics for the terminal; columns are left out, and names cut, to fit into `width`."""
    try:
        from rich import box
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise ImportError("History.table: there is no rich. Install it: pip install rich.") from error
    found = lines(history, most)
    rows = [*found.groups, found.whole]
    columns, name = _fitting(rows, width)
    made = Table(
        title=heading(history),
        caption=" ".join(notes(history, found)),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    made.add_column("group", overflow="fold", vertical="bottom")
    for head, _, _ in columns:
        made.add_column(head, justify="right", no_wrap=True, vertical="bottom")
    for line in rows:
        style = "bold" if line is found.whole else "red" if line.nonfinite else None
        cells = (cell(line) for _, cell, _ in columns)
        made.add_row(Text(printable(line.name, name)), *cells, style=style, end_section=line is rows[-2:][0])
    return made


def _fitting(rows: Sequence[Line], width: int | None) -> tuple[list[Any], int]:
    """The columns that fit into a width, and the characters left for names."""
    longest = min(max(len(line.name) for line in rows), NAME_WIDTH)
    columns = list(COLUMNS)
    while width is not None:
        # Two spaces between columns.
        taken = sum(2 + max(_width(head), *(len(cell(line)) for line in rows)) for head, cell, _ in columns)
        droppable = [order for _, _, order in columns if order]
        if width - taken >= min(longest, 2 * LEAST_NAME) or not droppable:
            return columns, max(LEAST_NAME, min(longest, width - taken))
        columns = [column for column in columns if column[2] != min(droppable)]
    return columns, longest


def _width(head: str) -> int:
    return max(map(len, head.split("\n")))


def text(history: Any) -> str:
    """The recording in a few lines."""
    said = [heading(history)]
    names = [printable(name, NAME_WIDTH) for name in history.names]
    if len(names) > 4:
        names = [*names[:2], "...", names[-1]]
    said.append(f"  groups: {', '.join(names)}")
    whole = _line("whole", np.nan, history.whole, history.steps, np.ones(len(history)))
    if whole.largest_step >= 0:
        said.append(
            f"  norm of the whole: median {number(whole.median)}, 99 % below {number(whole.p99)}, largest "
            f"{number(whole.largest)} at update {whole.largest_step:,}"
        )
    loss = np.zeros(0) if history.loss is None else history.loss
    finite = np.flatnonzero(np.isfinite(loss))
    if len(finite):
        loss, last = loss[finite], finite[-1]
        when = (
            "at last" if last == len(history) - 1 else f"at update {history.steps[last]:,}, the last finite"
        )
        said.append(f"  loss: {loss[0]:.4g} at first, {loss[-1]:.4g} {when}, {loss.min():.4g} at best")
    return "\n".join([*said, f"  not finite: {_nonfinite(history, whole.nonfinite)}"])


def _nonfinite(history: Any, updates: int) -> str:
    first = history.first_nonfinite()
    if first is None:
        earlier = history.run is None and len(history) and history.steps[0] > 0
        return "never in these updates" if earlier else "never"
    rest = len(first.names) - 1
    also = f" and {rest:,} more" if rest else ""
    since = history.steps >= first.step
    lasting = not np.isfinite(history.norms[since]).all(axis=1).any()
    begin = (
        f"from update {first.step:,} on, first"
        if since.any() and lasting
        else f"first at update {first.step:,},"
    )
    said = f"{begin} in {printable(first.names[0], NAME_WIDTH)}{also}"
    if first.deepest_finite is not None:
        said += f"; {printable(first.deepest_finite, NAME_WIDTH)} still was finite"
    kept = "the last " if len(history) and first.step < history.steps[0] else ""
    return f"{said}; in {updates:,} of {kept}{len(history):,} updates"
