"""What an advice says of a recording: what was seen, what was assumed, why nothing can be said."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from optaxclip import _checks
from optaxclip.history._evidence import Evidence, Rule
from optaxclip.history._lengths import Lengths, norm

WORTH_SAYING = 2.0  # a factor; what changes by less is lost in the scatter of norms


def undecided(history: Any, found: Evidence, rule: Rule) -> str | None:
    """Why nothing can be said; None if something can."""
    if not len(found.whole):
        return _nothing_known(history, found)
    if not np.isnan(found.clipped_at):
        return (
            f"{percent(found.at_limit)} of the steps share the largest norm, {found.clipped_at:.3g}: these "
            "updates have been clipped or normalised already. Put record() before that, first in the chain."
        )
    if not found.ended and len(found.whole) < rule.least_steps:
        return (
            f"The recording has {count(len(history), 'step', 'steps')}, {len(found.whole)} with a norm that "
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
        if history.run is not None:
            why = (
                "the recording has no norms of the parameters, since record() had an axis_name or its init "
                "saw shapes alone; pass them to oc.History(history.names, history.norms, start=...)"
            )
        if history.start is not None and history.norm != "l2":
            why = f"the norms are {history.norm}, and lengths are l2; record these"
        elif history.start is not None:
            why = "no norm of parameters that get gradients is finite and above zero"
        said.append(f"The learning rate was not used: {why}.")
    return said


def seen(history: Any, found: Evidence, steps: Lengths | None) -> list[str]:
    """What was seen."""
    said, ordinary = [], found.whole[found.ordinary]
    if len(ordinary):
        low, high = np.quantile(ordinary, [0.05, 0.95])
        norms = f"its norm is {low:.3g}" if len(ordinary) == 1 else f"each of norm {low:.3g}"
        if low < high:
            norms = f"nine of ten have norms from {low:.3g} to {high:.3g}"
        said.append(
            f"{len(ordinary)} of {count(len(history), 'recorded step', 'recorded steps')} "
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
        f"{percent(found.shares[most])} is in {found.names[most]!r}; in effect it is spread over "
        f"{found.effective:.1f} of {len(found.names)} rows. In {'it' if number == 1 else 'a typical one'} "
        f"{percent(found.together)} of the rows are far above their own level."
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
            f"Training went on after {count(found.passed, 'step', 'steps')} that "
            f"{'was' if found.passed == 1 else 'were'} not finite. No limit on norms mends such steps: see "
            "oc.skip_updates, and nonfinite='zero'."
        )
    if found.ended and found.growth > 0:
        said.append(
            f"Before the end norms grew for {count((~found.calm).sum(), 'step', 'steps')}, by "
            f"{found.growth:.2g} doublings each: clip before that."
        )
    elif found.ended:
        said.append(
            "Norms did not grow before the end. If what is not finite comes from elsewhere, such as the "
            "derivative of a root at zero, clipping will not prevent it."
        )
    return said


def some(names: Sequence[str]) -> str:
    """A few of some names."""
    return _checks.listed(names, 3)


def percent(share: float) -> str:
    """A share in three digits."""
    return f"{100 * share:.3g}%"


def count(number: Any, one: str, many: str) -> str:
    """A number of things, one or many."""
    return f"{int(number)} {one if number == 1 else many}"
