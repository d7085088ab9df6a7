"""What the pages on backbones, evaluation and sampling state is what the code has; their figures are the script's."""

import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from scaling_dit import backbones
from scaling_dit.backbones.declared import built_in_diffusers
from scaling_dit.config.metrics import COMMON
from scaling_dit.data.shapes.source import ShapesSource
from scaling_dit.diffusion.predictions import PREDICTIONS
from scaling_dit.diffusion.samplers import SAMPLERS
from scaling_dit.diffusion.schedules import SCHEDULES, make_schedule
from scaling_dit.diffusion.time_sampling import TIME_SAMPLINGS
from scaling_dit.diffusion.weightings import WEIGHTINGS
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.scoring import Scoring, score
from tests.support.pages import blocks, first_column
from tests.support.paths import DOCS
from tools import diagram, figures

FAMILIES = built_in_diffusers()
NAMES = sorted(backbones.BACKBONES)
TRANSFORMERS = ("large_dit", "next_dit", "pixart", "uvit")
SVG = "{http://www.w3.org/2000/svg}"


def codes(page, heading):
    """The code words in the first cells of the table under a heading."""
    return [word for cell in first_column(page, heading) for word in re.findall(r"`(.+?)`", cell)]


@pytest.fixture(scope="module", params=NAMES)
def drawn(request):
    """A figure's name, and its canvas."""
    canvas = figures.FIGURES[request.param]()
    yield request.param, canvas
    diagram.plt.close(canvas.figure)


def svg_texts(svg):
    """Every text of a figure with its place, to a hundredth of a point."""
    found = []
    for element in ET.fromstring(svg.encode()).iter(f"{SVG}text"):
        place = element.get("transform") or f"translate({element.get('x')} {element.get('y')})"
        numbers = [round(float(number), 2) for number in re.findall(r"-?[\d.]+", place)]
        found.append((element.text, numbers[:2]))
    return found


def test_every_backbone_has_its_page_and_figure():
    assert sorted(figures.FIGURES) == NAMES
    assert sorted(path.stem for path in (DOCS / "backbones").glob("*.md")) == sorted([*NAMES, "index"])


def test_texts_fit_their_boxes_and_do_not_touch(drawn):
    _, canvas = drawn
    renderer = canvas.figure.canvas.get_renderer()
    to_units = canvas.axes.transData.inverted()
    width, height = canvas.axes.get_xlim()[1], canvas.axes.get_ylim()[1]
    extents = []
    for text, box in canvas.texts:
        (left, low), (right, high) = to_units.transform(text.get_window_extent(renderer).get_points())
        assert left > 0 and right < width and low > 0 and high < height, text.get_text()
        if box is not None:
            assert left >= box.left[0] + 2 and right <= box.right[0] - 2, text.get_text()
            assert low >= box.bottom[1] and high <= box.top[1], text.get_text()
        # Lines of one box stand close.
        extents.append((left, low + 2, right, high - 2, text.get_text()))
    assert len(extents) > 20
    for (l1, b1, r1, t1, one), (l2, b2, r2, t2, other) in itertools.combinations(extents, 2):
        assert r1 <= l2 or r2 <= l1 or t1 <= b2 or t2 <= b1, (one, other)


def test_the_committed_figure_is_the_script_s(drawn):
    name, canvas = drawn
    committed = (figures.IMAGES / f"{name}.svg").read_text()
    made = canvas.svg()
    assert svg_texts(committed) == svg_texts(made), "run `make figures`"
    assert committed.count("<path") == made.count("<path")
    assert len(committed) < 60_000


@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_s_page(name):
    page = f"backbones/{name}.md"
    text = (DOCS / page).read_text()
    assert f"](../images/{name}.svg)" in text
    headings = re.findall(r"^## (.+)", text, re.MULTILINE)
    ending = ["What the papers say", "Text mask", "Fields", "Weights", "Example"]
    assert headings[0] == "Equations" and [h for h in headings if h in ending] == ending

    known = backbones.backbone_fields(name)
    shared = codes("backbones/index.md", "Fields of all") + (
        codes("backbones/index.md", "Fields of the transformers") if name in TRANSFORMERS else []
    )
    scanned = ["scan_layers"] if name in TRANSFORMERS else []
    assert sorted([*shared, *scanned, *codes(page, "Fields")]) == sorted(known)
    assert f"default is `{known['size']}`" in text or name == "next_dit"

    writes = "`--to=diffusers` writes a folder for" in text
    assert writes == (name in FAMILIES)
    if writes:
        assert f"`{FAMILIES[name].class_name}`" in text.split("## Weights")[1]


@pytest.mark.parametrize("name", NAMES)
def test_defaults_on_the_pages(name):
    """Cells that are plain values are the fields' defaults."""
    known = backbones.backbone_fields(name)
    rows = re.findall(
        r"^\| `(\w+)` \| `?(\w+)`? \|", (DOCS / f"backbones/{name}.md").read_text(), re.MULTILINE
    )
    rows += re.findall(
        r"^\| `(\w+)` \| `?(\w+)`? \|", (DOCS / "backbones/index.md").read_text(), re.MULTILINE
    )
    compared = {field: value for field, value in rows if field in known and known[field] is not None}
    assert len(compared) > 4
    assert {field: str(known[field]) for field in compared} == compared


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("unet")) for name in NAMES]
)
def test_the_example_of_a_backbone_prints_what_it_says(name, capsys):
    (example,) = blocks("python", f"backbones/{name}.md")
    exec(example, {})
    assert capsys.readouterr().out.strip() == re.search(r"# (\d+)$", example.strip()).group(1)


def test_the_start_page_leads_to_every_page():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - {"index.md"}
    assert set(re.findall(r"\]\(([\w/]+\.md)\)", (DOCS / "index.md").read_text())) == pages


def test_what_an_evaluation_writes_is_explained():
    source = ShapesSource(preset="grid16")
    metric = METRICS["shapes_tifa"]()
    items = metric.items(source, 6)
    result, scored = score(
        Scoring("shapes_tifa", metric, items), [np.stack([item.truth for item in items])], 0
    )
    assert result["tifa_average"] == 1.0
    explained = set(codes("evaluation.md", "What is in result.json"))
    sampling = {"metric", "fields", "workdir", "seed", "step", "ema", "sampler", "steps", "guidance"}
    sampling |= {"guidance_rescale", "guidance_interval", "training_seed", "left_out"}
    sampling |= {"prompt_set", "prompt_files", "prompt_transform", "prompts_sha256"}
    assert explained == set(result) | sampling | set(metric.about()) | {"accuracy_on_real_scans"}
    judged = {"free", "log_p", "second", "counts", "unanswered"}
    assert set(codes("evaluation.md", "What is in rows.jsonl")) == set(next(iter(scored))) | judged
    common = {name: str(field.default) for name, field in COMMON.items()}
    section = (DOCS / "evaluation.md").read_text().split("\n## Fields of a metric\n")[1].split("\n## ")[0]
    assert dict(re.findall(r"^\| `(\w+)` \| (\w*) ?\|", section, re.MULTILINE)) == common


def test_the_questions_on_the_page_are_asked():
    section = (DOCS / "evaluation.md").read_text().split("\n## shapes_tifa\n")[1].split("\n## ")[0]
    table = dict(re.findall(r"^\| `(\w+)` \| (.+?\?) \|", section, re.MULTILINE))
    source = ShapesSource(preset="grid16", shapes=("circle", "square"), colours=("red", "blue"))
    rows = [row for i in range(400) for row in source.held_out().questions(i)]
    assert set(table) == {row["element_type"] for row in rows}
    for kind, question in table.items():
        assert question in {row["question"] for row in rows if row["element_type"] == kind}


def test_the_metrics_are_listed_and_explained():
    listed = (DOCS / "evaluation.md").read_text().split("\n## ")[0]
    names = re.findall(r"^\| `(\w+)` \|", listed, re.MULTILINE)
    assert len(names) == 3
    cells = re.findall(r"^\| (`.+?) \|", listed, re.MULTILINE)
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == set(METRICS)
    headings = re.findall(r"^## (\w+)$", (DOCS / "evaluation.md").read_text(), re.MULTILINE)
    assert headings[: len(names)] == names
    part = (DOCS / "config.md").read_text().split("\n### `metrics`\n")[1].split("\n### ")[0]
    assert re.findall(r"^#### `(\w+)`$", part, re.MULTILINE) == list(METRICS)


def test_samplers_schedules_and_their_timesteps():
    page = "sampling_and_guidance.md"
    text = (DOCS / page).read_text()
    assert re.findall(r"^\| `(\w+)` \|", text.split("## Samplers")[1], re.MULTILINE) == list(SAMPLERS)
    for field, names in (
        ("schedule", SCHEDULES),
        ("prediction", PREDICTIONS),
        ("weighting", WEIGHTINGS),
        ("time_sampling", TIME_SAMPLINGS),
    ):
        (cell,) = re.findall(rf"^\| `config\.diffusion\.{field}` \| (.+) \|$", text, re.MULTILINE)
        assert [name for name in re.findall(r"`(\w+)`", cell) if name in names] == list(names)
    rows = re.findall(r"^\| (by default|with `zero_snr`) \| (.+?) \| (.+?) \|", text, re.MULTILINE)
    for (how, first, second), zero_snr in zip(rows, (False, True), strict=True):
        assert ("zero_snr" in how) == zero_snr
        schedule = make_schedule("scaled_linear", zero_snr=zero_snr)
        cells = dict.fromkeys(("ddim", "euler", "heun"), first) | {
            "dpmpp_2m": second.replace("the same", first)
        }
        for name, cell in cells.items():
            times = SAMPLERS[name].table(schedule, 50).timesteps
            start, following, last = map(int, re.findall(r"\d+", cell))
            np.testing.assert_allclose(times[[0, 1, -1]], [start, following, last], atol=0.01)
