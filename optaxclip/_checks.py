"""Argument checks, so that errors have one voice: where, what was wrong, what to do."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is known now: a Python or NumPy number rather than an array or a tracer."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def real(*values: Any) -> list[Any]:
    """The values, arrays as real ones in no less than float32.

    `optax.inject_hyperparams` makes them complex where parameters are, and of 16 bits likewise.
    """
    return [_real(value) if isinstance(value, jax.Array) else value for value in values]


def _real(value: jax.Array) -> jax.Array:
    value = jnp.real(value)
    short = jnp.issubdtype(value.dtype, jnp.floating) and jnp.finfo(value.dtype).bits < 32
    return value.astype(jnp.float32) if short else value


def numeric(where: str, **arguments: Any) -> None:
    """Raises unless every argument is a number or an array of numbers."""
    for name, value in arguments.items():
        if is_number(value) or isinstance(value, jax.Array | np.ndarray):
            continue
        raise TypeError(
            f"{where}: {name} is {value!r}, of type {type(value).__name__}. Pass a number or an array."
        )


def real_dtype(where: str, **arguments: Any) -> np.dtype:
    """The real floating-point dtype that the one argument names."""
    ((name, value),) = arguments.items()
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{where}: {name} is {value!r}. Pass None or a real floating-point dtype, such as jnp.float32."
        )
    return dtype


def unscheduled(**arguments: Any) -> dict[str, Any]:
    """Those of the arguments that can be checked now: schedules have no value yet."""
    return {name: value for name, value in arguments.items() if not callable(value)}


def nonnegative(where: str, **arguments: Any) -> None:
    """Raises if an argument is a negative or NaN number. Arrays are not read: they may be traced."""
    numeric(where, **arguments)
    for name, value in arguments.items():
        if is_number(value) and not value >= 0:
            raise ValueError(
                f"{where}: {name} is {value!r}, not among the numbers from 0 to inf. Pass one that is "
                "neither negative nor NaN."
            )


def positive(where: str, **arguments: Any) -> None:
    """Raises if an argument is a number that is zero, negative or NaN."""
    numeric(where, **arguments)
    for name, value in arguments.items():
        if is_number(value) and not value > 0:
            raise ValueError(
                f"{where}: {name} is {value!r}, not among the numbers above 0. Pass a positive one."
            )


def within(where: str, least: float, most: float, **arguments: Any) -> None:
    """Raises if an argument is a number outside `[least, most]` or NaN."""
    numeric(where, **arguments)
    for name, value in arguments.items():
        if is_number(value) and not least <= value <= most:
            raise ValueError(
                f"{where}: {name} is {value!r}, not among the numbers from {least} to {most}. Pass one of "
                "these."
            )


def whole_number(where: str, *, least: int = 0, **arguments: Any) -> None:
    """Raises unless every argument is an integer known now, and not below `least`."""
    for name, value in arguments.items():
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            hint = ""
            if isinstance(value, jax.Array):
                hint = f" Under optax.inject_hyperparams, name it: static_args={name!r}."
            raise TypeError(
                f"{where}: {name} is {value!r}, of type {type(value).__name__}. Pass an integer.{hint}"
            )
        if value < least:
            raise ValueError(f"{where}: {name} is {value}, below {least}. Pass {least} or more.")


def one_of(where: str, choices: Iterable[str], **arguments: Any) -> None:
    """Raises unless every argument is one of `choices`."""
    choices = tuple(choices)
    for name, value in arguments.items():
        if value not in choices:
            raise ValueError(f"{where}: {name} is {value!r}. Pass one of {', '.join(map(repr, choices))}.")


def spec(where: str, kind: type, **arguments: Any) -> None:
    """Raises unless every argument is a specification of the given kind."""
    for name, value in arguments.items():
        if not isinstance(value, kind):
            module = {"Groups": "groups", "Norm": "norms", "Response": "responses"}[kind.__name__]
            hint = f" Call it: {module}.{value.__name__}()." if callable(value) else ""
            shown = f"{value!r}, " if value is None or isinstance(value, str | int | float) else ""
            raise TypeError(
                f"{where}: {name} is {shown}of type {type(value).__name__}. "
                f"Pass one of optaxclip.{module}.{hint}"
            )
        if kind.__name__ == "Norm" and not value.degree >= 1:
            raise ValueError(
                f"{where}: {name} has the degree {value.degree!r}, below 1. Pass a norm whose partial "
                "results grow at least as fast as entries."
            )


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names for an error message, cut where there are too many to read."""
    names = list(names)
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"


def state(where: str, value: Any, kind: type) -> None:
    """Raises unless a state is of the given kind."""
    if not isinstance(value, kind):
        raise TypeError(
            f"{where}: the state is of type {type(value).__name__}. Pass the {kind.__name__} that `init` or "
            "the last update returned; where a checkpoint has none yet, that of `init(params)`."
        )


def per_row(where: str, name: str, shape: tuple[int, ...], rows: Sequence[str]) -> None:
    """Raises unless an array of this shape has one entry, or one for each row; a tree may have no rows."""
    if rows and math.prod(shape) != 1 and shape != (len(rows),):
        raise ValueError(
            f"{where}: {name} has shape {shape} for {len(rows)} rows of groups, {listed(rows)}. Pass one "
            "number, or one for each row."
        )


def same_rows(
    where: str, names: Sequence[str], before: tuple[int, ...], kind: str = "rows of groups"
) -> None:
    """Raises unless there are as many names as a vector of the state has entries.

    Args:
      where: the public name, for the error.
      names: the names of the rows of the tree in `update`.
      before: the shape of the vector that `init` made.
      kind: what the names are of.
    """
    if before != (len(names),):
        raise ValueError(
            f"{where}: the tree has {len(names)} {kind}, {listed(names)}; `init` saw {before[0]}. Pass "
            "updates with the structure that `init` was given."
        )


def finite_order(where: str, p: Any) -> None:
    """Raises unless `p` is a number known now, at least 1 and finite."""
    if not is_number(p):
        raise TypeError(f"{where}: p is {p!r}, of type {type(p).__name__}. Pass a Python number.")
    if not (p >= 1 and math.isfinite(p)):
        raise ValueError(
            f"{where}: p is {p!r}, not among the finite orders from 1. Use norms.linf() for infinity."
        )
