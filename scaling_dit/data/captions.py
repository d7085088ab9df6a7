"""Which caption of an image is shown: the one place where caption policies live."""

from collections.abc import Sequence

import numpy as np

from scaling_dit.errors import UserError


def choose_caption(captions: Sequence[str], rng: np.random.Generator) -> str:
    """One of an image's captions, each with the same probability.

    Only the chosen caption is read, so `captions` may make its items when asked.

    Raises:
      UserError: no captions, or a lone string, which would be read as a list of letters.
    """
    if isinstance(captions, str) or not len(captions):
        raise UserError(f"a record's captions must be a list with at least one text, not {captions!r}")
    return captions[int(rng.integers(len(captions)))]
