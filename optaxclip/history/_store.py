"""Recordings as files: their arrays, and a JSON header for the rest."""

import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from optaxclip import _checks
from optaxclip.history import _npz
from optaxclip.history._recording import Run, Stretch
from optaxclip.history._rows import Row, Source

FORMAT, VERSION = "optaxclip.History", 1

# Objects take up to twenty-four times the bytes of the JSON they are made of (empty ones: three bytes, and an
# object of 64 in a list), and are made before they can be counted; three more times is the text itself.
OBJECTS = 27


class _Form(NamedTuple):
    """What an array must be: `f` float64, `i` int32 or int64; and what its axes count."""

    kind: str
    axes: tuple[str, ...]


NEEDED = {"norms": _Form("f", ("steps", "rows")), "steps": _Form("i", ("steps",))}
OPTIONAL = {
    "loss": _Form("f", ("steps",)),
    "params": _Form("f", ("steps", "rows")),
    "start": _Form("f", ("rows",)),
    "sizes": _Form("f", ("rows",)),
}
COUNTS = ("largest_step", "nonfinite", "entries", "first", "first_entries")
STRETCH = {
    "median": _Form("f", ("stretches", "rows")),
    "largest": _Form("f", ("stretches", "rows")),
    "loss_median": _Form("f", ("stretches",)),
    "loss_largest": _Form("f", ("stretches",)),
}
RUN = {
    "edges": _Form("f", ("edges",)),
    "histogram": _Form("i", ("rows", "bins")),
    "largest": _Form("f", ("rows",)),
    **dict.fromkeys(COUNTS, _Form("i", ("rows",))),
}
OF_RUN = {f"run.{key}": form for key, form in RUN.items()} | {
    f"run.stretches.{key}": form for key, form in STRETCH.items()
}
FORMS = NEEDED | OPTIONAL | OF_RUN

_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    RuntimeError,  # of zipfile: a password is needed; of json: nested too deeply
)


def save(history: Any, path: Any) -> None:
    """Writes a `History` to a file, all of it or nothing."""
    arrays = {key: getattr(history, key) for key in (*NEEDED, *OPTIONAL)}
    if history.run is not None:
        arrays |= {f"run.{key}": getattr(history.run, key) for key in RUN}
        arrays |= {f"run.stretches.{key}": getattr(history.run.stretches, key) for key in STRETCH}
    header = json.dumps(_header(history)).encode()
    plain = {"header": np.frombuffer(header, np.uint8)}
    plain |= {key: _plain(array, FORMS[key].kind) for key, array in arrays.items() if array is not None}
    _npz.write(path, plain)


def _header(history: Any) -> dict[str, Any]:
    """All that is no array; leaves that several rows have are written once."""
    sources = {
        source: k for k, source in enumerate(dict.fromkeys(s for r in history.rows for s in r.sources))
    }
    run = history.run
    return {
        "format": FORMAT,
        "version": VERSION,
        "norm": history.norm,
        "run": None if run is None else {"updates": int(run.updates), "length": int(run.stretches.length)},
        "sources": [
            [list(s.keys), None if s.shape is None else [int(n) for n in s.shape], [int(a) for a in s.axes]]
            for s in sources
        ],
        "rows": [
            [row.name, [sources[s] for s in row.sources], [int(at) for at in row.at]] for row in history.rows
        ],
    }


def _plain(array: Any, kind: str) -> np.ndarray:
    array = np.asarray(array)
    dtype = "<f8" if kind == "f" else "<i4" if array.dtype == np.int32 else "<i8"
    return np.ascontiguousarray(array, dtype)


def load(path: Any, max_bytes: int, make: Callable[..., Any]) -> Any:
    """The `History` in a file, made by `make` of its rows, its norms, which norm they are, and all else."""
    where = "History.load"
    _checks.whole_number(where, least=1, max_bytes=max_bytes)
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return _read(archive, max_bytes, make)
        except _DAMAGED as error:
            why = str(error).rstrip(".") or type(error).__name__
            raise ValueError(
                f"{where}: {os.fspath(path)!r} holds no recording that can be read: {why}. Pass a file that "
                "History.save wrote."
            ) from error


def _read(archive: zipfile.ZipFile, max_bytes: int, make: Callable[..., Any]) -> Any:
    members = _npz.members(archive, max_bytes, {"header": OBJECTS})
    if "header" not in members:
        raise ValueError("it is a zip without 'header.npy'")
    header = _header_of(archive, members.pop("header"))
    run = header["run"]
    asked = {*NEEDED, *(OF_RUN if run is not None else ())}
    missing, strange = asked - set(members), set(members) - asked - set(OPTIONAL)
    if missing:
        raise ValueError(f"{min(missing)!r} is missing")
    if strange:
        raise ValueError(f"{min(strange)!r} is no part of a recording")
    rows = _rows_of(header)
    lengths, arrays = {"rows": len(rows)}, {}
    for key, info in members.items():
        form = FORMS[key]
        array = arrays[key] = _npz.read(archive, info, form.kind, len(form.axes))
        if any(lengths.setdefault(axis, n) != n for axis, n in zip(form.axes, array.shape, strict=True)):
            raise ValueError(f"{key!r} has shape {array.shape}, which does not fit the rest")
    given = {key: arrays.get(key) for key in ("steps", *OPTIONAL)}
    if run is not None:
        given["run"] = _run_of(run, arrays, lengths)
    return make(rows, arrays["norms"], header["norm"], **given)


def _header_of(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> dict[str, Any]:
    text = _npz.read(archive, info, "u", 1).tobytes()
    try:
        header = json.loads(text.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is no JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"its header does not say {FORMAT!r}")
    version = header.get("version")
    if type(version) is not int or version < 1:
        raise ValueError(f"its version is {version!r:.40}")
    if version > VERSION:
        raise ValueError(
            f"it has version {version}, and this optaxclip knows {VERSION}: a newer one is needed"
        )
    if set(header) != {"format", "version", "norm", "run", "sources", "rows"}:
        raise ValueError("its header has not the keys that it should have")
    if not isinstance(header["norm"], str):
        raise ValueError("its norm has no name")
    return header


def _numbers(value: Any) -> tuple[int, ...]:
    """A list of integers from 0 that NumPy can count with."""
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**63 for n in value):
        raise ValueError("its header has something else where whole numbers should be")
    return tuple(value)


def _listed(value: Any, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or length not in (None, len(value)):
        raise ValueError("its header has something else where a list should be")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("its header has something else where a name should be")
    return value


def _rows_of(header: dict[str, Any]) -> tuple[Row, ...]:
    sources = []
    for source in _listed(header["sources"]):
        keys, shape, axes = _listed(source, 3)
        shape, axes = None if shape is None else _numbers(shape), _numbers(axes)
        if any(axis >= len(shape or ()) for axis in axes):
            raise ValueError("a leaf has fewer axes than its header says")
        sources.append(Source(tuple(_text(key) for key in _listed(keys)), shape, axes))
    rows, counts = [], [0] * len(sources)
    last: list[tuple[int, ...]] = [()] * len(sources)
    for row in _listed(header["rows"]):
        name, own, at = _listed(row, 3)
        own, at = _numbers(own), _numbers(at)
        if not own or any(k >= len(sources) or len(sources[k].axes) != len(at) for k in own):
            raise ValueError(f"row {name!r:.80} is of leaves that its header has not")
        for k in own if at else ():
            if any(index >= n for index, n in zip(at, _along(sources[k]), strict=True)) or last[k] >= at:
                raise ValueError(f"row {name!r:.80} is of an index that its leaf has not, or had before")
            last[k], counts[k] = at, counts[k] + 1
        rows.append(Row(_text(name), tuple(sources[k] for k in own), at))
    for source, count in zip(sources, counts, strict=True):
        # Regrouping lists all indices that a leaf has.
        if 0 < count < math.prod(_along(source)):
            raise ValueError(f"leaf {'/'.join(source.keys)!r:.80} has rows for {count} of its indices")
    return tuple(rows)


def _along(source: Source) -> tuple[int, ...]:
    """How many indices there are along the axes of a leaf that has a row for each."""
    return tuple((source.shape or ())[axis] for axis in source.axes)


def _run_of(run: Any, arrays: dict[str, np.ndarray], lengths: dict[str, int]) -> Run:
    if not isinstance(run, dict) or set(run) != {"updates", "length"}:
        raise ValueError("its header does not say how long the run was")
    updates, length = _numbers([run["updates"], run["length"]])
    if lengths["edges"] != lengths["bins"] + 1:
        raise ValueError("its histogram has not one edge more than bins")
    of_run = {key: arrays[f"run.{key}"] for key in RUN}
    thinned = {key: arrays[f"run.stretches.{key}"] for key in STRETCH}
    return Run(updates=updates, **of_run, stretches=Stretch(length, **thinned))
