"""The short form of `chaos.py`: every named method through every disaster, and a killed process."""

import inspect
from pathlib import Path

import chaos
import jax
import jax.numpy as jnp
import pytest

import optaxclip as oc

pytest.importorskip("orbax.checkpoint")
STEPS, SIZE = 440, 110
# Compiling is what costs. These have an engine of their own for zeros in place of NaN, and run with both
# policies; the others that have two share theirs, and take turns.
BOTH = ("clip_by_layerwise_norm", "clip_per_example", "scale_by_stable_adam")
TURNS = [name for name, method in chaos.METHODS.items() if len(method.policies) > 1 and name not in BOTH]
ZERO = {*BOTH, *TURNS[1::2]}
SHORT = [(x, p) for x, p in chaos.CASES if x in BOTH or (p == "zero") == (x in ZERO)]
# Public functions that make no transformation.
OTHERS = {"describe", "group_norms", "metrics", "per_example_quantile", "rescale_tree"}


@pytest.fixture(autouse=True, scope="module")
def strict_promotion():
    """Optax mixes dtypes: no strict promotion in this file."""


@pytest.fixture
def quickly_compiled(monkeypatch):
    """What is compiled once and run for a moment needs no optimisation by LLVM."""
    options = {"xla_backend_optimization_level": 0}
    monkeypatch.setattr(
        chaos, "block", jax.jit(chaos.scanned, static_argnums=(0, 1, 2), compiler_options=options)
    )


def test_no_named_method_is_left_out():
    """Every public function that makes a transformation is one of those that are run."""
    listed = Path(__file__).with_name("api.txt").read_text(encoding="utf-8").splitlines()
    functions = {line.split("(")[0] for line in listed if "(" in line}
    named = {name for name in functions if name.islower() and "." not in name}
    assert named - OTHERS == set(chaos.METHODS)
    assert all(inspect.isfunction(getattr(oc, name)) for name in named)


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize(("name", "policy"), SHORT)
def test_no_disaster_gets_past(tmp_path, name, policy):
    """Updates keep to policy and limit, what is remembered recovers, and restored runs are the same."""
    found = chaos.trial(name, policy, STEPS, 1, tmp_path, size=SIZE, dtypes=1)
    assert not found.broken, str(found)
    assert found.steps == STEPS
    assert 60 < found.bad < STEPS
    assert found.changed > 20 or name == "record"


@pytest.mark.usefixtures("quickly_compiled")
def test_limits_may_change_their_dtype_in_the_middle_of_a_run(tmp_path):
    """From float32 to float16, to bfloat16 and to a schedule, with the state of what came before."""
    found = chaos.trial("clip_by_leafwise_norm", "propagate", 200, 3, tmp_path, size=100, tail=20)
    assert not found.broken, str(found)


def learns_everything():
    """A limit of 3 that learns from norms that are not finite."""
    return oc.Limit(
        lambda table: jnp.zeros(len(table.names)),
        lambda norm, state, ctx: (jnp.full_like(norm, 3), state + norm),
    )


@pytest.mark.usefixtures("quickly_compiled")
def test_the_run_finds_what_is_wrong(tmp_path, monkeypatch):
    """A method that hides what is not finite, is above its limit, and learns what it should not."""
    name = "clip_by_leafwise_norm"
    liar = chaos.METHODS[name]._replace(
        make=lambda c, p: oc.clip_by_leafwise_norm(learns_everything(), nonfinite="zero")
    )
    monkeypatch.setitem(chaos.METHODS, name, liar)
    found = chaos.trial(name, "propagate", 100, 0, tmp_path, size=100, dtypes=1)
    assert set(found.broken) == {chaos.CHECKS[x] for x in ("policy", "limit", "within", "learned", "kept")}


def test_a_process_that_is_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path):
    """Orbax's newest checkpoint and the recording are whole, and the run goes on from there the same."""
    assert chaos.killed("adagc", tmp_path, 0) == ""
