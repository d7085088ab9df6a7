"""Features of many images on disk, read by blocks or by rows, so that memory does not grow with their number.

Kernel distances (KID, CMMD) and sorted projections (MIND) need every feature at the end; a covariance does not.
"""

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np

_F32 = np.dtype("<f4")
# Rows of a block: 8 MiB of 2048 features.
BLOCK = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureTable:
    """float32 [N, D] in an open local file.

    Attributes:
      file: open for reading; the table closes it with its last reference.
      start: offset of the first value, in bytes.
      count: N.
      width: D.
    """

    file: IO[Any]
    start: int
    count: int
    width: int

    @classmethod
    def spill(cls, blocks: Iterable[np.ndarray], width: int) -> "FeatureTable":
        """Writes blocks [some, D] to a temporary file, which goes away with the table; see TMPDIR."""
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the table keeps it
        count = 0
        for block in blocks:
            file.write(np.ascontiguousarray(block, _F32).tobytes())
            count += len(block)
        file.flush()
        return cls(file, 0, count, width)

    def __len__(self) -> int:
        return self.count

    def blocks(self, size: int = BLOCK) -> Iterator[np.ndarray]:
        """The rows in order, `size` at a time; the last block may be smaller."""
        for start in range(0, self.count, size):
            yield self._read(start, min(size, self.count - start))

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The rows of these numbers, in their order: [len(indices), D]."""
        found = np.empty((len(indices), self.width), _F32)
        # In the order of the file, which disks like better.
        for place in np.argsort(indices, kind="stable"):
            found[place] = self._read(int(indices[place]), 1)[0]
        return found

    def _read(self, row: int, count: int) -> np.ndarray:
        size = self.width * _F32.itemsize
        wanted, at = count * size, self.start + row * size
        pieces = []
        while wanted:
            piece = os.pread(self.file.fileno(), wanted, at)
            if not piece:
                raise ValueError(f"the table of features ends at byte {at}, before row {row + count}")
            pieces.append(piece)
            at, wanted = at + len(piece), wanted - len(piece)
        return np.frombuffer(b"".join(pieces), _F32).reshape(count, self.width)
