"""AgiBot World Alpha and Beta to RLDS: segments, grippers, hands, incomplete actions, bad files."""

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import raw
from raw_hdf5 import seen as steps_seen

from data_builders.agibot.agibot import Builder
from data_builders.builder import Skip
from jaxvp.errors import UserError

VIEWS = {"head_color": 0, "hand_left_color": 1, "hand_right_color": 2}
HAND_VIEWS = {"head_color": 0, "hand_left_fisheye_color": 1, "hand_right_fisheye_color": 2}
SEGMENTS = [
    {"start_frame": 2, "end_frame": 7, "action_text": "Retrieve cucumber from the shelf.",
     "skill": "Pick"},
    {"start_frame": 7, "end_frame": 12, "action_text": "Place the cucumber  in the cart.",
     "skill": "Place"},
]


def write_proprio(path: Path, length: int, hand: int = 2, commands: int | None = None,
                  index=None):
    """Joint j is `step + j / 100`, commands are 100 more. The left gripper closes: its state goes
    from 35 to 120, its command from 0 to 1. `index`: the steps of the arms' commands."""
    path.parent.mkdir(parents=True)
    steps = np.arange(length)
    sent = np.arange(length if commands is None else commands) if index is None else np.array(index)
    joints = steps[:, None] + np.arange(14) / 100
    closing = np.zeros((length, hand))
    closing[:, 0] = steps / (length - 1)
    body = np.stack([steps / 10, steps / 20], 1)
    columns = {
        "timestamp": 1_700_000_000_000_000_000 + steps * 33_333_333,
        "state/joint/position": joints, "state/joint/current_value": joints,
        "state/effector/position": 35 + 85 * closing if hand == 2 else closing,
        "state/end/position": np.zeros((length, 2, 3)),
        "state/end/orientation": np.zeros((length, 2, 4)),
        "state/head/position": body, "state/waist/position": body + 1,
        "action/joint/position": 100 + joints[:1] + sent[:, None], "action/joint/index": sent,
        "action/effector/position": closing, "action/effector/index": steps,
        "action/end/position": np.zeros((length, 2, 3)), "action/end/index": np.zeros(0, np.int64),
        "action/head/position": body + 2, "action/head/index": steps,
        "action/waist/position": body + 3, "action/waist/index": steps,
        "action/robot/velocity": body + 4, "action/robot/index": steps,
    }
    for group in ("state/joint", "action/joint"):
        for name in ("effort", "velocity"):
            columns[f"{group}/{name}"] = np.zeros(0, np.float32)
    for name in ("position", "orientation"):
        columns[f"state/robot/{name}"] = np.zeros(0, np.float32)
    with h5py.File(path, "w") as file:
        for key, values in columns.items():
            file[key] = values


def write_episode(root: Path, task: int, number: int, length: int = 14, views=VIEWS, frames=None,
                  **proprio) -> Path:
    """Returns the folder of its videos."""
    write_proprio(root / "proprio_stats" / f"{task}" / f"{number}" / "proprio_stats.h5", length,
                  **proprio)
    folder = root / "observations" / f"{task}" / f"{number}"
    for name, view in views.items():
        pictures = [raw.picture(step, view) for step in range(frames or length)]
        raw.write_video(folder / "videos" / f"{name}.mp4", pictures, 30, "libsvtav1")
    (folder / "depth").mkdir()
    return folder / "videos"


def write_task(root: Path, task: int, segments: dict[int, list], key: str = "label_info"):
    (root / "task_info").mkdir(exist_ok=True, parents=True)
    (root / "task_info" / f"task_{task}.json").write_text(json.dumps([
        {"episode_id": number, "task_id": task, "task_name": "Pickup in Supermarket",
         "init_scene_text": "The robot is in front of the fruit shelf.",
         key: {"action_config": configs, "key_frame": [{"start": 0, "end": 0, "comment": ""}]}}
        for number, configs in segments.items()]))


def agibot(root: Path, **options) -> Builder:
    return Builder(raw=str(root), **{"image_size": 64, "val_fraction": 0.0} | options)


def built(builder: Builder, item) -> list:
    """Episodes, and the reasons of what is left out."""
    return [str(made) if isinstance(made, Skip) else made for made in builder.build(item)]


def test_segments_are_read_back_as_clips(tmp_path):
    root = tmp_path / "raw"
    write_task(root, 327, {648649: SEGMENTS})
    write_episode(root, 327, 648649)
    folder, report = raw.convert(agibot(root), tmp_path / "out")
    assert (report.items, report.kept, report.steps) == (1, 2, 10)
    assert report.skipped == {"no instruction": 2}, "before the first segment, after the last"
    clips = raw.clips(folder, ("head", "left_wrist", "right_wrist"), fps=15, frames=2, chunk=2)
    episodes = clips.episodes
    assert [episodes.text("episode_id", i) for i in (0, 1)] == ["327/648649/0", "327/648649/1"]
    assert list(episodes.robots()) == ["AgiBot G1 with two arms, grippers and wheels"]
    assert set(episodes.fps) == {30} and len(episodes.names["state"]) == 20
    assert episodes.names["action"][14:16] == ("left_gripper", "right_gripper")
    assert episodes.units["action"][-3:] == ("m", "m/s", "rad/s")
    for record, texts in enumerate(
            ["Retrieve cucumber from the shelf.", "Place the cucumber in the cart."]):
        assert {text.decode() for text in episodes[record].instruction} == {texts}
        clip, step = clips[5 * record + 1], 2 + 5 * record + 1
        assert [raw.seen(image) for image in clip["video"][:, 1]] == [
            (step + 2, view) for view in range(3)]
        state, action = (raw.physical(clips, clip, name) for name in ("state", "action"))
        body = [step / 10, step / 20]
        opening = 1 - step / 13
        np.testing.assert_allclose(
            state, [*(step + np.arange(14) / 100), opening, 1, *body, *np.add(body, 1)], atol=1e-3)
        np.testing.assert_allclose(
            action[0], [*(100 + step + np.arange(14) / 100), opening, 1, *np.add(body, 2),
                        *np.add(body, 3), *np.add(body, 4)], atol=1e-3)
        np.testing.assert_allclose(action[1, 0], 101 + step, atol=1e-3)


def test_segments_are_clipped_misspelt_and_may_overlap(tmp_path):
    segments = [{"start_frame": -3, "end_frame": 4, "action_text": "a"},
                {"start_frame": 2, "end_frame": 99, "action_text": "b"},
                {"start_frame": 20, "end_frame": 30, "action_text": "beyond the end"}]
    write_task(tmp_path, 327, {1: segments}, key="lable_info")
    write_episode(tmp_path, 327, 1)
    first, second = built(agibot(tmp_path, fps=15), (327, 1))
    assert (first.instruction, second.instruction) == ("a", "b")
    assert steps_seen(first.images["head"]) == [(0, 0), (2, 0)]
    assert steps_seen(second.images["right_wrist"]) == [(step, 2) for step in range(2, 14, 2)]
    np.testing.assert_allclose(first.action[:, 0], [101, 103])
    np.testing.assert_allclose(second.state[:, 0], np.arange(2, 14, 2))
    assert second.fps == 15
    assert second.source == "proprio_stats/327/1/proprio_stats.h5:steps 2 to 14"


def test_frames_without_an_instruction_can_stay(tmp_path):
    write_task(tmp_path, 327, {1: SEGMENTS[:1]})
    write_episode(tmp_path, 327, 1)
    made = built(agibot(tmp_path, unlabelled="keep"), (327, 1))
    assert [(m.episode_id, m.instruction, len(m.state)) for m in made] == [
        ("327/1/0", SEGMENTS[0]["action_text"], 5), ("327/1/1", "", 2), ("327/1/2", "", 7)]
    short = built(agibot(tmp_path, min_seconds=0.16), (327, 1))
    assert [made if isinstance(made, str) else made.episode_id for made in short] == [
        "shorter than 0.16 s", "no instruction", "327/1/0"]


def test_cameras_without_a_video_are_counted(tmp_path):
    root = tmp_path / "raw"
    write_task(root, 327, {1: SEGMENTS, 2: SEGMENTS})
    write_episode(root, 327, 1)
    videos = write_episode(root, 327, 2)
    (videos / "hand_left_color.mp4").unlink()
    _, report = raw.convert(agibot(root), tmp_path / "out")
    assert (report.kept, report.missing) == (4, {"left_wrist": 2})
    (videos.parents[1] / "1" / "videos" / "hand_left_color.mp4").unlink()
    with pytest.raises(UserError, match="None of 4 episodes has images of left_wrist: complete"):
        raw.convert(agibot(root), tmp_path / "none")
    _, report = raw.convert(agibot(root, cameras=("head", "right_wrist")), tmp_path / "two")
    assert (report.kept, report.missing) == (4, {})


def test_task_info_and_videos_that_have_no_counterpart(tmp_path):
    root = tmp_path / "raw"
    write_task(root, 327, {1: SEGMENTS, 3: SEGMENTS})
    write_task(root, 400, {7: SEGMENTS})  # Nothing of this task was downloaded.
    write_episode(root, 327, 1)
    write_episode(root, 327, 2)
    write_episode(root, 351, 5)  # No task_info at all.
    (root / "observations" / ".gitattributes").touch()
    (root / "observations" / "327" / "1-2.tar").touch()
    assert agibot(root).items() == [(327, 1), (327, 2), (327, 3), (351, 5)]
    _, report = raw.convert(agibot(root), tmp_path / "out")
    assert (report.kept, report.unreadable) == (2, [])
    assert report.skipped == {"no instruction": 4, "in task_info, but not downloaded": 1}


def test_hands_are_another_robot(tmp_path):
    write_task(tmp_path, 475, {1: SEGMENTS, 2: SEGMENTS, 3: SEGMENTS})
    write_episode(tmp_path, 475, 1, views=HAND_VIEWS, hand=12)
    write_episode(tmp_path, 475, 2)
    write_episode(tmp_path, 475, 3, hand=7)
    with pytest.raises(Skip, match="no gripper: see --hand"):
        built(agibot(tmp_path), (475, 1))
    with pytest.raises(Skip, match="no dexhand: see --hand"):
        built(agibot(tmp_path, hand="dexhand"), (475, 2))
    with pytest.raises(ValueError, match=r"stats.h5: state/effector/position is \(14, 7\)"):
        built(agibot(tmp_path), (475, 3))
    builder = agibot(tmp_path, hand="dexhand")
    first = built(builder, (475, 1))[2]
    assert first.robot == "AgiBot G1 with two arms, six-joint hands and wheels"
    assert steps_seen(first.images["left_wrist"]) == [(step, 1) for step in range(2, 7)]
    np.testing.assert_allclose(first.state[:, 14], np.arange(2, 7) / 13)  # Angles stay.
    np.testing.assert_allclose(first.action[:, 14], np.arange(2, 7) / 13)
    (record,) = first.records(builder.features())
    assert record["steps"]["observation"]["state"].shape == (5, 30)
    assert record["steps"]["action"].shape == (5, 32)


def test_actions_that_were_not_sent_at_every_step(tmp_path):
    write_task(tmp_path, 352, dict.fromkeys(range(1, 6), SEGMENTS))
    write_episode(tmp_path, 352, 1, index=[0, 3, 4])
    (_, _, first, _) = built(agibot(tmp_path), (352, 1))
    np.testing.assert_allclose(first.action[:, 0], [2, 103, 104, 5, 6])
    assert first.notes == ["completed with states: joint action"]
    write_episode(tmp_path, 352, 2, commands=15)
    with pytest.raises(Skip, match="more actions than states"):
        built(agibot(tmp_path), (352, 2))
    write_episode(tmp_path, 352, 3, index=[0, 3, 14])
    with pytest.raises(ValueError, match="action/joint/index does not say when the 3 commands of"):
        built(agibot(tmp_path), (352, 3))
    write_episode(tmp_path, 352, 4, index=[0, 3, 4])
    with h5py.File(tmp_path / "proprio_stats/352/4/proprio_stats.h5", "a") as file:
        # The index of the joints stands in for that of the grippers.
        closing = file["action/effector/position"][[0, 3, 4]]
        for key, values in (("action/effector/position", closing),
                            ("action/effector/index", np.zeros(0, np.int64)),
                            ("action/head/position", np.zeros(0, np.float32)),
                            ("action/robot/velocity", np.zeros(0, np.float32)),
                            ("state/waist/position", np.zeros(0, np.float32))):
            del file[key]
            file[key] = values
    (_, _, first, _) = built(agibot(tmp_path), (352, 4))
    np.testing.assert_allclose(first.action[:, 14], 1 - np.arange(2, 7) / 13)  # Never millimetres.
    np.testing.assert_allclose(first.action[:, 16], np.arange(2, 7) / 10)  # The head stays.
    np.testing.assert_array_equal(first.action[:, -2:], 0)
    np.testing.assert_array_equal(first.state[:, -2:], 0)
    assert sorted(first.notes) == [
        *(f"completed with states: {part} action"
          for part in ("effector", "head", "joint", "robot")),
        "filled with zeros: waist state"]
    write_episode(tmp_path, 352, 5, commands=0)
    (_, _, first, _) = built(agibot(tmp_path, noops="drop"), (352, 5))
    assert first.action is None and first.notes == ["no actions: joint"]
    assert len(first.state) == len(first.images["head"]) == 5


def test_a_base_that_drives_moves(tmp_path):
    write_task(tmp_path, 352, {4: []})
    write_episode(tmp_path, 352, 4)
    with h5py.File(tmp_path / "proprio_stats/352/4/proprio_stats.h5", "a") as file:
        for part in ("joint", "effector", "head", "waist"):
            file[f"action/{part}/position"][...] = 0.5
        file["action/robot/velocity"][...] = 0.3
        file["action/robot/velocity"][7:] = 0.0
    (made,) = built(agibot(tmp_path, noops="drop", unlabelled="keep"), (352, 4))
    assert len(made.state) == 7


def test_bad_videos(tmp_path):
    root = tmp_path / "raw"
    write_task(root, 380, dict.fromkeys(range(1, 6), SEGMENTS))
    damaged = write_episode(root, 380, 1) / "hand_left_color.mp4"
    damaged.write_bytes(damaged.read_bytes()[:200])
    (write_episode(root, 380, 2) / "hand_right_color.mp4").unlink()
    write_episode(root, 380, 3, frames=10)
    write_episode(root, 380, 4, frames=6)
    write_episode(root, 380, 5)
    (root / "proprio_stats" / "380" / "5" / "proprio_stats.h5").unlink()
    one, four, five = "hand_left_color.mp4 is not a video", "'states': 14, 'head': 6", "there is no"
    _, report = raw.convert(agibot(root), tmp_path / "out")
    assert [entry["item"] for entry in report.unreadable] == ["(380, 1)", "(380, 4)", "(380, 5)"]
    for entry, message in zip(report.unreadable, (one, four, five), strict=True):
        assert re.search(message, entry["error"])
    assert report.kept == 4 and report.notes == {"cut: the head ended first": 2}
    first, last = built(agibot(root, unlabelled="keep"), (380, 3))[:2]
    assert len(last.state) == 3 and steps_seen(last.images["head"]) == [(7, 0), (8, 0), (9, 0)]
    made = built(agibot(root), (380, 2))[2]
    assert list(made.images) == ["head", "left_wrist"]
    assert made.camera_text == "a head view, a left wrist view"


def test_archives_must_be_unpacked(tmp_path):
    with pytest.raises(UserError, match="there is no .*observations"):
        agibot(tmp_path).items()
    (tmp_path / "observations" / "327").mkdir(parents=True)
    with pytest.raises(UserError, match="found nothing like that"):
        agibot(tmp_path).items()
    (tmp_path / "observations" / "327" / "648649-674627.tar").touch()
    with pytest.raises(UserError, match="only archives: unpack them, `for f in observ"):
        agibot(tmp_path).items()
    write_episode(tmp_path, 327, 1)
    with pytest.raises(UserError, match="there is no .*task_info"):
        agibot(tmp_path).items()
    (tmp_path / "task_info").mkdir()
    (tmp_path / "task_info" / "task_327.json").write_text("[1]")
    with pytest.raises(ValueError, match="task_327.json is not a JSON list of episodes"):
        agibot(tmp_path).items()
