"""How the processes of a run notice that one of them is gone: within moments, in one line.

Left to itself, JAX notices after 100 seconds, or never where a TPU waits for the missing one, and
ends with stack traces that name nobody. Here every process keeps a connection to process 0, which
the operating system closes when a process dies, and on which each says every now and then that it
is alive. Process 0 tells the others who is gone and why; then all end.
"""

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback

from jaxvp import errors

# How long an error may be the consequence of another process's end, whose news is on its way.
NEWS_SECONDS = 5


class Lifeline:
    """The connections of one process; a thread watches them.

    Process 0 makes it first, and the others with the `invitation` that they were given.
    """

    def __init__(self, process_id: int, count: int, silence: float,
                 host: str = "", invitation: str = ""):
        """Connects, and starts to watch.

        Args:
          process_id, count: which process of how many this is.
          silence: seconds without a sign of life after which a process counts as gone.
          host, invitation: process 0's, for the others.

        Raises:
          OSError: process 0 cannot be reached.
        """
        self._id, self._silence = process_id, silence
        self._lock, self._done = threading.Lock(), set()
        self._lines: dict[int, socket.socket] = {}
        self._expected = {0} if process_id else set(range(1, count))
        if process_id:
            port, self._token = invitation.split()
            connection = socket.create_connection((host, int(port)), silence)
            connection.sendall(f"{process_id} {self._token}\n".encode())
            self._lines[0], self._server = connection, None
        else:
            both = socket.has_dualstack_ipv6()
            self._server = socket.create_server(
                ("", 0), family=socket.AF_INET6 if both else socket.AF_INET, backlog=count,
                dualstack_ipv6=both)
            self._token = secrets.token_hex(16)
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def invitation(self) -> str:
        """What the others need to connect to process 0: a port and a password."""
        return f"{self._server.getsockname()[1]} {self._token}"

    def done(self):
        """Tells the others that this process ends because its work is done."""
        self._tell("done")

    def fail(self, error: BaseException):
        """Ends this process over an error, and the others with it; does not return.

        JAX's own way out would wait for the others, which wait for this process.
        """
        if not isinstance(error, errors.UserError | KeyboardInterrupt):
            time.sleep(NEWS_SECONDS)  # The watch ends this process when another was first.
        line = errors.one_line(error)
        if line is None:
            traceback.print_exception(error)
            line = f"{type(error).__name__}: {error}"
        else:
            print(line, file=sys.stderr)
        self._tell("failed " + " ".join(line.removeprefix("error: ").split()))
        _exit(1)

    def _tell(self, message: str, but: int | None = None):
        with self._lock:
            for number, line in list(self._lines.items()):
                if number != but:
                    with contextlib.suppress(OSError):  # Its end is noticed where it is read.
                        line.sendall(f"{message}\n".encode())

    def _watch(self):
        selector, heard = selectors.DefaultSelector(), {}
        received: dict[int, bytes] = {}
        start = beat = time.monotonic()

        def watch(number, line):
            line.settimeout(self._silence)
            heard[number], received[number] = time.monotonic(), b""
            selector.register(line, selectors.EVENT_READ, number)

        for number, line in self._lines.items():
            watch(number, line)
        if self._server:
            selector.register(self._server, selectors.EVENT_READ, None)
        while True:
            ready = selector.select(self._silence / 10)
            for key, _ in ready:
                if key.data is None:
                    if (met := self._meet()) is not None:
                        watch(*met)
                    continue
                number = key.data
                try:
                    data = key.fileobj.recv(4096)
                except OSError:
                    data = b""
                heard[number] = time.monotonic()
                *messages, received[number] = (received[number] + data).split(b"\n")
                for message in messages:
                    self._hear(number, message.decode(errors="replace"))
                if not data:
                    selector.unregister(key.fileobj)
                    del heard[number]
                    if number not in self._done:
                        self._gone(number, "it was killed, or its machine failed")
            now = time.monotonic()
            if now - beat > self._silence / 5:
                beat = now
                self._tell("alive")
            for number in self._expected:
                last = heard.get(number, start if number not in self._lines else None)
                if last is not None and number not in self._done and now - last > self._silence:
                    self._gone(number, f"no sign of life for {self._silence:g} s")

    def _meet(self) -> tuple[int, socket.socket] | None:
        """Accepts a connection to process 0; a stranger's is closed."""
        with contextlib.suppress(OSError, ValueError):
            line = self._server.accept()[0]
            try:
                line.settimeout(5)
                number, token = line.recv(100).decode().split()
                if token == self._token and int(number) in self._expected - self._lines.keys():
                    with self._lock:
                        self._lines[int(number)] = line
                    return int(number), line
            finally:
                if line not in self._lines.values():
                    line.close()
        return None

    def _hear(self, number: int, message: str):
        kind, _, rest = message.partition(" ")
        if kind == "done":
            self._done.add(number)
        elif kind == "failed":
            self._gone(number, rest)
        elif kind == "gone":  # Process 0 says which.
            which, _, why = rest.partition(" ")
            self._gone(int(which), why)

    def _gone(self, number: int, why: str):
        if not self._id:
            self._tell(f"gone {number} {why}", but=number)
        print(f"error: Process {number} is gone, so process {self._id} ends: {why}",
              file=sys.stderr)
        _exit(1)


def _exit(code: int):
    """Ends the process at once: what JAX would do at the end waits for the others."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
