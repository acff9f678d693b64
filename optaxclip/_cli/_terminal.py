"""What the commands share: reading files, errors in one line, output for people and for programs."""

import contextlib
import functools
import inspect
import json
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import optaxclip
from optaxclip.history import History, _tables

ZIP = b"PK\x03\x04", b"PK\x05\x06"  # how a zip begins, and one that holds nothing
BIG = 2**23  # bytes of a log that take about a second to read
WIDE = 96  # characters of a line of prose, at most


def plainly(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors are one line on stderr."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            with warnings.catch_warnings(action="ignore"):
                command(*args, **options)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except OSError as error:
            name = f"{os.fspath(error.filename)!r}: " if error.filename else ""
            _fail(f"{name}{error.strerror or error}")
        except (ValueError, TypeError) as error:
            _fail(str(error))
        except ImportError as error:
            _fail(str(error), code=2)
        except Exception as error:  # nobody wants to read a traceback
            _fail(f"unexpected {type(error).__name__}: {error}")

    run.__signature__ = inspect.signature(command)  # type: ignore[attr-defined]
    return run


def _fail(message: str, code: int = 1) -> None:
    print(f"optaxclip: {_tables.printable(' '.join(message.split()))}", file=sys.stderr)
    raise typer.Exit(code)


def read(
    file: Path,
    columns: list[str] | None,
    step: str | None,
    loss: str | None,
    norm: str | None,
    rows: str,
    groups: str,
) -> History:
    """The recording in a file, of whichever kind."""
    grouping = _grouping(groups)
    given = {"columns": columns, "step": step, "loss": loss, "norm": norm}
    given["rows"] = None if rows == "leaf" else rows
    options = {key: value for key, value in given.items() if value}
    if columns:
        names = [name for part in columns for name in part.split(",")]
        options["columns"] = columns[0] if len(columns) == 1 and "(" in columns[0] else names
    with file.open("rb") as opened:
        start = opened.read(2**16)
    kind = kind_of(file, start)
    if kind == "npz" and options:
        raise typer.BadParameter("a saved recording has its own.", param_hint=f"--{next(iter(options))}")
    with _progress(file):
        reader = {"npz": History.load, "jsonl": History.from_jsonl, "csv": History.from_csv}[kind]
        history = reader(file, **options)
    return history if grouping is None else history.regroup(grouping)


def kind_of(file: Path, start: bytes) -> Literal["npz", "jsonl", "csv"]:
    """What a file is by its first bytes, and by its name where these leave it open."""
    if start.startswith(ZIP) or file.suffix == ".npz":
        return "npz"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if b"\0" in start or not text:
        what = "neither a recording nor text" if text else "empty"
        raise ValueError(f"{str(file)!r} is {what}. Pass a file of History.save, CSV or JSON lines.")
    return "jsonl" if text.startswith(b"{") or file.suffix in (".jsonl", ".ndjson", ".json") else "csv"


def _grouping(groups: str) -> Any:
    if groups == "leaf":
        return None
    if groups == "layer":
        return optaxclip.groups.layer()
    kind, _, levels = groups.partition(":")
    if kind == "depth" and levels.isdecimal():
        return optaxclip.groups.depth(int(levels))
    raise typer.BadParameter(f"{groups!r} is none of leaf, layer, depth:K.", param_hint="--groups")


@contextlib.contextmanager
def _progress(file: Path) -> Iterator[None]:
    """A moving bar on stderr while a large file is read; none where nobody would see it."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    if not console.is_terminal or file.stat().st_size < BIG:
        yield
        return
    with Progress(*columns, console=console, transient=True) as bar:
        bar.add_task(f"reading {_tables.printable(file.name, 30)}", total=None)
        yield


def stdout() -> Console:
    """Stdout; as wide as need be where it is no terminal."""
    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 10_000
    return console


def as_json(value: Any) -> None:
    """Prints a value as JSON, null for numbers that are not finite."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def print_comparison(found: Any) -> None:
    """Prints a `Comparison`: policies below each other where a table is too wide."""
    console, table = stdout(), found.table()
    if Measurement.get(console, console.options.update_width(10_000), table).maximum <= console.width:
        console.print(table)
        return
    head, *lines = found.cells()
    for name, *cells in lines:
        console.print(name)
        for key, cell in zip(head[1:], cells, strict=True):
            console.print(f"  {key}: {cell}")


def print_advice(said: Any) -> None:
    """Prints an `Advice`, its sentences as wide as the terminal, its code in one line to be copied."""
    head, *_ = str(said).split("\n  - ")
    print(head if said.reasons else said.code)
    width = min(stdout().width, WIDE)
    for reason in said.reasons:
        print(textwrap.fill(reason, width, initial_indent="  - ", subsequent_indent="    "))
    if said.comparison is not None:
        print()
        print_comparison(said.comparison)
    elif said._end():
        print(f"\n{said._end()}")
