"""RoboMIND to RLDS and back: embodiments, channel order, unencoded frames, texts, next states."""

import json
from typing import NamedTuple

import h5py
import numpy as np
import pytest
import raw
import raw_hdf5

from data_builders.robomind.embodiments import EMBODIMENTS
from data_builders.robomind.robomind import Builder
from jaxvp.errors import UserError

TABLE = """,task,instruction
0,bread_in_basket,Put bread into the basket
1,10_packplate,"pick up the plate,put it in the rack,  done"
"""
FRANKA = ("camera_top", "camera_left", "camera_right")


class Layout(NamedTuple):
    """Of the files: the state's data sets and their widths; columns of grippers that are 1 when
    closed; whether red and blue are exchanged; the leader is the action; states per frame."""

    cameras: tuple[str, ...]
    state: dict[str, int]
    grippers: tuple[int, ...] = ()
    swapped: bool = True
    leader: bool = False
    rate: int = 1


TOP = ("camera_top",)
LAYOUTS = {
    "agilex_3rgb": Layout(
        ("camera_front", "camera_left_wrist", "camera_right_wrist"),
        {"puppet/joint_position_left": 7, "puppet/joint_position_right": 7}, leader=True),
    "franka_1rgb": Layout(TOP, {"puppet/joint_position": 8}, (7,), swapped=False),
    "franka_3rgb": Layout(FRANKA, {"puppet/joint_position": 8}, (7,), swapped=False),
    "franka_fr3_dual": Layout(("camera_front", "camera_left", "camera_right", "camera_top"),
                              {"puppet/joint_position": 16}, (7, 15), swapped=False),
    "ur_1rgb": Layout(TOP, {"puppet/joint_position": 7}, (6,), swapped=False),
    "tienkung_gello_1rgb": Layout(TOP, {"puppet/joint_position": 16}, leader=True),
    "tienkung_prod1_gello_1rgb": Layout(TOP, {"puppet/joint_position": 16}, leader=True),
    "tienkung_xsens_1rgb": Layout(TOP, {"puppet/joint_position": 14, "puppet/end_effector": 12}),
    "sim_franka_3rgb": Layout(
        ("camera_front_external", "camera_left_external", "camera_right_external",
         "camera_handeye"), {"franka/joint_position": 8}, rate=4),
    "sim_tienkung_1rgb": Layout(("camera_head", "camera_chest"), {
        f"tiangong/{side}_{part}_joint_pos_seq": width
        for side in ("left", "right") for part, width in (("arm", 7), ("hand", 12))}),
}
TEXTS = {"task_summary": "bread", "steps": [
    {"step_description": text, "start_frame": f"camera_top_{start:04d}.jpg",
     "end_frame": f"camera_top_{end:04d}.jpg"}
    for text, start, end in (("reach", 0, 3), ("grasp  it", 5, 6), ("", 9, 14))]}


def open_episode(folder, embodiment, name, task="bread_in_basket", part="train/"):
    path = (folder / "benchmark1_1_release" / f"h5_{embodiment}" / task / "success_episodes" /
            f"{part}{name}" / "data" / "trajectory.hdf5")
    path.parent.mkdir(parents=True)
    file = h5py.File(path, "w")
    file.attrs.update({"sim": False, "compress": True})
    file.create_group("observations/rgb_images")
    file.create_group("observations/depth_images")
    return file


def write(folder, embodiment, name, length=12, task="bread_in_basket", part="train/", missing=(),
          frames=None):
    """An episode in the published layout. Column d of the state is d + step / 10, of the leader's
    1000 more; grippers are 0 up to step 5 and then 1."""
    layout = LAYOUTS[embodiment]
    with open_episode(folder, embodiment, name, task, part) as file:
        rows = length * layout.rate
        values = np.arange(sum(layout.state.values())) + np.arange(rows)[:, None] / 10 / layout.rate
        values[:, layout.grippers] = (np.arange(rows) >= 6)[:, None]
        parts = np.split(values, np.cumsum([*layout.state.values()])[:-1], 1)
        for key, columns in zip(layout.state, parts, strict=True):
            file[key] = columns
            if key.startswith("puppet"):
                file[key.replace("puppet", "master")] = columns + 1000
        for view, camera in enumerate(layout.cameras):
            if camera not in missing:
                raw_hdf5.write_objects(file["observations/rgb_images"], camera, raw_hdf5.jpegs(
                    frames or length, view, layout.swapped))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "raw"
    (path / "language_description_annotation_json").mkdir(parents=True)
    (path / "RoboMIND_v1_2_instr.csv").write_text(TABLE)
    return path


def robomind(folder, embodiment="franka_3rgb", **options):
    return Builder(raw=str(folder), embodiment=embodiment, **{"image_size": 64} | options)


def test_franka_is_read_back_as_clips(folder, tmp_path):
    write(folder, "franka_3rgb", "1014_144602")
    write(folder, "franka_3rgb", "1014_144642", task="10_packplate", part="val/")
    out, report = raw.convert(robomind(folder), tmp_path / "out")
    assert (report.kept, report.steps, report.notes, report.unreadable) == (2, 22, {}, [])
    clips = raw.clips(out, FRANKA, fps=15, frames=3, chunk=2)
    assert len(clips.episodes) == 1, "the official validation episode is in val"
    assert clips.episodes.fps[0] == 30 and clips.episodes.has_action[0]
    assert clips.episodes.text("camera_layout", 0) == ",".join(FRANKA)
    assert clips.episodes.text("dataset", 0) == "robomind_franka_3rgb"
    assert clips.episodes.units["action"] == ("rad",) * 7 + ("0 closed .. 1 open",)
    clip = clips[4]
    assert [[raw.seen(image) for image in view] for view in clip["video"]] == [
        [(4 + 2 * k, view) for k in range(3)] for view in range(3)]
    state, action = (raw.physical(clips, clip, name) for name in ("state", "action"))
    np.testing.assert_allclose(state, [*(np.arange(7) + 0.4), 1], atol=1e-4)
    # The next state of the follower; the gripper closes, 1 in the file, at step 6.
    np.testing.assert_allclose(action[:, :7], np.arange(7) + [[0.5], [0.6]], atol=1e-4)
    np.testing.assert_allclose(action[:, 7], [1, 0], atol=1e-4)
    assert set(clips.episodes[0].instruction) == {b"Put bread into the basket"}
    (text,) = set(raw.clips(out, FRANKA, fps=15, split="val").episodes[0].instruction)
    assert text == b"pick up the plate, put it in the rack, done"


@pytest.mark.parametrize("embodiment", sorted(EMBODIMENTS))
def test_every_embodiment(folder, embodiment):
    layout = LAYOUTS[embodiment]
    write(folder, embodiment, "2024_09_18-10_40_22-172952636630221088.00")
    made = raw_hdf5.built(robomind(folder, embodiment, fps=15.0))
    steps = list(range(0, 12 if layout.leader else 11, 2))
    assert list(made.images) == list(layout.cameras)
    for view, camera in enumerate(layout.cameras):
        assert raw_hdf5.seen(made.images[camera]) == [(step, view) for step in steps]
    free = np.setdiff1d(np.arange(made.state.shape[1]), layout.grippers)
    times = np.array(steps)[:, None]
    np.testing.assert_allclose(made.state[:, free], free + times / 10)
    # At half the rate, the last of two actions counts.
    ahead = 1000 + (times + 1) / 10 if layout.leader else np.minimum(times + 2, 11) / 10
    np.testing.assert_allclose(made.action[:, free], free + ahead)
    if layout.grippers:
        assert made.state[:, layout.grippers[-1]].tolist() == [step < 6 for step in steps]
    assert made.fps == 15 and made.instruction == ["Put bread into the basket"] * len(steps)


def test_frame_level_texts_change_inside_an_episode(folder):
    write(folder, "sim_franka_3rgb", "2024_10_11-15_18_23")
    write(folder, "sim_franka_3rgb", "2024_10_11-15_18_24")
    path = folder / "language_description_annotation_json" / "h5_simulation_franka.json"
    name = "h5_simulation/bread_in_basket/success_episodes/train/2024_10_11-15_18_23/data"
    path.write_text(json.dumps([{"id": name, "response": TEXTS}]))
    builder = robomind(folder, "sim_franka_3rgb")
    first, second = builder.items()
    task = ["Put bread into the basket"]
    assert raw_hdf5.built(builder, first).instruction == (
        ["reach"] * 5 + ["grasp it"] * 4 + task * 2)
    assert raw_hdf5.built(builder, second).instruction == task * 11
    plain = robomind(folder, "sim_franka_3rgb", language="task")
    assert raw_hdf5.built(plain, first).instruction == task * 11


def test_the_summary_stands_in_for_a_task_that_the_table_lacks(folder, tmp_path):
    for name in ("1016_161244", "1016_161245"):
        write(folder, "ur_1rgb", name, task="new_task")
    path = folder / "language_description_annotation_json" / "h5_ur_1rgb.json"
    name = "h5_ur_1rgb/new_task/success_episodes/train/1016_161244/data"
    path.write_text(json.dumps([{"id": name, "response": {"task_summary": "stir", "steps": []}}]))
    builder = robomind(folder, "ur_1rgb")
    assert raw_hdf5.built(builder).instruction == ["stir"] * 11
    _, report = raw.convert(builder, tmp_path / "out")
    assert report.kept == 1 and report.skipped == {"no instruction": 1}


def test_a_part_without_a_text_does_not_cost_the_episode(folder):
    write(folder, "ur_1rgb", "0000", task="new_task")
    path = folder / "language_description_annotation_json" / "h5_ur_1rgb.json"
    name = "h5_ur_1rgb/new_task/success_episodes/train/0000/data"
    path.write_text(json.dumps([{"id": name, "response": TEXTS | {"task_summary": " "}}]))
    assert raw_hdf5.built(robomind(folder, "ur_1rgb")).instruction == (
        ["reach"] * 5 + ["grasp it"] * 4 + [""] * 2)


@pytest.mark.parametrize("empty", [False, True])
def test_episodes_with_two_cameras(folder, tmp_path, empty):
    write(folder, "franka_3rgb", "0000", missing=("camera_top",))
    if empty:
        (path,) = folder.rglob("trajectory.hdf5")
        with h5py.File(path, "a") as file:
            raw_hdf5.write_objects(file, "observations/rgb_images/camera_top", [])
    builder = robomind(folder)
    made = raw_hdf5.built(builder)
    assert list(made.images) == ["camera_left", "camera_right"]
    assert made.camera_text == "a left view, a right view"
    assert raw_hdf5.seen(made.images["camera_right"])[0] == (0, 2)
    write(folder, "franka_3rgb", "0001")
    out, report = raw.convert(builder, tmp_path / "out")
    clips = raw.clips(out, FRANKA, fps=30)
    masks = {clips.episodes.text("episode_id", i)[-4:]: clips[11 * i]["view_mask"].tolist()
             for i in range(2)}
    assert masks == {"0000": [False, True, True], "0001": [True, True, True]}
    _, report = raw.convert(robomind(folder, min_views=3), tmp_path / "three")
    assert report.kept == 1 and report.skipped == {"fewer than 3 views": 1}


@pytest.mark.parametrize("embodiment", ["ur_1rgb", "tienkung_gello_1rgb"])
@pytest.mark.parametrize("height,width", [(480, 640), (720, 1280)])
def test_frames_that_are_not_encoded(folder, embodiment, height, width):
    write(folder, embodiment, "0000", length=4)
    swapped = LAYOUTS[embodiment].swapped
    (path,) = folder.rglob("trajectory.hdf5")
    with h5py.File(path, "a") as file:
        picture = raw.picture(30, 0, height, width)
        # What would have been given to the encoder, which takes blue first.
        buffer = picture if swapped else picture[..., ::-1]
        file["observations/rgb_images/camera_top"][1] = buffer.ravel()
    made = raw_hdf5.built(robomind(folder, embodiment))
    assert raw_hdf5.seen(made.images["camera_top"])[:3] == [(0, 0), (30, 0), (2, 0)]


def test_simulation_has_fewer_frames_than_states(folder, tmp_path):
    write(folder, "sim_franka_3rgb", "0000", length=12, frames=10)
    write(folder, "sim_franka_3rgb", "0001", length=30, frames=10)
    builder = robomind(folder, "sim_franka_3rgb")
    made = raw_hdf5.built(builder)
    assert raw_hdf5.seen(made.images["camera_handeye"]) == [(step, 3) for step in range(9)]
    np.testing.assert_allclose(made.state[:, 0], np.arange(9) / 10)
    np.testing.assert_allclose(made.action[:, 0], np.arange(1, 10) / 10)
    _, report = raw.convert(builder, tmp_path / "out")
    assert report.kept == 1 and report.notes == {"cut: the camera_front_external ended first": 1}
    (entry,) = report.unreadable
    assert "0001" in entry["item"] and "lengths do not fit" in entry["error"]


def test_parts_of_tien_kung_in_simulation_differ_by_some_rows(folder):
    write(folder, "sim_tienkung_1rgb", "0000")
    (path,) = folder.rglob("trajectory.hdf5")
    with h5py.File(path, "a") as file:
        arm = file["tiangong/left_arm_joint_pos_seq"][:-2]
        del file["tiangong/left_arm_joint_pos_seq"]
        file["tiangong/left_arm_joint_pos_seq"] = arm
    made = raw_hdf5.built(robomind(folder, "sim_tienkung_1rgb"))
    assert made.state.shape == (9, 38) and made.notes


def test_source_fps_and_lengths(folder, tmp_path):
    write(folder, "ur_1rgb", "0000", length=12)
    write(folder, "ur_1rgb", "0001", length=22)
    made = raw_hdf5.built(robomind(folder, "ur_1rgb", source_fps=10.0))
    assert made.fps == 10 and len(made.state) == 11
    builder = robomind(folder, "ur_1rgb", source_fps=10.0, min_seconds=2.0)
    _, report = raw.convert(builder, tmp_path / "out")
    assert report.kept == 1 and report.skipped == {"shorter than 2 s": 1}


def test_the_same_episode_in_two_releases_is_one(folder):
    write(folder, "ur_1rgb", "0000")
    (folder / "benchmark1_1_release").rename(folder / "benchmark1_0_release")
    write(folder, "ur_1rgb", "0000")
    builder = robomind(folder, "ur_1rgb")
    assert len(builder.items()) == 2
    assert set(map(builder.episode_id, builder.items())) == {
        "bread_in_basket/success_episodes/train/0000"}


def test_broken_files_are_named(folder, tmp_path):
    for name in ("0000", "0001", "0002", "0003"):
        write(folder, "franka_1rgb", name)
    paths = sorted(folder.rglob("trajectory.hdf5"))
    paths[0].write_bytes(paths[0].read_bytes()[:1000])
    with h5py.File(paths[1], "a") as file:
        del file["puppet/joint_position"]
    with h5py.File(paths[2], "a") as file:
        frames = file["observations/rgb_images/camera_top"]
        frames[3] = frames[3][:-9]
    _, report = raw.convert(robomind(folder, "franka_1rgb"), tmp_path / "out")
    assert report.kept == 1
    cut, missing, image = report.unreadable
    assert "0000" in cut["item"] and "OSError" in cut["error"]
    assert "/puppet/joint_position is missing, found nothing" in missing["error"]
    assert "camera_top[3]" in image["error"] and "not a whole image" in image["error"]


def test_a_wrong_folder_is_named(folder, tmp_path):
    write(folder, "ur_1rgb", "0000")
    with pytest.raises(UserError, match=r"--raw=.* has no h5_franka_3rgb/.*found RoboMIND"):
        robomind(folder).items()
    with pytest.raises(ValueError, match="--cameras=camera_left: robomind_ur_1rgb has camera_top"):
        robomind(folder, "ur_1rgb", cameras=("camera_left",)).features()
    (folder / "RoboMIND_v1_2_instr.csv").unlink()
    with pytest.raises(UserError, match="there is no .*RoboMIND_v1_2_instr.csv"):
        robomind(folder, "ur_1rgb").items()
