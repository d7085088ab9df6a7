"""What this process runs on, for notes and reports. Needs only the standard library."""

import pathlib
import platform


def processor() -> str:
    """The CPU's name as the kernel gives it."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
