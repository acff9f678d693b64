"""Measures leaves where they lie: each device its own parts, where it is known how leaves are split.

Left to the compiler, each split leaf is summed over the devices on its own, over one mesh axis after another,
and only some hundreds of these sums are merged. Where types say how leaves are split, as they do if mesh axes
are explicit, or the user does in `specs`, a device puts what it has of all leaves together first: one short
vector is summed for each set of axes, and nothing is gathered.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from optaxclip import _mesh
from optaxclip._mesh import Along
from optaxclip._read import Block, merged

Of: TypeAlias = Callable[[Sequence[Block]], jax.Array]


def by_device(run: Callable[[Sequence[Block], Of], jax.Array], blocks: Sequence[Block], of: Of) -> jax.Array:
    """What `run` makes of blocks, which has to be the same on all devices.

    Args:
      run: is called with the blocks as they are, if nothing is known to be split; else where mesh axes are
        manual, with one device's parts, and with what measures them: one number for each index of the whole
        blocks, and zeros for the indices that are on other devices.
      blocks: the blocks, whole.
      of: what measures blocks.
    """
    along = [_along(block) for block in blocks]
    axes = _split_axes(blocks, along)
    return _mapped(run, blocks, of, along, axes) if axes else run(blocks, of)


def _split_axes(blocks: Sequence[Block], along: Sequence[Along]) -> tuple[str, ...]:
    """The mesh axes, not manual, that some block is known to be split over: those to make manual.

    Of the explicit ones, an axis that `vmap` took away is none of them.
    """
    axes = {name for one in along for names in one for name in names}
    if any(block.laid for block in blocks) and not _mesh.PARTLY:
        kinds = _mesh.kinds_of(_mesh.mesh_of(block.array for block in blocks))
        axes |= {name for name, kind in kinds.items() if kind == AxisType.Auto}
    return tuple(sorted(axes))


def _mapped(
    run: Callable[[Sequence[Block], Of], jax.Array],
    blocks: Sequence[Block],
    of: Of,
    along: Sequence[Along],
    axes: tuple[str, ...],
) -> jax.Array:
    """What `run` makes of one device's parts of the blocks, where `axes` are manual."""
    kept = [tuple(names[axis] for axis in _kept(block)) for block, names in zip(blocks, along, strict=True)]
    splits = [_joined(block.split, names) for block, names in zip(blocks, along, strict=True)]
    scales = [_scale_of(block) for block in blocks]
    told = any(block.laid for block in blocks)  # then specs name all axes that split them
    of_scales = [names if scale.ndim else () for scale, names in zip(scales, kept, strict=True)]

    def own(arrays: Sequence[jax.Array], scales: Sequence[jax.Array]) -> jax.Array:
        found = zip(blocks, arrays, splits, scales, strict=True)
        parts = [block._replace(array=x, split=split, scale=scale) for block, x, split, scale in found]
        places = {id(part): names for part, names in zip(parts, kept, strict=True) if any(names)}

        def measured(some: Sequence[Block]) -> jax.Array:
            placed = [_placed(of([part]), part, places.get(id(part))) for part in some]
            return jnp.concatenate(placed) if len(placed) > 1 else placed[0]

        return run(merged(parts, lambda part: told or _whole(part)), measured)

    mesh = _mesh.mesh_of(block.array for block in blocks)
    assert mesh is not None  # of which the axes are
    mapped = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=tuple([PartitionSpec(*names) for names in some] for some in (along, of_scales)),
        out_specs=PartitionSpec(None),
        axis_names=set(axes),
        check_vma=_mesh.is_tracked(mesh),
    )
    return mapped([block.array for block in blocks], scales)


def _along(block: Block) -> Along:
    """For each axis of the array, the mesh axes that split it: those its type tells of, and `block.laid`."""
    x = block.array
    laid = block.laid or ((),) * x.ndim
    if not _mesh.has_mesh(x):
        return laid
    sharding = jax.typeof(x).sharding
    kinds = _mesh.kinds_of(sharding.mesh)
    parts = _mesh.axes_by_dimension(sharding.spec)
    parts += ((),) * (x.ndim - len(parts))
    typed = (tuple(name for name in part if kinds.get(name) == AxisType.Explicit) for part in parts)
    return tuple((*one, *other) for one, other in zip(typed, laid, strict=True))


def _joined(split: tuple[str, ...], along: Along) -> tuple[str, ...]:
    return tuple(sorted({*split, *(name for names in along for name in names)}))


def _kept(block: Block) -> list[int]:
    return [axis for axis in range(block.array.ndim) if axis not in block.reduced]


def _scale_of(block: Block) -> jax.Array:
    """The scale of a block, split as the block is where there is one for each of the kept indices."""
    scale = jnp.asarray(1.0 if block.scale is None else block.scale)
    return _mesh.share(scale, block.array, _kept(block)) if scale.ndim else scale


def _placed(values: jax.Array, part: Block, along: Along | None) -> jax.Array:
    """One device's numbers at their place among those of all devices, flat."""
    if along is None:
        return values
    counts = [_mesh.axis_size(names) for names in along]
    whole = jnp.zeros([n * count for n, count in zip(part.kept, counts, strict=True)], values.dtype)
    starts = [lax.axis_index(names) * n if names else 0 for n, names in zip(part.kept, along, strict=True)]
    whole = _mesh.vary_like(whole, [values])
    return lax.dynamic_update_slice(whole, values.reshape(part.kept), starts).reshape(-1)


def _whole(part: Block) -> bool:
    """Whether a device has all there is of a part: no axis is left for the compiler to split."""
    return AxisType.Auto not in jax.typeof(part.array).sharding.mesh.axis_types
