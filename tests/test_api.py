"""Names that other code relies on: `tests/api.txt` lists them, and a change of one shows in it.

`python tests/test_api.py` writes the list anew. A line that goes or changes there is a breaking change.
"""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optaxclip as oc

LISTED = Path(__file__).with_name("api.txt")


def shown(value: object) -> str:
    """A default value, as it would be written."""
    if value is inspect.Parameter.empty:
        return ""
    if isinstance(value, oc.Groups | oc.Norm | oc.Response) or type(value) is object:
        return "=..."  # a specification, whose functions have no text; or what says that nothing was passed
    if isinstance(value, oc.Rule):
        return "=Rule()"
    return f"={value!r}"


def signature(function: object) -> str:
    """Parameters by name, kind and default; annotations are not promised."""
    words, kind = [], None
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind == parameter.KEYWORD_ONLY and kind not in (
            parameter.KEYWORD_ONLY,
            parameter.VAR_POSITIONAL,
        ):
            words.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        words.append(f"{stars}{parameter.name}{shown(parameter.default)}")
        kind = parameter.kind
    return f"({', '.join(words)})"


def members(name: str, kind: type) -> Iterator[str]:
    """The constructor, the fields of a named tuple, and the public methods and properties of a class."""
    if hasattr(kind, "_fields"):
        yield f"{name}{signature(kind)}"
    for own, value in sorted(vars(kind).items()):
        if own.startswith("_") or own in getattr(kind, "_fields", ()):
            continue
        value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if inspect.isfunction(value):
            yield f"{name}.{own}{signature(value)}"
        elif isinstance(value, property) or hasattr(value, "func"):
            yield f"{name}.{own}"


def public() -> Iterator[str]:
    """Every public name, with its parameters."""
    for name in sorted(oc.__all__):
        value = getattr(oc, name)
        if inspect.ismodule(value):
            yield from (f"{name}.{own}{signature(getattr(value, own))}" for own in sorted(value.__all__))
        elif inspect.isclass(value):
            yield name
            yield from members(name, value)
        elif callable(value):
            yield f"{name}{signature(value)}"
        else:
            yield name


def test_public_names_are_those_that_are_listed():
    """Names, parameters, their order and their defaults."""
    assert list(public()) == LISTED.read_text(encoding="utf-8").splitlines()


def test_importing_takes_neither_plots_nor_the_command_line():
    """`import optaxclip` brings what JAX and Optax bring, and nothing of the extras."""
    code = (
        "import sys, optax; before = set(sys.modules); import optaxclip; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {
        "optaxclip",
        "jaxtyping",
        "numpy",
        "wadler_lindig",
        *sys.stdlib_module_names,
    }


if __name__ == "__main__":
    LISTED.write_text("".join(f"{line}\n" for line in public()), encoding="utf-8")
