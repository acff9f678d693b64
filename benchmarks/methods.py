"""The methods that are compared, and what each of them is compared with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import optaxclip as oc
from benchmarks.trees import Tree

LIMIT = 1.0  # far below the norm of any leaf of standard normal entries
RATIO = 0.01  # of update to parameters, for adaptive clipping
MANY = 300  # leaves; beyond, each program takes long to compile, and only what has a target there is measured
ADAPTIVE = ("autoclip", "zclip", "adagc")


class Method(NamedTuple):
    """A way to clip.

    Attributes:
      name: what the command line and the tables call it.
      build: makes the transformation for a tree.
      against: what it is compared with: others' methods or references for the same purpose, and global
        clipping for what should cost no more.
      needs_params: whether `update` reads parameters.
      leaves: the largest tree to measure it on.
      only: the dtypes to measure it with, if not all.
      clips: whether it makes gradients smaller, so that they have to grow again before the next call.
    """

    name: str
    build: Callable[[Tree], optax.GradientTransformation]
    against: tuple[str, ...] = ()
    needs_params: bool = False
    leaves: int = MANY
    only: str | None = None
    clips: bool = True

    def fits(self, tree: Tree, dtype: str) -> bool:
        """Whether to measure it there."""
        return tree.leaves <= self.leaves and self.only in (None, dtype)


def _each(tree: Tree, groups: oc.Groups) -> oc.Groups:
    """The groups, or the same of each of the layers that the tree has stacked."""
    return groups if tree.stacked is None else oc.groups.stacked(groups, tree.stacked)


def _grouped(groups: oc.Groups) -> Callable[[Tree], optax.GradientTransformation]:
    return lambda tree: oc.clip_by_groupwise_norm(LIMIT, _each(tree, groups))


def _global_float32(tree: Tree) -> optax.GradientTransformation:
    """Global clipping that hands updates on in float32, whatever dtype they came in."""
    return oc.rescale_by_norm(LIMIT, out_dtype="float32")


def _adaptive(tree: Tree) -> optax.GradientTransformation:
    return oc.adaptive_grad_clip(RATIO, groups=_each(tree, oc.groups.unit()))


def _partition(tree: Tree) -> optax.GradientTransformation:
    """Optax's global clipping of each layer by itself; of stacked layers, of all together."""
    labels = {layer: dict.fromkeys(leaves, layer) for layer, leaves in tree.shapes.items()}
    return optax.partition({layer: optax.clip_by_global_norm(LIMIT) for layer in tree.shapes}, labels)


def _recorded_clip(tree: Tree) -> optax.GradientTransformation:
    return optax.chain(oc.record(), oc.clip_by_global_norm(LIMIT))


def _reported(tree: Tree) -> optax.GradientTransformation:
    """A recording, global clipping, and what `oc.metrics` makes of it, which is in the state to be logged."""
    clip = _recorded_clip(tree)

    def init(params) -> Any:
        state = clip.init(params)
        return state, oc.metrics(state)

    def update(updates, state, params=None) -> tuple[Any, Any]:
        updates, own = clip.update(updates, state[0], params)
        return updates, (own, oc.metrics(own))

    return optax.GradientTransformation(init, update)


OTHERS = ("optax_global", "torch_foreach", "torch_loop")
BOTH = ("global", "optax_global")
ALL = {
    method.name: method
    for method in (
        Method("none", lambda tree: optax.identity(), leaves=2_000),
        Method("optax_global", lambda tree: optax.clip_by_global_norm(LIMIT), leaves=2_000),
        Method("global", lambda tree: oc.clip_by_global_norm(LIMIT), OTHERS, leaves=10_000),
        Method("global_float32", _global_float32, ("global",), only="mixed"),
        Method("layerwise", _grouped(oc.groups.layer()), (*BOTH, "optax_partition"), leaves=10_000),
        Method("leafwise", _grouped(oc.groups.leaf()), (*BOTH, "torch_leafwise"), leaves=10_000),
        Method("unitwise", _grouped(oc.groups.unit()), BOTH, leaves=10_000),
        Method("optax_partition", _partition),
        Method("adaptive", _adaptive, ("global", "optax_adaptive"), needs_params=True),
        Method("optax_adaptive", lambda tree: optax.adaptive_grad_clip(RATIO), needs_params=True),
        Method("autoclip", lambda tree: oc.autoclip(), ("global", "torch_autoclip")),
        Method("zclip", lambda tree: oc.zclip(), ("global", "torch_zclip")),
        Method("adagc", lambda tree: oc.adagc(groups=_each(tree, oc.groups.leaf())), ("global",)),
        Method("record", lambda tree: oc.record(), ("global",), clips=False),
        Method("record_clip", _recorded_clip, ("global",)),
        Method("metrics", _reported, ("global",)),
    )
}

OURS = tuple(name for name, method in ALL.items() if method.against)


def selected(names: list[str]) -> list[Method]:
    """The methods of these names with what they are compared with, in the order of `ALL`."""
    wanted = {"none", *names}
    while peers := {peer for name in wanted for peer in ALL[name].against if peer in ALL} - wanted:
        wanted |= peers
    return [method for name, method in ALL.items() if name in wanted]
