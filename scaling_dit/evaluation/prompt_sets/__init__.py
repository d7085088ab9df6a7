"""Published prompt sets by name, read from the files that their authors publish: "tifa:FOLDER".

None of them is part of this package, and nothing is downloaded. `SETS` says for each where its files are, and how many
prompts are published. A file of another layout is refused in one line. A set keeps the hash of each file it was read
from, because scores on other prompts do not compare.
"""

import dataclasses
import hashlib
import importlib
import re
from collections.abc import Callable, Mapping, Sequence

from etils import epath

from scaling_dit.errors import UserError, nearest
from scaling_dit.evaluation.metric import Item
from scaling_dit.files import expand

# Ids name files.
_ID = re.compile(r"[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Row:
    """A published set.

    Attributes:
      reader: "module:function" of `prompt_sets`, which reads its files.
      files: what PATH must hold.
      where: the place that publishes it.
      count: prompts as published.
    """

    reader: str
    files: str
    where: str
    count: int


SETS: dict[str, Row] = {
    "tifa": Row(
        "questions:tifa",
        "folder with tifa_v1.0_text_inputs.json and tifa_v1.0_question_answers.json",
        "github.com/Yushi-Hu/tifa, folder tifa_v1.0",
        4081,
    ),
    "coco10k": Row(
        "plain:coco10k",
        "captions_val2014.json",
        "cocodataset.org, 2014 Train/Val annotations",
        10_000,
    ),
    "coco30k": Row(
        "plain:coco30k",
        "captions_val2014.json",
        "cocodataset.org, 2014 Train/Val annotations",
        30_000,
    ),
    "image_reward": Row(
        "plain:image_reward",
        "benchmark-prompts.json",
        "github.com/zai-org/ImageReward, folder benchmark",
        100,
    ),
    "hpsv2": Row(
        "plain:hpsv2",
        "folder with anime.json, concept-art.json, paintings.json and photo.json",
        "huggingface.co/datasets/zhwang/HPDv2, folder benchmark",
        3200,
    ),
    "geneval": Row(
        "plain:geneval",
        "evaluation_metadata.jsonl",
        "github.com/djghosh13/geneval, folder prompts",
        553,
    ),
    "geneval2": Row(
        "questions:geneval2",
        "geneval2_data.jsonl",
        "github.com/facebookresearch/GenEval2 (CC BY-NC 4.0)",
        800,
    ),
    "parti": Row(
        "plain:parti",
        "PartiPrompts.tsv",
        "github.com/google-research/parti",
        1632,
    ),
    "drawbench": Row(
        "plain:drawbench",
        "a .csv file with the columns Prompts and Category",
        "imagen.research.google (DrawBench)",
        200,
    ),
    "brushbench": Row(
        "inpainting:brushbench",
        "folder with mapping_file.json and images",
        "github.com/TencentARC/BrushNet, data set BrushBench",
        600,
    ),
    "brushbench_outside": Row(
        "inpainting:brushbench_outside",
        "folder with mapping_file.json and images",
        "github.com/TencentARC/BrushNet, data set BrushBench",
        600,
    ),
    "dpg": Row(
        "questions:dpg",
        "folder with dpg_bench.csv and prompts/ID.txt",
        "github.com/TencentQQGYLab/ELLA, folder dpg_bench",
        1065,
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class PromptSet:
    """The prompts of a set.

    Attributes:
      name: in `SETS`.
      items: the prompts, in the order of the files.
      files: name of each file that was read -> its sha256.
    """

    name: str
    items: Sequence[Item]
    files: Mapping[str, str]

    @property
    def complete(self) -> bool:
        """Whether it has as many prompts as are published."""
        return len(self.items) == SETS[self.name].count

    def about(self) -> dict[str, object]:
        """What a result says of its prompts."""
        return {
            "prompt_set": self.name,
            "prompt_files": dict(self.files),
            "prompts_published": SETS[self.name].count,
        }


class Files:
    """Reads the files of a set and notes their hashes.

    Args:
      name: of the set.
      path: as the user gave it.
    """

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path = name, epath.Path(expand(path))
        self.hashes: dict[str, str] = {}

    def read(self, file: str = "") -> str:
        """The text of a file of the folder, or of the path itself.

        Raises:
          UserError: no such file, or it is not UTF-8.
        """
        path = self.path / file if file else self.path
        if not path.is_file():
            row = SETS[self.name]
            raise UserError(
                f"prompt set {self.name}: no file {path}; give {self.name}:PATH, PATH being {row.files}, "
                f"published at {row.where}"
            )
        data = path.read_bytes()
        self.hashes[path.name] = hashlib.sha256(data).hexdigest()
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"prompt set {self.name}: {path} is not UTF-8 (byte {error.start})") from None

    def file_in(self, name: str) -> str:
        """`name` if the path is a folder, "" if it is that file itself."""
        return name if self.path.is_dir() else ""

    def wrong(self, what: str, file: str = "") -> UserError:
        """The error of a file of another layout or version."""
        path = self.path / file if file else self.path
        return UserError(
            f"prompt set {self.name}: {path} {what}; it must be the file of {SETS[self.name].where}"
        )


def open_prompt_set(text: str) -> PromptSet:
    """The set that "NAME:PATH" names.

    Raises:
      UserError: no such set or file, a file of another layout, or ids that cannot name files.
    """
    name, colon, path = text.partition(":")
    if name not in SETS:
        raise UserError(f"--prompt_set={text}: no prompt set {name!r}; {nearest(name, SETS)}")
    if not colon or not path:
        raise UserError(
            f"--prompt_set={text}: write {name}:PATH, PATH being {SETS[name].files}, published at {SETS[name].where}"
        )
    module, _, function = SETS[name].reader.partition(":")
    read: Callable[[Files], Sequence[Item]] = getattr(
        importlib.import_module(f"{__name__}.{module}"), function
    )
    try:
        files = Files(name, path)
    except UserError as error:
        raise UserError(f"--prompt_set: {error}") from None
    items = read(files)
    seen = set()
    for item in items:
        if not _ID.fullmatch(item.id):
            raise files.wrong(f"has the id {item.id!r}, which cannot name a file")
        if item.id in seen:
            raise files.wrong(f"has two prompts with the id {item.id!r}")
        seen.add(item.id)
    if not items:
        raise files.wrong("has no prompts")
    return PromptSet(name, items, files.hashes)
