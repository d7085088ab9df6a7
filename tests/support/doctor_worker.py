"""One process of a run of `doctor` with a fault of its own: doctor_worker.py RANK COUNT PORT WORKDIR FAULT."""

import sys
import time

from scaling_dit import config as config_lib
from scaling_dit.doctor import probe, report
from scaling_dit.parallel import processes

rank, count, port, workdir, fault = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
FAULTS = {
    "versions": lambda: probe.installed() | {"flax": "0.0.1"},
    "now": lambda: time.time() + 60,
    "all_reduce": lambda mesh, rows: probe.all_reduce(mesh, rows) + 1,
}
last = rank == count - 1
changes = FAULTS if last and fault == "many" else {}
if last and fault == "many":
    workdir = "/proc/no/such/folder"


def main():
    config = config_lib.load("experiments/shapes.py:smoke", ["--config.backbone.depth=1"])
    before, machine = report.held_devices(end=False, devices=()), probe.Machine(**changes)
    return report.main(config, workdir, before, as_json=True, machine=machine)


if count > 1:
    processes.join(processes.Membership(f"localhost:{port}", count, rank), heartbeat=20, start_up=120)
    sys.exit(processes.together(main, 20))
sys.exit(main())
