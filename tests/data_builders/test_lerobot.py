"""LeRobot datasets to RLDS: formats 2.0, 2.1 and 3.0, names, grippers, tasks, missing videos."""

import dataclasses
import json
import re

import numpy as np
import pyarrow as pa
import pytest
import raw
import raw_lerobot
from pyarrow import parquet
from raw_lerobot import FEATURES, FPS, NAMES, TASKS, Episode

from data_builders.builder import Skip
from data_builders.lerobot.dataset import Dataset
from data_builders.lerobot.lerobot import Builder, _datasets
from jaxvp.data import rlds
from jaxvp.errors import UserError

EPISODES = (Episode(7), Episode(8, task=(0, 0, 0, 1, 1, 1, 1, 1)), Episode(6, task=1))


def lerobot(root, **options) -> Builder:
    return Builder(raw=str(root), **{"image_size": 64, "val_fraction": 0.0} | options)


def built(builder: Builder, item=None):
    """The episode of an item, of the first by default."""
    (made,) = builder.build(item or builder.items()[0])
    return made


def steps_seen(images) -> list[tuple[int, int]]:
    return [raw.seen(rlds.decode_image(image)) for image in images]


@pytest.mark.parametrize(("version", "codec"), [
    ("v2.0", "libx264"), ("v2.1", "libx264"), ("v3.0", "libsvtav1")])
def test_a_dataset_is_read_back_as_clips(tmp_path, version, codec):
    root = raw_lerobot.write(tmp_path / "raw", version, EPISODES, codec=codec)
    builder = lerobot(root, gripper=("gripper.pos=0:100",))
    assert builder.name == "lerobot_raw"
    folder, report = raw.convert(builder, tmp_path / "out")
    assert (report.kept, report.steps, report.notes, report.unreadable) == (3, 21, {}, [])
    clips = raw.clips(folder, ("top", "wrist"), fps=5, frames=2, chunk=2)
    episodes = clips.episodes
    assert episodes.names["action"] == tuple(NAMES) == episodes.names["state"]
    assert episodes.units["state"] == ("", "", "", "0 closed .. 1 open")
    assert set(episodes.robots()) == {"so100"} and set(episodes.fps) == {FPS}
    assert sorted(episodes.text("episode_id", i) for i in range(3)) == ["0", "1", "2"]
    for record in range(3):
        number = int(episodes.text("episode_id", record))
        start = int(episodes.lengths[:record].sum())
        clip = clips[start + 2]
        assert [raw.seen(image) for image in clip["video"][:, 0]] == [
            (10 * number + 2, 0), (10 * number + 2, 1)]
        assert raw.seen(clip["video"][0, 1]) == (10 * number + 4, 0)
        state, action = (raw.physical(clips, clip, name) for name in ("state", "action"))
        np.testing.assert_allclose(
            state, [*(10 * number + 2 + 0.01 * np.arange(3)), 0], atol=1e-3)
        np.testing.assert_allclose(action[:, 0], [-10 * number - 2, -10 * number - 3], atol=1e-3)
        np.testing.assert_allclose(action[:, 3], [0, 1], atol=1e-3)
        texts = [text.decode() for text in episodes[record].instruction]
        assert texts == [TASKS[task] for task in EPISODES[number].tasks()]
    sparse = built(lerobot(root, fps=5), (".", 1))
    assert steps_seen(sparse.images["wrist"]) == [(10, 1), (12, 1), (14, 1), (16, 1)]
    np.testing.assert_allclose(sparse.state[:, 0], [10, 12, 14, 16])
    assert sparse.instruction == [TASKS[0], TASKS[0], TASKS[1], TASKS[1]]


def test_every_camera_and_its_order_can_be_chosen(tmp_path):
    root = raw_lerobot.write(tmp_path / "raw", "v2.1", EPISODES[:1])
    assert list(Dataset(root).cameras) == ["top", "wrist"], "depth is left out"
    made = built(lerobot(root, cameras=("wrist",)))
    assert list(made.images) == ["wrist"] and made.camera_text == "cameras wrist"
    with pytest.raises(ValueError, match="--cameras=front: lerobot_raw has top, wrist"):
        lerobot(root, cameras=("front",)).items()


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_short_and_missing_videos(tmp_path, version):
    episodes = (Episode(8, frames={"top": 6}), Episode(7, frames={"wrist": 0}),
                Episode(9, frames={"top": 4}), Episode(5))
    root = raw_lerobot.write(tmp_path / "raw", version, episodes)
    builder = lerobot(root)
    short, blind, broken, _ = builder.items()
    made = built(builder, short)
    assert steps_seen(made.images["top"]) == [(step, 0) for step in range(6)]
    assert len(made.state) == len(made.images["wrist"]) == 6
    np.testing.assert_allclose(made.action[:, 0], -np.arange(6))
    assert made.notes == ("cut: the top ended first",)
    made = built(builder, blind)
    assert list(made.images) == ["top"] and len(made.state) == 7
    with pytest.raises(ValueError, match="lengths do not fit.*'states': 9, 'top': 4"):
        built(builder, broken)
    with pytest.raises(Skip, match="fewer than 2 views"):
        built(lerobot(root, min_views=2), blind)
    _, report = raw.convert(lerobot(root, min_views=2), tmp_path / "out")
    assert (report.kept, report.skipped) == (2, {"fewer than 2 views": 1})
    assert report.notes == {"cut: the top ended first": 1}
    assert "'item': \"('.', 2)\"" in str(report.unreadable)


def test_videos_that_go_on_after_the_states_or_have_another_rate(tmp_path):
    root = raw_lerobot.write(tmp_path / "raw", "v2.1", (Episode(6, frames={"top": 8}),))
    made = built(lerobot(root))
    assert len(made.state) == 6 and made.notes == ("cut: the states ended first",)
    root = raw_lerobot.write(tmp_path / "slow", "v2.1", EPISODES[:1])
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fps": 2 * FPS}))
    with pytest.raises(ValueError, match="000000.mp4 has 10 frames per second, info.json says 20"):
        built(lerobot(root))


def test_a_damaged_video_is_named(tmp_path):
    root = raw_lerobot.write(tmp_path / "raw", "v2.1", EPISODES)
    (path,) = root.glob("videos/chunk-000/observation.images.top/episode_000001.mp4")
    path.write_bytes(path.read_bytes()[:300])
    _, report = raw.convert(lerobot(root), tmp_path / "out")
    (entry,) = report.unreadable
    assert report.kept == 2 and str(path) in entry["error"]


def change_table(path, change):
    """Rewrites a parquet file; `change` is given its columns by name, lists, and changes them."""
    _datasets.cache_clear()
    columns = parquet.read_table(path, partitioning=None).to_pydict()
    change(columns)
    parquet.write_table(pa.table(columns), path)


EPISODE_TABLE = "meta/episodes/chunk-000/file-000.parquet"
VIDEO = "videos/observation.images.top"


def shift(*seconds):
    """Moves the times of the episodes, of the camera top."""
    def change(columns):
        for side in ("from", "to"):
            name = f"{VIDEO}/{side}_timestamp"
            columns[name] = [a + b for a, b in zip(columns[name], seconds, strict=True)]
    return change


def packed(folder, episodes, change=None):
    """Format 3.0, whose last episode has files of its own."""
    root = raw_lerobot.write(folder, "v3.0", episodes)
    if change:
        change_table(root / EPISODE_TABLE, change)
    return root


THREE = (Episode(6), Episode(5), Episode(7))


@pytest.mark.parametrize("seconds", [(0.0, 0.04, 0.04), (0.0, 0.06, 0.11), (-0.07, 0.3, 0.8)])
def test_times_that_drift_show_no_frame_of_another_episode(tmp_path, seconds):
    root = packed(tmp_path / "raw", (*THREE, Episode(5)), shift(*seconds, 0.0))
    builder = lerobot(root)
    for number in range(3):
        made = built(builder, (".", number))
        assert steps_seen(made.images["top"]) == [
            (10 * number + step, 0) for step in range(THREE[number].length)]
        drifts = abs(seconds[number]) > 0.05
        assert made.notes == (("times of videos drift: frames are counted instead",) * drifts)


def test_a_short_video_does_not_shift_those_that_follow(tmp_path):
    """Nor when the frames that it lacks are another's, and times drift."""
    episodes = (Episode(8, frames={"top": 6}), Episode(5, frames={"top": 7}), *THREE[2:],
                Episode(5))
    for name, seconds in ("exact", (0.0,) * 4), ("drift", (0.0, 0.03, 0.06, 0.0)):
        builder = lerobot(packed(tmp_path / name, episodes, shift(*seconds)))
        for number, length in enumerate((6, 5, 7)):
            made = built(builder, (".", number))
            assert steps_seen(made.images["top"]) == [
                (10 * number + step, 0) for step in range(length)]
            assert steps_seen(made.images["wrist"])[-1] == (10 * number + length - 1, 1)


def drop_first(columns):
    for name in columns:
        del columns[name][0]


def test_frames_that_no_episode_has(tmp_path):
    """Of an episode that the table lacks: the times of the others count, if they fit."""
    root = packed(tmp_path / "exact", (*THREE, Episode(5)), drop_first)
    for number, length in ((1, 5), (2, 7)):
        made = built(lerobot(root), (".", number))
        assert steps_seen(made.images["top"]) == [
            (10 * number + step, 0) for step in range(length)]
        assert not made.notes
    change_table(root / EPISODE_TABLE, shift(0.04, 0.0, 0.0))
    with pytest.raises(UserError, match="top/chunk-000/file-000.mp4: the table has episode 1 from "
                       "0.64 to 1.14 s, which does not fit its 5 rows, nor do the 2 episodes of "
                       "this file fill its 18 frames"):
        built(lerobot(root), (".", 1))
    assert steps_seen(built(lerobot(root), (".", 2)).images["top"])[0] == (20, 0)
    root = packed(tmp_path / "longer", (*THREE, Episode(5)), drop_first)
    change_table(root / EPISODE_TABLE, lambda columns: columns.update(length=[5, 8, 5]))
    with pytest.raises(UserError, match="episode 2 from 1.1 to 1.8 s, which does not fit its 8 ro"):
        built(lerobot(root), (".", 2))


def test_a_packed_video_of_another_rate(tmp_path):
    root = packed(tmp_path / "raw", THREE)
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fps": 2 * FPS}))
    with pytest.raises(UserError, match="file-000.mp4 has 10 frames per second, info.json says 20"):
        built(lerobot(root))
    _datasets.cache_clear()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fps": 1.002 * FPS}))
    made = built(lerobot(root), (".", 1))
    assert steps_seen(made.images["top"])[-1] == (14, 0)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_cameras_whose_videos_are_missing_are_counted(tmp_path, version):
    """The last episode has a file of its own in both formats."""
    root = raw_lerobot.write(tmp_path / "raw", version, EPISODES)
    files = sorted(root.glob("videos/**/*.mp4"))
    wrist = [file for file in files if "wrist" in str(file)]
    wrist[-1].unlink()
    folder, report = raw.convert(lerobot(root), tmp_path / "out")
    assert (report.kept, report.missing, report.unreadable) == (3, {"wrist": 1}, [])
    saved = json.loads((folder / "build_report.json").read_text())
    assert saved["missing"] == {"wrist": 1}
    for file in wrist[:-1]:
        file.unlink()
    with pytest.raises(UserError, match="raw: no episode has a video of the camera wrist: compl"):
        lerobot(root).items()
    _, report = raw.convert(lerobot(root, cameras=("top",)), tmp_path / "top")
    assert (report.kept, report.missing) == (3, {})


def as_floats(columns):
    """As pandas writes a table of which a number is absent."""
    for name, values in columns.items():
        if isinstance(values[0], int) and not isinstance(values[0], bool):
            columns[name] = [np.nan if value is None else float(value) for value in values]


def test_tables_of_floats_and_nan(tmp_path):
    root = packed(tmp_path / "raw", (*EPISODES, Episode(5)))
    for path in root.glob("**/*.parquet"):
        change_table(path, as_floats)

    def blind(columns):
        for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp"):
            columns[f"{VIDEO}/{name}"][3] = np.nan
    change_table(root / EPISODE_TABLE, blind)

    def unlabelled(columns):
        columns["task_index"][8] = np.nan
    change_table(root / "data/chunk-000/file-000.parquet", unlabelled)
    builder = lerobot(root)
    assert builder.items() == [(".", number) for number in range(4)]
    for number, episode in enumerate(EPISODES):
        made = built(builder, (".", number))
        assert steps_seen(made.images["top"]) == [
            (10 * number + step, 0) for step in range(episode.length)]
        texts = [TASKS[task] for task in episode.tasks()]
        texts[1:2] = [""] if number == 1 else texts[1:2]
        assert made.instruction == texts
    assert list(built(builder, (".", 3)).images) == ["wrist"]
    _, report = raw.convert(builder, tmp_path / "out")
    assert (report.kept, report.missing, report.unreadable) == (4, {"top": 1}, [])
    assert report.notes == {"some steps have no instruction": 1}


def test_numbers_that_are_none(tmp_path):
    root = packed(tmp_path / "half", THREE,
                  lambda columns: columns.update({"data/file_index": [0.5, 0.0, 1.0]}))
    with pytest.raises(UserError, match="data/file_index of an episode must be a whole number, fo"
                       "und 0.5"):
        lerobot(root).items()
    root = packed(tmp_path / "none", THREE,
                  lambda columns: columns.update({"data/file_index": [np.nan, 0.0, 1.0]}))
    with pytest.raises(UserError, match="not say in which file of data episode 0 is"):
        built(lerobot(root))
    root = packed(tmp_path / "number", THREE,
                  lambda columns: columns.update(episode_index=[np.nan, 1.0, 2.0]))
    with pytest.raises(UserError, match="an episode in meta has no episode_index"):
        lerobot(root).items()

    def hole(columns):
        columns["action"][2] = None
    root = packed(tmp_path / "action", THREE)
    change_table(root / "data/chunk-000/file-000.parquet", hole)
    _, report = raw.convert(lerobot(root), tmp_path / "out")
    assert report.kept == 2
    assert "action must be finite" in report.unreadable[0]["error"]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_task_that_the_table_lacks(tmp_path, version):
    root = raw_lerobot.write(tmp_path / "raw", version, EPISODES)
    if version == "v3.0":
        change_table(root / "meta/tasks.parquet", lambda columns: columns.update(task_index=[0, 7]))
    else:
        lines = (root / "meta/tasks.jsonl").read_text()
        (root / "meta/tasks.jsonl").write_text(lines.replace(': 1', ': 7.0'))
    _, report = raw.convert(lerobot(root), tmp_path / "out")
    assert report.kept == 1 and [entry["item"] for entry in report.unreadable] == [
        "('.', 1)", "('.', 2)"]
    assert re.search("UserError: .*/meta/tasks.(jsonl|parquet) has no task 1, only 0, 7.",
                     report.unreadable[0]["error"])


def test_a_recording_that_was_never_finalized(tmp_path):
    root = packed(tmp_path / "raw", THREE)
    data = root / "data/chunk-000/file-000.parquet"
    whole = data.read_bytes()
    for cut in (b"", whole[:4], whole[:-300]):
        data.write_bytes(cut)
        with pytest.raises(UserError, match="file-000.parquet: .*recording is finalized.* never w"):
            built(lerobot(root))
    table = root / EPISODE_TABLE
    _datasets.cache_clear()
    table.write_bytes(table.read_bytes()[:-300])
    with pytest.raises(UserError, match="file-000.parquet: .*recording is finalized.* never was"):
        lerobot(root).items()
    table.unlink()
    with pytest.raises(UserError, match=r"raw: meta has no episodes. .*dataset.finalize\(\).* nev"):
        lerobot(root).items()
    root = raw_lerobot.write(tmp_path / "old", "v2.1", THREE)
    (root / "meta/episodes.jsonl").write_text("")
    with pytest.raises(UserError, match="old: meta has no episodes. Is the download complete"):
        lerobot(root).items()


@pytest.mark.parametrize(("names", "expected"), [
    (["a", "b", "c", "d"], ["a", "b", "c", "d"]),
    ({"motors": ["a", "b", "c", "d"]}, ["a", "b", "c", "d"]),
    ({"b": 1, "a": 0, "d": 3, "c": 2}, ["a", "b", "c", "d"]),
    ([["a", "b", "c", "d"]], ["a", "b", "c", "d"]),
    (["x", "y", "z", "y"], ["x_0", "y_1", "z_2", "y_3"]),
    (["state"], ["state_0", "state_1", "state_2", "state_3"]),
    (None, ["state_0", "state_1", "state_2", "state_3"]),
])
def test_dimension_names_come_in_many_forms(tmp_path, names, expected):
    state = {"dtype": "float32", "shape": [4], "names": names}
    root = raw_lerobot.write(tmp_path / "raw", "v2.1", EPISODES[:1],
                             features=FEATURES | {"observation.state": state})
    assert Dataset(root).part("observation.state").names == expected


def test_images_in_the_table(tmp_path):
    image = {"dtype": "image", "shape": [3, 48, 64], "names": ["channel", "height", "width"]}
    features = {"observation.image": image} | {
        key: feature for key, feature in FEATURES.items() if feature["dtype"] != "video"}
    root = raw_lerobot.write(tmp_path / "raw", "v3.0", EPISODES, features=features,
                             video_path=None)
    builder = lerobot(root, fps=5)
    made = built(builder, builder.items()[1])
    assert steps_seen(made.images["image"]) == [(10, 0), (12, 0), (14, 0), (16, 0)]
    np.testing.assert_allclose(made.action[:, 0], [-11, -13, -15, -17], atol=1e-5)
    assert made.fps == 5


def test_other_columns_as_state_action_and_instruction(tmp_path):
    """RoboCasa's annotation column, DROID's texts, GR00T's modality.json, scalars."""
    root = raw_lerobot.write(
        tmp_path / "raw", "v2.1", EPISODES[:1],
        features=FEATURES | {
            "annotation.human.task": {"dtype": "int64", "shape": [1], "names": None},
            "language": {"dtype": "string", "shape": [1], "names": None},
            "width": {"dtype": "float32", "shape": [1], "names": None}},
        columns=lambda number, length: {
            "annotation.human.task": np.ones(length, np.int64),
            "language": ["tidy up"] * length, "width": np.arange(length) / 10})
    modality = {"state": {"arm": {"start": 1, "end": 3}},
                "action": {"grip": {"start": 3, "end": 4, "original_key": "action"}}}
    (root / "meta" / "modality.json").write_text(json.dumps(modality))
    builder = lerobot(root, state=("width", "state.arm"), action=("action.grip",),
                      task_column="annotation.human.task", gripper=("action.grip=100:0",))
    doc = builder.features()["steps"].feature["observation"]["state"].doc.desc
    assert doc == "width, state.arm_0, state.arm_1"
    made = built(builder)
    assert set(made.instruction) == {TASKS[1]}
    np.testing.assert_allclose(made.state[3], [0.3, 3.01, 3.02], atol=1e-5)
    np.testing.assert_allclose(made.action[:, 0], [1, 0, 1, 0, 1, 0, 1])
    assert set(built(lerobot(root, task_column="language")).instruction) == {"tidy up"}
    with pytest.raises(ValueError, match="no vector 'language'; there are observation.state,"):
        lerobot(root, state=("language",)).items()


def test_relative_actions_add_up_and_still_steps_go(tmp_path):
    root = raw_lerobot.write(tmp_path / "raw", "v2.1", EPISODES[:1])
    made = built(lerobot(root, fps=5, relative=tuple(NAMES[:2])))
    np.testing.assert_allclose(made.action[1], [-5, -5.02, -3.02, 100], atol=1e-5)
    with pytest.raises(ValueError, match="--relative: there is no dimension x; there are joint_0"):
        lerobot(root, relative=("x",)).items()
    rows = raw_lerobot.vector(0, 7, 4) * np.array([1, 1, 1, 0])
    rows[2:4] = 0
    root = raw_lerobot.write(tmp_path / "pauses", "v2.1", EPISODES[:1],
                             columns=lambda number, length: {"action": rows})
    made = built(lerobot(root, noops="drop", relative=tuple(NAMES)))
    np.testing.assert_allclose(made.action[:, 1], [0.01, 1.01, 4.01, 5.01, 6.01], atol=1e-5)
    assert steps_seen(made.images["top"]) == [(step, 0) for step in (0, 1, 4, 5, 6)]


def test_without_state_actions_or_instruction(tmp_path):
    root = raw_lerobot.write(tmp_path / "raw", "v2.1", EPISODES[:1], robot_type="unknown")
    folder, _ = raw.convert(lerobot(root, state=(), action=()), tmp_path / "out")
    episodes = rlds.Episodes(folder, "train")
    assert not episodes.has_action[0] and episodes.names == {"action": (), "state": ()}
    assert list(episodes.robots()) == ["robot of lerobot_raw"]
    (root / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": " "}\n')
    other = dataclasses.replace(lerobot(root.rename(tmp_path / "unlabelled")), robot="SO-100 arm")
    with pytest.raises(Skip, match="no instruction"):
        built(other)
    made = built(dataclasses.replace(other, unlabelled="keep"))
    assert set(made.instruction) == {""} and made.robot == "SO-100 arm"


def test_several_datasets_below_raw(tmp_path):
    for name in ("b", "a/deep"):
        raw_lerobot.write(tmp_path / "raw" / name, "v2.1", EPISODES[:1])
    builder = lerobot(tmp_path / "raw")
    assert builder.items() == [("a/deep", 0), ("b", 0)]
    made = built(builder)
    assert made.episode_id == "a/deep/0"
    assert made.source == "a/deep/data/chunk-000/episode_000000.parquet:episode_index 0"
    raw_lerobot.write(tmp_path / "other" / "b", "v2.1", EPISODES[:1])
    names = {"dtype": "float32", "shape": [4], "names": None}
    raw_lerobot.write(tmp_path / "other" / "a", "v2.1", EPISODES[:1],
                      features=FEATURES | {"action": names})
    with pytest.raises(ValueError, match="of b are .*joint_0.*, of a .*action_0.* separately"):
        lerobot(tmp_path / "other").items()


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no .*absent"):
        lerobot(tmp_path / "absent").items()
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "1_2.tar.gz").touch()
    with pytest.raises(UserError, match=r"meta/info.json, only archives.*1_2.tar.gz"):
        lerobot(tmp_path / "packed").items()
    old = raw_lerobot.write(tmp_path / "old", "v2.1", EPISODES[:1], codebase_version="v1.6")
    with pytest.raises(ValueError, match="must be 2.0, 2.1 or 3.0, found 1.6"):
        lerobot(old).items()
    root = raw_lerobot.write(tmp_path / "raw", "v2.1", EPISODES[:2])
    for text in ("gripper.pos", "gripper.pos=0", "gripper.pos=a:b", "gripper.pos=1:1"):
        with pytest.raises(ValueError, match="--gripper must be NAME=CLOSED:OPEN"):
            lerobot(root, gripper=(text,)).items()
    with pytest.raises(ValueError, match="--gripper: there is no dimension claw; there are"):
        lerobot(root, gripper=("claw=0:1",)).items()
    with pytest.raises(ValueError, match="episode_000001.parquet: .*nothing_here"):
        built(lerobot(root, task_column="nothing_here"), (".", 1))
    (root / "data" / "chunk-000" / "episode_000001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="episode_000001.parquet"):
        built(lerobot(root), (".", 1))
    wide = {"dtype": "float32", "shape": [5], "names": None}
    root = raw_lerobot.write(tmp_path / "wide", "v2.1", EPISODES[:1])
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"features": FEATURES | {
        "action": wide}}))
    with pytest.raises(ValueError, match=r"action has 4 dimensions, info.json says \[5\]"):
        built(lerobot(root))
    packed = raw_lerobot.write(tmp_path / "v3", "v3.0", EPISODES[:2])
    for name, lost in ("episodes/chunk-000/file-000.parquet", -100), ("tasks.parquet", -8):
        path = packed / "meta" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:lost])
        with pytest.raises(ValueError, match=f"meta/{name}: .*Parquet magic bytes not found"):
            built(lerobot(packed))
        path.write_bytes(whole)
    (tmp_path / "bad" / "meta").mkdir(parents=True)
    (tmp_path / "bad" / "meta" / "info.json").write_text("{")
    with pytest.raises(ValueError, match="info.json is not JSON"):
        lerobot(tmp_path / "bad").items()
    for text in ("[]", "{}", '{"fps": 10}'):
        (tmp_path / "bad" / "meta" / "info.json").write_text(text)
        with pytest.raises(UserError, match="info.json must have features and fps"):
            lerobot(tmp_path / "bad").items()
