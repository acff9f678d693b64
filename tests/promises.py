"""What each named method promises about a step, whatever comes: checked in float32, inside a scan."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip as oc

PARAMS = {
    "a": {"bias": jnp.zeros(2, jnp.bfloat16), "kernel": jnp.array([[0.3, -0.2], [0.1, 0.4], [-0.5, 0.2]])},
    "b": {"kernel": jnp.array([[0.5, -0.3], [0.2, 0.6]], jnp.float16)},
}
LEAVES = ("a/bias", "a/kernel", "b/kernel")
# Which row each of the twelve entries belongs to, in tree order, and how many rows there are.
ROWS = {
    "whole": [0] * 12,
    "layer": [0] * 8 + [1] * 4,
    "leaf": [0] * 2 + [1] * 6 + [2] * 4,
    "unit": [0, 0, *[1, 2] * 3, *[3, 4] * 2],
    "mean": [0, 1, *[2, 3] * 3, *[4, 5] * 2],  # what is centralised; a bias is left alone
    "entry": list(range(12)),
}
SPANS = ((0, 2), (2, 8), (8, 12))  # the entries of each leaf
# How far a norm may be above its limit, by the dtype of the entries: what rounding to it costs.
ROUNDING = np.repeat(np.float32([2**-8, 1e-5, 2**-10]), [2, 6, 4])
LARGEST = np.repeat(np.float32([3.38e38, 3.4e38, 65504]), [2, 6, 4])  # and the largest number of it
UNDERFLOW = 1e-6  # a few of the smallest numbers of float16
VANISHING = 1e-27  # entries that may count as zero beside others: docs/numerics.md

# The limit at each step, over and over: every one is a number of float16. A negative one counts as 0.
LIMITS = np.float32([1, 0.5, 2, np.inf, 0.125, 0, 4, 1, -1, 0.25, np.nan])
DTYPES = ("float32", "float16", "bfloat16", "schedule")  # what the limit comes as
MOST = float(jnp.finfo(jnp.float32).max)  # what a norm beyond its range counts as

CHECKS = {
    "policy": "a row that is not finite is NaN or zero, as the policy says",
    "finite": "a row that is finite comes out finite",
    "others": "a row that is finite comes out as if the others had been zeros, to the bit",
    "limit": "no norm is above its limit",
    "within": "what is within its limit comes out as it went in, to the bit",
    "learned": "what a limit remembers is what it would be had the rows that are not finite been zeros",
    "kept": "all that is remembered is finite",
    "report": "the norms and counts in the state are those of the updates",
}


class Method(NamedTuple):
    """A method and what is promised of it.

    Attributes:
      make: from the limit and the policy to the transformation.
      rows: which entries share a norm, a key of `ROWS`.
      bound: from what is seen in a step to the limit of each row; None for none.
      exact: whether a row within its limit must come out as it went in.
      policies: what may become of a row that is not finite.
      fixed: whether it takes the limit, which then comes in every dtype.
      check: what else is promised, or is promised instead: from what is seen in a step to checks by name.
      clean: "row" if rows that are not finite are not learned, "entry" if the other entries of theirs are.
      memory: from the state to what a limit remembers.
      norm: the norm of a row: "l2", "rms" or "largest singular value".
      batch: whether each update has one gradient for each of three examples.
      slack: how far above its limit a norm may come out.
    """

    make: Callable[[Any, str], Any]
    rows: str = "whole"
    bound: Callable[["Seen"], Any] | None = None
    exact: bool = False
    policies: tuple[str, ...] = ("propagate", "zero")
    fixed: bool = False
    check: Callable[["Seen"], dict[str, Any]] | None = None
    clean: str = "row"
    memory: Callable[[Any], Any] = lambda state: state.rule
    norm: str = "l2"
    batch: bool = False
    slack: float = 0.0


class Seen(NamedTuple):
    """One step: what went in, what came out, and the same step with zeros in place of what is not finite.

    Attributes:
      method: which it is of.
      policy: what is to become of rows that are not finite.
      limit: the number of this step, float32, from 0.
      before: the update, `(12,)` in float32; with a batch that of the worst example.
      after: what came of it, `(12,)`.
      other: what came of the clean update.
      known: whether an entry was finite, `(12,)`.
      good: whether all of its row was, and the limit was a number, `(12,)`.
      params: the parameters, `(12,)`.
      old: the state before.
      new: the state after.
      clean: the state after the clean update.
    """

    method: Method
    policy: str
    limit: jax.Array
    before: jax.Array
    after: jax.Array
    other: jax.Array
    known: jax.Array
    good: jax.Array
    params: jax.Array
    old: Any
    new: Any
    clean: Any

    def norms(self, entries: jax.Array, rows: str | None = None) -> jax.Array:
        """The norm of each row, by its own rule for large and small numbers: divided by the largest."""
        return norms(entries, rows or self.method.rows, self.method.norm)

    def spread(self, per_row: jax.Array) -> jax.Array:
        """From a number for each row to one for each entry."""
        return jnp.broadcast_to(per_row, (count(self.method.rows),))[np.array(ROWS[self.method.rows])]


def count(rows: str) -> int:
    return max(ROWS[rows]) + 1


def norms(entries: jax.Array, rows: str, kind: str) -> jax.Array:
    ids = np.array(ROWS[rows])
    member = jnp.asarray(ids == np.arange(count(rows))[:, None])
    peak = jnp.max(jnp.where(member, jnp.abs(entries), 0), axis=1)
    # In two steps: the reciprocal of a large number is too small a number, and may be taken for zero.
    first = jnp.where(peak > 1, 2.0**-64, 1)
    safe = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1) * first
    scaled = jnp.where(member, entries * first[:, None] / safe[:, None], 0)
    size = jnp.sqrt(jnp.sum(scaled**2, axis=1))
    if kind == "rms":
        size = size / np.sqrt(np.sum(ids == np.arange(count(rows))[:, None], axis=1)).astype(np.float32)
    if kind == "largest singular value":
        size = jnp.stack([size[0], *(_largest(scaled[k, slice(*SPANS[k])].reshape(-1, 2)) for k in (1, 2))])
    return jnp.where(jnp.isfinite(peak), jnp.minimum(size * peak, MOST), peak)


def _largest(matrix: jax.Array) -> jax.Array:
    """The largest singular value of a matrix of two columns, by the formula."""
    (a, b), (_, d) = matrix.T @ matrix
    return jnp.sqrt((a + d + jnp.hypot(a - d, 2 * b)) / 2)


def flat(tree: Any) -> jax.Array:
    return jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(tree)])


def same(a: Any, b: Any) -> jax.Array:
    """Whether two trees are the same to the bit, NaN being equal to NaN."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return functools.reduce(jnp.logical_and, [jnp.all(_equal(x, y)) for x, y in pairs], jnp.array(True))


def _equal(x: jax.Array, y: jax.Array) -> jax.Array:
    equal = x == y
    return equal | (jnp.isnan(x) & jnp.isnan(y)) if jnp.issubdtype(x.dtype, jnp.inexact) else equal


def _finite(tree: Any) -> jax.Array:
    """No NaN; an infinity is what limits begin with."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return functools.reduce(jnp.logical_and, [~jnp.any(jnp.isnan(x)) for x in leaves], jnp.array(True))


# What is promised.


def checks(seen: Seen) -> dict[str, jax.Array]:
    """Whether each promise was kept, by its name in `CHECKS`."""
    method, good = seen.method, seen.good
    bad = jnp.isnan(seen.after) if seen.policy == "propagate" else seen.after == 0
    found = {
        "policy": jnp.all(good | bad),
        "finite": jnp.all(~good | jnp.isfinite(seen.after)),
        "others": jnp.all(~good | (seen.after == seen.other)),
        "learned": same(method.memory(seen.new), method.memory(seen.clean)),
        "kept": _finite(method.memory(seen.new)),
    }
    if method.bound is not None:
        bound = seen.spread(jnp.asarray(method.bound(seen)))
        before, after = (seen.spread(seen.norms(x)) for x in (seen.before, seen.after))
        most = bound * (1 + _rounding(method) + method.slack) + UNDERFLOW * (bound > 0)
        found["limit"] = jnp.all(~good | (after <= most) | (before < VANISHING))
        if method.exact:
            within = good & (before * (1 + 1e-5) + 2e-6 <= bound)
            found["within"] = jnp.all(~within | (seen.after == seen.before))
    if isinstance(seen.new, oc.RescaleState | oc.SpectralState):
        found["report"] = _reported(seen)
    return found | (method.check(seen) if method.check is not None else {})


def _rounding(method: Method) -> np.ndarray:
    """The roundings of the entries of each row, for each entry."""
    ids = np.array(ROWS[method.rows])
    most = np.array([ROUNDING[ids == row].max() for row in range(count(method.rows))])
    return most[ids]


def _reported(seen: Seen) -> jax.Array:
    """The norm before and after, and how many were not finite."""
    new, old, rounding = seen.new, seen.old, _rounding(seen.method) + np.float32(1e-4 + seen.method.slack)
    before, after = (seen.spread(seen.norms(x)) for x in (seen.before, seen.after))
    known = seen.spread(jnp.isfinite(new.norm))
    rows = seen.spread(jnp.isfinite(seen.norms(seen.before)))
    close = jnp.abs(seen.spread(new.norm) - before) <= before * rounding
    out = jnp.abs(seen.spread(new.norm_after) - after) <= after * rounding + UNDERFLOW
    out = jnp.isfinite(seen.spread(new.norm_after)) & (out | (before >= MOST))
    counts = new.nonfinite - old.nonfinite == (~jnp.isfinite(new.norm)).astype(jnp.int32)
    told = ~seen.good | (before < VANISHING) | (close & out)
    return jnp.all(known == rows) & jnp.all(told) & jnp.all(counts)


def fixed(seen: Seen) -> jax.Array:
    return seen.limit


def own(seen: Seen) -> jax.Array:
    """The limit that the state says, of a method that finds its own."""
    return seen.new.limit


def _of_params(seen: Seen) -> jax.Array:
    return seen.limit * jnp.maximum(seen.norms(seen.params), 1e-3)


def _with_floor(seen: Seen) -> jax.Array:
    norm = seen.norms(seen.before)
    return jnp.where(norm < MOST, jnp.maximum(seen.limit, norm * 1e-3), jnp.inf)


def _by_value(seen: Seen) -> dict[str, jax.Array]:
    """NaN stays NaN, an infinity becomes the bound; a NaN bound makes all NaN."""
    number, nan = ~jnp.isnan(seen.limit), jnp.isnan(seen.before)
    inside = jnp.abs(seen.after) <= seen.limit
    untouched = seen.known & (jnp.abs(seen.before) <= seen.limit)
    return {
        "policy": jnp.all(jnp.isnan(seen.after) == (nan | ~number)),
        "limit": jnp.all(nan | ~number | inside),
        "finite": jnp.all(nan | ~number | jnp.isfinite(seen.after) | (seen.limit == jnp.inf)),
        "within": jnp.all(~untouched | (seen.after == seen.before)),
    }


def _by_largest(seen: Seen) -> dict[str, jax.Array]:
    """NaN stays NaN; an infinity becomes the limit of its leaf, once there is one."""
    bound = seen.spread(jnp.where(seen.new.weight > 0, seen.new.limit, jnp.inf))
    nan = jnp.isnan(seen.before)
    return {
        "policy": jnp.all(jnp.isnan(seen.after) == nan),
        "limit": jnp.all(nan | (jnp.abs(seen.after) <= bound * (1 + ROUNDING) + UNDERFLOW)),
        "within": jnp.all(~seen.known | (jnp.abs(seen.before) > bound) | (seen.after == seen.before)),
    }


def _by_momentum(seen: Seen) -> dict[str, jax.Array]:
    """An entry that is not finite comes out as it is, and is not learned."""
    bound, trees = flat(seen.new.bound), ("momentum", "bound")
    out = (seen.after == seen.before) | (jnp.isnan(seen.after) & jnp.isnan(seen.before))
    unlearned = [seen.known | (flat(getattr(seen.new, x)) == flat(getattr(seen.old, x))) for x in trees]
    return {
        "policy": jnp.all(seen.known | out),
        "limit": jnp.all(~seen.known | (jnp.abs(seen.after) <= bound * (1 + ROUNDING) + UNDERFLOW)),
        "learned": jnp.all(jnp.stack(unlearned)) & _same_where(seen, trees),
        "kept": _finite((seen.new.momentum, seen.new.bound)),
    }


def _same_where(seen: Seen, trees: tuple[str, ...]) -> jax.Array:
    """What is kept of entries that are finite is what it is after the clean update."""
    pairs = [(flat(getattr(seen.new, x)), flat(getattr(seen.clean, x))) for x in trees]
    return jnp.all(jnp.stack([~seen.known | (a == b) for a, b in pairs]))


def _by_spikes(seen: Seen) -> dict[str, jax.Array]:
    """NaN stays NaN, an infinity becomes the bound where there is one; neither is learned."""
    old = jnp.where(seen.new.since == 0, 0, flat(seen.old.rms))
    bound = jnp.where((seen.new.since >= 3) & (old > 0), 4 * old, jnp.inf)
    nan = jnp.isnan(seen.before)
    # A bound beyond the range of the leaf's dtype is infinite there.
    bound = jnp.where(bound * (1 + ROUNDING) < LARGEST, bound, jnp.inf)
    clipped = jnp.abs(seen.after) <= bound * (1 + ROUNDING) + UNDERFLOW
    return {
        "policy": jnp.all(jnp.isnan(seen.after) == nan),
        "limit": jnp.all(nan | clipped),
        "learned": jnp.all(seen.known | (flat(seen.new.rms) == old) | (jnp.abs(seen.before) > bound))
        & _same_where(seen, ("rms",)),
        "kept": _finite(seen.new.rms),
    }


def _adam(state: Any) -> Any:
    return state[0] if isinstance(state, tuple) and not hasattr(state, "_fields") else state


def _by_adam(seen: Seen) -> dict[str, jax.Array]:
    """Entries that are not finite are not learned; those beside them are."""
    trees = ("mean", "rms")
    seen = seen._replace(old=_adam(seen.old), new=_adam(seen.new), clean=_adam(seen.clean))
    unlearned = [seen.known | (flat(getattr(seen.new, x)) == flat(getattr(seen.old, x))) for x in trees]
    return {
        "learned": jnp.all(jnp.stack(unlearned)) & _same_where(seen, trees),
        "kept": _finite((seen.new.mean, seen.new.rms, seen.new.weights)),
        "report": jnp.all(seen.new.nonfinite - seen.old.nonfinite == _bad_rows(seen)),
    }


def _bad_rows(seen: Seen) -> jax.Array:
    member = np.array(ROWS[seen.method.rows]) == np.arange(count(seen.method.rows))[:, None]
    return jnp.any(jnp.asarray(member) & ~seen.known, axis=1).astype(jnp.int32)


def _by_mean(seen: Seen) -> dict[str, jax.Array]:
    """A unit that is not finite is NaN; a mean is taken of what does not leave the range of its dtype."""
    alone = np.arange(12) < 2
    fits = jnp.all(jnp.abs(seen.before) < 1e38)
    out = jnp.where(alone, (seen.after == seen.before) | jnp.isnan(seen.before), jnp.isnan(seen.after))
    return {
        "policy": jnp.all(seen.good | out),
        "finite": ~fits | jnp.all(~seen.good | jnp.isfinite(seen.after)),
        "others": jnp.all(~seen.good | (seen.after == seen.other) | ~jnp.isfinite(seen.after)),
    }


def _untouched(seen: Seen) -> dict[str, jax.Array]:
    """A recording changes nothing, counts what is not finite, and keeps no NaN where it adds up."""
    equal = (seen.after == seen.before) | (jnp.isnan(seen.after) & jnp.isnan(seen.before))
    return {"policy": jnp.all(equal), "kept": _finite(seen.new.largest)}


def _skipped(seen: Seen) -> dict[str, jax.Array]:
    """A step above the limit or not finite is zero, and leaves the optimizer as it was."""
    norm = seen.norms(seen.before)[0]
    surely = ~jnp.all(seen.known) | jnp.isnan(seen.limit) | (norm > seen.limit * (1 + 1e-5))
    never = jnp.all(seen.known) & (norm * (1 + 1e-5) <= seen.limit)
    dropped = jnp.all(seen.after == 0) & same(seen.new.inner, seen.old.inner)
    return {
        "policy": ~surely | (dropped & seen.new.last),
        "limit": ~seen.new.last | dropped,
        "within": ~never | ~seen.new.last,
        "kept": _finite((seen.new.inner, seen.new.rule)),
    }


def _carried(seen: Seen) -> dict[str, jax.Array]:
    """A step that is not finite is not carried over."""
    kept = same(seen.new.buffer, seen.old.buffer) | jnp.all(seen.known)
    return {"learned": kept, "kept": _finite(seen.new.buffer) & jnp.all(jnp.isfinite(flat(seen.new.buffer)))}


def _forgotten(seen: Seen) -> dict[str, jax.Array]:
    """After a reset nothing is left of what the optimizer has learned."""
    reset = (seen.new.since == 0) & (seen.new.step > 1)
    by = jnp.float32(0.01)
    expected = -0.1 * by * seen.before
    close = jnp.abs(seen.after - expected) <= jnp.abs(expected) * (ROUNDING + 1e-3) + UNDERFLOW
    return {"policy": ~reset | jnp.all(~seen.known | close)}


def _by_example(seen: Seen) -> dict[str, jax.Array]:
    """One example that is not finite is counted; it adds nothing, or makes its row NaN."""
    own = seen.spread((seen.new.nonfinite - seen.old.nonfinite).astype(jnp.float32))
    said = {"report": jnp.all(seen.good | (own >= 1)) | jnp.isnan(seen.limit)}
    if seen.policy == "propagate":
        return said
    unheard = (seen.after == seen.other) & jnp.isfinite(seen.after)
    return {"policy": jnp.isnan(seen.limit) | jnp.all(unheard), **said}


def _alone(*names: str) -> Callable[[Callable], Callable]:
    """Makes a check that is instead of, not beside, those of rows: of the others only `names` stay."""

    def wrap(check: Callable[[Seen], dict[str, jax.Array]]) -> Callable[[Seen], dict[str, jax.Array]]:
        def run(seen: Seen) -> dict[str, jax.Array]:
            skipped = {name: jnp.array(True) for name in CHECKS if name not in names}
            return skipped | check(seen)

        return run

    return wrap


GROUPS = {"whole": oc.groups.whole(), "layer": oc.groups.layer(), "leaf": oc.groups.leaf()}
SGD = optax.sgd(0.1, momentum=0.9)


def _nothing(state: Any) -> Any:
    del state
    return ()


def _clip(name: str, rows: str, **options: Any) -> Method:
    """A method that takes a limit and never exceeds it."""
    made = functools.partial(getattr(oc, name), **options)
    return Method(lambda c, p: made(c, nonfinite=p), rows, fixed, exact=True, fixed=True)


def _adaptive(name: str, rows: str, clips: bool = True, **options: Any) -> Method:
    """A method that finds its own limits."""
    made = functools.partial(getattr(oc, name), groups=GROUPS[rows], **options)
    return Method(lambda c, p: made(nonfinite=p), rows, own if clips else None, exact=clips)


def _soft(name: str, rows: str, bound: Callable[[Seen], Any] = fixed, **options: Any) -> Method:
    made = functools.partial(getattr(oc, name), groups=GROUPS[rows], **options)
    return Method(lambda c, p: made(c, nonfinite=p), rows, bound, fixed=True)


def _matrix(name: str, exact: bool, slack: float, **options: Any) -> Method:
    made = functools.partial(getattr(oc, name), **options)
    norm = "largest singular value"
    return Method(lambda c, p: made(c, nonfinite=p), "leaf", fixed, exact, fixed=True, norm=norm, slack=slack)


ONE = ("propagate",)
METHODS = {
    "acclip": Method(
        lambda c, p: oc.acclip(),
        "entry",
        policies=ONE,
        check=_by_momentum,
        clean="entry",
        memory=_nothing,
    ),
    "adagc": _adaptive("adagc", "layer", warmup=20),
    "adanorm": _adaptive("adanorm", "leaf", clips=False),
    "adaptive_grad_clip": Method(
        lambda c, p: oc.adaptive_grad_clip(c, nonfinite=p), "unit", _of_params, exact=True, fixed=True
    ),
    "adaptive_value_clip": Method(
        lambda c, p: oc.adaptive_value_clip(0.9),
        "leaf",
        policies=ONE,
        check=_by_largest,
        memory=lambda state: (state.limit, state.weight),
    ),
    "aggc": _adaptive("aggc", "layer", clips=False),
    "autoclip": _adaptive("autoclip", "layer", percentile=50.0),
    "automatic_clip": _soft("automatic_clip", "layer"),
    "carry_clipped": Method(
        lambda c, p: oc.carry_clipped(oc.clip_by_global_norm(c, nonfinite=p)),
        "whole",
        fixed,
        fixed=True,
        check=_carried,
        memory=lambda state: state.inner.rule,
    ),
    "centralize": Method(lambda c, p: oc.centralize(), "mean", policies=ONE, check=_by_mean, memory=_nothing),
    "clip_by_adaptive_quantile": _adaptive("clip_by_adaptive_quantile", "leaf"),
    "clip_by_block_rms": _clip("clip_by_block_rms", "leaf")._replace(norm="rms"),
    "clip_by_global_norm": _clip("clip_by_global_norm", "whole"),
    "clip_by_groupwise_norm": _clip("clip_by_groupwise_norm", "layer", groups=oc.groups.depth(1)),
    "clip_by_historical_norm": _adaptive("clip_by_historical_norm", "layer", window=16, warmup=4),
    "clip_by_layerwise_norm": _clip("clip_by_layerwise_norm", "layer"),
    "clip_by_leafwise_norm": _clip("clip_by_leafwise_norm", "leaf"),
    "clip_by_spectral_norm": _matrix("clip_by_spectral_norm", True, 0.02, iterations=16),
    "clip_by_unitwise_norm": _clip("clip_by_unitwise_norm", "unit"),
    "clip_by_value": Method(
        lambda c, p: oc.clip_by_value(c), "entry", policies=ONE, fixed=True, check=_by_value, memory=_nothing
    ),
    "clip_per_example": Method(
        lambda c, p: oc.clip_per_example(c, groups=oc.groups.layer(), nonfinite=p),
        "layer",
        fixed,
        fixed=True,
        check=_by_example,
        batch=True,
    ),
    "clip_singular_values": _matrix("clip_singular_values", True, 1e-3),
    "delta_clip": _soft("delta_clip", "leaf", _with_floor),
    "gradient_stabilizer": _adaptive("gradient_stabilizer", "leaf", clips=False),
    "lamb_trust_ratio": Method(
        lambda c, p: oc.lamb_trust_ratio(nonfinite=p), "leaf", lambda seen: own(seen), memory=_nothing
    ),
    "larc": Method(lambda c, p: oc.larc(0.1, nonfinite=p), "leaf", own, exact=True, memory=_nothing),
    "mask_spikes": Method(
        lambda c, p: oc.mask_spikes(16.0, period=50, grace=3, decay=0.9),
        "entry",
        policies=ONE,
        check=_by_spikes,
        clean="entry",
        memory=_nothing,
    ),
    "normalize_by_global_norm": Method(
        lambda c, p: oc.normalize_by_global_norm(c, nonfinite=p), "whole", fixed, fixed=True
    ),
    "normalize_by_layerwise_norm": Method(
        lambda c, p: oc.normalize_by_layerwise_norm(c, nonfinite=p), "layer", fixed, fixed=True
    ),
    "normalize_by_running_norm": _adaptive("normalize_by_running_norm", "leaf", clips=False),
    "psac_clip": _soft("psac_clip", "layer"),
    "quantile_clip": _adaptive("quantile_clip", "whole", percentile=50.0, window=16),
    "record": Method(
        lambda c, p: oc.record(capacity=32, stretches=4),
        "leaf",
        policies=ONE,
        check=_alone()(_untouched),
        memory=_nothing,
    ),
    "rescale_by_norm": Method(
        lambda c, p: oc.rescale_by_norm(c, groups=oc.groups.leaf(), nonfinite=p),
        "leaf",
        fixed,
        exact=True,
        fixed=True,
    ),
    "reset_momentum": Method(
        lambda c, p: oc.reset_momentum(SGD, period=5, warmup=2),
        "entry",
        policies=ONE,
        check=_alone()(_forgotten),
        memory=_nothing,
    ),
    "scale_by_stable_adam": Method(
        lambda c, p: oc.scale_by_stable_adam(nonfinite=p),
        "leaf",
        check=_by_adam,
        clean="entry",
        memory=_nothing,
    ),
    "skip_updates": Method(
        lambda c, p: oc.skip_updates(SGD, c),
        "whole",
        policies=ONE,
        fixed=True,
        check=_alone()(_skipped),
    ),
    "smooth_clip": _soft("smooth_clip", "leaf"),
    "soft_clip_singular_values": _matrix("soft_clip_singular_values", False, 1e-3),
    "stable_adamw": Method(
        lambda c, p: oc.stable_adamw(0.1, nonfinite=p),
        "leaf",
        check=_by_adam,
        clean="entry",
        memory=_nothing,
    ),
    "zclip": _adaptive("zclip", "layer", warmup=5),
}
CASES = [(name, policy) for name, method in METHODS.items() for policy in method.policies]
