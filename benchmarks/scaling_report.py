"""Tables of counted collectives and of estimated times."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from benchmarks import network, report

if TYPE_CHECKING:
    from benchmarks.scaling import Counted

DEVICES = (10, 100, 1_000, 10_000, 100_000)
GROUPS = (1_000, 10_000, 100_000, 1_000_000)
HEADS = ["mode", "split", "grouping", "method", "leaves", "groups"]
ON = {False: "on eight devices", True: "on 64 devices"}
NUMBERS = ["all-reduces", "bytes", "all-gathers", "bytes", "other", "if not finite", "compile, s"]


def cells(row: "Counted") -> list[str]:
    """A row under `HEADS` and `NUMBERS`."""
    case = row.case
    names = [case.mode, case.layout, case.grouping, f"`{case.method}`"]
    sums = [row.all_reduces, row.reduced, row.all_gathers, row.gathered, row.others]
    numbers = [f"{n:,}" for n in (row.leaves, row.groups, *sums)]
    return [*names, *numbers, f"+{row.rare}" if row.rare else "", f"{row.seconds:.1f}"]


def counts(rows: Sequence["Counted"]) -> Table:
    """The counts, for the terminal."""
    table = Table(title="Collectives in a clipped update, counted", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for head in [*HEADS, *NUMBERS]:
        table.add_column(head, justify="left" if head in HEADS[:4] else "right")
    for row in rows:
        table.add_row(ON[row.case.wide], *(cell.strip("`") for cell in cells(row)))
    return table


def estimate(scheme: network.Scheme, of: network.Network, groups: int) -> list[str]:
    """Microseconds by number of devices, as text."""
    values = [scheme.microseconds(of, devices, groups) for devices in DEVICES]
    return ["–" if math.isnan(x) else f"{x:,.2g}" if x < 10 else f"{x:,.0f}" for x in values]


def lines(of: network.Network) -> list[list[str]]:
    """The estimates for a network: schemes that depend on groups for each number of them."""
    found = []
    for scheme in network.SCHEMES:
        depends = scheme.all_reduces is None or scheme.nbytes is None
        for groups in GROUPS if depends else (1,):
            found.append([scheme.name, f"{groups:,}", *estimate(scheme, of, groups)])
    return found


def estimates() -> list[Table]:
    """The model, for the terminal."""
    made = []
    for of in network.NETWORKS.values():
        table = Table(title=f"Model: microseconds, {of.name}", title_justify="left", box=box.SIMPLE_HEAD)
        for head in ["", "groups", *(f"{n:,} devices" for n in DEVICES)]:
            table.add_column(head, justify="right" if head else "left")
        for line in lines(of):
            table.add_row(*line)
        made.append(table)
    return made


def markdown(rows: Sequence["Counted"], environment: Mapping[str, Any]) -> str:
    """The environment and all tables."""
    parts = [report.sentence(environment)]
    for wide, on in ON.items():
        columns = len(HEADS) + len(NUMBERS) - wide  # the first table says what compiling takes
        rules = ["---"] * 4 + ["---:"] * (columns - 4)
        if chosen := [cells(row)[:columns] for row in rows if row.case.wide == wide]:
            heads = [*HEADS, *NUMBERS][:columns]
            parts += [f"### Counted {on}", _table([heads, rules, *chosen])]
    for of in network.NETWORKS.values():
        parts.append(f"### Model, not measured: microseconds of a step, {of.name}")
        heads = ["", "groups", *(f"{n:,} devices" for n in DEVICES)]
        parts.append(_table([heads, ["---", *["---:"] * (len(heads) - 1)], *lines(of)]))
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
