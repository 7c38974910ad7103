"""The command that fills a folder of embeddings."""

import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import write

from jaxvp.data.rlds import Episodes
from jaxvp.data.text import SentencePieceTokenizer
from jaxvp.data.text_embeddings import TextEmbeddings
from jaxvp.tools import embed_texts
from jaxvp.weights import umt5
from jaxvp.weights.streaming import write_file

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def two_splits(tmp_path_factory):
    return write(tmp_path_factory.mktemp("two_splits"), val_fraction=0.4)


@pytest.fixture
def flags(tmp_path):
    """The command's flags but --data, for a tiny encoder."""
    pytest.importorskip("sentencepiece")
    weights = dict(np.load(GOLDEN / "umt5.npz"))
    del weights["tokens"], weights["output"]
    write_file(tmp_path / "model.safetensors", {k: (v.shape, v.dtype) for k, v in weights.items()},
               weights.get)
    (tmp_path / "spiece.model").write_bytes(
        np.load(GOLDEN / "umt5_tokenizer.npz")["model"].tobytes())
    return {"weights": f"{tmp_path}/model.safetensors", "tokenizer": f"{tmp_path}/spiece.model",
            "length": 512, "out": f"{tmp_path}/out", "texts": ""}


def run(flags, **more):
    embed_texts.start(types.SimpleNamespace(**flags | more))


def test_command(tmp_path, two_splits, flags, monkeypatch, capsys):
    (tmp_path / "texts").write_text("hold\nthe plate\n")
    run(flags, data=[two_splits], texts=f"{tmp_path}/texts")
    # Six tasks, five of which have another text from step 5 on, "", and the file's two.
    texts = {f"test robot; three views; task {i}{more}" for i in range(6) for more in ("", " more")}
    texts -= {"test robot; three views; task 4 more"}
    assert "14 texts added, 14 there, D 32" in capsys.readouterr().out
    embeddings = TextEmbeddings(tmp_path / "out")
    assert all(text in embeddings for text in texts | {"", "hold", "the plate"})
    assert embeddings.datasets == {Episodes(two_splits, split).digest for split in ("train", "val")}

    encoder, params, _ = umt5.read(tmp_path / "model.safetensors", jnp.float32)
    tokens = SentencePieceTokenizer(tmp_path / "spiece.model", 80).encode("the plate")
    expected = np.asarray(encoder(params, tokens[None])[0])
    found = embeddings.lookup("the plate", 80).astype(np.float32)
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)
    assert found[tokens > 0].any(-1).all() and not found[tokens == 0].any()

    monkeypatch.setattr(umt5, "read", None)  # Not needed: all is there.
    monkeypatch.setattr(embed_texts, "texts_of", None)
    run(flags, data=[two_splits])
    assert "0 texts added, 14 there" in capsys.readouterr().out


def test_text_that_is_too_long_fails_before_anything_is_encoded(tmp_path, two_splits, flags,
                                                                monkeypatch):
    monkeypatch.setattr(umt5, "read", None)
    with pytest.raises(ValueError, match="tokens, the tokenizer's length is 12.*test robot"):
        run(flags, data=[two_splits], length=12)


def test_digest_is_of_the_weights_not_of_their_file(tmp_path):
    def digest_of(name, weights):
        write_file(tmp_path / name, {k: (v.shape, v.dtype) for k, v in weights.items()},
                   weights.get)
        return umt5.digest(umt5.Tensors(tmp_path / name))

    weights = dict(np.load(GOLDEN / "umt5.npz"))
    del weights["tokens"], weights["output"]
    rounded = {k: v.astype(jnp.bfloat16) for k, v in weights.items()}
    other = weights | {"shared.weight": weights["shared.weight"] + 1}
    digests = [digest_of(f"{i}.safetensors", w) for i, w in enumerate((weights, rounded, other))]
    assert digests[0] == digests[1] != digests[2]
