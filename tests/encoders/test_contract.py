"""The checks of a user's own codec and text encoder: built-in ones pass, and each mistake is one line."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from scaling_dit.encoders import contract
from scaling_dit.encoders.codec import Pixels, check_own_codec, create_codec
from scaling_dit.encoders.scratch import Scratch, WordTokenizer
from scaling_dit.errors import UserError

WHERE = "config.codec 'my:Part'"
ENCODER = Scratch(WordTokenizer(("red", "circle")), dim=8, depth=1, heads=2, length=6)


@dataclasses.dataclass(frozen=True)
class Changed:
    """A part of which some attributes are others; None leaves one out."""

    part: Any
    changes: dict[str, Any]

    def __getattr__(self, name):
        changes = object.__getattribute__(self, "changes")
        if name in changes and changes[name] is None:
            raise AttributeError(name)
        return changes[name] if name in changes else getattr(object.__getattribute__(self, "part"), name)


def fails(message, check, *arguments):
    with pytest.raises(UserError, match=message) as error:
        check(*arguments, WHERE)
    assert str(error.value).startswith(WHERE) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, fields",
    [("pixels", {}), ("dct", {}), pytest.param("vae", {"weights": "random"}, marks=pytest.mark.slow)],
)
def test_built_in_codecs_pass(name, fields):
    contract.check_codec(create_codec(name, **fields), 64, WHERE)


def test_the_built_in_text_encoder_passes():
    contract.check_text_encoder(ENCODER, WHERE)
    contract.check_text_encoder(Scratch(WordTokenizer(())), WHERE, has_tokenizer=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"decode": None}, r"it has no method decode\(params, latents\); it is a Changed"),
        ({"encode": lambda images: images}, r"encode has the call \(images\); it must take \(params, images, rng\)"),
        ({"channels": 3.0}, "channels is 3.0; it must be an integer of at least 1"),
        ({"bounded": None}, "bounded is None; it must be True or False"),
        ({"shape": lambda size: (size, size)}, r"shape\(16\) is \(16, 16\); it must be three integers"),
        ({"shape": lambda size: size / 0}, r"shape\(16\) raised ZeroDivisionError: division by zero \(.*line"),
        ({"channels": 4}, r"shape\(16\) is \(16, 16, 3\), and channels is 4; the last side"),
        ({"moments_shape": lambda size: (size, size, 6)}, r"moments\(\) returns float32 \[2, 16, 16, 3\]; .* 6\]"),
        ({"sample": lambda p, m, r: m[..., :1]}, r"sample\(\) returns float32 \[2, 16, 16, 1\]; it must return .* 3\]"),
        ({"encode": lambda p, x, r: x}, r"encode\(\) returns uint8 \[2, 16, 16, 3\]; it must return float32"),
        ({"decode": lambda p, z: z}, r"decode\(\) returns float32 \[2, 16, 16, 3\]; it must return uint8"),
        ({"decode": lambda p, z: p["scale"]}, r"decode\(\) raised KeyError: 'scale'"),
    ],
)  # fmt: skip
def test_mistakes_of_a_codec(changes, message):
    fails(message, contract.check_codec, Changed(Pixels(), changes), 16)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"apply": None}, r"it has no method apply\(params, ids, mask\)"),
        ({"dim": 0}, "dim is 0; it must be an integer of at least 1"),
        ({"tokenize": lambda captions: 1 / 0}, r"tokenize\(\) raised ZeroDivisionError"),
        ({"tokenize": lambda captions: np.zeros((2, 6))}, r"returned a ndarray; it must return \(ids, mask\)"),
        ({"tokenize": lambda captions: (np.zeros((2, 6)), None)}, r"ids of shape \(2, 6\) and type float64 for 2 capt"),
        ({"tokenize": lambda captions: (np.zeros((2, 5), np.int32), None)}, r"ids of shape \(2, 5\) and type int32"),
        ({"tokenize": lambda captions: (np.zeros((2, 6), np.int32),) * 2}, r"mask of shape \(2, 6\) and type int32"),
        ({"apply": lambda p, i, m: (p["embedding"][i], m)}, r"apply\(\) .*embedding|apply\(\) returns"),
        ({"apply": lambda p, i, m: (i, m, i)}, r"returns int32 \[2, 6\] and bool \[2, 6\] and int32 .* \[2, 6, 8\]"),
        ({"apply": lambda p, i, m: (jnp.zeros((2, 6, 8)), m, jnp.zeros(2))}, r"and float32 \[2\]; .* \[2, any\]"),
    ],
)  # fmt: skip
def test_mistakes_of_a_text_encoder(changes, message):
    fails(message, contract.check_text_encoder, Changed(ENCODER, changes))


def test_built_in_codecs_are_not_checked_again():
    check_own_codec(Changed(Pixels(), {"decode": None}), "pixels", 16)
    with pytest.raises(UserError, match=r"config.codec 'my:Codec': it has no method decode"):
        check_own_codec(Changed(Pixels(), {"decode": None}), "my:Codec", 16)
