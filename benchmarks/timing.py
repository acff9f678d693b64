"""Interleaved measurements and what is made of them: ratios of pairs, with their spread."""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

Sample = TypeVar("Sample")


class Spread(NamedTuple):
    """Ratios of measurements that were made in the same round.

    Attributes:
      median: their median.
      low: their lower quartile.
      high: their upper quartile.
      fastest: the ratio of the two fastest measurements, whatever their rounds.
    """

    median: float
    low: float
    high: float
    fastest: float


def interleaved(
    candidates: Mapping[str, Callable[[], Sample]],
    rounds: int,
    seed: int,
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, list[Sample]]:
    """Measures every candidate once a round, each round in a new random order.

    Whatever else the machine does in a round then falls on candidates by chance, and on none of them always.
    """
    order = list(candidates)
    shuffle = random.Random(seed).shuffle
    samples: dict[str, list[Sample]] = {name: [] for name in candidates}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            samples[name].append(candidates[name]())
            tick(name)
    return samples


def spread(samples: Sequence[float], reference: Sequence[float]) -> Spread:
    """The ratio of samples to those of a reference, paired by round."""
    ratios = [a / b for a, b in zip(samples, reference, strict=True)]
    if len(ratios) == 1:
        low = high = ratios[0]
    else:
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Spread(statistics.median(ratios), low, high, min(samples) / min(reference))
