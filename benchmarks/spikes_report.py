"""What `spikes.py` reports: the table, for terminals and for the docs, and the figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks import report

SPIKE = 0.5  # nats above the median of the steps before
BEFORE = 25  # steps to compare with
HEADINGS = ("final loss", "spikes", "acted on", "lost after NaN", "cost")


class Row(NamedTuple):
    """One method over all seeds.

    Attributes:
      name: the method.
      final: the mean loss of the last ordinary steps of each seed; infinite where it is not finite.
      spikes: the share of ordinary steps whose loss is `SPIKE` above the median of the `BEFORE` steps before.
      acted: the share of steps whose update was changed or dropped; None where no state tells.
      lost: the median number of steps after the NaN until the loss is back; None if it never is.
      cost: seconds per step over those without clipping.
    """

    name: str
    final: list[float]
    spikes: float
    acted: float | None
    lost: float | None
    cost: float


def row(
    name: str, losses: np.ndarray, ordinary: np.ndarray, nan: int, acted: float | None, cost: float
) -> Row:
    """What losses `(seeds, steps)` amount to, on the ordinary steps."""
    known = [run[ordinary] for run in losses]
    final = [float(np.mean(run[-BEFORE:])) for run in known]
    spikes = [spike_share(run) for run in known]
    lost = [steps_lost(run, int(np.searchsorted(ordinary, nan))) for run in known]
    return Row(
        name=name,
        final=[value if np.isfinite(value) else np.inf for value in final],
        spikes=float(np.mean(spikes)),
        acted=acted,
        lost=None if any(value is None for value in lost) else float(np.median(lost)),  # type: ignore[arg-type]
        cost=cost,
    )


def spike_share(losses: np.ndarray) -> float:
    """The share of steps with a loss far above that of the steps before; what is not finite is."""
    high = [not losses[k] <= np.median(losses[k - BEFORE : k]) + SPIKE for k in range(BEFORE, len(losses))]
    return float(np.mean(high))


def steps_lost(losses: np.ndarray, nan: int) -> int | None:
    """How many steps after a NaN the loss takes to be no worse than the worst of the steps before it."""
    before = np.max(losses[nan - BEFORE : nan])
    back = np.flatnonzero(losses[nan + 1 :] <= before)
    return int(back[0]) if back.size else None


def cells(row: Row) -> list[str]:
    """The numbers as text."""
    dead = not np.isfinite(row.final).all()
    spread = f"{np.mean(row.final):.2f} ({min(row.final):.2f}–{max(row.final):.2f})"
    return [
        "not finite" if dead else spread,
        f"{row.spikes:.1%}",
        "–" if row.acted is None else f"{row.acted:.0%}",
        "all" if row.lost is None else f"{row.lost:.0f}",
        f"{row.cost:.2f}",
    ]


def table(rows: Sequence[Row]) -> Table:
    """The rows, the best final loss first."""
    made = Table("method", title="Bad batches, a NaN, a learning rate that is too high", pad_edge=False)
    for heading in HEADINGS:
        made.add_column(heading.replace(" ", "\n"), justify="right")
    for one in ordered(rows):
        made.add_row(one.name, *cells(one))
    return made


def ordered(rows: Sequence[Row]) -> list[Row]:
    """By the mean final loss."""
    return sorted(rows, key=lambda one: float(np.mean(one.final)))


def write(path: Path, rows: Sequence[Row], setting: str, where: Mapping[str, Any]) -> None:
    """Writes the table as Markdown, between the marks of a file that has them."""
    lines = [["method", *HEADINGS], ["---", *["---:"] * len(HEADINGS)]]
    lines += [[f"`{one.name}`", *cells(one)] for one in ordered(rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    report.write_markdown(path, f"Setting: {setting}.\n\n{report.sentence(where)}\n\n{text}\n")


def figure(losses: Mapping[str, np.ndarray], bad: np.ndarray, nan: int, setting: str) -> Figure:
    """One panel for each method: the losses of its seeds over those of all others."""
    columns = min(4, len(losses))
    lines = -(-len(losses) // columns)
    made = Figure(figsize=(3.2 * columns, 0.9 + 2.1 * lines), layout="constrained", dpi=110)
    made.suptitle(f"Training loss under each method\n{_wrapped(setting)}", fontsize=10)
    axes = made.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for place, (name, runs) in zip(axes, losses.items(), strict=False):
        _panel(place, name, runs, losses, bad, nan)
    for place in axes[len(losses) :]:
        place.set_axis_off()
    for place in axes[::columns]:
        place.set_ylabel("loss / nats")
    for place in axes[-columns:]:
        place.set_xlabel("step")
    return made


def _panel(
    axes: Axes, name: str, runs: np.ndarray, losses: Mapping[str, np.ndarray], bad: np.ndarray, nan: int
) -> None:
    ordinary = np.setdiff1d(np.arange(runs.shape[1]), bad)
    for other in losses.values():
        axes.plot(ordinary, _smooth(other[0][ordinary]), color="0.87", lw=0.7)
    for run in runs:
        axes.plot(ordinary, _smooth(run[ordinary]), color="#0072B2", lw=0.9)
    for where in bad:
        axes.axvline(where, color="#E69F00", lw=0.6, ymax=0.06)
    axes.axvline(nan, color="#D55E00", lw=0.9, ls=":")
    axes.set(ylim=(1.5, 6), title=name)
    axes.title.set_fontsize(9)
    if not np.isfinite(runs[:, -1]).all():
        axes.text(0.97, 0.9, "not finite", transform=axes.transAxes, ha="right", color="#D55E00", fontsize=8)


def _smooth(losses: np.ndarray, width: int = 5) -> np.ndarray:
    """Medians of neighbours, so that the noise of batches does not hide the rest."""
    padded = np.pad(losses, (width // 2, width - 1 - width // 2), mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)


def _wrapped(setting: str) -> str:
    first, *rest = setting.split("; ")
    return f"{first}; {rest[0]}\n{'; '.join(rest[1:])}" if rest else first
