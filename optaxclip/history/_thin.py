"""What a figure shows of a long or a wide recording: updates in columns, groups put together."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from optaxclip import groups as _groups
from optaxclip.history._rows import put_together
from optaxclip.history._tables import foremost, lines, shares

COLUMNS = 300  # fewer than the pixels that a panel is wide, lest a spike falls between two
SHARES = 120  # colours that change more often than this cannot be told apart
ROWS = 60  # more rows than these are put together by layer
TALL = 180  # fewer than the pixels that a panel is high, likewise

DRAWN = 1e-200, 1e200  # beyond, the margins of a log scale overflow


class Thin(NamedTuple):
    """A recording in as many columns as can be drawn, each a stretch of updates of which the largest is kept.

    Attributes:
      names: the rows.
      how: how rows were put together, in words; empty if they were not.
      edges: where columns begin and end, in updates.
      norms: the largest finite norms; NaN where there is none.
      bad: where a norm was not finite.
      whole: the largest finite norm of the whole.
      loss: the largest finite loss; None if it was not recorded.
      begins: the recorded update that each column begins with, for those from `earlier` on.
      earlier: how many columns are of updates before the first that was recorded one by one: their norms are
        those that rows put together had at most.
      longest: the most updates in a column.
      shares: the shares of rows in the whole, in fewer columns: in that update of each in which the whole was
        largest.
      share_edges: where these columns begin and end, in updates.
      top: the rows worth naming.
    """

    names: tuple[str, ...]
    how: str
    edges: Float[np.ndarray, " columns+1"]
    norms: Float[np.ndarray, "columns rows"]
    bad: Bool[np.ndarray, "columns rows"]
    whole: Float[np.ndarray, " columns"]
    loss: Float[np.ndarray, " columns"] | None
    begins: np.ndarray
    earlier: int
    longest: int
    shares: Float[np.ndarray, "fewer rows"]
    share_edges: Float[np.ndarray, " fewer+1"]
    top: Sequence[int]


def thin(history: Any, columns: int = COLUMNS, rows: int = ROWS, top: int = 7) -> Thin:
    """Makes a recording of at least one update fit into columns, and its leaves into layers."""
    own, place, how = _rows(history, rows)
    whole = own.whole
    begins, edges, longest = _stretches(history.steps, columns)
    few, share_edges, _ = _stretches(history.steps, SHARES)
    largest = [
        first + int(np.argmax(np.where(np.isfinite(part), part, -1)))
        for first, part in zip(few, np.split(whole, few[1:]), strict=True)
    ]
    found = Thin(
        names=own.names,
        how=how,
        edges=edges,
        norms=drawable(largest_of(own.norms, begins)),
        bad=np.logical_or.reduceat(~np.isfinite(own.norms), begins, axis=0),
        whole=drawable(largest_of(whole, begins)),
        loss=None if own.loss is None else largest_of(own.loss, begins),
        begins=begins,
        earlier=0,
        longest=longest,
        shares=shares(own)[largest],
        share_edges=share_edges,
        top=foremost(lines(own).groups, top),
    )
    return _with_earlier(found, history, place)


def _stretches(steps: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Divides updates: which ones columns begin with, the edges of columns, and the most updates in one."""
    cuts = np.unique(np.linspace(0, len(steps), min(len(steps), most) + 1).astype(int))
    between = (steps[cuts[1:-1] - 1] + steps[cuts[1:-1]]) / 2
    edges = np.concatenate([[steps[0] - 0.5], between, [steps[-1] + 0.5]])
    return cuts[:-1], edges, int(np.diff(cuts).max())


def _rows(history: Any, most: int) -> tuple[Any, np.ndarray, str]:
    """The recording by layer where it has too many rows; the place of each row in it; how, in words."""
    alone = history, np.arange(len(history.names)), ""
    if len(history.names) <= most or any(row.at for row in history.rows):
        return alone
    try:
        regrouped = history.regrouped(_groups.layer())
        by_layer = history.regroup(_groups.layer())
    except ValueError:  # rows that are more than one layer
        return alone
    if not 1 < len(by_layer.names) < len(history.names):
        return alone
    place = np.where(regrouped.measured, regrouped.place, -1)
    return by_layer, place, f"{len(history.names):,} groups by layer"


def largest_of(values: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """The largest finite values of stretches; NaN where there is none."""
    finite = np.where(np.isfinite(values), values, -np.inf)
    found = np.maximum.reduceat(finite, begins, axis=0)
    return np.where(np.isfinite(found), found, np.nan)


def rows_in_sight(data: Thin) -> tuple[Float[np.ndarray, "columns fewer"], Any, np.ndarray]:
    """The rows of a map, too many neighbours together: norms, where they are bad, and the first of each."""
    first = np.arange(0, len(data.names), -(-len(data.names) // TALL))
    finite = np.where(np.isfinite(data.norms), data.norms, -np.inf)
    norms = np.maximum.reduceat(finite, first, axis=1)
    bad = np.logical_or.reduceat(data.bad, first, axis=1)
    return np.where(np.isfinite(norms), norms, np.nan), bad, first


def drawable(norms: np.ndarray) -> np.ndarray:
    """Norms that have a place on a log scale; 0, infinity and NaN stay."""
    return np.where((norms > 0) & (norms < np.inf), np.clip(norms, *DRAWN), norms)


def _with_earlier(found: Thin, history: Any, place: np.ndarray) -> Thin:
    """Adds what `record` keeps of the updates before those that it keeps one by one."""
    run = history.run
    if run is None or run.updates <= len(history):
        return found
    stretches = run.stretches
    starts = np.arange(len(stretches.largest)) * stretches.length - 0.5
    before = starts < found.edges[0]
    if not before.any():
        return found
    starts, largest = starts[before], stretches.largest[before]
    losses = stretches.loss_largest[before]
    end = len(stretches.largest) * stretches.length - 0.5
    if end < found.edges[0]:  # of what is in no whole stretch, and not kept one by one, nothing is known
        starts = np.append(starts, end)
        largest = np.append(largest, np.full((1, largest.shape[1]), np.nan), axis=0)
        losses = np.append(losses, np.nan)
    norms = put_together(largest, history.sizes, place, len(found.names), history.norm)
    whole = put_together(largest, history.sizes, np.zeros(len(place), int), 1, history.norm)[:, 0]
    loss = found.loss
    if loss is not None:
        loss = np.concatenate([_finite(losses), loss])
    return found._replace(
        edges=np.concatenate([starts, found.edges]),
        norms=np.concatenate([drawable(_finite(norms)), found.norms]),
        bad=np.concatenate([np.isinf(norms), found.bad]),
        whole=np.concatenate([drawable(_finite(whole)), found.whole]),
        loss=loss,
        earlier=len(norms),
        longest=max(found.longest, stretches.length),
    )


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)
