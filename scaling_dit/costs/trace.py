"""Walks a traced program: counts its matrix products and convolutions by scope, and follows its inputs.

A product counts as output size x summed terms, a scanned body as often as it runs, a branch by its costliest side.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core as jex

from scaling_dit.errors import UserError

_PRODUCTS = ("dot_general", "conv_general_dilated")
# Primitives that run their one inner program once, on exactly their operands.
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


@dataclasses.dataclass
class Macs:
    """Multiply-accumulates: `linear` of products with an operand that depends on no input (a weight), `all` of all."""

    linear: int = 0
    all: int = 0

    def add(self, linear: int, every: int) -> None:
        self.linear += linear
        self.all += every


class Walker:
    """Walks programs and sums their products in `macs` by scope: the names of the enclosing modules, joined by "/".

    `name` is the backbone's, for error messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.macs: dict[str, Macs] = {}

    def run(self, jaxpr: Any, reached: Sequence[bool], scope: str = "", times: int = 1) -> list[bool]:
        """Counts `times` runs of the program.

        Args:
          jaxpr: the program.
          reached: for each operand whether it depends on an input of the model.
          scope: the enclosing modules.
          times: number of runs.

        Returns:
          For each result whether it depends on an input of the model.

        Raises:
          UserError: products cannot be counted, in a loop of unknown length or a hand-written kernel.
        """
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
        if name in _PRODUCTS:
            macs = times * (_dot_macs(eqn) if name == "dot_general" else _conv_macs(eqn))
            self.macs.setdefault(scope, Macs()).add(0 if all(operands) else macs, macs)
        elif name == "scan":
            return self._scan(eqn, operands, scope, times)
        elif name == "cond":
            return self._cond(eqn, operands, scope, times)
        elif bodies := _sub_jaxprs(params):
            if len(bodies) == 1 and name in _CALLS and len(bodies[0].invars) == len(operands):
                return self.run(bodies[0], operands, scope, times)
            if any(_has_products(body) for body in bodies):
                raise UserError(
                    f"{self.name}: the products inside {name!r} (at {scope.strip('/') or 'the top'}) cannot be "
                    f"counted; use jax.lax.scan for loops and attention='xla' for kernels"
                )
        return [any(operands)] * len(eqn.outvars)

    def _scan(self, eqn: Any, operands: list[bool], scope: str, times: int) -> list[bool]:
        # Operands are constants, carries, then arrays that are read step by step; results are carries, then stacked
        # arrays. Versions of jax name their counts differently, but only stepwise arrays have one axis less inside.
        body = eqn.params["jaxpr"].jaxpr
        carries = sum(map(_same_rank, eqn.outvars, body.outvars))
        consts = sum(map(_same_rank, eqn.invars, body.invars)) - carries
        state = operands[consts : consts + carries]
        # A carry depends on an input if it does in any iteration.
        while True:
            inputs = operands[:consts] + state + operands[consts + carries :]
            outputs = Walker(self.name).run(body, inputs, scope, 0)
            merged = [a or b for a, b in zip(state, outputs[:carries], strict=True)]
            if merged == state:
                break
            state = merged
        return self.run(body, inputs, scope, times * eqn.params["length"])

    def _cond(self, eqn: Any, operands: list[bool], scope: str, times: int) -> list[bool]:
        """Counts the branch with the most products. An output depends on an input if the choice or any branch does."""
        choice, *inputs = operands
        walkers, outputs = [], []
        for branch in eqn.params["branches"]:
            walkers.append(Walker(self.name))
            outputs.append(walkers[-1].run(branch.jaxpr, inputs, scope, times))
        heaviest = max(walkers, key=lambda walker: sum(macs.all for macs in walker.macs.values()))
        for key, macs in heaviest.macs.items():
            self.macs.setdefault(key, Macs()).add(macs.linear, macs.all)
        return [choice or any(branch) for branch in zip(*outputs, strict=True)]


def _dot_macs(eqn: Any) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracting)


def _conv_macs(eqn: Any) -> int:
    """Output size x terms per output; the kernel's input axis has the size of one group.

    In a transposed convolution the terms on the zeros between inputs do not count.
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
            # A closed jaxpr holds its jaxpr.
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                found.append(item)
    return found


def _has_products(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name in _PRODUCTS or any(_has_products(body) for body in _sub_jaxprs(eqn.params))
        for eqn in jaxpr.eqns
    )
