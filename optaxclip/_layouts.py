"""Where arrays keep the outputs of their layer: by rank alone, or as a framework names and shapes them."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from optaxclip import _checks, _patterns
from optaxclip._base import Leaf

Axis: TypeAlias = int | str | Sequence[int] | None
Axes: TypeAlias = (
    Axis | Mapping[str, Axis]
)  # what a user says: axes, a framework or nothing, or these by pattern

# The axes that the norm of an output unit runs over, by rank: JAX's layouts keep outputs last.
BY_RANK = {2: (0,), 3: (0,), 4: (0, 1, 2), 5: (0, 1, 2, 3), 6: (0, 1, 2, 3, 4)}


class Rule(NamedTuple):
    """Where the arrays of some name and rank keep their outputs.

    Attributes:
      pattern: what is found in their paths.
      outputs: the axes that count their output units; none for biases and scales, which are one group.
      rank: the rank that they have; None for every rank.
    """

    pattern: re.Pattern
    outputs: tuple[int, ...]
    rank: int | None = None


def _last(*keys: str) -> re.Pattern:
    """A pattern for paths that end with one of the keys."""
    return re.compile(rf"(^|/)({'|'.join(keys)})$")


_ANY = re.compile("")
# Queries, keys and values are (model, heads, head), where a 1-D convolution is (width, in, out).
_QUERY_KEY_VALUE = Rule(re.compile(r"(^|/)(query|key|value)/kernel$"), (1, 2), 3)
LAYOUTS = {
    "equinox": (Rule(_last("bias"), ()), Rule(_ANY, (0,))),
    "flax": (
        Rule(_last("bias", "scale"), ()),
        Rule(_last("embedding"), (0,), 2),
        _QUERY_KEY_VALUE,
        Rule(_ANY, (-1,)),
    ),
    "haiku": (
        Rule(_last("b", "offset", "scale"), ()),
        Rule(_last("embeddings"), (0,), 2),
        Rule(re.compile(r"conv[123]_d_transpose(_\d+)?/w$"), (-2,)),
        Rule(_ANY, (-1,)),
    ),
    "keras": (
        Rule(_last("bias", "beta", "gamma"), ()),
        Rule(_last("embeddings"), (0,), 2),
        _QUERY_KEY_VALUE,
        Rule(re.compile(r"conv[123]d_transpose(_\d+)?/kernel$"), (-2,)),
        Rule(re.compile(r"depthwise_conv[12]d(_\d+)?/kernel$|(^|/)depthwise_kernel$"), (-2, -1)),
        Rule(_ANY, (-1,)),
    ),
}


def chosen(where: str, said: Axes, name: str = "axis") -> Callable[[Leaf], tuple[int, ...] | str | None]:
    """What was said of a leaf, by the first pattern found in its path: axes, a framework, or nothing.

    Raises:
      TypeError: if an axis is not an integer, or a pattern not a str.
      ValueError: if the framework is not known, or a pattern does not compile.
    """
    by_pattern = said if isinstance(said, Mapping) else {"": said}
    rules = [
        (_patterns.found_in_paths(where, pattern), _said(where, own, name))
        for pattern, own in by_pattern.items()
    ]
    return lambda leaf: next((own for pattern, own in rules if pattern.search(leaf.path)), None)


def _said(where: str, axes: Any, name: str) -> tuple[int, ...] | str | None:
    if isinstance(axes, str):
        _checks.one_of(where, LAYOUTS, **{name: axes})
        return axes
    if axes is None:
        return None
    axes = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    for a in axes:
        _checks.whole_number(where, axis=a, least=-64)
    return axes


def in_range(where: str, axis: int, leaf: Leaf, otherwise: str = "") -> int:
    """An axis of a leaf counted from the first, or an error that says what to do otherwise."""
    rank = len(leaf.shape)
    if not -rank <= axis < rank:
        raise ValueError(
            f"{where}: axis {axis} is out of range at leaf {leaf.path!r}, which has shape {leaf.shape}. "
            f"Pass axes by pattern{otherwise}."
        )
    return axis % rank


def outputs(leaf: Leaf, framework: str) -> tuple[int, ...]:
    """The axes that count output units, as a framework shapes its arrays; none for biases and scales."""
    rank = len(leaf.shape)
    rule = next(r for r in LAYOUTS[framework] if r.rank in (None, rank) and r.pattern.search(leaf.path))
    return tuple(axis % rank for axis in rule.outputs)


def reduced(where: str, leaf: Leaf, framework: str | None) -> set[int]:
    """The axes that the norm of an output unit runs over; an array with one long axis is one unit."""
    rank = len(leaf.shape)
    if sum(size > 1 for size in leaf.shape) <= 1:
        return set(range(rank))
    return set(
        by_rank(where, leaf) if framework is None else set(range(rank)) - set(outputs(leaf, framework))
    )


def by_rank(where: str, leaf: Leaf) -> tuple[int, ...]:
    """The axes that the norm of an output unit runs over where only its rank is known, from 2 to 6."""
    rank = len(leaf.shape)
    if rank not in BY_RANK:
        raise ValueError(
            f"{where}: leaf {leaf.path!r} has rank {rank}, shape {leaf.shape}; the default knows ranks 0 "
            "to 6. Pass axis={pattern: axes} for it."
        )
    return BY_RANK[rank]
