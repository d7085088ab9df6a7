"""Watches one start of a run: times of steps, MFU, memory, goodput, the slowest host, and the heartbeat.

Nothing here waits for a step that the loop does not wait for. Processes exchange a few numbers once per log.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping

import jax

from scaling_dit.costs.step import train_flops
from scaling_dit.monitor.goodput import Recorder
from scaling_dit.monitor.heartbeat import Heartbeat
from scaling_dit.monitor.step_times import StepTimes, Window
from scaling_dit.monitor.work import GIB, Work, device_memory, image_tokens, memory_scalars
from scaling_dit.parallel import processes, topologies
from scaling_dit.training.start import Run


class Watcher:
    """The metrics of a start beside the losses, and its heartbeat.

    Attributes:
      times: of steps, given by the loop.
      heart: of this process.
      work: of one step.
    """

    def __init__(self, run: Run, recorder: Recorder, times: StepTimes, heart: Heartbeat) -> None:
        self.times, self.heart, self.work = times, heart, work_of(run)
        self._recorder = recorder
        here = jax.process_index()
        self._devices = [device for device in run.program.mesh.devices.flat if device.process_index == here]

    def decisions(self) -> dict[str, str]:
        """What MFU is measured against; empty where there is none."""
        return {"mfu": str(self.work)} if self.work.peak and self.work.flops else {}

    def during(self, state: str) -> contextlib.AbstractContextManager[None]:
        """The heartbeat says so inside the context."""
        return self.heart.during(state)

    def scalars(self, steps_per_second: float) -> dict[str, float]:
        """Metrics of the steps since the last call; all processes call it at the same steps.

        Args:
          steps_per_second: the current rate.
        """
        window, memory = self.times.window(), device_memory(self._devices)
        found = self.work.scalars(steps_per_second) | window_scalars(window) | memory_scalars(memory)
        found["speed/goodput"] = self._recorder.so_far()["goodput"]
        wait = window.host_wait if window else math.nan
        in_use, peak = (max((values[i] for values in memory.values()), default=math.nan) for i in (0, 1))
        if jax.process_count() > 1:
            found |= over_processes(processes.gather_numbers([wait, in_use / GIB, peak / GIB]))
        self.heart.update(
            memory={str(device): values for device, values in memory.items()},
            host_wait=None if math.isnan(wait) else wait,
            devices=len(self._devices),
        )
        return found


def window_scalars(window: Window | None) -> dict[str, float]:
    """Seconds of the steps of a window; empty without one."""
    if window is None:
        return {}
    return {
        "speed/step_seconds_p50": window.p50,
        "speed/step_seconds_p95": window.p95,
        "speed/step_seconds_max": window.longest,
        "speed/host_wait": window.host_wait,
    }


def over_processes(rows: list[list[float]]) -> dict[str, float]:
    """Metrics over all processes, from the host wait and the memory in use and at peak of each.

    The slowest is the one whose devices wait longest for their host, because all devices finish a step together. NaN
    stands for what a process cannot say.
    """
    found: dict[str, float] = {}
    waits = {process: row[0] for process, row in enumerate(rows) if not math.isnan(row[0])}
    if waits:
        slowest = max(waits, key=lambda process: waits[process])
        found["speed/slowest_process"] = slowest
        found["speed/slowest_host_wait"] = waits[slowest]
        found["speed/host_wait"] = sum(waits.values()) / len(waits)
    for place, name in ((1, "in_use"), (2, "peak")):
        values = [row[place] for row in rows if not math.isnan(row[place])]
        if values:
            found[f"memory/most_{name}_gib"] = max(values)
    return found


def work_of(run: Run) -> Work:
    """The work of one step of a run. FLOPs are counted only for chips whose peak is known."""
    config, model, devices = run.config, run.model, list(run.program.mesh.devices.flat)
    tokens = image_tokens(model.backbone, model.latent_shape, config.batch)
    chip = topologies.find_chip(devices[0].device_kind)
    if chip is None:
        return Work(tokens=tokens)
    return Work(train_flops(config, model), tokens, max(1, len(devices) // chip.devices), chip.peak)


@contextlib.contextmanager
def watch(run: Run, recorder: Recorder) -> Iterator[Watcher]:
    """Watches a start until the context ends; the heartbeat then says how."""
    facts: Mapping[str, object] = {"processes": jax.process_count(), "steps": run.config.steps}
    with (
        Heartbeat(run.workdir.heartbeats, jax.process_index(), facts) as heart,
        StepTimes(heart.reach) as times,
    ):
        yield Watcher(run, recorder, times, heart)
