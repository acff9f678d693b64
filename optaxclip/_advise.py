"""The rule behind `History.advise`: from evidence to a policy and its limit; `docs/choosing.md` explains it."""

import re
from typing import Any, Literal, NamedTuple

import numpy as np

from optaxclip import _advice, _checks, groups as _groups
from optaxclip._advice import Advice, Chosen
from optaxclip._evidence import Evidence, Rule, evidence
from optaxclip._ordinary import spikes


class Asked(NamedTuple):
    """What `History.advise` was asked.

    Attributes:
      history: the recording.
      found: its evidence, row by row.
      budget: the share of ordinary steps that clipping may touch.
      optimizer: what follows the clipping.
      learning_rate: its learning rate at the start; None if unknown.
      rule: the constants.
    """

    history: Any
    found: Evidence
    budget: float
    optimizer: str
    learning_rate: float | None
    rule: Rule


class Steps(NamedTuple):
    """How long the optimizer's steps are, relative to the weights at the start.

    Attributes:
      names: the layers, or the rows where they are no leaves.
      each: of each, the median over ordinary steps, `(layers,)`; NaN where weights start from zero.
      whole: of all together.
      rows: the layer of each row, `(rows,)`.
    """

    names: tuple[str, ...]
    each: np.ndarray
    whole: float
    rows: np.ndarray


def advise(
    history: Any,
    budget: float,
    optimizer: Literal["sgd", "adam"],
    learning_rate: float | None,
    rule: Rule,
) -> Advice:
    """Weighs a recording, and decides."""
    where = "History.advise"
    _checks.within(where, 0, 0.5, budget=budget)
    _checks.one_of(where, ("sgd", "adam"), optimizer=optimizer)
    if learning_rate is not None:
        _checks.positive(where, learning_rate=learning_rate)
    found = evidence(history, rule)
    asked = Asked(history, found, budget, optimizer, learning_rate, rule)
    refusal = _undecided(asked)
    if refusal is not None:
        return _advised("undecided", _advice.nothing(), [refusal], None, asked)
    if _ended(found) and found.ordinary.sum() < rule.least_steps:
        return _from_the_start(asked)
    return _from_ordinary_steps(asked)


def _ended(found: Evidence) -> bool:
    """Whether what is not finite ended the run, rather than one step of it."""
    return found.growth > 0 or (found.nonfinite is not None and not found.calm.all())


def _undecided(asked: Asked) -> str | None:
    """Why nothing can be said, if so."""
    found, rule = asked.found, asked.rule
    if not len(asked.history.names) or not len(found.whole):
        return (
            "The recording holds no finite norm: nothing can be said. Look at the first step's loss and data."
        )
    if not found.whole.max() > 0:
        return "All recorded norms are zero: record gradients, before anything else acts on them."
    if not np.isnan(found.clipped_at):
        share = np.mean(found.whole >= found.clipped_at * (1 - 2.0**-7))
        return (
            f"{share:.0%} of the steps share the largest norm, {found.clipped_at:.3g}: these updates have been "
            "clipped already. Put record() before the clipping, first in the chain."
        )
    if found.nonfinite is None and len(found.whole) < rule.least_steps:
        return (
            f"The recording has {len(found.whole)} finite steps; below {rule.least_steps} nothing is known of "
            "how norms scatter. Record more."
        )
    return None


def _from_the_start(asked: Asked) -> Advice:
    """A run that ended before there were enough ordinary steps to learn from."""
    found, rule = asked.found, asked.rule
    first = found.nonfinite
    reasons = [
        f"Step {first.step} is the first that is not finite, in {_some(first.names)}"
        + (f"; the deepest that still was: {first.deepest_finite}." if first.deepest_finite else ".")
    ]
    reasons.append(
        f"{int(found.calm.sum())} steps came before norms began to grow, {found.growth:.1f} doublings a step: "
        "clipping must begin with the first step, and its limit cannot be read from ordinary ones."
    )
    growth = found.norms[-1] / np.where(found.norms[0] > 0, found.norms[0], np.nan)
    grown = np.nan_to_num(growth) > rule.factor
    steps = _steps(asked)
    culprits = _too_long(asked, steps)
    if culprits is not None and 0 < culprits.sum() <= rule.few * len(culprits):
        return _outliers(asked, culprits, reasons, steps)
    if len(found.whole) > 1:
        reasons.append(
            f"From the first step to the last finite one, {grown.sum()} of {len(grown)} rows grew."
        )
    limit, why = _limit_at_start(asked, steps)
    reasons.append(why)
    return _advised("global", _advice.globally(limit, repr(limit)), reasons, None, asked)


def _limit_at_start(asked: Asked, steps: Steps | None) -> tuple[float, str]:
    """A limit from what is known before the first step."""
    norm = float(np.median(asked.found.whole[asked.found.calm]))
    if asked.optimizer == "adam":
        return _advice.rounded(norm), (
            f"The limit is the norm before the growth, {norm:.3g}: Adam's steps do not depend on the size of "
            "gradients, only on how it changes."
        )
    start, rate = asked.history.start, asked.learning_rate
    if start is not None and rate is not None:
        weights = _root_sum(start)
        limit = _advice.rounded(asked.rule.step * weights / rate)
        return limit, (
            f"The weights' norm at the start is {weights:.3g}. With a limit of {limit:g} and a learning rate of "
            f"{rate:g} a step is {asked.rule.step:g} of it, the trust coefficient of LARS; without, the first "
            f"was {rate * norm / weights:.3g} of it."
        )
    if start is not None:
        limit = _advice.rounded(0.01 * _root_sum(start))
        return limit, (
            f"The weights' norm at the start is {_root_sum(start):.3g}, and the limit a hundredth of it, as in "
            "adaptive clipping. Pass learning_rate= for one that knows the length of steps."
        )
    return _advice.rounded(
        norm
    ), f"The limit is the norm before the growth, {norm:.3g}, for want of the weights'."


def _from_ordinary_steps(asked: Asked) -> Advice:
    """A recording with enough ordinary steps to tell what is beyond them."""
    found, rule = asked.found, asked.rule
    steps = _steps(asked)
    reasons = _seen(asked)
    culprits = _too_long(asked, steps)
    if culprits is not None and culprits.any() and steps is not None:
        if culprits.sum() <= rule.few * len(culprits):
            return _outliers(asked, culprits, reasons, steps)
        limit, why = _limit_at_start(asked, steps)
        reasons.append(
            f"An ordinary step is {steps.whole:.2g} of the weights' norm: the learning rate of "
            f"{asked.learning_rate:g} is the real problem. Try a lower one first; clipping holds steps down "
            "where it stays."
        )
        reasons.append(why)
        return _advised("global", _advice.globally(limit, repr(limit)), reasons, None, asked)
    if not (found.spike & found.calm).any() and not _ended(found):
        reasons.append("No step is beyond what is ordinary: nothing would be gained by clipping.")
        return _advised("none", _advice.nothing(), reasons, None, asked)
    top = np.argsort(-found.shares)
    count = int(np.searchsorted(np.cumsum(found.shares[top]), rule.concentrated) + 1)
    if found.shares.any() and count <= rule.few * len(top):
        own = np.zeros(len(top), bool)
        own[top[:count]] = True
        return _outliers(asked, own, reasons, None)
    if np.isnan(found.together) or found.together >= rule.together:
        return _global(asked, reasons)
    return _each_by_itself(asked, reasons)


def _seen(asked: Asked) -> list[str]:
    """What was seen, in sentences."""
    found = asked.found
    ordinary, spike = found.ordinary, found.spike & found.calm
    low, high = np.quantile(found.whole[ordinary], [0.05, 0.95])
    said = [
        f"{ordinary.sum()} of {len(asked.history)} steps are ordinary, with norms of {low:.3g} to {high:.3g}."
    ]
    if spike.any():
        said.append(
            f"{spike.sum()} steps are spikes of up to {found.whole[spike].max():.3g}. Of their excess "
            f"{found.shares.max():.0%} is in {found.names[int(found.shares.argmax())]}; the effective number of "
            f"rows in it is {found.effective:.1f} of {len(found.names)}. In a spike {found.together:.0%} of the "
            "rows spike."
        )
    if found.nonfinite is not None:
        first = found.nonfinite
        said.append(f"Step {first.step} is the first that is not finite, in {_some(first.names)}.")
    if found.growth > 0:
        said.append(
            f"Before it norms grew for {int((~found.calm).sum())} steps, {found.growth:.1f} doublings each."
        )
    if _drifts(asked):
        said.append(f"Within the recording the ordinary norm changed by a factor of {found.drift:.2g}.")
    return said


def _global(asked: Asked, reasons: list[str]) -> Advice:
    found, rule = asked.found, asked.rule
    if _drifts(asked):
        limit, code = _advice.following(asked.budget, _window(asked))
        reasons.append("Rows spike together, and norms drift: the limit follows the global norm.")
        return _advised("global", _advice.globally(limit, code), reasons, None, asked)
    values = found.whole[found.ordinary]
    limit = _advice.rounded(float(np.quantile(values, 1 - asked.budget)))
    within = _advice.interval(values, 1 - asked.budget, rule.resamples)
    reasons.append(
        f"Rows spike together: the global norm tells all, and keeps direction. {limit:g} is what "
        f"{1 - asked.budget:.0%} of the ordinary steps stay below."
    )
    return _advised("global", _advice.globally(limit, repr(limit)), reasons, within, asked)


def _each_by_itself(asked: Asked, reasons: list[str]) -> Advice:
    """Rows that spike one by one: layers, if the leaves of one do so together."""
    history = asked.history
    layers = history.regroup(_groups.layer()) if _of_leaves(history) else None
    layerwise = layers is not None and _leaves_together(asked) >= asked.rule.together
    own = layers if layerwise and layers is not None else history
    found = evidence(own, asked.rule)
    if _drifts(asked) or len(own.names) > 12:
        limit, code = _advice.following(asked.budget, _window(asked))
    else:
        top = np.quantile(found.norms[asked.found.ordinary], 1 - asked.budget, axis=0)
        limit, code = _advice.each(dict(zip(own.names, map(float, top), strict=True)))
    made = (_advice.by_layer if layerwise else _advice.by_leaf)(limit, code)
    reasons.append(
        f"{'Layers' if layerwise else 'Leaves'} spike one by one: a global limit would hold all of them back "
        "for one, so each is held to its own ordinary norm."
    )
    return _advised("layerwise" if layerwise else "leafwise", made, reasons, None, asked)


def _leaves_together(asked: Asked) -> float:
    """Of the leaves of layers in which one spikes, which share does; the median over steps."""
    of = spikes(asked.found.norms, asked.rule.sigmas, asked.rule.factor, asked.rule.window).spike
    layer = asked.history.regrouped(_groups.layer()).place
    shares = []
    for row in of[of.any(axis=1)]:
        hit = np.isin(layer, layer[row])
        shares.append(row[hit].mean())
    return float(np.median(shares)) if shares else 1.0


def _outliers(asked: Asked, own: np.ndarray, reasons: list[str], steps: Steps | None) -> Advice:
    """Clipping of the culprits alone, the rows that `own` marks."""
    history, found = asked.history, asked.found
    patterns: dict[Any, Any] = {}
    for row in (row for row, hit in zip(history.rows, own, strict=True) if hit):
        for source in row.sources:
            path = "/".join(source.keys)
            patterns[path.replace("\\", r"\\")] = f"^{re.escape(path)}$"
    names = list(patterns)
    patterns[None] = ".*"
    few = history.regroup(_groups.regex(patterns))
    if steps is None:
        norms = few.norms[np.isfinite(history.norms).all(axis=1)][: len(found.whole)]
        top = np.quantile(norms[found.ordinary], 1 - asked.budget, axis=0)
        why = f"each is held to what {1 - asked.budget:.0%} of its ordinary norms stay below"
    else:
        good = float(np.nanmedian(steps.each[~np.isin(np.arange(len(steps.each)), steps.rows[own])]))
        assert few.start is not None
        assert asked.learning_rate is not None
        top = good * few.start / asked.learning_rate
        why = (
            f"an ordinary step is {np.nanmax(steps.each):.2g} of their weights, and {good:.2g} of the others', "
            "to which each is held"
        )
    limit, code = _advice.each(dict(zip(few.names, map(float, top), strict=True)))
    reasons.append(
        f"Only {_some(names)} {'is' if len(names) == 1 else 'are'} to blame: {why}; all else is left alone."
    )
    return _advised("outliers", _advice.only(patterns, limit, code), reasons, None, asked)


def _steps(asked: Asked) -> Steps | None:
    """How long steps are, where that can be known: by plain gradients, with learning rate and weights given."""
    history, found = asked.history, asked.found
    if asked.optimizer != "sgd" or asked.learning_rate is None or history.start is None:
        return None
    own = history.regroup(_groups.layer()) if _of_leaves(history) else history
    place = history.regrouped(_groups.layer()).place if _of_leaves(history) else np.arange(len(history.names))
    norms = own.norms[np.isfinite(history.norms).all(axis=1)][: len(found.whole)]
    some = found.ordinary if found.ordinary.any() else found.calm
    with np.errstate(divide="ignore", invalid="ignore"):
        each = asked.learning_rate * np.median(norms[some], axis=0) / own.start
        whole = asked.learning_rate * np.median(found.whole[some]) / _root_sum(history.start)
    return Steps(own.names, np.where(own.start > 0, each, np.nan), float(whole), place)


def _too_long(asked: Asked, steps: Steps | None) -> np.ndarray | None:
    """The rows of layers whose steps are too long, bool `(rows,)`; None where that cannot be known."""
    if steps is None:
        return None
    return np.nan_to_num(steps.each, nan=0.0)[steps.rows] >= asked.rule.high


def _root_sum(norms: np.ndarray) -> float:
    return float(np.sqrt((norms**2).sum()))


def _of_leaves(history: Any) -> bool:
    return all(len(row.sources) == 1 for row in history.rows)


def _drifts(asked: Asked) -> bool:
    return not 1 / asked.rule.drift < asked.found.drift < asked.rule.drift


def _window(asked: Asked) -> int:
    """How many norms an advised limit remembers: twice what tells drift from spikes."""
    return 2 * asked.rule.window - 2


def _some(names: Any) -> str:
    return _checks.listed(names, 3)


def _advised(
    policy: Any, chosen: Chosen, reasons: list[str], within: tuple[float, float] | None, asked: Asked
) -> Advice:
    comparison = None
    if asked.found.ordinary.sum() >= asked.rule.least_steps and policy != "undecided":
        comparison = asked.history.compare(_candidates(asked, policy, chosen))
    return Advice(
        policy=policy,
        groups=chosen.groups,
        limit=chosen.limit,
        interval=within,
        code=chosen.code,
        reasons=tuple(reasons),
        comparison=comparison,
        _made=chosen.transformation,
    )


def _candidates(asked: Asked, policy: str, chosen: Chosen) -> dict[str, Any]:
    """The advice beside the others, each with limits that as few ordinary norms exceed."""
    found, share = asked.found, 1 - asked.budget
    made = {"none": np.inf, "global": float(np.quantile(found.whole[found.ordinary], share))}
    made = {name: asked.history.replay(limit) for name, limit in made.items()}
    for name, groups in {"layerwise": _groups.layer(), "leafwise": _groups.leaf()}.items():
        if _of_leaves(asked.history):
            own = asked.history.regroup(groups)
            norms = own.norms[np.isfinite(asked.history.norms).all(axis=1)][: len(found.whole)]
            limit = np.quantile(norms[found.ordinary], share, axis=0).astype(np.float32)
            made[name] = asked.history.replay(limit, groups)
    if policy != "none":
        made |= {f"advised: {policy}": asked.history.replay(chosen.transformation)}
    return made
