"""Tries meshes, `sharding.gather_once`, microbatches and remat policies for a topology, and ranks those that fit.

The search starts with the cheapest combination: few microbatches and little rematerialisation on the config's own mesh.
If a combination does not fit, those that save less memory on the same mesh are skipped. A combination whose state alone
does not fit is not compiled.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from scaling_dit.errors import UserError
from scaling_dit.parallel import rules
from scaling_dit.parallel.mesh import AXES
from scaling_dit.parallel.topologies import TPUS, Topology
from scaling_dit.planning import plan as plan_lib
from scaling_dit.planning.plan import Plan
from scaling_dit.training.program import run_mesh

# From the policy that keeps most to the one that keeps least.
REMAT = ("none", "products", "dots", "attention", "full")
MICROBATCHES = (1, 2, 4, 8)


def search(
    config: ConfigDict,
    topology: Topology,
    step: str,
    price: float | None,
    limit: int,
    on_progress: Callable[[str], None] = lambda line: None,
    make: Callable[..., Plan] | None = None,
) -> list[Plan]:
    """At most `limit` compiled plans: those that fit first, then by expected time.

    Args:
      config: the resolved config.
      topology: the devices to plan for.
      step: "train" or "sample".
      price: US dollars of a chip-hour; the list price by default.
      limit: the most combinations to compile.
      on_progress: called with a line about each finished combination.
      make: `plan.make` (the default) or `quick.make`, whose plans are ranked by their limit.

    Raises:
      UserError: no combination splits the batch over the topology, or all of them failed (with the last error).
    """
    plans: list[Plan] = []
    mistake: UserError | None = None
    failed: list[tuple[dict[str, int], tuple[int, ...]]] = []
    tried = 0
    for mesh, once, microbatches, remat in candidates(config, topology, step):
        saving = (
            MICROBATCHES.index(microbatches),
            REMAT.index(remat) if remat in REMAT else 0,
            # gather_once needs a copy of the parameters and of the gradients.
            -once,
        )
        if any(mesh == other and all(map(operator.le, saving, most)) for other, most in failed):
            continue
        tried += 1
        chosen = variant(config, mesh, once, microbatches, remat)
        try:
            plan = (make or plan_lib.make)(chosen, topology, step, price)
        except UserError as error:
            on_progress(f"{describe(chosen)}: {error}")
            mistake = error
            continue
        if not plan.memory.fits:
            failed.append((mesh, saving))
        on_progress(f"{describe(chosen)}: peak {plan.memory.peak / 2**30:.2f} GiB, fits: {plan.memory.fits}")
        plans.append(plan)
        if len(plans) >= limit:
            break
    if not tried:
        raise UserError(f"no mesh over {topology.chips} chips splits a batch of {config.batch}")
    if mistake is not None and not plans:
        raise mistake
    return sorted(plans, key=rank)


def rank(plan: Plan) -> tuple[bool, float, int]:
    """Sort key: plans that fit first, then the least time, then the least memory."""
    found = plan.roofline
    time = (found.estimate or found.limit) if found else math.inf
    return not plan.memory.fits, time, plan.memory.peak


def describe(config: ConfigDict) -> str:
    """The settings that `variant` gave a config, as text."""
    words = [f"{axis}={config.mesh[axis]}" for axis in AXES if config.mesh[axis] > 1]
    words += [name for name in ("gather_once", "sparse_core") if config.sharding[name]]
    remat = config.backbone.get("remat", "none")
    return f"{' '.join(words)}, {config.optim.accumulate} microbatches, remat {remat}"


def candidates(
    config: ConfigDict, topology: Topology, step: str = "train"
) -> Iterator[tuple[dict[str, int], bool, int, str]]:
    """(fields of config.mesh, gather_once, microbatches, remat) for which the batch divides, the cheapest first.

    Rematerialisation costs up to a third of the FLOPs, and each microbatch repeats the gathers of parameters. So the
    search raises both together, over all meshes, before it takes either to its end.
    """
    remats = (
        REMAT if "remat" in config.backbone and step == "train" else (config.backbone.get("remat", "none"),)
    )
    counts = [n for n in MICROBATCHES if config.batch % n == 0] if step == "train" else [1]
    own = run_mesh(config, topology.devices())
    layouts = [
        (place, sizes, once)
        for place, sizes in enumerate(meshes(dict(own.shape), own.size, topology.slices))
        for once in gathers(config, sizes, topology, step)
    ]
    combinations = sorted(
        itertools.product(range(len(layouts)), counts, range(len(remats))),
        key=lambda item: (MICROBATCHES.index(item[1]) + item[2] + layouts[item[0]][0], item),
    )
    for layout, microbatches, remat in combinations:
        _, sizes, once = layouts[layout]
        rows = (
            config.batch // microbatches if step == "train" else rules.round_batch(own, config.sample.batch)
        )
        if rows % (sizes["data"] * sizes["fsdp"]) == 0:
            yield sizes, once, microbatches, remats[remat]


def gathers(config: ConfigDict, sizes: dict[str, int], topology: Topology, step: str) -> tuple[bool, ...]:
    """The values of `sharding.gather_once` to try on a mesh of these sizes, the config's own first.

    True is tried only for training on TPUs, on meshes that support it and have no more replicas than slices. On these
    it gathers most, and the list of candidates stays short.
    """
    on_tpu = topology.chip is not None and topology.chip.name in TPUS
    if not on_tpu or step != "train" or sizes["data"] > topology.slices:
        return (False,)
    changed = variant(config, sizes, True, config.optim.accumulate, REMAT[0])
    try:
        run_mesh(changed, topology.devices())
    except UserError:
        return (False,)
    own = config.sharding.gather_once
    return (own, not own)


def meshes(own: dict[str, int], devices: int, slices: int) -> list[dict[str, int]]:
    """The config's own mesh, then splits of the devices into data and fsdp, then with a little tensor parallelism."""
    found = [own]
    for tensor in (1, 2, 4):
        rest = devices // tensor
        for parts in (1, 2, 4, 8, 16):
            data = parts * slices
            if devices % tensor == 0 and rest % data == 0 and rest // data >= 8:
                found.append({"data": data, "fsdp": rest // data, "context": 1, "tensor": tensor})
    return [mesh for place, mesh in enumerate(found) if mesh not in found[:place]]


def variant(
    config: ConfigDict, mesh: dict[str, int], gather_once: bool, microbatches: int, remat: str
) -> ConfigDict:
    """The config with these settings; `mesh` holds fields of config.mesh."""
    changed = config.copy_and_resolve_references().unlock()
    changed.mesh.update(mesh)
    changed.sharding.gather_once = gather_once
    changed.sharding.sparse_core &= gather_once
    changed.optim.accumulate = microbatches
    if "remat" in changed.backbone:
        changed.backbone.remat = remat
    return changed.lock()
