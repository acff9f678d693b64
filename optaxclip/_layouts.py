"""Where arrays keep the outputs of their layer: by rank alone, or as a framework names and shapes them."""

import re
from typing import NamedTuple

from optaxclip._base import Leaf

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


def reduced(where: str, leaf: Leaf, layout: str | None) -> set[int]:
    """The axes that the norm of an output unit runs over; an array with one long axis is one unit."""
    rank = len(leaf.shape)
    if sum(size > 1 for size in leaf.shape) <= 1:
        return set(range(rank))
    if layout is not None:
        rule = next(r for r in LAYOUTS[layout] if r.rank in (None, rank) and r.pattern.search(leaf.path))
        return set(range(rank)) - {axis % rank for axis in rule.outputs}
    return set(by_rank(where, leaf))


def by_rank(where: str, leaf: Leaf) -> tuple[int, ...]:
    """The axes that the norm of an output unit runs over where only its rank is known, from 2 to 6."""
    rank = len(leaf.shape)
    if rank not in BY_RANK:
        raise ValueError(
            f"{where}: leaf {leaf.path!r} has rank {rank}, shape {leaf.shape}; the default knows ranks 0 "
            "to 6. Pass axis={pattern: axes} for it."
        )
    return BY_RANK[rank]
