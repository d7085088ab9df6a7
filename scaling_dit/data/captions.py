"""Which caption of an image is shown: the one place where caption policies live.

An image has captions of three kinds: `alt` (what stood beside it on the web), `synthetic` (short ones that a captioning
model wrote) and `long` (paragraphs). A policy states the share of each kind:

    uniform  every caption of an image has the same probability, whatever its kind
    mix      first a kind, with the probabilities `alt`, `synthetic` and `long`, then one of its captions, each with
             the same probability

Half of the captions of arXiv 2404.02883 are one of five synthetic ones: alt 0.5, synthetic 0.5. LensArt-Long-50% of
arXiv 2412.12391 has half long ones: alt 0.5, long 0.5.

An image that lacks a kind falls back: the shares of the kinds it has are scaled to sum to 1, so with 0.5, 0.3 and 0.2
an image without synthetic captions shows alt-text in 5 of 7 cases. If all kinds it has are of share 0, its captions
are chosen uniformly.
"""

import bisect
import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_dit.data.text import sound
from scaling_dit.errors import UserError

KINDS = ("alt", "synthetic", "long")
# A unit ends where the next begins: behind white space, for sentences only after a full stop or the like.
_UNITS = {"words": re.compile(r"\S+"), "sentences": re.compile(r"\S.*?(?:[.!?。！？]+(?=\s|$)|$)", re.DOTALL)}  # noqa: RUF001


@dataclasses.dataclass(frozen=True)
class CaptionPolicy:
    """How a caption is chosen, and how much of it is shown; the fields of `config.captions`.

    Attributes:
      policy: uniform | mix.
      alt: share of alt-text under `mix`; the three shares sum to 1.
      synthetic: share of synthetic captions under `mix`.
      long: share of long captions under `mix`.
      random_length: share of the chosen captions that are cut to a random length: their first n units, n uniform
        from 1 to all of them.
      unit: what a caption is cut by: words | sentences.
    """

    policy: str = "uniform"
    alt: float = 0.5
    synthetic: float = 0.5
    long: float = 0.0
    random_length: float = 0.0
    unit: str = "words"

    def choose(self, record: Mapping[str, Any], rng: np.random.Generator) -> str:
        """The caption shown of a record, chosen by `rng`; only this one of its captions is read.

        Raises:
          UserError: the record has no captions, or its kinds do not fit them.
        """
        captions = record["captions"]
        if self.policy == "uniform":
            caption = choose_caption(captions, rng)
        else:
            caption = captions[self._draw(captions, record.get("kinds"), rng)]
        if not isinstance(caption, str):
            raise UserError(
                f"record {record.get('key')!r} has as caption a {type(caption).__name__}, it must be a text"
            )
        # Of a user's own source; those of the package give sound ones.
        caption = sound(caption)
        if self.random_length and rng.random() < self.random_length:
            return cut(caption, self.unit, rng)
        return caption

    def shares(self, kinds: Sequence[str]) -> list[float]:
        """The probability of each caption of an image whose captions are of these kinds; they sum to 1."""
        weights = [1.0] * len(kinds)
        if self.policy == "mix":
            held = collections.Counter(kinds)
            weights = [getattr(self, kind) / held[kind] for kind in kinds]
        total = sum(weights)
        return [weight / total for weight in weights] if total else [1 / len(kinds)] * len(kinds)

    def _draw(self, captions: Sequence[str], kinds: Sequence[str] | None, rng: np.random.Generator) -> int:
        """The place of a caption, by `shares`."""
        _checked(captions)
        if kinds is None:
            return int(rng.integers(len(captions)))
        if isinstance(kinds, str) or len(kinds) != len(captions):
            raise UserError(
                f"a record's kinds must be a list with one for each of its captions, not {kinds!r}"
            )
        return bisect.bisect_right(_edges(self, tuple(kinds)), rng.random())


# Few records differ in their kinds.
@functools.lru_cache(4096)
def _edges(policy: CaptionPolicy, kinds: tuple[str, ...]) -> tuple[float, ...]:
    """Where each caption's part of [0, 1) ends."""
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"a caption's kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    sums = list(itertools.accumulate(policy.shares(kinds)))
    # The last is 1, so every random number is below it.
    return tuple(edge / sums[-1] for edge in sums)


UNIFORM = CaptionPolicy()


def choose_caption(captions: Sequence[str], rng: np.random.Generator) -> str:
    """One of an image's captions, each with the same probability.

    Only the chosen caption is read, so `captions` may make its items when asked.

    Raises:
      UserError: no captions, or a lone string, which would be read as a list of letters.
    """
    return captions[int(rng.integers(len(_checked(captions))))]


def cut(caption: str, unit: str, rng: np.random.Generator) -> str:
    """The first n words or sentences of a caption, n uniform from 1 to all; a blank one as it is."""
    ends = [match.end() for match in _UNITS[unit].finditer(caption)]
    return caption[: ends[int(rng.integers(len(ends)))]] if ends else caption


def check_policy(policy: CaptionPolicy) -> None:
    """Makes sure that the shares of a policy are probabilities.

    Raises:
      UserError: they do not sum to 1.
    """
    total = policy.alt + policy.synthetic + policy.long
    if policy.policy == "mix" and abs(total - 1) > 1e-6:
        shares = f"alt {policy.alt}, synthetic {policy.synthetic} and long {policy.long}"
        raise UserError(f"config.captions: the shares {shares} sum to {total:g}; they must sum to 1")


def _checked(captions: Sequence[str]) -> Sequence[str]:
    if isinstance(captions, str) or not len(captions):
        raise UserError(f"a record's captions must be a list with at least one text, not {captions!r}")
    return captions
