"""What a recording says about clipping: the numbers that advice goes by."""

import bisect
from typing import Any, NamedTuple

import numpy as np

from optaxclip.history._ordinary import Spikes, spikes

BFLOAT16 = 2.0**-8  # how far apart the roundings of a number to bfloat16 can be, relatively


class Rule(NamedTuple):
    """Every constant that advice depends on, with the reason for its value; see `docs/choosing.md`.

    Attributes:
      least_steps: below so many finite steps nothing is known of how norms scatter: of 50, the largest
        twentieth are two or three.
      sigmas: how many robust standard deviations above the running median the logarithm of an ordinary norm
        may lie: the identifier of Hampel (1974). Its usual 3 calls one of 700 normal numbers a spike, 4 one
        of 30,000.
      factor: how many times the running median an ordinary norm may be, however little norms scatter.
      window: how many norms the running median is of; what changes more slowly is drift.
      least_spikes: fewer spikes do not tell where the next will sit.
      concentrated: the share of the excess that makes its groups the culprits. 0.8 leaves the others together
        half of the culprits' norm.
      few: culprits may be at most this part of all groups, else all share in it.
      together: groups spike together if in a spike of the whole more than this part of them does.
      drift: norms drift if their level changes by this factor within the recording.
      at_limit: the recording is of clipped updates if this part of it shares its largest norm.
      step: by how much the output may change in a step of SGD, relatively. The trust coefficients of LARS
        (You et al., 2017) and of its clipped form in Apex are 0.001 and 0.02 for each layer;
        `benchmarks/advice.py` has what half and twice of 0.005 cost, with momentum 0.9.
      high: the length of a step relative to the weights from which on it is far too long: at 0.1, ten steps
        in one direction double the weights.
      of_weights: the norm of an update relative to the weights', where a run ended before there was more to
        go by: the factor of adaptive gradient clipping (Brock et al., 2021).
      uneven: norms scatter too much if the root of their mean square is this many times an ordinary norm.
        Adam divides by it: ordinary steps are shorter by a third. With SGD a few steps do most of the way.
      below: a limit for Adam is this many times below ordinary norms, so that it still is when norms have
        fallen, as they do in training; being lower costs nothing while limit / √entries is far above its eps.
      listed: the number of groups whose names and limits still make a line of code one can read.
      resamples: of the bootstrap behind the interval.

    References:
      Hampel, The influence curve and its role in robust estimation, 1974. You et al., [Large Batch Training
      of Convolutional Networks](https://arxiv.org/abs/1708.03888), 2017. Brock et al., [High-Performance
      Large-Scale Image Recognition Without Normalization](https://arxiv.org/abs/2102.06171), 2021.

    >>> import optaxclip as oc
    >>> history = oc.History(["a"], [[1.0]] * 30)
    >>> print(history.advise().policy, history.advise(rule=oc.Rule(least_steps=20)).policy)
    undecided none
    """

    least_steps: int = 50
    sigmas: float = 4.0
    factor: float = 2.0
    window: int = 65
    least_spikes: int = 3
    concentrated: float = 0.8
    few: float = 1 / 3
    together: float = 0.5
    drift: float = 3.0
    at_limit: float = 0.2
    step: float = 0.005
    high: float = 0.1
    of_weights: float = 0.01
    uneven: float = 1.5
    listed: int = 12
    below: float = 10.0
    resamples: int = 1000


class Evidence(NamedTuple):
    """What a recording shows; groups are those it is asked about.

    Attributes:
      names: the groups.
      kept: which steps of the recording count: those that are finite and not zero, `(recorded,)`. All other
        arrays have one entry for each of them.
      ended: whether the run ended in what is not finite, rather than passing through it.
      norms: the norms of the groups, `(steps, groups)`.
      whole: the norm of all together, `(steps,)`.
      settling: which are the first steps, with norms above all that is ordinary later, `(steps,)`.
      calm: which steps came before norms began to grow towards the first one that is not finite, `(steps,)`.
      spike: which are spikes of the whole, neither before norms settled nor at the end, `(steps,)`.
      spread: the standard deviation of the logarithm of ordinary norms, robustly.
      shares: the share of each group in the excess of spikes, `(groups,)`; zeros if there is none.
      effective: the effective number of groups in it, 1 / Σ shares².
      together: the share of groups that spike in a spike of the whole, the median; NaN without spikes.
      drift: the level of the whole at the end over that at the start.
      growth: how often the whole doubled per step before the first norm that is not finite; 0 if all are.
      clipped_at: the norm that many steps share as their largest; NaN if they do not.
      at_limit: the part of the steps that does.
      nonfinite: the first step that is not finite; None if all are.
      passed: how many steps were not finite though the run went on after them.
    """

    names: tuple[str, ...]
    kept: np.ndarray
    ended: bool
    norms: np.ndarray
    whole: np.ndarray
    settling: np.ndarray
    calm: np.ndarray
    spike: np.ndarray
    spread: float
    shares: np.ndarray
    effective: float
    together: float
    drift: float
    growth: float
    clipped_at: float
    at_limit: float
    nonfinite: Any
    passed: int

    @property
    def ordinary(self) -> np.ndarray:
        """Which steps are neither spikes nor part of what goes on at the start or towards the end."""
        return self.calm & ~self.spike & ~self.settling

    @property
    def swollen(self) -> float:
        """The root of the mean square of norms over an ordinary one, if their logarithms are normal."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.spread**2))


class Kinds(NamedTuple):
    """Which steps of a recording are of which kind, bool `(recorded,)`; every step is of one of them."""

    ordinary: np.ndarray
    spike: np.ndarray
    settling: np.ndarray
    growing: np.ndarray
    zero: np.ndarray
    nonfinite: np.ndarray


def kinds(history: Any, rule: Rule) -> Kinds:
    """The kinds of a recording's steps, by the norms of the whole."""
    found, finite = _sorted(history, rule), np.isfinite(history.norms).all(axis=1)

    def among_all(own: np.ndarray) -> np.ndarray:
        marked = np.zeros(len(finite), bool)
        marked[found.kept] = own
        return marked

    return Kinds(
        ordinary=among_all(found.calm & ~found.spike & ~found.settling),
        spike=among_all(found.spike),
        settling=among_all(found.settling),
        growing=among_all(~found.calm),
        zero=finite & ~found.kept,
        nonfinite=~finite,
    )


class _Sorted(NamedTuple):
    """What `Evidence` says of steps, and how the norm of the whole scatters."""

    kept: np.ndarray
    ended: bool
    whole: np.ndarray
    settling: np.ndarray
    calm: np.ndarray
    spike: np.ndarray
    growth: float
    scatter: Spikes


def _sorted(history: Any, rule: Rule) -> _Sorted:
    finite = np.isfinite(history.norms).all(axis=1)
    kept = finite & (history.norms > 0).any(axis=1)
    ended = len(finite) > 0 and not finite[-1]
    whole = history.whole[kept]
    calm, growth = _calm(whole, rule) if ended else (np.ones(len(whole), bool), 0.0)
    scatter = _spikes(whole[:, None], rule)
    far = scatter.spike[:, 0]
    settling = np.cumprod(far).astype(bool) & calm
    return _Sorted(kept, ended, whole, settling, calm, far & calm & ~settling, growth, scatter)


def evidence(history: Any, rule: Rule) -> Evidence:
    """Weighs a `History`, whose rows are the groups that advice is asked about."""
    kept, ended, whole, settling, calm, spike, growth, of_whole = _sorted(history, rule)
    norms = history.norms[kept]
    of_groups = _spikes(norms, rule)
    shares = _shares(norms, of_groups, spike)
    clipped_at, at_limit = _shared_maximum(whole, rule)
    return Evidence(
        names=history.names,
        kept=kept,
        ended=ended,
        norms=norms,
        whole=whole,
        settling=settling,
        calm=calm,
        spike=spike,
        spread=float(of_whole.spread[0]),
        shares=shares,
        effective=float(1 / (shares**2).sum()) if shares.any() else np.nan,
        together=float(np.median(of_groups.spike[spike].mean(axis=1))) if spike.any() else np.nan,
        drift=_drift(of_whole.level[calm, 0]),
        growth=growth,
        clipped_at=clipped_at,
        at_limit=at_limit,
        nonfinite=history.first_nonfinite(),
        passed=passed(history),
    )


def passed(history: Any) -> int:
    """How many updates were not finite and yet followed by one that was."""
    finite = np.isfinite(history.norms).all(axis=1)
    at_end = int(np.argmax(finite[::-1])) if finite.any() else len(finite)
    seen = int((~finite).sum())
    # Rows fail together more often than not; of those before the recording more is not known.
    whole_run = seen if history.run is None else int(history.run.nonfinite.max(initial=0))
    return max(seen, whole_run) - at_end


def _spikes(norms: np.ndarray, rule: Rule) -> Spikes:
    return spikes(norms, rule.sigmas, rule.factor, rule.window)


def _calm(whole: np.ndarray, rule: Rule) -> tuple[np.ndarray, float]:
    """Which steps came before the growth that ended in a norm that is not finite, and how fast that was.

    The growth begins after the last step whose norm is no more than `factor` times the median of those
    before it.
    """
    calm = np.zeros(len(whole), bool)
    if not len(whole):
        return calm, 0.0
    before = np.concatenate([whole[:1], _medians(whole)[:-1]])
    last = int(np.flatnonzero(whole <= rule.factor * before)[-1])
    calm[: last + 1] = True
    steps = len(whole) - 1 - last
    doublings = np.log2(whole[-1]) - np.log2(whole[last]) if steps else 0.0
    return calm, float(doublings / max(steps, 1))


def _medians(values: np.ndarray) -> np.ndarray:
    """The median of all values up to each."""
    found, ordered = np.empty(len(values)), []
    for k, value in enumerate(values.tolist()):
        bisect.insort(ordered, value)
        found[k] = ordered[k // 2] / 2 + ordered[(k + 1) // 2] / 2
    return found


def _shares(norms: np.ndarray, found: Spikes, seen: np.ndarray) -> np.ndarray:
    """The share of each group in what spikes are above the ordinary, averaged over spikes."""
    if not seen.any():
        return np.zeros(norms.shape[1])
    top = norms[seen].max(axis=1, keepdims=True)
    above = norms[seen] / top
    level = np.minimum(np.nan_to_num(found.level[seen] / top), above)
    excess = above**2 - level**2
    total = excess.sum(axis=1, keepdims=True)
    return (excess / np.where(total > 0, total, 1)).mean(axis=0)


def _drift(level: np.ndarray) -> float:
    """The level in the last tenth of the steps over that in the first."""
    known = level[~np.isnan(level)]
    tenth = max(1, len(known) // 10)
    return float(np.median(known[-tenth:]) / np.median(known[:tenth])) if len(known) else 1.0


def _shared_maximum(whole: np.ndarray, rule: Rule) -> tuple[float, float]:
    """The largest norm if a limit must have held the many steps that share it, else NaN; and their part.

    Norms that change smoothly have many near their largest as well, but as many, or at a maximum sqrt(2) - 1
    times as many, just below.
    """
    if len(whole) < rule.least_steps:
        return np.nan, 0.0
    same, wider = (float((whole >= whole.max() * (1 - k * BFLOAT16)).mean()) for k in (1, 2))
    clipped = same >= rule.at_limit and wider - same < same / 4 and len(np.unique(whole)) > 1
    return (float(whole.max()) if clipped else np.nan), same
