"""Readers of prompt sets without questions, in the layouts of their published files."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from scaling_dit.evaluation.metric import Item
from scaling_dit.evaluation.prompt_sets import Files

HPS_STYLES = ("anime", "concept-art", "paintings", "photo")


def coco10k(files: Files) -> Sequence[Item]:
    """10,000 captions of MSCOCO val2014, each of another image.

    The random list of arXiv 2404.02883 is not published. Here images are ordered by the SHA-256 of their id, and each
    has the caption with its lowest annotation id, so the choice is the same everywhere.
    """
    return _coco(files, 10_000)


def coco30k(files: Files) -> Sequence[Item]:
    """30,000 captions of MSCOCO val2014, of which those of `coco10k` are the first."""
    return _coco(files, 30_000)


def _coco(files: Files, count: int) -> Sequence[Item]:
    name = files.file_in("captions_val2014.json")
    content = load_json(files, name)
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise files.wrong("has no list under 'annotations'", name)
    first: dict[int, tuple[int, str]] = {}
    for number, row in enumerate(content["annotations"]):
        image, key = (take(files, row, k, int, f"annotations[{number}]", name) for k in ("image_id", "id"))
        caption = take(files, row, "caption", str, f"annotations[{number}]", name)
        if image not in first or key < first[image][0]:
            first[image] = (key, caption)
    ordered = sorted(first, key=lambda image: hashlib.sha256(str(image).encode()).digest())[:count]
    return [
        Item(f"coco-{image:012d}", first[image][1].strip(), meta={"image_id": image, "id": first[image][0]})
        for image in ordered
    ]


def image_reward(files: Files) -> Sequence[Item]:
    """The 100 prompts of ImageReward's benchmark."""
    name = files.file_in("benchmark-prompts.json")
    return [
        Item(
            str(take(files, row, "id", (str, int), f"row {number}", name)),
            take(files, row, "prompt", str, f"row {number}", name),
        )
        for number, row in enumerate(rows_of(files, name))
    ]


def hpsv2(files: Files) -> Sequence[Item]:
    """HPSv2's prompts: 800 of each of four styles; ids are STYLE-00000."""
    items = []
    for style in HPS_STYLES:
        name = f"{style}.json"
        for number, prompt in enumerate(rows_of(files, name)):
            if not isinstance(prompt, str):
                raise files.wrong(f"row {number} is {type(prompt).__name__}, no text", name)
            items.append(Item(f"{style}-{number:05d}", prompt, meta={"style": style, "number": number}))
    return items


def geneval(files: Files) -> Sequence[Item]:
    """GenEval's prompts; ids are the numbers of their folders. Only its own detector scores them."""
    name = files.file_in("evaluation_metadata.jsonl")
    items = []
    for number, row in enumerate(json_lines(files, name)):
        for key, kind in (("tag", str), ("include", list), ("prompt", str)):
            take(files, row, key, kind, f"line {number + 1}", name)
        items.append(Item(f"{number:05d}", row["prompt"], meta=row))
    return items


def parti(files: Files) -> Sequence[Item]:
    """PartiPrompts (P2), with category and challenge."""
    name = files.file_in("PartiPrompts.tsv")
    rows = _table(files, name, "\t", ("Prompt", "Category", "Challenge"))
    return [
        Item(f"parti-{number:04d}", row["Prompt"], meta=_lower(row, ("Category", "Challenge")))
        for number, row in enumerate(rows)
    ]


def drawbench(files: Files) -> Sequence[Item]:
    """DrawBench, with category."""
    name = files.file_in("drawbench.csv")
    rows = _table(files, name, ",", ("Prompts", "Category"))
    return [
        Item(f"drawbench-{number:03d}", row["Prompts"], meta=_lower(row, ("Category",)))
        for number, row in enumerate(rows)
    ]


def _lower(row: dict[str, str], keys: Sequence[str]) -> dict[str, str]:
    return {key.lower(): row[key] for key in keys}


def _table(files: Files, name: str, delimiter: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    text = io.StringIO(files.read(name))
    if delimiter == "\t":
        reader = csv.DictReader(text, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    else:
        reader = csv.DictReader(text, delimiter=delimiter)
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise files.wrong(f"has no column {', '.join(missing)}", name)
    for number, row in enumerate(reader, start=2):
        if not all(isinstance(row[column], str) for column in columns) or not row[columns[0]].strip():
            raise files.wrong(f"line {number} has no text under {columns[0]}, or too few columns", name)
        yield row


def load_json(files: Files, name: str) -> Any:
    """The content of a JSON file; raises UserError for anything else."""
    try:
        return json.loads(files.read(name))
    except json.JSONDecodeError as error:
        raise files.wrong(f"is not JSON (line {error.lineno}: {error.msg})", name) from None


def rows_of(files: Files, name: str) -> list[Any]:
    """The rows of a JSON list; raises UserError for anything else."""
    content = load_json(files, name)
    if not isinstance(content, list):
        raise files.wrong(f"holds {type(content).__name__}, no list", name)
    return content


def json_lines(files: Files, name: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; raises UserError for anything else."""
    # Not splitlines(), which also splits at characters that a prompt may hold.
    for number, line in enumerate(files.read(name).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise files.wrong(f"line {number} is not JSON ({error.msg})", name) from None
        if not isinstance(row, dict):
            raise files.wrong(f"line {number} is {type(row).__name__}, no object", name)
        yield row


def take(files: Files, row: Any, key: str, kind: Any, where: str, name: str) -> Any:
    """`row[key]`, which must be of a type; raises UserError otherwise."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        got = "is missing" if value is None else f"is {type(value).__name__}"
        raise files.wrong(f"is of another version: {key!r} of {where} {got}", name)
    return value
