"""XLA options by TPU generation and number of slices, each with its reason.

They are given to a program as it is compiled (`jax.jit(..., compiler_options=...)`), not to the process, so that a plan
and the run it is for get the same ones. There are none for GPUs and CPUs. What is not here: continuation fusion
(`xla_tpu_overlap_compute_collective_tc` with asynchronous gathers), which libtpu refuses on v5p and sets itself on v5e.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from scaling_dit.parallel import topologies


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of XLA.

    Attributes:
      name: as XLA knows it.
      value: what it is set to.
      reason: why.
      chips: the generations it is for.
      least_slices: the least number of slices it is for.
      sparse_core: whether it is only for runs with `sharding.sparse_core`.
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
        "sums the gradients of all slices while the backward pass still runs, for the network between slices is slow",
        least_slices=2,
    ),
    Option(
        "xla_tpu_data_parallel_opt_different_sized_ops",
        True,
        "lets the former join all-reduces of unequal sizes, as the layers of a model have",
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
    """The options of programs for these jax devices, or those of a topology description.

    `sparse_core`: whether SparseCores are to gather and sum, `config.sharding.sparse_core`.
    """
    chip = topologies.find_chip(devices[0].device_kind)
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    return {
        option.name: option.value
        for option in OPTIONS
        if chip is not None and chip.name in option.chips and slices >= option.least_slices
        if sparse_core or not option.sparse_core
    }
