"""Refusals, and how a command ends over one."""

import contextlib
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable

# What libraries in C++ raise in its place: TensorStore (of Orbax) a ValueError, ArrayRecord a
# RuntimeError. They say it in the text.
TENSORSTORE_CODE = re.compile(r"\[os_error_code='(\d+)'\]")
TENSORSTORE_FILE = re.compile(r'"(/[^"]*)": ')
ARRAY_RECORD = re.compile(r"^\w+\(\) failed: ([^;]+); (?:opening|reading|writing) ([^;]+)")
NUMBERS = {os.strerror(number): number for number in errno.errorcode}


class UserError(ValueError):
    """jaxvp refuses what it was given: one line that names the file or key, what was expected and
    what was found. Every other exception is a bug, or the machine's, and keeps its traceback."""


def did_you_mean(name: str, known: Iterable[str], form: Callable[[str], str] = repr) -> str:
    """" Did you mean 'NAME'?", the nearest of `known`, to end a message with; "" if none is near.
    `form` says how a name is written."""
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f" Did you mean {form(near[0])}?" if near else ""


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
    if refusal := os_error(error):
        return f"error: {describe(refusal)}"
    if isinstance(error, KeyboardInterrupt):
        return f"stopped{stopped and ': '}{stopped}"
    return None


def os_error(error: BaseException | None) -> OSError | None:
    """What the operating system refused: `error` itself, what it was raised from, or what its text
    says where it is TensorStore's or ArrayRecord's; None for every other exception."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        if found := TENSORSTORE_CODE.search(str(error)):
            number, files = int(found[1]), TENSORSTORE_FILE.findall(str(error))
            return OSError(number, os.strerror(number), *files[-1:])
        if (found := ARRAY_RECORD.match(str(error))) and found[1] in NUMBERS:
            return OSError(NUMBERS[found[1]], *found.groups())
        error = error.__cause__
    return None


@contextlib.contextmanager
def naming(path):
    """Around the writing of the file `path`: an OSError that names none names this one. Python
    does not say which file it could not write to, when the disk is full."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def describe(error: OSError) -> str:
    """What the operating system said, and of which file: "a/b: No space left on device"."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([*(names and [" -> ".join(names)]), error.strerror or str(error)])
