"""Whole pipelines of diffusers in and out: the same images from the same noise, before and after more training."""

import contextlib
import dataclasses
import inspect
import io
import json
import pathlib
import types
import warnings

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import torch
import transformers

from scaling_dit import backbones
from scaling_dit import config as config_lib
from scaling_dit.backbones.next_dit_weights import DIFFUSERS
from scaling_dit.cli import main as cli
from scaling_dit.diffusion import published_samplers
from scaling_dit.encoders import clip, vocabularies
from scaling_dit.encoders.vae import Autoencoder
from scaling_dit.errors import UserError
from scaling_dit.interop.diffusers import pipelines, schedulers, text_encoders
from scaling_dit.sampling import pipeline
from scaling_dit.sampling.options import SamplingOptions
from scaling_dit.sampling.sampler import Sampler
from tests.support import text_towers
from tests.support.parity import randomise_

pytestmark = pytest.mark.usefixtures("verbs_on_one_device")
PIXELS, STEPS, GUIDANCE = 16, 10, 3.0
PROMPTS = ["a red circle left of a blue square", "", "two small green triangles, quite far apart " * 12]
SMOKE = "--config=experiments/shapes.py:smoke"
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (16, 32),
    "latent_channels": 4,
    "norm_num_groups": 8,
    "scaling_factor": 0.7,
    "sample_size": PIXELS,
}


class FloatImages(Autoencoder):
    """Images before they are rounded to 256 levels, in [0, 1]."""

    def decode(self, params, latents):
        return jnp.clip((self.decode_float(params, latents) + 1) / 2, 0, 1)


def sampler_of(pipe):
    """What samples images in [0, 1] from a run's weights, and from those of another step of it."""
    model = dataclasses.replace(pipe.model, codec=FloatImages(**dataclasses.asdict(pipe.model.codec)))
    return Sampler(model, pipe.mesh, SamplingOptions.of(pipe.config.sample, steps=STEPS, guidance=GUIDANCE))


def ours(sampler, pipe):
    """Images [N, H, W, 3] in [0, 1] of a run."""
    return sampler(pipe.params, pipe.frozen, PROMPTS, seed=5)


def noise_of(sampler):
    """The noise that these images are sampled from."""
    return np.asarray(sampler.model.noise(jax.random.key(5), jnp.arange(len(PROMPTS))))


def theirs(pipe, noise, **options):
    """Images of a pipeline of diffusers from our noise."""
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipe(
            prompt=PROMPTS, negative_prompt=[""] * len(PROMPTS), latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
            num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np", **options,
        ).images  # fmt: skip


def load(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return diffusers.DiffusionPipeline.from_pretrained(folder)


def run(*arguments):
    assert cli.main([str(argument) for argument in arguments]) == 0


def autoencoder():
    return randomise_(diffusers.AutoencoderKL(**VAE), 1).eval()


def stable_diffusion(folder):
    """A tiny one as diffusers saves it, with a text tower that lacks its last layer, as that of version 2.

    Its UNet has one level, for it is compiled twice; that of more levels is a subject of the folders' tests.
    """
    text_towers.save_clip_words(folder / "words")
    unet = diffusers.UNet2DConditionModel(
        sample_size=PIXELS // 2, block_out_channels=(32,), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=(4,), use_linear_projection=True,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        unet=randomise_(unet, 0).eval(),
        vae=autoencoder(),
        text_encoder=text_towers.clip_text(2),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "words", pad_token="!", model_max_length=77),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
            set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "pipeline")  # fmt: skip
    return folder / "pipeline"


def pixart(folder):
    text = [f"a {c} {s} {p} a {d} {s}" for c in ("red", "blue") for s in ("circle", "square", "triangle")
            for p in ("above", "left of") for d in ("green", "small", "large")]  # fmt: skip
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=30, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    pieces, _, charsmap = vocabularies._sentence_piece(model.getvalue())
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    tiny = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 32_128}
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=2, in_channels=4, out_channels=8,
        cross_attention_dim=64, sample_size=PIXELS // 2, patch_size=2, caption_channels=32,
        use_additional_conditions=False, interpolation_scale=1,
    )  # fmt: skip
    diffusers.PixArtAlphaPipeline(
        transformer=randomise_(transformer, 0).eval(),
        vae=autoencoder(),
        text_encoder=text_towers.build(
            transformers.T5EncoderModel, transformers.T5Config(feed_forward_proj="gated-gelu", **tiny)
        ),
        tokenizer=transformers.T5Tokenizer(
            vocab=pieces, _spm_precompiled_charsmap=charsmap, model_max_length=40
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_schedule="linear",
            beta_start=0.0001,
            beta_end=0.02,
            timestep_spacing="leading",
            steps_offset=1,
        ),
    ).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


# maker, backbone, how diffusers' pipeline is called, fields of the run
CASES = {
    "unet": (stable_diffusion, {}, []),
    "pixart": (
        pixart,
        {"max_sequence_length": 40, "use_resolution_binning": False, "clean_caption": False},
        ["--config.text_encoder.length=40"],
    ),
}


@dataclasses.dataclass(frozen=True)
class Imported:
    """A pipeline of diffusers, the run it was imported to, and what both draw.

    Attributes:
      pipe: diffusers' own.
      options: of its call.
      theirs: its images.
      workdir: of the run, which a test trains on.
      sampler: of the run.
      ours: images of the run.
    """

    pipe: diffusers.DiffusionPipeline
    options: dict
    theirs: np.ndarray
    workdir: pathlib.Path
    sampler: Sampler
    ours: np.ndarray


@pytest.fixture(scope="module", params=["unet", "pixart"])
def case(request, tmp_path_factory):
    make, options, fields = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    saved = make(folder)
    # Two steps, for the first is one of warm-up: saved once, at the end.
    fields = [
        f"--config.backbone.name={request.param}",
        *fields,
        "--config.log.tensorboard=false",
        "--config.steps=2",
    ]
    run("import", f"--from={saved}", SMOKE, f"--workdir={folder / 'run'}", *fields)
    pipe, imported = load(saved), pipeline.load(folder / "run")
    sampler = sampler_of(imported)
    drawn = theirs(pipe, noise_of(sampler), **options)
    return Imported(pipe, options, drawn, folder / "run", sampler, ours(sampler, imported))


@pytest.mark.slow
def test_an_imported_pipeline_gives_the_same_images(case):
    np.testing.assert_allclose(case.ours, case.theirs, rtol=0, atol=1e-3)
    # They are not blank.
    assert case.ours.std() > 0.05


@pytest.mark.slow
def test_a_run_is_resumed_and_its_exported_pipeline_gives_the_same_images(case, tmp_path):
    """The UNet's as it was imported: a step of it compiles for half a minute, and any run resumes the same way."""
    workdir = case.workdir
    settings = json.loads((workdir / "config.json").read_text())
    trained, images = settings["backbone"]["name"] == "pixart", case.ours
    if trained:
        run("train", f"--workdir={workdir}", "--config.eval.every=0")
        images = ours(case.sampler, pipeline.load(workdir))
    run(
        "export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--to=diffusers-pipeline", "--ema=none"
    )
    exported = load(tmp_path / "out")
    found = theirs(exported, noise_of(case.sampler), **case.options)
    np.testing.assert_allclose(images, found, rtol=0, atol=1e-3)
    # Training changed them.
    assert (np.abs(images - case.theirs).max() > 1e-3) == trained
    assert type(exported) is type(case.pipe)
    # The tokenizers that were written split captions as those that came.
    first, again = case.pipe.tokenizer, exported.tokenizer
    hard = [text for text in text_towers.HARD if "<" not in text]
    assert again(hard)["input_ids"] == first(hard)["input_ids"]
    assert (again.pad_token, again.model_max_length) == (first.pad_token, settings["text_encoder"]["length"])


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "cosine"])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpmpp_2m"])
def test_a_scheduler_is_written_and_read(sampler, schedule, zero_snr):
    config = config_lib.resolve(config_lib.defaults()).copy_and_resolve_references()
    config.diffusion.update({"schedule": schedule, "prediction": "v", "zero_snr": zero_snr})
    config.sample.sampler = sampler
    if sampler == "heun" and zero_snr:
        with pytest.raises(UserError, match="no zero terminal SNR"):
            schedulers.write(config)
        return
    described = schedulers.write(config)
    kind = getattr(diffusers, described["_class_name"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        scheduler = kind.from_config(described)
    assert {
        name: scheduler.config[name] for name in described if not name.startswith("_")
    }.items() <= described.items()
    diffusion, sample = schedulers.read({**scheduler.config, "_class_name": described["_class_name"]}, "here")
    noise = {"schedule": schedule, "prediction": "v", "zero_snr": zero_snr, "resolution_shift": 1.0}
    assert diffusion == noise
    # Where the built-in sampler is not exactly diffusers', with trailing timesteps, the class of the scheduler is.
    if zero_snr and sampler in ("ddim", "dpmpp_2m"):
        assert sample["sampler"].startswith("scaling_dit.diffusion.published_samplers:")
        assert sample["sampler_fields"]["timestep_spacing"] == "trailing"
    else:
        assert sample == {"sampler": sampler}
    with config.unlocked():
        config.sample.update(sample)
    assert schedulers.read(schedulers.write(config), "here") == (diffusion, sample)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"beta_end": 0.5}, "betas scaled_linear from 0.00085 to 0.5"),
        ({"trained_betas": [0.1]}, "betas of its own"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.1},
            "with shift_terminal 0.1",
        ),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler", "invert_sigmas": True}, "with invert_sigmas True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas True"),
        ({"prediction_type": "flow"}, "prediction_type 'flow'"),
        ({"_class_name": "EDMEulerScheduler"}, "is of a EDMEulerScheduler, whose noise schedule is not here"),
        ({"_class_name": "IPNDMScheduler"}, "is of a IPNDMScheduler, whose noise schedule is not here"),
        ({"_class_name": None}, "is of a None, whose noise schedule is not here"),
        ({"_class_name": "UniPCMultistepScheduler"}, "no sampler here equals.*--config.sample.sampler="),
        ({"_class_name": "PNDMScheduler"}, "with skip_prk_steps False.*right would be True"),
        (
            {"_class_name": "DDPMScheduler", "variance_type": "learned_range"},
            "with variance_type 'learned_range'",
        ),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "timestep_type 'continuous'",
        ),
        ({"new_in_a_later_version": 3}, "with new_in_a_later_version 3, which is not known here"),
        ({"steps_offset": "one"}, "with steps_offset 'one'; it must be of type int"),
    ],
)
def test_schedulers_that_are_not_here(changes, line):
    config = config_lib.resolve(config_lib.defaults())
    with pytest.raises(UserError, match=line):
        schedulers.read(schedulers.write(config) | changes, "scheduler_config.json")


def test_what_no_pipeline_of_diffusers_has_is_refused_by_name():
    config = config_lib.resolve(config_lib.defaults(), ["--config.diffusion.resolution_shift=2.0"])
    with pytest.raises(
        UserError, match="config.diffusion.resolution_shift is 2.0, which no scheduler of diffusers has"
    ):
        schedulers.write(config)
    with pytest.raises(UserError, match="config.text_encoder.length is 154, 2 windows, which no pipeline"):
        text_encoders.describe(clip.ClipText(size="tiny", length=154))
    backbone = backbones.create("next_dit", size="h16-d1-n2", text_dim=8, rope_scaling="ntk")
    with pytest.raises(UserError, match="rope_scaling is 'ntk', which diffusers' model has no argument for"):
        DIFFUSERS.to_arguments(backbone, (8, 8))


def test_with_a_sampler_of_the_users_choice_only_the_noise_schedule_is_read():
    described = schedulers.write(config_lib.resolve(config_lib.defaults()))
    expected = schedulers.read(described, "here")[0]
    for name in ("UniPCMultistepScheduler", "LMSDiscreteScheduler", "PNDMScheduler"):
        assert schedulers.read(described | {"_class_name": name}, "here", sampling=False) == (expected, {})
    with pytest.raises(UserError, match="whose noise schedule is not here"):
        schedulers.read(described | {"_class_name": "EDMEulerScheduler"}, "here", sampling=False)


def test_every_scheduler_of_diffusers_is_read_or_refused_by_name():
    """With its own defaults; none becomes another schedule in silence."""
    known = {*published_samplers.SCHEDULERS.values(), *schedulers._SAME, *schedulers._FLOW}
    found = set()
    for name in dir(diffusers):
        if name.endswith("Scheduler") and name not in ("SchedulerMixin", "PNDMScheduler"):
            kind = getattr(diffusers, name)
            arguments = inspect.signature(kind.__init__).parameters.values()
            defaults = {p.name: p.default for p in arguments if p.default is not p.empty}
            with contextlib.suppress(UserError):
                schedulers.read({"_class_name": name, **defaults}, "here")
                found.add(name)
            if name not in known:
                with pytest.raises(UserError, match=f"is of a {name}"):
                    schedulers.read({"_class_name": name, **defaults}, "here")
    assert found <= known and len(found) > 6


def test_a_stable_diffusion_pipeline_sets_two_settings_itself():
    described = schedulers.write(config_lib.resolve(config_lib.defaults()))
    old = described | {"clip_sample": True, "steps_offset": 0}
    assert schedulers.read(old, "here", pipeline="StableDiffusionPipeline")[1] == {"sampler": "ddim"}
    assert schedulers.read(old, "here")[1]["sampler_fields"] == {"set_alpha_to_one": False}


def test_runs_that_no_pipeline_draws(smoke_run):
    pipe = pipeline.load(smoke_run)
    with pytest.raises(UserError, match="no pipeline of diffusers samples with backbone 'uvit'"):
        pipelines.kind_of(pipe)
    other = dataclasses.replace(pipe.model, backbone=backbones.create("unet", size="sd2"))
    with pytest.raises(UserError, match="needs a CLIPTextModel; this run has text encoder 'scratch'"):
        pipelines.kind_of(dataclasses.replace(pipe, model=other))
    widened = dataclasses.replace(other, conditions=(types.SimpleNamespace(name="inpaint"),))
    with pytest.raises(
        UserError, match="StableDiffusionPipeline reads no image conditions, and this run reads inpaint"
    ):
        pipelines.kind_of(dataclasses.replace(pipe, model=widened))
    config = pipe.config.copy_and_resolve_references()
    config.diffusion.update({"schedule": "flow", "prediction": "flow"})
    with pytest.raises(UserError, match="which no pipeline of diffusers"):
        schedulers.write(config)


@pytest.mark.parametrize("missing", ["vae", "scheduler", "text_encoder"])
def test_parts_that_are_missing(tmp_path, missing, capsys):
    for part in ("vae", "scheduler", "text_encoder"):
        (tmp_path / part).mkdir()
    (tmp_path / missing).rmdir()
    (tmp_path / "model_index.json").write_text("{}")
    arguments = ["import", f"--from={tmp_path}", SMOKE, f"--workdir={tmp_path / 'run'}"]
    assert cli.main(arguments) == 2
    assert f"is a pipeline without the folder {missing!r}" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["", "unet"])
def test_a_pipeline_whose_condition_has_other_latents_is_refused(tmp_path, part, capsys):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionInstructPix2PixPipeline"}')
    assert cli.main(["import", f"--from={tmp_path / part}", SMOKE, f"--workdir={tmp_path / 'run'}"]) == 2
    assert "whose backbone reads unscaled latents of the image to edit" in capsys.readouterr().err


def test_text_encoders_that_are_not_here(tmp_path):
    (tmp_path / "text_encoder").mkdir()
    file = tmp_path / "text_encoder" / "config.json"
    for config, line in (
        ({"architectures": ["GemmaModel"]}, "is a GemmaModel; here are CLIP's and T5's"),
        ({"architectures": ["T5EncoderModel"], "d_model": 33}, "has no size of"),
        ({"architectures": ["CLIPTextModel"], "hidden_size": 33}, "has no size of"),
    ):
        file.write_text(json.dumps(config))
        with pytest.raises(UserError, match=line):
            text_encoders.read_fields(tmp_path)


def test_train_needs_a_config_or_a_run(tmp_path, capsys):
    assert cli.main(["train", f"--workdir={tmp_path}"]) == 2
    assert f"{tmp_path} holds no run, so train needs --config" in capsys.readouterr().err
