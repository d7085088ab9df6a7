"""The launcher of a job: it observes, asks the state machine, keeps its answer, and acts.

The state is written before an action, never after: a launcher that is killed at any moment and started again looks for
the resource by name and continues. What it may do twice, it can do twice.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence

from scaling_dit import files
from scaling_dit.errors import UserError

from . import backends, remote
from .backends import Request
from .backends.contract import answer, clears, is_absent
from .commands import Command, Result, Runner, Say, redact, run_all, shown
from .job import Job
from .observations import Answer, Observation, Phase, Report, Resource, Work, summarize
from .state import ENDS, Action, Do, Limits, Stage, State, left, resumed, step
from .store import Store

# Seconds that a question may take.
_ASK = 120.0
# Seconds after which an unchanged line is shown again.
_OFTEN = 600.0
# A request may wait in the queue for a day before its machines run.
_QUEUE = 24 * 3600
LIMITS = Limits()
_HOME = f"{remote.FOLDER}/"


Startup = Callable[[Job, str], str]


def no_startup(job: Job, zone: str) -> str:
    """Machines that run nothing of their own."""
    return ""


class Launcher:
    """Watches one job.

    Args:
      job: what to run.
      store: its folder on this machine.
      runner: runs commands.
      say: shows a line to the user.
      limits: of the state machine.
      clock: seconds since the epoch.
      startup: (job, zone) -> script that its machines run when they start, and that ends them when nobody else does;
        "" = none. The budget of the job that it gets is what is left.
    """

    def __init__(
        self,
        job: Job,
        store: Store,
        runner: Runner,
        say: Say,
        limits: Limits = LIMITS,
        clock: Callable[[], float] = time.time,
        startup: Startup = no_startup,
    ) -> None:
        self.job, self.store = job, store
        self.limits = dataclasses.replace(limits, switch=bool(startup(job, job.zones[0])))
        self.state = resumed(store.read_state() or State())
        self.resource = Resource(Phase.UNKNOWN)
        self.report = Report()
        self._backend = backends.get(job)
        self.runner, self._clock, self._startup = runner, clock, startup
        self._ask: Runner = functools.partial(runner, seconds=_ASK)
        self._answer, self._reason = Answer.NONE, ""
        self._say_line, self._said, self._said_at = say, "", 0.0

    def secrets(self) -> dict[str, str]:
        """The values of the job's secrets. Raises UserError if one is not in the environment."""
        missing = [name for name in self.job.secrets if name not in os.environ]
        if missing:
            raise UserError(f"--secret={missing[0]}: there is no such variable in your environment")
        return {name: os.environ[name] for name in self.job.secrets}

    def say(self, line: str) -> None:
        """Shows a line, without secrets."""
        self._say_line(redact(line, (os.environ.get(name, "") for name in self.job.secrets)))

    def tick(self, until: Stage | None = None) -> bool:
        """One turn; returns whether the job has ended, or the stage `until` was reached."""
        seen = self.observe()
        old = self.state
        self.state, actions = step(self.job, old, seen, self.limits)
        self.store.write_state(self.state)
        self._say_state(old)
        if self.state.stage in ENDS:
            self.say(f"{self.job.name}: {self.state.verdict}; used {self.job.cost(self.state.used)}")
            return True
        if until is not None and self.state.stage is until:
            return True
        self._answer, self._reason = Answer.NONE, ""
        for action in actions:
            self._answer, self._reason = self._do(action)
            if self._reason:
                self.say(f"{action.do.value}: {self._answer.value}: {self._reason}")
        return False

    def watch(self, sleep: Callable[[float], None] = time.sleep, until: Stage | None = None) -> None:
        """Turns until the job has ended, or the stage `until` is reached."""
        while not self.tick(until):
            sleep(self._pause())

    def _pause(self) -> float:
        """Seconds to the next turn; what was just done is looked at soon."""
        soon = self._answer is Answer.OK and self.state.stage is not Stage.RUN
        return min(5.0, self.limits.poll) if soon else self.limits.poll

    # Looking.

    def observe(self) -> Observation:
        """Everything that the machine looks at now."""
        state, found = self.state, None
        report = Report()
        if state.stage is Stage.FIND:
            all_zones = [self._backend.observe(self.job, zone, self._ask) for zone in self.job.zones]
            self.resource = all_zones[state.zone]
            if all(one.phase is not Phase.UNKNOWN for one in all_zones):
                none = (Phase.ABSENT, Phase.FOREIGN)
                found = tuple(zone for zone, one in enumerate(all_zones) if one.phase not in none)
        elif state.stage is Stage.CREATE:
            self.resource = Resource(Phase.ABSENT)
        else:
            self.resource = self._backend.observe(self.job, self.zone, self._ask)
            ready = self.resource.phase in (Phase.READY, Phase.SICK)
            if state.stage is Stage.RUN and ready and self.resource.machines == state.machines:
                report = self.ask_workers()
        self.report = report
        return Observation(
            now=self._clock(),
            resource=self.resource,
            found=found,
            report=report,
            answer=self._answer,
            reason=self._reason,
            stop=self.store.stop_asked(),
        )

    @property
    def zone(self) -> str:
        """The zone of the resource."""
        return self.job.zones[self.state.zone]

    def ask_workers(self) -> Report:
        """What all workers say about the job."""
        results = self.on_workers(remote.status(self.job), _ASK)
        workers = remote.read_status("\n".join(result.out for result in results))
        return summarize(workers, self.job.workers, self.state.attempt)

    def on_workers(self, text: str, seconds: float) -> list[Result]:
        """Runs shell text on all workers of the resource that was seen last."""
        commands = self._backend.on_workers(self.job, self.zone, self.resource.nodes, text)
        return run_all(self.runner, commands, seconds)

    # Acting.

    def _do(self, action: Action) -> tuple[Answer, str]:
        zone = self.job.zones[action.zone]
        if action.do is Do.CREATE:
            return self._create(zone)
        if action.do is Do.DELETE:
            return self._delete(zone)
        if action.do is Do.SET_UP:
            return self.set_up(zone)
        text = remote.save(self.job) if action.do is Do.SAVE else remote.start(self.job, action.attempt)
        results = self.on_workers(text, self.limits.save if action.do is Do.SAVE else _ASK)
        bad = [result for result in results if result.code]
        return (Answer.NONE, bad[0].reason) if bad else (Answer.OK, "")

    def request(self, zone: str) -> Request:
        """The request for a resource, now; writes the script that its machines run when they start."""
        seconds = max(1.0, self.state.allowed)
        budget = dataclasses.replace(self.job.budget, hours=seconds / 3600, dollars=0.0)
        text = self._startup(dataclasses.replace(self.job, budget=budget), zone)
        if text:
            self.store.write_private(self.store.startup, text)
        expires = int(self._clock() + seconds + _QUEUE)
        startup = str(self.store.startup) if text else ""
        return Request(zone, self.state.resources, seconds, expires, startup)

    def _create(self, zone: str) -> tuple[Answer, str]:
        for command in self._backend.create(self.job, self.request(zone)):
            result = self.runner(command)
            if clears(command):
                continue
            answered, reason = answer(result)
            if answered is not Answer.OK:
                return answered, reason
        return Answer.OK, ""

    def _delete(self, zone: str) -> tuple[Answer, str]:
        first, *rest = self._backend.delete(self.job, zone, self.state.resources)
        result = self.runner(first)
        if result.code and not is_absent(result):
            return Answer.NONE, result.reason
        for command in rest:
            self.runner(command)
        return Answer.OK, ""

    def set_up(self, zone: str) -> tuple[Answer, str]:
        """Prepares all workers; (how it ended, why it failed)."""
        stamp = self.stamp()
        with self.secrets_file():
            for commands in self.preparation(zone, stamp):
                results = run_all(self.runner, commands)
                bad = [result for result in results if result.code]
                if bad:
                    return Answer.REFUSED, bad[0].reason
        done = remote.ready("\n".join(result.out for result in results), stamp)
        if done < self.job.workers:
            return Answer.REFUSED, f"{done} of {self.job.workers} workers were reached"
        return Answer.OK, ""

    @contextlib.contextmanager
    def secrets_file(self) -> Iterator[None]:
        """For the block, the file of the job's secrets exists on this machine."""
        try:
            if self.job.secrets:
                self.store.write_private(self.store.env, remote.environment_file(self.secrets()))
            yield
        finally:
            self.store.env.unlink(missing_ok=True)

    def stamp(self) -> str:
        """Differs for set-ups that differ."""
        source = files.sha256(self.store.source)[:8] if self.job.source else "none"
        return f"{self.job.digest}-{source}"

    def preparation(self, zone: str, stamp: str) -> list[list[Command]]:
        """The commands that prepare the workers, in order; those of one list run at the same time."""
        nodes, home = self.resource.nodes, f"{_HOME}{self.job.name}/"
        commands = []
        copies = []
        if self.job.source:
            copies.append((str(self.store.source), f"{home}source.tgz"))
        if self.job.secrets:
            copies.append((str(self.store.env), f"{home}env"))
        if copies:
            commands.append(self._backend.on_workers(self.job, zone, nodes, remote.make_folder(self.job)))
        commands += [self._backend.copy(self.job, zone, nodes, local, target) for local, target in copies]
        return [*commands, self._backend.on_workers(self.job, zone, nodes, remote.setup(self.job, stamp))]

    # Lines for the user.

    def _say_state(self, old: State) -> None:
        state, parts = self.state, []
        if state.stage in (Stage.RUN, Stage.SETUP, Stage.WAIT, Stage.DELETE):
            normal = self.resource.phase is Phase.READY or not self.resource.detail
            parts.append(
                f"{self.zone}: {self.resource.phase.value}{'' if normal else f' ({self.resource.detail})'}"
            )
        if state.stage is Stage.RUN and self.report.work is not Work.UNASKED:
            parts.append(f"attempt {state.attempt}: {self.report.work.value}")
        if state.verdict and state.verdict != old.verdict and state.stage not in ENDS:
            parts.append(state.verdict)
        if state.stage is Stage.CREATE and old.stage is not Stage.CREATE:
            parts.append(f"next request in {self.zone} in {max(0.0, state.until - state.seen):.0f} s")
        line = "; ".join([f"{self.job.name}: {state.stage.value}", *parts])
        # The line of a job that runs is printed again every ten minutes.
        if line == self._said and state.seen - self._said_at < _OFTEN:
            return
        self._said, self._said_at = line, state.seen
        self.say(f"{line}, step {self.report.step}" if self.report.step >= 0 else line)

    def what_runs(self) -> str:
        """What still runs and costs, and the command that ends it, for a user who leaves now."""
        job, state = self.job, self.state
        if state.stage in ENDS or not (state.out or state.billed or state.stage is Stage.FIND):
            return f"{job.name}: nothing runs; used {job.cost(state.used)}"
        cost = (
            f"${job.hourly:,.2f} an hour ({job.shape.chips} chips at {job.rate})" if job.hourly else job.rate
        )
        zones = self.zone if state.out else f"one of {', '.join(job.zones)}"
        words = "is" if state.billed else "may be"
        left_hours = max(0.0, left(job, state, self.limits)) / 3600
        return (
            f"{job.name} {words} running in {zones} and costs {cost} until it is deleted; used so far "
            f"{job.cost(state.used)}, {left_hours:.2f} h of its budget are left.\n"
            f"  end it:      scaling-dit tpu delete --name={job.name}\n"
            f"  continue it: scaling-dit tpu babysit --name={job.name}"
        )


def exit_code(state: State) -> int:
    """Of a launcher whose job is in this state."""
    return 0 if state.stage is Stage.DONE else 1


def begin(job: Job, store: Store, *, say: Say) -> None:
    """Takes a job over: a new one, or one of that name that has not ended.

    Raises:
      UserError: a job of that name has other settings and has not ended.
    """
    kept, state = store.read_job(), store.read_state()
    is_running = state is not None and state.stage not in ENDS
    if is_running and kept is not None and kept != job:
        old, new = dataclasses.asdict(kept), dataclasses.asdict(job)
        differs = ", ".join(name for name in old if old[name] != new[name])
        raise UserError(
            f"a job {job.name} was launched with other settings ({differs}) and has not ended; end it with "
            f"`scaling-dit tpu delete --name={job.name}`, continue it with "
            f"`scaling-dit tpu babysit --name={job.name}`, or give another --name"
        )
    if is_running:
        say(f"{job.name}: continues; used so far {job.cost(state.used if state else 0.0)}")
        return
    store.forget_stop()
    store.write_state(State())
    store.write_job(job)


def dry_runner(say: Say, secrets: Sequence[str] = ()) -> Runner:
    """A runner that shows commands and runs none."""

    def runner(command: Command, seconds: float = 0.0) -> Result:
        say(shown(command, secrets))
        return Result(0)

    return runner
