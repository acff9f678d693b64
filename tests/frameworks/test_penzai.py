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


UNITS = {r"output\.weights$": (0, 1), "weights$": 0, "embeddings$": 1}
HEADS = {"heads": 2, "projection": 3}


@pytest.mark.parametrize(
    ("kind", "name", "inputs", "outputs", "axis"),
    [
        (pz.nn.Affine, "mlp", {"features": 3}, {"features_out": 5}, UNITS),
        (pz.nn.Affine, "mlp", {"embedding": 4}, HEADS, {"bias$": (0, 1), **UNITS}),
        (pz.nn.Linear, "attention/query", {"embedding": 4}, HEADS, UNITS),
        (pz.nn.Linear, "attention/output", HEADS, {"embedding": 4}, UNITS),
    ],
    ids=["dense", "to heads, with a bias", "query", "output"],
)
def test_units_of_a_linear_layer_are_its_outputs(kind, name, inputs, outputs, axis):
    """By the derivative: weights have inputs first, and a norm runs over these."""
    unbound, variables = pz.unbind_params(kind.from_config(name, jax.random.key(1), inputs, outputs))
    params = {variable.label: variable.value for variable in variables}
    x = pz.nx.wrap(jax.random.normal(jax.random.key(0), (8, *inputs.values()))).tag("batch", *inputs)

    def forward(params):
        values = [pz.ParameterValue(value=value, label=label) for label, value in params.items()]
        y = pz.bind_variables(unbound, values)(x)
        return y.untag("batch", *outputs).unwrap().reshape(8, -1)

    found = units(params, forward, oc.groups.unit(axis))
    if kind is pz.nn.Affine:
        assert is_one(found, f"{name}/AddBias.bias")
    assert is_unit(found, f"{name}/Linear.weights" if kind is pz.nn.Affine else f"{name}.weights")


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

    found = units(params, forward, oc.groups.unit(UNITS))
    assert is_unit(found, "embedder.embeddings")
