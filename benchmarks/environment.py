"""What the numbers depend on: the device, the versions, the commit and the command."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import jax

SPINS = "GOMP_SPINCOUNT"
COMMIT = "COMMIT"  # the environment variable that has the commit of a copy that is no repository


def describe() -> dict[str, str | int]:
    """Device, cores, how busy they are, versions, commit, date and command."""
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "optaxclip")}
    return {
        "device": f"{device.platform}: {_processor() if device.platform == 'cpu' else device.device_kind}",
        "cores": cores(),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def shorten_spins() -> None:
    """Lets threads of C and PyTorch that wait sleep soon; before either is loaded, unless told otherwise.

    By default they spin for milliseconds, on a core that what is measured next needs.
    """
    os.environ.setdefault(SPINS, "1000")


def commit() -> str:
    """The commit that is checked out, and whether code differs from it."""
    found = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "-uno", "--", ":/optaxclip", "*.py", "*.c")
    if not found:
        return os.environ.get(COMMIT, "unknown")
    return f"{found}, changed" if changed else found


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if not done.returncode else ""


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
