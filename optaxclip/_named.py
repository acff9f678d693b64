"""Published methods by name, each one return statement. `docs/methods.md` has them in one table."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax

from optaxclip import groups as _groups, limits, norms, responses
from optaxclip._apply import Nonfinite
from optaxclip._base import Groups, PyTree
from optaxclip._layouts import Axes
from optaxclip._rescale import named, rescale_by_norm
from optaxclip._split import AxisName
from optaxclip.limits import LimitLike, as_limit

Transformation: TypeAlias = optax.GradientTransformationExtraArgs


@named()
def clip_by_global_norm(
    max_norm: LimitLike,
    *,
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Scales the whole update down so that its L2 norm is at most `max_norm`; its direction is kept.

    $$u' = u \min\Big(1, \frac{c}{n}\Big), \qquad n = \|u\|_2 = \sqrt{\textstyle\sum_i |u_i|^2}$$

    Args:
      max_norm: the limit: a number, an array of shape `()`, or `(rows,)` where there are several groups, a
        schedule or one of `optaxclip.limits`.
      eps: added to the norm. 1e-6 gives the numbers of `torch.nn.utils.clip_grad_norm_`.
      nonfinite: what becomes of a NaN or an infinity; see `rescale_by_norm`.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if `max_norm` is no limit.
      ValueError: if `max_norm` is a negative or NaN number.

    References:
      Pascanu et al., [On the difficulty of training recurrent neural
      networks](https://arxiv.org/abs/1211.5063), 2013. The same in libraries:
      [optax.clip_by_global_norm](https://optax.readthedocs.io/en/latest/api/transformations.html),
      [torch.nn.utils.clip_grad_norm_](https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html).

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_by_global_norm(1.0)
    >>> grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["a"], updates["b"])
    [0.6] [0.8]
    """
    return rescale_by_norm(
        as_limit(max_norm, "clip_by_global_norm", "max_norm"),
        eps=eps,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named()
def clip_by_layerwise_norm(
    max_norm: LimitLike,
    *,
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Scales each layer down so that its own L2 norm, of kernel and bias together, is at most `max_norm`.

    $$u'_g = u_g \min(1, c / \|u_g\|_2) \quad \text{for each layer } g$$

    Args:
      max_norm: the limit for each layer; see `clip_by_global_norm`. `limits.budget(c)` divides one limit on
        the whole update among the layers.
      eps: as in `rescale_by_norm`, like the following.
      nonfinite: what becomes of a NaN or an infinity.
      axis_name: mesh axes inside `shard_map` or `pmap`.
      specs: how leaves are split over them.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if `max_norm` is no limit.
      ValueError: if `max_norm` is a negative or NaN number.

    References:
      McMahan et al., [Learning Differentially Private Recurrent Language
      Models](https://arxiv.org/abs/1710.06963), 2018, as per-layer clipping, there of each user's update.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_by_layerwise_norm(1.0)
    >>> grads = {"dense": {"w": jnp.array([3.0]), "b": jnp.array([4.0])}, "head": {"w": jnp.array([0.5])}}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["dense"]["w"], updates["dense"]["b"], updates["head"]["w"])
    [0.6] [0.8] [0.5]
    """
    return rescale_by_norm(
        as_limit(max_norm, "clip_by_layerwise_norm", "max_norm"),
        groups=_groups.layer(),
        eps=eps,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named()
def clip_by_leafwise_norm(
    max_norm: LimitLike,
    *,
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Scales each leaf down so that its own L2 norm is at most `max_norm`. Keras calls it `clipnorm`.

    $$u'_g = u_g \min(1, c / \|u_g\|_2) \quad \text{for each leaf } g$$

    Args:
      max_norm: the limit for each leaf; see `clip_by_global_norm`.
      eps: as in `rescale_by_norm`, like the following.
      nonfinite: what becomes of a NaN or an infinity.
      axis_name: mesh axes inside `shard_map` or `pmap`.
      specs: how leaves are split over them.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if `max_norm` is no limit.
      ValueError: if `max_norm` is a negative or NaN number.

    References:
      [Keras' `clipnorm`](https://keras.io/api/optimizers/), and
      [tf.clip_by_norm](https://www.tensorflow.org/api_docs/python/tf/clip_by_norm) of one array.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_by_leafwise_norm(1.0)
    >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["w"], updates["b"])
    [0.6 0.8] [0.5]
    """
    return rescale_by_norm(
        as_limit(max_norm, "clip_by_leafwise_norm", "max_norm"),
        groups=_groups.leaf(),
        eps=eps,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named()
def clip_by_groupwise_norm(
    max_norm: LimitLike,
    groups: Groups,
    *,
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Scales each group down so that its own L2 norm is at most `max_norm`.

    $$u'_g = u_g \min(1, c_g / \|u_g\|_2) \quad \text{for each group } g$$

    Args:
      max_norm: the limit for each group; see `clip_by_global_norm`. `limits.per_group` has one for each.
      groups: which entries share a norm, one of `optaxclip.groups`.
      eps: as in `rescale_by_norm`, like the following.
      nonfinite: what becomes of a NaN or an infinity.
      axis_name: mesh axes inside `shard_map` or `pmap`.
      specs: how leaves are split over them.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if `max_norm` is a negative or NaN number.

    References:
      `grad_norm_group` of [Megatron-LM](https://github.com/NVIDIA/Megatron-LM).

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_by_groupwise_norm(1.0, oc.groups.regex({"embedding": "embed", "rest": ".*"}))
    >>> grads = {"embed": jnp.array([6.0, 8.0]), "a": jnp.array([0.3]), "b": jnp.array([0.4])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["embed"], updates["a"], updates["b"])
    [0.6 0.8] [0.3] [0.4]
    """
    return rescale_by_norm(
        as_limit(max_norm, "clip_by_groupwise_norm", "max_norm"),
        groups=groups,
        eps=eps,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named()
def clip_by_unitwise_norm(
    max_norm: LimitLike,
    axis: Axes = None,
    *,
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Scales each output unit of each leaf down so that its own L2 norm is at most `max_norm`.

    $$u'_g = u_g \min(1, c / \|u_g\|_2) \quad \text{for each output unit } g$$

    Args:
      max_norm: the limit for each unit; see `clip_by_global_norm`.
      axis: the axes that the norm of a unit runs over; see `groups.unit` for the default.
      eps: as in `rescale_by_norm`, like the following.
      nonfinite: what becomes of a NaN or an infinity.
      axis_name: mesh axes inside `shard_map` or `pmap`.
      specs: how leaves are split over them.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if `max_norm` is a negative or NaN number; in `init`, if an axis is out of range.

    References:
      Brock et al., [High-Performance Large-Scale Image Recognition Without
      Normalization](https://arxiv.org/abs/2102.06171), 2021, for the units; there the limit is relative.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_by_unitwise_norm(1.0)
    >>> grads = {"kernel": jnp.array([[3.0, 0.3], [4.0, 0.4]])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["kernel"])
    [[0.6 0.3]
     [0.8 0.4]]
    """
    return rescale_by_norm(
        as_limit(max_norm, "clip_by_unitwise_norm", "max_norm"),
        groups=_groups.unit(axis),
        eps=eps,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named()
def clip_by_block_rms(
    threshold: LimitLike,
    *,
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Scales each leaf down so that the root mean square of its entries is at most `threshold`.

    $$u'_g = u_g \min(1, c / n_g), \qquad
    n_g = \|u_g\|_2 / \sqrt{d_g} \quad \text{for each leaf } g \text{ of } d_g \text{ entries}$$

    Args:
      threshold: the limit for each leaf; see `clip_by_global_norm`.
      eps: as in `rescale_by_norm`, like the following.
      nonfinite: what becomes of a NaN or an infinity.
      axis_name: mesh axes inside `shard_map` or `pmap`.
      specs: how leaves are split over them.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if `threshold` is no limit.
      ValueError: if `threshold` is a negative or NaN number.

    References:
      Shazeer and Stern, [Adafactor](https://arxiv.org/abs/1804.04235), 2018: update clipping with 1.0. The
      same in Optax: [optax.clip_by_block_rms](https://optax.readthedocs.io/en/latest/api/transformations.html).

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.clip_by_block_rms(1.0)
    >>> grads = {"w": jnp.array([2.0, -2.0, 2.0])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["w"])
    [ 1. -1.  1.]
    """
    return rescale_by_norm(
        as_limit(threshold, "clip_by_block_rms", "threshold"),
        groups=_groups.leaf(),
        norm=norms.rms(),
        eps=eps,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named(ratio="clipping", floor="eps")
def adaptive_grad_clip(
    clipping: float | jax.Array | Callable[[Any], Any],
    eps: float | jax.Array = 1e-3,
    axis: Axes = None,
    *,
    groups: Groups | None = None,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Scales each output unit down so that its norm is at most `clipping` times its parameters' norm.

    $$\text{limit} = \lambda \max(\|w\|, \epsilon)$$

    The paper uses 0.01 and leaves the final layer out: `groups=groups.regex` or `groups.labels` can name it
    None, or mask it with `optax.masked`. Parameters are needed in `update`.

    Args:
      clipping: the largest ratio of update to parameters: a number, an array of shape `()` or `(rows,)`, or a
        schedule.
      eps: the least that a unit's parameters count as, so that units initialised at zero can move.
      axis: the axes that the norm of a unit runs over; see `groups.unit` for the default.
      groups: a grouping in place of units, such as `groups.leaf()`.
      nonfinite: what becomes of a NaN or an infinity; see `rescale_by_norm`.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is negative or NaN, or both `axis` and `groups` are given; in `init`, if an
        axis is out of range; in `update`, if `params` is missing.

    References:
      Brock et al., [High-Performance Large-Scale Image Recognition Without
      Normalization](https://arxiv.org/abs/2102.06171), 2021.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.adaptive_grad_clip(0.1)
    >>> grads = {"kernel": jnp.array([[3.0, 0.3], [4.0, 0.4]])}
    >>> params = {"kernel": jnp.array([[10.0, 10.0], [0.0, 0.0]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> print(updates["kernel"])
    [[0.6 0.3]
     [0.8 0.4]]
    """
    if groups is not None and axis is not None:
        raise ValueError("adaptive_grad_clip: both axis and groups are given. Pass groups.unit(axis).")
    return rescale_by_norm(
        limits.relative(clipping, eps),
        groups=groups or _groups.unit(axis),
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named()
def normalize_by_global_norm(
    norm: LimitLike = 1.0,
    *,
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Scales the whole update to the L2 norm `norm`, up or down: normalised gradient descent.

    $$u' = c\,u / \|u\|_2$$

    An update of zeros stays zeros.

    Args:
      norm: the norm to give the update; see `clip_by_global_norm`.
      eps: as in `rescale_by_norm`, like the following.
      nonfinite: what becomes of a NaN or an infinity.
      axis_name: mesh axes inside `shard_map` or `pmap`.
      specs: how leaves are split over them.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if `norm` is no limit.
      ValueError: if `norm` is a negative or NaN number.

    References:
      Cutkosky and Mehta, [Momentum Improves Normalized SGD](https://arxiv.org/abs/2002.03305), 2020.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.normalize_by_global_norm()
    >>> grads = {"a": jnp.array([0.3]), "b": jnp.array([0.4])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["a"], updates["b"])
    [0.6] [0.8]
    """
    return rescale_by_norm(
        as_limit(norm, "normalize_by_global_norm", "norm"),
        response=responses.normalize(),
        eps=eps,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )


@named()
def normalize_by_layerwise_norm(
    norm: LimitLike = 1.0,
    *,
    eps: jax.typing.ArrayLike = 0.0,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> Transformation:
    r"""Scales each layer to the L2 norm `norm`, up or down: the block-normalised gradient.

    $$u'_g = c\,u_g / \|u_g\|_2 \quad \text{for each layer } g$$

    A layer of zeros stays zeros.

    Args:
      norm: the norm to give each layer; see `clip_by_global_norm`.
      eps: as in `rescale_by_norm`, like the following.
      nonfinite: what becomes of a NaN or an infinity.
      axis_name: mesh axes inside `shard_map` or `pmap`.
      specs: how leaves are split over them.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if `norm` is no limit.
      ValueError: if `norm` is a negative or NaN number.

    References:
      Yu et al., [Block-Normalized Gradient Method](https://arxiv.org/abs/1707.04822), 2017.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.normalize_by_layerwise_norm()
    >>> grads = {"a": {"w": jnp.array([0.3, 0.4])}, "b": {"w": jnp.array([6.0, 8.0])}}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["a"]["w"], updates["b"]["w"])
    [0.6 0.8] [0.6 0.8]
    """
    return rescale_by_norm(
        as_limit(norm, "normalize_by_layerwise_norm", "norm"),
        groups=_groups.layer(),
        response=responses.normalize(),
        eps=eps,
        nonfinite=nonfinite,
        axis_name=axis_name,
        specs=specs,
    )
