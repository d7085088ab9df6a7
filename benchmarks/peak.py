"""The most memory that this program has used."""

import pathlib
import re
import resource

_STATUS = pathlib.Path("/proc/self/status")


def peak_mib() -> float:
    """MiB resident at most since the program began.

    `getrusage` alone would count the process that started this one as well, as Linux hands its peak on.
    """
    if _STATUS.exists():
        (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        return int(kibibytes) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
