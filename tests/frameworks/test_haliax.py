"""haliax: named axes, weights with outputs first, `Stacked` layers."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from claims import drops_in, each, is_one, is_unit, units

import optaxclip as oc

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it imports from where JAX once had things
    hax = pytest.importorskip("haliax", exc_type=ImportError)
    import haliax.nn as hnn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
In, Hidden, Tokens, Layers, Batch = hax.make_axes(In=3, Hidden=4, Tokens=7, Layers=5, Batch=8)
Heads, Head = hax.make_axes(Heads=2, Head=3)
KEY = jax.random.key(0)
X = hax.random.normal(KEY, (Batch, In))
ATTENTION = oc.groups.unit({"q_proj/weight$": -1, "": "equinox"})


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
    """What is stacked: projections to heads and back, as in attention, and a dense layer."""

    q_proj: hnn.Linear
    o_proj: hnn.Linear
    dense: hnn.Linear

    @staticmethod
    def init(key):
        """One of the layers."""
        return Block(
            hnn.Linear.init(Hidden, (Heads, Head), key=key),
            hnn.Linear.init((Heads, Head), Hidden, key=key),
            hnn.Linear.init(Hidden, Hidden.alias("Out"), key=key),
        )

    def __call__(self, x):
        """Calls them in turn."""
        return hax.tanh(self.dense(x + self.o_proj(hax.tanh(self.q_proj(x)))).rename({"Out": "Hidden"}))


def test_stacked_layers_are_taken_apart():
    """As under Equinox's vmap, along the first axis; units too, those of heads by their pattern."""
    blocks = hnn.Stacked.init(Layers, Block)(key=jax.random.split(KEY, Layers.size))
    model = {"blocks": blocks, "head": hnn.Linear.init(Hidden, (), key=KEY)}
    x = hax.random.normal(KEY, (Batch, Hidden))

    def loss(model):
        return hax.mean((model["head"](model["blocks"].fold(x)) - 1) ** 2).scalar()

    layers = {
        name: select
        for own in ("dense", "o_proj", "q_proj")
        for name, select in each(
            f"blocks/stacked/{own}", 5, lambda tree, own=own: getattr(tree["blocks"].stacked, own)
        ).items()
    }
    stacked = oc.groups.stacked(oc.groups.layer(), "stacked/")
    drops_in(model, loss, layers | {"head": lambda tree: tree["head"]}, stacked)

    norms = oc.group_norms(model, oc.groups.stacked(ATTENTION, "stacked/"))
    for name, inputs in (("dense", 2), ("o_proj", (2, 3)), ("q_proj", 3)):
        weight = np.asarray(getattr(blocks.stacked, name).weight.array)
        expected = np.sqrt(np.sum(weight**2, axis=inputs)).ravel()
        np.testing.assert_allclose(norms[f"blocks/stacked/{name}/weight"], expected, rtol=1e-6)


def test_units_are_those_of_equinox():
    """Outputs are first, and the rows of an embedding are its tokens."""
    linear, embedding = hnn.Linear.init(In, Hidden, key=KEY), hnn.Embedding.init(Tokens, Hidden, key=KEY)
    assert [axis.name for axis in linear.weight.axes] == ["Hidden", "In"]
    norms = oc.group_norms({"linear": linear, "embed": embedding}, oc.groups.unit("equinox"))
    np.testing.assert_allclose(norms["linear/weight"], np.linalg.norm(linear.weight.array, axis=1), rtol=1e-6)
    assert norms["embed/weight"].shape == (Tokens.size,)
    assert norms["linear/bias"] == jnp.linalg.norm(linear.bias.array)


@pytest.mark.parametrize(
    ("In", "Out", "out_first", "axis"),
    [
        (Hidden, (Heads, Head), True, {"weight$": -1, "": "equinox"}),
        (Hidden, (Heads, Head), False, {"weight$": 0, "": "equinox"}),
        ((Heads, Head), Hidden, True, "equinox"),
        ((Heads, Head), Hidden, False, {"weight$": (0, 1), "": "equinox"}),
    ],
    ids=["to heads", "to heads, inputs first", "from heads", "from heads, inputs first"],
)
def test_units_of_several_axes_are_told_by_the_axes_that_the_norm_runs_over(In, Out, out_first, axis):
    """By the derivative: those of the inputs, which a path does not show."""
    linear = hnn.Linear.init(In, Out, key=KEY, out_first=out_first)
    outputs = linear.bias.size
    x = hax.random.normal(KEY, (Batch, *hax.axis.ensure_tuple(In)))

    def forward(linear):
        return linear(x).rearrange((Batch, *hax.axis.ensure_tuple(Out))).array.reshape(-1, outputs)

    found = units(linear, forward, oc.groups.unit(axis))
    assert is_unit(found, "weight")
    assert found["weight"].shape == (outputs, outputs)
    assert is_one(found, "bias")


def test_the_layout_of_equinox_takes_the_first_axis_for_the_outputs():
    """Why these have to be told: one norm for each head, or for each input."""
    for out_first, count in ((True, Heads.size), (False, Hidden.size)):
        linear = hnn.Linear.init(Hidden, (Heads, Head), key=KEY, out_first=out_first)
        assert oc.group_norms(linear, oc.groups.unit("equinox"))["weight"].shape == (count,)
