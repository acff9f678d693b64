"""Step for step beside what others published: the extra `peers` brings their packages."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import DRAWN, assert_same, drawn, gradients, middle, ours

import optaxclip as oc

torch = pytest.importorskip("torch", reason="the extra 'peers' is not installed")


def theirs(grads, make):
    """The updates of every step of something with PyTorch's parameters; `make` returns what to call."""
    leaves, treedef = jax.tree.flatten(grads)
    model = torch.nn.ParameterList([torch.zeros(x.shape[1:]) for x in leaves])
    clip, out = make(model), []
    for step in zip(*leaves, strict=True):
        for parameter, x in zip(model, step, strict=True):
            parameter.grad = torch.tensor(np.array(x))
        clip()
        out.append([parameter.grad.numpy().copy() for parameter in model])
    return treedef.unflatten([np.stack(x) for x in zip(*out, strict=True)])


@pytest.mark.parametrize("seed", DRAWN)
def test_any_tree_is_clipped_as_by_pytorch(seed):
    """As a whole, what hangs off the top by its own norm, each parameter, and by value."""
    grads = gradients(seed, drawn(seed))
    top = [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(grads)]
    limit, norm = middle(grads), torch.nn.utils.clip_grad_norm_

    def parts(model):
        own = [[p for p, key in zip(model, top, strict=True) if key == name] for name in sorted(set(top))]
        return lambda: [norm(parameters, limit / 2) for parameters in own]

    pairs = [
        (oc.clip_by_global_norm(limit, eps=1e-6), lambda m: lambda: norm(m.parameters(), limit)),
        (oc.clip_by_groupwise_norm(limit / 2, oc.groups.depth(1), eps=1e-6), parts),
        (oc.clip_by_leafwise_norm(0.5, eps=1e-6), lambda m: lambda: [norm([p], 0.5) for p in m]),
        (oc.clip_by_value(0.2), lambda m: lambda: torch.nn.utils.clip_grad_value_(m.parameters(), 0.2)),
    ]
    for tx, make in pairs:
        assert_same(ours(tx, grads), theirs(grads, make), 1e-6)


def test_the_numbers_of_the_guide_are_those_of_pytorch():
    """`docs/moving.md` shows them, where they can be run without PyTorch."""
    page = (Path(__file__).parents[1] / "docs" / "moving.md").read_text(encoding="utf-8")
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([0.003, 0.004])
    torch.nn.utils.clip_grad_norm_([parameter], 0.001)
    block = page.split("## From PyTorch")[1].partition("```\n")[0]
    assert f"\n{jnp.array(parameter.grad.numpy())}\n" in block


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 100.0])
def test_global_clipping_has_the_numbers_of_pytorch(max_norm):
    """An eps of 1e-6 is PyTorch's, to 1e-6."""
    grads = gradients(0)
    expected = theirs(grads, lambda m: lambda: torch.nn.utils.clip_grad_norm_(m.parameters(), max_norm))
    assert_same(ours(oc.clip_by_global_norm(max_norm, eps=1e-6), grads), expected, 1e-6)


def test_leafwise_clipping_has_the_numbers_of_pytorch_parameter_by_parameter():
    grads = gradients(1)

    def make(model):
        return lambda: [torch.nn.utils.clip_grad_norm_([p], 0.5) for p in model.parameters()]

    assert_same(ours(oc.clip_by_leafwise_norm(0.5, eps=1e-6), grads), theirs(grads, make), 1e-6)


@pytest.mark.parametrize("order", [1.0, 3.0, float("inf")])
def test_other_norms_have_the_numbers_of_pytorch(order):
    grads = gradients(2)
    norm = {1.0: oc.norms.l1(), 3.0: oc.norms.lp(3), float("inf"): oc.norms.linf()}[order]

    def make(model):
        return lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5, norm_type=order)

    assert_same(ours(oc.rescale_by_norm(0.5, norm=norm, eps=1e-6), grads), theirs(grads, make), 2e-6)


def test_clipping_by_value_has_the_numbers_of_pytorch():
    grads = gradients(3)
    expected = theirs(grads, lambda m: lambda: torch.nn.utils.clip_grad_value_(m.parameters(), 0.2))
    assert_same(ours(oc.clip_by_value(0.2), grads), expected, 0)


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, {}),
        ({"max_norm": None}, {"max_grad_norm": None}),
        ({"max_norm": None, "mode": "mean"}, {"max_grad_norm": None, "clip_option": "mean"}),
        (
            {"max_norm": None, "mode": "fixed", "z": 2.0},
            {"max_grad_norm": None, "mode": "percentile", "z_thresh": 2.0},
        ),
        (
            {"max_norm": 2.0, "factor": 0.8, "decay": 0.9},
            {"max_grad_norm": 2.0, "clip_factor": 0.8, "alpha": 0.9},
        ),
        (
            {"max_norm": None, "learn_from_spikes": False, "warmup": 10},
            {"max_grad_norm": None, "skip_update_on_spike": True, "warmup_steps": 10},
        ),
    ],
)
def test_zclip_follows_the_package_of_its_authors(options, same):
    """Step for step, in all modes, on finite norms that are not zero."""
    theirs_zclip = pytest.importorskip("zclip")
    grads = gradients(4)

    def make(model):
        clip = theirs_zclip.ZClip(**same)
        return lambda: clip.step(model)

    assert_same(ours(oc.zclip(**options), grads), theirs(grads, make), 3e-5)


def test_quantile_clip_follows_autoclip_on_the_registry():
    """`QuantileClip` of the package `autoclip`, parameter by parameter."""
    autoclip = pytest.importorskip("autoclip.torch")
    grads = gradients(5)

    def make(model):
        return autoclip.QuantileClip(model.parameters(), quantile=0.75, history_length=30).step

    tx = oc.quantile_clip(75.0, window=30, groups=oc.groups.leaf())
    assert_same(ours(tx, grads), theirs(grads, make), 1e-5)
