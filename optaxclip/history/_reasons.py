"""The sentences of an advice, with the numbers that led to it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from optaxclip import _checks
from optaxclip.history._compare import Comparison
from optaxclip.history._evidence import Evidence, Rule
from optaxclip.history._expressed import called
from optaxclip.history._lengths import Lengths, norm

# These change what is said, not what is advised.
MOST = 0.5  # of the steps
WORTH_SAYING = 2.0  # a factor; what changes by less is lost in the scatter of norms
TURNED = 0.99  # the cosine of 8 degrees; a smaller angle is no reason against a policy


def undecided(history: Any, found: Evidence, rule: Rule) -> str | None:
    """Why nothing can be said; None if something can."""
    if not len(found.whole):
        return _nothing_known(history, found)
    if not np.isnan(found.clipped_at):
        return (
            f"{_percent(found.at_limit)} of the steps share the largest norm, {found.clipped_at:.3g}: these "
            "updates have been clipped or normalised already. Put record() before that, first in the chain."
        )
    if not found.ended and len(found.whole) < rule.least_steps:
        return (
            f"The recording has {_count(len(history), 'step', 'steps')}, {len(found.whole)} with a norm that "
            f"is finite and not zero; below {rule.least_steps} nothing is known of how norms scatter. Record "
            "more."
        )
    return None


def _nothing_known(history: Any, found: Evidence) -> str:
    if not len(history.names):
        return (
            "The recording has no groups. Record gradients: arrays of real or complex numbers, not integers."
        )
    if not len(history):
        return "The recording is empty. Record some hundred steps, or until the run fails."
    if np.isfinite(history.norms).all(axis=1).any():
        return "All recorded norms are zero. Record gradients, before anything else acts on them."
    first = found.nonfinite
    where = "" if first is None else f" Step {first.step} is the first that is not, in {some(first.names)}."
    todo = "Record the steps before that: with a larger capacity, or a shorter run."
    if first is not None and first.step == 0:
        todo = "No limit on norms mends that: look at the parameters, the data and the loss."
    return f"No recorded step is finite.{where} {todo}"


def taken(history: Any, optimizer: str | None, rate: float | None, used: bool) -> list[str]:
    """What was assumed, and why the learning rate was not used."""
    if optimizer == "adam":
        return []
    said = []
    what = [] if optimizer else ["optimizer 'adam' for Adam and its kin"]
    if rate is None:
        head = "The learning rate is" if optimizer else "Taken: SGD, with a learning rate that is"
        also = "the learning rate"
        if history.start is None:
            also += ", of a recording with the norms of the parameters, by oc.record()"
        said.append(
            f"{head} not known, so how long steps are was not judged. Pass {', or '.join([*what, also])}."
        )
    elif not optimizer:
        said.append(f"Taken: SGD. Pass {what[0]}.")
    if rate is not None and not used:
        why = "the recording has no norms of the parameters; record them with oc.record()"
        if history.start is not None and history.norm != "l2":
            why = f"the norms are {history.norm}, and lengths are l2; record these"
        elif history.start is not None:
            why = "no norm of parameters that get gradients is finite and above zero"
        said.append(f"The learning rate was not used: {why}.")
    return said


def clips_most(acted: np.ndarray, steps: int) -> list[str]:
    """That clipping sets the length of steps, where it does; `acted` is of those that are finite."""
    if not acted.mean() > MOST:
        return []
    which = "recorded steps" if len(acted) == steps else "finite steps"
    return [
        f"What is advised clips {_percent(acted.mean())} of the {len(acted)} {which}: it sets how long steps "
        "are, rather than holding a few; a lower learning rate does much the same."
    ]


def seen(history: Any, found: Evidence, steps: Lengths | None) -> list[str]:
    """What was seen."""
    said, ordinary = [], found.whole[found.ordinary]
    if len(ordinary):
        low, high = np.quantile(ordinary, [0.05, 0.95])
        norms = f"its norm is {low:.3g}" if len(ordinary) == 1 else f"each of norm {low:.3g}"
        if low < high:
            norms = f"nine of ten have norms from {low:.3g} to {high:.3g}"
        said.append(
            f"{len(ordinary)} of {_count(len(history), 'recorded step', 'recorded steps')} "
            f"{'is' if len(ordinary) == 1 else 'are'} ordinary: {norms}."
        )
    if found.spike.any():
        said.append(_spikes_seen(found))
    said += _nonfinite_seen(found)
    if not 1 / WORTH_SAYING < found.drift < WORTH_SAYING:
        said.append(f"Within the recording the ordinary norm changed by a factor of {found.drift:.2g}.")
    if steps is not None and len(ordinary):
        said.append(
            f"An ordinary step is {steps.whole:.2g} times as long as the weights at the start, whose norm is "
            f"{norm(steps.weights):.3g}."
        )
    return said


def _spikes_seen(found: Evidence) -> str:
    number, largest = int(found.spike.sum()), found.whole[found.spike].max()
    head = f"1 step is a spike, of {largest:.3g}." if number == 1 else ""
    head = head or f"{number} steps are spikes, of up to {largest:.3g}."
    if len(found.names) == 1:
        return head
    most = int(found.shares.argmax())
    return (
        f"{head} Of what is above the ordinary in {'it' if number == 1 else 'them'} "
        f"{_percent(found.shares[most])} is in {found.names[most]!r}; in effect it is spread over "
        f"{found.effective:.1f} of {len(found.names)} rows. In {'it' if number == 1 else 'a typical one'} "
        f"{_percent(found.together)} of the rows are far above their own level."
    )


def _nonfinite_seen(found: Evidence) -> list[str]:
    said, first = [], found.nonfinite
    if first is not None:
        deepest = first.deepest_finite
        still = (
            "" if deepest is None else f" Next to them in the order of rows, {deepest!r} still was finite."
        )
        said.append(f"Step {first.step} is the first that is not finite, in {some(first.names)}.{still}")
    if found.passed:
        said.append(
            f"Training went on after {_count(found.passed, 'step', 'steps')} that "
            f"{'was' if found.passed == 1 else 'were'} not finite. No limit on norms mends such steps: see "
            "oc.skip_updates, and nonfinite='zero'."
        )
    if found.ended and found.growth > 0:
        said.append(
            f"Before the end norms grew for {_count((~found.calm).sum(), 'step', 'steps')}, by "
            f"{found.growth:.2g} doublings each: clip before that."
        )
    elif found.ended:
        said.append(
            "Norms did not grow before the end. If what is not finite comes from elsewhere, such as the "
            "derivative of a root at zero, clipping will not prevent it."
        )
    return said


def nothing_beyond(found: Evidence) -> str:
    """Why there is no clipping."""
    first = " after the first few" if found.settling.any() else ""
    return f"No step{first} is beyond what is ordinary: nothing would be gained by clipping."


def short_enough(found: Evidence, steps: Lengths) -> str:
    """Why there is no clipping though some steps are spikes."""
    longest = steps.rate * float(found.whole.max()) / norm(steps.weights)
    if longest > steps.safe:
        first = "the first steps are" if found.settling.any() else "what scatters beyond it is"
        return (
            f"Up to {steps.safe:.2g} times the weights is safe, and {first} at most {longest:.2g}: nothing "
            "would be gained by clipping."
        )
    return (
        f"Even the longest step is {longest:.2g} times as long as the weights, and {steps.safe:.2g} is safe: "
        "nothing would be gained by clipping."
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


def all_too_long(found: Evidence, steps: Lengths, rule: Rule) -> str:
    """Why every layer is limited by the length of its step."""
    longest = steps.rate * float(found.whole.max()) / norm(steps.weights)
    if longest <= steps.safe:
        return (
            f"No finite step was longer than is safe, {steps.safe:.2g} times the weights. Each layer is held "
            "to that all the same, relative to its own weights."
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
        f"{which} {length:.2g} times as long as the weights, and {steps.safe:.2g} is safe.{blame} Each layer "
        "is held to that, relative to its own weights: a limit on the whole would let one layer use it up "
        "for all."
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
        f"one: a few steps do most of the way. {_percent(1 - budget)} of the norms stay below {limit:g}."
    )


def few_ordinary(found: Evidence) -> str:
    """How much the limit is worth if it was read from few steps."""
    number = _count(found.ordinary.sum(), "ordinary step", "ordinary steps")
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
        f"{_percent(1 - budget)} of its ordinary norms stay below, and nothing else is."
    )


def together(found: Evidence, limit: float | None, budget: float) -> str:
    """Why the global norm."""
    why = "Rows spike together, so the global norm tells all"
    if not found.spike.any():
        why = "Nothing tells rows apart before the end, so the global norm is the one to hold"
    if limit is None:
        return f"{why}; since norms drift, the limit follows them."
    return (
        f"{why}, and clipping by it keeps the direction. {_percent(1 - budget)} of the ordinary norms stay "
        f"below {limit:g}."
    )


def one_by_one(rows: str, budget: float) -> str:
    """Why each group by itself."""
    return (
        f"{rows.capitalize()} spike one by one: a global limit would hold back all of them for one, so each "
        f"is held to what {_percent(1 - budget)} of its own ordinary norms stay below."
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


def some(names: Sequence[str]) -> str:
    """A few of some names."""
    return _checks.listed(names, 3)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _count(number: Any, one: str, many: str) -> str:
    return f"{int(number)} {one if number == 1 else many}"
