import multiprocessing
import os
import signal

import pytest

from jaxvp.errors import UserError
from jaxvp.workdir import locked


def hold(workdir, ready):
    with locked(workdir):
        ready.set()
        signal.pause()


def test_one_run_at_a_time_and_a_killed_one_keeps_nobody_out(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", ready))
    other.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match=f"used by a run that goes on, process {other.pid} on"):
        with locked(tmp_path / "run"):
            pass
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with locked(tmp_path / "run"):
        assert f"process {os.getpid()} " in (tmp_path / "run" / "lock").read_text()
    with locked(tmp_path / "run"):
        pass
