"""Plans: the memory of the real state, what does not fit, and searches."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import types
from unittest import mock

import jax
import numpy as np
import pytest

from scaling_dit import config as config_lib
from scaling_dit.checkpoints.workdir import Workdir
from scaling_dit.cli import main as cli
from scaling_dit.data.loader import make_loader
from scaling_dit.errors import UserError
from scaling_dit.parallel import rules, topologies
from scaling_dit.parallel.topologies import CHIPS, GIB, LOCAL, parse
from scaling_dit.planning import (
    compile as plan_compile,
)
from scaling_dit.planning import (
    plan,
)
from scaling_dit.planning import (
    quick as plan_quick,
)
from scaling_dit.planning import (
    report as plan_report,
)
from scaling_dit.planning import (
    search as plan_search,
)
from scaling_dit.planning.hlo_cost import Collective, Statistics
from scaling_dit.planning.roofline import roofline
from scaling_dit.training.program import place_seed
from scaling_dit.training.start import Run
from tests.support import xla
from tests.support.plans import command, quickly

SMOKE = "experiments/shapes.py:smoke"
# One block, where no figure of the plan is the subject: what is compiled takes the time.
SMALL = "--config.backbone.depth=1"
FSDP = ["--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.batch=16"]
# Of one block, wide enough for the text encoder beside it to be small.
ONE_BLOCK = [*FSDP, "--config.backbone.depth=1", "--config.backbone.hidden=64"]


@pytest.fixture
def here(capfd):
    """Runs `scaling-dit plan --quick` in this process, which compiles nothing: one of its own does.

    A function of flags and the exit code; it returns what both print, (out, err).
    """

    def run(*flags, code=0):
        with mock.patch.dict(os.environ, xla.plain_environment(), clear=True):
            assert cli.main(["plan", *flags, "--quick"]) == code
        return capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def local():
    """A plan of the smoke experiment, of one block, on the eight devices here."""
    return plan.make(config_lib.load(SMOKE, ONE_BLOCK), parse(LOCAL))


@pytest.mark.slow
def test_argument_bytes_are_those_of_the_real_state(local, tmp_path):
    run = Run.open(config_lib.load(SMOKE, ONE_BLOCK), Workdir(tmp_path / "run"))
    state = run.program.init(jax.random.key(run.config.seed))
    loader = make_loader(
        run.source, run.model.text_encoder.tokenize, batch=run.config.batch, seed=0, positions=run.positions
    )
    batch = rules.to_global(next(loader), run.program.mesh, run.config.batch)
    batch["seed"] = place_seed(run.config.seed, run.program.mesh)
    loader.close()
    device = run.program.mesh.devices.flat[0]
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves((state, run.frozen, batch))
        for shard in leaf.addressable_shards
        if shard.device == device
    )
    assert local.memory.arguments == held
    assert local.memory.peak >= held and local.memory.fits


def test_a_plan_counts_the_program_that_it_compiled(local):
    assert local.mesh == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
    statistics = local.statistics
    assert statistics.unknown_loops == 0 and local.constraints > 20
    # The text encoder trains along, and the oldest activations need no gradient.
    assert 0.9 < statistics.flops * local.chips / local.model_flops < 1.5
    kinds = {(row.kind, row.axes) for row in statistics.collectives}
    # Parameters are gathered where they are split; gradients are summed over all parts of the batch.
    assert ("all-gather", ("fsdp",)) in kinds and ("all-reduce", ("data", "fsdp")) in kinds
    assert local.roofline is None and "fits" in plan_report.report(local)
    assert json.loads(json.dumps(local.to_dict()))["memory"]["arguments"] == local.memory.arguments


@pytest.fixture(scope="module")
def verb():
    """What the verb prints of the smoke experiment on four chips that are not there."""
    (found,) = json.loads(command("--config=shapes:smoke", SMALL, "--topology=v5e:2x2", "--json").stdout)
    return found


@pytest.fixture(scope="module")
def quick():
    """The same without kernels."""
    return quickly("shapes:smoke", "v5e:2x2", SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["quick", "verb"])
def test_the_verb_compiles_for_a_tpu_that_is_not_there(kind, request):
    found = request.getfixturevalue(kind)
    assert found["chips"] == 4 and found["mesh"]["data"] * found["mesh"]["fsdp"] == 4
    memory, statistics, times = found["memory"], found["statistics"], found["roofline"]
    assert (
        memory["fits"] and memory["limit"] == round(15.75 * GIB) and 0 < memory["arguments"] < memory["peak"]
    )
    assert statistics["unknown_loops"] == 0
    assert sum(statistics["parts"].values()) == statistics["cycles"]
    assert times["limit"] == max(times[name] for name in ("compute", "hbm", "ici", "dcn")) > 0
    assert found["constraints"] > 20
    if kind == "quick":
        assert statistics["cycles"] == 0 and times["estimate"] is None
    else:
        assert statistics["cycles"] > 0 and times["limit"] < times["estimate"]


@pytest.mark.slow
def test_a_quick_plan_is_the_plan_but_for_cycles(verb, quick):
    found = quick
    for name in ("arguments", "limit", "fits"):
        assert found["memory"][name] == verb["memory"][name]
    # Kernels may ask for some more; the peak of many small arrays is far below what lies between them.
    assert found["memory"]["temporaries"] == pytest.approx(verb["memory"]["temporaries"], rel=0.01)
    assert found["memory"]["peak"] >= verb["memory"]["peak"]
    assert found["statistics"] == verb["statistics"] | {
        "cycles": 0,
        "parts": dict.fromkeys(verb["statistics"]["parts"], 0),
    }
    times = ("compute", "hbm", "ici", "dcn", "limit", "mfu_limit", "price")
    assert {name: found["roofline"][name] for name in times} == {
        name: verb["roofline"][name] for name in times
    }
    assert found["roofline"]["estimate"] is None and (found["kernels"], verb["kernels"]) == (False, True)
    for name in ("mesh", "settings", "replicated", "attention", "model_flops", "constraints"):
        assert found[name] == verb[name]


def test_a_quick_plan_says_what_it_leaves_out_and_leaves_nothing_behind(tmp_path, monkeypatch, here):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # What is found here is found by the process that compiles.
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    flags = "--config=shapes:smoke", "--config.backbone.depth=1", "--topology=v5p:2x2x1", "--step=sample"
    shown = here(*flags).out
    assert "without kernels: no cycles, no estimate" in shown and "  limit " in shown
    assert "  estimate " not in shown and "cycles  " not in shown and "estimate:" not in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_quick_search_ranks_by_the_limit(here):
    done = here("--config=shapes:smoke", SMALL, "--topology=v5e:2x2", "--search", "--search_limit=1")
    assert "1 compiled" in done.out and "ms limit  MFU limit" in done.out
    assert done.err.count("fits: True") == 1 and "Traceback" not in done.err


@pytest.mark.parametrize(
    "program, places, expected",
    [
        ("HloModule m\n\nENTRY %main {\n}\n\n", None, "does not write its memory layout"),
        ("HloModule m\n\nENTRY %main {\n}\n\n", "", "is incomplete"),
        ("HloModule m\n\nENTRY %main {\n}\n\n", "BufferAssignment:\nallocation 0: si", "is incomplete"),
        (
            "HloModule m\n\nENTRY %ma",
            "allocation 1: size 8, page 0, parameter 0, shape |f32[2]|:\n",
            "is incomplete",
        ),
    ],
)
def test_a_layout_that_is_not_there_or_cut_short_is_no_plan(program, places, expected):
    class Lowered:
        """Writes what a compiler writes."""

        def compile(self, compiler_options):
            folder = pathlib.Path(compiler_options["xla_dump_to"])
            files = {"after_optimizations.txt": program}
            if places is not None:
                files["after_optimizations-buffer-assignment.txt"] = places
                files["after_optimizations_after_buffer_assignment.txt"] = program
            for name, text in files.items():
                (folder / f"module_0000.jit_step.{name}").write_text(text)

    with pytest.raises(UserError, match=expected):
        plan_compile.outline_program(Lowered(), 8, parse("v5e:2x2"))


class Unread:
    """A compiled program that fits but cannot be read back."""

    def memory_analysis(self):
        sizes = {"argument_size_in_bytes": 8, "temp_size_in_bytes": 4, "output_size_in_bytes": 8}
        return types.SimpleNamespace(**sizes, alias_size_in_bytes=8, peak_memory_in_bytes=GIB)

    def cost_analysis(self):
        return {"flops": 12.0, "bytes accessed": 34.0, "utilization": 1.0}

    def as_text(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: async-update\nmore")

    def compile(self, compiler_options):
        assert compiler_options["xla_dump_hlo_as_text"]
        return self


@pytest.mark.parametrize(
    "name, reason", [("v5e:2x2", "INTERNAL: async-update"), ("tpu7x:2x2x1", "programs of this chip")]
)
def test_a_program_that_cannot_be_read_has_its_memory_and_a_reason(name, reason, local):
    found = plan_compile.compile_program(Unread(), 8, parse(name))
    assert found.program is None and reason in found.missing and "\n" not in found.missing
    assert found.memory.fits and found.memory.peak == GIB
    assert found.analysis == {"flops": 12.0, "bytes accessed": 34.0}
    made = dataclasses.replace(
        local, memory=found.memory, statistics=None, roofline=None, missing=found.missing, analysis=found.analysis,
        devices_per_chip=2, unverified=("hbm_bandwidth",),
    )  # fmt: skip
    text = plan_report.report(made)
    assert (
        "missing      FLOPs, traffic, collectives, cycles and times: the compiled program cannot be read"
        in text
    )
    assert reason in text and "bytes accessed 34, flops 12" in text and "8 chips of 2 devices" in text
    assert "unverified   hbm bandwidth of this chip" in text


def test_devices_of_a_chip_share_what_it_has():
    ring = Collective("all-gather", ("fsdp",), (0,), False, False, 1, 10**9, 10**9)
    counted = statistics([ring], cycles=10**9)
    one, two = (roofline(parse(f"{name}:4x4x4"), counted, 10**15, 3600) for name in ("v5p", "tpu7x"))
    v5p, tpu7x = CHIPS["v5p"], CHIPS["tpu7x"]
    assert two.compute == pytest.approx(one.compute * 2 * v5p.peak / tpu7x.peak)
    assert two.hbm == pytest.approx(one.hbm * 2 * v5p.hbm_bandwidth / tpu7x.hbm_bandwidth)
    assert two.ici == pytest.approx(2 * one.ici)
    assert two.mfu_limit == pytest.approx(10**15 / 64 / tpu7x.peak / two.limit)
    # The clock is not known.
    assert two.estimate is None and one.estimate is not None


@pytest.mark.slow
def test_tpu7x_is_planned_and_what_is_not_verified_is_named():
    done = command("--config=shapes:smoke", SMALL, "--topology=tpu7x:2x2x1", "--json")
    (found,) = json.loads(done.stdout)
    assert (found["chips"], found["devices_per_chip"], found["mesh"]["data"]) == (4, 2, 8)
    assert found["memory"]["limit"] == int(94.74 * GIB) and found["memory"]["fits"]
    assert found["unverified"] == ["hbm_bandwidth", "link_bandwidth", "dcn_bandwidth"]
    # Read from the compiler's own text, for jax cannot read these programs back.
    assert found["missing"] == "" and found["statistics"]["flops"] > 0 and found["statistics"]["collectives"]
    assert found["statistics"]["cycles"] > 0 and found["roofline"]["estimate"] is None
    assert "stack trace" not in done.stderr


def test_a_process_that_is_killed_is_one_line(monkeypatch):
    monkeypatch.setattr(plan_quick, "__name__", "this_is_no_module")
    config = config_lib.load(SMOKE, FSDP)
    with pytest.raises(UserError, match="ended with code 1; its messages are above"):
        plan_quick.make(config, parse("v5e:2x2"))
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, -9))
    with pytest.raises(UserError, match="ended by SIGKILL; is there too little memory"):
        plan_quick.make(config, parse("v5e:2x2"))


@pytest.mark.slow
def test_the_process_of_a_quick_plan_ends_with_its_parent(tmp_path):
    verb = [
        sys.executable,
        "-m",
        "scaling_dit",
        "plan",
        "--config=shapes:smoke",
        "--topology=v5e:2x2",
        "--quick",
    ]
    with subprocess.Popen(
        verb, env=xla.plain_environment() | {"TMPDIR": str(tmp_path)}, stderr=subprocess.DEVNULL
    ) as parent:
        while not list(tmp_path.glob("*/request")):
            time.sleep(0.1)
        # Python of the child starts.
        time.sleep(1)
        parent.terminate()
    for _ in range(300):
        if not list(tmp_path.iterdir()):
            break
        time.sleep(0.1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, expected",
    [
        (
            ["--topology=local", "--config=shapes:smoke", "--search"],
            "it cannot go together with --topology=local",
        ),
        (["--topology=v5e:2x2", "--config=shapes:smoke", "--config.batch=6"], "batch 6 cannot be split"),
    ],
)
def test_a_mistake_in_a_quick_plan_is_one_line(flags, expected, here):
    error = here(*flags, code=2).err
    assert expected in error.strip().splitlines()[-1] and "Traceback" not in error


def test_places_in_memory_are_added_up():
    text = """BufferAssignment:
allocation 0: size 512, page 0, thread-local:
 value: <68 reduce_sum.20 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 4096, page 0, parameter 3, shape |bf16[3,3,640,640]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 100, page 0, parameter 12, shape |bf16[32,16,16,320]| at ShapeIndex {}:
allocation 3: size 7, color 1, page 0, preallocated-temp:
allocation 4: size 30, page 0, preallocated-temp:
allocation 5: size 2, page 0, maybe-live-out:
allocation 6: size 8, page 0, output shape is |(f32[640], bf16[3,3,640,640])|, maybe-live-out:
allocation 7: size 512, page 0, constant:
allocation 8: size 9, color 5, page 0, parameter 13, shape |f32[9]| at ShapeIndex {}:
"""
    assert plan_compile.allocated(text) == (4196, 30, 10)


@pytest.mark.slow
@pytest.mark.parametrize("quick", [False, True])
def test_what_cannot_fit_says_so_with_numbers_and_exit_code_1(quick, here):
    flags = "--config=dit_scaling:large_dit-h4096-d32-n32", "--topology=v5e:2x2"
    said = here(*flags, code=1).out if quick else command(*flags, code=1).stdout
    assert "does not fit" in said and "of 15.75 GiB" in said
    needed = float(said.split("needs at least ")[1].split(" ")[0])
    # Parameters, two moments and an average of 7.6B in float32, over 4 chips.
    assert 27 < needed < 30


@pytest.mark.parametrize(
    "message, needed, there",
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (256.00G) exceeds available HBM (15.75G). HLO module: jit_step.",
            256 * GIB,
            15.75 * GIB,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
            20.5 * GIB,
            15.75 * GIB,
        ),
    ],
)
def test_the_compilers_numbers_are_read(message, needed, there):
    assert plan_compile.out_of_memory(message, None) == (needed, there)


def test_another_error_of_the_compiler_is_one_line():
    with pytest.raises(UserError, match="the compiler fails: INTERNAL: something") as error:
        plan_compile.out_of_memory("INTERNAL: something\nat some place", None)
    assert "\n" not in str(error.value)
    # Of a core, not of the chip.
    with pytest.raises(UserError, match="the compiler fails: RESOURCE_EXHAUSTED.* vmem"):
        plan_compile.out_of_memory(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 28.33M of 16.00M vmem.", None
        )


def test_a_batch_that_does_not_split_is_one_line():
    with pytest.raises(UserError, match="batch 12 cannot be split"):
        plan.make(config_lib.load(SMOKE, [*FSDP[:2], "--config.batch=12"]), parse(LOCAL))


def statistics(collectives=(), **changes):
    fields = {"flops": 459e12, "kernel_flops": 0, "undeclared_kernels": 0, "hbm_bytes": 2.765e11, "cycles": 0}
    fields |= {"parts": {}, "unknown_loops": 0} | changes
    return Statistics(collectives=tuple(collectives), **fields)


def test_a_roofline_by_hand():
    topology = parse("v5p:4x4x4", slices=2)
    ring = Collective("all-gather", ("fsdp",), (0, 1, 2), False, True, 1, 0, 300 * 10**9)
    exposed = Collective("all-reduce", ("tensor",), (0,), False, False, 1, 0, 50 * 10**9)
    across = Collective("all-reduce", ("data",), (), True, False, 1, 0, 6_250_000_000)
    found = roofline(
        topology, statistics([ring, exposed, across], cycles=1_750_000_000), 128 * 459 * 10**12, 3600, 2.0
    )
    assert found.compute == pytest.approx(1.0) and found.hbm == pytest.approx(0.1)
    assert found.ici == pytest.approx(0.5 + 0.25) and found.dcn == pytest.approx(1.0)
    assert found.exposed == pytest.approx(0.25 + 1.0)
    assert found.limit == pytest.approx(1.0) and found.mfu_limit == pytest.approx(1.0)
    assert found.estimate == pytest.approx(2.25) and found.mfu_estimate == pytest.approx(1 / 2.25)
    assert found.chip_hours_limit == pytest.approx(128) and found.price == 2.0
    assert "x $2.00 = $256" in "\n".join(plan_report.roofline_lines(found))


def test_the_bound_is_the_slowest_and_no_chip_has_no_roofline():
    found = roofline(parse("v5p:4x4x4"), statistics(hbm_bytes=2.765e12 * 3), None, None)
    assert (found.bound, found.estimate, found.mfu_limit, found.chip_hours_limit) == ("HBM", None, None, None)
    assert found.price == CHIPS["v5p"].price
    assert roofline(parse(LOCAL), statistics(), 1, 1) is None


@pytest.fixture
def made(monkeypatch):
    """Instead of compiling: a program whose memory halves with each saving and whose time grows with it."""
    tried = []

    def make(config, topology, step, price):
        remat = plan_search.REMAT.index(config.backbone.remat)
        saving = remat + plan_search.MICROBATCHES.index(config.optim.accumulate)
        mesh = config.mesh.to_dict()
        once = config.sharding.gather_once
        tried.append((mesh["fsdp"], config.optim.accumulate, config.backbone.remat, once))
        peak = int((200 if once else 100) * GIB / 2**saving)
        time = (1 + saving) * (2 if mesh["tensor"] > 1 else 1) * (0.7 if once else 1)
        counted = statistics(cycles=int(time * CHIPS["v5e"].clock))
        return plan.Plan(
            topology.name, 1, topology.chips, topology.hosts, step, mesh, plan.settings(config, step),
            rules.Replicated(1, 0, ()), [], plan.Memory(GIB, 0, peak, 16 * GIB, peak < 16 * GIB), 10**12, counted,
            roofline(topology, counted, 10**12, 10, price), 1, 0.0, 0.0,
        )  # fmt: skip

    monkeypatch.setattr(plan, "make", make)
    monkeypatch.setattr(topologies.Topology, "devices", lambda self: jax.devices())
    return tried


def test_a_search_tries_the_cheapest_first_and_ranks_what_fits(made):
    config = config_lib.load("experiments/dit_scaling.py:uvit-h1024-d20-n16", ["--config.batch=64"])
    found = plan_search.search(config, parse("v5e:2x4"), "train", None, limit=9)
    assert made[0] == (8, 1, "none", False) and len(made) == len(found) == 9
    assert [row.memory.fits for row in found] == sorted((row.memory.fits for row in found), reverse=True)
    fitting = [row.roofline.estimate for row in found if row.memory.fits]
    assert fitting == sorted(fitting) and fitting
    table = plan_report.search_table(parse("v5e:2x4"), found)
    assert len(table.splitlines()) == 2 + len(found) and " yes " in table and " no " in table


def test_a_search_keeps_sparse_cores_where_it_gathers_once(made):
    flags = ["--config.batch=64", "--config.sharding.gather_once=True", "--config.sharding.sparse_core=True"]
    config = config_lib.load("experiments/dit_scaling.py:uvit-h1024-d20-n16", flags)
    found = plan_search.search(config, parse("v5p:2x2x2"), "train", None, limit=9)
    kept = {(row.settings["gather_once"], row.settings["sparse_core"]) for row in found}
    assert kept == {(True, True), (False, False)}
    table = plan_report.search_table(parse("v5p:2x2x2"), found)
    assert " gather_once sparse_core " in table


def test_a_search_does_not_compile_what_must_need_more_than_what_failed(made):
    config = config_lib.load("experiments/dit_scaling.py:uvit-h1024-d20-n16", ["--config.batch=64"])
    plan_search.search(config, parse("v5e:2x4"), "train", None, limit=100)
    own = [rest for fsdp, *rest in made if fsdp == 8]
    place = {tuple(settings): at for at, settings in enumerate(own)}
    assert len(place) == len(own)
    # Whatever saves less comes earlier, or was known to fail.
    for microbatches, remat, once in place:
        for other in plan_search.REMAT[: plan_search.REMAT.index(remat)]:
            assert place.get((microbatches, other, once), -1) < place[(microbatches, remat, once)]
    # 50 GiB without gathering once do not fit, so twice that was not compiled; half of 16 was.
    assert (1, "products", False) in place and (1, "products", True) not in place
    assert (2, "dots", False) in place and (2, "dots", True) in place


def test_a_search_gathers_once_where_a_mesh_and_the_chip_allow_it(made):
    config = config_lib.load("experiments/dit_scaling.py:uvit-h1024-d20-n16", ["--config.batch=64"])
    found = plan_search.search(config, parse("v5e:2x4"), "train", None, limit=100)
    assert {(row.mesh["data"], row.mesh["tensor"]) for row in found if row.settings["gather_once"]} == {
        (1, 1)
    }
    best = plan_report.search_table(parse("v5e:2x4"), found).splitlines()[2]
    assert found[0].settings["gather_once"] and best.strip().startswith("fsdp=8 gather_once ")
    with config.unlocked():
        config.sharding.gather_once = True
    for sizes, topology, step, wanted in (
        # The config's own first.
        ((1, 8, 1, 1), "v5e:2x4", "train", (True, False)),
        ((1, 4, 1, 2), "v5e:2x4", "train", (False,)),
        ((2, 4, 1, 1), "v5e:2x4", "train", (False,)),
        ((1, 8, 1, 1), "v5e:2x4", "sample", (False,)),
        ((1, 8, 1, 1), LOCAL, "train", (False,)),
    ):
        mesh = dict(zip(("data", "fsdp", "context", "tensor"), sizes, strict=True))
        assert plan_search.gathers(config, mesh, parse(topology), step) == wanted


def test_meshes_begin_with_the_config_s_own_and_cover_all_chips():
    own = {"data": 1, "fsdp": 64, "context": 1, "tensor": 1}
    found = plan_search.meshes(own, 64, 1)
    assert found[0] == own and len(found) > 5
    assert all(np.prod(list(mesh.values())) == 64 for mesh in found)
    assert all(mesh["data"] % 4 == 0 for mesh in plan_search.meshes(own, 64, 4)[1:])
