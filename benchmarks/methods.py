"""The methods that are compared, and what each of them is compared with."""

from collections.abc import Callable
from typing import NamedTuple

import optax

import optaxclip as oc
from benchmarks.trees import Tree

LIMIT = 1.0  # far below the norm of any leaf of standard normal entries
RATIO = 0.01  # of update to parameters, for adaptive clipping


class Method(NamedTuple):
    """A way to clip.

    Attributes:
      name: what the command line and the tables call it.
      build: makes the transformation for a tree.
      against: the peer: the Optax method for the same purpose, or global clipping for adaptive limits; None
        for Optax's own and for no clipping.
      needs_params: whether `update` reads parameters.
    """

    name: str
    build: Callable[[Tree], optax.GradientTransformation]
    against: str | None = None
    needs_params: bool = False


def _each(tree: Tree, groups: oc.Groups) -> oc.Groups:
    """The groups, or the same of each of the layers that the tree has stacked."""
    return groups if tree.stacked is None else oc.groups.stacked(groups, tree.stacked)


def _layerwise(tree: Tree) -> optax.GradientTransformation:
    return oc.clip_by_groupwise_norm(LIMIT, _each(tree, oc.groups.layer()))


def _leafwise(tree: Tree) -> optax.GradientTransformation:
    return oc.clip_by_groupwise_norm(LIMIT, _each(tree, oc.groups.leaf()))


def _adaptive(tree: Tree) -> optax.GradientTransformation:
    return oc.adaptive_grad_clip(RATIO, groups=_each(tree, oc.groups.unit()))


ALL = {
    method.name: method
    for method in (
        Method("none", lambda tree: optax.identity()),
        Method("optax_global", lambda tree: optax.clip_by_global_norm(LIMIT)),
        Method("global", lambda tree: oc.clip_by_global_norm(LIMIT), "optax_global"),
        Method("layerwise", _layerwise, "optax_global"),
        Method("leafwise", _leafwise, "optax_global"),
        Method("optax_adaptive", lambda tree: optax.adaptive_grad_clip(RATIO), needs_params=True),
        Method("adaptive", _adaptive, "optax_adaptive", needs_params=True),
        Method("autoclip", lambda tree: oc.autoclip(), "global"),
        Method("zclip", lambda tree: oc.zclip(), "global"),
        Method("adagc", lambda tree: oc.adagc(groups=_each(tree, oc.groups.leaf())), "global"),
    )
}

OURS = tuple(name for name, method in ALL.items() if method.against)


def selected(names: list[str]) -> list[Method]:
    """The methods of these names with what they are compared with, in the order of `ALL`."""
    wanted = {"none", *names}
    while peers := {peer for name in wanted if (peer := ALL[name].against)} - wanted:
        wanted |= peers
    return [method for name, method in ALL.items() if name in wanted]
