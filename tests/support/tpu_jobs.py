"""Jobs, stores and launchers of the tests of `tpu/`."""

import dataclasses

from scaling_dit.tpu.job import Budget, Job
from scaling_dit.tpu.launcher import Launcher
from scaling_dit.tpu.state import Limits, State, from_dict

from tests.support.tpu_cloud import Cloud
from tests.support.tpu_model_workers import ModelWorkers

ZONES = ("us-east5-a", "us-east5-b", "us-west4-a")


def job(**changes) -> Job:
    """A job on two hosts of v5p with a budget of ten hours."""
    values = {
        "name": "first",
        "topology": "v5p:2x2x2",
        "zones": ZONES,
        "command": ("scaling-dit", "train"),
        "budget": Budget(10.0),
        "price": 2.5,
        "price_source": "given by --price",
        "owner": "me",
    }
    return Job(**{**values, **changes})


class MemoryStore:
    """A job's folder in memory; the state passes through its dict, as it would through a file."""

    def __init__(self, folder):
        self.source, self.startup, self.env = (folder / name for name in ("source.tgz", "startup.sh", "env"))
        self.values, self.stop = None, False

    def read_state(self) -> State | None:
        return None if self.values is None else from_dict(self.values)

    def write_state(self, state: State) -> None:
        self.values = state.to_dict()

    def write_private(self, path, text: str) -> None:
        path.write_text(text)

    def stop_asked(self) -> bool:
        return self.stop


class World:
    """A job, its launcher, and the cloud around them.

    Args:
      guarded: whether machines end themselves when their time is over.
    """

    def __init__(self, folder, one: Job, seed=0, limits=None, guarded=True, runner=None, **workers):
        self.job, self.limits = one, limits or Limits()
        self.workers = ModelWorkers(**workers)
        self.cloud = Cloud(seed, workers=self.workers)
        self.store = MemoryStore(folder)
        self.guarded, self.said = guarded, []
        self.runner = runner or self.cloud
        self.launch()

    def launch(self) -> None:
        """Another launcher of the same job."""

        def allowed(one, zone):
            return f"allowed {3600 * one.budget.hours}" if self.guarded else ""

        self.launcher = Launcher(
            self.job,
            self.store,
            self.runner,
            self.said.append,
            self.limits,
            clock=lambda: self.cloud.now,
            startup=allowed,
        )

    @property
    def state(self) -> State:
        return self.launcher.state

    def turn(self) -> bool:
        """One turn, and the time until the next."""
        ended = self.launcher.tick()
        if not ended:
            self.cloud.advance(self.launcher._pause())
        return ended

    def turns(self, most: int, until=lambda: False) -> bool:
        """Turns until the end, or `until()` holds, or as many; returns whether the job has ended."""
        for _ in range(most):
            if self.turn():
                return True
            if until():
                return False
        return False

    @property
    def resource(self):
        """The job's resource, if there is one."""
        return next(iter(self.cloud.wanted(self.job.name)), None)

    def running(self):
        """The resource, if its machines run."""
        return next(iter(self.cloud.running(self.job.name)), None)


def with_budget(one: Job, **changes) -> Job:
    return dataclasses.replace(one, budget=dataclasses.replace(one.budget, **changes))
