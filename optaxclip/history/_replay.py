"""Replays policies on recorded norms: the limits and responses of training, without training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from optaxclip import groups as _groups, responses as _responses
from optaxclip._apply import Options, checked, decide
from optaxclip._base import Context, Groups, Limit, Response
from optaxclip._measure import TINY, Measured, merge
from optaxclip._rescale import Policy, policy_of
from optaxclip.history._rows import Regrouped, name_of, norm_called, put_together
from optaxclip.limits import as_limit

LARGEST = float(np.finfo(np.float32).max)
LAST = np.iinfo(np.int32).max  # where training's counter of steps stops


@dataclasses.dataclass(frozen=True, eq=False)
class Replay:
    r"""What a policy would have done to the updates of a recording; NumPy arrays, float64.

    $$n'_t = \sqrt{\textstyle\sum_r s_{t,r}^2\, n_{t,r}^2}, \qquad
    \cos_t = \frac{\sum_r s_{t,r}\, n_{t,r}^2}{n_t\, n'_t}$$

    for the whole update in L2, of rows with norms $n_{t,r}$ and factors $s_{t,r}$.

    Attributes:
      names: the groups of the policy.
      steps: the number of each update, `(steps,)`.
      norm: the norms of the groups, `(steps, groups)`, in the norm that the policy measures.
      limit: what they would have been held against, likewise.
      factor: what they would have been multiplied by, likewise; NaN where a NaN or an infinity propagates.
      after: their norms afterwards, likewise.
      norm_before: the norm of the whole update, all that was recorded, `(steps,)`.
      norm_after: the same afterwards, `(steps,)`.
      cosine: of the angle between the whole update before and after, `(steps,)`. NaN where one of them is
        zero or not finite, and where norms other than `l2` and `rms` were recorded, which have no angles.
      by_row: the factor of each recorded row, 1 where the policy leaves it alone, `(steps, rows)`.
      acted: in which updates any group's factor was not 1, bool `(steps,)`; groups that are not finite do
        not count.

    >>> import optaxclip as oc
    >>> history = oc.History(["a", "b"], [[3.0, 4.0], [3.0, 40.0]])
    >>> found = history.replay(oc.clip_by_leafwise_norm(5.0))
    >>> print(found.norm_after.round(3), found.cosine.round(3), found.clipped)
    [5.    5.831] [1.    0.894] 0.5
    """

    names: tuple[str, ...]
    steps: np.ndarray
    norm: np.ndarray
    limit: np.ndarray
    factor: np.ndarray
    after: np.ndarray
    norm_before: np.ndarray
    norm_after: np.ndarray
    cosine: np.ndarray
    by_row: np.ndarray
    acted: np.ndarray

    @property
    def clipped(self) -> float:
        """In which share of the updates any group's factor was not 1."""
        return float(self.acted.mean()) if len(self.acted) else 0.0


def policy_like(
    limit: Any, groups: Groups | None, response: Response | None, norm: str, eps: float, nonfinite: Any
) -> Policy:
    """The policy that the arguments of `History.replay` stand for."""
    where = "History.replay"
    policy = policy_of(limit)
    if policy is not None:
        if groups is not None or response is not None or eps or nonfinite != "propagate":
            raise TypeError(f"{where}: a transformation has groups and all else of its own. Pass it alone.")
        return policy
    if isinstance(limit, optax.GradientTransformation | tuple) and not isinstance(limit, Limit):
        raise TypeError(
            f"{where}: {type(limit).__name__} is neither a limit nor made by rescale_by_norm. What acts "
            "entry by entry, or wraps another transformation, cannot be replayed on norms."
        )
    groups = _groups.whole() if groups is None else groups
    response = _responses.clip() if response is None else response
    options = checked(where, groups, norm_called(norm), response, eps, nonfinite)
    return Policy(as_limit(limit, where), options)


def replay(history: Any, policy: Policy) -> Replay:
    """Runs a policy over a `History`."""
    own = history.regrouped(policy.options.groups)
    wanted = _wanted(history, policy.options)
    norm = _norms(history, history.norms, own, own.measured, wanted)
    limit, factor, after = _run(history, policy, own, wanted, norm)
    if history.sizes is None and (np.isnan(limit) & np.isfinite(norm)).any():
        raise ValueError(
            "History.replay: the limit depends on the sizes of the groups, which are not known. Pass "
            "History(..., sizes=...), the number of entries of each."
        )
    by_row = np.ones_like(history.norms)
    scaled = own.scaled & (own.place >= 0)
    by_row[:, scaled] = factor[:, own.place[scaled]]
    with np.errstate(invalid="ignore"):  # zero times infinity
        rows = by_row * history.norms
    if policy.options.nonfinite == "zero":
        rows[by_row == 0] = 0
    together = np.zeros(len(own.place), int)
    return Replay(
        names=own.table.names,
        steps=history.steps,
        norm=norm,
        limit=limit,
        factor=factor,
        after=after,
        norm_before=history.whole,
        norm_after=put_together(rows, history.sizes, together, 1, history.norm)[:, 0],
        cosine=cosine(history.norms, by_row, history.sizes, history.norm),
        by_row=by_row,
        acted=((factor != 1) & np.isfinite(norm) & ~np.isnan(limit)).any(axis=1),
    )


def _wanted(history: Any, options: Options) -> str:
    """The norm that a policy measures, which must be one that the recorded norms give."""
    wanted = name_of(options.norm)
    if wanted != history.norm and {wanted, history.norm} != {"l2", "rms"}:
        raise ValueError(
            f"History.replay: the policy measures {wanted}, the recording holds {history.norm}. Make it with "
            "record(norm=...) of the same norm."
        )
    if wanted != history.norm and history.sizes is None:
        raise ValueError(
            f"History.replay: to get {wanted} from {history.norm} takes the sizes of the groups, which are "
            "not known. Pass History(..., sizes=...), the number of entries of each."
        )
    return wanted


def _norms(history: Any, norms: np.ndarray, own: Regrouped, of: np.ndarray, wanted: str) -> np.ndarray:
    """The norms of groups, of those of their rows that `of` marks: `(steps, groups)`.

    Root mean squares are over all entries of a group that are measured, whatever `of` marks, as in training.
    """
    place, kind = np.where(of, own.place, -1), history.norm
    if kind == "rms":
        norms, kind = norms * np.sqrt(history.sizes), "l2"
    found = put_together(norms, None, place, len(own.table.names), kind)
    return found / np.sqrt(own.table.sizes) if wanted == "rms" else found


def _run(
    history: Any, policy: Policy, own: Regrouped, wanted: str, norm: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The limits, the factors and the norms afterwards, `(steps, groups)` each."""
    if not norm.size:
        return norm, norm, norm
    rule, options = policy.limit, policy.options
    free = fixed = params = None
    if not np.all(own.scaled[own.measured]):
        parts = own.measured & own.scaled, own.measured & ~own.scaled
        free, fixed = (_norms(history, history.norms, own, of, wanted) for of in parts)
    if rule.needs_params:
        if history.params is None:
            raise ValueError(
                "History.replay: the limit is relative to the parameters, whose norms were not recorded. "
                "Make the recording with record(params=True)."
            )
        params = _norms(history, history.params, own, own.measured, wanted)
    start, steps = rule.init(own.table), history.steps
    # What remembers norms starts with the first of the recording, as training starts with step 0.
    steps = steps - steps[0] if jax.tree.leaves(start) else steps

    def step(state: Any, now: Any) -> Any:
        at, norm, small, free, fixed, of_params = now
        found = Measured(norm, small, fixed, free)
        total = merge(options.norm, jnp.where(jnp.isfinite(norm), norm, 0), own.table.sizes)
        context = Context(at, own.table, options.norm, options.response, total, of_params)
        stats, first, then, new = decide(rule, state, found, context, options)
        new = jax.tree.map(lambda new, old: new.astype(old.dtype), new, state)
        return new, (stats.limit, first, then, stats.norm_after)

    given = (
        np.minimum(steps, LAST).astype(np.int32),
        *jax.tree.map(_single, (norm, norm * TINY, free, fixed, params)),
    )
    _, found = jax.jit(lambda start, given: jax.lax.scan(step, start, given))(start, given)
    limit, first, then, after = (np.asarray(x, np.float64) for x in found)
    return limit, first * then, after


def _single(x: np.ndarray) -> np.ndarray:
    return np.where(x < np.inf, np.minimum(x, LARGEST), x).astype(np.float32)


def cosine(
    norms: Float[np.ndarray, "steps rows"],
    factors: Float[np.ndarray, "steps rows"],
    sizes: Float[np.ndarray, " rows"] | None,
    norm: str,
) -> Float[np.ndarray, " steps"]:
    """The cosine of the angle between updates and what is left of them when rows are scaled, `(steps,)`."""
    if norm not in ("l2", "rms"):
        return np.full(len(norms), np.nan)
    lengths = norms if norm == "l2" or sizes is None else norms * np.sqrt(sizes)
    with np.errstate(invalid="ignore", divide="ignore"):
        lengths = lengths / lengths.max(axis=1, keepdims=True, initial=0)
        after = lengths * factors
        after = after / after.max(axis=1, keepdims=True, initial=0)
        sums = (lengths * after).sum(axis=1), (lengths**2).sum(axis=1), (after**2).sum(axis=1)
        return np.minimum(sums[0] / np.sqrt(sums[1] * sums[2]), 1)
