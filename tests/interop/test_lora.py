"""Adapters in the format of diffusers and peft: theirs read here and ours read there compute the same.

What both compute is compared on diffusers' models: one with the file loaded as an adapter, and one whose weights are
ours with the adapters added. That ours compute what diffusers' do is tested with the weights themselves.
"""

import copy
import functools
import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from diffusers.utils.peft_utils import get_peft_kwargs
from einops import rearrange
from etils import epath
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import load_file, save_file

from scaling_dit import backbones, config, interop, trees
from scaling_dit.backbones import contract
from scaling_dit.cli import main as cli
from scaling_dit.errors import UserError
from scaling_dit.interop import importing
from scaling_dit.interop.diffusers import lora
from scaling_dit.model.adapters import Adapters
from scaling_dit.sampling import pipeline
from scaling_dit.training import loop
from scaling_dit.weights import table
from tests.support import unet_reference
from tests.support.parity import randomise_
from tests.support.runs import tiny

pytestmark = pytest.mark.usefixtures("on_one_device")

TEXT, SIZE, CHANNELS = 12, 8, 3
TOLERANCE = 1e-5
SMOKE = "experiments/shapes.py:smoke"


def pixart():
    backbone = backbones.create(
        "pixart", size="h16-d2-n2", in_channels=CHANNELS, text_dim=TEXT, learn_sigma=True
    )
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, cross_attention_dim=16, caption_channels=TEXT,
        in_channels=CHANNELS, out_channels=2 * CHANNELS, sample_size=SIZE, use_additional_conditions=False,
    )  # fmt: skip
    conditions = {"resolution": None, "aspect_ratio": None}
    return backbone, model, lambda m, x, t, y: m(x, y, t, added_cond_kwargs=conditions).sample


def next_dit():
    backbone = backbones.create(
        "next_dit", size="h16-d2-n2", in_channels=CHANNELS, text_dim=TEXT, scan_layers=True, learn_sigma=True
    )
    model = diffusers.LuminaNextDiT2DModel(
        hidden_size=16, num_layers=2, num_attention_heads=2, num_kv_heads=2, cross_attention_dim=TEXT,
        in_channels=CHANNELS, sample_size=SIZE, learn_sigma=True, qk_norm=backbone.qk_norm,
    )  # fmt: skip

    def call(model, latents, timesteps, text):
        rotary = get_2d_rotary_pos_embed_lumina(model.head_dim, SIZE // 2, SIZE // 2)
        mask = torch.ones(text.shape[:2], dtype=torch.int64)
        return model(latents, timesteps, text, mask, rotary, cross_attention_kwargs={}).sample

    return backbone, model, call


def unet():
    backbone = unet_reference.small(**unet_reference.ONE_LEVEL)
    return backbone, unet_reference.model(backbone), lambda m, x, t, y: m(x, t, y).sample


MODELS = {"pixart": pixart, "next_dit": next_dit, "unet": unet}
# Linear layers of one part and of several, and convolutions, beside the projections of attention.
MORE = {
    "pixart": ("mlp/fc1/kernel", "patch_embed/kernel"),
    "next_dit": ("feed_forward/w13/kernel", "modulation/linear"),
    "unet": ("fc1/kernel", "conv1/kernel", "proj_in/kernel"),
}


def share_queries_(model):
    """Makes the queries of image and text, one parameter here and two there, equal in place."""
    for layer in model.layers if isinstance(model, diffusers.LuminaNextDiT2DModel) else ():
        for name in ("to_q", "norm_q"):
            getattr(layer.attn2, name).load_state_dict(getattr(layer.attn1, name).state_dict())


class Case:
    """A tiny model in both forms, and adapters of it."""

    def __init__(self, name, rank=2, alpha=6.0, more=True, seed=0):
        self.backbone, model, self.call = MODELS[name]()
        share_queries_(randomise_(model, 1))
        self.make = functools.partial(self._copy, model.eval())
        self.inputs = contract.example_inputs(self.backbone, (SIZE, SIZE, CHANNELS), (5, TEXT))
        self.weights = {key: value.numpy() for key, value in self.make().state_dict().items()}
        self.base = {
            "backbone": interop.load_state_dict(self.backbone, self.weights, inputs=self.inputs)["params"]
        }
        boxed = jax.eval_shape(self.backbone.init, jax.random.key(0), *self.inputs)["params"]
        self.boxed = {"backbone": boxed}
        targets = (*config.defaults().adapter.targets, *(MORE[name] if more else ()))
        self.set(rank, alpha, targets)
        self.generator = np.random.default_rng(seed)

    def set(self, rank, alpha, targets):
        settings = config.defaults()
        settings.adapter.update({"rank": rank, "alpha": alpha, "targets": targets})
        self.adapters = Adapters.of(settings, self.boxed)
        self.forms = {path[1:]: form for path, form in self.adapters.forms.items()}

    def random(self):
        shapes = trees.unbox(jax.eval_shape(self.adapters.init, jax.random.key(0)))
        return jax.tree.map(lambda leaf: self.generator.normal(0, 0.2, leaf.shape).astype("f4"), shapes)

    def merged(self, adapters):
        """Their state dict of our base with adapters added."""
        whole = jax.jit(self.adapters.add)(self.base, adapters)
        return interop.to_state_dict(self.backbone, {"params": whole["backbone"]}, inputs=self.inputs)

    def output(self, model):
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(2, CHANNELS, SIZE, SIZE, generator=generator)
        text = torch.randn(2, 5, TEXT, generator=generator)
        with torch.no_grad():
            return self.call(model, latents, torch.tensor([10.0, 700.0]), text).numpy()

    def plain(self, weights=None):
        model = self.make()
        model.load_state_dict(
            {key: torch.from_numpy(np.array(v)) for key, v in (weights or self.weights).items()}
        )
        return self.output(model)

    @staticmethod
    def _copy(model):
        new = type(model).from_config(model.config).eval()
        new.load_state_dict(model.state_dict())
        return new


def close(found, wanted):
    return np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()


@pytest.fixture(
    scope="module",
    params=["pixart", *(pytest.param(name, marks=pytest.mark.slow) for name in ("next_dit", "unet"))],
)
def case(request):
    return Case(request.param)


def load_there(model, folder, prefix):
    """Loads a file as diffusers does; by peft alone where the class has no loader of its own."""
    if hasattr(model, "load_lora_adapter"):
        model.load_lora_adapter(str(folder), weight_name=lora.FILE, prefix=prefix)
        return
    found = load_file(folder / lora.FILE)
    assert all(key.startswith(f"{prefix}.") for key in found)
    state = {key.removeprefix(f"{prefix}."): torch.from_numpy(value) for key, value in found.items()}
    ranks = {key: value.shape[1] for key, value in state.items() if "lora_B" in key}
    settings = LoraConfig(**get_peft_kwargs(ranks, None, state, is_unet=False))
    inject_adapter_in_model(settings, model, adapter_name="default")
    left = set_peft_model_state_dict(model, state, "default")
    assert not left.unexpected_keys


def test_diffusers_with_our_file_computes_what_our_merged_weights_do(case, tmp_path):
    adapters = case.random()
    arrays = lora.save(case.backbone, adapters["backbone"], case.forms, case.adapters.scale, case.inputs)
    lora.write(epath.Path(tmp_path), arrays)
    prefix = lora.prefix(case.backbone)
    assert prefix == ("unet." if "unet" in type(case.backbone).__name__.lower() else "transformer.")
    model = case.make()
    load_there(model, tmp_path, prefix.rstrip("."))
    there = case.output(model)
    assert close(there, case.plain(case.merged(adapters)))
    # And the adapters do something.
    assert not close(there, case.plain())


def test_our_file_reads_back_as_the_same_change(case, tmp_path):
    adapters = case.random()
    arrays = lora.save(case.backbone, adapters["backbone"], case.forms, case.adapters.scale, case.inputs)
    lora.write(epath.Path(tmp_path), arrays)
    read = lora.read_file(epath.Path(tmp_path))
    again = copy.copy(case)
    again.set(read.rank, 0.0, lora.targets(case.backbone, read, case.inputs))
    assert set(again.adapters.leaves) == set(case.adapters.leaves)
    loaded = {
        "backbone": lora.load(case.backbone, read, again.forms, again.random()["backbone"], case.inputs)
    }
    now, then = again.merged(loaded), case.merged(adapters)
    for name, value in then.items():
        np.testing.assert_allclose(now[name], value, atol=1e-5, err_msg=name)


def their_adapters(case, modules, alpha, rank, **settings):
    """A diffusers model with random adapters of peft's, trained as it were."""
    model = case.make()
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, **settings), model, "default"
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2, generator=generator)
    share_queries_(model)
    return model


@pytest.mark.parametrize("where", ["alpha tensors", "metadata", "nowhere"])
def test_their_file_computes_here_what_it_does_there(case, where, tmp_path):
    """The alpha of a file is 3 x its rank wherever it stands; a file without one means 1."""
    rank = 2
    alpha = {"nowhere": rank}.get(where, 3 * rank)
    model = their_adapters(case, ["to_q", "to_v", "to_out.0"], alpha, rank)
    wanted = case.output(model)
    prefix = lora.prefix(case.backbone)
    state = {prefix + key: value.numpy() for key, value in get_peft_model_state_dict(model).items()}
    metadata = {"format": "pt"}
    if where == "alpha tensors":
        modules = {key.partition(".lora_")[0] for key in state}
        state |= {f"{module}.alpha": np.array(alpha, np.float32) for module in modules}
    elif where == "metadata":
        metadata["lora_adapter_metadata"] = json.dumps({f"{prefix}r": rank, f"{prefix}lora_alpha": alpha})
    save_file(state, tmp_path / lora.FILE, metadata=metadata)
    read = lora.read_file(epath.Path(tmp_path / lora.FILE))
    assert read.rank == rank
    again = copy.copy(case)
    again.set(rank, 0.0, lora.targets(case.backbone, read, case.inputs))
    # What the file does not have, such as every k, must change nothing.
    fresh = jax.jit(lambda key: trees.unbox(again.adapters.init(key)))(jax.random.key(0))
    loaded = {"backbone": lora.load(case.backbone, read, again.forms, fresh["backbone"], case.inputs)}
    assert close(case.plain(again.merged(loaded)), wanted)
    assert not close(case.plain(), wanted)


@pytest.fixture(scope="module")
def small():
    return Case("pixart", more=False)


def write(path, arrays, **metadata):
    save_file(arrays, path, metadata={"format": "pt"} | metadata)
    return epath.Path(path)


def test_files_that_are_not_understood_are_one_line(small, tmp_path):
    name = "transformer.transformer_blocks.0.attn1.to_q"
    a, b = np.ones((2, 16), "f4"), np.ones((16, 2), "f4")
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match=r"holds lora_unet_x.lora_down.weight; only adapters as diffusers"):
        lora.read_file(write(path, {"lora_unet_x.lora_down.weight": a}))
    with pytest.raises(UserError, match="one factor of .*to_q without the other"):
        lora.read_file(write(path, {f"{name}.lora_A.weight": a}))
    both = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    with pytest.raises(UserError, match="trained with use_dora"):
        lora.read_file(
            write(path, both, lora_adapter_metadata=json.dumps({"use_dora": True, "lora_alpha": 2}))
        )
    read = lora.read_file(
        write(path, both | {"transformer.nothing.lora_A.weight": a, "transformer.nothing.lora_B.weight": b})
    )
    assert lora.targets(small.backbone, read, small.inputs) == (r"^backbone/blocks_\d+/attn/qkv/kernel$",)
    again = copy.copy(small)
    again.set(2, 0.0, lora.targets(small.backbone, read, small.inputs))
    with pytest.raises(UserError, match="modules that PixArt does not have: nothing"):
        lora.load(small.backbone, read, again.forms, again.random()["backbone"], small.inputs)
    read = lora.read_file(write(path, {f"{name}.lora_A.weight": a[:, :8], f"{name}.lora_B.weight": b}))
    with pytest.raises(
        UserError, match=r"to_q is \(2, 8\) and \(16, 2\), which does not fit blocks_0/attn/qkv/kernel"
    ):
        lora.load(small.backbone, read, again.forms, again.random()["backbone"], small.inputs)


def random_adapters(backbone, targets):
    """(adapters, forms, inputs) of the kernels of a backbone that `targets` choose."""
    inputs = contract.example_inputs(backbone, (SIZE, SIZE, backbone.in_channels), (5, TEXT))
    boxed = jax.eval_shape(backbone.init, jax.random.key(0), *inputs)["params"]
    settings = config.defaults()
    settings.adapter.update({"rank": 2, "targets": targets})
    chosen = Adapters.of(settings, {"backbone": boxed})
    shapes = trees.unbox(jax.eval_shape(chosen.init, jax.random.key(0)))["backbone"]
    generator = np.random.default_rng(0)
    numbers = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype("f4"), shapes)
    return numbers, {path[1:]: form for path, form in chosen.forms.items()}, inputs


def test_a_kernel_that_is_a_part_of_an_entry_there_is_not_written():
    backbone = unet_reference.small(
        in_channels=4, conditions=(("edit", 4, "channel", "shared"),), **unet_reference.ONE_LEVEL
    )
    adapters, forms, inputs = random_adapters(backbone, ("conv_in/kernel",))
    with pytest.raises(UserError, match=r"conv_in/kernel is conv_in.weight\[.*no file of adapters can name"):
        lora.save(backbone, adapters, forms, 1.0, inputs)


@pytest.mark.parametrize("order", ["(n e) d", "(e n) d"])
def test_a_fused_kernel_in_another_order_is_not_read_as_if_it_were_in_ours(order, monkeypatch):
    """The order of the parts is that of the row, which may be a user's own."""
    backbone = backbones.create("uvit", hidden=16, depth=2, heads=2, in_channels=3, text_dim=TEXT)
    fresh, forms, inputs = random_adapters(backbone, ("in_blocks_0/attn/qkv/kernel",))
    _, abstract, what = lora.table(backbone, inputs)
    row = table.Row(
        "in_blocks.0.attn.qkv.weight",
        "in_blocks_0/attn/qkv/kernel",
        table.Transform(
            load=lambda w: rearrange(w, f"{order} -> d n e", n=3),
            save=lambda p: (rearrange(p, f"d n e -> {order}"),),
        ),
    )
    monkeypatch.setattr(lora, "table", lambda *_: ([row], abstract, what))
    generator = np.random.default_rng(0)
    module = lora.Module(generator.normal(size=(2, 16)), generator.normal(size=(48, 2)), 1.0)
    read = lora.Read({"in_blocks.0.attn.qkv": module}, 2)
    if order == "(n e) d":
        assert lora.load(backbone, read, forms, fresh, inputs)
        return
    with pytest.raises(UserError, match="qkv/kernel is no product of two factors"):
        lora.load(backbone, read, forms, fresh, inputs)


def lora_of_smoke(path, width=None):
    """A file that adapts the first attention of the miniature run, by factors of ones; `width` is of its inputs."""
    hidden = config.load(SMOKE).backbone.hidden
    name = "transformer.in_blocks.0.attn.qkv"
    a, b = np.ones((2, width or hidden), "f4"), np.ones((3 * hidden, 2), "f4")
    return write(path, {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})


def test_a_file_that_does_not_fit_leaves_no_run_of_fresh_adapters(smoke_run, tmp_path):
    file, workdir = lora_of_smoke(tmp_path / "a.safetensors", width=6), tmp_path / "run"
    with pytest.raises(
        UserError, match=r"qkv is \(2, 6\) .*, which does not fit in_blocks_0/attn/qkv/kernel"
    ):
        importing.main(str(file), str(workdir), SMOKE, base=str(smoke_run))
    assert not workdir.exists()


def test_an_import_that_is_killed_before_its_checkpoint_is_no_run(smoke_run, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    file, workdir = lora_of_smoke(tmp_path / "a.safetensors"), tmp_path / "run"
    monkeypatch.setattr(importing.Checkpoints, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        importing.main(str(file), str(workdir), SMOKE, base=str(smoke_run))
    # A folder with a config is a run, which `train` would begin with adapters of its own.
    assert not (workdir / "config.json").exists()


@pytest.mark.slow
def test_export_and_import_of_a_run(smoke_run, tmp_path, capsys):
    settings = {
        # As that of `smoke_run`.
        "backbone__depth": 2,
        "adapter__rank": 2,
        "adapter__alpha": 4.0,
        "optim__learning_rate": 0.05,
        "optim__warmup_steps": 0,
    }
    loop.train(tiny(2, **settings), tmp_path / "run", jax.devices()[:1], start=str(smoke_run))
    run = f"--workdir={tmp_path / 'run'}"
    for argv in (
        ["export", run, f"--out={tmp_path / 'adapter'}", "--to=diffusers", "--adapter"],
        ["export", run, f"--out={tmp_path / 'merged'}", "--to=safetensors"],
        ["import", f"--from={tmp_path / 'adapter'}", f"--base={smoke_run}", "--config=experiments/shapes.py:smoke",
         f"--workdir={tmp_path / 'again'}"],
    ):  # fmt: skip
        assert cli.main(argv) == 0, capsys.readouterr().err
    ema = pipeline.read_config(tmp_path / "run").optim.ema[-1]
    trained, again = pipeline.load(tmp_path / "run", ema=ema), pipeline.load(tmp_path / "again")
    for one, two in zip(jax.tree.leaves(trained.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    wanted = interop.to_state_dict(trained.model.backbone, {"params": trained.params["backbone"]})
    for name, value in merged.items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-6)
    size = sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir())
    assert size < sum(file.stat().st_size for file in (tmp_path / "merged").iterdir()) / 2
    assert cli.main(["import", f"--from={tmp_path / 'adapter'}", "--config=experiments/shapes.py:smoke",
                     f"--workdir={tmp_path / 'third'}"]) == 2  # fmt: skip
    assert "--base=WORKDIR" in capsys.readouterr().err
    assert (
        cli.main(
            ["export", f"--workdir={smoke_run}", f"--out={tmp_path / 'x'}", "--to=diffusers", "--adapter"]
        )
        == 2
    )
    assert "trains no adapters" in capsys.readouterr().err
