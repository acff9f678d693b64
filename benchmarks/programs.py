"""The programs that are timed: a clip in a training step and alone, and what they are held against."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import optax

from benchmarks import char_model, trees
from benchmarks.methods import Method
from benchmarks.trees import Tree

ADAMW = optax.adamw(1e-3)
FACTOR = 1 - 2.0**-8  # the nearest to 1 that bfloat16 has, so that entries stay ordinary numbers


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
        return _updated(optimizer, params, adam, clip, grads)

    params = trees.specs(tree, trees.PARAMS[dtype])
    clip, adam = cast(tuple[Any, Any], jax.eval_shape(optimizer.init, params))
    args = params, adam, clip, trees.specs(tree, trees.GRADS[dtype])
    return Program(jax.jit(run, donate_argnums=(0, 1, 2)), args)


def train(method: Method, shape: char_model.Shape) -> Program:
    """`(params, adam, clip, passages) -> (params, adam, clip)`: a whole step of a transformer."""
    tree = transformer(shape)
    optimizer = optax.chain(method.build(tree), ADAMW)

    def run(params, adam, clip, passages):
        grads = jax.grad(char_model.loss)(params, passages, shape)
        return _updated(optimizer, params, adam, clip, grads)

    params = trees.specs(tree, "float32")
    clip, adam = cast(tuple[Any, Any], jax.eval_shape(optimizer.init, params))
    passages = jax.ShapeDtypeStruct((shape.batch, shape.context + 1), "int32")
    return Program(jax.jit(run, donate_argnums=(0, 1, 2)), (params, adam, clip, passages))


@functools.cache
def transformer(shape: char_model.Shape) -> Tree:
    """The parameters of the transformer."""
    params = jax.eval_shape(functools.partial(char_model.initial, shape, 0))
    return Tree("transformer", {layer: {k: x.shape for k, x in own.items()} for layer, own in params.items()})


def _updated(optimizer: optax.GradientTransformation, params: Any, adam: Any, clip: Any, grads: Any) -> Any:
    updates, state = optimizer.update(grads, (clip, adam), params)
    clip, adam = cast(tuple[Any, Any], state)
    return optax.apply_updates(params, updates), adam, clip


def alone(method: Method, tree: Tree, dtype: str) -> Program:
    """`(grads, clip, params) -> (grads, clip)`: the method alone, `grads` and `clip` donated.

    `params` is None for methods that read none.
    """
    transformation = method.build(tree)

    def run(grads, clip, params):
        return transformation.update(grads, clip, params)

    grads = trees.specs(tree, trees.GRADS[dtype])
    clip = jax.eval_shape(transformation.init, grads)
    return Program(jax.jit(run, donate_argnums=(0, 1)), (grads, clip, grads if method.needs_params else None))


def identity(tree: Tree, dtype: str) -> Program:
    """`grads -> grads`, donated: what it takes to call a program with that many leaves."""
    return Program(jax.jit(lambda grads: grads, donate_argnums=0), (trees.specs(tree, trees.GRADS[dtype]),))


def scaled_leaves(tree: Tree, dtype: str) -> Program:
    """`grads -> grads`, donated: each leaf times a number, the least that a clip can be."""

    def run(grads):
        return jax.tree.map(lambda leaf: leaf * leaf.dtype.type(FACTOR), grads)

    return Program(jax.jit(run, donate_argnums=0), (trees.specs(tree, trees.GRADS[dtype]),))


def copied(suite: str, tree: Tree, dtype: str) -> Program:
    """`array -> array`, donated: read and written once, as large as the suite's programs must move bytes."""
    array = jax.ShapeDtypeStruct((moved_bytes(suite, tree, dtype) // 8,), "float32")
    return Program(jax.jit(lambda array: array * array.dtype.type(FACTOR), donate_argnums=0), (array,))


def moved_bytes(suite: str, tree: Tree, dtype: str) -> int:
    """What a clip, or a clipped step of AdamW, must read and write.

    Gradients are read for their norm, and again to be scaled; they are written back, or parameters and both
    moments read and written.
    """
    grads, params = tree.nbytes(dtype), tree.entries * jax.numpy.dtype(trees.PARAMS[dtype]).itemsize
    return 3 * grads if suite == "alone" else 2 * grads + 6 * params


def temporary_bytes(compiled: Any) -> int:
    """The peak of what a compiled program allocates besides its arguments and outputs."""
    return compiled.memory_analysis().temp_size_in_bytes
