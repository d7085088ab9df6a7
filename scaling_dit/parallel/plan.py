"""Compiles a run's real program for machines that are not there, and tells whether it fits and how fast it can be.

What is compiled is what `train` and `sample` run: the same functions, shardings and XLA options (`program.StepProgram`,
`generate.Sampler`), on the devices of a topology description instead of real ones. So the memory is the compiler's own
figure for the real run, and FLOPs and collectives are counted in the program itself (`hlo_cost`).
"""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from scaling_dit import encoders, generate, pipeline
from scaling_dit.backbones.attention import recorded_choices
from scaling_dit.errors import UserError
from scaling_dit.parallel import hlo, hlo_cost, hlo_timeline, rules
from scaling_dit.parallel.roofline import Roofline, roofline
from scaling_dit.parallel.topologies import GIB, LOCAL, TPUS, Topology
from scaling_dit.program import StepProgram, run_mesh
from scaling_dit.scaling.count import count

STEPS = ("train", "sample")


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM of one chip, in bytes.

    Attributes:
      arguments: state, frozen weights and batch, as they lie between steps. Sums of shards, padding included.
      temporaries: what a step needs on top; None for a program that was not compiled to its end.
      peak: most at any time; for a program that does not fit, what it needs at least.
      limit: what a program can have; None if not known.
      fits: whether the compiler accepts the program and the peak is within the limit.
    """

    arguments: int
    temporaries: int | None
    peak: int
    limit: int | None
    fits: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of one program on one topology before it runs there.

    Attributes:
      topology: name; slices: how many; chips, hosts: of all slices.
      step: "train" or "sample".
      mesh: axis -> size.
      settings: batch, and fields of the config that `--search` varies.
      replicated: parameters that every chip holds whole.
      attention: what each kind of attention call is computed with.
      memory: of one chip.
      model_flops: FLOPs of a train step over all chips by `scaling.count`; None for sampling.
      statistics: of the compiled program, for one chip; None if it does not fit.
      roofline: None without statistics, or for an unknown chip.
      constraints: sharding constraints in the traced program.
      lower_seconds, compile_seconds: what tracing and lowering, and compiling took here.
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

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return dataclasses.asdict(self)


def make(config: ConfigDict, topology: Topology, step: str = "train", price: float | None = None) -> Plan:
    """Compiles a resolved config for a topology.

    Args:
      step: "train", or "sample" for one batch of `config.sample`.
      price: US dollars of a chip-hour; the list price if not given.

    Raises:
      UserError: a mesh or batch that the topology does not divide, or a shape that libtpu does not know.
    """
    mesh = run_mesh(config, topology.devices())
    began = time.perf_counter()
    model = abstract_model(config)
    program = StepProgram.build(config, model, mesh)
    with recorded_choices() as chosen:
        if step == "train":
            rules.local_positions(
                mesh, config.batch // config.optim.accumulate
            )  # a microbatch must split as well
            held: tuple[Any, ...] = (program.state, program.frozen, program.batch)
            lowered = program.lower()
        else:
            held = (program.state.params, program.frozen)
            lowered = generate.Sampler.of(model, mesh, config.sample).lower(*held)
    lowered_at = time.perf_counter()
    compiled, memory = compile_program(lowered, sum(map(shard_bytes, jax.tree.leaves(held))), topology)
    compiled_at = time.perf_counter()
    statistics = found = None
    model_flops = train_flops(config, model) if step == "train" else None
    if compiled is not None:
        layout, steps = hlo_cost.Layout.of(mesh), config.steps if step == "train" else None
        statistics = hlo_cost.statistics(compiled, layout)
        waiting = hlo_timeline.waiting(compiled, layout, topology) if statistics.cycles else None
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
        memory=memory,
        model_flops=model_flops,
        statistics=statistics,
        roofline=found,
        constraints=lowered.as_text().count("sharding_constraint"),
        lower_seconds=lowered_at - began,
        compile_seconds=compiled_at - lowered_at,
    )


def settings(config: ConfigDict, step: str) -> dict[str, Any]:
    """What a plan's memory and speed depend on beside the mesh."""
    if step == "sample":
        return {"batch": config.sample.batch, "sampler": config.sample.sampler, "steps": config.sample.steps}
    remat = config.backbone.get("remat", "none")
    return {
        "batch": config.batch,
        "microbatches": config.optim.accumulate,
        "remat": remat,
        "gather_once": config.mesh.gather_once,
        "sparse_core": config.mesh.sparse_core,
    }


def abstract_model(config: ConfigDict) -> pipeline.Model:
    """The model of a config, built as a new run builds it, without weights, and without tokenizer files if need be."""
    source = pipeline.create_source(config)
    tokenizer = pipeline.make_tokenizer(config, source)
    model = pipeline.build(config, tokenizer, source)
    if tokenizer is None:
        return dataclasses.replace(model, text_encoder=_WithoutTokenizer(model.text_encoder))
    return model


class _WithoutTokenizer:
    """A text encoder that makes the same ids of every caption: which ones changes nothing in a plan."""

    def __init__(self, encoder: encoders.TextEncoder) -> None:
        self._encoder = encoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def tokenize(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Captions -> (ids int32 [B, L], mask bool [B, L])."""
        shape = (len(captions), self._encoder.length)
        return np.zeros(shape, np.int32), np.ones(shape, bool)


def train_flops(config: ConfigDict, model: pipeline.Model) -> int | None:
    """FLOPs of one train step over all chips, of the backbone alone; None for one that cannot be counted."""
    text = (model.text_encoder.length, model.text_encoder.dim)
    backbone: Any = model.backbone
    try:
        return count(backbone, model.latent_shape, text).train_flops(config.batch, 1)
    except UserError:
        return None


def compile_program(lowered: Any, arguments: int, topology: Topology) -> tuple[hlo.Program | None, Memory]:
    """(the compiled program, or None if it does not fit, its memory on one chip).

    `arguments` are the bytes of what it takes; where they alone do not fit, nothing is compiled.
    """
    limit = int(topology.chip.usable_hbm) if topology.chip else None
    if limit is not None and arguments > limit:
        return None, Memory(arguments, None, arguments, limit, fits=False)
    try:
        compiled, text = hlo.compiled_text(lowered, dump=topology.name != LOCAL)
    except jax.errors.JaxRuntimeError as error:
        needed, limit = out_of_memory(str(error), limit)
        return None, Memory(arguments, None, needed, limit, fits=False)
    analysis = compiled.memory_analysis()
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    # Compilers for other chips than TPUs leave arguments out of their peak. Results that do not take the place of the
    # donated state lie beside all the rest.
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    on_tpu = topology.chip is not None and topology.chip.name in TPUS
    peak = analysis.peak_memory_in_bytes if on_tpu else arguments + temporaries + fresh
    return hlo.Program(text), Memory(arguments, temporaries, peak, limit, fits=limit is None or peak <= limit)


def out_of_memory(message: str, limit: int | None) -> tuple[int, int | None]:
    """(bytes needed, bytes there) from the compiler's error.

    Raises:
      UserError: an error of another kind, in one line.
    """
    known = "RESOURCE_EXHAUSTED" in message or "Ran out of memory" in message
    if not known or "space vmem" in message:  # a kernel's own memory is no matter of what fits the chip
        raise UserError(f"the compiler fails: {message.strip().partition(chr(10))[0]}")
    found = re.search(r"[Uu]sed ([\d.]+)([GM]) of ([\d.]+)([GM])", message) or re.search(
        r"\(([\d.]+)([GM])\) exceeds available \w+ \(([\d.]+)([GM])\)", message
    )
    if found is None:
        raise UserError(f"the program does not fit: {message.strip().partition(chr(10))[0]}")
    unit = {"G": GIB, "M": 2**20}
    return int(float(found[1]) * unit[found[2]]), int(float(found[3]) * unit[found[4]])


def shard_bytes(leaf: Any) -> int:
    """Bytes of one device's part of an abstract array with a sharding, without the padding of a memory layout."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
