"""Latents that are stored once: what is written, what training reads, and stopping between."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import pretrain
from jaxvp import step, train
from jaxvp.config import build
from jaxvp.data import mixture, precompute, rlds
from jaxvp.errors import UserError
from jaxvp.weights import streaming, wan_vae

ROOT = Path(__file__).parents[2]
METHOD = {
    "name": "video_policy", "taps": (0, 1), "codec": {"name": "pixel"},
    "video": {"width": 16, "layers": 2, "heads": 2, "ffn": 32}, "text": {"width": 8},
    "head": {"width": 16, "layers": 1, "heads": 2}}
LATENTS = (3, 6, 4, 48)


def config_of(path, **data):
    values = {"sources": ({"path": str(path)},), "num_frames": 3, "fps": 5.0, "chunk": 4,
              "image_size": 16, "text_length": 96, "num_threads": 0}
    config = pretrain.get_config().to_dict()
    config |= {"method": METHOD, "data": values | data, "embedded": {}, "steps": 2, "batch_size": 8}
    config["optimizer"]["warmup_steps"] = 0
    config |= {"save_every": 0, "validate_every": 2, "validation_batches": 1, "sample_every": 2}
    return config


def plain(config):
    return build(step.TrainConfig, config)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A dataset with a validation split, and the folder of its latents at every third step."""
    from synthetic import write

    folder = tmp_path_factory.mktemp("latents")
    original = write(folder / "made", val_fraction=0.4)
    config = plain(config_of(original))
    encoder = precompute.Encoder(config, batch_size=8)
    return original, precompute.precompute(config.data.sources[0], encoder, folder / "out", 3)


def test_latents_are_those_of_the_clips(stored):
    original, folder = stored
    config = plain(config_of(original))
    (pictures,) = mixture.train_iterator(config.data, 1, 0)._sources
    method = step.make_method(config, pictures.spec)
    latents = mixture.train_iterator(
        dataclasses.replace(config.data, latents=LATENTS,
                            sources=(mixture.SourceConfig(path=str(folder)),)), 1, 0)._sources[0]
    lengths = pictures.episodes.lengths
    assert len(latents) == sum(-(-lengths // 3))
    starts = [(record, start) for record, length in enumerate(lengths)
              for start in range(0, length, 3)]
    for index, (record, start) in enumerate(starts):
        seen = pictures[int(lengths[:record].sum()) + start]
        found = latents[index]
        batch = {name: seen[name][None] for name in ("video", "view_mask")}
        np.testing.assert_array_equal(
            found["latents"], np.asarray(method.encode({}, batch)[0], np.float16))
        assert found.keys() == seen.keys() - {"video", "view_mask"} | {"latents"}
        for name in found.keys() - {"latents"}:
            np.testing.assert_array_equal(found[name], seen[name], err_msg=name)


def test_the_dataset_is_rlds_that_tfds_reads(stored):
    original, folder = stored
    assert rlds.splits(folder) == ("train", "val")
    (first, *_) = tfds.builder_from_directory(folder).as_data_source("train")
    (before, *_) = tfds.builder_from_directory(original).as_data_source("train")
    steps, expected = list(first["steps"]), list(before["steps"])
    assert [s["observation"]["latents"].shape for s in steps] == [
        (3, *LATENTS[1:]) if k % 3 == 0 else (0, *LATENTS[1:]) for k in range(len(expected))]
    for a, b in zip(steps, expected, strict=True):
        assert a["observation"].keys() == {"state", "latents"}
        np.testing.assert_array_equal(a["action"], b["action"])
        assert a["language_instruction"] == b["language_instruction"]
    settings = rlds.Episodes(folder, "train").stored_latents
    assert settings["stride"] == 3 and settings["codec"] == {"name": "pixel"}
    assert settings["views"] == ["head", "left_wrist", "right_wrist"]


def test_a_run_on_latents_trains_validates_and_samples(stored, tmp_path, capsys):
    config = config_of(stored[1], latents=LATENTS)
    train.train(config, tmp_path)
    out = capsys.readouterr().out
    assert "validation loss" in out and "psnr" in out
    assert (tmp_path / "samples" / "0000002.mp4").stat().st_size > 1000


def test_a_stopped_run_continues_with_the_missing_files(stored, tmp_path, monkeypatch):
    original, folder = stored
    config = plain(config_of(original))
    encoder, source = precompute.Encoder(config, batch_size=8), config.data.sources[0]
    written = []

    def failing(target, *arguments):
        if written:
            raise KeyboardInterrupt
        written.append(target.name)
        write(target, *arguments)

    write = precompute._write
    monkeypatch.setattr(precompute, "_write", failing)
    with pytest.raises(KeyboardInterrupt):
        precompute.precompute(source, encoder, tmp_path, 3)
    with pytest.raises(UserError, match="an unfinished build"):
        rlds.version_folder(tmp_path)
    with pytest.raises(UserError, match="other settings"):
        precompute.precompute(source, encoder, tmp_path, 2)
    again = []
    monkeypatch.setattr(precompute, "_write", lambda target, *a: again.append(target.name)
                        or write(target, *a))
    result = precompute.precompute(source, encoder, tmp_path, 3)
    assert again and not set(again) & set(written)
    for path in folder.glob("*.array_record*"):
        assert (result / path.name).read_bytes() == path.read_bytes()
    assert not list(result.glob("*.partial")) and not (result / "plan.json").exists()
    with pytest.raises(UserError, match="exists already"):
        precompute.precompute(source, encoder, tmp_path, 3)


@pytest.mark.parametrize("changes, message", [
    ({}, r"holds latents, so data.latents must be \(3, 6, 4, 48\); it is \(\)"),
    ({"latents": LATENTS, "layout": "single", "cameras": ("head",)}, "layout 'bimanual'"),
    ({"latents": LATENTS, "fps": 2.5}, r"latents of other clips: fps 5.0, not 2.5"),
    ({"latents": (3, 6, 4, 16)}, r"latents \[3, 6, 4, 48\], not \[3, 6, 4, 16\]"),
])
def test_latents_of_other_clips_are_refused(stored, changes, message):
    with pytest.raises(ValueError, match=message):
        mixture.train_iterator(plain(config_of(stored[1], **changes)).data, 4, 0)


def test_images_are_no_latents(stored):
    with pytest.raises(ValueError, match=r"holds images, so data.latents must be \(\)"):
        mixture.train_iterator(plain(config_of(stored[0], latents=LATENTS)).data, 4, 0)
    with pytest.raises(ValueError, match="config.data.latents is set"):
        precompute.Encoder(plain(config_of(stored[0], latents=LATENTS)), 8)


def test_the_command(dataset, tmp_path):
    command = [
        sys.executable, "-m", "jaxvp.data.precompute", f"--config={ROOT}/configs/pretrain.py",
        f"--config.data.sources=({{'path': '{dataset}', 'validation_split': ''}},)",
        "--config.data.image_size=16", f"--out={tmp_path}"]
    run = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    name = Path(dataset).parent.name
    assert "data: {latents: (4, 6, 4, 48)}" in run.stdout
    assert rlds.Episodes(tmp_path / name, "train").stored_latents["stride"] == 4
    run = subprocess.run([*command, "--stride=0"], cwd=ROOT, text=True, capture_output=True)
    assert run.returncode == 1 and run.stderr.strip().startswith("error: flag --stride=0")


def test_the_codecs_weights_are_read_and_remembered(stored, tmp_path):
    arrays = dict(np.load(ROOT / "tests/golden/vae_2.1.npz"))
    arrays = {key: array for key, array in arrays.items() if "." in key}
    path = tmp_path / "vae.safetensors"
    streaming.write_file(path, {k: (a.shape, a.dtype) for k, a in arrays.items()}, arrays.get)
    codec = {"name": "wan", "version": "2.1", "width": 4, "decoder_width": 4}
    config = config_of(stored[0], num_frames=5, image_size=32) | {"method": METHOD | {
        "codec": codec}, "pretrained": {"codec": str(path)}}
    encoder = precompute.Encoder(plain(config), batch_size=8)
    assert encoder.shape == (2, 6, 4, 16) and encoder.identity["weights"]
    clip = encoder.spec.empty()
    clip["video"][:], clip["view_mask"][:] = 90, True
    (found,) = encoder([clip])
    method = step.make_method(plain(config | {"data": config["data"] | {
        "action_size": 1, "state_size": 1}}), dataclasses.replace(
            encoder.spec, action_size=1, state_size=1))
    params = {"codec": wan_vae.load(path, method.video_codec)[0]}
    expected = method.encode(params, {name: clip[name][None] for name in ("video", "view_mask")})
    np.testing.assert_allclose(found, expected[0], atol=2e-3)
    with pytest.raises(ValueError, match="config.pretrained.codec is empty"):
        precompute.Encoder(plain(config | {"pretrained": {}}), batch_size=8)


def test_an_unreadable_picture_is_named(make_dataset, tmp_path):
    config = plain(config_of(make_dataset("bad", val_fraction=0.4, bad_frame=(1, 3))))
    encoder = precompute.Encoder(config, batch_size=8)
    with pytest.raises(ValueError, match="episode episode-1 from step 0: camera head, step 3.*"
                                         "Build the dataset again"):
        precompute.precompute(config.data.sources[0], encoder, tmp_path / "out", 3)
    assert not list((tmp_path / "out").glob("*/dataset_info.json"))


TWO_PROCESSES = """
import sys
from jaxvp import distributed
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), timeout=60)
from pathlib import Path
from jaxvp.data import precompute
from test_precompute import config_of, plain
config = plain(config_of(sys.argv[3]))
write = precompute._write
def note(target, *arguments):
    print("wrote", target.name)
    write(target, *arguments)
precompute._write = note
encoder = precompute.Encoder(config, batch_size=8)
precompute.precompute(config.data.sources[0], encoder, Path(sys.argv[4]), 3)
"""


def test_two_processes_share_the_files(stored, tmp_path):
    original, alone = stored
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    paths = [str(Path(__file__).parent), *sys.path]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2",
                                "PYTHONPATH": os.pathsep.join(paths)}
    processes = [subprocess.Popen(
        [sys.executable, "-c", TWO_PROCESSES, address, str(i), str(original), str(tmp_path)],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for i in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    written = [{line.split()[1] for line in out.splitlines() if line.startswith("wrote")}
               for out in outputs]
    assert all(written) and not written[0] & written[1]
    for path in alone.glob("*.array_record*"):
        assert path.name in written[0] | written[1]
        assert (tmp_path / alone.name / path.name).read_bytes() == path.read_bytes()
    assert rlds.splits(tmp_path / alone.name) == ("train", "val")


def test_sources_of_one_name_are_refused(make_dataset, tmp_path):
    paths = [make_dataset(f"{folder}/same").parent for folder in ("a", "b")]
    command = [
        sys.executable, "-m", "jaxvp.data.precompute", f"--config={ROOT}/configs/pretrain.py",
        f"--config.data.sources=({{'path': '{paths[0]}'}}, {{'path': '{paths[1]}'}})",
        f"--out={tmp_path / 'out'}"]
    run = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert run.returncode == 1 and "Several sources are in folders named same" in run.stderr


def test_encoding_spreads_over_the_devices(stored):
    config = plain(config_of(stored[0]))
    with pytest.raises(ValueError, match=f"not a multiple of the {jax.device_count()} devices"):
        precompute.Encoder(config, batch_size=jax.device_count() + 1)
