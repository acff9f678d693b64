"""Results as tables for the terminal and as Markdown."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from benchmarks import methods, programs, references, results, targets, trees, variants
from benchmarks.files import Run
from benchmarks.results import Row

START, END = "<!-- results{} -->", "<!-- end of results{} -->"
TITLES = {
    "step": "A training step with AdamW, over the same without clipping",
    "alone": "The clip alone",
    "compile": "Tracing and compiling the clip, over Optax's global clipping",
    "memory": "Peak temporary memory, over the bytes of the gradients",
    "launches": "Kernels, counted as instructions of the compiled program",
    "ablations": "With one thing left out or done in another way, over the library as it is",
    "train": "A whole training step of a transformer, over the same without clipping",
}
COLOURS = {"met": "green", "missed": "red", "unclear": "yellow"}
COLUMNS = (*methods.ALL, *variants.ALL, *references.NAMES)
TINY_LEAVES = 10_000  # entries to a leaf; below, calling a program with so many leaves is the limit


class Section(NamedTuple):
    """What was measured together: a tree, dtypes and a case, beside one baseline.

    Attributes:
      head: the tree, the dtypes and the case.
      baseline: what the ratios are over; None where there is none.
      values: seconds, memory or kernels, by method.
      rows: the rows to show: the ratios, or the values where there is no baseline.
    """

    head: tuple[str, str, str]
    baseline: str | None
    values: dict[str, float]
    rows: dict[str, Row]


def sections(suite: str, rows: Sequence[Row]) -> Iterator[Section]:
    """The sections of a suite, in the order in which they were measured: one for each baseline shown."""
    own = [row for row in rows if row.suite == suite]
    for head, some in itertools.groupby(own, lambda row: (row.tree, row.dtype, row.case)):
        section = list(some)
        values = {row.method: row.value for row in section if row.against is None}
        known = [name for name in results.BASELINES.get(suite, ()) if name in values]
        if "identity" in known and _tiny(head[0]):
            known = ["identity"]
        if all(row.against is None for row in section):
            known = []  # what needs no clock
        baseline = known[0] if known else None
        yield Section(head, baseline, values, {row.method: row for row in section if row.against == baseline})
        for other in known[1:]:
            if other in results.BESIDE:
                alike = [row for row in section if row.against == other]
                beside = {row.method: row for row in alike if row.method.startswith(results.BESIDE[other])}
                yield Section(head, other, {name: values[name] for name in (other, *beside)}, beside)


def _tiny(tree: str) -> bool:
    return tree in trees.ALL and trees.ALL[tree].entries < TINY_LEAVES * trees.ALL[tree].leaves


def cell(row: Row | None) -> str:
    """What is shown of a row: its ratio, or the value."""
    if row is None:
        return ""
    if row.ratio is not None:
        return f"{row.ratio.median:.2f} ({row.ratio.low:.2f}–{row.ratio.high:.2f})"
    if row.suite == "memory" or row.case.startswith("memory"):
        return f"{row.value:.3f}"
    return f"{row.value:,.0f}" if row.suite == "launches" else time(row.value)


def _timed(section: Section) -> bool:
    return not section.head[2].startswith("memory")


def _over(suite: str, section: Section) -> str:
    """The baseline, what it took, and if it is a copy, the bytes that it moved in a second."""
    tree, dtype, _ = section.head
    name = section.baseline or ""
    text = f"{name}, {time(section.values[name])}"
    if name != "copy" or tree not in trees.ALL:
        return text
    rate = programs.moved_bytes(suite, trees.ALL[tree], dtype) / section.values[name]
    return f"{text}, {rate / 1e9:,.3g} GB/s"


def time(seconds: float) -> str:
    """Seconds or milliseconds, to three digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def tables(rows: Sequence[Row]) -> list[Table]:
    """Tables for the terminal: one for each suite, and the targets."""
    made = []
    for suite in _suites(rows):
        table = _table(TITLES[suite], "", "", "", "target")
        for section in sections(suite, rows):
            over = f"over {_over(suite, section)}" if section.baseline else ""
            table.add_row(", ".join(section.head), "", over, style="bold")
            for name, value in section.values.items():
                row = section.rows.get(name)
                if suite not in results.BASELINES or not _timed(section):
                    numbers = cell(row), ""
                else:
                    numbers = time(value), cell(row) if section.baseline else ""
                reach = f"{row.verdict} (≤ {row.target:.4g})" if row and row.target is not None else ""
                style = COLOURS.get(row.verdict or "") if row else None
                table.add_row(f"  {name}", *numbers, reach, style=style)
            table.add_section()
        made.append(table)
    reached = _table("Targets", *REACHED)
    for line in reaching(rows):
        reached.add_row(*line)
    return [*made, reached] if reached.rows else made


def _table(title: str, *heads: str) -> Table:
    table = Table("", title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for head in heads:
        wraps = head == REACHED[-1]
        table.add_column(head, justify="left" if head in ("target", *REACHED) else "right", no_wrap=not wraps)
    return table


REACHED = ("over", "reach", "met", "not met")


def reaching(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Each target that was measured: the work, and what stands under `REACHED`."""
    for target in targets.ALL:
        own = [row for row in rows if target.holds_for(*row[:6])]
        if not own:
            continue
        limits = sorted({row.target for row in own if row.target is not None})
        met = sum(row.verdict == "met" for row in own)
        rest = [
            f"{row.tree} {row.dtype} {row.case} {row.method} {cell(row)}" + "?" * (row.verdict == "unclear")
            for row in own
            if row.verdict != "met"
        ]
        reach = ", ".join(f"{limit:.4g}" for limit in limits)
        yield target.work, target.against or "", f"≤ {reach}", f"{met} of {len(own)}", "; ".join(rest)


def sentence(environment: Mapping[str, Any]) -> str:
    """What was measured where, in one line."""
    return "; ".join(f"{name}: {value}" for name, value in environment.items()) + "."


def markdown(runs: Sequence[Run]) -> str:
    """How each run of a device was made, the targets, and a table for each suite.

    Trees and cases go down, methods across. Of several runs each line of a table says from which it is.
    """
    several = len(runs) > 1
    parts = [f"### {runs[0].environment['device']}"]
    parts += [f"Run {k}: " * several + sentence(run.environment) for k, run in enumerate(runs, 1)]
    rows = [row for run in runs for row in run.rows]
    of_run = {head: k for k, run in enumerate(runs, 1) for head in run.heads()}
    lines = [["work", *REACHED], ["---"] * 5, *map(list, reaching(rows))]
    if len(lines) > 2:
        parts += ["#### Targets", _pipes(lines)]
    for suite in _suites(rows):
        shown = [part for part in sections(suite, rows) if part.head[2] not in ("trace", "compile")]
        names = [name for name in COLUMNS if any(name in part.rows for part in shown)]
        timed = suite in results.BASELINES
        lines = [["tree", "dtype", "case", *["run"] * several, *["over"] * timed, *names]]
        lines += [["---"] * (3 + several + timed) + ["---:"] * len(names)]
        for part in shown:
            over = _over(suite, part) if part.baseline else ""
            source = [str(of_run[suite, *part.head])] * several
            cells = (cell(part.rows.get(name)) for name in names)
            lines.append([*part.head, *source, *[over] * timed, *cells])
        parts += [f"#### {TITLES[suite]}", _pipes(lines)]
    return "\n\n".join(parts) + "\n"


def _pipes(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_markdown(path: Path, text: str, name: str = "") -> None:
    """Writes a text between the two marks that have a name, and leaves the rest of the page as it is.

    A page without these marks gets them behind those of other names, or at its end. Without a name, what has
    no marks is written anew.
    """
    start, end = (mark.format(f": {name}" if name else "") for mark in (START, END))
    block = f"{start}\n\n{text}\n{end}"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    before, has_start, rest = old.partition(start)
    _, has_end, after = rest.partition(end)
    if has_start and has_end:
        text = f"{before}{block}{after}"
    elif name:
        cut = _end_of_blocks(old)
        before, after = f"{old[:cut].rstrip()}\n\n".lstrip(), old[cut:].removeprefix("\n")
        text = f"{before}{block}\n{after}"
    path.write_text(text, encoding="utf-8")


def _end_of_blocks(text: str) -> int:
    """Where the last block of results ends; where the text does, if there is none."""
    last = text.rfind(END.partition("{")[0])
    return len(text) if last < 0 else text.index("-->", last) + len("-->")


def _suites(rows: Sequence[Row]) -> list[str]:
    measured = {row.suite for row in rows}
    return [suite for suite in TITLES if suite in measured]
