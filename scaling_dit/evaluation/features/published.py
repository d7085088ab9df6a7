"""Where the weights of metrics lie: a field of the metric, or a known name in the folder $SCALING_DIT_WEIGHTS.

No weights are downloaded by themselves. A metric without them is skipped, and the reason says which file to get and
how to convert it.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence

from etils import epath

from scaling_dit import files
from scaling_dit.errors import UserError
from scaling_dit.evaluation.metric import Skipped
from scaling_dit.weights import places

FOLDER = "SCALING_DIT_WEIGHTS"


@dataclasses.dataclass(frozen=True)
class Published:
    """One set of published weights.

    Attributes:
      names: names of files or folders that it may have in $SCALING_DIT_WEIGHTS.
      source: where it is published, for people.
      convert: whether it is published as a pickle, which `import --to=safetensors` converts once.
    """

    names: tuple[str, ...]
    source: str
    convert: bool = False

    def find(self, given: str, metric: str) -> str:
        """The place of the weights: `given`, the metric's field, or the first known name in $SCALING_DIT_WEIGHTS.

        Raises:
          Skipped: there are none.
        """
        if places.is_place(given):
            if given.startswith("hub:"):
                return given
            given = files.expand(given)
            if not epath.Path(given).exists():
                raise Skipped(f"metric {metric!r}: no file or folder {given}; get it from {self._how()}")
            return given
        if given:
            raise UserError(
                f"metric {metric!r}: weights is {given!r}; it must be a file or folder of weights"
            )
        folder = os.environ.get(FOLDER, "")
        folder = files.expand(folder) if folder else ""
        for name in self.names:
            if folder and (epath.Path(folder) / name).exists():
                return str(epath.Path(folder) / name)
        where = f"in {folder} (${FOLDER})" if folder else f"because ${FOLDER} is not set"
        raise Skipped(
            f"metric {metric!r} lacks weights: no {' or '.join(self.names)} {where}, and its fields in "
            f"config.metrics.{metric} name no other; get it from {self._how()}"
        )

    def _how(self) -> str:
        if not self.convert:
            return self.source
        return f"{self.source}, then scaling-dit import --from=FILE --to=safetensors --out={self.names[0]}"


CLIP_L = Published(
    ("clip-vit-large-patch14",), "https://huggingface.co/openai/clip-vit-large-patch14, the whole folder"
)
CLIP_L_336 = Published(
    ("clip-vit-large-patch14-336",),
    "https://huggingface.co/openai/clip-vit-large-patch14-336, the whole folder",
)
PICKSCORE = Published(
    ("PickScore_v1",), "https://huggingface.co/yuvalkirstain/PickScore_v1, the whole folder"
)
HPS = {
    "v2": Published(
        ("HPS_v2_compressed.safetensors",),
        "https://huggingface.co/xswu/HPSv2, HPS_v2_compressed.pt",
        convert=True,
    ),
    "v2.1": Published(
        ("HPS_v2.1_compressed.safetensors",),
        "https://huggingface.co/xswu/HPSv2, HPS_v2.1_compressed.pt",
        convert=True,
    ),
}
AESTHETIC = Published(
    ("sac+logos+ava1-l14-linearMSE.safetensors",),
    "https://github.com/christophschuhmann/improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE.pth",
    convert=True,
)
IMAGE_REWARD = Published(
    ("ImageReward.safetensors",), "https://huggingface.co/THUDM/ImageReward, ImageReward.pt", convert=True
)
INCEPTION = Published(
    ("inception-2015-12-05.safetensors",),
    "https://github.com/mseitzer/pytorch-fid/releases, pt_inception-2015-12-05-6726825d.pth",
    convert=True,
)
DINOV2_L = Published(
    ("dinov2_vitl14_pretrain.safetensors", "dinov2-large"),
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth (or the folder "
    "https://huggingface.co/facebook/dinov2-large)",
    convert=True,
)
CLIP_WORDS = Published(
    ("bpe_simple_vocab_16e6.txt.gz", "clip-vit-large-patch14"),
    "https://github.com/openai/CLIP, clip/bpe_simple_vocab_16e6.txt.gz",
)
BERT_WORDS = Published(
    ("bert-base-uncased/vocab.txt",), "https://huggingface.co/google-bert/bert-base-uncased, vocab.txt"
)


@functools.lru_cache(maxsize=32)
def digest(place: str) -> str:
    """The sha256 of the weights in a place: of its file, or of names and checksums of all its weight files.

    Raises:
      UserError: no such place.
    """
    path = places.locate(place, part="image_encoder", field="weights")
    if not path.is_dir():
        return files.sha256(path)
    held = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.name.endswith((".safetensors", ".safetensors.index.json")):
            held.update(f"{file.name} {files.sha256(file)}\n".encode())
    return held.hexdigest()


def about(named: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Checksums of weights for a result, from (name in the result, place)."""
    return {name: digest(place) for name, place in named}
