r"""Which entries of an update share a norm.

Groupings look at normalised paths: the keys of the tree joined with `/`, without the wrappers that frameworks
add at the end (`value`, `raw_value`, `data_array`), so that `init` and `update` see the same names. `names=`
replaces the paths where a tree has none worth reading, such as the plain list of Keras 3.

Leaves that are not floating point or complex (integers, booleans, float0, PRNG keys), zero-size arrays and
everything under Flax's `_overwrite_with_gradient` never belong to a group: they pass through.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from optaxclip import _checks, _layouts, _paths, _patterns
from optaxclip._base import Groups, Leaf, Member
from optaxclip._layouts import Axes

__all__ = [
    "depth",
    "labels",
    "layer",
    "leaf",
    "measured_only",
    "regex",
    "scaled_only",
    "stacked",
    "unit",
    "whole",
]

ROOT = "(root)"  # the layer of arrays at the top of the tree; no path can be called so
_APART = ", or keep the leaf out with groups.regex"


def measured_only(name: str) -> Member:
    r"""Puts leaves into the norm of group `name` without scaling them.

    $$n_g = \|u_{g \cup m}\|, \qquad u'_m = u_m \quad \text{for the leaves } m \text{ that it is for}$$

    For use in place of a name in `regex` and `labels`: parameters of another optimizer that should count
    towards the global norm, say.

    Args:
      name: the group's name.

    Raises:
      TypeError: if `name` is no str, or empty.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> rule = oc.groups.regex({oc.groups.measured_only("all"): "muon", "all": ".*"})
    >>> grads = {"muon": jnp.array([4.0]), "adam": jnp.array([3.0])}
    >>> tree, stats = oc.rescale_tree(grads, 1.0, groups=rule)
    >>> print(stats.norm, tree["muon"], tree["adam"])
    [5.] [4.] [0.6]
    """
    return _named("groups.measured_only", name)._replace(scaled=False)


def scaled_only(name: str) -> Member:
    r"""Scales leaves with group `name` without counting them in its norm.

    $$n_g = \|u_g\|, \qquad u'_m = f(n_g, c_g)\,u_m \quad \text{for the leaves } m \text{ that it is for}$$

    For use in place of a name in `regex` and `labels`. A group that only has such leaves is an error.

    Args:
      name: the group's name.

    Raises:
      TypeError: if `name` is no str, or empty.

    References:
      [Megatron-LM](https://github.com/NVIDIA/Megatron-LM), whose norm leaves out shared parameters.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> rule = oc.groups.regex({oc.groups.scaled_only("all"): "copy", "all": ".*"})
    >>> grads = {"copy": jnp.array([3.0, 4.0]), "embedding": jnp.array([3.0, 4.0])}
    >>> tree, stats = oc.rescale_tree(grads, 1.0, groups=rule)
    >>> print(stats.norm, tree["copy"])
    [5.] [0.6 0.8]
    """
    return _named("groups.scaled_only", name)._replace(measured=False)


def _names(where: str, names: Sequence[str] | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    names = (names,) if isinstance(names, str) else tuple(names)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"{where}: names holds {wrong[0]!r}. Pass one path, a str, for each leaf.")
    return names


def _by_leaf(where: str, place: Callable[[Leaf], Member | None], names: Sequence[str] | None) -> Groups:
    return Groups(lambda leaves: [place(leaf) for leaf in leaves], _names(where, names))


def whole() -> Groups:
    r"""One group for the whole tree, called `whole`: its norm is the global norm.

    $$n = \|u\|, \qquad \text{by default } \sqrt{\textstyle\sum_i |u_i|^2}$$

    References:
      Pascanu et al., [On the difficulty of training recurrent neural
      networks](https://arxiv.org/abs/1211.5063), 2013.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> oc.group_norms({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, oc.groups.whole())
    {'whole': Array(5., dtype=float32)}
    """
    return _WHOLE


def layer(*, names: Sequence[str] | None = None) -> Groups:
    """One group for each layer: the arrays that hang off one module, kernel and bias together.

    A layer is called by the normalised path without its last key. Arrays at the top of the tree form the
    layer `(root)`.

    Args:
      names: paths to use in place of the tree's, one per leaf in tree order.

    References:
      Yu et al., [Block-Normalized Gradient Method](https://arxiv.org/abs/1707.04822), 2017, with layers as
      blocks.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> params = {"dense": {"kernel": jnp.array([[3.0]]), "bias": jnp.array([4.0])}}
    >>> oc.group_norms(params, oc.groups.layer())
    {'dense': Array(5., dtype=float32)}
    """
    return _by_leaf("groups.layer", lambda leaf: Member("/".join(leaf.keys[:-1]) or ROOT), names)


def leaf(*, names: Sequence[str] | None = None) -> Groups:
    """One group for each array, called by its normalised path.

    Args:
      names: paths to use in place of the tree's, one per leaf in tree order.

    References:
      [Keras' `clipnorm`](https://keras.io/api/optimizers/) goes by these.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> oc.group_norms([jnp.array([3.0, 4.0]), jnp.array([12.0])], oc.groups.leaf())
    {'0': Array(5., dtype=float32), '1': Array(12., dtype=float32)}
    """
    return _by_leaf("groups.leaf", lambda leaf: Member(leaf.path or ROOT), names)


def depth(k: int, *, names: Sequence[str] | None = None) -> Groups:
    """One group for each value of the first `k` keys of the path; `depth(0)` is one group.

    Args:
      k: how many keys, an integer from 0.
      names: paths to use in place of the tree's, one per leaf in tree order.

    Raises:
      TypeError: if `k` is not an integer.
      ValueError: if `k` is negative.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> params = {"encoder": {"a": jnp.ones(9), "b": jnp.ones(7)}, "head": {"c": jnp.ones(4)}}
    >>> oc.group_norms(params, oc.groups.depth(1))
    {'encoder': Array(4., dtype=float32), 'head': Array(2., dtype=float32)}
    """
    _checks.whole_number("groups.depth", k=k)
    return _by_leaf("groups.depth", lambda leaf: Member("/".join(leaf.keys[:k]) or ROOT), names)


def _named(where: str, name: Any) -> Member:
    if isinstance(name, str) and name:
        return Member(name)
    raise TypeError(
        f"{where}: a group is called {name!r}. Pass a str that is not empty, None to leave leaves alone, "
        "measured_only(name) or scaled_only(name)."
    )


def _member(where: str, name: Any) -> Member | None:
    return name if name is None or isinstance(name, Member) else _named(where, name)


_NO_DEFAULT = object()


def regex(
    rules: Mapping[Any, str | Sequence[str]],
    *,
    default: Any = _NO_DEFAULT,
    names: Sequence[str] | None = None,
) -> Groups:
    r"""Named groups by regular expressions on the normalised path.

    The first rule whose pattern is found in the path (`re.search`) wins; anchor it with `^` and `$` to match
    the whole path. A name may refer back to what its pattern matched: `{r"block\1": r"block_(\d+)"}` makes
    one group per block.

    Args:
      rules: from name to pattern, or to a list of patterns, tried in order. A name of None leaves the leaf
        alone; `measured_only(name)` and `scaled_only(name)` say what they are called.
      default: the name for leaves that no rule matches. Without it they are an error.
      names: paths to use in place of the tree's, one per leaf in tree order.

    Raises:
      TypeError: if a name or a pattern is of the wrong type.
      ValueError: if a pattern does not compile, might take exponential time, as `(a+)+$` does, or a name
        refers to a group it lacks; in `init`, if no rule matches a leaf, or no leaf gets a name. A name that
        only some trees have leaves for is no error: `describe` shows what a grouping does to a tree.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> params = {"embed": jnp.ones(4), "block_0": jnp.ones(9), "block_1": jnp.ones(16)}
    >>> oc.group_norms(params, oc.groups.regex({None: "embed", r"block\1": r"block_(\d+)"}))
    {'block0': Array(3., dtype=float32), 'block1': Array(4., dtype=float32)}
    """
    where = "groups.regex"
    if not isinstance(rules, Mapping):
        raise TypeError(f"{where}: rules is of type {type(rules).__name__}. Pass a dict of name: pattern.")
    compiled = []
    for name, patterns in rules.items():
        member = _member(where, name)
        several = isinstance(patterns, Sequence) and not isinstance(patterns, str | bytes)
        for pattern in patterns if several else [patterns]:
            compiled.append((member, _patterns.found_in_paths(where, pattern)))
            _check_references(where, *compiled[-1])
    fallback = _NO_DEFAULT if default is _NO_DEFAULT else _member(where, default)

    def place(leaf: Leaf) -> Member | None:
        for member, pattern in compiled:
            match = pattern.search(leaf.path)
            if match:
                return member and member._replace(group=_expand(where, match, member.group, leaf.path))
        if fallback is _NO_DEFAULT:
            patterns = _checks.listed(pattern.pattern for _, pattern in compiled)
            raise ValueError(
                f"{where}: no rule matches leaf {leaf.path!r}. Rules, in order: {patterns}. "
                "End with '.*' to catch the rest, or pass default=."
            )
        return fallback  # type: ignore[return-value]

    def assign(leaves: Sequence[Leaf]) -> list[Member | None]:
        members = [place(leaf) for leaf in leaves]
        wanted = [pattern.pattern for member, pattern in compiled if member is not None]
        if leaves and wanted and not any(members):
            raise ValueError(
                f"{where}: no leaf gets a name by {_checks.listed(wanted)}, among "
                f"{_checks.listed(leaf.path for leaf in leaves)}: nothing would be scaled. Mend the patterns."
            )
        return members

    return Groups(assign, _names(where, names))


def _check_references(where: str, member: Member | None, pattern: re.Pattern) -> None:
    """Raises if the name refers to a group that the pattern lacks, before any leaf is seen."""
    if member is None:
        return
    template = member.group.replace(r"\\", "")  # two backslashes stand for one
    for reference in re.findall(r"\\(\d+)", template) + re.findall(r"\\g<(\w+)>", template):
        known = int(reference) <= pattern.groups if reference.isdigit() else reference in pattern.groupindex
        if not known:
            raise ValueError(
                f"{where}: the name {member.group!r} refers to group {reference!r}, which the pattern "
                f"{pattern.pattern!r} lacks. Put the part of the path that it should repeat in parentheses."
            )


def _expand(where: str, match: re.Match, name: str, path: str) -> str:
    try:
        expanded = match.expand(name) if "\\" in name else name
    except re.error as error:
        raise ValueError(f"{where}: the name {name!r} cannot be filled in: {error}. Mend it.") from error
    if not expanded:
        raise ValueError(f"{where}: the name {name!r} comes out empty at leaf {path!r}. Add text to it.")
    return expanded


def labels(rule: Any, *, names: Sequence[str] | None = None) -> Groups:
    """Named groups by a function of path and leaf, or by a tree prefix of names.

    Args:
      rule: a function `(path, leaf) -> name`, or a tree of names whose structure is a prefix of the
        update's: a name stands for everything below it. The two trees may use different containers, as long
        as their keys are the same. In both, None leaves a leaf alone, and `measured_only(name)` and
        `scaled_only(name)` say what they are called.
      names: paths to use in place of the tree's, one per leaf in tree order.

    Raises:
      TypeError: if a name is not one of these.
      ValueError: in `init`, if the tree of names has none for a leaf.

    References:
      [optax.partition](https://optax.readthedocs.io/en/latest/api/combining_optimizers.html), whose labels
      are such a tree.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> params = {"body": {"w": jnp.ones(9), "b": jnp.ones(7)}, "head": {"w": jnp.ones(4)}}
    >>> oc.group_norms(params, oc.groups.labels({"body": "slow", "head": None}))
    {'slow': Array(4., dtype=float32)}
    >>> oc.group_norms(params, oc.groups.labels(lambda path, leaf: path[-1]))
    {'b': Array(2.6457512, dtype=float32), 'w': Array(3.6055512, dtype=float32)}
    """
    where = "groups.labels"
    # An Equinox module is callable and yet a tree: a function is what JAX sees as a leaf.
    if callable(rule) and jax.tree_util.all_leaves([rule]):
        return _by_leaf(where, lambda leaf: _member(where, rule(leaf.path, leaf.value)), names)
    prefix = {
        _paths.parts(keys): _member(where, name)
        for keys, name in _paths.flatten(rule, is_leaf=lambda x: x is None or isinstance(x, Member))
    }

    def place(leaf: Leaf) -> Member | None:
        at = _paths.nearest(_paths.parts(leaf.keys), prefix)
        if at is not None:
            return prefix[at]
        raise ValueError(
            f"{where}: no name for leaf {leaf.path!r}. Names are given at "
            f"{_checks.listed('/'.join(keys) for keys in prefix)}. Add one at or above the leaf."
        )

    return _by_leaf(where, place, names)


def unit(axis: Axes = None, *, names: Sequence[str] | None = None) -> Groups:
    r"""One group for each output unit of each array, as adaptive gradient clipping has it.

    $$n_j = \sqrt{\textstyle\sum_i |w_{ij}|^2} \quad \text{for output } j \text{ of a dense kernel, in L2}$$

    By default the norm runs over these axes, following JAX's layouts with outputs last:

    | rank | layout | norm over | groups |
    | --- | --- | --- | --- |
    | 0, 1 | scale, bias | all | one |
    | 2 | dense `(in, out)` | 0 | one per output |
    | 3 | attention `(model, heads, head)` | 0 | one per head and feature |
    | 4 | convolution `HWIO` | 0, 1, 2 | one per output channel |
    | 5 | convolution `DHWIO` | 0, 1, 2, 3 | one per output channel |
    | 6 | any, outputs last | 0, 1, 2, 3, 4 | one per output |

    An array with at most one axis longer than 1 counts as a vector, one group, as in the paper's code and
    Optax.

    Ranks do not tell a 1-D convolution `WIO` from attention, an attention output `(heads, head, model)` from
    its input, or Equinox's `(out, in)` from `(in, out)`. Names do: `"equinox"`, `"flax"`, `"haiku"` and
    `"keras"` stand for how that framework calls and shapes its arrays (haliax is as Equinox where a layer
    has one output axis). With them biases and scales of any rank are one group, and an embedding has one for
    each of its rows, a token.

    Args:
      axis: the axes that the norm runs over, for all arrays, negative ones counted from the end; or the name
        of a framework; or a dict from pattern to one of these, where the first pattern found in the path wins
        and the rest gets the default: `{"fused_qkv/kernel$": 0, "": "flax"}`.
      names: paths to use in place of the tree's, one per leaf in tree order.

    Raises:
      TypeError: if an axis is not an integer.
      ValueError: if the framework is none of these; in `init`, if an axis is out of range or, without a
        framework, a rank above 6 has no axes.

    References:
      Brock et al., [High-Performance Large-Scale Image Recognition Without
      Normalization](https://arxiv.org/abs/2102.06171), 2021.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> oc.group_norms({"kernel": jnp.array([[3.0, 5.0], [4.0, 12.0]])}, oc.groups.unit())
    {'kernel': Array([ 5., 13.], dtype=float32)}
    >>> linear = {"weight": jnp.array([[3.0, 4.0], [5.0, 12.0]]), "bias": jnp.array([0.6, 0.8])}
    >>> for axis in ("equinox", {"weight$": 1}):
    ...     norms = oc.group_norms(linear, oc.groups.unit(axis))
    ...     print(norms["weight"], norms["bias"])
    [ 5. 13.] 1.0
    [ 5. 13.] 1.0
    """
    where = "groups.unit"
    chosen = _layouts.chosen(where, axis)

    def place(leaf: Leaf) -> Member:
        axes = chosen(leaf)
        if isinstance(axes, tuple):
            reduced = {_layouts.in_range(where, a, leaf, _APART) for a in axes}
        else:
            reduced = _layouts.reduced(where, leaf, axes)
        return Member(leaf.path or ROOT, rows=tuple(a for a in range(len(leaf.shape)) if a not in reduced))

    return _by_leaf(where, place, names)


def stacked(inner: Groups, where: str | Callable[[str], bool], axis: int = 0) -> Groups:
    r"""Takes leaves that hold one layer per index of an axis apart: one group per index.

    $$n_{g,k} = \|u_{g,k}\| \quad \text{over the entries at index } k \text{ of the axis}$$

    For models that scan over their layers. The result equals `inner` on the unstacked layers, one by one.

    Args:
      inner: how each unstacked layer is grouped: `layer`, `leaf`, `unit` or any other.
      where: which leaves are stacked: a regular expression that is found in their paths, or a function of
        the path.
      axis: the axis that counts the layers: 0 for Flax's `nn.scan`, 1 for MaxText's default.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: in `init`, if no leaf matches, the axis is out of range for one that does, or a group has
        both stacked and other leaves.

    References:
      `scan_aware_clip_by_block_rms` of [Levanter](https://github.com/marin-community/levanter).

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> params = {"layers": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.zeros((3, 2))}, "head": jnp.ones(4)}
    >>> oc.group_norms(params, oc.groups.stacked(oc.groups.layer(), "layers"))
    {'(root)': Array(2., dtype=float32), 'layers': Array([2., 2., 2.], dtype=float32)}
    """
    here = "groups.stacked"
    _checks.spec(here, Groups, inner=inner)
    _checks.whole_number(here, axis=axis, least=-64)
    matches = where if callable(where) else _patterns.found_in_paths(here, where).search

    def assign(leaves: Sequence[Leaf]) -> list[Member | None]:
        axes = [
            _layouts.in_range(here, axis, leaf, _APART) if matches(leaf.path) else None for leaf in leaves
        ]
        if leaves and all(a is None for a in axes):
            raise ValueError(
                f"{here}: no leaf matches {where!r}, among {_checks.listed(leaf.path for leaf in leaves)}. "
                "Mend the pattern."
            )
        unstacked = [leaf if a is None else _without(leaf, a) for leaf, a in zip(leaves, axes, strict=True)]
        members = inner.assign(unstacked)
        return [m if m is None or a is None else _stack(m, a) for m, a in zip(members, axes, strict=True)]

    return Groups(assign, inner.names)


def _without(leaf: Leaf, axis: int) -> Leaf:
    shape = leaf.shape[:axis] + leaf.shape[axis + 1 :]
    return leaf._replace(value=jax.ShapeDtypeStruct(shape, leaf.value.dtype))


def _stack(member: Member, axis: int) -> Member:
    shifted = tuple(a + (a >= axis) for a in member.rows)
    return member._replace(rows=tuple(sorted((axis, *shifted))))


_WHOLE = Groups(lambda leaves: [Member("whole") for _ in leaves])
