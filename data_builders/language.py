"""Instructions: one of several."""

import hashlib
from collections.abc import Sequence

from jaxvp.data.text import clean_instruction


def pick(texts: str | Sequence[str | bytes | None] | None, key: str) -> str:
    """One of the texts that are not empty, the same whenever `key` is; "" if there are none."""
    texts = [texts] if isinstance(texts, str | bytes) else texts or ()
    texts = list(filter(None, map(clean_instruction, texts)))
    if not texts:
        return ""
    return texts[int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % len(texts)]
