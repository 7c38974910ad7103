"""Text as bytes: a tokenizer that needs no vocabulary file."""

import dataclasses

import numpy as np


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
          ValueError: the text has more than M bytes; a text that is cut may be another task.
        """
        data = text.encode("utf-8")
        if len(data) > self.length:
            raise ValueError(
                f"The text has {len(data)} bytes, text_length is {self.length}: raise text_length. "
                f"The text: {text!r}."
            )
        tokens = np.zeros(self.length, np.int32)
        tokens[: len(data)] = np.frombuffer(data, np.uint8).astype(np.int32) + 1
        return tokens

    def decode(self, tokens: np.ndarray) -> str:
        """The text of int32[M] tokens: the inverse of `encode`.

        Raises:
          ValueError: a token is outside 0..256, or the bytes are not UTF-8.
        """
        tokens = np.asarray(tokens)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() <= 256:
            raise ValueError(f"Tokens must be in 0..256, found {tokens.min()}..{tokens.max()}.")
        return bytes((tokens[tokens > 0] - 1).astype(np.uint8)).decode("utf-8")
