"""Parts of records of an ArrayRecord file, read without the rest of the record.

The library's reader copies and hashes a whole record, 0.5 GB/s, to get at one image in it. A file
that was written with OPTIONS holds its records as they are, but for 24 bytes in front of every
block of 64 KiB. The format is that of Riegeli, doc/riegeli_records_file_format.md in
github.com/google/riegeli.
"""

import os
import struct
from pathlib import Path

OPTIONS = "group_size:1,uncompressed"  # Of ArrayRecordWriter, for files that are read here.

BLOCK, HEADER = 1 << 16, 24
CHUNK = struct.Struct("<8x Q 8x Q 8x")  # Bytes of data; records << 8 | type.
RECORDS = ord("r")


class Value:
    """The bytes of one record in a file, read part by part."""

    def __init__(self, path: Path, position: int):
        """Opens the file; `position` is one of `positions`."""
        self._position, self._file = position, os.open(path, os.O_RDONLY)

    def __del__(self, close=os.close):  # When Python ends, `os` may be gone before.
        if hasattr(self, "_file"):
            close(self._file)

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from byte `start` of the record on; fewer where the file ends."""
        return _read(self._file, self._position + start, size)


def positions(path: Path, count: int) -> list[int]:
    """Where in the file its first `count` records begin, headers of blocks not counted.

    -1 for a record that is compressed, shares a chunk with others, or comes after a damaged header.
    """
    found, position, end = [], 0, path.stat().st_size
    with path.open("rb") as file:
        while len(found) < count and position < end:
            header = _read(file.fileno(), position, CHUNK.size)
            if len(header) < CHUNK.size:
                break
            size, kind = CHUNK.unpack(header)
            position += CHUNK.size
            if kind & 255 == RECORDS:
                records = min(kind >> 8, count - len(found))
                # The kind of compression, the length of a list of lengths, that list, the records.
                start = _read(file.fileno(), position, 2)
                plain = records == 1 and len(start) == 2 and start[0] == 0 and start[1] < 128
                found += [position + 2 + start[1]] if plain else [-1] * records
            position += size
    return found + [-1] * (count - len(found))


def _read(file: int, position: int, size: int) -> bytes:
    """Bytes of an open file at a position that does not count the headers of blocks."""
    first, last = _with_headers(position), _with_headers(position + size)
    data = os.pread(file, last - first, first)
    cut = BLOCK - first % BLOCK
    if len(data) <= cut:
        return data
    blocks = [data[:cut]]
    blocks += (data[start + HEADER : start + BLOCK] for start in range(cut, len(data), BLOCK))
    return b"".join(blocks)


def _with_headers(position: int) -> int:
    block, inside = divmod(position, BLOCK - HEADER)
    return block * BLOCK + HEADER + inside
