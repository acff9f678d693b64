"""Policies as the command line takes them: a small language that is parsed, and never evaluated."""

import ast
import inspect
import re
from collections.abc import Callable
from typing import Any

import optaxclip
from optaxclip import groups, limits, norms, responses
from optaxclip.history._expressed import literal

FORMS = (
    "none, global:LIMIT, layerwise:LIMIT, leafwise:LIMIT, depth:K:LIMIT, regex:PATTERN:LIMIT, zclip[:Z] "
    "(with its cap of 1), autoclip[:PERCENTILE] (of 100), adagc[:SLACK], or a call such as "
    "oc.clip_by_global_norm(oc.limits.ema(2.0))"
)
MODULES = {"groups": groups, "limits": limits, "norms": norms, "responses": responses}
LONGEST = 1000  # characters; no policy needs as many, and what is nested deeper exhausts the parser


def _number(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise ValueError(f"{text} is negative or NaN")
    return value


def _percentile(text: str) -> float:
    value = _number(text)
    if 0 < value < 1:
        raise ValueError(f"percentiles are of 100: {100 * value:g} rather than {text}")
    return value


def _regex(pattern: str, limit: str) -> Any:
    # What does not match is left alone.
    rules = {literal(pattern): pattern, None: ".*"}
    return optaxclip.clip_by_groupwise_norm(_number(limit), groups.regex(rules))


def _depth(levels: str, limit: str) -> Any:
    return optaxclip.clip_by_groupwise_norm(_number(limit), groups.depth(int(levels)))


# What is behind the colons, where that is needed.
NEEDED = {
    **{kind: f"a limit: {kind}:1.0" for kind in ("global", "layerwise", "leafwise")},
    "depth": "a number of keys and a limit: depth:1:0.5",
    "regex": "a pattern and a limit: regex:embed:0.1",
}

# The maker and the numbers of arguments it takes.
KINDS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "none": (lambda: optaxclip.clip_by_global_norm(float("inf")), (0,)),
    "global": (lambda x: optaxclip.clip_by_global_norm(_number(x)), (1,)),
    "layerwise": (lambda x: optaxclip.clip_by_layerwise_norm(_number(x)), (1,)),
    "leafwise": (lambda x: optaxclip.clip_by_leafwise_norm(_number(x)), (1,)),
    "depth": (_depth, (2,)),
    "regex": (_regex, (2,)),
    "zclip": (lambda z="2.5": optaxclip.zclip(z=_number(z)), (0, 1)),
    "autoclip": (lambda percentile="10": optaxclip.autoclip(_percentile(percentile)), (0, 1)),
    "adagc": (lambda slack="1.04": optaxclip.adagc(_number(slack)), (0, 1)),
}


def policy(text: str) -> tuple[str, Any]:
    """The name and the transformation that `[NAME=]POLICY` stands for.

    Raises:
      ValueError: if it stands for none.

    >>> name, made = policy("tight=global:0.5")
    >>> print(name)
    tight
    """
    named = re.fullmatch(r"([\w .-]+)=(.*)", text, re.DOTALL)
    name, form = (named[1].strip(), named[2].strip()) if named else (text, text)
    try:
        return name, _called(form) if "(" in form and not form.startswith("regex:") else _short(form)
    except (TypeError, ValueError, SyntaxError, RecursionError, re.error) as error:
        raise ValueError(f"{text!r}: {str(error).rstrip('.')}. Pass {FORMS}.") from error


def _short(form: str) -> Any:
    kind, *rest = form.strip().split(":", 1)
    if kind not in KINDS:
        raise ValueError(f"there is no policy {kind!r}")
    make, counts = KINDS[kind]
    # A pattern may hold colons.
    arguments = rest[0].rsplit(":", max(counts) - 1) if rest and max(counts) else rest
    if len(arguments) not in counts or not all(arguments):
        needs = (
            f"needs {NEEDED[kind]}" if kind in NEEDED else f"takes {'one number' if max(counts) else 'none'}"
        )
        raise ValueError(f"{kind} {needs}")
    return make(*arguments)


def _called(form: str) -> Any:
    """What a call of optaxclip's own functions with plain arguments makes."""
    if len(form) > LONGEST:
        raise ValueError(f"it has more than {LONGEST} characters")
    made = _value(ast.parse(form.strip(), mode="eval").body)
    if not hasattr(made, "update"):
        raise ValueError("it makes no transformation")
    return made


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return tuple(map(_value, items))
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_value(k): _value(v) for k, v in zip(keys, values, strict=True) if k is not None}
        case ast.Call(func=function, args=args, keywords=keywords):
            options = {k.arg: _value(k.value) for k in keywords if k.arg is not None}
            if len(options) < len(keywords):
                raise ValueError("** is not known here")
            return _function(function)(*map(_value, args), **options)
    raise ValueError(f"{ast.unparse(node)!r} is no number, text, list, dict, or call of a function of oc")


def _function(node: ast.expr) -> Callable[..., Any]:
    """A public function of the package or of one of its four modules; nothing else can be named."""
    path = ast.unparse(node).split(".")
    owner: Any = {2: optaxclip, 3: MODULES.get(path[1]) if len(path) > 1 else None}.get(len(path))
    if owner is not None and path[0] in ("oc", "optaxclip") and path[-1] in owner.__all__:
        found = getattr(owner, path[-1])
        if inspect.isfunction(found):
            return found
    raise ValueError(f"there is no function {ast.unparse(node)}")
