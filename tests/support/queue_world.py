"""A world for tests of the queue: slices with clocks of their own that vanish, stand still and race for members.

Time passes only in `World.step`. The store can lose answers, refuse, and let another slice act in the middle of a
write.
"""

import random

from scaling_dit.tpu import leases, queue_worker
from scaling_dit.tpu import queue as queue_lib


class FakeStore:
    """A store in memory that keeps the history of every object."""

    def __init__(self, rng=None, lost=0.0, refused=0.0):
        self.objects, self.history = {}, {}
        self._rng, self._lost, self._refused = rng or random.Random(0), lost, refused
        # Called between a slice's reading and its writing.
        self.between = lambda: None

    def read(self, name):
        return self.objects.get(name)

    def write(self, name, data, generation):
        self.between()
        if self._rng.random() < self._refused:
            raise OSError("refused")
        now = self.objects.get(name, (b"", leases.ABSENT))[1]
        if now != generation:
            return False
        self.objects[name] = data, now + 1
        self.history.setdefault(name, []).append(data)
        if self._rng.random() < self._lost:
            raise OSError("the answer is lost")
        return True

    def names(self, prefix):
        return sorted(name for name in self.objects if name.startswith(prefix))


class Work:
    """What the commands of all members have done so far; each resumes where it was stopped."""

    def __init__(self, seconds, codes=None):
        self.seconds, self.codes = dict(seconds), {name: list(all_) for name, all_ in (codes or {}).items()}
        self.done = dict.fromkeys(seconds, 0.0)
        self.exits = []

    def ended(self, name):
        """The exit code of a command whose work is done; its next attempt begins again unless the code is 0."""
        codes = self.codes.get(name)
        code = codes.pop(0) if codes else 0
        if code:
            self.done[name] = 0.0
        self.exits.append((name, code))
        return code


class FakeRunner:
    def __init__(self, work):
        self.work, self.name, self.code = work, None, None

    def start(self, command, name):
        assert self.name is None, "one command at a time"
        assert tuple(command) == ("run", name)
        self.name, self.code = name, None

    def advance(self, seconds):
        if self.name is None or self.code is not None:
            return
        self.work.done[self.name] += seconds
        if self.work.done[self.name] >= self.work.seconds[self.name]:
            self.code = self.work.ended(self.name)

    def poll(self):
        code = self.code
        if code is not None:
            self.name = None
        return code

    def stop(self):
        code = -15 if self.code is None else self.code
        self.name = None
        return code


class Slice:
    """One slice: a worker, a clock that is off by some seconds, and a time until which it stands still."""

    def __init__(self, world, name):
        self.world, self.name = world, name
        self.still_until = 0.0
        self.offset = world.rng.uniform(-10, 10)
        self.begin()

    def begin(self):
        """The slice is new, or again there after a preemption."""
        self.runner = FakeRunner(self.world.work)
        self.worker = queue_worker.Worker(self.world.store, self.name, self.runner)
        self.more = self.fresh = True

    @property
    def runs(self):
        """The member that it runs, if it has looked at its lease since it stood still."""
        return None if self.fresh or self.runner.code is not None else self.runner.name

    def tick(self):
        self.more = self.worker.tick(self.world.now + self.offset)
        self.fresh = False


class World:
    """Members and slices; `run` lets them work until nothing is left to run."""

    def __init__(
        self,
        seed,
        members,
        seconds,
        codes=None,
        slices=3,
        preempted=0.004,
        still=0.01,
        lost=0.02,
        refused=0.02,
    ):
        self.rng = random.Random(seed)
        self.now = 1.7e9
        self.store = FakeStore(self.rng)
        queue_lib.add(self.store, members)
        self.store._lost, self.store._refused = lost, refused
        self.work = Work(seconds, codes)
        self.preempted, self.still = preempted, still
        self.slices = [Slice(self, f"slice-{i}") for i in range(slices)]
        self.preemptions, self.inside = 0, False
        self.store.between = self.between

    def between(self):
        """Sometimes another slice acts while one is about to write."""
        if self.inside or self.rng.random() > 0.2:
            return
        self.inside = True
        other = self.rng.choice(self.slices)
        if other is not self.acting and other.still_until <= self.now:
            other.tick()
        self.inside = False

    def step(self):
        seconds = self.rng.uniform(1, 20)
        self.now += seconds
        for one in self.slices:
            if one.still_until <= self.now:
                one.runner.advance(seconds)
        for one in self.rng.sample(self.slices, len(self.slices)):
            if one.still_until > self.now:
                continue
            if self.rng.random() < self.preempted:
                self.preemptions += 1
                one.begin()
                one.still_until = self.now + self.rng.uniform(60, 600)
            elif self.rng.random() < self.still:
                one.still_until, one.fresh = self.now + self.rng.uniform(20, 900), True
            else:
                self.acting = one
                one.tick()
        running = [one.runs for one in self.slices if one.runs and one.still_until <= self.now]
        assert len(running) == len(set(running)), f"two slices run {running}"

    def run(self, most=20_000):
        for step in range(most):
            self.step()
            # To read all members costs as much as a slice's turn.
            if step % 10 == 9 and queue_lib.finished(self.members()):
                return
        raise AssertionError("the queue does not end:\n" + queue_lib.table(self.members(), self.now))

    def members(self):
        return [held.member for held in queue_lib.read_all(self.store)]

    def states(self, name):
        """All states that a member had, one after the other."""
        history = self.store.history[queue_lib.MEMBERS + name]
        return [queue_lib.decode(data).state for data in history]
