"""The policy server, over the loopback: both protocols, what is refused, limits, the end."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import io
import random
import signal
import subprocess
import sys
import threading
import time
import types
import urllib.request
from pathlib import Path

import msgpack
import numpy as np
import PIL.Image
import pytest
import served
import toy_bundle
import websockets
import websockets.sync.client

from jaxvp.config import build
from jaxvp.policy import bundle as policy_bundle
from jaxvp.policy import client as client_module
from jaxvp.policy import protocols, server
from jaxvp.policy.bundle import Manifest
from jaxvp.policy.client import Client, pack, unpack
from jaxvp.policy.runner import PolicyRunner

CAMERAS = toy_bundle.SPEC.cameras
OBSERVATION = {
    "images": {camera: np.full((16, 16, 3), 40 * k, np.uint8) for k, camera in enumerate(CAMERAS)},
    "state": np.array([0.4, 0, 0.3, 0, 0, 0, 0, 1], np.float32), "prompt": "lift the tray"}


class Bundle(types.SimpleNamespace):
    """Answers after `seconds` with the state's first number, and counts calls in the carry."""

    def __init__(self, seconds=0.0, **changes):
        values = toy_bundle.manifest(format_version=3, files={}, sha256="", **changes)
        super().__init__(manifest=build(Manifest, values), path="a bundle", seconds=seconds,
                         calls=[], error=None)

    def initial_carry(self, rows):
        return {"calls": np.zeros((rows, 1), np.float32)}

    def predict(self, given, keys, wanted, carry):
        self.calls.append(given)
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        spec = self.manifest.spec
        action = np.zeros((len(keys), spec.window.chunk, spec.action_size), np.float32)
        action[:, :, 0] = np.linspace(-1, 1, spec.window.chunk)
        action[:, :, 1] = given["state"][:, -1, :1]
        action[:, :, 2] = np.asarray(carry["calls"]) / 10 - 1
        return {"action": action}, {"calls": carry["calls"] + 1}


@contextlib.contextmanager
def serving(bundle, kind="jaxvp", limits=None, prompt=""):
    """A server in a thread; yields its url and what stops it."""
    started, box = threading.Event(), {}

    async def main():
        box["loop"], box["stop"] = asyncio.get_running_loop(), asyncio.Event()

        def ready(port):
            box["url"] = f"ws://127.0.0.1:{port}"
            started.set()

        service = server.Service(bundle, kind, prompt)
        await server.run(service, "127.0.0.1", 0, box["stop"], limits, ready)

    thread = threading.Thread(target=asyncio.run, args=[main()], daemon=True)
    thread.start()
    assert started.wait(30)

    def stop():
        box["loop"].call_soon_threadsafe(box["stop"].set)

    try:
        yield box["url"], stop
    finally:
        if thread.is_alive():
            stop()
        thread.join(20)
        assert not thread.is_alive()


def connect(url):
    return websockets.sync.client.connect(url, compression=None, max_size=None)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return policy_bundle.load(toy_bundle.write(tmp_path_factory.mktemp("bundles") / "toy"))


def test_metadata_then_actions_as_the_runner_says(toy):
    with serving(toy) as (url, _), Client(url) as client:
        assert client.metadata["keys"] == [*(f"images.{name}" for name in CAMERAS), "state",
                                           "prompt"]
        assert client.metadata["execution_horizon"] == toy_bundle.HORIZON
        found = [client.infer(OBSERVATION) for _ in range(2)]
    runner = PolicyRunner(toy)
    runner.reset(0, "lift the tray", 0)
    seen = {"images": OBSERVATION["images"], "state": OBSERVATION["state"],
            "instruction": "lift the tray", "robot": toy.manifest.robot}
    for answer in found:
        runner.observe(0, seen)
        expected = runner.act([0], steps=toy_bundle.SPEC.window.chunk)[0]
        assert answer["actions"].dtype == np.float32
        np.testing.assert_allclose(answer["actions"], expected, atol=1e-6)
        for _ in range(toy_bundle.HORIZON - 1):  # The clock of the noise.
            runner.observe(0, seen)
    assert {"infer_ms", "decode_ms", "wait_ms"} <= found[1]["server_timing"].keys()
    assert found[1]["server_timing"]["prev_total_ms"] > 0
    assert "prev_total_ms" not in found[0]["server_timing"]


def test_health():
    with serving(Bundle()) as (url, _):
        base = url.replace("ws", "http")
        with urllib.request.urlopen(f"{base}/healthz") as answer:
            assert answer.status == 200 and answer.read() == b"OK\n"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{base}/nothing")


@pytest.mark.parametrize("change, said", [
    ({"state": None}, "no state; found .*images.head.*prompt"),
    ({"prompt": None}, "no prompt; found"),
    ({"images": {"head": OBSERVATION["images"]["head"]}}, "no images.left_wrist"),
    ({"images": 3}, "no images.head"),
    ({"prompt": 3}, "prompt must be text, found int"),
    ({"prompt": "x" * 200}, "text_length is 96"),
    ({"state": np.zeros(7, np.float32)}, "must have 8 numbers, found 7"),
    ({"state": np.full(8, np.nan, np.float32)}, "finite numbers"),
    ({"state": np.full(8, 1e300)}, "finite numbers"),
    ({"state": "zero"}, "finite numbers, found str"),
    ({"images": OBSERVATION["images"] | {"head": np.zeros((16, 16), np.uint8)}},
     r"images.head must be uint8\[H, W, 3\], found uint8\[16, 16\]"),
    ({"images": OBSERVATION["images"] | {"head": np.zeros((16, 16, 3), np.float32)}},
     "found float32"),
])
def test_a_refusal_names_the_key_and_keeps_the_connection(change, said):
    wrong = {name: value for name, value in (OBSERVATION | change).items() if value is not None}
    with serving(Bundle()) as (url, _), Client(url) as client:
        client.infer(OBSERVATION)
        with pytest.raises(RuntimeError, match=said) as error:
            client.infer(wrong)
        assert "\n" not in str(error.value)
        calls = client.infer(OBSERVATION)["actions"][0, 2]  # The episode goes on.
        assert calls == pytest.approx(0.15 * 0.1)


ARRAY = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}


@pytest.mark.parametrize("data", [
    b"", b"\xc1", b"\x81", b"\xdf\xff\xff\xff\xff", bytes(40), b"\x91" * 100_000,
    msgpack.packb({"state": 1, 2: 3}), msgpack.packb([1, 2]), msgpack.packb("text"),
    *(msgpack.packb({"state": ARRAY | change}) for change in (
        {b"dtype": "|O"}, {b"dtype": "<V8"}, {b"dtype": "f4,f4"}, {b"dtype": None},
        {b"dtype": "<U0"}, {b"shape": [3]}, {b"shape": [-2]}, {b"shape": [2**40, 0]},
        {b"shape": "22"}, {b"shape": [1] * 60}, {b"data": "text"}, {b"data": 8},
        {b"shape": [True, 2]})),
    msgpack.packb({"state": {b"__npgeneric__": True, b"data": [1], b"dtype": "<f4"}}),
    msgpack.packb(msgpack.ExtType(5, b"abc")), msgpack.packb(msgpack.Timestamp(1)),
], ids=lambda data: f"{data[:8].hex()}_{len(data)}")
def test_malformed_messages(data, malformed):
    connection = malformed
    connection.send(data)
    answer = connection.recv(10)
    assert isinstance(answer, str) and answer and "bug" not in answer


@pytest.fixture(scope="module")
def malformed():
    with serving(Bundle()) as (url, _), connect(url) as connection:
        connection.recv(10)
        yield connection
        connection.send(pack(OBSERVATION))
        assert unpack(connection.recv(10))["actions"].shape == (6, 8)


def test_our_client_is_one_file(tmp_path):
    (tmp_path / "robot.py").write_text(Path(client_module.__file__).read_text())
    with serving(Bundle()) as (url, _):
        done = subprocess.run(
            [sys.executable, "-c", "import sys, robot; print(robot.Client(sys.argv[1]).metadata["
             "'chunk']); assert not {'jax', 'jaxvp'} & set(sys.modules)", url],
            cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "6\n", done.stderr


def test_arrays_there_and_back():
    values = {"a": np.arange(6, dtype=">i2").reshape(2, 3), "b": np.float32(0.5), "c": True,
              "d": np.zeros((0, 3), bool), "e": [np.ones(2), "x"], "f": np.array(3)}
    found = unpack(pack(values))
    for name in "abdf":
        np.testing.assert_array_equal(found[name], values[name])
    assert found["a"].dtype == np.dtype(">i2") and not found["a"].flags.writeable
    assert found["c"] is True and found["e"][1] == "x"
    with pytest.raises(TypeError, match="cannot be sent"):
        pack({"x": np.array([None])})


def message(kind, payload, seq=1):
    return {"type": kind, "payload": payload, "seq": seq, "timestamp": 0.0}


def png(image):
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="PNG")
    return {"__image__": True, "format": "png", "data": buffer.getvalue(),
            "shape": list(image.shape)}


def as_vla_eval(**changes):
    state = OBSERVATION["state"]
    return {"images": {name: png(image) for name, image in OBSERVATION["images"].items()},
            "states": {"__ndarray__": True, "data": state.tobytes(), "dtype": "<f4", "shape": [8]},
            "task_description": "lift the tray", **changes}


def test_fuzzed_messages_break_nothing(caplog):
    tiny = OBSERVATION | {"images": {c: np.zeros((2, 2, 3), np.uint8) for c in CAMERAS}}
    rng = random.Random(0)
    with serving(Bundle()) as (url, _):
        with connect(url) as connection:
            connection.recv(10)
            for _ in range(300):
                connection.send(served.fuzzed(rng, pack(tiny)))
                connection.recv(10)
        good = msgpack.packb(message("observation", as_vla_eval()))
        with connect(f"{url}/vla-eval") as connection:
            for _ in range(300):
                connection.send(served.fuzzed(rng, good))
                connection.send(msgpack.packb(message("hello", {}, 7)))
                while msgpack.unpackb(connection.recv(10))["type"] != "hello":
                    pass
        with Client(url) as client:
            assert client.infer(OBSERVATION)["actions"].shape == (6, 8)
    assert not caplog.records, caplog.text  # A bug would have been logged.


def test_observations_that_come_while_the_policy_runs_are_one_batch():
    bundle = Bundle(seconds=0.3)
    with serving(bundle) as (url, _), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(url)) for _ in range(5)]
        states = [np.full(8, k / 10, np.float32) for k in range(5)]
        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            found = list(pool.map(lambda client, x: client.infer(OBSERVATION | {"state": x}),
                                  clients, states))
    assert len(bundle.calls) <= 3  # The first alone, or some of them, then the others.
    for state, answer in zip(states, found, strict=True):
        assert answer["actions"][0, 1] == pytest.approx(state[0], abs=1e-3)
    assert max(answer["server_timing"]["batch"] for answer in found) >= 3


def test_what_one_client_is_refused_does_not_touch_the_others():
    bundle = Bundle(seconds=0.2)
    with serving(bundle) as (url, _), Client(url) as good, Client(url) as bad:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            wrong = pool.submit(bad.infer, OBSERVATION | {"prompt": "y" * 100})
            right = pool.submit(good.infer, OBSERVATION)
            assert right.result()["actions"].shape == (6, 8)
            assert isinstance(wrong.exception(), RuntimeError)


def test_a_late_answer_is_not_taken_for_the_next():
    with serving(Bundle(seconds=1.0)) as (url, _), Client(url) as client:
        client._timeout = 0.2
        with pytest.raises(TimeoutError):
            client.infer(OBSERVATION)
        with pytest.raises(websockets.ConnectionClosed):
            client.infer(OBSERVATION)


def test_a_bug_is_logged_with_its_traceback_and_told_as_one(caplog):
    bundle = Bundle()
    bundle.error = ZeroDivisionError("of the policy")
    with serving(bundle) as (url, _), Client(url) as client:
        with pytest.raises(RuntimeError, match="bug of the server.*ZeroDivisionError"):
            client.infer(OBSERVATION)
        bundle.error = None
        assert client.infer(OBSERVATION)["actions"][0, 2] == 0  # A new episode.
    assert "ZeroDivisionError: of the policy" in caplog.text


def test_episodes_start_with_a_connection_a_prompt_or_a_reset():
    def calls(answer):
        return round(float(answer["actions"][0, 2]) / 0.015)

    with serving(Bundle()) as (url, _):
        with Client(url) as client:
            assert [calls(client.infer(OBSERVATION)) for _ in range(3)] == [0, 1, 2]
            assert calls(client.infer(OBSERVATION | {"prompt": "fold the towel"})) == 0
            assert calls(client.infer(OBSERVATION | {"prompt": "fold the towel"})) == 1
            client.reset()
            assert calls(client.infer(OBSERVATION | {"prompt": "fold the towel"})) == 0
        with Client(url) as client:
            assert calls(client.infer(OBSERVATION)) == 0


def test_history_of_a_client_that_sends_an_observation_a_chunk():
    # Frames 4 and 8 steps ago; 4 are executed of every chunk.
    bundle = Bundle(spec=toy_bundle.window(fps=2.5, past=3, past_actions=2), execution_horizon=4)
    with serving(bundle) as (url, _), Client(url) as client:
        chunks = [client.infer(OBSERVATION | {"state": np.full(8, k / 10, np.float32)})["actions"]
                  for k in range(3)]
    given = bundle.calls[-1]
    np.testing.assert_array_equal(given["frame_mask"], [[True] * 3])
    np.testing.assert_allclose(given["state"][0, :, 0], [0, 0.25, 0.5], atol=1e-6)
    expected = bundle.manifest.normalizer.normalize("action", chunks[1][2:4])
    np.testing.assert_allclose(given["action"][0], expected, atol=1e-5)


def test_history_that_such_a_client_cannot_give_is_refused():
    bundle = Bundle(spec=toy_bundle.window(fps=5.0, past=2))  # 2 steps ago, of chunks of 4.
    with serving(bundle) as (url, _), Client(url) as client:
        with pytest.raises(RuntimeError, match="what was 2 control steps ago.*/vla-eval"):
            client.infer(OBSERVATION)


def ask(connection, kind, payload, seq=1):
    connection.send(msgpack.packb(message(kind, payload, seq)))
    answer = msgpack.unpackb(connection.recv(10))
    assert answer["seq"] == seq
    return answer["type"], answer["payload"]


def test_vla_eval_gets_one_action_a_step_as_the_evaluator_would(toy):
    runner, found = PolicyRunner(toy), []
    seen = {"images": OBSERVATION["images"], "state": OBSERVATION["state"],
            "instruction": "lift the tray", "robot": toy.manifest.robot}
    with serving(toy) as (url, _), connect(f"{url}/vla-eval") as connection:
        kind, hello = ask(connection, "hello", {"harness_version": "0.8.0"})
        assert kind == "hello" and hello["protocol_version"] == 1
        connection.send(msgpack.packb(message("episode_start", {
            "task": {"name": "lift the tray", "episode_idx": 3}})))
        for seq in range(10):
            kind, payload = ask(connection, "observation", as_vla_eval(), seq + 2)
            assert kind == "action" and payload["actions"]["shape"] == [8]
            found.append(np.frombuffer(payload["actions"]["data"], np.float32))
    runner.reset(0, "lift_the_tray", 3)
    runner.observe(0, seen)
    expected = []
    while len(expected) < 10:
        for action in runner.act([0])[0]:
            expected.append(action)
            runner.observe(0, seen, action)
    np.testing.assert_allclose(found, expected[:10], atol=1e-6)


def test_vla_eval_errors_name_their_message_and_keep_the_connection():
    with serving(Bundle()) as (url, _), connect(f"{url}/vla-eval") as connection:
        kind, payload = ask(connection, "observation", {"task_description": "x"}, 5)
        assert kind == "error" and "no images.head" in payload["error"]
        for broken in (b"\x89PNG\r\n\x1a\n", b"", 3):
            images = {"head": {"__image__": True, "format": "png", "data": broken}}
            kind, payload = ask(connection, "observation", as_vla_eval(images=images), 0)
            assert kind == "error" and "an image" in payload["error"]
        large = png(np.zeros((8192, 4096), np.uint8))
        assert "too large" in ask(connection, "observation", {"x": large}, 0)[1]["error"]
        half = png(np.zeros((3000, 3000), np.uint8))  # Two of them are more than a message may.
        assert "too large" in ask(connection, "observation", {"x": half, "y": half}, 0)[1]["error"]
        assert ask(connection, "observation", as_vla_eval(), 6)[0] == "action"


def test_limits():
    limits = server.Limits(message=100_000, connections=1, idle=1.0)
    with serving(Bundle(), limits=limits) as (url, _):
        with Client(url) as client:
            with pytest.raises(websockets.ConnectionClosed, match="1013"):
                Client(url)
            with pytest.raises(websockets.ConnectionClosed, match="1009"):
                client.infer({"large": bytes(200_000)})
        with connect(url) as connection:
            connection.recv(10)
            with pytest.raises(websockets.ConnectionClosed, match="1001.*idle for 1 s"):
                connection.recv(10)


def test_the_end_answers_what_is_running_and_says_goodbye():
    with serving(Bundle(seconds=0.5)) as (url, stop), Client(url) as busy, connect(url) as idle:
        idle.recv(10)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(busy.infer, OBSERVATION)
            time.sleep(0.2)
            stop()
            assert answer.result()["actions"].shape == (6, 8)
        for connection in (idle, busy._connection):
            with pytest.raises(websockets.ConnectionClosed, match="1001.*the server stops"):
                connection.recv(10)


def test_command(tmp_path):
    folder = toy_bundle.write(tmp_path / "bundle")
    command = [sys.executable, "-W", "error", "-m", "jaxvp.serve", f"--bundle={folder}"]
    done = subprocess.run([*command, "--client=libero"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "does not fit --client=libero: robot" in done.stderr
    with subprocess.Popen([*command, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        url = process.stdout.readline().split()[-1]
        with Client(url) as client:
            assert client.infer(OBSERVATION)["actions"].shape == (6, 8)
            taken = subprocess.run([*command, f"--port={url.rpartition(':')[2]}"],
                                   capture_output=True, text=True)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        assert process.stderr.read() == "" and "stopped" in process.stdout.read()
    assert taken.returncode == 1 and "address already in use" in taken.stderr
    assert taken.stderr.count("\n") == 1


def test_metadata_has_the_protocol_of_a_remote_benchmark():
    row = protocols.CLIENTS["robocasa"]
    manifest = dataclasses.replace(
        Bundle().manifest, robot=row.robot, fps=20.0, state=None, layout="single_wrist",
        cameras=("robot0_agentview_left", "robot0_eye_in_hand"),
        action=stats(row.action), spec=dataclasses.replace(
            toy_bundle.SPEC, cameras=("agentview", "wrist"), action_size=7, state_size=0))
    protocols.check_fit("robocasa", row, manifest)
    bundle = Bundle()
    bundle.manifest = manifest
    with serving(bundle, "robocasa") as (url, _), Client(url) as client:
        assert client.metadata["protocol"]["task_max_steps"]["OpenDoubleDoor"] == 1000


def stats(dimensions):
    names, _, units = zip(*(name.removesuffix("]").partition(" [") for name in dimensions),
                          strict=True)
    low, high = [-1.0] * len(names), [1.0] * len(names)
    return policy_bundle.Stats(names, units, 1, low, high, low, high, low, high)
