"""Regular expressions from users: compiled, and refused where a match could take exponential time."""

import re
from collections.abc import Iterable, Sequence
from re import _constants as sre, _parser  # type: ignore[attr-defined]
from typing import Any

# Characters that stand for all others of their kind; 'ß' and '☃' for letters and symbols beyond ASCII.
SAMPLE = frozenset(map(chr, range(128))) | {"ß", "☃"}
MANY = 10  # how often something must be repeated to count as a loop: two ways each time are a thousand in ten

_KINDS = {
    sre.CATEGORY_DIGIT: frozenset(c for c in SAMPLE if c.isdigit()),
    sre.CATEGORY_SPACE: frozenset(c for c in SAMPLE if c.isspace()),
    sre.CATEGORY_WORD: frozenset(c for c in SAMPLE if c.isalnum() or c == "_"),
}
_KINDS |= {
    sre.CATEGORY_NOT_DIGIT: SAMPLE - _KINDS[sre.CATEGORY_DIGIT],
    sre.CATEGORY_NOT_SPACE: SAMPLE - _KINDS[sre.CATEGORY_SPACE],
    sre.CATEGORY_NOT_WORD: SAMPLE - _KINDS[sre.CATEGORY_WORD],
}

Characters = frozenset[str]
Items = Sequence[tuple[Any, Any]]


def compiled(where: str, what: str, pattern: str | re.Pattern) -> re.Pattern:
    """A pattern, or an error that says what is wrong with it; `what` is how to call it."""
    try:
        made = re.compile(pattern)
        loops = _ambiguous(_parser.parse(made.pattern, made.flags), frozenset(), False)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}: {what} does not compile: {error}. Mend it.") from error
    if loops:
        raise ValueError(
            f"{where}: {what} repeats what can match the same text in several ways, which may take "
            "exponential time. Let what is repeated end in a character that it has nowhere else, as in "
            "'(?:[^/]+/)*'."
        )
    return made


def _ambiguous(items: Items, follow: Characters, looping: bool) -> bool:
    """Whether there is a choice, inside a loop, that the next character does not decide.

    Args:
      items: a part of a parsed pattern.
      follow: which characters may come after it.
      looping: whether it is repeated.
    """
    for k, (op, of) in enumerate(items):
        rest = _first(list(items)[k + 1 :], follow)
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            least, most, body = of
            own = _first(body, frozenset())
            many = most >= MANY
            if looping and least != most and own & rest:
                return True
            if _ambiguous(body, own | rest if most > 1 else rest, looping or many):
                return True
        elif op is sre.BRANCH:
            seen: set[str] = set()
            for part in of[1]:
                first = _first(part, rest)
                if (looping and first & seen) or _ambiguous(part, rest, looping):
                    return True
                seen |= first
        elif any(_ambiguous(part, rest, looping and op is sre.SUBPATTERN) for part in _inside(op, of)):
            return True
    return False


def _inside(op: Any, of: Any) -> Iterable[Items]:
    """The parts of an item that is neither a repetition nor a choice; what is atomic is never tried again."""
    if op in (sre.SUBPATTERN, sre.ASSERT, sre.ASSERT_NOT, sre.POSSESSIVE_REPEAT):
        return [of[-1]]
    if op is sre.ATOMIC_GROUP:
        return [of]
    return [part for part in of[1:] if part is not None] if op is sre.GROUPREF_EXISTS else []


def _first(items: Items, follow: Characters) -> Characters:
    """Which characters may come first."""
    found: Characters = frozenset()
    for op, of in items:
        own, empty = _begins(op, of)
        found |= own
        if not empty:
            return found
    return found | follow


def _begins(op: Any, of: Any) -> tuple[Characters, bool]:
    """Which characters an item may begin with, and whether it may be empty."""
    if op is sre.LITERAL:
        return _cased(of), False
    if op is sre.NOT_LITERAL:
        return SAMPLE - {chr(of)}, False
    if op is sre.ANY:
        return SAMPLE, False
    if op is sre.IN:
        return _of_set(of), False
    if op in (sre.AT, sre.ASSERT, sre.ASSERT_NOT):
        return frozenset(), True
    if op in (sre.GROUPREF, sre.GROUPREF_EXISTS):
        return SAMPLE, True
    parts = of[1] if op is sre.BRANCH else [of if op is sre.ATOMIC_GROUP else of[-1]]
    # No character is in the sample that could stand for the end.
    firsts = [_first(part, frozenset({""})) for part in parts]
    empty = any("" in first for first in firsts)
    if op in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
        empty |= of[0] == 0
    return frozenset().union(*firsts) - {""}, empty


def _of_set(parts: Iterable[tuple[Any, Any]]) -> Characters:
    found, negated = frozenset(), False
    for op, of in parts:
        if op is sre.NEGATE:
            negated = True
        elif op is sre.LITERAL:
            found |= _cased(of)
        elif op is sre.RANGE:
            found |= frozenset(c for c in SAMPLE if of[0] <= ord(c) <= of[1]) | _cased(of[0])
        else:
            found |= _KINDS.get(of, SAMPLE)
    return SAMPLE - found if negated else found


def _cased(code: int) -> Characters:
    """A character and, as case may be ignored, its other forms."""
    return frozenset({chr(code), chr(code).lower(), chr(code).upper()})
