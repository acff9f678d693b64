"""What happens where `axis_name` is forgotten or wrong: the table in docs/scaling.md."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import optaxclip as oc

GRADS = {"split": jnp.ones(16), "whole": jnp.ones(4)}
SPECS = {"split": P("data"), "whole": P()}


def clip(axis_name=None):
    tx = oc.clip_by_global_norm(1.0, axis_name=axis_name)
    return lambda grads: tx.update(grads, tx.init(grads))


def mapped(step, specs, out, **options):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:8])
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(specs,), out_specs=out, **options))


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.float64(x))) for x in jax.tree.leaves(tree)))


def test_named_it_is_right():
    """With the axis named, the update has the limit for its norm."""
    updates, state = mapped(clip("data"), SPECS, (SPECS, P()))(GRADS)
    assert norm(updates) == pytest.approx(1.0)
    assert state.norm == pytest.approx([np.sqrt(20)])


def test_forgotten_it_is_an_error_where_something_must_be_the_same_on_all_devices():
    """JAX finds that a replicated leaf, or the state, differs between devices."""
    message = "require replication which can't be statically inferred"
    with pytest.raises(ValueError, match=message):
        mapped(lambda grads: clip()(grads)[0], SPECS, SPECS)(GRADS)
    with pytest.raises(ValueError, match=message):
        mapped(clip(), P("data"), (P("data"), P()))(GRADS["split"])


def test_forgotten_it_is_wrong_where_all_is_split():
    """Each of eight devices clips its part to the limit, and no error says so."""
    updates = mapped(lambda x: clip()(x)[0], P("data"), P("data"))(GRADS["split"])
    assert norm(updates) == pytest.approx(np.sqrt(8))


def test_forgotten_it_is_wrong_where_jax_does_not_look():
    """So it is with check_vma=False, and under pmap."""
    updates, _ = mapped(clip(), SPECS, (SPECS, P()), check_vma=False)(GRADS)
    assert norm(updates) > 1.8
    devices = jax.devices("cpu")[:8]
    updates = jax.pmap(lambda x: clip()(x)[0], "data", devices=devices)(jnp.ones((8, 4)))
    assert norm(updates) == pytest.approx(np.sqrt(8))


def test_an_unknown_axis_is_an_error():
    """JAX names an axis that the mesh does not have, or that stands outside of shard_map."""
    with pytest.raises(NameError, match="unbound axis name: modle"):
        mapped(clip("modle"), SPECS, (SPECS, P()))(GRADS)
    with pytest.raises(NameError, match="unbound axis name: data"):
        jax.jit(clip("data"))(GRADS)
