"""A tiny random UMT5 encoder of transformers, and a tokenizer of its kind."""

import io
import tempfile
from pathlib import Path

import numpy as np

OTHER = {"relative_attention_max_distance": 40, "layer_norm_epsilon": 0.1}
TEXTS = (
    "",
    "pick up the red block",
    "  Pick  up\tthe red&nbsp;block,\n then stack it &amp;lt;here&amp;gt; ",
    "“Würfel” ﬁrst — naïve café, 3½ cm",
    "put the 25 blocks_on the plate!",
)


def make(folder: Path):
    """Writes umt5.npz, umt5_config.npz and umt5_tokenizer.npz.

    umt5.npz: `tokens` int32[2, 160] (the second text is short), `output` float32[2, 160, 32] with
    padded rows as the model leaves them, and the weights under transformers' names.
    umt5_config.npz: `output` of the same weights with OTHER in their config.
    umt5_tokenizer.npz: `model` (bytes of a sentencepiece model), and of text i in TEXTS `clean_i`
    as diffusers' Wan pipeline cleans it and `tokens_i`, which transformers makes of that.
    """
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=64, d_model=32, d_kv=6, d_ff=48, num_layers=3, num_heads=4)
    model = UMT5EncoderModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else
                            noise if "bias" in name or "shared" in name else 0.2 * noise)
        tokens = torch.randint(1, 64, (2, 160), generator=generator)
        tokens[1, 7:] = 0
        output = model(tokens, attention_mask=(tokens > 0).long()).last_hidden_state
        other = UMT5EncoderModel(UMT5Config(**config.to_dict() | OTHER)).eval()
        other.load_state_dict(model.state_dict())
        other = other(tokens, attention_mask=(tokens > 0).long()).last_hidden_state
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    np.savez_compressed(folder / "umt5.npz", tokens=tokens.numpy().astype(np.int32),
                        output=output.numpy(), **weights)
    np.savez_compressed(folder / "umt5_config.npz", output=other.numpy())
    np.savez_compressed(folder / "umt5_tokenizer.npz", **_tokenizer())


def _tokenizer() -> dict[str, np.ndarray]:
    import sentencepiece
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean
    from transformers import T5Tokenizer

    stream = io.BytesIO()
    sentences = [f"{verb} the {colour} {thing} {where}" for verb in ("pick up", "put", "stack")
                 for colour in ("red", "green", "blue") for thing in ("block", "plate", "tray")
                 for where in ("here", "on the table", "first, then there")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=stream, model_type="unigram",
        vocab_size=100, hard_vocab_limit=False, character_coverage=1.0, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, normalization_rule_name="identity", num_threads=1, minloglevel=2)
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary, "spiece.model").write_bytes(stream.getvalue())
        tokenizer = T5Tokenizer.from_pretrained(temporary, extra_ids=0)
    arrays = {"model": np.frombuffer(stream.getvalue(), np.uint8)}
    for i, text in enumerate(TEXTS):
        arrays[f"clean_{i}"] = np.array(prompt_clean(text))
        arrays[f"tokens_{i}"] = np.array(tokenizer(prompt_clean(text)).input_ids, np.int32)
    return arrays
