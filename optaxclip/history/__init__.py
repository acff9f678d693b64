"""A recording of group norms: saved, replayed, compared, looked at, and asked for advice."""

from optaxclip.history._advice import Advice
from optaxclip.history._compare import Compared, Comparison
from optaxclip.history._evidence import Rule
from optaxclip.history._history import History
from optaxclip.history._recording import FirstNonfinite, Run, Stretch
from optaxclip.history._replay import Replay

__all__ = [
    "Advice",
    "Compared",
    "Comparison",
    "FirstNonfinite",
    "History",
    "Replay",
    "Rule",
    "Run",
    "Stretch",
]
