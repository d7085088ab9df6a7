"""Open readers of ArrayRecord shards: as many as the limit of open files allows, those used last.

A set may have more shards than a process may open files (`ulimit -n`, often 1,024). ArrayRecord reports a file that it
cannot open as one with no records, so the cause is looked for here.
"""

import collections
import errno
import os
import pathlib
import resource
import shutil
import tempfile
import threading

from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from scaling_dit import files
from scaling_dit.errors import UserError

_READ_AT_RANDOM = "readahead_buffer_size:0,max_parallelism:0"
# Bytes of a reader.
_READ_BUFFER = 2**15
# The part of the process's open files that the readers of one split may take: both splits have readers, and everything
# else in the process opens files too.
_SHARE = 4
# Of all limits.
_LEAST, _MOST = 4, 4096


class Readers:
    """Readers by path, opened when they are asked for; safe to use from several threads.

    One that is dropped is closed when the last thread that reads with it is done.
    """

    def __init__(self) -> None:
        self._open: collections.OrderedDict[str, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._copies: tempfile.TemporaryDirectory[str] | None = None
        self.limit = limit()

    def get(self, path: epath.Path, records: int) -> ArrayRecordReader:
        """The reader of a shard that must hold so many records.

        Raises:
          UserError: it cannot be opened (the line names the cause), or holds another number of records.
        """
        name = str(path)
        with self._lock:
            reader = self._open.get(name)
            if reader is None:
                self._keep(self.limit - 1)
                reader = self._open[name] = self._read(path, records)
            self._open.move_to_end(name)
        return reader

    def __len__(self) -> int:
        return len(self._open)

    def _keep(self, count: int) -> None:
        """Drops those that were not used for longest."""
        while len(self._open) > count:
            self._open.popitem(last=False)

    def _read(self, path: epath.Path, records: int) -> ArrayRecordReader:
        while True:
            try:
                return self._try(path, records)
            except OSError as error:
                # What else is open left fewer than the share.
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._open:
                    hint = "; raise the limit, ulimit -n" if error.errno == errno.EMFILE else ""
                    raise UserError(f"cannot open shard {path}: {error.strerror}{hint}") from None
                self.limit = max(len(self._open) // 2, 1)
                self._keep(self.limit - 1)

    def _try(self, path: epath.Path, records: int) -> ArrayRecordReader:
        local = self._local(path)
        if not files.is_remote(local):
            # For the cause, if the file cannot be opened; ArrayRecord knows of none.
            os.close(os.open(local, os.O_RDONLY | os.O_NONBLOCK))
        try:
            reader = ArrayRecordReader(local, options=_READ_AT_RANDOM, file_reader_buffer_size=_READ_BUFFER)
            count = reader.num_records()
        except RuntimeError as error:
            raise UserError(f"cannot read shard {path}: {' '.join(str(error).split())}") from None
        if count != records:
            if not files.is_remote(local):
                os.close(os.open(local, os.O_RDONLY | os.O_NONBLOCK))
            if not count:
                raise UserError(f"cannot read shard {path}: no record is found; its manifest says {records}")
            raise UserError(f"{path} holds {count} records; its manifest says {records}")
        return reader

    def _local(self, path: epath.Path) -> str:
        """A path that ArrayRecord reads: local files and gs:// as they are, others as a copy."""
        if not files.is_remote(path):
            return os.fspath(path)
        if str(path).startswith("gs://"):
            return str(path)
        if self._copies is None:
            self._copies = tempfile.TemporaryDirectory(prefix="scaling_dit_latents_")
        copy = pathlib.Path(self._copies.name) / path.name
        if not copy.exists():
            with path.open("rb") as source, copy.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        return str(copy)


def limit() -> int:
    """How many readers of one split may be open at once."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed == resource.RLIM_INFINITY:
        return _MOST
    return min(max(allowed // _SHARE, _LEAST), _MOST)
