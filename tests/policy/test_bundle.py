"""Policy bundles: what is written is read, and damage is named."""

import errno
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_bundle
from etils import epath

from jaxvp.data import text_embeddings
from jaxvp.errors import UserError
from jaxvp.policy import bundle


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return toy_bundle.write(tmp_path_factory.mktemp("bundles") / "toy")


@pytest.fixture(scope="module")
def loaded(written):
    return bundle.load(written)


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def keys(rows):
    return np.arange(2 * rows, dtype=np.uint32).reshape(rows, 2)


def test_round_trip(written, loaded):
    assert loaded.manifest.method == "toy" and loaded.manifest.format_version == 2
    assert loaded.manifest.dimensions("action")[3] == "left_gripper [0 closed .. 1 open]"
    assert loaded.manifest.normalizer.mode == "min_max"
    np.testing.assert_array_equal(loaded.params["linear"]["w"], toy_bundle.PARAMS["linear"]["w"])
    assert sorted(p.name for p in written.iterdir()) == [
        "act.stablehlo", "imagine.stablehlo", "params", "policy.json"]


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_any_number_of_rows(loaded, rows):
    observation = toy_bundle.observation(rows)
    expected = jax.jit(toy_bundle.act)(toy_bundle.PARAMS, observation, keys(rows))
    found = loaded.act(observation, keys(rows))
    assert found.shape == (rows, toy_bundle.CHUNK, toy_bundle.SIZE) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_rows_do_not_depend_on_each_other(loaded):
    observation = toy_bundle.observation(5)
    together = loaded.act(observation, keys(5))
    row = jax.tree.map(lambda x: x[3:4], (observation, keys(5)))
    np.testing.assert_array_equal(loaded.act(*row)[0], together[3])


def test_imagine(loaded, copy):
    observation = toy_bundle.observation(2)
    video = loaded.imagine(observation, keys(2))
    np.testing.assert_array_equal(video[:, 2], observation["video"][:, 0, 0])
    (copy / "imagine.stablehlo").unlink()
    toy_bundle.edit(copy)
    with pytest.raises(UserError, match="exported without imagine.stablehlo"):
        bundle.load(copy).imagine(observation, keys(2))


@pytest.mark.parametrize("version, message", [
    (3, "format_version 3, this jaxvp reads 2: upgrade jaxvp"),
    (1, "format_version 1, this jaxvp reads 2: export the bundle again"),
    ("old", "format_version 'old', .*export the bundle again"),
])
def test_other_format(copy, version, message):
    file = copy / "policy.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": version}))
    with pytest.raises(UserError, match=message):
        bundle.load(copy)


@pytest.mark.parametrize("changes, message", [
    ({"chunks": 4}, "chunks does not exist. Did you mean .*chunk"),
    ({"fps": "fast"}, "fps: expected float, found 'fast'"),
    ({"execution_horizon": 7}, "execution_horizon is in 1..chunk; found .* = 7"),
    ({"layout": "circle"}, "layout is one of single"),
    ({"cameras": ["head"]}, "one entry for each of the views .*left_wrist"),
    ({"image_orientation": "upside_down"}, "image_orientation is 'upright'"),
    ({"normalization": "none"}, "normalization must be one of"),
    ({"batch_size": 4}, "policy.json says"),
])
def test_wrong_manifest(copy, changes, message):
    with pytest.raises(UserError, match=message):
        toy_bundle.edit(copy, **changes)
        bundle.load(copy)


@pytest.mark.parametrize("text", ['{"format_version": 2,', "[2]", "{}", '"text"'])
def test_not_a_policy(copy, text):
    (copy / "policy.json").write_text(text)
    with pytest.raises(UserError, match="policy.json is damaged"):
        bundle.load(copy)


def test_policy_json_may_be_formatted_anew(copy):
    file = copy / "policy.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(dict(sorted(values.items())), indent="\t", ensure_ascii=False))
    assert bundle.read_manifest(copy).method == "toy"


def changed(data: bytes, rng: np.random.Generator) -> bytes:
    """One random change: of a bit or a byte; something removed, inserted, doubled or zeroed."""
    where, size = int(rng.integers(len(data))), int(rng.integers(1, 9))
    head, part, tail = data[:where], data[where : where + size], data[where + size :]
    return [
        lambda: head + bytes([data[where] ^ 1 << rng.integers(8)]) + data[where + 1 :],
        lambda: head + rng.bytes(1) + data[where + 1 :],
        lambda: head + str(rng.integers(10)).encode() + data[where + 1 :],
        lambda: head + tail,
        lambda: head + part + part + tail,
        lambda: head + rng.bytes(size) + part + tail,
        lambda: head + bytes(len(part)) + tail,
        lambda: head,
    ][rng.integers(8)]()


def meaning(data: bytes):
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_no_random_change_is_accepted(tmp_path, monkeypatch):
    """Of any part: refused by name, before anything is read into jax. Where policy.json says the
    same as before, in other words, there is nothing to refuse."""
    folder = embedded(tmp_path)
    monkeypatch.setattr(bundle, "_Exported", None)  # A call would raise TypeError.
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {path.relative_to(folder).parts[0] for path in files} == {
        "policy.json", "act.stablehlo", "imagine.stablehlo", "params", "text_embeddings"}
    rng, refused = np.random.default_rng(0), 0
    for file in files:
        data = file.read_bytes()
        for _ in range(120 if file.name == "policy.json" else 15):
            other = changed(data, rng) if data else rng.bytes(1)
            if other == data or file.name == "policy.json" and meaning(other) == meaning(data):
                continue
            file.write_bytes(other)
            with pytest.raises(UserError, match=file.name):
                bundle.load(folder)
            refused += 1
        file.write_bytes(data)
        file.rename(file.with_name("renamed"))
        with pytest.raises(UserError, match=file.name):
            bundle.load(folder)
        file.with_name("renamed").rename(file)
    assert refused > 15 * len(files)


def test_what_nobody_exported(copy):
    (copy / "README.md").write_text("A policy.")  # Is not read.
    (copy / "params" / ".DS_Store").write_bytes(b"Mac")
    bundle.load(copy)
    (copy / "params" / "more").write_bytes(b"")
    with pytest.raises(UserError, match="params/more is none of the files that policy.json lists"):
        bundle.load(copy)


def embedded(tmp_path: Path) -> Path:
    """A toy bundle with every part that a bundle can have."""
    text_embeddings.add(tmp_path / "made", ["", "lift the tray"], "toy", 4,
                        lambda texts: [np.ones((3, 4), np.float32)] * len(texts))
    bundle.save(tmp_path / "embedded", toy_bundle.manifest(text_width=4), toy_bundle.PARAMS,
                toy_bundle.export(toy_bundle.act), toy_bundle.export(toy_bundle.imagine),
                tmp_path / "made")
    return tmp_path / "embedded"


@pytest.mark.parametrize("name", ["policy.json", "act.stablehlo", "params"])
def test_missing_part(copy, name):
    path = copy / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=name):
        bundle.load(copy)


def test_missing_bundle(tmp_path):
    with pytest.raises(UserError, match="not a policy bundle: .*jaxvp.export"):
        bundle.load(tmp_path / "nothing")


@pytest.mark.parametrize("data", [b"", b"garbage" * 100])
def test_damaged_function(copy, data):
    (copy / "act.stablehlo").write_bytes(data)
    toy_bundle.edit(copy)
    with pytest.raises(UserError, match="act.stablehlo cannot be read.*written with jax"):
        bundle.load(copy)


def test_other_platform(copy):
    (copy / "act.stablehlo").write_bytes(toy_bundle.export(toy_bundle.act, platforms=("tpu",)))
    toy_bundle.edit(copy)
    with pytest.raises(ValueError, match="exported for tpu, not for cpu"):
        bundle.load(copy)


def test_weights_of_another_model(tmp_path):
    params = {"linear": {"w": np.zeros((3, 3), np.float32)}}
    act = toy_bundle.export(toy_bundle.act)
    bundle.save(tmp_path / "other", toy_bundle.manifest(), params, act)
    with pytest.raises(ValueError, match="params does not hold the weights"):
        bundle.load(tmp_path / "other")


def test_save_never_overwrites(copy):
    with pytest.raises(UserError, match="is not empty"):
        bundle.save(copy, toy_bundle.manifest(), toy_bundle.PARAMS, b"")


def test_a_save_that_failed_is_not_in_the_way(tmp_path, monkeypatch):
    """Neither where it could clean up, nor where it was killed."""
    folder, act = tmp_path / "new", toy_bundle.export(toy_bundle.act)
    write = Path.write_bytes

    def full(path, data):
        write(path, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = folder, toy_bundle.manifest(), toy_bundle.PARAMS, act
    with monkeypatch.context() as patch, pytest.raises(OSError, match="act.stablehlo") as caught:
        patch.setattr(type(epath.Path(folder)), "write_bytes", full)
        bundle.save(*arguments)
    assert Path(caught.value.filename).name == "act.stablehlo"
    assert [path.name for path in folder.iterdir()] == [bundle.UNFINISHED]

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(type(epath.Path(folder)), "write_bytes", full)
        patch.setattr(bundle, "_clear", lambda path: None)  # As if killed.
        bundle.save(*arguments)
    assert {"params", "act.stablehlo"} < {path.name for path in folder.iterdir()}
    with pytest.raises(UserError, match="not a policy bundle"):
        bundle.load(folder)
    bundle.save(*arguments)
    assert {path.name for path in folder.iterdir()} == {"policy.json", "params", "act.stablehlo"}
    bundle.load(folder)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        bundle.claim(tmp_path)
    with pytest.raises(NotADirectoryError):
        bundle.claim(tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_save_checks_the_manifest(tmp_path):
    with pytest.raises(ValueError, match="policy.json.stepp does not exist"):
        bundle.save(tmp_path / "new", toy_bundle.manifest(stepp=1), toy_bundle.PARAMS, b"")
    assert not (tmp_path / "new").exists()
