"""The command: `python -m benchmarks --help`."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import environment, methods, report, suites, trees
from benchmarks.results import Row

app = typer.Typer(add_completion=False)
DTYPES = ("float32", "bfloat16")
DISK_CACHE = "jax_enable_compilation_cache"


def _choices(option: str, text: str, known: Sequence[str]) -> list[str]:
    chosen = [name.strip() for name in text.split(",")] if text != "all" else list(known)
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


def _measured(tree_names: list[str], dtypes: list[str], plan: suites.Plan, console: Console) -> list[Row]:
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
    with bar, _without_disk_cache():
        task = bar.add_task("", total=len(tree_names) * len(dtypes) * plan.ticks())
        for name in tree_names:
            for dtype in dtypes:

                def tick(what: str, where: str = f"{name} {dtype}") -> None:
                    bar.update(task, advance=1, description=f"{where}: {what}", refresh=True)

                rows += suites.run(trees.ALL[name], dtype, plan, tick)
                jax.clear_caches()
    return rows


@app.command()
def main(
    tree: Annotated[str, typer.Option("--trees", help=f"Some of {', '.join(trees.ALL)}.")] = "all",
    method: Annotated[str, typer.Option("--methods", help=f"Some of {', '.join(methods.OURS)}.")] = "all",
    suite: Annotated[str, typer.Option("--suites", help=f"Some of {', '.join(suites.SUITES)}.")] = "all",
    dtype: Annotated[str, typer.Option(help=f"Some of {', '.join(DTYPES)}.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each program.")] = 15,
    compile_rounds: Annotated[int, typer.Option(min=1, help="Compilations of each program.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="3 rounds of short measurements.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write everything to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file.")] = None,
) -> None:
    """Measures optaxclip beside Optax: run time, trace and compile time, temporary memory, as ratios.

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
    tree_names, dtypes = _choices("--trees", tree, tuple(trees.ALL)), _choices("--dtype", dtype, DTYPES)
    chosen = {*tree_names, *dtypes, *plan.suites, *(method.name for method in plan.methods)}
    everything = [*trees.ALL, *DTYPES, *suites.SUITES, *methods.OURS]
    left_out = [name for name in everything if name not in chosen]
    # The load is taken before this run adds to it.
    where = environment.describe() | {"rounds": rounds, "left out": ", ".join(left_out) or "nothing"}
    console = Console()
    rows = _measured(tree_names, dtypes, plan, console)
    console.print(report.sentence(where))
    for table in report.tables(rows):
        console.print(table)
    if json is not None:
        report.write_json(json, rows, where)
    if markdown is not None:
        report.write_markdown(markdown, report.markdown(rows, where))


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
