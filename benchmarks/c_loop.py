"""Clipping by the global norm in C, compiled when it is first needed: the limit that memory sets."""

import ctypes
import functools
import math
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

CHUNK = 1 << 15  # entries: two passes of one fit the cache, and there are chunks for many threads
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
SOURCE = Path(__file__).with_name("clip.c")
TEMPORARY = "optaxclip-benchmarks-"


class Unavailable(Exception):
    """Why there is no compiled loop, in words for a report."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled loop.

    Raises:
      Unavailable: if there is no compiler, or it fails.
    """
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        built = Path(folder) / "clip.so"
        command = [_compiler(), *FLAGS, str(SOURCE), "-o", str(built), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"the C compiler failed: {done.stderr.strip()[:200]}")
        return ctypes.CDLL(str(built))


def unavailable() -> str | None:
    """Why there is no compiled loop; None if there is one."""
    try:
        library()
    except Unavailable as why:
        return str(why)
    return None


def version() -> str:
    """What compiles the loop, or why nothing does."""
    if why := unavailable():
        return why
    said = subprocess.run([_compiler(), "--version"], capture_output=True, text=True, check=False)
    return said.stdout.partition("\n")[0]


def _compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc")
    if found is None:
        raise Unavailable("no C compiler")
    return found


class Loop:
    """The loop over a tree of arrays of one dtype, float32 or bfloat16, on the CPU.

    It writes into the memory of JAX's arrays, so that its memory is placed as JAX's own is. Nobody else may
    hold or read them meanwhile.
    """

    def __init__(self, tree: Any, threads: int):
        self.leaves = [jax.block_until_ready(leaf) for leaf in jax.tree.leaves(tree)]
        (dtype,) = {leaf.dtype for leaf in self.leaves}
        self.clip = getattr(library(), f"clip_{dtype.name}")
        self.clip.restype = ctypes.c_double
        chunks, sizes = [], []
        for leaf in self.leaves:
            start = leaf.unsafe_buffer_pointer()
            for k in range(math.ceil(leaf.size / CHUNK)):
                chunks.append(start + k * CHUNK * dtype.itemsize)
                sizes.append(min(CHUNK, leaf.size - k * CHUNK))
        self.chunks, self.sizes = np.array(chunks, np.uintp), np.array(sizes, np.int64)
        self.threads = threads

    def __call__(self, limit: float) -> float:
        """Scales all entries so that their norm is at most `limit`; returns the norm before."""
        return self.clip(
            self.chunks.ctypes.data_as(ctypes.c_void_p),
            self.sizes.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(len(self.sizes)),
            ctypes.c_double(limit),
            ctypes.c_int(self.threads),
        )
