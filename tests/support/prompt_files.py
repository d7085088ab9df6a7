"""Files of published prompt sets, made in their layouts."""

import csv
import json

import numpy as np

_KINDS = {
    "object": ["yes", "no"],
    "counting": ["1", "2", "3", "4"],
    "color": ["red", "blue", "green", "white"],
}


def write_tifa(folder, captions=3, seed=0):
    """TIFA v1.0's two files; returns (prompts, questions)."""
    rng = np.random.default_rng(seed)
    prompts = [{"id": f"coco_{i}", "caption": f"caption number {i}"} for i in range(captions)]
    questions = []
    for prompt in prompts:
        for number in range(int(rng.integers(3, 9))):
            kind = list(_KINDS)[number % 3]
            questions.append(
                {
                    "id": prompt["id"], "caption": prompt["caption"], "question": f"{kind} {number} of {prompt['id']}?",
                    "choices": _KINDS[kind], "answer": str(rng.choice(_KINDS[kind])), "element_type": kind,
                    "element": "x",
                }
            )  # fmt: skip
    (folder / "tifa_v1.0_text_inputs.json").write_text(json.dumps(prompts))
    (folder / "tifa_v1.0_question_answers.json").write_text(json.dumps(questions))
    return prompts, questions


GENEVAL2 = {
    "prompt": "four white bicycles", "atom_count": 3,
    "vqa_list": [["How many bicycles are in the image?", "four"], ["Are the bicycles white?", "Yes"]],
    "skills": ["count", "attribute"],
}  # fmt: skip
GENEVAL = {
    "tag": "colors",
    "include": [{"class": "bench", "count": 1, "color": "red"}],
    "prompt": "a red bench",
}
# item_id, proposition_id, dependency, tuple, question.
DPG = [
    ("COCOval2014000000000001", 1, "0", "entity - whole (dog)", "Is there a dog?"),
    ("COCOval2014000000000001", 2, "1", "attribute - color (dog, black)", "Is the dog black?"),
    ("COCOval2014000000000001", 3, "1,2", "relation - spatial (dog, mat, on)", "Is the black dog on a mat?"),
    ("partiprompts7", 1, "0", "global - (photo)", "Is this a photo?"),
]
_DPG_COLUMNS = (
    "item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple",
    "question_natural_language",
)  # fmt: skip


def write_geneval2(path, rows=(GENEVAL2,)):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_dpg(folder, rows=DPG, columns=_DPG_COLUMNS):
    """The CSV and the prompts' files."""
    (folder / "prompts").mkdir(exist_ok=True)
    with (folder / "dpg_bench.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for key, number, parents, tuple_, question in rows:
            writer.writerow([key, f"text of {key}", "", number, parents, "b", "d", tuple_, question])
            (folder / "prompts" / f"{key}.txt").write_text(f"prompt of {key}\n")
