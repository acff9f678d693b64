"""Leaves as matrices: their singular values held against limits, one group for each matrix."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import _checks, _layouts, _mesh, _singular, groups as _groups
from optaxclip._apply import Nonfinite, reported, whole_of
from optaxclip._base import Context, Leaf, Limit, PyTree, Response, Stats
from optaxclip._layouts import Axes
from optaxclip._measure import TINY, Measured, merge
from optaxclip._partition import Partition, Place, matching, partition
from optaxclip._read import widen, without_nan
from optaxclip._rescale import blank, counted
from optaxclip._scale import Factors, factors, scale
from optaxclip._singular import View
from optaxclip._split import Split, axes_of

COLD = 8  # iterations where no vector is remembered


class SpectralState(NamedTuple):
    """The state of the spectral methods, and what they did at the last update. See `clip_by_spectral_norm`.

    Vectors have one entry for each matrix, in natural order of the leaves' paths; a stacked leaf has one for
    each of its layers. The fields are those of `RescaleState`, with one more.

    Attributes:
      step: how many updates there were, int32, `()`.
      rule: the limit's own state.
      vector: the right singular vectors of all matrices one after another, float32, `(entries,)`, of complex
        ones the real and then the imaginary parts; 0 before the first update. An empty tuple
        where none are remembered.
      norm: the largest singular values that came in, float32, `(matrices,)`.
      norm_after: the largest that went out, float32, `(matrices,)`.
      limit: the limits they were held against, float32, `(matrices,)`.
      factor: what the largest were multiplied by, float32, `(matrices,)`; NaN where a NaN or an infinity was
        propagated.
      clipped: how often the factor was not 1, int32, `(matrices,)`.
      nonfinite: how often a matrix had an entry that was NaN or infinite, int32, `(matrices,)`.
      whole: the same for the whole update, `()` each; its norm is the largest of all.
    """

    step: jax.Array
    rule: PyTree
    vector: jax.Array | tuple[()]
    norm: jax.Array
    norm_after: jax.Array
    limit: jax.Array
    factor: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array
    whole: Stats


class Method(NamedTuple):
    """How the matrices are measured and what becomes of them.

    Attributes:
      split: what was told of devices, with the public name for errors.
      limit: how large singular values may be.
      response: what the largest is multiplied by; vectors are multiplied by it too.
      iterations: of the power method; 0 where matrices are decomposed.
      warm: whether vectors are remembered.
      change: from what was found and the limits to new matrices; None to multiply them by their factors.
      nonfinite: what becomes of a matrix that is not finite.
    """

    split: Split
    limit: Limit
    response: Response
    iterations: int
    warm: bool
    change: Callable[["Found", jax.Array], jax.Array] | None
    nonfinite: Nonfinite


class Found(NamedTuple):
    """A leaf, measured.

    Attributes:
      size: the largest singular values of the scaled matrices, `(count,)`.
      scale: what the matrices were multiplied by, `(count,)`.
      peak: their largest entries, `(count,)`.
      vector: the new vectors, flat float32.
      scaled: the scaled matrices, `(count, inputs, outputs)`; None if not asked for.
      factors: their singular value decomposition; None likewise.
    """

    size: jax.Array
    scale: jax.Array
    peak: jax.Array
    vector: jax.Array
    scaled: jax.Array | None
    factors: tuple[jax.Array, jax.Array, jax.Array] | None


def transformation(method: Method, axes: Axes, stacked: str | None) -> optax.GradientTransformationExtraArgs:
    where = method.split.where
    _checks.one_of(where, ("propagate", "zero"), nonfinite=method.nonfinite)
    views_of = _views(where, axes)
    groups = _groups.leaf()
    if stacked is not None:
        groups = _groups.stacked(groups, stacked)

    def init(params: PyTree) -> SpectralState:
        part = partition(groups, params)
        views = views_of(part)
        entries = sum(_entries(part.leaves[k], view) for k, view in views.items())
        return SpectralState(
            step=jnp.zeros((), jnp.int32),
            rule=method.limit.init(part.table),
            vector=jnp.zeros((entries,), jnp.float32) if method.warm else (),
            whole=blank(()),
            **blank((len(part.table.names),))._asdict(),
        )

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        del extra_args
        _checks.state(where, state, SpectralState)
        part = partition(groups, updates)
        views = views_of(part)
        _checks.same_rows(where, part.table.names, state.norm.shape, "matrices")
        step = jnp.asarray(optax.safe_increment(state.step))
        if not part.table.names:
            return updates, state._replace(step=step)
        found = _find(method, part, part.leaves, views, state.vector, state.step)
        values = _together(part, found)
        limit, rule = _limited(method, part, values.norm, views, state, params)
        made = factors(values, limit, method.response, 0.0)
        leaves, stats = _changed(method, part, found, views, values.norm, limit, made)
        new = SpectralState(
            step=step,
            rule=jax.tree.map(lambda new, old: new.astype(old.dtype), rule, state.rule),
            vector=_joined([found[k].vector for k in views]) if method.warm and views else state.vector,
            whole=counted(reported(whole_of(stats, part.table, _singular.spectral())), state.whole),
            **counted(reported(stats), state)._asdict(),
        )
        return jax.tree.unflatten(part.treedef, leaves), new

    return optax.GradientTransformationExtraArgs(init, update)


def _views(where: str, axes: Axes) -> Callable[[Partition], dict[int, View]]:
    """The axes of the matrices, by the number of the leaf; ranks 0 and 1 have none."""
    chosen = _layouts.chosen(where, axes, "axes")

    def view(leaf: Leaf) -> View | None:
        rank = len(leaf.shape)
        if rank < 2:
            return None
        own = chosen(leaf)
        if isinstance(own, str):
            own = _layouts.outputs(leaf, own)
            if not own:
                return None  # a bias or a scale
        own = (-1,) if own is None else own
        if not own:
            raise ValueError(
                f"{where}: no axis of leaf {leaf.path!r}, of shape {leaf.shape}, is an output. Name one at "
                "least."
            )
        outputs = {_layouts.in_range(where, axis, leaf) for axis in own}
        if len(outputs) == rank:
            raise ValueError(
                f"{where}: all axes of leaf {leaf.path!r}, of shape {leaf.shape}, are outputs. Leave one of "
                "them for the inputs."
            )
        return View(tuple(a for a in range(rank) if a not in outputs), tuple(sorted(outputs)))

    def views(part: Partition) -> dict[int, View]:
        found = {}
        for k, (path, place, value) in enumerate(zip(part.paths, part.places, part.leaves, strict=True)):
            if place is None:
                continue
            layers = len(place.axes)
            shape = jax.ShapeDtypeStruct(value.shape[layers:], value.dtype)
            own = view(Leaf(path, (), shape))
            if own is not None:
                found[k] = View(*(tuple(a + layers for a in side) for side in own))
        return found

    return views


def _entries(leaf: Any, view: View) -> int:
    """How many numbers the vectors of a leaf take."""
    return int(np.prod(view.vectors(leaf.shape))) * (1 + jnp.issubdtype(leaf.dtype, jnp.complexfloating))


def _find(
    method: Method,
    part: Partition,
    leaves: Sequence[Any],
    views: Mapping[int, View],
    vectors: jax.Array | tuple[()],
    step: Any,
) -> dict[int, Found]:
    """Measures all leaves, by their number, of which a device must not have parts; each in its turn.

    On CPU a decomposition of several matrices waits for the threads that other ones wait in: where all start
    together, none may end.
    """
    axes_of(part, leaves, method.split)  # for its error: a device may have part of a matrix
    found, first, earlier = {}, 0, jnp.zeros((), jnp.float32)
    vectors = jnp.zeros((0,), jnp.float32) if isinstance(vectors, tuple) else vectors
    for k, (place, leaf) in enumerate(zip(part.places, leaves, strict=True)):
        if place is None:
            continue
        view = views.get(k) or View((), tuple(range(len(place.axes), leaf.ndim)))
        size = _entries(leaf, view) if method.warm and view.inputs else 0
        found[k] = _measured(
            jnp.asarray(leaf),
            earlier,
            vectors[first : first + size],
            np.uint32(k) + jnp.asarray(step).astype(jnp.uint32) * np.uint32(len(part.leaves)),
            view=view,
            iterations=method.iterations if view.inputs else 0,
            whole=method.change is not None and bool(view.inputs),
        )
        if found[k].factors is not None:
            earlier = jax.lax.stop_gradient(jnp.max(found[k].size)).astype(jnp.float32)
        first += size
    return found


@functools.partial(jax.jit, static_argnames=("view", "iterations", "whole"))
def _measured(
    leaf: jax.Array,
    earlier: jax.Array,
    warm: jax.Array,
    seed: jax.Array,
    *,
    view: View,
    iterations: int,
    whole: bool,
) -> Found:
    """Measures a leaf: a vector by its L2 norm, a matrix by power iteration or, without any, decomposed."""
    real = jnp.float64 if jnp.finfo(leaf.dtype).bits == 64 else jnp.float32
    x = widen(leaf, real)
    peak = _singular.peak_of(without_nan(x) if _mesh.is_partitioned(x) else x, view.axes)
    rate = _singular.inverse(peak)
    x = x * rate.astype(x.dtype)
    scaled = svd = None
    vector = warm
    if whole:
        # The size of the leaf before is never negative: this only makes the decomposition wait for it.
        finite = jnp.where(jnp.isfinite(peak) & ~(earlier < 0), x, jnp.zeros_like(x))
        scaled = _singular.matrices(_mesh.replicate(finite), view)
    if iterations:
        before = _unpacked(warm, x, view)
        size, after = _singular.largest(x, view, before, seed if warm.size else jnp.uint32(0), iterations)
        known = jnp.isfinite(size) & jnp.isfinite(peak) & (size > 0)
        vector = _packed(jnp.where(known, after, before)) if warm.size else warm
    elif scaled is not None:
        left, values, right = jnp.linalg.svd(scaled, full_matrices=False)
        svd, size = (left, values, right), values[:, 0]
    else:
        size = _singular.size_of(x, view.axes)
    size, rate, peak = (_mesh.replicate(y).reshape(-1) for y in (size, rate, peak))
    return Found(size, rate, peak, vector, scaled, svd)


def _unpacked(flat: jax.Array, x: jax.Array, view: View) -> jax.Array:
    """Remembered vectors in the shape that goes with an array, or zeros."""
    shape = view.vectors(x.shape)
    if not flat.size:
        return jnp.zeros(shape, x.dtype)
    if jnp.iscomplexobj(x):
        real, imag = jnp.split(flat, 2)
        flat = jax.lax.complex(real, imag)
    return flat.reshape(shape).astype(x.dtype)


def _packed(vector: jax.Array) -> jax.Array:
    vector = _mesh.replicate(vector).reshape(-1)
    if jnp.iscomplexobj(vector):
        vector = jnp.concatenate([vector.real, vector.imag])
    return vector.astype(jnp.float32)


def _joined(vectors: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate(vectors) if len(vectors) > 1 else vectors[0]


def _together(part: Partition, found: Mapping[int, Found]) -> Measured:
    """The largest singular values of all matrices, by row."""
    wide = any(jnp.finfo(jax.dtypes.canonicalize_dtype(part.leaves[k].dtype)).bits == 64 for k in found)
    order = sorted(found, key=lambda k: _place(part, k).first)
    columns = ([getattr(found[k], field) for k in order] for field in ("size", "scale", "peak"))
    dtype = jnp.float64 if wide else jnp.float32
    size, rate, peak = (_joined([x.astype(dtype) for x in column]) for column in columns)
    norm = jnp.minimum(size / rate, float(jnp.finfo(size.dtype).max))
    return Measured(jnp.where(jnp.isfinite(peak), norm, peak), size * (TINY / rate), None, None)


def _place(part: Partition, k: int) -> Place:
    place = part.places[k]
    assert place is not None
    return place


def _limited(
    method: Method,
    part: Partition,
    norm: jax.Array,
    views: Mapping[int, View],
    state: SpectralState,
    params: PyTree,
) -> tuple[jax.Array, PyTree]:
    """The limits by row, not negative, and the new state of the rule."""
    table, rule = part.table, method.limit
    of_params = None
    if rule.needs_params:
        cold = method._replace(warm=False, iterations=COLD, change=None)
        matched = matching(part, params, None, method.split.where)
        of_params = _together(part, _find(cold, part, matched, views, state.vector, state.step)).norm
    measure = _singular.spectral()
    total = merge(measure, jnp.where(jnp.isfinite(norm), norm, 0), table.sizes)
    context = Context(state.step, table, measure, method.response, total, of_params)
    limit, new = rule.update(norm, state.rule, context)
    if limit.size == 1:
        limit = limit.reshape(())
    elif limit.shape != norm.shape:
        raise ValueError(
            f"{method.split.where}: the limit has shape {limit.shape} for {len(norm)} matrices, "
            f"{_checks.listed(table.names)}. Pass one number, one per matrix, or limits.per_group."
        )
    return jnp.broadcast_to(jnp.maximum(limit, 0).astype(norm.dtype), norm.shape), new


def _changed(
    method: Method,
    part: Partition,
    found: Mapping[int, Found],
    views: Mapping[int, View],
    norm: jax.Array,
    limit: jax.Array,
    made: Factors,
) -> tuple[list[Any], Stats]:
    """The new leaves, and the statistics of the rows."""
    usable = jnp.isfinite(norm) & ~jnp.isnan(limit)
    bad = jnp.nan if method.nonfinite == "propagate" else 0.0
    leaves = list(part.leaves)
    whole = [k for k in found if method.change is not None and k in views]
    plain = [k for k in found if k not in whole]
    if plain:
        scaled = scale(
            [jnp.asarray(leaves[k]) for k in plain],
            made.first,
            jnp.where(usable, made.then, bad),
            norm[0],
            places=tuple(_place(part, k) for k in plain),
            drop=method.nonfinite == "zero",
        )
        for k, leaf in zip(plain, scaled, strict=True):
            leaves[k] = leaf
    for k in whole:
        assert method.change is not None
        first, count = _place(part, k).first, len(found[k].size)
        own = slice(first, first + count)
        new = method.change(found[k], limit[own].astype(found[k].size.dtype))
        keep, good = ((x[own])[:, None, None] for x in (made.factor == 1, usable))
        old = _singular.matrices(_mesh.replicate(jnp.asarray(leaves[k])), views[k])
        new = jnp.where(keep, old, new.astype(old.dtype))
        new = jnp.where(good, new, jnp.asarray(bad, old.dtype))
        leaves[k] = _singular.unview(new, views[k], part.leaves[k].shape)
    after = jnp.minimum(made.after, float(jnp.finfo(norm.dtype).max))
    after, factor = (jnp.where(usable, x, bad) for x in (after, made.factor))
    return leaves, Stats(norm, after, limit, factor, usable & (factor != 1), ~jnp.isfinite(norm))
