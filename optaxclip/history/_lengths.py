"""How long an optimizer's steps are beside the weights they change."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from optaxclip import groups as _groups
from optaxclip.history._evidence import Evidence


class Lengths(NamedTuple):
    """The lengths of steps in proportion to plain updates, relative to the weights at the start.

    Attributes:
      layers: the layers, or the recorded rows where these are of several leaves.
      place: the layer of each row, `(rows,)`.
      weights: the norm of each layer's weights, `(layers,)`.
      each: the length of its ordinary step over that, the median; NaN for weights that start from zero.
      longest: the length of its longest step likewise.
      whole: the length of the ordinary step of all layers together.
      first: the longest of the first steps, before norms settled, of all layers together.
      safe: the length that is safe without knowing more.
      rate: the learning rate.
    """

    layers: tuple[str, ...]
    place: Int[np.ndarray, "rows"]
    weights: Float[np.ndarray, "layers"]
    each: Float[np.ndarray, "layers"]
    longest: Float[np.ndarray, "layers"]
    whole: float
    first: float
    safe: float
    rate: float

    @property
    def limit(self) -> float:
        """The norm of an update whose step is as long as is safe."""
        return self.safe * norm(self.weights) / self.rate


def lengths(history: Any, found: Evidence, rate: float | None, step: float) -> Lengths | None:
    """The lengths of a recording's steps; None where the learning rate or the weights are not known.

    Args:
      history: the recording, with the norms of the weights at the start.
      found: what it shows.
      rate: the learning rate.
      step: by how much the output may change in a step; of L layers each may change by that over the root
        of L, since independent changes add in squares.
    """
    if rate is None or history.start is None or not norm(history.start) > 0:
        return None
    single = all(len(row.sources) == 1 for row in history.rows)
    own = history.regroup(_groups.layer()) if single else history
    place = history.regrouped(_groups.layer()).place if single else np.arange(len(history.names))
    norms, some = own.norms[found.kept], found.ordinary if found.ordinary.any() else found.calm
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(own.start > 0, rate * norms / own.start, np.nan)
    first = found.whole[found.settling] if found.settling.any() else found.whole[:1]
    return Lengths(
        layers=own.names,
        place=place,
        weights=own.start,
        each=np.median(relative[some], axis=0),
        longest=relative.max(axis=0),
        whole=rate * float(np.median(found.whole[some])) / norm(own.start),
        first=rate * float(first.max()) / norm(own.start),
        safe=step / np.sqrt(max(1, np.count_nonzero(own.start))),
        rate=rate,
    )


def norm(norms: np.ndarray) -> float:
    """The L2 norm of groups together."""
    return float(np.sqrt((norms**2).sum()))
