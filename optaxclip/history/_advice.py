"""Advice: a policy, its limit, a line of code and the reasons."""

import dataclasses
import textwrap
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import optax

from optaxclip import groups as _groups, limits
from optaxclip._base import Groups, Limit
from optaxclip._named import (
    clip_by_global_norm,
    clip_by_groupwise_norm,
    clip_by_layerwise_norm,
    clip_by_leafwise_norm,
)
from optaxclip.history._compare import Comparison

LISTED = 12  # groups; of more the limits no longer fit into a line of code

PolicyName: TypeAlias = Literal["none", "global", "layerwise", "leafwise", "outliers", "undecided"]


class Chosen(NamedTuple):
    """A policy, once as objects and once as code.

    Attributes:
      groups: which entries share a norm; None for no clipping.
      limit: a number or a `Limit`; None likewise.
      code: a line that makes the transformation.
      transformation: what it makes.
    """

    groups: Groups | None
    limit: float | Limit | None
    code: str
    transformation: optax.GradientTransformation


@dataclasses.dataclass(frozen=True)
class Advice:
    """What to do, and why. `str()` is for a terminal.

    Attributes:
      policy: `"none"`, `"global"`, `"layerwise"`, `"leafwise"`, `"outliers"` or `"undecided"`.
      groups: which entries share a norm; None for `"none"` and `"undecided"`.
      limit: how large a norm may be: a number, or a `Limit` that has one for each group or follows the norms;
        None likewise.
      interval: between which numbers the limit lies in nine of ten resamplings of the ordinary steps; None
        where the limit is no such number.
      code: a line that runs after `import optax, optaxclip as oc`.
      reasons: sentences with the numbers that led to it.
      comparison: what the candidates would have done to the recording; None if it is too short for that.
    """

    policy: PolicyName
    groups: Groups | None
    limit: float | Limit | None
    interval: tuple[float, float] | None
    code: str
    reasons: tuple[str, ...]
    comparison: Comparison | None
    _made: optax.GradientTransformation = dataclasses.field(repr=False)

    def transformation(self) -> optax.GradientTransformation:
        """What the code makes: a transformation to put first in `optax.chain`."""
        return self._made

    def __str__(self) -> str:
        head = f"{self.policy}: {self.code}"
        if self.interval is not None:
            low, high = self.interval
            head += f"\n  limit between {low:.3g} and {high:.3g} in nine of ten resamplings"
        lines = [
            textwrap.fill(reason, 96, initial_indent="  - ", subsequent_indent="    ")
            for reason in self.reasons
        ]
        text = "\n".join([head, *lines])
        return text if self.comparison is None else f"{text}\n\n{self.comparison}"


def rounded(value: float) -> float:
    """A limit to three digits, as the code has it."""
    return float(f"{value:.3g}")


def nothing() -> Chosen:
    """No clipping."""
    return Chosen(None, None, "optax.identity()", optax.identity())


def globally(limit: float | Limit, code: str) -> Chosen:
    """Clipping by the global norm; `code` is the limit's."""
    made = clip_by_global_norm(limit)
    return Chosen(_groups.whole(), limit, f"oc.clip_by_global_norm({code})", made)


def by_layer(limit: float | Limit, code: str) -> Chosen:
    """Clipping of each layer by its own norm."""
    made = clip_by_layerwise_norm(limit)
    return Chosen(_groups.layer(), limit, f"oc.clip_by_layerwise_norm({code})", made)


def by_leaf(limit: float | Limit, code: str) -> Chosen:
    """Clipping of each leaf by its own norm."""
    made = clip_by_leafwise_norm(limit)
    return Chosen(_groups.leaf(), limit, f"oc.clip_by_leafwise_norm({code})", made)


def alternatives(patterns: list[str]) -> str | list[str]:
    """Patterns as `groups.regex` takes them."""
    return patterns[0] if len(patterns) == 1 else patterns


def only(patterns: dict[str | None, str | list[str]], limit: float | Limit, code: str) -> Chosen:
    """Clipping of some groups by their own norms, and of no others."""
    groups = _groups.regex(patterns)
    line = f"oc.clip_by_groupwise_norm({code}, oc.groups.regex({patterns!r}))"
    return Chosen(groups, limit, line, clip_by_groupwise_norm(limit, groups))


def each(numbers: dict[str, float]) -> tuple[float | Limit, str]:
    """A limit for each group: one number if there is one group."""
    if len(numbers) == 1:
        (number,) = numbers.values()
        return rounded(number), repr(rounded(number))
    own = {name: rounded(number) for name, number in numbers.items()}
    return limits.per_group(own), f"oc.limits.per_group({own!r})"


def following(budget: float, window: int) -> tuple[Limit, str]:
    """A limit that follows the norms: a high percentile of the last ones."""
    q = rounded(100 * (1 - budget))
    made = limits.percentile(q, window, include_current=False)
    return made, f"oc.limits.percentile({q!r}, {window}, include_current=False)"


def interval(values: np.ndarray, share: float, resamples: int, seed: int = 0) -> tuple[float, float]:
    """The interval of a quantile: 90 % of what resampling with replacement gives."""
    drawn = np.random.default_rng(seed).choice(values, (resamples, len(values)))
    low, high = np.quantile(np.quantile(drawn, share, axis=1), [0.05, 0.95])
    return float(low), float(high)
