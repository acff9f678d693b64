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

from benchmarks import environment, figure as figures, files, methods, references, report, suites, trees
from benchmarks.files import Run
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
    merge: Annotated[str, typer.Option(help="Measure nothing: put these JSON files together.")] = "",
    json: Annotated[Path | None, typer.Option(help="Write everything to this file.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the tables to this file, one block for each device.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the ratios into this file.")] = None,
) -> None:
    """Measures optaxclip beside Optax, PyTorch and C: time, compile time, memory and kernels, as ratios.

    Options that take several names take them with commas between. Of what several files of `--merge` have,
    the last one's numbers stay.
    """
    environment.shorten_spins()
    console = Console()
    if merge:
        runs = [run for name in merge.split(",") for run in _read(Path(name.strip()))]
        _publish(runs, console, json, markdown, figure)
        return
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

    def save(rows: list[Row]) -> None:  # after each tree, since the whole takes long
        if json is not None:
            files.write_json(json, [Run(where, rows)])

    rows = _measured(tree_names, dtypes, plan, console, save)
    _publish([Run(where, rows)], console, json, markdown, figure)


def _read(path: Path) -> list[Run]:
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {str(path)!r}.", param_hint="--merge")
    return files.read_json(path)


def _publish(
    runs: list[Run], console: Console, json: Path | None, markdown: Path | None, figure: Path | None
) -> None:
    """Shows the runs, device by device, and writes them to those files that are asked for."""
    devices = files.by_device(runs)
    if figure is not None and len(devices) > 1:
        raise typer.BadParameter(
            f"a figure is of one device, not of {', '.join(devices)}.", param_hint="--figure"
        )
    for device, own in devices.items():
        for run in own:
            console.print(report.sentence(run.environment))
        rows = [row for run in own for row in run.rows]
        for table in report.tables(rows):
            console.print(table)
        if markdown is not None:
            report.write_markdown(markdown, report.markdown(own), device)
        if figure is not None:
            figures.draw(rows, own[-1].environment).savefig(figure)
    if json is not None:
        files.write_json(json, [run for own in devices.values() for run in own])


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
