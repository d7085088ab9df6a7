"""Judges of transformers: tiny models with random weights, saved in the real format, against their own logits."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from scaling_dit.errors import UserError
from scaling_dit.evaluation.metric import Skipped
from scaling_dit.evaluation.vqa import Asked
from scaling_dit.evaluation.vqa.answers import Answers
from scaling_dit.evaluation.vqa.choices import create_matcher
from scaling_dit.evaluation.vqa.forms import YES
from scaling_dit.evaluation.vqa.panel import open_judge
from tests.support import text_towers, xla
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 20, 28, 3), np.uint8)
WORDS = ["is", "there", "a", "red", "dog", "cat", "how", "many", "yes", "Yes", "no", "No", "two", "2", "?"]


def tokenizer(special, **names):
    import tokenizers
    import transformers

    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, *(f"w{i}" for i in range(20))])}
    base = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=names["unk_token"]))
    base.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=base, **names), vocabulary


def sharpened(model):
    """Weights far from those of initialisation, so that tokens differ in probability."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    import transformers

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    words, vocabulary = tokenizer(special, **names)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(vocabulary), "encoder_hidden_size": 16, "bos_token_id": 1, "sep_token_id": 2,
        "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64, "projection_dim": 8,
    }  # fmt: skip
    config = transformers.BlipConfig(
        vision_config=small | {"image_size": 16, "patch_size": 8}, text_config=text, projection_dim=8
    )
    folder = tmp_path_factory.mktemp("blip")
    sharpened(transformers.BlipForQuestionAnswering(config)).save_pretrained(folder)
    pixels = transformers.BlipImageProcessor(size={"height": 16, "width": 16})
    transformers.BlipProcessor(pixels, words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip2(tmp_path_factory):
    import transformers

    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words, vocabulary = tokenizer(special, additional_special_tokens=["<image>"], **names)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "t5", "vocab_size": len(vocabulary), "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1,
            "num_heads": 2, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=small | {"image_size": 16, "patch_size": 8},
        qformer_config=small | {"encoder_hidden_size": 16, "vocab_size": len(vocabulary)},
        text_config=text, num_query_tokens=4, image_token_index=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("blip2")
    sharpened(transformers.Blip2ForConditionalGeneration(config)).save_pretrained(folder)
    pixels = transformers.BlipImageProcessor(size={"height": 16, "width": 16})
    transformers.Blip2Processor(pixels, words, num_query_tokens=4).save_pretrained(folder)
    return folder


def judge(folder, **fields):
    return open_judge(f"transformers:{folder}", {key: str(value) for key, value in fields.items()}, Answers())


def questions(*texts):
    return [Asked(image, text, ("yes", "no"), {}) for image in IMAGES for text in texts]


@pytest.mark.parametrize("kind", ["blip", "blip2"])
def test_a_batch_is_answered_like_each_question_alone(kind, request):
    folder = request.getfixturevalue(kind)
    asked = questions("is there a red dog ?", "how many ?", "is a cat red ? two dog")
    whole, alone = judge(folder, batch=9), judge(folder, batch=1)
    assert whole.answers(asked) == alone.answers(asked)
    found = [one.log_p for one in whole.likelihoods(asked)]
    np.testing.assert_allclose(found, [one.log_p for one in alone.likelihoods(asked)], atol=1e-4)
    assert len({round(p, 4) for p in found}) > 3 and all(p < 0 for p in found)
    architecture = {"blip": "BlipForQuestionAnswering", "blip2": "Blip2ForConditionalGeneration"}[kind]
    assert whole.identity.startswith(f"{architecture} ")


def test_the_probability_of_blip_is_that_of_its_decoders_first_token(blip):
    import torch
    import transformers

    model = transformers.BlipForQuestionAnswering.from_pretrained(blip).eval()
    processor = transformers.AutoProcessor.from_pretrained(blip)
    text = "is there a dog ?"
    encoded = processor(images=Image.fromarray(IMAGES[0]), text=text, return_tensors="pt")
    with torch.inference_mode():
        seen = model.vision_model(pixel_values=encoded["pixel_values"])[0]
        read = model.text_encoder(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            encoder_hidden_states=seen,
        )[0]
        start = torch.tensor([[model.decoder_start_token_id]])
        logits = model.text_decoder(input_ids=start, encoder_hidden_states=read).logits[0, -1].double()
    p = torch.softmax(logits, -1).numpy()
    ids = {processor.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "Yes")}
    found = judge(blip)
    # Four forms, of which two share their first token with another.
    assert found.judge.first_ids(YES) == sorted(ids)
    assert found.judge.probability(IMAGES[0], text, YES) == pytest.approx(sum(p[i] for i in ids), rel=1e-5)
    assert found.template == "{question}"


def test_a_model_with_a_chat_template_is_asked_through_it(tmp_path):
    """LLaVA, as an example of image-text-to-text models."""
    import transformers

    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words, vocabulary = tokenizer(special, additional_special_tokens=["<image>"], **names)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8} | small,
        text_config={"model_type": "llama", "vocab_size": len(vocabulary), "num_key_value_heads": 1} | small,
        image_token_index=4,
    )
    model = sharpened(transformers.LlavaForConditionalGeneration(config))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(tmp_path)
    pixels = transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image> {% else %}{{ c.text }} "
        "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}yes{% endif %}"
    )
    transformers.LlavaProcessor(
        pixels, words, patch_size=8, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(tmp_path)  # fmt: skip
    asked = questions("is there a red dog ?", "how many ?")
    whole, alone = judge(tmp_path, batch=6, max_tokens=3), judge(tmp_path, batch=1, max_tokens=3)
    found = [one.log_p for one in whole.likelihoods(asked)]
    np.testing.assert_allclose(found, [one.log_p for one in alone.likelihoods(asked)], atol=1e-4)
    assert whole.answers(asked) == alone.answers(asked)
    # The image matters, and so does the text.
    assert len({round(p, 4) for p in found}) == 6
    assert whole.identity.startswith("LlavaForConditionalGeneration ")


QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory):
    """A small Qwen3-VL in the layout of the published folders, which have a part for videos."""
    import tokenizers
    import transformers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = transformers.Qwen2Tokenizer(vocab={c: i for i, c in enumerate(letters)}, merges=[])
    marks = [
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    words.add_tokens(marks, special_tokens=True)
    words.chat_template = QWEN_TEMPLATE
    start, end, image, video = (words.convert_tokens_to_ids(mark) for mark in marks[2:])
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0}
    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "rope_parameters": rope,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
            "spatial_merge_size": 2, "out_hidden_size": 32, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    model = sharpened(transformers.Qwen3VLForConditionalGeneration(config))
    model.generation_config.eos_token_id = words.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = words.pad_token_id
    folder = tmp_path_factory.mktemp("qwen3_vl")
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    pixels = {
        "size": {"shortest_edge": 64, "longest_edge": 4096}, "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "processor_class": "Qwen3VLProcessor",
    }  # fmt: skip
    images = pixels | {"image_processor_type": "Qwen2VLImageProcessorFast"}
    videos = pixels | {"video_processor_type": "Qwen3VLVideoProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    return folder


def test_qwen3_vl_without_torchvision_answers_as_called_directly(qwen3_vl):
    """Model, tokenizer and pixels put together by hand, as transformers' documentation of the model says."""
    import torch
    import transformers

    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(qwen3_vl).eval()
    words = transformers.AutoTokenizer.from_pretrained(qwen3_vl)
    pixels = transformers.AutoImageProcessor.from_pretrained(qwen3_vl)
    assert type(pixels).__name__ == "Qwen2VLImageProcessorPil"
    mark = words.convert_tokens_to_ids("<|image_pad|>")
    texts = ["is there a red dog ?", "how many ?"]
    tall = np.random.default_rng(1).integers(0, 256, (40, 16, 3), np.uint8)
    asked = [Asked(image, text, YES, {}) for image in (*IMAGES, tall) for text in texts]
    alone, whole = judge(qwen3_vl, batch=1, max_tokens=4), judge(qwen3_vl, batch=8, max_tokens=4)
    found = []
    for image, text, forms, _ in asked:
        seen = pixels(Image.fromarray(image), return_tensors="pt")
        # Patches of 4 px, of which 2 x 2 are one token.
        count = int(seen["image_grid_thw"].prod()) // 4
        prompt = (
            f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>{text}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        ids = words([prompt], return_tensors="pt")["input_ids"]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **seen}
        inputs["mm_token_type_ids"] = (ids == mark).int()
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -1].double()
            made = model.generate(**inputs, do_sample=False, max_new_tokens=4)[0, ids.shape[1] :]
        p = torch.softmax(logits, -1).numpy()
        firsts = {words.encode(form, add_special_tokens=False)[0] for form in forms}
        found.append(np.log(sum(p[i] for i in firsts)))
        assert alone.judge.probability(image, text, forms) == pytest.approx(np.exp(found[-1]), rel=1e-4)
        assert alone.judge.answer(image, text, ()) == words.decode(made, skip_special_tokens=True).strip()
    np.testing.assert_allclose([one.log_p for one in whole.likelihoods(asked)], found, atol=1e-4)
    assert whole.answers(asked) == alone.answers(asked)
    # Images and questions matter.
    assert len({round(p, 4) for p in found}) == len(found)
    assert whole.identity.startswith("Qwen3VLForConditionalGeneration ")
    assert "Qwen2VLImageProcessorPil, float32, 4 tokens" in whole.identity


def test_what_else_needs_torchvision_is_refused_in_one_line(blip, qwen3_vl, tmp_path, monkeypatch):
    import transformers

    def needs(*_, **__):
        raise ImportError("\nSam2ImageProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", needs)
    message = "Sam2ImageProcessor needs torchvision; pip install torchvision, in the build that fits torch"
    with pytest.raises(Skipped, match=message):
        judge(blip)
    # A torchvision of another build of torch, beside which transformers loads no model.
    (tmp_path / "torchvision").mkdir()
    fails = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / "torchvision" / "__init__.py").write_text(fails)
    code = (
        "from scaling_dit.evaluation.vqa.transformers_models import TransformersJudge\n"
        "from scaling_dit.evaluation.metric import Skipped\n"
        f"try: TransformersJudge({str(qwen3_vl)!r})\n"
        "except Skipped as error: print(error)\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert "the torchvision here does not load (operator torchvision::nms does not exist)" in done.stdout, (
        done.stderr
    )
    assert "install the build that fits torch, or remove it" in done.stdout and done.stdout.count("\n") == 1


def test_nothing_but_the_extra_eval_is_needed_to_evaluate(smoke_run, qwen3_vl, tmp_path):
    """With the core's packages and those of [eval] alone: a judge of transformers, the oracle, and a CLIP tower."""
    import setuptools

    caught = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", caught.update)
        code = compile((ROOT / "setup.py").read_text(), ROOT / "setup.py", "exec")
        exec(code, {"__file__": str(ROOT / "setup.py"), "__name__": "__main__"})
    allowed = [*caught["install_requires"], *caught["extras_require"]["eval"]]
    script = tmp_path / "evaluate.py"
    script.write_text("from scaling_dit.__main__ import run\nrun()\n")
    clip = tmp_path / "clip"
    text_towers.clip().save_pretrained(clip)
    text_towers.save_clip_words(clip)
    command = [
        sys.executable, ROOT / "tests/support/few_packages.py", script, "evaluate", f"--workdir={smoke_run}",
        "--items=2", f"--out={tmp_path / 'out'}", "--metrics=shapes_tifa,tifa,soft_tifa,vqa_score,clip_score",
        f"--judge=transformers:{qwen3_vl}", f"--config.metrics.clip_score.weights={clip}",
        "--config.metrics.clip_score.size=tiny", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "FEW_PACKAGES": " ".join(allowed), "XLA_FLAGS": xla.flags(devices=1)}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert set(found) == {"shapes_tifa", "tifa", "soft_tifa", "vqa_score", "clip_score"}
    assert all(row["n"] == 2 for row in found.values())


def test_the_nearest_sentence_is_that_of_mean_embeddings(tmp_path):
    import torch
    import transformers

    words, vocabulary = tokenizer(["<pad>", "<unk>"], pad_token="<pad>", unk_token="<unk>")
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = sharpened(transformers.BertModel(config)).eval()
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)

    def embed(text):
        with torch.inference_mode():
            tokens = model(**words([text], return_tensors="pt")).last_hidden_state[0]
        return torch.nn.functional.normalize(tokens.mean(0), dim=0).numpy()

    matcher = create_matcher(str(tmp_path))
    choices = ("red dog", "two cat", "how many")
    for answer in ("a dog", "cat cat", "many ? there"):
        nearest = max(choices, key=lambda choice: float(embed(answer) @ embed(choice)))
        assert matcher.match([answer], [choices]) == [nearest]
    # Literally a choice: taken as it is.
    assert matcher.match(["two cat"], [choices]) == ["two cat"]
    assert "else the nearest one by sentence embedding" in matcher.rule


def test_what_is_no_judge_is_reported(tmp_path, blip):
    with pytest.raises(Skipped, match="config.json is missing"):
        judge(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    with pytest.raises(Skipped, match="holds no AutoModelForImageTextToText with its processor"):
        judge(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="names no single architecture"):
        judge(tmp_path)
    with pytest.raises(UserError, match="needs max_tokens and batch from 1"):
        judge(blip, batch=0)
    with pytest.raises(UserError, match="dtype=float8"):
        judge(blip, dtype="float8")
    assert math.isfinite(judge(blip).likelihoods(questions("no ?"))[0].log_p)
