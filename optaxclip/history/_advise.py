"""The rule behind `History.advise`, from evidence to a policy and a limit; `docs/choosing.md` explains it."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from optaxclip import _checks
from optaxclip._base import Limit
from optaxclip.groups import ROOT
from optaxclip.history import _advice, _reasons, _seen
from optaxclip.history._advice import Advice, Chosen, PolicyName
from optaxclip.history._compare import compare
from optaxclip.history._evidence import Evidence, Rule, evidence, passed
from optaxclip.history._expressed import LAYER, LEAF, WHOLE, called, coarser, finest, only, plain
from optaxclip.history._lengths import Lengths, lengths, norm
from optaxclip.history._ordinary import spikes


class Case(NamedTuple):
    """What is to be decided upon.

    Attributes:
      history: the recording, of whole leaves or coarser.
      found: its evidence, row by row.
      lengths: of the steps; None where it is not known, or where steps do not go by the size of updates.
      rate: the learning rate; None if it was not given.
      budget: the share of ordinary steps that clipping may touch.
      optimizer: what follows the clipping.
      rule: the constants.
    """

    history: Any
    found: Evidence
    lengths: Lengths | None
    rate: float | None
    budget: float
    optimizer: str
    rule: Rule


def advise(
    history: Any, budget: float, optimizer: str | None, learning_rate: float | None, rule: Rule
) -> Advice:
    """Weighs a recording, and decides."""
    _check(budget, optimizer, learning_rate)
    recorded, history = history, plain(history)
    found = evidence(history, rule)
    if history.run is None and recorded.run is not None:  # lost where rows were put together
        found = found._replace(nonfinite=recorded.first_nonfinite(), passed=passed(recorded))
    refusal = _seen.undecided(history, found, rule)
    if refusal is not None:
        chosen = _advice.nothing()
        return Advice("undecided", None, None, None, chosen.code, (refusal,), None, chosen.transformation)
    steps = None if optimizer == "adam" else lengths(history, found, learning_rate, rule.step)
    case = Case(history, found, steps, learning_rate, budget, optimizer or "sgd", rule)
    taken = _seen.taken(history, optimizer, learning_rate, steps is not None)
    said = [*taken, *_seen.seen(history, found, steps)]
    if optimizer == "adam":
        return _for_adam(case, said)
    if steps is not None:
        beyond = found.ordinary if found.swollen >= rule.uneven else found.spike
        far = (beyond | found.spike) & (found.whole > steps.limit)
        if steps.whole > steps.safe or steps.first >= rule.high or far.any() or found.ended:
            return _too_long(case, steps, said)
        said.append(_reasons.short_enough(found, steps, rule))
        return _advised(case, "none", _advice.nothing(), said)
    if found.ended and found.ordinary.sum() < rule.least_steps:
        return _from_the_start(case, said)
    return _beyond_the_ordinary(case, said)


def _check(budget: Any, optimizer: Any, learning_rate: Any) -> None:
    """Raises unless `advise` can take them."""
    where = "History.advise"
    _checks.within(where, 0, 0.5, budget=budget)
    if optimizer not in (None, "sgd", "adam"):
        raise ValueError(
            f"{where}: optimizer is {optimizer!r}. Pass one of 'sgd', 'adam': 'adam' is for AdamW, Lion, "
            "Adafactor and all whose steps do not depend on the size of gradients; 'sgd' for momentum too."
        )
    if callable(learning_rate):
        raise TypeError(
            f"{where}: learning_rate is {learning_rate!r}, of type {type(learning_rate).__name__}. Pass a "
            "number: of a schedule, its highest value."
        )
    if learning_rate is not None:
        _checks.positive(where, learning_rate=learning_rate)


def _for_adam(case: Case, said: list[str]) -> Advice:
    """Steps do not depend on the size of updates, only on how it changes."""
    found, rule = case.found, case.rule
    if not (found.spike.any() or found.ended or found.swollen >= rule.uneven):
        return _advised(case, "none", _advice.nothing(), [*said, _reasons.nothing_beyond(found)])
    values = found.whole[_typical(case)]
    limit = _advice.rounded(float(np.quantile(values, case.budget)) / rule.below)
    said = [*said, _reasons.for_adam(found, limit, rule), *_reasons.near_eps(case.history, limit)]
    return _globally(case, limit, said)


def _too_long(case: Case, steps: Lengths, said: list[str]) -> Advice:
    """Steps of SGD that are longer than is safe: each layer's limit is the longest that is."""
    culprits, limits = _layers_to_blame(case, steps), steps.limits
    if culprits is not None:
        own = np.flatnonzero(culprits)
        limit, code = _advice.each({called(steps.layers[k]): limits[k] for k in own})
        said = [*said, _reasons.culprits_too_long(steps, culprits)]
        chosen = _advice.clipping(limit, code, only([steps.layers[k] for k in own]), case.history.norm)
        return _advised(case, "outliers", chosen, said)
    by = finest(case.history) if coarser(case.history, LAYER) is None else LAYER
    said = [*said, _reasons.all_too_long(case.found, steps, case.rule, whole=by == WHOLE)]
    if by == WHOLE:
        return _globally(case, _advice.rounded(float(limits[0])), said)
    at_start = None
    if len(limits) <= case.rule.listed:
        limit, code = _advice.each(dict(zip(map(called, steps.layers), limits, strict=True)))
    else:
        ratio, floor = (_advice.rounded(x) for x in (steps.safe / steps.rate, float(steps.scale.min())))
        limit, code = _advice.in_proportion(ratio, floor)
        said.append(_reasons.in_proportion(floor))
        stands = dict(zip(map(called, steps.layers), np.maximum(steps.weights, floor), strict=True))
        names = case.history.regrouped(by.groups).table.names
        at_start = _advice.held(ratio * np.array([stands[name or ROOT] for name in names])).astype(np.float32)
    chosen = _advice.clipping(limit, code, by, case.history.norm)
    return _advised(case, "layerwise", chosen, said, at_start=at_start)


def _layers_to_blame(case: Case, steps: Lengths) -> np.ndarray | None:
    """The few layers that are to blame for steps that are too long, bool `(layers,)`; None if all are.

    They are those with steps that are far too long; or those that hold the excess of spikes; or those that
    hold the length of ordinary steps. What is left alone must not have made a step that is far too long.
    """
    rule, each = case.rule, np.nan_to_num(steps.each)
    rows = _to_blame(case)
    by_spikes = np.isin(np.arange(len(each)), steps.place[rows]) if rows is not None else each < 0
    total = (each**2).sum()
    for own in (each >= rule.high, by_spikes, _holders(each**2 / total if total > 0 else each, rule)):
        known = not np.isnan(steps.each[own]).any()
        if _few(own, rule) and known and (np.nan_to_num(steps.longest[~own]) < rule.high).all():
            return own
    return None


def _holders(shares: np.ndarray, rule: Rule) -> np.ndarray:
    """The least number of groups that hold what counts as concentrated."""
    top = np.argsort(-shares)
    own = np.zeros(len(top), bool)
    own[top[: int(np.searchsorted(np.cumsum(shares[top]), rule.concentrated) + 1)]] = True
    return own


def _to_blame(case: Case) -> np.ndarray | None:
    """The few rows that spike and hold the excess, bool `(rows,)`; None if there are none."""
    found, rule = case.found, case.rule
    if found.spike.sum() < rule.least_spikes or found.together > rule.together or not found.shares.any():
        return None
    own = _holders(found.shares, rule)
    return own if _few(own, rule) else None


def _few(own: np.ndarray, rule: Rule) -> bool:
    """Whether so few are marked that they can be called outliers, and listed in a line of code."""
    return bool(0 < own.sum() <= min(rule.few * len(own), rule.listed))


def _from_the_start(case: Case, said: list[str]) -> Advice:
    """A run that ended before there were ordinary steps to learn from, of unknown step lengths."""
    found, start = case.found, case.history.start
    limit, of_weights = float(np.median(found.whole[found.calm])), np.nan
    if start is not None and case.history.norm == "l2":
        of_weights = case.rule.of_weights * norm(start)
    held = 0 < of_weights < limit
    limit = _advice.rounded(of_weights if held else limit)
    return _globally(
        case, limit, [*said, _reasons.from_the_start(limit, held, start is not None and case.rate is None)]
    )


def _beyond_the_ordinary(case: Case, said: list[str]) -> Advice:
    """What is beyond the ordinary is limited to what is not."""
    found, rule = case.found, case.rule
    if not found.spike.any() and not found.ended:
        if found.swollen >= rule.uneven:
            limit, within = _of_the_whole(case, 1 - case.budget)
            return _globally(case, limit, [*said, _reasons.scattered(found, limit, case.budget)], within)
        return _advised(case, "none", _advice.nothing(), [*said, _reasons.nothing_beyond(found)])
    if found.ordinary.sum() < rule.least_steps:
        said = [*said, _reasons.few_ordinary(found)]
    own = _to_blame(case)
    if own is not None:
        culprits = [case.history.rows[k] for k in np.flatnonzero(own)]
        by = only(culprits)
        limit, code = _of_each(case, case.history.regroup(by.groups))
        said = [*said, _reasons.culprits_spike([called(row) for row in culprits], case.budget)]
        return _advised(case, "outliers", _advice.clipping(limit, code, by, case.history.norm), said)
    if np.isnan(found.together) or found.together > rule.together:
        return _all_together(case, said)
    return _one_by_one(case, said)


def _all_together(case: Case, said: list[str]) -> Advice:
    if _drifts(case):
        limit, code = _advice.following(case.budget, _window(case))
        chosen = _advice.clipping(limit, code, WHOLE, case.history.norm)
        return _advised(case, "global", chosen, [*said, _reasons.together(case.found, None, case.budget)])
    limit, within = _of_the_whole(case, 1 - case.budget)
    return _globally(case, limit, [*said, _reasons.together(case.found, limit, case.budget)], within)


def _one_by_one(case: Case, said: list[str]) -> Advice:
    """Rows that spike one by one: layers, if the leaves of one do so together."""
    history, by = case.history, finest(case.history)
    own = coarser(history, LAYER) if by == LEAF else None
    if own is not None and _leaves_together(case) > case.rule.together:
        history, by = own, LAYER
    limit, code = _of_each(case, history)
    policy, rows = (
        ("leafwise", "leaves") if by == LEAF else ("layerwise", "layers" if by == LAYER else "groups")
    )
    chosen = _advice.clipping(limit, code, by, history.norm)
    return _advised(case, policy, chosen, [*said, _reasons.one_by_one(rows, case.budget)])


def _globally(case: Case, limit: float, said: list[str], within: tuple[float, float] | None = None) -> Advice:
    chosen = _advice.clipping(limit, repr(limit), WHOLE, case.history.norm)
    return _advised(case, "global", chosen, said, within)


def _of_the_whole(case: Case, share: float) -> tuple[float, tuple[float, float] | None]:
    """A limit that this share of ordinary norms stays below, and its interval where there are enough."""
    values = case.found.whole[_typical(case)]
    known = len(values) >= case.rule.least_steps
    within = _advice.interval(values, share, case.rule.resamples) if known else None
    return _advice.rounded(float(np.quantile(values, share))), within


def _of_each(case: Case, own: Any) -> tuple[float | Limit, str]:
    """The same for each row of a recording; where numbers will not do, a limit that follows the norms."""
    if _drifts(case) or len(own.names) > case.rule.listed:
        return _advice.following(case.budget, _window(case))
    return _advice.each(dict(zip(map(called, own.rows), _seldom_exceeded(case, own), strict=True)))


def _seldom_exceeded(case: Case, own: Any) -> np.ndarray:
    """What but a share of each row's ordinary norms stay below, `(rows,)`.

    Norms of zero do not count: of a row that is rarely used they would be the most, and a limit of zero would
    stop it. A row that was never used may be as large as any other.
    """
    norms = own.norms[case.found.kept][_typical(case)]
    top = np.array([np.quantile(x[x > 0], 1 - case.budget) if (x > 0).any() else 0 for x in norms.T])
    return _advice.held(np.where(top > 0, top, top.max(initial=0)))


def _typical(case: Case) -> np.ndarray:
    """The ordinary steps; those before the end if none is."""
    found = case.found
    return found.ordinary if found.ordinary.any() else found.calm


def _leaves_together(case: Case) -> float:
    """Of the leaves of layers in which one spikes, which share does; the median over steps."""
    rule = case.rule
    far = spikes(case.found.norms, rule.sigmas, rule.factor, rule.window).spike
    layer = case.history.regrouped(LAYER.groups).place
    shares = [row[np.isin(layer, layer[row])].mean() for row in far[far.any(axis=1)]]
    return float(np.median(shares)) if shares else 1.0


def _drifts(case: Case) -> bool:
    return not 1 / case.rule.drift < case.found.drift < case.rule.drift


def _window(case: Case) -> int:
    """How many norms an advised limit remembers: twice what tells drift from spikes."""
    return 2 * case.rule.window - 2


def _advised(
    case: Case,
    policy: PolicyName,
    chosen: Chosen,
    said: list[str],
    within: tuple[float, float] | None = None,
    at_start: np.ndarray | None = None,
) -> Advice:
    made, ordinary = chosen.transformation, int(case.found.ordinary.sum())
    advice = Advice(
        policy, chosen.groups, chosen.limit, within, chosen.code, tuple(said), None, made, at_start, ordinary
    )
    beside = {} if policy == "none" else {f"advised: {policy}": advice.replay(case.history)}
    if ordinary < case.rule.least_steps:
        return advice
    comparison = compare(case.history, beside | _candidates(case), case.rule)
    if case.optimizer != "adam":
        *seen, why = said
        often = _reasons.clips_most(comparison.rows[0], policy) if beside else []
        said = [*seen, *often, why, *_reasons.beside_others(comparison, policy)]
    return dataclasses.replace(advice, reasons=tuple(said), comparison=comparison)


def _candidates(case: Case) -> dict[str, Any]:
    """What the advice stands beside: policies with limits that few ordinary norms exceed."""
    history = case.history
    made = {"none": history.replay(np.inf)}
    top = np.quantile(case.found.whole[_typical(case)], 1 - case.budget)
    made["global"] = history.replay(float(_advice.held(top)))
    for name, by in {"layerwise": LAYER, "leafwise": LEAF}.items():
        own = coarser(history, by)
        if own is not None:
            made[name] = history.replay(_seldom_exceeded(case, own).astype(np.float32), by.groups)
    return made
