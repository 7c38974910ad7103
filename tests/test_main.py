"""The command line: every field has a flag, and what is wrong with one is said in one line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import finetune, libero, pretrain
from jaxvp.config import build
from jaxvp.step import TrainConfig

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("config", [
    *map(pretrain.get_config, ("", "all", *pretrain.WAN)),
    *map(finetune.get_config, finetune.VARIANTS), libero.get_config()])
def test_every_config_is_complete(config):
    assert config.mesh.fsdp and config.microbatches == 1
    build(TrainConfig, config)


@pytest.mark.parametrize("flag, message", [
    ("--config.mehs.fsdp=2", 'does not have: .*Did you mean "mesh"'),
    ("--config.batch_size=abc", "flag --config.batch_size=abc: invalid literal"),
    ("--config.init_from=nowhere", "No checkpoint in nowhere: expected a workdir"),
    ("--config.mesh.fsdp=3", "fsdp=3, context=1, tensor=1, which does not fit 1 devices"),
])
def test_a_wrong_flag_is_one_line(flag, message, tmp_path):
    command = [sys.executable, "-m", "jaxvp.main", f"--config={ROOT}/configs/pretrain.py", flag,
               f"--workdir={tmp_path}/run", "--dry_run"]
    run = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, env={
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""})
    assert run.returncode == 1, run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in run.stderr
    assert re.search(message, errors[0]), errors
