"""Why an advice is what it is, in sentences with the numbers that led to it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from optaxclip.history._compare import Compared, Comparison
from optaxclip.history._evidence import Evidence, Rule
from optaxclip.history._expressed import called
from optaxclip.history._lengths import Lengths, norm
from optaxclip.history._seen import WORTH_SAYING, count, percent, some

# These change what is said, not what is advised.
MOST = 0.5  # of the steps
TURNED = 0.99  # the cosine of 8 degrees; a smaller angle is no reason against a policy
NEAR_EPS = 1e-6  # of an entry; from 100 times Adam's usual eps on, steps are a hundredth shorter at most


def clips_most(advised: Compared, policy: str) -> list[str]:
    """That clipping sets the length of steps, where it does."""
    if not advised.touched > MOST:
        return []
    whose, instead = "", "a lower learning rate does much the same"
    if policy == "outliers":
        whose, instead = " of these rows", "so would a lower learning rate of their own"
    return [
        f"What is advised clips {percent(advised.touched)} of the ordinary steps: it sets how long steps"
        f"{whose} are, rather than holding a few; {instead}."
    ]


def nothing_beyond(found: Evidence) -> str:
    """Why there is no clipping."""
    first = " after the first few" if found.settling.any() else ""
    return f"No step{first} is beyond what is ordinary: nothing would be gained by clipping."


def short_enough(found: Evidence, steps: Lengths, rule: Rule) -> str:
    """Why there is no clipping though some steps are spikes, or long for some layers."""
    also = _far_in_some(steps, rule)
    longest = steps.rate * float(found.whole.max()) / norm(steps.weights)
    if longest > steps.safe:
        first = "the first steps are" if found.settling.any() else "what scatters beyond it is"
        return (
            f"Up to {steps.safe:.2g} times the weights is safe, and {first} at most {longest:.2g}: nothing "
            f"would be gained by clipping.{also}"
        )
    return (
        f"Even the longest step is {longest:.2g} times as long as the weights, and {steps.safe:.2g} is safe: "
        f"nothing would be gained by clipping.{also}"
    )


def _far_in_some(steps: Lengths, rule: Rule) -> str:
    """That some layers take far longer steps than all together do; nothing if none does."""
    far = np.nan_to_num(steps.each) >= rule.high
    if not far.any():
        return ""
    names = [called(steps.layers[k]) for k in np.flatnonzero(far)]
    return (
        f" But ordinary steps of {some(names)} are up to {steps.each[far].max():.2g} times as long as the "
        "weights there were at the start. Layers that start near zero grow out of that; if training fails, "
        "look there first."
    )


def for_adam(found: Evidence, limit: float, rule: Rule) -> str:
    """Why Adam gets a limit below nearly all norms."""
    why = "a spike stays in its second moments, and shortens the steps that follow"
    end = ""
    if found.ended:
        end = " It makes no step shorter: if the run ends again, the learning rate is the real problem."
    if not found.spike.any() and not found.ended and found.swollen >= rule.uneven:
        why = (
            f"norms scatter so much that the root of their mean square is {found.swollen:.2g} times an "
            "ordinary one"
        )
    return (
        f"Adam's steps do not depend on the size of updates, only on how it changes, and {why}. A limit "
        f"of {limit:g}, {rule.below:g} times below ordinary norms, costs nothing, makes every step count "
        f"alike, and still will when norms have fallen.{end}"
    )


def near_eps(history: Any, limit: float) -> list[str]:
    """That entries of a clipped update come near Adam's eps, where they do and that is known."""
    if history.sizes is None or history.norm != "l2":
        return []
    entries = float(history.sizes.sum())
    each = limit / np.sqrt(entries)
    if not each < NEAR_EPS:
        return []
    return [
        f"Spread over {entries:,.0f} entries that is {each:.1g} each, and Adam's usual eps of 1e-8 beside it "
        f"makes steps shorter: pass the optimizer an eps of {each / 100:.0g} or less."
    ]


def culprits_too_long(steps: Lengths, culprits: np.ndarray) -> str:
    """Why some layers are limited by the length of their steps."""
    names = [called(steps.layers[k]) for k in np.flatnonzero(culprits)]
    rest = steps.each[~culprits]
    rest = rest[~np.isnan(rest)]
    others = ""
    if len(rest) == 1:
        others = f", those of the other layer {rest[0]:.2g}"
    elif len(rest):
        others = f", those of other layers {np.median(rest):.2g} in the middle and {rest.max():.2g} at most"
    return (
        f"Only {some(names)} {'is' if len(names) == 1 else 'are'} to blame: ordinary steps there are up to "
        f"{np.nanmax(steps.each[culprits]):.2g} times as long as the weights{others}. They are held to "
        f"{steps.safe:.2g} times, and nothing else is."
    )


def all_too_long(found: Evidence, steps: Lengths, rule: Rule, whole: bool) -> str:
    """Why each layer is limited by the length of its step; or the `whole`, if nothing finer was recorded."""
    held = "Each layer is held to that{also}, relative to its own weights{why}."
    why = ": a limit on the whole would let one layer use it up for all"
    if whole:
        held = "All together are held to that{also}; record leaves, and each layer can be held to its own."
    longest = steps.rate * float(found.whole.max()) / norm(steps.weights)
    if longest <= steps.safe:
        return (
            f"No finite step was longer than is safe, {steps.safe:.2g} times the weights. "
            f"{held.format(also=' all the same', why='')}"
        )
    blame = ""
    if max(steps.whole, steps.first) >= rule.high and not found.ended:
        blame = f" The learning rate of {steps.rate:g} is the real problem: try a lower one first."
    elif max(steps.whole, steps.first) >= rule.high:
        blame = (
            f" A learning rate below {steps.rate:g}, or smaller gradients at the start, would help as well."
        )
    which, length = "The longest step is", longest
    if steps.first >= rule.high:
        which, length = "The first steps are up to", steps.first
    elif steps.whole > steps.safe:
        which, length = "Ordinary steps are", steps.whole
    return (
        f"{which} {length:.2g} times as long as the weights, and {steps.safe:.2g} is safe.{blame} "
        f"{held.format(also='', why=why)}"
    )


def in_proportion(floor: float) -> str:
    """What limits relative to weights ask for."""
    return (
        "The limits are in proportion to each layer's weights: pass params to the optimizer's update. No "
        f"layer counts as less than {floor:g}, the least norm of a layer's weights at the start."
    )


def scattered(found: Evidence, limit: float, budget: float) -> str:
    """Why there is a limit without spikes."""
    return (
        f"Norms scatter so much that the root of their mean square is {found.swollen:.2g} times an ordinary "
        f"one: a few steps do most of the way. {percent(1 - budget)} of the norms stay below {limit:g}."
    )


def few_ordinary(found: Evidence) -> str:
    """How much the limit is worth if it was read from few steps."""
    number = count(found.ordinary.sum(), "ordinary step", "ordinary steps")
    return f"A limit read from {number} is a first guess: train with it, and record again."


def from_the_start(limit: float, weights: bool, lengths: bool) -> str:
    """Where a limit comes from when there was no ordinary step; `lengths`: those of steps could be known."""
    source = (
        "a hundredth of the weights' norm, as in adaptive gradient clipping"
        if weights
        else "the median norm before they grew"
    )
    todo = (
        "Pass the learning rate for a limit that goes by the length of steps, or record"
        if lengths
        else "Record"
    )
    return (
        f"The run ended before there were enough ordinary steps to read a limit from; {limit:g} is {source}. "
        f"{todo} a run at a lower rate."
    )


def culprits_spike(names: Sequence[str], budget: float) -> str:
    """Why some groups are limited to their ordinary norms."""
    one = len(names) == 1
    return (
        f"Only {some(names)} {'is' if one else 'are'} to blame: {'it is' if one else 'each is'} held to what "
        f"{percent(1 - budget)} of its ordinary norms stay below, and nothing else is."
    )


def together(found: Evidence, limit: float | None, budget: float) -> str:
    """Why the global norm."""
    why = "Rows spike together, so the global norm tells all"
    if not found.spike.any():
        why = "Nothing tells rows apart before the end, so the global norm is the one to hold"
    if limit is None:
        return f"{why}; since norms drift, the limit follows them."
    return (
        f"{why}, and clipping by it keeps the direction. {percent(1 - budget)} of the ordinary norms stay "
        f"below {limit:g}."
    )


def one_by_one(rows: str, budget: float) -> str:
    """Why each group by itself."""
    return (
        f"{rows.capitalize()} spike one by one: a global limit would hold back all of them for one, so each "
        f"is held to what {percent(1 - budget)} of its own ordinary norms stay below."
    )


def beside_others(comparison: Comparison, policy: str) -> list[str]:
    """What others would have done to the recording, where that tells them apart."""
    rows = {row.name: row for row in comparison.rows}
    said = []
    for name in ("layerwise", "leafwise"):
        row = rows.get(name)
        if policy == "global" and row is not None and row.cosine_mean < TURNED:
            said.append(
                f"{name.capitalize()} clipping with limits that are exceeded as seldom would have turned the "
                f"updates it acts on, to a mean cosine of {row.cosine_mean:.2f}."
            )
    row = rows.get("global")
    if policy in ("outliers", "layerwise", "leafwise") and row is not None and row.spike_cut > WORTH_SAYING:
        said.append(f"A global limit would have divided all layers by {row.spike_cut:.2g} in a spike.")
    return said
