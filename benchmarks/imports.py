"""How long `import optaxclip` takes beside `import optax`: `python -m benchmarks.imports --help`."""

import json
import os
import statistics
import subprocess
import sys
from typing import Annotated

import typer

from benchmarks import environment

PACKAGES = ("optax", "optaxclip")
TIMED = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def seconds(package: str) -> float:
    """The time that an import takes in a process of its own, compiled to bytecode as when it is installed."""
    command = [sys.executable, "-c", TIMED.format(package)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)


def measured(rounds: int) -> dict[str, float]:
    """The median seconds of each package, in turns after a first round that reads from the disk."""
    found = [{package: seconds(package) for package in PACKAGES} for _ in range(rounds + 1)]
    return {package: statistics.median(row[package] for row in found[1:]) for package in PACKAGES}


def main(rounds: Annotated[int, typer.Option(min=1, help="Imports of each package.")] = 15) -> None:
    """Prints the median seconds of each import and their ratio, and where they were measured, as JSON."""
    found = measured(rounds)
    ratio = found["optaxclip"] / found["optax"]
    print(json.dumps({"seconds": found, "ratio": round(ratio, 3), "where": environment.describe()}, indent=2))


if __name__ == "__main__":
    typer.run(main)
