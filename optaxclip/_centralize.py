"""Gradients without their mean."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _layouts, _mesh, groups as _groups
from optaxclip._base import Leaf, PyTree
from optaxclip._layouts import Axes
from optaxclip._partition import Place, partition
from optaxclip._read import times, widen
from optaxclip._split import AxisName, axes_of, told
from optaxclip._walk import across, number, real_dtype, together


def centralize(
    axis: Axes = None, *, axis_name: AxisName = None, specs: PyTree = None
) -> optax.GradientTransformationExtraArgs:
    r"""Subtracts from each output unit of each array the mean of its entries: gradient centralisation.

    $$u'_i = u_i - \frac{1}{d} \sum_{j=1}^{d} u_j \quad \text{over the } d \text{ entries of a unit}$$

    By default the mean runs over these axes, all but the outputs of JAX's layouts, as in `groups.unit`:

    | rank | layout | mean over |
    | --- | --- | --- |
    | 0, 1 | scale, bias | nothing: left alone, whatever `axis` says |
    | 2 | dense `(in, out)` | 0 |
    | 3 | attention `(model, heads, head)` | 0 |
    | 4 to 6 | convolution `HWIO`, or any with outputs last | all but the last |

    Where a mean would be that of one entry, as in a dense layer with one input, the array is left alone: it
    would be zeros at every step. The mean is taken in float32 (float64 for such leaves) and dtypes are kept.
    Entries below 1e-38 times their number may count as zeros in it.
    A NaN or an infinity makes its unit NaN. There is no state.

    Args:
      axis: the axes that the mean runs over, for all arrays of rank 2 or more, negative ones counted from the
        end; or the name of a framework, as in `groups.unit`, whose biases and scales of any rank are left
        alone; or a dict from pattern to one of these, where the first pattern found in the path wins and the
        rest gets the default. PyTorch's `(out, in)` needs `axis=1`; no axes, `()`, leave an array alone.
      axis_name: inside `shard_map` or `pmap`, the mesh axes that the entries of a unit are split over, which
        are those of the inputs; see `rescale_by_norm`. Mesh axes that split the outputs must not be among
        them: each device has units of its own along these. Where one splits the inputs of some arrays and
        the outputs of others, give each kind a `centralize` of its own, with `optax.partition`. `()` if
        mesh axes split nothing but outputs.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`. Axes of
        the outputs that it names are left out by `axis_name`.

    Returns:
      A transformation with an `optax.EmptyState`.

    Raises:
      TypeError: if an axis is not an integer, or a pattern not a str.
      ValueError: if a pattern does not compile or the framework is not known; in `init`, if an axis is out
        of range or, without a framework, a rank above 6 has no axes; in `update`, inside `shard_map`, as in
        `rescale_by_norm`.

    References:
      Yong et al., [Gradient Centralization](https://arxiv.org/abs/2004.01461), 2020. `optax.centralize` means
      over all axes but the first, which are outputs in JAX's layouts.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.centralize()
    >>> grads = {"kernel": jnp.array([[1.0, 5.0], [3.0, 6.0]]), "bias": jnp.array([1.0, 5.0])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["kernel"].tolist(), updates["bias"])
    [[-1.0, -0.5], [1.0, 0.5]] [1. 5.]
    """
    where = "centralize"
    split = told(where, axis_name, specs)
    chosen = _layouts.chosen(where, axis)

    def mean_over(leaf: Leaf) -> tuple[int, ...]:
        rank = len(leaf.shape)
        if rank < 2:
            return ()
        axes = chosen(leaf)
        if isinstance(axes, tuple):
            return tuple(_layouts.in_range(where, a, leaf) for a in axes)
        if axes is None:
            return _layouts.by_rank(where, leaf)
        outputs = _layouts.outputs(leaf, axes)
        return tuple(a for a in range(rank) if a not in outputs) if outputs else ()

    def init(params: PyTree) -> optax.EmptyState:
        part = partition(_groups.whole(), params)
        for leaf, path, place in zip(part.leaves, part.paths, part.places, strict=True):
            if place is not None:
                mean_over(Leaf(path, (), leaf))
        return optax.EmptyState()

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        del params, extra_args
        part = partition(_groups.whole(), updates)
        means = [
            () if place is None else mean_over(Leaf(path, (), leaf))
            for leaf, path, place in zip(part.leaves, part.paths, part.places, strict=True)
        ]
        places = tuple(
            Place(tuple(a for a in range(leaf.ndim) if a not in axes), 0, True, True) if axes else None
            for leaf, axes in zip(part.leaves, means, strict=True)
        )
        splits = axes_of(part._replace(places=places), part.leaves, split)
        chosen = {}
        for k, (leaf, axes) in enumerate(zip(part.leaves, means, strict=True)):
            count = math.prod(leaf.shape[a] for a in axes) * _mesh.axis_size(splits[k])
            if count > 1:
                chosen[k] = _Unit(widen(jnp.asarray(leaf), real_dtype(leaf)), axes, count)
        totals = across(jax.lax.psum, {k: unit.total() for k, unit in chosen.items()}, part.leaves, splits)
        return together(part, {k: unit.without(totals[k]) for k, unit in chosen.items()}), state

    return optax.GradientTransformationExtraArgs(init, update)


class _Unit(NamedTuple):
    """An array, the axes of its mean, and how many entries this is the mean of, on all devices."""

    leaf: jax.Array
    axes: tuple[int, ...]
    entries: int

    @property
    def least(self) -> float:
        """A power of two, so that a sum does not overflow."""
        return 2.0 ** -math.ceil(math.log2(self.entries))

    def total(self) -> jax.Array:
        scaled = times(self.leaf, number(self.least, real_dtype(self.leaf)))
        return jnp.sum(scaled, axis=self.axes, keepdims=True)

    def without(self, total: jax.Array) -> jax.Array:
        """The array less the mean that the total over all devices gives."""
        total = jnp.where(jnp.isfinite(total), total, jnp.nan)  # less infinity, a number is no NaN
        return self.leaf - times(total, number(1 / (self.least * self.entries), real_dtype(self.leaf)))
