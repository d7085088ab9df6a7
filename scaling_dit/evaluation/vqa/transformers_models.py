"""Judges that are models of transformers: BLIP-VQA, BLIP-2, and image-text-to-text models such as Qwen3-VL.

All of them generate greedily. A probability is read from the logits of the first token that the model would generate:
the sum over the first tokens of the accepted forms, each id once, because two forms may begin with the same token.
"""

import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from scaling_dit.curation.captioning.transformers_models import FROM_FOLDER, check_dtype, load_model
from scaling_dit.errors import UserError
from scaling_dit.evaluation.metric import Skipped
from scaling_dit.evaluation.vqa import MULTIPLE_CHOICE, Asked, Likelihood
from scaling_dit.evaluation.vqa.hashes import weights_hash
from scaling_dit.files import expand

# The architecture whose answers come from a decoder of their own, and which is asked plainly.
_BLIP_VQA = "BlipForQuestionAnswering"


@dataclasses.dataclass
class TransformersJudge:
    """A model and its processor from a folder.

    Attributes:
      folder: that `save_pretrained` wrote, with weights as safetensors.
      max_tokens: the most tokens of an answer.
      batch: questions at once.
      dtype: float32 | bfloat16 | float16, of the weights.
      device: torch device, such as cuda:0; "" uses a GPU if there is one.

    Raises:
      Skipped: torch or transformers is missing, or the folder holds no such model.
      UserError: a field out of range.
    """

    folder: str
    max_tokens: int = 16
    batch: int = 8
    dtype: str = "float32"
    device: str = ""

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.batch < 1:
            raise UserError("judge transformers needs max_tokens and batch from 1")
        check_dtype(self.dtype)
        self.folder = expand(self.folder)
        self._kind = _architecture(self.folder)
        plain = self._kind == _BLIP_VQA
        try:
            kind = _BLIP_VQA if plain else "AutoModelForImageTextToText"
            self._model, self._processor = load_model(kind, self.folder, self.dtype, self.device)
        except UserError as error:
            raise Skipped(f"judge transformers: {error}") from None
        self.template = "{question}" if plain else MULTIPLE_CHOICE
        self._tokenizer = self._processor.tokenizer

    @staticmethod
    def check_ready(folder: str) -> None:
        """Makes sure that the packages and the folder are there; raises Skipped or UserError."""
        for package in ("torch", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise Skipped(
                    f"judge transformers: {package} is not installed; pip install 'scaling-dit[eval]'"
                )
        _architecture(expand(folder))

    @property
    def identity(self) -> str:
        """The architecture with the hash of its weights, and what else changes its answers."""
        # By Pillow or by torchvision, which resize differently.
        pixels = type(self._processor.image_processor).__name__
        weights = weights_hash(self.folder)[:12]
        return f"{self._kind} {weights}, {pixels}, {self.dtype}, {self.max_tokens} tokens"

    def answer(self, image: np.ndarray, question: str, choices: Sequence[str]) -> str:
        """See `Judge`."""
        return str(self.answers([Asked(image, question, tuple(choices), {})])[0])

    def probability(self, image: np.ndarray, question: str, accepted: Sequence[str]) -> float:
        """See `Judge`."""
        (found,) = self.likelihoods([Asked(image, question, tuple(accepted), {})])
        assert found is not None
        return float(np.exp(found.log_p))

    def answers(self, asked: Sequence[Asked]) -> list[str | None]:
        """The generated answers, without special tokens and blanks around them."""
        found: list[str | None] = [None] * len(asked)
        for places in self._batches(asked):
            made = self._generate([asked[i] for i in places], self.max_tokens).sequences
            texts = self._tokenizer.batch_decode(made, skip_special_tokens=True)
            for i, text in zip(places, texts, strict=True):
                found[i] = text.strip()
        return found

    def likelihoods(self, asked: Sequence[Asked]) -> list[Likelihood | None]:
        """The probabilities that the first token begins an accepted form."""
        found: list[Likelihood | None] = [None] * len(asked)
        for places in self._batches(asked):
            logits = self._generate([asked[i] for i in places], 1).logits[0].double().cpu().numpy()
            for i, row in zip(places, logits, strict=True):
                found[i] = Likelihood(first_token(row, self.first_ids(asked[i].options)))
        return found

    def first_ids(self, forms: Sequence[str]) -> list[int]:
        """The ids of the first tokens of some forms, each once, ascending."""
        firsts = set()
        for form in forms:
            ids = self._tokenizer.encode(form, add_special_tokens=False)
            if ids:
                firsts.add(int(ids[0]))
        return sorted(firsts)

    def _batches(self, asked: Sequence[Asked]) -> Iterator[list[int]]:
        """Places of questions that are asked at once: of equal length, as BLIP's decoder sees the padding of others."""
        alike: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for i, one in enumerate(asked):
            tokens = len(self._tokenizer(one.text)["input_ids"])
            alike.setdefault((tokens, one.image.shape), []).append(i)
        for places in alike.values():
            for start in range(0, len(places), self.batch):
                yield places[start : start + self.batch]

    def _generate(self, asked: Sequence[Asked], tokens: int) -> Any:
        """What `generate` returns: `sequences` of answers without their prompts, and `logits` of each new token."""
        import torch

        encoded = self._encode(asked)
        with torch.inference_mode():
            made = self._model.generate(
                **encoded,
                do_sample=False,
                num_beams=1,
                max_new_tokens=tokens,
                return_dict_in_generate=True,
                output_logits=True,
            )
        made.sequences = made.sequences[:, made.sequences.shape[1] - len(made.logits) :]
        return made

    def _encode(self, asked: Sequence[Asked]) -> Any:
        images = [Image.fromarray(np.ascontiguousarray(one.image)) for one in asked]
        texts = [one.text for one in asked]
        if getattr(self._processor, "chat_template", None):
            texts = [self._chat(text) for text in texts]
        encoded = self._processor(images=images, text=texts, return_tensors="pt")
        encoded = encoded.to(self._model.device)
        encoded["pixel_values"] = encoded["pixel_values"].to(self._model.dtype)
        return encoded

    def _chat(self, text: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        message = [{"role": "user", "content": content}]
        return self._processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)


class SentenceEncoder:
    """Text -> the mean over a sentence encoder's tokens, of unit length: float32 [D].

    Args:
      folder: of an encoder of transformers with its tokenizer.

    Raises:
      Skipped: torch or transformers is missing, or the folder holds no encoder.
    """

    def __init__(self, folder: str) -> None:
        try:
            import transformers

            self._model = transformers.AutoModel.from_pretrained(
                folder, use_safetensors=True, **FROM_FOLDER
            ).eval()
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **FROM_FOLDER)
        except ImportError as error:
            raise Skipped(f"{error.name} is not installed; pip install 'scaling-dit[eval]'") from None
        except (OSError, ValueError, KeyError) as error:
            why = str(error).strip().partition("\n")[0]
            raise Skipped(f"{folder!r} holds no sentence encoder with its tokenizer: {why}") from None

    def __call__(self, text: str) -> np.ndarray:
        import torch

        # One at a time, so a text's vector does not depend on others.
        encoded = self._tokenizer([text], truncation=True, return_tensors="pt")
        with torch.inference_mode():
            tokens = self._model(**encoded).last_hidden_state[0]
        mean = tokens.mean(0).float().numpy()
        return mean / max(float(np.linalg.norm(mean)), 1e-12)


def first_token(logits: np.ndarray, ids: Sequence[int]) -> float:
    """The log-probability of any of these ids, each of which counts once: float64 [vocabulary] logits -> at most 0."""
    top = logits.max()
    if not ids:
        return -np.inf
    shifted = logits - top
    chosen = np.logaddexp.reduce(shifted[list(dict.fromkeys(ids))])
    return min(0.0, float(chosen - np.logaddexp.reduce(shifted)))


def _architecture(folder: str) -> str:
    """The name of a folder's model, for the identity and to tell BLIP-VQA, which no automatic class knows."""
    config = pathlib.Path(folder) / "config.json"
    if not config.is_file():
        raise Skipped(
            f"no model in {folder!r} ({config.name} is missing); download one, such as "
            "Salesforce/blip2-flan-t5-xl from huggingface.co, and name its folder"
        )
    try:
        (found,) = json.loads(config.read_text())["architectures"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{config} names no single architecture; give a folder that `save_pretrained` wrote"
        ) from None
    return str(found)
