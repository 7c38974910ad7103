"""Policy bundles: what is written is read, and damage is named."""

import errno
import json
import re
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
    assert loaded.manifest.method == "toy" and loaded.manifest.format_version == 3
    assert loaded.manifest.dimensions("action")[3] == "left_gripper [0 closed .. 1 open]"
    assert loaded.manifest.normalizer.mode == "min_max"
    np.testing.assert_array_equal(loaded.params["linear"]["w"], toy_bundle.PARAMS["linear"]["w"])
    assert sorted(p.name for p in written.iterdir()) == [
        "observation-action+video.stablehlo", "observation-action.stablehlo",
        "observation-video.stablehlo", "params", "policy.json"]


@pytest.mark.parametrize("wanted", [("action",), ("video",), ("video", "action")])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_any_number_of_rows_in_every_mode(loaded, rows, wanted):
    given, carry = toy_bundle.observation(rows), loaded.initial_carry(rows)
    expected, after = jax.jit(toy_bundle.predict, static_argnums=4)(
        toy_bundle.PARAMS, given, keys(rows), carry, wanted)
    found, carry = loaded.predict(given, keys(rows), wanted, carry)
    assert found.keys() == set(wanted)
    for name, value in found.items():
        assert isinstance(value, np.ndarray) and value.dtype == expected[name].dtype
        np.testing.assert_allclose(value, expected[name], atol=1e-6)
    np.testing.assert_array_equal(carry["calls"], after["calls"])


def test_rows_do_not_depend_on_each_other(loaded):
    arguments = toy_bundle.observation(5), keys(5)
    together, carry = loaded.predict(*arguments, ("action",), loaded.initial_carry(5))
    row = jax.tree.map(lambda x: x[3:4], (*arguments, carry))
    alone, first = loaded.predict(*row[:2], ("action",), loaded.initial_carry(1))
    np.testing.assert_array_equal(alone["action"][0], together["action"][3])
    np.testing.assert_array_equal(first["calls"], row[2]["calls"])


def test_the_carry_is_handed_back(loaded):
    arguments, carry = (toy_bundle.observation(2), keys(2), ("action",)), loaded.initial_carry(2)
    assert carry["calls"].shape == (2, 1) and not carry["calls"].any()
    first, carry = loaded.predict(*arguments, carry)
    second, carry = loaded.predict(*arguments, carry)
    np.testing.assert_allclose(second["action"], first["action"] / 2, atol=1e-6)


@pytest.mark.parametrize("wanted, changes, message", [
    (("flow",), {}, "no function that predicts flow; it has observation-action.stablehlo, "),
    (("action",), {"state": np.zeros((2, 7), np.float32)},
     r"observation-action.stablehlo is given other arrays: "
     r"state is float32\[B, 7\], not float32\[B, 1, 8\]"),
    (("video",), {"depth": np.zeros((2, 1))}, "depth is float64.*, not absent"),
])
def test_what_no_mode_predicts(loaded, wanted, changes, message):
    with pytest.raises(UserError, match=message):
        loaded.predict(toy_bundle.observation(2) | changes, keys(2), wanted,
                       loaded.initial_carry(2))


def test_a_mode_whose_function_is_absent(copy):
    (copy / "observation-video.stablehlo").unlink()
    toy_bundle.edit(copy)
    with pytest.raises(UserError, match="lists a mode, but no file observation-video.stablehlo"):
        bundle.load(copy)
    toy_bundle.edit(copy, modes=[toy_bundle.ACT, toy_bundle.BOTH])
    assert bundle.load(copy).manifest.acting == toy_bundle.ACT


def test_the_least_that_acts_is_what_a_policy_acts_by(copy):
    toy_bundle.edit(copy, modes=[toy_bundle.BOTH, toy_bundle.IMAGINE, toy_bundle.ACT])
    assert bundle.read_manifest(copy).acting == toy_bundle.ACT
    (copy / "observation-action.stablehlo").unlink()
    toy_bundle.edit(copy, modes=[toy_bundle.BOTH, toy_bundle.IMAGINE])
    assert bundle.load(copy).manifest.acting == toy_bundle.BOTH


def test_functions_of_different_weights(copy):
    def other(params, given, keys, carry):
        return toy_bundle.predict(params | {"linear": {"w": params["linear"]["w"][:8]}}, given,
                                  keys, carry, ("video",))

    params = {"linear": {"w": np.zeros((9, 8), np.float32)}}
    made = jax.export.export(jax.jit(other))(params, *toy_bundle.arguments())
    (copy / "observation-video.stablehlo").write_bytes(made.serialize())
    toy_bundle.edit(copy)
    loaded = bundle.load(copy)
    with pytest.raises(UserError, match="observation-video.stablehlo takes other weights"):
        loaded.predict(toy_bundle.observation(1), keys(1), ("video",), loaded.initial_carry(1))


@pytest.mark.parametrize("change", [
    lambda outputs, carry: (outputs, {}), lambda outputs, carry: (outputs["action"], carry),
    lambda outputs, carry: ({**outputs, "more": carry["calls"]}, carry),
    lambda outputs, carry: ({"action": outputs["action"][:, :3]}, carry),
    lambda outputs, carry: outputs])
def test_a_function_of_other_outputs(copy, change):
    made = toy_bundle.export(
        lambda *arguments: change(*toy_bundle.predict(*arguments, ("action",))), ("cpu",))
    (copy / "observation-action.stablehlo").write_bytes(made)
    toy_bundle.edit(copy)
    with pytest.raises(UserError, match="observation-action.stablehlo gives .*export again"):
        bundle.load(copy)


@pytest.mark.parametrize("version, message", [
    (4, "format_version 4, this jaxvp reads 3: upgrade jaxvp"),
    (2, "format_version 2, this jaxvp reads 3: export the bundle again"),
    ("old", "format_version 'old', .*export the bundle again"),
])
def test_other_format(copy, version, message):
    file = copy / "policy.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": version}))
    with pytest.raises(UserError, match=message):
        bundle.load(copy)


@pytest.mark.parametrize("changes, message", [
    ({"mods": 4}, "mods does not exist. Did you mean .*modes"),
    ({"spec": {"window": {}}}, "policy.json.spec.cameras is missing"),
    ({"spec": toy_bundle.spec(text_length=8) | {"text_length": 0}}, "expected int >= 1, found 0"),
    ({"spec": toy_bundle.spec(cameras=("head",))}, "spec.cameras is .'head', 'left_wrist'"),
    ({"spec": toy_bundle.spec(action_size=7)}, "spec.action_size is at least the number of act"),
    ({"spec": toy_bundle.window(fps=30.0)}, "fps is at least that of the window, 30.0; found .*10"),
    ({"modes": [toy_bundle.IMAGINE]}, "modes has one that predicts an action of an observation"),
    ({"modes": [toy_bundle.ACT, [["depth"], ["action"]]]}, "modes gives observations and arrays"),
    ({"fps": "fast"}, "fps: expected float, found 'fast'"),
    ({"execution_horizon": 7}, "execution_horizon is in 1..6; found .* = 7"),
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


@pytest.mark.parametrize("text", ['{"format_version": 3,', "[2]", "{}", '"text"'])
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
        "policy.json", *map(bundle.function_name, (toy_bundle.ACT, toy_bundle.BOTH)), "params",
        "text_embeddings"}
    rng, refused = np.random.default_rng(0), 0
    for file in files:
        data = file.read_bytes()
        for _ in range(120 if file.name == "policy.json" else 15):
            other = changed(data, rng) if data else rng.bytes(1)
            if other == data or file.name == "policy.json" and meaning(other) == meaning(data):
                continue
            file.write_bytes(other)
            with pytest.raises(UserError, match=re.escape(file.name)):
                bundle.load(folder)
            refused += 1
        file.write_bytes(data)
        file.rename(file.with_name("renamed"))
        with pytest.raises(UserError, match=re.escape(file.name)):
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
    functions = {mode: b"a function" for mode in (toy_bundle.ACT, toy_bundle.BOTH)}
    bundle.save(tmp_path / "embedded", toy_bundle.manifest(spec=toy_bundle.spec(text_width=4)),
                toy_bundle.PARAMS, functions, tmp_path / "made")
    return tmp_path / "embedded"


@pytest.mark.parametrize("name", ["policy.json", "observation-action.stablehlo", "params"])
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
    (copy / "observation-action.stablehlo").write_bytes(data)
    toy_bundle.edit(copy)
    with pytest.raises(UserError, match="-action.stablehlo cannot be read.*written with jax"):
        bundle.load(copy)


def test_other_platform(copy):
    made = toy_bundle.export(toy_bundle.function(toy_bundle.ACT), ("tpu",))
    (copy / "observation-action.stablehlo").write_bytes(made)
    toy_bundle.edit(copy)
    with pytest.raises(ValueError, match="exported for tpu, not for cpu"):
        bundle.load(copy)


def test_weights_of_another_model(tmp_path):
    params = {"linear": {"w": np.zeros((3, 3), np.float32)}}
    bundle.save(tmp_path / "other", toy_bundle.manifest(), params, toy_bundle.functions())
    with pytest.raises(ValueError, match="params does not hold the weights"):
        bundle.load(tmp_path / "other")


def test_save_never_overwrites(copy):
    with pytest.raises(UserError, match="is not empty"):
        bundle.save(copy, toy_bundle.manifest(), toy_bundle.PARAMS, {toy_bundle.ACT: b""})


def test_a_save_that_failed_is_not_in_the_way(tmp_path, monkeypatch):
    """Neither where it could clean up, nor where it was killed."""
    folder, functions = tmp_path / "new", {toy_bundle.ACT: toy_bundle.functions()[toy_bundle.ACT]}
    write = Path.write_bytes

    def full(path, data):
        write(path, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = folder, toy_bundle.manifest(), toy_bundle.PARAMS, functions
    with monkeypatch.context() as patch, pytest.raises(OSError, match="action.stablehlo") as caught:
        patch.setattr(type(epath.Path(folder)), "write_bytes", full)
        bundle.save(*arguments)
    assert Path(caught.value.filename).name == "observation-action.stablehlo"
    assert [path.name for path in folder.iterdir()] == [bundle.UNFINISHED]

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(type(epath.Path(folder)), "write_bytes", full)
        patch.setattr(bundle, "_clear", lambda path: None)  # As if killed.
        bundle.save(*arguments)
    assert {"params", "observation-action.stablehlo"} < {path.name for path in folder.iterdir()}
    with pytest.raises(UserError, match="not a policy bundle"):
        bundle.load(folder)
    bundle.save(*arguments)
    assert {path.name for path in folder.iterdir()} == {
        "policy.json", "params", "observation-action.stablehlo"}
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
        bundle.save(tmp_path / "new", toy_bundle.manifest(stepp=1), toy_bundle.PARAMS,
                    {toy_bundle.ACT: b""})
    assert not (tmp_path / "new").exists()
