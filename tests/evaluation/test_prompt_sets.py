"""Published prompt sets in made files of their layouts, and what is said of files of other versions."""

import csv
import hashlib
import json

import pytest

from scaling_dit import config as config_lib
from scaling_dit.errors import UserError
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.bases import PerImage
from scaling_dit.evaluation.metric import Item
from scaling_dit.evaluation.prompt_sets import SETS, open_prompt_set
from scaling_dit.evaluation.prompt_sets.plain import HPS_STYLES
from scaling_dit.evaluation.prompt_sets.transform import transform
from scaling_dit.evaluation.registry import choose
from tests.support.paths import DOCS
from tests.support.prompt_files import DPG, GENEVAL, GENEVAL2, write_dpg, write_geneval2, write_tifa


def prompts_of(items):
    return [(item.id, item.prompt) for item in items]


def refused(text, message):
    with pytest.raises(UserError) as error:
        open_prompt_set(text)
    assert message in str(error.value), str(error.value)


def test_tifa(tmp_path):
    prompts, questions = write_tifa(tmp_path)
    found = open_prompt_set(f"tifa:{tmp_path}")
    assert [(item.id, item.prompt) for item in found.items] == [
        (row["id"], row["caption"]) for row in prompts
    ]
    assert [row for item in found.items for row in item.questions] == questions
    data = (tmp_path / "tifa_v1.0_question_answers.json").read_bytes()
    assert found.files["tifa_v1.0_question_answers.json"] == hashlib.sha256(data).hexdigest()
    assert not found.complete and found.about()["prompts_published"] == 4081


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows[1].pop("choices"), "is of another version: 'choices' of row 1 is missing"),
        (lambda rows: rows[2].update(id="coco_99"), "row 2 is about 'coco_99', which is no prompt"),
        (lambda rows: rows[0].update(caption="other"), "the caption of 'coco_0' differs"),
        (lambda rows: rows[0].update(answer="maybe"), "row 0: the answer 'maybe' is none of its choices"),
        (lambda rows: rows[0].update(answer=3), "'answer' of row 0 is int"),
        (lambda rows: rows[0].update(choices=[]), "row 0: its choices are no texts"),
        (lambda rows: rows.__delitem__(slice(0, 20)), "it has no questions about 'coco_0'"),
    ],
)
def test_a_question_file_of_another_version_is_one_line(tmp_path, change, message):
    _, questions = write_tifa(tmp_path, captions=9)
    change(questions)
    path = tmp_path / "tifa_v1.0_question_answers.json"
    path.write_text(json.dumps(questions))
    refused(f"tifa:{tmp_path}", message)
    path.write_text("[" + path.read_text())
    refused(f"tifa:{tmp_path}", "is not JSON (line 1")
    path.write_text("{}")
    refused(f"tifa:{tmp_path}", "holds dict, no list; it must be the file of github.com/Yushi-Hu/tifa")


def test_names_and_places(tmp_path):
    refused("tifaa:x", "no prompt set 'tifaa'; did you mean 'tifa'?")
    refused(
        "parti",
        "write parti:PATH, PATH being PartiPrompts.tsv, published at github.com/google-research/parti",
    )
    refused(f"tifa:{tmp_path}", "no file")
    (tmp_path / "latin.csv").write_bytes(b"Prompts,Category\n\xff,x\n")
    refused(f"drawbench:{tmp_path / 'latin.csv'}", "is not UTF-8 (byte 17)")
    assert {row.count for row in SETS.values()} >= {4081, 10_000, 100, 3200, 553, 800, 1632, 200, 1065}


def coco(path, count=30):
    rows = [{"image_id": 100 + i // 2, "id": 1000 - i, "caption": f" caption {i} "} for i in range(count)]
    path.write_text(json.dumps({"annotations": rows, "images": []}))


def test_coco_is_the_same_choice_everywhere(tmp_path):
    coco(tmp_path / "captions_val2014.json")
    items = open_prompt_set(f"coco10k:{tmp_path}").items
    assert len(items) == 15 and items == sorted(
        items, key=lambda item: hashlib.sha256(str(item.meta["image_id"]).encode()).digest()
    )
    # The caption with the lowest id of each image.
    assert {item.meta["id"] for item in items} == {1000 - i for i in range(1, 30, 2)}
    assert items[0].id == f"coco-{items[0].meta['image_id']:012d}" and not items[0].prompt.startswith(" ")
    (tmp_path / "captions_val2014.json").write_text('{"annotations": [{"image_id": 1, "id": 2}]}')
    refused(f"coco30k:{tmp_path}", "'caption' of annotations[0] is missing")
    (tmp_path / "captions_val2014.json").write_text("[]")
    refused(f"coco10k:{tmp_path}", "has no list under 'annotations'")


def test_image_reward_hpsv2_and_geneval(tmp_path):
    path = tmp_path / "benchmark-prompts.json"
    path.write_text(json.dumps([{"id": "001-2", "prompt": "a"}, {"id": "7", "prompt": "b"}]))
    assert [item.id for item in open_prompt_set(f"image_reward:{path}").items] == ["001-2", "7"]
    path.write_text(json.dumps([{"id": "1/2", "prompt": "a"}]))
    refused(f"image_reward:{tmp_path}", "has the id '1/2', which cannot name a file")
    path.write_text(json.dumps([{"id": "1", "prompt": "a"}] * 2))
    refused(f"image_reward:{tmp_path}", "has two prompts with the id '1'")

    for style in HPS_STYLES:
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(2)]))
    items = open_prompt_set(f"hpsv2:{tmp_path}").items
    assert len(items) == 8 and (items[3].id, items[3].prompt) == ("concept-art-00001", "concept-art 1")
    assert items[3].meta == {"style": "concept-art", "number": 1}
    (tmp_path / "photo.json").write_text('[{"prompt": "x"}]')
    refused(f"hpsv2:{tmp_path}", "photo.json row 0 is dict, no text")

    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(json.dumps(GENEVAL) + "\n" + json.dumps(GENEVAL | {"prompt": "x\u2028y"}) + "\n")
    items = open_prompt_set(f"geneval:{path}").items
    assert [item.id for item in items] == ["00000", "00001"] and items[0].meta == GENEVAL
    assert items[1].prompt == "x\u2028y"
    path.write_text('{"tag": "x"}\n')
    refused(f"geneval:{path}", "'include' of line 1 is missing")


def test_geneval_2(tmp_path):
    path = tmp_path / "geneval2_data.jsonl"
    write_geneval2(path)
    (item,) = open_prompt_set(f"geneval2:{tmp_path}").items
    assert item.questions[0]["answer"] == "four" and item.questions[0]["element_type"] == "count"
    assert item.questions[1]["answer"] == "yes" and item.questions[1]["choices"] == ["yes", "no"]
    write_geneval2(path, [GENEVAL2 | {"skills": ["count"]}])
    refused(f"geneval2:{path}", "line 1 has 2 questions and 1 skills")
    write_geneval2(path, [{key: value for key, value in GENEVAL2.items() if key != "vqa_list"}])
    refused(f"geneval2:{path}", "is of another version: 'vqa_list' of line 1 is missing")


def test_parti_and_drawbench(tmp_path):
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text(
        'Prompt\tCategory\tChallenge\tNote\na "quoted cat\tAnimals\tBasic\t\nB\tArts\tComplex\tn\n'
    )
    items = open_prompt_set(f"parti:{path}").items
    assert items[0].prompt == 'a "quoted cat' and items[1].meta == {
        "category": "Arts",
        "challenge": "Complex",
    }
    path.write_text("prompt\tCategory\n")
    refused(f"parti:{tmp_path}", "has no column Prompt, Challenge")
    path.write_text("Prompt\tCategory\tChallenge\na\tb\n")
    refused(f"parti:{tmp_path}", "line 2 has no text under Prompt, or too few columns")
    path = tmp_path / "drawbench.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["Prompts", "Category"], ["a red, car", "Colors"]])
    (item,) = open_prompt_set(f"drawbench:{path}").items
    assert (item.id, item.prompt, item.meta) == ("drawbench-000", "a red, car", {"category": "Colors"})


@pytest.mark.parametrize(
    "name, message",
    [
        ("digits", "has no digits; metric 'digits' takes the run's data, the images of"),
        ("edges_f1", "has no condition 'edges'; metric 'edges_f1' takes the run's data"),
        ("edits", "has no edits whose pixels can be read; metric 'edits' takes the run's data"),
        ("emoji", "has no emoji of the run's folder; metric 'emoji' takes the run's data"),
        ("shapes_tifa", "has no scenes whose pixels can be read; metric 'shapes_tifa' takes the run's data"),
        ("inpaint", "has no images and masks; metric 'inpaint' takes brushbench:FOLDER, or the run's data"),
        ("tifa", "has no questions; name a set that has them"),
        ("soft_tifa", "has no questions; name a set that has them"),
        ("dpg", "has no questions; name a set that has them"),
    ],
)
def test_a_set_that_a_metric_cannot_score_is_refused_before_anything_is_sampled(name, message, tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("Prompts,Category\na red car,Colors\n")
    config = config_lib.defaults()
    config.eval.metrics = (name,)
    config = config_lib.resolve(config, [f"--config.metrics.{name}.prompt_set=drawbench:{path}"])
    (one,) = choose(config, (name,))

    def no_source():
        raise AssertionError("prompts of a set need no data")

    with pytest.raises(UserError) as error:
        one.prompts(no_source, 0)
    assert message in str(error.value) and "\n" not in str(error.value)


class NoItems(PerImage):
    """A metric of a user's own whose items are prompts."""

    def items(self, source, count):
        return ["a red circle", "a blue square"]


@pytest.mark.parametrize("done", ["none", "repeat:2", "rewrite:none.jsonl"])
def test_items_are_checked_before_anything_is_done_to_their_prompts(done):
    name = f"{__name__}:NoItems"
    config = config_lib.resolve(
        config_lib.defaults(),
        [f"--config.eval.metrics=('{name}',)", f"--config.metrics.NoItems.prompt_transform={done}"],
    )
    (one,) = choose(config, (name,))
    with pytest.raises(UserError, match="metric 'NoItems': items must return Items, got str"):
        one.prompts(None, 2)


def test_paths_in_names_are_expanded(tmp_path, monkeypatch):
    write_tifa(tmp_path)
    monkeypatch.setenv("SETS", str(tmp_path))
    assert len(open_prompt_set("tifa:$SETS").items) == len(open_prompt_set(f"tifa:{tmp_path}").items)
    (tmp_path / "longer.jsonl").write_text('{"id": "a", "prompt": "one cat"}\n')
    assert transform([("a", "one")], "rewrite:${SETS}/longer.jsonl")[0] == ["one cat"]
    monkeypatch.delenv("SETS")
    refused("tifa:$SETS/x", "--prompt_set: $SETS/x: the environment variable SETS is not set")
    with pytest.raises(UserError, match="^prompt_transform: .* variable SETS is not set"):
        transform([("a", "one")], "rewrite:$SETS/longer.jsonl")


def test_every_metric_with_items_of_its_own_checks_those_of_a_set():
    """The others score any image by its prompt, or by real images that they ask for."""
    any_prompt = {"vqa_score", "clip_score", "hpsv2", "pickscore", "image_reward", "aesthetic"}
    assert {name for name in METRICS if not hasattr(METRICS[name], "check_items")} == any_prompt


def test_dpg(tmp_path):
    write_dpg(tmp_path)
    one, other = open_prompt_set(f"dpg:{tmp_path}").items
    assert one.id == DPG[0][0] and one.prompt == f"prompt of {one.id}" and other.id == "partiprompts7"
    assert [row["parents"] for row in one.questions] == [[], [1], [1, 2]]
    assert [row["element_type"] for row in one.questions] == ["entity", "attribute", "relation"]
    assert one.questions[1]["detail"] == "attribute - color"
    (tmp_path / "prompts/partiprompts7.txt").unlink()
    refused(f"dpg:{tmp_path}", "asks about 'partiprompts7', but there is no file")
    write_dpg(tmp_path, [(*DPG[0][:2], "x", *DPG[0][3:])])
    refused(f"dpg:{tmp_path}", "line 2: proposition_id and dependency must be numbers")
    write_dpg(tmp_path, columns=("item_id", "prompt"))
    refused(f"dpg:{tmp_path}", "has no column text, proposition_id, dependency")


def test_transforms_of_prompts(tmp_path):
    items = [Item("a", "one"), Item("b", "two")]
    assert transform(prompts_of(items), "none") == (["one", "two"], "none")
    assert transform(prompts_of(items), "repeat:3") == (["one one one", "two two two"], "repeat:3")
    path = tmp_path / "longer.jsonl"
    path.write_text('{"id": "b", "prompt": "two cats"}\n{"id": "a", "prompt": "one cat"}\n')
    prompts, done = transform(prompts_of(items), f"rewrite:{path}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    assert (prompts, done) == (["one cat", "two cats"], f"rewrite:longer.jsonl ({digest})")
    for text, message in (
        ("twice", "it must be none, repeat:N"),
        ("repeat:1", "it must be none, repeat:N"),
        (f"rewrite:{tmp_path}/none", "no file"),
    ):
        with pytest.raises(UserError, match=message):
            transform(prompts_of(items), text)
    with pytest.raises(UserError, match=r"has no prompt for 'c' \(1 missing\)"):
        transform([*prompts_of(items), ("c", "x")], f"rewrite:{path}")
    path.write_text("{}\n")
    with pytest.raises(UserError, match="line 1 is not"):
        transform(prompts_of(items), f"rewrite:{path}")


def test_the_page_lists_every_set_as_it_is():
    section = (DOCS / "judges.md").read_text().split("## Prompt sets\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    cells = {
        line.split("|")[1].strip(" `"): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines
    }
    for name, row in SETS.items():
        files, where, count = cells[name]
        assert files.replace("`", "").split("/ID")[0].rstrip("/") == row.files.split("/ID")[0], name
        assert count == f"{row.count:,}" and (where == "the same" or where.replace("`", "") in row.where), (
            name
        )
