"""The dated first lines of a benchmark's note. Needs only the standard library."""

import datetime
import importlib.metadata
import os
import pathlib
import platform

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def header(title: str, script: str, how: str = "") -> list[str]:
    """The first lines of a note: title, date, hardware, versions, and the script that writes it."""
    installed = {dist.name.lower() for dist in importlib.metadata.distributions()}
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if name in installed
    )
    return [
        f"# {title}",
        "",
        f"{datetime.date.today()}; {processor()}, {os.cpu_count()} cores; "
        f"Python {platform.python_version()}, {versions}.",
        f"Written by `{script}`{' ' if how else ''}{how}.",
    ]


def processor() -> str:
    """The CPU's name as the kernel gives it."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
