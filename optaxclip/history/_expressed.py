"""Recordings and groupings as advice can put them into a line of code."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from optaxclip import groups as _groups
from optaxclip._base import Groups
from optaxclip.history._rows import UNKNOWN, Row


class Grouping(NamedTuple):
    """A grouping, once as an object and once as code."""

    groups: Groups
    code: str


WHOLE = Grouping(_groups.whole(), "oc.groups.whole()")
LAYER = Grouping(_groups.layer(), "oc.groups.layer()")
LEAF = Grouping(_groups.leaf(), "oc.groups.leaf()")


def plain(history: Any) -> Any:
    """A recording of whole leaves, or of several together, in L2 norms where these can be had.

    Rows that are parts of leaves, one for each unit or each of stacked layers, are put together.
    """
    if history.norm == "rms":
        root = np.sqrt(history.sizes)
        given = {key: getattr(history, key) for key in ("norms", "params", "start")}
        lengths = {key: None if value is None else value * root for key, value in given.items()}
        history = history._with(norm="l2", **lengths)
    if not any(row.at for row in history.rows):
        return history
    if history.norm == "spectral":
        raise ValueError(
            "History.advise: the rows are singular values of parts of leaves, and do not give those of whole "
            "leaves. Record with groups.leaf()."
        )
    return next(h for h in (coarser(history, by) for by in (LEAF, LAYER, WHOLE)) if h is not None)


def coarser(history: Any, by: Grouping) -> Any:
    """The recording regrouped; None if its rows are coarser than that."""
    try:
        return history.regroup(by.groups)
    except ValueError:
        return None


def finest(history: Any) -> Grouping:
    """The grouping whose groups are the rows of a recording of whole leaves."""
    deepest = max((len(source.keys) for row in history.rows for source in row.sources), default=0)
    depths = (Grouping(_groups.depth(k), f"oc.groups.depth({k})") for k in range(1, deepest))
    for by in (LEAF, LAYER, WHOLE, *depths):
        found = coarser(history, by)
        # Limits are given by name.
        if found is not None and sorted(found.names) == sorted(history.names):
            return by
    return only(history.rows)


def only(rows: Iterable[Row]) -> Grouping:
    """The grouping of some rows; other leaves are left alone."""
    rules: dict[Any, Any] = {}
    for row in rows:
        patterns = list(dict.fromkeys(_pattern(source.keys) for source in row.sources))
        rules[literal(called(row))] = patterns[0] if len(patterns) == 1 else patterns
    rules[None] = ".*"
    return Grouping(_groups.regex(rules), f"oc.groups.regex({rules!r})")


def _pattern(keys: tuple[str, ...]) -> str:
    """What matches the path of a leaf; of all leaves that hang off a layer where those are not known."""
    if keys and keys[-1] in UNKNOWN:
        return f"^{re.escape(''.join(f'{key}/' for key in keys[:-1]))}[^/]+$"
    return f"^{re.escape('/'.join(keys))}$"


def literal(name: str) -> str:
    """A name that stands for itself in `groups.regex`, where names are templates of what was matched."""
    return name.replace("\\", r"\\")


def called(row: Row) -> str:
    """The name of a group; an array that is the whole tree has none of its own."""
    return row.name or _groups.ROOT


def norm_code(name: str) -> str:
    """The code of a norm of this name."""
    return f"oc.norms.{name}" if name.startswith("lp(") else f"oc.norms.{name}()"
