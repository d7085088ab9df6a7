"""Members are derived by replacement, named by what they are, and matched in cost as costs/ counts it."""

import pytest

from scaling_dit import config as config_lib
from scaling_dit import count
from scaling_dit.errors import UserError
from scaling_dit.scaling import ladder


@pytest.fixture(scope="module")
def base():
    config = config_lib.load("experiments/shapes.py:smoke", ["--config.optim.decay=constant"])
    return ladder.derive(config, {}, "uvit")


def test_a_member_is_the_base_with_fields_replaced(base):
    made = ladder.derive(
        base.config, {"optim.learning_rate": 2e-3, "source.scenes": 300}, "m", {"size": "tiny"}
    )
    before, after = (config_lib.flatten(one) for one in (base.config, made.config))
    assert {key for key in after if after[key] != before[key]} == {"optim.learning_rate", "source.scenes"}
    assert made.groups == {"family": "uvit", "size": "tiny"}
    # The base stays as it was.
    assert base.config.source.scenes == 0


def test_a_section_is_replaced_whole(base):
    made = ladder.derive(
        base.config, {"backbone": {"name": "pixart", "hidden": 32, "depth": 1, "heads": 2}}, "p"
    )
    assert made.config.backbone.name == "pixart" and "long_skips" not in made.config.backbone
    # A default, not the base's patch of 8.
    assert made.config.backbone.patch == 2


def test_width_keeps_the_size_of_heads_and_depth_keeps_the_width(base):
    wide, deep = ladder.widths(base, (64,))[0], ladder.depths(base, (4,))[0]
    assert (wide.name, wide.config.backbone.hidden, wide.config.backbone.heads) == ("uvit-w64", 64, 4)
    assert (deep.name, deep.config.backbone.hidden, deep.config.backbone.depth) == ("uvit-d4", 32, 4)
    assert wide.groups["width"] == "64" and deep.groups["depth"] == "4"
    with pytest.raises(UserError, match="width 40 is no multiple of the head size 16"):
        ladder.widths(base, (40,))


def test_data_and_captions(base):
    few, every = ladder.data_sizes(base, (300, 0))
    assert (few.name, few.config.source.scenes, every.name) == ("uvit-n300", 300, "uvit-nall")
    (wrong,) = ladder.captions(base, {"wrong": {"source.wrong_caption_rate": 0.3}})
    assert wrong.config.source.wrong_caption_rate == 0.3 and wrong.groups["captions"] == "wrong"


def test_costs_are_those_of_count(base):
    from scaling_dit import backbones

    found = ladder.cost(base.config)
    section = config_lib.flatten(base.config.backbone)
    theirs = count(backbones.create_for(in_channels=3, text_dim=32, **section), (16, 16, 3), (16, 32))
    assert (found.params, found.macs_total) == (theirs.params, theirs.macs_total)
    assert found.train_flops() == theirs.train_flops(base.config.batch, base.config.steps)
    assert found.train_flops(2, paper=True) == theirs.train_flops(base.config.batch, 2, "paper")
    # 4 steps with guidance: two calls each.
    assert found.inference_flops == 2 * theirs.macs_total * 4 * 2
    heun = ladder.derive(base.config, {"sample.sampler": "heun", "sample.guidance": 1.0}, "h")
    assert ladder.cost(heun.config).inference_flops == 2 * theirs.macs_total * (2 * 4 - 1)


@pytest.mark.parametrize(
    "number, label",
    [
        (586_994_852, "0.6B"),
        (2_344_200_356, "2.3B"),
        (8.0e9, "8B"),
        (1.12e6, "1.1M"),
        (54_292, "54.3K"),
        (12, "12"),
    ],
)
def test_names_say_the_size(number, label):
    assert ladder.size_label(number) == label


def test_names_say_the_budget(base):
    assert ladder.flops_label(3e20) == "3e20" and ladder.flops_label(1.5e12) == "1.5e12"
    assert ladder.auto_name(base.config) == "uvit-54.3K-1.9e8"


def test_an_isoflop_grid_spends_each_budget_within_one_percent(base):
    sizes = ladder.widths(base, (32, 64))
    grid = ladder.isoflop(sizes, (1e10, 4e10))
    assert len(grid) == 4 and len({member.name for member in grid}) == 4
    for member in grid:
        budget = float(member.groups["budget"])
        assert ladder.cost(member.config).train_flops() == pytest.approx(budget, rel=0.01)
    with pytest.raises(UserError, match=r"are 2\.\d steps of .*; raise the budget to at least"):
        ladder.at_compute(base, 1e8)


@pytest.fixture(scope="module")
def pixart(base):
    row = {"name": "pixart", "hidden": 48, "depth": 1, "heads": 2, "patch": 8}
    return ladder.derive(base.config, {"backbone": row}, "pixart")


def test_members_are_matched_in_compute(base, pixart):
    long = ladder.derive(base.config, {"steps": 400}, "uvit")
    by_compute = ladder.matched((long, pixart), "compute")
    assert ladder.spread(by_compute, "compute") < 1.01 < ladder.spread(by_compute, "params")
    assert [member.name for member in by_compute] == ["uvit", "pixart"]
    with pytest.raises(UserError, match="by is 'width'"):
        ladder.matched((long,), "width")


@pytest.mark.slow
@pytest.mark.parametrize("by", ["params", "inference"])
def test_members_are_matched_by_their_width(base, pixart, by):
    made = ladder.matched((base, pixart), by, tolerance=0.25)
    assert ladder.spread(made, by) < 1.6 and made[1].config.backbone.hidden % 8 == 0
    with pytest.raises(UserError, match=r"no width comes within 0% of 1e\+05; the nearest"):
        ladder.matched((pixart,), by, 1e5, tolerance=0.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"backbone.hiden": 64}, "config.backbone.hiden: no such field; did you mean 'backbone.hidden'?"),
        ({"nothing": 1}, "config.nothing: no such field"),
        ({"steps": "many"}, "config.steps is 'many'"),
        ({"batch": 0}, "config.batch is 0"),
    ],
)
def test_mistakes_are_one_line(base, changes, message):
    with pytest.raises(UserError, match=message) as error:
        ladder.derive(base.config, changes, "m")
    assert "\n" not in str(error.value)
