"""Caption policies: shares measured by drawing, fallbacks, random length, determinism from (seed, step, position)."""

import collections
import timeit

import numpy as np
import pytest

from scaling_dit import config as config_lib
from scaling_dit.data.captions import KINDS, CaptionPolicy, check_policy, choose_caption, cut
from scaling_dit.data.loader import KeyedGenerator, make_loader
from scaling_dit.errors import UserError

DRAWS = 20_000
# Of arXiv 2404.02883, and LensArt-Long-50% of arXiv 2412.12391.
HALF_SYNTHETIC = CaptionPolicy("mix", alt=0.5, synthetic=0.5, long=0.0)
HALF_LONG = CaptionPolicy("mix", alt=0.5, synthetic=0.0, long=0.5)
THREE = CaptionPolicy("mix", alt=0.5, synthetic=0.3, long=0.2)
FULL = ("alt", *["synthetic"] * 5)
EVERY = (*FULL, "long", "long")


def record(kinds):
    return {"captions": [f"{kind} {place}" for place, kind in enumerate(kinds)], "kinds": kinds}


# Policy, kinds of an image's captions -> the probability of each of them, worked out by hand.
TABLE = [
    (CaptionPolicy(), FULL, [1 / 6] * 6),
    # 0.5 alt, else one of five.
    (HALF_SYNTHETIC, FULL, [0.5] + [0.1] * 5),
    (HALF_SYNTHETIC, ("synthetic", "alt", "synthetic"), [0.25, 0.5, 0.25]),
    # No synthetic one: alt-text.
    (HALF_SYNTHETIC, ("alt", "alt"), [0.5, 0.5]),
    (HALF_SYNTHETIC, ("synthetic",) * 4, [0.25] * 4),
    (HALF_SYNTHETIC, EVERY, [0.5] + [0.1] * 5 + [0, 0]),
    # Only kinds of share 0.
    (HALF_SYNTHETIC, ("long", "long"), [0.5, 0.5]),
    (HALF_LONG, ("alt", "long"), [0.5, 0.5]),
    (HALF_LONG, EVERY, [0.5] + [0] * 5 + [0.25, 0.25]),
    (HALF_LONG, FULL, [1.0] + [0] * 5),
    (THREE, EVERY, [0.5] + [0.06] * 5 + [0.1, 0.1]),
    (THREE, ("alt", "long"), [5 / 7, 2 / 7]),
    (THREE, ("synthetic", "long", "synthetic"), [0.3, 0.4, 0.3]),
]


@pytest.mark.parametrize(("policy", "kinds", "expected"), TABLE)
def test_shares_measured_by_drawing(policy, kinds, expected):
    """Every frequency is within 5 standard deviations of a binomial; one of share 0 or 1 is never or always drawn."""
    rng = np.random.default_rng(0)
    drawn = collections.Counter(policy.choose(record(kinds), rng) for _ in range(DRAWS))
    for place, (kind, share) in enumerate(zip(kinds, expected, strict=True)):
        bound = 5 * (share * (1 - share) * DRAWS) ** 0.5
        assert abs(drawn[f"{kind} {place}"] - share * DRAWS) <= bound, (place, drawn)
    np.testing.assert_allclose(policy.shares(kinds), expected, atol=1e-12)


def test_a_plain_list_is_alt_text():
    plain = {"captions": ["a", "b", "c"]}
    for policy in (CaptionPolicy(), HALF_SYNTHETIC, HALF_LONG):
        rng = np.random.default_rng(1)
        drawn = collections.Counter(policy.choose(plain, rng) for _ in range(3000))
        assert all(abs(drawn[text] - 1000) < 5 * (3000 * 2 / 9) ** 0.5 for text in "abc")
        # As it was before there were policies: the same caption of the same generator.
        same = [policy.choose(plain, np.random.default_rng(i)) for i in range(50)]
        assert same == [choose_caption(plain["captions"], np.random.default_rng(i)) for i in range(50)]


def test_only_the_chosen_caption_is_read():
    class Lazy(list):
        read = 0

        def __getitem__(self, place):
            Lazy.read += 1
            return super().__getitem__(place)

    lazy = {"captions": Lazy("abcdef"), "kinds": FULL}
    HALF_SYNTHETIC.choose(lazy, np.random.default_rng(0))
    assert Lazy.read == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"captions": "one text", "kinds": ["alt"]}, "captions must be a list"),
        ({"captions": []}, "captions must be a list with at least one text"),
        (
            {"captions": ["a", "b"], "kinds": ["alt"]},
            "kinds must be a list with one for each of its captions",
        ),
        ({"captions": ["a", "b", "c"], "kinds": "alt"}, "kinds must be a list"),
        (
            {"captions": ["a"], "kinds": ["alttext"]},
            "kind is 'alttext'; it must be one of alt, synthetic, long",
        ),
    ],
)
def test_a_record_that_is_wrong_is_told(wrong, message):
    with pytest.raises(UserError, match=message):
        HALF_SYNTHETIC.choose(wrong, np.random.default_rng(0))


# Random length

TEXT = "A red car.  It stands in a street of 3.5 m! Why? Nobody knows"
SENTENCES = ["A red car.", "A red car.  It stands in a street of 3.5 m!", TEXT[:-13], TEXT]


def test_sentences_end_where_they_should():
    found = {cut(TEXT, "sentences", np.random.default_rng(i)) for i in range(200)}
    assert sorted(found, key=len) == SENTENCES


def test_each_length_has_the_same_probability():
    rng = np.random.default_rng(0)
    words = TEXT.split()
    drawn = collections.Counter(len(cut(TEXT, "words", rng).split()) for _ in range(DRAWS))
    expected = DRAWS / len(words)
    assert drawn.keys() == set(range(1, len(words) + 1))
    assert all(abs(count - expected) < 5 * expected**0.5 for count in drawn.values())


@pytest.mark.parametrize("text", ["word", " a  b ", "", " \n", "一句话。 两句话。", "no end", "..."])
@pytest.mark.parametrize("unit", ["words", "sentences"])
def test_what_is_cut_begins_the_caption(text, unit):
    for seed in range(20):
        found = cut(text, unit, np.random.default_rng(seed))
        assert text.startswith(found) and (found.strip() or not text.strip())
    if len(text.split()) == 1:
        assert found.strip() == text.strip()


def test_the_share_that_is_cut():
    policy = CaptionPolicy("mix", random_length=0.3)
    rng = np.random.default_rng(0)
    long = {"captions": [" ".join(["word"] * 1000)]}
    shortened = sum(policy.choose(long, rng) != long["captions"][0] for _ in range(4000))
    assert abs(shortened - 0.3 * 4000 * 0.999) < 5 * (4000 * 0.21) ** 0.5
    always = CaptionPolicy(random_length=1.0)
    assert {always.choose({"captions": ["a b"]}, rng) for _ in range(50)} == {"a", "a b"}


# Through the loader and the config


class Pairs:
    """Record i has one caption of alt-text and five synthetic ones that hold its number."""

    image_size = 1

    def __len__(self):
        return 300

    def __getitem__(self, index, /):
        captions = [f"{index}.{place}" for place in range(6)]
        return {
            "image": np.zeros((1, 1, 3), np.uint8),
            "captions": captions,
            "kinds": FULL,
            "key": str(index),
        }

    def describe(self):
        return "pairs"


def shown(policy, steps, positions, *, start=0, seed=5, threads=2):
    def tokenize(captions):
        ids = np.array([text.split(".") for text in captions], np.int32)
        return ids, ids >= 0

    loader = make_loader(
        Pairs(), tokenize, batch=12, seed=seed, positions=positions, start_step=start, captions=policy, threads=threads
    )  # fmt: skip
    read = [next(loader)["ids"] for _ in range(steps)]
    loader.close()
    return np.stack(read)


def test_the_choice_follows_from_seed_step_and_position():
    whole = shown(HALF_SYNTHETIC, 40, range(12))
    np.testing.assert_array_equal(shown(HALF_SYNTHETIC, 40, [9, 2], threads=0), whole[:, [9, 2]])
    np.testing.assert_array_equal(shown(HALF_SYNTHETIC, 15, range(12), start=25, threads=4), whole[25:])
    share = (whole[..., 1] == 0).mean()
    assert abs(share - 0.5) < 5 * (0.25 / whole[..., 1].size) ** 0.5
    uniform = shown(CaptionPolicy(), 40, range(12))
    # The same records in the same order.
    np.testing.assert_array_equal(whole[..., 0], uniform[..., 0])
    assert (whole[..., 1] != shown(HALF_SYNTHETIC, 40, range(12), seed=6)[..., 1]).mean() > 0.3


def test_the_choice_is_cheap():
    """A tenth of what 10,000 samples/s leave, so that it does not bound the loader."""
    keyed, held = KeyedGenerator(0), record(FULL)

    def draw():
        for position in range(1000):
            HALF_SYNTHETIC.choose(held, keyed.at(7, position))

    seconds = min(timeit.repeat(draw, number=1, repeat=5)) / 1000
    assert seconds < 50e-6


def test_the_config_is_checked():
    assert config_lib.load("shapes").captions.to_dict() == {
        "policy": "uniform", "alt": 0.5, "synthetic": 0.5, "long": 0.0, "random_length": 0.0, "unit": "words",
    }  # fmt: skip
    mixed = ["--config.captions.policy=mix"]
    config = config_lib.load("shapes", [*mixed, "--config.captions.alt=0.2", "--config.captions.long=0.3"])
    assert CaptionPolicy(**config.captions).shares(KINDS) == pytest.approx([0.2, 0.5, 0.3])
    for overrides, message in (
        (["--config.captions.policy=mixed"], "captions.policy is 'mixed'; did you mean 'mix'"),
        (["--config.captions.unit=letters"], "captions.unit is 'letters'"),
        (["--config.captions.alt=1.5"], "captions.alt is 1.5; it must be from 0 to 1"),
        ([*mixed, "--config.captions.alt=0.2"], "alt 0.2, synthetic 0.5 and long 0.0 sum to 0.7; they must sum to 1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            config_lib.load("shapes", overrides)
    # Shares do not matter to uniform.
    check_policy(CaptionPolicy(alt=0.9))
