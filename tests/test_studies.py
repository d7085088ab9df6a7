"""Every study file of the project resolves every member that it names."""

import ast
import importlib
import types

import pytest
from scaling_dit.experiments.studies import _shapes

from scaling_dit.config import experiment_files
from scaling_dit.model.build import build_model, countable_tokenizer
from scaling_dit.scaling import ladder, member_runs
from scaling_dit.scaling import spec as spec_lib
from scaling_dit.training import stage_configs
from tests.support.paths import ROOT

FOLDER = ROOT / "experiments" / "studies"
# Those count backbones, or resolve dozens of members.
HEAVY = {
    ("shapes_core", ""),
    ("emoji_core", ""),
    ("shapes_full", ""),
    ("shapes_large", ""),
    ("p2_families", "compute"),
    ("editing_shapes", ""),
    ("editing_shapes", "edges"),
    ("editing_shapes", "edit"),
}


def arguments():
    found = []
    for name in experiment_files.installed_names(spec_lib.STUDY):
        module = importlib.import_module(f"{spec_lib.STUDY.package}.{name}")
        first = [""] if name != "p2_ablations" else []
        found += [(name, argument) for argument in (*first, *getattr(module, "ARGUMENTS", ()))]
    return found


@pytest.mark.parametrize(
    "name, argument",
    [
        pytest.param(*one, marks=[pytest.mark.slow] if one in HEAVY else [], id=":".join(filter(None, one)))
        for one in arguments()
    ],
)
def test_every_member_of_every_study_resolves(name, argument):
    spec = spec_lib.load(f"{name}:{argument}" if argument else name)
    assert len(spec.members) >= 2
    assert len(set(map(spec_lib.member_hash, spec.members))) == len(spec.members)
    seed = spec.seeds[-1]
    for member in spec.members:
        config = spec.run_config(member, seed)
        assert config.seed == seed and config.eval.every * spec.points >= config.steps
    # The other studies use the same data and as many prompts, so these are enough. The emoji, which a user makes first,
    # are not here.
    if (name, argument) in {*HEAVY, ("p1_batch", "")} - {("emoji_core", "")}:
        member_runs.check(spec, spec.members)


def test_study_files_are_short_and_say_what_they_are():
    paths = sorted(FOLDER.glob("[!_]*.py"))
    assert len(paths) == 17
    for path in paths:
        text = path.read_text()
        assert len(text.splitlines()) < 120
        docstring = ast.get_docstring(ast.parse(text))
        question = docstring.splitlines()[0]
        assert "?" in question and "scaling-dit study --config=" in docstring, path
        assert "Slice: " in docstring and "Expect" in docstring, path


def test_conditions_as_tokens_and_channels_are_compared_at_equal_steps_and_at_equal_compute():
    spec = spec_lib.load("editing_shapes:smoke")
    token, channel, long = (
        ladder.cost(spec.member(name).config) for name in ("token", "channel", "channel-long")
    )
    assert token.steps == channel.steps < long.steps
    assert long.train_flops() == pytest.approx(token.train_flops(), rel=0.01)
    # Four more tokens of 32 numbers beside 21, in two blocks.
    assert token.macs_total > 1.1 * channel.macs_total
    assert all(claim.paired for claim in spec.claims)


@pytest.mark.slow
def test_members_of_the_core_study_are_matched():
    """Families of one size have equal training FLOPs within 1 %, and parameters within a tenth of their mean."""
    spec = spec_lib.load("shapes_core")
    for size in ("0.4M", "1M"):
        plain = [member for member in spec.members if "captions" not in member.groups]
        members = [member for member in plain if member.groups["size"] == size]
        assert len(members) == 6
        assert ladder.spread(members, "compute") < 1.01
        params = [ladder.cost(member.config).params for member in members]
        assert max(abs(p / (sum(params) / 6) - 1) for p in params) < 0.1, dict(
            zip(members, params, strict=True)
        )
    wide, deep = spec.member("unet-wide"), spec.member("unet-deep")
    # The deep one has the fewer.
    assert 1 <= ladder.cost(wide.config).params / ladder.cost(deep.config).params < 1.12
    assert ladder.spread((wide, deep), "compute") < 1.01


def test_p1_continues_its_narrow_unets_at_512_px():
    spec = spec_lib.load("p1_resolution")
    for row in ("sdxl-c128", "sdxl-c192"):
        base, stage = (spec.member(f"{row}-{side}px") for side in (256, 512))
        assert stage.base == base.name and stage.config.source.image_size == 2 * base.config.source.image_size
        there = types.SimpleNamespace(start="base", config=base.config, trains_text=False)
        model = build_model(stage.config, countable_tokenizer(stage.config))
        # A stage may begin from it: nothing that it computes with differs.
        stage_configs.check_configs(there, stage.config, model)


def test_mup_has_heads_of_one_size_and_costs_nothing():
    """As in `shapes_full`, whose other members take their time to resolve."""
    config = _shapes.base()
    rows = [{"hidden": width, "depth": 1, "heads": 4} for width in (48, 160)]
    sizes = [
        ladder.derive(config, {"backbone": _shapes.section("uvit", row, 4)}, f"s{row['hidden']}")
        for row in rows
    ]
    *made, without = _shapes.by_mup(sizes)
    assert [one.name for one in (*made, without)] == ["s48-mup", "s160-mup", "s160-h16"]
    for plain, one in zip(sizes, made, strict=True):
        assert one.config.optim.mup_base == 48 and one.config.backbone.hidden == plain.config.backbone.hidden
        assert one.config.backbone.hidden // one.config.backbone.heads == 16
        assert one.config.optim.learning_rate == plain.config.optim.learning_rate
        assert ladder.cost(one.config).train_flops() == ladder.cost(plain.config).train_flops()
    assert without.config.optim.mup_base == 0
    assert without.config.backbone == made[-1].config.backbone
