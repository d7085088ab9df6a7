"""`stats` on Beam against a brute-force count of the same captions."""

import itertools
import json
import re
import statistics as arithmetic
from collections import Counter

import numpy as np
import pytest
from apache_beam.runners.portability import prism_runner

from scaling_dit.curation import sidecar, statistics, stats_pipeline, words
from scaling_dit.curation.raw import RawName
from scaling_dit.curation.sidecar import MadeCaption
from scaling_dit.errors import UserError
from tests.support import small_webdataset

pytestmark = pytest.mark.usefixtures("inspected_once")

THINGS = ["dog", "cat", "boy", "box", "cherry", "car", "tree", "horse", "leaf", "puppy"]
FORMS = {thing: thing for thing in THINGS} | {
    "dogs": "dog", "cats": "cat", "boys": "boy", "boxes": "box", "cherries": "cherry", "cars": "car", "trees": "tree",
    "horses": "horse", "leaves": "leaf", "puppies": "puppy",
}  # fmt: skip
OTHERS = ["the", "a", "red", "Big", "very", "is", "running", "slowly,", "and", "of"]
IMAGE = small_webdataset.encoded(np.zeros((4, 4, 3)))
ELEMENTS = {"red": "color", "dog": "animal", "big puppy": "animal", "purple": "color"}
QUESTIONS = [{"element": element, "element_type": kind} for element, kind in ELEMENTS.items()]


def draw_caption(rng, longest):
    return " ".join(rng.choice([*FORMS, *OTHERS], size=rng.integers(1, longest)))


def write_set(folder, shards, per_shard, seed=0):
    """A webdataset with side-cars and lists; returns (shard, key, alt, synthetic, aesthetic, kept) of each image."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(shards):
        name, samples = f"{number:05d}.tar", []
        for index in range(per_shard):
            aesthetic = None if rng.random() < 0.1 else round(float(rng.uniform(3, 7)), 4)
            made = [
                MadeCaption(draw_caption(rng, 20), "synthetic", float(-i)) for i in range(rng.integers(0, 4))
            ]
            key = f"{number:05d}/{index:06d}"
            rows.append((name, key, draw_caption(rng, 90), made, aesthetic, bool(rng.random() < 0.7)))
            samples.append((f"{index:06d}", IMAGE, rows[-1][2], {"aesthetic": aesthetic}))
        small_webdataset.write_tar(folder / name, samples)
        own = rows[-per_shard:]
        sidecar.write_captions(folder / "made", name, [(row[1], row[3]) for row in own])
        lines = [{"key": row[1]} | ({} if row[5] else {"dropped": "filter"}) for row in own]
        sidecar.write_lines(sidecar.path_of(folder / "kept", name, sidecar.FILTER), lines)
    return rows


def count_by_hand(rows, synthetic):
    """The table and the lengths of captions, counted with other code than the package's."""

    def tokens(text):
        return re.sub(r"[^a-z ]", "", text.lower()).split()

    def nouns(text):
        return [FORMS[token] for token in tokens(text) if token in FORMS]

    pairs, met = 0, set()
    for _, _, alt, made, *_ in rows:
        found = (
            set(nouns(alt)).union(*(nouns(caption.text) for caption in made))
            if synthetic
            else set(nouns(alt))
        )
        pairs, met = pairs + len(found), met | found
    texts = {"alt": [row[2] for row in rows]}
    if synthetic:
        texts["synthetic"] = [caption.text for row in rows for caption in row[3]]
    lengths = {
        kind: {"words": [len(tokens(t)) for t in given], "nouns": [len(nouns(t)) for t in given]}
        for kind, given in texts.items()
    }
    scores = [row[4] for row in rows if row[4] is not None]
    return pairs, len(met), lengths, scores, texts


def check(found, rows, synthetic=True):
    pairs, unique, lengths, scores, texts = count_by_hand(rows, synthetic)
    assert found["images"] == len(rows) and found["aesthetic"]["images"] == len(scores)
    assert found["aesthetic"]["mean"] == pytest.approx(arithmetic.fmean(scores), abs=1e-6)
    row = found["table"]["with synthetic" if synthetic else "alt"]
    assert row == {"image_noun_pairs": pairs, "unique_nouns": unique, "nouns_per_image": pairs / len(rows)}
    assert set(found["captions"]) == set(texts)
    for kind, given in lengths.items():
        assert found["captions"][kind] == len(texts[kind])
        for what, numbers in given.items():
            assert found["per_caption"][kind][what]["mean"] == pytest.approx(arithmetic.fmean(numbers))
            classes = Counter(min(number, 60) for number in numbers)
            assert found["per_caption"][kind][what]["histogram"] == [classes[n] for n in range(61)]
    return texts


def run(folder, out, capsys, **options):
    name = RawName(f"webdataset:{folder}/*.tar")
    stats_pipeline.main(name, str(out), nouns="lexicon", as_json=True, **options)
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "stats.json").read_text())
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    return folder, write_set(folder, shards=3, per_shard=40)


def test_figures_are_a_brute_force_count_with_and_without_synthetic_captions(small, tmp_path, capsys):
    folder, rows = small
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps(QUESTIONS))
    found = run(folder, tmp_path / "a", capsys, captions=str(folder / "made"), questions=str(questions))
    texts = check(found, rows)
    assert found["table"]["alt"]["image_noun_pairs"] == count_by_hand(rows, synthetic=False)[0]
    patterns = {"color": r"\b(reds?|purples?)\b", "animal": r"\b(dogs?|big (puppy|puppies))\b"}
    for kind, given in texts.items():
        for element, pattern in patterns.items():
            share = arithmetic.fmean(bool(re.search(pattern, text.lower())) for text in given)
            assert found["density"][element][kind] == pytest.approx(share) and 0 < share < 1
    without = run(folder, tmp_path / "b", capsys)
    check(without, rows, synthetic=False)
    assert set(without["table"]) == {"alt"} and "density" not in without
    assert without["nouns_by"] == words.LexiconNouns().name


def test_only_what_the_filter_kept_is_counted(small, tmp_path, capsys):
    folder, rows = small
    found = run(folder, tmp_path, capsys, captions=str(folder / "made"), kept=str(folder / "kept"))
    check(found, [row for row in rows if row[5]])


@pytest.mark.slow
def test_5000_pairs(tmp_path, capsys):
    rows = write_set(tmp_path, shards=10, per_shard=500, seed=1)
    check(run(tmp_path, tmp_path / "out", capsys, captions=str(tmp_path / "made")), rows)


def test_damage_is_counted_and_the_table_says_what_was_used(tmp_path, capsys, monkeypatch):
    servers = []
    monkeypatch.setattr(prism_runner.PrismRunner, "run_pipeline", lambda *_: servers.append("started"))
    samples = [("a", IMAGE, "a dog", None), ("b", None, "no image", None), ("c", IMAGE, " ", None)]
    small_webdataset.write_tar(tmp_path / "0.tar", samples)
    stats_pipeline.main(RawName(f"webdataset:{tmp_path}/*.tar"), str(tmp_path / "out"), nouns="lexicon")
    shown = capsys.readouterr().out
    assert "damaged samples left out: empty_caption 1, missing_image 1" in shown
    assert "no tagging, no proper nouns" in shown and "column 'aesthetic' of 0 images" in shown
    written = json.loads((tmp_path / "out/stats.json").read_text())
    assert written["images"] == 1 and written["aesthetic"]["mean"] is None
    # Beam would download one first, and run there.
    assert not servers


def test_a_side_car_of_another_set_is_reported(small, tmp_path):
    folder, rows = small
    name = RawName(f"webdataset:{folder}/*.tar")
    with pytest.raises(UserError, match="`scaling-dit caption` writes one"):
        stats_pipeline.main(name, str(tmp_path), captions=str(tmp_path))
    for shard in {row[0] for row in rows}:
        sidecar.write_captions(tmp_path, shard, [("another", [])])
    with pytest.raises(UserError, match=r"0000\d.tar.captions.jsonl has no '0000\d/000000'"):
        stats_pipeline.main(name, str(tmp_path), captions=str(tmp_path))


def test_side_car_captions_come_back(tmp_path):
    made = [MadeCaption("über ☂", "long", None), MadeCaption("b", "synthetic", -0.25)]
    sidecar.write_captions(tmp_path, "x.tar", [("k", made), ("none", [])])
    assert sidecar.read_captions(tmp_path, "x.tar") == {"k": made, "none": []}
    sidecar.path_of(tmp_path, "x.tar", sidecar.CAPTIONS).write_text(
        '{"key": "k", "captions": [{"text": "a"}]}'
    )
    with pytest.raises(UserError, match="line 1: a line holds"):
        sidecar.read_captions(tmp_path, "x.tar")


def test_processes_share_the_shards_without_overlap():
    names = [f"{n}.tar" for n in range(7)]
    dealt = [sidecar.share(names, process, 3) for process in range(3)]
    assert sorted(itertools.chain(*dealt)) == names and max(map(len, dealt)) == 3
    with pytest.raises(UserError, match="process 3 of 3: count from 0 to 2"):
        sidecar.share(names, 3, 3)


def test_the_plot_is_a_png_with_both_figures():
    counting = statistics.Counting(words.LexiconNouns(), "aesthetic")
    counting.add([("a dog and a cat", "alt"), ("a small dog", "synthetic")], {})
    found = statistics.result(counting.counts, {}, {}, nouns_by="x", aesthetic="aesthetic")
    assert (statistics.plot(found) or b"").startswith(b"\x89PNG")
