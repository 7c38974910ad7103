"""JAX's coordination service in a process of its own: `python -m jaxvp.coordinator`.

Inside of process 0, where JAX starts it, the service would end with process 0, and JAX would abort
every other process with a stack trace before that process can say what happened. Here it outlives
process 0, whose end closes its standard input, by a few seconds.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

GRACE_SECONDS = 5


class Service:
    """Stands for JAX's own object in process 0."""

    def __init__(self, address: str, count: int, **settings):
        """Starts the service; arguments as of JAX's, of values that are JSON."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jaxvp.coordinator"], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True,
            # What it would log about a process that is gone is said by that process's peers.
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"})
        self._process.stdin.write(json.dumps([address, count, settings]) + "\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise RuntimeError(f"JAX's coordination service does not start at {address}.")

    def shutdown(self):
        self._process.communicate("shut down\n")


@contextlib.contextmanager
def outside():
    """While `jax.distributed.initialize` runs: the service that it starts is a `Service`."""
    from jax._src.lib import _jax
    original = _jax.get_distributed_runtime_service
    _jax.get_distributed_runtime_service = Service
    try:
        yield
    finally:
        _jax.get_distributed_runtime_service = original


def main():
    from jax._src.lib import _jax
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Sent to all by launchers; it ends last.
    address, count, settings = json.loads(sys.stdin.readline())
    service = _jax.get_distributed_runtime_service(address, count, **settings)
    print("ready", flush=True)
    if sys.stdin.readline():
        service.shutdown()
    else:  # Process 0 is gone; the others are told by their lifelines.
        time.sleep(GRACE_SECONDS)
        os._exit(1)


if __name__ == "__main__":
    main()
