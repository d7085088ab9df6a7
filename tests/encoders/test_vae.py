"""The autoencoder against diffusers' `AutoencoderKL` with the same weights, from files that diffusers wrote."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors import torch as safetensors_torch

from scaling_dit import trees
from scaling_dit.encoders import codec, vae_weights
from scaling_dit.encoders.vae import Autoencoder, decode_tiles
from scaling_dit.encoders.vae_config import ARCHITECTURES, Architecture, read_architecture
from scaling_dit.errors import UserError
from scaling_dit.parallel import rules
from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.weights import state_dicts
from tests.support.uvit_golden import FAST_KEY

# Px.
SIDE = 32
KEY = FAST_KEY
SIZES = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "latent_channels": 3,
    "norm_num_groups": 8,
    "scaling_factor": 0.7,
    "sample_size": 16,
}


def tiny(**changes):
    """A random torch model; norms are moved from the identity, or their parameters could be lost unseen."""
    torch.manual_seed(0)
    options = SIZES | changes
    levels = len(options["block_out_channels"])
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    model = AutoencoderKL(**kinds, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline") / "vae"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)


@functools.cache
def opened(place, **fields):
    """(codec, its weights, the jitted moments and decoding)."""
    vae = Autoencoder(weights=str(place), **fields)
    return vae, vae.load(), jax.jit(vae.moments), jax.jit(vae.decode_float)


def torch_moments(model, images):
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = model.encode(pixels).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], 1).permute(0, 2, 3, 1).numpy()


def torch_decode(model, latents):
    z = torch.from_numpy(np.asarray(latents)).permute(0, 3, 1, 2)
    with torch.no_grad():
        return model.decode(z).sample.permute(0, 2, 3, 1).numpy()


def test_moments_and_decoding_equal_those_of_diffusers(model, folder, images):
    # The part of a whole pipeline is found.
    vae, params, moments_of, decode = opened(folder.parent)
    moments = moments_of(params, images)
    assert moments.dtype == jnp.float32
    assert moments.shape == (2, *vae.moments_shape(SIDE)) == (2, 16, 16, 6)
    np.testing.assert_allclose(moments, torch_moments(model, images), atol=1e-4)
    latents = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(decode(params, latents), torch_decode(model, latents / 0.7), atol=1e-4)


def test_latents_are_sampled_from_the_moments_and_scaled(folder):
    vae = Autoencoder(weights=str(folder))
    rng = np.random.default_rng(2)
    mean, logvar = rng.normal(size=(2, 64, 64, 3)), np.full((2, 64, 64, 3), np.log(0.25))
    moments, sample = np.concatenate([mean, logvar], -1).astype("f4"), jax.jit(vae.sample)
    sampled = np.asarray(sample({}, moments, KEY))
    noise = (sampled / 0.7 - mean) / 0.5
    assert sampled.dtype == np.float32
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    np.testing.assert_array_equal(sampled, sample({}, moments, KEY))
    still = np.concatenate([moments[..., :3], np.full_like(moments[..., 3:], -np.inf)], -1)
    np.testing.assert_allclose(sample({}, still, KEY), 0.7 * mean, rtol=1e-6)


def test_a_shift_is_taken_off_before_the_scale(tmp_path, model):
    model.save_pretrained(tmp_path)
    edit(tmp_path, shift_factor=0.3)
    vae, plain = Autoencoder(weights=str(tmp_path)), Autoencoder(weights="random")
    assert vae.architecture.shift == 0.3 and plain.architecture.shift == 0
    moments = np.concatenate([np.ones((1, 2, 2, 3), "f4"), np.full((1, 2, 2, 3), -np.inf, "f4")], -1)
    np.testing.assert_allclose(jax.jit(vae.sample)({}, moments, KEY), (1 - 0.3) * 0.7, rtol=1e-6)


def test_encode_samples_from_the_moments_and_decode_rounds(folder, images):
    vae, params, moments_of, decode = opened(folder)
    latents = jax.jit(vae.sample)(params, moments_of(params, images), KEY)
    np.testing.assert_allclose(jax.jit(vae.encode)(params, images, KEY), latents, atol=1e-4)
    shown = jax.eval_shape(codec.Pixels().decode, {}, decode(params, latents))
    assert shown.dtype == jnp.uint8 and shown.shape == images.shape


def edit(folder, **changes):
    """Changes the config.json of a folder; None takes an argument out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def write(folder, model, tensors):
    """The model's folder with other tensors in its file."""
    model.save_pretrained(folder)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    safetensors_torch.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")


OLD_PARTS = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def older(tensors, convolutions):
    """The names of diffusers before 0.16, linear maps of attention as 1x1 convolutions if asked."""
    renamed = {}
    for name, value in tensors.items():
        for new, old in OLD_PARTS.items():
            if f".{new}." in name:
                name = name.replace(f".{new}.", f".{old}.")
                value = value[:, :, None, None] if convolutions and value.ndim == 2 else value
        renamed[name] = value
    return renamed


@pytest.mark.parametrize("convolutions", [False, True])
def test_older_names_give_the_same_weights(convolutions, folder, model, tmp_path):
    write(tmp_path, model, older(model.state_dict(), convolutions))
    _, params, _, _ = opened(folder)
    jax.tree.map(np.testing.assert_array_equal, Autoencoder(weights=str(tmp_path)).load(), params)


def test_the_original_names_are_those_that_diffusers_converts(folder, model, tmp_path):
    vae, params, _, _ = opened(folder)
    abstract = jax.eval_shape(lambda: params)
    rows = vae_weights.rows(vae.architecture, vae_weights.ORIGINAL, attention_as_convolutions=True)
    original = {
        name: torch.from_numpy(value)
        for name, value in state_dicts.save(rows, abstract, params, "it").items()
    }
    assert (
        original["encoder.mid.attn_1.q.weight"].ndim == 4 and "decoder.up.1.block.0.conv1.weight" in original
    )
    converted = convert_ldm_vae_checkpoint(original, dict(model.config))
    state_dict = model.state_dict()
    assert converted.keys() == state_dict.keys()
    for name, value in converted.items():
        torch.testing.assert_close(value.reshape(state_dict[name].shape), state_dict[name], rtol=0, atol=0)
    # In a whole checkpoint they stand beside the backbone's, under a prefix.
    prefixed = {f"first_stage_model.{name}": value for name, value in original.items()}
    write(tmp_path, model, prefixed | {"model.diffusion_model.out.0.weight": torch.ones(3)})
    jax.tree.map(np.testing.assert_array_equal, Autoencoder(weights=str(tmp_path)).load(), params)


def test_half_precision_files_are_widened(folder, model, tmp_path):
    write(tmp_path, model, {name: value.half() for name, value in model.state_dict().items()})
    _, params, _, _ = opened(folder)
    stored = Autoencoder(weights=str(tmp_path)).load()
    rounded = jax.tree.map(lambda p: p.astype(np.float16).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, stored, rounded)


@pytest.mark.slow
def test_bfloat16_drifts_little(folder, images):
    _, params, moments_of, decode = opened(folder)
    _, _, low_moments, low_decode = opened(folder, dtype="bfloat16")
    exact, moments = np.asarray(moments_of(params, images)), np.asarray(low_moments(params, images))
    latents = 0.7 * exact[..., :3]
    decoded, drifted = np.asarray(decode(params, latents)), np.asarray(low_decode(params, latents))
    for right, found in ((exact, moments), (decoded, drifted)):
        error = np.sqrt(np.mean((found - right) ** 2) / np.mean(right**2))
        # It is used, and costs about one part in a hundred.
        assert 1e-5 < error < 0.03
    assert moments.dtype == drifted.dtype == np.float32


def test_weights_are_sharded_and_give_the_same(folder, images):
    vae, params, moments_of, _ = opened(folder)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings = rules.param_shardings(mesh, jax.eval_shape(vae.init, KEY))
    placed = jax.device_put(params, shardings)
    assert placed["encoder"]["mid"]["res_0"]["conv1"]["kernel"].sharding.spec[2:] == ("fsdp", "tensor")
    batch = jax.device_put(np.concatenate([images, images]), rules.batch_sharding(mesh))
    with rules.activate(mesh):
        found = jax.jit(vae.moments, in_shardings=(shardings, rules.batch_sharding(mesh)))(placed, batch)
    np.testing.assert_allclose(np.asarray(found)[2:], moments_of(params, images), atol=1e-4)


def test_tiles_are_blended_as_diffusers_does(folder, model):
    """Along one axis both do the same, up to where diffusers adds a last, smaller tile."""
    _, params, _, _ = opened(folder)
    latents = np.random.default_rng(3).normal(size=(1, 8, 20, 3)).astype(np.float32)
    tiled = Autoencoder(weights=str(folder), tile=8)
    found = np.asarray(jax.jit(tiled.decode_float)(params, 0.7 * latents))
    model.enable_tiling()
    try:
        right = torch_decode(model, latents)
    finally:
        model.disable_tiling()
    assert found.shape == right.shape == (1, 16, 40, 3)
    np.testing.assert_allclose(found[:, :12, :36], right[:, :12, :36], atol=1e-4)


def test_tiles_of_a_local_decoder_make_the_whole_image():
    latents = np.random.default_rng(4).normal(size=(2, 11, 19, 3)).astype(np.float32)

    def double(z):
        return jnp.repeat(jnp.repeat(z, 2, 1), 2, 2)

    for tile in (8, 9, 16):
        found = jax.jit(decode_tiles, static_argnums=(0, 2, 3))(double, latents, tile, 2)
        np.testing.assert_allclose(found, latents.repeat(2, 1).repeat(2, 2), atol=1e-6)


def test_sdxl_has_the_published_sizes_and_names():
    vae = Autoencoder()
    abstract = trees.unbox(jax.eval_shape(vae.init, KEY))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == 83_653_863
    config = {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "scaling_factor": 0.13025, "sample_size": 1024,
    }  # fmt: skip
    with torch.device("meta"):
        published = AutoencoderKL(**config).state_dict()
    rows = vae_weights.rows(vae.architecture)
    # The shapes that the table wants.
    upstream = {
        name: part.shape
        for entry in state_dicts.expand(rows, [])
        for name, part in zip(
            entry.names,
            entry.row.transform.save(np.broadcast_to(np.float32(0), at(abstract, entry.path))),
            strict=True,
        )
    }
    assert upstream == {name: tuple(value.shape) for name, value in published.items()}
    assert len(upstream) == 248
    assert read_architecture(config, "it") == ARCHITECTURES["sdxl"]
    assert (vae.shape(1024), vae.moments_shape(256)) == ((128, 128, 4), (32, 32, 8))
    assert Autoencoder(size="sd").architecture.scale == 0.18215


def at(tree, path):
    return functools.reduce(lambda node, key: node[key], path.split("/"), tree).shape


def test_an_architecture_without_its_optional_parts():
    """As in Stable Diffusion 3: no 1x1 convolutions, 16 channels."""
    options = {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}
    other = tiny(**options, latent_channels=16)
    architecture = read_architecture(dict(other.config), "it")
    assert not architecture.quant_conv and architecture.latent_channels == 16
    names = {name for entry in state_dicts.expand(vae_weights.rows(architecture), []) for name in entry.names}
    assert names == other.state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "holds a AutoencoderTiny; it must hold a AutoencoderKL"),
        ({"act_fn": "relu"}, "has act_fn 'relu'; the autoencoder here computes with 'silu'"),
        ({"latents_mean": [0.0]}, "has latents_mean"),
        ({"wavelets": True}, "sets wavelets, which AutoencoderKL does not have"),
        ({"norm_num_groups": 7}, r"widths \(16, 32\) and groups 7"),
        ({"layers_per_block": "many"}, "makes no AutoencoderKL"),
        ({"latent_channels": 4}, "encoder.conv_out.weight is"),
    ],
)
def test_other_architectures_are_refused(changes, message, model, tmp_path):
    model.save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        Autoencoder(weights=str(tmp_path)).load()
    assert "\n" not in str(error.value)


def test_fields_are_checked():
    for fields, message in (
        ({"size": "sdxxl"}, "did you mean 'sdxl'"),
        ({"dtype": "float16"}, "must be float32 or bfloat16"),
        ({"tile": 7}, "at least 8"),
    ):
        with pytest.raises(UserError, match=message):
            codec.create_codec("vae", **fields)
    with pytest.raises(UserError, match="100 px do not divide by 8"):
        Autoencoder().shape(100)
    assert Architecture().factor == 8
