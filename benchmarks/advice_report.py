"""What `advice.py` reports: tables for terminals and for the docs, the figure, and all of it as JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table

from benchmarks import report
from benchmarks.advice_grid import Cell
from benchmarks.advice_tasks import Task

GOAL = 0.02  # how far above the grid's best an advice may end
HEADINGS = (
    "optimizer",
    "without",
    "best of the grid",
    "within 2 %",
    "advice",
    "its loss",
    "over the best",
    "",
)
COLOURS = {"none": "0.3", "global": "#0072B2", "layerwise": "#009E73", "leafwise": "#E69F00"}


class Taken(NamedTuple):
    """An advice from a recording, and what training with it came to.

    Attributes:
      seed: of both.
      policy: in a word.
      limit: the advice's; None where it is no number, and the code tells.
      code: the line that was put before the optimizer.
      reasons: the advice's.
      final: the final loss; infinite where it is not finite.
    """

    seed: int
    policy: str
    limit: float | None
    code: str
    reasons: list[str]
    final: float


class Outcome(NamedTuple):
    """A task's grid and the advice for each seed, of which there is none if only the grid was trained."""

    task: Task
    start: list[float]
    cells: list[Cell]
    taken: list[Taken]
    seconds: float

    @property
    def best(self) -> Cell:
        """The policy of the grid with the lowest median."""
        return min(self.cells, key=lambda cell: cell.median)

    @property
    def without(self) -> Cell:
        """No clipping."""
        return next(cell for cell in self.cells if cell.limit is None)

    @property
    def good(self) -> int:
        """How many policies of the grid come within `GOAL` of its best."""
        return sum(cell.median <= (1 + GOAL) * self.best.median for cell in self.cells)

    @property
    def over(self) -> float:
        """How far the median of the advised runs is above the best; negative if it is below."""
        return float(np.median([one.final for one in self.taken])) / self.best.median - 1

    @property
    def verdict(self) -> str:
        """`reached`, `missed`, or `diverged` if a seed did that some policy of the grid can train."""
        if not self.taken:
            return ""
        for one in self.taken:
            trains = any(cell.finals[one.seed] < self.start[one.seed] for cell in self.cells)
            if trains and not one.final < self.start[one.seed]:
                return "diverged"
        return "reached" if self.over <= GOAL else "missed"


def loss(value: float, start: float = np.inf) -> str:
    """As text; worse than at the start counts as diverged."""
    return f"{value:.3f}" if value < start else "diverged"


def cells(one: Outcome) -> list[str]:
    """The numbers of a task as text, under `HEADINGS`."""
    start = float(np.median(one.start))
    advised = ["–", "–", "–"]
    if one.taken:
        advised = [
            ", ".join(dict.fromkeys(taken.policy for taken in one.taken)),
            loss(float(np.median([taken.final for taken in one.taken])), start),
            f"{one.over:+.2%}",
        ]
    return [
        one.task.optimizer,
        loss(one.without.median, start),
        f"{loss(one.best.median, start)} ({one.best})",
        f"{one.good} of {len(one.cells)}",
        *advised,
        one.verdict,
    ]


def table(outcomes: Sequence[Outcome]) -> Table:
    """A line for each task."""
    made = Table("task", title="The advice beside the best of the grid", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in HEADINGS:
        justify = "left" if heading in ("optimizer", "advice", "") else "right"
        made.add_column(heading.replace(" ", "\n", 1), justify=justify)
    for one in outcomes:
        made.add_row(one.task.name, *cells(one))
    return made


def grid(one: Outcome) -> Table:
    """The median final losses, and what was advised; a star marks the best, a plus what is within `GOAL`."""
    limits = list(dict.fromkeys(cell.limit for cell in one.cells if cell.limit is not None))
    start = float(np.median(one.start))
    lines = [f"{one.task.name}: {one.task.what}", f"at the start {start:.3f}"]
    if one.seconds:
        lines[1] += f"; {one.seconds:.0f} s"
    advised = [escape(f"seed {taken.seed}: {loss(taken.final, start)}, {taken.code}") for taken in one.taken]
    made = Table(
        "", title="\n".join(lines), caption="\n".join(advised), box=box.SIMPLE_HEAD, title_style="bold"
    )
    made.title_justify = made.caption_justify = "left"
    for limit in limits:
        made.add_column(f"{limit:g}", justify="right", no_wrap=True)
    for grouping in dict.fromkeys(cell.grouping for cell in one.cells):
        row = [cell for cell in one.cells if cell.grouping == grouping]
        made.add_row(grouping, *(_marked(cell, one, start) for cell in row))
    return made


def _marked(cell: Cell, one: Outcome, start: float) -> str:
    text = loss(cell.median, start).replace("diverged", "–")
    if cell is one.best:
        return f"[bold]{text}*[/]"
    return f"[green]{text}+[/]" if cell.median <= (1 + GOAL) * one.best.median else text


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many tasks reached the goal, in a sentence."""
    verdicts = [one.verdict for one in outcomes]
    return (
        f"Within {GOAL:.0%} of the grid's best final loss in {verdicts.count('reached')} of "
        f"{len(verdicts)} tasks; diverged in {verdicts.count('diverged')}."
    )


def write_markdown(path: Path, outcomes: Sequence[Outcome], setting: str, where: Mapping[str, Any]) -> None:
    """Writes the table and what each task is, between the marks of a file that has them."""
    lines = [["task", *HEADINGS], ["---", *["---"] * len(HEADINGS)]]
    lines += [[f"`{one.task.name}`", *cells(one)] for one in outcomes]
    parts = [f"Setting: {setting}.", report.sentence(where)]
    parts += [summary(outcomes)] * any(one.taken for one in outcomes)
    parts += ["\n".join(f"| {' | '.join(line)} |" for line in lines)]
    parts += ["\n".join(_item(one) for one in outcomes)]
    report.write_markdown(path, "\n\n".join(parts) + "\n")


def _item(one: Outcome) -> str:
    advised = f" Advised for the first seed: `{one.taken[0].code}`." if one.taken else ""
    return f"- `{one.task.name}`: {one.task.what}.{advised}"


def write_json(path: Path, outcomes: Sequence[Outcome], setting: str, where: Mapping[str, Any]) -> None:
    """Writes every final loss and every advice; null stands for a loss that is not finite."""
    tasks = [
        {
            "task": one.task.name,
            "what": one.task.what,
            "optimizer": one.task.optimizer,
            "learning_rate": one.task.learning_rate,
            "steps": one.task.steps,
            "recorded": one.task.recorded,
            "start": one.start,
            "best": str(one.best),
            "over": one.over if one.taken else None,
            "verdict": one.verdict or None,
            "grid": [cell._asdict() for cell in one.cells],
            "advice": [taken._asdict() for taken in one.taken],
        }
        for one in outcomes
    ]
    made = _finite({"environment": dict(where), "setting": setting, "tasks": tasks})
    path.write_text(json.dumps(made, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def figure(outcomes: Sequence[Outcome]) -> Figure:
    """One panel for each task: final losses over the limit, and those of the advice."""
    columns = min(4, len(outcomes))
    lines = -(-len(outcomes) // columns)
    made = Figure(figsize=(3.4 * columns, 0.9 + 2.5 * lines), layout="constrained", dpi=110)
    made.suptitle(
        "Final loss under each grouping and limit (lines), and under the advice (crosses)", fontsize=10
    )
    axes = made.subplots(lines, columns, squeeze=False).ravel()
    for place, one in zip(axes, outcomes, strict=False):
        _panel(place, one)
    for place in axes[len(outcomes) :]:
        place.set_axis_off()
    for place in axes[::columns]:
        place.set_ylabel("final loss")
    for place in axes[max(0, len(outcomes) - columns) : len(outcomes)]:
        place.set_xlabel("limit on the whole update")
    made.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return made


def _panel(axes: Axes, one: Outcome) -> None:
    ceiling = min(float(np.median(one.start)), 3 * one.best.median)
    axes.axhline(min(one.without.median, ceiling), color=COLOURS["none"], ls="--", lw=0.9, label="none")
    for grouping in [name for name in COLOURS if name != "none"]:
        row = [cell for cell in one.cells if cell.grouping == grouping]
        limits = np.array([cell.limit for cell in row], float)
        losses = np.minimum([cell.median for cell in row], ceiling)
        axes.plot(limits, losses, color=COLOURS[grouping], lw=1.2, marker=".", ms=3, label=grouping)
    axes.axhspan(one.best.median, (1 + GOAL) * one.best.median, color="0.85", lw=0)
    for place, taken in zip(np.linspace(0.9, 0.98, len(one.taken)), one.taken, strict=True):
        # At the right: its limit may be for each group, or for none, and is not on the axis.
        style = {"marker": "x", "ms": 7, "mew": 2, "color": COLOURS.get(taken.policy, "#CC79A7")}
        axes.plot(place, min(taken.final, ceiling), transform=axes.get_yaxis_transform(), **style)
    axes.set(xscale="log", title=one.task.name)
    axes.title.set_fontsize(9)
