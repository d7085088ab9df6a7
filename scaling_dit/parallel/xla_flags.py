"""XLA options by TPU generation and number of slices, each with its reason.

Each program gets them when it is compiled (`jax.jit(..., compiler_options=...)`), not the process, so that a plan and
its run use the same options. GPUs and CPUs have none. Continuation fusion (`xla_tpu_overlap_compute_collective_tc` with
asynchronous gathers) is left out: libtpu refuses it on v5p and sets it by itself on v5e.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from scaling_dit.parallel import topologies


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of XLA.

    Attributes:
      name: its name in XLA.
      value: the value it is set to.
      reason: why it is set.
      chips: the generations that get it.
      least_slices: the least number of slices from which a program gets it.
      sparse_core: whether only runs with `sharding.sparse_core` get it.
    """

    name: str
    value: Any
    reason: str
    chips: Sequence[str] = topologies.TPUS
    least_slices: int = 1
    sparse_core: bool = False


OPTIONS: tuple[Option, ...] = (
    Option(
        "xla_tpu_enable_latency_hiding_scheduler",
        True,
        "orders a program so that collectives run beside the computation that does not wait for them",
    ),
    Option(
        "xla_tpu_enable_data_parallel_all_reduce_opt",
        True,
        "sums the gradients of all slices during the backward pass, because the network between slices is slow",
        least_slices=2,
    ),
    Option(
        "xla_tpu_data_parallel_opt_different_sized_ops",
        True,
        "lets the option above join all-reduces of unequal sizes, such as those of a model's layers",
        least_slices=2,
    ),
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_all_gather",
        True,
        "gathers parameters beside the computation; a v5p has no other asynchronous gather",
        chips=topologies.SPARSE_CORES,
        sparse_core=True,
    ),
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
        True,
        "sums and scatters gradients beside the computation",
        chips=topologies.SPARSE_CORES,
        sparse_core=True,
    ),
)


def options(devices: Sequence[Any], sparse_core: bool = False) -> dict[str, Any]:
    """The options of programs for these devices, attached or from a topology description.

    Args:
      devices: jax devices.
      sparse_core: `config.sharding.sparse_core`, whether SparseCores gather and sum.
    """
    chip = topologies.find_chip(devices[0].device_kind)
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    return {
        option.name: option.value
        for option in OPTIONS
        if chip is not None and chip.name in option.chips and slices >= option.least_slices
        if sparse_core or not option.sparse_core
    }
