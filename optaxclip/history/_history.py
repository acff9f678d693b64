"""A recording of group norms: saved, replayed, compared, looked at, and asked for advice."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from optaxclip import _checks, groups as _groups, norms as _norms
from optaxclip._base import Groups, Norm, PyTree, Response
from optaxclip.history import _logs, _store
from optaxclip.history._advice import Advice
from optaxclip.history._advise import advise
from optaxclip.history._compare import Comparison, compare
from optaxclip.history._evidence import Rule
from optaxclip.history._recording import FirstNonfinite, Run, Stretch, fields, first_nonfinite, of_state
from optaxclip.history._replay import Replay, policy_like, replay
from optaxclip.history._rows import Regrouped, Row, check_whole, name_of, named_rows, put_together, regroup

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

_RULE = Rule()

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
        rows: Literal["leaf", "layer"] = "leaf",
    ):
        """A recording from arrays.

        Args:
          names: the path of each leaf, its keys joined with `/`, or a tuple of the keys.
          norms: the norm of each leaf at each step, `(steps, leaves)`.
          steps: the number of each update, below 2**53; by default from 0 on.
          loss: the loss of each, `(steps,)`.
          params: the norms of the parameters, `(steps, leaves)`.
          start: the norms of the parameters at the start, `(leaves,)`.
          sizes: how many entries each leaf has, `(leaves,)`.
          norm: which norm it is.
          rows: what the names are of: `"leaf"`, or `"layer"` for norms by `groups.layer()`, which cannot be
            divided into those of leaves.

        Raises:
          TypeError: if an array holds no numbers.
          ValueError: if shapes do not fit, a norm is negative, steps do not ascend or are too large, a name
            comes twice, or there is no such norm.
        """
        own = named_rows(names, rows)
        given = {"steps": steps, "loss": loss, "params": params, "start": start, "sizes": sizes}
        self.__dict__.update(fields(own, norms, norm, **given))

    @classmethod
    def _of(cls, rows: tuple[Row, ...], norms: Any, norm: str, **given: Any) -> "History":
        """A recording of rows that may be more than leaves."""
        new = object.__new__(cls)
        new.__dict__.update(fields(rows, norms, norm, **given))
        return new

    def _with(self, **changed: Any) -> "History":
        """The recording of the same rows with some attributes changed."""
        keys = ("norms", "norm", "steps", "loss", "params", "start", "sizes", "run")
        return self._of(self.rows, **{key: getattr(self, key) for key in keys} | changed)

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

        >>> import jax.numpy as jnp, optaxclip as oc
        >>> tx, params = oc.record(), {"w": jnp.zeros(2), "b": jnp.zeros(1)}
        >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.ones(1)}
        >>> updates, state = tx.update(grads, tx.init(params))
        >>> history = oc.History.from_state(state, params)
        >>> print(history.names, history.norms)
        ('b', 'w') [[1. 5.]]
        """
        rows, norms, given = of_state(opt_state, params, groups, norm)
        return cls._of(rows, norms, name_of(norm), **given)

    @classmethod
    def from_metrics(
        cls,
        metrics: Iterable[Mapping[str, Any]],
        *,
        prefix: str = "clip",
        statistic: str = "norm_before",
        separator: str = "/",
        loss: str | None = None,
        step: str | None = None,
        norm: str = "l2",
        rows: Literal["leaf", "layer"] = "leaf",
    ) -> "History":
        """The norms in dicts of `metrics`, one for each update, as a loop collects them.

        A norm of the whole is left out, unless there is no other. A name is taken for a leaf unless `rows`
        says layer.

        Args:
          metrics: the dicts, with scalars of NumPy, JAX or Python.
          prefix: as in `metrics`.
          statistic: which of the norms: `norm_before` or `norm_after`.
          separator: as in `metrics`.
          loss: the key of the loss, if they have one.
          step: the key of the number of the update; by default they count from 0.
          norm: which norm was measured.
          rows: `"leaf"`, or `"layer"` if `metrics` was given `groups.layer()`.

        Raises:
          TypeError: if an entry is no dict or a value no scalar.
          ValueError: if no key is of a norm, entries have different keys, or as in `History`.

        >>> import optaxclip as oc
        >>> logged = [{"clip/norm_before/a": 3.0, "clip/norm_before/b": 4.0, "clip/norm_before/whole": 5.0}]
        >>> history = oc.History.from_metrics(logged)
        >>> print(history.names, history.norms)
        ('a', 'b') [[3. 4.]]
        """
        head = separator.join((prefix, statistic, ""))
        return cls(**_logs.from_metrics(metrics, head, loss, step, norm), rows=rows)

    @classmethod
    def from_csv(
        cls,
        path: str | os.PathLike[str],
        *,
        columns: str | Sequence[str] | None = None,
        step: str | None = None,
        loss: str | None = None,
        norm: str = "l2",
        rows: Literal["leaf", "layer"] = "leaf",
        delimiter: str | None = None,
    ) -> "History":
        r"""The norms in a CSV log of any framework.

        Columns of norms are found by their names, after what a logger puts before them: `norm_before/<name>`
        (`metrics`), `grad_2.0_norm/<name>` (Lightning), `grad/<name>.norm` (OLMo), `l2_norm/grad/<name>`
        (Composer), `grad_norm/<name>` (also `grad_norms`, `gradient_norm`). Where there are none of these,
        all columns of numbers are taken but the step, the loss, and what loggers add: epoch, learning rate,
        times, other steps, accuracies, `val_` and `eval_` figures, names with a leading `_`; beside a norm of
        all gradients, such as `grad_norm`, only those with a path's name, with dots or slashes. Totals
        (`grad_norm`, `total`, `*_total`, `global`, `whole`) are left out, unless there is nothing else.

        Names with dots and no slashes, as PyTorch's `layers.0.weight`, become paths, `layers/0/weight`, but
        for those of `metrics`. A name in a log is taken for a leaf unless `rows` says layer. Lines of the
        same step complete one another, since loggers write several; steps without norms are left out. The
        file is read line by line; its cells may be empty, `nan`, `inf`.

        Args:
          path: a file of UTF-8 text whose first line names the columns.
          columns: those with norms: a regular expression with one group, the name of the leaf; or a list.
          step: the column of the step; by default `step`, `global_step`, `_step`, `iteration`,
            `trainer/global_step` or `train/global_step`, in either case. Without any, each line with norms is
            a step, from 0.
          loss: the column of the loss; by default `loss`, `train/loss` or `train_loss`. If a step has
            several, the last counts.
          norm: which norm was logged. `rms` needs sizes, which logs do not have.
          rows: `"leaf"`, or `"layer"` for norms by `groups.layer()` or of modules.
          delimiter: what is between cells; by default the one of comma, semicolon, tab and `|` that makes
            most columns of the first line.

        Raises:
          OSError: if the file cannot be opened.
          ValueError: if a column is not there or has a name of more than 1,000 characters, a chosen cell is
            no number, a norm is negative or missing from a step, steps do not ascend, or the file is no such
            table; it names the line.

        >>> import pathlib, tempfile, optaxclip as oc
        >>> path = pathlib.Path(tempfile.mkdtemp(), "log.csv")
        >>> _ = path.write_text("step,loss,fc.weight,fc.bias\n10,0.5,3,4\n20,0.4,6,8")
        >>> history = oc.History.from_csv(path)
        >>> print(history.names, history.steps, history.whole)
        ('fc/weight', 'fc/bias') [10 20] [ 5. 10.]
        """
        found = _logs.from_csv(path, delimiter, columns=columns, step=step, loss=loss, norm=norm)
        return cls(**found, rows=rows)

    @classmethod
    def from_jsonl(
        cls,
        path: str | os.PathLike[str],
        *,
        columns: str | Sequence[str] | None = None,
        step: str | None = None,
        loss: str | None = None,
        norm: str = "l2",
        rows: Literal["leaf", "layer"] = "leaf",
    ) -> "History":
        r"""The norms in a log of one JSON object a line; all else as in `from_csv`, keys being columns.

        Values may be null, and the tokens `NaN` and `Infinity`.

        >>> import pathlib, tempfile, optaxclip as oc
        >>> path = pathlib.Path(tempfile.mkdtemp(), "log.jsonl")
        >>> _ = path.write_text('{"step": 0, "grad_norm/a": 3.0}\n{"step": 1, "grad_norm/a": NaN}')
        >>> print(oc.History.from_jsonl(path).norms.tolist())
        [[3.0], [nan]]
        """
        return cls(**_logs.from_jsonl(path, columns=columns, step=step, loss=loss, norm=norm), rows=rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all of the recording to one file, of exactly this name; `load` reads it.

        It is a zip of plain arrays that `numpy.load` reads too. It is written beside the old file and then
        put in its place, so that there is always a whole one. Equal recordings make equal files.

        Args:
          path: the file.

        Raises:
          OSError: if it cannot be written; what was there before stays.

        >>> import pathlib, tempfile, numpy as np, optaxclip as oc
        >>> path = pathlib.Path(tempfile.mkdtemp(), "run.npz")
        >>> oc.History(["a", "b"], [[3.0, 4.0]]).save(path)
        >>> print(np.load(path)["norms"])
        [[3. 4.]]
        """
        _store.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, max_bytes: int = 2**31) -> "History":
        """The recording in a file that `save` wrote, to the bit. Nothing in the file is ever executed.

        Args:
          path: the file.
          max_bytes: how many bytes what is read may take in memory, checked before it is read. Arrays take as
            many as they have; names and shapes are counted 27 times, which is how much objects may take.

        Raises:
          OSError: if there is no such file.
          ValueError: if it is truncated, foreign, too large, or of a newer version.

        >>> import pathlib, tempfile, optaxclip as oc
        >>> path = pathlib.Path(tempfile.mkdtemp(), "run.npz")
        >>> oc.History(["a", "b"], [[3.0, 4.0]]).save(path)
        >>> print(oc.History.load(path).norms)
        [[3. 4.]]
        """
        return _store.load(path, max_bytes, cls._of)

    def __len__(self) -> int:
        """How many updates it holds."""
        return len(self.norms)

    @property
    def whole(self) -> np.ndarray:
        r"""The norm of all rows together, `(steps,)`; in L2 $\sqrt{\textstyle\sum_r n_{t,r}^2}$."""
        together = np.zeros(len(self.rows), int)
        return put_together(self.norms, self.sizes, together, 1, self.norm)[:, 0]

    def regrouped(self, groups: Groups) -> Regrouped:
        """Which rows a grouping puts together, and how. See `History.regroup`.

        Args:
          groups: one of `optaxclip.groups`.

        Returns:
          A tuple of the `table` and `rows` of the groups, and for each recorded row its `place` among them,
          and whether it is `measured` and `scaled`, `(rows,)` each.

        >>> import optaxclip as oc
        >>> history = oc.History(["a/kernel", "a/bias", "b/kernel"], [[3.0, 4.0, 1.0]])
        >>> found = history.regrouped(oc.groups.layer())
        >>> print(found.table.names, found.place)
        ('a', 'b') [0 0 1]
        """
        _checks.spec("History.regroup", Groups, groups=groups)
        found = regroup(self.rows, self.sizes, groups)
        if self.norm == "spectral":
            check_whole(self.rows, found)
        return found

    def regroup(self, groups: Groups) -> "History":
        r"""The recording of coarser groups, as if it had been made with them.

        $$n_{t,g} = \sqrt{\textstyle\sum_{r \in g} n_{t,r}^2} \quad \text{in L2}$$

        What the grouping leaves alone is left out, and what it does not measure. Of the whole run only the
        last updates are kept, since histograms and maxima cannot be put together.

        Args:
          groups: one of `optaxclip.groups`.

        Raises:
          ValueError: if it divides what was recorded as one, asks for shapes that are not known, or puts
            singular values of parts of a leaf together.

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
        norms starts with the first recorded update; schedules are asked for the number of each, but for one
        inside a limit that remembers norms, which counts from the first recorded update.

        Args:
          limit: a number, a schedule or one of `optaxclip.limits`; or a transformation made by
            `rescale_by_norm` or by a method of its kind, which brings all else.
          groups: which rows share a norm, one of `optaxclip.groups`; by default all do.
          response: what groups are multiplied by, one of `optaxclip.responses`; by default `clip()`.
          eps: as in `rescale_by_norm`.
          nonfinite: likewise.

        Returns:
          What came of it, step by step. See `Replay`.

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
        return compare(self, policies, _RULE)

    def advise(
        self,
        budget: float = 0.05,
        optimizer: Literal["sgd", "adam"] | None = None,
        learning_rate: float | None = None,
        *,
        rule: Rule = _RULE,
    ) -> Advice:
        """Which grouping to clip by, at which limit, and why; `docs/choosing.md` has the rule.

        Record gradients before anything acts on them, some hundred steps or until the run fails.

        Args:
          budget: which share of the ordinary norms of each group clipping may touch, from 0 to 0.5.
          optimizer: what follows the clipping: `"sgd"` for steps in proportion to the update, with or without
            momentum, `"adam"` for those that do not depend on its size, as of AdamW, Lion and Adafactor.
            Without it SGD is taken, and the reasons say so.
          learning_rate: the optimizer's; its peak, where it warms up. With it and SGD, the length of steps is
            judged too, if the norms of the parameters were recorded.
          rule: the constants of the rule.

        Raises:
          TypeError: if the learning rate is no number.
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
        from optaxclip.history import _tables

        return _tables.text(self)

    def table(self, most: int = 20) -> "Table":
        """The norms of each group in numbers, as a table of rich: `rich.print(history.table())`.

        The last line is the whole. Quantiles and shares are of finite norms; `–` stands where there is none.

        Args:
          most: how many groups to show. Those with the largest shares and the largest norms are kept.

        Raises:
          ImportError: without rich: `pip install rich`.

        >>> import optaxclip as oc
        >>> table = oc.History(["a", "b"], [[3.0, 4.0]]).table()
        >>> print(table.row_count, table.columns[0].header)
        3 group
        """
        from optaxclip.history import _tables

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
          ImportError: without Matplotlib: `pip install matplotlib`.
          TypeError: if a limit is no number.
          ValueError: if a limit is negative or NaN, or has another shape.

        >>> import pathlib, tempfile, optaxclip as oc
        >>> path = pathlib.Path(tempfile.mkdtemp(), "norms.png")
        >>> oc.History(["a", "b"], [[3.0, 4.0], [3.0, 40.0]]).plot(limits=5.0).savefig(path)
        >>> print(path.read_bytes()[1:4])
        b'PNG'
        """
        from optaxclip.history import _plot

        return _plot.figure(self, limits, advice)

    def to_html(self, path: str | os.PathLike, advice: Any = None, *, limits: Any = None) -> None:
        """Writes one file to send to a colleague: the figure, the table, and the advice with its code.

        The page loads nothing from elsewhere and runs no scripts. An existing file is replaced.

        Args:
          path: the file to write.
          advice: what `advise` said; left out by default.
          limits: limits of the whole norm to draw, as in `plot`.

        Raises:
          ImportError: without Matplotlib: `pip install matplotlib`.
          OSError: if the file cannot be written.
          TypeError: if a limit is no number.
          ValueError: if a limit is negative or NaN, or has another shape.

        >>> import pathlib, tempfile, optaxclip as oc
        >>> path = pathlib.Path(tempfile.mkdtemp(), "run.html")
        >>> oc.History(["a", "b"], [[3.0, 4.0], [3.0, 40.0]]).to_html(path)
        >>> print(path.read_text(encoding="utf-8")[:15])
        <!doctype html>
        """
        from optaxclip.history import _html

        _html.write(self, path, advice, limits)
