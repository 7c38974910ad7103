"""Mixtures: order, shares, resuming, several processes, statistics."""

import dataclasses

import numpy as np
import pytest
from synthetic import LENGTHS, action, state, write

from jaxvp.config import build
from jaxvp.data import mixture
from jaxvp.data.mixture import DataConfig, SourceConfig
from jaxvp.data.text import ByteTokenizer


def config(*folders, **changes):
    sources = tuple({"path": str(f)} if not isinstance(f, dict) else f for f in folders)
    values = dict(num_frames=2, fps=5, chunk=3, image_size=16, text_length=48)
    return DataConfig(sources=sources, **values | changes)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two datasets with training and validation splits."""
    folder = tmp_path_factory.mktemp("two")
    return [
        write(folder / name, val_fraction=0.4, robot=robot)
        for name, robot in (("a", "robot a"), ("b", "robot b"))
    ]


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])
    return True


def test_batch_is_a_clip_with_a_batch_axis(dataset):
    batch = next(mixture.train_iterator(config(dataset), 4, seed=0))
    shapes = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    assert shapes == {
        "video": ((4, 3, 2, 16, 16, 3), "uint8"),
        "view_mask": ((4, 3), "bool"),
        "frame_mask": ((4, 2), "bool"),
        "text": ((4, 48), "int32"),
        "action": ((4, 3, 3), "float32"),
        "action_mask": ((4, 3, 3), "bool"),
        "state": ((4, 2), "float32"),
        "state_mask": ((4, 2), "bool"),
        "source": ((4,), "int32"),
    }
    assert np.abs(batch["action"]).max() <= 1


def test_every_clip_once_per_epoch_in_a_new_order(dataset):
    iterator = mixture.train_iterator(config(dataset), 1, seed=3)
    epochs = [take(iterator, sum(LENGTHS)) for _ in range(2)]
    keys = [[(b["state"].tobytes(), b["text"].tobytes()) for b in epoch] for epoch in epochs]
    assert len(set(keys[0])) == sum(LENGTHS) and set(keys[0]) == set(keys[1])
    assert keys[0] != keys[1]


def test_the_seed_decides_the_order(two):
    first, same, other = (
        take(mixture.train_iterator(config(*two), 4, seed), 3) for seed in (1, 1, 2)
    )
    assert equal(first, same)
    assert any((a["state"] != b["state"]).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("num_threads", [0, 2])
def test_resuming_is_exact(two, num_threads):
    cfg = config(*two, num_threads=num_threads)
    iterator = mixture.train_iterator(cfg, 4, seed=1)
    take(iterator, 5)
    saved = iterator.get_state()
    expected = take(iterator, 4)
    fresh = mixture.train_iterator(cfg, 4, seed=1)
    next(fresh)
    fresh.set_state(saved)
    assert equal(take(fresh, 4), expected)
    iterator.set_state(saved)
    assert equal(take(iterator, 4), expected)


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_sees_the_same_batches(two, count):
    cfg = config(*two)
    single = take(mixture.train_iterator(cfg, 8, seed=5), 5)
    parts = [
        take(mixture.train_iterator(cfg, 8, 5, process_index=p, process_count=count), 5)
        for p in range(count)
    ]
    together = [
        {key: np.concatenate([part[n][key] for part in parts]) for key in single[0]}
        for n in range(5)
    ]
    assert equal(together, single)


def test_state_of_one_process_continues_on_two(two):
    cfg = config(*two)
    single = mixture.train_iterator(cfg, 4, seed=5)
    take(single, 3)
    parts = [mixture.train_iterator(cfg, 4, 5, p, 2) for p in range(2)]
    for part in parts:
        part.set_state(single.get_state())
    halves = [next(part)["state"] for part in parts]
    np.testing.assert_array_equal(np.concatenate(halves), next(single)["state"])


def test_state_of_another_batch_size(two):
    cfg = config(*two)
    iterator = mixture.train_iterator(cfg, 4, seed=5)
    take(iterator, 3)
    double = mixture.train_iterator(cfg, 6, seed=5)
    double.set_state(iterator.get_state())
    expected = np.concatenate([batch["state"] for batch in take(iterator, 3)])
    found = np.concatenate([batch["state"] for batch in take(double, 2)])
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="12 examples, is not a multiple of batch_size 5"):
        mixture.train_iterator(cfg, 5, seed=5).set_state({"step": 3, "batch_size": 4})


def test_shares_follow_the_weights(two):
    sources = ({"path": str(two[0]), "weight": 3}, {"path": str(two[1]), "weight": 1.0})
    iterator = mixture.train_iterator(config(*sources), 4, seed=0)
    drawn = np.concatenate([batch["source"] for batch in take(iterator, 50)])
    assert (drawn == 0).sum() == 150 and (drawn == 1).sum() == 50


def test_validation_batches_are_fixed_and_held_out(two):
    batches = mixture.validation_batches(config(*two), 4, 3)
    assert len(batches) == 3
    assert equal(list(batches), [batches[i] for i in range(3)])
    texts = {ByteTokenizer(48).decode(row) for batch in batches for row in batch["text"]}
    held_out = [item for item in range(len(LENGTHS)) if item >= len(LENGTHS) * 0.6]
    assert texts and all(int(text.split("task ")[1].split()[0]) in held_out for text in texts)
    none = [{"path": str(folder), "validation_split": ""} for folder in two]
    with pytest.raises(ValueError, match="No source has a validation_split"):
        mixture.validation_batches(config(*none), 4, 3)


def test_validation_keeps_the_numbers_of_the_sources(two):
    sources = ({"path": str(two[0]), "validation_split": ""}, {"path": str(two[1])})
    batch = mixture.validation_batches(config(*sources), 4, 1)[0]
    assert (batch["source"] == 1).all()


def test_statistics_are_those_of_numpy(dataset):
    normalizer = mixture.statistics(config(dataset))["test robot"]
    for column, value in (("action", action), ("state", state)):
        rows = np.stack(
            [value(e, s) for e, length in enumerate(LENGTHS) for s in range(length)]
        ).astype(np.float64)
        stats = getattr(normalizer, column)
        assert stats.count == len(rows)
        np.testing.assert_allclose(stats.min, rows.min(0))
        np.testing.assert_allclose(stats.max, rows.max(0))
        np.testing.assert_allclose(stats.mean, rows.mean(0))
        np.testing.assert_allclose(stats.std, rows.std(0), atol=1e-12)
        np.testing.assert_allclose(stats.q01, np.quantile(rows, 0.01, axis=0))
        np.testing.assert_allclose(stats.q99, np.quantile(rows, 0.99, axis=0))


def test_statistics_are_cached_by_content(make_dataset, monkeypatch):
    folder = make_dataset("cached")
    first = mixture.statistics(config(folder))
    with monkeypatch.context() as patch:
        patch.setattr(mixture, "_compute_statistics", lambda sources: pytest.fail("computed again"))
        assert mixture.statistics(config(folder)) == first
        quantile = mixture.statistics(config(folder, normalization="quantile"))
    assert quantile["test robot"].action == first["test robot"].action
    changed = make_dataset("changed", lengths=(9, 4))
    for shard in folder.glob("synthetic-*"):
        shard.unlink()
    for name in ("dataset_info.json", "synthetic-train.array_record-00000-of-00001"):
        (folder / name).write_bytes((changed / name).read_bytes())
    assert mixture.statistics(config(folder)) != first


def test_statistics_decode_no_image(dataset, monkeypatch):
    monkeypatch.setattr("jaxvp.data.rlds.decode_image", lambda data: pytest.fail("decoded"))
    monkeypatch.setattr("jaxvp.data.rlds.cached", lambda folder, name, make: make())
    monkeypatch.setattr("jaxvp.data.mixture.cached", lambda folder, name, make: make())
    assert mixture.statistics(config(dataset))


def test_statistics_per_robot_and_of_a_subset(two, monkeypatch):
    assert set(mixture.statistics(config(*two))) == {"robot a", "robot b"}
    monkeypatch.setattr(mixture, "MAX_STATISTICS_STEPS", 10)
    monkeypatch.setattr("jaxvp.data.mixture.cached", lambda folder, name, make: make())
    assert 5 <= mixture.statistics(config(*two))["robot a"].action.count <= 20


def test_video_without_actions_joins_a_mixture(dataset, make_dataset):
    video = make_dataset("video", has_action=False, robot="person")
    cfg = config(dataset, video)
    assert mixture.statistics(cfg)["person"].action is None
    batch = next(mixture.train_iterator(cfg, 8, seed=0))
    assert batch["action_mask"].any((1, 2)).tolist() == (batch["source"] == 0).tolist()


def test_sizes_can_be_set_ahead(dataset):
    batch = next(mixture.train_iterator(config(dataset, action_size=7, state_size=3), 2, seed=0))
    assert batch["action"].shape == (2, 3, 7) and batch["state"].shape == (2, 3)
    with pytest.raises(ValueError, match="action_size is 2, but a robot has 3"):
        mixture.train_iterator(config(dataset, action_size=2), 2, seed=0)


def test_normalizers_of_a_checkpoint_are_used(dataset):
    cfg = config(dataset)
    saved = mixture.statistics(cfg)
    wide = dataclasses.replace(saved["test robot"].state, min=(-100.0, -100.0), max=(100.0, 100.0))
    given = {"test robot": dataclasses.replace(saved["test robot"], state=wide)}
    iterator = mixture.train_iterator(cfg, 4, seed=0, normalizers=given)
    assert iterator.normalizers == given and np.abs(next(iterator)["state"]).max() < 0.1


def test_bad_records_are_counted(make_dataset):
    folder = make_dataset("corrupt", bad_frame=(1, 9))
    iterator = mixture.train_iterator(config(folder), 4, seed=0)
    take(iterator, 20)
    assert iterator.bad_records == 1


def test_bad_configs(dataset):
    for changes, message in (
        ({"layout": "bimanal"}, "data.layout is 'bimanal'; there are single"),
        ({"normalization": "z"}, "data.normalization is 'z'"),
        ({"fps": 0}, "data.fps must be positive, found 0"),
    ):
        with pytest.raises(ValueError, match=message):
            config(dataset, **changes)
    with pytest.raises(ValueError, match=r"data.sources\[0\].wieght does not exist. Did you mean"):
        config({"path": "x", "wieght": 2})
    with pytest.raises(ValueError, match="data.num_frame does not exist. Did you mean"):
        build(DataConfig, {"num_frame": 2}, "data")
    with pytest.raises(ValueError, match="sources is empty"):
        config()
    with pytest.raises(ValueError, match="weight .* must be positive, found 0"):
        SourceConfig(path="x", weight=0)
    with pytest.raises(ValueError, match="batch_size 3 must be a positive multiple of the 2"):
        mixture.train_iterator(config(dataset), 3, seed=0, process_count=2)
