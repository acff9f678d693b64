"""What the library is to reach, row by row."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.methods import ADAPTIVE
from benchmarks.trees import Tree

LARGE = ("gpt2", "gpt2_stacked", "one_leaf")  # beside which calling a program costs nothing
GPT2 = ("gpt2", "gpt2_stacked")
ANY = None
GROUPED = ("layerwise", "leafwise", "unitwise")
CLIPPING = ("global", *GROUPED)
TELEMETRY = ("record", "record_clip", "metrics")
ONE_BY_ONE = ("global", "layerwise", "leafwise")
COPY = 1.25  # of the time that moving the bytes takes


class Target(NamedTuple):
    """Something to reach.

    Attributes:
      work: what it is about, in words.
      limit: the largest ratio, or value where `against` is None; or a function of the tree.
      suite: where it is measured.
      methods: what is to reach it.
      against: what the ratio is over.
      trees: the trees it is for, all if None; so are the others.
      dtypes: what the command line calls them.
      cases: as in a row.
    """

    work: str
    limit: float | Callable[[Tree], float]
    suite: str
    methods: tuple[str, ...]
    against: str | None
    trees: tuple[str, ...] | None = ANY
    dtypes: tuple[str, ...] | None = ANY
    cases: tuple[str, ...] | None = ANY

    def reach(self, tree: Tree) -> float:
        """The limit for a tree."""
        return self.limit(tree) if callable(self.limit) else self.limit

    def holds_for(
        self, suite: str, tree: str, dtype: str, case: str, method: str, against: str | None
    ) -> bool:
        """Whether a row is to reach it."""
        several = (self.trees, tree), (self.dtypes, dtype), (self.cases, case), (self.methods, method)
        exact = suite == self.suite and against == self.against
        return exact and all(some is None or one in some for some, one in several)


_step = functools.partial(Target, suite="step", against="none", trees=GPT2)
_alone = functools.partial(Target, suite="alone", methods=("global",), against="c_loop", trees=LARGE)
_beaten = functools.partial(Target, limit=1.0)
_compile = functools.partial(
    Target, suite="compile", methods=CLIPPING, against="optax_global", cases=("total",)
)
_memory = functools.partial(
    Target, suite="memory", methods=(*CLIPPING, "adaptive", *ADAPTIVE, *TELEMETRY), against=None
)

ALL = (
    _step("a clipped AdamW step, float32", 1.15, methods=("global",), dtypes=("float32",)),
    _step("bfloat16 gradients, float32 parameters", 1.5, methods=("global",), dtypes=("mixed",)),
    _step("the same, handed on in float32", 1.1, methods=("global_float32",), dtypes=("mixed",)),
    _step("bfloat16", 1.3, methods=("global",), dtypes=("bfloat16",)),
    _alone("the clip alone, float32", 1.1, dtypes=("float32",), cases=("clips",)),
    _alone("the same with nothing to clip", 0.6, dtypes=("float32",), cases=("idle",)),
    _alone("the clip alone, bfloat16", 1.4, dtypes=("bfloat16",), cases=("clips",)),
    _alone("the same with nothing to clip, bfloat16", 0.6, dtypes=("bfloat16",), cases=("idle",)),
    Target("the clip alone on a GPU", COPY, "alone", ONE_BY_ONE, "copy", trees=GPT2, cases=("clips",)),
    Target("a clipped AdamW step on a GPU", COPY, "step", ONE_BY_ONE, "copy", trees=GPT2),
    Target("groups, alone", 1.1, "alone", GROUPED, "global"),
    Target("groups, in a step", 1.1, "step", GROUPED, "global"),
    Target("adaptive limits and recording, in a step", 1.05, "step", (*ADAPTIVE, *TELEMETRY), "global"),
    *(
        _beaten(f"{name} beaten, {where}", suite=suite, methods=(method,), against=name)
        for method, name in (
            ("global", "optax_global"),
            ("layerwise", "optax_partition"),
            ("adaptive", "optax_adaptive"),
        )
        for suite, where in (("step", "in a step"), ("alone", "alone"))
    ),
    *(
        _beaten(f"{name} beaten, alone", suite="alone", methods=(method,), against=name)
        for method, name in (
            ("global", "torch_foreach"),
            ("global", "torch_loop"),
            ("leafwise", "torch_leafwise"),
            ("zclip", "torch_zclip"),
            ("autoclip", "torch_autoclip"),
        )
    ),
    *(
        _beaten(f"{name} and PyTorch's AdamW beaten", suite="step", methods=("global",), against=name)
        for name in ("torch_foreach", "torch_loop")
    ),
    Target("2,000 small leaves", 1.1, "alone", ("global",), "identity", trees=("small_2000",)),
    _compile("trace and compile, 300 leaves", 1.0, trees=("leaves_300", "mixed_300")),
    _compile("trace and compile, 1,000 leaves", 0.25, trees=("small_1000",)),
    _compile("trace and compile, 2,000 leaves", 0.15, trees=("small_2000",)),
    Target(
        "10,000 leaves, seconds", 60.0, "compile", CLIPPING, None, trees=("large_10000",), cases=("total",)
    ),
    _memory("memory, the clip alone", 0.01, cases=("alone",)),
    _memory("memory, a step, float32", 0.01, cases=("step",), dtypes=("float32",)),
    _memory("memory, a step, bfloat16 gradients", 1.05, cases=("step",), dtypes=("bfloat16", "mixed")),
    Target(
        "kernels for 2,000 small leaves",
        lambda tree: tree.leaves + tree.leaves // 64 + 10,
        "launches",
        ("global",),
        None,
        trees=("small_2000",),
        cases=("alone",),
    ),
)


def find(suite: str, tree: str, dtype: str, case: str, method: str, against: str | None) -> Target | None:
    """What a row is to reach; None if nothing."""
    row = suite, tree, dtype, case, method, against
    return next((target for target in ALL if target.holds_for(*row)), None)
