"""Config: filling sections, typed overrides, checks, and the experiment files they come from."""

import dataclasses
import pickle
import re
import sys

import pytest
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit.config import schema
from scaling_dit.diffusion import predictions, samplers, schedules, time_sampling, weightings
from scaling_dit.errors import UserError

FIELDS = {
    "backbone": {
        "uvit": {
            "text_dim": 8,
            "in_channels": 4,
            "hidden": 64,
            "depth": 2,
            "long_skips": True,
            "size": "",
            "out_channels": None,
        },
        "mine:Net": {"hidden": 8, "depth": "deep", "ratios": (1, 2), "rate": 0.5},
    },
    "text_encoder": {"scratch": {"dim": 32}},
    "codec": {"pixels": {}},
    "source": {"shapes": {"seed": 0, "image_size": 16}, "folder:pictures": {"image_size": 32}},
}


@pytest.fixture(autouse=True)
def components(monkeypatch):
    """Known components, so that these tests do not follow the fields of the real ones."""

    def fields_of(section):
        def fields(name):
            if name not in FIELDS[section]:
                raise UserError(f"unknown {section} {name!r}")
            return dict(FIELDS[section][name])

        return fields

    known = {
        section: dataclasses.replace(component, fields_of=fields_of(section))
        for section, component in schema.COMPONENTS.items()
    }
    monkeypatch.setattr(schema, "COMPONENTS", known)


def resolve(*overrides, **sections):
    config = config_lib.defaults()
    for section, values in sections.items():
        config[section] = ConfigDict(values)
    return config_lib.resolve(config, [f"--config.{override}" for override in overrides])


def fails(match, *overrides, **sections):
    with pytest.raises(UserError, match=re.escape(match)) as caught:
        resolve(*overrides, **sections)
    assert "\n" not in str(caught.value)


# Filling


def test_sections_are_filled_under_the_values_set():
    config = resolve(backbone={"name": "uvit", "hidden": 7})
    own = {k: v for k, v in FIELDS["backbone"]["uvit"].items() if not schema.derived(f"backbone.{k}")}
    assert config.backbone.to_dict() == {"name": "uvit"} | own | {"hidden": 7}
    assert config.codec.to_dict() == {"name": "pixels"}


def test_missing_sections_take_the_defaults():
    config = config_lib.resolve(ConfigDict({"steps": 5, "optim": {"clip_norm": 2.0}}))
    assert (config.steps, config.optim.clip_norm, config.optim.b1) == (5, 2.0, 0.9)


def test_complete_leaves_its_argument_alone():
    config = config_lib.defaults()
    before = config_lib.dump(config)
    config_lib.complete(config)
    assert config_lib.dump(config) == before


def test_a_resolved_config_is_resolved_once(monkeypatch):
    config = resolve("optim.ema=(0.9,0.99)", "backbone.out_channels=3")
    text = config_lib.to_json(config)
    monkeypatch.delattr(schema, "defaults")
    assert config_lib.resolve(config) is config
    assert config_lib.to_json(config) == text


def test_a_copy_of_a_resolved_config_resolves_to_an_equal_one():
    config = resolve("optim.ema=(0.9,0.99)", "backbone.out_channels=3")
    for copy in (
        config.copy_and_resolve_references(),
        ConfigDict(config),
        pickle.loads(pickle.dumps(config)),
        config_lib.from_json(config_lib.to_json(config)),
    ):
        again = config_lib.resolve(copy)
        assert again is not copy
        assert again == config


def test_a_resolved_config_that_was_changed_is_checked_again():
    config = resolve()
    config.batch = 0
    with pytest.raises(UserError, match=r"config\.batch is 0"):
        config_lib.resolve(config)
    config.batch = 64
    with config.unlocked():
        config.unheard_of = 1
    with pytest.raises(UserError, match=r"config\.unheard_of: no such field"):
        config_lib.resolve(config)
    changed = resolve("optim.clip_norm=5")
    # Equal to 5.0, but no float: a saved config would differ.
    with changed.ignore_type():
        changed.optim.clip_norm = 5
    assert type(config_lib.resolve(changed).optim.clip_norm) is float


def test_overrides_of_a_resolved_config_leave_it_alone():
    config = resolve()
    assert config_lib.resolve(config, ["--config.steps=7"]).steps == 7
    assert config.steps == 1000


def test_a_resolved_config_is_locked():
    with pytest.raises((AttributeError, KeyError)):
        resolve().optim.new_field = 1


def test_unknown_fields_are_named_with_the_nearest():
    fails("config.backbone.hiden: no such field; did you mean 'backbone.hidden'?", backbone={"hiden": 3})
    fails("config.optim.clip: no such field; did you mean 'optim.clip_norm'?", optim={"clip": 3.0})


def test_fields_that_follow_from_others_are_no_fields():
    assert "text_dim" not in resolve().backbone
    fails("config.backbone.text_dim: it follows from the text encoder", backbone={"text_dim": 3})


def test_values_of_another_type():
    fails("config.backbone.hidden is 'wide', but its default 64 is of type int", backbone={"hidden": "wide"})
    with pytest.raises(UserError, match=r"config\.backbone is 'uvit'; set config\.backbone\.name"):
        config_lib.resolve(ConfigDict({"backbone": "uvit"}))


def test_an_int_is_a_float_where_one_is_expected():
    assert resolve(backbone={"name": "mine:Net", "rate": 2}).backbone.rate == 2.0


# Overrides


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("steps=12", "steps", 12),
        ("optim.learning_rate=1e-3", "optim.learning_rate", 1e-3),
        ("optim.learning_rate=1", "optim.learning_rate", 1.0),
        ("log.tensorboard=false", "log.tensorboard", False),
        ("log.tensorboard", "log.tensorboard", True),
        ("optim.ema=(0.9,0.99)", "optim.ema", (0.9, 0.99)),
        ("optim.ema=0.9", "optim.ema", (0.9,)),
        ("diffusion.schedule=cosine", "diffusion.schedule", "cosine"),
        ("backbone.size=h8-d2", "backbone.size", "h8-d2"),
        ("backbone.out_channels=6", "backbone.out_channels", 6),
        ("backbone.out_channels=None", "backbone.out_channels", None),
        ("mesh.data=-1", "mesh.data", -1),
    ],
)
def test_overrides_are_typed(override, key, value):
    found = config_lib.flatten(resolve(override))[key]
    assert found == value
    assert type(found) is type(value)


def test_no_prefix_negates_a_bool():
    config = config_lib.resolve(config_lib.defaults(), ["--noconfig.train_text_encoder"])
    assert config.train_text_encoder is False


def test_repeating_a_tuple_collects_and_repeating_a_number_takes_the_last():
    config = resolve("optim.ema=0.9", "optim.ema=0.99", "steps=3", "steps=4")
    assert config.optim.ema == (0.9, 0.99)
    assert config.steps == 4


@pytest.mark.parametrize(
    "override, message",
    [
        ("steps=1e3", "--config.steps=1e3: config.steps is 1000 and must stay an integer"),
        ("optim.b1=high", "must stay a number"),
        ("log.tensorboard=perhaps", "must stay true or false"),
        ("optim.b1", "must stay a number"),
        ("optim.ema=(0.9,", "must stay a tuple such as"),
        ("optim.lerning_rate=1", "no such field; did you mean 'optim.learning_rate'?"),
        ("learning_rate=1", "did you mean 'optim.learning_rate'?"),
        ("sample.learning_rate=1", "did you mean 'optim.learning_rate'?"),
        ("log.qqqqqq=1", "log has every, profile, tensorboard"),
        ("qqqqqq=1", "known: adapter, backbone, batch, buckets, captions"),
        ("log=1", "config.log is a section; set one of its fields, every, profile, tensorboard"),
        ("backbone.name=uvti", "unknown backbone 'uvti'"),
        (
            "backbone.text_dim=5",
            "--config.backbone.text_dim=5: it follows from the text encoder; set config.text_encoder.dim",
        ),
        ("backbone.in_channels=5", "it follows from the codec; set config.codec.name"),
    ],
)
def test_wrong_overrides(override, message):
    fails(message, override)


def test_a_components_name_is_seen_before_its_fields():
    config = resolve("backbone.ratios=(3,4)", "backbone.name=mine:Net", "backbone.rate=2")
    assert config.backbone.to_dict() == {
        "name": "mine:Net",
        "hidden": 8,
        "depth": "deep",
        "ratios": (3, 4),
        "rate": 2.0,
    }


def test_another_component_keeps_the_values_it_shares():
    # A user's own shares none, whatever its fields are called.
    given = {"name": "uvit", "hidden": 7, "depth": 3, "long_skips": False}
    config = resolve("backbone.name=mine:Net", backbone=given)
    assert config.backbone.to_dict() == {"name": "mine:Net"} | FIELDS["backbone"]["mine:Net"]
    assert resolve("backbone.name=uvit", backbone=given).backbone.depth == 3


def test_a_folder_keeps_its_path_in_the_name():
    config = resolve("source.name=folder:pictures", source={"name": "shapes", "seed": 3, "image_size": 8})
    assert config.source.to_dict() == {"name": "folder:pictures", "image_size": 8}


# Checks


def test_choices_are_what_the_diffusion_code_takes():
    assert schema.FIELDS["diffusion.schedule"].choices == schedules.SCHEDULES
    assert schema.FIELDS["diffusion.prediction"].choices == predictions.PREDICTIONS
    assert schema.FIELDS["diffusion.weighting"].choices == weightings.WEIGHTINGS
    assert schema.FIELDS["diffusion.time_sampling"].choices == time_sampling.TIME_SAMPLINGS
    assert schema.FIELDS["sample.sampler"].choices == tuple(samplers.SAMPLERS)


@pytest.mark.parametrize("interval", ["(1,)", "(500.0,400.0)", "(-1.0,400.0)", "(0.0,1001.0)", "('a','b')"])
def test_an_interval_of_guidance_is_two_timesteps_in_order(interval):
    fails("it must be two timesteps (low, high) from 0 to 1000", f"sample.guidance_interval={interval}")
    assert resolve("sample.guidance_interval=(100,900)").sample.guidance_interval == (100, 900)


def test_every_field_is_checked():
    # Checked with other fields, or by the part that reads it.
    own = {"optim.groups", "eval.metrics", "conditioning.names", "sample.ema", "adapter.targets"}
    # Any text.
    own |= {"compile_cache"}
    unchecked = {
        key
        for key, field in schema.FIELDS.items()
        if field.check is None and not field.choices and not isinstance(field.default, bool)
    }
    assert unchecked == own
    assert set(schema.FIELDS) | {f"{name}.name" for name in schema.COMPONENTS} == set(
        config_lib.flatten(config_lib.defaults())
    )


@pytest.mark.parametrize(
    "override, message",
    [
        ("diffusion.schedule=cosin", "config.diffusion.schedule is 'cosin'; did you mean 'cosine'?"),
        ("diffusion.prediction=u", "config.diffusion.prediction is 'u'; known: eps, flow, v, x0"),
        ("sample.sampler=dddim", "did you mean 'ddim'?"),
        ("steps=-3", "config.steps is -3; it must be at least 1"),
        ("batch=1048577", "config.batch is 1048577; it must be from 1 to 2**20 = 1,048,576"),
        ("sample.batch=99999999999", "config.sample.batch is 99999999999; it must be from 1 to 2**20"),
        ("batch=0", "config.batch is 0; it must be from 1 to 2**20"),
        ("log.profile=(5,4)", "config.log.profile is (5, 4); it must be () for none, or (first, last) step"),
        (
            "log.profile=(5000,5001)",
            "config.log.profile is (5000, 5001); it must begin at most at config.steps",
        ),
        ("rewind.factor=1", "config.rewind.factor is 1.0; it must be 0 for never, or more than 1"),
        ("optim.learning_rate=nan", "config.optim.learning_rate is nan; it must be a number"),
        ("optim.clip_norm=inf", "it must be 0 or more"),
        ("diffusion.caption_drop=1.5", "config.diffusion.caption_drop is 1.5; it must be from 0 to 1"),
        ("optim.b2=1", "config.optim.b2 is 1.0; it must be at least 0 and below 1"),
        ("optim.ema=(0.9,0.9)", "a tuple of different numbers between 0 and 1"),
        ("optim.ema=1.5", "a tuple of different numbers between 0 and 1"),
        (
            "optim.accumulate=3",
            "config.batch is 128; it must be a multiple of config.optim.accumulate, which is 3",
        ),
        ("mesh.fsdp=-1", "config.mesh has -1 on more than one axis"),
        ("mesh.tensor=0", "config.mesh.tensor is 0; it must be at least 1, or -1 for the remaining devices"),
        ("sample.steps=2000", "config.sample.steps is 2000; it must be from 1 to 999"),
        ("sample.ema=0.5", "config.sample.ema is 0.5; it must be 0 (raw weights)"),
        ("optim.groups=(('(', 1, 1),)", "config.optim.groups holds ('(', 1, 1); a group is (regex"),
        ("optim.groups=(('text', -1, 0),)", "config.optim.groups holds ('text', -1, 0)"),
        ("optim.groups=('text',)", "config.optim.groups holds 'text'"),
        ("optim.groups=(('text', 1),)", "config.optim.groups holds ('text', 1)"),
    ],
)
def test_values_out_of_range(override, message):
    fails(message, override)


def test_sampling_uses_the_average_of_the_largest_decay():
    assert resolve("optim.ema=(0.9,0.99,0.5)").sample.ema == 0.99
    assert resolve("optim.ema=()").sample.ema == 0
    assert resolve("optim.ema=(0.9,0.99)", "sample.ema=0.9").sample.ema == 0.9
    assert resolve("sample.ema=0").sample.ema == 0


def test_a_group_of_nan_is_refused():
    with pytest.raises(UserError, match="the numbers must be 0 or more"):
        config_lib.parse_group(("text", float("nan"), 0.0))


def test_parameter_groups_pass():
    groups = (("text_encoder/.*", 0.1, 0.0),)
    assert resolve(f"optim.groups={groups!r}").optim.groups == groups


# Text and JSON


def test_dump_is_sorted_and_complete():
    lines = config_lib.dump(resolve("optim.ema=(0.5,)")).splitlines()
    assert lines == sorted(lines)
    assert "optim.ema = (0.5,)" in lines
    assert "backbone.out_channels = None" in lines
    assert len(lines) == len(config_lib.flatten(resolve()))


def test_json_round_trip():
    config = resolve("optim.groups=(('a', 1.0, 0.0),)", "optim.clip_norm=5", "backbone.out_channels=3")
    again = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.dump(again) == config_lib.dump(config)
    assert config_lib.to_json(again) == config_lib.to_json(config)
    assert type(again.optim.clip_norm) is float


def test_damaged_json():
    with pytest.raises(UserError, match="not valid JSON"):
        config_lib.from_json("{")


# One workdir, one run


def test_the_same_run_may_change_how_it_runs():
    saved = config_lib.from_json(config_lib.to_json(resolve()))
    free = (
        "mesh.fsdp=2",
        "loader.threads=1",
        "log.every=7",
        "eval.prompts=3",
        "checkpoint.every=9",
        "sample.steps=3",
        "log.profile=(3,4)",
        "rewind.factor=3.0",
        "rewind.back=9",
    )
    config_lib.check_same_run(saved, resolve(*free))


def test_a_run_of_constant_learning_rate_may_be_resumed_for_longer():
    saved = resolve("optim.decay=constant")
    config_lib.check_same_run(saved, resolve("optim.decay=constant", "steps=2000"))
    with pytest.raises(UserError, match="steps is 1000 there and 500 here"):
        config_lib.check_same_run(saved, resolve("optim.decay=constant", "steps=500"))
    with pytest.raises(UserError, match="steps is 1000 there and 2000 here"):
        config_lib.check_same_run(resolve("optim.decay=cosine"), resolve("optim.decay=cosine", "steps=2000"))


def test_another_run_is_refused_with_the_differences():
    saved = config_lib.from_json(config_lib.to_json(resolve()))
    with pytest.raises(
        UserError, match=r"batch is 128 there and 64 here, steps is 1000 there and 5 here; give another"
    ):
        config_lib.check_same_run(saved, resolve("steps=5", "batch=64"))


def test_many_differences_are_cut_short_and_absent_fields_are_named():
    saved = config_lib.from_json(config_lib.to_json(resolve()))
    with pytest.raises(UserError) as caught:
        config_lib.check_same_run(saved, resolve("backbone.name=mine:Net", "steps=5"))
    assert "backbone.depth is 2 there and 'deep' here" in str(caught.value)
    assert "backbone.long_skips is True there and 'absent' here" in str(caught.value)
    assert "and 6 more; give another --workdir" in str(caught.value)


# Experiment files

EXPERIMENT = """
from ml_collections import ConfigDict
from scaling_dit import config as config_lib
ARGUMENTS = ("small", "large")
def get_config(arg=""):
    config = config_lib.defaults()
    config.steps = {"": 10, "small": 20, "large": 30}[arg]
    return config
"""


@pytest.fixture
def experiments(tmp_path, monkeypatch):
    """A working directory with an experiments/ folder; returns a function that writes a file there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()

    def write(text, name="mine.py"):
        (tmp_path / "experiments" / name).write_text(text)
        return f"experiments/{name}"

    return write


def test_an_experiment_by_path_by_name_and_with_an_argument(experiments):
    path = experiments(EXPERIMENT)
    assert config_lib.load(path).steps == 10
    assert config_lib.load(f"{path}:small").steps == 20
    assert config_lib.load("mine:large", ["--config.batch=64"]).to_dict()["batch"] == 64
    assert config_lib.load("mine").steps == 10


def test_an_installed_experiment_comes_before_the_working_directory(experiments, tmp_path, monkeypatch):
    installed = tmp_path / "installed"
    installed.mkdir()
    (installed / "mine.py").write_text(EXPERIMENT.replace("10", "77"))
    package = type(sys)("scaling_dit.experiments")
    package.__path__ = [str(installed)]
    monkeypatch.setitem(sys.modules, "scaling_dit.experiments", package)
    monkeypatch.delitem(sys.modules, "scaling_dit.experiments.mine", raising=False)
    experiments(EXPERIMENT)
    try:
        assert config_lib.load("mine").steps == 77
    finally:
        sys.modules.pop("scaling_dit.experiments.mine", None)


@pytest.mark.parametrize(
    "text, spec, message",
    [
        (
            EXPERIMENT,
            "experiments/mien.py",
            "no file experiments/mien.py; did you mean 'experiments/mine.py'?",
        ),
        (EXPERIMENT, "nowhere/mine.py", "no file nowhere/mine.py"),
        (EXPERIMENT, "mien", "no experiment 'mien'; did you mean 'mine'?"),
        (EXPERIMENT, "mine-1", "give a name such as shapes, or path/to/file.py"),
        (EXPERIMENT, "mine:smal", "has no argument 'smal'; did you mean 'small'?"),
        ("x = 1", "mine", "has no get_config"),
        ("def get_config():\n    return None", "mine", "returned NoneType; it must return a ConfigDict"),
        ("def get_config():\n    return None", "mine:small", "takes no argument; leave out ':small'"),
        ("def get_config(:\n", "mine", "line 1: invalid syntax"),
        (EXPERIMENT.replace("config.steps", "config.optm.steps"), "mine", "line 7: "),
        (
            EXPERIMENT.replace("config.steps", "config.stpes"),
            "mine",
            "config.stpes: no such field; did you mean 'steps'?",
        ),
        (
            EXPERIMENT.replace("config.steps", "config.seed = 'a'; _"),
            "mine",
            "Could not override field 'seed'",
        ),
    ],
)
def test_wrong_experiments(experiments, text, spec, message):
    experiments(text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        config_lib.load(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("\nimport nosuchmodule\n", "line 2: ModuleNotFoundError: No module named 'nosuchmodule'"),
        ("def get_config():\n    return len(3)\n", "line 2: TypeError: object of type 'int' has no len()"),
        ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_names_the_line_of_an_experiment(experiments, text, message):
    path = experiments(text)
    with pytest.raises(UserError, match=re.escape(f"{path}, {message}")) as caught:
        config_lib.load(path)
    assert caught.value.__cause__ is not None


def test_arguments_of_an_experiment():
    module = type(sys)("experiment")
    assert config_lib.experiment_arguments(module) == ("",)
    module.ARGUMENTS = ("a", "b")
    assert config_lib.experiment_arguments(module) == ("", "a", "b")
