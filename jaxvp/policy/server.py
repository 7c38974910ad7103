"""A policy over WebSocket, for several robots or simulators at once.

The path says the protocol: `/` is openpi's (github.com/Physical-Intelligence/openpi, openpi-client
0.1.2), `/vla-eval` that of vla-eval 0.8.0, see `policy.vla_eval`. GET /healthz answers "OK".

openpi's protocol, one binary frame of msgpack each: the server first says its metadata, then every
observation is answered with {"actions": float32[P, d], "policy_timing", "server_timing"}. What is
refused is answered with a frame of text, which openpi's client raises; the connection stays.

A connection is one robot. One thread runs the policy; the observations that come while it runs are
its next batch.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import http
import logging
import time
from collections.abc import Callable

import numpy as np
import websockets
from websockets.asyncio.server import Request, ServerConnection, serve

import jaxvp
from jaxvp.errors import UserError
from jaxvp.policy import client, protocols
from jaxvp.policy.bundle import Bundle
from jaxvp.policy.runner import PolicyRunner

GOING_AWAY, TRY_AGAIN_LATER = 1001, 1013

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may do.

    Attributes:
      message: bytes of a message; the connection of a client that sends more is closed (1009).
      connections: at a time; one more is closed (1013).
      idle: seconds without a message after which a connection is closed (1001), or in which a
        client does not take its answer.
    """

    message: int = 16 * 2**20
    connections: int = 64
    idle: float = 3600.0


def read(data: bytes, hook=None) -> dict:
    """The map that a message is; `hook` as for `client.unpack`.

    Raises:
      UserError: it is none.
    """
    if isinstance(data, str):
        raise UserError("A message is a binary frame of msgpack, found text.")
    try:
        message = client.unpack(data, hook)
    except (ValueError, TypeError, OverflowError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"A message of {len(data)} bytes cannot be read: {said:.300}") from error
    if not isinstance(message, dict):
        raise UserError(f"A message is a map, found {type(message).__name__}.")
    return message


class Service:
    """A policy that is asked for several robots at once.

    Attributes:
      manifest, runner: of the policy.
      kind, row: of its clients.
      default_prompt: the task of clients that send none.

    Args:
      bundle: the policy, which fits these clients.
      kind: a key of `protocols.CLIENTS`, or `protocols.OWN`.
      default_prompt: as above.
      seed: of the policy's noise.
    """

    def __init__(self, bundle: Bundle, kind: str, default_prompt: str = "", seed: int = 0):
        self.manifest, self.kind, self.default_prompt = bundle.manifest, kind, default_prompt
        self.row = protocols.client(kind, bundle.manifest)
        self.runner = PolicyRunner(bundle, seed)
        self.runner.latencies = {stage: collections.deque(maxlen=1)  # Each reply tells its own.
                                 for stage in self.runner.latencies}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "policy")
        self._waiting: asyncio.Queue = asyncio.Queue()

    async def ask(self, slot: int) -> tuple[np.ndarray, dict[str, float]]:
        """What the robot that was observed should do.

        Returns:
          float32[P, A] in SI units, and times in milliseconds: "wait_ms" until the policy was free,
          "infer_ms" of its call, of which "preprocess_ms" and "act_ms"; "batch", the robots that
          shared the call.
        """
        answer = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((slot, time.perf_counter(), answer))
        return await answer

    async def run(self):
        """Runs the policy until it is cancelled."""
        loop = asyncio.get_running_loop()
        act = functools.partial(self.runner.act, steps=self.manifest.spec.window.chunk)
        while True:
            batch = [await self._waiting.get()]
            while not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            started = time.perf_counter()
            slots = [slot for slot, _, _ in batch]
            try:
                chunks, failure = await loop.run_in_executor(self._thread, act, slots), None
            except Exception as error:  # A bug is told to those who wait, and is logged there.
                chunks, failure = {}, error
            timing = {"infer_ms": 1e3 * (time.perf_counter() - started), "batch": len(batch)} | {
                f"{stage}_ms": 1e3 * times[-1]
                for stage, times in self.runner.latencies.items() if times}
            for slot, came, answer in batch:
                if answer.cancelled():
                    continue
                if failure:
                    answer.set_exception(failure)
                else:
                    answer.set_result((chunks[slot], {"wait_ms": 1e3 * (started - came), **timing}))


def openpi_refusal(row: protocols.Client, manifest: protocols.Manifest) -> str:
    """Why the policy cannot be asked in openpi's protocol, "" if it can."""
    if not row.openpi:
        return "openpi has no such client: vla-eval connects to the path /vla-eval"
    window = manifest.spec.window
    past = -window.steps(manifest.fps)[: window.past]
    if (past % manifest.execution_horizon).any():
        steps = ", ".join(map(str, past[:-1]))
        return (f"the policy sees what was {steps} control steps ago, too, but openpi's clients "
                f"send one observation a chunk, every {manifest.execution_horizon} steps; "
                "vla-eval's, which connect to the path /vla-eval, send all")
    return ""


class OpenpiSession:
    """A client of openpi. Its requests know no time and no reset: each counts as
    `execution_horizon` control steps after the one before, whose first actions were executed; a new
    connection, another prompt, and the key "reset" of our own client start an episode."""

    def __init__(self, service: Service, slot: int):
        self._service, self._slot = service, slot
        self._refusal = openpi_refusal(service.row, service.manifest)
        if not self._refusal:
            self._translator = protocols.Translator(
                service.row, service.row.openpi, service.manifest, service.default_prompt)
        self._episodes, self._chunk, self._seen = 0, None, None
        self._total = None

    def greeting(self) -> bytes:
        """The first message, the server's: what the policy is."""
        manifest, row = self._service.manifest, self._service.row
        return client.pack({
            "server": f"jaxvp {jaxvp.__version__}", "client": self._service.kind,
            "keys": [] if self._refusal else list(self._translator.keys),
            "method": manifest.method, "robot": manifest.robot, "fps": manifest.fps,
            "chunk": row.chunk or manifest.spec.window.chunk,
            "execution_horizon": manifest.execution_horizon, "action": list(row.action),
            "state": list(manifest.dimensions("state")),
            "image_size": list(manifest.spec.observation["video"][0][2:4]),
            "protocol": row.protocol.to_dict() if row.protocol else {},
        })

    async def answer(self, data: bytes) -> bytes:
        """The reply to an observation.

        Raises:
          UserError: it is refused.
        """
        started = time.perf_counter()
        await asyncio.to_thread(self._receive, data)
        decoded = time.perf_counter()
        try:
            self._chunk, timing = await self._service.ask(self._slot)
        except BaseException:
            self._seen = None  # What comes next is a new episode.
            raise
        reply = {"actions": self._translator.actions(self._chunk[: self._service.row.chunk]),
                 "policy_timing": {"infer_ms": timing["infer_ms"]},
                 "server_timing": {"decode_ms": 1e3 * (decoded - started), **timing}}
        if self._total is not None:
            reply["server_timing"]["prev_total_ms"] = self._total
        packed = client.pack(reply)
        self._total = 1e3 * (time.perf_counter() - started)
        return packed

    def refusal(self, text: str) -> str:
        """The reply to what is refused."""
        return text

    def _receive(self, data: bytes):
        runner = self._service.runner
        if self._refusal:
            raise UserError(self._refusal)
        message = read(data)
        seen = self._translator.observation(message)
        runner.encode(seen["instruction"])  # Refused before anything has changed.
        executed = None
        if (self._seen is None or message.get("reset") is True
                or seen["instruction"] != self._seen["instruction"]):
            runner.reset(self._slot, seen["instruction"], self._episodes)
            self._episodes += 1
        else:
            *between, executed = self._chunk[: self._service.manifest.execution_horizon]
            for action in between:  # No call of the policy looks at these.
                runner.observe(self._slot, self._seen, action)
        runner.observe(self._slot, seen, executed)
        self._seen = seen


async def run(service: Service, host: str, port: int, stop: asyncio.Event,
              limits: Limits | None = None, ready: Callable[[int], None] = lambda port: None):
    """Serves a policy until `stop` is set; requests that are running then are answered.

    Args:
      service: the policy.
      host, port: where to listen; port 0 takes a free one.
      stop: ends the server.
      limits: of the clients; None: the usual.
      ready: called with the port when clients can connect.

    Raises:
      OSError: the port cannot be had.
    """
    from jaxvp.policy.vla_eval import VlaEvalSession  # It imports this module.
    limits = limits or Limits()
    sessions = {"/": OpenpiSession, "/vla-eval": VlaEvalSession}
    free = list(range(limits.connections))
    listening: set[ServerConnection] = set()

    def respond(connection: ServerConnection, request: Request):
        if request.path in ("/healthz", "/health"):
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if request.path not in sessions:
            return connection.respond(http.HTTPStatus.NOT_FOUND, "The paths are / (openpi), "
                                      "/vla-eval and /healthz.\n")
        return None

    async def handle(connection: ServerConnection):
        if not free:
            await connection.close(TRY_AGAIN_LATER, f"{limits.connections} are connected already")
            return
        slot = free.pop()
        try:
            with contextlib.suppress(websockets.ConnectionClosed):
                session = sessions[connection.request.path](service, slot)
                if greeting := session.greeting():
                    await connection.send(greeting)
                await _converse(connection, session, listening, stop, limits)
        finally:
            service.runner.forget(slot)
            free.append(slot)

    policy = asyncio.create_task(service.run())
    try:
        async with serve(handle, host, port, process_request=respond, compression=None,
                         max_size=limits.message, max_queue=1, ping_interval=None) as server:
            ready(server.sockets[0].getsockname()[1])
            await stop.wait()
            server.close(close_connections=False)
            await asyncio.gather(*(connection.close(GOING_AWAY, "the server stops")
                                   for connection in list(listening)))
    finally:
        policy.cancel()


async def _converse(connection: ServerConnection, session, listening: set, stop: asyncio.Event,
                    limits: Limits):
    """Answers the messages of a client until it goes, is idle, or the server stops."""
    while not stop.is_set():
        listening.add(connection)
        try:
            async with asyncio.timeout(limits.idle):
                data = await connection.recv()
        except TimeoutError:
            await connection.close(GOING_AWAY, f"idle for {limits.idle:g} s")
            return
        finally:
            listening.discard(connection)
        try:
            reply = await session.answer(data)
        except UserError as error:
            reply = session.refusal(str(error))
        except Exception as error:
            log.exception("A request failed")
            reply = session.refusal(f"a bug of the server, see its log: {type(error).__name__}")
        if reply is not None:
            try:
                async with asyncio.timeout(limits.idle):
                    await connection.send(reply)
            except TimeoutError:  # It does not read.
                connection.transport.abort()
                return
    await connection.close(GOING_AWAY, "the server stops")
