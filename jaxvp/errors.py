"""Refusals, and how a command ends over one."""

import contextlib
import sys


class UserError(ValueError):
    """jaxvp refuses what it was given: one line that names the file or key, what was expected and
    what was found. Every other exception is a bug, or the machine's, and keeps its traceback."""


@contextlib.contextmanager
def one_line_errors(stopped: str = ""):
    """Around everything that a command does: ends it with the `one_line` of an error."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if (line := one_line(error, stopped)) is None:
            raise
        sys.exit(line)


def one_line(error: BaseException, stopped: str = "") -> str | None:
    """The line that a command ends with: for a `UserError`, for what the operating system refuses
    (a full disk, a read-only folder, a port in use) wherever it is raised, and when the user
    interrupts the command; None for all else, which keeps its traceback.

    Args:
      error: what was raised.
      stopped: what to say when the user interrupts.
    """
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"error: {describe(error)}"
    if isinstance(error, KeyboardInterrupt):
        return f"stopped{stopped and ': '}{stopped}"
    return None


def describe(error: OSError) -> str:
    """What the operating system said, and of which file: "a/b: No space left on device"."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([*(names and [" -> ".join(names)]), error.strerror or str(error)])
