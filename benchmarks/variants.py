"""The library's methods with one thing left out or done in another way, to see what it is for.

What is exchanged is private, and only while a program is traced; JAX must have forgotten what it traced
before, and must forget what it then traced.
"""

import contextlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import optax
from jax import lax

from benchmarks import methods
from benchmarks.methods import Method
from benchmarks.trees import Tree
from optaxclip import _measure, _mesh, _scale


def _forced(name: str, on_cpu: bool) -> SimpleNamespace:
    """JAX's `lax`, where of two implementations one is for all platforms.

    The pair is known by the `name` of what is for the CPU: that, or the other one.
    """

    def chosen(*args: Any, cpu: Callable, default: Callable) -> Any:
        if cpu.__name__ == name:
            return (cpu if on_cpu else default)(*args)
        return lax.platform_dependent(*args, cpu=cpu, default=default)

    return SimpleNamespace(**{**vars(lax), "platform_dependent": chosen})


# What stands in place of what: module, name and value.
CHANGES: dict[str, tuple[tuple[Any, str, Any], ...]] = {
    # The entries go into the norm as the rest of the program knows them.
    "no_barrier": ((_mesh, "barrier", lambda arrays, scale: (list(arrays), [scale] * len(arrays))),),
    # Factors are read where they are made, as on other platforms than the CPU.
    "no_conditional": ((_scale, "lax", _forced("opaque", on_cpu=False)),),
    # Factors come out of a conditional, as on the CPU.
    "conditional": ((_scale, "lax", _forced("opaque", on_cpu=True)),),
    # Entries are read once, as they are, and nothing is read again.
    "no_loop": (
        (_measure, "_plain", lambda blocks: [True] * len(blocks)),
        (_measure, "_by_trial", lambda arrays, norm, start, at: (start.partial, start.scales)),
    ),
    # Entries are multiplied by a power of two before they are squared, large leaves too.
    "scaled_reads": ((_measure, "_plain", lambda blocks: [False] * len(blocks)),),
    # Products are converted to bfloat16, not rounded by their bits, as on other platforms than the CPU.
    "converted": ((_scale, "lax", _forced("by_bits", on_cpu=False)),),
}


def _changed(
    build: Callable[[Tree], optax.GradientTransformation], changes: Sequence[tuple[Any, str, Any]]
) -> Callable[[Tree], optax.GradientTransformation]:
    def made(tree: Tree) -> optax.GradientTransformation:
        transformation = build(tree)

        def update(updates, state, params=None):
            with contextlib.ExitStack() as stack:
                for change in changes:
                    stack.enter_context(mock.patch.object(*change))
                return transformation.update(updates, state, params)

        return optax.GradientTransformation(transformation.init, update)

    return made


def _variants(name: str, changes: Sequence[str]) -> list[Method]:
    whole = methods.ALL[name]
    return [
        whole._replace(name=f"{name}_{change}", build=_changed(whole.build, CHANGES[change]), against=(name,))
        for change in changes
    ]


CPU, OTHERS = ("no_conditional", "converted"), ("conditional",)  # what is nothing new elsewhere
ALL = {
    method.name: method
    for method in (
        *_variants("global", [name for name in CHANGES if name != "converted"]),
        *(one._replace(only="bfloat16") for one in _variants("global", ["converted"])),
        *_variants("unitwise", ["no_conditional", "conditional"]),
    )
}
WHOLE = tuple(dict.fromkeys(method.against[0] for method in ALL.values()))


def usual() -> list[Method]:
    """The variants that differ from the library on this device."""
    same = OTHERS if jax.default_backend() == "cpu" else CPU
    return [method for name, method in ALL.items() if name.split("_", 1)[1] not in same]
