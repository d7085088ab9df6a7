"""Loss spikes: found without waiting for each step, gone back from, and the same whatever kills the run."""

import contextlib
import dataclasses
import io
import os
import signal

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.checkpoints.workdir import Workdir, claim_workdir, open_workdir, read_metrics
from scaling_dit.config import schema
from scaling_dit.data.loader import HostBatches
from scaling_dit.errors import UserError
from scaling_dit.monitor.writers import MultiWriter
from scaling_dit.training import loop, report, rewind
from scaling_dit.training.loop import main, train
from scaling_dit.training.rewind import Rewind, SpikeDetector
from scaling_dit.training.start import Run
from tests.support.runs import assert_same_bits, tiny

SETTINGS = ConfigDict({"factor": 3.0, "window": 3, "back": 2, "ahead": 1, "limit": 2})


def test_the_data_of_a_step_follow_from_the_record():
    first, second = Rewind(8, 5, 5, 10), Rewind(14, 9, 14, 21)
    assert [rewind.data_step(step, []) for step in (0, 7)] == [0, 7]
    assert [rewind.data_step(step, [first]) for step in (4, 5, 6, 9)] == [4, 10, 11, 14]
    assert [rewind.data_step(step, [first, second]) for step in (4, 5, 8, 9, 10)] == [4, 10, 13, 21, 22]
    # Went back to before an earlier rewind, which no longer acts.
    further = Rewind(7, 2, 2, 16)
    assert [rewind.data_step(step, [first, further]) for step in (1, 2, 5, 6)] == [1, 16, 19, 20]


def test_the_plan_goes_back_far_enough_and_skips_past_the_spike():
    # 6 is no regular checkpoint.
    assert rewind.plan(8, [], [0, 4, 6], SETTINGS, 4) == Rewind(8, 4, 4, 9)
    # But better than none.
    assert rewind.plan(8, [], [5, 7], SETTINGS, 4) == Rewind(8, 5, 5, 9)
    assert rewind.plan(8, [], [7], SETTINGS, 4) is None
    assert rewind.plan(1, [], [0], SETTINGS, 4) == Rewind(1, 0, 0, 2)
    again = rewind.plan(9, [Rewind(8, 4, 4, 9)], [0, 4], SETTINGS, 4)
    # Update 9 read data step 13.
    assert again == Rewind(9, 4, 9, 15)


def test_which_checkpoints_a_rewind_makes_void():
    rewinds = [Rewind(8, 4, 4, 9), Rewind(20, 12, 17, 30)]
    seen = {(4, 0): False, (8, 0): True, (8, 1): False, (16, 1): True, (16, 2): False, (12, 1): False}
    assert {key: rewind.is_void(*key, rewinds) for key in seen} == seen


def test_the_record_comes_back_and_damage_is_reported(tmp_path):
    path = epath.Path(tmp_path) / "rewinds.json"
    assert rewind.read(path) == []
    rewinds = [Rewind(8, 4, 4, 9), Rewind(20, 12, 17, 30)]
    rewind.write(path, rewinds)
    assert rewind.read(path) == rewinds
    for text in ("[", '[{"spike": 1}]'):
        path.write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            rewind.read(path)


def test_a_spike_is_over_the_median_of_the_losses_before_it():
    detector = SpikeDetector(SETTINGS)
    for step, loss in enumerate([9.0, 1.0, 2.0, 5.9, np.inf, np.nan, 100.0, 1.0], start=1):
        detector.add(step, np.float32(loss))
    # 5.9 < 3 x median(9, 1, 2); those that are not finite were skipped; 100 > 3 x median(1, 2, 5.9)
    spike = detector.first()
    assert (spike.step, spike.loss, spike.median) == (7, 100.0, 2.0)
    # The spike is in no later median.
    assert detector.recent == pytest.approx([1.0, 2.0, 5.9])


def test_looking_now_and_then_finds_what_looking_each_step_does():
    losses = [1.0, 1.1, 0.9, 1.0, 1.2, 9.0, 1.0]
    found = []
    for every in (1, 3, 7):
        detector = SpikeDetector(SETTINGS)
        for step, loss in enumerate(losses, start=1):
            detector.add(step, np.float32(loss))
            if step % every == 0 and (spike := detector.first()):
                found.append((spike, detector.recent))
                break
    assert len(found) == 3 and found[0] == found[1] == found[2]


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(UserError, match=r"rewind\.back is 100; .*here 4"):
        config_lib.resolve(tiny(checkpoint__every=4), ["--config.rewind.factor=3"])
    with pytest.raises(UserError, match=r"rewind\.factor is 0\.5"):
        tiny(rewind__factor=0.5)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """All runs here of as many steps are of one model: each takes the first one's compiled functions, no more."""
    real, opened = Run.open, {}

    def open_again(config, workdir, devices=None, lease=None, start=None):
        if config.steps not in opened:
            opened[config.steps] = real(config, workdir, devices, lease, start)
            return opened[config.steps]
        first = opened[config.steps]
        assert {key: value for key, value in config.items() if key not in schema.FREE_SECTIONS} == {
            key: value for key, value in first.config.items() if key not in schema.FREE_SECTIONS
        }
        tokenizer = open_workdir(workdir, config, first.source)
        claim_workdir(workdir, config, tokenizer)
        return dataclasses.replace(first, config=config, workdir=workdir)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "open", open_again)
        yield


@pytest.fixture(scope="module")
def poisoned():
    """Images of data steps 10 and 11 are noise, whose loss is out of all that came before; yields what was read."""
    real, read = HostBatches.__getitem__, []

    def getitem(self, index):
        batch = real(self, index)
        step = self._data_step(self._start_step + index)
        read.append(step)
        if step in (10, 11):
            noise = np.random.default_rng(step).integers(0, 2, batch["images"].shape)
            batch["images"] = (255 * noise).astype(np.uint8)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostBatches, "__getitem__", getitem)
        yield read


@pytest.fixture
def poison(poisoned):
    """The same, with what this test alone reads."""
    poisoned.clear()
    return poisoned


def spiking(**changes):
    settings = {"rewind__factor": 3.0, "rewind__window": 4, "rewind__back": 3, "rewind__ahead": 2}
    return tiny(**{"steps": 12, "checkpoint__every": 4, "checkpoint__keep_last": 2} | settings | changes)


def run(workdir, **changes):
    return train(spiking(**changes), workdir, devices=jax.devices()[:1])


def recorded(workdir):
    """The rewinds of a run."""
    return rewind.read(Workdir(workdir).rewinds)


class Killed(BaseException):
    """Ends the loop at a line of our choice."""


def killed(*_):
    raise Killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory, poisoned):
    """A run with one spike that nothing kills: (workdir, final state, data steps read, stderr)."""
    workdir, printed = epath.Path(tmp_path_factory.mktemp("whole")), io.StringIO()
    poisoned.clear()
    with contextlib.redirect_stderr(printed):
        state = run(workdir)
    return workdir, state, list(poisoned), printed.getvalue()


def test_a_run_goes_back_and_skips_the_data(whole):
    workdir, state, read, printed = whole
    assert "back to step 8, without data steps 8 to 12" in printed
    assert recorded(workdir) == [Rewind(11, 8, 8, 13)]
    assert max(read) >= 13 + 3 and int(state.step) == 12
    facts = report.report(workdir)
    assert facts["rewinds"] == [{"spike": 11, "to": 8, "data_from": 8, "data_to": 13}]
    assert facts["goodput"]["lost_steps"] == 3 and facts["goodput"]["starts"] == 1
    rows = {row["step"]: row["train/loss"] for row in read_metrics(workdir)}
    # The spike is no longer among them.
    assert sorted(rows) == list(range(1, 13)) and rows[11] < 3 * rows[10]


def before_the_record(patch):
    patch.setattr(loop, "record_rewind", killed)


def after_the_record(patch):
    real = rewind.write

    def write(path, rewinds):
        real(path, rewinds)
        raise Killed

    patch.setattr(rewind, "write", write)


def after_restoring(patch):
    patch.setattr(MultiWriter, "back_to", killed)


@pytest.mark.parametrize(
    "kill, every",
    [
        pytest.param(before_the_record, 5, marks=pytest.mark.slow),
        pytest.param(after_the_record, 1, marks=pytest.mark.slow),
        pytest.param(after_restoring, 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_went_back_is_the_same_wherever_it_is_killed(whole, tmp_path, poison, kill, every):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill(patch)
        run(tmp_path, log__every=every)
    assert_same_bits(run(tmp_path, log__every=3), whole[1])
    assert recorded(tmp_path) == recorded(whole[0])


@pytest.mark.slow
def test_checkpoints_of_undone_updates_are_replaced(tmp_path, poison):
    # From 11 back to 4, so that 8 is of undone updates.
    state = run(tmp_path, steps=16, rewind__back=4)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as store:
        assert store.all_steps() == [12, 16]
        assert store.extra(12)["rewinds"] == 1 and len(store.extra(12)["losses"]) == 4
    assert int(state.step) == 16


@pytest.mark.slow
def test_a_save_on_sigterm_pushes_no_checkpoint_out_that_a_rewind_needs(tmp_path, poison, monkeypatch):
    shown, sent = loop.Progress.update, []

    def update(self, step, loss=None):
        shown(self, step, loss)
        if step == 9 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(loop.Progress, "update", update)
    with pytest.raises(loop.Stopped, match="saved step 10"):
        run(tmp_path, steps=16, rewind__back=4)
    run(tmp_path, steps=16, rewind__back=4)
    # As without the signal.
    assert recorded(tmp_path) == [Rewind(11, 4, 4, 13)]


def test_past_the_limit_the_run_stops_with_a_code_of_its_own(tmp_path, poison, capsys):
    # The next batch is poisoned as well.
    config = spiking(rewind__ahead=0, rewind__limit=1)
    assert main(config, str(tmp_path)) == loop.SPIKE == 4
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "after 1 rewinds" in last and "last checkpoint: step 8" in last


@pytest.mark.slow
def test_a_run_that_never_spikes_reads_the_data_in_order(tmp_path, poison):
    run(tmp_path, steps=16, rewind__factor=50.0)
    assert sorted(set(poison))[:16] == list(range(16)) and not Workdir(tmp_path).rewinds.exists()
