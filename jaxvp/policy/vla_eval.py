"""The protocol of vla-eval (github.com/allenai/vla-evaluation-harness 0.8.0), as its model server.

A message is one binary frame of msgpack, {"type", "payload", "seq", "timestamp"}. The client says
`hello` and is told what its benchmark should send; `episode_start` starts an episode; every control
step is an `observation`, answered with the `action` of that step; what is refused is answered with
an `error`. Images come as PNG or JPEG.

The policy is asked after every `execution_horizon` steps, as by jaxvp's own evaluator. Its noise is
that of the same task, trial and step there, where the task is named by its instruction.
"""

import asyncio
import collections
import functools
import io
import time
from collections.abc import Mapping

import msgpack
import numpy as np
import PIL.Image

import jaxvp
from jaxvp.errors import UserError
from jaxvp.policy import client, protocols, server

PROTOCOL_VERSION = 1
MAX_PIXELS = 2**24


class VlaEvalSession:
    """A client of vla-eval."""

    def __init__(self, service: server.Service, slot: int):
        self._service, self._slot = service, slot
        self._translator = service.row.vla_eval and protocols.Translator(
            service.row, service.row.vla_eval, service.manifest, service.default_prompt)
        self._seq, self._executed = 0, None
        self._start({})

    def greeting(self) -> None:
        """The client speaks first."""

    async def answer(self, data: bytes) -> bytes | None:
        """The reply to a message, None where none is expected.

        Raises:
          UserError: it is refused.
        """
        self._seq = 0  # Of what cannot be read.
        kind, payload, self._seq = await asyncio.to_thread(_message, data)
        if kind == "hello":
            return self._reply("hello", {
                "harness_version": f"jaxvp {jaxvp.__version__}", "capabilities": {},
                "protocol_version": PROTOCOL_VERSION, "model_server": f"jaxvp {self._service.kind}",
                "observation_params": self._parameters()})
        if kind == "episode_start":
            self._start(payload)
        elif kind == "observation":
            return self._reply("action", {"actions": await self._act(payload)})
        elif kind not in ("episode_end", "error"):
            raise UserError(f"There is no message of type {kind!r:.40}.")
        return None

    def refusal(self, text: str) -> bytes:
        """The reply to what is refused."""
        return self._reply("error", {"error": text})

    def _start(self, payload: Mapping):
        """The next observation starts an episode."""
        task = payload.get("task")
        task = task if isinstance(task, Mapping) else {}
        trial = task.get("episode_idx", 0)
        self._episode = str(task.get("name", "")).replace(" ", "_"), trial
        self._first, self._actions = True, collections.deque()

    async def _act(self, payload: Mapping) -> np.ndarray:
        """float32[d], what to do in this control step."""
        await asyncio.to_thread(self._observe, payload)
        if not self._actions:
            try:
                chunk, _ = await self._service.ask(self._slot)
            except BaseException:
                self._first = True
                raise
            self._actions.extend(chunk[: self._service.manifest.execution_horizon])
        self._executed = self._actions.popleft()
        return self._translator.actions(self._executed[None])[0]

    def _observe(self, payload: Mapping):
        runner = self._service.runner
        if not self._translator:
            raise UserError(f"--client={self._service.kind} is no benchmark of vla-eval: openpi's "
                            "clients connect to the path /.")
        seen = self._translator.observation(payload)
        runner.encode(seen["instruction"])  # Refused before anything has changed.
        if self._first:
            runner.reset(self._slot, *self._episode)
            self._first, self._executed = False, None
            self._actions.clear()
        runner.observe(self._slot, seen, self._executed)

    def _parameters(self) -> dict:
        """What the benchmark should be told, so that it sends what the policy reads."""
        manifest = self._service.manifest
        values = dict(self._service.row.vla_eval_params)
        if not manifest.state:
            for name in ("send_state", "quat_no_antipodal"):
                values.pop(name, None)
        if "wrist" not in manifest.cameras:
            values.pop("send_wrist_image", None)
        if "camera_names" in values:
            values["camera_names"] = [camera for camera in manifest.cameras if camera]
        return values

    def _reply(self, kind: str, payload: dict) -> bytes:
        message = {"type": kind, "payload": payload, "seq": self._seq, "timestamp": time.time()}
        return msgpack.packb(message, default=_encode)


def _message(data: bytes) -> tuple[str, dict, int]:
    """Type, payload and number of a message.

    Raises:
      UserError: it is none.
    """
    message = server.read(data, functools.partial(_decode, [MAX_PIXELS]))
    expected = {"type": str, "payload": dict, "seq": int}
    for name, kind in expected.items():
        if not isinstance(message.get(name), kind):
            raise UserError(f"A message of vla-eval has {', '.join(expected)}; {name} is "
                            f"{message.get(name)!r:.80}.")
    return tuple(message[name] for name in expected)


def _encode(value):
    return {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str,
            "shape": list(value.shape)}


def _decode(left: list[int], found: dict):
    """The array or image that a map is, if it is one.

    Args:
      left: one number, how many pixels the images of the message may still have.
      found: the map.

    Raises:
      ValueError: it cannot be read, or is too large.
    """
    if "__ndarray__" in found or found.get("format") == "raw":
        return client.to_array(*(found.get(key) for key in ("data", "dtype", "shape")))
    if "__image__" not in found:
        return found
    data = found.get("data")
    if not isinstance(data, bytes):
        raise ValueError(f"an image is bytes, found {type(data).__name__}")
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        left[0] -= image.width * image.height
        if left[0] < 0:
            raise ValueError(f"images of more than {MAX_PIXELS:,} pixels, the last of "
                             f"{image.width} x {image.height}, are too large")
        return np.asarray(image)
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError,
            PIL.Image.DecompressionBombWarning) as error:
        raise ValueError(f"an image of {len(data)} bytes: {error}") from error
