"""Checkpoints: Orbax keeps every state, and clipping can be added to a run that began without it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc

ocp = pytest.importorskip("orbax.checkpoint")
RNG = np.random.default_rng(0)
PARAMS = {"a": {"kernel": np.float32(RNG.normal(size=(3, 4))), "bias": np.zeros(4, np.float32)}}
LAYER = oc.groups.layer()
METHODS = {
    "none": optax.identity,
    "record": oc.record,
    "record, with parameters": lambda: oc.record(capacity=4, params=True),
    "numbers": lambda: oc.clip_by_layerwise_norm(0.1),
    "adagc": oc.adagc,
    "autoclip": lambda: oc.autoclip(window=4),
    "zclip": oc.zclip,
    "quantile": oc.clip_by_adaptive_quantile,
    "spectral": lambda: oc.clip_by_spectral_norm(0.1),
    "singular values": lambda: oc.clip_singular_values(0.1),
    "soft singular values": lambda: oc.soft_clip_singular_values(0.1),
    "skip": lambda: oc.skip_updates(optax.adam(0.1)),
    "carry": lambda: oc.carry_clipped(oc.clip_by_value(0.01)),
    "spikes": oc.mask_spikes,
    "aggc": oc.aggc,
    "stabilizer": oc.gradient_stabilizer,
    "momentum": lambda: oc.reset_momentum(optax.sgd(0.1, momentum=0.9), 2, 0),
    "adamw": lambda: oc.stable_adamw(0.1),
}


@pytest.mark.parametrize("name", METHODS)
def test_no_state_holds_an_array_without_entries(name):
    """Orbax refuses to save one."""
    state = jax.eval_shape(METHODS[name]().init, PARAMS)
    assert [x for x in jax.tree.leaves(state) if x.size == 0] == []


def through_orbax(path, state, like):
    """Saved and restored as a user of Orbax does."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, jax.eval_shape(lambda: like))


def step(tx):
    """One update of a small problem, jitted; the third is a spike."""

    @jax.jit
    def run(params, state):
        grads = jax.tree.map(
            lambda p: jnp.where(optax.tree.get(state, "ScaleByAdamState").count == 2, 50, 1) * p, params
        )
        updates, state = tx.update(grads, state, params, value=jnp.float32(1))
        return optax.apply_updates(params, updates), state

    return run


def test_a_restored_run_goes_on_bit_by_bit(tmp_path):
    """Recordings, limits that follow the norms and what is carried are all in the state."""
    parts = [METHODS[name]() for name in ("record", "adagc", "autoclip", "carry")]
    tx = optax.chain(*parts, optax.adam(0.1))
    run, now = step(tx), (PARAMS, tx.init(PARAMS))
    for _ in range(2):
        now = run(*now)
    restored = through_orbax(tmp_path / "state", now, (PARAMS, tx.init(PARAMS)))
    chex.assert_trees_all_equal(restored, now)
    for _ in range(2):
        now, restored = run(*now), run(*restored)
    chex.assert_trees_all_equal(restored, now)
    assert len(oc.History.from_state(restored[1], PARAMS)) == 4


def adam_after(count):
    """A run without clipping."""
    tx = optax.adam(0.1)
    run, now = step(tx), (PARAMS, tx.init(PARAMS))
    for _ in range(count):
        now = run(*now)
    return tx, now


def test_clipping_is_added_to_a_run_that_began_without_it(tmp_path):
    """Restore what was saved with what saved it, and put a fresh state of the clip in front."""
    tx, (params, state) = adam_after(2)
    clipped = optax.chain(oc.clip_by_layerwise_norm(oc.limits.ema(1.05)), tx)
    fresh = clipped.init(params)
    with pytest.raises(ValueError, match=r"(?i)structure|match"):
        through_orbax(tmp_path / "refused", state, fresh)
    old = through_orbax(tmp_path / "state", state, tx.init(params))
    chex.assert_trees_all_equal_structs((fresh[0], old), fresh)
    params, (clip, adam) = step(clipped)(params, (fresh[0], old))
    assert (int(adam[0].count), int(clip.step)) == (3, 1)
    chex.assert_trees_all_equal(params, step(tx)(*adam_after(2)[1])[0])  # ema never limits the first step


def test_a_chain_is_put_behind_the_clip_as_a_whole(tmp_path):
    """So that its saved state is one element of the new one, whatever is in it."""
    old_tx = optax.chain(optax.scale_by_adam(), optax.scale(-0.1))
    old = through_orbax(tmp_path / "state", old_tx.init(PARAMS), old_tx.init(PARAMS))
    nested = optax.chain(oc.clip_by_global_norm(1.0), old_tx)
    chex.assert_trees_all_equal((nested.init(PARAMS)[0], old), nested.init(PARAMS))


def test_clipping_is_taken_out_again(tmp_path):
    """What is behind the clip in the chain is the state that a run without it has."""
    tx = optax.adam(0.1)
    clipped = optax.chain(oc.clip_by_global_norm(0.1), tx)
    _, state = step(clipped)(PARAMS, clipped.init(PARAMS))
    restored = through_orbax(tmp_path / "state", state, clipped.init(PARAMS))
    chex.assert_trees_all_equal_structs(restored[1], tx.init(PARAMS))
    assert restored[1][0].count == 1


def test_a_limit_may_change_between_save_and_restore():
    """A number is no part of the state; neither is a schedule."""
    saved = oc.clip_by_layerwise_norm(0.1)
    _, state = jax.jit(saved.update)(PARAMS, saved.init(PARAMS))
    for limit in (2.0, optax.linear_schedule(1.0, 0.1, 10)):
        tx = oc.clip_by_layerwise_norm(limit)
        chex.assert_trees_all_equal_structs(tx.init(PARAMS), state)
        _, after = jax.jit(tx.update)(PARAMS, state)
        assert after.step == 2


def test_clipping_is_added_to_a_train_state_of_flax():
    """`tx` and `opt_state` are replaced together."""
    train_state = pytest.importorskip("flax.training.train_state")
    tx, (params, state) = adam_after(2)
    run = train_state.TrainState(step=2, apply_fn=None, params=params, tx=tx, opt_state=state)
    clip = oc.clip_by_layerwise_norm(1e-3)
    run = run.replace(tx=optax.chain(clip, run.tx), opt_state=(clip.init(run.params), run.opt_state))
    run = run.apply_gradients(grads=params)
    assert oc.metrics(run.opt_state, params, LAYER)["clip/norm_after/a"] == pytest.approx(1e-3, rel=1e-5)
    assert run.opt_state[1][0].count == 3


def test_clipping_is_added_to_an_optimizer_of_nnx():
    """A new optimizer takes over the state of the old one."""
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

    def train(optimizer):
        grads = nnx.grad(lambda model: jnp.mean(model(jnp.ones((2, 3))) ** 2))(model)
        optimizer.update(model, grads)

    old = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    train(old)
    optimizer = nnx.Optimizer(
        model, optax.chain(oc.clip_by_global_norm(1e-3), optax.adam(0.1)), wrt=nnx.Param
    )
    optimizer.opt_state = nnx.data((optimizer.opt_state[0], old.opt_state))
    optimizer.step = old.step
    train(optimizer)
    assert optimizer.step[...] == 2
    assert optimizer.opt_state[1][0].count[...] == 2
    assert float(oc.metrics(optimizer.opt_state)["clip/norm_after/whole"]) == pytest.approx(1e-3, rel=1e-5)
