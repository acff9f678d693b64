"""The command line over saved recordings and logs of norms; needs the extra `cli`."""

from optaxclip._cli._app import app, main

__all__ = ["app", "main"]
