"""What a run writes about its speed and its processes, and that watching changes none of its numbers."""

import math
import shutil
import types

import pytest
from etils import epath

from scaling_dit.checkpoints.workdir import Workdir, read_metrics
from scaling_dit.costs.step import train_flops
from scaling_dit.monitor import goodput, heartbeat
from scaling_dit.monitor.jsonl import read_rows
from scaling_dit.parallel import topologies
from scaling_dit.training import watching
from tests.support import runs


def test_metrics_of_speed(smoke_run):
    rows = [row for row in read_metrics(smoke_run) if "speed/goodput" in row]
    assert rows and all(0 <= row["speed/goodput"] < 1 for row in rows)
    timed = [row for row in rows if "speed/step_seconds_p50" in row]
    assert timed and timed[-1]["step"] == 4
    for row in timed:
        assert (
            0
            < row["speed/step_seconds_p50"]
            <= row["speed/step_seconds_p95"]
            <= row["speed/step_seconds_max"]
        )
        assert 0 <= row["speed/host_wait"] <= row["speed/step_seconds_max"]
        # 8 images of 4 x 4 latents, in patches of 2.
        assert row["speed/tokens_per_s"] == pytest.approx(row["speed/images_per_second"] * 4)
        # CPUs state neither a peak nor their memory, and one process is not the slowest of anything.
        for name in row:
            assert not name.startswith("memory/")
            assert name not in ("speed/mfu", "speed/model_tflops_per_chip", "speed/slowest_process")


def test_the_heartbeat_of_a_finished_run(smoke_run):
    (row,) = heartbeat.read(Workdir(smoke_run).heartbeats)
    assert (row["state"], row["step"], row["steps"], row["processes"]) == ("done", 4, 4, 1)
    assert row["began"] <= row["progress_time"] <= row["time"]


def test_goodput_so_far_is_that_of_the_rows_written(smoke_run):
    starts = read_rows(Workdir(smoke_run).goodput) * 2
    account = goodput.Account()
    for place, rows in enumerate(starts):
        account.start()
        for number, row in enumerate(rows, 1):
            account.add(row)
            assert account.summary() == goodput.summarise([*starts[:place], rows[:number]])


def test_a_start_that_is_resumed_counts_the_ones_before(smoke_run, tmp_path):
    shutil.copytree(Workdir(smoke_run).goodput, tmp_path / "goodput")
    before = goodput.summary(tmp_path / "goodput")
    with goodput.Recorder(epath.Path(tmp_path / "goodput"), goodput.Stopwatch()) as recorder:
        found = recorder.so_far()
    assert found["starts"] == before["starts"] + 1 and found["seconds"]["step"] == before["seconds"]["step"]


def test_the_slowest_process_is_the_one_whose_devices_wait():
    nan = math.nan
    rows = [[0.1, 10.0, 12.0], [0.4, 11.0, 15.0], [0.1, nan, nan]]
    assert watching.over_processes(rows) == {
        "speed/slowest_process": 1,
        "speed/slowest_host_wait": 0.4,
        "speed/host_wait": pytest.approx(0.2),
        "memory/most_in_use_gib": 11.0,
        "memory/most_peak_gib": 15.0,
    }
    assert watching.over_processes([[nan, nan, nan]] * 2) == {}


def stand_in(config, kind, count):
    device = types.SimpleNamespace(device_kind=kind)
    mesh = types.SimpleNamespace(devices=types.SimpleNamespace(flat=[device] * count))
    from scaling_dit.planning.plan import abstract_model

    return types.SimpleNamespace(
        config=config, model=abstract_model(config), program=types.SimpleNamespace(mesh=mesh)
    )


def test_the_work_of_a_run_on_chips_with_a_known_peak():
    config = runs.tiny()
    one = stand_in(config, "TPU v5p", 8)
    work = watching.work_of(one)
    assert work.flops == train_flops(config, one.model) > 0
    assert (work.chips, work.peak) == (8, topologies.CHIPS["v5p"].peak)
    # Two devices of a chip are one chip.
    two = watching.work_of(stand_in(config, "TPU7x", 8))
    assert (two.chips, two.peak, two.flops) == (4, topologies.CHIPS["tpu7x"].peak, work.flops)
