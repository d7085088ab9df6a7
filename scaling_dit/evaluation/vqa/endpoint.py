"""A judge behind OpenAI's chat interface: vLLM, SGLang, llama.cpp or a hosted service."""

import concurrent.futures
import dataclasses
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from absl import logging
from PIL import Image

from scaling_dit.curation.captioning.chat import Chat, GaveUp, Later, Refused, check_server, user_message
from scaling_dit.errors import UserError
from scaling_dit.evaluation.metric import Skipped
from scaling_dit.evaluation.vqa import MULTIPLE_CHOICE, Asked, Likelihood

# Questions in a row that fail, after all tries of each, before the judge counts as out of reach.
_GIVE_UP = 3
_KEPT = "answers so far are kept, run the same command to resume"
R = TypeVar("R")


@dataclasses.dataclass
class Endpoint:
    """Asks `URL/chat/completions`, at temperature 0, several questions at once.

    A request is repeated as `captioning.chat.Chat` says. A question that still has no sensible answer is left out and
    reported. The judge is out of reach after three such questions in a row, or if the server refuses the key or the
    model. A probability is that of the first token (see `first_token`), of the `top` most probable ones that the server
    gives.

    Attributes:
      url: of the interface, such as http://localhost:8000/v1.
      model: its name on the server.
      revision: what else tells the model from others of that name, such as a commit; part of the identity.
      max_tokens: the most tokens of an answer.
      top: log-probabilities asked for each token; OpenAI's limit is 20.
      image_format: png | jpeg, in which images are sent.
      tries: requests for one question.
      pause: seconds before the second try; the third waits twice as long.
      timeout: seconds for one request.
      threads: requests at once.
      key_variable: environment variable with the key; no key is sent if it is not set.

    Raises:
      UserError: no http(s) URL, no model, or a field out of range.
    """

    url: str
    model: str = ""
    revision: str = ""
    max_tokens: int = 16
    top: int = 20
    image_format: str = "png"
    tries: int = 6
    pause: float = 1.0
    timeout: float = 120.0
    threads: int = 8
    key_variable: str = "OPENAI_API_KEY"

    template = MULTIPLE_CHOICE

    def __post_init__(self) -> None:
        check_server("judge", "--judge_option", self.url, self.model, self.image_format)
        if min(self.max_tokens, self.tries, self.threads) < 1 or not 1 <= self.top <= 20 or self.timeout <= 0:
            raise UserError(
                "judge openai needs max_tokens, tries and threads from 1, top from 1 to 20, a timeout above 0"
            )
        self._chat = Chat(self.url, self.tries, self.pause, self.timeout, self.key_variable, _KEPT)
        self._failed, self._lock = 0, threading.Lock()

    @property
    def identity(self) -> str:
        """The model's name, with what changes its answers."""
        at = f"@{self.revision}" if self.revision else ""
        return f"openai:{self.model}{at}, {self.image_format}, top {self.top}"

    def answer(self, image: np.ndarray, question: str, choices: Sequence[str]) -> str:
        """See `Judge`; raises UserError where there is no answer."""
        return _one(self.answers([Asked(image, question, tuple(choices), {})]), question)

    def probability(self, image: np.ndarray, question: str, accepted: Sequence[str]) -> float:
        """See `Judge`; raises UserError where there is no answer."""
        found = _one(self.likelihoods([Asked(image, question, tuple(accepted), {})]), question)
        return math.exp(found.log_p)

    def answers(self, asked: Sequence[Asked]) -> list[str | None]:
        """The answers, without blanks around them.

        Raises:
          Skipped: the judge is out of reach.
        """
        return self._map(lambda one: self._ask(one, {"max_tokens": self.max_tokens}, _read_text), asked)

    def likelihoods(self, asked: Sequence[Asked]) -> list[Likelihood | None]:
        """The probabilities of the accepted forms.

        Raises:
          Skipped: the judge is out of reach, or gives no log-probabilities.
        """
        more = {"max_tokens": 1, "logprobs": True, "top_logprobs": self.top}
        return self._map(
            lambda one: self._ask(one, more, lambda answer: first_token(_read_top(answer), one.options)),
            asked,
        )

    def _map(self, ask: Callable[[Asked], R | None], asked: Sequence[Asked]) -> list[R | None]:
        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            waiting = [pool.submit(ask, one) for one in asked]
            try:
                return [one.result() for one in waiting]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, one: Asked, more: Mapping[str, Any], read: Callable[[bytes], R]) -> R | None:
        with self._lock:
            if self._failed >= _GIVE_UP:
                raise Skipped(f"judge {self.url} is out of reach; {_KEPT}")
        image = Image.fromarray(np.ascontiguousarray(one.image))
        request = {
            "model": self.model,
            "messages": [user_message(image, one.text, self.image_format)],
            "temperature": 0,
            **more,
        }
        try:
            found = self._chat.ask(request, read)
        except Refused as refused:
            logging.warning("%s refuses a question: %s", self.url, refused)
            return None
        except _Missing as missing:
            raise Skipped(f"judge {self.url}: {missing}") from None
        except GaveUp as error:
            logging.warning("%s", error)
            with self._lock:
                self._failed += 1
            return None
        except UserError as error:
            raise Skipped(f"judge {error}") from None
        with self._lock:
            self._failed = 0
        return found


class _Missing(Exception):
    """The server answers, but not what is needed; asking again does not help."""


def _one(found: Sequence[R | None], question: str) -> R:
    if found[0] is None:
        raise UserError(f"the judge has no answer to {question!r}")
    return found[0]


def _choice(answer: bytes) -> dict[str, Any]:
    try:
        choice = json.loads(answer)["choices"][0]
        if not isinstance(choice, dict):
            raise TypeError("choices[0] is no object")
        return choice
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise Later(f"an answer without choices ({type(error).__name__}: {error})") from None


def _read_text(answer: bytes) -> str:
    choice = _choice(answer)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise Later("an answer without text")
    return text.strip()


def _read_top(answer: bytes) -> dict[str, float]:
    """The most probable first tokens with their log-probabilities."""
    choice = _choice(answer)
    try:
        content = (choice.get("logprobs") or {}).get("content") or []
        if not content or not content[0].get("top_logprobs"):
            raise _Missing(
                "its answers have no top_logprobs, which probabilities need; start it with them (vLLM and SGLang have "
                "them), or take a metric that reads answers, such as tifa"
            )
        found: dict[str, float] = {}
        for one in content[0]["top_logprobs"]:
            token, log_p = one["token"], float(one["logprob"])
            if not isinstance(token, str) or math.isnan(log_p) or log_p > 1e-3:
                raise ValueError(f"{one!r} is no token with its log-probability")
            # Two ids may have one text.
            found[token] = float(np.logaddexp(found.get(token, -math.inf), log_p))
        return found
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise Later(f"log-probabilities that make no sense ({error})") from None


def first_token(top: Mapping[str, float], accepted: Sequence[str]) -> Likelihood:
    """The probability that the first token begins an accepted form, from the most probable tokens.

    A server does not say how it splits a text. So a token counts if it is an accepted form; of a form that is not among
    the tokens the longest token counts that it begins with, from two letters on. Each token counts once. Where none
    counts, the probability is at most that of the least probable listed token, and at most what the listed ones leave.
    """
    counted = set()
    for form in accepted:
        beginnings = [token for token in top if token == form or _begins(token, form)]
        if beginnings:
            counted.add(max(beginnings, key=len))
    if counted:
        return Likelihood(min(0.0, float(np.logaddexp.reduce([top[token] for token in sorted(counted)]))))
    left = 1.0 - sum(math.exp(log_p) for log_p in top.values())
    bound = min(min(top.values()), math.log(left) if left > 0 else -math.inf)
    return Likelihood(min(0.0, bound), bound=True)


def _begins(token: str, form: str) -> bool:
    """Whether a token is the beginning of a form; one letter begins too many words."""
    return len(token.strip()) > 1 and form.startswith(token)
