"""Penzai: parameters by their labels."""

import jax
import jax.numpy as jnp
import pytest
from claims import drops_in, is_one, is_unit, units

import optaxclip as oc

pytest.importorskip("penzai")
from penzai import pz
from penzai.models import simple_mlp

X = pz.nx.wrap(jax.random.normal(jax.random.key(0), (8, 3))).tag("batch", "features")


@pytest.fixture(scope="module")
def model():
    """Two affine layers."""
    return simple_mlp.MLP.from_config(name="mlp", init_base_rng=jax.random.key(1), feature_sizes=[3, 4, 1])


def test_a_model_drops_in_by_its_labels(model):
    """The labels are paths of layers already, and what a named array adds to them is dropped."""
    unbound, variables = pz.unbind_params(model)
    params = {variable.label: variable.value for variable in variables}

    def loss(params):
        values = [pz.ParameterValue(value=value, label=label) for label, value in params.items()]
        return jnp.mean((pz.bind_variables(unbound, values)(X).untag("batch", "features").unwrap() - 1) ** 2)

    layers = {
        f"mlp/Affine_{k}": lambda tree, k=k: {n: x for n, x in tree.items() if f"_{k}/" in n}
        for k in range(2)
    }
    drops_in(params, loss, layers)
    assert list(oc.group_norms(params, oc.groups.leaf())) == [
        f"mlp/Affine_{k}/{own}" for k in range(2) for own in ("AddBias.bias", "Linear.weights")
    ]


def test_a_model_with_its_parameters_unfrozen_has_no_arrays(model):
    """They are variables and no leaves of numbers: unbind or freeze them first."""
    assert oc.describe(oc.groups.layer(), model).startswith("0 groups")


def test_a_frozen_model_is_called_by_its_sublayers(model):
    """Where a weight and its bias are two sublayers, and so two layers; a pattern puts them together."""
    frozen = pz.freeze_params(model)
    weights, biases = "sublayers/{}/sublayers/0", "sublayers/{}/sublayers/2"
    layers = [path.format(k) for k in (0, 2) for path in (weights, biases)]
    assert list(oc.group_norms(frozen, oc.groups.layer())) == layers
    assert list(oc.group_norms(frozen, oc.groups.leaf())) == [
        f"{layer}/{own}" for layer, own in zip(layers, ["weights", "bias"] * 2, strict=True)
    ]
    together = oc.groups.regex({r"\1": r"^(.*)/sublayers/\d+/\w+$"})
    assert list(oc.group_norms(frozen, together)) == ["sublayers/0", "sublayers/2"]


def test_a_list_of_frozen_parameters_takes_their_labels_for_names(model):
    """Without them all are one layer."""
    frozen = [variable.freeze() for variable in pz.unbind_params(model)[1]]
    assert list(oc.group_norms(frozen, oc.groups.leaf())) == ["0", "1", "2", "3"]
    assert list(oc.group_norms(frozen, oc.groups.layer())) == ["(root)"]
    labels = [parameter.label for parameter in frozen]
    assert list(oc.group_norms(frozen, oc.groups.layer(names=labels))) == ["mlp/Affine_0", "mlp/Affine_1"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "axis"),
    [
        ({"features": 3}, {"features_out": 5}, {"Linear.weights$": 0}),
        ({"embedding": 4}, {"heads": 2, "projection": 3}, {"Linear.weights$": 0, "bias$": (0, 1)}),
        ({"heads": 2, "projection": 3}, {"embedding": 4}, {r"output/Linear\.weights$": (0, 1)}),
    ],
    ids=["dense", "to heads", "from heads"],
)
def test_units_of_a_linear_layer_are_its_outputs(inputs, outputs, axis):
    """By the derivative: `Linear.weights` has inputs first, and a norm runs over these."""
    layer = pz.nn.Affine.from_config("output", jax.random.key(1), inputs, outputs)
    unbound, variables = pz.unbind_params(layer)
    params = {variable.label: variable.value for variable in variables}
    x = pz.nx.wrap(jax.random.normal(jax.random.key(0), (8, *inputs.values()))).tag("batch", *inputs)

    def forward(params):
        values = [pz.ParameterValue(value=value, label=label) for label, value in params.items()]
        y = pz.bind_variables(unbound, values)(x)
        return y.untag("batch", *outputs).unwrap().reshape(8, -1)

    found = units(params, forward, oc.groups.unit(axis))
    assert is_unit(found, "output/Linear.weights")
    assert is_one(found, "output/AddBias.bias")


def test_units_of_an_embedding_are_its_rows():
    """One for each token: the only entries that its derivative is not zero in."""
    table = pz.nn.EmbeddingTable.from_config(
        "embedder", jax.random.key(1), vocab_size=7, embedding_axes={"e": 4}
    )
    unbound, variables = pz.unbind_params(pz.nn.EmbeddingLookup(table))
    params = {variable.label: variable.value for variable in variables}

    def forward(params):
        values = [pz.ParameterValue(value=value, label=label) for label, value in params.items()]
        found = pz.bind_variables(unbound, values)(pz.nx.wrap(jnp.arange(7)).tag("tokens"))
        return found.untag("e", "tokens").unwrap()

    found = units(params, forward, oc.groups.unit({"embeddings$": 1}))
    assert is_unit(found, "embedder.embeddings")
