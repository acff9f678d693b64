"""What the numbers depend on: the device and the versions."""

import importlib.metadata
import os
import platform
import time
from pathlib import Path

import jax


def describe() -> dict[str, str | int]:
    """Device, cores, how busy they are, versions and date."""
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "optaxclip")}
    return {
        "device": f"{device.platform}: {_processor() if device.platform == 'cpu' else device.device_kind}",
        "cores": cores(),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
        "date": time.strftime("%Y-%m-%d"),
    }


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
