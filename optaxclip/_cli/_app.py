"""The command line over recordings: show, plot, compare, advise."""

import dataclasses
import io
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import optaxclip
from optaxclip import _checks
from optaxclip._cli import _policies
from optaxclip._cli._terminal import as_json, plainly, print_advice, print_comparison, read, stdout
from optaxclip.history import Comparison, History, _plot, _tables

EXAMPLES = """
**Files.** A recording saved by `history.save("run.npz")`, or a log of norms from any framework, PyTorch
included: CSV with a header, or JSON lines, one object for each step. Which it is, is found out from what is
in it. Columns of norms are found by their names; where they have others, say which:

    optaxclip show log.csv --columns 'grads/(.+)' --step iteration --loss train_loss

**Look, compare, ask.**

    optaxclip show run.npz

    optaxclip plot run.npz -o norms.png

    optaxclip plot run.npz -o report.html

    optaxclip compare run.npz -p global:1.0 -p layerwise:0.5 -p 'regex:embed:0.1' -p zclip

    optaxclip advise run.npz --optimizer sgd --learning-rate 0.1

    optaxclip advise run.npz --json | jq -r .code

**Exit codes.** 0: done. 1: the file cannot be read or written, or does not hold what was asked for. 2: wrong
usage, or a package is missing.
"""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TEXT = "Logs only. "
File = Annotated[Path, typer.Argument(help="A saved recording (.npz), a CSV or a JSON-lines log.")]
Columns = Annotated[
    list[str] | None,
    typer.Option(help=TEXT + "Columns of norms: a regular expression with one group, or names."),
]
Step = Annotated[str | None, typer.Option(help=TEXT + "The column of the step.")]
Loss = Annotated[str | None, typer.Option(help=TEXT + "The column of the loss.")]
Norm = Annotated[str | None, typer.Option(help=TEXT + "What was logged: l2 (default), l1, linf, lp(3.0).")]
Rows = Annotated[
    Literal["leaf", "layer"],
    typer.Option(help=TEXT + "A name in a log is taken for a leaf unless this says layer."),
]
Groups = Annotated[str, typer.Option(help="Put leaves together first: leaf, layer or depth:K.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout; null for what is not finite.")]
Optimizer = Annotated[
    Literal["sgd", "adam"] | None,
    typer.Option(
        help="What follows the clipping: adam, for AdamW, Lion, Adafactor and all whose steps do not depend "
        "on the size of gradients; or sgd, for momentum too, which is taken without it."
    ),
]


def _above_zero(value: float | None) -> float | None:
    if value is not None and not value > 0:
        raise typer.BadParameter(f"{value} is not above 0.")
    return value


Rate = Annotated[
    float | None,
    typer.Option(
        "--learning-rate",
        "--lr",
        callback=_above_zero,
        help="Its learning rate, above 0; the highest of a schedule.",
    ),
]
Budget = Annotated[
    float, typer.Option(min=0, max=0.5, help="Which share of ordinary updates clipping may touch.")
]


def main() -> None:
    """Runs it; what a stream cannot encode is replaced."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app(prog_name="optaxclip")


@app.callback(epilog=EXAMPLES, invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Looks at recorded gradient norms, and says whether to clip as a whole or by layer, at which limit."""
    if version:
        print(optaxclip.__version__)


@app.command()
@plainly
def show(
    file: File,
    most: Annotated[int, typer.Option(min=1, help="How many groups to show.")] = 20,
    columns: Columns = None,
    step: Step = None,
    loss: Loss = None,
    norm: Norm = None,
    rows: Rows = "leaf",
    groups: Groups = "leaf",
    json: Json = False,
) -> None:
    """Prints the norms of each group in numbers, and what was not finite.

    `optaxclip show log.csv --groups layer --most 40`
    """
    history = read(file, columns, step, loss, norm, rows, groups)
    found = _tables.lines(history, most)
    if json:
        first = history.first_nonfinite()
        as_json(
            {
                "updates": len(history),
                "steps": [int(history.steps[0]), int(history.steps[-1])] if len(history) else None,
                "norm": history.norm,
                "groups": found.groups,
                "left_out": found.left_out,
                "whole": found.whole,
                "first_nonfinite": None if first is None else dataclasses.asdict(first),
            }
        )
        return
    console = stdout()
    console.print(_tables.table(history, most, console.width))
    console.print(*str(history).split("\n")[2:], sep="\n")


@app.command()
@plainly
def plot(
    file: File,
    output: Annotated[Path, typer.Option("-o", "--output", help=".png, .svg, .pdf, or .html.")],
    limit: Annotated[list[float] | None, typer.Option(help="A limit of the whole norm to draw.")] = None,
    advice: Annotated[bool, typer.Option(help="Draw the advised limit.")] = True,
    optimizer: Optimizer = None,
    learning_rate: Rate = None,
    budget: Budget = 0.05,
    columns: Columns = None,
    step: Step = None,
    loss: Loss = None,
    norm: Norm = None,
    rows: Rows = "leaf",
    groups: Groups = "leaf",
    json: Json = False,
) -> None:
    """Draws the norms: a heat map, the whole with limits, who dominates, a histogram.

    An `.html` file also has the table and the advice, and needs no other files.

    `optaxclip plot run.npz -o norms.png --limit 1 --limit 5`
    """
    kinds = [*_plot.formats(), "html"]
    kind = output.suffix.removeprefix(".").lower()
    if kind not in kinds:
        raise typer.BadParameter(
            f"{str(output)!r} ends in none of {', '.join(kinds)}.", param_hint="--output"
        )
    history = read(file, columns, step, loss, norm, rows, groups)
    said = history.advise(budget, optimizer, learning_rate) if advice else None
    if kind == "html":
        history.to_html(output, said, limits=limit)
    else:
        history.plot(limit, said).savefig(output)
    if json:
        as_json({"written": str(output)})
    else:
        print(f"Written: {output}")
        if said is not None and optimizer is None and kind != "html":  # which shows all reasons
            print(f"The advised limit: {said.reasons[0]}")


@app.command(epilog=f"A policy is one of {_policies.FORMS}. Put NAME= before it to name it in the table.")
@plainly
def compare(
    file: File,
    policy: Annotated[
        list[str] | None, typer.Option("-p", "--policy", help="A policy; again for more.")
    ] = None,
    columns: Columns = None,
    step: Step = None,
    loss: Loss = None,
    norm: Norm = None,
    rows: Rows = "leaf",
    groups: Groups = "leaf",
    json: Json = False,
) -> None:
    """Replays policies on the recording: what each would have done, without training again.

    Without `--policy` it compares what `advise` weighs.

    `optaxclip compare run.npz -p global:1.0 -p 'tight=regex:embed|head:0.1' -p 'oc.adagc(slack=1.1)'`
    """
    try:
        named = [_policies.policy(text) for text in policy or ()]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--policy") from error
    policies = dict(named)
    if len(policies) < len(named):
        names = [name for name, _ in named]
        twice = next(name for name in names if names.count(name) > 1)
        raise typer.BadParameter(
            f"{twice!r} is the name of several. Put NAME= before one.", param_hint="--policy"
        )
    history = read(file, columns, step, loss, norm, rows, groups)
    replays = {name: history.replay(made) for name, made in policies.items()}
    for name, replay in replays.items():
        if history.names and not replay.names:
            raise ValueError(f"policy {name!r} is about no group among {_checks.listed(history.names)}.")
    found = history.compare(replays) if replays else _weighed(file, history)
    if json:
        own = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        policies = own.pop("rows")
        as_json({**own, "policies": policies})
    else:
        print_comparison(found)


def _weighed(file: Path, history: History) -> Comparison:
    """What `advise` weighs; an error that says why it weighs nothing."""
    said = history.advise()
    if said.comparison is not None:
        return said.comparison
    why = "has too few ordinary steps to choose policies by."
    if said.policy == "undecided":
        why = f"is no file to choose policies by. {said.reasons[0]}"
    raise ValueError(f"{str(file)!r} {why} Name some: -p global:1.0.")


@app.command()
@plainly
def advise(
    file: File,
    optimizer: Optimizer = None,
    learning_rate: Rate = None,
    budget: Budget = 0.05,
    columns: Columns = None,
    step: Step = None,
    loss: Loss = None,
    norm: Norm = None,
    rows: Rows = "leaf",
    groups: Groups = "leaf",
    json: Json = False,
) -> None:
    """Says whether to clip, by which groups and at which limit, with reasons and a line of code.

    `optaxclip advise run.npz --optimizer adam`
    """
    history = read(file, columns, step, loss, norm, rows, groups)
    said = history.advise(budget, optimizer, learning_rate)
    if json:
        as_json(
            {
                "policy": said.policy,
                "limit": said.limit if isinstance(said.limit, float) else None,
                "interval": said.interval,
                "code": said.code,
                "reasons": said.reasons,
                "comparison": None if said.comparison is None else said.comparison.rows,
            }
        )
        return
    print_advice(said)
