"""How long an optimizer's steps are beside the weights they change."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from optaxclip.history._evidence import Evidence
from optaxclip.history._expressed import LAYER, coarser
from optaxclip.history._rows import Row


class Lengths(NamedTuple):
    """The lengths of steps in proportion to plain updates, relative to the weights at the start.

    Attributes:
      layers: the layers, or the recorded rows where these are coarser, as rows.
      place: the layer of each row, `(rows,)`.
      weights: the norm of each layer's weights, `(layers,)`; zero where no gradient ever came.
      each: the length of its ordinary step over that, the median; NaN for weights that start from zero.
      longest: the length of its longest step likewise.
      whole: the length of the ordinary step of all layers together.
      first: the longest of the first steps, before norms settled, of all layers together.
      safe: the length that is safe without knowing more.
      rate: the learning rate.
    """

    layers: tuple[Row, ...]
    place: Int[np.ndarray, " rows"]
    weights: Float[np.ndarray, " layers"]
    each: Float[np.ndarray, " layers"]
    longest: Float[np.ndarray, " layers"]
    whole: float
    first: float
    safe: float
    rate: float

    @property
    def scale(self) -> Float[np.ndarray, " layers"]:
        """What each layer's step is held against: the norm of its weights.

        Layers whose weights start from zero get the median of the others: nothing is known of them.
        """
        return np.where(self.weights > 0, self.weights, np.median(self.weights[self.weights > 0]))

    @property
    def limits(self) -> Float[np.ndarray, " layers"]:
        """The norm of each layer's update whose step is as long as is safe."""
        return self.safe * self.scale / self.rate

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
    if rate is None or history.start is None or history.norm != "l2":
        return None
    own, place = coarser(history, LAYER), np.arange(len(history.names))
    if own is None:
        own = history
    else:
        place = history.regrouped(LAYER.groups).place
    norms, some = own.norms[found.kept], found.ordinary if found.ordinary.any() else found.calm
    # Frozen weights would make the steps of the others look short.
    weights = np.where((norms > 0).any(axis=0), own.start, 0)
    if not 0 < norm(weights) < np.inf:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(weights > 0, rate * norms / weights, np.nan)
    first = found.whole[found.settling] if found.settling.any() else found.whole[:1]
    return Lengths(
        layers=own.rows,
        place=place,
        weights=weights,
        each=np.median(relative[some], axis=0),
        longest=relative.max(axis=0),
        whole=rate * float(np.median(found.whole[some])) / norm(weights),
        first=rate * float(first.max()) / norm(weights),
        safe=step / np.sqrt(max(1, np.count_nonzero(weights))),
        rate=rate,
    )


def norm(norms: np.ndarray) -> float:
    """The L2 norm of groups together."""
    return float(np.sqrt((norms**2).sum()))
