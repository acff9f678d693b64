"""`out_dtype`: what comes out of a clip, where that is not the dtype of the leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc

GRADS = {
    "half": jnp.array([3.1, -4.7], jnp.bfloat16),
    "single": jnp.array([1.25, 2.5], jnp.float32),
    "complex": jnp.array([1 + 2j, 3 - 1j], jnp.complex64),
    "count": jnp.array([7], jnp.int32),
}
GROUPED = ["half", "single", "complex"]


def exact(name):
    return np.asarray(GRADS[name], np.complex128 if name == "complex" else np.float64)


@pytest.fixture(scope="module")
def clipped():
    updates, stats = jax.jit(lambda grads: oc.rescale_tree(grads, 1.0, out_dtype=jnp.float32))(GRADS)
    return updates, stats


def test_leaves_come_out_in_it_and_others_as_they_are(clipped):
    """Real leaves in the dtype, complex ones in the complex dtype of its precision, integers untouched."""
    dtypes = {name: leaf.dtype for name, leaf in clipped[0].items()}
    assert dtypes == {
        "half": jnp.float32,
        "single": jnp.float32,
        "complex": jnp.complex64,
        "count": jnp.int32,
    }
    assert clipped[0]["count"] == 7


def test_nothing_is_rounded_to_the_dtype_of_the_leaf(clipped):
    """Products are those of float32 arithmetic, also of a bfloat16 leaf."""
    whole = np.sqrt(sum(np.sum(np.abs(exact(name)) ** 2) for name in GROUPED))
    for name in GROUPED:
        np.testing.assert_allclose(clipped[0][name], exact(name) / whole, rtol=1e-6)


def test_below_the_limit_entries_keep_their_values():
    """What is not clipped is only widened, which changes no number."""
    updates, _ = oc.rescale_tree(GRADS, 100.0, out_dtype=jnp.float32)
    for name in GROUPED:
        np.testing.assert_array_equal(np.asarray(updates[name], np.complex128), exact(name))


def test_rows_of_a_leaf_too():
    """Groups of units, with several factors to a leaf."""
    grads = {"kernel": jnp.arange(1.0, 7.0, dtype=jnp.bfloat16).reshape(3, 2)}
    updates, _ = oc.rescale_tree(grads, 1.0, groups=oc.groups.unit(), out_dtype=jnp.float32)
    kernel = np.arange(1.0, 7.0).reshape(3, 2)
    expected = kernel / np.linalg.norm(kernel, axis=0)
    assert updates["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-6)


def test_zero_drops_what_is_not_finite_in_it():
    """`nonfinite="zero"` gives zeros of the dtype."""
    grads = {"w": jnp.array([jnp.nan, 1.0], jnp.float16)}
    updates, _ = oc.rescale_tree(grads, 1.0, nonfinite="zero", out_dtype="float32")
    assert updates["w"].dtype == jnp.float32
    np.testing.assert_array_equal(updates["w"], [0.0, 0.0])


def test_float32_moments_stay_float32():
    """In front of Adam over float32 parameters, bfloat16 gradients leave every dtype of its state alone."""
    params, grads = {"w": jnp.ones(4)}, {"w": jnp.ones(4, jnp.bfloat16)}
    tx = optax.chain(oc.rescale_by_norm(1.0, out_dtype=jnp.float32), optax.adam(0.1))
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):  # Adam mixes dtypes
        updates, after = jax.jit(tx.update)(grads, state, params)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
    assert updates["w"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, "flaot32", 3])
def test_anything_but_a_real_dtype_is_an_error(dtype):
    with pytest.raises(TypeError, match=r"rescale_by_norm: out_dtype is .*Pass None or a real"):
        oc.rescale_by_norm(1.0, out_dtype=dtype)
