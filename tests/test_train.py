import contextlib
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny_run import config_of, rows, weights, write_config

from configs import finetune
from data_builders.build import build
from data_builders.tabletop.tabletop import Builder
from jaxvp import checkpoint, export, train
from jaxvp import step as step_lib
from jaxvp.config import ConfigError
from jaxvp.data import augment, mixture
from jaxvp.errors import UserError
from jaxvp.metrics import NonFiniteError
from jaxvp.policy import bundle
from jaxvp.rules import named_leaves


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("tabletop")
    builder = Builder(episodes=8, tasks=("core",), image_size=16, val_fraction=0.3)
    build(builder, builder.items(), out, num_workers=1)
    return str(out)


@contextlib.contextmanager
def command(config, workdir, devices=8):
    """`python -m jaxvp.main` for a config, in a process that does not outlive the block."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    line = [sys.executable, "-m", "jaxvp.main", f"--config={write_config(config, workdir)}",
            f"--workdir={workdir}"]
    with subprocess.Popen(line, env={**os.environ, "XLA_FLAGS": flags}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_killed_run_continues_bit_for_bit(dataset, tmp_path):
    """SIGKILL at some step after a checkpoint, against the same length without it."""
    killed, straight, steps = tmp_path / "killed", tmp_path / "straight", 40
    config = config_of(dataset, steps=steps, save_every=10)

    def stopped_at():
        """The step that is saved, the step that is done."""
        with contextlib.suppress(checkpoint.CheckpointError, UserError, IndexError):
            saved = checkpoint.restore_json(killed, "progress")["step"]
            return saved, rows(killed)[-1]["step"]
        return 0, 0

    with command(config, killed) as process:
        while process.poll() is None:
            saved, done = stopped_at()
            if 0 < saved < done:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.02)
        output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output
    saved, done = stopped_at()
    assert saved < done < steps

    train.train(config, killed)
    train.train(config, straight)
    for item in ("params", "ema"):
        expected, found = weights(straight, steps, item), weights(killed, steps, item)
        assert expected.keys() == found.keys()
        for name, leaf in expected.items():
            np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    a, b = (checkpoint.restore_json(workdir, "data") for workdir in (killed, straight))
    assert a == b and (a["step"], a["batch_size"]) == (steps, 8)
    # The same batches: the losses of every step agree, of those after the restart too.
    losses = [[(row["step"], row["loss"]) for row in rows(workdir)]
              for workdir in (killed, straight)]
    assert losses[0] == losses[1] and len(losses[0]) == steps


@pytest.fixture(scope="module")
def stages(dataset, tmp_path_factory):
    """Workdirs of the two stages, `video` and `action`, and the config of the second."""
    folder = tmp_path_factory.mktemp("stages")
    train.train(config_of(dataset), folder / "video")
    config = config_of(dataset, finetune, init_from=str(folder / "video"))
    train.train(config, folder / "action")
    return folder, config


def test_action_stage_starts_from_the_video_stage_and_leaves_it_alone(stages, tmp_path):
    folder, config = stages
    before = named_leaves(checkpoint.restore_params(folder / "video"))
    after = weights(folder / "action", 4)
    changed = {name.split("/")[0] for name in after if (after[name] != before[name]).any()}
    assert changed == {"action"}
    # Only what is trained has an average; the rest of what is exported is as it was.
    averages = weights(folder / "action", 4, "ema")
    assert {name.split("/")[0] for name in averages} == {"action"}
    for name, leaf in named_leaves(checkpoint.restore_params(folder / "action")).items():
        np.testing.assert_array_equal(leaf, averages.get(name, before[name]), err_msg=name)

    export.export(folder / "action", tmp_path / "bundle", batch_size=2)
    policy = bundle.load(tmp_path / "bundle")
    seen = {"video": np.zeros((3, 3, 1, 16, 16, 3), np.uint8), "view_mask": np.ones((3, 3), bool),
            "text": np.ones((3, 96), np.int32), "state": np.zeros((3, 8), np.float32),
            "state_mask": np.ones((3, 8), bool)}
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 3))
    actions = policy.act(seen, np.asarray(keys))
    config = step_lib.config_lib.build(step_lib.TrainConfig, config, "config")
    method = step_lib.make_method(config, step_lib.ClipSpec(**checkpoint.restore_json(
        folder / "action", "assets")["spec"]))
    params = checkpoint.restore_params(folder / "action")
    expected = jax.jit(method.act)(params, seen, jax.random.wrap_key_data(keys))
    np.testing.assert_allclose(actions, expected, atol=1e-5)
    assert policy.imagine(seen, np.asarray(keys)).shape == (3, 3, 24, 16, 3)
    with pytest.raises(ValueError, match="--robot=aloha"):
        export.export(folder / "action", tmp_path / "other", 2, "aloha")


@pytest.mark.parametrize("absent", ["embodiments", "spec"])
def test_a_workdir_of_an_older_version(stages, tmp_path, monkeypatch, absent):
    assets = checkpoint.restore_json(stages[0] / "action", "assets")
    monkeypatch.setattr(checkpoint, "restore_json", lambda *_: {
        name: value for name, value in assets.items() if name != absent} | {"step": 4})
    with pytest.raises(UserError, match=f"action was written by another version .*{absent}"):
        export.export(stages[0] / "action", tmp_path / "bundle", 2)


def test_parameters_of_an_older_version(stages, tmp_path, monkeypatch):
    params = checkpoint.restore_params(stages[0] / "action")
    del params["action"]
    monkeypatch.setattr(checkpoint, "restore_params", lambda _: params)
    with pytest.raises(UserError, match=r"other parameters, such as action/.*: expected \(.*, "
                       r"found none. Use that one"):
        export.export(stages[0] / "action", tmp_path / "bundle", 2)
    assert not (tmp_path / "bundle").exists()


def test_a_video_stage_gives_no_policy(stages, tmp_path):
    with pytest.raises(UserError, match="stage 'video', which trains no policy"):
        export.export(stages[0] / "video", tmp_path / "bundle", 2)
    assert not (tmp_path / "bundle").exists()


def test_an_export_needs_an_empty_folder(stages, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        export.export(stages[0] / "action", tmp_path, 2)
    with pytest.raises(NotADirectoryError):
        export.export(stages[0] / "action", tmp_path / "notes.txt", 2)
    with pytest.raises(UserError, match="--batch_size must be at least 1, found 0"):
        export.export(stages[0] / "action", tmp_path / "new", 0)


def test_a_run_on_crops_is_validated_and_exported_on_the_middle(dataset, tmp_path):
    """24 of 32 pixels are shown; the loader has enlarged pictures of 16."""
    config = config_of(dataset, steps=2, validate_every=2, **{
        "stage": "joint", "data.crop": 0.75, "data.source_size": 32, "method.video_steps": 1,
        "method.action_steps": 1})
    train.train(config, tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "bundle", batch_size=2)
    config = step_lib.config_lib.build(step_lib.TrainConfig, config, "config")
    clip = mixture.validation_batches(config.data, 8, 1)[0]
    assert clip["video"].shape[3:5] == (32, 32)
    spec = mixture.clip_spec(config.data, mixture.statistics(config.data))
    method, params = step_lib.make_method(config, spec), checkpoint.restore_params(tmp_path / "run")
    middle = augment.fit({**clip, "video": clip["video"][..., 4:28, 4:28, :]}, spec)

    @jax.jit
    def loss(clip):
        return method.loss(params, clip, step_lib.clip_keys(config.seed, 0, 8), "joint")[0]

    found = rows(tmp_path / "run")[-1]["validation_loss"]
    np.testing.assert_allclose(found, loss(middle), rtol=1e-4)
    assert abs(found - loss(augment.fit(clip, spec))) > 1e-3 * found

    policy, keys = bundle.load(tmp_path / "bundle"), jax.random.split(jax.random.key(0), 8)
    assert policy.manifest.image_size == (32, 32)
    actions = policy.act(train.observe(clip), np.asarray(jax.random.key_data(keys)))
    expected = jax.jit(method.act)(params, train.observe(middle), keys)
    np.testing.assert_allclose(actions, expected, atol=1e-3)
    frames = policy.imagine(train.observe(clip), np.asarray(jax.random.key_data(keys)))[:, 0]
    off = [np.abs(frames - np.float32(method.shown(params, seen)[:, 0])).mean()
           for seen in (middle, augment.fit(clip, spec))]
    assert off[0] < 0.5 < off[1]


def test_eight_devices_train_as_one(dataset, tmp_path):
    train.train(config_of(dataset, mesh={"data": 4, "fsdp": 2},
                          rules=((".*/ffn_1/kernel", (None, None, "fsdp")),)), tmp_path / "eight")
    with command(config_of(dataset), tmp_path / "one", devices=1) as process:
        output = process.communicate()[0]
    assert process.returncode == 0, output
    eight, single = (rows(tmp_path / name) for name in ("eight", "one"))
    np.testing.assert_allclose([r["loss"] for r in eight], [r["loss"] for r in single], rtol=1e-4)


def test_validation_samples_and_one_compilation(dataset, tmp_path, caplog):
    changes = {"validate_every": 2, "sample_every": 4, "log_every": 2}
    with jax.log_compiles(), caplog.at_level("WARNING", "jax._src.interpreters.pxla"):
        train.train(config_of(dataset, **changes), tmp_path)
    compiled = [r.getMessage() for r in caplog.records if "Compiling jit(update)" in r.getMessage()]
    assert len(compiled) == 1
    last = rows(tmp_path)[-1]
    assert {"psnr", "psnr_of_first_frame", "validation_loss", "clips_per_second",
            "bad_records"} < last.keys()
    assert (tmp_path / "samples" / "0000004.mp4").stat().st_size > 0
    assert list((tmp_path / "tensorboard").iterdir())


def test_nan_stops_the_run_and_saves_nothing_bad(dataset, tmp_path):
    config = config_of(dataset, save_every=1, **{"optimizer.learning_rate": 1e30,
                                                 "optimizer.clip_norm": None})
    with pytest.raises(NonFiniteError, match=r"Step \d: "):
        train.train(config, tmp_path)
    for step in checkpoint.Checkpoints(tmp_path).steps:
        assert all(np.isfinite(x).all() for x in weights(tmp_path, step).values())


def test_relative_workdirs(dataset, tmp_path, monkeypatch):
    """The default workdir is relative, and so is what the README passes on."""
    monkeypatch.chdir(tmp_path)
    train.train(config_of(dataset, steps=2), "video")
    train.train(config_of(dataset, steps=2, init_from="video"), "again")
    assert checkpoint.restore_json("again", "progress")["step"] == 2
    assert weights(tmp_path / "again", 2).keys() == named_leaves(
        checkpoint.restore_params("again")).keys()


def test_dry_run_writes_nothing(dataset, tmp_path, capsys):
    train.train(config_of(dataset), tmp_path / "run", dry_run=True)
    assert "parameters trained" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("every", ["validate_every", "sample_every"])
def test_what_is_validated_on_is_looked_at_before_the_first_step(
        dataset, tmp_path, monkeypatch, dry_run, every):
    monkeypatch.setattr(step_lib, "build", lambda *args: pytest.fail("the step was built"))
    config = config_of(dataset, **{every: 2})
    config.data.sources = ({"path": dataset, "validation_split": "vla"},)
    with pytest.raises(UserError, match=r"has no split 'vla' to validate on, but \['train', 'val'"):
        train.train(config, tmp_path, dry_run)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"batchsize": 3}, "config.batchsize does not exist. Did you mean config.batch_size?"),
    ({"method.video.widht": 3}, "config.method.video.widht does not exist"),
    ({"method.name": "vidar2"}, "known methods"),
    ({"stage": "vidoe"}, "has stages"),
    ({"data.fsp": 3.0}, "config.data.fsp does not exist. Did you mean config.data.fps?"),
    ({"steps": "many"}, "config.steps: expected int, found 'many'"),
    ({"mesh": {"data": 3}}, "does not fit 8 devices"),
    ({"batch_size": 6}, "batch_size is 6: expected a multiple.*the nearest is 8"),
    ({"data.image_size": 12}, "multiples of"),
    ({"init_from": "nowhere"}, "No checkpoint in nowhere"),
    ({"method.taps": (0, 2)}, r"config.method.taps=\(0, 2\): expected different blocks .* 0 to 1"),
    ({"method.taps": ()}, r"config.method.taps=\(\): expected different blocks .* at least one"),
    ({"method.shift": -1.0}, "config.method.shift: expected float > 0, found -1.0"),
    ({"method.codec": {"name": "pixel", "patch": 0}}, "config.method.codec.patch: expected int >="),
    ({"method.video.heads": 0}, "config.method.video.heads: expected int >= 1, found 0"),
    ({"batch_size": 8000}, "batch_size is 8000, but the data has only"),
    ({"data.chunk": 200}, "data.chunk is 200, but the longest record"),
])
def test_bad_configs_name_the_key(dataset, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        train.train(config_of(dataset, **changes), tmp_path)


def test_a_workdir_of_another_config_is_refused(dataset, tmp_path):
    train.train(config_of(dataset, steps=3), tmp_path)
    with pytest.raises(ConfigError, match=r"config.optimizer.learning_rate: 0.\d+ -> 0.5"):
        train.train(config_of(dataset, steps=3, **{"optimizer.learning_rate": 0.5}), tmp_path)


def test_absent_dataset(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        train.train(config_of("nowhere"), tmp_path)
