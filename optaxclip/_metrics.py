"""The statistics of a state as a flat dict of scalars, ready for a logger."""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optaxclip import _checks, groups as _groups, norms as _norms
from optaxclip._apply import ratio_of
from optaxclip._base import Groups, Norm, PyTree, Stats, Table
from optaxclip._carry import CarryState
from optaxclip._coordinate import ACClipState, AdaptiveValueClipState, MaskSpikesState
from optaxclip._elementwise import ClipByValueState
from optaxclip._matrices import SpectralState
from optaxclip._measure import merge
from optaxclip._partition import partition
from optaxclip._per_example import PerExampleState
from optaxclip._rescale import RescaleState
from optaxclip._reset import ResetMomentumState
from optaxclip._skip import SkipState
from optaxclip._trust import ScaleByStableAdamState


def metrics(
    opt_state: PyTree,
    params: PyTree = None,
    groups: Groups | Sequence[Groups] = _groups.whole(),
    *,
    norm: Norm = _norms.l2(),
    prefix: str = "clip",
    separator: str = "/",
    expand: int = 64,
) -> dict[str, jax.Array | np.generic]:
    """What the last update measured and did, found anywhere in an optimizer's state.

    The keys are `clip/<statistic>/<group>`, and `clip/<statistic>/whole` for the whole update, where
    `<statistic>` is one of

    | statistic | meaning |
    | --- | --- |
    | `norm_before` | the norm that came in, before anything was scaled |
    | `norm_after` | the norm that went out |
    | `limit` | the limit it was held against; for the whole, the norm that the groups' limits add up to |
    | `factor` | what the group was multiplied by; for the whole, `norm_after` over `norm_before` |
    | `clipped_fraction` | in which share of all steps the factor was not 1; for the whole, of any group |
    | `nonfinite_count` | in how many steps the norm was NaN or infinite |

    Other methods have statistics of their own, wrappers beside those of what is in them; ° marks those that
    are of the whole only:

    | statistic | of | meaning |
    | --- | --- | --- |
    | `skip_norm` | `skip_updates` | the norm that came in |
    | `skip_limit` | | the limit it was held against, infinite where the norm is not watched |
    | `skipped_fraction` | | the share of all steps in which the norm, or of the whole anything, was off |
    | `loss`, `loss_limit` | | ° the loss that came in and its limit; 0 and infinity where not watched |
    | `loss_skipped_fraction` | | ° the share of all steps in which the loss was off |
    | `carry_norm` | `carry_clipped` | ° the norm of what was cut off and is not yet passed on |
    | `carry_lost` | | ° the sum of the norms of what the bound took from that |
    | `example_norm` | `clip_per_example` | the mean norm of the examples with a finite one |
    | `example_limit` | | the largest limit that they were held against |
    | `example_clipped_fraction` | | the share of the last batch whose factor was not 1 |
    | `example_nonfinite_count` | | how many examples had a norm that was NaN or infinite, in all updates |
    | `entry_limit` | `adaptive_value_clip` | the bound of the entries of each leaf |
    | `entry_clipped_fraction` | | the share of all steps in which any entry was clipped |
    | `entry_nonfinite_count` | | in how many steps any entry was NaN or infinite |
    | `entry_clipped_share` | | ° the share of the entries that the last update clipped |
    | the last three | `clip_by_value`, `acclip`, `mask_spikes` | ° the same |
    | `rms_ratio` | `scale_by_stable_adam` | the root mean square of a leaf's entries over their `rms` |
    | `rms_clipped_fraction` | | the share of all steps in which that was above the threshold |
    | `rms_nonfinite_count` | | in how many steps an entry was NaN or infinite |
    | `reset_count` | `reset_momentum` | ° how often the moments were forgotten |

    Where these have no number for the whole, it is the largest of all groups.

    A group with several rows (`stacked`, `unit`) has one key for each, `layers[3]`, or is put together where
    it has more than `expand`; of the second table the largest is taken. States hold arrays and no names,
    which is why the parameters and the groups are asked for; without them only the whole is reported.

    Args:
      opt_state: the state of a `rescale_by_norm`, of a spectral method, of a method in the second table, or
        any state that holds one: of `optax.chain`, `masked`, `partition`,
        `MultiSteps`, `inject_hyperparams`. If it holds several with statistics of the same names, their
        prefixes are `clip_0`, `clip_1` and so on.
      params: the tree that `init` was given: parameters, updates or `jax.ShapeDtypeStruct`. Behind
        `optax.masked` and `optax.partition` that is the masked tree, with `optax.MaskedNode()` in place of
        what is left out; of a partition, pass the state of one part, `state.inner_states[label]`.
      groups: the groups that the transformation was given, or a list with one for each state that was given
        any, from the outermost in: a `RescaleState`, `SpectralState`, `SkipState` or `PerExampleState`; or
        with one for each of the first two kinds. Of a `SkipState` or a `PerExampleState` beside these, only
        the whole is reported where the groups given are not its own, by their number. Methods that go leaf
        by leaf need none.
      norm: the norm that it was given.
      prefix: the first part of every key.
      separator: what stands between the parts.
      expand: how many rows of a group to report one by one.

    Returns:
      From key to scalar, float32 or int32: NumPy scalars, or arrays of shape `()` inside `jit`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if there is no state to report, or it has not as many rows as the groups.

    >>> import jax.numpy as jnp, optax, optaxclip as oc
    >>> params = {"w": jnp.array([0.0, 0.0]), "b": jnp.array([0.0])}
    >>> tx = optax.chain(oc.clip_by_leafwise_norm(1.0), optax.sgd(0.1))
    >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> logs = oc.metrics(state, params, oc.groups.leaf())
    >>> print(logs["clip/norm_before/w"], logs["clip/norm_after/w"], logs["clip/factor/b"])
    5.0 1.0 1.0
    """
    where = "metrics"
    _checks.spec(where, Norm, norm=norm)
    states = list(_states(opt_state))
    if not states:
        raise ValueError(
            f"{where}: no RescaleState in a state of type {type(opt_state).__name__}, nor one of another "
            "method that metrics knows. Pass the state of an optimizer with one of them in it."
        )
    found, seen = {}, collections.Counter()
    several = collections.Counter(_kind(state) for state in states)
    for state, own in zip(states, _groups_of(states, groups, params), strict=True):
        kind = _kind(state)
        first = prefix if several[kind] == 1 else f"{prefix}_{seen[kind]}"
        seen[kind] += 1
        for (statistic, group), value in _of_state(state, params, own, norm, expand).items():
            found[separator.join((first, statistic, group))] = value
    return found


Clip: TypeAlias = RescaleState | SpectralState
Grouped: TypeAlias = Clip | SkipState | PerExampleState
ByLeaf: TypeAlias = AdaptiveValueClipState | ScaleByStableAdamState
Entries: TypeAlias = ClipByValueState | ACClipState | MaskSpikesState
Known: TypeAlias = Grouped | ByLeaf | Entries | CarryState | ResetMomentumState

# Not read: what optimizers and limits remember.
HELD = ("inner", "rule", "vector", "buffer", "momentum", "bound", "rms", "mean", "weights")


def _states(tree: PyTree) -> Iterator[Known]:
    """All states that are known, those inside others behind them."""
    for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Known)):
        if isinstance(x, Known):
            yield x
        if isinstance(x, SkipState | CarryState | ResetMomentumState):
            yield from _states(x.inner)


def _kind(state: Known) -> type:
    """States of one kind have statistics of the same names."""
    if isinstance(state, Clip):
        return RescaleState
    return ClipByValueState if isinstance(state, Entries | AdaptiveValueClipState) else type(state)


def _groups_of(
    states: Sequence[Known], groups: Groups | Sequence[Groups], params: PyTree
) -> list[Groups | None]:
    """The groups of each state, None for those whose rows have no names."""
    several = isinstance(groups, list | tuple) and not isinstance(groups, Groups)
    listed: list[Any] = list(groups) if several else [groups]
    for each in listed:
        _checks.spec("metrics", Groups, groups=each)
    clips = [k for k, state in enumerate(states) if isinstance(state, Clip)]
    grouped = {k: state for k, state in enumerate(states) if isinstance(state, Grouped)}
    if isinstance(groups, Groups):
        # A wrapper's groups may well be others than those of the clip in it.
        rows = len(partition(groups, params).table.names) if clips and params is not None else None
        own = {k: groups for k, x in grouped.items() if k in clips or rows in (None, len(x.norm))}
    else:
        of = list(grouped) if len(listed) == len(grouped) else clips
        if len(listed) != len(of):
            raise ValueError(
                f"metrics: {len(listed)} groups for {len(grouped)} states. Pass one for each state."
            )
        own = dict(zip(of, listed, strict=True))
    # Methods that go by leaf go by the tree's own paths.
    return [_groups.leaf() if isinstance(state, ByLeaf) else own.get(k) for k, state in enumerate(states)]


def _of_state(
    state: Known, params: PyTree, groups: Groups | None, norm: Norm, expand: int
) -> dict[tuple[str, str], Any]:
    xp = jnp
    state = state._replace(**{field: () for field in HELD if field in state._fields})
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves(state)):
        state, xp = jax.device_get(state), np  # one transfer, in place of one for each scalar
    step = xp.maximum(state.step, 1).astype(np.float32)
    rows, whole, together = _statistics(state, step, norm)
    found = {}
    if params is not None and groups is not None:
        table = _table(len(next(iter(rows.values()))), params, groups)
        for group, (first, count) in table.spans.items():
            if count > expand:
                merged = together(rows, slice(first, first + count), table)
                found |= {(statistic, group): value for statistic, value in merged.items()}
            else:
                for row in range(first, first + count):
                    found |= {(statistic, table.names[row]): x[row] for statistic, x in rows.items()}
    found |= {(statistic, "whole"): x for statistic, x in whole.items()}
    return found if xp is jnp else {key: np.asarray(value)[()] for key, value in found.items()}


def _statistics(
    state: Known, step: Any, norm: Norm
) -> tuple[dict[str, Any], dict[str, Any], Callable[[dict[str, Any], slice, Table], dict[str, Any]]]:
    """Those of the rows, those of the whole, and how many rows are put together."""
    match state:
        case RescaleState() | SpectralState():
            norm = _norms.spectral() if isinstance(state, SpectralState) else norm
            stats = Stats(*(getattr(state, field) for field in Stats._fields))
            return _columns(stats, step), _columns(state.whole, step), functools.partial(_together, norm=norm)
        case SkipState():
            rows = {
                "skip_norm": state.norm,
                "skip_limit": state.limit,
                "skipped_fraction": state.skipped.astype(np.float32) / step,
            }
            own = {
                "skipped_fraction": state.total.astype(np.float32) / step,
                "loss": state.loss,
                "loss_limit": state.loss_limit,
                "loss_skipped_fraction": state.loss_skipped.astype(np.float32) / step,
            }
        case PerExampleState():
            own = {}
            rows = {
                "example_norm": state.norm,
                "example_limit": state.limit,
                "example_clipped_fraction": state.clipped,
                "example_nonfinite_count": state.nonfinite,
            }
        case AdaptiveValueClipState():
            rows = {"entry_limit": state.limit} | _counts("entry", state, step)
            own = {"entry_clipped_share": state.share}
        case ClipByValueState() | ACClipState() | MaskSpikesState():
            rows, own = {}, _counts("entry", state, step) | {"entry_clipped_share": state.share}
        case ScaleByStableAdamState():
            rows, own = {"rms_ratio": state.ratio} | _counts("rms", state, step), {}
        case CarryState():
            rows, own = {}, {"carry_norm": state.norm, "carry_lost": state.lost}
        case ResetMomentumState():
            rows, own = {}, {"reset_count": state.resets}
    return rows, {name: x.max() for name, x in rows.items() if x.size} | own, _largest


def _counts(kind: str, state: Any, step: Any) -> dict[str, Any]:
    return {
        f"{kind}_clipped_fraction": state.clipped.astype(np.float32) / step,
        f"{kind}_nonfinite_count": state.nonfinite,
    }


def _largest(stats: dict[str, Any], own: slice, table: Table) -> dict[str, Any]:
    del table
    return {statistic: x[own].max() for statistic, x in stats.items()}


def _table(rows: int, params: PyTree, groups: Groups) -> Table:
    """The table of the groups, checked against the number of rows of the state."""
    table = partition(groups, params).table
    if rows != len(table.names):
        raise ValueError(
            f"metrics: the state has {rows} rows; these groups and parameters have {len(table.names)}: "
            f"{_checks.listed(table.names)}. Pass the groups and the tree that the transformation was given: "
            "behind optax.masked and partition, optax.MaskedNode() stands in it for what was left out."
        )
    if "whole" in table.spans and len(table.spans) > 1:
        raise ValueError("metrics: a group among others is called 'whole', as all together are. Rename it.")
    return table


def _columns(stats: Stats, step: Any) -> dict[str, Any]:
    """The statistics by the names they are reported under."""
    return {
        "norm_before": stats.norm,
        "norm_after": stats.norm_after,
        "limit": stats.limit,
        "factor": stats.factor,
        "clipped_fraction": stats.clipped.astype(np.float32) / step,
        "nonfinite_count": stats.nonfinite,
    }


def _together(stats: dict[str, Any], own: slice, table: Table, *, norm: Norm) -> dict[str, Any]:
    """Many rows as one: norms put together, the share of clipped rows, the most frequent non-finite one."""
    found = {
        statistic: merge(norm, jnp.asarray(stats[statistic][own]), table.sizes[own])
        for statistic in ("norm_before", "norm_after", "limit")
    }
    before, after = found["norm_before"], found["norm_after"]
    found["factor"] = ratio_of(before, after)
    found["clipped_fraction"] = stats["clipped_fraction"][own].mean()
    found["nonfinite_count"] = stats["nonfinite_count"][own].max()
    return found
