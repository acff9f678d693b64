"""The two programs that are timed, for one method: a training step, and the clip alone."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import optax

from benchmarks import trees
from benchmarks.methods import Method
from benchmarks.trees import Tree

ADAMW = optax.adamw(1e-3)


class Program(NamedTuple):
    """A jitted function that was not traced yet, and the shapes to trace it with."""

    function: Any
    args: tuple[Any, ...]

    def compiled(self) -> Callable[..., Any]:
        return self.function.lower(*self.args).compile()


def step(method: Method, tree: Tree, dtype: str) -> Program:
    """`(params, adam, clip, grads) -> (params, adam, clip)`: AdamW behind the method; `grads` is not donated.

    The states are apart, so that programs with different methods can hand the same parameters and moments on.
    """
    optimizer = optax.chain(method.build(tree), ADAMW)

    def run(params, adam, clip, grads):
        updates, state = optimizer.update(grads, (clip, adam), params)
        clip, adam = cast(tuple[Any, Any], state)
        return optax.apply_updates(params, updates), adam, clip

    params = trees.specs(tree, dtype)
    clip, adam = cast(tuple[Any, Any], jax.eval_shape(optimizer.init, params))
    return Program(jax.jit(run, donate_argnums=(0, 1, 2)), (params, adam, clip, params))


def alone(method: Method, tree: Tree, dtype: str) -> Program:
    """`(grads, clip, params) -> (grads, clip)`: the method alone, `grads` and `clip` donated.

    `params` is None for methods that read none.
    """
    transformation = method.build(tree)

    def run(grads, clip, params):
        return transformation.update(grads, clip, params)

    grads = trees.specs(tree, dtype)
    clip = jax.eval_shape(transformation.init, grads)
    return Program(jax.jit(run, donate_argnums=(0, 1)), (grads, clip, grads if method.needs_params else None))


def temporary_bytes(compiled: Any) -> int:
    """The peak of what a compiled program allocates besides its arguments and outputs."""
    return compiled.memory_analysis().temp_size_in_bytes
