"""Simulators in processes of their own: same results, and what becomes of those that fail."""

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from counting_suite import PROTOCOL, Chunks, Stateful, Suite

from jaxvp.errors import UserError
from jaxvp.evaluation import baselines, suites
from jaxvp.evaluation.rollout import TRIES, rollouts
from jaxvp.evaluation.workers import SimulatorError, Workers

TESTS = Path(__file__).parents[1]


def run(policy, count=1, num_envs=2, num_videos=0, suite=None, step=60.0, episode=60.0, **changes):
    """The episodes, and the error that ended it."""
    protocol = dataclasses.replace(PROTOCOL, **changes)
    episodes, error = [], None
    with Workers(suite or Suite, protocol, count, step, episode) as workers:
        try:
            episodes += rollouts(None, protocol, policy, num_envs, num_videos, workers=workers)
        except Exception as raised:
            error = raised
        pids = workers.processes
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    return sorted(episodes, key=lambda e: (e.task, e.trial)), error


def faulty(folder, name, where=(("a", 1),), once=False):
    return functools.partial(Suite, folder, dict.fromkeys(where, name), once)


@functools.cache
def alone():
    return list(rollouts(Suite(), PROTOCOL, Stateful(), num_videos=1))


@pytest.mark.parametrize("count, num_envs", [(1, 1), (1, 3), (2, 2), (2, 5), (3, 3), (3, 6)])
def test_episodes_do_not_depend_on_workers(count, num_envs):
    episodes, error = run(Stateful(), count, num_envs, num_videos=1)
    assert error is None and episodes == alone()
    assert len({episode.steps for episode in episodes}) > 2
    for ours, other in zip(episodes, alone(), strict=True):
        assert ours.calls == other.calls and len(ours.frames) == len(other.frames)
        for name in ("actions", "states", "frames"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(other, name))


@pytest.mark.parametrize("fault", ["killed", "segfault"])
def test_the_episode_of_a_crashed_worker_is_run_again(tmp_path, fault):
    episodes, error = run(Stateful(), suite=faulty(tmp_path, fault, once=True))
    assert error is None and episodes == alone()
    restarts = {(e.task, e.trial): e.restarts for e in episodes}
    assert restarts.pop(("a", 1)) == 1
    assert sum(restarts.values()) <= 1  # Of the other environment of the same worker.


def test_an_episode_that_always_crashes(tmp_path):
    episodes, error = run(Chunks(1), suite=faulty(tmp_path, "killed"), num_envs=1)
    assert isinstance(error, SimulatorError)
    assert str(error).startswith(f"a, trial 1: the simulator's process was ended by SIGKILL, in "
                                 f"each of {TRIES} tries")
    assert str(error).endswith("about to die")
    assert [(e.task, e.trial) for e in episodes] == [("a", 0)]  # Finished ones are kept.


def test_neighbours_of_a_crash_are_not_guilty(tmp_path):
    """Every environment of the worker starts again each time; only one is the reason."""
    where = [(task, trial) for task in "ab" for trial in range(3)]
    episodes, error = run(Chunks(1), num_envs=6, suite=faulty(tmp_path, "killed", where, True))
    assert error is None and len(episodes) == 6
    assert max(episode.restarts for episode in episodes) >= TRIES


@pytest.mark.parametrize("fault", ["hang", "stopped"])
def test_a_hung_worker_is_replaced(tmp_path, fault):
    started = time.monotonic()
    episodes, error = run(Stateful(), suite=faulty(tmp_path, fault, once=True), step=2.0)
    assert error is None and episodes == alone() and time.monotonic() - started < 30
    assert {e.restarts for e in episodes if (e.task, e.trial) == ("a", 1)} == {1}


def test_an_episode_that_always_hangs(tmp_path):
    _, error = run(Chunks(1), suite=faulty(tmp_path, "hang"), step=1.5)
    assert isinstance(error, UserError) and "\n" not in str(error)
    assert str(error).startswith("a, trial 1: a step or reset took more than 1.5 s, in each of 3")
    assert "--step_timeout" in str(error)


def test_an_episode_that_takes_too_long(tmp_path):
    """In one chunk, and in many: what earlier chunks took counts."""
    for policy in (baselines.ExpertPolicy(), Chunks(1)):
        _, error = run(policy, suite=faulty(tmp_path, "slow", [("b", 0)]), episode=0.5,
                       tasks=("b",), trials=1)
        assert isinstance(error, UserError)
        assert str(error).startswith("b, trial 0: it took more than 0.5 s, in each of 3")
        assert "--episode_timeout" in str(error)


def test_a_bug_keeps_its_traceback(tmp_path):
    _, error = run(Chunks(1), suite=faulty(tmp_path, "bug"))
    assert isinstance(error, SimulatorError)
    assert "Traceback" in str(error) and "KeyError: 'the bug'" in str(error)
    assert "counting_suite.py" in str(error)


@pytest.mark.parametrize("fault, kind, message", [
    ("refusal", UserError, "The counter is full: empty it."),
    ("lost_file", FileNotFoundError, "not there"),
])
def test_a_refusal_stays_one(tmp_path, fault, kind, message):
    _, error = run(Chunks(1), suite=faulty(tmp_path, fault))
    assert isinstance(error, kind) and message in str(error) and "\n" not in str(error)


def test_a_suite_that_cannot_be_made():
    make = functools.partial(suites.make, "tabletop", {"libero_demos": "x"}, {})
    _, error = run(Chunks(1), suite=make)
    assert isinstance(error, UserError)
    assert str(error) == "--suite=tabletop does not use --libero_demos."


def test_a_worker_imports_simulators_only(tmp_path):
    run(Chunks(1), suite=faulty(tmp_path, "modules"))
    assert (tmp_path / "modules").read_text() == "."


SCRIPT = """
import functools, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # Ignored where tests run with `&`.
from counting_suite import PROTOCOL, Chunks, Suite
from jaxvp.evaluation.rollout import rollouts
from jaxvp.evaluation.workers import Workers
suite = functools.partial(Suite, sys.argv[1], {("a", 0): "hang"})
with Workers(suite, PROTOCOL, 2, 600, 600) as workers:
    print(*workers.processes, flush=True)
    list(rollouts(None, PROTOCOL, Chunks(1), 4, workers=workers))
"""


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="a hung worker is told by Linux only")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, how):
    """One of them hangs in a step, the other waits for what to do. The script has no `if __name__
    == "__main__"`, which workers would need if they imported it."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    with subprocess.Popen([sys.executable, script, tmp_path], text=True,
                          env={**os.environ, "PYTHONPATH": paths},
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        assert len(pids) == 2 and not any(map(gone, pids))
        parent.send_signal(how)
        try:
            parent.wait(20)
        finally:
            parent.kill()
    deadline = time.monotonic() + 20
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
