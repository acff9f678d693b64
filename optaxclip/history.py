"""A recording of group norms: saved, replayed, compared, looked at, and asked for advice."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from optaxclip import _checks, groups as _groups, norms as _norms
from optaxclip._advice import Advice
from optaxclip._advise import advise
from optaxclip._base import Groups, Norm, PyTree, Response
from optaxclip._compare import Comparison, compare
from optaxclip._evidence import Rule
from optaxclip._record import RecordState
from optaxclip._recording import FirstNonfinite, Run, Stretch, fields, first_nonfinite, run_of
from optaxclip._replay import Replay, policy_like, replay
from optaxclip._rows import Regrouped, Row, Source, name_of, put_together, regroup, rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["FirstNonfinite", "History", "Run", "Stretch"]


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class History:
    """A recording of the norms of groups, update by update.

    From `record` by `from_state`; from anything else that logged norms by `from_metrics`, `from_csv`,
    `from_jsonl`, or from arrays by the constructor.

    Attributes:
      names: a name for each row, in order.
      norms: the norms, float64 `(steps, rows)`; NaN or infinite where an entry was.
      steps: the number of each update, from 0, int64 `(steps,)`, ascending.
      loss: the loss of each, float64 `(steps,)`; None if it was not recorded.
      params: the norms of the parameters, `(steps, rows)`; None likewise.
      start: the norms of the parameters at the start, `(rows,)`; None likewise.
      sizes: how many entries each row has, `(rows,)`; None if that is not known.
      norm: which norm was measured: `"l2"`, `"l1"`, `"linf"`, `"rms"`, `"spectral"` or `"lp(3.0)"`.
      rows: the leaves that each row is the norm of.
      run: what is known of the whole run; None unless it comes from `record`.

    >>> import numpy as np, optaxclip as oc
    >>> norms = np.array([[3.0, 4.0], [30.0, 40.0]])
    >>> history = oc.History(["layer_1/kernel", "layer_2/kernel"], norms)
    >>> print(history.whole)
    [ 5. 50.]
    >>> print(history.replay(oc.clip_by_global_norm(10.0)).norm_after.round(3))
    [ 5. 10.]
    """

    names: tuple[str, ...]
    norms: np.ndarray
    steps: np.ndarray
    loss: np.ndarray | None
    params: np.ndarray | None
    start: np.ndarray | None
    sizes: np.ndarray | None
    norm: str
    rows: tuple[Row, ...]
    run: Run | None

    def __init__(
        self,
        names: Sequence[str | Sequence[str]],
        norms: Any,
        *,
        steps: Any = None,
        loss: Any = None,
        params: Any = None,
        start: Any = None,
        sizes: Any = None,
        norm: str = "l2",
    ):
        """A recording from arrays.

        Args:
          names: the path of each leaf, its keys joined with `/`, or a tuple of the keys.
          norms: the norm of each leaf at each step, `(steps, leaves)`.
          steps: the number of each update; by default from 0 on.
          loss: the loss of each, `(steps,)`.
          params: the norms of the parameters, `(steps, leaves)`.
          start: the norms of the parameters at the start, `(leaves,)`.
          sizes: how many entries each leaf has, `(leaves,)`.
          norm: which norm it is.

        Raises:
          TypeError: if an array holds no numbers.
          ValueError: if shapes do not fit, a norm is negative, steps do not ascend, a name comes twice, or
            there is no such norm.
        """
        keys = [tuple(name.split("/")) if isinstance(name, str) else tuple(name) for name in names]
        rows = tuple(Row("/".join(own), (Source(own),)) for own in keys)
        given = {"steps": steps, "loss": loss, "params": params, "start": start, "sizes": sizes}
        self.__dict__.update(fields(rows, norms, norm, **given))

    @classmethod
    def _of(cls, rows: tuple[Row, ...], norms: Any, norm: str, **given: Any) -> "History":
        """A recording of rows that may be more than leaves."""
        new = object.__new__(cls)
        new.__dict__.update(fields(rows, norms, norm, **given))
        return new

    @classmethod
    def from_state(
        cls,
        opt_state: PyTree,
        params: PyTree,
        groups: Groups = _groups.leaf(),
        norm: Norm = _norms.l2(),
    ) -> "History":
        """The recording in an optimizer's state.

        Args:
          opt_state: a `RecordState`, or any state that holds one.
          params: the tree that `init` was given: parameters, updates or `jax.ShapeDtypeStruct`.
          groups: the groups that `record` was given.
          norm: the norm that it was given.

        Raises:
          TypeError: if an argument is of the wrong type.
          ValueError: if there is not exactly one `RecordState`, or it has not as many rows as the groups.
        """
        where = "History.from_state"
        _checks.spec(where, Groups, groups=groups)
        _checks.spec(where, Norm, norm=norm)
        states = [
            x
            for x in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, RecordState))
            if isinstance(x, RecordState)
        ]
        if len(states) != 1:
            raise ValueError(
                f"{where}: {len(states) or 'no'} RecordState in a state of type {type(opt_state).__name__}. "
                "Pass the state of an optimizer with one oc.record() in it, or the RecordState itself."
            )
        state: RecordState = jax.device_get(states[0])
        rows, table = rows_of(groups, params)
        if len(rows) != len(state.start):
            raise ValueError(
                f"{where}: the state has {len(state.start)} rows; these groups and parameters have "
                f"{len(rows)}: {_checks.listed(table.names)}. Pass the groups and the tree that record had."
            )
        updates, capacity = int(state.step), len(state.norm)
        steps = np.arange(max(0, updates - capacity), updates)
        kept = steps % capacity
        return cls._of(
            rows,
            state.norm[kept],
            name_of(norm),
            steps=steps,
            loss=None if np.isnan(state.loss).all() else state.loss[kept],
            params=state.params[kept] if len(state.params) else None,
            start=None if np.isnan(state.start).any() else state.start,
            sizes=table.sizes,
            run=run_of(state),
        )

    def __len__(self) -> int:
        """How many updates it holds."""
        return len(self.norms)

    @property
    def whole(self) -> np.ndarray:
        """The norm of all rows together, `(steps,)`."""
        together = np.zeros(len(self.rows), int)
        return put_together(self.norms, self.sizes, together, 1, self.norm)[:, 0]

    def regrouped(self, groups: Groups) -> Regrouped:
        """Which rows a grouping puts together, and how; `regroup` does it."""
        _checks.spec("History.regroup", Groups, groups=groups)
        return regroup(self.rows, self.sizes, groups)

    def regroup(self, groups: Groups) -> "History":
        """The recording of coarser groups, as if it had been made with them.

        What the grouping leaves alone is left out, and what it does not measure. Of the whole run only the
        last updates are kept, since histograms and maxima cannot be put together.

        Args:
          groups: one of `optaxclip.groups`.

        Raises:
          ValueError: if it divides what was recorded as one, or asks for shapes that are not known.

        >>> import optaxclip as oc
        >>> history = oc.History(["a/kernel", "a/bias", "b/kernel"], [[3.0, 4.0, 1.0]])
        >>> coarse = history.regroup(oc.groups.layer())
        >>> print(coarse.names, coarse.norms)
        ('a', 'b') [[5. 1.]]
        """
        own = self.regrouped(groups)
        count = len(own.table.names)
        place = np.where(own.measured, own.place, -1)

        def together(norms: np.ndarray | None) -> np.ndarray | None:
            return None if norms is None else put_together(norms, self.sizes, place, count, self.norm)

        start = together(None if self.start is None else self.start[None])
        return self._of(
            own.rows,
            put_together(self.norms, self.sizes, place, count, self.norm),
            self.norm,
            steps=self.steps,
            loss=self.loss,
            params=together(self.params),
            start=None if start is None else start[0],
            sizes=None if self.sizes is None else own.table.sizes,
        )

    def replay(
        self,
        limit: Any,
        groups: Groups | None = None,
        response: Response | None = None,
        *,
        eps: float = 0.0,
        nonfinite: Literal["propagate", "zero"] = "propagate",
    ) -> Replay:
        """What a policy would have done to these updates, by the same code as in training.

        It is exact: a policy that goes by norms depends on an update only through the norms of its groups. It
        does not know that other updates would have led to other gradients later on. A limit that remembers
        norms starts with the first recorded update; schedules are asked for the number of each.

        Args:
          limit: a number, a schedule or one of `optaxclip.limits`; or a transformation made by
            `rescale_by_norm` or by a method of its kind, which brings all else.
          groups: which rows share a norm, one of `optaxclip.groups`; by default all do.
          response: what groups are multiplied by, one of `optaxclip.responses`; by default `clip()`.
          eps: as in `rescale_by_norm`.
          nonfinite: likewise.

        Raises:
          TypeError: if the transformation cannot be replayed on norms, or an argument is of the wrong type.
          ValueError: if groups are finer than the recording, or it lacks what the limit needs.

        >>> import optaxclip as oc
        >>> history = oc.History(["a", "b"], [[3.0, 4.0], [3.0, 40.0]])
        >>> found = history.replay(5.0, oc.groups.leaf())
        >>> print(found.factor.round(3).tolist(), found.clipped)
        [[1.0, 1.0], [1.0, 0.125]] 0.5
        """
        return replay(self, policy_like(limit, groups, response, self.norm, eps, nonfinite))

    def compare(self, policies: Mapping[str, Any] | Sequence[Any]) -> Comparison:
        """What several policies would have done, side by side.

        Args:
          policies: from a name to what `replay` takes: a transformation, a limit on the whole, or a `Replay`.
            A list is numbered.

        Raises:
          TypeError: as in `replay`.
          ValueError: likewise.

        >>> import optaxclip as oc
        >>> history = oc.History(["a", "b"], [[3.0, 4.0]] * 9 + [[3.0, 400.0]])
        >>> policies = {"global": oc.clip_by_global_norm(6.0), "leaf": oc.clip_by_leafwise_norm(6.0)}
        >>> found = history.compare(policies)
        >>> print([(row.name, round(row.spike_cut, 1), round(row.spread, 1)) for row in found.rows])
        [('global', 66.7, 1.0), ('leaf', 59.6, 66.7)]
        """
        return compare(self, policies)

    def advise(
        self,
        budget: float = 0.05,
        optimizer: Literal["sgd", "adam"] = "sgd",
        learning_rate: float | None = None,
        *,
        rule: Rule = Rule(),
    ) -> Advice:
        """Which grouping to clip by, at which limit, and why; `docs/choosing.md` has the rule.

        Record gradients before anything acts on them, some hundred steps or until the run fails.

        Args:
          budget: which share of ordinary steps clipping may touch, from 0 to 0.5.
          optimizer: what follows the clipping: `"sgd"` for steps in proportion to the update, with or without
            momentum, `"adam"` for those that do not depend on its size.
          learning_rate: the optimizer's, at the start. With it and SGD, the length of steps is judged too.
          rule: the constants of the rule.

        Raises:
          ValueError: if an argument is outside its range, or unknown.

        >>> import numpy as np, optaxclip as oc
        >>> norms = np.exp(0.2 * np.random.default_rng(0).standard_normal((300, 3)))
        >>> norms[[50, 120, 250]] *= 100
        >>> advice = oc.History(["layer_1/kernel", "layer_2/kernel", "head/kernel"], norms).advise()
        >>> print(advice.code)
        oc.clip_by_global_norm(2.15)
        """
        return advise(self, budget, optimizer, learning_rate, rule)

    def first_nonfinite(self) -> FirstNonfinite | None:
        """The first update of the run, or of the recording, in which a norm was not finite; None if none was.

        >>> import numpy as np, optaxclip as oc
        >>> history = oc.History(["layer_1", "layer_2", "layer_3"], [[1, 1, 1], [np.nan, np.inf, 9]])
        >>> found = history.first_nonfinite()
        >>> print(found.step, found.names, found.deepest_finite)
        1 ('layer_1', 'layer_2') layer_3
        """
        return first_nonfinite(self)

    def __str__(self) -> str:
        """The recording in a few lines.

        >>> import optaxclip as oc
        >>> print(oc.History(["a", "b"], [[3.0, 4.0], [3.0, 40.0]], loss=[2.0, 1.5]))
        Norms (l2) of 2 groups, 2 updates, 0 to 1
          groups: a, b
          norm of the whole: median 22.6, 99 % below 39.8, largest 40.1 at update 1
          loss: 2 at first, 1.5 at last, 1.5 at best
          not finite: never
        """
        from optaxclip import _tables

        return _tables.text(self)

    def table(self, most: int = 20) -> "Table":
        """The norms of each group in numbers, as a table of rich: `rich.print(history.table())`.

        The last line is the whole. Quantiles and shares are of finite norms; `–` stands where there is none.

        Args:
          most: how many groups to show. Those with the largest shares and the largest norms are kept.

        Raises:
          ImportError: without rich, which `pip install 'optaxclip[cli]'` brings.
        """
        from optaxclip import _tables

        return _tables.table(self, most)

    def plot(self, limits: Any = None, advice: Any = None) -> "Figure":
        """Four panels: each group's norm over the updates, the whole's, who dominates, and a histogram.

        Where there are more updates than a panel has pixels, a column is the largest of several, so that
        spikes stay; more than 60 groups are put together by layer. What is not finite is hatched.

        Args:
          limits: limits of the whole norm to draw: a number, several, or from a name to a number or to an
            array `(steps,)`, such as `history.replay(oc.zclip()).limit[:, 0]`.
          advice: what `advise` said, to draw its limit.

        Returns:
          A figure that belongs to no window: `figure.savefig("norms.png")`; notebooks show it as it is.

        Raises:
          ImportError: without Matplotlib, which `pip install 'optaxclip[plot]'` brings.
          ValueError: if a limit is negative or NaN, or has another shape.
        """
        from optaxclip import _plot

        return _plot.figure(self, limits, advice)

    def to_html(self, path: str | os.PathLike, advice: Any = None) -> None:
        """Writes one file to send to a colleague: the figure, the table, and the advice with its code.

        The page loads nothing from elsewhere and runs no scripts. An existing file is replaced.

        Args:
          path: the file to write.
          advice: what `advise` said; left out by default.

        Raises:
          ImportError: without Matplotlib, which `pip install 'optaxclip[plot]'` brings.
          OSError: if the file cannot be written.
        """
        from optaxclip import _html

        _html.write(self, path, advice)
