"""Extra arrays, stored once: what is written, what training reads, and stopping between."""

import dataclasses
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import vpp
from jaxvp import checkpoint, step, train
from jaxvp.config import build
from jaxvp.data import mixture, rlds
from jaxvp.data.sources import SourceConfig
from jaxvp.errors import UserError
from jaxvp.methods import base
from jaxvp.tools import precompute
from jaxvp.weights import streaming, wan_vae

ROOT = Path(__file__).parents[2]
METHOD = {
    "name": "video_policy", "taps": (0, 1), "head": {"width": 16, "layers": 1, "heads": 2},
    "video": {"transformer": {"width": 16, "layers": 2, "heads": 2, "ffn": 32},
              "text": {"width": 8}, "codec": {"name": "pixel"}}}
LATENTS = (3, 6, 4, 48)


def config_of(path, **data):
    values = {"sources": ({"path": str(path)},), "window": {"fps": 5.0, "future": 2, "chunk": 4},
              "image_size": 16, "text_length": 96, "num_threads": 0}
    config = vpp.get_config().to_dict()
    config |= {"method": METHOD, "data": values | data, "embedded": {}, "steps": 2, "batch_size": 8}
    config["optimizer"]["warmup_steps"] = 0
    config |= {"save_every": 0, "validate_every": 2, "validation_batches": 1, "sample_every": 2}
    return config


def plain(config):
    return build(step.TrainConfig, config)


def stored_clips(folder, **data):
    """The config of clips whose latents are stored."""
    return config_of(folder, **{"extra": {"latents": LATENTS}, "video": False} | data)


def clips_of(config):
    """The clips of the only source, and the batches of its training."""
    data = mixture.Mixture(plain(config).data)
    batches = data.train(data.spec.window, 1, 0)
    return batches._sources[0], batches


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
    pictures, _ = clips_of(config_of(original))
    method = step.make_method(plain(config_of(original)), pictures.spec)
    latents, _ = clips_of(stored_clips(folder))
    lengths = pictures.episodes.lengths
    assert len(latents) == sum(-(-lengths // 3))
    starts = [(record, start) for record, length in enumerate(lengths)
              for start in range(0, length, 3)]
    for index, (record, start) in enumerate(starts):
        seen = pictures[int(lengths[:record].sum()) + start]
        found = latents[index]
        batch = {name: seen[name][None] for name in ("video", "view_mask")}
        np.testing.assert_array_equal(
            found["latents"], np.asarray(method.video_model.encode({}, batch)[0], np.float16))
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
    settings = rlds.Episodes(folder, "train").extra["latents"]
    assert settings["stride"] == 3 and settings["codec"] == {"name": "pixel"}
    assert settings["views"] == ["head", "left_wrist", "right_wrist"]
    assert (settings["past"], settings["future"], settings["fps"]) == (1, 2, 5.0)


def test_a_run_on_latents_trains_validates_and_samples(stored, tmp_path, capsys):
    config = stored_clips(stored[1])
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
    (tmp_path / "1.0.0.incomplete" / "synthetic-val.array_record.0a.partial").write_bytes(b"half")
    with pytest.raises(UserError, match="left from a run with other settings"):
        precompute.precompute(source, encoder, tmp_path, 2)
    again = []
    monkeypatch.setattr(precompute, "_write", lambda target, *a: again.append(target.name)
                        or write(target, *a))
    result = precompute.precompute(source, encoder, tmp_path, 3)
    assert again and not set(again) & set(written)
    for path in folder.glob("*.array_record*"):
        assert (result / path.name).read_bytes() == path.read_bytes()
    assert not list(result.glob("*.partial"))
    again.clear()
    assert precompute.precompute(source, encoder, tmp_path, 3) == result and not again
    with pytest.raises(UserError, match="exists already, and not with these settings"):
        precompute.precompute(source, encoder, tmp_path, 2)


def test_a_run_that_is_killed_before_its_last_step_keeps_its_settings(
        make_dataset, tmp_path, monkeypatch):
    original = make_dataset("made", lengths=(5, 6))
    config = plain(config_of(original))
    encoder, source = precompute.Encoder(config, batch_size=8), config.data.sources[0]
    rename = Path.rename

    def killed(path, target):
        if Path(target).name == "1.0.0":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        precompute.precompute(source, encoder, tmp_path / "out", 3)
    monkeypatch.undo()
    assert (tmp_path / "out" / "1.0.0.incomplete" / "dataset_info.json").exists()
    with pytest.raises(UserError, match="an unfinished build"):
        rlds.version_folder(tmp_path / "out")
    with pytest.raises(UserError, match="left from a run with other settings"):
        precompute.precompute(source, encoder, tmp_path / "out", 2)
    result = precompute.precompute(source, encoder, tmp_path / "out", 3)
    assert rlds.Episodes(result, "train").extra["latents"]["stride"] == 3


@pytest.mark.parametrize("recipe", [None, '{"stride": 3'])
def test_files_without_a_recipe_are_refused(make_dataset, tmp_path, recipe):
    config = plain(config_of(make_dataset("made", lengths=(5,))))
    encoder, source = precompute.Encoder(config, batch_size=8), config.data.sources[0]
    folder = tmp_path / "out" / "1.0.0.incomplete"
    folder.mkdir(parents=True)
    (folder / "synthetic-train.array_record-00000-of-00001").write_bytes(b"of whom?")
    if recipe:
        (folder / "recipe.json").write_text(recipe)
    with pytest.raises(UserError, match="1.0.0.incomplete is left from a run with other settings"):
        precompute.precompute(source, encoder, tmp_path / "out", 3)


def test_the_files_of_another_source_are_not_continued(make_dataset, tmp_path, monkeypatch):
    one, other = make_dataset("one", lengths=(5, 6)), make_dataset("other", lengths=(6, 5))
    encoder = precompute.Encoder(plain(config_of(one)), batch_size=8)
    monkeypatch.setattr(precompute, "_finish", lambda *_: pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception):
        precompute.precompute(SourceConfig(path=str(one)), encoder, tmp_path / "out", 3)
    with pytest.raises(UserError, match="or another source"):
        precompute.precompute(SourceConfig(path=str(other)), encoder, tmp_path / "out", 3)


def test_a_full_disk_is_told_and_leaves_no_half_file(make_dataset, tmp_path):
    """By a limit on the size of files, whose error comes by the same way."""
    config = plain(config_of(make_dataset("made", lengths=(30, 30))))
    encoder, source = precompute.Encoder(config, batch_size=8), config.data.sources[0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match="train.*cannot be written: .*File too large"):
            precompute.precompute(source, encoder, tmp_path / "out", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    names = [path.name for path in (tmp_path / "out" / "1.0.0.incomplete").iterdir()]
    assert names == ["recipe.json"]


@pytest.mark.parametrize("changes, message", [
    ({"extra": {"flow": LATENTS}}, r"stores \('latents',\), not 'flow', which data.extra names"),
    ({"layout": "single", "cameras": ("head",)}, "layout bimanual, not single"),
    ({"window": {"fps": 2.5, "future": 2, "chunk": 4}}, "of other clips: fps 5.0, not 2.5"),
    ({"window": {"fps": 5.0, "future": 3, "chunk": 4}}, "of other clips: future 2, not 3 or more"),
    ({"extra": {"latents": (3, 6, 4, 16)}}, r"shape \[3, 6, 4, 48\], not \[3, 6, 4, 16\]"),
])
def test_latents_of_other_clips_are_refused(stored, changes, message):
    with pytest.raises(UserError, match=message):
        clips_of(stored_clips(stored[1], **changes))


def test_latents_of_the_same_rate_are_taken(stored):
    window = {"fps": 5.0 * (1 + 1e-6), "future": 2, "chunk": 4}
    _, batches = clips_of(stored_clips(stored[1], window=window))
    assert next(batches)["latents"].shape == (1, *LATENTS)


def test_images_are_no_latents(stored):
    with pytest.raises(UserError, match=r"stores no arrays, not 'latents'"):
        clips_of(stored_clips(stored[0]))
    with pytest.raises(UserError, match="has no camera 'head'; it has ()"):
        clips_of(config_of(stored[1]))
    with pytest.raises(UserError, match="config.data.extra is set"):
        precompute.Encoder(plain(stored_clips(stored[0])), 8)
    with pytest.raises(UserError, match="crop is 0.8, but what is stored is of whole pictures"):
        precompute.Encoder(plain(config_of(stored[0], crop=0.8)), 8)
    window = {"fps": 20.0, "future": 2, "chunk": 4}
    fast = precompute.Encoder(plain(config_of(stored[0], window=window)), 8)
    with pytest.raises(UserError, match="has 10 frames per second, clips want 20"):
        precompute.precompute(SourceConfig(path=str(stored[0])), fast, stored[1].parent / "x", 3)


class Brightness(base.Method):
    """A method whose extra arrays are means of the pictures, scaled by a parameter."""

    modes = ()

    @property
    def extras(self):
        def mean(params, clip):
            video = clip["video"].astype(jnp.float32).mean((-3, -2, -1))
            return params["scale"]["by"] * video * clip["frame_mask"][:, None]

        def colours(params, clip):
            return clip["video"].astype(jnp.float32).mean((2, 3, 4))

        return {"brightness": base.Extra((3, 3), ("scale",), mean, {}),
                "colours": base.Extra((3, 3), (), colours, {"space": "RGB"})}

    def init(self, part, key):
        return {"by": jnp.ones(())}

    def load(self, part, path, abstract):
        return {"by": jax.device_put(jnp.float32(path.rpartition("x")[2]))}, "a number"


class Nothing(base.Method):
    modes = ()


def of_brightness(path, **changes):
    return plain(config_of(path) | {"method": {"name": f"{__name__}:Brightness"},
                                    "init_from": {"*": "", "scale": "x0.5"}} | changes)


def test_any_method_says_what_is_stored(dataset, tmp_path):
    encoder = precompute.Encoder(of_brightness(dataset), batch_size=8)
    source = SourceConfig(path=str(dataset), validation_split="")
    folder = precompute.precompute(source, encoder, tmp_path, 2)
    config = config_of(folder, extra={"brightness": (3, 3), "colours": (3, 3)}, video=False)
    stored = clips_of(config)[0]
    pictures = clips_of(config_of(dataset))[0]
    for index, number in ((0, 0), (1, 2), (3, 6)):  # Of 7 steps; the last has no future.
        found, seen = stored[index], pictures[number]
        means = seen["video"].astype(np.float32)
        np.testing.assert_allclose(found["brightness"], 0.5 * means.mean((-3, -2, -1))
                                   * seen["frame_mask"], rtol=1e-3)
        np.testing.assert_allclose(found["colours"], means.mean((1, 2, 3)), rtol=1e-3)
    settings = stored.episodes.extra
    assert settings["brightness"]["weights"] and not settings["colours"]["weights"]
    assert settings["colours"]["space"] == "RGB" and settings["brightness"]["shape"] == [3, 3]


def test_arrays_are_chosen_by_name(dataset):
    config = of_brightness(dataset, init_from={})
    encoder = precompute.Encoder(config, 8, ["colours"])  # Which need no parameters.
    assert encoder.shapes == {"colours": (3, 3)}
    with pytest.raises(UserError, match="config.init_from.scale: nothing has scale/by"):
        precompute.Encoder(config, 8)
    with pytest.raises(UserError, match="--extra=color: Brightness .* Did you mean 'colours'"):
        precompute.Encoder(config, 8, ["color"])
    with pytest.raises(UserError, match="^Nothing has no arrays that can be stored"):
        precompute.Encoder(of_brightness(
            dataset, method={"name": f"{__name__}:Nothing"}), 8)


def test_the_command(dataset, tmp_path):
    command = [
        sys.executable, "-m", "jaxvp.tools.precompute", f"--config={ROOT}/configs/pretrain.py",
        f"--config.data.sources=({{'path': '{dataset}', 'validation_split': ''}},)",
        "--config.data.image_size=16", "--config.method.video.codec.patch=4", f"--out={tmp_path}"]
    run = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    name = Path(dataset).parent.name
    assert "data: {extra: {'latents': (4, 6, 4, 48)}, video: False}" in run.stdout
    assert rlds.Episodes(tmp_path / name, "train").extra["latents"]["stride"] == 4
    run = subprocess.run([*command, "--stride=0"], cwd=ROOT, text=True, capture_output=True)
    assert run.returncode == 1 and run.stderr.strip().startswith("error: flag --stride=0")


def test_the_codecs_weights_are_read_and_remembered(stored, tmp_path):
    arrays = dict(np.load(ROOT / "tests/golden/vae_2.1.npz"))
    arrays = {key: array for key, array in arrays.items() if "." in key}
    path = tmp_path / "vae.safetensors"
    streaming.write_file(path, {k: (a.shape, a.dtype) for k, a in arrays.items()}, arrays.get)
    codec = {"name": "wan", "version": "2.1", "width": 4, "decoder_width": 4}
    config = config_of(stored[0], window={"fps": 5.0, "future": 4, "chunk": 4}, image_size=32) | {
        "method": METHOD | {"video": METHOD["video"] | {"codec": codec}},
        "init_from": {"*": "", "video": "absent", "codec": str(path)}}
    encoder = precompute.Encoder(plain(config), batch_size=8)
    assert encoder.shapes == {"latents": (2, 6, 4, 16)} and encoder.settings["latents"]["weights"]
    clip = encoder.spec.empty()
    clip["video"][:], clip["view_mask"][:] = 90, True
    (found,) = encoder([clip])
    model = step.make_method(plain(config), dataclasses.replace(
        encoder.spec, action_size=1, state_size=1)).video_model
    params = {"codec": wan_vae.load(path, model.video_codec)[0]}
    expected = model.encode(params, {name: clip[name][None] for name in ("video", "view_mask")})
    np.testing.assert_allclose(found["latents"], expected[0], atol=2e-3)
    with pytest.raises(UserError, match="config.init_from.codec: nothing has codec/"):
        precompute.Encoder(plain(config | {"init_from": {"codec": ""}}), batch_size=8)

    # A run that has the codec is as good as its published weights.
    params = jax.jit(lambda: step.init_parts(model, ("video", "codec")))() | params
    checkpoints = checkpoint.Checkpoints(tmp_path / "run")
    state = {"params": params, "ema": {"video": params["video"]}, "opt_state": {"n": jnp.ones(1)}}
    checkpoints.save(1, state, data={}, assets={"config": {}})
    checkpoints.close()
    config["init_from"] = {"*": str(tmp_path / "run")}
    again = precompute.Encoder(plain(config), batch_size=8)
    assert again.settings == encoder.settings


def test_an_unreadable_picture_is_named(make_dataset, tmp_path):
    config = plain(config_of(make_dataset("bad", val_fraction=0.4, bad_frame=(1, 3))))
    encoder = precompute.Encoder(config, batch_size=8)
    with pytest.raises(ValueError, match="episode episode-1 from step 0: camera head, step 3.*"
                                         "Build the dataset again"):
        precompute.precompute(config.data.sources[0], encoder, tmp_path / "out", 3)
    assert not list((tmp_path / "out").glob("*/dataset_info.json"))


PROCESS = """
import sys, time
from jaxvp import distributed
address, rank, source, out, fault = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
from pathlib import Path
from jaxvp.tools import precompute
from test_precompute import config_of, plain
config = plain(config_of(source))
write, finish, sink = precompute._write, precompute._finish, precompute.ArrayRecordWriter

def recorded(path, options):
    print("partial", path)
    return sink(path, options)

def noted(target, *arguments):
    print("wrote", target.name)
    write(target, *arguments)
    while fault == "rank 1 while 0 works" and rank == 0:  # Ends if it is told.
        target.unlink()
        write(target, *arguments)
    if fault.startswith("rank 1") and rank == 1:
        time.sleep(2)
        raise OSError(28, "No space left on device", str(target))

def finishes(*arguments):
    if fault == "rank 0 while 1 waits":
        raise RuntimeError("a bug")
    finish(*arguments)

precompute.ArrayRecordWriter, precompute._write, precompute._finish = recorded, noted, finishes
with distributed.processes(address=address, num_processes=2, process_id=rank):
    encoder = precompute.Encoder(config, batch_size=8)
    stride = 2 if fault == "other flags" and rank == 1 else 3
    precompute.precompute(config.data.sources[0], encoder, Path(out), stride)
"""


@pytest.fixture
def two_processes(tmp_path):
    """two_processes(source, out, fault) -> [(exit status, output)] of process 0 and 1."""
    def run(source, out, fault=""):
        with socket.create_server(("", 0)) as server:
            address = f"localhost:{server.getsockname()[1]}"
        paths = [str(Path(__file__).parent), *sys.path]
        environment = os.environ | {
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2"),
            "PYTHONPATH": os.pathsep.join(paths)}
        processes = [subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(i), str(source), str(out), fault],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for i in (0, 1)]
        try:
            outputs = [process.communicate(timeout=90)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [(process.returncode, output)
                for process, output in zip(processes, outputs, strict=True)]
    return run


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A dataset of three files to train on and one to validate on."""
    from synthetic import write
    return write(tmp_path_factory.mktemp("many"), lengths=(5, 6, 7, 8) * 4, val_fraction=0.25)


def lines(output, word):
    return [line.split()[1] for line in output.splitlines() if line.startswith(word)]


def test_two_processes_share_the_files(many, two_processes, tmp_path):
    (first, one), (second, two) = two_processes(many, tmp_path / "two")
    assert (first, second) == (0, 0), one + two
    written = lines(one, "wrote"), lines(two, "wrote")
    assert len(written[0]) == len(written[1]) == 2 and not {*written[0]} & {*written[1]}
    partial = lines(one, "partial") + lines(two, "partial")
    assert len(set(partial)) == 4
    config = plain(config_of(many))
    alone = precompute.precompute(config.data.sources[0], precompute.Encoder(config, batch_size=8),
                                  tmp_path / "alone", 3)
    for path in alone.glob("*.array_record*"):
        assert path.name in written[0] + written[1]
        assert (tmp_path / "two" / alone.name / path.name).read_bytes() == path.read_bytes()
    assert rlds.splits(tmp_path / "two" / alone.name) == ("train", "val")


@pytest.mark.parametrize("fault, failing, message", [
    ("rank 1 while 0 works", 1, "No space left on device"),
    ("rank 1 while 0 waits", 1, "No space left on device"),
    ("rank 0 while 1 waits", 0, "RuntimeError: a bug"),
    ("other flags", 1, "start all processes with the same flags, on one shared --out"),
])
def test_a_process_that_fails_ends_the_other(many, two_processes, tmp_path, fault, failing,
                                             message):
    results = two_processes(many, tmp_path, fault)
    assert [status for status, _ in results] == [1, 1], results
    assert message in results[failing][1] and "is gone" not in results[failing][1]
    last = results[1 - failing][1].splitlines()[-1]
    assert f"error: Process {failing} is gone, so process {1 - failing} ends: " in last
    assert message in last and "Traceback" not in results[1 - failing][1]
    with pytest.raises(UserError, match="an unfinished build"):
        rlds.version_folder(tmp_path)


def test_sources_of_one_name_are_refused(make_dataset, tmp_path):
    paths = [make_dataset(f"{folder}/same").parent for folder in ("a", "b")]
    command = [
        sys.executable, "-m", "jaxvp.tools.precompute", f"--config={ROOT}/configs/pretrain.py",
        f"--config.data.sources=({{'path': '{paths[0]}'}}, {{'path': '{paths[1]}'}})",
        f"--out={tmp_path / 'out'}"]
    run = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert run.returncode == 1 and "Several sources are in folders named same" in run.stderr


def test_encoding_spreads_over_the_devices(stored):
    config = plain(config_of(stored[0]))
    with pytest.raises(ValueError, match=f"not a multiple of the {jax.device_count()} devices"):
        precompute.Encoder(config, batch_size=jax.device_count() + 1)
