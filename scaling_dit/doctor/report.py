"""The verb `doctor`: makes all checks, and prints the verdict."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from scaling_dit.doctor import holders
from scaling_dit.doctor.judge import Check, judge

# Exit codes.
HEALTHY, FAULTY = 0, 1
_MARKS = {True: "ok", False: "FAULT", None: "-"}


def held_devices(*, end: bool, devices: Sequence[str] | None = None) -> Check:
    """Looks for processes that hold the TPU, and ends them if asked to. Call it before jax asks for the devices.

    Args:
      end: whether to end them.
      devices: paths; by default the TPU's devices of this host.
    """
    found = holders.find(devices)
    if not found:
        unseen = holders.hidden()
        note = f" ({unseen} processes of other users cannot be seen; as root they can)" if unseen else ""
        return Check("held devices", True, f"no other process holds the TPU{note}")
    words = "; ".join(map(str, found))
    if not end:
        return Check("held devices", False, f"{words}; --end_stale ends them")
    left = holders.end(found)
    if left:
        return Check("held devices", False, f"cannot be ended: {'; '.join(map(str, left))}")
    return Check("held devices", True, f"ended: {words}")


def main(
    config: Any,
    workdir: str | None,
    before: Check,
    *,
    chips: int | None = None,
    as_json: bool = False,
    machine: Any = None,
) -> int:
    """Makes the checks that need jax, in all processes of the run, and prints the verdict in the first.

    Args:
      config: resolved.
      workdir: folder to write to; None to leave it out.
      before: of `held_devices`.
      chips: chips that there should be; None if that is not known.
      as_json: print JSON.
      machine: what is asked of this host, a `probe.Machine`; by default the real one.
    """
    # Held devices would have ended the command before.
    import jax

    from scaling_dit.doctor import probe
    from scaling_dit.parallel import processes

    mine = probe.facts(config, workdir, machine or probe.Machine())
    facts = [json.loads(data) for data in processes.gather_bytes(json.dumps(mine).encode())]
    checks = [before, *judge(facts, chips)]
    if jax.process_index() == 0:
        show(checks, facts, as_json=as_json)
    # No process ends before the others have their verdict.
    processes.gather_bytes(b"")
    return HEALTHY if healthy(checks) else FAULTY


def healthy(checks: Sequence[Check]) -> bool:
    """Whether no check failed."""
    return all(check.passed is not False for check in checks)


def show(checks: Sequence[Check], facts: Sequence[Any] = (), *, as_json: bool = False) -> None:
    """Prints the checks and the verdict."""
    good = healthy(checks)
    if as_json:
        document = {"healthy": good, "checks": [check._asdict() for check in checks], "hosts": list(facts)}
        print(json.dumps(document, indent=1))
        return
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{_MARKS[check.passed]:5}  {check.name:{width}}  {check.words}")
    faults = [check.name for check in checks if check.passed is False]
    print("healthy" if good else f"not healthy: {', '.join(faults)}")
    sys.stdout.flush()
