"""What docs/frameworks.md shows of frameworks that not all have runs, and prints what it says."""

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text(encoding="utf-8")
SHOWN = re.compile(r"```python\n((?!>>>).*?)```\n\n```text\n(.*?)```", re.S)
FRAMEWORKS = {"Haiku": "haiku", "Keras 3 on JAX": "keras", "haliax": "haliax", "Penzai": "penzai"}


@pytest.mark.parametrize("title", FRAMEWORKS)
def test_what_is_shown_prints_what_is_said(title, monkeypatch):
    """Each block of code, followed by its output."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what frameworks import
        pytest.importorskip(FRAMEWORKS[title], exc_type=ImportError)
    section = TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    ((code, expected),) = SHOWN.findall(section)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == expected


def test_no_block_is_left_out():
    """Every block without a prompt is one of these."""
    assert len(SHOWN.findall(TEXT)) == len(FRAMEWORKS) == len(re.findall(r"```python\n(?!>>>)", TEXT))
