"""`python -m jaxvp.main` as several real processes, which is how a pod runs it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_run import config_of, rows, write_config

from data_builders.build import build
from data_builders.tabletop.tabletop import Builder
from jaxvp import checkpoint

STEPS = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("tabletop")
    builder = Builder(episodes=8, tasks=("core",), image_size=16, val_fraction=0.3)
    build(builder, builder.items(), out, num_workers=1)
    return str(out)


def small(dataset, **changes):
    """A run that does all that a run does: it validates, samples, saves."""
    return config_of(dataset, **{
        "steps": STEPS, "save_every": 4, "validate_every": 6, "sample_every": STEPS,
        "mesh": {"data": 2, "fsdp": 4}, "log_every": 1} | changes)


class Run:
    """The processes of one run, which do not outlive the block."""

    def __init__(self, config, workdir, count, devices=8):
        with socket.create_server(("", 0)) as server:
            address = f"localhost:{server.getsockname()[1]}"
        flags = os.environ["XLA_FLAGS"].replace("device_count=8",
                                                f"device_count={devices // count}")
        line = [sys.executable, "-m", "jaxvp.main", f"--config={write_config(config, workdir)}",
                f"--workdir={workdir}"]
        self.processes = []
        for number in range(count):
            where = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count),
                     "JAX_PROCESS_ID": str(number)} if count > 1 else {}
            self.processes.append(subprocess.Popen(
                line, env={**os.environ, "XLA_FLAGS": flags, **where}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self):
        """[(exit status, output)] when all have ended."""
        outputs = [process.communicate(timeout=300)[0] for process in self.processes]
        return [(process.returncode, output)
                for process, output in zip(self.processes, outputs, strict=True)]


def wait_for(workdir, step, run):
    """Returns when the run has a checkpoint and is at `step` or later."""
    while not ((workdir / "checkpoints" / "4").exists() and (workdir / "metrics.jsonl").exists()
               and rows(workdir) and rows(workdir)[-1]["step"] >= step):
        assert all(process.poll() is None for process in run.processes), run.wait()
        time.sleep(0.02)


def curve(workdir):
    """{(step, name): value}; how fast a step was is not of interest."""
    return {(row["step"], name): value for row in rows(workdir) for name, value in row.items()
            if name not in ("step", "time", "clips_per_second")}


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory):
    """One process with eight devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    with Run(small(dataset), workdir, 1) as run:
        (status, output), = run.wait()
    assert status == 0, output
    return workdir


def assert_same_run(workdir, other):
    expected, found = curve(other), curve(workdir)
    assert expected.keys() == found.keys() and max(step for step, _ in found) == STEPS
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-4, err_msg=str(key))
    assert len(rows(workdir)) == len(rows(other)) == STEPS
    assert (workdir / "samples" / f"{STEPS:07d}.mp4").stat().st_size > 0
    assert checkpoint.restore_json(workdir, "data") == checkpoint.restore_json(other, "data")


def kill_one(config, workdir, killed):
    """Kills one of two processes after the first checkpoint: the other must end soon, in one line
    that names it."""
    with Run(config, workdir, 2) as run:
        wait_for(workdir, 5, run)
        run.processes[killed].send_signal(signal.SIGKILL)
        start = time.monotonic()
        ended = run.wait()
        assert time.monotonic() - start < 20
    status, output = ended[1 - killed]
    assert ended[killed][0] == -signal.SIGKILL and status == 1, output
    last = output.strip().splitlines()[-1]
    assert last == (f"error: Process {killed} is gone, so process {1 - killed} ends: it was "
                    "killed, or its machine failed"), output
    assert "Traceback" not in output and "stack trace" not in output


def test_two_processes_of_which_one_is_killed_train_as_one(dataset, tmp_path, alone):
    """Repeated, the command goes on where it was, with the curve of one process."""
    workdir = tmp_path / "two"
    kill_one(small(dataset), workdir, 1)
    with Run(small(dataset), workdir, 2) as run:
        ended = run.wait()
    assert [status for status, _ in ended] == [0, 0], ended
    assert "Continuing from step" in ended[0][1] and "Continuing" not in ended[1][1]
    assert_same_run(workdir, alone)


def test_process_0_is_killed(dataset, tmp_path):
    """Which had JAX's coordination service, whose end would abort the others first."""
    kill_one(small(dataset, validate_every=0, sample_every=0), tmp_path / "two", 0)


def test_four_processes_train_as_one_and_go_on_as_one(dataset, tmp_path, alone):
    """SIGTERM to one of four: all save the same step. One process with eight devices goes on."""
    workdir = tmp_path / "four"
    with Run(small(dataset), workdir, 4) as run:
        wait_for(workdir, 5, run)
        run.processes[2].send_signal(signal.SIGTERM)
        ended = run.wait()
    assert [status for status, _ in ended] == [0] * 4, ended
    assert "Stopped by a signal after step" in ended[0][1]
    stopped = checkpoint.restore_json(workdir, "progress")["step"]
    assert 5 <= stopped <= STEPS
    with Run(small(dataset), workdir, 1) as run:
        (status, output), = run.wait()
    assert status == 0, output
    assert_same_run(workdir, alone)


def test_embedded_data_is_built_once_and_waited_for(tmp_path):
    """Process 1 waits for the dataset that process 0 builds; a refusal of one ends both."""
    embedded = {"path": str(tmp_path / "data"), "episodes": 4, "tasks": ("core",), "image_size": 16,
                "val_fraction": 0.3}
    config = small(str(tmp_path / "data"), embedded=embedded, steps=2, validate_every=0,
                   sample_every=0)
    with Run(config, tmp_path / "run", 2) as run:
        ended = run.wait()
    assert [status for status, _ in ended] == [0, 0], ended
    assert "is absent: building" in ended[0][1] and "building" not in ended[1][1]
    assert checkpoint.restore_json(tmp_path / "run", "progress")["step"] == 2


def test_a_refusal_ends_all_processes(dataset, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file in the way")
    with Run(small(dataset), tmp_path / "run", 2) as run:
        ended = run.wait()
    assert [status for status, _ in ended] == [1, 1]
    assert any("checkpoints: Not a directory" in output for _, output in ended), ended
    assert not any("Traceback" in output for _, output in ended), ended


def test_a_damaged_checkpoint_is_left_aside_by_all(dataset, tmp_path):
    workdir = tmp_path / "run"
    with Run(small(dataset, steps=8, validate_every=0, sample_every=0), workdir, 2) as run:
        assert [status for status, _ in run.wait()] == [0, 0]
    data = max((workdir / "checkpoints" / "8" / "params").rglob("*"),
               key=lambda path: path.is_file() and "/d/" in str(path) and path.stat().st_size)
    data.write_bytes(data.read_bytes()[:1000])
    with Run(small(dataset, steps=8, validate_every=0, sample_every=0), workdir, 2) as run:
        ended = run.wait()
    assert [status for status, _ in ended] == [0, 0], ended
    assert "Checkpoint 8 is damaged" in ended[0][1] and "Falling back to step 4" in ended[0][1]
    assert (workdir / "checkpoints" / "damaged-8").exists()
    assert [row["step"] for row in rows(workdir)] == list(range(1, 9))
    assert json.loads((workdir / "config.json").read_text())["steps"] == 8
    assert checkpoint.restore_json(workdir, "progress")["step"] == 8
