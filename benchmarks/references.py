"""What is measured beside Optax: C, PyTorch and packages for it, a copy, and programs that do nothing."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import c_loop, environment, programs, pytorch, trees
from benchmarks.methods import LIMIT
from benchmarks.trees import Tree

Measure = Callable[[int], float]
TORCH = ("torch_none", "torch_foreach", "torch_loop", "torch_leafwise", *pytorch.PACKAGES)
NAMES = ("c_loop", "copy", "identity", "scaled_leaves", *TORCH)


def alone(tree: Tree, dtype: str, size: float) -> dict[str, Measure]:
    """What the clip alone is held against, as functions of a number of calls that give seconds per call.

    The loop in C is the limit on the CPU. Anywhere else it is `copy`, one array that is multiplied in place,
    which moves as many bytes as a clip has to. `size` is the standard deviation of the gradients.
    """

    def grads() -> Any:
        return trees.normal(tree, trees.GRADS[dtype], seed=1, size=size)

    made: dict[str, Measure] = {"identity": _chained(programs.identity(tree, dtype).compiled(), grads())}
    if jax.default_backend() != "cpu":
        made["copy"] = _copy("alone", tree, dtype)
    elif c_loop.unavailable() is None:
        made["c_loop"] = _repeated(c_loop.Loop(grads(), environment.cores()))
    if pytorch.unavailable() is None:
        for name, clip in _clips().items():
            own = pytorch.Gradients(grads(), environment.cores())
            made[name] = functools.partial(pytorch.measure_clip, own, functools.partial(clip, own))
    for name, package in pytorch.PACKAGES.items():
        if pytorch.unavailable(package) is None:
            own = pytorch.Gradients(grads(), environment.cores())
            made[name] = pytorch.Packaged(package, own, grows=size == 1).measure
    return {name: made[name] for name in NAMES if name in made}


def steps(tree: Tree, dtype: str, size: float) -> dict[str, Measure]:
    """What a step is held against besides others: PyTorch's, and a copy elsewhere than on the CPU.

    PyTorch's gradients have the dtype of its parameters: there is none for `mixed`.
    """
    made: dict[str, Measure] = {}
    if jax.default_backend() != "cpu":
        made["copy"] = _copy("step", tree, dtype)
    if pytorch.unavailable() is None and dtype != "mixed":
        own = pytorch.Gradients(trees.normal(tree, dtype, seed=1, size=size), environment.cores())
        training = pytorch.Training(own)
        made["torch_none"] = functools.partial(training.measure, lambda: None)
        for name in ("torch_foreach", "torch_loop"):
            made[name] = functools.partial(training.measure, functools.partial(_clips()[name], own))
    return made


def versions() -> dict[str, str]:
    """What the references were made with, or why they are left out."""
    on_cpu = jax.default_backend() == "cpu"
    return pytorch.versions() | {"C": c_loop.version() if on_cpu else "on the CPU only"}


def _clips() -> dict[str, Callable[[pytorch.Gradients], None]]:
    """PyTorch's `clip_grad_norm_` in both of its forms, and of each leaf by itself."""
    return {
        "torch_foreach": lambda grads: grads.clip(LIMIT, foreach=True),
        "torch_loop": lambda grads: grads.clip(LIMIT, foreach=False),
        "torch_leafwise": lambda grads: grads.clip_each(LIMIT),
    }


def _copy(suite: str, tree: Tree, dtype: str) -> Measure:
    program = programs.copied(suite, tree, dtype)
    return _chained(program.compiled(), jax.numpy.ones(program.args[0].shape, program.args[0].dtype))


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
