"""What other platforms than this one are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import optaxclip as oc
from benchmarks import methods, programs, trees

METHODS = {
    "global": oc.clip_by_global_norm(1.0),
    "leafwise": oc.rescale_by_norm(1.0, groups=oc.groups.leaf(), nonfinite="zero"),
    "unitwise": oc.clip_by_unitwise_norm(0.5),
}


@pytest.fixture(autouse=True, scope="module")
def strict_promotion():
    """Optax's AdamW mixes dtypes: no strict promotion in this file."""


def gradients(dtype, scale):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (64, 128), "bias": (5000,), **{f"scale_{k}": (7, 3) for k in range(12)}}
    return {name: jnp.asarray(rng.normal(size=shape) * scale).astype(dtype) for name, shape in shapes.items()}


CASES = {
    f"{dtype}, {scale}": gradients(dtype, scale)
    for dtype in ("float32", "bfloat16")
    for scale in (1e-3, 1, 100)
}
CASES["nan"] = CASES["bfloat16, 1"] | {"bias": CASES["bfloat16, 1"]["bias"].at[3].set(jnp.nan)}
CASES["inf"] = CASES["float32, 1"] | {"bias": CASES["float32, 1"]["bias"].at[3].set(jnp.inf)}


def assert_equal(x, y):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("name", METHODS)
def test_all_platforms_have_the_numbers_of_this_one(name, monkeypatch):
    """What is for other platforms than CPU, run here."""
    tx = METHODS[name]

    def found():
        jax.clear_caches()
        return {
            case: jax.device_get(jax.jit(tx.update)(grads, tx.init(grads))) for case, grads in CASES.items()
        }

    expected, taken = found(), []

    def other(*args, default, **own):
        taken.append(own)
        return default(*args)

    monkeypatch.setattr(lax, "platform_dependent", other)
    for case, (updates, state) in found().items():
        jax.tree.map(assert_equal, (updates, state), expected[case])
    assert taken
    assert all(list(own) == ["cpu"] for own in taken)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
@pytest.mark.parametrize("name", ["global", "layerwise", "unitwise", "adaptive", "record_clip", "zclip"])
def test_programs_lower_for_other_platforms(name, platform):
    """Without a device of that kind."""
    for dtype in ("float32", "bfloat16"):
        made = programs.step(methods.ALL[name], trees.ALL["mlp"], dtype)
        lowered = made.function.trace(*made.args).lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.while" in lowered
