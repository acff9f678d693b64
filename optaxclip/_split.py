"""Over which mesh axes leaves are split: what JAX knows, and what `axis_name` and `specs` say."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.sharding import AxisType, PartitionSpec

from optaxclip import _checks, _mesh, _paths
from optaxclip._base import PyTree
from optaxclip._mesh import Along
from optaxclip._partition import Partition, named_leaves

AxisName: TypeAlias = str | Sequence[str] | None
Axes: TypeAlias = tuple[str, ...]

_NO_PARTS = "norms of matrices cannot be put together from those of their parts."
_EXPERTS = "each device has whole matrices of its own, such as experts"
_INSTEAD = "else gather the leaf first, clip under jit, or use a norm that is summed, such as norms.l2."


class Split(NamedTuple):
    """What a public function was told.

    Attributes:
      where: the function, for errors.
      axis_name: the mesh axes that count, or None if that was left to `specs`, or to nothing.
      specs: the specification of each subtree, by the keys of its path; None if there are none.
      whole: whether leaves are measured whole, as matrices are: not by parts that are put together.
    """

    where: str
    axis_name: Axes | None
    specs: dict[tuple[str, ...], PartitionSpec] | None
    whole: bool = False

    @property
    def axes(self) -> Axes:
        """The mesh axes that leaves may be split over."""
        if self.axis_name is not None:
            return self.axis_name
        return self._named()

    def manual(self, leaves: Sequence[Any]) -> Axes:
        """Those of `axes` that are manual, as all are that no mesh is known of."""
        named, kinds = self._named(), _mesh.kinds_of(_mesh.mesh_of(leaves))
        other = {axis for axis in named if kinds.get(axis, AxisType.Manual) != AxisType.Manual}
        return tuple(axis for axis in self.axes if axis not in other)

    def automatic(self, leaves: Sequence[Any]) -> dict[str, int]:
        """The axes that `specs` name and that are automatic ones of the leaves' mesh, with their sizes."""
        mesh = _mesh.mesh_of(leaves)
        kinds = _mesh.kinds_of(mesh)
        named = (axis for axis in self._named() if kinds.get(axis) == AxisType.Auto)
        return {} if mesh is None else {axis: mesh.shape[axis] for axis in named}

    def _named(self) -> Axes:
        return tuple(dict.fromkeys(axis for spec in (self.specs or {}).values() for axis in named_in(spec)))


def told(where: str, axis_name: AxisName, specs: PyTree = None, whole: bool = False) -> Split:
    """What the public arguments say, or an error that names the one at fault."""
    if axis_name is not None:
        axis_name = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    if specs is None:
        return Split(where, axis_name, None, whole)
    specs = jax.tree.map(lambda x: PartitionSpec() if x is None else x, specs, is_leaf=lambda x: x is None)
    by_keys = {}
    for leaf in named_leaves(specs):
        if not isinstance(leaf.value, PartitionSpec):
            raise TypeError(
                f"{where}: specs has {leaf.value!r} at {leaf.path!r}, of type {type(leaf.value).__name__}. "
                "Pass a tree of jax.sharding.PartitionSpec."
            )
        if PartitionSpec.UNCONSTRAINED in leaf.value or getattr(leaf.value, "unreduced", None):
            raise ValueError(
                f"{where}: specs has {leaf.value} at {leaf.path!r}, which does not say how a value is split. "
                "Name the mesh axes, or None, for each dimension."
            )
        by_keys[_paths.parts(leaf.keys)] = leaf.value
    return Split(where, axis_name, by_keys, whole)


def alone(where: str, axis_name: AxisName) -> Split:
    """As `told`, for methods that decompose matrices, where a device can only measure its own: None or ()."""
    split = told(where, axis_name, whole=True)
    if split.axis_name:
        raise ValueError(
            f"{where}: axis_name is {axis_name!r}, and {_NO_PARTS} Pass () where {_EXPERTS}; {_INSTEAD}"
        )
    return split


def named_in(spec: PartitionSpec) -> Axes:
    """The mesh axes that a specification names."""
    return tuple(axis for part in _mesh.axes_by_dimension(spec) for axis in part)


def axes_of(part: Partition, leaves: Sequence[Any], split: Split) -> tuple[Axes, ...]:
    """For each leaf the mesh axes that its parts are to be summed over, sorted.

    Args:
      part: the updates, taken apart.
      leaves: their leaves, or others of the same paths and shapes.
      split: what the public function was told.

    Raises:
      ValueError: if a measured leaf varies over an axis and nothing was told, if what was told is not what
        JAX knows, would add up rows of different groups or splits what is measured whole, or if no
        specification is for the leaf.
    """
    return _axes_of(part, leaves, split, _specs_of(part, split))


def axes_and_layout(
    part: Partition, leaves: Sequence[Any], split: Split
) -> tuple[tuple[Axes, ...], tuple[Along, ...]]:
    """What `axes_of` says, and for each leaf, and each of its dimensions, the automatic axes that split it.

    Those are the ones that `specs` name. Empty for leaves that are split over none.

    Raises:
      ValueError: as in `axes_of`; if a leaf's shape does not allow its specification.
    """
    specs = _specs_of(part, split)
    return _axes_of(part, leaves, split, specs), _laid_out(part, leaves, split, specs)


def _axes_of(
    part: Partition, leaves: Sequence[Any], split: Split, specs: Sequence[PartitionSpec] | None
) -> tuple[Axes, ...]:
    varying = {k: _mesh.varying_axes(leaves[k]) for k in part.measured}
    if split.axis_name is None and split.specs is None:
        _check_alone(part, varying, split)
        return ((),) * len(leaves)
    axes = frozenset(split.manual([leaves[k] for k in varying]))
    tracked = _mesh.tracked_axes(axes)
    found: list[Axes] = [()] * len(leaves)
    for k, known in varying.items():
        own = axes - (tracked - known)
        if specs is not None:
            own = axes & set(named_in(specs[k]))
            seen = known if split.axis_name is None else known & axes
            _check_spec(part, k, split.where, specs[k], own & tracked, seen)
        if own and split.whole:
            raise ValueError(
                f"{split.where}: leaf {part.paths[k]!r} counts as split over the mesh axes {_listed(own)}, "
                f"and {_NO_PARTS} Name other axes in axis_name, or none by (), where {_EXPERTS}; {_INSTEAD}"
            )
        found[k] = tuple(sorted(own))
    return tuple(found)


def _laid_out(
    part: Partition, leaves: Sequence[Any], split: Split, specs: Sequence[PartitionSpec] | None
) -> tuple[Along, ...]:
    sizes = split.automatic([leaves[k] for k in part.measured])
    found: list[Along] = [()] * len(leaves)
    if sizes and specs is not None:
        for k in part.measured:
            found[k] = _laid(part.paths[k], leaves[k].shape, specs[k], split.where, sizes)
    return tuple(found)


def _laid(path: str, shape: tuple[int, ...], spec: PartitionSpec, where: str, sizes: dict[str, int]) -> Along:
    laid = [tuple(axis for axis in axes if axis in sizes) for axes in _mesh.axes_by_dimension(spec)]
    if not any(laid):
        return ()
    wrong = f"{where}: leaf {path!r} of shape {shape} cannot be split as its specification, {spec}, says: "
    if len(spec) > len(shape):
        raise ValueError(f"{wrong}it has {len(shape)} dimensions. Give it a specification of its own.")
    for dimension, (size, axes) in enumerate(zip(shape, laid, strict=False)):
        if size % (devices := math.prod(sizes[axis] for axis in axes)):
            raise ValueError(
                f"{wrong}dimension {dimension} does not divide by {devices} devices. Name no axes for it, "
                "and the compiler gathers it, or leave specs out."
            )
    return (*laid, *((),) * (len(shape) - len(laid)))


def _check_alone(part: Partition, varying: dict[int, frozenset[str]], split: Split) -> None:
    """Nothing was told: then no leaf may vary."""
    some = [k for k, axes in varying.items() if axes]
    if some:
        own, union = (_listed(frozenset().union(*(varying[k] for k in few))) for few in (some[:1], some))
        advice = (
            f"axis_name is missing. Pass axis_name={union} to measure the parts of all devices together, or "
            "axis_name=() to have each device measure its own."
        )
        if split.whole:
            advice = f"{_NO_PARTS} Pass axis_name=() where {_EXPERTS}; {_INSTEAD}"
        raise ValueError(
            f"{split.where}: leaf {part.paths[some[0]]!r} varies over the mesh axes {own}, as {len(some)} of "
            f"{len(varying)} leaves vary, and {advice} Gradients that are not yet averaged over an axis vary "
            "over it too: average them first."
        )


def _check_spec(
    part: Partition, k: int, where: str, spec: PartitionSpec, own: frozenset[str], seen: frozenset[str]
) -> None:
    """Holds the axes of a specification that JAX keeps track of against those that it sees."""
    if own != seen:
        raise ValueError(
            f"{where}: leaf {part.paths[k]!r} varies over the mesh axes {_listed(seen)}, and its "
            f"specification, {spec}, names {_listed(own)}. Correct specs, or average gradients first over "
            "the axes that only the batch is split over."
        )
    place = part.places[k]
    for axis in () if place is None else place.axes:
        apart = own & set(named_in(PartitionSpec(*spec[axis : axis + 1])))
        if apart:
            raise ValueError(
                f"{where}: leaf {part.paths[k]!r} has a group for each index of dimension {axis}, which its "
                f"specification, {spec}, splits over {_listed(apart)}: those of one device are not those of "
                "another. Leave these axes out of axis_name."
            )


def _specs_of(part: Partition, split: Split) -> list[PartitionSpec] | None:
    """The specification of each leaf: that of the smallest subtree it is in; None if there are none."""
    if split.specs is None:
        return None
    # By path, so that containers may differ; the tree's own, which the names of groups may replace.
    own = named_leaves(jax.tree.unflatten(part.treedef, range(len(part.paths))))
    found = []
    for leaf, place in zip(own, part.places, strict=True):
        at = _paths.nearest(_paths.parts(leaf.keys), split.specs)
        spec = None if at is None else split.specs[at]
        if spec is None and place is not None:
            known = _checks.listed("/".join(keys) for keys in split.specs)
            raise ValueError(
                f"{split.where}: specs has none for leaf {leaf.path!r}, among {known or 'nothing'}. Pass a "
                "tree prefix of the updates, as in_specs of shard_map."
            )
        found.append(spec or PartitionSpec())
    return found


def _listed(axes: frozenset[str] | set[str]) -> str:
    return repr(tuple(sorted(axes)))
