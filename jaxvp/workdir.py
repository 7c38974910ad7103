"""A workdir belongs to one run at a time."""

import contextlib
import fcntl
import os
import socket
import time

from etils import epath

from jaxvp.errors import UserError


@contextlib.contextmanager
def locked(workdir: epath.PathLike):
    """Keeps other runs out of `workdir`, which is made when it does not exist, for as long as the
    block lasts. The operating system gives the lock back when this process dies.

    Object stores (gs://, s3://) have no locks: there, nothing is kept out.

    Raises:
      UserError: a run is in there; says on which machine and since when.
    """
    if "://" in os.fspath(workdir):
        yield
        return
    epath.Path(workdir).mkdir(parents=True, exist_ok=True)
    with open(os.path.join(workdir, "lock"), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{workdir} is used by a run that goes on, {file.read().strip()}: stop "
                            "it, or use another --workdir.") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since "
                   f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield
