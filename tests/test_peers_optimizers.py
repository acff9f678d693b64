"""Step for step beside pytorch-optimizer 4.1, which brings clipping inside of whole optimizers.

Where its optimizers average gradients, β1 is 0 here, so that the average is what the clipping let through.

What it computes otherwise is left out: unit norms of arrays of rank 3 (its AGC runs over the input axis of a
one-dimensional convolution and not over its width), and SPAM's momentum reset (Adam's count goes on there).
"""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peers import STEPS, assert_same, gradients, ours, walked

import optaxclip as oc

torch = pytest.importorskip("torch", reason="the extra 'peers' is not installed")
peer = pytest.importorskip("pytorch_optimizer", reason="the extra 'peers' is not installed")

MATRICES = {"a": (3, 2), "b": (2, 4)}
LAYOUTS = {"bias": (0,), "conv": (2, 3, 1, 0), "dense": (1, 0)}  # the axes of JAX's layouts in PyTorch's
ARRAYS = {"bias": (5,), "conv": (4, 3, 2, 5), "dense": (4, 5)}  # PyTorch's OIHW and (out, in)


def theirs(make, grads, read, params=None):
    """What `read` finds for each parameter after every step of the optimizer that `make` returns."""
    start = (
        {name: np.zeros(x.shape[1:], np.float32) for name, x in grads.items()} if params is None else params
    )
    model = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
    optimizer = make(list(model.values()))
    out = {name: [] for name in grads}
    for k in range(STEPS):
        for name, parameter in model.items():
            parameter.grad = torch.tensor(grads[name][k])
        optimizer.step()
        for name, parameter in model.items():
            found = read(parameter, optimizer.state[parameter]).detach().numpy()
            out[name].append(found.reshape(parameter.shape).copy())
    return {name: np.stack(x) for name, x in out.items()}


def average(parameter, state):
    return state["exp_avg"]


def weights(seed, shapes):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def as_jax(tree, leading=0):
    """Arrays in JAX's layouts, behind `leading` axes that stay where they are."""
    first = tuple(range(leading))
    return {
        name: jnp.transpose(jnp.asarray(x), first + tuple(leading + a for a in LAYOUTS[name]))
        for name, x in tree.items()
    }


@pytest.fixture(scope="module")
def agc():
    """Gradients and parameters in PyTorch's layouts, and what theirs clips them to at 0.1."""
    grads, params = gradients(0, ARRAYS), weights(0, ARRAYS)
    params["dense"][1] = 0.0  # a unit that counts as `eps`
    clipped = {
        name: np.stack([peer.agc(torch.tensor(params[name]), torch.tensor(g), 1e-3, 0.1).numpy() for g in x])
        for name, x in grads.items()
    }
    return grads, params, clipped


def test_adaptive_clipping_by_unit_in_the_layouts_of_jax_is_agc_in_those_of_pytorch(agc):
    """The default axes are one output unit of a dense layer, a convolution or a bias, transposed."""
    grads, params, expected = agc
    found = ours(oc.adaptive_grad_clip(0.1, eps=1e-3), as_jax(grads, 1), as_jax(params))
    assert_same(found, as_jax(expected, 1), 2e-6)


@pytest.mark.parametrize("axis", ["equinox", {"dense": 1, "conv": (1, 2, 3)}])
def test_adaptive_clipping_of_arrays_with_outputs_first_is_agc_as_it_stands(agc, axis):
    """`(out, in)` and OIHW, not transposed: numbers are the axes that a norm runs over, not the outputs'."""
    grads, params, expected = agc
    found = ours(oc.adaptive_grad_clip(0.1, axis=axis), grads, params)
    assert_same(found, expected, 2e-6)
    wrong = ours(oc.adaptive_grad_clip(0.1, axis={"dense|conv": 0}), grads, params)
    for name in ("dense", "conv"):
        assert np.abs(wrong[name] / expected[name] - 1).max() > 0.5


def test_centralising_in_the_layouts_of_jax_is_that_of_pytorch_in_its_own():
    """A mean runs over all axes of an array but its outputs."""
    grads = gradients(1, ARRAYS)
    expected = {name: torch.tensor(x) for name, x in grads.items()}
    for k in range(STEPS):
        for x in expected.values():
            peer.centralize_gradient(x[k])
    found = ours(oc.centralize(), as_jax(grads, 1))
    for name, x in as_jax({name: x.numpy() for name, x in expected.items()}, 1).items():
        np.testing.assert_allclose(found[name], x, rtol=0, atol=1e-6 * np.abs(x).max(), err_msg=name)


@pytest.mark.parametrize(("warmup", "max_norm"), [(100, 1.0), (20, 0.1), (1, 50.0)])
def test_adagc_follows_theirs(warmup, max_norm):
    """Through warm-up, spikes and a rise, on finite norms that are not zero."""
    grads = gradients(2)

    def make(params):
        options = {"betas": (0.0, 0.999), "beta": 0.98, "lambda_rel": 1.05, "weight_decay": 0.0, "eps": 0.0}
        return peer.AdaGC(params, lambda_abs=max_norm, warmup_steps=warmup + 1, **options)

    tx = oc.adagc(1.05, 0.98, warmup=warmup, max_norm=max_norm, eps=0.0)
    assert_same(ours(tx, grads), theirs(make, grads, average), 1e-5)


def test_stable_spam_is_clipping_of_entries_and_then_a_norm_from_two_moments():
    """Its resets of the momentum, at every 70th step, leave both limits alone, as they should."""
    grads = gradients(3)

    def make(params):
        return peer.StableSPAM(params, betas=(0.0, 0.999), update_proj_gap=70)

    tx = optax.chain(oc.adaptive_value_clip(0.999), oc.gradient_stabilizer(0.7, 0.9, eps=1e-8))
    assert_same(ours(tx, grads), theirs(make, grads, average), 1e-5)


def test_spikes_are_masked_as_by_spam():
    """Where no second moment is 0, over periods of 70 steps; a spike is at the first step not spared."""
    grads = gradients(4)

    def make(params):
        return peer.SPAM(params, betas=(0.0, 0.99), threshold=20, grad_accu_steps=21, update_proj_gap=70)

    tx = oc.mask_spikes(20.0, period=70, grace=21, decay=0.99)
    found = ours(tx, grads)
    assert any((found[name] != grads[name]).sum() > 20 for name in grads)
    assert_same(found, theirs(make, grads, average), 1e-5)


def test_a_bound_that_grows_with_the_steps_is_that_of_adopt():
    """What ADOPT clips are gradients over earlier second moments; those come from a run without a bound.

    It counts the first step, which only learns, as 1; Optax's counts it as 0.
    """
    grads = gradients(5)

    def adopt(bound):
        return lambda params: peer.ADOPT(params, betas=(0.0, 0.99), clip_lambda=bound)

    runs = [theirs(adopt(bound), grads, average) for bound in (None, lambda step: step**0.25)]
    free, expected = ({name: x[1:] for name, x in run.items()} for run in runs)
    tx = oc.clip_by_value(lambda step: jnp.float32(step + 2) ** 0.25)
    assert_same(ours(tx, free), expected, 1e-6)
    assert any((free[name] != expected[name]).any() for name in grads)


def test_clipping_by_block_rms_is_that_of_adafactor():
    """On its preconditioned updates, which a threshold out of reach leaves as they are."""
    grads = gradients(6)

    def adafactor(threshold):
        options = {"lr": 1.0, "betas": (0.0, 0.999), "scale_parameter": False, "relative_step": False}
        options["momentum_dtype"] = torch.float32
        return lambda params: peer.AdaFactor(params, clip_threshold=threshold, **options)

    free, expected = (theirs(adafactor(threshold), grads, average) for threshold in (1e30, 1.0))
    assert_same(ours(oc.clip_by_block_rms(1.0), free), expected, 1e-6)
    assert any((free[name] != expected[name]).any() for name in grads)


def test_dividing_by_a_running_norm_is_what_novograd_does_first():
    grads = gradients(7)

    def make(params):
        return peer.NovoGrad(params, betas=(0.0, 0.98), eps=1e-8)

    found = ours(oc.normalize_by_running_norm(0.98, eps=1e-8), grads)
    assert_same(found, theirs(make, grads, lambda p, state: state["moments"]), 1e-5)


def test_adanorm_follows_theirs_once_its_mean_starts_at_the_first_norm():
    """Theirs starts at 0, as the paper's, and scales nothing before it has risen; see `docs/methods.md`."""
    grads = gradients(8)
    expected = {}
    for name, x in grads.items():
        mean = torch.tensor([np.linalg.norm(x[0])])
        rescale = peer.AdaNorm.get_adanorm_gradient
        expected[name] = np.stack([rescale(torch.tensor(g), True, mean, 0.95).numpy() for g in x])
    assert_same(ours(oc.adanorm(0.95), grads), expected, 1e-5)


def test_clipping_before_adan_is_that_within():
    """Adan clips the whole update and keeps its negative for the next difference; its eps is 1e-8."""
    grads = gradients(9)

    def make(params):
        return peer.Adan(params, max_grad_norm=0.7)

    expected = theirs(make, grads, lambda p, state: -state["previous_grad"])
    assert_same(ours(oc.clip_by_global_norm(0.7, eps=1e-8), grads), expected, 1e-6)


def test_the_trust_ratio_is_that_of_lamb():
    """With the parameters' norm counted up to 10, and an eps of 1e-6 on Adam's direction."""
    grads = gradients(10, MATRICES)
    params = weights(10, MATRICES)
    params["b"] *= 10 / np.linalg.norm(params["a"])
    assert np.linalg.norm(params["a"]) < 10 < np.linalg.norm(params["b"])

    def make(params):
        return peer.Lamb(params, lr=0.0, eps=1e-6, pre_norm=False)

    def direction(parameter, state):
        return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-6)

    free = theirs(make, grads, direction, params)
    expected = theirs(make, grads, lambda p, s: direction(p, s) * s["trust_ratio"], params)
    found = ours(oc.lamb_trust_ratio(eps=1e-6), free, {name: jnp.asarray(x) for name, x in params.items()})
    assert_same(found, expected, 2e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_larc_without_clipping_is_lars(weight_decay):
    """For arrays of rank 2 and more; LARS leaves the others alone."""
    grads, params = gradients(11, MATRICES), weights(11, MATRICES)

    def make(params):
        return peer.LARS(params, lr=0.0, momentum=0.0, weight_decay=weight_decay, trust_coefficient=0.02)

    tx = oc.larc(1.0, 0.02, clip=False, weight_decay=weight_decay, eps=0.0)
    found = ours(tx, grads, {name: jnp.asarray(x) for name, x in params.items()})
    expected = theirs(make, grads, lambda p, state: p.grad, params)
    for name, x in expected.items():  # a decay may nearly cancel a gradient's entry
        np.testing.assert_allclose(found[name], x, rtol=2e-6, atol=1e-6 * np.abs(x).max(), err_msg=name)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_stable_adamw_takes_the_same_path(weight_decay):
    """The parameters after each of 200 steps, with moments, ratio, direction and decay in their order."""
    grads, params = gradients(12), weights(12, {"a": (3, 2), "b": (4,)})

    def make(params):
        return peer.StableAdamW(params, lr=0.05, betas=(0.9, 0.99), eps=1e-6, weight_decay=weight_decay)

    expected = theirs(make, grads, lambda p, state: p, params)
    tx = oc.stable_adamw(0.05, 0.9, 0.99, eps=1e-6, weight_decay=weight_decay)
    found = walked(tx, grads, {name: jnp.asarray(x) for name, x in params.items()})
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=0, atol=1e-5, err_msg=name)
