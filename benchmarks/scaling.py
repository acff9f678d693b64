"""Counts what a clipped update exchanges between devices, and estimates how long that takes on many of them.

`python -m benchmarks.scaling --help`
"""

import functools
import itertools
import json as json_module
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import optax
import typer
from jax.sharding import AxisType, PartitionSpec as P
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import optaxclip as oc
from benchmarks import environment, hlo, layouts, report, scaling_report

app = typer.Typer(add_completion=False)

# Leaves, or rows of a leaf that has many: what compiles in about a minute.
SIZES = {"whole": 1000, "layer": 100, "leaf": 200, "unit": 1_000_000, "stacked": 1_000_000}
# The same on 64 devices, and between a thousand groups and a million: nothing but bytes depends on either.
WIDE = {"leaf": (200,), "unit": (10_000, 100_000), "stacked": (10_000, 100_000)}
# For what limits and recordings add, which does not depend on size or grouping.
SMALL = {"leaf": 40, "unit": 1_000}

Build = Callable[
    [oc.Groups, Mapping[str, Any]], optax.GradientTransformationExtraArgs | optax.GradientTransformation
]
METHODS: dict[str, Build] = {
    "clip": lambda groups, split: oc.rescale_by_norm(1.0, groups=groups, **split),
    "clip, limits.ema": lambda groups, split: oc.rescale_by_norm(oc.limits.ema(1.05), groups=groups, **split),
    "clip, limits.relative": lambda groups, split: oc.rescale_by_norm(
        oc.limits.relative(0.01), groups=groups, **split
    ),
    "record, clip": lambda groups, split: optax.chain(
        oc.record(groups=groups, capacity=2, **split), oc.rescale_by_norm(1.0, groups=groups, **split)
    ),
    "optax.clip_by_global_norm": lambda groups, split: optax.clip_by_global_norm(1.0),
    "optax.adaptive_grad_clip": lambda groups, split: optax.adaptive_grad_clip(0.01),
}
EXTRAS = ("clip, limits.ema", "clip, limits.relative", "record, clip")
PEERS = {"whole": "optax.clip_by_global_norm", "unit": "optax.adaptive_grad_clip"}


class Case(NamedTuple):
    """One program to compile.

    Attributes:
      mode: `jit`, where the compiler places the collectives; `specs`, where these say under `jit` how leaves
        are split; `explicit`, where their types do; or `shard_map`, where `axis_name` names the axes.
      layout: a name of `layouts.LAYOUTS`.
      grouping: a name of `layouts.GROUPINGS`.
      method: a name of `METHODS`.
      size: leaves, or rows of a kernel; see `layouts.tree`.
      wide: whether on 64 devices, not on eight.
    """

    mode: str
    layout: str
    grouping: str
    method: str
    size: int
    wide: bool = False


class Counted(NamedTuple):
    """What one program exchanges in an ordinary step, by device.

    Attributes:
      case: which program.
      leaves: of the tree.
      groups: rows of all groupings.
      all_reduces: how many, of norms.
      reduced: bytes in them.
      all_gathers: how many.
      gathered: bytes in them.
      others: collectives of any other kind.
      rare: all-reduces of counts, in a loop entered only where a norm is not finite.
      seconds: to trace and compile.
    """

    case: Case
    leaves: int
    groups: int
    all_reduces: int
    reduced: int
    all_gathers: int
    gathered: int
    others: int
    rare: int
    seconds: float


def compiled(case: Case) -> Any:
    """The update, compiled for all devices of the case, from shapes alone."""
    kind = AxisType.Explicit if case.mode == "explicit" else AxisType.Auto
    mesh = layouts.mesh(kind, layouts.WIDE if case.wide else layouts.MESH)
    mapped = case.mode == "shard_map"
    tree = layouts.tree(case.layout, case.grouping, case.size, None if mapped else mesh)
    spec = layouts.specs(case.layout, case.grouping, case.size)
    split = {"specs": {"specs": spec}, "shard_map": {"axis_name": tuple(layouts.MESH)}}
    tx = METHODS[case.method](layouts.GROUPINGS[case.grouping], split.get(case.mode, {}))
    if not mapped:
        return jax.jit(tx.update).lower(tree, jax.eval_shape(tx.init, tree), tree).compile()
    state = jax.eval_shape(tx.init, tree)
    update = jax.shard_map(
        lambda grads, state, params: tx.update(grads, state, params),
        mesh=mesh,
        in_specs=(spec, P(), spec),
        out_specs=(spec, P()),
    )
    return jax.jit(update).lower(tree, state, tree).compile()


def counted(case: Case) -> Counted:
    """Compiles a program and counts its collectives."""
    begin = time.perf_counter()
    program = compiled(case)
    seconds = time.perf_counter() - begin
    found = hlo.collectives(hlo.parse(program))
    sums = [one for one in found if one.kind == "all-reduce"]
    counts = [one for one in sums if one.integer and one.where != "entry"]
    norms = [one for one in sums if one not in counts]
    gathers = [one for one in found if one.kind == "all-gather"]
    tree = layouts.tree(case.layout, case.grouping, case.size, None)
    return Counted(
        case,
        leaves=len(jax.tree.leaves(tree)),
        groups=sum(x.size for x in _norms(case.grouping, tree)),
        all_reduces=len(norms),
        reduced=sum(one.nbytes for one in norms),
        all_gathers=len(gathers),
        gathered=sum(one.nbytes for one in gathers),
        others=len(found) - len(sums) - len(gathers),
        rare=len(counts),
        seconds=seconds,
    )


def _norms(grouping: str, tree: Any) -> list[Any]:
    groups = layouts.GROUPINGS[grouping]
    return jax.tree.leaves(jax.eval_shape(functools.partial(oc.group_norms, groups=groups), tree))


def cases(chosen: Sequence[str]) -> Iterator[Case]:
    """The programs to compile for some layouts."""
    for layout, (grouping, size) in itertools.product(chosen, SIZES.items()):
        if layouts.LAYOUTS[layout].axis_sets == 0 and grouping != "leaf":
            continue  # nothing is split, and nothing exchanged
        yield from (Case(mode, layout, grouping, "clip", size) for mode in ("jit", "specs", "explicit"))
        if grouping in PEERS:
            yield Case("jit", layout, grouping, PEERS[grouping], size)
        if (
            layout in ("fsdp", "mixed", "both") and grouping != "unit"
        ):  # units that are split have no one state
            yield Case("shard_map", layout, grouping, "clip", size)
        if grouping in SMALL:
            yield from (Case("jit", layout, grouping, method, SMALL[grouping]) for method in EXTRAS)


def wide_cases(chosen: Sequence[str]) -> Iterator[Case]:
    """The programs to compile for 64 devices."""
    for layout in chosen:
        if layout in ("fsdp", "mixed"):
            for grouping, sizes in WIDE.items():
                for size in sizes:
                    for mode in ("jit", "specs", "explicit"):
                        yield Case(mode, layout, grouping, "clip", size, wide=True)


def count_all(chosen: Sequence[Case], console: Console) -> list[Counted]:
    """Compiles and counts them one by one, behind a progress bar."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    rows: list[Counted] = []
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(chosen))
        for case in chosen:
            bar.update(task, description=f"{case.mode} {case.layout} {case.grouping} {case.size}")
            rows.append(counted(case))
            jax.clear_caches()
            bar.advance(task)
    return rows


@app.command()
def main(
    layout: Annotated[str, typer.Option("--layouts", help=f"Some of {', '.join(layouts.LAYOUTS)}.")] = "all",
    json: Annotated[Path | None, typer.Option(help="Write all counts to this file.")] = None,
    wide: Annotated[bool, typer.Option("--wide", help="Also compile for 64 devices.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file.")] = None,
) -> None:
    """What a clipped update exchanges between devices, and how long that may take on many of them.

    Updates are compiled for eight devices of the CPU, or 64, and never run; the collectives of the compiled
    program are counted. A model of latency and bandwidth carries the counts on to more devices and groups.
    """
    chosen = list(layouts.LAYOUTS) if layout == "all" else [name.strip() for name in layout.split(",")]
    for name in chosen:
        if name not in layouts.LAYOUTS:
            raise typer.BadParameter(
                f"{name!r} is none of {', '.join(layouts.LAYOUTS)}.", param_hint="--layouts"
            )
    console, where = Console(), environment.describe()
    rows = count_all([*cases(chosen), *(wide_cases(chosen) if wide else ())], console)
    console.print(report.sentence(where), scaling_report.counts(rows), highlight=False)
    for table in scaling_report.estimates():
        console.print(table)
    if json is not None:
        plain = [{**row._asdict(), "case": row.case._asdict()} for row in rows]
        text = json_module.dumps({"environment": where, "rows": plain}, indent=1, allow_nan=False)
        json.write_text(text + "\n", encoding="utf-8")
    if markdown is not None:
        report.write_markdown(markdown, scaling_report.markdown(rows, where))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 64)
    app(prog_name="python -m benchmarks.scaling")
