"""Plans of the papers' sizes on the papers' slices, and what moves between chips there."""

import json

import pytest

from scaling_dit import config as config_lib
from scaling_dit.parallel.topologies import GIB
from scaling_dit.planning import hlo_cost, plan
from tests.support.plans import command, quickly

# (config, topology, flags, most GiB at the peak)
PAPER = [
    ("dit_scaling:uvit-h2048-d42-n16", "v5e:16x16", [], 8.0),
    ("dit_scaling:large_dit-h4096-d32-n32", "v5p:4x4x4", ["--config.backbone.remat=full"], 40.0),
]
# Of the stand-in for the text encoder, which is trained along and would be most of a small program.
ONE_LAYER = "--config.text_encoder.depth=1"
# Nine images for each of 256 chips, a number that no width has.
BATCH = 2304


@pytest.fixture(scope="module", params=PAPER, ids=lambda case: case[0])
def paper(request):
    """A plan of a paper's config, and the budget it has."""
    spec, topology, flags, budget = request.param
    return quickly(spec, topology, f"--config.batch={BATCH}", *flags), budget


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_paper_s_size_fits_within_its_budget(paper):
    found, budget = paper
    assert found["memory"]["fits"] and found["memory"]["peak"] < budget * GIB
    assert found["lower_seconds"] < 20
    assert found["replicated"]["whole"] < 0.01 * found["replicated"]["total"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fsdp_gathers_parameters_and_reduces_gradients_and_nothing_else(paper):
    found, _ = paper
    rows = found["statistics"]["collectives"]
    assert {tuple(row["axes"]) for row in rows} == {("fsdp",)}
    # Bytes in bfloat16.
    parameters = found["replicated"]["total"] // 2
    moved = sum(row["size"] for row in rows)
    # Gathered forward, backward, and once more where a layer is computed again; gradients reduced once.
    assert 2.5 * parameters < moved < 4.5 * parameters
    assert {row["kind"] for row in rows} <= {
        "all-gather",
        "all-reduce",
        "reduce-scatter",
        "collective-permute",
        "all-to-all",
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("row", ["uvit-h1024-d20-n16", "pixart-h1024-d28", "large_dit-h1024-d16-n16"])
def test_without_rematerialisation_the_program_does_the_model_s_flops(row):
    found = quickly(
        f"dit_scaling:{row}", "v5p:2x2x1", "--config.batch=64", "--config.backbone.remat=none",
        "--config.backbone.attention=xla", ONE_LAYER,
    )  # fmt: skip
    assert found["statistics"]["flops"] * found["chips"] == pytest.approx(found["model_flops"], rel=0.05)


@pytest.mark.slow
def test_sparse_cores_gather_and_sum_beside_the_computation():
    """All kernels are gathered and their gradients summed; what is left are scales, biases and the loss."""
    done = command(
        # Of widths whose kernels compile in half the time.
        "--config=dit_scaling:uvit-h1024-d20-n16", "--config.backbone.hidden=256", "--config.backbone.heads=4",
        "--config.text_encoder.dim=256", "--config.text_encoder.heads=4",
        "--topology=v5p:2x2x2", "--config.batch=8", "--json",
        "--config.backbone.depth=1", "--config.backbone.scan_layers=False", "--config.backbone.remat=none",
        "--config.sharding.gather_once=True", "--config.sharding.sparse_core=True", ONE_LAYER,
    )  # fmt: skip
    (found,) = json.loads(done.stdout)
    rows = found["statistics"]["collectives"]
    beside = [row for row in rows if row["asynchronous"]]
    assert {"all-gather", "reduce-scatter"} <= {row["kind"] for row in beside}
    assert sum(row["wire"] for row in beside) > 0.9 * sum(row["wire"] for row in rows)
    times = found["roofline"]
    assert 0 < times["exposed"] < times["ici"]
    assert found["settings"]["sparse_core"]


@pytest.mark.slow
def test_no_array_of_a_program_holds_the_whole_batch():
    from scaling_dit.planning.hlo import Program
    from scaling_dit.training.program import StepProgram, run_mesh

    config = config_lib.load("experiments/dit_scaling.py:uvit-h1024-d20-n16", [
        "--config.backbone.hidden=128", "--config.backbone.depth=2", "--config.batch=72", "--config.backbone.heads=2",
        "--config.text_encoder.dim=128", "--config.text_encoder.heads=2", ONE_LAYER,
    ])  # fmt: skip
    mesh = run_mesh(config)
    step = StepProgram.build(config, plan.abstract_model(config), mesh)
    program = Program(step.lower().compile().as_text())
    arrays = [array for visit in program.walk() for array in visit.instruction.arrays]
    # An eighth of it.
    assert any(9 in array.dims for array in arrays)
    whole = [array.size for array in arrays if 72 in array.dims]
    # Timesteps, keys: numbers for each image, never its latents.
    assert max(whole, default=0) <= 72 * 8 * 4
    assert hlo_cost.statistics(program, hlo_cost.Layout.of(mesh)).collectives
