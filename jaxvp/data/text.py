"""Text, cleaned, and as tokens: bytes, which need no vocabulary file, or the pieces that Wan's
encoder reads."""

import dataclasses
import functools
import html
from pathlib import Path

import numpy as np

from jaxvp.errors import UserError


def one_line(text: str) -> str:
    """`text` with every run of white space, line ends included, as one space; none at the ends."""
    return " ".join(text.split())


def clean_instruction(text: str | bytes | None) -> str:
    """An instruction as datasets hold it and as a policy is given it, in training and after it.

    Returns:
      One line, see `one_line`; "" for None, NaN and words that mean them.

    Raises:
      UserError: bytes that are not UTF-8.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"an instruction is not UTF-8: {text[:60]!r}") from error
    if text is None or text != text:  # pandas writes an absent text as NaN.
        return ""
    text = one_line(text)
    return "" if text.lower() in ("none", "null", "nan") else text


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes shifted by one, so that 0 is padding and 1..256 are the bytes.

    Attributes:
      length: M, the number of tokens of every text.
    """

    length: int

    vocabulary_size = 257

    def encode(self, text: str) -> np.ndarray:
        """`text` as int32[M], padded with 0.

        Raises:
          UserError: the text has more than M bytes; a text that is cut may be another task.
        """
        self.check(text, self.length)
        data = text.encode("utf-8")
        tokens = np.zeros(self.length, np.int32)
        tokens[: len(data)] = np.frombuffer(data, np.uint8).astype(np.int32) + 1
        return tokens

    @staticmethod
    def check(text: str, length: int):
        """Raises UserError when the text has more than `length` bytes."""
        if (size := len(text.encode("utf-8"))) > length:
            raise UserError(f"The text has {size} bytes, text_length is {length}: raise "
                            f"text_length. The text: {text!r}.")

    def decode(self, tokens: np.ndarray) -> str:
        """The text of int32[M] tokens: the inverse of `encode`.

        Raises:
          UserError: a token is outside 0..256, or the bytes are not UTF-8.
        """
        tokens = np.asarray(tokens)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() <= 256:
            raise UserError(f"Tokens must be in 0..256, found {tokens.min()}..{tokens.max()}.")
        return bytes((tokens[tokens > 0] - 1).astype(np.uint8)).decode("utf-8")


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
    """Text as UMT5 reads it in Wan: `clean`, sentencepiece, then </s>, and 0 for padding.

    Attributes:
      path: the sentencepiece model, such as spiece.model of google/umt5-xxl.
      length: M, the number of tokens of every text, </s> included.

    Raises:
      UserError: the file does not exist, or is no model of T5's kind.
    """

    path: str | Path
    length: int = 512

    def __post_init__(self):
        _ = self._model  # A wrong file fails here.

    @functools.cached_property
    def _model(self):
        try:
            import sentencepiece  # Only those who have Wan's text encoder need it.
        except ImportError as error:
            raise UserError(f"{self.path} needs `pip install jaxvp[wan]`: {error}.") from error
        if not Path(self.path).is_file():
            raise UserError(
                f"No tokenizer at {self.path}: it is the file spiece.model of google/umt5-xxl, "
                "also in the `tokenizer` folder of Wan's releases.")
        model = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromFile(str(self.path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{self.path} is not a sentencepiece model: {error}.") from error
        if (model.pad_id(), model.eos_id()) != (0, 1):
            raise UserError(
                f"{self.path} pads with {model.pad_id()} and ends with {model.eos_id()}; T5's "
                "tokenizers pad with 0 and end with 1: take spiece.model of google/umt5-xxl.")
        return model

    @property
    def vocabulary_size(self) -> int:
        return self._model.vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """`text` as int32[M], padded with 0.

        Raises:
          UserError: the text has more than M tokens; a text that is cut may be another task.
        """
        pieces = [*self._model.encode(clean(text)), 1]
        if len(pieces) > self.length:
            raise UserError(
                f"The text has {len(pieces)} tokens, the tokenizer's length is {self.length}: "
                f"shorten it. The text: {text!r}.")
        tokens = np.zeros(self.length, np.int32)
        tokens[: len(pieces)] = pieces
        return tokens

    def decode(self, tokens: np.ndarray) -> str:
        """The cleaned text of int32[M] tokens."""
        return self._model.decode([int(token) for token in tokens if token > 1])


def clean(text: str) -> str:
    """Text as Wan cleans it: broken Unicode and HTML mended, runs of white space one space.

    Wan 2.1, wan/modules/tokenizers.py, `clean="whitespace"`; diffusers' `prompt_clean`.
    """
    import ftfy

    return one_line(html.unescape(html.unescape(ftfy.fix_text(text))))
