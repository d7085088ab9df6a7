"""Captions from a server with OpenAI's chat interface: vLLM, SGLang, llama.cpp, Ollama or a hosted service."""

import base64
import concurrent.futures
import dataclasses
import http.client
import io
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from absl import logging
from PIL import Image

from scaling_dit.curation.captioning import Scored
from scaling_dit.errors import UserError, printable

# Status codes that refuse one image. Other codes from 400 to 499 would refuse every image.
_REFUSED = (400, 413, 422)
# Status codes, besides those from 500 on, after which a later request may work.
_AGAIN = (408, 409, 425, 429)
# In seconds.
_LONGEST_PAUSE = 60.0


class _Refused(Exception):
    """The server will not caption this image."""


class _Later(Exception):
    """A request failed that may work after a pause of at least `seconds`."""

    def __init__(self, why: str, seconds: float = 0.0) -> None:
        super().__init__(why)
        self.seconds = seconds


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
        if not self.url.startswith(("http://", "https://")):
            raise UserError(
                f"captioner openai:{self.url}: give a URL such as openai:http://localhost:8000/v1"
            )
        if not self.model:
            raise UserError("captioner openai needs the model's name on the server: --option=model=NAME")
        if self.image_format not in ("png", "jpeg"):
            raise UserError(f"image_format={self.image_format}: give png or jpeg")
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
        body = json.dumps(self._request(image, seed)).encode()
        for tried in range(1, self.tries + 1):
            try:
                return self._read(self._ask(body))
            except _Refused as refused:
                logging.warning("%s refuses an image: %s", self.url, printable(str(refused)))
                return []
            except _Later as later:
                why = later
            if tried < self.tries:
                time.sleep(max(why.seconds, min(self.pause * 2 ** (tried - 1), _LONGEST_PAUSE)))
        raise UserError(
            f"{self.url}: {why}; {self.tries} tries; finished shards are kept, run the same command to resume"
        )

    def _request(self, image: Image.Image, seed: int) -> dict[str, Any]:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, self.image_format.upper())
        data = f"data:image/{self.image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": self.prompt}]
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "n": self.captions,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": seed % 2**31,
            "logprobs": True,
        }

    def _ask(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            why = f"status {error.code}, {error.read(500).decode(errors='replace').strip() or error.reason}"
            if error.code in _REFUSED:
                raise _Refused(why) from None
            if error.code in _AGAIN or error.code >= 500:
                raise _Later(why, _seconds(error.headers.get("Retry-After"))) from None
            hint = f"; the key is read from {self.key_variable}" if error.code in (401, 403) else ""
            raise UserError(f"{request.full_url}: {why}{hint}") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise _Later(str(getattr(error, "reason", error)) or type(error).__name__) from None

    def _read(self, answer: bytes) -> list[Scored]:
        try:
            choices = json.loads(answer)["choices"]
            found = [(str(choice["message"]["content"] or "").strip(), _score(choice)) for choice in choices]
        except (ValueError, TypeError, KeyError) as error:
            raise _Later(f"an answer without captions ({type(error).__name__}: {error})") from None
        if not any(text for text, _ in found):
            raise _Later("an answer without captions")
        return [(text, score) for text, score in found if text]


def _score(choice: dict[str, Any]) -> float | None:
    """Mean log-probability of a choice's tokens, if it has them."""
    tokens = (choice.get("logprobs") or {}).get("content") or []
    mean = sum(token["logprob"] for token in tokens) / len(tokens) if tokens else math.nan
    return mean if math.isfinite(mean) else None


def _seconds(retry_after: str | None) -> float:
    """The pause in seconds that a server asks for; 0 if it gives a date."""
    try:
        return min(max(float(retry_after or 0), 0.0), _LONGEST_PAUSE)
    except ValueError:
        return 0.0
