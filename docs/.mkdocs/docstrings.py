"""An extension of Griffe that makes docstrings into what Markdown shows as it is meant.

Examples stand at the end of docstrings, without a heading and as doctests read them: they become blocks of
code. Sections of what is returned and of references become paragraphs that look like the other sections.
"""

import re
import textwrap

import griffe

# From a prompt to the next empty line, any number of times.
EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^.+\n?)*\n*)+", re.M)
SECTION = re.compile(r"^(Returns|References):\n((?:^  .+\n?|^\n)+)", re.M)


def shown(text: str) -> str:
    """A docstring whose examples are in fences, and whose sections of text are paragraphs."""
    text = SECTION.sub(lambda m: f"**{m[1]}:**\n\n{textwrap.dedent(m[2]).strip()}\n\n", text)
    return EXAMPLE.sub(lambda m: f"```pycon\n{m[0].rstrip()}\n```\n\n", text)


class Docstrings(griffe.Extension):
    """Rewrites every docstring that is found."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called for each object once it is there."""
        del kwargs
        if obj.docstring:
            obj.docstring.value = shown(obj.docstring.value)
