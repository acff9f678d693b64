"""Which columns of a log are norms, and what they hold step by step."""

import re
from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np

from optaxclip import _checks, _patterns
from optaxclip.history._recording import LAST_STEP
from optaxclip.history._rows import norm_called

STEPS = ("step", "global_step", "_step", "iteration", "trainer/global_step", "train/global_step")
LOSSES = ("loss", "train/loss", "train_loss")

# What stands before or around the names of norms, and who writes it; what a logger puts before that.
_HEAD = r"(?:.*?[/ ])?"
OURS = re.compile(_HEAD + r"norm_before/(?P<name>.+)")  # optaxclip.metrics
NORMS = (
    OURS,
    re.compile(_HEAD + r"grad_(?P<order>\d+(?:\.\d+)?|inf)_norm/(?P<name>.+)"),  # Lightning's grad_norm
    re.compile(_HEAD + r"grad/(?P<name>.+)\.norm"),  # OLMo
    re.compile(_HEAD + r"l2_norm/grad/(?P<name>.+)"),  # Composer
    re.compile(_HEAD + r"grad(?:ient)?_norms?/(?P<name>.+)"),
)
TOTALS = re.compile(
    r"(?:.*_)?total|global|whole|(?:.*[/ ])?(?:(?:(?:total|global)_)?grad(?:ient)?|total|global)_norm",
    re.IGNORECASE,
)
BANDS = re.compile(r".*__(?:MIN|MAX)")  # W&B's, around the curves of an exported chart
# What loggers write beside norms: figures of W&B (a leading underscore), of validation, of the schedule, of
# speed, steps and clocks; and the column without a name that pandas writes.
OTHERS = re.compile(
    r"|_.*|Unnamed: \d+|(?:eval|val|valid|validation|test)[/_].*"
    r"|(?:.*[/_ ])?(?:epoch|steps?|iterations?|lr|learning_rate|loss|acc|accuracy|time|runtime)"
    r"|(?:.*[/_ ])?(?:per_second|flos|tokens)|lr-.*|relative time.*",
    re.IGNORECASE,
)

LONGEST_NAME = 1000  # characters; the forms above take the square of a name's length
ORDERS = {1.0: "l1", 2.0: "l2", np.inf: "linf"}


class Cells:
    """The numbers of a log, in the order that they are read in: 24 bytes each, whatever lines hold.

    Attributes:
      where: the file and who reads it, for errors.
      columns: the number of each column.
      lines: the line that each record ends in.
      record: for each number, its record.
      column: likewise.
      value: likewise.
      text: for each column with cells that are no numbers, the first of these and its line.
    """

    def __init__(self, where: str, columns: Iterable[str] = ()):
        self.where = where
        self.columns: dict[str, int] = {}
        for name in columns:
            self._new(name)
        self.lines, self.record, self.column, self.value = array("q"), array("q"), array("q"), array("d")
        self.text: dict[int, tuple[int, str]] = {}

    def add(self, line: int, cells: Iterable[tuple[str, Any]]) -> None:
        """Takes up a record; its empty cells are none."""
        record = len(self.lines)
        self.lines.append(line)
        for name, cell in cells:
            column = self.columns.get(name)
            if column is None:
                column = self._new(name)
            if cell is None or cell == "":
                continue
            value = number_in(cell)
            if value is not None:
                self.record.append(record)
                self.column.append(column)
                self.value.append(value)
            elif column not in self.text and not (isinstance(cell, str) and cell.isspace()):
                self.text[column] = line, repr(cell[:40] if isinstance(cell, str) else type(cell).__name__)

    def _new(self, name: str) -> int:
        """The number of a column that has none yet."""
        if len(name) > LONGEST_NAME:
            raise ValueError(
                f"{self.where}: the name of column {name[:40]!r}... has {len(name)} characters. Give it one "
                f"of at most {LONGEST_NAME}, or leave it out."
            )
        return self.columns.setdefault(name, len(self.columns))


def number_in(cell: Any) -> float | None:
    """A cell as a number, NaN and infinity among them; None if it is none."""
    if isinstance(cell, float):
        return cell
    if not isinstance(cell, str) or "_" in cell:  # which float() takes for a separator of thousands
        return None
    try:
        return float(cell)
    except ValueError:
        return None


def arguments(cells: Cells, columns: Any, step: Any, loss: Any, norm: str) -> dict[str, Any]:
    """The arguments of `History` that a log holds."""
    norm_called(norm)
    step = _known(cells, "step", step, STEPS)
    loss = _known(cells, "loss", loss, LOSSES)
    names = _names(cells, columns, {step, loss}, norm)
    for column in filter(None, (*names, step, loss)):
        line, text = cells.text.get(cells.columns[column], (None, None))
        if line is not None:
            raise ValueError(
                f"{cells.where}, line {line}: {text} in column {column!r} is no number. Mend it, or pass "
                "columns=, step= or loss= to choose others."
            )
    lines, steps, of_record = _steps(cells, list(names), step, loss)
    norms, kept = _norms(cells, list(names), lines, of_record)
    if not len(norms):
        raise ValueError(f"{cells.where} has no line with norms. Pass columns= to choose them.")
    losses = np.full(len(lines), np.nan)
    if loss is not None:
        record, _, value = _of(cells, loss)
        known = of_record[record] >= 0
        losses[of_record[record[known]]] = value[known]
    return {
        "names": list(names.values()),
        "norms": norms,
        "steps": None if steps is None else steps[kept],
        "loss": None if np.isnan(losses[kept]).all() else losses[kept],
        "norm": norm,
    }


def _known(cells: Cells, argument: str, wanted: str | None, usual: Iterable[str]) -> str | None:
    """The column that is asked for, or that is called as is usual; W&B puts the run before it."""
    if wanted is None:
        return next((c for name in usual for c in cells.columns if c.lower().split(" - ")[-1] == name), None)
    if wanted not in cells.columns:
        raise _unknown(cells, argument, wanted)
    return wanted


def _unknown(cells: Cells, argument: str, wanted: Any) -> ValueError:
    return ValueError(
        f"{cells.where}: no column {wanted!r} among {_checks.listed(cells.columns)}. Pass one as {argument}=."
    )


def _names(cells: Cells, columns: Any, taken: set[str | None], norm: str) -> dict[str, str]:
    """The name of the leaf of each column that is chosen, in their order."""
    filled = set(np.unique(np.asarray(cells.column, int)).tolist())
    if columns is None:
        numeric = [
            c for c, k in cells.columns.items() if k in filled and c not in taken and not BANDS.fullmatch(c)
        ]
        found = _guessed(cells, numeric, norm)
    elif isinstance(columns, str | re.Pattern):
        found = _matching(cells, columns)
    else:
        found = {}
        for column in columns:
            if not isinstance(column, str):
                raise TypeError(f"{cells.where}: columns has {column!r}. Pass the names of columns.")
            if column not in cells.columns:
                raise _unknown(cells, "columns", column)
            match = next(filter(None, (form.fullmatch(column) for form in NORMS)), None)
            found[column] = match["name"] if match else column
    if not found:
        raise ValueError(
            f"{cells.where}: no column holds norms, among {_checks.listed(cells.columns)}. Pass "
            "columns=, their names or a regular expression that has one group for the name."
        )
    first: dict[str, str] = {}
    for column, name in found.items():
        if first.setdefault(name, column) != column:
            raise ValueError(
                f"{cells.where}: columns {first[name]!r} and {column!r} both hold {name!r}. Pass columns= to "
                "choose those of one run."
            )
    # PyTorch's names are made paths. Names of ours that have dots are of leaves that do.
    dotted = not any("/" in name or OURS.fullmatch(column) for column, name in found.items())
    return {column: name.replace(".", "/") if dotted else name for column, name in found.items()}


def _guessed(cells: Cells, numeric: list[str], norm: str) -> dict[str, str]:
    plain = {c: c.split(" - ")[-1] for c in numeric}  # W&B puts the run before the name
    found = {c: name for c, name in plain.items() if not OTHERS.fullmatch(name)}
    for form in NORMS:
        matches = {c: match for c in numeric if (match := form.fullmatch(c))}
        if matches:
            _check_order(cells, matches, norm)
            found = {c: match["name"] for c, match in matches.items()}
            break
    else:
        found = _beside_total(found)
    parts = {c: name for c, name in found.items() if not TOTALS.fullmatch(name)}
    return parts or dict(list(found.items())[:1])


def _beside_total(found: dict[str, str]) -> dict[str, str]:
    """Beside a norm of all gradients stands any figure; those with a path's name may be norms of leaves."""
    total = next((x for x in found.values() if TOTALS.fullmatch(x) and "norm" in x.lower()), None)
    if total is None:
        return found
    head = total[: total.rfind("/") + 1]
    return {c: name for c, name in found.items() if TOTALS.fullmatch(name) or _is_path(name, head)}


def _is_path(name: str, head: str) -> bool:
    """Whether a name may be a leaf's; one that begins as a total does, with `head`, takes a dot for that."""
    return "." in name or ("/" in name and not (head and name.startswith(head)))


def _check_order(cells: Cells, matches: dict[str, re.Match[str]], norm: str) -> None:
    for column, match in matches.items():
        order = match.groupdict().get("order")
        called = None if order is None else ORDERS.get(float(order), f"lp({float(order)})")
        if called not in (None, norm):
            raise ValueError(
                f"{cells.where}: column {column!r} holds {called} norms, and norm is {norm!r}. Pass "
                f"norm={called!r}, or columns= to choose others."
            )


def _matching(cells: Cells, pattern: str | re.Pattern[str]) -> dict[str, str]:
    compiled = _patterns.compiled(cells.where, f"columns={pattern!r}", pattern)
    if compiled.groups != 1:
        raise ValueError(
            f"{cells.where}: columns={compiled.pattern!r} has {compiled.groups} groups. Put parentheses "
            "around the name, and only there; (?:...) groups without counting."
        )
    found = {column: compiled.search(column) for column in cells.columns}
    return {column: match[1] for column, match in found.items() if match and match[1]}


def _of(cells: Cells, *columns: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each number in these columns: its record, which of the columns, and its value."""
    place = np.full(len(cells.columns), -1)
    place[[cells.columns[column] for column in columns]] = np.arange(len(columns))
    own = place[np.asarray(cells.column, int)]
    chosen = own >= 0
    return np.asarray(cells.record, int)[chosen], own[chosen], np.asarray(cells.value, float)[chosen]


def _steps(
    cells: Cells, columns: list[str], step: str | None, loss: str | None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """The first line and the number of each step, and the step that each record is of; -1: of none."""
    lines = np.asarray(cells.lines, int)
    used = np.zeros(len(lines), bool)
    used[_of(cells, *columns)[0]] = True
    if step is None:
        return lines[used], None, np.where(used, np.cumsum(used) - 1, -1)
    number = np.full(len(lines), np.nan)
    record, _, value = _of(cells, step)
    number[record] = value
    lacking = lines[used & np.isnan(number)]
    if len(lacking):
        raise ValueError(f"{cells.where}, line {lacking[0]} has norms and no {step!r}. Give it its number.")
    if loss is not None:
        used[_of(cells, loss)[0]] = True
        used &= ~np.isnan(number)
    lines, own = lines[used], number[used]
    strange = np.flatnonzero((own < 0) | (own > LAST_STEP) | (own != np.floor(own)))
    if len(strange):
        raise ValueError(
            f"{cells.where}, line {lines[strange[0]]}: {step!r} is {own[strange[0]]:.16g}. Steps are whole "
            "numbers from 0; pass step= to choose another column."
        )
    back = np.flatnonzero(np.diff(own) < 0)
    if len(back):
        at = back[0] + 1
        raise ValueError(
            f"{cells.where}, line {lines[at]}: step {own[at]:.0f} comes after step {own[at - 1]:.0f}. Sort "
            "the lines, or cut the log where the run was resumed."
        )
    first = np.diff(own, prepend=-1) > 0
    of_record = np.full(len(used), -1)
    of_record[used] = np.cumsum(first) - 1
    return lines[first], own[first].astype(np.int64), of_record


def _norms(
    cells: Cells, columns: list[str], lines: np.ndarray, of_record: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The norms, `(steps with norms, columns)`, and which steps those are."""
    record, place, value = _of(cells, *columns)
    at = np.asarray(cells.lines, int)[record]
    for k in np.flatnonzero(value < 0)[:1]:
        raise ValueError(
            f"{cells.where}, line {at[k]}: {value[k]:g} in column {columns[place[k]]!r} is no norm: it is "
            "negative. Pass columns= to choose others."
        )
    step, width = of_record[record], len(columns)
    order = np.argsort(step * width + place, kind="stable")
    for k in np.flatnonzero(np.diff((step * width + place)[order]) == 0)[:1]:
        raise ValueError(
            f"{cells.where}, line {at[order[k + 1]]}: {columns[place[order[k]]]!r} comes twice in one step, "
            f"before in line {at[order[k]]}. Pass step= to choose another column, or cut the log."
        )
    counts = np.bincount(step, minlength=len(lines))
    for k in np.flatnonzero((counts > 0) & (counts < width))[:1]:
        missing = sorted(set(range(width)) - set(place[step == k].tolist()))
        raise ValueError(
            f"{cells.where}, line {lines[k]}: the step has {counts[k]} of {width} norms, not "
            f"{_checks.listed((columns[j] for j in missing), 4)}. Pass columns= to leave these out."
        )
    return value[order].reshape(-1, width), counts > 0
