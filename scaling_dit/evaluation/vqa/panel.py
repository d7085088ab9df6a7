"""A judge by name, checked, with its answers kept: what a metric asks."""

import dataclasses
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from absl import logging

from scaling_dit.components import BackEnds, Registry, check_methods, describe, one_line
from scaling_dit.config import metrics
from scaling_dit.errors import UserError
from scaling_dit.evaluation.metric import Skipped
from scaling_dit.evaluation.vqa import Asked, Judge, Likelihood
from scaling_dit.evaluation.vqa.answers import ANSWER, LIKELIHOOD, Answers, keys

BACK_ENDS = BackEnds(Registry("judge", metrics.JUDGES), metrics.JUDGE_PLACES, "--judge_option")
# Questions that a kill can lose.
_AT_ONCE = 256
R = TypeVar("R")


@dataclasses.dataclass
class Panel:
    """One judge that is asked through what is kept.

    Attributes:
      judge: as named.
      identity: of the judge.
      template: its own, for questions with choices.
    """

    judge: Any
    identity: str
    template: str
    kept: Answers

    def answers(self, asked: Sequence[Asked]) -> list[str | None]:
        """The answers; None for a question that cannot be answered, such as one that a server refuses."""
        return self._ask(ANSWER, asked, self.judge.answers, lambda reply: reply, lambda kept: kept)

    def likelihoods(self, asked: Sequence[Asked]) -> list[Likelihood | None]:
        """The probabilities of the accepted forms; None for a question that cannot be answered."""
        return self._ask(LIKELIHOOD, asked, self.judge.likelihoods, _to_json, _from_json)

    def _ask(
        self,
        kind: str,
        asked: Sequence[Asked],
        ask: Callable[[Sequence[Asked]], Sequence[R | None]],
        encode: Callable[[R], Any],
        decode: Callable[[Any], R],
    ) -> list[R | None]:
        # The oracle reads more of a question than its text, and is fast.
        if not getattr(self.judge, "kept", True):
            return list(ask(asked))
        named = keys(self.identity, kind, asked)
        # Of equal questions one is asked.
        missing = {key: i for i, (key, _) in enumerate(named) if self.kept.get(key) is None}
        places = sorted(missing.values())
        for start in range(0, len(places), _AT_ONCE):
            some = places[start : start + _AT_ONCE]
            replies = ask([asked[i] for i in some])
            for i, reply in zip(some, replies, strict=True):
                if reply is not None:
                    self.kept.put(named[i][0], encode(reply), named[i][1])
            self.kept.flush()
        found: list[R | None] = []
        for (key, _), one in zip(named, asked, strict=True):
            kept = self.kept.get(key)
            if kept is None:
                logging.warning("%s has no answer to %r; it is left out", self.identity, one.text)
            found.append(None if kept is None else decode(kept))
        return found


def _to_json(reply: Likelihood) -> list[Any]:
    """JSON has no infinity."""
    return [None if reply.log_p == -math.inf else reply.log_p, reply.bound]


def _from_json(kept: Sequence[Any]) -> Likelihood:
    return Likelihood(-math.inf if kept[0] is None else kept[0], kept[1])


def open_judge(name: str, options: Mapping[str, str], kept: Answers) -> Panel:
    """A judge by name.

    Args:
      name: see the package.
      options: its fields as text.
      kept: where its answers are kept.

    Raises:
      Skipped: no name, or the judge's weights or packages are missing.
      UserError: an unknown name or field, or a user's own that is no judge.
    """
    _check_given(name)
    judge = BACK_ENDS.create(name, options)
    kind = BACK_ENDS.split(name)[0]
    if BACK_ENDS.is_own(kind):
        judge = _Own(check_judge(judge, kind), kind, dict(options))
    return Panel(judge, judge.identity, judge.template, kept)


def check_judge_named(name: str, options: Mapping[str, str]) -> None:
    """Makes sure that `open_judge` will find a judge, as far as that can be known without loading a network.

    Raises:
      Skipped, UserError: as `open_judge`.
    """
    _check_given(name)
    BACK_ENDS.check(name, options)
    kind, place = BACK_ENDS.split(name)
    if BACK_ENDS.is_own(kind):
        return
    found = BACK_ENDS.registry.resolve(kind)
    if check := getattr(found, "check_ready", None):
        check(**place)
    else:
        # It loads nothing.
        BACK_ENDS.create(name, options)


def _check_given(name: str) -> None:
    if not name:
        raise Skipped(
            "it needs a judge: --judge=transformers:FOLDER (such as Salesforce/blip2-flan-t5-xl or "
            "Salesforce/blip-vqa-capfilt-large from huggingface.co), --judge=openai:URL, or package.module:Name; "
            "where that flag is not, config.metrics.NAME.judge"
        )


def _source_hash(judge: Any) -> str:
    """Of the file that a judge is written in: an edited judge gives other answers than the kept ones."""
    try:
        source = inspect.getsource(inspect.getmodule(type(judge)) or type(judge))
    except (OSError, TypeError):
        return "source unknown"
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def check_judge(judge: Any, name: str) -> Judge:
    """A user's own judge.

    Raises:
      UserError: it lacks a method of `Judge`, or one takes other arguments.
    """
    methods = {"answer": "image, question, choices", "probability": "image, question, accepted"}
    check_methods(judge, f"judge {name!r}", methods)
    return judge


class _Own:
    """A user's own judge, asked one question at a time, whose replies are checked."""

    def __init__(self, judge: Judge, name: str, options: Mapping[str, str]) -> None:
        self._judge, self._what = judge, f"judge {name!r}"
        fields = ", ".join(f"{key}={value}" for key, value in sorted(options.items()))
        self.identity = str(getattr(judge, "identity", f"{name}({fields}), {_source_hash(judge)}"))
        self.template = str(getattr(judge, "template", "{question}"))

    def answers(self, asked: Sequence[Asked]) -> list[str | None]:
        found: list[str | None] = []
        for one in asked:
            with one_line(f"{self._what}: answer()"):
                reply = self._judge.answer(one.image, one.text, one.options)
            if not isinstance(reply, str):
                raise UserError(f"{self._what}: answer() returned {describe(reply)}; it must return a string")
            found.append(reply)
        return found

    def likelihoods(self, asked: Sequence[Asked]) -> list[Likelihood | None]:
        found: list[Likelihood | None] = []
        for one in asked:
            with one_line(f"{self._what}: probability()"):
                reply = self._judge.probability(one.image, one.text, one.options)
            number = isinstance(reply, int | float | np.integer | np.floating) and not isinstance(reply, bool)
            if not number or not 0 <= reply <= 1:
                raise UserError(
                    f"{self._what}: probability() returned {reply!r}; it must return a number from 0 to 1"
                )
            found.append(Likelihood(math.log(reply) if reply > 0 else -math.inf))
        return found
