"""The dated first lines of a benchmark's note. Needs no other package than this one."""

import datetime
import importlib.metadata
import platform

from scaling_dit.monitor.host import cores, processor

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def header(title: str, script: str, how: str = "") -> list[str]:
    """The first lines of a note: title, date, hardware, versions, and the script that writes it."""
    installed = {dist.name.lower() for dist in importlib.metadata.distributions()}
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if name in installed
    )
    count = len(cores())
    return [
        f"# {title}",
        "",
        f"{datetime.date.today()}; {processor()}, {count} core{'s' * (count > 1)}; "
        f"Python {platform.python_version()}, {versions}.",
        f"Written by `{script}`{' ' if how else ''}{how}.",
    ]
