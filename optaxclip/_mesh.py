"""What differs between versions of JAX and kinds of mesh: varying axes, collectives, explicit shardings."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

Along: TypeAlias = tuple[tuple[str, ...], ...]  # mesh axes, for each axis of an array
# JAX up to 0.8 cannot constrain how values are split where only some axes are manual.
PARTLY = hasattr(jax.lax, "pcast")


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The manual mesh axes over which a value differs from device to device, where JAX keeps track.

    Empty outside `shard_map`, under `pmap`, and where `check_vma=False` switches the tracking off.
    """
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # JAX 0.10
    axes = manual.varying if manual is not None else getattr(kind, "vma", ())
    return frozenset(axes)


def vary_like(
    value: jax.Array, arrays: Sequence[jax.Array], split: Sequence[Sequence[str]] | None = None
) -> jax.Array:
    """The value, typed as of the mesh of some arrays, and as varying over the manual axes they vary over.

    The axes that each of them is `split` over do not count: what is made of it is summed over them.
    """
    value = replicate(value, next((x for x in arrays if is_partitioned(x)), arrays[0]))
    split = [()] * len(arrays) if split is None else split
    axes = frozenset[str]().union(*(varying_axes(x) - {*own} for x, own in zip(arrays, split, strict=True)))
    axes = tuple(sorted(axes - varying_axes(value)))
    if not axes:
        return value
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(value, axes, to="varying")
    return jax.lax.pvary(value, axes)  # JAX up to 0.8  # pyright: ignore[reportAttributeAccessIssue]


def typed_like(value: ArrayLike, like: jax.Array) -> Any:
    """A constant with the mesh of another value in its type if that is explicit, for `vmap` to know of it."""
    if has_mesh(like) and AxisType.Explicit in jax.typeof(like).sharding.mesh.axis_types:
        return replicate(jnp.asarray(value), like)
    return value


def barrier(arrays: Sequence[jax.Array], scale: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """The arrays and the scale, once for each, of which the compiler knows nothing before the scale is known.

    It takes a barrier for each set of manual axes, since what passes one together varies over the same.
    """
    passed, scales = list(arrays), [scale] * len(arrays)
    for axes in dict.fromkeys(varying_axes(x) for x in arrays):
        alike = [k for k, x in enumerate(arrays) if varying_axes(x) == axes]
        together = jax.lax.optimization_barrier(([arrays[k] for k in alike], [scale] * len(alike)))
        for k, x, own in zip(alike, *together, strict=True):
            passed[k], scales[k] = x, own
    return passed, scales


def mesh_of(arrays: Iterable[jax.Array]) -> AbstractMesh | None:
    """The mesh that the types of some arrays know; None if they know of none."""
    return next((jax.typeof(x).sharding.mesh for x in arrays if has_mesh(x)), None)


def kinds_of(mesh: AbstractMesh | None) -> dict[str, AxisType]:
    """The kinds of a mesh's axes."""
    return {} if mesh is None else dict(zip(mesh.axis_names, mesh.axis_types, strict=True))


def tracked_axes(axes: Iterable[str]) -> frozenset[str]:
    """Those of some manual axes for which JAX keeps track of what varies over them."""
    return frozenset(name for name in axes if name in varying_axes(jax.lax.axis_index(name)))


def is_tracked(mesh: AbstractMesh) -> bool:
    """Whether JAX keeps track of what varies over the manual axes of a mesh, if it has some."""
    manual = [name for name, kind in kinds_of(mesh).items() if kind == AxisType.Manual]
    return tracked_axes(manual) == frozenset(manual)


def axes_by_dimension(spec: PartitionSpec) -> Along:
    """The mesh axes that a specification names for each dimension."""
    parts = (part if isinstance(part, tuple) else (part,) for part in spec)
    return tuple(tuple(axis for axis in part if axis is not None) for part in parts)


def axis_size(axes: Iterable[str]) -> int:
    """The number of devices along some manual axes."""
    size = 1
    for name in axes:
        size *= jax.lax.axis_size(name)
    return size


def has_mesh(x: jax.Array) -> bool:
    """Whether a value's type carries a mesh: then it must not be merged with others."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    return sharding is not None and not sharding.mesh.empty


def is_partitioned(x: jax.Array) -> bool:
    """Whether the compiler may split a value over devices: its mesh has axes that are not manual."""
    return has_mesh(x) and any(k != AxisType.Manual for k in jax.typeof(x).sharding.mesh.axis_types)


def replicate(x: jax.Array, like: jax.Array | None = None) -> jax.Array:
    """The value, whole on every device of its mesh or of `like`'s; as it is if that is manual or missing.

    The compiler is told so too: it would split what stands next to split leaves, and gather it again.
    """
    like = x if like is None else like
    if not is_partitioned(like):
        return x
    mesh = jax.typeof(like).sharding.mesh
    whole = NamedSharding(mesh, PartitionSpec(*[None] * x.ndim))
    if AxisType.Explicit in mesh.axis_types:
        x = jax.sharding.reshard(x, whole)
    return jax.lax.with_sharding_constraint(x, whole) if AxisType.Auto in mesh.axis_types else x


def share(x: jax.Array, like: jax.Array, axes: Sequence[int]) -> jax.Array:
    """A value with one axis for each of `axes` of `like`, split as `like` is where that is explicit."""
    if not is_partitioned(like):
        return x
    x = replicate(x, like)
    sharding = jax.typeof(like).sharding
    spec = [sharding.spec[axis] for axis in axes]
    if all(axis is None for axis in spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def zeros_like(x: jax.Array) -> jax.Array:
    """Zeros that follow `x`, of numbers that are not negative, in all that JAX knows of it.

    Under `vmap` over an explicitly split axis, JAX loses the mesh of a choice between values that are equal
    for every example; what is made with these zeros is not.
    """
    return jnp.where(x < 0, x, 0)
