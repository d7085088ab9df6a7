"""Runs that train adapters: their start, their checkpoints, resuming, the base they are tied to, every layout."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from scaling_dit import trees
from scaling_dit.checkpoints.checksums import params_hash
from scaling_dit.checkpoints.frozen_base import FrozenBase
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.checkpoints.workdir import Workdir, read_metrics
from scaling_dit.errors import UserError
from scaling_dit.sampling import pipeline
from scaling_dit.training import adapters as adapters_lib
from scaling_dit.training import loop
from scaling_dit.training.adapters import base_of
from scaling_dit.training.base import Start
from tests.support.layouts import LAYOUTS
from tests.support.runs import assert_same_bits, leaves, tiny

pytestmark = pytest.mark.usefixtures("on_one_device")

ONE = jax.devices()[:1]
ADAPTED = {
    "adapter__rank": 2,
    "adapter__alpha": 4.0,
    "optim__learning_rate": 0.01,
    "optim__warmup_steps": 0,
}


def adapted(steps, **changes):
    return tiny(steps, **ADAPTED, **changes)


FOUR = adapted(4, checkpoint__every=2, eval__every=2, eval__metrics=())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The workdir of a run with checkpoints of steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("base") / "run"
    loop.train(tiny(4, checkpoint__every=2), workdir, ONE)
    return workdir


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted") / "run"
    loop.train(FOUR, folder, ONE, start=str(base))
    return folder


@pytest.mark.slow
def test_checkpoints_hold_adapters_alone_and_the_hash_of_their_base(base, trained):
    with Checkpoints(Workdir(trained).checkpoints, read_only=True) as store:
        assert store.latest_step() == 4
        saved, extra = trees.by_path(store._metadata(4)), store.extra(4)
    kernels = {path[:-1] for path in saved if path[0] == "params"}
    assert {path[-1] for path in saved if path[0] in ("params", "emas")} == {"lora_a", "lora_b"}
    assert kernels
    kept = json.loads(Workdir(trained).base.read_text())
    whole = pipeline.load(base, ema=kept["ema"])
    assert (
        extra["base_sha256"]
        == kept["sha256"]
        == params_hash({"/".join(path): leaf for path, leaf in trees.by_path(whole.params).items()})
    )
    assert kept["place"] == str(base)
    sizes = [
        sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
        for run in (base / "checkpoints" / "4", trained / "checkpoints" / "4")
    ]
    assert sizes[1] < sizes[0] / 3


@pytest.mark.slow
def test_training_changes_the_samples_and_the_loss_from_those_of_the_base(base, trained):
    rows = {row["step"]: row for row in read_metrics(trained)}
    assert rows[4]["validation/loss"] < rows[2]["validation/loss"]
    pipe, plain = pipeline.load(trained), pipeline.load(base, ema=FrozenBase.read(Workdir(trained).base).ema)
    changed = [
        path
        for (path, now), then in zip(
            trees.by_path(pipe.params).items(), jax.tree.leaves(plain.params), strict=True
        )
        if not np.array_equal(now, then)
    ]
    assert {path[:-1] for path in trees.by_path(pipe.adapters)} == set(changed)
    first, second = (run.sample(["a red circle"], seed=1, steps=2) for run in (pipe, plain))
    assert not np.array_equal(first, second)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_bits(base, trained, tmp_path):
    whole = loop.train(FOUR, tmp_path / "whole", ONE, start=str(base))
    with Checkpoints(Workdir(trained).checkpoints, read_only=True) as store:
        there, _ = store.restore(4, whole)
    assert_same_bits(whole, there)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
    resumed = loop.train(FOUR, tmp_path / "resumed", ONE)
    assert_same_bits(whole, resumed)


@pytest.mark.slow
def test_another_base_is_refused_in_one_line_and_a_moved_one_found(base, trained, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(trained, run)
    # The same run two steps earlier, under the name of the step that was the base.
    shutil.copytree(base, other)
    shutil.rmtree(other / "checkpoints" / "4")
    (other / "checkpoints" / "2").rename(other / "checkpoints" / "4")
    with pytest.raises(UserError, match=r"trained beside another base than the one in .*other"):
        loop.train(FOUR, run, ONE, start=str(other))
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    loop.train(FOUR, run, ONE, start=str(moved))
    assert FrozenBase.read(Workdir(run).base).place == str(moved)
    # Or with a file that was changed by hand, which the checkpoint contradicts.
    kept = json.loads(Workdir(run).base.read_text()) | {"sha256": "", "place": str(other)}
    Workdir(run).base.write_text(json.dumps(kept))
    with pytest.raises(UserError, match=r"the adapters in .*run were trained beside another base \(sha256"):
        pipeline.load(run)


@pytest.fixture(scope="module")
def one_device(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return leaves(loop.train(adapted(2, batch=16), folder / "run", ONE, start=str(base)).params)


@pytest.mark.slow
# All axes that split a parameter or a sequence; that examples are split is a test of conditions.
def test_a_layout_trains_as_one_device_does(base, one_device, tmp_path):
    mesh = {f"mesh__{axis}": size for axis, size in LAYOUTS["FSDP2xCTX2xTP2"].items()}
    many = leaves(loop.train(adapted(2, batch=16, **mesh), tmp_path / "run", start=str(base)).params)
    assert many.keys() == one_device.keys()
    for name in many:
        np.testing.assert_allclose(many[name], one_device[name], rtol=0, atol=5e-4, err_msg=name)


def test_a_base_must_be_given_and_be_no_run_of_adapters(smoke_run, tmp_path):
    new = Workdir(tmp_path / "new")
    with pytest.raises(UserError, match=r"config.adapter.rank is 2, so .* --from=WORKDIR"):
        base_of(adapted(2), new, None)
    assert base_of(tiny(2), new, None) is None
    found = base_of(adapted(2), new, Start(str(smoke_run)))
    assert (found.step, found.place, found.sha256) == (4, str(smoke_run), "")
    assert base_of(adapted(2), new, Start(str(smoke_run), step=2, ema=0.995)).step == 2
    with pytest.raises(UserError, match="has no checkpoint of step 3"):
        base_of(adapted(2), new, Start(str(smoke_run), step=3))
    with pytest.raises(UserError, match="is no run's folder, .*`import` a file first"):
        base_of(adapted(2), new, Start(str(tmp_path / "nothing")))


def test_a_run_keeps_the_checkpoint_and_average_of_its_base_and_says_so(smoke_run, tmp_path):
    run = Workdir(tmp_path)
    run.config.write_text("{}")
    kept = FrozenBase("/gone", 2, "0.995", "ab")
    kept.save(run.base)
    for start in (Start(str(smoke_run)), Start(str(smoke_run), step=2, ema=0.995)):
        assert base_of(adapted(2), run, start) == dataclasses.replace(kept, place=str(smoke_run))
    with pytest.raises(UserError, match="beside step 2 of their base, EMA 0.995, not .*@4; leave @STEP"):
        base_of(adapted(2), run, Start(str(smoke_run), step=4))
    FrozenBase("/gone", 2, None, "ab").save(run.base)
    with pytest.raises(UserError, match="of their base, raw weights, not .* with --from_ema=0.995; "):
        base_of(adapted(2), run, Start(str(smoke_run), ema=0.995))


@pytest.mark.parametrize("damage", ["lost", "damaged"])
def test_a_start_finds_a_base_whose_file_is_gone_by_what_the_checkpoints_say(
    damage, smoke_run, tmp_path, monkeypatch
):
    run = Workdir(tmp_path)
    run.config.write_text("{}")
    if damage == "damaged":
        run.base.write_text("{")
    with pytest.raises(UserError, match=r"base.json .*give the `train` command with --from"):
        base_of(adapted(2), run, None)
    # So that another base, such as a newer checkpoint, is refused before it is written down.
    monkeypatch.setattr(adapters_lib, "newest_extra", lambda workdir: {"base_sha256": "ab"})
    found = base_of(adapted(2), run, Start(str(smoke_run), step=2))
    assert found == FrozenBase(str(smoke_run), 2, None, "ab")


def test_what_does_not_go_with_adapters_is_one_line():
    with pytest.raises(UserError, match=r"adapters do not go with config.sharding.gather_once"):
        adapted(2, sharding__gather_once=True)
    with pytest.raises(UserError, match=r"config.adapter.targets holds '\('; it must be a regex"):
        adapted(2, adapter__targets=("(",))
    with pytest.raises(UserError, match=r"config.adapter.targets is \(\)"):
        adapted(2, adapter__targets=())


def test_the_file_of_a_base_reads_back_and_damage_is_one_line(tmp_path):
    path = Workdir(tmp_path).base
    with pytest.raises(UserError, match="base.json is missing.*--from"):
        FrozenBase.read(path)
    wanted = FrozenBase("/runs/base", 4, "0.999", "ab")
    wanted.save(path)
    assert FrozenBase.read(path) == wanted
    path.write_text('{"place": 3}')
    with pytest.raises(UserError, match="damaged"):
        FrozenBase.read(path)
