"""AgiBot World 2026, LeRobot 2.1 with named fields and instruction segments, to RLDS."""

import numpy as np
import raw
import raw_lerobot
from raw_lerobot import FEATURES, TASKS, Episode

from data_builders.agibot_2026.agibot_2026 import Builder
from jaxvp.data import rlds

SIZES = {"left_effector/position": 1, "right_effector/position": 1, "joint/position": 14,
         "head/position": 3, "waist/position": 5}
SEGMENTS = {"0": [
    {"track": "default", "instruction": "Reach", "start_frame_index": 1, "end_frame_index": 3},
    {"track": "default", "instruction": "Grasp", "start_frame_index": 3, "end_frame_index": 6},
    {"track": "Left arm", "instruction": "overlaps", "start_frame_index": 0, "end_frame_index": 7},
]}


def vector(column: str, others: int) -> dict:
    """A feature in which `others` dimensions of no use come first, as their number differs."""
    fields, start = {f"{column}/end/position": others}, 0
    fields |= {f"{column}/{name}": size for name, size in SIZES.items()}
    fields[f"{column}/robot/{'velocity' if column == 'action' else 'position'}"] = (
        2 if column == "action" else 0)  # No position was recorded.
    described = {}
    for name, size in fields.items():
        described[name] = {"description": "", "dimensions": size,
                           "indices": list(range(start, start + size))}
        start += size
    return {"dtype": "float32", "shape": [start], "names": None, "field_descriptions": described}


def write(root, others: int):
    """`Dimension d of step i is i + d / 100, counted without the `others`; grippers close."""
    cameras = {f"observation.images.{name}": FEATURES["observation.images.top"] for name in
               ("hand_left", "hand_right", "head_left_fisheye", "top_head")}
    depth = FEATURES["observation.images.top_depth"]
    features = {key: value for key, value in FEATURES.items() if "images" not in key} | cameras | {
        "observation.images.head_depth": depth, "observation.state": vector("state", others),
        "action": vector("action", others)}

    def columns(number, length):
        steps = np.arange(length)[:, None]
        made = {}
        for name in ("observation.state", "action"):
            values = steps + (np.arange(features[name]["shape"][0]) - others) / 100
            values[:, others] = -0.91 * np.arange(length) / (length - 1)
            values[:, others + 1] = -1  # Beyond closed.
            made[name] = values
        return made

    raw_lerobot.write(root, "v2.1", [Episode(7)], features=features, columns=columns,
                      robot_type="g2a", instruction_segments=SEGMENTS)


def test_fields_are_found_by_name_and_segments_become_instructions(tmp_path):
    scene = tmp_path / "raw" / "ImitationLearning" / "Kitchen"
    write(scene / "task_1" / "0_9" / "data", others=6)  # Some archives have one more folder.
    write(scene / "task_2" / "10_19", others=13)
    builder = Builder(raw=str(tmp_path / "raw"), image_size=64, val_fraction=0.0)
    folder, report = raw.convert(builder, tmp_path / "out")
    assert (report.kept, report.steps, report.unreadable) == (2, 14, [])
    clips = raw.clips(folder, ("top_head", "hand_left", "hand_right"), fps=10, frames=1)
    episodes = clips.episodes
    assert list(episodes.robots()) == ["AgiBot G2 with two arms, grippers and wheels"]
    assert episodes.text("camera_layout", 0) == "top_head,hand_left,hand_right"
    names, units = episodes.names["action"], episodes.units["action"]
    assert len(names) == 26 and names[0] == "action/joint/position_0"
    assert names[14] == "action/left_effector/position"
    assert units[13:17] == ("rad", *["0 closed .. 1 open"] * 2, "rad") and units[-1] == ""
    joints = 2 + np.arange(14) / 100
    for record in range(2):
        clip = clips[7 * record + 2]
        assert [raw.seen(image) for image in clip["video"][:, 0]] == [(2, 3), (2, 0), (2, 1)]
        state, action = (raw.physical(clips, clip, name) for name in ("state", "action"))
        np.testing.assert_allclose(state, [
            *(joints + 0.02), 1 - 2 / 6, 0, *(2 + np.arange(16, 24) / 100)], atol=1e-3)
        np.testing.assert_allclose(action[0, :16], state[:16], atol=1e-3)
        np.testing.assert_allclose(action[0, 16:], 2 + np.arange(16, 26) / 100, atol=1e-3)
        texts = [text.decode() for text in rlds.Episodes(folder, "train")[record].instruction]
        assert texts == [TASKS[0], "Reach", "Reach", "Grasp", "Grasp", "Grasp", TASKS[0]]
