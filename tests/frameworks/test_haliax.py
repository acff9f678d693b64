"""haliax: named axes, weights with outputs first, `Stacked` layers."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from claims import drops_in

import optaxclip as oc

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it imports from where JAX once had things
    hax = pytest.importorskip("haliax", exc_type=ImportError)
    import haliax.nn as hnn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
In, Hidden, Tokens, Layers, Batch = hax.make_axes(In=3, Hidden=4, Tokens=7, Layers=5, Batch=8)
KEY = jax.random.key(0)
X = hax.random.normal(KEY, (Batch, In))


def test_a_module_drops_in():
    """What a named array adds to a path is dropped."""
    model = {"first": hnn.Linear.init(In, Hidden, key=KEY), "last": hnn.Linear.init(Hidden, (), key=KEY)}

    def loss(model):
        hidden = hax.tanh(model["first"](X))
        return hax.mean((model["last"](hidden) - 1) ** 2).scalar()

    assert list(oc.group_norms(model, oc.groups.leaf())) == [
        "first/bias",
        "first/weight",
        "last/bias",
        "last/weight",
    ]
    drops_in(model, loss, {name: lambda tree, name=name: tree[name] for name in model})


class Block(eqx.Module):
    """What is stacked."""

    dense: hnn.Linear

    @staticmethod
    def init(key):
        """One of the layers."""
        return Block(hnn.Linear.init(Hidden, Hidden.alias("Out"), key=key))


def test_stacked_layers_are_taken_apart():
    """As under Equinox's vmap, along the first axis."""
    model = hnn.Stacked.init(Layers, Block)(key=jax.random.split(KEY, Layers.size))
    stacked = oc.groups.stacked(oc.groups.layer(), "stacked/")
    norms = oc.group_norms(model, stacked)["stacked/dense"]
    weight, bias = model.stacked.dense.weight.array, model.stacked.dense.bias.array
    expected = [np.linalg.norm(np.append(weight[k], bias[k])) for k in range(5)]
    np.testing.assert_allclose(norms, expected, rtol=1e-6)


def test_units_are_those_of_equinox():
    """Outputs are first, and the rows of an embedding are its tokens."""
    linear, embedding = hnn.Linear.init(In, Hidden, key=KEY), hnn.Embedding.init(Tokens, Hidden, key=KEY)
    assert [axis.name for axis in linear.weight.axes] == ["Hidden", "In"]
    norms = oc.group_norms({"linear": linear, "embed": embedding}, oc.groups.unit("equinox"))
    np.testing.assert_allclose(norms["linear/weight"], np.linalg.norm(linear.weight.array, axis=1), rtol=1e-6)
    assert norms["embed/weight"].shape == (Tokens.size,)
    assert norms["linear/bias"] == jnp.linalg.norm(linear.bias.array)
