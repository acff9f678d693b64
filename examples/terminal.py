"""What examples share at the terminal: checked options, progress, an advice, and what to do next."""

import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import typer
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import optaxclip as oc


def check(output: Path, **positive: float) -> None:
    """Refuses options that their types let through, before any training, and makes the folder."""
    for name, value in positive.items():
        if not (value > 0 and math.isfinite(value)):
            hint = f"'--{name.replace('_', '-')}'"
            raise typer.BadParameter(f"{value} is not a positive, finite number.", param_hint=hint)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{output}: {error.strerror}.", param_hint="'--output'") from error


class Bars(Progress):
    """A bar for each of several runs of as many steps."""

    def __init__(self, names: list[str], steps: int, console: Console):
        columns = TextColumn("{task.description:9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        super().__init__(*columns, TextColumn("{task.fields[note]}"), console=console)
        self.bars = {name: self.add_task(name, False, steps, note="waiting") for name in names}

    def begin(self, name: str) -> Callable[[int, float], None]:
        """Starts a run's clock; returns what to call with the steps done since, and the loss."""
        self.start_task(self.bars[name])
        self.update(self.bars[name], note="compiling")
        return lambda steps, loss: self.update(self.bars[name], advance=steps, note=f"loss {loss:.2g}")


def in_words(advice: oc.Advice) -> str:
    """The limit of an advice as a table has it: short, and in full only where it is one number."""
    if isinstance(advice.limit, float):
        return f"{advice.limit:.2g} in all" if advice.policy == "global" else f"{advice.limit:.2g}"
    return "–" if advice.limit is None else "see below"


def show(advice: oc.Advice, console: Console) -> None:
    """Prints an advice as wide as the terminal, its code in one line to be copied."""
    console.rule(
        f"Advice from the run without clipping, whose steps count from 0: {advice.policy}", align="left"
    )
    console.print(Text(advice.code, "bold"), soft_wrap=True)
    reasons = Table.grid(padding=(0, 1))
    for reason in advice.reasons:
        reasons.add_row("•", Text(reason))
    console.print(Padding(reasons, (0, 0, 0, 1)))


def written(paths: list[Path], learning_rate: float, console: Console) -> None:
    """Prints which files there are, the last of them a recording, and commands that look at it."""
    recording = paths[-1]
    page = recording.with_name(f"{recording.stem}_norms.html")
    program, rate = _program(), f"--learning-rate {learning_rate:g}"
    file, output = (shlex.quote(str(path)) for path in (recording, page))
    console.rule()
    lines = (
        f"Written: {', '.join(map(str, paths))}",
        "The last is the recording of the run without clipping. Look at it, and ask it again:",
        f"  {program} show {file}",
        f"  {program} plot {file} {rate} -o {output}",
        f"  {program} advise {file} {rate}",
    )
    console.print(Text("\n".join(lines)), soft_wrap=True)


def _program() -> str:
    """The command as it can be typed here, whether or not its environment is active."""
    if shutil.which("optaxclip"):
        return "optaxclip"
    python = Path(sys.executable)
    here = python.relative_to(os.getcwd()) if python.is_relative_to(os.getcwd()) else python
    return f"{shlex.quote(str(here))} -m optaxclip"
