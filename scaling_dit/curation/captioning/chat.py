"""A client of servers with OpenAI's chat interface: one request at a time, repeated where that may help."""

import base64
import dataclasses
import http.client
import io
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from PIL import Image

from scaling_dit.errors import UserError

# Status codes that refuse one image. Other codes from 400 to 499 would refuse every image.
_REFUSED = (400, 413, 422)
# Status codes, besides those from 500 on, after which a later request may work.
_AGAIN = (408, 409, 425, 429)
# In seconds.
_LONGEST_PAUSE = 60.0
T = TypeVar("T")


class Refused(Exception):
    """The server will not answer about this image."""


class GaveUp(UserError):
    """None of the tries was answered."""


class Later(Exception):
    """A request failed that may work after a pause of at least `seconds`."""

    def __init__(self, why: str, seconds: float = 0.0) -> None:
        super().__init__(why)
        self.seconds = seconds


def check_server(who: str, flag: str, url: str, model: str, image_format: str) -> None:
    """Checks what every user of a chat server is given.

    Args:
      who: the user, such as "judge".
      flag: the one that sets its fields, such as "--judge_option".

    Raises:
      UserError: no http(s) URL, no model, or an image format that is not sent.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{who} openai:{url}: give a URL such as openai:http://localhost:8000/v1")
    if not model:
        raise UserError(f"{who} openai needs the model's name on the server: {flag}=model=NAME")
    if image_format not in ("png", "jpeg"):
        raise UserError(f"image_format={image_format}: give png or jpeg")


@dataclasses.dataclass(frozen=True)
class Chat:
    """Posts requests to `URL/chat/completions`.

    A request is repeated if it times out, or if the answer is 408, 409, 425, 429, 500 or above, or cannot be read. The
    pauses double each time, or are as long as the server asks for.

    Attributes:
      url: of the interface, such as http://localhost:8000/v1.
      tries: requests before giving up.
      pause: seconds before the second try; the third waits twice as long.
      timeout: seconds for one request.
      key_variable: environment variable with the key; no key is sent if it is not set.
      kept: what the error line says about the work done so far.
    """

    url: str
    tries: int
    pause: float
    timeout: float
    key_variable: str
    kept: str

    def ask(self, request: Mapping[str, Any], read: Callable[[bytes], T]) -> T:
        """What `read` finds in the answer; it raises `Later` for an answer that makes no sense.

        Raises:
          Refused: the server refuses this request, with 400, 413 or 422.
          GaveUp: it answers none of `tries`, or with nothing that can be read.
          UserError: it refuses every request.
        """
        body = json.dumps(request).encode()
        for tried in range(1, self.tries + 1):
            try:
                return read(self._post(body))
            except Later as later:
                why = later
            if tried < self.tries:
                time.sleep(max(why.seconds, min(self.pause * 2 ** (tried - 1), _LONGEST_PAUSE)))
        raise GaveUp(f"{self.url}: {why}; {self.tries} tries; {self.kept}")

    def _post(self, body: bytes) -> bytes:
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
                raise Refused(why) from None
            if error.code in _AGAIN or error.code >= 500:
                raise Later(why, _seconds(error.headers.get("Retry-After"))) from None
            hint = f"; the key is read from {self.key_variable}" if error.code in (401, 403) else ""
            raise UserError(f"{request.full_url}: {why}{hint}") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise Later(str(getattr(error, "reason", error)) or type(error).__name__) from None


def user_message(image: Image.Image, text: str, image_format: str) -> dict[str, Any]:
    """One message with an image, encoded as png or jpeg, and a text about it."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, image_format.upper())
    data = f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": text}]
    return {"role": "user", "content": content}


def _seconds(retry_after: str | None) -> float:
    """The pause in seconds that a server asks for; 0 if it gives a date, or no number."""
    try:
        asked = float(retry_after or 0)
    except ValueError:
        return 0.0
    return min(max(asked, 0.0), _LONGEST_PAUSE) if not math.isnan(asked) else 0.0
