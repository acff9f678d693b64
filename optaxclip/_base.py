"""The types that the four nouns are made of; nothing here computes.

A specification (`Groups`, `Norm`, `Limit`, `Response`) is a NamedTuple of pure functions. None of them is
callable, because `optax.inject_hyperparams` takes any callable argument for a schedule.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Float, Int

PyTree: TypeAlias = Any


class Leaf(NamedTuple):
    """What a grouping may know of a leaf.

    Attributes:
      path: the normalised path, its keys joined with '/'. A key may itself hold slashes (Haiku).
      keys: the normalised keys; `keys[:-1]` names the layer.
      value: the array, tracer or `jax.ShapeDtypeStruct`; a grouping reads its shape and dtype only.
    """

    path: str
    keys: tuple[str, ...]
    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's shape."""
        return tuple(self.value.shape)


class Member(NamedTuple):
    """A leaf's place: the group it belongs to, and how.

    Attributes:
      group: the group's name.
      rows: the axes of the leaf along which there is one group per index, ascending. None of them: the
        whole leaf counts towards one norm.
      measured: whether the leaf's entries are counted in the group's norm.
      scaled: whether the group's factor is applied to the leaf.
    """

    group: str
    rows: tuple[int, ...] = ()
    measured: bool = True
    scaled: bool = True


class Groups(NamedTuple):
    """Which entries share a norm.

    Attributes:
      assign: from the leaves, in tree order, to the place of each; None leaves that leaf alone.
      names: paths to use in place of the tree's own, one for each leaf, or None.
    """

    assign: Callable[[Sequence[Leaf]], Sequence[Member | None]]
    names: tuple[str, ...] | None = None


class Norm(NamedTuple):
    """How a group is measured: a reduction per leaf, a sum or maximum across leaves, a closing function.

    The partial result of a leaf must grow as the `degree`-th power of the leaf, which is what lets the
    engine measure entries whose powers would overflow or vanish at another scale.

    Attributes:
      measure: from a real or complex array in its accumulation dtype and the axes to reduce, to the
        partial result, real.
      combine: how the partial results of a group's leaves and devices are put together.
      close: from the combined partial result and the number of entries, to the norm.
      open: the inverse of `close`.
      degree: the power with which partial results grow.
      shaped: whether the shape of a leaf matters, so that leaves must not be flattened to be read together.
    """

    measure: Callable[[Array, tuple[int, ...]], Array]
    combine: Literal["sum", "max"]
    close: Callable[[Array, Any], Array]
    open: Callable[[Array, Any], Array]
    degree: float
    shaped: bool = False


class Table(NamedTuple):
    """What is known of the groups before any value is.

    Attributes:
      names: one name per row. Groups with several rows add the index: `layers[3]`.
      sizes: how many measured entries a row has, `(rows,)`, float64.
      spans: for each group name, in order, the first of its rows and how many it has.
    """

    names: tuple[str, ...]
    sizes: np.ndarray
    spans: dict[str, tuple[int, int]]


class Context(NamedTuple):
    """What a limit may know besides the norms it is given.

    Attributes:
      step: how many updates came before, int32, `()`.
      table: names and sizes of the rows.
      norm: the way the groups are measured.
      response: what the norms and limits will be given to.
      total: the norm of all groups together whose norms are finite, `()`.
      params: the parameters' norms, `(rows,)`; None unless the limit needs them.
    """

    step: Int[Array, ""] | Int[np.ndarray, ""]
    table: Table
    norm: Norm
    response: "Response"
    total: Float[Array, ""]
    params: Float[Array, " rows"] | None


class Limit(NamedTuple):
    """How large a norm may be.

    Attributes:
      init: from the table of the groups to the limit's own state, a pytree of arrays.
      update: from the norms `(rows,)`, the state and the context, to the limits (a scalar for all rows or
        `(rows,)`) and the new state. Rows are independent of each other.
      needs_params: whether `Context.params` is read.
    """

    init: Callable[[Table], PyTree]
    update: Callable[[Array, PyTree, Context], tuple[Array, PyTree]]
    needs_params: bool = False


class Response(NamedTuple):
    """What a group is multiplied by.

    Attributes:
      factor: from the norms and the limits, both of shape `(rows,)`, to the factors. The norms are
        positive; the engine deals with zero, infinite and NaN norms. Norms beyond the dtype's range are given
        at another scale, and so are their limits; a factor far below 1 has to grow with the limit.
    """

    factor: Callable[[Array, Array], Array]


class Stats(NamedTuple):
    """What was measured and done, one entry per row of the groups (or scalars, for the whole update).

    Attributes:
      norm: the norm that came in.
      norm_after: the norm that went out.
      limit: the limit it was held against.
      factor: what the group was multiplied by.
      clipped: how often the factor was not 1, int32.
      nonfinite: how often the norm was NaN or infinite, int32.
    """

    norm: jax.Array
    norm_after: jax.Array
    limit: jax.Array
    factor: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array
