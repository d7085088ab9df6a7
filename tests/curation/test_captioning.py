"""The caption runner and its back-ends: a tiny BLIP-2 in transformers' format, a fake server, exact scenes."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from PIL import Image

from scaling_dit.curation import captioning, sidecar
from scaling_dit.curation.captioning import chat, create_captioner, runner, transformers_models
from scaling_dit.curation.raw import RawName
from scaling_dit.data.sources import create_source
from scaling_dit.errors import UserError
from tests.support import small_webdataset
from tests.support.chat_server import FaultyHandler, shown_image


class Mean:
    """A captioner that says the mean colour and the seed; kills its process at the image number `dies_at`."""

    def __init__(self, captions: int = 3, dies_at: int = 0):
        self.captions, self.dies_at, self.seen, self.batches = captions, dies_at, 0, []

    def caption(self, images, seeds):
        self.batches.append(len(images))
        self.seen += len(images)
        if self.dies_at and self.seen >= self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        scores = [None, 0.5, 0.75][: self.captions]
        means = [int(np.asarray(image).mean()) for image in images]
        return [
            [(f" mean {mean} seed {seed} {n}", score) for n, score in enumerate(scores)]
            for mean, seed in zip(means, seeds, strict=True)
        ]


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Three tars of 5 images; one broken, one without a caption of its own."""
    folder, rng = tmp_path_factory.mktemp("tars"), np.random.default_rng(0)
    for shard in range(3):
        samples = []
        for number in range(5):
            image = small_webdataset.encoded(rng.integers(0, 256, (12, 10, 3)))
            broken = (shard, number) == (1, 2)
            caption = None if (shard, number) == (2, 0) else "alt"
            samples.append((f"{number}", image[:-60] if broken else image, caption, {}))
        small_webdataset.write_tar(folder / f"{shard}.tar", samples)
    return RawName(f"webdataset:{folder}/*.tar")


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def made(tars, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mean_captioner", sys.modules[__name__])
    runner.main(tars, "mean_captioner:Mean", str(tmp_path / "made"), batch=2)
    return tmp_path / "made"


def test_captions_are_ranked_and_keyed(made):
    rows = sidecar.read_captions(made, "1.tar")
    assert list(rows) == [f"1/{n}" for n in range(5)]
    # Cannot be decoded.
    assert rows["1/2"] == []
    for key in ("1/0", "1/4"):
        scores = [caption.score for caption in rows[key]]
        assert scores == [0.75, 0.5, None] and rows[key][0].kind == "synthetic"
        assert all(f"seed {runner.key_seed(0, key)} " in caption.text for caption in rows[key])
    assert list(sidecar.read_captions(made, "2.tar")) == [f"2/{n}" for n in range(1, 5)]
    assert len({runner.key_seed(seed, key) for seed in range(3) for key in "abc"}) == 9


def test_three_processes_do_the_work_of_one(tars, made, tmp_path):
    for process in (2, 0, 1):
        runner.main(tars, "mean_captioner:Mean", str(tmp_path / "shared"), process=process, processes=3)
    assert files(tmp_path / "shared") == files(made)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tars, made, tmp_path, capsys):
    out = tmp_path / "killed"
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from scaling_dit.curation.captioning import runner\n"
        "from scaling_dit.curation.raw import RawName\n"
        "import tests.curation.test_captioning as t\n"
        "sys.modules['mean_captioner'] = t\n"
        # An option would be a setting of the captions.
        "t.Mean.__init__.__defaults__ = (3, 8)\n"
        f"runner.main(RawName({tars.name!r}), 'mean_captioner:Mean', {str(out)!r}, batch=2)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(files(out)) == ["0.tar.captions.jsonl", "caption.json"]
    capsys.readouterr()
    runner.main(tars, "mean_captioner:Mean", str(out), batch=2)
    assert "3 shards, 1 of them captioned before" in capsys.readouterr().out
    assert files(out) == files(made)


def test_other_settings_do_not_mix(tars, made):
    with pytest.raises(
        UserError,
        match=r"captioned in another way: seed differ \(seed is 0 there, 1 here\); give another --out",
    ):
        runner.main(tars, "mean_captioner:Mean", str(made), seed=1)
    with pytest.raises(UserError, match="another way: options differ"):
        runner.main(tars, "mean_captioner:Mean", str(made), options={"captions": "2"})
    with pytest.raises(UserError, match="--kind=alt"):
        runner.main(tars, "mean_captioner:Mean", str(made), kind="alt")


def test_a_captioner_that_fails_leaves_nothing_that_refuses_the_corrected_command(
    tars, tmp_path, monkeypatch
):
    class Down(Mean):
        def caption(self, images, seeds):
            raise UserError("no server")

    module = types.SimpleNamespace(Mean=Mean, Down=Down)
    monkeypatch.setitem(sys.modules, "mean_captioner", module)
    with pytest.raises(UserError, match="no field 'caption'"):
        runner.main(tars, "mean_captioner:Mean", str(tmp_path), options={"caption": "2"})
    with pytest.raises(UserError, match="no server"):
        runner.main(tars, "mean_captioner:Down", str(tmp_path))
    assert not files(tmp_path)
    runner.main(tars, "mean_captioner:Mean", str(tmp_path))
    assert len(files(tmp_path)) == 4


def test_options_are_typed_and_checked(monkeypatch):
    monkeypatch.setitem(sys.modules, "mean_captioner", sys.modules[__name__])
    assert create_captioner("mean_captioner:Mean", {"captions": "2"}).captioner.captions == 2
    with pytest.raises(UserError, match="--option=captions=two: give a value such as 3"):
        create_captioner("mean_captioner:Mean", {"captions": "two"})
    with pytest.raises(UserError, match="no field 'caption'; did you mean 'captions'"):
        create_captioner("mean_captioner:Mean", {"caption": "2"})
    with pytest.raises(UserError, match="names no folder; write transformers:FOLDER"):
        create_captioner("transformers", {})
    with pytest.raises(UserError, match="unknown captioner 'blip'"):
        create_captioner("blip", {})


def test_a_captioner_that_loses_photosis_reported(tars, tmp_path):
    class Short:
        def caption(self, images, seeds):
            return []

    source = runner.open_raw(tars)
    with pytest.raises(UserError, match="0 lists of captions for 5 images"):
        list(runner.caption_shard(source, Short(), "0.tar", kind="long", batch=5, seed=0))


def test_scenes_are_captioned_exactly():
    source = create_source("shapes")
    captioner = create_captioner("shapes", {"captions": "4"})
    records = [source[index] for index in range(20)]
    photos = [Image.fromarray(record["image"]) for record in records]
    found = captioner.caption(photos, list(range(20)))
    assert found == [captioner.caption([photos[n]], [n])[0] for n in range(20)]
    for record, captions in zip(records, found, strict=True):
        truth = sorted(
            word
            for word in record["captions"][0].split()
            if word in {"red", "green", "blue", "circle", "square"}
        )
        for text, score in captions:
            assert score is None and set(truth) <= set(text.split()), (record["captions"][0], text)
    assert captioner.caption([Image.new("RGB", (5, 5))], [0]) == [[]]
    with pytest.raises(UserError, match="did you mean 'grid16'"):
        create_captioner("shapes", {"preset": "grid61"})


# --- transformers ---


@pytest.fixture(scope="module")
def blip2(tmp_path_factory):
    """A tiny BLIP-2 with random weights, its processor and tokenizer, as save_pretrained writes them."""
    torch = pytest.importorskip("torch")
    import tokenizers
    import transformers

    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *(f"word{n}" for n in range(27))]
    base = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    base.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    base.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=base, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left",
    )  # fmt: skip
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 32, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "word_embed_proj_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "dropout": 0.0}  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=small | {"image_size": 16, "patch_size": 8},
        qformer_config=small | {"encoder_hidden_size": 16, "vocab_size": 32},
        text_config={"model_type": "opt"} | text,
        num_query_tokens=4,
        image_token_index=4,
    )
    torch.manual_seed(0)
    model = transformers.Blip2ForConditionalGeneration(config)
    # Sharper than at initialisation, so that a nucleus leaves some tokens out.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    image_processor = transformers.BlipImageProcessor(size={"height": 16, "width": 16})
    folder = tmp_path_factory.mktemp("blip2")
    model.save_pretrained(folder)
    transformers.Blip2Processor(image_processor, tokenizer, num_query_tokens=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(3)]


@pytest.fixture(scope="module")
def captioner(blip2):
    return create_captioner(f"transformers:{blip2}", {"captions": "4", "max_tokens": "6"})


def test_a_batch_is_captioned_like_its_photosalone(captioner, photos):
    together = captioner.caption(photos, [7, 8, 9])
    assert [len(row) for row in together] == [4, 4, 4]
    assert len({text for row in together for text, _ in row}) > 6
    for number, (photo, seed) in enumerate(zip(photos, [7, 8, 9], strict=True)):
        (alone,) = captioner.caption([photo], [seed])
        assert [text for text, _ in alone] == [text for text, _ in together[number]]
        assert [score for _, score in alone] == pytest.approx(
            [score for _, score in together[number]], abs=1e-5
        )
    assert captioner.caption(photos[:1], [70])[0] != together[0]


def test_the_score_is_the_mean_log_probability_of_the_tokens(captioner, photos):
    import torch

    model, processor = captioner._model, captioner._processor
    (row,) = captioner.caption(photos[:1], [5])
    encoded = processor(images=photos[0], return_tensors="pt")
    lengths = set()
    for text, score in row:
        words = processor.tokenizer.convert_tokens_to_ids(text.split())
        tokens = [*words, *([2] if len(words) < 6 else [])]
        ids = torch.tensor([[4] * 4 + [1] + tokens])
        logits = model(pixel_values=encoded["pixel_values"], input_ids=ids).logits[0, 4:-1].double()
        expected = logits.log_softmax(-1)[range(len(tokens)), tokens].mean()
        if len(words) == len(text.split()) and 0 not in words:
            assert score == pytest.approx(float(expected.detach()), abs=1e-4)
            lengths.add(len(tokens))
    assert lengths


def test_the_nucleus_is_that_of_transformers_and_drawn_in_proportion():
    torch = pytest.importorskip("torch")
    from transformers import TopPLogitsWarper

    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)) * 2
    expected = TopPLogitsWarper(0.8)(None, logits / 0.7).softmax(-1)[0].numpy()
    rng = np.random.default_rng(0)
    counts = np.zeros(12)
    rows = 20_000
    nucleus = transformers_models.Nucleus(torch, [rng] * rows, 0.8, 0.7)
    only = nucleus(None, logits.expand(rows, 12))
    assert torch.isinf(only).sum() == rows * 11
    counts = np.bincount(only.argmax(-1).numpy(), minlength=12) / rows
    assert ((counts > 0) == (expected > 0)).all() and 1 < (counts > 0).sum() < 12
    assert np.abs(counts - expected).max() < 0.015
    chosen = logits.double().log_softmax(-1)[0, only.argmax(-1)]
    assert np.allclose(nucleus.log_probabilities()[:, 0], chosen)


def test_the_runner_with_a_real_model_and_a_prompt(blip2, tars, tmp_path):
    options = {"captions": "2", "max_tokens": "4", "prompt": "word1 word2"}
    for name, batch in (("a", 4), ("b", 4)):
        runner.main(tars, f"transformers:{blip2}", str(tmp_path / name), options=options, batch=batch)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    rows = sidecar.read_captions(tmp_path / "a", "0.tar")
    for captions in rows.values():
        scores = [caption.score for caption in captions]
        assert scores == sorted(scores, reverse=True)
        # Without the prompt's two words.
        assert all(len(caption.text.split()) <= 4 for caption in captions)
    assert any(rows.values())


def test_clip_ranks_the_captions(blip2, photos, tmp_path):
    import transformers

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = small | {
        "vocab_size": 32,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.CLIPConfig(
        text_config=text, vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=8
    )
    clip = transformers.CLIPModel(config).eval()
    clip.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(blip2)
    tokenizer.model_max_length = 16
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    processor = transformers.CLIPProcessor(images, tokenizer)
    processor.save_pretrained(tmp_path)
    options = {"captions": "3", "max_tokens": "5"}
    plain = create_captioner(f"transformers:{blip2}", options).caption(photos, [1, 2, 3])
    ranked = create_captioner(f"transformers:{blip2}", options | {"rank_by": str(tmp_path)}).caption(
        photos, [1, 2, 3]
    )
    for photo, row, before in zip(photos, ranked, plain, strict=True):
        assert [text for text, _ in row] == [text for text, _ in before]
        given = processor(text=[text for text, _ in row], images=photo, return_tensors="pt", padding=True)
        cosines = clip(**given).logits_per_image[0] / clip.logit_scale.exp()
        assert [score for _, score in row] == pytest.approx(cosines.tolist(), abs=1e-5)


def test_what_is_no_model_is_reported(tmp_path):
    with pytest.raises(UserError, match="holds no AutoModelForImageTextToText with its processor"):
        create_captioner(f"transformers:{tmp_path}", {})
    with pytest.raises(UserError, match="no folder '.*nowhere' .*; download the model and name its folder"):
        create_captioner(f"transformers:{tmp_path}/nowhere", {})
    with pytest.raises(UserError, match="top_p in"):
        create_captioner(f"transformers:{tmp_path}", {"top_p": "0"})
    with pytest.raises(UserError, match="dtype=float8"):
        create_captioner(f"transformers:{tmp_path}", {"dtype": "float8"})


def test_code_of_a_folder_is_refused_and_nobody_is_asked(tmp_path, monkeypatch):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(UserError, match=r"holds no AutoModelForImageTextToText .*contains custom code"):
        create_captioner(f"transformers:{tmp_path}", {})


# --- an endpoint ---


class Server(http.server.ThreadingHTTPServer):
    """Answers with the image's size and the seed; `faults` are given out first, one per request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.requests, self.lock = [], [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(FaultyHandler):
    def noted(self, request):
        return self.path, self.headers.get("Authorization"), request

    def answered(self, request):
        image = shown_image(request)
        text = f"{image.format} {image.size[0]}x{image.size[1]} seed {request['seed']}"
        choices = [
            {
                "message": {"content": f"{text} {n}"},
                "logprobs": {"content": [{"logprob": -n - 0.5}, {"logprob": -n}]},
            }
            for n in range(request["n"])
        ]
        return json.dumps({"choices": choices})


@pytest.fixture
def server():
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def of_server(server, **fields):
    given = {"model": "vlm", "pause": 0.01, "captions": 2} | fields
    return create_captioner(f"openai:{server.url}", {key: str(value) for key, value in given.items()})


def test_the_endpoint_is_asked_as_openai_says(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    captioner = of_server(server, key_variable="MY_KEY", prompt="What?", image_format="png", threads=2)
    photos = [Image.new("RGB", (4 + n, 3)) for n in range(5)]
    found = captioner.caption(photos, list(range(5)))
    assert found == [[(f"PNG {4 + n}x3 seed {n} {k}", -k - 0.25) for k in range(2)] for n in range(5)]
    path, key, body = server.requests[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["model"] == "vlm" and body["n"] == 2 and body["messages"][0]["content"][1]["text"] == "What?"


@pytest.mark.parametrize("fault", [429, 500, 503, "{", '{"choices": []}', '{"error": "x"}', "[]", "hang up"])
def test_what_may_pass_is_tried_again(server, fault):
    server.faults = [fault, fault]
    assert of_server(server).caption([Image.new("RGB", (4, 3))], [5])[0][0][0] == "JPEG 4x3 seed 5 0"
    assert len(server.requests) == 3 and server.requests[0][1] is None


def test_pauses_double_and_a_servers_wish_counts(server, monkeypatch):
    pauses = []
    monkeypatch.setattr(chat.time, "sleep", pauses.append)
    server.faults = [500, 500, 429, 500]
    of_server(server).caption([Image.new("RGB", (4, 3))], [5])
    assert pauses == [0.01, 0.02, 0.05, 0.08]
    assert chat._seconds("Wed, 21 Oct 2026 07:28:00 GMT") == 0 and chat._seconds("1e9") == 60


def test_an_image_that_is_refused_has_no_captions(server):
    server.faults = [400]
    found = of_server(server, threads=1).caption([Image.new("RGB", (4, 3))] * 2, [5, 6])
    assert found[0] == [] and len(found[1]) == 2


def test_what_does_not_pass_stops_in_one_line_and_keeps_finished_shards(server, tars, tmp_path):
    options = {"model": "vlm", "pause": "0.001", "tries": "3", "threads": "1"}
    server.faults = [None] * 5 + [500] * 3
    with pytest.raises(UserError, match="status 500, no; 3 tries; finished shards are kept"):
        runner.main(tars, f"openai:{server.url}", str(tmp_path), options=options, batch=1)
    assert sorted(files(tmp_path)) == ["0.tar.captions.jsonl", "caption.json"]
    server.faults = [401]
    with pytest.raises(UserError, match="status 401, no; the key is read from OPENAI_API_KEY"):
        runner.main(tars, f"openai:{server.url}", str(tmp_path), options=options, batch=1)
    runner.main(tars, f"openai:{server.url}", str(tmp_path), options=options, batch=1)
    assert len(sidecar.read_captions(tmp_path, "2.tar")["2/1"]) == 1


def test_a_slow_server_times_out(server, monkeypatch):
    held = threading.Event()
    monkeypatch.setattr(Handler, "do_POST", lambda self: held.wait(5))
    with pytest.raises(UserError, match="timed out; 1 tries"):
        of_server(server, tries=1, timeout=0.1).caption([Image.new("RGB", (4, 3))], [0])
    held.set()


def test_wrong_settings_of_an_endpoint_are_reported(server):
    with pytest.raises(UserError, match="give a URL such as"):
        create_captioner("openai:localhost", {})
    with pytest.raises(UserError, match="--option=model=NAME"):
        create_captioner(f"openai:{server.url}", {})
    with pytest.raises(UserError, match="image_format=gif"):
        of_server(server, image_format="gif")
    with pytest.raises(UserError, match="tries and threads from 1"):
        of_server(server, tries=0)
    assert captioning._BACK_ENDS.split("openai:http://x:1/v1") == ("openai", {"url": "http://x:1/v1"})
