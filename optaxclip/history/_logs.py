"""Norms from the logs of any framework: metrics dicts, CSV, JSON lines."""

import codecs
import contextlib
import csv
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import jax

from optaxclip import _checks
from optaxclip.history._columns import Cells, arguments, number_in

# Lines are held in memory one at a time. A line with the norms of a hundred thousand parameters is shorter.
LONGEST_LINE = 2**24


def from_metrics(
    metrics: Iterable[Mapping[str, Any]], head: str, loss: str | None, step: str | None, norm: str
) -> dict[str, Any]:
    """The arguments of `History` that a list of metrics holds."""
    where, rows = "History.from_metrics", list(metrics)
    for k, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"{where}: entry {k} is of type {type(row).__name__}. Pass dicts of oc.metrics.")
    keys = [key for key in rows[0] if key.startswith(head)] if rows else []
    if not keys:
        held = _checks.listed(rows[0]) if rows else "no dicts"
        raise ValueError(f"{where}: no key starts with {head!r} among {held}. Pass prefix= and statistic=.")
    keys = [key for key in keys if key != f"{head}whole"] or keys
    wanted = [*keys, *(key for key in (loss, step) if key is not None)]
    for k, row in enumerate(rows):
        strange = [key for key in row if key.startswith(head) and key not in rows[0]]
        missing = [key for key in wanted if row.get(key) is None]
        if missing or strange:
            raise ValueError(
                f"{where}: entry {k} {'lacks' if missing else 'has'} {(missing or strange)[0]!r}, entry 0 "
                f"has {_checks.listed(keys, 4)}. Pass dicts of the same keys."
            )
    found = jax.device_get([[row[key] for key in wanted] for row in rows])
    columns = dict(zip(wanted, zip(*found, strict=True), strict=True))
    return {
        "names": [key.removeprefix(head) for key in keys],
        "norms": list(zip(*(columns[key] for key in keys), strict=True)),
        "steps": None if step is None else columns[step],
        "loss": None if loss is None else columns[loss],
        "norm": norm,
    }


def _lines(where: str, file: IO[bytes]) -> Iterator[str]:
    """The lines of a file of UTF-8 text, without a byte order mark."""
    for number in itertools.count(1):
        line = file.readline(LONGEST_LINE + 1)
        if not line:
            return
        if len(line) > LONGEST_LINE:
            raise ValueError(f"{where}, line {number} has more than {LONGEST_LINE} bytes. Pass a log.")
        try:
            yield (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}, line {number} is no UTF-8 text: {error}. Pass a log.") from error


def from_csv(path: Any, delimiter: str | None, **options: Any) -> dict[str, Any]:
    """The arguments of `History` that a CSV file holds."""
    if delimiter is not None and not (isinstance(delimiter, str) and re.fullmatch(r'[^"\r\n]', delimiter)):
        raise ValueError(f"History.from_csv: delimiter is {delimiter!r}. Pass a character, or None to guess.")
    where = f"History.from_csv: {os.fspath(path)!r}"
    with open(path, "rb") as file:
        lines = _lines(where, file)
        blank, first = 0, next(lines, "")
        while first.isspace():
            blank, first = blank + 1, next(lines, "")
        if not first:
            raise ValueError(f"{where} is empty. Pass a log with a line of names and lines of numbers.")
        by = _delimiter(first) if delimiter is None else delimiter
        reader = csv.reader(itertools.chain([first], lines), delimiter=by, skipinitialspace=by != " ")
        try:
            cells = _read(where, reader, blank)
        except csv.Error as error:
            raise ValueError(f"{where}, line {blank + reader.line_num}: {error}. Mend the line.") from error
    return arguments(cells, **options)


def _delimiter(first: str) -> str:
    """What divides a line into most cells."""
    with contextlib.suppress(csv.Error):
        return max(",;\t|", key=lambda by: len(next(csv.reader([first], delimiter=by))))
    return ","


def _read(where: str, reader: Any, blank: int) -> Cells:
    """The cells of a CSV file whose first `blank` lines have been skipped."""
    names = [name.strip() for name in next(reader)]
    if all(number_in(name) is not None for name in names):
        raise ValueError(f"{where} begins with numbers. Put a line with the names of the columns first.")
    known = list(filter(None, names))
    if len(set(known)) < len(known):
        twice = next(name for name in known if known.count(name) > 1)
        raise ValueError(f"{where} has two columns {twice!r}. Give each its own name.")
    cells = Cells(where, known)
    for record in reader:
        line = blank + reader.line_num
        if not any(record):
            continue
        if len(record) != len(names):
            raise ValueError(
                f"{where}, line {line} has {len(record)} cells among {len(names)} columns. Mend the line, or "
                "pass delimiter=."
            )
        cells.add(line, ((name, cell) for name, cell in zip(names, record, strict=True) if name))
    return cells


def from_jsonl(path: Any, **options: Any) -> dict[str, Any]:
    """The arguments of `History` that a JSON-lines file holds."""
    where = f"History.from_jsonl: {os.fspath(path)!r}"
    cells = Cells(where)
    with open(path, "rb") as file:
        for number, line in enumerate(_lines(where, file), 1):
            if line.isspace():
                continue
            try:
                record = json.loads(line, parse_int=float)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{where}, line {number} is no JSON: {error}. Mend it; if writing was cut off, delete it."
                ) from error
            if not isinstance(record, dict):
                raise ValueError(f"{where}, line {number} is no object. Pass a log of one object a line.")
            cells.add(number, record.items())
    return arguments(cells, **options)
