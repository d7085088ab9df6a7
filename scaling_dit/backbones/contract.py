"""The contract of a backbone, and the checks every backbone and everything that drives one shares.

A backbone is a `flax.linen.Module`, used only through `init` and `apply`, with this call:

    __call__(latents, timesteps, text, text_mask=None, conditions=None, extras=None, *, train=False) -> prediction

    latents     [B, H, W, C] noised latents
    timesteps   [B] in [0, 1000), may be fractional
    text        [B, L, D] token embeddings
    text_mask   [B, L] bool, True = real token; None = every token is real
    conditions  name -> (image [B, H, W, Ci], present [B] bool), only those of the field `conditions`; a name that is
                absent or not present is dropped
    extras      name -> array, only the names declared in the attribute `EXTRAS` of the class, or of the instance where
                a field decides (a property)
    returns     [B, H, W, C], or [B, H, W, 2C] with a learned variance (loss and samplers use the first C)

Its fields are plain config values (numbers, strings, booleans, None, tuples of them), each with a default. A module
that has the fields `in_channels` and `text_dim` gets them from the codec and the text encoder of the run, one that has
the field `conditions` gets a row for each image condition of the run (conditions.py). Parameters carry logical axis
names (`nn.with_logical_partitioning`) so that they can be sharded; those without are split over fsdp by size.

Attributes of the class say the rest; each may be left out:

    EXTRAS         extra -> its shape per example, in which a string stands for the value of the field of that name
    CONCAT         how it can read conditions: ("token", "channel"), or one of them; both by default
    SPLITS_TOKENS  True: activations [B, T, ...] may be split over T, their logical axis "length"; without it the mesh
                   axis `context` splits the batch
    WEIGHTS        "package.module:function", backbone -> the table of its weights under upstream names
                   (`weights/table.py`); without it weights can neither be imported nor exported
    RESIZED        parameter -> "package.module:function", (value, text, image) -> the value for a run that begins with
                   another's weights (`train --from`) and has another number of tokens; text and image are (tokens
                   there, tokens here). Parameters without one must have the same shape in both. A property where a
                   field decides which there are
    DIFFUSERS      "package.module:NAME", a `weights.diffusers_class.DiffusersClass`: the model of diffusers that
                   computes the same, whose folders can then be read and written
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn

from scaling_dit import components, trees
from scaling_dit.backbones import conditions as image_conditions
from scaling_dit.backbones.conditions import Conditions
from scaling_dit.components import one_line
from scaling_dit.errors import UserError, nearest
from scaling_dit.nn.attention import check_implementation
from scaling_dit.nn.layers import check_remat, parse_dtype

Extras = Mapping[str, jax.Array]
Shape = tuple[int, ...]

# Far beyond any that was trained: a slip of the keys, which would be built for hours.
_LARGEST = {"hidden": 2**17, "depth": 1000, "heads": 2**12}
_TRANSFORMER_SIZE = re.compile(r"h(\d+)-d(\d+)-n(\d+)")


@runtime_checkable
class Backbone(Protocol):
    """What the trainer, the samplers and `count` use of a backbone; see the module's docstring for the call."""

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Fresh variables, {"params": tree}, from a key and example inputs."""

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """The call on given variables."""


def check_class(candidate: Any, where: str) -> None:
    """Makes sure that a class can be a backbone: a linen module with the contract's call.

    Raises:
      UserError: it is no such class; `where` names it in the message.
    """
    if not (isinstance(candidate, type) and issubclass(candidate, nn.Module)):
        raise UserError(f"backbone {where} must be a flax.linen.Module class, it is {_describe(candidate)}")
    signature = inspect.signature(candidate.__call__)
    try:
        # Self and the six inputs.
        signature.bind(*[None] * 7, train=False)
    except TypeError as error:
        raise UserError(
            f"backbone {where} has the call {signature}; it must take (latents, timesteps, text, text_mask=None, "
            f"conditions=None, extras=None, *, train=False): {error}"
        ) from None


def check_backbone(backbone: Any) -> None:
    """Makes sure that this is an instance of a backbone class.

    Raises:
      UserError: it is not.
    """
    if not isinstance(backbone, nn.Module):
        raise UserError(f"a backbone must be a flax.linen.Module instance, this is {_describe(backbone)}")
    check_class(type(backbone), type(backbone).__name__)


def check_inputs(
    backbone: nn.Module,
    latents: Shape,
    text: Shape,
    *,
    patch: int = 1,
    conditions: Conditions | None = None,
    extras: Extras | None = None,
) -> None:
    """Checks the shapes of one call, latents [B, H, W, C] and text [B, L, D], against the fields of a backbone.

    Raises:
      UserError: channels or text width differ from the fields, H or W is no multiple of `patch`, or a condition or
        extra is given that the backbone does not read, or a condition of another shape.
    """
    name = type(backbone).__name__
    if len(latents) != 4 or len(text) != 3:
        raise UserError(f"{name} takes latents [B, H, W, C] and text [B, L, D], got {latents} and {text}")
    for field, value, what in (("in_channels", latents[3], "latents"), ("text_dim", text[2], "text")):
        expected = getattr(backbone, field, value)
        if expected != value:
            raise UserError(
                f"{name} has {field}={expected}, but the last axis of the {what} has {value} "
                f"(latents {latents}, text {text})"
            )
    if latents[1] % patch or latents[2] % patch:
        raise UserError(
            f"{name} cuts patches of {patch}: height and width must be multiples, got {latents[1:3]}"
        )
    declared = extra_shapes(backbone)
    image_conditions.check_given(backbone, latents, conditions)
    for extra in sorted(set(extras or ()) - set(declared)):
        hint = nearest(extra, declared) if declared else "it reads none"
        raise UserError(f"{name} does not read the extra {extra!r}; {hint}")


def check_fields(backbone: Any) -> None:
    """Checks the fields that the backbones of this library share, before anything is built.

    Raises:
      UserError: `out_channels`, or `patch` where there is one, is no positive integer, or `attention`, `remat`, `dtype`
        or `param_dtype` is none of its names; or a row of `conditions` is none.
    """
    for field in ("patch", "out_channels", "in_channels", "text_dim"):
        value = getattr(backbone, field, None)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"{field} must be an integer of at least 1, got {value!r}")
    image_conditions.check_rows(backbone)
    check_implementation(backbone.attention)
    check_remat(backbone.remat)
    for field in ("dtype", "param_dtype"):
        parse_dtype(getattr(backbone, field), field)


def extra_shapes(backbone: nn.Module) -> dict[str, Shape]:
    """The shape per example of every extra the backbone declares in `EXTRAS`."""
    declared: Mapping[str, tuple[int | str, ...]] = getattr(backbone, "EXTRAS", {})
    return {
        name: tuple(getattr(backbone, size) if isinstance(size, str) else size for size in shape)
        for name, shape in declared.items()
    }


def example_inputs(backbone: nn.Module, latents: Shape, text: Shape, batch: int = 1) -> tuple[Any, ...]:
    """Abstract positional inputs of one call: latents (H, W, C), text (L, D), all tokens real, every condition."""
    f32 = jnp.float32
    extras = {k: jax.ShapeDtypeStruct((batch, *shape), f32) for k, shape in extra_shapes(backbone).items()}
    return (
        jax.ShapeDtypeStruct((batch, *latents), f32),
        jax.ShapeDtypeStruct((batch,), f32),
        jax.ShapeDtypeStruct((batch, *text), f32),
        jax.ShapeDtypeStruct((batch, text[0]), jnp.bool_),
        image_conditions.example(backbone, batch, *latents[:2]) or None,
        extras or None,
    )


def abstract_variables(backbone: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Shapes and dtypes of the variables, without logical axes; nothing is allocated.

    Reading and writing weights ask for them again and again; tracing a large backbone takes seconds.
    """
    leaves, structure = jax.tree.flatten(inputs)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    trace: Callable[..., Any] = _kept if components.comparable(backbone) else _traced
    # Its text too, for True equals 1 but is refused where 1 is not.
    found = trace(backbone, repr(backbone), structure, shapes)
    # Other nodes than those that are kept, for a caller may change its own.
    return jax.tree.map(lambda leaf: leaf, found)


def _traced(backbone: nn.Module, _: str, structure: Any, shapes: tuple[tuple[Shape, Any], ...]) -> Any:
    inputs = structure.unflatten([jax.ShapeDtypeStruct(*shape) for shape in shapes])
    return trees.unbox(jax.eval_shape(lambda *given: backbone.init(jax.random.key(0), *given), *inputs))


_kept = functools.lru_cache(maxsize=64)(_traced)


def check_output(backbone: Any, found: Any, latents: Shape) -> None:
    """Makes sure that a backbone returned a prediction for latents [B, H, W, C].

    Raises:
      UserError: it is no array, or of another shape than the contract's.
    """
    *sides, channels = latents
    right = (*sides, channels), (*sides, 2 * channels)
    shape = getattr(found, "shape", None)
    if shape not in right:
        returned = _describe(found) if shape is None else shape
        raise UserError(
            f"{type(backbone).__name__} returned {returned} for latents {tuple(latents)}; "
            f"it must return {right[0]}, or {right[1]} with learned sigma"
        )


def check_own(backbone: nn.Module, latents: Shape, text: Shape, where: str) -> None:
    """Makes sure that a backbone of a user's own can be initialised and called; nothing is computed.

    Args:
      backbone: of a class that `check_class` passed.
      latents: (H, W, C) of the run.
      text: (L, D) of the run.
      where: its name in the error line.

    Raises:
      UserError: it raises, or returns something else than a prediction.
    """
    inputs = example_inputs(backbone, latents, text, batch=2)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with one_line(f"{where}: init() or the call"):
        variables = jax.eval_shape(backbone.init, key, *inputs)
        found = jax.eval_shape(backbone.apply, variables, *inputs)
    check_output(backbone, found, inputs[0].shape)


def transformer_size(
    size: str | None,
    sizes: Mapping[str, Mapping[str, int]],
    *,
    hidden: int | None,
    depth: int | None,
    heads: int | None,
) -> tuple[int, int, int]:
    """(hidden, depth, heads) of a transformer: the row that `size` names, each replaced by the explicit field if set.

    `size` is a name in `sizes` or any string of the form h<hidden>-d<depth>-n<heads>.

    Raises:
      UserError: an unknown size, a number that is missing or not positive, or heads that do not divide hidden.
    """
    row = dict(size_row(size, sizes)) if size is not None else {}
    row |= {k: v for k, v in {"hidden": hidden, "depth": depth, "heads": heads}.items() if v is not None}
    for field in ("hidden", "depth", "heads"):
        if not isinstance(row.get(field), int) or isinstance(row[field], bool) or row[field] < 1:
            raise UserError(f"{field} must be a positive integer, got {row.get(field)!r} (size={size!r})")
        if row[field] > _LARGEST[field]:
            raise UserError(f"{field} must be at most {_LARGEST[field]}, got {row[field]} (size={size!r})")
    if row["hidden"] % row["heads"]:
        raise UserError(f"hidden={row['hidden']} must be a multiple of heads={row['heads']} (size={size!r})")
    return row["hidden"], row["depth"], row["heads"]


def size_row(size: str, sizes: Mapping[str, Mapping[str, int]]) -> Mapping[str, int]:
    """The fields a size stands for: a named row of `sizes`, or h<hidden>-d<depth>-n<heads> read as it is.

    Raises:
      UserError: neither; the message ends with the nearest name.
    """
    if not isinstance(size, str):
        raise UserError(f"size must be a name or h<hidden>-d<depth>-n<heads>, got {size!r}")
    if size in sizes:
        return sizes[size]
    parsed = _TRANSFORMER_SIZE.fullmatch(size)
    if parsed is None:
        raise UserError(
            f"unknown size {size!r}: a name or h<hidden>-d<depth>-n<heads>; {nearest(size, sizes)}"
        )
    return dict(zip(("hidden", "depth", "heads"), map(int, parsed.groups()), strict=True))


def _describe(thing: Any) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"
