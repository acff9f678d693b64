"""What a recording is made of, checked, and what is known of the whole run."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from optaxclip import _checks
from optaxclip._base import Groups, Norm, PyTree
from optaxclip._record import LEAST, PER_DOUBLING, RecordState
from optaxclip.history._rows import Row, norm_called, rows_of

# Steps are checked in float64, which does not tell the next integer from the one after it.
LAST_STEP = 2**53 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class Stretch:
    """The whole run, thinned: equally long stretches one after the other, the first from update 0.

    Attributes:
      length: updates in a stretch.
      median: the medians of the finite norms, `(stretches, rows)`; NaN where there was none.
      largest: the largest norms, likewise; infinite where one was not finite.
      loss_median: the medians of the loss, `(stretches,)`; NaN where none was given.
      loss_largest: the largest losses; infinite where none was given or one was not finite.
    """

    length: int
    median: np.ndarray
    largest: np.ndarray
    loss_median: np.ndarray
    loss_largest: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What `record` keeps of the whole run, beyond the last updates; arrays have one entry for each row.

    Attributes:
      updates: how many there were.
      edges: the edges of the histogram's bins, `(bins + 1,)`.
      histogram: in how many updates the norm was in each bin, `(rows, bins)`.
      largest: the largest finite norm.
      largest_step: the update it belongs to; -1 if there was none.
      nonfinite: in how many updates the norm was NaN or infinite.
      entries: how many entries were, all updates together.
      first: the first update in which the norm was; -1 if it never was.
      first_entries: how many entries were in the first update in which any was.
      stretches: the whole run, thinned.
    """

    updates: int
    edges: np.ndarray
    histogram: np.ndarray
    largest: np.ndarray
    largest_step: np.ndarray
    nonfinite: np.ndarray
    entries: np.ndarray
    first: np.ndarray
    first_entries: np.ndarray
    stretches: Stretch


@dataclasses.dataclass(frozen=True)
class FirstNonfinite:
    """The first update with a NaN or an infinity.

    Attributes:
      step: its number.
      names: the rows that were not finite in it, in order.
      entries: how many of their entries were not; None if that was not recorded.
      deepest_finite: where some rows are finite, the one next to those that are not, in the order of rows.
        Where that is the order of layers, it is the last that was still right, as gradients are computed from
        the last layer to the first. None if none was finite.
    """

    step: int
    names: tuple[str, ...]
    entries: tuple[int, ...] | None
    deepest_finite: str | None


def run_of(state: RecordState) -> Run:
    """The figures of the whole run in a state that has been fetched from its devices."""
    stretches, filled = state.stretches, slice(int(state.stretches.filled))
    median, largest = (np.asarray(x, float)[filled] for x in (stretches.median, stretches.largest))
    columns = median[:, :-1], largest[:, :-1], median[:, -1], largest[:, -1]
    return Run(
        updates=int(state.step),
        edges=2.0 ** (LEAST + np.arange(state.histogram.shape[1] + 1) / PER_DOUBLING),
        histogram=np.asarray(state.histogram),
        largest=np.asarray(state.largest, float),
        largest_step=np.asarray(state.largest_step),
        nonfinite=np.asarray(state.nonfinite),
        entries=np.asarray(state.entries),
        first=np.asarray(state.first),
        first_entries=np.asarray(state.first_entries),
        stretches=Stretch(int(stretches.length), *columns),
    )


def of_state(
    opt_state: PyTree, params: PyTree, groups: Groups, norm: Norm
) -> tuple[tuple[Row, ...], np.ndarray, dict[str, Any]]:
    """The rows of the recording in an optimizer's state, their norms, and all else for `fields`."""
    where = "History.from_state"
    _checks.spec(where, Groups, groups=groups)
    _checks.spec(where, Norm, norm=norm)
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, RecordState))
    states = [x for x in leaves if isinstance(x, RecordState)]
    if len(states) != 1:
        raise ValueError(
            f"{where}: {len(states) or 'no'} RecordState in a state of type {type(opt_state).__name__}. "
            "Pass the state of an optimizer with one oc.record() in it, or the RecordState itself."
        )
    state = _fetched(where, states[0])
    rows, table = rows_of(groups, params)
    if len(rows) != len(state.start):
        raise ValueError(
            f"{where}: the state has {len(state.start)} rows; these groups and parameters have "
            f"{len(rows)}: {_checks.listed(table.names)}. Pass the groups and the tree that record had."
        )
    updates, capacity = int(state.step), len(state.norm)
    steps = np.arange(max(0, updates - capacity), updates)
    kept = steps % capacity
    given = {
        "steps": steps,
        "loss": None if np.isnan(state.loss).all() else state.loss[kept],
        "params": state.params[kept] if len(state.params) else None,
        "start": None if np.isnan(state.start).any() else state.start,
        "sizes": table.sizes,
        "run": run_of(state),
    }
    return rows, np.asarray(state.norm)[kept], given


def _fetched(where: str, state: RecordState) -> RecordState:
    """The state in NumPy. Nothing is gathered: all processes would have to take part, and one may ask."""
    try:
        return jax.device_get(state)
    except RuntimeError as error:
        split = [
            jax.tree_util.keystr(path, simple=True, separator=".")
            for path, x in jax.tree.leaves_with_path(state)
            if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        ]
        if not split:
            raise
        raise ValueError(
            f"{where}: {_checks.listed(split)} in the RecordState {'is' if len(split) == 1 else 'are'} split "
            "over the devices of several processes. Keep the state whole on every device; or pass, in all "
            "processes, jax.experimental.multihost_utils.process_allgather(state, tiled=True)."
        ) from error


def first_nonfinite(history: Any) -> FirstNonfinite | None:
    """The first update of a `History` in which a norm was not finite."""
    if history.run is not None:
        met = history.run.first >= 0
        if not met.any():
            return None
        step = int(history.run.first[met].min())
        bad, entries = history.run.first == step, tuple(map(int, history.run.first_entries))
    else:
        steps = np.flatnonzero(~np.isfinite(history.norms).all(axis=1))
        if not len(steps):
            return None
        step, bad, entries = int(history.steps[steps[0]]), ~np.isfinite(history.norms[steps[0]]), None
    names = tuple(name for name, own in zip(history.names, bad, strict=True) if own)
    after = np.flatnonzero(bad)[-1] + 1
    finite = np.flatnonzero(~bad)
    deepest = None
    if len(finite):
        deepest = history.names[after if after < len(bad) else finite[-1]]
    counts = None if entries is None else tuple(n for n, own in zip(entries, bad, strict=True) if own)
    return FirstNonfinite(step, names, counts, deepest)


def fields(
    rows: tuple[Row, ...],
    norms: Any,
    norm: str,
    *,
    steps: Any = None,
    loss: Any = None,
    params: Any = None,
    start: Any = None,
    sizes: Any = None,
    run: Run | None = None,
) -> dict[str, Any]:
    """The attributes of a recording, checked: what is wrong raises `TypeError` or `ValueError`."""
    norm_called(norm)
    names = tuple(row.name for row in rows)
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"History: {min(twice)!r} is the name of several rows. Give each its own.")
    values = _array("norms", norms, (None, len(names)), names)
    count = len(values)
    wanted = {
        "loss": (loss, (count,)),
        "params": (params, values.shape),
        "start": (start, (len(names),)),
        "sizes": (sizes, (len(names),)),
    }
    arrays = {
        key: None if given is None else _array(key, given, shape, names)
        for key, (given, shape) in wanted.items()
    }
    for key, array in {"norms": values, **arrays}.items():
        if key != "loss" and array is not None and (array < 0).any():
            at = np.argwhere(array < 0)[0]
            raise ValueError(
                f"History: {key} holds {array[tuple(at)]:g}, for {names[at[-1]]!r}. Norms are positive."
            )
    steps = np.arange(count) if steps is None else _array("steps", steps, (count,), names)
    whole = (steps >= 0) & (steps <= LAST_STEP) & (steps == np.floor(steps))
    if not whole.all() or (np.diff(steps) <= 0).any():
        raise ValueError(
            f"History: steps must be whole numbers from 0 to {LAST_STEP}, each larger than the one before."
        )
    if norm == "rms" and arrays["sizes"] is None:
        raise ValueError("History: to put rms norms together takes sizes, the number of entries of each row.")
    found = {"names": names, "norms": values, "steps": steps.astype(np.int64), "norm": norm, "rows": rows}
    return {**found, **arrays, "run": run}


def _array(key: str, value: Any, shape: tuple[int | None, ...], names: Sequence[str]) -> np.ndarray:
    try:
        array = np.asarray(value, float)
    except (TypeError, ValueError) as error:
        raise TypeError(f"History: {key} is no array of numbers: {error}. Pass one.") from error
    if array.ndim != len(shape) or any(
        w is not None and w != n for w, n in zip(shape, array.shape, strict=True)
    ):
        want = str(tuple("steps" if n is None else n for n in shape)).replace("'", "")
        raise ValueError(
            f"History: {key} has shape {array.shape}; {len(names)} names, {_checks.listed(names, 4)}, ask "
            f"for {want}."
        )
    return array
