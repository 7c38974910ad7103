"""Bytes as tokens."""

import numpy as np
import pytest

from jaxvp.data.text import ByteTokenizer


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
