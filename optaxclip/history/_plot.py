"""Figures of a `History`. Matplotlib is imported when one is asked for; pyplot is not, nor any backend."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optaxclip.history import _panels
from optaxclip.history._panels import Counted, Mark, Shown
from optaxclip.history._tables import heading, live, number, printable
from optaxclip.history._thin import thin

TAIL = 10  # updates that are drawn of a run after its end

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(history: Any, limits: Any = None, advice: Any = None) -> "Figure":
    """All four panels."""
    made = _figure((14.5, 9.5))
    count = _worth_drawing(history)
    rest = "" if count == len(history) else f"; drawn are {count:,}, since no later one is finite"
    made.suptitle(heading(history) + rest, fontsize=12)
    drawn = panels(history, limits, advice)
    if not drawn:
        made.text(0.5, 0.5, "Nothing was recorded.", ha="center")
    parts: list[Any] = [*np.asarray(made.subfigures(2, 2)).flat] if drawn else []
    # Each panel in a figure of its own: names beside one must not narrow the others.
    for part, draw in zip(parts, drawn, strict=True):
        draw(part.subplots())
    return made


def figures(history: Any, limits: Any = None, advice: Any = None) -> "list[Figure]":
    """Each panel by itself."""
    made = []
    for draw in panels(history, limits, advice):
        made.append(_figure((7.2, 4.6)))
        draw(made[-1].subplots())
    return made


def formats() -> list[str]:
    """The kinds of files that a figure can be written to, by their suffixes."""
    return [*_figure((1, 1)).canvas.get_supported_filetypes()]


def _figure(size: tuple[float, float]) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "History.plot: there is no matplotlib. Install it: pip install matplotlib."
        ) from error
    return Figure(figsize=size, dpi=110, layout="constrained")


def panels(history: Any, limits: Any, advice: Any) -> "list[Callable[[Axes], None]]":
    """Functions that draw a panel each; none if nothing was recorded."""
    marks = given(limits, len(history))
    if not history.norms.size:
        return []
    count = _worth_drawing(history)
    if count < len(history):
        history = _first(history, count)
        marks = [mark._replace(value=mark.value[:count]) if mark.value.ndim else mark for mark in marks]
    shown = _shown(history, marks, advice)
    return [lambda axes, draw=draw: draw(axes, shown) for draw in _panels.ALL]


def _worth_drawing(history: Any) -> int:
    """How many updates to draw: of a run that went on after it was dead, little more than the live part."""
    end = live(history)
    return min(len(history), end + max(TAIL, end // 10))


def _first(history: Any, count: int) -> Any:
    """The first updates of a recording."""
    given = {key: getattr(history, key) for key in ("norms", "steps", "loss", "params")}
    return history._with(**{key: None if value is None else value[:count] for key, value in given.items()})


def given(limits: Any, updates: int) -> list[Mark]:
    """The limits that a caller wants to see."""
    if limits is None:
        return []
    found, asked = [], limits
    try:
        if not isinstance(limits, Mapping):
            limits = limits if isinstance(limits, Sequence) and not isinstance(limits, str) else [limits]
            names = [f"limit {value:g}" for value in limits]
            names = [
                name if names.count(name) == 1 else f"limit {x!r}"
                for name, x in zip(names, limits, strict=True)
            ]
            limits = dict(zip(names, limits, strict=True))
        arrays = {name: np.asarray(value, float) for name, value in limits.items()}
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"History.plot: limits is {asked!r}, of type {type(asked).__name__}. Pass numbers; to write a "
            "file, history.plot().savefig('x.png')."
        ) from error
    for name, array in arrays.items():
        if array.shape not in ((), (updates,)) or (array < 0).any() or np.isnan(array).any():
            raise ValueError(
                f"History.plot: limit {name!r} is {limits[name]!r}. Pass a number that is neither negative "
                f"nor NaN, or one for each of {updates} updates, as "
                "history.replay(oc.zclip()).limit[:, 0] has."
            )
        found.append(Mark(str(name), array))
    return found


def _shown(history: Any, limits: list[Mark], advice: Any) -> Shown:
    whole = Counted("Norms of the whole", history.whole, f"norm of the whole ({history.norm})", "updates")
    shown = Shown(history, thin(history), limits, None, None, whole, limits)
    if advice is None or advice.policy in ("none", "undecided"):
        return shown
    interval = None if advice.interval is None else tuple(map(float, advice.interval))
    found = advice.replay(history)
    if advice.policy == "global":
        limit = found.limit[:, 0]
        same = np.ptp(limit) == 0
        name = f"advised limit {number(limit[0])}" if same else "advised limit"
        if history.norm == "rms":  # advice is of L2 norms
            name, root = f"{name} (l2)", np.sqrt(history.sizes.sum())
            limit, interval = limit / root, interval and tuple(end / root for end in interval)
        limits = [*limits, Mark(name, limit[0] if same else limit)]
        return shown._replace(limits=limits, interval=interval, marks=limits)
    limited = np.isfinite(found.limit).any(axis=0)
    limit, norm = found.limit[:, limited], found.norm[:, limited]
    count = limit.shape[1]
    of = (
        repr(printable(np.asarray(found.names)[limited][0], _panels.NAME))
        if count == 1
        else f"{count:,} groups"
    )
    title = f"Norms of what the advice limits: {of}"
    if limit.size and np.ptp(limit) == 0:
        mark, what = Mark(f"advised limit {number(limit.flat[0])}", limit.flat[0]), "norm of a group"
    else:
        with np.errstate(invalid="ignore", divide="ignore"):
            mark, norm, interval = Mark("advised limit", np.asarray(1.0)), norm / limit, None
        what = "norm of a group over its limit"
    counted = Counted(title, norm.ravel(), what, "updates" if count == 1 else "norms of groups in updates")
    return shown._replace(interval=interval, after=found.norm_after, histogram=counted, marks=[mark])
