"""Captions by a captioning model of transformers: BLIP-2, BLIP and others of their interface; needs extra [caption].

Captions are drawn by nucleus sampling (Holtzman et al., arXiv 1904.09751) as BLIP's authors do for synthetic captions,
with p = 0.9. Every image has random numbers of its own, so a batch is captioned like its images alone.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from scaling_dit.curation.captioning import Scored
from scaling_dit.errors import UserError


@dataclasses.dataclass
class TransformersCaptioner:
    """A model and its processor from a folder.

    A caption's score is the mean log-probability of its tokens under the model, its end included, or with `rank_by` the
    cosine of its CLIP embedding with the image's.

    Attributes:
      folder: what `save_pretrained` wrote, weights as safetensors.
      captions: per image.
      prompt: what the model goes on from; only what it adds is the caption.
      top_p: share of the probability that tokens are drawn from.
      temperature: of sampling.
      max_tokens: longest caption.
      rank_by: folder of a CLIP model of transformers; "" ranks by the captioner's own probability.
      dtype: float32 | bfloat16 | float16, of the weights.
      device: of torch, such as cuda:0; "" takes a GPU if there is one.

    Raises:
      UserError: torch or transformers is missing, or the folder holds no such model.
    """

    folder: str
    captions: int = 5
    prompt: str = ""
    top_p: float = 0.9
    temperature: float = 1.0
    max_tokens: int = 40
    rank_by: str = ""
    dtype: str = "float32"
    device: str = ""

    def __post_init__(self) -> None:
        if self.captions < 1 or self.max_tokens < 1 or not 0 < self.top_p <= 1 or self.temperature <= 0:
            raise UserError(
                "a captioner needs captions and max_tokens from 1, top_p in (0, 1], temperature above 0"
            )
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"dtype={self.dtype}: give float32, bfloat16 or float16")
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UserError(f"{error.name} is not installed; pip install 'scaling-dit[caption]'") from None
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._torch = torch
        self._model, self._processor = self._load(transformers.AutoModelForImageTextToText, self.folder)
        self._ends = _end_tokens(self._model)
        self._clip = self._load(transformers.CLIPModel, self.rank_by) if self.rank_by else None

    def caption(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[list[Scored]]:
        """See `Captioner`."""
        inputs: dict[str, Any] = {"images": list(images)}
        if self.prompt:
            inputs |= {"text": [self.prompt] * len(images), "padding": True}
        encoded = self._processor(**inputs, return_tensors="pt").to(self.device)
        encoded["pixel_values"] = encoded["pixel_values"].to(self._model.dtype)
        draws = [
            np.random.Generator(np.random.Philox(key=[seed, n]))
            for seed in seeds
            for n in range(self.captions)
        ]
        nucleus = Nucleus(self._torch, draws, self.top_p, self.temperature)
        with self._torch.inference_mode():
            sequences = self._model.generate(
                **encoded,
                do_sample=True,  # of what `nucleus` leaves: one token
                num_beams=1,
                num_return_sequences=self.captions,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=self.max_tokens,
                logits_processor=[nucleus],
            )
        log_probabilities = nucleus.log_probabilities()
        made = sequences[:, -log_probabilities.shape[1] :].cpu().numpy()
        found: list[Scored] = []
        for tokens, each in zip(made, log_probabilities, strict=True):
            ended = np.isin(tokens, self._ends)
            length = int(ended.argmax()) + 1 if ended.any() else len(tokens)
            text = self._processor.decode(tokens[:length].tolist(), skip_special_tokens=True).strip()
            found.append((text, float(each[:length].mean())))
        rows = [found[i : i + self.captions] for i in range(0, len(found), self.captions)]
        return rows if self._clip is None else self._ranked(images, rows, *self._clip)

    def _ranked(
        self, images: Sequence[Image.Image], rows: list[list[Scored]], model: Any, processor: Any
    ) -> list[list[Scored]]:
        """The captions with CLIP's cosines as scores."""
        texts = [text for row in rows for text, _ in row]
        encoded = processor(
            text=texts, images=list(images), return_tensors="pt", padding=True, truncation=True
        )
        with self._torch.inference_mode():
            output = model(**encoded.to(self.device))
        cosines = (
            (output.image_embeds @ output.text_embeds.T).float().cpu().numpy()
        )  # [images, texts], of unit length
        ranked: list[list[Scored]] = []
        start = 0
        for number, row in enumerate(rows):
            ranked.append([(text, float(cosines[number, start + n])) for n, (text, _) in enumerate(row)])
            start += len(row)
        return ranked

    def _load(self, kind: Any, folder: str) -> tuple[Any, Any]:
        """A model in its place, and its processor."""
        import transformers

        if not pathlib.Path(folder).is_dir():  # transformers would ask the hub, for whatever is there today
            raise UserError(
                f"no folder {folder!r} to load {kind.__name__} from; download the model and name its folder"
            )
        try:
            model = kind.from_pretrained(
                folder, dtype=getattr(self._torch, self.dtype), use_safetensors=True, local_files_only=True
            )
            processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            why = str(error).strip().partition("\n")[0]
            raise UserError(f"{folder!r} holds no {kind.__name__} with its processor: {why}") from error
        return model.to(self.device).eval(), processor


class Nucleus:
    """A logits processor of transformers that draws each row's next token itself and leaves nothing else possible.

    The token is the one at which the cumulated probability, most probable token first, passes u times the mass of the
    nucleus: the smallest set of tokens whose probabilities sum to at least top_p. u comes from the row's generator.
    """

    def __init__(
        self, torch: Any, draws: Sequence[np.random.Generator], top_p: float, temperature: float
    ) -> None:
        self._torch, self._draws = torch, draws
        self._top_p, self._temperature = top_p, temperature
        self._chosen: list[Any] = []  # log-probabilities [rows], one per step

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """scores: [rows, vocabulary] logits; returns 0 for the token that was drawn and -inf for all others."""
        probabilities = (scores.double() / self._temperature).softmax(-1)
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        cumulated = ordered.cumsum(-1)
        size = (cumulated - ordered < self._top_p).sum(-1, keepdim=True)
        mass = cumulated.gather(1, size - 1)
        uniform = self._torch.tensor(
            [[draw.random()] for draw in self._draws], dtype=mass.dtype, device=mass.device
        )
        place = (cumulated <= uniform * mass).sum(-1, keepdim=True)
        token = order.gather(1, place.minimum(size - 1))
        self._chosen.append(scores.double().log_softmax(-1).gather(1, token)[:, 0])
        return self._torch.full_like(scores, -float("inf")).scatter(1, token, 0.0)

    def log_probabilities(self) -> np.ndarray:
        """Of the tokens drawn so far under the model, without temperature and nucleus; float64 [rows, steps]."""
        return self._torch.stack(self._chosen, 1).cpu().numpy()


def _end_tokens(model: Any) -> list[int]:
    """The ids at which a caption ends."""
    parts = [model, *(getattr(model, name, None) for name in ("language_model", "text_decoder"))]
    ends = [getattr(getattr(part, "generation_config", None), "eos_token_id", None) for part in parts]
    if hasattr(model, "text_decoder"):  # BLIP ends a text as BERT does
        ends.append(model.config.text_config.sep_token_id)
    lists = [end if isinstance(end, list) else [end] for end in ends]
    return [end for some in lists for end in some if end is not None]
