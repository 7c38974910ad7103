"""ALOHA and mobile ALOHA to RLDS: compressed images, the shift of real actions, the base."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import raw
from raw_hdf5 import seen as steps_seen

from data_builders.aloha.aloha import Builder
from data_builders.builder import Skip
from jaxvp.errors import UserError

REAL = ("cam_high", "cam_left_wrist", "cam_low", "cam_right_wrist")
MOBILE = ("cam_high", "cam_left_wrist", "cam_right_wrist")


def write(path: Path, length: int, cameras, *, sim: bool | None = False, compress: bool = False,
          base: bool = False, frames: int | None = None):
    """As record_episodes.py and compress_data.py do: joint j is `step + j / 100`, its command 100
    more. `frames`: of the images, when not as many as steps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = np.arange(length)[:, None]
    qpos = (steps + np.arange(14) / 100).astype(np.float32)
    qpos[:, [6, 13]] = np.concatenate([steps, length - steps], 1) / length
    with h5py.File(path, "w") as file:
        if sim is not None:
            file.attrs["sim"] = sim
        file.attrs["compress"] = compress
        file["observations/qpos"], file["observations/qvel"] = qpos, np.zeros_like(qpos)
        if not sim:
            file["observations/effort"] = np.zeros_like(qpos)
        action = 100 + qpos
        action[:, [6, 13]] = qpos[:, [6, 13]]
        file["action"] = action
        if base:
            file["base_action"] = np.concatenate([steps / 10, -steps / 10], 1)
        lengths = []
        for view, camera in enumerate(cameras):
            images = [raw.picture(step, view) for step in range(frames or length)]
            if compress:
                encoded = [raw.jpeg(image, swapped=True) for image in images]
                lengths.append([len(data) for data in encoded])
                width = max(lengths[-1])
                images = [np.frombuffer(data.ljust(width, b"\0"), np.uint8) for data in encoded]
            chunks = (1, *np.shape(images)[1:])
            file.create_dataset(f"observations/images/{camera}", data=np.stack(images),
                                chunks=chunks)
        if compress:
            file["compress_len"] = np.array(lengths)


def aloha(root: Path, **options) -> Builder:
    return Builder(raw=str(root), **{"image_size": 64, "val_fraction": 0.0} | options)


def built(builder: Builder, item: str):
    (made,) = builder.build(item)
    return made


@pytest.mark.parametrize("compress", [False, True])
def test_real_episodes_are_read_back_as_clips(tmp_path, compress):
    folder = tmp_path / "raw" / "aloha_mobile_wipe_wine"
    for number in (2, 10):
        write(folder / f"episode_{number}.hdf5", 6, MOBILE, compress=compress, base=True)
    write(folder / "mirror_episode_2.hdf5", 6, MOBILE)
    builder = aloha(tmp_path / "raw")
    assert [item.rsplit("_", 1)[1] for item in builder.items()] == ["2.hdf5", "10.hdf5"]
    made, report = raw.convert(builder, tmp_path / "out")
    assert (report.kept, report.steps, report.notes) == (2, 12, {})
    clips = raw.clips(made, MOBILE, fps=25, frames=2, chunk=2)
    episodes = clips.episodes
    assert list(episodes.robots()) == ["mobile ALOHA with two ViperX arms"]
    assert episodes.text("camera_text", 0) == "cameras high, left wrist, right wrist"
    assert episodes.names["action"][6] == "left_gripper" and set(episodes.fps) == {50}
    assert episodes.units["action"][12:] == ("rad", "0 closed .. 1 open", "m/s", "rad/s")
    assert episodes[0].instruction == [b"aloha mobile wipe wine"] * 6
    clip = clips[3]
    assert [raw.seen(image) for image in clip["video"][:, 1]] == [(5, 0), (5, 1), (5, 2)]
    state, action = (raw.physical(clips, clip, name) for name in ("state", "action"))
    joints = np.arange(6) / 100
    np.testing.assert_allclose(
        state, [*(3 + joints), 0.5, *(3.07 + joints), 0.5], atol=1e-3)
    # The command of the step before, base included.
    np.testing.assert_allclose(
        action[0], [*(102 + joints), 2 / 6, *(102.07 + joints), 4 / 6, 0.2, -0.2], atol=1e-3)


@pytest.mark.parametrize(("sim", "alignment", "first"), [
    (False, "act", [100, 100, 101, 102]), (None, "act", [100, 100, 101, 102]),
    (False, "as_is", [100, 101, 102, 103]), (True, "act", [100, 101, 102, 103])])
def test_only_real_actions_are_shifted(tmp_path, sim, alignment, first):
    write(tmp_path / "sim_transfer_cube" / "episode_0.hdf5", 4, ("top",), sim=sim)
    made = built(aloha(tmp_path, alignment=alignment), "sim_transfer_cube/episode_0.hdf5")
    np.testing.assert_allclose(made.action[:, 0], first)
    np.testing.assert_allclose(made.state[:, 0], np.arange(4))
    assert made.robot == ("simulated " if sim else "") + "ALOHA with two ViperX arms"
    assert made.action.shape == (4, 14) and list(made.images) == ["top"]


@pytest.mark.parametrize("compress", [False, True])
def test_colours_fps_cameras_and_instruction_can_be_chosen(tmp_path, compress):
    write(tmp_path / "episode_0.hdf5", 10, REAL, compress=compress)
    builder = aloha(tmp_path, fps=10, cameras=("cam_low", "cam_high"), task="Open the  jar.")
    made = built(builder, "episode_0.hdf5")
    assert list(made.images) == ["cam_low", "cam_high"]
    assert steps_seen(made.images["cam_low"]) == [(0, 2), (5, 2)]
    np.testing.assert_allclose(made.action[:, 0], [103, 108], atol=1e-4)
    assert (made.fps, made.instruction) == (10, "Open the jar.")
    other = built(aloha(tmp_path, swapped=False), "episode_0.hdf5")
    if compress:
        with pytest.raises(AssertionError, match="red and blue are exchanged"):
            steps_seen(other.images["cam_low"])
    else:
        assert steps_seen(other.images["cam_low"])[:2] == [(0, 2), (1, 2)]


def test_files_that_differ(tmp_path):
    folder = tmp_path / "raw" / "task"
    write(folder / "episode_0.hdf5", 8, MOBILE, base=True)
    write(folder / "episode_1.hdf5", 8, MOBILE, base=True, frames=6)
    write(folder / "episode_2.hdf5", 8, MOBILE, base=True, frames=3)
    write(folder / "episode_3.hdf5", 8, MOBILE[:2], base=True)
    write(folder / "episode_4.hdf5", 8, REAL, base=True)
    write(folder / "episode_5.hdf5", 8, MOBILE)
    (folder / "episode_6.hdf5").write_bytes((folder / "episode_0.hdf5").read_bytes()[:2000])
    write(folder / "episode_7.hdf5", 8, MOBILE, compress=True, base=True)
    with h5py.File(folder / "episode_7.hdf5", "a") as file:
        file["observations/images/cam_high"][3, 100:] = 0
    write(folder / "episode_8.hdf5", 8, MOBILE, base=True)
    with h5py.File(folder / "episode_8.hdf5", "a") as file:
        del file["action"]
    _, report = raw.convert(aloha(tmp_path / "raw"), tmp_path / "out")
    assert report.kept == 3 and report.notes == {"cut: the cam_high ended first": 1}
    errors = {entry["item"][-6]: entry["error"] for entry in report.unreadable}
    assert sorted(errors) == ["2", "4", "5", "6", "7", "8"]
    assert "'cam_high': 3" in errors["2"] and "{'cam_low'}" in errors["4"]
    assert "action must be finite float32[L, 16]" in errors["5"] and "OSError" in errors["6"]
    assert "images/cam_high[3]: " in errors["7"] and "/action is missing" in errors["8"]
    made = built(aloha(tmp_path / "raw"), "task/episode_1.hdf5")
    np.testing.assert_allclose(made.action[:, 0], [100, 100, 101, 102, 103, 104])
    with pytest.raises(Skip, match="fewer than 3 views"):
        built(aloha(tmp_path / "raw", min_views=3), "task/episode_3.hdf5")


@pytest.mark.parametrize("speed, kept", [(0.2, 6), (0.0, 0)])
def test_a_base_that_drives_moves(tmp_path, speed, kept):
    path = tmp_path / "drive" / "episode_0.hdf5"
    write(path, 6, MOBILE, base=True)
    with h5py.File(path, "a") as file:
        file["action"][...] = 1.0
        file["base_action"][...] = speed
    builder = aloha(tmp_path, noops="drop")
    if not kept:
        with pytest.raises(Skip, match="nothing moves"):
            built(builder, "drive/episode_0.hdf5")
        return
    made = built(builder, "drive/episode_0.hdf5")
    assert len(made.state) == kept
    np.testing.assert_allclose(made.action[:, -2:], speed)


def test_the_first_file_may_be_broken(tmp_path):
    folder = tmp_path / "raw" / "task"
    for number in range(3):
        write(folder / f"episode_{number}.hdf5", 4, MOBILE, base=True)
    (folder / "episode_0.hdf5").write_bytes((folder / "episode_0.hdf5").read_bytes()[:2000])
    with h5py.File(folder / "episode_1.hdf5", "a") as file:
        del file["observations/images"]
    _, report = raw.convert(aloha(tmp_path / "raw"), tmp_path / "out")
    assert report.kept == 1 and [entry["item"] for entry in report.unreadable] == [
        "task/episode_0.hdf5", "task/episode_1.hdf5"]
    (folder / "episode_2.hdf5").write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match="episode_2.hdf5: .*file signature not found"):
        aloha(tmp_path / "raw").items()


def test_a_folder_without_episodes_is_named(tmp_path):
    with pytest.raises(UserError, match="has no episode_<n>.hdf5"):
        aloha(tmp_path).items()
    with h5py.File(tmp_path / "episode_0.hdf5", "w") as file:
        file["data"] = 0
    with pytest.raises(ValueError, match="episode_0.hdf5: there is no observations/images"):
        aloha(tmp_path).items()
