"""The verbs over whole data sets, from the command line to what they write."""

import json
import re

import pytest
from PIL import Image

from scaling_dit.cli import main as cli
from scaling_dit.curation import captioning, filters
from scaling_dit.data.sources import create_source
from tests.support import small_webdataset
from tests.support.pages import commands, first_column
from tests.support.paths import DOCS

pytestmark = pytest.mark.usefixtures("inspected_once")


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Two tars of scenes with sparse captions; each scene of the second is in the first too, twice as large."""
    folder, source = tmp_path_factory.mktemp("scenes"), create_source("shapes", caption_level=1)
    for shard in range(2):
        samples = []
        for number in range(6):
            record = source[number]
            image = Image.fromarray(record["image"])
            image = image if shard else image.resize((32, 32), Image.Resampling.NEAREST)
            metadata = {"aesthetic": 4.0 + number / 4}
            samples.append((f"{number}", small_webdataset.encoded(image), record["captions"][0], metadata))
        small_webdataset.write_tar(folder / f"{shard}.tar", samples)
    return f"--source=webdataset:{folder}/*.tar"


@pytest.mark.slow
def test_scenes_are_captioned_filtered_and_counted(tars, tmp_path, capsys):
    made, kept, stats = (str(tmp_path / name) for name in ("made", "kept", "stats"))
    caption = ["caption", tars, "--captioner=shapes", f"--out={made}", "--option=captions=2", "--kind=long"]
    assert cli.main([*caption, "--process=1", "--processes=2"]) == 0
    assert cli.main(caption) == 0
    assert "2 shards, 1 of them captioned before" in capsys.readouterr().out
    options = ["--duplicates=near", "--filter=aesthetic >= 4.5", "--json", "--", "--direct_num_workers=1"]
    assert cli.main(["filter", tars, f"--out={kept}", *options]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["samples"] == 12 and counts["dropped"]["filter"] == 4
    assert counts["kept"] + counts["dropped"]["near_duplicate"] == 8 and counts["kept"] <= 4 + 1
    flags = [f"--captions={made}", f"--kept={kept}", "--nouns=lexicon", f"--out={stats}"]
    assert cli.main(["stats", tars, *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == counts["kept"] and found["captions"]["alt"] == counts["kept"]
    assert set(found["captions"]) <= {"alt", "long"}
    assert cli.main(["stats", tars, *flags]) == 0
    shown = capsys.readouterr().out
    assert f"written to {stats}: stats.json, captions.png" in shown and "nouns by lexicon" in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["filter", "--out=o"], "filter needs --source; for example: scaling-dit filter"),
        (["stats", "--source=folder:x"], "stats needs --out"),
        (["caption", "--source=folder:x", "--out=o"], "caption needs --captioner"),
        (["filter", "--source=folder:x", "--out=o", "--filter=a >"], "is no expression"),
        (["filter", "--source=folder:no/such", "--out=o"], "no/such"),
        (["filter", "--source=folder:x", "--out=o", "--duplicates=all"], "--duplicates"),
        (
            ["caption", "--source=folder:x", "--out=o", "--captioner=shapes", "--option=captions"],
            "write FIELD=VALUE",
        ),
        (["stats", "--source=shapes", "--out=o"], "holds no image files"),
        (["stats", "--source=folder:x", "--out=o", "--config.steps=3"], "only --config.source.FIELD=VALUE"),
        (["stats", "--source=folder:x", "--out=o", "--nouns=spacy"], "en_core_web_sm is not installed"),
    ],
)
def test_mistakes_are_one_line(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    line = capsys.readouterr().err
    assert told in line and line.startswith("scaling-dit: error: ") and line.count("\n") == 1


def test_without_beam_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    assert cli.main(["stats", "--source=folder:x", "--out=o"]) == 2
    assert "pip install 'scaling-dit[beam]'" in capsys.readouterr().err


def test_the_commands_of_the_page_run_and_its_lists_are_those_of_the_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/raw").mkdir(parents=True)
    image = small_webdataset.encoded(create_source("shapes")[0]["image"])
    small_webdataset.write_tar(tmp_path / "data/raw/0.tar", [("0", image, "a shape", {"aesthetic": 5.0})])
    for command in commands("data_at_scale.md"):
        assert cli.main(command) == 0, capsys.readouterr().err
    written = {path.name for path in (tmp_path / "data").rglob("*") if path.is_file()}
    assert {
        "0.tar.filter.jsonl",
        "0.tar.captions.jsonl",
        "filter.json",
        "stats.json",
        "captions.png",
    } <= written
    text = (DOCS / "data_at_scale.md").read_text()
    rows = dict(re.findall(r"^\| (functions|comparisons|arithmetic) \| (.+) \|$", text, re.MULTILINE))
    words = {name: set(re.findall(r"`(.+?)`", row)) for name, row in rows.items()}
    assert words["functions"] == {*filters._FUNCTIONS, *filters._COLUMN_FUNCTIONS}
    assert len(words["comparisons"]) == len(filters._COMPARE) and len(words["arithmetic"]) == len(
        filters._ARITHMETIC
    )
    listed = [cell.strip("`") for cell in first_column("data_at_scale.md", "Captions")]
    assert listed == list(captioning._BACK_ENDS.registry.known)
    for expression in re.findall(r"^--filter='(.+)'$", text, re.MULTILINE):
        filters.parse(expression)
