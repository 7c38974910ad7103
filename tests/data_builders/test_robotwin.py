"""RoboTwin 2.0 to RLDS and back: both layouts, next states, exchanged colours, texts, robots."""

import json

import h5py
import numpy as np
import pytest
import raw
import raw_hdf5

from data_builders.robotwin.robotwin import CAMERAS, Builder
from jaxvp.errors import UserError

TASK = "adjust_bottle"
SEEN = [f"Adjust the bottle, way {i}." for i in range(50)]


def targets(length, joints=6):
    """Drive targets: dimension d is d + step / 10; grippers close at step 6."""
    values = np.arange(2 * joints + 2) + np.arange(length)[:, None] / 10.0
    values[:, [joints, 2 * joints + 1]] = (np.arange(length) < 6)[:, None]
    return np.split(values, [joints, joints + 1, 2 * joints + 1], 1)


def write_legacy(folder, number=0, length=12, config="aloha-agilex_clean_50", joints=6,
                 texts=None, missing=(), frames=None):
    path = folder / TASK / config / "data" / f"episode{number}.hdf5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        names = ("left_arm", "left_gripper", "right_arm", "right_gripper")
        parts = targets(length, joints)
        for name, values in zip(names, parts, strict=True):
            file[f"joint_action/{name}"] = values[:, 0] if "gripper" in name else values
        file["joint_action/vector"] = np.concatenate(parts, 1)
        file["endpose/left_endpose"] = np.zeros((length, 7))
        file.create_group("pointcloud")
        for view, camera in enumerate(CAMERAS):
            group = file.create_group(f"observation/{CAMERAS[camera][0]}")
            group["intrinsic_cv"] = np.zeros((length, 3, 3))
            if camera not in missing:
                raw_hdf5.write_strings(
                    group, "rgb", raw_hdf5.jpegs(frames or length, view, swapped=True))
    path = folder / TASK / config / "instructions" / f"episode{number}.json"
    path.parent.mkdir(exist_ok=True)
    texts = {"seen": SEEN, "unseen": ["Never seen."]} if texts is None else texts
    path.write_text(json.dumps(texts))


def write_xpolicylab(folder, number=0, length=12, frequency=15):
    """As process_data_xpolicylab.py converts the other: state = [:-1], action = [1:]."""
    path = folder / "RoboTwin" / TASK / "aloha_agilex" / "data" / f"episode_{number:07d}.hdf5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs["source_format"] = "RoboTwin"
        text = h5py.string_dtype("utf-8")
        file.create_dataset("data_format_version", data="v1.0", dtype=text)
        file.create_dataset("instructions", data=json.dumps(SEEN), dtype=text)
        file["additional_info/frequency"] = np.int32(frequency)
        names = ("left_arm_joint_states", "left_ee_joint_states", "right_arm_joint_states",
                 "right_ee_joint_states")
        for name, values in zip(names, targets(length), strict=True):
            file[f"state/{name}"] = values[:-1].astype("f4")
            file[f"action/{name}"] = values[1:].astype("f4")
        for view, camera in enumerate(CAMERAS):
            group = file.create_group(f"vision/{CAMERAS[camera][1]}")
            raw_hdf5.write_strings(group, "colors", raw_hdf5.jpegs(length, view, swapped=True)[:-1])
            group["shape"] = np.array([48, 64, 3], np.int32)


def robotwin(folder, **options):
    return Builder(raw=str(folder), **{"image_size": 64, "val_fraction": 0.0} | options)


@pytest.mark.parametrize("write", [write_legacy, write_xpolicylab])
def test_both_layouts_are_read_back_as_clips(tmp_path, write):
    write(tmp_path / "raw")
    out, report = raw.convert(robotwin(tmp_path / "raw"), tmp_path / "out")
    assert (report.kept, report.steps, report.notes, report.unreadable) == (1, 11, {}, [])
    clips = raw.clips(out, tuple(CAMERAS), fps=250 / 30, frames=3, chunk=2)
    assert clips.episodes.fps[0] == pytest.approx(250 / 15)
    assert clips.episodes.text("dataset", 0) == "robotwin_agilex"
    clip = clips[4]
    assert [[raw.seen(image) for image in view] for view in clip["video"]] == [
        [(4 + 2 * k, view) for k in range(3)] for view in range(4)]
    state, action = (raw.physical(clips, clip, name) for name in ("state", "action"))
    joints = [i for i in range(14) if i not in (6, 13)]
    np.testing.assert_allclose(state[joints], np.array(joints) + 0.4, atol=1e-4)
    np.testing.assert_allclose(action[:, joints], np.array(joints) + [[0.5], [0.6]], atol=1e-4)
    np.testing.assert_allclose(state[[6, 13]], 1, atol=1e-4)
    np.testing.assert_allclose(action[:, [6, 13]], [[1, 1], [0, 0]], atol=1e-4)
    assert clips.episodes.units["action"][13] == "0 closed .. 1 open"
    (text,) = set(clips.episodes[0].instruction)
    assert text.decode() in SEEN


def test_every_file_name_is_accepted(tmp_path):
    for number in (2, 10):
        write_legacy(tmp_path, number)
    folder = tmp_path / TASK / "aloha-agilex_clean_50" / "data"
    (folder / "episode10.hdf5").rename(folder / "episode_0000010.hdf5")
    builder = robotwin(tmp_path)
    assert [item.split("/")[-1] for item in builder.items()] == [
        "episode2.hdf5", "episode_0000010.hdf5"]
    for item in builder.items():
        assert raw_hdf5.built(builder, item).instruction in SEEN


def test_robots_are_told_apart_by_their_folders(tmp_path):
    write_legacy(tmp_path, config="franka-panda_clean_50", joints=7)
    write_legacy(tmp_path, config="demo_clean")
    write_legacy(tmp_path, 1, config="aloha-agilex_randomized_500")
    assert [item.split("/")[1] for item in robotwin(tmp_path).items()] == [
        "aloha-agilex_randomized_500", "demo_clean"]
    franka = robotwin(tmp_path, robot="franka")
    made = raw_hdf5.built(franka)
    assert made.state.shape == (11, 16) and made.robot.startswith("two simulated Franka Panda")
    assert made.dataset == "robotwin_franka"
    (inside,) = robotwin(tmp_path / TASK / "franka-panda_clean_50", robot="franka").items()
    assert inside == "data/episode0.hdf5"
    with pytest.raises(UserError, match="no folder of --robot=ur5, but of agilex, franka"):
        robotwin(tmp_path, robot="ur5").items()


@pytest.mark.parametrize(("texts", "expected"), [
    ({"seen": ["a"], "unseen": ["b"]}, "b"), ({"instructions": ["c"]}, "c"),
    ({"instruction": "d"}, "d"), (["e"], "e"), ("f", "f")])
def test_forms_of_instructions(tmp_path, texts, expected):
    write_legacy(tmp_path, texts=texts)
    assert raw_hdf5.built(robotwin(tmp_path, instructions="unseen")).instruction == expected


def test_an_episode_without_instructions(tmp_path):
    for number in range(3):
        write_legacy(tmp_path / "raw", number)
    (tmp_path / "raw" / TASK / "aloha-agilex_clean_50/instructions/episode0.json").unlink()
    builder = robotwin(tmp_path / "raw")
    _, report = raw.convert(builder, tmp_path / "out")
    assert report.kept == 2 and report.skipped == {"no instruction": 1}
    first, *others = builder.items()
    assert len({raw_hdf5.built(builder, item).instruction for item in others}) == 2
    assert raw_hdf5.built(robotwin(tmp_path / "raw", unlabelled="keep"), first).instruction == ""


def test_files_say_at_which_rate_they_were_saved(tmp_path):
    write_xpolicylab(tmp_path, frequency=25)
    assert raw_hdf5.built(robotwin(tmp_path)).fps == 10


def test_cameras_that_were_not_collected_and_short_ones(tmp_path):
    write_legacy(tmp_path / "raw", missing=("front",), frames=10)
    made = raw_hdf5.built(robotwin(tmp_path / "raw"))
    assert list(made.images) == ["head", "left_wrist", "right_wrist"]
    assert raw_hdf5.seen(made.images["left_wrist"]) == [(step, 1) for step in range(9)]
    assert made.notes == ("cut: the head ended first",)
    with pytest.raises(ValueError, match="1 skipped: fewer than 4 views"):
        raw.convert(robotwin(tmp_path / "raw", min_views=4), tmp_path / "out")


def test_broken_files_are_named(tmp_path):
    for number in range(4):
        write_legacy(tmp_path / "raw", number)
    folder = tmp_path / "raw" / TASK / "aloha-agilex_clean_50" / "data"
    (folder / "episode0.hdf5").write_bytes(b"no HDF5")
    with h5py.File(folder / "episode1.hdf5", "a") as file:
        del file["joint_action/right_gripper"]
    with h5py.File(folder / "episode2.hdf5", "a") as file:
        frames = file["observation/left_camera/rgb"]
        frames[3] = frames[3][:100]
    _, report = raw.convert(robotwin(tmp_path / "raw"), tmp_path / "out")
    assert report.kept == 1
    damaged, missing, image = report.unreadable
    assert "episode0" in damaged["item"] and "OSError" in damaged["error"]
    assert "/joint_action/right_gripper is missing, found left_arm" in missing["error"]
    assert "/observation/left_camera/rgb[3]: 100 bytes are not a whole" in image["error"]


def test_a_wrong_folder_is_named(tmp_path):
    (tmp_path / "aloha-agilex_clean_50.zip").touch()
    with pytest.raises(UserError, match="has no .*episode.*found aloha-agilex.*zip"):
        robotwin(tmp_path).items()
