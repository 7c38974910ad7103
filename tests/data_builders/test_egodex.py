"""EgoDex: hands in the frame of the camera, the next step as action, descriptions, confidences."""

import dataclasses

import h5py
import numpy as np
import pytest
import raw

from data_builders.builder import Skip
from data_builders.egodex.egodex import NAMES, Builder
from jaxvp.data import rlds
from jaxvp.errors import UserError

FINGER = ("Metacarpal", "Knuckle", "IntermediateBase", "IntermediateTip", "Tip")
BODY = ("hip", *(f"spine{i}" for i in range(1, 8)), *(f"neck{i}" for i in range(1, 5)))
ARM = ("Shoulder", "Arm", "Forearm", "Hand", *(f"Thumb{part}" for part in FINGER[1:]), *(
    f"{finger}Finger{part}" for finger in ("Index", "Middle", "Ring", "Little") for part in FINGER))
JOINTS = (*BODY, *(f"{side}{joint}" for side in ("left", "right") for joint in ARM))
TIPS = ("ThumbTip", "IndexFingerTip", "MiddleFingerTip", "RingFingerTip", "LittleFingerTip")
REVERSIBLE = {"llm_type": "reversible", "llm_description": "Open the box.",
              "llm_description2": "Close the box."}


def turned(angle, axis):
    """float32[4, 4], a rotation about an axis."""
    pose, (i, j) = np.eye(4, dtype=np.float32), [k for k in range(3) if k != axis]
    pose[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return pose


def seen_from_camera(joint, step):
    """float32[4, 4], where a joint is in the frame of the camera: another place for each."""
    pose = turned(0.1 * step + (0.5 if joint.startswith("left") else -0.5), axis=0)
    pose[:3, 3] = JOINTS.index(joint) / 100, 0.02 * step, 0.4
    return pose


def write(root, name, length=12, frames=None, confidence=None, **attributes):
    """`<part>/<task>/<number>` of `length` rows, with as many frames or `frames`."""
    path = root / name
    raw.write_video(path.with_suffix(".mp4"),
                    [raw.picture(step, 0) for step in range(length if frames is None else frames)],
                    30)
    camera = np.stack([turned(0.05 * step, axis=1) for step in range(length)])
    camera[:, :3, 3] = np.stack([np.array([step / 50, 1.6, -0.3]) for step in range(length)])
    with h5py.File(path.with_suffix(".hdf5"), "w") as file:
        file["camera/intrinsic"] = np.float32([[736.6, 0, 960], [0, 736.6, 540], [0, 0, 1]])
        file["transforms/camera"] = camera
        for joint in JOINTS:
            local = np.stack([seen_from_camera(joint, step) for step in range(length)])
            file[f"transforms/{joint}"] = camera @ local
            if confidence is not None:
                file[f"confidences/{joint}"] = np.float32(confidence(joint, np.arange(length)))
        file.attrs.update({
            "task": "basic_pick_place", "session_name": "s", "description": "None",
            "description2": "None", "which_llm_description": "1", "llm_type": "reset",
            "llm_description": "Pick up  the cup.", "llm_description2": "None",
            "llm_verbs": np.array(["pick"], object), "environment": "table:metal, hand:right",
            "annotated": True, "object": "cup", **attributes})


@pytest.fixture
def builder(tmp_path):
    write(tmp_path / "raw", "part1/basic_pick_place/2")
    return Builder(raw=str(tmp_path / "raw"), image_size=64, val_fraction=0.0)


def expected(step):
    """What the 48 numbers are at a step."""
    numbers = []
    for side in ("left", "right"):
        wrist = seen_from_camera(f"{side}Hand", step)
        numbers += [wrist[:3, 3], wrist[:3, 0], wrist[:3, 1]]
        numbers += [seen_from_camera(f"{side}{tip}", step)[:3, 3] for tip in TIPS]
    return np.concatenate(numbers)


def test_files_are_as_published(builder):
    assert len(JOINTS) == 68 and len(set(JOINTS)) == 68
    assert len(NAMES) == 48 and NAMES[:4] == (
        "left_wrist_x [m]", "left_wrist_y [m]", "left_wrist_z [m]", "left_wrist_r11")
    assert NAMES[8:10] == ("left_wrist_r32", "left_thumb_x [m]")
    assert NAMES[24] == "right_wrist_x [m]" and NAMES[47] == "right_little_z [m]"


def test_hands_are_in_the_frame_of_the_camera(builder, tmp_path):
    folder, report = raw.convert(builder, tmp_path / "out")
    assert (report.kept, report.steps, report.notes) == (1, 11, {})  # The last step has no action.
    clips = raw.clips(folder, ("head",), fps=30)
    clip = clips[4]
    assert [raw.seen(frame) for frame in clip["video"][0]] == [(4 + k, 0) for k in range(4)]
    np.testing.assert_allclose(raw.physical(clips, clip, "state"), expected(4), atol=1e-5)
    actions = raw.physical(clips, clip, "action")
    np.testing.assert_allclose(actions, [expected(step) for step in (5, 6, 7)], atol=1e-5)
    assert clip["action_mask"].all() and clips.episodes.fps.tolist() == [30]
    assert clips.episodes.names["action"][3] == "left_wrist_r11"
    assert clips.episodes.units["state"][:4] == ("m", "m", "m", "")
    assert clips.episodes.text("robot", 0) == "human hands, poses of wrists and fingertips"
    assert clips.episodes.text("episode_id", 0) == "part1/basic_pick_place/2"
    assert set(clips.episodes[0].instruction) == {b"Pick up the cup."}


def test_the_action_is_the_next_step_that_is_kept(builder, tmp_path):
    folder, _ = raw.convert(dataclasses.replace(builder, fps=10.0), tmp_path / "out")
    clips = raw.clips(folder, ("head",), fps=10, frames=2, chunk=2)
    assert clips.episodes.lengths.tolist() == [4]
    assert [raw.seen(frame)[0] for frame in clips[1]["video"][0]] == [3, 6]
    actions = raw.physical(clips, clips[1], "action")
    np.testing.assert_allclose(actions, [expected(6), expected(9)], atol=1e-5)


@pytest.mark.parametrize(("attributes", "text"), [
    (REVERSIBLE | {"which_llm_description": "1"}, b"Open the box."),
    (REVERSIBLE | {"which_llm_description": "2"}, b"Close the box."),
    (REVERSIBLE | {"which_llm_description": np.bytes_("2")}, b"Close the box."),
    (REVERSIBLE | {"which_llm_description": "2", "llm_type": "reset"}, b"Open the box."),
    (REVERSIBLE | {"which_llm_description": "2", "llm_description2": "None"}, None),
    ({"llm_description": "None"}, None)])
def test_description_is_that_of_the_direction(tmp_path, attributes, text):
    write(tmp_path, "part1/box/0", **attributes)
    (item,) = (builder := Builder(raw=str(tmp_path), unlabelled="keep", image_size=16)).items()
    (made,) = builder.build(item)
    assert made.instruction.encode() == (text or b"")
    if text is None:
        with pytest.raises(Skip, match="no instruction"):
            next(dataclasses.replace(builder, unlabelled="drop").build(item))


def test_parts_are_folders_and_test_is_a_split(builder, tmp_path):
    for name in ("part1/basic_pick_place/10", "part2/part2/fold/0", "test/fold/0"):
        write(tmp_path / "raw", name, length=4)
    assert builder.items() == [
        "part1/basic_pick_place/2", "part1/basic_pick_place/10", "part2/part2/fold/0",
        "test/fold/0"]
    folder, report = raw.convert(builder, tmp_path / "out")
    assert rlds.splits(folder) == ("test", "train") and report.kept == 4
    assert len(rlds.Episodes(folder, "test")) == 1


def test_hands_that_are_not_tracked_can_be_left_out(builder, tmp_path):
    def half(joint, steps):  # The right hand is never seen, other joints do not count.
        return np.where(joint.startswith("right") * np.ones_like(steps), 0.001, 0.9)

    write(tmp_path / "raw", "part1/fold/0", confidence=half)
    assert raw.convert(builder, tmp_path / "all")[1].kept == 2
    strict = dataclasses.replace(builder, min_tracked=0.6)
    folder, report = raw.convert(strict, tmp_path / "out")
    assert report.skipped == {"tracked for less than 0.6 of the time": 1}
    assert rlds.Episodes(folder, "train").text("episode_id", 0) == "part1/basic_pick_place/2"
    half_is_enough = dataclasses.replace(builder, min_tracked=0.5)
    assert raw.convert(half_is_enough, tmp_path / "half")[1].kept == 2


def test_video_that_ends_early_cuts_the_episode(builder, tmp_path):
    write(tmp_path / "raw", "part1/fold/0", length=12, frames=9)
    write(tmp_path / "raw", "part1/fold/1", length=12, frames=5)
    _, report = raw.convert(builder, tmp_path / "out")
    assert report.steps == 11 + 8 and report.notes == {"cut: the video ended first": 1}
    (entry,) = report.unreadable
    assert entry["item"] == "part1/fold/1" and "do not fit each other" in entry["error"]


def test_broken_files_are_counted(builder, tmp_path):
    for number in range(4):
        write(tmp_path / "raw", f"part1/fold/{number}", length=4)
    fold = tmp_path / "raw" / "part1" / "fold"
    (fold / "3.hdf5").unlink()
    (fold / "0.mp4").unlink()
    with h5py.File(fold / "1.hdf5", "a") as file:
        del file["transforms/leftThumbTip"]
    with h5py.File(fold / "2.hdf5", "a") as file:
        file["transforms/rightHand"][2] = np.nan
    _, report = raw.convert(builder, tmp_path / "out")
    assert report.kept == 1
    errors = {entry["item"][-1]: entry["error"] for entry in report.unreadable}
    assert "UserError" in errors["0"] and "0.mp4" in errors["0"]
    assert "/transforms/leftThumbTip is missing" in errors["1"]
    assert "must be finite" in errors["2"] and "there is no" in errors["3"]


def test_folders_without_episodes_are_named(builder):
    with pytest.raises(UserError, match="has no <part>/<task>/<number>.hdf5"):
        dataclasses.replace(builder, raw=f"{builder.raw}/part1").items()
