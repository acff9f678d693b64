"""The command: `python -m optaxclip --help`."""

import importlib.util
import sys


def main() -> None:
    """Runs the command line, or says what to install for it."""
    try:
        from optaxclip import _cli
    except ImportError as error:
        missing = (error.name or "optaxclip").split(".")[0]
        if missing == "optaxclip":
            raise
        needed = [name for name in ("typer", "rich", "matplotlib") if not importlib.util.find_spec(name)]
        install = " ".join(dict.fromkeys([*needed, missing]))
        print(f"optaxclip: there is no {error.name}. pip install {install}", file=sys.stderr)
        sys.exit(2)
    _cli.main()


if __name__ == "__main__":
    main()
