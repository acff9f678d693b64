"""Small errors, put into the modules that compute one at a time: do the tests notice?

`python tests/mutants.py` changes a copy of the tree, never the tree itself, and prints the errors that no
test of a few files for that module noticed. What is to be said of them is in `mutants.md`.

Each test needs seconds of compilation, so that a sample is drawn, and the tests run in forks of one process
that has imported JAX and the other packages already.
"""

import argparse
import ast
import contextlib
import copy
import datetime
import importlib
import importlib.metadata
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = ["tests/test_numerics.py", "tests/test_metrics.py", "tests/test_limits.py"]
ADAPTIVE = ["tests/test_adaptive.py", "tests/test_moving.py"]
# From a module to the tests that should notice, the fastest first.
TESTS = {
    "_measure": ENGINE,
    "_read": ENGINE,
    "_scale": ENGINE,
    "_apply": [*ENGINE, "tests/test_errors.py"],
    "_rescale": ["optaxclip/_rescale.py", "tests/test_groups.py", "tests/test_errors.py", *ENGINE],
    "limits": ["optaxclip/limits.py", "tests/test_limits.py", "tests/test_errors.py"],
    "responses": ["optaxclip/responses.py", "tests/test_numerics.py", "tests/test_errors.py"],
    "norms": ["optaxclip/norms.py", "tests/test_numerics.py", "tests/test_errors.py"],
    "_moments": ["optaxclip/_moments.py", *ADAPTIVE],
    "_running": ["optaxclip/_running.py", *ADAPTIVE, "tests/test_numerics.py"],
    "_windows": ["optaxclip/_windows.py", *ADAPTIVE],
    "_ema": ["optaxclip/_ema.py", *ADAPTIVE],
    "_learning": [*ADAPTIVE, "tests/test_limits.py", "tests/test_coordinate.py"],
}
REWRITE = "ignore::pytest.PytestAssertRewriteWarning"  # of plugins that are imported already
SECONDS = 600  # of computing
WORDS = {0: "SURVIVED", 1: "noticed", 2: "noticed"}  # by pytest's exit code; 2: a module cannot be imported

COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.RShift: ast.LShift,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
CALLS = {"minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any", "min": "max", "max": "min"}
SKIPPED = (ast.Raise, ast.JoinedStr, ast.AnnAssign, ast.Import, ast.ImportFrom)


class Mutant(NamedTuple):
    """One small error.

    Attributes:
      module: where.
      line: of the expression.
      old: the expression.
      new: the expression with the error.
      source: of the module with the error.
    """

    module: str
    line: int
    old: str
    new: str
    source: str


def expressions(node: ast.AST) -> Iterator[ast.expr]:
    """All of them, without annotations and the text of errors."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, SKIPPED):
            continue
        if isinstance(child, ast.arg) or (isinstance(node, ast.FunctionDef) and child is node.returns):
            continue
        if isinstance(child, ast.expr):
            yield child
        yield from expressions(child)


def changed(node: ast.expr) -> Iterator[ast.expr]:
    """The expression with an error, for each error that it can have."""
    new = copy.deepcopy(node)
    match node, new:
        case ast.Compare(), ast.Compare() if len(node.ops) == 1:
            new.ops = [COMPARISONS[type(node.ops[0])]()]
            yield new
        case (ast.BinOp(), ast.BinOp()) | (ast.BoolOp(), ast.BoolOp()) if type(node.op) in OPERATORS:
            new.op = OPERATORS[type(node.op)]()
            yield new
        case ast.UnaryOp(op=ast.Not() | ast.Invert() | ast.USub()), _:
            yield node.operand
        case ast.IfExp(), ast.IfExp():
            new.body, new.orelse = new.orelse, new.body
            yield new
        case ast.Constant(value=bool()), ast.Constant():
            new.value = not node.value
            yield new
        case ast.Constant(value=int() | float()), ast.Constant():
            new.value = node.value + 1 if isinstance(node.value, int) else 2 * node.value or 1.0
            yield new
        case ast.Call(func=ast.Attribute(attr=name)), ast.Call(func=ast.Attribute()) if name in CALLS:
            new.func.attr = CALLS[name]
            yield new
        case ast.Call(func=ast.Attribute(attr="where"), args=[_, _, _]), ast.Call():
            new.args[1:] = reversed(new.args[1:])
            yield new


def mutants(module: str) -> list[Mutant]:
    """All errors that a module can be given."""
    text = (ROOT / "optaxclip" / f"{module}.py").read_bytes()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    made = []
    for node in expressions(ast.parse(text)):
        first = starts[node.lineno - 1] + node.col_offset
        last = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        for new in changed(node):
            source = text[:first] + f"({ast.unparse(new)})".encode() + text[last:]
            with contextlib.suppress(SyntaxError):  # a pattern or a keyword
                ast.parse(source)
                made.append(Mutant(module, node.lineno, ast.unparse(node), ast.unparse(new), source.decode()))
    return made


def outcome(mutant: Mutant | None, tests: list[str], folder: Path) -> str:
    """What tests say of the error in the copy of the tree in a folder: one of `WORDS`, or how they ended."""
    path = None if mutant is None else folder / "optaxclip" / f"{mutant.module}.py"
    before = b"" if path is None else path.read_bytes()
    if path is not None and mutant is not None:
        path.write_text(mutant.source, encoding="utf-8")
    try:
        if not (child := os.fork()):
            try:
                run(tests, folder)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(3)
        _, status = os.waitpid(child, 0)
    finally:
        if path is not None:
            path.write_bytes(before)
    code = os.waitstatus_to_exitcode(status)  # of a signal, such as that of the limit, below 0
    return WORDS.get(code, f"ended with {code}")


def run(tests: list[str], folder: Path) -> None:
    """In a fork: the tests, on the copy alone, and out."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    out = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    code = pytest.main(["-x", "-q", "--no-header", "--durations=20", "-W", REWRITE, *tests])
    sys.stdout.flush()
    os._exit(int(code))


def sampled(modules: list[str], count: int, seed: int) -> list[Mutant]:
    """So many errors for each module, spread over its lines, and none twice."""
    drawn = []
    for module in modules:
        made = mutants(module)
        random = Random(f"{seed} {module}")
        chosen = sorted(random.sample(range(len(made)), min(count, len(made))))
        drawn += [made[k] for k in chosen]
    return drawn


def copied(folder: Path) -> None:
    for name in ("optaxclip", "tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder)


def versions() -> str:
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax", "numpy"))
    return f"{datetime.date.today()}, Python {platform.python_version()}, {packages}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Puts small errors into modules; do the tests notice?")
    parser.add_argument("--sample", type=int, default=4, help="Errors for each module.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="*", default=list(TESTS), choices=list(TESTS))
    parser.add_argument("--tests", nargs="*", help="In place of the fast files of each module.")
    parser.add_argument("--only", nargs="*", help="MODULE:LINE of the errors to put in, of all there are.")
    parser.add_argument("--cache", type=Path, help="Where compiled programs stay from run to run.")
    parser.add_argument("--unchecked", action="store_true", help="The tests are known to pass as they are.")
    parser.add_argument("--list", action="store_true", help="Only print the errors.")
    told = parser.parse_args()
    chosen = sampled(told.modules, 10**9 if told.only else told.sample, told.seed)
    chosen = [x for x in chosen if not told.only or f"{x.module}:{x.line}" in told.only]
    if told.list:
        for x in chosen:
            print(f"{x.module}:{x.line}: {x.old} -> {x.new}")
        return 0
    began, left = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied(folder)
        # An error in one place leaves most programs as they are.
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": str(told.cache or folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        for package in ("jax", "optax", "flax", "chex", "hypothesis", "beartype"):
            importlib.import_module(package)
        files = dict.fromkeys(file for x in chosen for file in told.tests or TESTS[x.module])
        for file in () if told.unchecked else files:
            if outcome(None, [file], folder) != WORDS[0]:
                print((folder / "log").read_text(), f"{file} fails without any error.", sep="\n")
                return 2
            print(f"{file} passes without an error, {time.perf_counter() - began:.0f} s.", flush=True)
        for x in chosen:
            since = time.perf_counter()
            word = outcome(x, told.tests or TESTS[x.module], folder)
            left += [] if word == WORDS[1] else [x]
            print(
                f"{word:8} {x.module}:{x.line}: {x.old} -> {x.new} ({time.perf_counter() - since:.0f} s)",
                flush=True,
            )
    print(f"{len(chosen) - len(left)} of {len(chosen)} noticed; seed {told.seed}; {versions()}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
