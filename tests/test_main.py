"""The command line: every field has a flag, and what is wrong with one is said in one line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import finetune, libero, pretrain, vidar, video_policy, vpp
from jaxvp import main
from jaxvp.config import ConfigError, build
from jaxvp.step import TrainConfig

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("config", [
    *map(pretrain.get_config, ("", "all", *pretrain.WAN)),
    *map(vpp.get_config, vpp.VARIANTS), finetune.get_config(),
    *map(libero.get_config, libero.VARIANTS),
    *map(vidar.get_config, vidar.VARIANTS),
    *map(video_policy.get_config, video_policy.VARIANTS)])
def test_every_config_is_complete(config):
    assert config.mesh.fsdp and config.microbatches == 1
    build(TrainConfig, config)


def command(*flags, cwd):
    return subprocess.run([sys.executable, "-m", "jaxvp.main", *flags], cwd=cwd, text=True,
                          capture_output=True, env={"PYTHONPATH": str(ROOT),
                                                    "JAX_PLATFORMS": "cpu", "PATH": "",
                                                    "COLUMNS": "200"})


def one_error(run) -> str:
    assert run.returncode == 1, run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in run.stderr
    return errors[0]


@pytest.mark.parametrize("flag, message", [
    ("--config.mehs.fsdp=2", 'does not have: .*Did you mean "mesh"'),
    ("--config.batch_size=abc", "flag --config.batch_size=abc: invalid literal"),
    ("--config.init_from.video=nowhere", r"config.init_from\['video'\]: there is no nowhere"),
    ("--config.init_from['*']=nowhere", r"config.init_from\['\*'\]: there is no nowhere"),
    ("--config.mesh.fsdp=3", "fsdp=3, context=1, tensor=1, which does not fit 1 devices"),
    ("--config.optimizer.learning_rate=nan", "config.optimizer.learning_rate: expected a finite"),
    ("--config.data.window.fps=inf", "config.data.window.fps: expected a finite"),
])
def test_a_wrong_flag_is_one_line(flag, message, tmp_path):
    run = command(f"--config={ROOT}/configs/pretrain.py", flag, f"--workdir={tmp_path}/run",
                  "--dry_run", cwd=tmp_path)
    assert re.search(message, one_error(run))


def run_main(folder, *flags):
    """The command in `folder`, without data there."""
    return command(f"--config={ROOT}/configs/pretrain.py", *flags, cwd=folder)


def test_a_mistyped_path_is_not_taken_for_the_embedded_dataset(tmp_path):
    run = run_main(tmp_path, "--config.data.sources=({'path': 'data/my_robto'},)",
                   "--config.embedded.episodes=4")
    assert run.returncode == 1 and "error: No dataset at data/my_robto" in run.stderr, run.stderr
    assert not (tmp_path / "data").exists()


def test_a_dry_run_of_the_embedded_dataset_writes_nothing(tmp_path):
    run = run_main(tmp_path, "--dry_run")
    assert run.returncode == 0, run.stderr
    assert "data/tabletop is absent: a run builds it first." in run.stdout
    assert "parameters trained" in run.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("sources, embedded, there, absent", [
    (["data/tabletop"], {"path": "data/tabletop"}, False, True),
    (["mine", "data/tabletop/"], {"path": "data/tabletop"}, False, True),
    (["data/tabletop"], {"path": "data/tabletop"}, True, False),
    (["mine"], {"path": "data/tabletop"}, False, False),
    (["data/tabletop"], {}, False, False),
])
def test_what_is_built(tmp_path, monkeypatch, sources, embedded, there, absent):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "tabletop" / "1.0.0.unfinished").mkdir(parents=True)
    if there:
        (tmp_path / "data" / "tabletop" / "dataset_info.json").touch()
    config = vpp.get_config().to_dict() | {"embedded": embedded}
    config["data"] |= {"sources": [{"path": path} for path in sources]}
    assert main.embedded_is_absent(build(TrainConfig, config)) == absent


def test_an_embedded_dataset_has_a_path():
    config = vpp.get_config().to_dict() | {"embedded": {"episodes": 3}}
    with pytest.raises(ConfigError, match="config.embedded.path is missing"):
        build(TrainConfig, config)


@pytest.mark.parametrize("config, message", [
    ("configs/pretrain.py:wan-15b", r"configs/pretrain.py:wan-15b: variants are .*'wan-14b'"),
    ("configs/mixtures.py", "No mixture '' in configs/mixtures.py: there are .*'vidar'"),
    ("configs/finetune.py:all", "--config: this file has no variants"),
    ("configs/nothing.py", "--config cannot be read: .*No such file.*configs/nothing.py"),
    ("configs/__init__.py", r"this file has no get_config\(\)"),
])
def test_a_wrong_config_is_one_line(config, message):
    assert re.search(message, one_error(command(f"--config={config}", cwd=ROOT)))


@pytest.mark.parametrize("body, error", [
    ("return {}['a']", "KeyError: 'a'"), ("return int('x')", "ValueError: invalid literal")])
def test_a_bug_of_a_config_keeps_its_traceback(tmp_path, body, error):
    (tmp_path / "mine.py").write_text(f"def get_config():\n    {body}\n")
    run = command("--config=mine.py", cwd=tmp_path)
    assert run.returncode == 1 and error in run.stderr
    assert re.search(r'File ".*mine.py", line 2, in get_config', run.stderr)
