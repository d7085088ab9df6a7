"""What a run does when a disk or bucket refuses: separates such faults from mistakes, and tries again for a while."""

import errno
import os
import re
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from scaling_dit.errors import StorageError, UserError

T = TypeVar("T")

# Of a disk or network, whatever the command was.
_FAULTS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE, errno.ENODEV, errno.ENXIO,
    errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENOTCONN,
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EREMOTEIO,
}  # fmt: skip
# The number of a fault in messages of TensorStore.
_NUMBER = re.compile(r"os_error_code='(\d+)'")
# How TensorStore's messages and those of clients of buckets say the same.
_SAID = re.compile(
    r"No space left on device|Disk quota exceeded|Read-only file system|Input/output error|File too large|"
    r"Stale file handle|Transport endpoint|Permission denied|No such file or directory|\blibcurl code \d+|"
    r"\b(UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|"
    r"Forbidden|Unauthorized|Service Unavailable|Too Many Requests)\b|\b(401|403|429|50[0234])\b"
)
_CLIENTS = (
    "gcsfs",
    "google",
    "aiohttp",
    "fsspec",
    "s3fs",
    "botocore",
    "adlfs",
    "azure",
    "huggingface_hub",
    "requests",
)
# Where TensorFlow is installed, etils reads gs:// with it. Its errors are of storage but for these kinds, which
# networks and input pipelines raise. They are known by name, so TensorFlow is not imported here.
_OF_TENSORFLOW = "tensorflow.python.framework.errors"
_NOT_OF_STORAGE = ("InvalidArgumentError", "UnimplementedError", "InternalError", "CancelledError")
# What etils does not turn into a FileNotFoundError, as of a listing.
_MISSING = "NotFoundError"
# Seconds between tries: the first pause, and the longest one.
_FIRST, _LONGEST = 0.5, 15.0
# Characters of a reason: a client's message names the path at its end.
_LONGEST_REASON = 300


def is_fault(error: BaseException) -> bool:
    """Whether an error says that a disk, network or bucket failed, and not that a path or command is wrong."""
    if isinstance(error, StorageError):
        return True
    if isinstance(error, UserError):
        return False
    if isinstance(error, OSError):
        return error.errno in _FAULTS or (error.errno is None and bool(_SAID.search(str(error))))
    if _is_of_tensorflow(error):
        return type(error).__name__ not in _NOT_OF_STORAGE
    return type(error).__module__.partition(".")[0] in _CLIENTS


def _is_of_tensorflow(error: BaseException) -> bool:
    """Whether TensorFlow raised it."""
    return type(error).__module__.startswith(_OF_TENSORFLOW)


def is_refusal(error: BaseException) -> bool:
    """Whether an error, met while a run in progress wrote, is of its storage: any OSError, or a message of its kind.

    A folder that was there and is gone, or may no longer be written, is no mistake in the command either.
    """
    if isinstance(error, UserError):
        return isinstance(error, StorageError)
    return isinstance(error, OSError) or is_fault(error) or bool(_SAID.search(str(error)))


# Messages of a read that say nothing about the file itself.
_CUT_OFF = re.compile(
    r"Permission denied|Too many open files|Input/output error|Stale file handle|Transport endpoint|"
    r"\b(UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|Forbidden|Unauthorized)\b"
)


def is_unreachable(error: BaseException) -> bool:
    """Whether a read failed for a reason that says nothing about the file: it may be sound."""
    if isinstance(error, FileNotFoundError):
        return False
    if _is_of_tensorflow(error) and type(error).__name__ == _MISSING:
        return False
    return is_fault(error) or isinstance(error, PermissionError) or bool(_CUT_OFF.search(str(error)))


def reason(error: BaseException) -> str:
    """What went wrong, in a few words: messages of TensorStore run over many lines."""
    if isinstance(error, UserError):
        return str(error) if error.__cause__ is None else reason(error.__cause__)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    said = _NUMBER.search(text)
    return os.strerror(int(said[1])) if said else text[:_LONGEST_REASON]


def patiently(
    work: Callable[[], T],
    what: str,
    seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """The result of `work()`, which is tried again while storage refuses it, with growing pauses.

    The first refusal is reported in one line on stderr.

    Args:
      work: may be called several times.
      what: what is written, with its path, for the lines.
      seconds: how long to try; 0 tries once.

    Raises:
      StorageError: the last try was refused as well.
    """
    began, pause, is_reported = clock(), _FIRST, False
    while True:
        try:
            return work()
        except Exception as error:
            if not is_refusal(error):
                raise
            left = seconds - (clock() - began)
            if left <= 0:
                tried = f" after {clock() - began:.0f} s" if is_reported else ""
                raise StorageError(f"cannot write {what}{tried}: {reason(error)}") from error
            if not is_reported:
                is_reported = True
                print(
                    f"scaling-dit: cannot write {what}: {reason(error)}; trying again for {seconds:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
        sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST)
