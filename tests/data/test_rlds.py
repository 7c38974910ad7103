"""Reading RLDS: what is written comes back, and damage is named."""

import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from synthetic import LENGTHS, action, colour, state

from jaxvp.data import rlds
from jaxvp.data.rlds import Episodes


def test_round_trip(dataset):
    episodes = Episodes(dataset, "train")
    assert episodes.lengths.tolist() == list(LENGTHS) and len(episodes) == len(LENGTHS)
    assert episodes.cameras == ("head", "left_wrist", "right_wrist")
    assert episodes.names == {"action": ("x", "y", "z"), "state": ("a", "b")}
    assert episodes.units == {"action": ("m", "rad", ""), "state": ("m", "")}
    assert episodes.text("episode_id", 3) == "episode-3" and episodes.robots() == ("test robot",)
    record = episodes[3]
    for step in (0, 29):
        np.testing.assert_array_equal(record.action[step], action(3, step))
        np.testing.assert_array_equal(record.state[step], state(3, step))
        image = rlds.decode_image(record.images["right_wrist"][step])
        assert np.abs(image.astype(int) - colour(3, step, 2)).max() <= 3
    assert record.instruction[4:6] == [b"task 3", b"task 3 more"]


def test_tfds_reads_what_jaxvp_writes(dataset):
    source = tfds.builder_from_directory(dataset).as_data_source("train")
    steps = list(source[1]["steps"])
    assert len(steps) == LENGTHS[1]
    assert [s["is_first"] for s in steps] == [True] + [False] * (len(steps) - 1)
    assert steps[-1]["is_last"] and steps[-1]["is_terminal"] and steps[-1]["reward"] == 1
    image = steps[2]["observation"]["head"].astype(int)
    assert np.abs(image - colour(1, 2, 0)).max() <= 3
    assert json.loads(source[1]["episode_metadata"]["options"])["fps"] == 10.0


def test_long_episodes_are_cut_evenly(make_dataset):
    episodes = Episodes(make_dataset("cut", lengths=(25, 4), max_steps=10), "train")
    assert episodes.lengths.tolist() == [9, 8, 8, 4]
    assert episodes.offsets.tolist() == [0, 9, 17, 0]
    assert [episodes.text("episode_id", i) for i in range(4)] == ["episode-0"] * 3 + ["episode-1"]
    np.testing.assert_array_equal(episodes[2].action[0], action(0, 17))


def test_index_is_read_once(dataset, monkeypatch):
    Episodes(dataset, "train")
    monkeypatch.setattr(Episodes, "_make_index", lambda self: pytest.fail("indexed again"))
    Episodes(dataset.parent, "train")


def test_read_only_dataset_uses_the_cache_folder(make_dataset, tmp_path, monkeypatch):
    folder = make_dataset("read_only")
    (folder / ".jaxvp").touch()  # A file, where a folder would have to be made.
    monkeypatch.setenv("JAXVP_CACHE", str(tmp_path / "cache"))
    assert len(Episodes(folder, "train")) == len(LENGTHS)
    assert len(list((tmp_path / "cache").glob("index-train-*.npz"))) == 1


def test_memory_of_parsed_records_is_bounded(dataset):
    episodes = Episodes(dataset, "train", cache_bytes=60_000)
    for record in range(len(episodes)):
        assert len(episodes[record].instruction) == LENGTHS[record]
    assert 0 < episodes._cached_bytes <= 60_000
    assert episodes[0] is not episodes.columns(0)


def test_absent_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: the folder does not exist.*--out"):
        Episodes(tmp_path / "nowhere", "train")


def test_unfinished_build_is_no_dataset(tmp_path):
    (tmp_path / "1.0.0.incomplete").mkdir()
    with pytest.raises(FileNotFoundError, match="an unfinished build"):
        Episodes(tmp_path, "train")


def test_several_versions(make_dataset, tmp_path):
    folder = make_dataset("versions")
    shutil.copytree(folder, folder.with_name("2.0.0"))
    with pytest.raises(ValueError, match=r"several versions \(1.0.0, 2.0.0\)"):
        Episodes(folder.parent, "train")


def test_absent_split(dataset):
    with pytest.raises(ValueError, match=r"no split 'test', but \['train'\]"):
        Episodes(dataset, "test")


def test_truncated_shard(make_dataset):
    folder = make_dataset("truncated")
    shard = next(folder.glob("*-00001-of-00002"))
    shard.write_bytes(shard.read_bytes()[:70_000])
    with pytest.raises(ValueError, match=f"{shard.name} is truncated or damaged"):
        Episodes(folder, "train")


def test_damaged_record(make_dataset):
    folder = make_dataset("damaged")
    shard = next(folder.glob("*-00000-of-00002"))
    data = bytearray(shard.read_bytes())
    data[2000:2100] = bytes(100)
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"train\[\d\] is damaged"):
        Episodes(folder, "train")


def test_missing_shard(make_dataset):
    folder = make_dataset("missing")
    next(folder.glob("*-00001-of-00002")).unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 files: .*00001-of-00002"):
        Episodes(folder, "train")


def test_shards_of_another_build(make_dataset):
    folder = make_dataset("mixed")
    first, second = sorted(folder.glob("*-of-00002"))
    shutil.copy(first, second)
    with pytest.raises(ValueError, match="4 records, dataset_info.json says 2"):
        Episodes(folder, "train")


def test_tfrecord_is_refused(make_dataset):
    folder = make_dataset("tfrecord")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="is tfrecord: random access needs array_record"):
        Episodes(folder, "train")


def test_features_of_another_schema(make_dataset):
    folder = make_dataset("schema")
    text = (folder / "features.json").read_text().replace("camera_layout", "layout")
    (folder / "features.json").write_text(text)
    with pytest.raises(ValueError, match="features.json lacks 'camera_layout'"):
        Episodes(folder, "train")


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff\xd9"])
def test_bad_image(data):
    with pytest.raises(rlds.BadImage, match=f"{len(data)} bytes"):
        rlds.decode_image(data)
