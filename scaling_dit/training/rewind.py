"""Rewinds: after a loss spike a run goes back to a checkpoint and skips the data around the spike.

A spike is a loss above `factor` times the median of the `window` losses before it. The run then goes back to the last
checkpoint at least `back` steps before the spike and skips the data from there to `ahead` steps after it, as PaLM's
training did (arXiv 2204.02311, 5.1). Noise and timesteps still depend on (seed, step) alone; other data make
another pass.

Every decision follows from the losses, the settings and the checkpoints of `checkpoint.every`, so that a run killed
anywhere decides the same again. The record of a rewind is on disk, written whole, before anything follows from it:

- killed before: the spike occurs again, and the same rewind follows;
- killed after: the next start reads the record, removes the checkpoints that it made void, and resumes from its step.

The `extra` of a checkpoint holds the number of rewinds before it and the losses that the next median needs. A
checkpoint is void if a rewind that it does not count went back to before it. Void checkpoints are removed only once the
record is written, and the one gone back to is never void.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from scaling_dit import files
from scaling_dit.errors import UserError


class Rewind(NamedTuple):
    """One rewind: at `spike` the run went back to step `to`; data steps `data_from` to `data_to` - 1 are skipped."""

    spike: int
    to: int
    data_from: int
    data_to: int


class Spike(NamedTuple):
    """The loss of an update (from 1) and the median it was compared with."""

    step: int
    loss: float
    median: float


def data_step(step: int, rewinds: Sequence[Rewind]) -> int:
    """The position in the data of the update after `step` updates; the identity for a run that never went back."""
    for rewind in reversed(rewinds):
        if step >= rewind.to:
            return rewind.data_to + step - rewind.to
    return step


def plan(
    spike: int, rewinds: Sequence[Rewind], saved: Iterable[int], settings: ConfigDict, every: int
) -> Rewind | None:
    """The rewind after a spike in update number `spike` (from 1); None if no checkpoint is old enough.

    Checkpoints at multiples of `every` are preferred: others, saved on SIGTERM, are not in every run.

    Args:
      spike: number of the update, from 1.
      rewinds: those on record.
      saved: steps of the checkpoints.
      settings: `config.rewind`.
      every: `config.checkpoint.every`.
    """
    old = [step for step in saved if step <= max(spike - settings.back, 0)]
    if not old:
        return None
    to = max([step for step in old if step % every == 0] or old)
    end = data_step(spike - 1, rewinds) + 1 + settings.ahead
    return Rewind(spike, to, data_step(to, rewinds), end)


def is_void(step: int, seen: int, rewinds: Sequence[Rewind]) -> bool:
    """Whether a checkpoint of `step`, saved after `seen` rewinds, holds updates that a later rewind undid."""
    return any(step > rewind.to for rewind in rewinds[seen:])


def read(path: epath.Path) -> list[Rewind]:
    """The rewinds on record, in the order they happened; none if the file does not exist.

    Raises:
      UserError: `write` did not write this file.
    """
    if not path.exists():
        return []
    remedy = "put the run's own file back: without it the run cannot know which data it skipped"
    rows = files.read_json(path, list, remedy)
    for row in rows:
        numbers = row.values() if isinstance(row, dict) and row.keys() == set(Rewind._fields) else [None]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise UserError(
                f"{path} is damaged: it must hold a list of {', '.join(Rewind._fields)}; {remedy}"
            )
    return [Rewind(**row) for row in rows]


def write(path: epath.Path, rewinds: Iterable[Rewind]) -> None:
    """Writes the record, whole: a kill leaves the old one or the new one."""
    text = json.dumps([rewind._asdict() for rewind in rewinds], indent=1) + "\n"
    files.write_whole(path, text.encode())


class SpikeDetector:
    """Finds the first spike among losses that stay on the devices until `first` is called.

    Args:
      settings: `config.rewind`.
      losses: those before the first one added, from the `extra` of a checkpoint.
    """

    def __init__(self, settings: ConfigDict, losses: Iterable[float] = ()) -> None:
        self._factor = settings.factor
        self._window = settings.window
        self._recent = deque(losses, maxlen=settings.window)
        self._unread: list[tuple[int, Any]] = []

    @property
    def recent(self) -> list[float]:
        """The last losses, at most `window`, for the checkpoint's `extra`."""
        return list(self._recent)

    def add(self, step: int, loss: jax.Array) -> None:
        """Adds the loss [] of an update; nothing is read, so the host need not wait for it."""
        if self._factor:
            self._unread.append((step, loss))

    def first(self) -> Spike | None:
        """The first spike among the losses added, or None; waits for them.

        A loss that is not finite is no spike: its update was skipped, and `optim.max_nonfinite` limits those.
        """
        unread, self._unread = self._unread, []
        values = np.asarray(jax.device_get([loss for _, loss in unread]), float)
        for (step, _), loss in zip(unread, values.tolist(), strict=True):
            if not math.isfinite(loss):
                continue
            if len(self._recent) == self._window:
                median = statistics.median(self._recent)
                if loss > self._factor * median:
                    return Spike(step, loss, median)
            self._recent.append(loss)
        return None
