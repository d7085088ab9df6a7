"""Parameters, multiply-accumulates, training FLOPs and activation memory of any backbone, from its traced program.

The call is traced on shapes, so nothing is allocated, and counting a model of billions of parameters takes seconds.
Every matrix product and convolution counts as output size x summed terms, a scanned body times its length.

There are two conventions. "paper", as in arXiv 2404.02883, counts the products that have an operand which depends on
no input: convolutions and linear layers. "total" counts all products, so those inside attention as well.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from flax import linen as nn

from scaling_dit.backbones import BACKBONES, contract
from scaling_dit.costs.trace import Walker
from scaling_dit.errors import UserError, nearest
from scaling_dit.nn.attention import IMPLEMENTATIONS

# Names of modules, the outermost first.
Path = tuple[str, ...]
_ATTENTION = re.compile(r"attn|attention|transformer", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-accumulates of one forward pass on one example, of a model or one of its parts.

    `macs_attention` is the share of `macs_paper` inside modules whose names contain attention, attn or transformer. In
    a transformer these are the projections of attention, in a UNet whole transformer modules, as in the column of
    arXiv 2404.02883, Table 1.
    """

    params: int = 0
    macs_paper: int = 0
    macs_attention: int = 0
    macs_total: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, name) + getattr(other, name) for name in _FIELDS))


_FIELDS = tuple(field.name for field in dataclasses.fields(Cost))


@dataclasses.dataclass(frozen=True)
class Count(Cost):
    """The cost of a backbone.

    Attributes:
      tree: cost of every module by its path, what lies in submodules not included. Equal numbered siblings (`name_0`,
        `name_1`, ...), the layers of a stack, are one entry, so that scanned and unrolled models give the same.
    """

    tree: Mapping[Path, Cost] = dataclasses.field(default_factory=dict)
    measure_activations: Callable[[], int] = dataclasses.field(default=int, repr=False, compare=False)

    @functools.cached_property
    def activation_bytes(self) -> int:
        """An estimate of the bytes that the forward pass on one example keeps for the backward pass.

        Sums the arrays that differentiation by the parameters stores and that depend on the example, in their own
        dtypes and under the backbone's `remat`. Parameters, casts of them, gradients and temporaries do not count.
        Attention counts as computed by XLA, which stores its weights; a fused kernel does not. Traced at first access.

        Raises:
          UserError: the call cannot be differentiated.
        """
        return self.measure_activations()

    @property
    def modules(self) -> dict[str, Cost]:
        """The cost of each top-level module, in the order of execution."""
        return self.by_module(1)

    def by_module(self, depth: int) -> dict[str, Cost]:
        """The cost of the modules up to `depth` levels down: "down_1_attn/blocks" -> cost."""
        first: dict[str, int] = {}
        for place, path in enumerate(self.tree):
            first.setdefault(path[0], place)
        parts: dict[str, Cost] = {}
        for path in sorted(self.tree, key=lambda path: first[path[0]]):
            key = "/".join(path[:depth])
            parts[key] = parts.get(key, Cost()) + self.tree[path]
        return parts

    def train_flops(self, batch: int, steps: int, convention: Literal["paper", "total"] = "total") -> int:
        """FLOPs of a training run: 3 (forward and backward) x 2 (per multiply-accumulate) x MACs x batch x steps.

        Rematerialisation does not count. "paper" is the x-axis of arXiv 2404.02883; "total" is for MFU.

        Raises:
          UserError: an unknown convention.
        """
        macs = {"paper": self.macs_paper, "total": self.macs_total}
        for name, value in (("batch", batch), ("steps", steps)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise UserError(f"{name} is {value!r}; it must be a number from 0 on")
        if convention not in macs:
            raise UserError(f"unknown convention {convention!r}; {nearest(convention, macs)}")
        return 3 * 2 * macs[convention] * batch * steps


def count(
    backbone: nn.Module, latents: tuple[int, int, int] = (32, 32, 4), text: tuple[int, int] = (77, 1024)
) -> Count:
    """Counts a backbone on latents (H, W, C) and text (L, D), with batch 1 and every condition that it reads.

    Raises:
      UserError: the module is no backbone, its fields exclude these shapes, the call fails or returns another shape, or
        products cannot be counted (in a loop of unknown length or a hand-written kernel).
    """
    contract.check_backbone(backbone)
    if not (_is_shape(latents, 3) and _is_shape(text, 2)):
        raise UserError(f"count takes latents=(H, W, C) and text=(L, D), got {latents} and {text}")
    contract.check_inputs(backbone, (1, *latents), (1, *text))
    if getattr(backbone, "attention", None) in IMPLEMENTATIONS:
        # A fused kernel would hide its products.
        backbone = backbone.clone(attention="xla")
    inputs = contract.example_inputs(backbone, latents, text)
    name = type(backbone).__name__
    traced = _scanned(backbone)
    try:
        variables = contract.abstract_variables(traced, inputs)
        forward, out = jax.make_jaxpr(traced.apply, return_shape=True)(variables, *inputs)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{name} cannot be traced on latents {latents} and text {text}: {_reason(error)}"
        ) from error
    shapes = [(1, *latents[:2], n * (getattr(backbone, "out_channels", None) or latents[2])) for n in (1, 2)]
    if getattr(out, "shape", None) not in shapes:
        raise UserError(
            f"{name} returns {_describe(out)}; it must return one array {shapes[0]} or {shapes[1]}"
        )

    walker = Walker(name)
    walker.run(forward.jaxpr, _reached(forward.jaxpr, variables))
    params = variables.get("params", {})
    shown = _shown(params)
    tree: dict[Path, Cost] = {}
    for scope, macs in walker.macs.items():
        path = _module_path(scope, shown)
        attention = macs.linear if any(map(_ATTENTION.search, path)) else 0
        tree[path] = tree.get(path, Cost()) + Cost(0, macs.linear, attention, macs.all)
    for path, size in _sizes(params).items():
        tree[path] = tree.get(path, Cost()) + Cost(size)
    total = sum(tree.values(), Cost())
    return Count(
        **dataclasses.asdict(total),
        tree=tree,
        measure_activations=functools.partial(_activation_bytes, backbone, inputs),
    )


def _scanned(backbone: nn.Module) -> nn.Module:
    """The backbone, scanned if it is a family's: they cost the same, and one layer is traced in place of all."""
    place = f"{type(backbone).__module__}:{type(backbone).__name__}"
    # What a user's own class does with such a field is not known.
    if place in BACKBONES.values() and getattr(backbone, "scan_layers", True) is False:
        return backbone.clone(scan_layers=True)
    return backbone


def _is_shape(value: Any, sides: int) -> bool:
    integers = isinstance(value, tuple | list) and all(type(side) is int and side > 0 for side in value)
    return integers and len(value) == sides


def _activation_bytes(backbone: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Bytes of the arrays that `jax.vjp` stores and that depend on an input, unlike parameters and casts of them."""

    def stored(variables: Any, *inputs: Any) -> list[Any]:
        rngs = {"dropout": jax.random.key(0)}
        call = lambda weights: backbone.apply(weights, *inputs, train=True, rngs=rngs)  # noqa: E731
        return jax.tree.leaves(jax.vjp(call, variables)[1])

    variables = contract.abstract_variables(backbone, inputs)
    try:
        jaxpr = jax.make_jaxpr(stored)(variables, *inputs).jaxpr
    except Exception as error:
        raise UserError(f"{type(backbone).__name__} cannot be differentiated: {_reason(error)}") from error
    depends = Walker(type(backbone).__name__).run(jaxpr, _reached(jaxpr, variables))
    arrays = {id(var): var.aval for var, on_input in zip(jaxpr.outvars, depends, strict=True) if on_input}
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in arrays.values())


def _reached(jaxpr: Any, variables: Any) -> list[bool]:
    """Marks the operands of a program (variables, then inputs) that are inputs."""
    weights = len(jax.tree.leaves(variables))
    return [False] * weights + [True] * (len(jaxpr.invars) - weights)


def _shown(params: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """The displayed name of each entry (`_stacks`), with the same of what lies below it."""
    below = {key: _shown(value) if isinstance(value, Mapping) else {} for key, value in params.items()}
    return {key: (name, below[key]) for key, name in _stacks(params).items()}


def _module_path(scope: str, shown: Mapping[str, tuple[str, Any]]) -> Path:
    """The modules with parameters that a scope passes through, under their displayed names; ("other",) if none."""
    path: Path = ()
    for part in scope.split("/"):
        if part in shown:
            name, shown = shown[part]
            path += (name,)
    return path or ("other",)


def _sizes(params: Mapping[str, Any], path: Path = ()) -> dict[Path, int]:
    """Parameters of each module by its path. A parameter outside of any module has its own name as path."""
    sizes: dict[Path, int] = {}
    names = _stacks(params)
    for key, value in params.items():
        if isinstance(value, Mapping):
            found = _sizes(value, (*path, names[key]))
        else:
            found = {path or (key,): math.prod(value.shape)}
        for at, size in found.items():
            sizes[at] = sizes.get(at, 0) + size
    return sizes


def _stacks(params: Mapping[str, Any]) -> dict[str, str]:
    """The displayed name of each entry: numbered siblings of equal shapes lose their numbers."""
    numbered: dict[str, list[str]] = {}
    for key in params:
        if re.search(r"_\d+$", key):
            numbered.setdefault(re.sub(r"_\d+$", "", key), []).append(key)
    names = {key: key for key in params}
    for stack, keys in numbered.items():
        shapes = [jax.tree.map(lambda leaf: leaf.shape, params[key]) for key in keys]
        if stack not in params and all(shape == shapes[0] for shape in shapes):
            names |= dict.fromkeys(keys, stack)
    return names


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _describe(out: Any) -> str:
    return str(out.shape) if hasattr(out, "shape") else f"a {type(out).__name__}"
