"""Parameters, multiply-accumulates and training FLOPs of any backbone, from its traced program.

Nothing is allocated: the call is traced on shapes, so a model of billions of parameters counts in seconds. Every
matrix product and convolution of the program is counted as output size x summed terms, a scanned body times its length.
Two conventions, of which arXiv 2404.02883 prints the first: "paper" counts products with at least one operand that no
input reaches, that is convolutions and linear layers; "total" counts all, so the products inside attention as well.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
from flax import linen as nn
from jax.extend import core as jex

from scaling_dit.backbones import contract
from scaling_dit.backbones.attention import IMPLEMENTATIONS
from scaling_dit.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-accumulates of one forward pass on one example, of a model or one of its parts."""

    params: int = 0
    macs_paper: int = 0
    macs_total: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            *(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        )


@dataclasses.dataclass(frozen=True)
class Count(Cost):
    """The cost of a backbone; `modules` splits it by top-level module, layers of one stack (`name_0`, ...) together."""

    modules: dict[str, Cost] = dataclasses.field(default_factory=dict)

    def train_flops(self, batch: int, steps: int, convention: Literal["paper", "total"] = "total") -> int:
        """FLOPs of a training run: 3 (forward and backward) x 2 (per multiply-accumulate) x MACs x batch x steps.

        Rematerialisation is not counted. "paper" is the x-axis of arXiv 2404.02883, "total" is for MFU.

        Raises:
          UserError: an unknown convention.
        """
        macs = {"paper": self.macs_paper, "total": self.macs_total}
        if convention not in macs:
            raise UserError(f"unknown convention {convention!r}; {nearest(convention, macs)}")
        return 3 * 2 * macs[convention] * batch * steps


def count(
    backbone: nn.Module, latents: tuple[int, int, int] = (32, 32, 4), text: tuple[int, int] = (77, 1024)
) -> Count:
    """Counts a backbone on latents (H, W, C) and text (L, D), batch 1, no conditions.

    Raises:
      UserError: not a backbone, shapes that its fields exclude, a call that fails or returns another shape, or products
        that cannot be counted (in a loop of unknown length or a hand-written kernel).
    """
    contract.check_backbone(backbone)
    if len(latents) != 3 or len(text) != 2:
        raise UserError(f"count takes latents=(H, W, C) and text=(L, D), got {latents} and {text}")
    contract.check_inputs(backbone, (1, *latents), (1, *text))
    if getattr(backbone, "attention", None) in IMPLEMENTATIONS:
        backbone = backbone.clone(attention="xla")  # a fused kernel hides its products
    inputs = contract.example_inputs(backbone, latents, text)
    name = type(backbone).__name__
    try:
        variables = contract.abstract_variables(backbone, inputs)
        closed, out = jax.make_jaxpr(backbone.apply, return_shape=True)(variables, *inputs)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        raise UserError(
            f"{name} cannot be traced on latents {latents} and text {text}: {type(error).__name__}: {reason}"
        ) from error
    shapes = [(1, *latents[:2], n * (getattr(backbone, "out_channels", None) or latents[2])) for n in (1, 2)]
    if getattr(out, "shape", None) not in shapes:
        raise UserError(
            f"{name} returns {_describe(out)}; it must return one array {shapes[0]} or {shapes[1]}"
        )

    params = variables.get("params", {})
    parts: dict[str, Cost] = {}
    for key, tree in params.items():
        size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        parts[_stack_name(key)] = parts.get(_stack_name(key), Cost()) + Cost(params=size)
    walker = _Walker(name, tuple(params))
    reached = [False] * len(jax.tree.leaves(variables))
    reached += [True] * (len(closed.jaxpr.invars) - len(reached))
    walker.run(closed.jaxpr, reached, "", 1)
    for key, cost in walker.costs.items():
        parts[key] = parts.get(key, Cost()) + cost
    total = sum(parts.values(), Cost())
    return Count(total.params, total.macs_paper, total.macs_total, modules=parts)


class _Walker:
    """Walks a program and adds up its products by module. `reached` says of a value whether an input reaches it."""

    def __init__(self, backbone: str, modules: Sequence[str]) -> None:
        self.backbone = backbone
        self.modules = set(modules)
        self.costs: dict[str, Cost] = {}

    def run(self, jaxpr: Any, reached: Sequence[bool], scope: str, times: int) -> list[bool]:
        """Counts `times` runs of the program on inputs that are `reached`; returns it for its outputs."""
        env: dict[Any, bool] = dict.fromkeys(jaxpr.constvars, False)
        env |= dict(zip(jaxpr.invars, reached, strict=True))

        def read(atom: Any) -> bool:
            return False if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            here = f"{scope}/{eqn.source_info.name_stack}"
            env |= dict(zip(eqn.outvars, self._equation(eqn, operands, here, times), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, operands: list[bool], scope: str, times: int) -> list[bool]:
        name, params = eqn.primitive.name, eqn.params
        if name in ("dot_general", "conv_general_dilated"):
            macs = times * (_dot_macs(eqn) if name == "dot_general" else _conv_macs(eqn))
            self._add(scope, Cost(0, 0 if all(operands) else macs, macs))
        elif name == "scan":
            return self._scan(eqn, operands, scope, times)
        elif name == "cond":
            return self._cond(eqn, operands, scope, times)
        elif bodies := _sub_jaxprs(params):
            if len(bodies) == 1 and name in _CALLS and len(bodies[0].invars) == len(operands):
                return self.run(bodies[0], operands, scope, times)
            if any(_has_products(body) for body in bodies):
                raise UserError(
                    f"{self.backbone}: the products inside {name!r} (at {scope.strip('/') or 'the top'}) cannot be "
                    f"counted; use jax.lax.scan for loops and attention='xla' for kernels"
                )
        return [any(operands)] * len(eqn.outvars)

    def _scan(self, eqn: Any, operands: list[bool], scope: str, times: int) -> list[bool]:
        # Operands are constants, carries, then what is read step by step; results are carries, then what is stacked.
        # Versions of jax count them under different names, but only what goes step by step has an axis less inside.
        body = eqn.params["jaxpr"].jaxpr
        carries = sum(map(_same_rank, eqn.outvars, body.outvars))
        consts = sum(map(_same_rank, eqn.invars, body.invars)) - carries
        state = operands[consts : consts + carries]
        while True:  # a carry is reached if any iteration's is
            inputs = operands[:consts] + state + operands[consts + carries :]
            outputs = _Walker(self.backbone, ()).run(body, inputs, scope, 0)
            merged = [a or b for a, b in zip(state, outputs[:carries], strict=True)]
            if merged == state:
                break
            state = merged
        return self.run(body, inputs, scope, times * eqn.params["length"])

    def _cond(self, eqn: Any, operands: list[bool], scope: str, times: int) -> list[bool]:
        """The branch with the most products counts; an output is reached if the choice or any branch's output is."""
        choice, *inputs = operands
        walkers, outputs = [], []
        for branch in eqn.params["branches"]:
            walkers.append(_Walker(self.backbone, tuple(self.modules)))
            outputs.append(walkers[-1].run(branch.jaxpr, inputs, scope, times))
        heaviest = max(walkers, key=lambda walker: sum(cost.macs_total for cost in walker.costs.values()))
        for key, cost in heaviest.costs.items():
            self.costs[key] = self.costs.get(key, Cost()) + cost
        return [choice or any(branch) for branch in zip(*outputs, strict=True)]

    def _add(self, scope: str, cost: Cost) -> None:
        module = next((part for part in scope.split("/") if part in self.modules), "other")
        key = _stack_name(module)
        self.costs[key] = self.costs.get(key, Cost()) + cost


# Primitives that run their one inner program once on exactly their operands.
_CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
}


def _dot_macs(eqn: Any) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracting)


def _conv_macs(eqn: Any) -> int:
    """Output size x terms per output; the kernel's input axis is already that of one group.

    Of a transposed convolution only the terms that do not hit the zeros between inputs count.
    """
    kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
    terms = math.prod(kernel[axis] for axis in spec[1:])
    return math.prod(eqn.outvars[0].aval.shape) * terms // math.prod(eqn.params["lhs_dilation"])


def _same_rank(a: Any, b: Any) -> bool:
    return len(a.aval.shape) == len(b.aval.shape)


def _sub_jaxprs(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)  # of a closed one
            if hasattr(item, "eqns"):
                found.append(item)
    return found


def _has_products(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name in ("dot_general", "conv_general_dilated")
        or any(_has_products(body) for body in _sub_jaxprs(eqn.params))
        for eqn in jaxpr.eqns
    )


def _stack_name(module: str) -> str:
    return re.sub(r"_\d+$", "", module)


def _describe(out: Any) -> str:
    return str(out.shape) if hasattr(out, "shape") else f"a {type(out).__name__}"
