"""Entries that only training used are passed over and named once; all others are refused."""

import numpy as np
import pytest

from scaling_dit.errors import UserError
from scaling_dit.weights import inert, state_dicts
from scaling_dit.weights.table import Row, Unread

ROWS = [Row("a.weight", "a"), Unread("a.y_embedding", (None, 3))]
ABSTRACT = {"a": np.zeros((2, 3), np.float32)}
GIVEN = {"a.weight": np.ones((2, 3), np.float32)}


def load(extra, **options):
    entries = GIVEN | {name: np.zeros(shape, np.float32) for name, shape in extra.items()}
    return state_dicts.load(ROWS, ABSTRACT, entries, "Part", **options)


@pytest.mark.parametrize(
    "extra",
    [
        {"text_model.embeddings.position_ids": (1, 77)},
        {"position_ids": (5,)},
        {"encoder.norm.num_batches_tracked": ()},
        {"a.y_embedding": (120, 3)},
        {"a.y_embedding": (300, 3)},
    ],
)
def test_inert_entries_are_ignored_and_named_once(extra, capsys):
    inert.report.cache_clear()
    for _ in range(2):
        np.testing.assert_array_equal(load(extra)["a"], GIVEN["a.weight"])
    assert (
        capsys.readouterr().err
        == f"scaling-dit: Part: ignored {next(iter(extra))}, which only training used\n"
    )


def test_leftovers_of_an_autoencoders_training(capsys):
    inert.report.cache_clear()
    leftovers = {f"loss.perceptual_loss.lin{i}.weight": (1,) for i in range(5)}
    leftovers |= {"discriminator.main.0.weight": (2,), "model_ema.decay": (), "loss.logvar": ()}
    load(leftovers, training_only=inert.AUTOENCODER)
    assert (
        "ignored discriminator.main.0.weight, loss.* (6 entries), model_ema.decay, which"
        in capsys.readouterr().err
    )
    with pytest.raises(UserError, match="unknown: discriminator.main.0.weight, loss.logvar"):
        load(leftovers)


@pytest.mark.parametrize(
    "name",
    [
        "loss.weight",
        "position_ids.weight",
        "my_num_batches_tracked",
        "norm.running_mean",
        "pos_embed.pos_embed",
    ],
)
def test_what_is_not_known_to_be_inert_is_refused(name):
    with pytest.raises(UserError, match=f"unknown: {name}"):
        load({name: (2,)})


def test_an_unread_entry_of_another_width_is_refused():
    with pytest.raises(UserError, match=r"a.y_embedding is \(120, 4\), it must be \(any, 3\)"):
        load({"a.y_embedding": (120, 4)})
