"""What is measured: a step, the clip alone, their compilation, memory, kernels and parts; and training."""

import functools
import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import char_model, hlo, programs, references, results, timing, trees, variants
from benchmarks.methods import MANY, Method
from benchmarks.results import Row, Setting
from benchmarks.runs import Clipping, Training
from benchmarks.trees import Tree

SUITES = ("step", "alone", "compile", "memory", "launches", "ablations", "train")
COUNTED = ("memory", "launches")  # without a clock
# The standard deviation of the gradients. Every leaf has a norm above every limit, or none has.
CASES = {"clips": 1.0, "idle": 2.0**-24}
# Of the ablations: the clip alone, a step that clips, compiling the clip, and memory of both programs.
ABLATED = (*CASES, "step", "total", "memory alone", "memory step")
WARM_UP = Tree("warm_up", {"dense": {"kernel": (8, 8), "bias": (8,)}})
MODELS = {
    "characters": char_model.Shape(),
    "gpt2_like": char_model.Shape(width=256, layers=4, context=64, batch=8, vocabulary=50_257),
}
LARGE = 1_000  # leaves; from here on Optax takes long to compile, and once is enough
TRAINED = ("none", "optax_global", "global", "layerwise", "leafwise", "zclip", "record", "metrics")


class Plan(NamedTuple):
    """What to measure, and how long.

    Attributes:
      suites: some of `SUITES`.
      methods: with what they are compared with.
      rounds: how often each program is measured.
      compile_rounds: how often each is compiled; large trees only once.
      seconds: about how long one measurement takes, of as many calls as that needs.
      seed: of the order in each round.
    """

    suites: Sequence[str]
    methods: Sequence[Method]
    rounds: int
    compile_rounds: int
    seconds: float = 0.03
    seed: int = 0

    def without(self, suite: str) -> "Plan":
        """The same but for one suite."""
        return self._replace(suites=[name for name in self.suites if name != suite])

    def fitting(self, setting: Setting, no_clipping: bool = True) -> list[Method]:
        """The methods to measure there."""
        fitting = [method for method in self.methods if method.fits(setting.tree, setting.dtype)]
        return [method for method in fitting if no_clipping or method.name != "none"]


Tick = Callable[[str], None]


def run(tree: Tree, dtype: str, plan: Plan, tick: Tick = lambda what: None) -> list[Row]:
    """All rows for one tree and one choice of dtypes."""
    setting, wanted = Setting(tree, dtype), set(plan.suites)
    if tree.compile_only:
        wanted &= {"compile"}
    if dtype == "mixed":  # which is bfloat16, until parameters are updated
        wanted -= {"alone", "compile", "ablations"}
    rows = []
    if wanted & {"step", *COUNTED}:
        rows += _step(setting, plan, wanted, tick)
    if wanted & {"alone", *COUNTED} and dtype != "mixed":
        rows += _alone(setting, plan, wanted, tick)
    if "compile" in wanted:
        rows += _compile(setting, plan, tick)
    if "ablations" in wanted and tree.leaves <= MANY:
        rows += _ablations(setting, plan, tick)
    return rows


def train(model: str, plan: Plan, tick: Tick = lambda what: None) -> list[Row]:
    """The rows of whole training steps of one of `MODELS`, in float32."""
    shape = MODELS[model]
    methods = [method for method in plan.methods if method.name in TRAINED]
    tree = programs.transformer(shape)._replace(name=model)
    setting = Setting(tree, "float32")
    compiled = _compiled(lambda method, *_: programs.train(method, shape), methods, setting, tick)
    passages = np.random.default_rng(0).integers(shape.vocabulary, size=(shape.batch, shape.context + 1))
    clips = {method.name: method.build(tree) for method in methods}
    training = Training(char_model.initial(shape, seed=0), clips, jax.numpy.asarray(passages, "int32"))
    steps = {name: functools.partial(training.measure, name, one) for name, one in compiled.items()}
    seconds = _seconds(steps, plan, tick)
    return results.compared("train", "whole", setting, methods, seconds)


def _step(setting: Setting, plan: Plan, wanted: set[str], tick: Tick) -> list[Row]:
    methods = plan.fitting(setting)
    compiled = _compiled(programs.step, methods, setting, tick)
    rows = _counted("step", setting, methods, wanted, compiled)
    for case, size in CASES.items() if "step" in wanted else ():
        steps = _steps(setting, methods, compiled, size) | references.steps(*setting, size)
        rows += results.compared("step", case, setting, methods, _seconds(steps, plan, tick))
        del steps  # before the next case takes as much memory
    return rows


def _steps(
    setting: Setting, methods: Sequence[Method], compiled: Mapping[str, Any], size: float
) -> dict[str, Callable[[int], float]]:
    tree, dtype = setting
    params = trees.normal(tree, trees.PARAMS[dtype], seed=0)
    grads = trees.normal(tree, trees.GRADS[dtype], seed=1, size=size)
    training = Training(params, {one.name: one.build(tree) for one in methods}, grads)
    return {name: functools.partial(training.measure, name, one) for name, one in compiled.items()}


def _alone(setting: Setting, plan: Plan, wanted: set[str], tick: Tick) -> list[Row]:
    methods = plan.fitting(setting, no_clipping=False)
    compiled = _compiled(programs.alone, methods, setting, tick)
    rows = _counted("alone", setting, methods, wanted, compiled)
    for case, size in CASES.items() if "alone" in wanted else ():
        measures = references.alone(*setting, size) | _clips(setting, methods, compiled, case)
        rows += results.compared("alone", case, setting, methods, _seconds(measures, plan, tick))
        del measures
    return rows


def _clips(
    setting: Setting, methods: Sequence[Method], compiled: Mapping[str, Any], case: str
) -> dict[str, Callable[[int], float]]:
    tree, dtype = setting
    params = trees.normal(tree, dtype, seed=0)
    measures = {}
    for method in methods:
        grads = trees.normal(tree, dtype, seed=1, size=CASES[case])
        grows = method.clips and case == "clips"
        one = Clipping(grads, grows, tree, method, params, compiled[method.name])
        measures[method.name] = one.measure
        del grads, one
    return measures


def _compile(setting: Setting, plan: Plan, tick: Tick) -> list[Row]:
    methods = plan.fitting(setting, no_clipping=False)
    clips = {method.name: functools.partial(programs.alone, method) for method in methods}
    samples = _built({**clips, "scaled_leaves": programs.scaled_leaves}, setting, plan, tick)
    rows = []
    for case, pick in {"trace": lambda s: s[0], "compile": lambda s: s[1], "total": sum}.items():
        seconds = {name: [pick(sample) for sample in some] for name, some in samples.items()}
        rows += results.compared("compile", case, setting, methods, seconds)
    return rows


def _built(
    made: Mapping[str, Callable[[Tree, str], programs.Program]], setting: Setting, plan: Plan, tick: Tick
) -> dict[str, list[tuple[float, float]]]:
    """Seconds to trace and lower, and to compile, in each round."""

    def measure(make: Callable[[Tree, str], programs.Program], tree: Tree) -> tuple[float, float]:
        jax.clear_caches()
        gc.collect()
        program = make(tree, setting.dtype)
        start = time.perf_counter()
        lowered = program.function.lower(*program.args)
        traced = time.perf_counter()
        lowered.compile()
        return traced - start, time.perf_counter() - traced

    for make in made.values():
        measure(make, WARM_UP)
    builds = {name: functools.partial(measure, make, setting.tree) for name, make in made.items()}
    rounds = plan.compile_rounds if setting.tree.leaves < LARGE else 1
    return timing.interleaved(builds, rounds, plan.seed, lambda name: tick(f"compile {name}"))


def _ablations(setting: Setting, plan: Plan, tick: Tick) -> list[Row]:
    whole = [method for method in plan.fitting(setting) if method.name in variants.WHOLE]
    names = {method.name for method in whole}
    parts = [one for one in variants.usual() if one.fits(*setting) and names.issuperset(one.against)]
    methods = [*whole, *parts]
    compared = functools.partial(results.compared, "ablations", setting=setting, methods=methods)
    made = {method.name: functools.partial(programs.alone, method) for method in methods}
    samples = _built(made, setting, plan, tick)
    rows = compared("total", seconds={name: [sum(one) for one in some] for name, some in samples.items()})
    compiled = {
        program.__name__: _compiled(program, methods, setting, tick, forget=True)
        for program in (programs.alone, programs.step)
    }
    jax.clear_caches()
    for name, ones in compiled.items():
        shares = _shares(setting, ones)
        rows += results.counted("ablations", f"memory {name}", setting, methods, shares)
    for case in CASES:
        clips = _clips(setting, methods, compiled["alone"], case)
        rows += compared(case, seconds=_seconds(clips, plan, tick))
        del clips
    steps = _steps(setting, methods, compiled["step"], CASES["clips"])
    return rows + compared("step", seconds=_seconds(steps, plan, tick))


def _compiled(
    make: Callable[..., programs.Program],
    methods: Iterable[Method],
    setting: Setting,
    tick: Tick,
    forget: bool = False,
) -> dict[str, Callable[..., Any]]:
    """Each method's program; `forget` what was traced before, if it was of something else."""
    compiled = {}
    for method in methods:
        tick(f"build {method.name}")
        if forget:
            jax.clear_caches()
        compiled[method.name] = make(method, *setting).compiled()
    return compiled


def _shares(setting: Setting, compiled: Mapping[str, Any]) -> dict[str, float]:
    """Temporary memory, over the bytes of the gradients."""
    nbytes = setting.tree.nbytes(setting.dtype)
    return {name: programs.temporary_bytes(one) / nbytes for name, one in compiled.items()}


def _counted(
    case: str, setting: Setting, methods: Sequence[Method], wanted: set[str], compiled: Mapping[str, Any]
) -> list[Row]:
    rows = []
    if "memory" in wanted:
        rows += results.counted("memory", case, setting, methods, _shares(setting, compiled))
    if "launches" in wanted:
        counts = {name: hlo.launches(hlo.parse(one)) for name, one in compiled.items()}
        rows += results.counted("launches", case, setting, methods, counts)
    return rows


def _seconds(candidates: dict[str, Callable[[int], float]], plan: Plan, tick: Tick) -> dict[str, list[float]]:
    """Seconds per call in each round, of as many calls as take about `plan.seconds`."""
    for measure in candidates.values():
        measure(1)  # touches the memory, and brings clipped gradients to the size that they keep
    measures = {}
    for name, measure in candidates.items():
        calls = max(1, min(100, round(plan.seconds / measure(1))))
        measures[name] = functools.partial(measure, calls)
    return timing.interleaved(measures, plan.rounds, plan.seed, lambda name: tick(f"run {name}"))
