"""Policy bundles: what is written is read, and damage is named."""

import json
import shutil

import jax
import numpy as np
import pytest
import toy_bundle

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


def edit(path, **changes):
    file = path / "policy.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))


def test_round_trip(written, loaded):
    assert loaded.manifest.method == "toy" and loaded.manifest.format_version == 1
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
    with pytest.raises(UserError, match="imagine.stablehlo is missing"):
        bundle.load(copy).imagine(observation, keys(2))


@pytest.mark.parametrize("changes, message", [
    ({"format_version": 2}, "format_version 2.*reads 1: upgrade jaxvp"),
    ({"format_version": "absent"}, "is damaged.*format_version"),
    ({"chunks": 4}, "chunks does not exist. Did you mean .*chunk"),
    ({"fps": "absent"}, "fps is missing"),
    ({"fps": "fast"}, "fps: expected float, found 'fast'"),
    ({"execution_horizon": 7}, "execution_horizon is in 1..chunk; found .* = 7"),
    ({"layout": "circle"}, "layout is one of single"),
    ({"cameras": ["head"]}, "one entry for each of the views .*left_wrist"),
    ({"image_orientation": "upside_down"}, "image_orientation is 'upright'"),
    ({"normalization": "none"}, "normalization must be one of"),
    ({"batch_size": 4}, "policy.json says"),
])
def test_wrong_manifest(copy, changes, message):
    edit(copy, **changes)
    with pytest.raises(ValueError, match=message):
        bundle.load(copy)


def test_not_json(copy):
    (copy / "policy.json").write_text('{"format_version": 1,')
    with pytest.raises(ValueError, match="policy.json is damaged"):
        bundle.load(copy)


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
    with pytest.raises(ValueError, match="act.stablehlo cannot be read.*written with jax"):
        bundle.load(copy)


def test_other_platform(copy):
    (copy / "act.stablehlo").write_bytes(toy_bundle.export(toy_bundle.act, platforms=("tpu",)))
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


def test_save_checks_the_manifest(tmp_path):
    with pytest.raises(ValueError, match="policy.json.stepp does not exist"):
        bundle.save(tmp_path / "new", toy_bundle.manifest(stepp=1), toy_bundle.PARAMS, b"")
    assert not (tmp_path / "new").exists()
