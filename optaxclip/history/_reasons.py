"""The sentences of an advice, with the numbers that led to it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from optaxclip import _checks
from optaxclip.history._compare import Comparison
from optaxclip.history._evidence import Evidence, Rule
from optaxclip.history._lengths import Lengths, norm


def undecided(history: Any, found: Evidence, rule: Rule) -> str | None:
    """Why nothing can be said; None if something can."""
    if not len(found.whole):
        first = found.nonfinite
        where = (
            "" if first is None else f" Step {first.step} is the first that is not, in {some(first.names)}."
        )
        return (
            f"The recording holds no finite norm.{where} Record the steps before it: a larger capacity, or a "
            "shorter run."
        )
    if not found.whole.max() > 0:
        return "All recorded norms are zero: record gradients, before anything else acts on them."
    if not np.isnan(found.clipped_at):
        share = np.mean(found.whole >= found.clipped_at * (1 - 2.0**-7))
        return (
            f"{share:.0%} of the steps share the largest norm, {found.clipped_at:.3g}: these updates have "
            "been clipped already. Put record() before the clipping, first in the chain."
        )
    if not found.ended and len(found.whole) < rule.least_steps:
        return (
            f"The recording has {len(history)} steps, {len(found.whole)} of them finite; below "
            f"{rule.least_steps} nothing is known of how norms scatter. Record more."
        )
    return None


def seen(history: Any, found: Evidence, steps: Lengths | None) -> list[str]:
    """What was seen."""
    said, ordinary = [], found.whole[found.ordinary]
    if len(ordinary):
        low, high = np.quantile(ordinary, [0.05, 0.95])
        said.append(
            f"{len(ordinary)} of {len(history)} recorded steps are ordinary, with norms of {low:.3g} to "
            f"{high:.3g} (nine of ten)."
        )
    if found.spike.any():
        most = int(found.shares.argmax())
        said.append(
            f"{_count(found.spike.sum(), 'step is a spike', 'steps are spikes')} of up to "
            f"{found.whole[found.spike].max():.3g}. {found.shares[most]:.0%} of their excess is in "
            f"{found.names[most]!r}; the effective number of rows in it is {found.effective:.1f} of "
            f"{len(found.names)}, and in a spike {found.together:.0%} of the rows spike."
        )
    first = found.nonfinite
    if first is not None:
        deepest = f" The deepest that still was: {first.deepest_finite!r}." if first.deepest_finite else ""
        said.append(f"Step {first.step} is the first that is not finite, in {some(first.names)}.{deepest}")
        if found.growth > 0:
            grew = int((~found.calm).sum())
            said.append(
                f"Norms grew for {_count(grew, 'step', 'steps')} before it, {found.growth:.1f} doublings "
                "each: clip before that."
            )
        if not found.ended:
            said.append(
                f"Training went on after {_count((~found.kept).sum(), 'such step', 'such steps')}, which no "
                "limit on norms mends: see skip_updates, and nonfinite='zero'."
            )
    if not 1 / 2 < found.drift < 2:
        said.append(f"Within the recording ordinary norms changed by a factor of {found.drift:.2g}.")
    if steps is not None and len(ordinary):
        said.append(
            f"An ordinary step is {steps.whole:.2g} of the weights' norm at the start, "
            f"{norm(steps.weights):.3g}."
        )
    return said


def nothing_beyond(found: Evidence) -> str:
    """Why there is no clipping."""
    first = " after the first few" if found.settling.any() else ""
    return f"No step{first} is beyond what is ordinary: nothing would be gained by clipping."


def short_enough(found: Evidence, steps: Lengths) -> str:
    """Why there is no clipping though some steps are spikes."""
    longest = steps.rate * float(found.whole.max()) / norm(steps.weights)
    return (
        f"Even the longest step is {longest:.2g} of the weights, and {steps.safe:.2g} is safe: nothing would "
        "be gained by clipping."
    )


def for_adam(found: Evidence, limit: float, swollen: float, rule: Rule) -> str:
    """Why Adam gets a limit below nearly all norms."""
    why = "a spike stays in its second moments, and shortens the steps that follow"
    if not found.spike.any() and not found.ended and swollen >= rule.uneven:
        why = (
            f"norms scatter so much that the root of their mean square is {swollen:.2g} times an ordinary one"
        )
    return (
        f"Adam's steps do not depend on the size of updates, only on how it changes, and {why}. A limit "
        f"of {limit:g}, {rule.below:g} times below ordinary norms, costs nothing, makes every step count "
        "alike, and still will when norms have fallen."
    )


def culprits_too_long(steps: Lengths, culprits: np.ndarray) -> str:
    """Why some layers are limited by the length of their steps."""
    names = [steps.layers[k] for k in np.flatnonzero(culprits)]
    rest = steps.each[~culprits]
    rest = rest[~np.isnan(rest)]
    others = f", those of other layers {np.median(rest):.2g}" if len(rest) else ""
    return (
        f"Only {some(names)} {'is' if len(names) == 1 else 'are'} to blame: ordinary steps there are "
        f"{np.nanmax(steps.each[culprits]):.2g} of the weights{others}. They are held to {steps.safe:.2g}, "
        "and nothing else is."
    )


def all_too_long(found: Evidence, steps: Lengths, limit: float, rule: Rule) -> str:
    """Why all layers together are limited by the length of the step."""
    longest = max(steps.whole, steps.first)
    blame = ""
    if longest >= rule.high and not found.ended:
        blame = f" The learning rate of {steps.rate:g} is the real problem: try a lower one first."
    elif longest >= rule.high:
        blame = f" A learning rate below {steps.rate:g}, or smaller weights at the start, would help as well."
    return (
        f"Steps are up to {longest:.2g} of the weights, and {steps.safe:.2g} is safe.{blame} With a limit of "
        f"{limit:g} no step is longer, and its direction is kept."
    )


def from_the_start(limit: float, weights: bool) -> str:
    """Where a limit comes from when there was no ordinary step."""
    source = (
        "at most a hundredth of the weights' norm, as in adaptive clipping" if weights else "the first norm"
    )
    return (
        f"The run ended before there were ordinary steps to read a limit from; {limit:g} is {source}. Pass "
        "learning_rate= for one that knows the length of steps."
    )


def culprits_spike(names: Sequence[str], budget: float) -> str:
    """Why some groups are limited to their ordinary norms."""
    one = len(names) == 1
    return (
        f"Only {some(names)} {'is' if one else 'are'} to blame: {'it is' if one else 'each is'} held to what "
        f"{1 - budget:.0%} of its ordinary norms stay below, and nothing else is."
    )


def together(limit: float | None, budget: float) -> str:
    """Why the global norm."""
    if limit is None:
        return "Rows spike together, so the global norm tells all; since norms drift, the limit follows it."
    return (
        "Rows spike together, so the global norm tells all, and clipping by it keeps the direction. "
        f"{1 - budget:.0%} of the ordinary norms stay below {limit:g}."
    )


def one_by_one(layerwise: bool) -> str:
    """Why each group by itself."""
    return (
        f"{'Layers' if layerwise else 'Leaves'} spike one by one: a global limit would hold back all of them "
        "for one, so each is held to its own ordinary norm."
    )


def beside_others(comparison: Comparison, policy: str) -> list[str]:
    """What others would have done to the recording, where that tells them apart."""
    rows = {row.name: row for row in comparison.rows}
    said = []
    for name in ("layerwise", "leafwise"):
        row = rows.get(name)
        if policy == "global" and row is not None and row.cosine_mean < 0.99:
            said.append(
                f"{name.capitalize()} clipping with limits that are exceeded as seldom would have turned the "
                f"updates it acts on, to a mean cosine of {row.cosine_mean:.2f}."
            )
    row = rows.get("global")
    if policy in ("outliers", "layerwise", "leafwise") and row is not None and row.spike_cut > 2:
        said.append(f"A global limit would have divided all layers by {row.spike_cut:.2g} in a spike.")
    return said


def some(names: Sequence[str]) -> str:
    """A few of some names."""
    return _checks.listed(names, 3)


def _count(number: Any, one: str, many: str) -> str:
    return f"{int(number)} {one if number == 1 else many}"
