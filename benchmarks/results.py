"""One row of results, and what it is held against."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.methods import Method
from benchmarks.timing import Spread, spread
from benchmarks.trees import Tree

SLACK = 0.02  # of the gradients; room for vectors with a number per group
COMPILED = ("leaves_300", "mixed_300")
ADAPTIVE = ("autoclip", "zclip", "adagc")


class Row(NamedTuple):
    """What one method took for one tree.

    Attributes:
      suite: `step`, `alone`, `compile` or `memory`.
      tree: the tree's name.
      dtype: of parameters and gradients.
      case: what was measured: `clips` or `idle`, `trace`, `compile` or `total`, `step` or `alone`.
      method: the method's name.
      against: the peer, if it has one.
      value: median seconds, or temporary memory over the gradients' bytes.
      reference: the same for `against`.
      ratio: seconds over those of `against`.
      over_none: seconds over those of the same program without clipping.
      rounds: how often it was measured.
      target: the largest ratio, or the largest memory, to reach.
      verdict: `met`; `missed`; or `unclear`, where only the lower quartile meets the target.
    """

    suite: str
    tree: str
    dtype: str
    case: str
    method: str
    against: str | None
    value: float
    reference: float | None
    ratio: Spread | None
    over_none: Spread | None
    rounds: int
    target: float | None
    verdict: str | None


def timed(
    suite: str,
    case: str,
    tree: Tree,
    dtype: str,
    methods: Sequence[Method],
    seconds: Mapping[str, list[float]],
) -> list[Row]:
    """The rows of one set of interleaved measurements, in seconds by method."""
    rows = []
    for name, against in [(method.name, method.against) for method in methods if method.name in seconds]:
        own, other = seconds[name], seconds.get(against or "")
        ratio = spread(own, other) if other else None
        unclipped = seconds.get("none") if name != "none" else None
        over_none = spread(own, unclipped) if unclipped else None
        target = _time_target(suite, case, tree, name)
        verdict = None if target is None or ratio is None else _verdict(ratio.median, ratio.low, target)
        reference = statistics.median(other) if other else None
        value = statistics.median(own)
        head = suite, tree.name, dtype, case, name, against
        rows.append(Row(*head, value, reference, ratio, over_none, len(own), target, verdict))
    return rows


def measured(
    case: str, tree: Tree, dtype: str, methods: Sequence[Method], temporary: Mapping[str, int]
) -> list[Row]:
    """The rows of temporary memory, in bytes by method."""
    rows = []
    for name, against in [(method.name, method.against) for method in methods if method.name in temporary]:
        value = temporary[name] / tree.nbytes(dtype)
        reference = temporary[against] / tree.nbytes(dtype) if against else None
        target = None if reference is None else reference + SLACK
        verdict = None if target is None else _verdict(value, value, target)
        head = "memory", tree.name, dtype, case, name, against
        rows.append(Row(*head, value, reference, None, None, 1, target, verdict))
    return rows


def _time_target(suite: str, case: str, tree: Tree, method: str) -> float | None:
    if suite == "step" and method == "global":
        return 1.0
    if suite == "step" and method in ADAPTIVE and tree.name.startswith("gpt2"):
        return 1.05
    if (
        suite == "compile"
        and case != "trace"
        and tree.name in COMPILED
        and method in ("layerwise", "leafwise")
    ):
        return 1.5
    return None


def _verdict(value: float, low: float, target: float) -> str:
    if math.isnan(value) or low > target:
        return "missed"
    return "met" if value <= target else "unclear"
