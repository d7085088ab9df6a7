"""Damaged records: counted by kind, reported and replaced, up to a limit.

A source reads its records through `Damage.read` and raises `DamagedRecord` for one it cannot give. What replaces it
is a function of its index and the source's contents alone, so `source[index]` stays a pure function: it depends
neither on the number of processes or threads nor on what was read before.
"""

import collections
import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from scaling_dit.data.text import sound
from scaling_dit.errors import UserError
from scaling_dit.files import parse_json

# Records that get a line of their own in the log.
_LOGGED = 10
# Records tried in place of one.
_TRIES = 100


class DamagedRecord(UserError):
    """One record that cannot be used.

    Attributes:
      kind: a short name with underscores, counted by: "missing_file".
      where: file and line or offset; names one record only.
      what: what is wrong with it.
    """

    def __init__(self, kind: str, where: str, what: str) -> None:
        # Both go into files in UTF-8, and may quote what cannot be encoded.
        self.kind, self.where, self.what = kind, sound(where), sound(what)
        super().__init__(f"{self.where}: {self.what}")


class Damage:
    """What was met of damaged records since the start, each counted once; safe to use from several threads.

    Args:
      limit: damaged records that are replaced; the first beyond it raises. 0 stops at the first, None has no limit.
      field: the config field that holds the limit, for the error line.
    """

    def __init__(self, limit: int | None = None, field: str = "") -> None:
        self.limit, self._field = limit, field
        # By place.
        self._met: dict[str, DamagedRecord] = {}
        self._saved = 0
        self._lock = threading.Lock()

    def meet(self, fault: DamagedRecord, *, log: bool = True) -> None:
        """Counts a damaged record, unless it was met before, and logs it if it is among the first.

        Raises:
          UserError: more records than the limit are damaged.
        """
        with self._lock:
            new = fault.where not in self._met
            self._met.setdefault(fault.where, fault)
            number = len(self._met)
        if self.limit is not None and number > self.limit:
            raise UserError(f"{fault}; {self._stopped()}") from fault
        if new and log and number <= _LOGGED:
            more = "; further ones are counted and listed, not logged" if number == _LOGGED else ""
            logging.warning("damaged record left out (%s): %s%s", fault.kind, fault, more)

    def meet_all(self, faults: Iterable[DamagedRecord]) -> None:
        """Counts what was found when a source was opened, without a line for each; raises as `meet`."""
        for fault in faults:
            self.meet(fault, log=False)

    def announce(self) -> None:
        """One log line of what was met so far; none if that is nothing."""
        if self._met:
            first = next(iter(self._met.values()))
            logging.warning(
                "%d damaged records left out (%s); the first: %s",
                len(self._met),
                _by_kind(self.counts()),
                first,
            )

    def counts(self) -> dict[str, int]:
        """Records met, by kind, in the order of the names."""
        with self._lock:
            return dict(sorted(collections.Counter(fault.kind for fault in self._met.values()).items()))

    def check(self, total: Mapping[str, int]) -> dict[str, float]:
        """Counts of all processes together as a run's metrics: {"data/damaged_missing_file": 2.0, ...}.

        Raises:
          UserError: they are more than the limit, which one process alone has not met.
        """
        if self.limit is not None and sum(total.values()) > self.limit:
            raise UserError(f"{sum(total.values())} damaged records in all processes; {self._stopped(total)}")
        return {f"data/damaged_{kind}": float(count) for kind, count in total.items()}

    def examples(self, kind: str) -> list[DamagedRecord]:
        """The records of a kind, in the order in which they were met."""
        with self._lock:
            return [fault for fault in self._met.values() if fault.kind == kind]

    def save(self, path: epath.Path, process: int = 0) -> None:
        """Lists every record met in a file of JSON lines, if there are new ones.

        What earlier starts listed stays. Process 1 adds -1 to the name of the file, and so on.
        """
        with self._lock:
            faults = list(self._met.values())
        if len(faults) > self._saved:
            if process:
                path = path.with_name(f"{path.stem}-{process}{path.suffix}")
            rows = {row["where"]: row for row in _listed(path)}
            rows |= {f.where: {"kind": f.kind, "where": f.where, "what": f.what} for f in faults}
            path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
            self._saved = len(faults)

    def read(self, index: int, length: int, read: Callable[[int], Any]) -> Any:
        """`read(index)`, or if that record is damaged, of the first sound one of its own fixed random sequence.

        Random, so that neighbouring damaged records do not all fall to the same sound one.

        Args:
          index: in [0, length); NumPy's integers too.
          length: of the source.
          read: gives a record or raises DamagedRecord.

        Raises:
          IndexError: past either end.
          UserError: too many damaged records, in all or in that sequence.
        """
        index = int(index)
        if not 0 <= index < length:
            raise IndexError(f"{index} is not in [0, {length})")
        for tried in _sequence(index, length):
            try:
                return read(tried)
            except DamagedRecord as fault:
                self.meet(fault)
                last = fault
        raise UserError(f"{last}; {_TRIES} records tried in place of one are all damaged") from last

    def _stopped(self, counts: Mapping[str, int] | None = None) -> str:
        if not self.limit:
            return f"to replace up to N damaged records by others, set {self._field}=N"
        by_kind = _by_kind(self.counts() if counts is None else counts)
        return f"more than {self._field}={self.limit} records are damaged ({by_kind})"


def damage_of(source: Any) -> Damage:
    """The counter of a source; one that stays empty if the source has none."""
    return getattr(source, "damage", None) or Damage()


def _by_kind(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.items())


def _listed(path: epath.Path) -> list[dict[str, str]]:
    """The rows of a list; a last one that a kill cut short is left out."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError):
            row = parse_json(line)
            if isinstance(row, dict) and "where" in row:
                rows.append(row)
    return rows


def _sequence(index: int, length: int) -> Iterator[int]:
    """The record itself, then `_TRIES` random ones from a generator of its own."""
    yield index
    generator = np.random.Generator(np.random.Philox(key=index))
    for _ in range(_TRIES):
        yield int(generator.integers(length))
