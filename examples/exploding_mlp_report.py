"""What `exploding_mlp.py` reports: the table, what it says in words, and the figure."""

import dataclasses
import json
import math
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colors, ticker
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from rich.table import Table

import optaxclip as oc

# Okabe and Ito's colours, which colour-blind readers can tell apart; one for each run, in order.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")

TRAINED = 0.9  # the test accuracy above which a network counts as trained


class Result(NamedTuple):
    """One row of the table. Steps count from 1; the mean is over the steps that have a cosine."""

    limit: str
    test_accuracy: float
    final_loss: float
    first_nonfinite_step: int | None
    clipped_share: float
    mean_cosine: float | None


class Trace(NamedTuple):
    """One run, step by step: loss, raw gradient norm of each layer, cosine of clipped and raw gradient."""

    loss: Any
    norms: Any
    cosine: Any


class Compared(NamedTuple):
    """All runs by their policies; the recording of the one without clipping, and what it says."""

    results: dict[str, Result]
    traces: dict[str, Trace]
    recording: oc.History
    advice: oc.Advice


def table(results: dict[str, Result]) -> Table:
    """The results; the best accuracy is in bold, runs that died are in red."""
    made = Table("policy", "limit", title="Handwritten digits, by clipping policy")
    for heading in "test\nacc.", "final\nloss", "not finite\nfrom step", "steps\nclipped", "mean\ncosine":
        made.add_column(heading, justify="right")
    best = max(row.test_accuracy for row in results.values())
    for name, row in results.items():
        made.add_row(
            name,
            row.limit,
            f"{row.test_accuracy:.1%}",
            f"{row.final_loss:.2g}",
            str(row.first_nonfinite_step or "never"),
            f"{row.clipped_share:.0%}",
            "–" if row.mean_cosine is None else f"{row.mean_cosine:.3f}",
            style="red" if row.first_nonfinite_step else "bold" if row.test_accuracy == best else None,
        )
    return made


def conclusion(results: dict[str, Result]) -> str:
    """What the table says, in words."""
    none = results["none"]
    reached = {name: row.test_accuracy for name, row in results.items() if name != "none"}
    trained = [name for name in reached if reached[name] > TRAINED]
    best = max(reached, key=reached.__getitem__)
    if none.test_accuracy > TRAINED:
        return (
            f"The network trains without clipping too, to {none.test_accuracy:.1%} of unseen scans: this "
            "setting does not need it. Try a larger --gain or --learning-rate."
        )
    fate = f"stays finite and reads {none.test_accuracy:.1%} of unseen scans"
    if none.first_nonfinite_step:
        fate = f"is no longer finite at step {none.first_nonfinite_step}"
    end = f"no clipping policy gets past {TRAINED:.0%} either. Try a smaller --limit or more --steps."
    if trained:
        end = (
            f"{len(trained)} of {len(reached)} clipping policies train the same network past {TRAINED:.0%} "
            f"of unseen scans ({', '.join(trained)}). Best with this seed: {best}, {reached[best]:.1%}."
        )
    return f"Without clipping the network {fate}; {end}"


def save(output: Path, setting: Any, found: Compared, guessing: float) -> list[Path]:
    """Writes the figure, the numbers as JSON with null for those that are not finite, and the recording."""
    rows = {name: row._asdict() for name, row in found.results.items()}
    for row in rows.values():
        row["final_loss"] = row["final_loss"] if math.isfinite(row["final_loss"]) else None
    said = {"policy": found.advice.policy, "code": found.advice.code, "reasons": found.advice.reasons}
    numbers = {"setting": dataclasses.asdict(setting), "policies": rows, "advice": said}
    picture, text, recording = (output / f"exploding_mlp.{kind}" for kind in ("png", "json", "npz"))
    title = f"Exploding gradients without clipping, and under six clipping policies\n{setting}"
    losses = {name: trace.loss for name, trace in found.traces.items()}
    norms = {name: trace.norms for name, trace in found.traces.items()}
    died = {name: row.first_nonfinite_step for name, row in found.results.items()}
    figure(title, losses, norms, died, guessing, found.advice.code).savefig(picture)
    text.write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    found.recording.save(recording)
    return [picture, text, recording]


def figure(
    title: str,
    losses: dict[str, np.ndarray],
    norms: dict[str, np.ndarray],
    died: dict[str, int | None],
    guessing: float,
    code: str,
) -> Figure:
    """Above, the losses of up to seven runs; below, for each, its gradient norms by layer and step.

    Args:
      title: two lines at most.
      losses: of each run, by its name, `(steps,)`. The first run's are drawn thicker.
      norms: of each run, `(steps, layers)`.
      died: the first step that is not finite, counted from 1, or None.
      guessing: the loss of a network that knows nothing.
      code: what was advised from the first run.
    """
    made = Figure(figsize=(15, 11), dpi=130, layout="constrained")
    made.suptitle(title, fontsize=12)
    grid = made.add_gridspec(3, 4, height_ratios=(1.25, 1, 1))
    draw_losses(made.add_subplot(grid[0, :]), losses, died, guessing)
    edges = bins(len(next(iter(losses.values()))))
    largest = {name: np.maximum.reduceat(norm, edges[:-1] - 1, axis=0).T for name, norm in norms.items()}
    scale, places = colour_scale([largest[name] for name in norms if not died[name]]), []
    for k, name in enumerate(norms):
        axes = made.add_subplot(grid[1 + k // 4, k % 4])
        draw_norms(axes, edges, largest[name], scale)
        axes.set_title(f"{name}: not finite from step {died[name]}" if died[name] else name, loc="left")
        axes.set(xlabel="step" if k >= 3 else "", ylabel="layer (1 sees the scan)" if k % 4 == 0 else "")
        places.append(axes)
    draw_note(made.add_subplot(grid[2, 3]), code)
    label = "norm of a layer's gradient before clipping (largest where steps share a column)"
    made.colorbar(
        ScalarMappable(scale, "viridis"), ax=places, extend="both", label=label, aspect=40, pad=0.01
    )
    return made


def draw_note(axes: Axes, code: str) -> None:
    """Where the last policy comes from."""
    lines = textwrap.wrap(code.replace("(", "( "), 36)  # it may break after a bracket
    note = "\n".join(["advised from the recording", "of the run without clipping:", "", *lines])
    axes.axis("off")
    axes.text(0, 0.5, note.replace("( ", "("), va="center", fontsize=12, linespacing=1.4)


def bins(steps: int) -> np.ndarray:
    """The steps that columns begin with, and the end: single steps at first, then ever more in each."""
    return np.unique(np.geomspace(1, steps + 1, 161).astype(int))


def draw_losses(
    axes: Axes, losses: dict[str, np.ndarray], died: dict[str, int | None], guessing: float
) -> None:
    """The losses, with a cross near the top where a run died."""
    starts = [loss[0] for loss in losses.values() if np.isfinite(loss[0])]
    top, steps = 1e3 * max([guessing, *starts]), len(next(iter(losses.values())))
    for k, (name, loss) in enumerate(losses.items()):
        end = died[name]
        alive = loss[: end - 1] if end else loss
        begins = bins(steps)[:-1]
        begins = begins[begins <= len(alive)]
        medians = [np.median(part) for part in np.split(alive, begins[1:] - 1) if len(part)]
        # A loss of 0 has no place on this axis.
        axes.plot(begins, np.maximum(medians, 1e-9), color=COLOURS[k], lw=1.5 if k else 3, label=name)
        if end:
            axes.plot(end, top / 5, "X", color=COLOURS[k], ms=14, mec="white", zorder=9)
    axes.axhline(guessing, color="0.5", ls=":", lw=1.5, label="guessing")
    axes.set(xscale="log", yscale="log", xlim=(1, steps), ylim=(None, top))
    axes.set(xlabel="step", ylabel="loss of the batch")
    axes.set_title("Training loss (median where steps share a column; ✕ no longer finite)", loc="left")
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    axes.legend(loc="upper right", ncols=4)
    axes.grid(color="0.92")


def colour_scale(norms: list[np.ndarray]) -> colors.LogNorm:
    """From nearly the least to the largest norm of the runs that lived."""
    seen = np.concatenate([np.zeros(0), *(norm.ravel() for norm in norms)])
    seen = seen[np.isfinite(seen) & (seen > 0)]
    low, high = np.percentile(seen, (1, 100)) if seen.size else (1e-3, 1e3)
    return colors.LogNorm(low, max(high, 10 * low))


def draw_norms(axes: Axes, edges: np.ndarray, norms: np.ndarray, scale: colors.Normalize) -> None:
    """Norms of shape `(layers, columns)`; grey and hatched where they are not finite."""
    rows = np.arange(len(norms) + 1) + 0.5
    axes.patch.set(facecolor="0.85", hatch="////", edgecolor="0.6")
    axes.set(xscale="log", xlim=(1, edges[-1]), ylim=(rows[-1], rows[0]))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=6, integer=True))
    axes.pcolormesh(edges, rows, np.ma.masked_invalid(norms), norm=scale, cmap="viridis")
