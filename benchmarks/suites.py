"""What is measured: a training step, the clip alone, tracing and compiling it, and temporary memory."""

import functools
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from benchmarks import programs, results, timing, trees
from benchmarks.methods import Method
from benchmarks.results import Row
from benchmarks.trees import Tree

SUITES = ("step", "alone", "compile", "memory")
# The standard deviation of the gradients. Every leaf has a norm above every limit, or none has.
CASES = {"clips": 1.0, "idle": 2.0**-24}
REGROWTH = 4  # exact in every dtype
WARM_UP = Tree("warm_up", {"dense": {"kernel": (8, 8), "bias": (8,)}})


class Plan(NamedTuple):
    """What to measure, and how long.

    Attributes:
      suites: some of `SUITES`.
      methods: with what they are compared with.
      rounds: how often each program is measured.
      compile_rounds: how often each is compiled.
      seconds: about how long one measurement takes, of as many calls as that needs.
      seed: of the order in each round.
    """

    suites: Sequence[str]
    methods: Sequence[Method]
    rounds: int
    compile_rounds: int
    seconds: float = 0.03
    seed: int = 0

    @property
    def clipping(self) -> list[Method]:
        """The methods that clip; alone, the others are no program."""
        return [method for method in self.methods if method.name != "none"]

    def ticks(self) -> int:
        """How often `run` ticks."""
        programs = {"step": len(self.methods), "alone": len(self.clipping)}
        needed = programs if "memory" in self.suites else programs.keys() & self.suites
        timed = sum(count for suite, count in programs.items() if suite in self.suites)
        compiled = len(self.clipping) * self.compile_rounds if "compile" in self.suites else 0
        return sum(programs[suite] for suite in needed) + len(CASES) * self.rounds * timed + compiled


Tick = Callable[[str], None]


def run(tree: Tree, dtype: str, plan: Plan, tick: Tick = lambda what: None) -> list[Row]:
    """All rows for one tree."""
    rows = []
    if {"step", "memory"} & set(plan.suites):
        rows += _step(tree, dtype, plan, tick)
    if {"alone", "memory"} & set(plan.suites):
        rows += _alone(tree, dtype, plan, tick)
    if "compile" in plan.suites:
        rows += _compile(tree, dtype, plan, tick)
    return rows


def _step(tree: Tree, dtype: str, plan: Plan, tick: Tick) -> list[Row]:
    compiled = _compiled(programs.step, plan.methods, tree, dtype, tick)
    rows = _memory("step", tree, dtype, plan, compiled)
    for case, size in CASES.items() if "step" in plan.suites else ():
        training = Training(tree, dtype, size, plan.methods)
        steps = {
            name: functools.partial(training.measure, name, program) for name, program in compiled.items()
        }
        seconds = _seconds(steps, plan, tick)
        rows += results.timed("step", case, tree, dtype, plan.methods, seconds)
        del training, steps  # before the next case takes as much memory
    return rows


def _alone(tree: Tree, dtype: str, plan: Plan, tick: Tick) -> list[Row]:
    compiled = _compiled(programs.alone, plan.clipping, tree, dtype, tick)
    rows = _memory("alone", tree, dtype, plan, compiled)
    for case, size in CASES.items() if "alone" in plan.suites else ():
        params = trees.normal(tree, dtype, seed=0)
        clips = {
            method.name: Clipping(tree, dtype, size, method, params, compiled[method.name]).measure
            for method in plan.clipping
        }
        rows += results.timed("alone", case, tree, dtype, plan.methods, _seconds(clips, plan, tick))
        del params, clips
    return rows


def _compile(tree: Tree, dtype: str, plan: Plan, tick: Tick) -> list[Row]:
    def measure(method: Method, tree: Tree) -> tuple[float, float]:
        jax.clear_caches()
        gc.collect()
        program = programs.alone(method, tree, dtype)
        start = time.perf_counter()
        lowered = program.function.lower(*program.args)
        traced = time.perf_counter()
        lowered.compile()
        return traced - start, time.perf_counter() - traced

    for method in plan.clipping:
        measure(method, WARM_UP)
    compiles = {method.name: functools.partial(measure, method, tree) for method in plan.clipping}
    samples = timing.interleaved(
        compiles, plan.compile_rounds, plan.seed, lambda name: tick(f"compile {tree.name} {name}")
    )
    rows = []
    for case, pick in {"trace": lambda s: s[0], "compile": lambda s: s[1], "total": sum}.items():
        seconds = {name: [pick(sample) for sample in some] for name, some in samples.items()}
        rows += results.timed("compile", case, tree, dtype, plan.methods, seconds)
    return rows


def _compiled(make, methods: Sequence[Method], tree: Tree, dtype: str, tick: Tick) -> dict[str, Any]:
    compiled = {}
    for method in methods:
        compiled[method.name] = make(method, tree, dtype).compiled()
        tick(f"build {tree.name} {method.name}")
    return compiled


def _memory(case: str, tree: Tree, dtype: str, plan: Plan, compiled: dict[str, Any]) -> list[Row]:
    if "memory" not in plan.suites:
        return []
    temporary = {name: programs.temporary_bytes(program) for name, program in compiled.items()}
    return results.measured(case, tree, dtype, plan.methods, temporary)


def _seconds(candidates: dict[str, Callable[[int], float]], plan: Plan, tick: Tick) -> dict[str, list[float]]:
    """Seconds per call in each round, of all candidates with equally many calls."""
    for measure in candidates.values():
        measure(1)  # touches the memory, and brings clipped gradients to the size that they keep
    fastest = min(measure(1) for measure in candidates.values())
    calls = max(1, min(100, round(plan.seconds / fastest)))
    measures = {name: functools.partial(measure, calls) for name, measure in candidates.items()}
    return timing.interleaved(measures, plan.rounds, plan.seed, lambda name: tick(f"run {name}"))


class Training:
    """Parameters and AdamW's moments, which each program takes over from the one that ran before it.

    So there is one copy of them, and no program has buffers that are better placed than another's. The
    gradients are the same at every step and never donated.
    """

    def __init__(self, tree: Tree, dtype: str, size: float, methods: Sequence[Method]):
        self.params = trees.normal(tree, dtype, seed=0)
        self.adam = programs.ADAMW.init(self.params)
        self.clip = {method.name: method.build(tree).init(self.params) for method in methods}
        self.grads = trees.normal(tree, dtype, seed=1, size=size)

    def measure(self, name: str, step: Callable[..., Any], calls: int) -> float:
        """Seconds per step, over some steps in a row."""
        params, adam, clip = self.params, self.adam, self.clip[name]
        start = time.perf_counter()
        for _ in range(calls):
            params, adam, clip = step(params, adam, clip, self.grads)
        jax.block_until_ready((params, adam, clip))
        seconds = (time.perf_counter() - start) / calls
        self.params, self.adam, self.clip[name] = params, adam, clip
        return seconds


class Clipping:
    """Gradients that one program clips in place again and again.

    What was clipped is at its limit and would not be clipped again. So between two calls, and out of the
    time, all entries are multiplied by `REGROWTH`, in place: every group comes in with that many times its
    limit each time, whatever the method's groups. Gradients that are not clipped stay as they are.
    """

    def __init__(self, tree: Tree, dtype: str, size: float, method: Method, params: Any, program: Any):
        self.grads = trees.normal(tree, dtype, seed=1, size=size)
        self.state = method.build(tree).init(self.grads)
        self.params = params if method.needs_params else None
        self.program = program
        self.grows = size == CASES["clips"]

    def measure(self, calls: int) -> float:
        """Seconds per call, over some calls."""
        seconds = 0.0
        for _ in range(calls):
            start = time.perf_counter()
            self.grads, self.state = self.program(self.grads, self.state, self.params)
            jax.block_until_ready((self.grads, self.state))
            seconds += time.perf_counter() - start
            if self.grows:
                self.grads = jax.block_until_ready(jax.tree.map(_regrown, self.grads))
        return seconds / calls


# Leaf by leaf, since a program for a whole tree of 2,000 leaves takes long to compile.
_regrown = jax.jit(lambda leaf: REGROWTH * leaf, donate_argnums=0)
