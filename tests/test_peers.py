"""Step for step beside what others published: the extra `peers` brings their packages."""

import numpy as np
import pytest
from peers import SHAPES, STEPS, assert_same, gradients, ours

import optaxclip as oc

torch = pytest.importorskip("torch", reason="the extra 'peers' is not installed")


def theirs(grads, make):
    """The updates of every step of something with PyTorch's parameters; `make` returns what to call."""
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(s)) for name, s in SHAPES.items()})
    clip, out = make(model), []
    for k in range(STEPS):
        for name, parameter in model.items():
            parameter.grad = torch.tensor(grads[name][k])
        clip()
        out.append({name: parameter.grad.numpy().copy() for name, parameter in model.items()})
    return {name: np.stack([step[name] for step in out]) for name in SHAPES}


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
