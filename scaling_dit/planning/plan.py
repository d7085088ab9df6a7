"""Compiles a run's real program for unattached TPUs, and reports whether it fits and how fast it can be.

The compiled programs are those that `train` and `sample` run: the same functions, shardings and XLA options
(`training.program.StepProgram`, `sampling.sampler.Sampler`), for the devices of a topology description instead of real
ones. So the memory is the compiler's own number for the real run, and FLOPs and collectives are counted in the program
itself (`hlo_cost`).
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from scaling_dit import encoders
from scaling_dit.costs.step import train_flops
from scaling_dit.model.adapters import BASE
from scaling_dit.model.build import build_model, make_tokenizer, open_source
from scaling_dit.model.model import Model
from scaling_dit.nn.attention import recorded_choices
from scaling_dit.parallel import rules
from scaling_dit.parallel.topologies import Topology
from scaling_dit.planning import hlo_cost, hlo_timeline
from scaling_dit.planning.compile import Memory, compile_program, outline_program, shard_bytes
from scaling_dit.planning.roofline import Roofline, roofline
from scaling_dit.sampling.options import SamplingOptions
from scaling_dit.sampling.sampler import Sampler
from scaling_dit.training.program import StepProgram, run_mesh

STEPS = ("train", "sample")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The facts about one program on one topology that are known before it runs.

    Attributes:
      topology: name of the topology.
      slices: number of slices.
      chips: chips of all slices.
      hosts: hosts of all slices.
      step: "train" or "sample".
      mesh: axis -> size.
      settings: batch, and fields of the config that `--search` varies.
      replicated: parameters that every chip holds whole.
      attention: implementation of each kind of attention call.
      memory: HBM of one device.
      model_flops: FLOPs of a train step over all chips by `costs.count`; None for sampling.
      statistics: cost of the compiled program for one device; None if it does not fit or its text cannot be read.
      roofline: best possible times; None without statistics or for an unknown chip.
      constraints: sharding constraints in the traced program.
      lower_seconds: seconds of tracing and lowering on this machine.
      compile_seconds: seconds of compiling on this machine.
      kernels: whether kernels were compiled. Without them there are no cycles and no estimate.
      devices_per_chip: jax devices of one chip.
      missing: why the text of a program that fits cannot be read; "" if it can.
      analysis: XLA's own "flops" and "bytes accessed" for one device where the text cannot be read.
      unverified: specifications of the chip that could not be checked.
    """

    topology: str
    slices: int
    chips: int
    hosts: int
    step: str
    mesh: dict[str, int]
    settings: dict[str, Any]
    replicated: rules.Replicated
    attention: list[str]
    memory: Memory
    model_flops: int | None
    statistics: hlo_cost.Statistics | None
    roofline: Roofline | None
    constraints: int
    lower_seconds: float
    compile_seconds: float
    kernels: bool = True
    devices_per_chip: int = 1
    missing: str = ""
    analysis: Mapping[str, float] | None = None
    unverified: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return dataclasses.asdict(self)


def make(
    config: ConfigDict,
    topology: Topology,
    step: str = "train",
    price: float | None = None,
    kernels: bool = True,
) -> Plan:
    """Compiles a resolved config for a topology.

    Args:
      config: the resolved config.
      topology: the devices to compile for.
      step: "train", or "sample" for one batch of `config.sample`.
      price: US dollars of a chip-hour; the list price by default.
      kernels: False to skip kernels, see `compile.outline_program`. The compiler cannot be stopped, so only a process
        that ends afterwards may use this: `quick.make` starts one.

    Raises:
      UserError: the mesh or batch does not divide over the topology, or libtpu does not know the topology's shape.
    """
    mesh = run_mesh(config, topology.devices())
    began = time.perf_counter()
    model = abstract_model(config)
    program = StepProgram.build(config, model, mesh)
    with recorded_choices() as chosen:
        if step == "train":
            # Checks that a microbatch splits as well.
            rules.local_positions(mesh, config.batch // config.optim.accumulate)
            held: tuple[Any, ...] = (program.state, program.frozen, program.batch)
            lowered = program.lower()
        else:
            # A run samples with its adapters added to their base.
            frozen = {name: tree for name, tree in program.frozen.items() if name != BASE}
            held = (program.frozen.get(BASE, program.state.params), frozen)
            lowered = Sampler(model, mesh, SamplingOptions.of(config.sample)).lower(*held)
    lowered_at = time.perf_counter()
    compiler = compile_program if kernels else outline_program
    compiled = compiler(lowered, sum(map(shard_bytes, jax.tree.leaves(held))), topology)
    compiled_at = time.perf_counter()
    statistics = found = None
    model_flops = train_flops(config, model) if step == "train" else None
    if compiled.program is not None:
        layout, steps = hlo_cost.Layout.of(mesh), config.steps if step == "train" else None
        statistics = hlo_cost.statistics(compiled.program, layout)
        waiting = hlo_timeline.waiting(compiled.program, layout, topology) if statistics.cycles else None
        found = roofline(topology, statistics, model_flops, steps, price, waiting)
    return Plan(
        topology=topology.name,
        slices=topology.slices,
        chips=topology.chips,
        hosts=topology.hosts,
        step=step,
        mesh=dict(mesh.shape),
        settings=settings(config, step),
        replicated=rules.replicated(mesh, program.boxed_params),
        attention=sorted(map(str, chosen)),
        memory=compiled.memory,
        model_flops=model_flops,
        statistics=statistics,
        roofline=found,
        constraints=lowered.as_text().count("sharding_constraint"),
        lower_seconds=lowered_at - began,
        compile_seconds=compiled_at - lowered_at,
        kernels=kernels,
        devices_per_chip=topology.devices_per_chip,
        missing=compiled.missing,
        analysis=compiled.analysis,
        unverified=topology.chip.unverified if topology.chip else (),
    )


def settings(config: ConfigDict, step: str) -> dict[str, Any]:
    """The settings, besides the mesh, that determine a plan's memory and speed."""
    if step == "sample":
        return {"batch": config.sample.batch, "sampler": config.sample.sampler, "steps": config.sample.steps}
    remat = config.backbone.get("remat", "none")
    return {
        "batch": config.batch,
        "microbatches": config.optim.accumulate,
        "remat": remat,
        "gather_once": config.sharding.gather_once,
        "sparse_core": config.sharding.sparse_core,
    }


def abstract_model(config: ConfigDict) -> Model:
    """The model of a config, built as for a new run, but without weights; tokenizer files may be missing."""
    source = open_source(config)
    tokenizer = make_tokenizer(config, source)
    model = build_model(config, tokenizer, source)
    if tokenizer is None:
        return dataclasses.replace(model, text_encoder=_WithoutTokenizer(model.text_encoder))
    return model


class _WithoutTokenizer:
    """A text encoder that gives every caption the same ids, because ids do not matter to a plan."""

    def __init__(self, encoder: encoders.TextEncoder) -> None:
        self._encoder = encoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def tokenize(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Captions -> (ids int32 [B, L], mask bool [B, L])."""
        shape = (len(captions), self._encoder.length)
        return np.zeros(shape, np.int32), np.ones(shape, bool)
