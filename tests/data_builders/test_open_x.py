"""Open X-Embodiment to RLDS: datasets with quirks as training reads them, options, messages."""

import json

import numpy as np
import pytest
from raw import clips, convert, physical, seen
from raw_open_x import build, column, concatenated, one_file, small, tensors, write

from data_builders import images
from data_builders.builder import Skip
from data_builders.open_x.datasets import DATASETS
from data_builders.open_x.open_x import Builder
from jaxvp.data import rlds
from jaxvp.errors import UserError


def trip(tmp_path, folder, view="agentview", fps=None, **options):
    """(clips of one view at the dataset's rate, report)."""
    made, report = convert(small(folder, **options), tmp_path / "out")
    return clips(made, (view,), fps or float(rlds.Episodes(made, "train").fps[0])), report


def frames(found, clip):
    """(step, view) of every frame."""
    assert found[clip]["view_mask"].all()
    return [seen(image) for image in found[clip]["video"][0]]


def text(found, record=0):
    return found.episodes[record].instruction[0].decode()


def test_fractal(tmp_path):
    dataset = "fractal20220817_data"
    values = {"action/gripper_closedness_action": lambda step: [0, 0.05, 1, 0, -1, 0][step],
              "observation/gripper_closed": lambda step: step / 10,
              "observation/natural_language_instruction": "pick  coke can\n"}
    folder = one_file(tmp_path, dataset, values, length=6)
    found, report = trip(tmp_path, folder)
    assert (report.kept, report.steps) == (1, 6) and found.episodes.fps[0] == 3
    assert found.episodes.has_action[0] and text(found) == "pick coke can"
    assert frames(found, 1) == [(1, 0), (2, 0), (3, 0), (4, 0)]
    action = concatenated(column(dataset, "action/world_vector", 6),
                          column(dataset, "action/rotation_delta", 6),
                          np.array([1, 1, 0, 0, 1, 1]))
    np.testing.assert_allclose(physical(found, found[2], "action"), action[2:5], atol=1e-5)
    np.testing.assert_allclose(physical(found, found[0], "action"), action[:3], atol=1e-5)
    pose = column(dataset, "observation/base_pose_tool_reached", 6)[3]
    np.testing.assert_allclose(physical(found, found[3], "state"), [*pose, 0.7], atol=1e-5)
    metadata = {name: found.episodes.text(name, 0) for name in ("robot", "camera_layout")}
    assert metadata == {"robot": "Everyday Robots mobile manipulator",
                        "camera_layout": "agentview"}
    assert found.episodes.names["action"][-1] == "gripper"
    assert found.episodes.units["action"][:4] == ("m", "m", "m", "rad")


BLACK = np.zeros((36, 48, 3), np.uint8)


def bridge_state(step):
    """x moves by 0.01, 0.03, 0.05, ...; the roll passes from pi to -pi after step 1; the gripper is
    half open."""
    return [0.01 * step**2, 0.2, 0, 3.1 + 0.03 * step - 2 * np.pi * (step > 1), 0, 0, 0.5]


def test_bridge_v2_is_relabelled_and_black_cameras_are_missing(tmp_path):
    grippers = [0, 1, 0.6, 0.3, 0.02, 1]
    values = {"action": lambda step: [9.0 * (step > 0)] * 6 + [grippers[step]],
              "observation/state": bridge_state, "language_instruction": "put the pot in the sink",
              "observation/image_2": BLACK, "observation/image_3": BLACK}
    whole = {name: value for name, value in values.items() if "image" not in name}
    folder = one_file(tmp_path, "bridge_dataset", values, whole, length=6, version="1.0.0")
    settings = small(folder)
    found, report = trip(tmp_path, folder, "side")
    assert report.kept == 2 and report.missing == {"side_2": 1, "wrist": 1}
    assert found.episodes.text("camera_layout", 0) == "agentview,side"
    text = found.episodes.text("camera_text", 0)
    assert text == "a third-person view, a view from the side"
    assert found.episodes.cameras == ("agentview", "side", "side_2", "wrist")
    # The first step is without motion, the last without a next state.
    assert found.episodes.lengths[0] == 4
    assert frames(found, 0) == [(1, 1), (2, 1), (3, 1), (4, 1)]
    action = found.episodes[0].action
    np.testing.assert_allclose(action[:, 0], [0.03, 0.05, 0.07, 0.09], atol=1e-6)
    assert not action[:, 1:3].any()
    np.testing.assert_allclose(action[:, 3], [0.03] * 4, atol=1e-5)
    np.testing.assert_allclose(action[:, 6], [1, 0, 0, 0])
    np.testing.assert_allclose(found.episodes[0].state[:, 0], [0.01, 0.04, 0.09, 0.16])
    assert not clips(tmp_path / "out" / "1.0.0", ("wrist",), 5.0)[0]["view_mask"].any()
    with pytest.raises(Skip, match="fewer than 3 views"):
        build(small(folder, min_views=3))
    assert settings.view_names(DATASETS["bridge_dataset"].cameras) == (
        "agentview", "side", "side_2", "wrist")


def test_a_step_without_a_text_does_not_cost_the_episode(tmp_path):
    """Nor does a text of white space hide the next key's."""
    texts = {"observation/natural_language_instruction": lambda step: ["", "go  left"][step > 1]}
    folder = one_file(tmp_path, "fractal20220817_data", texts)
    found, report = trip(tmp_path, folder)
    assert report.kept == 1 and report.notes == {"some steps have no instruction": 1}
    assert found.episodes[0].instruction == [b"", b"", b"go left", b"go left"]
    several = {"language_instruction": " ", "language_instruction_2": b"None",
               "language_instruction_3": "open it ",
               "episode_metadata/file_path": "lab/success/1"}
    made = build(small(one_file(tmp_path / "droid", "droid", several)))
    assert set(made.instruction) == {"open it"}


def test_bridge_v2_keeps_a_first_step_that_moves(tmp_path):
    values = {"observation/state": bridge_state, "action": [0, 0, 1e-3, 0, 0, 0, 1]}
    made = build(small(one_file(tmp_path, "bridge_dataset", values)))
    assert len(made.action) == 3 and seen(images.decode(made.images["wrist"][0])) == (0, 3)
    with pytest.raises(ValueError, match="00000-of-00001, record 0: the episode has no steps"):
        build(small(one_file(tmp_path / "one", "bridge_dataset", values, length=1)))


def test_bridge_of_the_collection(tmp_path):
    values = {"action/world_vector": lambda step: [step, 0, 0],
              "action/rotation_delta": [0, 0, 0], "action/open_gripper": lambda step: step == 2,
              "observation/state": bridge_state}
    found, _ = trip(tmp_path, one_file(tmp_path, "bridge", values, length=5))
    np.testing.assert_allclose(found.episodes[0].action[:, 0], [0.03, 0.05, 0.07], atol=1e-6)
    np.testing.assert_allclose(found.episodes[0].action[:, 6], [0, 1, 0])
    assert [seen(image) for image in found[0]["video"][0][:3]] == [(1, 0), (2, 0), (3, 0)]
    assert text(found) == "the natural_language_instruction"
    assert found.episodes.text("robot", 0) == DATASETS["bridge_dataset"].robot


def test_kuka_keeps_successes_reads_zlib_and_has_no_text(tmp_path):
    pose = "observation/clip_function_input/base_pose_tool_reached"
    values = {"success": True, "action/gripper_closedness_action": 0,
              "observation/gripper_closed": lambda step: step == 2}
    folder = one_file(tmp_path, "kuka", {"success": False}, values)
    found, report = trip(tmp_path, folder)
    assert report.kept == 1 and report.skipped == {"not successful": 1}
    assert found.episodes.text("episode_id", 0) == "kuka-train.tfrecord-00000-of-00001:1"
    state = concatenated(column("kuka", pose), np.array([1, 1, 0, 1]))
    np.testing.assert_allclose(found.episodes[0].state, state, atol=1e-6)
    np.testing.assert_allclose(found.episodes[0].action[:, 6], [1, 1, 1, 1])
    assert text(found) == "" and found.episodes.fps[0] == 10
    with pytest.raises(Skip, match="not successful"):
        build(small(folder))
    assert not build(small(folder, failed="keep")).success


@pytest.mark.parametrize("name", ["r2d2_faceblur", "droid_101", "droid"])
def test_droid(tmp_path, name):
    path = "episode_metadata/file_path"
    good = {path: "/nfs/AUTOLab/success/2023-07-07/1/trajectory.h5", "language_instruction": "",
            "language_instruction_2": "", "language_instruction_3": "wipe the table",
            "action_dict/gripper_position": lambda step: step / 4}
    silent = dict.fromkeys((f"language_instruction{i}" for i in ("", "_2", "_3")), "")
    folder = one_file(tmp_path, "droid", good, {path: "/nfs/AUTOLab/failure/2023-07-07/2"},
                 good | silent, name=name, version="1.0.1")
    assert small(folder).name == "droid"
    found, report = trip(tmp_path, folder, "wrist")
    assert report.skipped == {"not successful": 1, "no instruction": 1} and report.kept == 1
    assert found.episodes.text("dataset", 0) == "droid" and found.episodes.fps[0] == 15
    published = [name for name, (_, dtype, _) in tensors("droid").items() if dtype == "jpeg"]
    view = published.index("observation/wrist_image_left")
    assert frames(found, 0) == [(step, view) for step in range(4)]
    assert text(found) == "wipe the table"
    velocity = column("droid", "action_dict/cartesian_velocity")
    action = concatenated(0.075 * velocity[:, :3], 0.15 * velocity[:, 3:],
                          np.array([1, 0.75, 0.5, 0.25]))
    np.testing.assert_allclose(physical(found, found[0], "action"), action[:3], atol=1e-6)
    state = concatenated(column("droid", "observation/cartesian_position"),
                         1 - column("droid", "observation/gripper_position"))
    np.testing.assert_allclose(physical(found, found[1], "state"), state[1], atol=1e-6)


def test_language_table(tmp_path):
    codes = np.frombuffer("push the “red” star".encode().ljust(512, b"\0"), np.uint8)
    values = {"observation/instruction": codes.astype(np.int32)}
    found, report = trip(tmp_path, one_file(tmp_path, "language_table", values))
    assert report.kept == 1 and text(found) == "push the “red” star"
    np.testing.assert_allclose(physical(found, found[1], "action")[:3],
                               column("language_table", "action")[[1, 2, 3]], atol=1e-6)
    state = column("language_table", "observation/effector_translation")
    np.testing.assert_allclose(physical(found, found[2], "state"), state[2], atol=1e-6)
    assert frames(found, 0)[2] == (2, 0)


def test_bc_z(tmp_path):
    closing = np.zeros((4, 10), int)
    closing[2:, 0] = 1
    closing[:, 1:] = 1  # Later actions of the chunk.
    values = {"action/future/target_close": lambda step: closing[step],
              "observation/present/sensed_close": 0.25}
    found, _ = trip(tmp_path, one_file(tmp_path, "bc_z", values))
    action = concatenated(column("bc_z", "action/future/xyz_residual")[:, :3],
                          column("bc_z", "action/future/axis_angle_residual")[:, :3],
                          np.array([1, 1, 0, 0]))
    np.testing.assert_allclose(found.episodes[0].action, action, atol=1e-6)
    np.testing.assert_allclose(found.episodes[0].state[:, 6], [0.75] * 4)
    assert frames(found, 0)[1] == (1, 0) and text(found) == "the natural_language_instruction"
    with pytest.raises(ValueError, match="version 1.0.0 of bc_z, and only 0.1.0 is known"):
        small(one_file(tmp_path, "bc_z", {}, version="1.0.0")).items()


def test_ur5(tmp_path):
    values = {"action/gripper_closedness_action": lambda step: [0, -1, 0, 1][step]}
    found, _ = trip(tmp_path, one_file(tmp_path, "berkeley_autolab_ur5", values), "wrist")
    assert frames(found, 0) == [(step, 1) for step in range(4)]  # Red and blue put right.
    np.testing.assert_allclose(found.episodes[0].action[:, 6], [0, 1, 1, 0])
    state = column("berkeley_autolab_ur5", "observation/robot_state")
    expected = concatenated(state[:, 6:13], 1 - state[:, 13])
    np.testing.assert_allclose(physical(found, found[1], "state"), expected[1], atol=1e-6)


@pytest.mark.parametrize(("module", "right"), [
    ("rlds_dataset_mod.multithreaded_adhoc_tfds_builder", False), ("rtx", True)])
def test_copies_that_octo_has_prepared_are_not_swapped_again(tmp_path, module, right):
    folder = one_file(tmp_path, "utaustin_mutex", {})
    path = folder / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"moduleName": module}))
    red, _, blue = images.decode(build(small(folder)).images["wrist"][0]).mean((0, 1))
    assert (blue > red) == right  # The test's pictures are blue, and swapped in the download.


# Options and splits.


def test_fewer_steps_add_up_changes_and_keep_the_last_gripper(tmp_path):
    dataset = "fractal20220817_data"
    values = {"action/gripper_closedness_action": lambda step: [0, 1, 0, -1][step],
              "observation/natural_language_instruction": lambda step: f"part {step // 2}"}
    folder = one_file(tmp_path, dataset, values)
    made = build(small(folder, fps=1.5))
    move = column(dataset, "action/world_vector")
    np.testing.assert_allclose(made.action[:, :3], move[::2] + move[1::2], rtol=1e-5)
    np.testing.assert_allclose(made.action[:, 6], [0, 1])
    pose = column(dataset, "observation/base_pose_tool_reached")
    np.testing.assert_allclose(made.state[:, :7], pose[::2], rtol=1e-5)
    assert made.instruction == ["part 0", "part 1"]
    assert made.fps == 1.5 and [seen(images.decode(frame))[0] for frame in
                                made.images["agentview"]] == [0, 2]
    still = {"action/world_vector": lambda step: [step == 2, 0, 0],
             "action/rotation_delta": [0, 0, 0], "action/gripper_closedness_action": [0]}
    made = build(small(one_file(tmp_path / "still", dataset, still), noops="drop"))
    assert [seen(images.decode(frame)) for frame in made.images["agentview"]] == [(2, 0)]


def test_filters(tmp_path):
    folder = one_file(tmp_path, "cmu_stretch", {"language_instruction": " "})
    with pytest.raises(Skip, match="no instruction"):
        build(small(folder))
    assert build(small(folder, unlabelled="keep")).instruction == [""] * 4
    with pytest.raises(Skip, match="shorter than 1 s"):
        build(small(folder, unlabelled="keep", min_seconds=1.0))
    with pytest.raises(ValueError, match="--cameras=wrist: cmu_stretch has agentview"):
        small(folder, cameras=("wrist",)).features()
    made = build(small(one_file(tmp_path, "roboset", {}), cameras=("wrist", "top")))
    assert list(made.images) == ["wrist", "top"]
    assert made.camera_text == "a wrist view, a view from above"


def test_a_camera_that_the_download_lacks_is_named(tmp_path):
    """Of another version, say; else all episodes would silently lack it."""
    folder = one_file(tmp_path, "roboset", {})
    path = folder / "features.json"
    path.write_text(path.read_text().replace('"image_top"', '"image_above"'))
    with pytest.raises(ValueError, match=r"lacks steps/observation/image_top\[1\]; it has"):
        small(folder).items()
    assert small(folder, cameras=("wrist",)).items()


@pytest.mark.parametrize("dataset", ["bridge_dataset", "kuka"])
def test_an_episode_without_steps_is_counted(tmp_path, dataset):
    folder = tmp_path / dataset
    write(folder, dataset, {"train": [[{}]]}, length=0)
    with pytest.raises(ValueError, match="00000-of-00001, record 0: the episode has no steps"):
        build(small(folder, failed="keep"))


def test_splits_of_the_dataset_stay(tmp_path):
    write(tmp_path / "three", "viola", {"train": [[{}, {}], [{}]], "test": [[{}]], "val": [[{}]]})
    settings = Builder(raw=str(tmp_path / "three"), val_fraction=1.0)
    assert settings.items() == [
        ("viola-train.tfrecord-00000-of-00002", 0), ("viola-train.tfrecord-00000-of-00002", 1),
        ("viola-train.tfrecord-00001-of-00002", 0), ("viola-test.tfrecord-00000-of-00001", 0),
        ("viola-val.tfrecord-00000-of-00001", 0)]
    splits = [settings.split(item) for item in settings.items()]
    assert splits == ["train"] * 3 + ["val"] * 2
    write(tmp_path / "one", "viola", {"train": [[{}, {}]]})
    for fraction, split in (0.0, "train"), (1.0, "val"):
        settings = Builder(raw=str(tmp_path / "one"), val_fraction=fraction)
        assert [settings.split(item) for item in settings.items()] == [split] * 2


def test_many_short_episodes_go_into_about_a_thousand_files(tmp_path):
    folder = one_file(tmp_path, "viola", {})
    assert small(folder).items_per_shard == 64
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    info["splits"][0]["shardLengths"] = ["442226"]
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / path.name).write_text(json.dumps(info))
    (tmp_path / "large" / "features.json").write_bytes((folder / "features.json").read_bytes())
    assert small(tmp_path / "large").items_per_shard == 432


# Names and messages.


def test_the_dataset_is_recognised_by_info_folder_or_flag(tmp_path):
    folder = tmp_path / "bridge_orig" / "1.0.0"
    write(folder, "bridge_dataset", {"train": [[{}]]}, name="my_bridge")
    assert small(folder).name == "bridge_dataset"
    folder = tmp_path / "own" / "1.0.0"
    write(folder, "viola", {"train": [[{}]]}, name="voila")
    with pytest.raises(ValueError, match="has no dataset 'voila'; near names are viola.*"
                                         "--dataset=NAME.*add an entry"):
        small(folder).items()
    assert small(folder, dataset="viola").items() == [
        ("voila-train.tfrecord-00000-of-00001", 0)]
    with pytest.raises(ValueError, match="has no dataset 'vioal'; near names are viola"):
        small(folder, dataset="vioal").items()
    with pytest.raises(ValueError, match=r"is not toto.*lacks steps/action/open_gripper\[1\], "
                                         r"steps/observation/state\[7\], "
                                         r"steps/observation/image\[1\]; it has"):
        small(folder, dataset="toto").items()


def test_what_is_not_a_download_is_named(tmp_path):
    (tmp_path / "1.0.0").mkdir()
    with pytest.raises(UserError, match="--raw.*no .*dataset_info.json; .* has 1.0.0"):
        small(tmp_path).items()
    folder = one_file(tmp_path, "viola", {})
    info = json.loads((folder / "dataset_info.json").read_text())
    for name, change, message in (
            ("a", {"fileFormat": "array_record"}, "holds array_record files, not tfrecord"),
            ("b", {"splits": []}, "dataset_info.json lists no files")):
        other = tmp_path / name
        other.mkdir()
        (other / "dataset_info.json").write_text(json.dumps(info | change))
        with pytest.raises(ValueError, match=message):
            small(other).items()


def test_missing_files_are_an_error_or_left_out(tmp_path):
    write(tmp_path / "viola", "viola", {"train": [[{}], [{}, {}]]})
    missing = tmp_path / "viola" / "viola-train.tfrecord-00000-of-00002"
    missing.unlink()
    with pytest.raises(UserError, match="lacks 1 of 2 files, such as .*-00000-of-00002: "
                                                "download them, or .* --partial"):
        small(tmp_path / "viola").items()
    items = small(tmp_path / "viola", partial=True).items()
    assert items == [("viola-train.tfrecord-00001-of-00002", number) for number in (0, 1)]
