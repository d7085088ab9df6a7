"""A member of the miniature study in a process that dies at a chosen call: study_worker.py WORKDIR FUNCTION COUNT."""

import dataclasses
import os
import sys

import pytest

from scaling_dit.evaluation import run as evaluation
from scaling_dit.scaling import spec, study, table, tensorboard
from scaling_dit.training import loop
from tests.support.runs import open_on_one_device, train_on_one_device

# Moments of a study, by a name: the module and the function called there.
MOMENTS = {
    "log": (loop, "write_log"),
    "score": (evaluation, "score_to_folders"),
    "table": (table, "write_parquet"),
}


def one_member() -> spec.StudySpec:
    """Two runs, one for each seed."""
    whole = spec.load("experiments/studies/shapes_core.py:smoke")
    return dataclasses.replace(whole, members=whole.members[:1], claims=())


def die_at(name: str, count: int) -> None:
    """Makes the process end at once, as SIGKILL ends it, at the `count`-th call of a moment's function."""
    module, attribute = MOMENTS[name]
    function, left = getattr(module, attribute), [count]

    def call(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            os._exit(9)
        return function(*args, **kwargs)

    setattr(module, attribute, call)


def main() -> None:
    workdir, moment, count = sys.argv[1:]
    die_at(moment, int(count))
    with pytest.MonkeyPatch.context() as patch:
        # As the study that it is compared with.
        open_on_one_device(patch)
        train_on_one_device(patch)
        # TensorBoard takes longer to import than a run here.
        patch.setattr(tensorboard, "write", lambda *_: None)
        study.study(one_member(), workdir)


if __name__ == "__main__":
    main()
