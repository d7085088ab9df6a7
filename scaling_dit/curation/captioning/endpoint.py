"""Captions from a server with OpenAI's chat interface: vLLM, SGLang, llama.cpp, Ollama or a hosted service."""

import concurrent.futures
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from absl import logging
from PIL import Image

from scaling_dit.curation.captioning import Scored
from scaling_dit.curation.captioning.chat import Chat, Later, Refused, check_server, user_message
from scaling_dit.errors import UserError, printable


@dataclasses.dataclass
class EndpointCaptioner:
    """Sends each image to `URL/chat/completions`, several at once.

    A request is repeated if it times out, or if the answer is 408, 409, 425, 429, 500 or above, or no valid JSON. The
    pauses double each time, or are as long as the server asks for. 400, 413 and 422 refuse one image, which then has no
    captions. Any other status stops the run. A caption's score is the mean log-probability of its tokens, if the server
    gives it.

    Attributes:
      url: of the interface, such as http://localhost:8000/v1.
      model: its name on the server.
      prompt: the request about the image.
      captions: number of captions per image.
      max_tokens: the most tokens of a caption.
      temperature: of sampling.
      top_p: probability mass of nucleus sampling.
      image_format: png | jpeg, in which images are sent.
      tries: requests for one image before the run stops.
      pause: seconds before the second try; the third waits twice as long.
      timeout: seconds for one request.
      threads: requests at once.
      key_variable: environment variable with the key; no key is sent if it is not set.

    Raises:
      UserError: no http(s) URL, no model, or a field out of range.
    """

    url: str
    model: str = ""
    prompt: str = "Describe this image in one detailed paragraph."
    captions: int = 1
    max_tokens: int = 300
    temperature: float = 1.0
    top_p: float = 0.9
    image_format: str = "jpeg"
    tries: int = 6
    pause: float = 1.0
    timeout: float = 120.0
    threads: int = 8
    key_variable: str = "OPENAI_API_KEY"

    def __post_init__(self) -> None:
        check_server("captioner", "--option", self.url, self.model, self.image_format)
        if min(self.captions, self.max_tokens, self.tries, self.threads) < 1 or self.timeout <= 0:
            raise UserError(
                "a captioner needs captions, max_tokens, tries and threads from 1, a timeout above 0"
            )

    def caption(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[list[Scored]]:
        """See `Captioner`. Whether equal seeds give equal captions depends on the server.

        Raises:
          UserError: the server refuses every image, or answers none of `tries` requests for one.
        """
        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self._of_image, images, seeds))

    def _of_image(self, image: Image.Image, seed: int) -> list[Scored]:
        kept = "finished shards are kept, run the same command to resume"
        chat = Chat(self.url, self.tries, self.pause, self.timeout, self.key_variable, kept)
        try:
            return chat.ask(self._request(image, seed), self._read)
        except Refused as refused:
            logging.warning("%s refuses an image: %s", self.url, printable(str(refused)))
            return []

    def _request(self, image: Image.Image, seed: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [user_message(image, self.prompt, self.image_format)],
            "n": self.captions,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": seed % 2**31,
            "logprobs": True,
        }

    def _read(self, answer: bytes) -> list[Scored]:
        try:
            choices = json.loads(answer)["choices"]
            found = [(str(choice["message"]["content"] or "").strip(), _score(choice)) for choice in choices]
        except (ValueError, TypeError, KeyError) as error:
            raise Later(f"an answer without captions ({type(error).__name__}: {error})") from None
        if not any(text for text, _ in found):
            raise Later("an answer without captions")
        return [(text, score) for text, score in found if text]


def _score(choice: dict[str, Any]) -> float | None:
    """Mean log-probability of a choice's tokens, if it has them."""
    tokens = (choice.get("logprobs") or {}).get("content") or []
    mean = sum(token["logprob"] for token in tokens) / len(tokens) if tokens else math.nan
    return mean if math.isfinite(mean) else None
