"""Several processes as one: a start that names who is missing, and a stop that saves first."""

import contextlib
import errno
import importlib.util
import os
import signal
import socket
import threading
import time

import jax
import numpy as np
import rich
from jax._src import distributed as jax_distributed

from jaxvp import coordinator
from jaxvp.errors import UserError
from jaxvp.lifeline import Lifeline

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

_stopped = False


@contextlib.contextmanager
def processes(silence: float = 60, **where):
    """Joins the processes of a run for as long as the block lasts; to be entered before anything
    else of JAX. When one of them fails or dies, all end, with one line that says which and why.

    Args:
      silence: seconds without a sign of life after which a process counts as dead; the death of a
        process whose machine still runs is noticed at once.
      where: see `join`.
    """
    lifeline = join(silence=silence, **where)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if lifeline is None:
            raise
        lifeline.fail(error)
    if lifeline is not None:
        lifeline.done()


def join(address: str | None = None, num_processes: int | None = None,
         process_id: int | None = None, timeout: float = 300,
         silence: float = 60) -> Lifeline | None:
    """Joins the processes of a run; `processes` does it for the commands.

    Where they come from: the arguments, else the environment variables VARIABLES, else Slurm,
    Kubernetes or the TPU's metadata. A single process needs none of them.

    Args:
      address: "host:port" of process 0.
      num_processes, process_id: how many there are, and which this is.
      timeout: seconds to wait for the others.
      silence: see `processes`.

    Returns:
      The connection to the others; None of a single process.

    Raises:
      UserError: some of the three are given, but not all; or a process did not come: the message
        names it.
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
    if num_processes == 1:
        return None
    lifeline = _roll_call(address, num_processes, process_id, timeout, silence)
    # JAX would catch SIGTERM from here on; see `preempted`.
    jax.config.update("jax_enable_preemption_service", False)
    with coordinator.outside():
        jax.distributed.initialize(
            address, num_processes, process_id, local, initialization_timeout=int(timeout),
            heartbeat_timeout_seconds=int(2 * silence) + 10)  # The lifeline is to be first.
    return lifeline


def preempted(step: int) -> bool:
    """Whether the machine asked to stop (SIGTERM): save, and leave the loop.

    Every process must ask after every step; all get the same answer. Until the first time there is
    nothing to save, and SIGTERM ends the process at once.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils
        if jax_distributed.global_state.preemption_sync_manager is None:
            jax.config.update("jax_enable_preemption_service", True)
            jax_distributed.global_state.initialize_preemption_sync_manager()
        return multihost_utils.reached_preemption_sync_point(step)
    if signal.getsignal(signal.SIGTERM) != _stop and not _stopped \
            and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
    return _stopped


def together(what: str):
    """Returns when all processes are at this place, however long that takes; `what` names it, and
    is used once."""
    if jax.process_count() > 1:
        day = 24 * 60 * 60 * 1000
        jax_distributed.global_state.client.wait_at_barrier(what, timeout_in_ms=day)


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


def _roll_call(address: str, count: int, process_id: int, timeout: float,
               silence: float = 60) -> Lifeline:
    """Returns the connection to the others when all processes are there.

    JAX's own start ends the process with a stack trace when one is missing, and names none. So
    process 0 first counts the others on the port that JAX takes over afterwards.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 <= process_id < count:
        raise UserError(f"Process {process_id} of {count} at {address!r}: expected an id from 0 "
                        "to the number of processes - 1, and host:port.")
    deadline = time.monotonic() + timeout
    if process_id == 0:
        lifeline = Lifeline(0, count, silence)
        print(f"Waiting for {count} processes at {address}.", flush=True)
        answer = _count(int(port), count, deadline, lifeline.invitation)
    else:
        answer = _report(host, int(port), process_id, count, deadline)
    word, _, invitation = answer.partition(" ")
    if word != "go":
        raise UserError(f"Process {process_id} of {count} waited {timeout:g} s at {address}: "
                        f"{answer}. All processes need the same address and number.")
    if process_id == 0:
        return lifeline
    try:
        return Lifeline(process_id, count, silence, host, invitation)
    except OSError as error:
        raise UserError(f"Process {process_id} reaches process 0 at {address}, but not at port "
                        f"{invitation.split()[0]} of {host}, where the processes watch each other "
                        f"({error.strerror or error}): open the ports between the machines."
                        ) from error


def _count(port: int, count: int, deadline: float, invitation: str) -> str:
    """Process 0: waits for the others' names, and tells all of them the outcome."""
    clients, present, strangers = [], set(), set()
    with contextlib.ExitStack() as stack, _listen(port, count, deadline) as server:
        while len(present) < count - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            # What is not one of us, or breaks off, is nobody.
            with contextlib.suppress(OSError, ValueError):
                client = stack.enter_context(server.accept()[0])
                client.settimeout(5)
                number, expected = map(int, client.recv(64).split())
                clients.append(client)
                valid = expected == count and 0 < number < count and number not in present
                (present if valid else strangers).add(number)
        missing = [str(number) for number in range(1, count) if number not in present]
        answer = f"process {', '.join(missing)} did not start" if missing else f"go {invitation}"
        if strangers:
            answer = f"{answer if missing else 'all came'}; process " \
                f"{', '.join(map(str, strangers))} came twice or expected another number than " \
                f"{count}"
        for client in clients:
            with contextlib.suppress(OSError):
                client.sendall(answer.encode())
                client.shutdown(socket.SHUT_WR)
                client.recv(1)  # It closes first: the port is free for JAX at once.
    return answer


def _listen(port: int, count: int, deadline: float) -> socket.socket:
    """A server at the port, which the run before this one may need some seconds to leave."""
    both = socket.has_dualstack_ipv6()
    last = min(deadline, time.monotonic() + 2 * coordinator.GRACE_SECONDS)
    while True:
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6 if both else socket.AF_INET, backlog=count,
                dualstack_ipv6=both)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > last:
                raise UserError(f"Process 0 cannot listen at port {port}: {error.strerror}. Choose "
                                "another for all processes.") from error
        time.sleep(0.2)


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
