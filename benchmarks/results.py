"""One row of results: a method, what it is held against, and what is to be reached."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks import targets
from benchmarks.methods import Method
from benchmarks.timing import Spread, spread
from benchmarks.trees import Tree

# What every method of a suite is held against, the first that there is.
BASELINES = {
    "step": ("none", "copy", "torch_none"),
    "alone": ("c_loop", "copy", "identity"),
    "compile": ("optax_global",),
    "ablations": ("global", "unitwise"),
    "train": ("none",),
}
# What else is shown as a baseline, and for which names, by how they start.
BESIDE = {"copy": "", "torch_none": "torch_", "unitwise": "unitwise_"}


class Setting(NamedTuple):
    """A tree, and what the command line calls its dtypes."""

    tree: Tree
    dtype: str


class Row(NamedTuple):
    """What one method took for one tree, beside one other.

    Attributes:
      suite: one of `suites.SUITES`.
      tree: the tree's name; in `train`, the model's.
      dtype: what the command line calls the dtypes.
      case: what was measured: `clips` or `idle`; `trace`, `compile` or `total`; in `memory` and `launches`
        the program, `step` or `alone`; in `ablations` one of `suites.ABLATED`.
      method: the method's name, or that of what it is held against.
      against: what it is held against; None in a row that has the value alone.
      value: median seconds; temporary memory over the gradients' bytes; or kernels.
      ratio: seconds over those of `against`, of the same round.
      rounds: how often it was measured.
      target: the largest ratio, or the largest value, to reach.
      verdict: `met`; `missed`; or `unclear`, where only the lower quartile meets the target.
    """

    suite: str
    tree: str
    dtype: str
    case: str
    method: str
    against: str | None
    value: float
    ratio: Spread | None
    rounds: int
    target: float | None
    verdict: str | None


def compared(
    suite: str, case: str, setting: Setting, methods: Sequence[Method], seconds: Mapping[str, list[float]]
) -> list[Row]:
    """The rows of one set of interleaved measurements, in seconds by name: each alone, and over others."""
    peers = {method.name: method.against for method in methods}
    rows = []
    for name, own in seconds.items():
        value = statistics.median(own)
        rows.append(_row(suite, case, setting, name, None, value, None, len(own)))
        for against in dict.fromkeys((*BASELINES[suite], *peers.get(name, ()))):
            if against in seconds and against != name:
                ratio = spread(own, seconds[against])
                rows.append(_row(suite, case, setting, name, against, value, ratio, len(own)))
    return rows


def counted(
    suite: str, case: str, setting: Setting, methods: Sequence[Method], counts: Mapping[str, float]
) -> list[Row]:
    """The rows of what needs no clock, by name."""
    return [
        _row(suite, case, setting, method.name, None, counts[method.name], None, 1)
        for method in methods
        if method.name in counts
    ]


def _row(
    suite: str,
    case: str,
    setting: Setting,
    name: str,
    against: str | None,
    value: float,
    ratio: Spread | None,
    rounds: int,
) -> Row:
    head = suite, setting.tree.name, setting.dtype, case, name, against
    target = targets.find(*head)
    reach = None if target is None else target.reach(setting.tree)
    middle, low = (value, value) if ratio is None else (ratio.median, ratio.low)
    verdict = None if reach is None else _verdict(middle, low, reach)
    return Row(*head, value, ratio, rounds, reach, verdict)


def _verdict(value: float, low: float, target: float) -> str:
    if math.isnan(value) or low > target:
        return "missed"
    return "met" if value <= target else "unclear"
