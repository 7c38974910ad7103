"""TFRecord without TensorFlow: damaged files, and a dataset that TensorFlow wrote."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from raw import convert
from raw_open_x import build, concatenated, one_file, small

from data_builders import images
from data_builders.open_x import open_x, tfrecord
from data_builders.open_x.datasets import Dataset, Part
from data_builders.open_x.open_x import Builder

GOLDEN = Path(__file__).parents[1] / "golden"
BLACK = np.zeros((36, 48, 3), np.uint8)


def damaged(tmp_path, change):
    """The report of a file of three records after `change` of (its bytes, offsets of records)."""
    folder = one_file(tmp_path, "cmu_stretch", {}, {}, {})
    (path,) = folder.glob("*.tfrecord-*")
    data = bytearray(path.read_bytes())
    offsets = [0]
    for _ in range(2):
        offsets.append(offsets[-1] + 16 + int.from_bytes(data[offsets[-1]:offsets[-1] + 8],
                                                         "little"))
    path.write_bytes(change(data, offsets))
    tfrecord._offsets.cache_clear()
    _, report = convert(small(folder), tmp_path / "out")
    assert report.items == 3
    return report, offsets


def flipped(data, position):
    data[position] ^= 1
    return data


def test_a_damaged_record_is_reported_and_the_others_are_read(tmp_path):
    report, offsets = damaged(tmp_path, lambda data, offsets: flipped(data, offsets[1] + 500))
    assert report.kept == 2
    (entry,) = report.unreadable
    assert f"record 1 at byte {offsets[1]} is damaged, its checksum differs" in entry["error"]
    assert "cmu_stretch-train.tfrecord-00000-of-00001" in entry["error"]


def test_after_a_damaged_length_nothing_is_read(tmp_path):
    report, offsets = damaged(tmp_path, lambda data, offsets: flipped(data, offsets[1] + 2))
    assert report.kept == 1
    assert [entry["error"].partition("has ")[2] for entry in report.unreadable] == [
        f"no record {number}: after 1 records the length at byte {offsets[1]} is damaged."
        for number in (1, 2)]


@pytest.mark.parametrize(("end", "message"), [
    (-3, "the record at byte {} goes on after the end of the file"),
    ((2, 7), "the file ends in a header at byte {}"), ((2, 0), "the file ends")])
def test_a_truncated_file_gives_its_whole_records(tmp_path, end, message):
    report, offsets = damaged(tmp_path, lambda data, offsets: data[
        :end if end == -3 else offsets[end[0]] + end[1]])
    assert report.kept == 2
    (entry,) = report.unreadable
    assert f"after 2 records {message.format(offsets[2])}." in entry["error"]


def test_episodes_that_cannot_be_read_are_named(tmp_path):
    good = {"language_instruction": "go"}
    truncated = {"observation/image": lambda step: images.encode_jpeg(BLACK)[:-9 * (step == 2)
                                                                             or None]}
    folder = one_file(tmp_path, "cmu_stretch", good, truncated, {"action": [np.nan] * 8},
                 {"observation/state": [1, 2, np.inf, 4]})
    _, report = convert(small(folder), tmp_path / "out")
    assert report.kept == 1
    file = "UserError: cmu_stretch-train.tfrecord-00000-of-00001"
    assert [entry["error"] for entry in report.unreadable] == [
        f"{file}, record 1: {len(images.encode_jpeg(BLACK)) - 9} bytes are not a whole image",
        f"{file}, record 2: action has numbers that are not finite",
        f"{file}, record 3: observation/state has numbers that are not finite"]


def test_records_that_do_not_fit_features_json():
    specs = {"a": tfrecord.Spec((2,), "float32", "none"), "z": tfrecord.Spec((), "int64", "zlib")}
    example = tfrecord.tf_example_pb2.Example()
    example.features.feature["a"].float_list.value.extend([1, 2, 3])
    example.features.feature["z"].bytes_list.value.append(b"no zlib")
    record = tfrecord.Example(example.SerializeToString(), specs)
    with pytest.raises(ValueError, match=r"a does not fit \(2,\) float32, encoding none"):
        record.array("a")
    with pytest.raises(ValueError, match=r"z does not fit \(\) int64, encoding zlib"):
        record.array("z")
    with pytest.raises(ValueError, match="the episode has no b"):
        record.values("b")
    with pytest.raises(ValueError, match="not a tf.train.Example"):
        tfrecord.Example(b"\x0a\xff\xff", specs)


def test_a_file_is_scanned_once(tmp_path):
    folder = one_file(tmp_path, "cmu_stretch", *[{}] * 5, length=2)
    tfrecord._offsets.cache_clear()
    settings = small(folder)
    for item in reversed(settings.items()):
        next(settings.build(item))
    assert tfrecord._offsets.cache_info().misses == 1


# What TensorFlow itself writes.


@pytest.fixture
def golden():
    spec = importlib.util.spec_from_file_location("rlds_tfrecord", GOLDEN / "rlds_tfrecord.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_dataset_that_tensorflow_wrote(golden, monkeypatch):
    """Values are exact; pictures are as near as JPEG leaves them."""
    table = {"rlds_tfrecord": Dataset(
        robot="robot", fps=5, cameras={"agentview": "image"},
        action=(Part("action/move", ("a", "b", "c")), Part("action/open", ("open",))),
        state=(Part("observation/state", ("x", "y", "z", "w")),
               Part("observation/clip/pose", ("p", "q", "r")),
               Part("observation/double", ("s", "t"))),
        language=("observation/codes",), success="success")}
    monkeypatch.setattr(open_x, "DATASETS", table)
    folder = GOLDEN / "rlds_tfrecord"
    settings = Builder(raw=str(folder), image_size=32, failed="keep")
    items = settings.items()
    assert [settings.split(item) for item in items] == ["train"] * 3 + ["val"]
    specs, found = tfrecord.download(folder).specs, set()
    for item in items:
        record = tfrecord.Example(tfrecord.read(folder / item[0], item[1]), specs)
        path = record.values("episode_metadata/file_path")[0].decode()
        split, number = path.split("/")[0], int(path.split("/")[1])
        length = golden.LENGTHS[split][number]
        made = build(settings, items.index(item))
        columns = np.array([[golden.value(number, step, i) for i in range(4)]
                            for step in range(length)])
        opened = np.arange(length) % 2 == 0
        np.testing.assert_array_equal(made.action, concatenated(columns[:, :3], opened))
        np.testing.assert_array_equal(
            made.state, concatenated(columns, columns[:, :3], columns[:, :2]))
        assert made.instruction == [golden.TEXT] * length and made.success == (number != 1)
        texts = [text.decode() for text in record.values("steps/language_instruction")]
        assert texts == [f"{golden.TEXT} {number}"] * length
        for step, frame in enumerate(made.images["agentview"]):
            expected = images.resize(golden.picture(number, step), 32)
            difference = np.abs(images.decode(frame).astype(int) - expected)
            assert difference.mean() < 4 and difference.max() < 40
        found.add(path)
    assert found == {"train/0", "train/1", "train/2", "val/0"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 200_000
