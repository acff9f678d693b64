"""What differs between versions of JAX and kinds of mesh: varying axes, collectives, explicit shardings."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The manual mesh axes over which a value differs from device to device, where JAX keeps track.

    Empty outside `shard_map`, under `pmap`, and where `check_vma=False` switches the tracking off.
    """
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # JAX 0.10
    axes = manual.varying if manual is not None else getattr(kind, "vma", ())
    return frozenset(axes)


def vary_like(value: jax.Array, x: jax.Array) -> jax.Array:
    """The value, typed as varying over the manual axes that `x` varies over, and as of the same mesh."""
    value = replicate(value, x)
    axes = tuple(varying_axes(x) - varying_axes(value))
    if not axes:
        return value
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(value, axes, to="varying")
    return jax.lax.pvary(value, axes)  # JAX up to 0.8  # pyright: ignore[reportAttributeAccessIssue]


def split_axes(x: jax.Array, axis_name: Sequence[str]) -> frozenset[str]:
    """Those of `axis_name` that a leaf is split over: all of them where JAX does not keep track."""
    tracked = {name for name in axis_name if name in varying_axes(jax.lax.axis_index(name))}
    return frozenset(axis_name) - (tracked - varying_axes(x))


def axis_size(axes: frozenset[str]) -> int:
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
