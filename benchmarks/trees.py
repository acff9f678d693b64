"""Trees of realistic shapes, as `{layer: {name: shape}}`, so that grouping by layer means something."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

Shape: TypeAlias = tuple[int, ...]

# By what the command line calls a choice of dtypes: the gradients' and the parameters'.
GRADS = {"float32": "float32", "bfloat16": "bfloat16", "mixed": "bfloat16"}
PARAMS = {"float32": "float32", "bfloat16": "bfloat16", "mixed": "float32"}


class Tree(NamedTuple):
    """A tree to benchmark.

    Attributes:
      name: what the command line calls it.
      shapes: the shape of each leaf by layer and name.
      stacked: a pattern of the paths whose first axis counts layers; None if there are none.
      compile_only: whether only tracing and compiling is measured.
    """

    name: str
    shapes: dict[str, dict[str, Shape]]
    stacked: str | None = None
    compile_only: bool = False

    @property
    def leaves(self) -> int:
        return sum(map(len, self.shapes.values()))

    @property
    def entries(self) -> int:
        return sum(math.prod(shape) for layer in self.shapes.values() for shape in layer.values())

    def nbytes(self, dtype: str) -> int:
        """Of the gradients."""
        return self.entries * jnp.dtype(GRADS[dtype]).itemsize


def mlp() -> Tree:
    """A multi-layer perceptron for images of 28 by 28: 10 leaves, 1 M entries."""
    widths = (784, 640, 512, 256, 128, 10)
    pairs = enumerate(itertools.pairwise(widths))
    return Tree("mlp", {f"dense_{k}": _dense(inner, outer) for k, (inner, outer) in pairs})


def gpt2() -> Tree:
    """GPT-2 small, layer by layer: 148 leaves, 124 M entries."""
    blocks = {f"h_{k}/{name}": layer for k in range(12) for name, layer in _block(768).items()}
    return Tree("gpt2", _embeddings() | blocks | {"ln_f": _norm(768)})


def gpt2_stacked() -> Tree:
    """The same for a scan over layers, with a leading axis of 12: 16 leaves."""
    blocks = {
        f"h/{name}": {leaf: (12, *shape) for leaf, shape in layer.items()}
        for name, layer in _block(768).items()
    }
    return Tree("gpt2_stacked", _embeddings() | blocks | {"ln_f": _norm(768)}, stacked="^h/")


def leaves_300() -> Tree:
    """300 leaves of 1,000 entries, two to a layer."""
    return Tree("leaves_300", _small(150))


def mixed_300() -> Tree:
    """300 leaves of mixed small shapes: 50 narrow residual blocks of three dense layers."""
    widths = (64, 64, 256, 64)
    blocks = {
        f"block_{k}/dense_{j}": _dense(*pair)
        for k in range(50)
        for j, pair in enumerate(itertools.pairwise(widths))
    }
    return Tree("mixed_300", blocks)


def small_1000() -> Tree:
    """1,000 leaves of 1,000 entries, two to a layer."""
    return Tree("small_1000", _small(500), compile_only=True)


def small_2000() -> Tree:
    """2,000 leaves of 1,000 entries, two to a layer."""
    return Tree("small_2000", _small(1000))


def large_10000() -> Tree:
    """10,000 leaves of 1,000 entries, two to a layer."""
    return Tree("large_10000", _small(5000), compile_only=True)


def one_leaf() -> Tree:
    """One leaf of 100 M entries."""
    return Tree("one_leaf", {"table": {"embedding": (100_000, 1000)}})


def _dense(inner: int, outer: int) -> dict[str, Shape]:
    return {"kernel": (inner, outer), "bias": (outer,)}


def _norm(width: int) -> dict[str, Shape]:
    return {"scale": (width,), "bias": (width,)}


def _embeddings() -> dict[str, dict[str, Shape]]:
    return {"wte": {"embedding": (50257, 768)}, "wpe": {"embedding": (1024, 768)}}


def _block(width: int) -> dict[str, dict[str, Shape]]:
    return {
        "ln_1": _norm(width),
        "attn_qkv": _dense(width, 3 * width),
        "attn_out": _dense(width, width),
        "ln_2": _norm(width),
        "mlp_in": _dense(width, 4 * width),
        "mlp_out": _dense(4 * width, width),
    }


def _small(layers: int) -> dict[str, dict[str, Shape]]:
    return {f"layer_{k}": {"scale": (1000,), "bias": (1000,)} for k in range(layers)}


ALL = {
    tree.name: tree
    for tree in (
        mlp(),
        leaves_300(),
        mixed_300(),
        small_1000(),
        small_2000(),
        large_10000(),
        one_leaf(),
        gpt2_stacked(),
        gpt2(),
    )
}
USUAL = tuple(name for name in ALL if name != "large_10000")  # what `all` stands for


def specs(tree: Tree, dtype: str) -> Any:
    """The tree with shapes and dtypes in place of arrays."""
    return _map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), tree)


def normal(tree: Tree, dtype: str, seed: int, size: float = 1.0) -> Any:
    """The tree with normally distributed entries of standard deviation `size`, in buffers of its own."""
    keys: Iterator[Any] = iter(jax.random.split(jax.random.key(seed), tree.leaves))
    return _map(lambda shape: _normal(next(keys), shape, jnp.dtype(dtype)) * size, tree)


_normal = jax.jit(jax.random.normal, static_argnums=(1, 2))


def _map(make, tree: Tree) -> Any:
    return {
        layer: {name: make(shape) for name, shape in leaves.items()} for layer, leaves in tree.shapes.items()
    }
