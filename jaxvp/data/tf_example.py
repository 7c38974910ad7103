"""Positions of the values of a `tf.train.Example` in its bytes, found without copying them."""

from collections.abc import Iterator

from jaxvp.errors import UserError


class Example:
    """A serialised Example. Its methods take the name of a feature; positions are (start, end)."""

    def __init__(self, data: bytes):
        """Raises UserError when the data is not a serialised Example."""
        self.data = data
        self._lists = {}
        for _, *features in _fields(data, 0, len(data)):
            for _, *entry in _fields(data, *features):
                parts = {number: span for number, *span in _fields(data, *entry)}
                (start, end), feature = parts[1], parts.get(2, (0, 0))
                _, *values = next(_fields(data, *feature), (0, 0, 0))
                self._lists[data[start:end].decode()] = values

    def elements(self, name: str) -> list[tuple[int, int]]:
        """The position of each element of a list of bytes; KeyError: no such feature exists."""
        return elements(self.data, *self._lists[name])

    def text(self, name: str) -> str:
        """The first element of a list of bytes."""
        start, end = self.elements(name)[0]
        return self.data[start:end].decode()

    def span(self, name: str) -> tuple[int, int]:
        """The position of a whole list, as it is serialised."""
        start, end = self._lists[name]
        return start, end

    def floats(self, name: str) -> tuple[int, int]:
        """The position of a list of numbers, little-endian float32.

        Raises:
          UserError: the numbers are not packed into one run of bytes.
        """
        spans = self.elements(name) or [(0, 0)]
        if len(spans) > 1:
            raise UserError(f"{name} is not packed")
        return spans[0]

    def integer(self, name: str) -> int:
        """The first of a list of integers, none of which is negative."""
        return _varint(self.data, self.elements(name)[0][0])[0]


def elements(data: bytes, start: int, end: int) -> list[tuple[int, int]]:
    """The position of each element of a list of bytes, given `Example.span` of the list."""
    found = []
    while start < end:  # As `_fields`, but faster: every record has hundreds.
        start += 2
        size = data[start - 1]
        if size > 127:
            size, start = _varint(data, start - 1)
        found.append((start, start + size))
        start += size
    return found


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of the fields of a message; in an Example all have a length."""
    while start < end:
        tag, start = _varint(data, start)
        size, start = _varint(data, start)
        if tag & 7 != 2 or start + size > end:
            raise UserError("not a serialised tf.train.Example")
        yield tag >> 3, start, start + size
        start += size


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """(value, where the next byte is)."""
    value = shift = 0
    for position in range(start, min(start + 10, len(data))):
        byte = data[position]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position + 1
        shift += 7
    raise UserError("not a serialised tf.train.Example")
