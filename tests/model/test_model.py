"""A model computes the same whether its text encoder is frozen or trained: step 0 of a tuned one is the base."""

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit import trees
from scaling_dit.model.build import build_model, make_tokenizer, open_source
from tests.support.layouts import FIELDS


def model_of(name, *, tuned):
    config = config_lib.load("experiments/shapes.py:smoke", [f"--config.train_text_encoder={tuned}"])
    with config.copy_and_resolve_references().unlocked() as config:
        config.backbone = ConfigDict({"name": name} | FIELDS[name])
    config = config_lib.resolve(config)
    source = open_source(config)
    return build_model(config, make_tokenizer(config, source), source)


@pytest.mark.parametrize(
    "name", ["uvit", *(pytest.param(name, marks=pytest.mark.slow) for name in FIELDS if name != "uvit")]
)
def test_a_tuned_text_encoder_is_the_same_program_of_the_same_weights(name):
    programs, shapes = [], []
    for tuned in (False, True):
        model = model_of(name, tuned=tuned)
        params, frozen = trees.unbox(jax.eval_shape(model.init, jax.random.key(0)))
        weights = {**frozen, **params}
        # Only where the weights lie differs.
        assert ("text_encoder" in params) == tuned and ("text_encoder" in frozen) != tuned

        def predict(weights, ids, mask, latents, times, *, model=model, trained=tuple(params)):
            params = {name: tree for name, tree in weights.items() if name in trained}
            frozen = {name: tree for name, tree in weights.items() if name not in trained}
            text, text_mask, _ = model.encode_text(params, frozen, ids, mask)
            return model.predict(params, latents, times, text, text_mask)

        ids = jax.ShapeDtypeStruct((2, model.text_encoder.length), jnp.int32)
        mask = jax.ShapeDtypeStruct(ids.shape, jnp.bool_)
        latents = jax.ShapeDtypeStruct((2, *model.latent_shape), jnp.float32)
        times = jax.ShapeDtypeStruct((2,), jnp.float32)
        programs.append(str(jax.make_jaxpr(predict)(weights, ids, mask, latents, times)))
        shapes.append(weights)
    assert shapes[0] == shapes[1]
    assert programs[0] == programs[1] and "dot_general" in programs[0]
