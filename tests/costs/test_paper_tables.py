"""Every named size of the two papers: exact parameters, multiply-accumulates in both conventions, printed digits.

The expected numbers were made with the reference models on torch's meta device and torch's FlopCounterMode (UNets and
PixArt: diffusers; U-ViT: the published code) or with closed forms checked against them (Large-DiT, Next-DiT).
"""

import pytest

from scaling_dit import backbones
from scaling_dit.costs.count import count
from tools import model_table
from tools.model_table import PRINTED, REASONS, T5, Row

# UNets take seconds to trace.
FAST = {"sdxl-td4_4"}
# Of PixArt both kinds of text and the largest; of U-ViT the smallest and the largest.
FAST |= {"h1152-d28", "h3072-d28", "h512-d12-n8", "h3072-d56-n16"}

# Parameters, GMACs of convolutions and linear layers, with the products inside attention, of attention by P1's rule.
UNETS = [
    (Row("unet", "sd2"), 865_910_724, 86.3, 90.5, 34.0),
    (Row("unet", "sd2-c512"), 2_191_746_564, 218.9, 225.8, 85.0),
    (Row("unet_if", "if-xl-c512"), 2_035_698_692, 193.4, 202.9, 23.2),
    (Row("unet_if", "if-xl"), 3_823_523_972, 363.6, 376.7, 42.0),
    (Row("unet", "sdxl-c128"), 423_971_332, 34.9, 35.9, 22.9),
    (Row("unet", "sdxl-c192"), 902_336_260, 74.5, 76.0, 48.2),
    (Row("unet", "sdxl"), 2_391_824_644, 198.3, 200.8, 126.4),
    (Row("unet", "sdxl-c384"), 3_402_948_100, 282.4, 285.4, 179.4),
    (Row("unet", "sdxl-td2"), 849_373_444, 98.0, 99.4, 42.9),
    (Row("unet", "sdxl-td4"), 1_234_986_244, 123.1, 124.7, 63.8),
    (Row("unet", "sdxl-td12"), 2_777_437_444, 223.4, 226.1, 147.3),
    (Row("unet", "sdxl-td14"), 3_163_050_244, 248.4, 251.5, 168.2),
    (Row("unet", "sdxl-td4_4"), 1_321_930_244, 143.0, 145.7, 83.7),
    (Row("unet", "sdxl-td4_8"), 2_093_155_844, 193.1, 196.4, 125.4),
    (Row("unet", "sdxl-td4_12"), 2_864_381_444, 243.2, 247.1, 167.2),
    (Row("unet", "sdxl-c384-td4_12"), 4_072_645_636, 346.3, 350.9, 237.4),
]
# Parameters, GMACs of convolutions and linear layers, and of all products where the reference was counted.
TRANSFORMERS = [
    (Row("pixart", "h1152-d28", T5), 610_837_648, 142.8, None),
    (Row("pixart", "h1152-d28"), 607_298_704, 139.1, None),
    (Row("pixart", "h1536-d28"), 1_078_691_344, 247.3, None),
    (Row("pixart", "h1024-d28"), 477_953_040, 109.8, None),
    (Row("pixart", "h1024-d56"), 948_259_856, 219.5, None),
    (Row("pixart", "h2048-d28"), 1_916_405_776, 439.5, None),
    (Row("pixart", "h2304-d28"), 2_424_916_240, None, None),
    (Row("pixart", "h3072-d28"), 4_309_060_624, None, None),
    (Row("uvit", "h512-d12-n8"), 44_823_716, None, None),
    (Row("uvit", "h512-d16-n8"), 58_476_708, None, None),
    (Row("uvit", "h1024-d20-n16"), 286_865_572, 95.4, 100.1),
    (Row("uvit", "h1024-d28-n16"), 396_003_492, 131.8, 138.4),
    (Row("uvit", "h1152-d28-n16"), 500_947_364, 166.8, 174.2),
    (Row("uvit", "h1024-d42-n16"), 586_994_852, 195.5, 205.3),
    (Row("uvit", "h1024-d56-n16"), 777_986_212, 259.3, 272.3),
    (Row("uvit", "h1536-d28-n16"), 889_703_588, 296.4, 306.4),
    (Row("uvit", "h1536-d42-n16"), 1_319_321_252, 439.8, 454.6),
    (Row("uvit", "h2048-d28-n16"), 1_580_535_972, 526.9, 540.2),
    (Row("uvit", "h2048-d42-n16"), 2_344_200_356, 781.9, 801.5),
    (Row("uvit", "h2560-d42-n16"), 3_661_632_164, 1221.6, 1246.2),
    (Row("uvit", "h3072-d56-n16"), 6_989_635_748, 2332.8, 2371.8),
]
# With a learned variance and the published code's padding token: `hidden` parameters that large_dit does not have.
LUMINA = [
    ("large_dit", "h1024-d16-n16", 344_500_512, 58.6),
    ("large_dit", "h1024-d28-n16", 599_488_992, 102.5),
    ("large_dit", "h1536-d16-n32", 660_263_968, 127.3),
    ("large_dit", "h2048-d28-n16", 1_915_907_552, 400.7),
    ("large_dit", "h3072-d32-n32", 4_439_413_792, 1001.8),
    ("large_dit", "h4096-d32-n32", 7_562_586_144, 1783.0),
    ("next_dit", "h2304-d24-n32", 1_874_203_168, 400.4),
]
LUMINA_FAST = {"h4096-d32-n32", "h2304-d24-n32"}


def slow_unless_fast(rows):
    return [
        pytest.param(*row, id=row[0].label, marks=[] if row[0].size in FAST else pytest.mark.slow)
        for row in rows
    ]


@pytest.mark.parametrize("row, params, paper, total, attention", slow_unless_fast(UNETS))
def test_unets(row, params, paper, total, attention):
    found = model_table.counted(row)
    assert found.params == params
    assert found.macs_paper / 1e9 == pytest.approx(paper, abs=0.1)
    assert found.macs_total / 1e9 == pytest.approx(total, abs=0.1)
    assert model_table.attention_macs(row) / 1e9 == pytest.approx(attention, abs=0.1)
    assert_as_printed(row)


@pytest.mark.parametrize("row, params, paper, total", slow_unless_fast(TRANSFORMERS))
def test_transformers(row, params, paper, total):
    found = model_table.counted(row)
    assert found.params == params
    assert paper is None or found.macs_paper / 1e9 == pytest.approx(paper, abs=0.1)
    assert total is None or found.macs_total / 1e9 == pytest.approx(total, abs=0.1)
    assert_as_printed(row)


@pytest.mark.slow
def test_the_official_sdxl():
    """Its text is 2048 wide, and it reads pooled text and sizes."""
    assert model_table.counted(Row("unet", "sdxl-official", (77, 2048))).params == 2_567_463_684


def assert_as_printed(row):
    """Every printed digit, but for the cells of REASONS, which do differ."""
    wrong = [name for (label, name) in REASONS if label == row.label]
    assert model_table.differences(row) == wrong


@pytest.mark.parametrize(
    "name, size, params, paper",
    # The largest of the one, and the other.
    [pytest.param(*row, marks=[] if row[1] in LUMINA_FAST else pytest.mark.slow) for row in LUMINA],
)
def test_large_dit_and_next_dit(name, size, params, paper):
    backbone = backbones.create(name, size=size, learn_sigma=True, scan_layers=True)
    hidden = backbone.widths[0]
    found = count(backbone)
    assert found.params == params - (hidden if name == "large_dit" else 0)
    assert found.macs_paper / 1e9 == pytest.approx(paper, abs=0.1)
    plain = model_table.counted(Row(name, size))
    assert found.params - plain.params == 4 * 4 * (hidden + 1)


def test_every_size_printed_row_and_reason_is_tested():
    tested = {row for row, *_ in UNETS + TRANSFORMERS}
    assert set(PRINTED) <= tested
    sizes = {(row.backbone, row.size) for row in tested} | {(name, size) for name, size, *_ in LUMINA}
    named = {(name, size) for name in model_table.TITLES for size in model_table.sizes(name)}
    # It has a test of its own.
    assert named - sizes == {("unet", "sdxl-official")}
    assert {label for label, _ in REASONS} <= {row.label for row in PRINTED}


@pytest.mark.slow
def test_the_efficient_unet_is_as_much_smaller_as_the_paper_says():
    sdxl, efficient = (model_table.counted(Row("unet", size)) for size in ("sdxl", "sdxl-td4_4"))
    assert round(100 * (1 - efficient.params / sdxl.params)) == 45
    assert round(100 * (1 - efficient.macs_paper / sdxl.macs_paper)) == 28


@pytest.mark.parametrize("row", [row for row, *_ in UNETS if row.size in FAST], ids=lambda row: row.label)
def test_the_page_has_the_rows(row):
    """A row that changes is seen at once; the whole page is compared by the slow test below."""
    assert model_table.line(row) in model_table.PAGE.read_text().splitlines()


@pytest.mark.slow
def test_the_page_is_up_to_date():
    assert model_table.PAGE.read_text() == model_table.page(), "run python -m tools.model_table"
