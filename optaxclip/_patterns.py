"""Regular expressions from users: compiled, and refused where a match could take exponential time.

A match that fails late tries each choice again that was left open: n of them may take 2**n tries. The next
character closes a choice of which only one way begins with it. Counted are those that stay open, in a loop as
often as it runs; a few of them take a power of the path's length at most.

How patterns are parsed is private to Python. Where a Python lacks it, every pattern that compiles is taken.
"""

import re
import string
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

try:
    from re._parser import parse
except ImportError:
    parse = None

MANY = 10  # how many open choices are too many: two ways each are a thousand

Characters = frozenset[str]
Items = Iterable[tuple[Any, Any]]

# The characters that sets are asked for one by one: ASCII, and what differs from it by case alone; for all
# others, the names of four kinds. One of the others is itself where a pattern spells it out.
SAME = ("iIİı", "kK\u212a", "sSſ")
ALONE = frozenset(map(chr, range(128))) | frozenset("".join(SAME))
KINDS = frozenset({"letters", "digits", "spaces", "others"})
ALL = ALONE | KINDS
_CATEGORIES = {
    "DIGIT": frozenset(c for c in ALONE if c.isdecimal()) | {"digits"},
    "SPACE": frozenset(c for c in ALONE if c.isspace()) | {"spaces"},
    "WORD": frozenset(c for c in ALONE if c.isalnum() or c == "_") | {"digits", "letters"},
}


class Part(NamedTuple):
    """A part of a pattern, as far as its choices go.

    Attributes:
      kind: "sequence" of parts; "choice" among them; "condition", a choice that the past decides; "loop";
        "once", whose end is final: what comes after it does not make it try again; or "plain".
      first: which characters it may begin with.
      empty: whether it may be empty.
      parts: what is in it.
      times: of a loop, how often it runs, at least and at most.
    """

    kind: str
    first: Characters = frozenset()
    empty: bool = True
    parts: Sequence["Part"] = ()
    times: tuple[int, int] = (1, 1)


def compiled(where: str, what: str, pattern: str | re.Pattern) -> re.Pattern:
    """A pattern, or an error that says what is wrong with it; `what` is how to call it."""
    try:
        made = re.compile(pattern)
        if not isinstance(made.pattern, str):
            raise TypeError(f"{where}: {what} is of type bytes. Pass a str.")
        items: Any = parse(made.pattern, made.flags) if parse else ()
        many = _open(_sequence(items, made.flags)) >= MANY
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}: {what} does not compile: {error}. Mend it.") from error
    if many:
        raise ValueError(
            f"{where}: {what} repeats what can match the same text in several ways, which may take "
            "exponential time. Make the next character decide: let no part that may repeat or be left out "
            "begin with what may follow it, nor two choices with the same character, as in '(?:[^/]+/)*'."
        )
    return made


def found_in_paths(where: str, pattern: Any) -> re.Pattern:
    """A pattern that is searched for in paths, or an error."""
    if not isinstance(pattern, str | re.Pattern):
        raise TypeError(f"{where}: the pattern {pattern!r} is of type {type(pattern).__name__}. Pass a str.")
    text = pattern if isinstance(pattern, str) else pattern.pattern
    return compiled(where, f"the pattern {text!r}", pattern)


def _open(part: Part, follow: Characters = frozenset(), times: int = 1) -> int:
    """How many choices the next character leaves open, each counted as often as it may come up.

    Args:
      part: where to look.
      follow: which characters may come after it.
      times: how often it may run, in all loops around it.
    """
    if part.kind == "sequence":
        found = 0
        for own in reversed(part.parts):
            found += _open(own, follow, times)
            follow = _then(own, follow)
        return found
    if part.kind == "loop":
        (body,), (least, most) = part.parts, part.times
        # What may be empty can be left out in two ways: not at all, and as nothing.
        found = times if least != most and (body.empty or _meet(body.first, follow)) else 0
        if most > 1:  # The outermost loop is left once: only whether it goes on is decided again and again.
            follow = body.first | follow if times > 1 else body.first
        return found + _open(body, follow, times * most)
    if part.kind == "once":
        found = _open(part.parts[0])
        return found if found >= MANY else 0
    found = times if part.kind == "choice" and _clash(_then(own, follow) for own in part.parts) else 0
    return found + max((_open(own, follow, times) for own in part.parts), default=0)


def _then(part: Part, follow: Characters) -> Characters:
    """Which characters a part, and what comes after it, may begin with."""
    return part.first | follow if part.empty else part.first


def _clash(firsts: Iterable[Characters]) -> bool:
    seen: Characters = frozenset()
    for first in firsts:
        if _meet(first, seen):
            return True
        seen |= first
    return False


def _meet(one: Characters, other: Characters) -> bool:
    """Whether a character may be in both."""
    return bool(one & other or _kinds(one) & other or one & _kinds(other))


def _kinds(characters: Characters) -> Characters:
    """The kinds of those that are spelled out."""
    return frozenset(
        "digits" if c.isdecimal() else "spaces" if c.isspace() else "letters" if c.isalnum() else "others"
        for c in characters - ALL
    )


def _sequence(items: Items, flags: int) -> Part:
    parts = [_part(str(op), of, flags) for op, of in items]
    first: Characters = frozenset()
    for part in reversed(parts):
        first = _then(part, first)
    return Part("sequence", first, all(part.empty for part in parts), parts)


def _part(op: str, of: Any, flags: int) -> Part:
    match op, of:
        case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN", _:
            return Part("plain", _characters(op, of, flags), False)
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT", (least, most, items):
            body = _sequence(items, flags)
            kind = "once" if op == "POSSESSIVE_REPEAT" else "loop"
            return Part(kind, body.first, body.empty or not least, [body], (least, most))
        case "BRANCH", (_, arms):
            return _either("choice", [_sequence(arm, flags) for arm in arms])
        case "GROUPREF_EXISTS", (_, yes, no):
            return _either("condition", [_sequence(arm or [], flags) for arm in (yes, no)])
        case "SUBPATTERN", (_, add, drop, items):
            kept = flags & ~re.ASCII if add & re.UNICODE else flags
            return _sequence(items, (kept | add) & ~drop)
        case "ATOMIC_GROUP", items:
            body = _sequence(items, flags)
            return body._replace(kind="once", parts=[body])
        case "ASSERT" | "ASSERT_NOT", (_, items):
            return Part("once", parts=[_sequence(items, flags)])
        case "AT", _:
            return Part("plain")
    return Part("plain", ALL)  # what a group has matched, and whatever a later Python may add


def _either(kind: str, parts: Sequence[Part]) -> Part:
    first = frozenset().union(*(part.first for part in parts))
    return Part(kind, first, any(part.empty for part in parts), parts)


def _characters(op: str, of: Any, flags: int) -> Characters:
    """Which characters a set may match: rather too many than too few."""
    if op == "LITERAL":
        return _cased(chr(of), flags)
    if op == "NOT_LITERAL":
        return ALL - _cased(chr(of), flags)
    if op == "ANY":
        return ALL if flags & re.DOTALL else ALL - {"\n"}
    found, negated = frozenset(), False
    for own, of_own in of:
        match str(own), of_own:
            case "NEGATE", _:
                negated = True
            case "LITERAL", code:
                found |= _cased(chr(code), flags)
            case "RANGE", (low, high):
                found = found.union(*(_cased(c, flags) for c in ALONE if low <= ord(c) <= high))
                found |= KINDS if high > 127 and not negated else frozenset()
            case "CATEGORY", kind:
                found |= _category(str(kind).removeprefix("CATEGORY_"), flags)
            case _:
                found |= frozenset() if negated else ALL
    return ALL - found if negated else found


def _category(kind: str, flags: int) -> Characters:
    if kind.startswith("NOT_"):
        return ALL - _category(kind.removeprefix("NOT_"), flags)
    found = _CATEGORIES[kind]
    return found & frozenset(string.printable) if flags & re.ASCII else found


def _cased(c: str, flags: int) -> Characters:
    """A character and, where case is ignored, its other forms."""
    if not flags & re.IGNORECASE or (flags & re.ASCII and not c.isascii()):
        return frozenset({c})
    same = None if flags & re.ASCII else next((same for same in SAME if c in same), None)
    return frozenset(same or {c, c.lower(), c.upper(), c.casefold()})
