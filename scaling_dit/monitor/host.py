"""What this process runs on, for notes and reports. Needs only the standard library."""

import os
import pathlib
import platform


def processor() -> str:
    """The CPU's name as the kernel gives it."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> list[int]:
    """The numbers of the CPU cores that this process may use, in rising order."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
