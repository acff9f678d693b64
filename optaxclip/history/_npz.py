"""Plain arrays in a zip, as `numpy.savez` writes them: replaced as a whole, read with nothing executed."""

import contextlib
import errno
import math
import os
import re
import secrets
import zipfile
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

# The one form that NumPy writes plain arrays in, which takes no evaluating of Python to read.
_NPY = re.compile(
    rb"\{'descr': '([<>|][fiu][148])', 'fortran_order': False, "
    rb"'shape': \((\d+,|\d+(?:, \d+)+)\), \} *\n"
)
_MAGIC = b"\x93NUMPY\x01\x00"
_PART = 2**20  # bytes read at a time, so that there is never a second copy of an array


def write(path: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes beside the file, and puts that in its place when all is on disk."""
    path = os.path.realpath(path)
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), folder)
    temporary = os.path.join(folder, f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            _pack(file, arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def _pack(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, array in arrays.items():
            info = zipfile.ZipInfo(f"{key}.npy")  # of no date: equal recordings are equal files
            info.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(info, "w", force_zip64=array.nbytes >= 2**30) as member:
                np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)


def members(archive: zipfile.ZipFile, max_bytes: int, times: Mapping[str, int]) -> dict[str, zipfile.ZipInfo]:
    """The arrays by name, none of which is read before all are known to be small enough together.

    Args:
      archive: where they are.
      max_bytes: how many bytes they may take.
      times: how often the bytes of a part count, where that is not once.
    """
    infos = archive.infolist()
    found = {info.filename.removesuffix(".npy"): info for info in infos}
    if len(found) < len(infos):
        raise ValueError("a part comes twice")
    total = sum(times.get(name, 1) * info.file_size for name, info in found.items())
    if total > max_bytes:
        raise ValueError(f"it may take {total} bytes of memory, and max_bytes is {max_bytes}")
    for info in infos:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{info.filename!r} is compressed in an unknown way")
    return found


def read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, kind: str, axes: int) -> np.ndarray:
    """One array; the shape it declares is held against the bytes that there are before they are read.

    Args:
      archive: where it is.
      info: which it is.
      kind: `f` for float64, `i` for int32 or int64, `u` for bytes.
      axes: how many it must have.
    """
    with archive.open(info) as member:
        start = member.read(len(_MAGIC) + 2)
        length = int.from_bytes(start[len(_MAGIC) :], "little")
        match = _NPY.fullmatch(member.read(length)) if start[: len(_MAGIC)] == _MAGIC else None
        if match is None:
            raise ValueError(f"{info.filename!r} is no plain array of numbers")
        dtype, shape = np.dtype(match[1].decode()), tuple(map(int, match[2].rstrip(b",").split(b", ")))
        if dtype.kind != kind or dtype.itemsize not in {"f": (8,), "i": (4, 8), "u": (1,)}[kind]:
            raise ValueError(f"{info.filename!r} has dtype {dtype}")
        if len(shape) != axes:
            raise ValueError(f"{info.filename!r} has shape {shape}, and should have {axes} axes")
        size = info.file_size - len(start) - length
        if math.prod(shape) * dtype.itemsize != size:
            raise ValueError(f"{info.filename!r} has shape {shape} and {size} bytes")
        array = np.empty(shape, dtype)
        flat, done = array.reshape(-1).view(np.uint8), 0
        while part := member.read(_PART):
            flat[done : done + len(part)] = np.frombuffer(part, np.uint8)
            done += len(part)
    if done != size:
        raise ValueError(f"{info.filename!r} ends early")
    return array.astype(dtype.newbyteorder("="), copy=False)
