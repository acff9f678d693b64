"""What no factor per group can express: rules for single entries, that remember."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import _checks, _mesh, groups as _groups
from optaxclip._base import PyTree
from optaxclip._learning import in_float32, power_mean
from optaxclip._measure import largest
from optaxclip._partition import partition
from optaxclip._read import modulus, times, unit, widen
from optaxclip._split import AxisName, axes_of, told
from optaxclip._walk import (
    across,
    count,
    counted,
    counters,
    number,
    real_dtype,
    rest,
    together,
    walk,
    zeros,
)


class ACClipState(NamedTuple):
    """The state of the method, and what it did at the last update. See `acclip`.

    Attributes:
      step: how many updates there were, int32, `()`.
      momentum: the running means of the entries, a tree like the parameters in float32.
      bound: the running power means of their moduli, a tree like the parameters in float32.
      share: which part of the entries was clipped, float32, `()`.
      clipped: in how many steps any entry was clipped, int32, `()`.
      nonfinite: in how many steps any entry was NaN or infinite, int32, `()`.
    """

    step: jax.Array
    momentum: PyTree
    bound: PyTree
    share: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array


class MaskSpikesState(NamedTuple):
    """The state of the method, and what it did at the last update. See `mask_spikes`.

    Attributes:
      step: how many updates there were, int32, `()`.
      since: how many updates there were in this period, int32, `()`.
      rms: the roots of the second moments, a tree like the parameters in float32.
      share: which part of the entries was a spike, float32, `()`.
      clipped: in how many steps any entry was a spike, int32, `()`.
      nonfinite: in how many steps any entry was NaN or infinite, int32, `()`.
    """

    step: jax.Array
    since: jax.Array
    rms: PyTree
    share: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array


class AdaptiveValueClipState(NamedTuple):
    """The state of the method, and what it did at the last update. See `adaptive_value_clip`.

    Vectors have one entry per leaf, in natural order of the leaves' paths.

    Attributes:
      step: how many updates there were, int32, `()`.
      limit: the running means of the largest moduli without bias, float32, `(leaves,)`; 0 before there
        is one.
      weight: how much of the mean there is, float32, `(leaves,)`, from 0 to 1.
      share: which part of the entries was clipped, float32, `()`.
      clipped: in how many steps any entry of the leaf was clipped, int32, `(leaves,)`.
      nonfinite: in how many steps any entry of the leaf was NaN or infinite, int32, `(leaves,)`.
    """

    step: jax.Array
    limit: jax.Array
    weight: jax.Array
    share: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array


def acclip(
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.99,
    alpha: float | jax.Array = 1.0,
    eps: float | jax.Array = 1e-5,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum, each entry of which is clipped to a running mean of its own modulus.

    $$m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
    \tau_t^\alpha = \beta_2 \tau_{t-1}^\alpha + (1 - \beta_2) |g_t|^\alpha, \qquad
    u_t = \min\left(1, \frac{\tau_t}{|m_t| + \epsilon}\right) m_t$$

    It stands for the momentum of the optimizer: put `optax.sgd(learning_rate)` behind it. Both means start at
    0, as in the paper, so that the first steps are small: about (1 - β2) of the gradient. All is reckoned in
    float32 (float64 for such leaves), and dtypes are kept. A NaN or infinite entry comes out as it is and is
    not learned; other entries do not notice. The state is twice as large as the parameters.

    Args:
      b1: β1, the weight of the past in the momentum per step, from 0 to 1.
      b2: β2, the same in the bound.
      alpha: α, the power that is averaged; positive.
      eps: ϵ, added to the momentum's modulus. Bounds well below it are not reached.

    Returns:
      A transformation with an `ACClipState`.

    Raises:
      TypeError: if an argument is neither a number nor an array.
      ValueError: if a number is outside its range; in `update`, if the tree is not that of `init`.

    References:
      Zhang et al., [Why are Adaptive Methods Good for Attention
      Models?](https://arxiv.org/abs/1912.03194), 2020, as ACClip. This is the paper's algorithm; the authors'
      code divides by the root of the mean square instead, by default.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.acclip(b1=0.0, b2=0.5, eps=0.0)
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> for grads in ([4.0, 1.0], [4.0, 9.0]):
    ...     updates, state = tx.update({"w": jnp.array(grads)}, state)
    >>> print(updates["w"])
    [3.   4.75]
    """
    where = "acclip"
    _checks.within(where, 0, 1, b1=b1, b2=b2)
    _checks.positive(where, alpha=alpha)
    _checks.nonnegative(where, eps=eps)

    def rule(leaf: jax.Array, k: int, momentum: jax.Array, bound: jax.Array):
        del k
        real = bound.dtype
        known = jnp.isfinite(leaf)
        seen = jnp.where(known, leaf, 0)
        learned = times(momentum, number(b1, real)) + times(seen, rest(b1, real))
        momentum = jnp.where(known, learned, momentum)
        bound = jnp.where(known, power_mean(modulus(seen), bound, rest(b2, real), alpha), bound)
        length = modulus(momentum)
        size = length + number(eps, real)
        outside = known & (bound < size) & (momentum != 0)
        first = jnp.where(outside, _first(length), 1)
        by = jnp.where(outside, bound / jnp.where(outside, size * first, 1), 1)
        clipped = times(times(momentum, first), by)
        return jnp.where(known, clipped, leaf), (momentum, bound), outside

    def init(params: PyTree) -> ACClipState:
        return ACClipState(momentum=zeros(params), bound=zeros(params, modulus=True), **counters())

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        del params, extra_args
        _checks.state(where, state, ACClipState)
        walked = walk(where, _groups.whole(), updates, (state.momentum, state.bound), rule)
        momentum, bound = walked.trees
        new = ACClipState(momentum=momentum, bound=bound, **counted(state, walked))
        return together(walked.part, walked.made), new

    return optax.GradientTransformationExtraArgs(init, update)


def mask_spikes(
    threshold: float | jax.Array = 5000.0,
    period: int = 500,
    grace: int = 20,
    decay: float | jax.Array = 0.999,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips entries whose square is more than `threshold` times their second moment.

    $$g'_t = \operatorname{sign}(g_t) \min(|g_t|, \sqrt{\theta v_{t-1}}), \qquad
    v_t = d\,v_{t-1} + (1 - d)\,g_t'^2$$

    The second moment starts at 0 and is not freed of its bias. It is forgotten at update `period` and every
    `period` after. Nothing is clipped before update `grace`, nor in the first `grace` updates from one at
    which it is forgotten. An entry whose second moment is 0 is left as it is.

    All is reckoned in float32 (float64 for such leaves), and dtypes are kept. Infinite entries are spikes and
    NaN stays NaN; neither is learned, and other entries do not notice. Zeros are learned, as by Adam. The
    state is as large as the parameters.

    Args:
      threshold: θ, how many times its second moment an entry's square may be; positive.
      period: how many updates a period has. Where the optimizer is in `reset_momentum`, the same as there.
      grace: how many updates to wait, counted from 0 at a reset, and from 1 at the start; less than `period`.
      decay: d, the weight of the past in the second moment per step, from 0 to 1.

    Returns:
      A transformation with a `MaskSpikesState`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number is outside its range; in `update`, if the tree is not that of `init`.

    References:
      Huang et al., [SPAM: Spike-Aware Adam with Momentum Reset](https://arxiv.org/abs/2501.06842), 2025. In
      the authors' code any gradient of an entry whose second moment is 0, such as a row of an embedding that
      has not been used, is set to 0; and the second moment is Adam's, while here it is of its own.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.mask_spikes(threshold=4.0, grace=2, decay=0.0)
    >>> state = tx.init({"w": jnp.zeros(3)})
    >>> for grads in ([1.0, 1.0, 0.0], [1.5, -9.0, 9.0]):
    ...     updates, state = tx.update({"w": jnp.array(grads)}, state)
    >>> print(updates["w"])
    [ 1.5 -2.   9. ]
    """
    where = "mask_spikes"
    _checks.positive(where, threshold=threshold)
    _checks.whole_number(where, least=1, period=period)
    _checks.whole_number(where, grace=grace)
    _checks.within(where, 0, 1, decay=decay)
    if grace >= period:
        raise ValueError(f"{where}: grace is {grace}, for a period of {period}. Pass less than {period}.")

    def init(params: PyTree) -> MaskSpikesState:
        return MaskSpikesState(since=jnp.zeros((), jnp.int32), rms=zeros(params, modulus=True), **counters())

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        del params, extra_args
        _checks.state(where, state, MaskSpikesState)
        since = jnp.where(state.since >= period - 1, 0, state.since + 1)

        def rule(leaf: jax.Array, k: int, rms: jax.Array):
            del k
            rms = jnp.where(since == 0, 0, rms)
            size = modulus(leaf)
            bound = jnp.sqrt(number(threshold, rms.dtype)) * rms
            outside = (since >= grace) & (rms > 0) & (size > bound)
            clipped = jnp.where(outside, times(unit(leaf), bound), leaf)
            seen = jnp.where(outside, bound, size)
            known = jnp.isfinite(leaf)
            learned = power_mean(jnp.where(known, seen, 0), rms, rest(decay, rms.dtype), 2)
            return clipped, (jnp.where(known, learned, rms),), outside

        walked = walk(where, _groups.whole(), updates, (state.rms,), rule)
        new = MaskSpikesState(since=since, rms=walked.trees[0], **counted(state, walked))
        return together(walked.part, walked.made), new

    return optax.GradientTransformationExtraArgs(init, update)


def _first(size: jax.Array) -> jax.Array:
    """What to multiply entries by first: a bound over a large number may be too small, and taken for zero."""
    return jnp.where(size > 1, 2.0**-64, 1.0).astype(size.dtype)


def adaptive_value_clip(
    decay: float | jax.Array = 0.999, *, axis_name: AxisName = None, specs: PyTree = None
) -> optax.GradientTransformationExtraArgs:
    r"""Scales down the entries of a leaf that are above the running mean of its largest modulus.

    $$T_t = \frac{m_t}{1 - d^t}, \qquad m_t = d\,m_{t-1} + (1 - d)\,g^{\max}_t, \qquad
    g'_i = \frac{g_i}{g^{\max}_t}\,T_t \text{ where } |g_i| > T_t$$

    with the largest modulus of each leaf by itself. The largest entry becomes T and others that were above T
    keep their ratio to it, so that they may end up below entries that were not: this is no clamp.

    Nothing is clipped at the first step. A leaf of zeros, or with an entry that is NaN or infinite, is not
    learned from; there the largest finite modulus counts, infinite entries become T and NaN stays NaN. All is
    reckoned in float32 (float64 for such leaves), and dtypes are kept. The state is four numbers per leaf.

    Args:
      decay: d, the weight of the past per step, from 0 to 1.
      axis_name: inside `shard_map` or `pmap`, the mesh axes that leaves are split over, as in
        `rescale_by_norm`: the largest modulus is that of all devices, and the state is the same on them.
      specs: how leaves are split over them, where JAX keeps no track of it; see there.

    Returns:
      A transformation with an `AdaptiveValueClipState`.

    Raises:
      TypeError: if `decay` is neither a number nor an array.
      ValueError: if it is a number outside its range; in `update`, if the tree is not that of `init`.

    References:
      Huang et al., [Stable-SPAM](https://arxiv.org/abs/2502.17055), 2025, as AdaClip. The authors' reset of
      the momentum resets the count t and not the mean, which puts T 316 times too high; here both belong
      together.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> tx = oc.adaptive_value_clip(0.5)
    >>> state = tx.init({"w": jnp.zeros(3)})
    >>> for grads in ([1.0, 1.0, 1.0], [-7.0, 6.0, 1.0]):
    ...     updates, state = tx.update({"w": jnp.array(grads)}, state)
    >>> print(updates["w"])
    [-5.        4.285714  1.      ]
    """
    where = "adaptive_value_clip"
    split = told(where, axis_name, specs)
    _checks.within(where, 0, 1, decay=decay)

    def init(params: PyTree) -> AdaptiveValueClipState:
        rows = (len(partition(_groups.leaf(), params).table.names),)
        vectors = {name: jnp.zeros(rows, jnp.float32) for name in ("limit", "weight")}
        counts = {name: jnp.zeros(rows, jnp.int32) for name in ("clipped", "nonfinite")}
        return AdaptiveValueClipState(**(counters() | vectors | counts))

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        del params, extra_args
        _checks.state(where, state, AdaptiveValueClipState)
        part = partition(_groups.leaf(), updates)
        rows = {k: place.first for k, place in enumerate(part.places) if place is not None}
        _checks.same_rows(where, part.table.names, state.limit.shape, "leaves")
        step = jnp.asarray(optax.safe_increment(state.step))
        if not rows:
            return updates, state._replace(step=step)
        order = sorted(rows, key=rows.__getitem__)
        splits = axes_of(part, part.leaves, split)
        peaks = across(largest, {k: _peak(part.leaves[k]) for k in order}, part.leaves, splits)
        peak = jnp.stack([_in_state(peaks[k][0]) for k in order])
        bad = jnp.stack([peaks[k][1].astype(jnp.float32) for k in order])
        limit, weight = _learned(state, peak, bad == 0, rest(decay, jnp.float32))
        bound = jnp.where(weight > 0, limit, jnp.inf)
        made, over = {}, {}
        for k, row in rows.items():
            made[k], over[k] = _to_limit(part.leaves[k], peaks[k][0], bound[row])
        over = across(jax.lax.psum, over, part.leaves, splits)
        clipped = jnp.stack([over[k] for k in order])
        entries = sum(part.leaves[k].size * _mesh.axis_size(splits[k]) for k in rows)
        return together(part, made), AdaptiveValueClipState(
            step=step,
            limit=limit,
            weight=weight,
            share=jnp.sum(clipped) / np.float32(entries),
            clipped=state.clipped + (clipped > 0).astype(jnp.int32),
            nonfinite=state.nonfinite + (bad > 0).astype(jnp.int32),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _peak(leaf: jax.Array) -> jax.Array:
    """The largest finite modulus of a leaf, and 1 if not all of it is finite, in its accumulation dtype."""
    wide = widen(jnp.asarray(leaf), real_dtype(leaf))
    finite = jnp.isfinite(wide)
    peak = jnp.max(jnp.where(finite, modulus(wide), 0))
    return jnp.stack([peak, (~jnp.all(finite)).astype(peak.dtype)])


def _in_state(peak: jax.Array) -> jax.Array:
    return jnp.where(peak > 0, in_float32(peak), 0)


def _learned(
    state: AdaptiveValueClipState, peak: jax.Array, finite: jax.Array, share: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The means without bias, and their weights: the mean of one peak is that peak, to the last bit."""
    known = finite & (peak > 0)
    weight = state.weight + share * (1 - state.weight)
    whole = jnp.where(weight > 0, weight, 1)
    new, old = share / whole, state.weight * (1 - share) / whole
    # From the one that counts more, or a mean far below the other would be lost.
    limit = jnp.where(new > 0.5, peak + old * (state.limit - peak), state.limit + new * (peak - state.limit))
    return jnp.where(known, limit, state.limit), jnp.where(known, weight, state.weight)


def _to_limit(leaf: jax.Array, peak: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The leaf with entries above the bound scaled so that the peak becomes it, and how many these were.

    It comes in its accumulation dtype, as `peak` does.
    """
    wide = widen(jnp.asarray(leaf), real_dtype(leaf))
    # In the dtype of the bound, which is rounded to it: a peak is not outside of itself.
    outside = modulus(wide).astype(bound.dtype) > bound
    bound, first = bound.astype(peak.dtype), _first(peak)
    peak = jnp.where(peak > 0, peak, 1) * first
    scaled = times(times(wide, first), jnp.where(jnp.isfinite(bound), bound, 0) / peak)
    scaled = jnp.where(jnp.isfinite(wide), scaled, times(unit(wide), bound))
    return jnp.where(outside, scaled, wide), count(outside)
