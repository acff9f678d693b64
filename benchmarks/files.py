"""Runs as JSON files, and what several of them measured, put together."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from benchmarks.results import Row
from benchmarks.timing import Spread

Head: TypeAlias = tuple[str, str, str, str]


class Run(NamedTuple):
    """What one call of the command measured.

    Attributes:
      environment: the device, versions, date and command.
      rows: all results.
    """

    environment: Mapping[str, Any]
    rows: Sequence[Row]

    def heads(self) -> set[Head]:
        """What was measured together, as suite, tree, dtypes and case."""
        return {row[:4] for row in self.rows}


def merged(runs: Sequence[Run]) -> list[Run]:
    """The runs without what a later one measured again: whole cases, since ratios are of one run."""
    kept, known = [], set()
    for run in reversed(runs):
        rows = [row for row in run.rows if row[:4] not in known]
        known |= run.heads()
        kept += [Run(run.environment, rows)] if rows else []
    return kept[::-1]


def by_device(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each device."""
    devices = dict.fromkeys(str(run.environment["device"]) for run in runs)
    return {name: merged([run for run in runs if run.environment["device"] == name]) for name in devices}


def write_json(path: Path, runs: Sequence[Run]) -> None:
    """Writes all that was measured."""
    plain = [{"environment": run.environment, "rows": list(map(_plain, run.rows))} for run in runs]
    path.write_text(json.dumps({"runs": plain}, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> list[Run]:
    """What `write_json` wrote."""
    return [
        Run(run["environment"], [_row(row) for row in run["rows"]])
        for run in json.loads(path.read_text(encoding="utf-8"))["runs"]
    ]


def _plain(row: Row) -> dict[str, Any]:
    return row._asdict() | {"ratio": row.ratio and row.ratio._asdict()}


def _row(plain: Mapping[str, Any]) -> Row:
    return Row(**{**plain, "ratio": plain["ratio"] and Spread(**plain["ratio"])})
