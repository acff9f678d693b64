"""What the clip alone is held against besides Optax: C, PyTorch, a copy, and a program that does nothing."""

import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import c_loop, environment, programs, pytorch, trees
from benchmarks.methods import LIMIT
from benchmarks.trees import Tree

Measure = Callable[[int], float]
NAMES = ("c_loop", "copy", "identity", "torch_global", "torch_leafwise")


def available(tree: Tree, dtype: str, size: float) -> dict[str, Measure]:
    """Each reference that there is here, as a function of a number of calls that gives seconds per call.

    The loop in C is the limit on the CPU. Anywhere else it is `copy`, one array that is multiplied in place,
    which reads and writes what a clip reads twice and writes. `size` is the standard deviation of the
    gradients.
    """

    def grads() -> Any:
        return trees.normal(tree, trees.GRADS[dtype], seed=1, size=size)

    made: dict[str, Measure] = {"identity": _chained(programs.identity(tree, dtype).compiled(), grads())}
    if jax.default_backend() != "cpu":
        one = Tree("one", {"all": {"entries": (tree.entries,)}})
        (array,) = jax.tree.leaves(trees.normal(one, trees.GRADS[dtype], seed=1, size=size))
        made["copy"] = _chained(programs.scaled(tree, dtype).compiled(), array)
    elif c_loop.unavailable() is None:
        made["c_loop"] = _repeated(c_loop.Loop(grads(), environment.cores()))
    if pytorch.unavailable() is None:
        made["torch_global"] = _repeated(pytorch.Clip(grads(), environment.cores(), each=False))
        made["torch_leafwise"] = _repeated(pytorch.Clip(grads(), environment.cores(), each=True))
    return {name: made[name] for name in NAMES if name in made}


def versions() -> dict[str, str]:
    """What the references were made with, or why they are left out."""
    on_cpu = jax.default_backend() == "cpu"
    return {"torch": pytorch.version(), "C": c_loop.version() if on_cpu else "on the CPU only"}


def _repeated(clip: Callable[[float], Any]) -> Measure:
    """A clip that takes the same time whatever the entries: no need to let them grow back."""

    def measure(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            clip(LIMIT)
        return (time.perf_counter() - start) / calls

    return measure


def _chained(program: Any, first: Any) -> Measure:
    """A program whose output is its next input; each call is waited for."""
    current = jax.block_until_ready(first)

    def measure(calls: int) -> float:
        nonlocal current
        start = time.perf_counter()
        for _ in range(calls):
            current = jax.block_until_ready(program(current))
        return (time.perf_counter() - start) / calls

    return measure
