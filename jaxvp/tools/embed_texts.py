"""Texts as Wan's text encoder sees them, computed once, so that no training step runs the encoder.

    python -m jaxvp.tools.embed_texts --data=DIR[,DIR] --weights=DIR --tokenizer=FILE --out=DIR

encodes every unified text of the datasets, and the empty one (guidance wants it), and adds what
--out lacks; see jaxvp/data/text_embeddings.py. A run that was stopped continues when the command is
repeated. The encoder in bfloat16 takes 11.4 GB of one device's memory, for as long as texts are
missing.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
from absl import flags

from jaxvp import command
from jaxvp.data import rlds
from jaxvp.data.text import SentencePieceTokenizer
from jaxvp.data.text_embeddings import TextEmbeddings, add, lines, texts_of
from jaxvp.weights import umt5
from jaxvp.weights.streaming import Tensors

BATCH = 16  # Texts that are encoded together, of similar length,
MULTIPLE = 64  # padded to a multiple of this, so that few shapes are compiled.


def umt5_encode(encoder, params, tokenizer) -> Callable[[Sequence[str]], list[np.ndarray]]:
    """The function texts -> embeddings, bfloat16[n, D] each, of a UMT5Encoder."""
    @jax.jit
    def run(params, tokens):
        return encoder(params, tokens).astype(jnp.bfloat16)

    def encode(texts):
        tokens = np.stack([tokenizer.encode(text) for text in texts])
        lengths = (tokens > 0).sum(1)
        order, results = np.argsort(lengths, kind="stable"), [None] * len(texts)
        starts = range(0, len(texts), BATCH)
        for start in rich.progress.track(starts, "Encoding texts", disable=len(starts) < 8):
            rows = order[start : start + BATCH]
            longest = -(-int(lengths[rows[-1]]) // MULTIPLE) * MULTIPLE
            batch = np.zeros((BATCH, longest), np.int32)
            batch[: len(rows), : tokens.shape[1]] = tokens[rows, :longest]
            for row, output in zip(rows, np.asarray(run(params, batch)), strict=False):
                results[row] = output[: lengths[row]]
        return results

    return encode


def embed(data: Sequence[str], texts: str, weights: str, tokenizer: str, length: int, out: str
          ) -> tuple[int, TextEmbeddings]:
    """Adds the texts of datasets and of a file to the folder `out`; arguments as the flags.

    Returns:
      How many were missing, and all that are there.

    Raises:
      UserError, OSError: a dataset, file or weights cannot be read, a text is too long, or `out`
        holds embeddings of another encoder. Before the weights are read.
    """
    tensors = Tensors(weights)
    encoder = umt5.encoder_of(tensors)
    tokenize = SentencePieceTokenizer(tokenizer, length)
    digest = hashlib.sha256(umt5.digest(tensors).encode())
    digest.update(Path(tokenizer).read_bytes())
    digest = digest.hexdigest()[:16]
    add(out, (), digest, encoder.width, None)  # Another encoder's folder fails here.
    complete = TextEmbeddings(out).datasets
    wanted, datasets = {""}, []
    for path in filter(None, data):
        for split in rlds.splits(path):
            episodes = rlds.Episodes(path, split)
            datasets.append(episodes.digest)
            if episodes.digest not in complete:
                wanted |= texts_of(episodes)
    if texts:
        wanted.update(lines(texts))
    for text in wanted:  # A text that is too long fails before the weights are read.
        tokenize.encode(text)

    made = []

    def encode(shard):
        if not made:
            made.append(umt5_encode(*umt5.read(weights)[:2], tokenize))
        return made[0](shard)

    return add(out, wanted, digest, encoder.width, encode, datasets), TextEmbeddings(out)


def start(settings):
    """Embeds what the flags say."""
    added, there = embed(settings.data, settings.texts, settings.weights, settings.tokenizer,
                         settings.length, settings.out)
    command.console().print(
        f"{settings.out}: {added} texts added, {len(there)} there, D {there.width}; data: "
        f"{{text_embeddings: {settings.out}, text_width: {there.width}}}", soft_wrap=True)


def run():
    """The command; see the module's docstring."""
    flags.DEFINE_list("data", [], "RLDS datasets; all splits.")
    flags.DEFINE_string("texts", "", "A file with further texts, one in a line, as they are: those "
                        "of an evaluation, a negative prompt.")
    flags.DEFINE_string("weights", None, "UMT5 in safetensors: file or folder, such as "
                        "`text_encoder` of Wan's Diffusers releases.")
    flags.DEFINE_string("tokenizer", None, "Its spiece.model.")
    flags.DEFINE_integer("length", 512, "Longest text in tokens.", lower_bound=1)
    flags.DEFINE_string("out", None, "The folder of embeddings.")
    flags.mark_flags_as_required(["weights", "tokenizer", "out"])
    command.run(start, "repeat the command to continue with the texts that are missing")


if __name__ == "__main__":
    run()
