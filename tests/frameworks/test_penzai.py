"""Penzai: parameters by their labels."""

import jax
import jax.numpy as jnp
import pytest
from claims import drops_in

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
    assert "mlp/Affine_0/Linear.weights" in oc.group_norms(params, oc.groups.leaf())


def test_a_model_with_its_parameters_unfrozen_has_no_arrays(model):
    """They are variables and no leaves of numbers: unbind or freeze them first."""
    assert oc.describe(oc.groups.layer(), model).startswith("0 groups")
    frozen = pz.freeze_params(model)
    assert len(oc.group_norms(frozen, oc.groups.leaf())) == 4
