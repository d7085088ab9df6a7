"""Workers of the simulated cloud as a model: they understand the launcher's scripts and train by the clock.

What a job saved outlives its workers, as a bucket does.
"""

import re

from scaling_dit.tpu import remote


class ModelWorkers:
    """All workers of one job.

    Attributes:
      total: steps of the job.
      pace: seconds of a step.
      saved: the last step in the bucket.
      fails: (step, exit code): the job ends so when it reaches the step; None = it does not.
      broken: how many of the next set-ups fail.
    """

    def __init__(self, total=200, pace=30.0, every=20):
        self.total, self.pace, self.every = total, pace, every
        self.saved, self.fails, self.broken = 0, None, 0
        self.known: dict[int, dict] = {}
        self.starts: list[tuple[int, int]] = []

    def gone(self, machine) -> None:
        if machine.id in self.known:
            self._progress_of(self.known.pop(machine.id), machine.id)

    def _progress_of(self, worker, machine_id, now=None):
        pass

    def step(self, worker, now: float) -> int:
        return min(self.total, worker["from"] + int((now - worker["since"]) / self.pace))

    def settle(self, worker, now: float) -> None:
        """Brings a running worker up to date."""
        if worker.get("work") != "RUNNING":
            return
        step = self.step(worker, now)
        if self.fails and step >= self.fails[0] >= worker["from"]:
            worker.update(work="ENDED", code=self.fails[1], step=self.fails[0], ended=now)
            self.saved = max(self.saved, self.fails[0] // self.every * self.every)
            return
        worker["step"] = step
        self.saved = max(self.saved, step // self.every * self.every)
        if step >= self.total:
            worker.update(work="ENDED", code=0, ended=now)

    def run(self, cloud, made, machine, text):
        worker = self.known.setdefault(machine.id, {"attempt": 0})
        self.settle(worker, cloud.now)
        what = text.partition("\n")[0]
        if what.startswith("# set-up"):
            if self.broken:
                self.broken -= 1
                return 1, ""
            worker["stamp"] = re.search(r"!= (\S+) \]", text)[1]
            return 0, f"{remote._READY} {machine.name} {worker['stamp']}\n"
        if match := re.match(r"# start (\d+)", what):
            attempt = int(match[1])
            if worker["attempt"] != attempt:
                self.starts.append((machine.id, attempt))
                worker.update(
                    {
                        "attempt": attempt,
                        "work": "RUNNING",
                        "from": self.saved,
                        "since": cloud.now,
                        "step": self.saved,
                    }
                )
                worker.pop("code", None)
            return 0, ""
        if what.startswith("# save"):
            if worker.get("work") == "RUNNING":
                self.saved = max(self.saved, worker["step"])
                worker.update(work="ENDED", code=75, ended=cloud.now)
            return 0, ""
        if what.startswith("# status"):
            work, code = worker.get("work", "GONE"), worker.get("code", "-")
            age = int(cloud.now - worker["ended"]) if work == "ENDED" else 0
            line = f"{remote._MARK} {machine.name} {worker['attempt']} {work} {code} {worker.get('step', -1)} {age}"
            return 0, f"{line}\n"
        return 0, ""

    def copy(self, cloud, made, machine, local, remote_path):
        return 0

    def end(self, code: int, now: float) -> None:
        """The job ends on all workers."""
        for worker in self.known.values():
            self.settle(worker, now)
            if worker.get("work") == "RUNNING":
                worker.update(work="ENDED", code=code, ended=now)

    def lose_process(self) -> None:
        """A process dies without an exit code."""
        for worker in list(self.known.values())[:1]:
            if worker.get("work") == "RUNNING":
                worker["work"] = "GONE"
