"""Advice: a policy, its limit, a line of code and the reasons."""

import dataclasses
import textwrap
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import optax

from optaxclip import limits
from optaxclip._base import Groups, Limit
from optaxclip._named import clip_by_groupwise_norm
from optaxclip._rescale import rescale_by_norm
from optaxclip.history._compare import Comparison
from optaxclip.history._expressed import LAYER, LEAF, WHOLE, Grouping, norm_code
from optaxclip.history._replay import Replay
from optaxclip.history._rows import norm_called

SMALLEST, LARGEST = 1.2e-38, 3.4e38  # float32 ends just beyond; what is smaller is zero to many devices

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

    >>> import numpy as np, optaxclip as oc
    >>> norms = np.exp(0.2 * np.random.default_rng(0).standard_normal((300, 3)))
    >>> norms[[50, 120, 250]] *= 100
    >>> history = oc.History(["layer_1/kernel", "layer_2/kernel", "head/kernel"], norms)
    >>> advice = history.advise()
    >>> print(advice.policy, advice.limit, np.round(advice.interval, 2))
    global 2.15 [2.08 2.2 ]
    """

    policy: PolicyName
    groups: Groups | None
    limit: float | Limit | None
    interval: tuple[float, float] | None
    code: str
    reasons: tuple[str, ...]
    comparison: Comparison | None
    _made: optax.GradientTransformation = dataclasses.field(repr=False)
    _at_start: np.ndarray | None = dataclasses.field(default=None, repr=False)
    _ordinary: int = dataclasses.field(default=0, repr=False)

    def replay(self, history: Any) -> Replay:
        """What the advice would have done to a recording.

        A limit in proportion to the weights stands at what it is at the start, so that their norms need not
        have been recorded.

        Args:
          history: the `History` it came from, or another one of the same rows.

        Returns:
          What came of it. See `Replay`.

        Raises:
          TypeError: if the policy is `"none"` or `"undecided"`.

        >>> import numpy as np, optaxclip as oc
        >>> norms = np.exp(0.2 * np.random.default_rng(0).standard_normal((300, 3)))
        >>> norms[[50, 120, 250]] *= 100
        >>> history = oc.History(["layer_1/kernel", "layer_2/kernel", "head/kernel"], norms)
        >>> advice = history.advise()
        >>> print(advice.replay(history).norm_after.max().round(2))
        2.15
        """
        if self.groups is None:
            raise TypeError(f"Advice.replay: the advice is {self.policy!r}, which is no policy to replay.")
        if self._at_start is None:
            return history.replay(self._made)
        return history.replay(self._at_start, self.groups)

    def transformation(self) -> optax.GradientTransformation:
        """What the code makes: a transformation to put first in `optax.chain`.

        Returns:
          A transformation with a `RescaleState`; `optax.identity()` for `"none"` and `"undecided"`.

        >>> import optaxclip as oc
        >>> advice = oc.History(["a", "b"], [[3.0, 4.0]] * 100).advise()
        >>> print(advice.code, advice.transformation().init({}))
        optax.identity() EmptyState()
        """
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
        end = self._end()
        return "\n".join([head, *lines, *(["", end] if end else [])])

    def _end(self) -> str:
        """The comparison; or why there is none, where the reasons do not say it."""
        if self.comparison is not None or self.policy == "undecided":
            return "" if self.comparison is None else str(self.comparison)
        steps = {0: "no step is", 1: "only 1 step is"}
        return f"No comparison: {steps.get(self._ordinary, f'only {self._ordinary} steps are')} ordinary."


def held(limits: Any) -> Any:
    """Limits that float32 can hold; one of zero would stop all updates."""
    return np.clip(limits, SMALLEST, LARGEST)


def rounded(value: float) -> float:
    """A limit to three digits, as the code has it."""
    return float(held(float(f"{value:.3g}")))


def nothing() -> Chosen:
    """No clipping."""
    return Chosen(None, None, "optax.identity()", optax.identity())


def clipping(limit: float | Limit, code: str, by: Grouping, norm: str) -> Chosen:
    """Clipping of each group by its own norm; `code` is the limit's."""
    if norm != "l2":
        groups = "" if by == WHOLE else f"groups={by.code}, "
        made = rescale_by_norm(limit, groups=by.groups, norm=norm_called(norm))
        line = f"oc.rescale_by_norm({code}, {groups}norm={norm_code(norm)})"
        return Chosen(by.groups, limit, line, made)
    made = clip_by_groupwise_norm(limit, by.groups)
    for name, known in {"global": WHOLE, "layerwise": LAYER, "leafwise": LEAF}.items():
        if by == known:
            return Chosen(by.groups, limit, f"oc.clip_by_{name}_norm({code})", made)
    return Chosen(by.groups, limit, f"oc.clip_by_groupwise_norm({code}, {by.code})", made)


def each(numbers: dict[str, float]) -> tuple[float | Limit, str]:
    """A limit for each group: one number if there is one group."""
    if len(numbers) == 1:
        (number,) = numbers.values()
        return rounded(number), repr(rounded(number))
    own = {name: rounded(number) for name, number in numbers.items()}
    return limits.per_group(own), f"oc.limits.per_group({own!r})"


def in_proportion(ratio: float, floor: float) -> tuple[Limit, str]:
    """A limit in proportion to each group's weights, as those change; for more groups than can be listed."""
    return limits.relative(ratio, floor), f"oc.limits.relative({ratio!r}, floor={floor!r})"


def following(budget: float, window: int) -> tuple[Limit, str]:
    """A limit that follows the norms: a high percentile of the last ones."""
    q = rounded(100 * (1 - budget))
    made = limits.percentile(q, window, include_current=False)
    return made, f"oc.limits.percentile({q!r}, {window}, include_current=False)"


def interval(values: np.ndarray, share: float, resamples: int, seed: int = 0) -> tuple[float, float]:
    """The interval of a quantile: 90 % of what resampling with replacement gives."""
    drawn = np.random.default_rng(seed)
    found = [np.quantile(drawn.choice(values, len(values)), share) for _ in range(resamples)]
    low, high = held(np.quantile(found, [0.05, 0.95]))
    return float(low), float(high)
