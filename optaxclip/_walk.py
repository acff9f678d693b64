"""Trees of entry-wise state beside the updates: leaf by leaf, at the same paths."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import _checks, _mesh
from optaxclip._base import Groups, Leaf, PyTree
from optaxclip._partition import Partition, is_grouped, named_leaves, partition
from optaxclip._read import widen


def zeros(params: PyTree, modulus: bool = False) -> PyTree:
    """A tree like the parameters, in float32 or float64; for moduli real where the parameters are complex."""
    return jax.tree.map(lambda leaf: _zeros(leaf, modulus), params)


def _zeros(leaf: Any, modulus: bool) -> jax.Array:
    if not is_grouped(Leaf("", (), leaf)):
        return jnp.zeros(getattr(leaf, "shape", ()), jnp.float32)  # in its place, and never read
    dtype = jax.eval_shape(lambda: widen(jnp.zeros((), jnp.result_type(leaf)), real_dtype(leaf))).dtype
    return jnp.zeros_like(leaf, dtype=real_dtype(leaf) if modulus else dtype)


def real_dtype(leaf: Any) -> jax.typing.DTypeLike:
    """The real dtype that a leaf is reckoned in."""
    return jnp.float64 if jnp.finfo(jnp.result_type(leaf)).bits == 64 else jnp.float32


def number(value: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A number or an array in a real dtype; under `inject_hyperparams` it may come complex."""
    return jnp.real(jnp.asarray(value)).astype(dtype)


def rest(decay: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
    """One less a decay, without the rounding of the decay where that is known now."""
    return number(1 - decay, dtype) if _checks.is_number(decay) else 1 - number(decay, dtype)


class Walked(NamedTuple):
    """What came of a walk.

    Attributes:
      part: the updates, taken apart.
      made: by the place of a leaf, what the rule made of it, in the accumulation dtype.
      noted: by the place of a leaf, what else the rule returned.
      trees: the new state trees.
    """

    part: Partition
    made: dict[int, jax.Array]
    noted: dict[int, Any]
    trees: tuple[PyTree, ...]


def walk(where: str, groups: Groups, updates: PyTree, trees: Sequence[PyTree], rule: Callable) -> Walked:
    """Applies a rule to each grouped leaf and what state trees hold at its path.

    Args:
      where: the public function's name, for errors.
      groups: which leaves share a norm; says which are left alone.
      updates: the updates.
      trees: the state trees. Their structure and dtypes are kept.
      rule: from the leaf in its accumulation dtype, its number and what is held, to what to make of it, what
        to hold, and anything else.
    """
    part = partition(groups, updates)
    named = [named_leaves(tree) for tree in trees]
    places = [{leaf.path: k for k, leaf in enumerate(leaves)} for leaves in named]
    new = [[leaf.value for leaf in leaves] for leaves in named]
    made, noted = {}, {}
    for k, place in enumerate(part.places):
        if place is None:
            continue
        at = [_place(where, part, k, leaves, own) for leaves, own in zip(new, places, strict=True)]
        real = real_dtype(part.leaves[k])
        held = [widen(leaves[j], real) for leaves, j in zip(new, at, strict=True)]
        made[k], kept, noted[k] = rule(widen(jnp.asarray(part.leaves[k]), real), k, *held)
        for leaves, j, x in zip(new, at, kept, strict=True):
            leaves[j] = x.astype(leaves[j].dtype)
    structures = [jax.tree.structure(tree) for tree in trees]
    rebuilt = (jax.tree.unflatten(s, leaves) for s, leaves in zip(structures, new, strict=True))
    return Walked(part, made, noted, tuple(rebuilt))


def _place(where: str, part: Partition, k: int, leaves: Sequence[Any], places: Mapping[str, int]) -> int:
    path, shape = part.paths[k], part.leaves[k].shape
    at = places.get(path)
    if at is None or leaves[at].shape != shape:
        got = "nothing" if at is None else f"shape {leaves[at].shape}"
        raise ValueError(
            f"{where}: the update's leaf {path!r} has shape {shape}; `init` saw {got} there. Pass updates "
            "with the structure that `init` was given."
        )
    return at


def across(
    reduce: Callable[[jax.Array, tuple[str, ...]], jax.Array],
    values: Mapping[int, jax.Array],
    leaves: Sequence[Any],
    splits: Sequence[tuple[str, ...]],
) -> dict[int, jax.Array]:
    """What each device found in its part of the leaves, put together: one collective for each set of axes.

    Leaves that vary over different axes are not sent together, so that each keeps its type.

    Args:
      reduce: `jax.lax.psum`, or another of its kind.
      values: arrays, by the place of the leaf that they are about.
      leaves: the leaves.
      splits: the manual mesh axes that each leaf is split over.
    """
    found, alike = dict(values), collections.defaultdict(list)
    for k, x in values.items():
        apart = k if _mesh.is_partitioned(jnp.asarray(leaves[k])) else None  # not to be merged with others
        alike[splits[k], _mesh.varying_axes(leaves[k]), x.dtype, apart].append(k)
    for (split, *_), own in alike.items():
        if split:
            ends = np.cumsum([values[k].size for k in own])[:-1]
            flat = jnp.concatenate([values[k].ravel() for k in own]) if len(own) > 1 else values[own[0]]
            parts = jnp.split(reduce(flat, split).ravel(), ends)
            found |= {k: x.reshape(values[k].shape) for k, x in zip(own, parts, strict=True)}
    return found


def together(part: Partition, made: Mapping[int, jax.Array]) -> PyTree:
    """The updates, with new leaves in the dtypes of the old ones."""
    leaves = list(part.leaves)
    for k, x in made.items():
        leaves[k] = x.astype(jax.dtypes.canonicalize_dtype(leaves[k].dtype))
    return jax.tree.unflatten(part.treedef, leaves)


def counters() -> dict[str, jax.Array]:
    """The counters of a state before the first update."""
    counts = {name: jnp.zeros((), jnp.int32) for name in ("step", "clipped", "nonfinite")}
    return counts | {"share": jnp.zeros((), jnp.float32)}


def counted(state: Any, walked: Walked) -> dict[str, jax.Array]:
    """The counters after an update whose rule noted the entries that it clipped."""
    leaves = walked.part.leaves
    over = sum((count(x) for x in walked.noted.values()), jnp.zeros((), jnp.float32))
    bad = [jnp.any(~jnp.isfinite(leaves[k])) for k in walked.noted]
    return {
        "step": jnp.asarray(optax.safe_increment(state.step)),
        # A Python number is an int32 to JAX, which large models have more entries than.
        "share": over / np.float32(max(sum(x.size for x in walked.noted.values()), 1)),
        "clipped": state.clipped + (over > 0).astype(jnp.int32),
        "nonfinite": state.nonfinite + jnp.any(jnp.array(bad, jnp.bool)).astype(jnp.int32),
    }


def count(mask: jax.Array) -> jax.Array:
    """How many entries are true, float32."""
    return jnp.sum(mask, dtype=jnp.float32)
