"""Policies side by side on one recording."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from optaxclip.history._evidence import Kinds, Rule, kinds
from optaxclip.history._replay import Replay


class Compared(NamedTuple):
    """What a policy would have done to a recording.

    Attributes:
      name: what it is called.
      clipped: in which share of the steps it would have acted.
      touched: in which share of the ordinary steps.
      largest_after: the largest norm of a whole update that it would have let through; NaN if all are.
      spike_cut: by what spikes would have been divided, the median over them; infinite if they would have
        become zero, NaN if there are none.
      cosine_mean: of the angle by which it would have turned the updates it acts on, the mean; 1 if it acts
        on none, NaN where angles are not known.
      cosine_worst: the least of them.
      spread: by how much it would have changed the sizes of rows against each other, the median over the
        steps it acts on of the largest factor over the least; 1 keeps them, infinite if some become zero.
    """

    name: str
    clipped: float
    touched: float
    largest_after: float
    spike_cut: float
    cosine_mean: float
    cosine_worst: float
    spread: float


COLUMNS = {
    "clipped": "clipped",
    "touched": "of ordinary",
    "largest_after": "largest after",
    "spike_cut": "spikes cut by",
    "cosine_mean": "cosine",
    "cosine_worst": "worst",
    "spread": "rows apart by",
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Policies side by side on one recording; `str()` is a table.

    Attributes:
      rows: what each would have done.
      steps: how many steps the recording has.
      ordinary: how many of them are ordinary, as `advise` sees it.
      spikes: how many are spikes.
      settling: how many are first steps with norms above all that is ordinary later.
      growing: how many are of the growth towards the end of a run that failed.
      zero: how many are zero.
      nonfinite: how many are not finite.

    >>> import optaxclip as oc
    >>> history = oc.History(["a", "b"], [[3.0, 4.0]] * 9 + [[3.0, 400.0]])
    >>> found = history.compare({"global": oc.clip_by_global_norm(6.0), "none": float("inf")})
    >>> print(found)
    10 steps, 1 of them spikes
    policy  clipped  of ordinary  largest after  spikes cut by  cosine  worst  rows apart by
    global    10.0%         0.0%              6           66.7   1.000  1.000              1
    none       0.0%         0.0%            400              1   1.000  1.000              1
    """

    rows: tuple[Compared, ...]
    steps: int
    ordinary: int
    spikes: int = 0
    settling: int = 0
    growing: int = 0
    zero: int = 0
    nonfinite: int = 0

    def title(self) -> str:
        """How many steps there are of each kind.

        >>> import optaxclip as oc
        >>> history = oc.History(["a", "b"], [[3.0, 4.0]] * 9 + [[3.0, 400.0]])
        >>> history.compare({"none": float("inf")}).title()
        '10 steps, 1 of them spikes'
        """
        others = {
            "before norms settled": self.settling,
            "growing towards the end": self.growing,
            "zero": self.zero,
            "not finite": self.nonfinite,
        }
        said = [f"{self.steps} steps", f"{self.spikes} of them spikes"]
        return ", ".join([*said, *(f"{count} {kind}" for kind, count in others.items() if count)])

    def cells(self) -> list[list[str]]:
        """The table as text, its head first.

        >>> import optaxclip as oc
        >>> history = oc.History(["a", "b"], [[3.0, 4.0]] * 9 + [[3.0, 400.0]])
        >>> found = history.compare({"global": oc.clip_by_global_norm(6.0), "none": float("inf")})
        >>> print(found.cells()[1][:3])
        ['global', '10.0%', '0.0%']
        """
        lines = [["policy", *COLUMNS.values()]]
        for row in self.rows:
            values = row._asdict()
            lines.append([row.name, *(_shown(key, values[key]) for key in COLUMNS)])
        return lines

    def __str__(self) -> str:
        cells = self.cells()
        widths = [max(len(line[k]) for line in cells) for k in range(len(cells[0]))]
        lines = [
            "  ".join(
                x.rjust(w) if k else x.ljust(w) for k, (x, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in cells
        ]
        return "\n".join([self.title(), *lines])

    def table(self) -> Any:
        """The same as a `rich.table.Table`.

        >>> import optaxclip as oc
        >>> history = oc.History(["a", "b"], [[3.0, 4.0]] * 9 + [[3.0, 400.0]])
        >>> found = history.compare({"global": oc.clip_by_global_norm(6.0), "none": float("inf")})
        >>> print(found.table().row_count, found.table().columns[0].header)
        2 policy
        """
        from rich.table import Table
        from rich.text import Text

        head, *lines = self.cells()
        table = Table(title=self.title())
        for k, name in enumerate(head):
            table.add_column(name, justify="right" if k else "left")
        for line in lines:
            table.add_row(*map(Text, line))  # a policy's name may have brackets
        return table


def _shown(key: str, value: float) -> str:
    if np.isnan(value):
        return "–"
    if key in ("clipped", "touched"):
        return f"{value:.1%}"
    if key.startswith("cosine"):
        return f"{value:.3f}"
    return f"{value:.3g}"


def compare(history: Any, policies: Mapping[str, Any] | Sequence[Any], rule: Rule) -> Comparison:
    """Replays policies on a `History` and sums up what each would have done."""
    if isinstance(policies, Replay) or hasattr(policies, "_fields") or not isinstance(policies, Iterable):
        raise TypeError(
            f"History.compare: policies is of type {type(policies).__name__}. Pass a dict from names to "
            "policies, or a list."
        )
    if not isinstance(policies, Mapping):
        policies = {f"policy {k + 1}": policy for k, policy in enumerate(policies)}
    of_steps = kinds(history, rule)
    angles = history.norm in ("l2", "rms")
    rows = []
    for name, policy in policies.items():
        found = policy if isinstance(policy, Replay) else history.replay(policy)
        if found.by_row.shape != history.norms.shape:
            raise ValueError(
                f"History.compare: {name!r} replays {len(found.steps)} steps of {found.by_row.shape[1]} "
                f"rows; this recording has {len(history)} of {len(history.names)}. Pass a replay of this one."
            )
        rows.append(_summed_up(str(name), found, of_steps, angles, history.norms != 0))
    return Comparison(
        tuple(rows),
        len(history),
        ordinary=int(of_steps.ordinary.sum()),
        spikes=int(of_steps.spike.sum()),
        settling=int(of_steps.settling.sum()),
        growing=int(of_steps.growing.sum()),
        zero=int(of_steps.zero.sum()),
        nonfinite=int(of_steps.nonfinite.sum()),
    )


def _summed_up(name: str, found: Replay, steps: Kinds, angles: bool, some: np.ndarray) -> Compared:
    """A line of the table; `some` are the rows that are not zero, `(steps, rows)`: others have no size."""
    acted = found.acted
    finite = np.isfinite(found.norm_after)
    before, after = found.norm_before, found.norm_after
    spike = steps.spike & finite
    turned = found.cosine[acted & finite]
    turned = turned[~np.isnan(turned)]
    straight = 1.0 if angles and not (acted & finite).any() else np.nan
    least = found.by_row.min(axis=1, initial=np.inf, where=some)
    most = found.by_row.max(axis=1, initial=0, where=some)
    changed = acted & finite & (most > 0)
    with np.errstate(divide="ignore", over="ignore"):
        cut, apart = before[spike] / after[spike], most[changed] / least[changed]
    return Compared(
        name=name,
        clipped=_mean(acted),
        touched=_mean(acted[steps.ordinary]),
        largest_after=float(after[finite].max()) if finite.any() else np.nan,
        spike_cut=float(np.median(cut)) if len(cut) else np.nan,
        cosine_mean=float(turned.mean()) if len(turned) else straight,
        cosine_worst=float(turned.min()) if len(turned) else straight,
        spread=float(np.median(apart)) if len(apart) else 1.0,
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
