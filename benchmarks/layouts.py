"""Sharded trees for `benchmarks.scaling`, as shapes: nothing is put on a device."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optaxclip as oc

INPUTS = 64  # of each dense layer
OUTPUTS = 64  # of layers that are many; a multiple of the devices
MESH = {"data": 4, "model": 2}
WIDE = {"data": 16, "model": 4}


class Layout(NamedTuple):
    """Over which mesh axes the two kinds of leaves are split.

    Attributes:
      kernel: of shape `(INPUTS, outputs)`.
      bias: of shape `(outputs,)`.
      axis_sets: distinct sets of axes that leaves are split over.
      under_jit: distinct sets of axes that single dimensions are split over: XLA reduces one after the other.
    """

    kernel: P
    bias: P
    axis_sets: int
    under_jit: int


LAYOUTS = {
    "fsdp": Layout(P("data"), P("data"), 1, 1),
    "tensor": Layout(P(None, "model"), P("model"), 1, 1),
    "mixed": Layout(P("data", "model"), P("data"), 2, 2),
    "both": Layout(P("data", "model"), P(), 1, 2),
    "data": Layout(P(), P(), 0, 0),
}
GROUPINGS = {
    "whole": oc.groups.whole(),
    "layer": oc.groups.layer(),
    "leaf": oc.groups.leaf(),
    "unit": oc.groups.unit(),
    "stacked": oc.groups.stacked(oc.groups.layer(), "layers"),
}
MANY_ROWS = ("unit", "stacked")  # many groups in a leaf: few leaves for as many groups as one likes


def mesh(kind: AxisType = AxisType.Auto, sizes: Mapping[str, int] = MESH) -> jax.sharding.Mesh:
    """Eight devices, four by two, or as many as the axes have."""
    types = (kind,) * len(sizes)
    devices = jax.devices("cpu")[: math.prod(sizes.values())]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


def specs(layout: str, grouping: str, size: int) -> Any:
    """The partition specs of `tree`."""
    kernel, bias, *_ = LAYOUTS[layout]
    if grouping == "stacked":
        return {"layers": {"kernel": P(None, *kernel), "bias": P(None, *bias)}}
    return {f"layer_{k}": {"kernel": kernel, "bias": bias} for k in range(_layers(grouping, size))}


def tree(layout: str, grouping: str, size: int, on: jax.sharding.Mesh | None) -> Any:
    """Dense layers, as shapes, split over a mesh if there is one.

    `size` counts leaves, two to a layer; or the groups of a kernel, for groupings that
    have many there.
    """
    outputs = size if grouping == "unit" else OUTPUTS
    shapes = {"kernel": (INPUTS, outputs), "bias": (outputs,)}
    if grouping == "stacked":
        shapes = {name: (size, *shape) for name, shape in shapes.items()}

    def leaf(name: str, spec: P) -> jax.ShapeDtypeStruct:
        sharding = None if on is None else NamedSharding(on, spec)
        return jax.ShapeDtypeStruct(shapes[name], jnp.float32, sharding=sharding)

    return {
        layer: {name: leaf(name, spec) for name, spec in leaves.items()}
        for layer, leaves in specs(layout, grouping, size).items()
    }


def _layers(grouping: str, size: int) -> int:
    return 1 if grouping in MANY_ROWS else size // 2
