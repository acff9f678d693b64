"""What `exploding_tensor.py` reports: two tables, what they say in words, and the figure."""

import textwrap
from typing import NamedTuple

import numpy as np
from exploding_mlp_report import COLOURS
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

import optaxclip as oc

TENSORS = ("#D55E00", "#56B4E9", "#CC79A7", "#777777")  # colours that no policy has

SMOOTHED = 20  # steps that share a point of a loss curve


class Result(NamedTuple):
    """One row of the table.

    Attributes:
      limit: in words.
      losses: on text that was not trained on, in nats, one for each seed.
      embedding: which part of its gradient the clipping left to the exploding tensor; the median over steps.
      others: likewise, to all else.
    """

    limit: str
    losses: tuple[float, ...]
    embedding: float
    others: float

    @property
    def loss(self) -> float:
        """The mean over seeds."""
        return float(np.mean(self.losses))


def table(results: dict[str, Result]) -> Table:
    """The results; the lowest loss is in bold."""
    made = Table("policy", "limit", title="Python's library by the character, by clipping policy")
    for heading in "loss on\nunseen text", "over\nseeds", "embedding's\ngradient left", "others'\nleft":
        made.add_column(heading, justify="right")
    best = min(row.loss for row in results.values())
    for name, row in results.items():
        made.add_row(
            name,
            row.limit,
            f"{row.loss:.3f}",
            f"±{np.ptp(row.losses) / 2:.3f}",
            f"{row.embedding:.1%}",
            f"{row.others:.1%}",
            style="bold" if row.loss == best else None,
        )
    return made


def lengths(recording: oc.History, learning_rate: float) -> Table:
    """What each tensor has of the recorded gradients, and how long its steps are beside its weights."""
    made = Table("tensor", title="Recorded without clipping: the first step, and the median of all")
    for heading in "share of\n1st gradient", "of all", "1st step\n/ weights", "of all":
        made.add_column(heading, justify="right")
    share, step = shares(recording), relative(recording, learning_rate)
    for k, name in enumerate(recording.names):
        parts = (f"{x:.1%}" for x in (share[0, k], np.median(share[:, k])))
        longs = ("–" if np.isnan(x) else f"{x:.2g}" for x in (step[0, k], np.median(step[:, k])))
        made.add_row(name, *parts, *longs)
    return made


def shares(recording: oc.History) -> np.ndarray:
    """The share of each tensor in the squared norm of all, `(steps, tensors)`."""
    return (recording.norms / recording.whole[:, None]) ** 2


def relative(recording: oc.History, learning_rate: float) -> np.ndarray:
    """The norm of plain steps over that of the weights at the start, `(steps, tensors)`; NaN if it is 0."""
    assert recording.start is not None
    return learning_rate * recording.norms / np.where(recording.start > 0, recording.start, np.nan)


def conclusion(results: dict[str, Result], advice: oc.Advice) -> str:
    """What the table says, in words."""
    advised, others = results["advised"], {k: row for k, row in results.items() if k != "advised"}
    best = min(others, key=lambda name: others[name].loss)
    end, next_best = advised.loss, others[best].loss
    beside = f"ends at a loss of {end:.3f}; of the others {best} is best, with {next_best:.3f}"
    if advice.policy != "outliers":
        return f"The advice is {advice.policy!r}: to clip no tensor alone. It {beside}."
    return (
        f"With one limit for all, global clipping leaves the others {results['global'].others:.0%} of their "
        f"gradients. The advice is to clip the one tensor alone. It leaves the others "
        f"{advised.others:.0%}, and {beside}."
    )


def figure(
    title: str, losses: dict[str, np.ndarray], recording: oc.History, learning_rate: float, advice: oc.Advice
) -> Figure:
    """On the left the losses of each policy, `(seeds, steps)`; on the right the recorded steps by tensor."""
    made = Figure(figsize=(14, 6.5), dpi=130, layout="constrained")
    made.suptitle("\n".join(textwrap.wrap(title.replace("\n", ": "), 150)), fontsize=11)
    left, right = made.subplots(1, 2)
    draw_losses(left, losses)
    draw_steps(right, recording, relative(recording, learning_rate))
    made.supxlabel("Advised from the recording: " + advice.code, fontsize=11)
    return made


def draw_losses(axes: Axes, losses: dict[str, np.ndarray]) -> None:
    """The mean over seeds, and the range between them."""
    for (name, loss), colour in zip(losses.items(), COLOURS, strict=False):
        size = min(SMOOTHED, loss.shape[1])
        count = loss.shape[1] // size
        points = loss[:, : count * size].reshape(len(loss), count, size).mean(axis=2)
        steps = size * (np.arange(count) + 0.5)
        axes.plot(steps, points.mean(axis=0), color=colour, lw=2, label=name)
        axes.fill_between(steps, points.min(axis=0), points.max(axis=0), color=colour, alpha=0.15, lw=0)
    axes.set(xlabel="step", ylabel=f"loss of the batch, nats (means of {SMOOTHED} steps)")
    axes.set_title("Training loss: mean of the seeds, and their range", loc="left")
    axes.legend()
    axes.grid(color="0.92")


def draw_steps(axes: Axes, recording: oc.History, steps: np.ndarray) -> None:
    """The steps of tensors that did not start from zero, beside their weights."""
    begins = np.unique(np.geomspace(1, len(steps) + 1, 81).astype(int))
    seen = [k for k in range(len(recording.names)) if np.isfinite(steps[:, k]).any()]
    for k, colour in zip(seen, TENSORS, strict=False):
        points = [np.median(part) for part in np.split(steps[:, k], begins[1:-1] - 1)]
        axes.plot(begins[:-1], points, color=colour, lw=2, label=recording.names[k])
    axes.set(xscale="log", yscale="log", xlabel="step", ylabel="step beside weights at the start")
    axes.set_title("Recorded without clipping: how long each tensor's steps are", loc="left")
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    axes.legend()
    axes.grid(color="0.92")
