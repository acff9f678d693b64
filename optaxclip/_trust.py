"""Methods that need second moments, parameters or the learning rate: StableAdamW, LARC and LAMB's ratio."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks, groups as _groups, norms, responses
from optaxclip._apply import Nonfinite, checked, measured, table_of
from optaxclip._base import Groups, Limit, PyTree
from optaxclip._learning import power_mean
from optaxclip._partition import Partition, matching, named_leaves, partition
from optaxclip._read import times, widen
from optaxclip._rescale import renamed, rescale_by_norm
from optaxclip._scale import scale
from optaxclip._split import AxisName
from optaxclip._walk import number, rest, together, walk, zeros
from optaxclip.limits import as_limit

Number: TypeAlias = float | jax.Array


class ScaleByStableAdamState(NamedTuple):
    """The state of the method, and what it did at the last update. See `scale_by_stable_adam`.

    Vectors have one entry per leaf, in natural order of the leaves' paths.

    Attributes:
      step: how many updates there were, int32, `()`.
      mean: the running means of the entries, a tree like the parameters in float32.
      rms: the roots of their second moments, a tree like the parameters in float32.
      weights: how much of the two there is, float32, `(2,)`; what takes their bias out.
      ratio: the root mean square of entries over their `rms`, float32, `(leaves,)`.
      clipped: how often that was above the threshold, int32, `(leaves,)`.
      nonfinite: how often an entry was NaN or infinite, int32, `(leaves,)`.
    """

    step: jax.Array
    mean: PyTree
    rms: PyTree
    weights: jax.Array
    ratio: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array


def scale_by_stable_adam(
    b1: Number = 0.9,
    b2: Number = 0.99,
    eps: Number = 1e-6,
    threshold: Number = 1.0,
    weight_decay: Number = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's direction, smaller for each leaf whose gradients outgrow their second moment.

    $$u = \frac{1}{\max(1, r / d)} \left(\frac{m}{\sqrt v + \epsilon} + \lambda w\right), \qquad
    r = \sqrt{\operatorname{mean} \frac{g^2}{\max(v, \epsilon^2)}}$$

    In this order: moments, the current gradient among them; the ratio r of each leaf, from g and not from m;
    the direction; weight decay λ; the division of both by the ratio, as by a smaller learning rate. The
    weights of the past in the moments are $(\beta^t - \beta) / (\beta^t - 1)$, which leaves no bias to
    correct.

    Moments are kept in float32 (float64 for such leaves), the second by its root, so that no square leaves
    the range; dtypes are kept. An entry that is NaN or infinite is not learned; the others of the leaf are.
    Where a second moment and ϵ are 0, so is the direction. The state is twice as large as the parameters, and
    three numbers per leaf.

    Args:
      b1: β1, the weight of the past in the mean per step, from 0 to 1.
      b2: β2, the same in the second moment.
      eps: ϵ, added to the root of the second moment, and the least that it counts as in the ratio.
      threshold: d, the ratio from which a leaf is scaled down; positive.
      weight_decay: λ, how much of the parameters to add.
      mask: which parameters decay: a tree of booleans, a prefix of it, or a function from the parameters to
        one; None for all.
      nonfinite: what becomes of a leaf with a NaN or infinite entry: `"propagate"` makes all of it NaN,
        `"zero"` makes zeros of it.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`.

    Returns:
      A transformation with a `ScaleByStableAdamState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range; in `update`, if the tree is not that of `init` or
        parameters to decay are missing.

    References:
      Wortsman et al., [Stable and low-precision training for large-scale vision-language
      models](https://arxiv.org/abs/2304.13013), 2023, as StableAdamW.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.scale_by_stable_adam(b1=0.0, b2=0.5, eps=0.0)
    >>> state = tx.init({"w": jnp.zeros(1)})
    >>> for size in (1.0, 1.0, 100.0):
    ...     updates, state = tx.update({"w": jnp.array([size])}, state)
    ...     print(updates["w"], state.ratio)
    [1.] [1.]
    [1.] [1.]
    [1.] [1.322826]
    """
    where = "scale_by_stable_adam"
    _checks.within(where, 0, 1, b1=b1, b2=b2)
    _checks.nonnegative(where, eps=eps, weight_decay=weight_decay)
    _checks.positive(where, threshold=threshold)
    options = checked(where, _groups.leaf(), norms.rms(), responses.clip(), 0.0, nonfinite, axis_name, specs)
    decays = not (_checks.is_number(weight_decay) and weight_decay == 0)

    def init(params: PyTree) -> ScaleByStableAdamState:
        rows = (len(partition(options.groups, params).table.names),)
        step, clipped, bad = (jnp.zeros(shape, jnp.int32) for shape in ((), rows, rows))
        weights, ratio = (jnp.zeros(shape, jnp.float32) for shape in ((2,), rows))
        return ScaleByStableAdamState(
            step, zeros(params), zeros(params, modulus=True), weights, ratio, clipped, bad
        )

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        del extra_args
        _checks.state(where, state, ScaleByStableAdamState)
        shares = jnp.stack([rest(b1, jnp.float32), rest(b2, jnp.float32)])
        weights = state.weights + shares * (1 - state.weights)
        shares = shares / jnp.where(weights > 0, weights, 1)
        walked = walk(where, options.groups, updates, (state.mean, state.rms), _adam(shares, eps))
        mean, rms = walked.trees
        new = state._replace(
            step=jnp.asarray(optax.safe_increment(state.step)), mean=mean, rms=rms, weights=weights
        )
        part, made = walked.part, walked.made
        if not made:
            return updates, new
        if decays:
            made = _with_decay(part, made, params, weight_decay, mask)
        ratios = [walked.noted.get(k, leaf) for k, leaf in enumerate(part.leaves)]
        ratio = measured(part, ratios, table_of(part, options), options).norm
        by = 1 / jnp.maximum(1, ratio / number(threshold, ratio.dtype))
        scaled = {}
        for k, x in made.items():
            own = by[part.places[k].first].astype(walked.noted[k].dtype)  # type: ignore[union-attr]
            scaled[k] = times(x, own)
            if nonfinite == "zero":
                scaled[k] = jnp.where(jnp.isnan(own), jnp.zeros_like(x), scaled[k])
        over, bad = (x.astype(jnp.int32) for x in (by < 1, jnp.isnan(ratio)))
        return together(part, scaled), new._replace(
            ratio=ratio.astype(jnp.float32), clipped=state.clipped + over, nonfinite=state.nonfinite + bad
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _adam(shares: jax.Array, eps: Any) -> Callable:
    """The rule that learns moments; it notes what each gradient is relative to its second moment."""

    def rule(leaf: jax.Array, k: int, mean: jax.Array, rms: jax.Array):
        del k
        real = rms.dtype
        first, second = shares[0].astype(real), shares[1].astype(real)
        known = jnp.isfinite(jnp.abs(leaf))
        seen = jnp.where(known, leaf, 0)
        mean = jnp.where(known, times(mean, 1 - first) + times(seen, first), mean)
        rms = jnp.where(known, power_mean(jnp.abs(seen), rms, second, 2), rms)
        least = number(eps, real)
        ratio = jnp.abs(seen) / jnp.where(rms > 0, jnp.maximum(rms, least), 1)
        direction = times(mean, 1 / jnp.where(rms + least > 0, rms + least, 1))
        return direction, (mean, rms), jnp.where(known, ratio, jnp.nan)

    return rule


def _with_decay(part: Partition, made: dict, params: PyTree, weight_decay: Any, mask: Any) -> dict:
    found = matching(part, params, None, "scale_by_stable_adam")
    spared = set()
    if mask is not None:
        flags = mask(params) if callable(mask) else mask
        flags = jax.tree.map(lambda flag, below: jax.tree.map(lambda _: flag, below), flags, params)
        pairs = zip(named_leaves(params), jax.tree.leaves(flags), strict=True)
        spared = {leaf.path for leaf, flag in pairs if not flag}

    def decayed(k: int, x: jax.Array) -> jax.Array:
        if part.paths[k] in spared:
            return x
        real = jnp.finfo(x.dtype).dtype
        return x + times(widen(found[k], real), number(weight_decay, real)).astype(x.dtype)

    return {k: decayed(k, x) for k, x in made.items()}


def stable_adamw(
    learning_rate: Number | Callable[[Any], Any],
    b1: Number = 0.9,
    b2: Number = 0.99,
    eps: Number = 1e-6,
    weight_decay: Number = 1e-2,
    threshold: Number = 1.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW whose learning rate is smaller for each leaf whose gradients outgrow their second moment.

    $$w' = w - \frac{\eta}{\max(1, r / d)} \left(\frac{m}{\sqrt v + \epsilon} + \lambda w\right), \qquad
    r = \sqrt{\operatorname{mean} \frac{g^2}{\max(v, \epsilon^2)}}$$

    An optimizer, in place of clipping gradients in front of one: Adam would take the scale of a gradient out
    again. It is `scale_by_stable_adam` and then `optax.scale_by_learning_rate`; the ratio divides the weight
    decay too, as it does in the paper.

    Args:
      learning_rate: a number or a schedule.
      b1: the weight of the past in the mean per step, from 0 to 1.
      b2: the same in the second moment.
      eps: added to the root of the second moment.
      weight_decay: how much of the parameters to add before the learning rate.
      threshold: the ratio from which a leaf is scaled down, 1 in the paper.
      mask: which parameters decay; see `scale_by_stable_adam`.
      nonfinite: what becomes of a leaf with a NaN or infinite entry; see there.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`.

    Returns:
      A transformation; its state is that of `scale_by_stable_adam`, twice as large as the parameters, and
      that of the learning rate.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range; in `update`, if parameters to decay are missing.

    References:
      Wortsman et al., [Stable and low-precision training for large-scale vision-language
      models](https://arxiv.org/abs/2304.13013), 2023.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx, params = oc.stable_adamw(0.1), {"w": jnp.array([1.0, -2.0])}
    >>> updates, state = tx.update({"w": jnp.array([3.0, 3.0])}, tx.init(params), params)
    >>> print(updates["w"])
    [-0.10099997 -0.09799997]
    """
    return optax.chain(
        scale_by_stable_adam(
            b1, b2, eps, threshold, weight_decay, mask, nonfinite=nonfinite, axis_name=axis_name, specs=specs
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def larc(
    learning_rate: Number | Callable[[Any], Any],
    trust_coefficient: Number = 0.02,
    clip: bool = True,
    weight_decay: Number = 0.0,
    eps: Number = 1e-8,
    *,
    groups: Groups = _groups.leaf(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps what the optimizer does to each leaf within a share of the leaf's norm.

    $$g' = a\,(g + \lambda w), \qquad
    a = \min\left(1, \frac{1}{\eta}\,\frac{\kappa \|w\|}{\|g\| + \lambda \|w\| + \epsilon}\right)$$

    and without `clip` neither the minimum nor the learning rate η: the leaf is scaled up as well. Put
    `optax.sgd` behind it, with the same learning rate and without weight decay of its own.

    Where the norm of gradients or of parameters is 0, a is 1. So zero-initialised leaves move, and leaves
    without gradients decay as they do without this method. See `rescale_by_norm` for dtypes, NaN and
    infinity; the state is one `RescaleState`, a few numbers per leaf.

    Args:
      learning_rate: η, a number or the schedule that the optimizer has; at 0, a is 1.
      trust_coefficient: κ, the share of the norm that a step may change.
      clip: whether leaves are only ever scaled down.
      weight_decay: λ, how much of the parameters to add.
      eps: ϵ, added to the norms.
      groups: which entries share a norm, one of `optaxclip.groups`.
      nonfinite: what becomes of a NaN or an infinity; see `rescale_by_norm`.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`.

    Returns:
      A transformation with a `RescaleState`. Its `norm_after` is without the weight decay, which is added
      with the factor as the state has it, rounded to float32, to float64 leaves too.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is negative or NaN; in `update`, if `params` is missing.

    References:
      You et al., [Large Batch Training of Convolutional Networks](https://arxiv.org/abs/1708.03888), 2017.
      LARC is its form in [Apex](https://github.com/NVIDIA/apex), where weight decay stops for leaves with a
      norm of 0.

    >>> import jax.numpy as jnp, optax, optaxclip as oc
    >>> tx = optax.chain(oc.larc(0.1, 0.02), optax.sgd(0.1))
    >>> params, grads = {"w": jnp.array([0.0, 5.0])}, {"w": jnp.array([3.0, 4.0])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> print(updates["w"])
    [-0.06 -0.08]
    """
    where = "larc"
    if isinstance(learning_rate, Limit):
        raise TypeError(f"{where}: learning_rate is a Limit. Pass a number, an array or a schedule.")
    rate = as_limit(learning_rate, where, "learning_rate")
    _checks.nonnegative(where, trust_coefficient=trust_coefficient, weight_decay=weight_decay, eps=eps)
    if not isinstance(clip, bool):
        raise TypeError(f"{where}: clip is {clip!r}, of type {type(clip).__name__}. Pass True or False.")

    def local(norm, state, ctx):
        decay, least, share = (number(x, norm.dtype) for x in (weight_decay, eps, trust_coefficient))
        known = (norm > 0) & (ctx.params != 0)  # a NaN is not 0, and is not hidden
        # At most 1: a quotient by the norm that is rounded to zero would make a limit of 0.
        part = norm / jnp.where(known, norm + decay * ctx.params + least, 1)
        limit = share * (ctx.params * part)
        if clip:
            limit = limit / rate.update(norm, (), ctx)[0].astype(norm.dtype)
        return jnp.where(known, limit, jnp.inf), state

    inner = renamed(
        where,
        rescale_by_norm(
            Limit(lambda table: (), local, needs_params=True),
            groups=groups,
            response=responses.clip() if clip else responses.normalize(),
            nonfinite=nonfinite,
            axis_name=axis_name,
            specs=specs,
        ),
    )
    decays = not (_checks.is_number(weight_decay) and weight_decay == 0)

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        scaled, state = inner.update(updates, state, params, **extra_args)
        if decays and len(state.factor):
            scaled = _plus(scaled, params, state.factor * number(weight_decay, jnp.float32), groups, where)
        return scaled, state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _plus(updates: PyTree, params: PyTree, by: jax.Array, groups: Groups, where: str) -> PyTree:
    """The updates, plus parameters times a number for each row of the groups."""
    part = partition(groups, updates)
    found = matching(part, params, groups.names, where)
    chosen = {k: place for k, place in enumerate(part.places) if place is not None and place.scaled}
    wide = {
        k: jnp.float64
        if jnp.finfo(jax.dtypes.canonicalize_dtype(part.leaves[k].dtype)).bits == 64
        else jnp.float32
        for k in chosen
    }
    terms = scale(
        [widen(found[k], wide[k]) for k in chosen],
        jnp.ones_like(by),
        by,
        jnp.zeros(()),
        places=tuple(chosen.values()),
        drop=False,
    )
    made = {k: widen(part.leaves[k], wide[k]) + term for k, term in zip(chosen, terms, strict=True)}
    return together(part, made)


def lamb_trust_ratio(
    max_norm: Number = 10.0,
    min_ratio: Number = 0.0,
    max_ratio: Number = math.inf,
    eps: Number = 0.0,
    *,
    groups: Groups = _groups.leaf(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    specs: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each leaf to the norm of its parameters, with bounds on the norm and on the ratio.

    $$u' = u \min\left(\rho_1, \max\left(\rho_0, \frac{\min(\|w\|, c)}{\|u\| + \epsilon}\right)\right)$$

    Where the norm of updates or of parameters is 0, the ratio is 1. It goes behind Adam and the weight decay
    and before the learning rate. With `max_norm` and `max_ratio` at inf this is
    `optax.scale_by_trust_ratio`, but for 16-bit leaves, whose norms are added up in float32 here and may
    overflow there. With `max_norm=inf, max_ratio=1` it is LAMBC. See `rescale_by_norm` for dtypes, NaN and
    infinity; the state is one `RescaleState`, a few numbers per leaf.

    Args:
      max_norm: c, the most that the norm of parameters counts as; inf for no bound.
      min_ratio: ρ0, the least ratio.
      max_ratio: ρ1, the largest ratio; inf for no bound.
      eps: ϵ, added to the norm of updates.
      groups: which entries share a norm, one of `optaxclip.groups`.
      nonfinite: what becomes of a NaN or an infinity; see `rescale_by_norm`.
      axis_name: mesh axes inside `shard_map` or `pmap`; see `rescale_by_norm`.
      specs: how leaves are split over them, where JAX keeps no track of it; see `rescale_by_norm`.

    Returns:
      A transformation with a `RescaleState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is negative or NaN, or `min_ratio` is above `max_ratio`; in `update`, if
        `params` is missing.

    References:
      You et al., [Large Batch Optimization for Deep Learning](https://arxiv.org/abs/1904.00962), 2020, as
      LAMB: its bound of 10 is that of the authors' code. LAMBC: `trust_clip` of
      [timm](https://github.com/huggingface/pytorch-image-models).

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx, params = oc.lamb_trust_ratio(), {"w": jnp.array([0.0, 20.0])}
    >>> updates, state = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init(params), params)
    >>> print(updates["w"])
    [6. 8.]
    """
    where = "lamb_trust_ratio"
    _checks.nonnegative(where, max_norm=max_norm, min_ratio=min_ratio, max_ratio=max_ratio, eps=eps)
    if _checks.is_number(min_ratio) and _checks.is_number(max_ratio) and min_ratio > max_ratio:
        raise ValueError(
            f"{where}: min_ratio is {min_ratio!r}, above max_ratio, {max_ratio!r}. Pass one that is not."
        )

    def trust(norm, state, ctx):
        most, low, high, least = (number(x, norm.dtype) for x in (max_norm, min_ratio, max_ratio, eps))
        known = (norm > 0) & (ctx.params != 0)  # a NaN is not 0, and is not hidden
        size = jnp.where(known, norm + least, 1)
        return jnp.where(
            known, jnp.clip(jnp.minimum(ctx.params, most), low * size, high * size), jnp.inf
        ), state

    return renamed(
        where,
        rescale_by_norm(
            Limit(lambda table: (), trust, needs_params=True),
            groups=groups,
            response=responses.normalize(),
            eps=eps,
            nonfinite=nonfinite,
            axis_name=axis_name,
            specs=specs,
        ),
    )
