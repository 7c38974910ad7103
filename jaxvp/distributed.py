"""Several processes as one: a start that names who is missing, and a stop that saves first."""

import contextlib
import importlib.util
import os
import signal
import socket
import time

import jax
import numpy as np
import rich

from jaxvp.errors import UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

_stopped = False


def initialize(address: str | None = None, num_processes: int | None = None,
               process_id: int | None = None, timeout: float = 300):
    """Joins the processes of a run; to be called before anything else of JAX. Catches SIGTERM.

    Where they come from: the arguments, else the environment variables VARIABLES, else Slurm,
    Kubernetes or the TPU's metadata. A single process needs none of them.

    Args:
      address: "host:port" of process 0.
      num_processes, process_id: how many there are, and which this is.
      timeout: seconds to wait for the others.

    Raises:
      UserError: some of the three are given, but not all.
      TimeoutError: a process did not come; the message names it.
    """
    given = [given if given is not None else os.environ.get(name) for name, given in
             zip(VARIABLES, (address, num_processes, process_id), strict=True)]
    if any(value is not None for value in given):
        missing = [name for name, value in zip(VARIABLES, given, strict=True) if value is None]
        if missing:
            raise UserError(f"{', '.join(missing)} is missing: several processes need all of "
                            f"{', '.join(VARIABLES)}, a single one none.")
        address, num_processes, process_id, local = given[0], int(given[1]), int(given[2]), None
    else:
        address, num_processes, process_id, local = _detect(timeout)
    if num_processes > 1:
        _roll_call(address, num_processes, process_id, timeout)
        # JAX catches SIGTERM itself, to agree with the other processes on a step.
        jax.distributed.initialize(address, num_processes, process_id, local,
                                   initialization_timeout=int(timeout))
    else:
        signal.signal(signal.SIGTERM, _stop)


def preempted(step: int) -> bool:
    """Whether the machine asked to stop (SIGTERM): save, and leave the loop.

    Every process must ask at every step; all get the same answer.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils
        return multihost_utils.reached_preemption_sync_point(step)
    return _stopped


def total(number: int) -> int:
    """The sum of a number on the host over all processes; every process must ask at the same
    step."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils
    with jax.transfer_guard("allow"):
        return int(multihost_utils.process_allgather(np.int32(number)).sum())


def note(*lines: str, style: str | None = None):
    """Prints to the console, once for all processes; `style` as rich knows it."""
    if jax.process_index() == 0:
        for line in lines:
            rich.get_console().print(line, style=style, markup=False, highlight=False,
                                     soft_wrap=True)


def _stop(number, frame):
    global _stopped
    _stopped = True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # A second one ends the process at once.


def _detect(timeout: float) -> tuple[str | None, int, int, list[int] | None]:
    """(address, processes, id, local devices) as JAX finds them; one process if it finds none."""
    managed = (int(os.environ.get("SLURM_NTASKS", 1)) > 1 or "JOB_COMPLETION_INDEX" in os.environ
               or importlib.util.find_spec("libtpu"))
    if not managed:
        return None, 1, 0, None
    # Not public, but the only way to know who is expected before JAX ends the process over it.
    from jax._src.clusters import ClusterEnv
    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout)
    return (None, 1, 0, None) if found[0] is None else found


def _roll_call(address: str, count: int, process_id: int, timeout: float):
    """Returns when all processes are there.

    JAX's own start ends the process with a stack trace when one is missing, and names none. So
    process 0 first counts the others on the port that JAX takes over afterwards.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 <= process_id < count:
        raise UserError(f"Process {process_id} of {count} at {address!r}: expected an id from 0 "
                        "to the number of processes - 1, and host:port.")
    deadline = time.monotonic() + timeout
    if process_id == 0:
        print(f"Waiting for {count} processes at {address}.", flush=True)
        answer = _count(int(port), count, deadline)
    else:
        answer = _report(host, int(port), process_id, count, deadline)
    if answer != "go":
        raise UserError(f"Process {process_id} of {count} waited {timeout:g} s at {address}: "
                           f"{answer}. All processes need the same address and number.")


def _count(port: int, count: int, deadline: float) -> str:
    """Process 0: waits for the others' names, and tells all of them the outcome."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    server = socket.create_server(("", port), family=family, backlog=count,
                                  dualstack_ipv6=socket.has_dualstack_ipv6())
    clients, present, strangers = [], set(), set()
    with contextlib.ExitStack() as stack, server:
        while len(present) < count - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(TimeoutError, ValueError):  # ValueError: not one of us.
                client = stack.enter_context(server.accept()[0])
                client.settimeout(5)
                number, expected = map(int, client.recv(64).split())
                clients.append(client)
                valid = expected == count and 0 < number < count and number not in present
                (present if valid else strangers).add(number)
        missing = [str(number) for number in range(1, count) if number not in present]
        answer = f"process {', '.join(missing)} did not start" if missing else "go"
        if strangers:
            answer += f"; process {', '.join(map(str, strangers))} came twice or expected another "
            answer += f"number than {count}"
        for client in clients:
            with contextlib.suppress(OSError):
                client.sendall(answer.encode())
                client.shutdown(socket.SHUT_WR)
                client.recv(1)  # It closes first: the port is free for JAX at once.
    return answer


def _report(host: str, port: int, process_id: int, count: int, deadline: float) -> str:
    """The others: tell process 0 the name, and wait for its word."""
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((host, port), left) as server:
            server.sendall(f"{process_id} {count}".encode())
            server.settimeout(left + 5)
            if answer := server.makefile().read():
                return answer
        time.sleep(0.2)
    return "process 0 did not answer"
