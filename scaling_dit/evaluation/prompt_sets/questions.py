"""Readers of prompt sets with questions, whose rows have TIFA's keys: question, choices, answer, element_type."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from scaling_dit.evaluation.metric import Item
from scaling_dit.evaluation.prompt_sets import Files
from scaling_dit.evaluation.prompt_sets.plain import json_lines, rows_of, take

_PROMPTS, _QUESTIONS = "tifa_v1.0_text_inputs.json", "tifa_v1.0_question_answers.json"
_DPG = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
_YES_NO = ("yes", "no")


def tifa(files: Files) -> Sequence[Item]:
    """TIFA v1.0: prompts in the order of the inputs, each with its questions in the order of their file."""
    prompts = {}
    for number, row in enumerate(rows_of(files, _PROMPTS)):
        where = f"row {number}"
        key = str(take(files, row, "id", (str, int), where, _PROMPTS))
        if key in prompts:
            raise files.wrong(f"has two prompts with the id {key!r}", _PROMPTS)
        prompts[key] = take(files, row, "caption", str, where, _PROMPTS)
    asked: dict[str, list[Mapping[str, Any]]] = {key: [] for key in prompts}
    for number, row in enumerate(rows_of(files, _QUESTIONS)):
        where = f"row {number}"
        for name, kind in (("question", str), ("choices", list), ("answer", str), ("element_type", str)):
            take(files, row, name, kind, where, _QUESTIONS)
        key = str(take(files, row, "id", (str, int), where, _QUESTIONS))
        if key not in prompts:
            raise files.wrong(
                f"is of another version: {where} is about {key!r}, which is no prompt", _QUESTIONS
            )
        if row.get("caption", prompts[key]) != prompts[key]:
            raise files.wrong(f"is of another version: the caption of {key!r} differs", _QUESTIONS)
        if not row["choices"] or not all(isinstance(choice, str) for choice in row["choices"]):
            raise files.wrong(f"{where}: its choices are no texts", _QUESTIONS)
        if row["answer"] not in row["choices"]:
            raise files.wrong(f"{where}: the answer {row['answer']!r} is none of its choices", _QUESTIONS)
        asked[key].append(row)
    without = [key for key, rows in asked.items() if not rows]
    if without:
        raise files.wrong(f"is of another version: it has no questions about {without[0]!r}", _QUESTIONS)
    return [Item(key, prompt, asked[key]) for key, prompt in prompts.items()]


def geneval2(files: Files) -> Sequence[Item]:
    """GenEval 2: each prompt with its atoms as questions; the skill of an atom is its element_type."""
    name = files.file_in("geneval2_data.jsonl")
    items = []
    for number, row in enumerate(json_lines(files, name)):
        where, key = f"line {number + 1}", f"geneval2-{number:04d}"
        prompt = take(files, row, "prompt", str, where, name)
        pairs = take(files, row, "vqa_list", list, where, name)
        skills = take(files, row, "skills", list, where, name)
        if len(pairs) != len(skills) or not pairs:
            raise files.wrong(f"{where} has {len(pairs)} questions and {len(skills)} skills", name)
        rows = []
        for pair, skill in zip(pairs, skills, strict=True):
            if not (
                isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
            ):
                raise files.wrong(f"{where}: {pair!r} is no pair of question and answer", name)
            choices = list(_YES_NO) if pair[1].lower() in _YES_NO else [pair[1]]
            answer = pair[1].lower() if pair[1].lower() in _YES_NO else pair[1]
            rows.append(
                {
                    "id": key, "caption": prompt, "question": pair[0], "choices": choices, "answer": answer,
                    "element_type": str(skill),
                }
            )  # fmt: skip
        items.append(Item(key, prompt, rows, meta={"atom_count": row.get("atom_count")}))
    return items


def dpg(files: Files) -> Sequence[Item]:
    """DPG-Bench: dense prompts, each with questions that depend on others; ids are those of the prompts' files."""
    name = "dpg_bench.csv"
    reader = csv.DictReader(io.StringIO(files.read(name)))
    missing = [column for column in _DPG if column not in (reader.fieldnames or ())]
    if missing:
        raise files.wrong(f"has no column {', '.join(missing)}", name)
    texts: dict[str, str] = {}
    asked: dict[str, list[dict[str, Any]]] = {}
    for line, row in enumerate(reader, start=2):
        try:
            parents = [int(part) for part in row["dependency"].split(",")]
            number = int(row["proposition_id"])
        except (ValueError, AttributeError, TypeError):
            raise files.wrong(f"line {line}: proposition_id and dependency must be numbers", name) from None
        key = row["item_id"]
        detail = (row["tuple"] or "").partition("(")[0].strip()
        texts.setdefault(key, row["text"])
        asked.setdefault(key, []).append(
            {
                "id": key, "caption": texts[key], "question": row["question_natural_language"],
                "choices": list(_YES_NO), "answer": "yes", "number": number,
                # 0 stands for none.
                "parents": [parent for parent in parents if parent],
                "element_type": detail.partition("-")[0].strip(), "detail": detail,
            }
        )  # fmt: skip
    return [Item(key, _dpg_prompt(files, key, texts[key]), rows) for key, rows in asked.items()]


def _dpg_prompt(files: Files, key: str, text: str) -> str:
    """The prompt in its file, which the published script samples; the CSV's text if there are no such files."""
    path = files.path / "prompts" / f"{key}.txt"
    if not (files.path / "prompts").is_dir():
        return text
    if not path.is_file():
        raise files.wrong(f"asks about {key!r}, but there is no file {path}", "dpg_bench.csv")
    return path.read_text().strip()
