"""The verb `doctor`."""

import dataclasses
import functools

from scaling_dit.cli.options import flag, group
from scaling_dit.cli.train import Processes
from scaling_dit.cli.verb import Verb, config_flag, json_flag
from scaling_dit.fields import COUNT

# The config whose steps run without --config: as small as a real run gets.
_SMALLEST = "shapes:smoke"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor(Verb):
    """Checks a machine or slice in a minute: chips, packages, storage, sums, steps."""

    EXAMPLE = "scaling-dit doctor --workdir=gs://bucket/runs --topology=v5e:4x8"
    OVERRIDES = True

    config: str | None = config_flag()
    workdir: str | None = flag(
        "folder, local or gs://, that every host must be able to write to and read", path=True
    )
    topology: str | None = flag("slice that this should be, such as v5p:4x4x4")
    slices: int = flag("equal slices that there should be", 1, COUNT)
    end_stale: bool = flag("end processes that hold the TPU's devices", False)
    processes: Processes = group(Processes)
    json: bool = json_flag()

    def run(self) -> int:
        """Prints the verdict; 0 healthy, 1 not."""
        from scaling_dit import config as config_lib
        from scaling_dit.doctor import report
        from scaling_dit.parallel import supervise, topologies

        chips = topologies.parse(self.topology, self.slices).chips if self.topology else None
        # Where it is needed: it imports jax, which a supervisor has no use for.
        config = functools.cache(lambda: config_lib.load(self.config or _SMALLEST, self.overrides))
        before = report.held_devices(end=self.end_stale)
        if before.passed is False:
            # jax would wait for the devices, or fail without naming who has them.
            if not supervise.supervised():
                report.show([before], as_json=self.json)
            return report.FAULTY

        def check() -> int:
            fitted = config()
            if not self._sized():
                fitted = config_lib.resolve(fitted, [f"--config.batch={_least_batch()}"])
            return report.main(fitted, self.workdir, before, chips=chips, as_json=self.json)

        return self.processes.run_together(check, lambda: config().processes, self.command)

    def _sized(self) -> bool:
        """Whether the batch is the user's."""
        return bool(self.config) or any("config.batch=" in override for override in self.overrides)


def _least_batch() -> int:
    """The least batch that splits over all devices of the run."""
    import jax

    return max(8, len(jax.devices()))
