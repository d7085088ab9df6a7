"""Checks of a user's own codec and text encoder: every mistake in one line.

They run when a run is opened, on shapes alone: nothing is computed but the tokens of two captions. The protocols are
`codec.Codec` and `TextEncoder`; docs/own_parts.md shows one of each. `where` names the part in every error line.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_dit import trees
from scaling_dit.components import check_methods, describe, one_line
from scaling_dit.errors import UserError

_ROWS = 2
_F32 = np.dtype(np.float32)
_CAPTIONS = ("", "a large red circle above a small blue square, and a green triangle beside both of them")


def check_codec(codec: Any, image_size: int, where: str) -> None:
    """Makes sure that this is a `Codec` for images of `image_size` x `image_size` pixels.

    Raises:
      UserError: it is not.
    """
    methods = {
        "shape": "image_size",
        "moments_shape": "image_size",
        "init": "rng",
        "moments": "params, images",
    }
    methods |= {
        "sample": "params, moments, rng",
        "encode": "params, images, rng",
        "decode": "params, latents",
    }
    check_methods(codec, where, methods)
    _check_value(codec, "channels", int, where)
    _check_value(codec, "bounded", bool, where)
    latents = _side_shape(codec, "shape", image_size, where)
    moments = _side_shape(codec, "moments_shape", image_size, where)
    if latents[-1] != codec.channels:
        raise UserError(
            f"{where}: shape({image_size}) is {latents}, and channels is {codec.channels}; the last side must be that"
        )
    key = jax.eval_shape(lambda: jax.random.key(0))
    images = jax.ShapeDtypeStruct((_ROWS, image_size, image_size, 3), jnp.uint8)
    drawn = jax.ShapeDtypeStruct((_ROWS, *latents), jnp.float32)
    stored = jax.ShapeDtypeStruct((_ROWS, *moments), jnp.float32)
    params = _init(codec, key, where)
    _check_call(codec.encode, (params, images, key), f"{where}: encode()", [(drawn.shape, _F32)])
    _check_call(codec.moments, (params, images), f"{where}: moments()", [(stored.shape, _F32)])
    _check_call(codec.sample, (params, stored, key), f"{where}: sample()", [(drawn.shape, _F32)])
    _check_call(codec.decode, (params, drawn), f"{where}: decode()", [(images.shape, np.dtype(np.uint8))])


def check_text_encoder(encoder: Any, where: str, *, has_tokenizer: bool = True) -> None:
    """Makes sure that this is a `TextEncoder`; without a tokenizer its `tokenize` is not called.

    Raises:
      UserError: it is not.
    """
    check_methods(encoder, where, {"tokenize": "captions", "init": "rng", "apply": "params, ids, mask"})
    for name in ("dim", "length"):
        _check_value(encoder, name, int, where)
    shape = (_ROWS, encoder.length)
    if has_tokenizer:
        with one_line(f"{where}: tokenize()"):
            found = encoder.tokenize(list(_CAPTIONS))
        if not (isinstance(found, tuple) and len(found) == 2):
            raise UserError(f"{where}: tokenize() returned {describe(found)}; it must return (ids, mask)")
        for name, array, dtype in (("ids", found[0], np.int32), ("mask", found[1], np.bool_)):
            made = (np.shape(array), getattr(array, "dtype", None))
            if made != (shape, dtype):
                raise UserError(
                    f"{where}: tokenize() returned {name} of shape {made[0]} and type {made[1]} for {_ROWS} captions; "
                    f"it must return shape {shape}, {np.dtype(dtype)}"
                )
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = _init(encoder, key, where)
    ids, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)
    wanted: list[Any] = [((*shape, encoder.dim), _F32), (shape, np.dtype(bool)), ((_ROWS, None), _F32)]
    _check_call(encoder.apply, (params, ids, mask), f"{where}: apply()", wanted)


def _check_value(part: Any, name: str, kind: type, where: str) -> None:
    """An attribute or property that is a bool, or an integer of at least 1."""
    value = getattr(part, name, None)
    fits = isinstance(value, bool) if kind is bool else type(value) is int and value >= 1
    if not fits:
        right = "an integer of at least 1" if kind is int else "True or False"
        raise UserError(f"{where}: {name} is {value!r}; it must be {right}")


def _side_shape(codec: Any, name: str, image_size: int, where: str) -> tuple[int, int, int]:
    """(height, width, channels) that `shape` or `moments_shape` gives."""
    with one_line(f"{where}: {name}({image_size})"):
        found = getattr(codec, name)(image_size)
    if not (
        isinstance(found, tuple) and len(found) == 3 and all(type(side) is int and side > 0 for side in found)
    ):
        raise UserError(
            f"{where}: {name}({image_size}) is {found!r}; it must be three integers, (height, width, channels)"
        )
    return found


def _init(part: Any, key: Any, where: str) -> Any:
    """The shapes of a part's parameters, without logical axes."""
    with one_line(f"{where}: init()"):
        return trees.unbox(jax.eval_shape(part.init, key))


def _check_call(call: Any, given: tuple[Any, ...], what: str, wanted: list[Any]) -> None:
    """The shapes and dtypes of what a pure function returns; None stands for any size."""
    with one_line(what):
        found = jax.eval_shape(call, *given)
    results = found if isinstance(found, tuple) else (found,)
    shown = [(tuple(getattr(x, "shape", ())), getattr(x, "dtype", type(x).__name__)) for x in results]
    fits = len(results) == len(wanted) and all(
        len(shape) == len(right[0])
        and all(size in (side, None) for side, size in zip(shape, right[0], strict=True))
        and dtype == right[1]
        for (shape, dtype), right in zip(shown, wanted, strict=True)
    )
    if not fits:
        raise UserError(f"{what} returns {_text(shown)}; it must return {_text(wanted)}")


def _text(arrays: list[Any]) -> str:
    """Such as "float32 [2, 16, 16, 3]"."""
    texts = []
    for shape, dtype in arrays:
        sides = ", ".join("any" if side is None else str(side) for side in shape)
        texts.append(f"{getattr(dtype, 'name', dtype)} [{sides}]")
    return " and ".join(texts)
