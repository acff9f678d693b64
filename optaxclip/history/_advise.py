"""The rule behind `History.advise`, from evidence to a policy and a limit; `docs/choosing.md` explains it."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from optaxclip import _checks, groups as _groups
from optaxclip.history import _advice, _reasons
from optaxclip.history._advice import Advice, Chosen, PolicyName
from optaxclip.history._evidence import Evidence, Rule, evidence
from optaxclip.history._lengths import Lengths, lengths
from optaxclip.history._ordinary import spikes


class Case(NamedTuple):
    """What is to be decided upon.

    Attributes:
      history: the recording.
      found: its evidence, row by row.
      lengths: of the steps; None where it is not known, or where steps do not go by the size of updates.
      budget: the share of ordinary steps that clipping may touch.
      optimizer: what follows the clipping.
      rule: the constants.
    """

    history: Any
    found: Evidence
    lengths: Lengths | None
    budget: float
    optimizer: str
    rule: Rule


def advise(history: Any, budget: float, optimizer: str, learning_rate: float | None, rule: Rule) -> Advice:
    """Weighs a recording, and decides."""
    where = "History.advise"
    _checks.within(where, 0, 0.5, budget=budget)
    _checks.one_of(where, ("sgd", "adam"), optimizer=optimizer)
    if learning_rate is not None:
        _checks.positive(where, learning_rate=learning_rate)
    found = evidence(history, rule)
    refusal = _reasons.undecided(history, found, rule)
    if refusal is not None:
        chosen = _advice.nothing()
        return Advice("undecided", None, None, None, chosen.code, (refusal,), None, chosen.transformation)
    steps = None if optimizer == "adam" else lengths(history, found, learning_rate, rule.step)
    case = Case(history, found, steps, budget, optimizer, rule)
    said = _reasons.seen(history, found, steps)
    if optimizer == "adam":
        return _for_adam(case, said)
    if steps is not None:
        if steps.whole > steps.safe or steps.first >= rule.high:
            return _too_long(case, steps, said)
        if found.whole.max() <= steps.limit and not found.ended:
            said.append(_reasons.short_enough(found, steps))
            return _advised(case, "none", _advice.nothing(), said)
    elif found.ended and found.ordinary.sum() < rule.least_steps:
        return _from_the_start(case, said)
    return _beyond_the_ordinary(case, said)


def _for_adam(case: Case, said: list[str]) -> Advice:
    """Steps do not depend on the size of updates, only on how it changes."""
    found, rule = case.found, case.rule
    swollen = float(np.exp(found.spread**2))
    if not (found.spike.any() or found.ended or swollen >= rule.uneven):
        return _advised(case, "none", _advice.nothing(), [*said, _reasons.nothing_beyond(found)])
    values = found.whole[found.ordinary] if found.ordinary.any() else found.whole[found.calm]
    limit = _advice.rounded(float(np.quantile(values, case.budget)) / rule.below)
    said = [*said, _reasons.for_adam(found, limit, swollen, rule)]
    return _advised(case, "global", _advice.globally(limit, repr(limit)), said)


def _too_long(case: Case, steps: Lengths, said: list[str]) -> Advice:
    """Steps of SGD that are longer than is safe: the limit is the longest that is."""
    found, rule = case.found, case.rule
    culprits = _layers_to_blame(case, steps)
    if culprits is not None:
        top = steps.safe * steps.weights / steps.rate
        limits = {steps.layers[k]: float(top[k]) for k in np.flatnonzero(culprits)}
        return _outliers(
            case, culprits[steps.place], limits, [*said, _reasons.culprits_too_long(steps, culprits)]
        )
    limit = _advice.rounded(steps.limit)
    said = [*said, _reasons.all_too_long(found, steps, limit, rule)]
    return _advised(case, "global", _advice.globally(limit, repr(limit)), said)


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
        few = 0 < own.sum() <= rule.few * len(own) and not np.isnan(steps.each[own]).any()
        if few and (np.nan_to_num(steps.longest[~own]) < rule.high).all():
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
    if found.spike.sum() < rule.least_spikes or found.together >= rule.together or not found.shares.any():
        return None
    own = _holders(found.shares, rule)
    return own if own.sum() <= rule.few * len(own) else None


def _from_the_start(case: Case, said: list[str]) -> Advice:
    """A run that ended before there were ordinary steps to learn from, of unknown step lengths."""
    found, start = case.found, case.history.start
    limit = float(np.median(found.whole[found.calm]))
    if start is not None:
        limit = min(limit, 0.01 * float(np.sqrt((start**2).sum())))  # as in adaptive gradient clipping
    limit = _advice.rounded(limit)
    said = [*said, _reasons.from_the_start(limit, start is not None)]
    return _advised(case, "global", _advice.globally(limit, repr(limit)), said)


def _beyond_the_ordinary(case: Case, said: list[str]) -> Advice:
    """What is beyond the ordinary is limited to what is not."""
    found, rule = case.found, case.rule
    if not found.spike.any() and not found.ended:
        return _advised(case, "none", _advice.nothing(), [*said, _reasons.nothing_beyond(found)])
    own = _to_blame(case)
    if own is not None:
        patterns = _patterns(case.history, own)
        few = case.history.regroup(_groups.regex(patterns))
        top = np.quantile(few.norms[found.kept][found.ordinary], 1 - case.budget, axis=0)
        limits = dict(zip(few.names, map(float, top), strict=True))
        said = [*said, _reasons.culprits_spike(few.names, case.budget)]
        return _outliers(case, own, limits, said)
    if np.isnan(found.together) or found.together >= rule.together:
        return _all_together(case, said)
    return _one_by_one(case, said)


def _all_together(case: Case, said: list[str]) -> Advice:
    found, rule = case.found, case.rule
    if _drifts(case):
        limit, code = _advice.following(case.budget, _window(case))
        said = [*said, _reasons.together(None, case.budget)]
        return _advised(case, "global", _advice.globally(limit, code), said)
    values = found.whole[found.ordinary]
    limit = _advice.rounded(float(np.quantile(values, 1 - case.budget)))
    within = _advice.interval(values, 1 - case.budget, rule.resamples)
    said = [*said, _reasons.together(limit, case.budget)]
    return _advised(case, "global", _advice.globally(limit, repr(limit)), said, within)


def _one_by_one(case: Case, said: list[str]) -> Advice:
    """Rows that spike one by one: layers, if the leaves of one do so together."""
    history, found = case.history, case.found
    single = all(len(row.sources) == 1 for row in history.rows)
    layerwise = single and _leaves_together(case) >= case.rule.together
    own = history.regroup(_groups.layer()) if layerwise else history
    if _drifts(case) or len(own.names) > _advice.LISTED:
        limit, code = _advice.following(case.budget, _window(case))
    else:
        top = np.quantile(own.norms[found.kept][found.ordinary], 1 - case.budget, axis=0)
        limit, code = _advice.each(dict(zip(own.names, map(float, top), strict=True)))
    chosen = (_advice.by_layer if layerwise else _advice.by_leaf)(limit, code)
    said = [*said, _reasons.one_by_one(layerwise)]
    return _advised(case, "layerwise" if layerwise else "leafwise", chosen, said)


def _leaves_together(case: Case) -> float:
    """Of the leaves of layers in which one spikes, which share does; the median over steps."""
    rule = case.rule
    far = spikes(case.found.norms, rule.sigmas, rule.factor, rule.window).spike
    layer = case.history.regrouped(_groups.layer()).place
    shares = [row[np.isin(layer, layer[row])].mean() for row in far[far.any(axis=1)]]
    return float(np.median(shares)) if shares else 1.0


def _outliers(case: Case, own: np.ndarray, limits: dict[str, float], said: list[str]) -> Advice:
    """Clipping of the culprits alone, the rows that `own` marks, in the groups that `limits` names."""
    patterns = _patterns(case.history, own, limits)
    limit, code = _advice.each(limits)
    return _advised(case, "outliers", _advice.only(patterns, limit, code), said)


def _patterns(history: Any, own: np.ndarray, layers: Iterable[str] = ()) -> dict[Any, Any]:
    """Patterns that find the leaves of marked rows: by layer for layers that are given, else one by one."""
    layers = set(layers)
    found: dict[Any, list[str]] = {}
    for row in (row for row, marked in zip(history.rows, own, strict=True) if marked):
        for source in row.sources:
            layer, path = "/".join(source.keys[:-1]) or _groups.ROOT, "/".join(source.keys)
            name = layer if layer in layers else path
            found.setdefault(name.replace("\\", r"\\"), []).append(f"^{re.escape(path)}$")
    short = {name: _advice.alternatives(patterns) for name, patterns in found.items()}
    return {**short, None: ".*"}


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
) -> Advice:
    comparison = None
    if case.found.ordinary.sum() >= case.rule.least_steps:
        comparison = case.history.compare(_candidates(case, policy, chosen))
        said = [*said, *_reasons.beside_others(comparison, policy)]
    made = chosen.transformation
    return Advice(policy, chosen.groups, chosen.limit, within, chosen.code, tuple(said), comparison, made)


def _candidates(case: Case, policy: str, chosen: Chosen) -> dict[str, Any]:
    """The advice beside the others, each with limits that as few ordinary norms exceed."""
    history, found, share = case.history, case.found, 1 - case.budget
    made = {} if policy == "none" else {f"advised: {policy}": history.replay(chosen.transformation)}
    made["none"] = history.replay(np.inf)
    made["global"] = history.replay(float(np.quantile(found.whole[found.ordinary], share)))
    if all(len(row.sources) == 1 for row in history.rows):
        for name, groups in {"layerwise": _groups.layer(), "leafwise": _groups.leaf()}.items():
            norms = history.regroup(groups).norms[found.kept][found.ordinary]
            limit = np.quantile(norms, share, axis=0).astype(np.float32)
            made[name] = history.replay(limit, groups)
    return made
