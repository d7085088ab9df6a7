"""Waiting for collectives is what their places in a program leave of their time on the wire."""

import types

import numpy as np
import pytest

from scaling_dit.parallel import topologies
from scaling_dit.planning import hlo, hlo_timeline
from scaling_dit.planning.hlo_cost import Layout

# Four chips in a line: a link takes 1 byte a second each way, so a ring of four takes 2; a cycle is a second.
CHIP = types.SimpleNamespace(dcn_bandwidth=0.5, clock=1.0, devices=1)
TOPOLOGY = types.SimpleNamespace(chip=CHIP, ici_bandwidth=lambda axes: 2.0)
LAYOUT = Layout({"fsdp": 4}, np.arange(4)[:, None])
GROUPS = "replica_groups={{0,1,2,3}}"


def compute(name, cycles):
    return (
        f'  %{name} = f32[8]{{0}} fusion(%x), kind=kLoop, backend_config={{"estimated_cycles":"{cycles}"}}\n'
    )


def waits(body, *computations):
    text = "\n".join(
        [*computations, "ENTRY %main (x: f32[4]) -> f32[8] {", "  %x = f32[4]{0} parameter(0)", body]
    )
    return hlo_timeline.waiting(hlo.Program(text + "}\n"), LAYOUT, TOPOLOGY)


# 16 bytes gathered whole, 12 of them sent: 6 seconds.
GATHER = f"  %g = f32[4]{{0}} all-gather(%x), {GROUPS}, dimensions={{0}}\n".replace("%x", "%s")
SHARD = "  %s = f32[1]{0} slice(%x), slice={[0:1]}\n"
START = SHARD + f"  %b = (f32[1]{{0}}, f32[4]{{0}}) all-gather-start(%s), {GROUPS}, dimensions={{0}}\n"
DONE = "  %d = f32[4]{0} all-gather-done(%b)\n"


def test_a_synchronous_collective_takes_its_time():
    assert waits(compute("a", 5) + SHARD + GATHER + compute("c", 7)) == 6


@pytest.mark.parametrize("cycles, waited", [(0, 6), (2, 4), (6, 0), (50, 0)])
def test_an_asynchronous_one_what_computation_leaves_of_it(cycles, waited):
    assert waits(START + compute("a", cycles) + DONE + compute("c", 9)) == waited


def test_a_network_does_one_after_the_other():
    second = START.replace("%b", "%b2").replace("%s", "%s2")
    assert (
        waits(START + second + compute("a", 10) + DONE + DONE.replace("%d", "%e").replace("%b", "%b2")) == 2
    )
    synchronous = GATHER.replace("%g", "%g2")
    # The wire is free after the first.
    assert waits(START + compute("a", 2) + synchronous + DONE) == 4 + 6


def test_sparse_cores_begin_with_their_update():
    """As libtpu 0.0.51 writes them: the start takes nothing, the update the data."""
    inner = (
        "%sent (p: f32[1]) -> f32[4] {\n  %p = f32[1]{0} parameter(0)\n"
        f"  ROOT %g = f32[4]{{0}} all-gather(%p), {GROUPS}, dimensions={{0}}\n}}"
    )
    start = '  %b = ((), (), s32[]) async-start(), async_execution_thread="sparsecore", calls=%sent\n'
    update = "  %u = ((f32[1]{0}), f32[4]{0}, s32[]) async-update(%b, %s), calls=%sent\n"
    done = "  %d = f32[4]{0} async-done(%u), calls=%sent\n"
    assert waits(SHARD + start + compute("a", 5) + update + compute("c", 2) + done, inner) == 4


def test_fusions_that_go_on_with_a_gather_hand_it_on():
    """A v5e begins a gather in one fusion, continues it beside products in others, and waits for it in a last one."""
    part = (
        "%NAME (p: f32[1]) -> f32[4] {\n  %p = f32[1]{0} parameter(0)\n"
        f"  ROOT %NAME_g = f32[4]{{0}} all-gather(%p), {GROUPS}, dimensions={{0}}\n}}"
    )
    names = ("first", "async_collective_fusion.1", "last")
    body = (
        SHARD
        + "  %async-collective-start = (f32[1]{0}, u32[]) fusion(%s), kind=kCustom, calls=%first\n"
        + "  %h = u32[] get-tuple-element(%async-collective-start), index=1\n"
        + "  %f = (f32[8]{0}, u32[]) fusion(%h, %s), kind=kOutput, calls=%async_collective_fusion.1,"
        + ' backend_config={"estimated_cycles":"4"}\n'
        + "  %i = u32[] get-tuple-element(%f), index=1\n"
        + "  %async-collective-done = f32[4]{0} fusion(%i), kind=kCustom, calls=%last\n"
    )
    assert waits(body, *(part.replace("NAME", name) for name in names)) == 2


def loop(times):
    noted = f'backend_config={{"known_trip_count":{{"n":"{times}"}}}}'
    return f"  %w = f32[4]{{0}} while(%x), condition=%other, body=%body, {noted}\n"


def branch(name, *lines):
    return "\n".join(
        [f"%{name} (x: f32[4]) -> f32[4] {{", "  %x = f32[4]{0} parameter(0)", "".join(lines) + "}"]
    )


@pytest.mark.parametrize("times", [0, 1, 3])
def test_loops_wait_as_often_as_they_run(times):
    assert waits(loop(times), branch("body", START, compute("a", 1), DONE), branch("other")) == times * 5


def test_of_branches_the_one_of_most_instructions_counts_as_in_the_other_figures():
    branches = "  %c = f32[4]{0} conditional(%x, %x, %x), branch_computations={%body, %other}\n"
    assert waits(branches, branch("body", START, DONE), branch("other", compute("a", 100))) == 6
    assert waits(branches, branch("body", START), branch("other", *(compute(n, 9) for n in "abcd"))) == 0


def test_what_a_loop_has_not_waited_for_ends_with_each_of_its_runs():
    assert waits(loop(2), branch("body", START, compute("a", 1)), branch("other")) == 2 * 5
    # A loop that sends nothing runs beside what was started before it.
    held = START + loop(2) + DONE
    assert waits(held, branch("body", compute("a", 2)), branch("other")) == 2
    assert waits(held, branch("body", SHARD, GATHER), branch("other")) == 6 + 2 * 6


def test_nothing_is_said_of_a_chip_that_is_not_known():
    program = hlo.Program("ENTRY %main () -> f32[] {\n}\n")
    unknown = topologies.Topology("local", None, (8,))
    assert hlo_timeline.waiting(program, LAYOUT, unknown) is None
