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
    """What a grouping may know of a leaf. See `Groups`.

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
    """A leaf's place: the group it belongs to, and how. See `Groups`.

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

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> rule = oc.Groups(lambda leaves: [oc.Member(f"rank {len(leaf.shape)}") for leaf in leaves])
    >>> oc.group_norms({"kernel": jnp.ones((2, 8)), "bias": jnp.array([3.0, 4.0])}, rule)
    {'rank 1': Array(5., dtype=float32), 'rank 2': Array(4., dtype=float32)}
    """

    assign: Callable[[Sequence[Leaf]], Sequence[Member | None]]
    names: tuple[str, ...] | None = None


class Norm(NamedTuple):
    r"""How a group is measured: a reduction per leaf, a sum or maximum across leaves, a closing function.

    $$n_g = \text{close}\Big(\textstyle\sum_{w \in g} \text{measure}(w),\, d_g\Big) \quad
    \text{with } d_g \text{ entries}$$

    The partial result of a leaf must grow as the `degree`-th power of the leaf, which is what lets the
    engine measure entries whose powers would overflow or vanish at another scale.

    Attributes:
      measure: from a real or complex array in its accumulation dtype and the axes to reduce, to the
        partial results, real, in the shape of the axes that are left, `()` if none is.
      combine: how the partial results of a group's leaves and devices are put together.
      close: from the combined partial results and the numbers of entries, `(rows,)` each, to the norms.
      open: the inverse of `close`, from norms and numbers of entries, `(rows,)` each.
      degree: the power with which partial results grow, from 1.
      shaped: whether the shape of a leaf matters, so that leaves must not be flattened to be read together.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> mean = oc.Norm(
    ...     measure=lambda x, axes: jnp.sum(jnp.abs(x), axis=axes),
    ...     combine="sum",
    ...     close=lambda partial, size: partial / size,
    ...     open=lambda norm, size: norm * size,
    ...     degree=1,
    ... )
    >>> oc.group_norms({"w": jnp.array([3.0, -1.0])}, norm=mean)
    {'w': Array(2., dtype=float32)}
    """

    measure: Callable[[Array, tuple[int, ...]], Array]
    combine: Literal["sum", "max"]
    close: Callable[[Array, Any], Array]
    open: Callable[[Array, Any], Array]
    degree: float
    shaped: bool = False


class Table(NamedTuple):
    """What is known of the groups before any value is. See `Limit`.

    Attributes:
      names: one name per row. Groups with several rows add the index: `layers[3]`.
      sizes: how many measured entries a row has, `(rows,)`, float64.
      spans: for each group name, in order, the first of its rows and how many it has.
    """

    names: tuple[str, ...]
    sizes: np.ndarray
    spans: dict[str, tuple[int, int]]


class Context(NamedTuple):
    """What a limit may know besides the norms it is given. See `Limit`.

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
    r"""How large a norm may be.

    $$c_t, s_t = \text{update}(n_t, s_{t-1}, \dots), \qquad s_0 = \text{init}(\text{table})$$

    Attributes:
      init: from the table of the groups to the limit's own state, a pytree of arrays.
      update: from the norms `(rows,)`, the state and the context, to the limits (a scalar for all rows or
        `(rows,)`) and the new state. Rows are independent of each other.
      needs_params: whether `Context.params` is read.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> twice_the_last = oc.Limit(
    ...     init=lambda table: jnp.zeros(len(table.names)),
    ...     update=lambda norm, last, ctx: (jnp.where(ctx.step > 0, 2 * last, jnp.inf), norm),
    ... )
    >>> tx = oc.clip_by_global_norm(twice_the_last)
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (1.0, 9.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    >>> print(updates["w"])
    [2.]
    """

    init: Callable[[Table], PyTree]
    update: Callable[[Array, PyTree, Context], tuple[Array, PyTree]]
    needs_params: bool = False


class Response(NamedTuple):
    r"""What a group is multiplied by.

    $$u'_g = f(n_g, c_g)\,u_g$$

    Attributes:
      factor: f, from the norms and the limits, both of shape `(rows,)`, to the factors. The norms are
        positive; the engine deals with zero, infinite and NaN norms. Norms beyond the dtype's range are given
        at another scale, and so are their limits; a factor far below 1 has to grow with the limit.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> root = oc.Response(lambda norm, limit: jnp.minimum(1, jnp.sqrt(limit / norm)))
    >>> print(oc.rescale_tree({"w": jnp.array([16.0])}, 4.0, response=root)[0]["w"])
    [8.]
    """

    factor: Callable[[Array, Array], Array]


class Stats(NamedTuple):
    """What was measured and done, one entry per row of the groups (or scalars, for the whole update).

    See `rescale_by_norm`.

    Attributes:
      norm: the norm that came in, float32, `(rows,)` or `()`, as all here.
      norm_after: the norm that went out, likewise.
      limit: the limit it was held against, likewise.
      factor: what the group was multiplied by, likewise.
      clipped: how often the factor was not 1, int32, likewise.
      nonfinite: how often the norm was NaN or infinite, int32, likewise.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
    >>> tree, stats = oc.rescale_tree(grads, 1.0, groups=oc.groups.leaf())
    >>> print(stats.norm, stats.factor, stats.clipped)
    [5.  0.5] [0.2 1. ] [1 0]
    """

    norm: jax.Array
    norm_after: jax.Array
    limit: jax.Array
    factor: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array
