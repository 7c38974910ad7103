"""Instructions in one line; bytes and pieces as tokens."""

from pathlib import Path

import numpy as np
import pytest

from jaxvp.data.text import (
    ByteTokenizer,
    SentencePieceTokenizer,
    clean,
    clean_instruction,
    one_line,
)
from jaxvp.errors import UserError

GOLDEN = np.load(Path(__file__).parents[1] / "golden/umt5_tokenizer.npz")
TEXTS = (  # As in golden/umt5.py.
    "",
    "pick up the red block",
    "  Pick  up\tthe red&nbsp;block,\n then stack it &amp;lt;here&amp;gt; ",
    "“Würfel” ﬁrst — naïve café, 3½ cm",
    "put the 25 blocks_on the plate!",
)


@pytest.mark.parametrize(("text", "cleaned"), [
    ("  pick  up\n the cup ", "pick up the cup"), ("pick\u2028up\u00a0the\tcup", "pick up the cup"),
    (b"r\xc3\xbchren", "r\u00fchren"),
    (None, ""), ("", ""), ("None", ""), ("NaN", ""), ("null", ""), (float("nan"), ""),
    ("nanny", "nanny"),
])
def test_instructions_are_cleaned(text, cleaned):
    assert clean_instruction(text) == cleaned == clean_instruction(cleaned)


def test_an_instruction_that_is_not_utf8_is_an_error():
    with pytest.raises(UserError, match=r"an instruction is not UTF-8: b'caf\\xe9'"):
        clean_instruction(b"caf\xe9")


def test_one_line():
    assert one_line("\n None  of \r\n these ") == "None of these"


@pytest.mark.parametrize("text", ["", "pick up the red block", "Würfel → 左"])
def test_round_trip(text):
    tokens = ByteTokenizer(32).encode(text)
    assert tokens.dtype == np.int32 and tokens.shape == (32,)
    assert ByteTokenizer(32).decode(tokens) == text


def test_tokens_are_bytes_plus_one_and_zero_padding():
    assert ByteTokenizer(4).encode("a\x00").tolist() == [ord("a") + 1, 1, 0, 0]


def test_text_that_does_not_fit_is_an_error():
    assert ByteTokenizer(4).encode("four").all()
    with pytest.raises(ValueError, match="5 bytes, text_length is 4.*'fours'"):
        ByteTokenizer(4).encode("fours")


def test_unknown_token_is_an_error():
    with pytest.raises(ValueError, match="0..256, found 1..257"):
        ByteTokenizer(2).decode(np.array([1, 257]))


@pytest.fixture
def tokenizer_file(tmp_path):
    pytest.importorskip("sentencepiece")
    path = tmp_path / "spiece.model"
    path.write_bytes(GOLDEN["model"].tobytes())
    return path


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_pieces_are_those_of_transformers_and_diffusers(tokenizer_file, number):
    expected = GOLDEN[f"tokens_{number}"].tolist()
    tokens = SentencePieceTokenizer(tokenizer_file).encode(TEXTS[number])
    assert tokens.dtype == np.int32 and tokens.shape == (512,)
    assert tokens.tolist() == expected + [0] * (512 - len(expected))
    assert clean(TEXTS[number]) == str(GOLDEN[f"clean_{number}"])


def test_pieces_round_trip(tokenizer_file):
    tokenizer = SentencePieceTokenizer(tokenizer_file, length=16)
    assert tokenizer.decode(tokenizer.encode(" pick up the  red block")) == "pick up the red block"
    assert tokenizer.vocabulary_size == 34


def test_pieces_that_do_not_fit_are_an_error(tokenizer_file):
    with pytest.raises(ValueError, match="16 tokens, .* length is 15.*'pick up the red block'"):
        SentencePieceTokenizer(tokenizer_file, length=15).encode("pick up the red block")


def test_other_files_are_no_tokenizer(tmp_path, tokenizer_file):
    with pytest.raises(UserError, match="spiece.model of google/umt5-xxl"):
        SentencePieceTokenizer(tmp_path / "absent.model")
    (tmp_path / "text").write_text("some text")
    with pytest.raises(ValueError, match="text is not a sentencepiece model"):
        SentencePieceTokenizer(tmp_path / "text")


def test_tokenizer_of_another_kind(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(  # Its defaults: <unk> 0, <s> 1, </s> 2, no padding.
        sentence_iterator=iter(["a b c", "a c b"]), model_prefix=str(tmp_path / "other"),
        vocab_size=16, hard_vocab_limit=False, minloglevel=2)
    with pytest.raises(ValueError, match="pads with -1 and ends with 2; T5's"):
        SentencePieceTokenizer(tmp_path / "other.model")
