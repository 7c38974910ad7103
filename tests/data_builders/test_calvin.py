"""CALVIN to RLDS and back: annotated parts, unlabelled play, scaling, pickles that are refused."""

import os
import pickle
import re

import numpy as np
import pytest
import raw
import raw_hdf5

from data_builders.calvin.calvin import CAMERAS, Builder, uncovered
from jaxvp.errors import UserError

WINDOWS = (("lift the red block", 3, 12), ("open  the drawer", 10, 17), ("push the button", 25, 30))
PLAYS = ((0, 19), (22, 33))  # Frames 20 and 21 do not exist.


def write_frame(folder, frame):
    """The pose is the number of the frame; the gripper opens, 1, at every tenth frame."""
    opens = 1.0 if frame % 10 == 0 else -1.0
    state = np.full(15, float(frame))
    state[14] = opens
    relative = np.array([0.5, 0, -0.25, 0, 0.5, 0, opens], np.float32)
    np.savez_compressed(
        folder / f"episode_{frame:07d}.npz", actions=np.zeros(7, np.float32),
        rel_actions=relative, robot_obs=state, scene_obs=np.zeros(24),
        rgb_static=raw.picture(frame, 0, 200, 200), rgb_gripper=raw.picture(frame, 1, 84, 84),
        rgb_tactile=np.zeros((160, 120, 6), np.uint8), depth_static=np.zeros((200, 200), "f4"),
        depth_gripper=np.zeros((84, 84), "f4"), depth_tactile=np.zeros((160, 120, 2), "f4"))


def write_annotations(folder, windows, value=None):
    (folder / "lang_annotations").mkdir(exist_ok=True)
    table = {
        "language": {"ann": [text for text, *_ in windows], "task": ["lift"] * len(windows),
                     "emb": np.zeros((len(windows), 1, 384), np.float32)},
        "info": {"episodes": [],
                 "indx": [(np.int64(first), last) for _, first, last in windows]},
    }
    np.save(folder / "lang_annotations" / "auto_lang_ann.npy", table if value is None else value)


def write(root):
    for name, plays, windows in (("training", PLAYS, WINDOWS),
                                 ("validation", ((0, 9),), (("lift the red block", 2, 5),))):
        folder = root / name
        folder.mkdir(parents=True)
        for start, end in plays:
            for frame in range(start, end + 1):
                write_frame(folder, frame)
        np.save(folder / "ep_start_end_ids.npy", np.array(plays))
        np.save(folder / "ep_lens.npy", np.array([end - start + 1 for start, end in plays]))
        np.save(folder / "scene_info.npy", {"calvin_scene_D": [0, 33]})
        write_annotations(folder, windows)
    return root


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return write(tmp_path_factory.mktemp("raw") / "task_ABC_D")


def calvin(folder, **options):
    return Builder(raw=str(folder), **{"image_size": 64} | options)


def test_annotated_parts_are_read_back_as_clips(shared, tmp_path):
    out, report = raw.convert(calvin(shared), tmp_path / "out")
    assert (report.kept, report.steps, report.notes, report.unreadable) == (4, 24, {}, [])
    clips = raw.clips(out, tuple(CAMERAS), fps=15, frames=3, chunk=3)
    episodes = clips.episodes
    assert [episodes.text("episode_id", i) for i in range(3)] == [
        "training/0000003-0000011/lift the red block", "training/0000010-0000016/open the drawer",
        "training/0000025-0000029/push the button"]
    assert episodes.lengths.tolist() == [9, 7, 5], "the end does not belong to a part"
    assert set(episodes.fps) == {30} and set(episodes[1].instruction) == {b"open the drawer"}
    clip = clips[5]  # Frame 8.
    assert [[raw.seen(image) for image in view] for view in clip["video"]] == [
        [(frame, view) for frame in (8, 10, 11)] for view in range(2)]
    state, action = (raw.physical(clips, clip, name) for name in ("state", "action"))
    np.testing.assert_allclose(state, [8] * 14 + [0], atol=1e-4)
    np.testing.assert_allclose(
        action, [[0.5, 0, -0.25, 0, 0.5, 0, opens] for opens in (0, 0, 1)], atol=1e-4)
    assert episodes.units["action"] == ("0.02 m",) * 3 + ("0.05 rad",) * 3 + ("0 closed .. 1 open",)
    assert raw.clips(out, ("static",), fps=30, split="val").episodes.lengths.tolist() == [3]


def test_changes_add_up_at_a_lower_rate(shared):
    made = raw_hdf5.built(calvin(shared, fps=10.0, cameras=("gripper",)))
    assert list(made.images) == ["gripper"] and made.camera_text == "a wrist view"
    assert raw_hdf5.seen(made.images["gripper"]) == [(frame, 1) for frame in (3, 6, 9)]
    np.testing.assert_allclose(made.action[0], [1.5, 0, -0.75, 0, 1.5, 0, 0])
    assert made.action[2, 6] == 0 and made.fps == 10


def test_what_no_text_covers_can_be_kept(shared, tmp_path):
    builder = calvin(shared, unlabelled="keep")
    training = [item[1:] for item in builder.items() if item[0] == "training"]
    assert training[3:] == [(0, 2, ""), (17, 19, ""), (22, 24, ""), (30, 33, "")]
    _, report = raw.convert(builder, tmp_path / "out")
    assert report.kept == 10 and report.steps == 24 + 13 + 2 + 5
    made = raw_hdf5.built(builder, ("training", 22, 24, ""))
    assert made.instruction == "" and raw_hdf5.seen(made.images["static"])[0] == (22, 0)


def test_long_play_is_cut():
    assert uncovered(np.array([[5, 1304]]), [(10, 9, "")]) == [(5, 438), (439, 871), (872, 1304)]
    assert uncovered(np.array([[5, 9]]), [(0, 20, "")]) == []


def test_short_parts_are_left_out(shared, tmp_path):
    _, report = raw.convert(calvin(shared, min_seconds=0.3), tmp_path / "out")
    assert report.kept == 1 and report.skipped == {"shorter than 0.3 s": 3}


def test_broken_and_missing_frames_are_named(tmp_path):
    folder = write(tmp_path / "raw") / "training"
    (folder / "episode_0000004.npz").unlink()
    path = folder / "episode_0000015.npz"
    path.write_bytes(path.read_bytes()[:200])
    path = folder / "episode_0000022.npz"
    # A version of zip that Python does not know, of which it makes a NotImplementedError.
    path.write_bytes(re.sub(rb"(PK\x01\x02..).", b"\\1\xff", path.read_bytes(), flags=re.DOTALL))
    with np.load(folder / "episode_0000026.npz") as file:
        np.savez(folder / "episode_0000026.npz", rgb_static=file["rgb_static"])
    builder = calvin(tmp_path / "raw", unlabelled="keep")
    _, report = raw.convert(builder, tmp_path / "out")
    assert report.kept == 6
    missing, damaged, lacking, unknown = (entry["error"] for entry in report.unreadable)
    assert "episode_0000022.npz does not hold" in unknown and "version 25.5" in unknown
    assert "FileNotFoundError" in missing and "episode_0000004.npz" in missing
    assert "episode_0000015.npz" in damaged
    assert "episode_0000026.npz" in lacking and "robot_obs" in lacking
    (folder / "ep_start_end_ids.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="training/ep_start_end_ids.npy does not hold.*No data"):
        builder.items()


def test_annotations_that_run_code_are_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    folder = write(tmp_path / "raw") / "training"
    write_annotations(folder, (), np.array(Attack(), object))
    with pytest.raises(ValueError, match="auto_lang_ann.npy does not hold.*mkdir, which is not al"):
        calvin(tmp_path / "raw").items()
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("value", [np.zeros(3), {"language": {}}, [1, 2]])
def test_other_annotations_are_refused(tmp_path, value):
    folder = write(tmp_path / "raw") / "training"
    write_annotations(folder, (), value)
    with pytest.raises(ValueError, match="auto_lang_ann.npy does not hold what CALVIN's files do"):
        calvin(tmp_path / "raw").items()


def test_annotations_of_older_numpy_are_read(tmp_path):
    folder = write(tmp_path / "raw") / "training"
    path = folder / "lang_annotations" / "auto_lang_ann.npy"
    content = path.read_bytes()
    header = content[:content.index(b"\n") + 1]
    table = pickle.dumps(np.load(path, allow_pickle=True), 2)
    path.write_bytes(header + table.replace(b"numpy._core", b"numpy.core"))
    assert [item[1:] for item in calvin(tmp_path / "raw").items()][:2] == [
        (3, 11, "lift the red block"), (10, 16, "open the drawer")]


def test_a_wrong_folder_is_named(tmp_path):
    (tmp_path / "task_D_D").mkdir()
    with pytest.raises(UserError, match="there is no .*training.*has task_D_D"):
        calvin(tmp_path).items()
