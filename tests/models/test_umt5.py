"""UMT5's encoder against transformers, and what only jaxvp does."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvp.errors import UserError
from jaxvp.models.umt5 import UMT5Encoder, relative_buckets
from jaxvp.weights import umt5
from jaxvp.weights.streaming import Tensors, write_file

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden/umt5.npz"))
TOKENS, OUTPUT = GOLDEN.pop("tokens"), GOLDEN.pop("output")
THERE = TOKENS > 0
TINY = UMT5Encoder(width=32, layers=3, heads=4, head_width=6, ffn=48, vocabulary=64)


def write(folder, weights):
    write_file(folder / "model.safetensors", {k: (v.shape, v.dtype) for k, v in weights.items()},
               weights.get)
    return folder


def wan_spelling(weights):
    """The same weights under the names of Wan's t5.py."""
    names = {"shared.weight": "token_embedding.weight",
             "encoder.final_layer_norm.weight": "norm.weight"}
    parts = {"layer.0.layer_norm": "norm1", "layer.1.layer_norm": "norm2",
             "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
             "layer.1.DenseReluDense.wi_0": "ffn.gate.0", "layer.1.DenseReluDense.wi_1": "ffn.fc1",
             "layer.1.DenseReluDense.wo": "ffn.fc2",
             **{f"layer.0.SelfAttention.{x}": f"attn.{x}" for x in "qkvo"}}
    for block in range(3):
        names |= {f"encoder.block.{block}.{theirs}.weight": f"blocks.{block}.{wans}.weight"
                  for theirs, wans in parts.items()}
    return {names[key]: value for key, value in weights.items() if key in names}


@pytest.mark.parametrize("spelling", [dict, wan_spelling])
def test_output_is_that_of_transformers(tmp_path, spelling):
    encoder, params, report = umt5.read(write(tmp_path, spelling(GOLDEN)), jnp.float32)
    assert encoder == TINY and set(report.unused) <= {"encoder.embed_tokens.weight"}
    output = jax.jit(encoder)(params, TOKENS)
    assert output.dtype == jnp.float32
    np.testing.assert_allclose(output[THERE], OUTPUT[THERE], atol=2e-5)
    assert not output[~THERE].any()


OTHER = {"relative_attention_max_distance": 40, "layer_norm_epsilon": 0.1}


def test_output_is_that_of_transformers_with_another_config(tmp_path):
    """What no shape tells, and another digest, by which embeddings of the two are told apart."""
    published = umt5.digest(Tensors(write(tmp_path, GOLDEN)))
    (tmp_path / "config.json").write_text(json.dumps(
        {"feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6}))
    assert umt5.digest(Tensors(tmp_path)) == published
    (tmp_path / "config.json").write_text(json.dumps(OTHER))
    encoder, params, _ = umt5.read(tmp_path, jnp.float32)
    assert (encoder.max_distance, encoder.epsilon) == (40, 0.1)
    expected = np.load(Path(__file__).parents[1] / "golden/umt5_config.npz")["output"]
    np.testing.assert_allclose(jax.jit(encoder)(params, TOKENS)[THERE], expected[THERE], atol=2e-5)
    assert umt5.digest(Tensors(tmp_path)) != published


@pytest.mark.parametrize("said, message", [
    ({"feed_forward_proj": "relu"}, "feed_forward_proj 'relu'; expected 'gated-gelu'"),
    ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon 'small'; expected a positive number"),
])
def test_a_config_of_another_encoder_is_refused(tmp_path, said, message):
    write(tmp_path, GOLDEN)
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=f"config.json says {message}"):
        umt5.read(tmp_path)


def test_padding_changes_nothing(tmp_path):
    encoder, params, _ = umt5.read(write(tmp_path, GOLDEN), jnp.float32)
    short, long = encoder(params, TOKENS[1:, :7]), encoder(params, TOKENS[1:, :32])
    np.testing.assert_allclose(short[0], long[0, :7], atol=1e-5)


def test_bfloat16_is_near(tmp_path):
    encoder, params, _ = umt5.read(write(tmp_path, GOLDEN))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    output = np.asarray(encoder(params, TOKENS))[THERE]
    error = np.linalg.norm(output - OUTPUT[THERE]) / np.linalg.norm(OUTPUT[THERE])
    assert 1e-4 < error < 0.03


def test_buckets():
    """Single distances up to 8, then logarithmic up to 128; keys after the query from 16 on."""
    row = relative_buckets(200, 32, 128)
    assert row[100, 93:101].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert row[100, 101] == 17 and row[0, 8] == row[0, 11] == 24 and row[0, 12] == 25
    assert row[0, 199] == row[0, 128] == row[0, 91] == 31 and row[0, 90] == 30
    assert row[199, 0] == 15


def test_xxl_has_its_published_size():
    """1.05 B of embeddings and 24 layers of 193 M, a relative bias in each."""
    shapes = jax.eval_shape(UMT5Encoder().init, jax.random.key(0))
    layer = 4 * 4096 * 4096 + 3 * 4096 * 10240 + 2 * 4096 + 32 * 64
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == (
        256384 * 4096 + 24 * layer + 4096) == 5_680_910_336


def test_weights_of_something_else(tmp_path):
    some = {key: GOLDEN[key] for key in list(GOLDEN)[:4]}
    with pytest.raises(ValueError, match="not UMT5's encoder: there is no .* among its 4 tensors"):
        umt5.encoder_of(Tensors(write(tmp_path, some)))


def test_weights_left_over(tmp_path):
    more = GOLDEN | {"encoder.block.0.adapter.weight": GOLDEN["shared.weight"]}
    with pytest.raises(ValueError, match="no parameter wants: encoder.block.0.adapter.weight"):
        umt5.read(write(tmp_path, more))
