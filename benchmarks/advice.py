"""Takes the advice of a short recording and trains with it, beside a grid of groupings and limits.

`python -m benchmarks.advice --help`
"""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import optax
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import optaxclip as oc
from benchmarks import advice_grid, advice_report, environment
from benchmarks.advice_networks import Params
from benchmarks.advice_report import Outcome, Taken
from benchmarks.advice_tasks import MOMENTUM, RECORDED, TASKS, Task

app = typer.Typer(add_completion=False)
Advise: TypeAlias = Callable[[Params, Any], oc.Advice]  # from parameters and batches


class Setting(NamedTuple):
    """What all tasks share.

    Attributes:
      seeds: runs of each policy.
      limits: of the grid.
      steps: updates in each run; None for each task's own.
    """

    seeds: int = 3
    limits: tuple[float, ...] = advice_grid.LIMITS
    steps: int | None = None

    def __str__(self) -> str:
        limits = ", ".join(f"{limit:g}" for limit in self.limits)
        return (
            f"{self.seeds} seeds; limits on the norm of the whole update of {limits}; SGD with momentum "
            f"{MOMENTUM:g} or Adam, with a cosine decay to zero; the first {1 / RECORDED:.0%} of the steps "
            f"recorded without clipping"
        )


QUICK = Setting(seeds=1, limits=(0.1, 1.0, 10.0))


RULE = oc.Rule()


def recorder(task: Task, rule: oc.Rule = RULE) -> Advise:
    """A function from parameters and batches to the advice of the task's first steps without clipping."""
    tx = optax.chain(oc.record(capacity=task.recorded), task.update_rule())
    run = jax.jit(lambda params, batches: advice_grid.train(task, tx, params, batches)[1])

    def advise(params: Params, batches: Any) -> oc.Advice:
        state = run(params, jax.tree.map(lambda x: x[: task.recorded], batches))
        history = oc.History.from_state(state, params)
        return history.advise(optimizer=task.optimizer, learning_rate=task.learning_rate, rule=rule)

    return advise


def follow(task: Task, params: Sequence[Params], batches: Sequence[Any], advise: Advise) -> list[Taken]:
    """Takes each seed's advice and trains with it from the start."""
    compiled, taken = {}, []
    for seed, (start, inputs) in enumerate(zip(params, batches, strict=True)):
        advice = advise(start, inputs)
        if advice.code not in compiled:
            tx = optax.chain(advice.transformation(), task.update_rule())
            compiled[advice.code] = jax.jit(
                lambda params, batches, tx=tx: task.evaluate(advice_grid.train(task, tx, params, batches)[0])
            )
        final = float(advice_grid.finite_or_inf(compiled[advice.code](start, inputs)))
        limit = float(advice.limit) if isinstance(advice.limit, int | float) else None
        taken.append(Taken(seed, advice.policy, limit, advice.code, list(advice.reasons), final))
    return taken


def compare(
    task: Task,
    setting: Setting,
    cache: advice_grid.Cache,
    make: Callable[[Task], Advise] | None,
    tick: Callable[[], None],
) -> Outcome:
    """Trains the grid and, unless `make` is None, with the advice; ticks after each grouping and last."""
    begin = time.perf_counter()
    params = [task.init(seed) for seed in range(setting.seeds)]
    batches = [task.batches(seed) for seed in range(setting.seeds)]
    both = advice_grid.stacked(params), advice_grid.stacked(batches)
    start = advice_grid.finite_or_inf(jax.vmap(task.evaluate)(both[0]))
    cells = []
    with ThreadPoolExecutor(environment.describe()["cores"]) as pool:  # type: ignore[arg-type]
        for some in advice_grid.cells(task, setting.limits, *both, cache, pool):
            cells += some
            tick()
    taken = follow(task, params, batches, make(task)) if make else []
    tick()
    return Outcome(task, list(start), cells, taken, time.perf_counter() - begin)


def compare_all(
    names: Sequence[str],
    setting: Setting,
    cache: advice_grid.Cache,
    make: Callable[[Task], Advise] | None,
    console: Console,
) -> list[Outcome]:
    """Prints the grid of each task as it is ready."""
    columns = TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    outcomes = []
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(names) * (len(advice_grid.GROUPINGS) + 1))
        for name in names:
            progress.update(bar, description=name)
            task = TASKS[name]() if setting.steps is None else TASKS[name](steps=setting.steps)
            outcomes.append(compare(task, setting, cache, make, lambda: progress.advance(bar)))
            console.print(advice_report.grid(outcomes[-1]), highlight=False)
    return outcomes


def named(tasks: str) -> list[str]:
    """The names in a list with commas, which must be those of tasks."""
    names = list(TASKS) if tasks == "all" else [name.strip() for name in tasks.split(",")]
    for name in names:
        if name not in TASKS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(TASKS)}.", param_hint="'--tasks'")
    return names


@app.command()
def main(
    tasks: Annotated[str, typer.Option(help="Names with commas between, or all.")] = "all",
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each policy; 3.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=8, help="Updates in each run; else each task's own.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed and three limits, to see that it runs.")
    ] = False,
    step: Annotated[
        float, typer.Option(min=0, help="The rule's length of a step of SGD that is safe.")
    ] = RULE.step,
    grid_only: Annotated[
        bool, typer.Option("--grid-only", help="Train the grid and take no advice.")
    ] = False,
    grid_cache: Annotated[
        Path | None, typer.Option(help="Keep the grid's losses here; a task that changed is trained again.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write every loss and every advice to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Write the figure to this file.")] = None,
) -> None:
    """Does the advice of a short recording train as well as the best policy of a grid?

    Each task is trained without clipping, and clipped by the global norm,
    layer by layer and leaf by leaf, with limits two a decade. Then a quarter
    of a run without clipping is recorded, its advice taken, and the task
    trained with it from the start. Compared are final losses, medians over seeds.
    """
    names, default = named(tasks), QUICK if quick else Setting()
    setting = default._replace(seeds=seeds or default.seeds, steps=steps)
    console, cache = Console(), advice_grid.Cache(grid_cache)
    where = environment.describe() | {
        "scikit-learn": sys.modules["sklearn"].__version__,
        "text": f"standard library of Python {sys.version.split()[0]}",
    }
    make = functools.partial(recorder, rule=RULE._replace(step=step))
    outcomes = compare_all(names, setting, cache, None if grid_only else make, console)
    console.print(advice_report.table(outcomes), f"Setting: {setting}.", sep="\n", highlight=False)
    if not grid_only:
        console.print(advice_report.summary(outcomes), highlight=False)
    if json is not None:
        advice_report.write_json(json, outcomes, str(setting), where)
    if markdown is not None:
        advice_report.write_markdown(markdown, outcomes, str(setting), where)
    if figure is not None:
        advice_report.figure(outcomes).savefig(figure)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.advice")
