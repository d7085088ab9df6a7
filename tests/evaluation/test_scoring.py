"""Streams of images: the same result in one go, in batches, after a kill and over processes, in bounded memory."""

import json
import tracemalloc

import numpy as np
import pytest
from etils import epath

from scaling_dit.errors import UserError
from scaling_dit.evaluation.bases import Base, PerImage
from scaling_dit.evaluation.metric import Item, Items, Skipped
from scaling_dit.evaluation.parts import InFolder, InMemory
from scaling_dit.evaluation.results import Target, score_to_folders
from scaling_dit.evaluation.scoring import Scoring, score, score_together

N = 100
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 4, 4, 3), np.uint8)


def items(count=N):
    return Items(count, lambda i: Item(f"i{i:05d}", f"prompt {i}\u2028end", truth=IMAGES[i % N]))


class Moments(Base):
    """Mean and covariance of pixels in float64, as FID keeps them of features, and a paired error of each image."""

    def __init__(self, size: int = 4):
        self.size = size

    def init(self):
        d = self.size**2 * 3
        return {"n": np.zeros((), np.int64), "sum": np.zeros(d), "products": np.zeros((d, d))}

    def update(self, state, batch):
        x = batch.images.reshape(len(batch.images), -1).astype(np.float64) / 255
        state = {
            "n": state["n"] + len(x), "sum": state["sum"] + x.sum(0), "products": state["products"] + x.T @ x,
        }  # fmt: skip
        truths = np.stack([item.truth for item in batch.items]).astype(np.float64)
        errors = ((batch.images - truths) ** 2).mean((1, 2, 3))
        return state, [{"score": error, "first": row[:2]} for error, row in zip(errors, x, strict=True)]

    def result(self, state, rows, seed):
        mean = state["sum"] / state["n"]
        covariance = state["products"] / state["n"] - np.outer(mean, mean)
        # From arrays in the rows, as KID takes subsets of features.
        chosen = set(np.random.default_rng(seed).choice(len(rows), 5, replace=False).tolist())
        picked = np.stack([row["first"] for i, row in enumerate(rows) if i in chosen])
        return {
            "n": int(state["n"]),
            "scalars": {
                "trace": np.trace(covariance), "picked": picked.mean(), "error": rows.column("score").mean(),
            },
        }  # fmt: skip


def test_the_result_is_that_of_all_images_at_once():
    result, rows = score(Scoring("m", Moments(), items(), batch=8), [IMAGES], 0)
    x = IMAGES.reshape(N, -1) / 255
    assert result["n"] == N and len(rows) == len(list(rows)) == len(list(rows)) == N
    assert result["scalars"]["trace"] == pytest.approx(np.trace(np.cov(x.T, bias=True)), rel=1e-12)
    chosen = np.sort(np.random.default_rng(0).choice(N, 5, replace=False))
    assert result["scalars"]["picked"] == pytest.approx(x[chosen, :2].mean(), rel=1e-12)
    assert result["scalars"]["error"] == 0
    first = next(iter(rows))
    assert (first["id"], first["prompt"]) == ("i00000", "prompt 0\u2028end")


@pytest.mark.parametrize("sizes", [[100], [1] * 100, [33, 33, 34], [0, 7, 93, 0]])
def test_how_images_arrive_does_not_matter(sizes):
    scoring = Scoring("m", Moments(), items(), batch=8)
    stream = np.split(IMAGES, np.cumsum(sizes)[:-1])
    assert score(scoring, stream, 3)[0] == score(scoring, [IMAGES], 3)[0]


@pytest.mark.parametrize("processes", [2, 3, 20])
def test_several_processes_give_the_same_bits(tmp_path, processes):
    scoring = Scoring("m", Moments(), items(), batch=8)
    expected, rows = score(scoring, [IMAGES], 3)
    expected_rows = [row["score"] for row in rows]
    shared = InFolder(epath.Path(tmp_path), {"a": 1})
    seen = []
    for index in reversed(range(processes)):
        scoring.update([IMAGES[:50], IMAGES[50:]], shared, share=(index, processes))
        seen.append(sum(shared.has(number) for number in scoring.numbers))
    assert seen[-1] == len(scoring.numbers) == 13 and seen[0] <= -(-13 // processes)
    result, rows = scoring.result(shared, 3)
    assert result == expected and [row["score"] for row in rows] == expected_rows


def to_folder(scoring, folder, head):
    (found,) = score_to_folders([Target(scoring, folder, head)], read, 0)
    return found


def read(numbers):
    return [IMAGES[numbers.start : numbers.stop]]


def test_an_evaluation_that_was_killed_scores_only_what_is_missing(tmp_path):
    class Dies(Moments):
        seen = 0

        def update(self, state, batch):
            if Dies.seen == 5:
                Dies.seen += 1
                raise KeyboardInterrupt
            Dies.seen += 1
            return super().update(state, batch)

    head = {"metric": "m", "n": N}
    whole, broken = epath.Path(tmp_path / "whole"), epath.Path(tmp_path / "broken")
    plain = Scoring("m", Moments(), items(), batch=8)
    assert to_folder(plain, whole, head)["metric"] == "m"
    dying = Scoring("m", Dies(), items(), batch=8)
    with pytest.raises(KeyboardInterrupt):
        to_folder(dying, broken, head)
    assert not (broken / "result.json").exists()
    to_folder(dying, broken, head)
    # 5 batches before the kill, one that died, and the 8 that were missing.
    assert Dies.seen == 14
    for name in ("result.json", "rows.jsonl"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(path.name for path in broken.iterdir()) == ["result.json", "rows.jsonl"]
    lines = (whole / "rows.jsonl").read_text().removesuffix("\n").split("\n")
    assert [json.loads(line)["id"] for line in lines] == [item.id for item in items()]
    assert set(json.loads(lines[0])) == {"id", "prompt", "score"}


def test_parts_made_with_other_settings_are_not_taken_up(tmp_path):
    first = InFolder(epath.Path(tmp_path / "parts"), {"weights": "a"})
    first.write(0, b"x")
    assert InFolder(epath.Path(tmp_path / "parts"), {"weights": "a"}).has(0)
    assert not InFolder(epath.Path(tmp_path / "parts"), {"weights": "b"}).has(0)


@pytest.mark.parametrize(
    "counts", [(1024, 1536, 2048), pytest.param((1024, 4096, 16384), marks=pytest.mark.slow)], ids=str
)
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, counts):
    """Of an image nothing is held but its id and prompt; images are 12 KiB each, states 18 KiB."""

    def peak(count):
        scoring = Scoring(
            "m", Moments(), Items(count, lambda i: Item(f"i{i}", "x", truth=IMAGES[0])), batch=16
        )
        parts = InFolder(epath.Path(tmp_path / str(count)), {})
        stream = (np.repeat(IMAGES[:1], 8, axis=0) for _ in range(count // 8))
        tracemalloc.start()
        scoring.update(stream, parts)
        result, rows = scoring.result(parts, 0)
        assert result["n"] == count and sum(1 for _ in rows) == count
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top, max(len(parts.read(number)) for number in scoring.numbers)

    tops, sizes = zip(*(peak(count) for count in counts), strict=True)
    # A part of a longer request has more images, up to 1024; from there on nothing grows.
    assert scoring_part(16384) == scoring_part(65536) == 1024
    assert tops[2] - tops[0] < 1024 * 1024 * 2 and tops[2] < 4e6, tops
    assert max(sizes) < 300_000, sizes


def scoring_part(count):
    class Cheap(Items):
        def __iter__(self):
            return (Item(str(i), "x") for i in range(len(self)))

    return Scoring("m", Moments(), Cheap(count, lambda i: Item(str(i), "x")), batch=16).part


def test_a_state_stays_as_large_as_it_is():
    metric = Moments()
    state = metric.init()
    sizes = set()
    for start in range(0, N, 4):
        batch = type("B", (), {"images": IMAGES[start : start + 4], "items": items()[start : start + 4]})
        state, _ = metric.update(state, batch)
        sizes.add(sum(value.nbytes for value in state.values()))
    assert len(sizes) == 1
    merged = metric.merge(state, state)
    assert sum(value.nbytes for value in merged.values()) in sizes and merged["n"] == 2 * N


def test_too_few_images_are_noticed():
    with pytest.raises(ValueError, match="100 items, but 99 images"):
        Scoring("m", Moments(), items()).update([IMAGES[:99]], InMemory())


class Dark(PerImage):
    def rows(self, batch):
        return [{"score": float(image.mean() < 100)} for image in batch.images]


def test_a_score_for_each_image_gives_mean_and_interval():
    result, _ = score(Scoring("dark", Dark(), items()), [IMAGES], 0)
    share = np.mean([image.mean() < 100 for image in IMAGES])
    assert result["scalars"] == {"Dark": pytest.approx(share)}
    low, high = result["interval"]
    assert low <= share <= high and "95 % interval" in Dark().table(result)


def broken(**methods):
    return type("Broken", (Dark,), methods)()


@pytest.mark.parametrize(
    "metric, message",
    [
        (broken(items=lambda self, source, count: None), "a sequence of at least one Item, got NoneType"),
        (broken(items=lambda self, source, count: []), "at least one Item, got none"),
        (broken(items=lambda self, source, count: ["a"]), "items must return Items, got str"),
        (broken(items=lambda self, source, count: [Item("a", "x")] * 2), "two items have the id 'a'"),
        (broken(items=lambda self, source, count: [Item("a", 3)]), "id and prompt of an Item must be text, got 'a', 3"),
        (broken(init=lambda self: None), "a state must be a dict of arrays by name, got NoneType"),
        (broken(init=lambda self: {"a": object()}), "'a' of its state is no array of numbers"),
        (broken(update=lambda self, state, batch: None), "update must return (state, rows), got NoneType"),
        (broken(update=lambda self, state, batch: (state, None)), "for each of 2 images, got NoneType"),
        (broken(rows=lambda self, batch: None), "for each of 2 images, got NoneType"),
        (broken(rows=lambda self, batch: [{"score": 1.0}]), "for each of 2 images, got 1 of them"),
        (broken(rows=lambda self, batch: [{"score": {1}}] * 2), "a row must hold JSON values and arrays"),
        (
            broken(rows=lambda self, batch: [{"a": np.zeros(i + 1)} for i in range(2)]),
            "'a' must be an array of the same shape in every row",
        ),
        (broken(merge=lambda self, one, other: None), "a state must be a dict of arrays by name, got NoneType"),
        (broken(result=lambda self, state, rows, seed: None), 'a dict with "scalars", such as'),
        (broken(result=lambda self, state, rows, seed: {"mean": 1.0}), "got a dict with mean"),
        (broken(result=lambda self, state, rows, seed: {"scalars": {}}), "got a dict with scalars"),
        (
            broken(result=lambda self, state, rows, seed: {"scalars": {"a": "1"}}),
            "scalar 'a' must be a number, got str",
        ),
        (
            broken(result=lambda self, state, rows, seed: {"scalars": {"a": 1}, "b": {1}}),
            "result must hold JSON values",
        ),
        (broken(rows=lambda self, batch: [{"score": np.nan}] * 2), "scalar 'Broken' is nan, which is no score"),
        (
            broken(result=lambda self, state, rows, seed: {"scalars": {"a": 1, "b": -np.inf}}),
            "scalar 'b' is -inf, which is no score",
        ),
        (
            broken(result=lambda self, state, rows, seed: {"scalars": {"a": 1}, "interval": [0.0, np.nan]}),
            "'interval' is [0.0, nan], which is no score",
        ),
    ],
)  # fmt: skip
def test_a_metric_that_breaks_the_contract_is_told_apart_in_one_line(metric, message):
    with pytest.raises(UserError) as error:
        given = metric.items(None, 2) if type(metric).items is not Dark.items else items(4)
        score(Scoring("broken", metric, given, batch=2), [IMAGES[: len(given)]], 0)
    assert str(error.value).startswith("metric 'broken': ") and message in str(error.value)


def test_a_metric_that_must_be_skipped_lets_the_sampling_of_others_end():
    """Processes sample together, so the stream is read to its end before the metric is given up."""

    class Missing(Moments):
        def update(self, state, batch):
            raise Skipped("no weights")

    seen = []
    stream = (seen.append(i) or IMAGES[i : i + 10] for i in range(0, N, 10))
    with pytest.raises(Skipped, match="no weights"):
        score(Scoring("m", Missing(), items(), batch=8), stream, 0)
    assert len(seen) == 10


class Faulty(Dark):
    """Gives no number for the first image until `mended`."""

    def __init__(self, mended=False):
        self.mended = mended

    def rows(self, batch):
        return [
            {"score": 0.5 if self.mended or item.id != "i00000" else np.nan, "id": item.id}
            for item in batch.items
        ]


def test_a_result_that_is_not_finite_is_skipped_and_computed_again(tmp_path):
    """The others have their results, and nothing of its parts stays: its code may be mended meanwhile."""

    def scored(*metrics):
        targets = [
            Target(Scoring(f"m{i}", metric, items(), batch=8), epath.Path(tmp_path / f"m{i}"), {})
            for i, metric in enumerate(metrics)
        ]
        return list(score_to_folders(targets, lambda numbers: IMAGES[None, numbers], 0))

    first, second = scored(Faulty(), Dark())
    assert isinstance(first, Skipped) and "scalar 'Faulty' is nan" in str(first)
    assert second["scalars"]["Dark"] > 0 and not (tmp_path / "m0" / "result.json").exists()
    assert scored(Faulty(mended=True), Dark())[0]["scalars"] == {"Faulty": 0.5}


def test_the_part_of_a_result_that_may_be_missing():
    """No interval, or none that is known."""
    metric = broken(result=lambda self, state, rows, seed: {"scalars": {"a": 1}, "interval": None})
    assert score(Scoring("m", metric, items()), [IMAGES], 0)[0] == {"scalars": {"a": 1.0}, "interval": None}


class Halves(Moments):
    """Dies, or must be skipped, at its second batch; notes the images it was given."""

    def __init__(self, error=None):
        super().__init__()
        self.error, self.given = error, []

    def update(self, state, batch):
        self.given.append(batch.items[0].id)
        if self.error and len(self.given) == 2:
            raise self.error
        return super().update(state, batch)


def test_metrics_of_the_same_images_read_each_once(tmp_path):
    """Alone, together, with one that must be skipped, and after a kill: the same bytes."""
    folder, numbers = epath.Path(tmp_path), []

    def counted(wanted):
        numbers.extend(wanted)
        return read(wanted)

    def together(place, *metrics):
        targets = [
            Target(Scoring("m", metric, items(), 8), folder / place / str(i), {"metric": "m"})
            for i, metric in enumerate(metrics)
        ]
        return list(score_to_folders(targets, counted, 0))

    alone = to_folder(Scoring("m", Moments(), items(), 8), folder / "alone", {"metric": "m"})
    first, last, missing = Halves(), Halves(), Halves(Skipped("no judge"))
    found = together("together", first, missing, last)
    assert found[0] == found[2] == alone and str(found[1]) == "no judge"
    # The one that is skipped is not asked again.
    assert numbers == list(range(N)) and first.given == last.given == [f"i{i:05d}" for i in range(0, N, 8)]
    assert len(missing.given) == 2 and not (folder / "together" / "1" / "result.json").exists()
    numbers.clear()
    with pytest.raises(KeyboardInterrupt):
        together("killed", Moments(), Halves(KeyboardInterrupt()), Moments())
    numbers.clear()
    again = [Halves() for _ in range(3)]
    assert together("killed", *again) == [alone] * 3
    assert numbers == list(range(8, N)) and {len(metric.given) for metric in again} == {12}
    for place in ("together/0", "together/2", "killed/0", "killed/1", "killed/2"):
        for name in ("result.json", "rows.jsonl"):
            assert (folder / place / name).read_bytes() == (folder / "alone" / name).read_bytes()
        assert not (folder / place / "parts").exists()


def test_a_kill_between_two_results_costs_no_image(tmp_path):
    class Ends(Moments):
        def result(self, state, rows, seed):
            raise KeyboardInterrupt

    def targets(*metrics):
        return [
            Target(Scoring("m", metric, items(), 8), epath.Path(tmp_path / str(i)), {})
            for i, metric in enumerate(metrics)
        ]

    with pytest.raises(KeyboardInterrupt):
        list(score_to_folders(targets(Moments(), Ends()), read, 0))
    assert (tmp_path / "0" / "result.json").exists()
    first, second = score_to_folders(targets(Moments(), Moments()), lambda numbers: 1 / 0, 0)
    assert first == second


def test_metrics_of_one_stream(tmp_path):
    stream = (IMAGES[i : i + 7] for i in range(0, N, 7))
    scorings = [Scoring("m", metric, items(), 8) for metric in (Moments(), Halves(Skipped("x")), Halves())]
    one, missing, other = score_together(scorings, stream, 3)
    assert one[0] == other[0] == score(scorings[0], [IMAGES], 3)[0] and isinstance(missing, Skipped)
    assert next(stream, None) is None


def test_only_the_images_of_missing_parts_are_read(tmp_path):
    scoring = Scoring("m", Moments(), items(), batch=8)
    expected, _ = score(scoring, [IMAGES], 3)
    parts, read = InFolder(epath.Path(tmp_path), {}), []

    def images(numbers):
        read.append(numbers)
        yield from np.array_split(IMAGES[numbers.start : numbers.stop], 3)

    scoring.update_from(images, parts, share=(1, 2))
    assert [numbers.start for numbers in read] == list(range(8, 100, 16))
    scoring.update_from(images, parts, share=(0, 1))
    assert sorted(numbers.start for numbers in read) == list(range(0, 100, 8))
    assert scoring.result(parts, 3)[0] == expected
    with pytest.raises(ValueError, match="100 items, but 3 images"):
        scoring.update_from(lambda numbers: [IMAGES[:3]], InMemory())
