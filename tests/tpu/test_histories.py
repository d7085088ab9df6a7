"""Random histories of both back-ends: one resource at most, within the budget, nothing left behind."""

import pathlib
import random
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scaling_dit.tpu import launcher
from scaling_dit.tpu.job import Budget
from scaling_dit.tpu.state import ENDS, Limits, Stage

from tests.support import tpu_jobs

KINDS = (
    "wait", "wait long", "preempt", "suspend", "fail", "capacity", "permission", "lost before", "lost after", "deaf",
    "stop", "killed", "killed while acting", "exit", "process lost", "sick", "well", "deleted outside", "set-up broken",
    "maintenance",
)  # fmt: skip
# Everything but what ends a job at once, which would make most histories short.
LASTING = tuple(kind for kind in KINDS if kind not in ("suspend", "permission", "stop", "deleted outside"))
EVENTS = st.lists(
    st.tuples(st.sampled_from((*LASTING, *LASTING, *LASTING, *KINDS)), st.integers(0, 9)),
    min_size=1,
    max_size=14,
)


class Killed(BaseException):
    """The launcher is killed."""


class Fragile:
    """A runner that kills the launcher before or after one of its next commands."""

    def __init__(self):
        self.cloud, self.after = None, None

    def __call__(self, command, seconds=0.0):
        if self.after is None:
            return self.cloud(command)
        self.after -= 1
        if self.after == 0:
            self.after = None
            raise Killed
        result = self.cloud(command)
        if self.after == 0.5:
            self.after = None
            raise Killed
        return result


class History:
    """A world to which events happen; what must hold is checked after each turn."""

    def __init__(self, folder, backend, zones, hours, repairs, seed):
        one = tpu_jobs.job(
            backend=backend,
            topology="v5p:2x2x2",
            zones=tpu_jobs.ZONES[:zones],
            budget=Budget(hours, restarts=6),
        )
        fragile = Fragile()
        self.world = tpu_jobs.World(folder, one, seed, Limits(poll=60.0), runner=fragile, total=150)
        self.cloud = fragile.cloud = self.world.cloud
        self.fragile, self.rng = fragile, random.Random(seed)
        self.cloud.repairs = repairs
        self.suspended_at = None

    def check(self):
        name = self.world.job.name
        assert len(self.cloud.wanted(name)) <= 1
        assert len(self.cloud.running(name)) <= 1
        assert self.cloud.billed(name) <= 3600 * self.world.job.hours

    def turns(self, most) -> bool:
        for _ in range(most):
            try:
                if self.world.turn():
                    self.check()
                    return True
            except Killed:
                self.world.launch()
            self.check()
        return False

    def happen(self, kind, amount) -> None:
        cloud, world = self.cloud, self.world
        running, one = world.running(), world.resource
        match kind:
            case "preempt" | "maintenance" if running and running.state == "ACTIVE":
                cloud.preempt(running)
            case "suspend" if running and running.state == "ACTIVE":
                cloud.suspend(running)
                self.suspended_at = cloud.created
            case "fail" if one and one.kind == "queued":
                cloud.fail(one)
            case "capacity" | "permission":
                cloud.deny = [kind] * (1 + amount % 3)
            case "lost before" | "lost after":
                cloud.lose = kind.split()[1]
            case "deaf":
                cloud.deaf = amount
            case "stop":
                world.store.stop = True
            case "killed":
                world.launch()
                cloud.advance(60.0 * 4**amount % 40_000)
                self.check()
            case "killed while acting":
                self.fragile.after = 1 + amount / 2
            case "exit":
                world.workers.end((75, 1, 137, 3, 74, 130, 74, 2, 75, 1)[amount], cloud.now)
            case "process lost":
                world.workers.lose_process()
            case "sick" | "well" if running:
                cloud.health(running, "UNHEALTHY_MAINTENANCE" if kind == "sick" else "HEALTHY")
            case "deleted outside" if one:
                cloud._begin_delete(one)
            case "set-up broken":
                world.workers.broken = amount % 4

    def end(self):
        """No more happens; the job comes to its end, and what it leaves is looked at."""
        cloud, world = self.cloud, self.world
        cloud.deny, cloud.lose, cloud.deaf, self.fragile.after = [], "", 0, None
        if running := world.running():
            cloud.health(running, "HEALTHY")
        assert self.turns(3000), world.state
        state = world.state
        assert state.stage in ENDS and state.verdict
        assert not cloud.running(world.job.name)
        left = cloud.wanted(world.job.name)
        if state.stage is Stage.PAUSED:
            assert left and self.suspended_at is not None
            assert cloud.created == self.suspended_at, "a user's suspension was undone"
        else:
            assert not left
        assert len(world.workers.starts) == len(set(world.workers.starts)), "an attempt was started twice"
        billed = cloud.billed(world.job.name)
        cloud.advance(7 * 24 * 3600.0)
        assert cloud.billed(world.job.name) == billed
        # What the launcher counted covers what was billed.
        assert state.used >= billed - 1


def play(backend, events, zones, hours, repairs, seed):
    with tempfile.TemporaryDirectory() as folder:
        history = History(pathlib.Path(folder), backend, zones, hours, repairs, seed)
        for kind, amount in events:
            if history.turns({"wait long": 40}.get(kind, 1 + amount)):
                break
            history.happen(kind, amount)
        history.end()


ARGUMENTS = {
    "events": EVENTS,
    "zones": st.integers(1, 3),
    "hours": st.sampled_from((0.1, 0.4, 1.0, 3.0, 10.0)),
    "repairs": st.booleans(),
    "seed": st.integers(0, 2**16),
}
QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(autouse=True)
def _one_after_the_other(monkeypatch):
    """Commands for several workers in their order, so that a history is the same each time."""
    monkeypatch.setattr(launcher, "run_all", lambda run, several, seconds=0.0: [run(one) for one in several])


@pytest.mark.parametrize("backend", ["queued", pytest.param("compute", marks=pytest.mark.slow)])
def test_some_random_histories(backend):
    @settings(max_examples=60, derandomize=True, **QUIET)
    @given(**ARGUMENTS)
    def histories(**drawn):
        play(backend, **drawn)

    histories()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["queued", "compute"])
def test_a_thousand_random_histories(backend):
    @settings(max_examples=600, **QUIET)
    @given(**ARGUMENTS)
    def histories(**drawn):
        play(backend, **drawn)

    histories()
