"""The command: `python -m benchmarks --help`."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import environment, figure as figures, methods, references, report, suites, trees
from benchmarks.results import Row

app = typer.Typer(add_completion=False)
DTYPES = tuple(trees.GRADS)
DISK_CACHE = "jax_enable_compilation_cache"


def _choices(option: str, text: str, known: Sequence[str], usual: Sequence[str] | None = None) -> list[str]:
    chosen = [name.strip() for name in text.split(",")] if text != "all" else list(usual or known)
    for name in chosen:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}.", param_hint=option)
    return [name for name in known if name in chosen]


@contextlib.contextmanager
def _without_disk_cache() -> Iterator[None]:
    """Programs are compiled, not read from a disk."""
    before = getattr(jax.config, DISK_CACHE)
    jax.config.update(DISK_CACHE, False)
    try:
        yield
    finally:
        jax.config.update(DISK_CACHE, before)


def _measured(
    tree_names: list[str],
    dtypes: list[str],
    plan: suites.Plan,
    console: Console,
    save: Callable[[list[Row]], None],
) -> list[Row]:
    rows: list[Row] = []
    # Nothing is drawn while something is timed: the bar moves only between measurements.
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
    )
    settings = [
        (trees.ALL[name], dtype)
        for name in tree_names
        for dtype in dtypes
        if dtype == dtypes[0] or trees.ALL[name].leaves <= methods.MANY
    ]
    models = suites.MODELS if "train" in plan.suites else {}
    with bar, _without_disk_cache():
        task = bar.add_task("", total=len(settings) + len(models))

        def tick(where: str, what: str) -> None:
            bar.update(task, description=f"{where}: {what}", refresh=True)

        def done(measured: list[Row]) -> None:
            rows.extend(measured)
            save(rows)
            bar.update(task, advance=1)
            jax.clear_caches()

        for tree, dtype in settings:
            # How long a program compiles depends little on the dtype.
            own = plan if dtype == dtypes[0] else plan.without("compile")
            done(suites.run(tree, dtype, own, functools.partial(tick, f"{tree.name} {dtype}")))
        for model in models:
            done(suites.train(model, plan, functools.partial(tick, model)))
    return rows


@app.command()
def main(
    tree: Annotated[str, typer.Option("--trees", help=f"Some of {', '.join(trees.ALL)}.")] = "all",
    method: Annotated[str, typer.Option("--methods", help=f"Some of {', '.join(methods.OURS)}.")] = "all",
    suite: Annotated[str, typer.Option("--suites", help=f"Some of {', '.join(suites.SUITES)}.")] = "all",
    dtype: Annotated[str, typer.Option(help=f"Some of {', '.join(DTYPES)}.")] = "all",
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each program.")] = 15,
    compile_rounds: Annotated[int, typer.Option(min=1, help="Compilations of each program.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="3 rounds of short measurements.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write everything to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the ratios into this file.")] = None,
) -> None:
    """Measures optaxclip beside Optax, PyTorch and C: time, compile time, memory and kernels, as ratios.

    Options that take several names take them with commas between.
    """
    if quick:
        rounds, compile_rounds = min(rounds, 3), 1
    plan = suites.Plan(
        suites=_choices("--suites", suite, suites.SUITES),
        methods=methods.selected(_choices("--methods", method, methods.OURS)),
        rounds=rounds,
        compile_rounds=compile_rounds,
        seconds=0.01 if quick else 0.03,
    )
    tree_names = _choices("--trees", tree, tuple(trees.ALL), trees.USUAL)
    dtypes = _choices("--dtype", dtype, DTYPES)
    chosen = {*tree_names, *dtypes, *plan.suites, *(method.name for method in plan.methods)}
    everything = [*trees.ALL, *DTYPES, *suites.SUITES, *methods.OURS]
    left_out = [name for name in everything if name not in chosen]
    # The load is taken before this run adds to it.
    where = environment.describe() | references.versions()
    where |= {"rounds": rounds, "left out": ", ".join(left_out) or "nothing"}
    console = Console()

    def save(rows: list[Row]) -> None:  # after each tree, since the whole takes long
        if json is not None:
            report.write_json(json, rows, where)

    rows = _measured(tree_names, dtypes, plan, console, save)
    console.print(report.sentence(where))
    for table in report.tables(rows):
        console.print(table)
    if markdown is not None:
        report.write_markdown(markdown, report.markdown(rows, where))
    if figure is not None:
        figures.draw(rows, where).savefig(figure)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
