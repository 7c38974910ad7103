"""Refusals, and how a command ends over one."""

import contextlib
import sys


class UserError(ValueError):
    """jaxvp refuses what it was given: one line that names the file or key, what was expected and
    what was found. Every other exception is a bug, or the machine's, and keeps its traceback."""


@contextlib.contextmanager
def one_line_errors(stopped: str = ""):
    """Around everything that a command does: ends it with one line for a `UserError`, and for what
    the operating system refuses (a full disk, a read-only folder, a port in use), wherever raised.

    Args:
      stopped: what to say when the user interrupts the command.
    """
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno is None:
            raise
        sys.exit(f"error: {describe(error)}")
    except KeyboardInterrupt:
        sys.exit(f"stopped{stopped and ': '}{stopped}")


def describe(error: OSError) -> str:
    """What the operating system said, and of which file: "a/b: No space left on device"."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([*(names and [" -> ".join(names)]), error.strerror or str(error)])
