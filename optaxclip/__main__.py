"""The command: `python -m optaxclip --help`."""

import sys


def main() -> None:
    """Runs the command line, or says what to install for it."""
    try:
        from optaxclip import _cli
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] == "optaxclip":
            raise
        print(f"optaxclip: there is no {error.name}. pip install 'optaxclip[cli]'", file=sys.stderr)
        sys.exit(2)
    _cli.main()


if __name__ == "__main__":
    main()
