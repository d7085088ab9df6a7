"""What is read from compiled programs is what they do: against closed forms, brute force and the traced program."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.planning import hlo, hlo_cost
from scaling_dit.planning.hlo_cost import Layout
from tests.support.paths import SUPPORT

AXES = {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
ALONE = Layout({"data": 1})


def read(function, *shapes, layout=ALONE, **options):
    """The statistics of a function compiled for CPU."""
    compiled = jax.jit(function, **options).lower(*shapes).compile()
    return hlo_cost.statistics(hlo.Program(compiled.as_text()), layout)


def shape(*dims, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)


def test_products_in_nested_loops_count_as_often_as_they_run():
    def inner(x, weight):
        return jnp.sin(x @ weight), None

    def outer(x, weights):
        return jax.lax.scan(inner, x, weights)[0], None

    def loss(x, weights):
        return jax.lax.scan(outer, x, weights)[0].sum()

    found = read(jax.grad(loss, (0, 1)), shape(32, 16), shape(5, 7, 16, 16))
    # Forward, and two products backward.
    assert found.flops == 3 * 5 * 7 * 2 * 32 * 16 * 16
    assert found.unknown_loops == 0


@pytest.mark.parametrize("seed", range(4))
def test_places_that_meet_are_those_found_one_by_one(seed):
    rng = np.random.default_rng(seed)
    for _ in range(200):
        size, taps, outputs, stride, spread, dilation = map(int, rng.integers(1, 8, 6))
        pad = int(rng.integers(-4, 7))
        at = np.arange(outputs)[:, None] * stride - pad + np.arange(taps) * dilation
        wanted = int(((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)).sum())
        assert hlo_cost.places_that_meet(size, taps, outputs, stride, pad, spread, dilation) == wanted
    # Of a product over a batch, which XLA writes as a window as large.
    batch = 2**16
    assert hlo_cost.places_that_meet(batch, batch, 1) == batch


@pytest.mark.parametrize(
    "stride, padding, dilation, transposed",
    [
        (1, "VALID", 1, 1),
        (1, "SAME", 1, 1),
        (2, "SAME", 1, 1),
        (1, "SAME", 2, 1),
        (1, ((1, 2), (1, 1)), 1, 2),
    ],
)
def test_a_convolution_counts_the_places_that_meet_data(stride, padding, dilation, transposed):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, 1), padding, (transposed, 1), (dilation, 1), ("NHWC", "HWIO", "NHWC")
        )

    x, kernel = shape(2, 9, 8, 4), shape(3, 3, 4, 6)
    # The sum over outputs of one output channel with ones everywhere is the number of multiply-adds it takes.
    ones = convolve(jnp.ones(x.shape), jnp.ones(kernel.shape))
    assert read(convolve, x, kernel).flops == 2 * int(ones.sum())


def test_collectives_are_counted_by_mesh_axis():
    mesh = make_mesh(**AXES)
    n = 512

    def exchange(x):
        gathered = jax.lax.all_gather(x, "fsdp", tiled=True)
        total = jax.lax.psum(jnp.sin(gathered), "data")
        parts = jax.lax.psum_scatter(jnp.cos(total), ("data", "fsdp"), tiled=True)
        turned = jax.lax.ppermute(parts, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        return jax.lax.all_to_all(jnp.tan(turned).reshape(4, -1), "fsdp", 0, 0)

    spec = PartitionSpec(("data", "fsdp"))
    function = jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    found = read(function, shape(n, sharding=NamedSharding(mesh, spec)), layout=Layout.of(mesh))
    rows = {row.kind: row for row in found.collectives}
    # Bytes of one device's share of x.
    part = n // 8 * 4
    gathered = 4 * part
    assert {kind: (row.axes, row.size, row.wire) for kind, row in rows.items()} == {
        "all-gather": (("fsdp",), gathered, gathered * 3 // 4),
        # Twice half of it.
        "all-reduce": (("data",), gathered, gathered),
        "reduce-scatter": (("data", "fsdp"), gathered, gathered * 7 // 8),
        "collective-permute": (("fsdp",), gathered // 8, gathered // 8),
        "all-to-all": (("fsdp",), gathered // 8, gathered // 8 * 3 // 4),
    }
    assert not any(row.slices or row.torus_axes for row in rows.values())


GROUPS = {
    "replica_groups={{0,1,2,3},{4,5,6,7}}": ("fsdp",),
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}": ("data",),
    "replica_groups=[2,4]<=[8]": ("fsdp",),
    "replica_groups=[4,2]<=[2,4]T(1,0)": ("data",),
    "replica_groups=[1,8]<=[8]": ("data", "fsdp"),
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}": ("fsdp",),
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}": ("data",),
    "replica_groups=mesh['axis_0'=8] {'axis_0'}": ("data", "fsdp"),
    "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}": ("fsdp",),
    "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_2'}": ("data",),
    "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=(0,4,1,5,2,6,3,7) {'axis_1'}": ("data",),
    "replica_groups={}": ("data", "fsdp"),
    "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}": ("fsdp",),
}


@pytest.mark.parametrize("attributes, axes", GROUPS.items())
def test_every_way_of_writing_groups_is_read(attributes, axes):
    groups = hlo_cost._groups(f"channel_id=1, {attributes}, dimensions={{0}}", 8)
    assert Layout(AXES).moved(groups)[0] == axes


def test_the_axes_of_the_torus_and_the_slices_are_found():
    # Slice, place on a ring of 4.
    places = np.array(list(itertools.product(range(2), range(4))))
    layout = Layout(AXES, coords=np.stack([places[:, 1], 0 * places[:, 1]], -1), slices=places[:, 0])
    assert layout.moved([np.arange(4), np.arange(4, 8)]) == (("fsdp",), (0,), False)
    assert layout.moved([np.array([i, i + 4]) for i in range(4)]) == (("data",), (), True)


# As libtpu 0.0.51 writes programs, cut to what matters.
TPU = (SUPPORT / "tpu_program.txt").read_text()


@pytest.fixture(scope="module")
def tpu():
    return hlo_cost.statistics(hlo.Program(TPU), Layout(AXES))


def test_the_loops_of_a_tpu_program_are_read_from_their_conditions(tpu):
    assert tpu.unknown_loops == 0
    assert tpu.flops == 21 * 2 * 32 * 16 * 8


def test_a_collective_that_three_fusions_share_counts_once_and_a_sum_that_is_sliced_is_a_reduce_scatter(tpu):
    gather, scatter = sorted(tpu.collectives, key=lambda row: row.kind)
    assert (gather.kind, gather.axes, gather.asynchronous, gather.count) == (
        "all-gather",
        ("fsdp",),
        True,
        21,
    )
    assert (gather.size, gather.wire) == (21 * 16 * 8 * 2, 21 * 16 * 8 * 2 * 3 // 4)
    assert (scatter.kind, scatter.axes, scatter.asynchronous) == ("reduce-scatter", ("data", "fsdp"), False)
    assert (scatter.size, scatter.wire) == (16 * 8 * 4, 16 * 8 * 4 * 7 // 8)


def test_cycles_go_to_the_part_of_the_main_product(tpu):
    assert {part: cycles for part, cycles in tpu.parts.items() if cycles} == {"MLP": 2100, "copies": 210}
    assert tpu.cycles == 2310 and set(tpu.parts) == set(hlo_cost.PARTS)


SCOPES = {
    "jit(step)/transpose(jvp(UViT))/in_blocks/attn/bkts,bksh->bkth/dot_general": "attention core",
    "jit(step)/jvp(UViT)/in_blocks/attn/qkv/dot_general": "projections",
    "jit(step)/jvp(LargeDiT)/layers/attention/out/dot_general": "projections",
    "jit(step)/jvp(LargeDiT)/layers/feed_forward/w13/dot_general": "MLP",
    "jit(step)/jvp(UViT)/out_blocks/skip_linear/dot_general": "projections",
    "jit(step)/jvp(UNet)/down_0_res_0/conv1/conv_general_dilated": "convolutions",
    "jit(step)/jvp(text_encoder)/ScratchTextEncoder/blocks_0/attn/qkv/dot_general": "text encoder",
    "jit(step)/codec/dot_general": "codec",
}


@pytest.mark.parametrize("scope, part", SCOPES.items())
def test_products_by_part(scope, part):
    product = hlo.Instruction("p", "dot", (), (), f'metadata={{op_name="{scope}"}}')
    assert hlo_cost._part(hlo.Program(""), product) == part


@pytest.mark.parametrize(
    "scope, opcode, part",
    [
        ("jit(step)/optimizer/cond/branch_1_fun/add", "fusion", "optimiser"),
        ("jit(step)/jvp(UViT)/in_blocks/norm1/reduce_sum", "fusion", "norms"),
        ("jit(step)/jvp(UViT)/in_blocks/attn/transpose", "fusion", "copies"),
        ("jit(step)/jvp(UViT)/in_blocks/attn/sub", "fusion", "attention core"),
        ("", "copy", "copies"),
        ("jit(step)/jvp()/add", "fusion", "other"),
    ],
)
def test_what_is_no_product_by_part(scope, opcode, part):
    instruction = hlo.Instruction("f", opcode, (), (), f'metadata={{op_name="{scope}"}}' if scope else "")
    assert hlo_cost._part(hlo.Program(""), instruction) == part


def test_hbm_bytes_of_nested_fusions_count_slices_not_stacks():
    program = hlo.Program("""\
%inner (p0: f32[8,16], p1: s32[]) -> f32[1,16] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %cut = f32[1,16]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,16}
}
%outer (a: f32[8,16], b: f32[8,16], i: s32[]) -> (f32[8,16], f32[16]) {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[8,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %flat = f32[8,16]{1,0} bitcast(%a)
  %row = f32[1,16]{1,0} fusion(%b, %i), kind=kLoop, calls=%inner
  %new = f32[1,16]{1,0} negate(%row)
  %put = f32[8,16]{1,0} dynamic-update-slice(%flat, %new, %i, %i)
  %line = f32[16]{0} bitcast(%new)
  ROOT %both = (f32[8,16]{1,0}, f32[16]{0}) tuple(%put, %line)
}
ENTRY %main (x: f32[8,16], y: f32[8,16], j: s32[]) -> (f32[8,16], f32[16]) {
  %x = f32[8,16]{1,0} parameter(0)
  %y = f32[8,16]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %f = (f32[8,16]{1,0}, f32[16]{0}) fusion(%x, %y, %j), kind=kLoop, calls=%outer
}
""")
    found = {visit.instruction.name: hlo_cost.hbm_bytes(program, visit) for visit in program.walk()}
    # A row of y and the index are read, a row of x replaced (counted read and written), and a row given besides.
    assert found["f"] == 4 * 16 * 4 + 4


def test_hbm_bytes_of_a_loop_count_slices_not_stacks():
    n, layers = 4096, 12

    def sweep(x, stack):
        return jax.lax.scan(lambda x, row: (x * row, None), x, stack)[0]

    found = read(sweep, shape(n), shape(layers, n)).hbm_bytes
    # Reads x and a row, writes x.
    each = 3 * n * 4
    assert layers * each <= found <= layers * each + 6 * n * 4


def test_what_lies_on_the_chip_is_no_hbm_traffic():
    program = hlo.Program(TPU)
    fusions = {v.instruction.name: v for v in program.walk() if v.instruction.opcode == "fusion"}
    started = hlo_cost.hbm_bytes(program, fusions["async-collective-start.1"])
    # Its result; %w lies in memory space 1.
    assert started == 16 * 8 * 2


def test_a_loop_without_a_bound_is_reported():
    text = TPU.replace("direction=LT", "direction=NE")
    found = hlo_cost.statistics(hlo.Program(text), Layout(AXES))
    assert found.unknown_loops == 1 and found.flops == 2 * 32 * 16 * 8


# What a kernel says of itself stands on lines of its own, and again at each part of its result.
NOTES = 'frontend_attributes={kernel_metadata={\n"estimated_cycles":"700"\n}}'
SCOPE = 'metadata={op_name="jit(step)/transpose(jvp(UViT))/out_blocks/attn/backward_kernel/pallas_call"}'
KERNEL = f"""HloModule jit_step, is_scheduled=true

ENTRY %main (q: bf16[4,8], d: bf16[4,8]) -> bf16[4,8] {{
  %q = bf16[4,8]{{1,0}} parameter(0)
  %d = bf16[4,8]{{1,0}} parameter(1)
  %backward_kernel.1 = (bf16[4,8]{{1,0}}, bf16[4,8]{{1,0}}) custom-call(%q, %d), custom_call_target="tpu_custom_call", {NOTES}, {SCOPE}, backend_config={{"custom_call_config":{{"cost_estimate":{{"flops":"640"}}}}}}
  %d_q = bf16[4,8]{{1,0}} get-tuple-element(%backward_kernel.1), index=0, {NOTES}, {SCOPE}
  %d_k = bf16[4,8]{{1,0}} get-tuple-element(%backward_kernel.1), index=1, {NOTES}, {SCOPE}
  ROOT %sum = bf16[4,8]{{1,0}} fusion(%d_q, %d_k), kind=kLoop, calls=%add, backend_config={{"estimated_cycles":"30"}}
}}
"""  # noqa: E501


def test_an_instruction_whose_notes_span_lines_is_read_whole():
    body = hlo.Program(KERNEL).computations["main"]
    assert [instruction.name for instruction in body] == ["q", "d", "backward_kernel.1", "d_q", "d_k", "sum"]
    kernel, part = body[2], body[3]
    assert kernel.opcode == "custom-call" and kernel.operands == ("q", "d") and kernel.size == 2 * 4 * 8 * 2
    for noted in (kernel, part):
        assert '"estimated_cycles":"700"' in noted.attributes and noted.scope.endswith(
            "backward_kernel/pallas_call"
        )


def test_the_cycles_that_a_kernel_declares_count_once():
    found = hlo_cost.statistics(hlo.Program(KERNEL), Layout(AXES))
    assert {part: cycles for part, cycles in found.parts.items() if cycles} == {
        "attention core": 700,
        "copies": 30,
    }
    assert (found.flops, found.kernel_flops, found.undeclared_kernels) == (640, 640, 0)
    # The kernel's four arrays, the three of the sum.
    assert found.hbm_bytes == (4 + 3) * 4 * 8 * 2
