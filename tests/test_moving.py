"""What `docs/moving.md` tells users to write can be written: every `oc.…` in its tables and sentences."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import optaxclip as oc

PAGE = (Path(__file__).parents[1] / "docs" / "moving.md").read_text(encoding="utf-8")
CALLS = sorted(set(re.findall(r"`(oc\.\w[^`]*)`", re.sub(r"^```.*?^```", "", PAGE, flags=re.M | re.S))))
TITLES = re.findall(r"^## .*$", PAGE, re.M)
PARAMS = {"body": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "head": {"kernel": jnp.ones((2, 1))}}
LONGER = 10**0.5 + 1e-6


@pytest.fixture(scope="module")
def around():
    """What the page's names stand for."""
    groups = oc.groups.regex({"head": "^head/", "body": ".*"})
    return {
        "oc": oc,
        "groups": groups,
        "params": PARAMS,
        "opt_state": oc.clip_by_groupwise_norm(1.0, groups).init(PARAMS),
        "optimizer": optax.sgd(1.0),
        "fn": lambda path, leaf: path[0],
    }


def test_the_page_has_calls_in_tables():
    """A change of how they are written would leave nothing to check."""
    assert len(CALLS) > 20
    assert {'oc.zclip(mode="fixed", z=2.0)', "oc.clip_by_value(0.5)"} <= set(CALLS)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_in_the_guide_makes_what_it_says(call, around):
    """A transformation takes a step, which is finite and no longer than what it was given."""
    found = eval(call, around)
    if isinstance(found, optax.GradientTransformation):
        updates, _ = jax.jit(found.update)(PARAMS, found.init(PARAMS), PARAMS)
        assert 0 < optax.tree.norm(updates) < LONGER
    else:
        assert found


@pytest.mark.parametrize("title", TITLES)
def test_every_guide_has_a_block_that_runs(title):
    """Its output is checked where pages are run as doctests."""
    section = PAGE.split(f"{title}\n")[1].partition("\n## ")[0]
    assert "\n>>> " in section
