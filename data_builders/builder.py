"""What a dataset builder promises; `data_builders/NAME/NAME.py` derives its `Builder` from this."""

import abc
import dataclasses
import hashlib
from collections.abc import Hashable, Sequence
from typing import ClassVar

import tensorflow_datasets as tfds


class Skip(Exception):
    """Raised by `Builder.build` for an item that is left out on purpose; the message is the reason.

    The report counts items by reason, so the message says the kind ("not successful"), not the
    item.
    """


def option(default, text: str):
    """A field of a builder with its default and its help text."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Builder(abc.ABC):
    """One raw dataset. Its fields are its options: command-line flags, stored with every episode.

    A subclass is a frozen dataclass whose fields are bool, int, float, str or tuple[str, ...],
    made with `option`. It is sent to worker processes, so it holds options and no open files.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    items_per_shard: ClassVar[int] = 64

    val_fraction: float = option(0.05, "share of items in the split `val`")

    @abc.abstractmethod
    def features(self) -> tfds.features.FeaturesDict:
        """The features on disk; `episode.features` makes them."""

    @abc.abstractmethod
    def items(self) -> Sequence[Hashable]:
        """All work items in a fixed order: small picklable keys, such as (file, key in it).

        Raises:
          FileNotFoundError: the raw data is not there; the message names the folder and the flag.
        """

    @abc.abstractmethod
    def build(self, item) -> list[dict]:
        """Converts one item into RLDS records, usually by `episode.Episode(...).records()`.

        Raises:
          Skip: the item is left out on purpose.
          OSError, ValueError, KeyError, EOFError: the item cannot be read; it is reported with the
            error and left out.
        """

    def split(self, item) -> str:
        """`train` or `val` from a hash of the item, whatever the other items are."""
        digest = hashlib.sha256(repr(item).encode()).digest()
        return "val" if int.from_bytes(digest[:8], "big") < self.val_fraction * 2**64 else "train"

    def options(self) -> dict:
        """The options of this conversion, for `episode_metadata/options`."""
        return dataclasses.asdict(self)
