"""`doctor` in a process whose last one of several has faults of its own; the flags are those of the verb."""

import argparse
import sys
import time

from scaling_dit import config as config_lib
from scaling_dit.doctor import probe, report
from scaling_dit.parallel import processes

parser = argparse.ArgumentParser()
for flag, kind in {"workdir": str, "coordinator": str, "processes": int, "process": int}.items():
    parser.add_argument(f"--{flag}", type=kind, required=True)
given = parser.parse_args()
changes = {}
if given.process == given.processes - 1:
    given.workdir = "/proc/no/such/folder"
    changes = {
        "versions": lambda: probe.installed() | {"flax": "0.0.1"},
        "now": lambda: time.time() + 60,
        "all_reduce": lambda mesh, rows: probe.all_reduce(mesh, rows) + 1,
    }


def main():
    config = config_lib.load("experiments/shapes.py:smoke", ["--config.backbone.depth=1"])
    before, machine = report.held_devices(end=False, devices=()), probe.Machine(**changes)
    return report.main(config, given.workdir, before, as_json=True, machine=machine)


membership = processes.Membership(given.coordinator, given.processes, given.process)
processes.join(membership, heartbeat=20, start_up=120)
sys.exit(processes.together(main, 20))
