"""Runs that begin with another's weights: what is taken, what is refused, and what a kill leaves."""

import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from scaling_dit import backbones, interop
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.checkpoints.workdir import Workdir
from scaling_dit.errors import UserError
from scaling_dit.sampling import pipeline
from scaling_dit.training import stages
from scaling_dit.training.base import Start
from scaling_dit.training.loop import open_checkpoints, train
from scaling_dit.training.start import Run
from tests.support import runs
from tests.support.runs import assert_same_bits, leaves

pytestmark = pytest.mark.usefixtures("on_one_device")

ONE = jax.devices()[:1]
# As deep as `smoke_run`.
tiny = functools.partial(runs.tiny, backbone__depth=2)


def begun(config, workdir, start, devices=ONE):
    """(run, its state of step 0) of a start from a base."""
    start = start if isinstance(start, Start) or start is None else Start.parse(start)
    run = Run.open(config, Workdir(workdir), devices, None, start)
    with open_checkpoints(run) as store:
        state, _, loader = run.begin(store, ())
        loader.close()
    return run, state


def test_step_0_is_the_base_bit_for_bit_and_the_base_is_read_once(smoke_run, tmp_path, monkeypatch, capsys):
    config = tiny(steps=6, seed=7, optim__learning_rate=1e-4)
    _, state = begun(config, tmp_path / "new", f"{smoke_run}@2")
    base = pipeline.load(smoke_run, step=2)
    assert int(state.step) == 0
    assert_same_bits(state.params, base.params)
    for average in state.emas.values():
        assert_same_bits(average, base.params)
    assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state) if x.ndim and x.dtype == np.float32)
    record = json.loads((tmp_path / "new/start.json").read_text())
    assert (record["from"], record["step"], record["ema"]) == (str(smoke_run), 2, None)
    assert len(record["copied"]) == len(jax.tree.leaves(base.params))
    assert record["resized"] == record["fresh"] == [] and len(record["params_sha256"]) == 64
    assert record["changed"]["optim.learning_rate"] == [1.5e-3, 1e-4]
    said = [line for line in capsys.readouterr().err.splitlines() if "began from" in line]
    assert len(said) == 1 and f"{smoke_run}, step 2, raw weights" in said[0] and "arrays copied" in said[0]

    def never(start):
        raise AssertionError(f"{start} was read again")

    monkeypatch.setattr("scaling_dit.training.start.open_base", never)
    for start in (f"{smoke_run}@2", smoke_run, None):
        assert_same_bits(begun(config, tmp_path / "new", start)[1], state)
    with pytest.raises(UserError, match=rf"began from {smoke_run}@2, not from {smoke_run}@4; give another"):
        begun(config, tmp_path / "new", f"{smoke_run}@4")
    with pytest.raises(UserError, match="holds a run that began from nothing"):
        Run.open(config, Workdir(smoke_run), ONE, None, Start("elsewhere"))
    shutil.rmtree(tmp_path / "new/checkpoints")
    with pytest.raises(UserError, match="began from another run's weights, and its checkpoints are gone"):
        begun(config, tmp_path / "new", None)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"backbone__name": "pixart"}, "config.backbone.name is 'uvit' there and 'pixart' here"),
        ({"backbone__hidden": 64}, "config.backbone.hidden is 32 there and 64 here"),
        ({"backbone__depth": 4}, "config.backbone.depth is 2 there and 4 here"),
        ({"backbone__patch": 4}, "config.backbone.patch is 8 there and 4 here"),
        ({"text_encoder__depth": 2}, "config.text_encoder.depth is 1 there and 2 here"),
        ({"codec": ConfigDict({"name": "dct", "patch": 2, "channels": 4})}, "codec.name is 'pixels' there and 'dct'"),
        ({"train_text_encoder": False}, "config.train_text_encoder is True there and False here"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)  # fmt: skip
def test_a_base_of_another_kind_is_refused_by_field_and_leaves_no_trace(smoke_run, tmp_path, changes, line):
    config = tiny().copy_and_resolve_references().unlock()
    for key, value in changes.items():
        if key == "backbone__name":
            config.backbone = ConfigDict({"name": value, "hidden": 32, "depth": 2, "heads": 2, "patch": 8})
        elif isinstance(value, ConfigDict):
            config[key] = value
        else:
            config.update_from_flattened_dict({key.replace("__", "."): value})
    from scaling_dit import config as config_lib

    with pytest.raises(UserError, match=line):
        Run.open(config_lib.resolve(config), Workdir(tmp_path / "new"), ONE, None, Start(str(smoke_run)))
    assert not (tmp_path / "new").exists()


def fake(shapes, config=None, text_length=3):
    """A base of these shapes, and as much of a model as `compare` reads."""
    base = types.SimpleNamespace(start="base", config=config, text_length=text_length)
    return base, {path: jnp.zeros(shape) for path, shape in shapes.items()}


def a_model(length=3, resized=True):
    backbone = types.SimpleNamespace(
        RESIZED={"pos_embed": "scaling_dit.backbones.uvit:resize_table"} if resized else {}
    )
    return types.SimpleNamespace(backbone=backbone, text_encoder=types.SimpleNamespace(length=length))


def test_only_positions_change_shape_and_only_conditions_are_fresh():
    base, there = fake({"backbone/a": (2,), "backbone/pos_embed": (20, 4)})
    here = {"backbone/a": (2,), "backbone/pos_embed": (68, 4), "backbone/condition_embed/edges/kernel": (3,)}
    here = {path: jnp.zeros(shape) for path, shape in here.items()}
    config = ConfigDict({"conditions": {"edges": {}}})
    taken = stages.compare(base, there, here, config, a_model())
    assert taken.copied == ("backbone/a",) and taken.fresh == ("backbone/condition_embed/edges/kernel",)
    table = jnp.arange(80.0).reshape(20, 4)
    assert taken.resized["backbone/pos_embed"](table).shape == (68, 4)
    assert str(taken) == (
        "1 arrays copied, 1 resized (backbone/pos_embed), 1 fresh (backbone/condition_embed/edges/kernel)"
    )

    def refused(there, here, line, config=config, model=None):
        there, here = ({k: jnp.zeros(v) for k, v in one.items()} for one in (there, here))
        with pytest.raises(UserError, match=line):
            stages.compare(base, there, here, config, model or a_model())

    fresh = {"backbone/condition_embed/edges/kernel": (3,)}
    refused({}, fresh, "edges/kernel is only here", ConfigDict())
    refused({}, {"backbone/b": (1,)}, "backbone/b is only here; only what the config adds may be missing")
    refused({"backbone/b": (1,)}, {}, "backbone/b is only there")
    refused({"backbone/a": (2,)}, {"backbone/a": (3,)}, r"backbone/a is \[2\] there and \[3\] here")
    both = {"backbone/pos_embed": (20, 4)}, {"backbone/pos_embed": (68, 8)}
    refused(*both, r"pos_embed is \[20, 4\] there and \[68, 8\] here")
    wider = {"backbone/pos_embed": (20, 4)}, {"backbone/pos_embed": (68, 4)}
    refused(*wider, "pos_embed is", model=a_model(resized=False))
    # The base had the condition already, so its parameters must be there.
    known, _ = fake({}, ConfigDict({"conditions": {"edges": {}}}))
    with pytest.raises(UserError, match="edges/kernel is only here"):
        stages.compare(known, {}, {path: jnp.zeros(3) for path in fresh}, config, a_model())


def test_a_table_of_as_many_positions_of_other_tokens_is_not_copied():
    # 1 + 3 + 16 and 1 + 10 + 9.
    base, there = fake({"backbone/pos_embed": (20, 4)}, text_length=10)
    taken = stages.compare(base, there, there, ConfigDict(), a_model(length=3))
    assert not taken.copied and tuple(taken.resized) == ("backbone/pos_embed",)


def test_positions_of_a_shifted_condition_are_fresh_with_it_and_resized_after():
    backbone = backbones.create(
        "uvit",
        hidden=8,
        depth=1,
        heads=1,
        conditions=(("edges", 4, "token", "shifted"), ("near", 4, "token", "shared")),
    )
    assert set(backbone.RESIZED) == {"pos_embed", "condition_pos_edges"}
    model = types.SimpleNamespace(backbone=backbone, text_encoder=types.SimpleNamespace(length=7))
    here = {
        "backbone/pos_embed": jnp.zeros((1 + 7 + 36, 8)),
        "backbone/condition_pos_edges": jnp.zeros((36, 8)),
    }
    config = ConfigDict({"conditions": {"edges": {}}})
    base, there = fake({"backbone/pos_embed": (1 + 3 + 9, 8)})
    taken = stages.compare(base, there, here, config, model)
    assert taken.fresh == ("backbone/condition_pos_edges",) and not taken.copied

    base, there = fake(
        {"backbone/pos_embed": (1 + 3 + 9, 8), "backbone/condition_pos_edges": (9, 8)}, config, text_length=3
    )
    taken = stages.compare(base, there, here, config, model)
    assert set(taken.resized) == set(here) and not taken.fresh
    table = jax.random.normal(jax.random.key(0), (9, 8))
    # The same function as for the image's own.
    whole = taken.resized["backbone/pos_embed"](jnp.concatenate([jnp.zeros((4, 8)), table]))
    np.testing.assert_array_equal(taken.resized["backbone/condition_pos_edges"](table), whole[-36:])
    # A longer text leaves it as it is.
    there["backbone/condition_pos_edges"] = jnp.zeros((36, 8))
    assert stages.compare(base, there, here, config, model).copied == ("backbone/condition_pos_edges",)
    there["backbone/condition_pos_edges"] = jnp.zeros((10, 8))
    with pytest.raises(UserError, match="resized from 10 to 36 tokens, which must be squares"):
        stages.compare(base, there, here, config, model)


def test_a_table_of_a_file_says_what_it_was_read_as():
    # 1 + 77 + 16 x 16 tokens are 1 + 44 + 17 x 17 as well.
    base, there = fake({"backbone/pos_embed": (334, 4)}, text_length=None)
    here = {"backbone/pos_embed": jnp.zeros((1 + 44 + 4, 4))}
    said = str(stages.compare(base, there, here, ConfigDict(), a_model(length=44)))
    assert (
        "1 resized (backbone/pos_embed); backbone/pos_embed read as 44 tokens of text, as here, and 17x17 of"
        in said
    )
    # A run says how long its texts are.
    base, there = fake({"backbone/pos_embed": (334, 4)}, text_length=77)
    assert "read as" not in str(stages.compare(base, there, here, ConfigDict(), a_model(length=44)))


def test_the_hash_is_of_names_kinds_and_values():
    arrays = {"a": jnp.arange(6.0), "b": jnp.ones(2)}
    found = stages.params_hash(arrays)
    assert found == stages.params_hash(dict(reversed(arrays.items())))
    others = [{"a": arrays["a"]}, arrays | {"b": jnp.zeros(2)}, arrays | {"a": jnp.arange(6.0).reshape(2, 3)}]
    assert len({found, *map(stages.params_hash, others)}) == 4


def test_a_run_began_from_one_average_of_its_base(tmp_path):
    run = Workdir(tmp_path)

    def check(recorded, **named):
        run.start.write_text(json.dumps({"from": "/base", "step": 4, "ema": recorded}))
        stages.check_same_start(run, Start("/base", **named))

    for recorded in (None, "0.999", "power-0.05"):
        # The place alone names the run.
        check(recorded)
    check("0.999", ema="0.9990", step=4)
    check("power-0.05", ema="power-.05")
    check(None, ema="none")
    with pytest.raises(
        UserError, match=r"began from the raw weights of /base, not from EMA 0.999; .*--from_ema"
    ):
        check(None, ema=0.999)
    with pytest.raises(UserError, match=r"began from EMA 0.999 of /base, not from EMA power-0.05"):
        check("0.999", ema="power-0.05")


def test_checkpoints_of_a_run_without_config_and_metrics_stay(tmp_path):
    run = Workdir(tmp_path)
    run.start.write_text(json.dumps({"from": "/base", "step": 4, "ema": None}))
    for step in ("0", "500"):
        (run.checkpoints / step).mkdir(parents=True)
    stages.leave_out(run)
    assert (run.checkpoints / "500").exists()
    config = tiny(steps=2)
    with pytest.raises(UserError, match="has checkpoints but no config.json, and no metrics that say"):
        Run.open(config, run, ONE, None, Start("/base", 4))
    shutil.rmtree(run.checkpoints / "500")
    # A save that was cut short is none.
    (run.checkpoints / "0.orbax-checkpoint-tmp").mkdir()
    stages.leave_out(run)
    assert not run.checkpoints.exists()


@pytest.mark.slow
def test_a_start_cut_short_is_made_again_with_the_same_command_only(smoke_run, tmp_path, monkeypatch):
    config, folder = tiny(steps=2), tmp_path / "new"
    save = Checkpoints.save

    def killed(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", killed)
        begun(config, folder, smoke_run)
    assert (folder / "start.json").exists() and not (folder / "config.json").exists()
    with pytest.raises(UserError, match="was cut short before it had its weights; give the same command"):
        begun(config, folder, None)
    _, state = begun(config, folder, Start(str(smoke_run), 2))
    assert_same_bits(state.params, pipeline.load(smoke_run, step=2).params)
    assert json.loads((folder / "start.json").read_text())["step"] == 2


@pytest.mark.slow
def test_a_run_continues_without_its_base_and_as_if_never_killed(smoke_run, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(smoke_run, base)
    config = tiny(steps=6, checkpoint__every=4)
    whole = train(config, tmp_path / "whole", ONE, start=base)

    class Killed(BaseException):
        pass

    def stop(step):
        def update(self, at, loss=None):
            if at == step:
                raise Killed

        return update

    with monkeypatch.context() as patch, pytest.raises(Killed):
        # Between the first save, of step 0, and the next.
        patch.setattr("scaling_dit.training.loop.Progress.update", stop(2))
        train(config, tmp_path / "new", ONE, start=base)
    shutil.rmtree(base)
    assert [path.name for path in (tmp_path / "new/checkpoints").iterdir()] == ["0"]
    assert_same_bits(train(config, tmp_path / "new", ONE, start=base), whole)


LONGER = {"source__preset": "grid32", "text_encoder__length": 20}


@pytest.fixture(scope="module")
def longer(smoke_run, tmp_path_factory):
    """(workdir, parameters) of a run of more tokens that began from `smoke_run` on one device."""
    workdir = tmp_path_factory.mktemp("longer") / "one"
    return workdir, begun(tiny(**LONGER), workdir, smoke_run)[1].params


@pytest.mark.slow
def test_a_layout_that_splits_parameters_twice_begins_with_the_same_bits(smoke_run, longer, tmp_path):
    config = tiny(**LONGER, mesh__data=1, mesh__fsdp=2, mesh__tensor=2)
    run, many = begun(config, tmp_path / "many", smoke_run, jax.devices()[:4])
    place = "['backbone']['pos_embed']"
    one, found = leaves(longer[1]), leaves(many.params)
    # Interpolated on another number of devices, so up to rounding.
    np.testing.assert_allclose(one.pop(place), found.pop(place), rtol=1e-5, atol=1e-7)
    assert_same_bits(one, found)
    records = [json.loads((at / "start.json").read_text()) for at in (longer[0], tmp_path / "many")]
    assert records[0]["params_sha256"] == records[1]["params_sha256"]
    assert records[0]["resized"] == ["backbone/pos_embed"]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, run.program.state.params)
    assert jax.tree.map(lambda leaf: leaf.sharding, many.params) == shardings


@pytest.mark.slow
def test_a_larger_run_with_a_kept_table_is_the_base_at_its_resolution(smoke_run, tmp_path):
    config = tiny(steps=1, source__preset="grid32", backbone__table_side=2, diffusion__resolution_shift=2.0)
    _, state = begun(config, tmp_path / "new", Start(str(smoke_run), None, "0.995"))
    base = pipeline.load(smoke_run, ema=0.995)
    assert_same_bits(state.params, base.params)


@pytest.fixture(scope="module")
def frozen_base(tmp_path_factory):
    """The workdir of a run whose text encoder is frozen."""
    workdir = tmp_path_factory.mktemp("frozen") / "base"
    train(runs.tiny(steps=2, train_text_encoder=False, seed=3), workdir, ONE)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("gather", [False, True])
def test_a_frozen_text_encoder_becomes_trained(frozen_base, tmp_path, gather):
    shutil.copytree(frozen_base, tmp_path / "base")
    base = pipeline.load(tmp_path / "base")
    mesh = {"mesh__data": 1, "mesh__fsdp": 2, "sharding__gather_once": True} if gather else {}
    # Another seed: neither the backbone nor the text encoder may come from it.
    config = runs.tiny(steps=1, seed=4, optim__text_encoder_rate=0.1, optim__warmup_steps=0, **mesh)
    devices = jax.devices()[:2] if gather else ONE
    _, state = begun(config, tmp_path / "new", tmp_path / "base", devices)
    assert_same_bits(state.params, base.params | {"text_encoder": base.frozen["text_encoder"]})
    before = leaves(state.params)
    after = leaves(train(config, tmp_path / "new", devices).params)
    moved = {name: np.abs(after[name] - before[name]).max() for name in before}
    rate = config.optim.learning_rate
    words = max(value for name, value in moved.items() if "text_encoder" in name)
    rest = max(value for name, value in moved.items() if "backbone" in name)
    # Adam's first step moves every parameter by the rate.
    assert 0.05 * rate < words < 0.15 * rate and 0.5 * rate < rest < 1.5 * rate

    if gather:
        return
    # Frozen weights that are not those of the base's checkpoint: refused before there is a program.
    with np.load(tmp_path / "base/frozen.npz") as saved:
        changed = {name: value + 1 for name, value in saved.items()}
    np.savez(tmp_path / "base/frozen.npz", **changed)
    with pytest.raises(UserError, match="was trained with other frozen weights"):
        begun(config, tmp_path / "other", tmp_path / "base", devices)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_file_of_a_backbone_is_a_base(smoke_run, tmp_path):
    from safetensors.numpy import save_file

    pipe = pipeline.load(smoke_run)
    weights = interop.to_state_dict(pipe.model.backbone, {"params": pipe.params["backbone"]})
    file = tmp_path / "model.safetensors"
    save_file(weights, file)
    _, state = begun(tiny(train_text_encoder=False, source__preset="grid32"), tmp_path / "new", file)
    table = leaves(state.params["backbone"]).pop("['pos_embed']")
    assert table.shape == (1 + 16 + 16, 32)
    same = {k: v for k, v in leaves(state.params["backbone"]).items() if "pos_embed" not in k}
    assert_same_bits(same, {k: v for k, v in leaves(pipe.params["backbone"]).items() if "pos_embed" not in k})
    with pytest.raises(UserError, match="holds a backbone alone, and config.text_encoder has no weights"):
        begun(tiny(), tmp_path / "trained", file)
    del weights["norm.weight"]
    save_file(weights, file)
    with pytest.raises(UserError, match=r"norm\.weight"):
        begun(tiny(train_text_encoder=False), tmp_path / "short", file)
