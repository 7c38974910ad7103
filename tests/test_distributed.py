import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxvp import distributed, lifeline
from jaxvp.errors import UserError

# What a training step needs of several processes: a global batch, a sum over it, one answer on
# whether to stop, and one voice.
TRAIN = """
import sys
from jaxvp import distributed
with distributed.processes(address=sys.argv[1], num_processes=2, process_id=int(sys.argv[2])):
    import jax, numpy as np
    from jaxvp import sharding
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2))
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        rows = np.full((2, 3), 1.0 + jax.process_index(), np.float32)
        batch = sharding.global_batch(mesh, rows)
        number = sharding.replicated(mesh, np.int32(7))
        total = jax.jit(lambda x, n: x.sum() + n)(batch, number)
        distributed.note(f"{jax.process_count()} {jax.device_count()} {batch.shape} {float(total)}")
        print("stop" if distributed.preempted(1) else "on")
        print("sum", distributed.total(3 + jax.process_index()))
    distributed.together("the end")
"""


@pytest.fixture
def address():
    with socket.create_server(("", 0)) as server:
        return f"localhost:{server.getsockname()[1]}"


def test_two_processes_train_as_one(address):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": os.getcwd()}
    processes = [
        subprocess.Popen([sys.executable, "-c", TRAIN, address, str(i)], env=environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for i in (0, 1)]
    first, second = (process.communicate(timeout=120)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    assert "2 4 (4, 3) 25.0" in first and "25.0" not in second
    assert "on" in first.split() and "on" in second.split()
    assert "sum 7" in first and "sum 7" in second


def roll_call(address, *processes, count=3, timeout=1):
    """What each of the processes that did come is told; None: go."""
    def call(process_id):
        try:
            distributed._roll_call(address, count, process_id, timeout)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(call, processes))


@pytest.fixture
def made(monkeypatch):
    """`Lifeline`, but that nobody is missed after the test: its thread would end this process."""
    lifelines = []

    def make(*arguments, **keywords):
        lifelines.append(lifeline.Lifeline(*arguments, **keywords))
        return lifelines[-1]

    monkeypatch.setattr(distributed, "Lifeline", make)
    yield make
    for each in lifelines:
        each._expected = set()
        each._done.update(range(8))


@pytest.fixture
def lines(monkeypatch, made):
    """What lifelines have told their process; here they do not end it."""
    told = []
    monkeypatch.setattr(lifeline.Lifeline, "_gone", lambda self, number, why: told.append(
        (self._id, number, why)))
    return told


def test_when_all_are_there_all_go(address, made):
    assert roll_call(address, 2, 1, 0) == [None, None, None]
    assert roll_call(address, 1, 0, 2) == [None, None, None]  # The port is free at once.


@pytest.mark.parametrize("processes, missing", [
    ((0, 1), "process 2 did not start"),
    ((0,), "process 1, 2 did not start"),
    ((1,), "process 0 did not answer"),
    ((0, 1, 1), "process 2 did not start; process 1 came twice"),
])
def test_who_is_missing_is_named(address, made, processes, missing):
    for number, told in zip(processes, roll_call(address, *processes), strict=True):
        assert told.startswith(f"Process {number} of 3 waited 1 s at {address}: {missing}")


def test_strangers_do_not_disturb_the_roll_call(address, made):
    """Bytes of somebody else, a connection that is reset, and one that says nothing."""
    with ThreadPoolExecutor() as pool:
        first = pool.submit(roll_call, address, 0, count=2, timeout=20)
        host, port = address.split(":")
        for attempt in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe", b"", None):
            stranger = connect(host, int(port))
            if attempt is None:
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                stranger.sendall(attempt)
            stranger.close()
        assert roll_call(address, 1, count=2, timeout=20) == [None] and first.result() == [None]


def connect(host, port):
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((host, port))
        time.sleep(0.01)


def test_a_firewall_between_the_processes_is_one_line(address, monkeypatch):
    with socket.create_server(("", 0)) as server:
        closed = server.getsockname()[1]
    monkeypatch.setattr(distributed, "_report", lambda *_: f"go {closed} token")
    with pytest.raises(UserError, match=f"but not at port {closed} of localhost, where"):
        distributed._roll_call(address, 2, 1, timeout=1)


def test_a_port_in_use_is_one_line(monkeypatch, made):
    monkeypatch.setattr(distributed.coordinator, "GRACE_SECONDS", 0.1)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"Process 0 cannot listen at port {port}: Address"):
            distributed._roll_call(f"localhost:{port}", 2, 0, timeout=1)


def wait_until(test):
    end = time.monotonic() + 20
    while not test():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_lifelines_tell_who_is_gone_and_why(lines, made):
    zero = made(0, 4, silence=60)
    one, two, three = (made(i, 4, 60, "localhost", zero.invitation) for i in (1, 2, 3))
    wait_until(lambda: len(zero._lines) == 3)
    two.done()
    wait_until(lambda: 2 in zero._done)
    two._lines[0].close()  # It may: its work is done.
    three._tell("failed disk full")
    wait_until(lambda: len(lines) == 1)
    assert lines == [(0, 3, "disk full")]
    one._lines[0].shutdown(socket.SHUT_RDWR)  # As when it is killed.
    wait_until(lambda: (0, 1, "it was killed, or its machine failed") in lines)


def test_process_0_passes_the_news_on(monkeypatch, made):
    told, ends = [], []
    monkeypatch.setattr(lifeline, "_exit", ends.append)
    monkeypatch.setattr("builtins.print", lambda text, **_: told.append(text))
    zero = made(0, 3, silence=60)
    one, two = (made(i, 3, 60, "localhost", zero.invitation) for i in (1, 2))
    wait_until(lambda: len(zero._lines) == 2)
    two.fail(UserError("no such file"))
    wait_until(lambda: len(ends) >= 3)
    assert {"error: no such file", "error: Process 2 is gone, so process 0 ends: no such file",
            "error: Process 2 is gone, so process 1 ends: no such file"} <= set(told)
    assert one._id == 1


def test_silence_counts_as_gone(lines, made):
    """Of a process that hangs with its machine: one that connects and says nothing more."""
    zero = made(0, 3, silence=1)
    port, token = zero.invitation.split()
    with socket.create_connection(("localhost", int(port))) as silent:
        silent.sendall(f"1 {token}\n".encode())
        made(2, 3, 1, "localhost", zero.invitation)
        wait_until(lambda: lines)
    assert lines[0] == (0, 1, "no sign of life for 1 s")
    assert all(number == 1 for _, number, _ in lines[:1])


def test_strangers_have_no_lifeline(lines, made):
    zero = made(0, 2, silence=60)
    port = int(zero.invitation.split()[0])
    for text in (b"1 wrong\n", b"hello\n", b"\xff\n"):
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(text)
            assert not stranger.recv(1)  # It is closed.
    made(1, 2, 60, "localhost", zero.invitation)
    wait_until(lambda: 1 in zero._lines)
    assert not lines


@pytest.fixture
def alone(monkeypatch):
    """A single process, whose reaction to SIGTERM is restored afterwards."""
    for name in (*distributed.VARIABLES, "SLURM_NTASKS", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed, "_stopped", False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_single_process_needs_nothing_and_stops_on_sigterm(alone):
    before = signal.getsignal(signal.SIGTERM)
    assert distributed.join() is None
    assert signal.getsignal(signal.SIGTERM) == before  # There is nothing to save yet.
    assert not distributed.preempted(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert distributed.preempted(2)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # A second one ends the process.


def test_half_of_the_variables(alone, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is missing"):
        distributed.join()


@pytest.mark.parametrize("address, process_id", [("host", 0), ("host:x", 0), ("host:1", 2)])
def test_an_address_that_cannot_be_one(alone, address, process_id):
    with pytest.raises(ValueError, match=f"Process {process_id} of 2 at '{address}': expected"):
        distributed.join(address, 2, process_id)


def test_slurm_is_found(alone, monkeypatch):
    for name, value in {"NTASKS": "4", "JOB_ID": "7", "STEP_NODELIST": "node[03-06]",
                        "PROCID": "2", "LOCALID": "0", "STEP_NUM_NODES": "4"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    address, count, process_id, _ = distributed._detect(1)
    assert address.startswith("node03:") and (count, process_id) == (4, 2)


def test_notes_come_from_process_0(monkeypatch, capsys):
    distributed.note("one", "[two]", style="bold")
    monkeypatch.setattr(distributed.jax, "process_index", lambda: 1)
    distributed.note("three")
    assert capsys.readouterr().out == "one\n[two]\n"
