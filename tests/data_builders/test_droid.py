"""DROID as recorded: units, gripper, cameras by serial number, annotations, short videos."""

import dataclasses
import json
import shutil

import h5py
import numpy as np
import pytest
import raw

from data_builders.droid.droid import ACTION, STATE, Builder, annotations
from data_builders.droid.droid import CAMERAS as CAMERA_TEXTS
from data_builders.open_x import open_x
from data_builders.open_x.datasets import DATASETS
from jaxvp.data.text import ByteTokenizer
from jaxvp.errors import UserError

FIRST = "AUTOLab/success/2023-08-18/Fri_Aug_18_12:00:11_2023"
SECOND = "IRIS/success/2023-11-28/Tue_Nov_28_08:46:19_2023"
FAILURE = "AUTOLab/failure/2023-08-18/Fri_Aug_18_12:04:40_2023"
NUMBERS = {FIRST: "AUTOLab+84bd5053+2023-08-18-12h-00m-11s",
           SECOND: "IRIS+ef107c48+2023-11-28-08h-46m-19s",
           FAILURE: "AUTOLab+84bd5053+2023-08-18-12h-04m-40s"}
CAMERAS = {"24400334": 1, "18026681": 0, "22008760": 1}  # 0 is the wrist.
ANNOTATIONS = {
    NUMBERS[FIRST]: {"language_instruction1": "", "language_instruction2": "Put the marker\nin it",
                     "language_instruction3": "Move the marker"},
    NUMBERS[SECOND]: {"language_instruction1": "Close the drawer", "language_instruction2": "",
                      "language_instruction3": ""},
    NUMBERS[FAILURE]: {"language_instruction1": "Fail", "language_instruction2": "",
                       "language_instruction3": ""}}


def columns(length):
    """Velocities as shares of the largest, and the gripper's command, 1 when it is closed; the
    steps 3, 4 and 5 are still."""
    step = np.arange(length)
    velocity = np.stack([0.02 * (step + 1), -0.5 + 0 * step, 0 * step,
                         0.04 * (step + 1), 0 * step, 0.1 + 0 * step], axis=1)
    velocity[3:6] = 0
    return velocity, np.where(step < 7, 0.0, 1.0)


def write(root, folder, length=12, frames=None):
    """One episode; `frames` of single cameras where they differ from `length`."""
    path = root / folder
    path.mkdir(parents=True)
    velocity, gripper = columns(length)
    step = np.arange(length)[:, None]
    with h5py.File(path / "trajectory.h5", "w") as file:
        file["action/cartesian_velocity"] = velocity
        file["action/cartesian_position"] = 9 + velocity
        file["action/gripper_position"] = gripper
        file["action/gripper_velocity"] = np.zeros(length)
        file["action/joint_position"] = file["action/joint_velocity"] = np.zeros((length, 7))
        state = file.create_group("observation/robot_state")
        state["cartesian_position"] = np.arange(6) + 0.01 * step
        state["gripper_position"] = np.linspace(0.2, 0.8, length)
        state["joint_positions"] = np.zeros((length, 7))
        file["observation/controller_info/movement_enabled"] = np.ones(length, bool)
        for serial, kind in CAMERAS.items():
            file[f"observation/camera_type/{serial}"] = np.full(length, kind)
            file[f"observation/camera_extrinsics/{serial}_left"] = np.zeros((length, 6))
        file.attrs.update({"success": "success" in folder, "current_task": "Do anything"})
    metadata = {"uuid": NUMBERS[folder], "trajectory_length": length, "ext1_cam_serial": "22008760",
                "ext2_cam_serial": "24400334", "wrist_cam_serial": "18026681"}
    (path / f"metadata_{NUMBERS[folder]}.json").write_text(json.dumps(metadata))
    for view, serial in enumerate(sorted(CAMERAS)):
        count = (frames or {}).get(serial, length)
        pictures = [raw.picture(k, view) for k in range(count)]
        mp4 = path / "recordings" / "MP4"
        raw.write_video(mp4 / f"{serial}.mp4", pictures, 60)
        stereo = [np.concatenate([picture, picture[:, ::-1]], axis=1) for picture in pictures[:2]]
        raw.write_video(mp4 / f"{serial}-stereo.mp4", stereo, 60)


@pytest.fixture
def builder(tmp_path):
    root = tmp_path / "raw"
    write(root, FIRST)
    (root / "aggregated-annotations-030724.json").write_text(json.dumps(ANNOTATIONS))
    return Builder(raw=str(root), image_size=64, val_fraction=0.0)


def expected(steps):
    """Actions in metres, radians and openness."""
    velocity, gripper = columns(12)
    scaled = np.concatenate([0.075 * velocity[:, :3], 0.15 * velocity[:, 3:]], axis=1)
    return np.concatenate([scaled, 1 - gripper[:, None]], axis=1)[steps]


def test_an_episode_keeps_its_views_and_gets_units(builder, tmp_path):
    folder, report = raw.convert(builder, tmp_path / "out")
    assert (report.kept, report.steps, report.notes) == (1, 12, {})
    clips = raw.clips(folder, ("agentview", "side", "wrist"), fps=15)
    clip = clips[6]
    # Serial numbers in ascending order are wrist, first and second exterior camera.
    for view, shown in ((0, 1), (1, 2), (2, 0)):
        assert [raw.seen(frame) for frame in clip["video"][view]] == [
            (6 + k, shown) for k in range(4)]
    actions = raw.physical(clips, clip, "action")
    np.testing.assert_allclose(actions, expected([6, 7, 8]), atol=1e-6)
    assert actions[:, 6].round(6).tolist() == [1, 0, 0]  # 1 is open, then it closes.
    state = raw.physical(clips, clip, "state")
    openness = 1 - (0.2 + 0.6 * 6 / 11)
    np.testing.assert_allclose(state, [*(np.arange(6) + 0.06), openness], atol=1e-5)
    episodes = clips.episodes
    assert episodes.robots() == (DATASETS["droid"].robot,)
    assert episodes.fps.tolist() == [15] and episodes.has_action.all()
    assert episodes.names["action"][:4] == ("dx", "dy", "dz", "droll")
    assert episodes.units["action"] == (*["m"] * 3, *["rad"] * 3, "0 closed .. 1 open")
    assert episodes.text("camera_layout", 0) == "agentview,side,wrist"
    assert episodes.text("episode_id", 0) == NUMBERS[FIRST]
    text = ByteTokenizer(256).decode(clip["text"])
    assert text.endswith("a third-person view, a view from the side, a wrist view; "
                         "Put the marker in it")


def test_names_are_those_of_the_rlds_release():
    """Statistics are kept by robot, whichever form its episodes have."""
    entry = DATASETS["droid"]
    assert (open_x.names(entry.state), open_x.names(entry.action)) == (STATE, ACTION)
    assert list(entry.cameras) == list(CAMERA_TEXTS)


def test_motion_adds_up_over_steps_that_are_left_out(builder, tmp_path):
    slow = dataclasses.replace(builder, fps=5.0, cameras=("wrist",))
    folder, _ = raw.convert(slow, tmp_path / "out")
    clips = raw.clips(folder, ("wrist",), fps=5, frames=2, chunk=4)
    assert [raw.seen(frame) for frame in clips[1]["video"][0]] == [(3, 0), (6, 0)]
    actions = raw.physical(clips, clips[0], "action")
    parts = [expected(slice(start, start + 3)) for start in (0, 3, 6, 9)]
    np.testing.assert_allclose(actions[:, :6], [part[:, :6].sum(0) for part in parts], atol=1e-6)
    np.testing.assert_allclose(actions[:, 6], [part[-1, 6] for part in parts], atol=1e-6)
    assert clips.episodes.text("camera_text", 0) == "a wrist view"


def test_steps_without_motion_can_be_left_out(builder, tmp_path):
    folder, _ = raw.convert(dataclasses.replace(builder, noops="drop"), tmp_path / "out")
    clips = raw.clips(folder, ("wrist",), fps=15, chunk=9)
    assert [raw.seen(frame)[0] for frame in clips[1]["video"][0]] == [1, 2, 6, 7]
    actions = raw.physical(clips, clips[0], "action")
    np.testing.assert_allclose(actions, expected([0, 1, 2, 6, 7, 8, 9, 10, 11]), atol=1e-6)


def test_failures_follow_their_folder(builder, tmp_path):
    write(tmp_path / "raw", FAILURE)
    write(tmp_path / "raw", SECOND)
    assert builder.items() == [FAILURE, FIRST, SECOND]
    _, report = raw.convert(builder, tmp_path / "out")
    assert report.kept == 2 and report.skipped == {"not successful": 1}
    keep = dataclasses.replace(builder, failed="keep")
    assert raw.convert(keep, tmp_path / "all")[1].kept == 3
    made = {item: next(keep.build(item)) for item in keep.items()}
    assert not made[FAILURE].success and made[FIRST].success and made[SECOND].success
    assert made[SECOND].instruction == "Close the drawer"


def test_episodes_without_annotations_are_left_out(builder, tmp_path):
    write(tmp_path / "raw", SECOND)
    file = tmp_path / "raw" / "aggregated-annotations-041124.json"  # The later one counts.
    file.write_text(json.dumps({NUMBERS[SECOND]: ANNOTATIONS[NUMBERS[SECOND]]}))
    _, report = raw.convert(builder, tmp_path / "out")
    assert report.kept == 1 and report.skipped == {"no instruction": 1}


def test_without_any_annotations(tmp_path):
    write(tmp_path / "raw", FIRST)
    builder = Builder(raw=str(tmp_path / "raw"), image_size=16)
    with pytest.raises(UserError, match="no .*aggregated-annotations-030724.json"):
        builder.items()
    (item,) = (keep := dataclasses.replace(builder, unlabelled="keep")).items()
    assert next(keep.build(item)).instruction == ""


def test_video_that_ends_early_cuts_the_episode(builder, tmp_path):
    write(tmp_path / "raw", SECOND, frames={"24400334": 11})
    _, report = raw.convert(builder, tmp_path / "out")
    assert report.steps == 12 + 11 and report.notes == {"cut: the side video ended first": 1}
    np.testing.assert_allclose(next(builder.build(SECOND)).action, expected(slice(11)), atol=1e-6)
    shutil.rmtree(tmp_path / "raw" / SECOND)
    write(tmp_path / "raw", SECOND, frames={"24400334": 5})
    _, report = raw.convert(builder, tmp_path / "short")
    (entry,) = report.unreadable
    assert entry["item"] == SECOND and "do not fit each other" in entry["error"]


def test_a_camera_may_be_absent(builder, tmp_path):
    (tmp_path / "raw" / FIRST / "recordings" / "MP4" / "22008760.mp4").unlink()
    with pytest.raises(UserError, match="None of 1 episodes has images of agentview"):
        raw.convert(builder, tmp_path / "one")
    write(tmp_path / "raw", SECOND)
    folder, report = raw.convert(builder, tmp_path / "out")
    assert report.missing == {"agentview": 1}
    clips = raw.clips(folder, ("agentview", "side", "wrist"), fps=15)
    assert clips[0]["view_mask"].tolist() == [False, True, True]
    assert raw.seen(clips[0]["video"][1][0]) == (0, 2)
    assert clips.episodes.text("camera_layout", 0) == "side,wrist"
    _, report = raw.convert(dataclasses.replace(builder, min_views=3), tmp_path / "all")
    assert report.skipped == {"fewer than 3 views": 1} and report.missing == {}


def test_incomplete_episodes_are_counted(builder, tmp_path):
    root = tmp_path / "raw"
    write(root, SECOND)
    (root / SECOND / "trajectory.h5").unlink()
    _, report = raw.convert(builder, tmp_path / "out")
    assert report.kept == 1 and len(report.unreadable) == 1
    assert report.unreadable[0]["item"] == SECOND
    assert "there is no" in report.unreadable[0]["error"]
    shutil.rmtree(root / SECOND / "recordings")
    shutil.copy(root / FIRST / "trajectory.h5", root / SECOND)
    _, report = raw.convert(builder, tmp_path / "videos")
    assert report.skipped == {"fewer than 1 views": 1}
    (root / SECOND / f"metadata_{NUMBERS[SECOND]}.json").unlink()
    _, report = raw.convert(builder, tmp_path / "metadata")
    assert f"{SECOND}/metadata_<episode id>.json" in report.unreadable[0]["error"]
    with h5py.File(root / SECOND / "trajectory.h5", "a") as file:
        del file["action/cartesian_velocity"]
    _, report = raw.convert(builder, tmp_path / "column")
    assert "/action/cartesian_velocity is missing" in report.unreadable[0]["error"]


def test_an_episode_without_steps_is_counted(builder, tmp_path):
    write(tmp_path / "raw", SECOND, length=0, frames=dict.fromkeys(CAMERAS, 1))
    _, report = raw.convert(builder, tmp_path / "out")
    (entry,) = report.unreadable
    assert report.kept == 1 and "do not fit each other: {'actions': 0" in entry["error"]


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="has no <lab>/<success.failure>/<date>/<time>"):
        Builder(raw=str(tmp_path)).items()


@pytest.mark.parametrize("newer", ["010125", "022924", "030824", "123124"])
def test_the_newest_annotations_are_those_of_the_latest_day(tmp_path, newer):
    names = {"030724": "old", "123123": "older", newer: "new"}
    if newer == "022924":  # Earlier in the year.
        names = {"123123": "old", newer: "new"}
    for date, text in (names | {"copy": "no date"}).items():
        (tmp_path / f"aggregated-annotations-{date}.json").write_text(json.dumps({"id": text}))
    assert annotations(tmp_path) == {"id": "new"}
