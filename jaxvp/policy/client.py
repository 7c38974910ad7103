"""A client of `python -m jaxvp.serve`, or of any policy server of openpi: copy this file.

    client = Client("ws://127.0.0.1:8000")
    while True:
        seen = {"images": {"wrist": image}, "state": state, "prompt": "lift the tray"}
        actions = client.infer(seen)["actions"]
        ...  # Execute as many of them as client.metadata["execution_horizon"] says.

Needs numpy, msgpack and websockets, nothing else. Messages are MessagePack; an array is a map of
its bytes, its dtype and its shape, as openpi writes it. Nothing in a message is unpickled.
"""

import contextlib
import math
import re

import msgpack
import numpy as np
import websockets.sync.client

# What may be in an array: truth values, integers and floats.
DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")


class Client:
    """One robot, or one simulated environment.

    Attributes:
      metadata: what the server says of its policy; see docs/serving.md.

    Args:
      url: of the server, such as "ws://127.0.0.1:8000".
      timeout: seconds to wait for the connection, and for each answer.

    Raises:
      OSError, TimeoutError: there is no server.
    """

    def __init__(self, url: str, timeout: float = 60.0):
        self._timeout, self._reset = timeout, False
        with contextlib.ExitStack() as stack:
            self._connection = stack.enter_context(websockets.sync.client.connect(
                url, open_timeout=timeout, compression=None, max_size=None))
            self.metadata = unpack(self._connection.recv(timeout))
            self._stack = stack.pop_all()

    def infer(self, observation: dict) -> dict:
        """What to do next.

        Args:
          observation: arrays by the names that the server's kind of client has, in dicts or not.

        Returns:
          {"actions": float32[H, A], "policy_timing": {...}, "server_timing": {...}}.

        Raises:
          RuntimeError: the server refused the observation, and says why; the connection stays.
          TimeoutError: the server did not answer in time; the connection is closed.
          websockets.ConnectionClosed: the server stopped.
        """
        self._connection.send(pack({**observation, "reset": True} if self._reset else observation))
        try:
            answer = self._connection.recv(self._timeout)
        except TimeoutError:
            self.close()  # A late answer would be taken for the next one's.
            raise
        if isinstance(answer, str):
            raise RuntimeError(answer)
        self._reset = False
        return unpack(answer)

    def reset(self):
        """The next observation is the first of an episode. A new connection and another prompt say
        so by themselves."""
        self._reset = True

    def close(self):
        """Ends the connection."""
        self._stack.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_):
        self.close()


def pack(message) -> bytes:
    """MessagePack of dicts, lists, strings, numbers and NumPy arrays.

    Raises:
      TypeError: there is something else in it.
    """
    return msgpack.packb(message, default=_to_map)


def unpack(data: bytes, hook=None):
    """What `pack`, or openpi, wrote; arrays are read-only.

    Args:
      data: the message.
      hook: function of a map that has no array of openpi's, returns what it stands for.

    Raises:
      ValueError: it is no MessagePack, or an array in it is not what it says.
    """
    def from_map(found: dict):
        if b"__ndarray__" in found:
            return to_array(*(found.get(key) for key in (b"data", b"dtype", b"shape")))
        if b"__npgeneric__" in found:
            value = found.get(b"data")
            if not isinstance(value, bool | int | float | str):
                raise ValueError(f"a NumPy scalar holds {type(value).__name__}")
            return value
        return hook(found) if hook else found

    return msgpack.unpackb(data, object_hook=from_map)


def to_array(data, dtype, shape) -> np.ndarray:
    """The read-only array of so many bytes.

    Raises:
      ValueError: they are not those of such an array.
    """
    if not isinstance(dtype, str) or not DTYPE.fullmatch(dtype):
        raise ValueError(f"an array has dtype {dtype!r:.40}: truth values, integers and floats "
                         "can be sent")
    if (not isinstance(shape, list | tuple) or len(shape) > 8
            or not all(type(size) is int and size >= 0 for size in shape)):
        raise ValueError(f"an array has shape {shape!r:.80}: it must be up to 8 sizes")
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not isinstance(data, bytes) or len(data) != size:
        found = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise ValueError(f"an array {dtype}{list(shape)} has {found}, not {size} bytes")
    return np.ndarray(shape, dtype, data)


def _to_map(value):
    if not isinstance(value, np.ndarray | np.generic) or not DTYPE.fullmatch(value.dtype.str):
        raise TypeError(f"{type(value).__name__} {getattr(value, 'dtype', '')} cannot be sent")
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str,
            b"shape": value.shape}
