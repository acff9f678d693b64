"""The statistics of a state as a flat dict of scalars, ready for a logger."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optaxclip import _checks, groups as _groups, norms as _norms
from optaxclip._base import Groups, Norm, PyTree, Stats, Table
from optaxclip._matrices import SpectralState
from optaxclip._measure import merge
from optaxclip._partition import partition
from optaxclip._rescale import RescaleState


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

    A group with several rows (`stacked`, `unit`) has one key for each, `layers[3]`, or is put together where
    it has more than `expand`. States hold arrays and no names, which is why the parameters and the groups
    are asked for; without them only the whole is reported.

    Args:
      opt_state: the state of a `rescale_by_norm` or of a spectral method, or any state that holds one: of
        `optax.chain`, `masked`, `partition`, `MultiSteps`, `inject_hyperparams`. If it holds several, their
        prefixes are `clip_0`, `clip_1` and so on.
      params: the tree that `init` was given: parameters, updates or `jax.ShapeDtypeStruct`. Behind
        `optax.masked` and `optax.partition` that is the masked tree, with `optax.MaskedNode()` in place of
        what is left out; of a partition, pass the state of one part, `state.inner_states[label]`.
      groups: the groups that the transformation was given, or a list with one for each state.
      norm: the norm that it was given.
      prefix: the first part of every key.
      separator: what stands between the parts.
      expand: how many rows of a group to report one by one.

    Returns:
      From key to scalar: NumPy scalars, or arrays inside `jit`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if there is no `RescaleState`, or it has not as many rows as the groups.

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
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(x)]
    if not states:
        raise ValueError(
            f"{where}: no RescaleState in a state of type {type(opt_state).__name__}. Pass the state of an "
            "optimizer with rescale_by_norm, or a method made of it, or a spectral method in it."
        )
    each = [groups] * len(states) if isinstance(groups, Groups) else list(groups)
    if len(each) != len(states):
        raise ValueError(f"{where}: {len(each)} groups for {len(states)} states. Pass one for each state.")
    found = {}
    for k, (state, own) in enumerate(zip(states, each, strict=True)):
        _checks.spec(where, Groups, groups=own)
        first = prefix if len(states) == 1 else f"{prefix}_{k}"
        for (statistic, group), value in _of_state(state, params, own, norm, expand).items():
            found[separator.join((first, statistic, group))] = value
    return found


def _is_state(x: Any) -> bool:
    return isinstance(x, RescaleState | SpectralState)


def _of_state(
    state: RescaleState | SpectralState, params: PyTree, groups: Groups, norm: Norm, expand: int
) -> dict[tuple[str, str], Any]:
    xp = jnp
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves(state)):
        state, xp = jax.device_get(state), np  # one transfer, in place of one for each scalar
    step = xp.maximum(state.step, 1).astype(np.float32)
    found = {}
    if params is not None:
        table = _table(state, params, groups)
        stats = _columns(Stats(*(getattr(state, field) for field in Stats._fields)), step)
        for group, (first, count) in table.spans.items():
            if count > expand:
                together = _together(stats, slice(first, first + count), table, norm)
                found |= {(statistic, group): value for statistic, value in together.items()}
            else:
                for row in range(first, first + count):
                    found |= {(statistic, table.names[row]): x[row] for statistic, x in stats.items()}
    found |= {(statistic, "whole"): x for statistic, x in _columns(state.whole, step).items()}
    return found if xp is jnp else {key: np.asarray(value)[()] for key, value in found.items()}


def _table(state: RescaleState | SpectralState, params: PyTree, groups: Groups) -> Table:
    """The table of the groups, checked against the state."""
    table = partition(groups, params).table
    if state.norm.shape != (len(table.names),):
        raise ValueError(
            f"metrics: the state has {len(state.norm)} rows; these groups and parameters have "
            f"{len(table.names)}: {_checks.listed(table.names)}. Pass the groups and the tree that the "
            "transformation was given."
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


def _together(stats: dict[str, Any], own: slice, table: Table, norm: Norm) -> dict[str, Any]:
    """Many rows as one: norms put together, the share of clipped rows, the most frequent non-finite one."""
    found = {
        statistic: merge(norm, jnp.asarray(stats[statistic][own]), table.sizes[own])
        for statistic in ("norm_before", "norm_after", "limit")
    }
    before, after = found["norm_before"], found["norm_after"]
    found["factor"] = jnp.where(before > 0, after / jnp.where(before > 0, before, 1), 1)
    found["clipped_fraction"] = stats["clipped_fraction"][own].mean()
    found["nonfinite_count"] = stats["nonfinite_count"][own].max()
    return found
