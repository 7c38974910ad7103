"""RoboCasa to RLDS and back: robomimic's HDF5 and LeRobot, one meaning of state and action."""

import json
import shutil

import h5py
import numpy as np
import pytest
import raw
import raw_hdf5
import raw_lerobot

from data_builders.robocasa.robocasa import ACTION_NAMES, STATE_NAMES, Builder
from jaxvp.errors import UserError

CAMERAS = ("robot0_agentview_left", "robot0_agentview_right", "robot0_eye_in_hand")
TASK = "v0.1/single_stage/kitchen_pnp/PnPCounterToCab"
SIZES = {"robot0_base_pos": 3, "robot0_base_quat": 4, "robot0_base_to_eef_pos": 3,
         "robot0_base_to_eef_quat": 4, "robot0_gripper_qpos": 2}
MODALITY = {
    "state": {name: {"original_key": "observation.state", "start": start, "end": end}
              for name, start, end in (
                  ("base_position", 0, 3), ("base_rotation", 3, 7),
                  ("end_effector_position_relative", 7, 10),
                  ("end_effector_rotation_relative", 10, 14), ("gripper_qpos", 14, 16))},
    "action": {name: {"original_key": "action", "start": start, "end": end}
               for name, start, end in (
                   ("base_motion", 0, 4), ("control_mode", 4, 5), ("end_effector_position", 5, 8),
                   ("end_effector_rotation", 8, 11), ("gripper_close", 11, 12))},
    "video": {name: {"original_key": f"observation.images.{name}"} for name in CAMERAS},
}


def columns(length):
    """(states, actions) in the order of v0. The gripper closes, 1, at step 6, when the arm stops
    and the base moves."""
    steps = np.arange(length)[:, None]
    states = np.arange(16) + steps / 10
    actions = np.zeros((length, 12))
    actions[:, :6] = np.where(steps < 6, 0.1 * np.arange(1, 7), 0)
    actions[:, 6] = np.where(steps[:, 0] < 6, -1, 1)
    actions[:, 7:11] = np.where(steps < 6, 0, [0.5, 0.25, -0.5, 0])
    actions[:, 11] = np.where(steps[:, 0] < 6, -1, 1)
    return states, actions


def write_hdf5(folder, name="demo_gentex_im128_randcams.hdf5", lengths=(12,), images=True):
    """A file with the demonstrations demo_0, demo_1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / name, "w") as file:
        file.create_group("data").attrs.update({"env_args": "{}", "total": sum(lengths)})
        file["mask/25_demos"] = np.array([b"demo_0"])
        for i, length in enumerate(lengths):
            demo = file.create_group(f"data/demo_{i}")
            demo.attrs.update({"num_samples": length, "model_file": "<mujoco/>", "ep_meta":
                               json.dumps({"lang": f"pick the apple {i} ", "layout_id": 3})})
            states, demo["actions"] = columns(length)
            demo["states"], demo["dones"] = np.zeros((length, 50)), np.zeros(length)
            if not images:
                continue
            for key, part in zip(SIZES, np.split(states, np.cumsum([*SIZES.values()])[:-1], 1),
                                 strict=True):
                demo[f"obs/{key}"] = part
            for view, camera in enumerate(CAMERAS):
                demo[f"obs/{camera}_image"] = np.stack(
                    [raw.picture(step, view) for step in range(length)])


EPISODE = raw_lerobot.Episode(12, task=1)


def write_lerobot(folder, episodes=(EPISODE,)):
    """v1.0: the same numbers in the order of modality.json."""
    vector = {"dtype": "float64", "names": None}
    features = {f"observation.images.{camera}": {
        "dtype": "video", "shape": [48, 64, 3], "names": ["height", "width", "channel"]}
        for camera in CAMERAS}
    features |= {"observation.state": vector | {"shape": [16]}, "action": vector | {"shape": [12]},
                 "timestamp": raw_lerobot.FEATURES["timestamp"]}
    features |= {name: raw_lerobot.FEATURES[name] for name in raw_lerobot.COUNTERS}

    def made(number, length):
        states, actions = columns(length)
        arm, gripper, base, mode = np.split(actions, [6, 7, 11], 1)
        return {"observation.state": states,
                "action": np.concatenate([base, mode, arm, gripper], 1)}

    raw_lerobot.write(folder, "v2.1", episodes, features=features, columns=made, fps=20)
    (folder / "meta" / "modality.json").write_text(json.dumps(MODALITY))


def robocasa(folder, **options):
    return Builder(raw=str(folder), **{"image_size": 64, "val_fraction": 0.0} | options)


@pytest.mark.parametrize("form", ["hdf5", "lerobot"])
def test_both_forms_are_read_back_as_clips(tmp_path, form):
    folder = tmp_path / "raw" / TASK / "2024-04-24"
    if form == "hdf5":
        write_hdf5(folder)
    else:
        write_lerobot(folder / "lerobot")
    out, report = raw.convert(robocasa(tmp_path / "raw"), tmp_path / "out")
    assert (report.kept, report.steps, report.notes, report.unreadable) == (1, 12, {}, [])
    clips = raw.clips(out, CAMERAS, fps=10, frames=3, chunk=2)
    assert clips.episodes.fps[0] == 20 and clips.episodes.robots() == (
        "mobile Panda arm of RoboCasa, end-effector deltas",)
    assert clips.episodes.names["action"][6] == "gripper"
    assert clips.episodes.units["action"][:3] == ("0.05 m",) * 3
    clip = clips[5]
    assert [[raw.seen(image) for image in view] for view in clip["video"]] == [
        [(5 + 2 * k, view) for k in range(3)] for view in range(3)]
    state, action = (raw.physical(clips, clip, name) for name in ("state", "action"))
    np.testing.assert_allclose(state, np.arange(16) + 0.5, atol=1e-4)
    np.testing.assert_allclose(action, [
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1, 0, 0, 0, 0, -1],
        [0, 0, 0, 0, 0, 0, 0, 0.5, 0.25, -0.5, 0, 1]], atol=1e-4)
    (text,) = set(clips.episodes[0].instruction)
    assert text.decode() == ("pick the apple 0" if form == "hdf5" else raw_lerobot.TASKS[1])


def test_names_fit_the_dimensions():
    assert len(STATE_NAMES) == 16 and len(ACTION_NAMES) == 12


def test_all_demonstrations_of_all_files_are_items(tmp_path):
    write_hdf5(tmp_path / TASK, lengths=[3] * 11)
    write_hdf5(tmp_path / TASK, "demo.hdf5", lengths=[3] * 11, images=False)  # The same, no images.
    write_lerobot(tmp_path / "v1.0" / "lerobot", [raw_lerobot.Episode(4)] * 2)
    builder = robocasa(tmp_path)
    items = builder.items()
    assert items[0] == (f"{TASK}/demo.hdf5", None)
    assert items[10:] == [(f"{TASK}/demo_gentex_im128_randcams.hdf5", "demo_9"),
                          (f"{TASK}/demo_gentex_im128_randcams.hdf5", "demo_10"),
                          ("v1.0/lerobot", 0), ("v1.0/lerobot", 1)]
    assert builder.episode_id(items[-1]) == "v1.0/lerobot/1"
    assert robocasa(tmp_path / "v1.0" / "lerobot").items() == [(".", 0), (".", 1)]
    raw_hdf5.built(robocasa(tmp_path / "v1.0" / "lerobot"), (".", 1))


def test_changes_add_up_at_a_lower_rate_and_still_steps_can_go(tmp_path):
    write_hdf5(tmp_path)
    made = raw_hdf5.built(robocasa(tmp_path, fps=10.0))
    assert raw_hdf5.seen(made.images[CAMERAS[1]]) == [(step, 1) for step in range(0, 12, 2)]
    np.testing.assert_allclose(made.action[1], [
        0.2, 0.4, 0.6, 0.8, 1, 1.2, 1, 0, 0, 0, 0, -1])
    np.testing.assert_allclose(made.action[4], [0] * 6 + [0, 1, 0.5, -1, 0, 1])
    with h5py.File(tmp_path / "demo_gentex_im128_randcams.hdf5", "a") as file:
        actions = file["data/demo_0/actions"]
        actions[2:4, :6] = 0
    kept = raw_hdf5.built(robocasa(tmp_path, noops="drop"))
    assert [step for step, _ in raw_hdf5.seen(kept.images[CAMERAS[0]])] == [0, 1, *range(4, 12)]


def test_a_video_that_ends_early_and_one_that_is_missing(tmp_path):
    camera = "robot0_agentview_left"
    episodes = [raw_lerobot.Episode(12, frames={camera: 8}),
                raw_lerobot.Episode(12, frames={camera: 0}),
                raw_lerobot.Episode(12, frames={camera: 3})]
    write_lerobot(tmp_path / "raw" / "lerobot", episodes)
    builder = robocasa(tmp_path / "raw")
    short, blind, _ = builder.items()
    assert raw_hdf5.built(builder, short).state.shape == (8, 16)
    made = raw_hdf5.built(builder, blind)
    assert list(made.images) == list(CAMERAS[1:])
    assert made.camera_text == "a right view, a wrist view"
    _, report = raw.convert(builder, tmp_path / "out")
    assert report.kept == 2 and report.notes == {"cut: the robot0_agentview_left ended first": 1}
    (entry,) = report.unreadable
    assert entry["item"] == "('lerobot', 2)" and "lengths do not fit" in entry["error"]


def test_demonstrations_without_text(tmp_path):
    write_hdf5(tmp_path / "raw", lengths=(4, 5))
    with h5py.File(tmp_path / "raw" / "demo_gentex_im128_randcams.hdf5", "a") as file:
        del file["data/demo_0"].attrs["ep_meta"]
    _, report = raw.convert(robocasa(tmp_path / "raw"), tmp_path / "out")
    assert report.kept == 1 and report.skipped == {"no instruction": 1}


def test_broken_demonstrations_are_named(tmp_path):
    write_hdf5(tmp_path / "raw", lengths=(4, 5, 6))
    with h5py.File(tmp_path / "raw" / "demo_gentex_im128_randcams.hdf5", "a") as file:
        del file["data/demo_0/obs/robot0_base_quat"]
        del file["data/demo_1/actions"]
        file["data/demo_1/actions"] = np.zeros((5, 7))
    _, report = raw.convert(robocasa(tmp_path / "raw"), tmp_path / "out")
    assert report.kept == 1
    missing, narrow = report.unreadable
    assert "demo_0" in missing["item"] and "/obs/robot0_base_quat is missing" in missing["error"]
    assert "actions must have 12 columns, found (5, 7)" in narrow["error"]


def test_files_that_cannot_be_read_or_have_no_images_are_counted(tmp_path):
    root = tmp_path / "raw"
    write_hdf5(root / "a")
    for name in ("b", "c"):
        write_hdf5(root / name, "demo.hdf5")
    write_hdf5(root / "d", "demo.hdf5", images=False)
    write_lerobot(root / "e" / "lerobot")
    (root / "b" / "demo.hdf5").write_bytes(b"no HDF5")
    with h5py.File(root / "c" / "demo.hdf5", "a") as file:
        del file["data"]
    (root / "e" / "lerobot" / "meta" / "episodes.jsonl").write_text("{")
    _, report = raw.convert(robocasa(root), tmp_path / "out")
    assert report.kept == 1 and report.items == 5
    assert report.skipped == {"no images: RoboCasa's dataset_states_to_obs.py renders them": 1}
    errors = {entry["item"][:4]: entry["error"] for entry in report.unreadable}
    assert "file signature not found" in errors["('b/"]
    assert "demo.hdf5: the group data/demo_0 is missing" in errors["('c/"]
    assert "episodes.jsonl is not JSON lines" in errors["('e/"]


def test_a_wrong_folder_is_named(tmp_path):
    (tmp_path / "a.tar").touch()
    with pytest.raises(UserError, match="has no .*hdf5 or .*info.json, found a.tar"):
        robocasa(tmp_path).items()
    write_lerobot(tmp_path / "lerobot")
    shutil.move(tmp_path / "lerobot" / "meta" / "modality.json", tmp_path)
    with pytest.raises(ValueError, match="no vector 'state.base_position'"):
        raw_hdf5.built(robocasa(tmp_path))
