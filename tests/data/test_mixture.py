"""Mixtures: order, shares, resuming, several processes, statistics."""

import dataclasses
import json
import time

import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from synthetic import LENGTHS, action, damage, state, write
from tensorflow_datasets.proto import tf_example_pb2

from jaxvp.config import build
from jaxvp.data import array_record, clips, mixture, statistics
from jaxvp.data.mixture import Mixture
from jaxvp.data.sources import DataConfig, open_source
from jaxvp.data.spec import Window
from jaxvp.data.text import ByteTokenizer
from jaxvp.errors import UserError

WINDOW = Window(fps=5, future=1, chunk=3)


def config(*folders, **changes):
    sources = tuple({"path": str(f)} if not isinstance(f, dict) else f for f in folders)
    values = dict(window=WINDOW, image_size=16, text_length=48)
    return DataConfig(sources=sources, **values | changes)


def train(cfg, *arguments, known=None, **options):
    return Mixture(cfg, known).train(cfg.window, *arguments, **options)


def validation(cfg, *arguments):
    return Mixture(cfg).validation(cfg.window, *arguments)


def normalizers(cfg):
    return Mixture(cfg).normalizers


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
    batch = next(train(config(dataset), 4, seed=0))
    shapes = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    assert shapes == {
        "video": ((4, 3, 2, 16, 16, 3), "uint8"),
        "view_mask": ((4, 3), "bool"),
        "frame_mask": ((4, 2), "bool"),
        "text": ((4, 48), "int32"),
        "action": ((4, 3, 3), "float32"),
        "action_mask": ((4, 3, 3), "bool"),
        "state": ((4, 1, 2), "float32"),
        "state_mask": ((4, 1, 2), "bool"),
        "source": ((4,), "int32"),
    }
    assert np.abs(batch["action"]).max() <= 1


def test_every_clip_once_per_epoch_in_a_new_order(dataset):
    iterator = train(config(dataset), 1, seed=3)
    epochs = [take(iterator, sum(LENGTHS)) for _ in range(2)]
    keys = [[(b["state"].tobytes(), b["text"].tobytes()) for b in epoch] for epoch in epochs]
    assert len(set(keys[0])) == sum(LENGTHS) and set(keys[0]) == set(keys[1])
    assert keys[0] != keys[1]


def test_the_seed_decides_the_order(two):
    first, same, other = (
        take(train(config(*two), 4, seed), 3) for seed in (1, 1, 2)
    )
    assert equal(first, same)
    assert any((a["state"] != b["state"]).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("num_threads", [0, 2])
def test_resuming_is_exact(two, num_threads):
    cfg = config(*two, num_threads=num_threads)
    iterator = train(cfg, 4, seed=1)
    take(iterator, 5)
    saved = iterator.get_state()
    expected = take(iterator, 4)
    fresh = train(cfg, 4, seed=1)
    next(fresh)
    fresh.set_state(saved)
    assert equal(take(fresh, 4), expected)
    iterator.set_state(saved)
    assert equal(take(iterator, 4), expected)


def test_any_number_of_processes_sees_the_same_batches(two, tmp_path):
    """Bit for bit, also when a run is continued on another number of them, and with bad records."""
    folder = write(tmp_path, bad_frame=(1, 9))
    (source,) = config(folder).sources
    cfg = config(*two, folder)
    damage(folder, open_source(cfg, source)[3].images["left_wrist"][20])
    reference = train(cfg, 8, seed=5)
    expected = take(reference, 28)
    assert reference.bad_records == 2
    parts = {
        count: [train(cfg, 8, 5, process_index=p, process_count=count)
                for p in range(count)]
        for count in (1, 2, 4)
    }
    step = 0
    for count in (4, 1, 2, 4, 2, 1, 4):
        state = json.loads(json.dumps(reference.get_state() | {"step": step}))
        for part in parts[count]:
            part.set_state(state)
        batches = [take(part, 4) for part in parts[count]]
        step += 4
        assert all(part.get_state() == state | {"step": step} for part in parts[count])
        found = [{key: np.concatenate([part[n][key] for part in batches]) for key in expected[0]}
                 for n in range(4)]
        assert equal(found, expected[step - 4 : step])


def test_state_of_another_batch_size(two):
    cfg = config(*two)
    iterator = train(cfg, 4, seed=5)
    take(iterator, 3)
    double = train(cfg, 6, seed=5)
    double.set_state(iterator.get_state())
    expected = np.concatenate([batch["state"] for batch in take(iterator, 3)])
    found = np.concatenate([batch["state"] for batch in take(double, 2)])
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="24 examples, is not a multiple of batch_size 5"):
        train(cfg, 5, seed=5).set_state(iterator.get_state())


def test_a_state_in_other_data_is_refused(two, dataset):
    """Records that came, sources that were exchanged or filtered: a position means nothing then."""
    state = train(config(*two), 4, seed=5).get_state()
    changed = config(*two), config(*reversed(two)), config(two[0])
    train(changed[0], 4, seed=5).set_state(state)
    for other in changed[1:]:
        with pytest.raises(UserError, match="are not those of the checkpoint"):
            train(other, 4, seed=5).set_state(state)
    old = {"step": 1, "batch_size": 4}  # Of a version that did not say which data.
    with pytest.raises(UserError, match="are not those of the checkpoint"):
        train(config(*two), 4, seed=5).set_state(old)


def test_windows_do_not_change_the_order_of_the_clips(two):
    """A stage that sees less of the same data is at the same place in it."""
    wide = dataclasses.replace(WINDOW, past=3, future=2, past_actions=2)
    data = Mixture(config(*two, window=wide))
    whole, part = (data.train(window, 4, seed=5) for window in (wide, WINDOW))
    assert whole.spec == data.spec and part.spec == data.spec.narrow(WINDOW)
    batches, parts = take(whole, 3), take(part, 3)
    assert whole.get_state() == part.get_state()
    fresh = data.train(WINDOW, 4, seed=5)
    fresh.set_state(whole.get_state())
    assert equal(take(fresh, 2), take(part, 2))
    held_out = [list(data.validation(window, 4, 2)) for window in (wide, WINDOW)]
    slices = {"video": np.s_[:, :, 2:4], "frame_mask": np.s_[:, 2:4], "action": np.s_[:, 2:],
              "action_mask": np.s_[:, 2:], "state": np.s_[:, 2:], "state_mask": np.s_[:, 2:]}
    for batch, small in zip(batches + held_out[0], parts + held_out[1], strict=True):
        assert equal([{name: x[slices.get(name, ...)] for name, x in batch.items()}], [small])
    with pytest.raises(UserError, match="data.window is .*, but a stage wants to see "):
        Mixture(config(*two)).train(wide, 4, seed=5)


def test_one_clip_of_some_shows_the_future(two, monkeypatch):
    """In the others it is masked, and no image of it is decoded; all else is as without."""
    decoded = []
    decode = clips.decode_image
    monkeypatch.setattr(clips, "decode_image",
                        lambda *arguments: decoded.append(1) or decode(*arguments))
    cfg = config(*two, num_threads=0)  # No batch is made ahead.
    with monkeypatch.context() as patch:
        patch.setattr(mixture, "BatchReader",
                      lambda clips_, threads, kept, every: clips.BatchReader(clips_, threads, kept))
        whole, all_images = next(train(cfg, 6, seed=0, future_every=3)), len(decoded)
    decoded.clear()
    batch = next(train(cfg, 6, seed=0, future_every=3))
    past = WINDOW.past
    hidden = np.arange(6) % 3 > 0
    assert not batch["frame_mask"][hidden, past:].any()
    assert (batch["video"][hidden][:, :, past:] == 127).all()
    assert len(decoded) < all_images
    for name, values in whole.items():
        np.testing.assert_array_equal(batch[name][~hidden], values[~hidden])
        if name not in ("video", "frame_mask"):
            np.testing.assert_array_equal(batch[name], values)
    np.testing.assert_array_equal(batch["video"][:, :, :past], whole["video"][:, :, :past])
    with pytest.raises(UserError, match="batch_size is 4, over 1 processes: expected a multiple of "
                                        "3 in each"):
        train(cfg, 4, seed=0, future_every=3)


def test_clips_that_show_no_future_have_actions(dataset, make_dataset):
    video = make_dataset("video", has_action=False, robot="person")
    cfg = config(dataset, video)
    batches = take(train(cfg, 12, seed=0, future_every=3), 20)
    hidden = np.arange(12) % 3 > 0
    for batch in batches:
        assert batch["action_mask"][hidden].any((1, 2)).all()
        assert set(batch["source"][~hidden]) == {0, 1}
    seen = [b["state"][hidden].tobytes() for b in batches]
    assert len(set(seen)) == len(seen)
    parts = [train(cfg, 12, 0, process_index=p, process_count=2, future_every=3) for p in (0, 1)]
    for batch in batches[:4]:
        halves = [next(part) for part in parts]
        for name, values in batch.items():
            np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), values)
    with pytest.raises(UserError, match="No record of .*video.* has actions to train on"):
        train(config(video), 6, seed=0, future_every=3)


def test_a_share_of_the_episodes_is_labelled(make_dataset):
    folder = make_dataset("labels", lengths=(4,) * 12, max_steps=2)
    window = dataclasses.replace(WINDOW, chunk=2)

    def labelled(share, **options):
        cfg = config({"path": str(folder), "labelled": share}, window=window)
        batches = take(train(cfg, 4, 0, **options), 60)
        assert episodes_in(batches) == set(range(12))
        shown = [{name: value[rows] for name, value in batch.items()} for batch in batches
                 if (rows := batch["action_mask"].any((1, 2))).any()]
        return episodes_in(shown), normalizers(cfg)["test robot"].action

    some, statistics_of_some = labelled(0.5)
    assert 2 < len(some) < 10 and statistics_of_some.count == 4 * len(some)
    assert labelled(0.5, future_every=4)[0] == some < labelled(0.8)[0]
    assert labelled(1.0)[0] == set(range(12))
    assert labelled(0.0) == (set(), None)
    held_out = config({"path": str(folder), "labelled": 0.5, "validation_split": "",
                       "validation_fraction": 0.5}, window=window)
    assert next(iter(validation(held_out, 8, 1)))["action_mask"].any((1, 2)).all()


def test_statistics_of_a_checkpoint_stay(two):
    cfg = config(*two)
    found = normalizers(cfg)
    robot, normalizer = next(iter(found.items()))
    wider = dataclasses.replace(normalizer.action, max=tuple(2 * x for x in normalizer.action.max))
    before = {robot: dataclasses.replace(normalizer, action=wider), "other": normalizer}
    data = Mixture(cfg, before)
    assert data.normalizers == found | {robot: before[robot]}
    (note,) = data.notes
    assert note.startswith(f"action of '{robot}' is normalised as in the checkpoint, by its")
    assert not Mixture(cfg, found).notes
    renamed = dataclasses.replace(wider, names=tuple(f"{name}_2" for name in wider.names))
    with pytest.raises(UserError, match="Give the robot another name"):
        Mixture(cfg, {robot: dataclasses.replace(normalizer, action=renamed)})
    with pytest.raises(UserError, match="data.normalization is 'min_max'; the checkpoint knows"):
        Mixture(cfg, {robot: dataclasses.replace(normalizer, mode="quantile")})


def test_a_column_that_the_checkpoint_lacks_comes_from_the_data(dataset, make_dataset):
    """Video of a robot first, then its actions; a robot that no longer has actions keeps them."""
    video = normalizers(config(make_dataset("video", has_action=False)))
    cfg = config(dataset)
    assert video["test robot"].action is None
    assert Mixture(cfg, video).normalizers == normalizers(cfg)
    silent = Mixture(config(make_dataset("silent", has_action=False)), normalizers(cfg))
    assert silent.normalizers == normalizers(cfg)
    assert silent.spec.action_size == 3


def test_state_is_that_of_batches_taken_not_of_those_made(two):
    iterator = train(config(*two, num_threads=2, prefetch=4), 4, seed=5)
    take(iterator, 2)
    time.sleep(0.2)
    assert iterator.get_state()["step"] == 2


def test_memory_of_batches_is_used_again_but_never_while_something_refers_to_it(dataset):
    iterator = train(config(dataset, num_threads=2), 4, seed=5)
    first = next(iterator)
    view, moved = first["video"][:, :1], {key: jnp.asarray(x) for key, x in first.items()}
    held, expected = take(iterator, 3), {key: x.copy() for key, x in first.items()}
    copies = [{key: x.copy() for key, x in batch.items()} for batch in held]
    del first
    addresses = set()
    for _ in range(20):
        batch = next(iterator)
        addresses.add(batch["video"].ctypes.data)
    assert len(addresses) <= 6  # 2 made ahead, 1 in the making, the held ones replaced.
    np.testing.assert_array_equal(view, expected["video"][:, :1])
    assert equal([{key: np.asarray(x) for key, x in moved.items()}], [expected])
    assert equal(held, copies)


def test_shares_without_weights_are_those_of_the_clips(two, dataset):
    sources = [{"path": str(folder), "weight": None} for folder in (two[0], dataset)]
    cfg = config(*sources)
    counts = [sum(LENGTHS[:4]), sum(LENGTHS)]  # Of two[0], a third of the episodes is in val.
    iterator = train(cfg, sum(counts), seed=0)
    drawn = next(iterator)["source"]
    assert abs((drawn == 0).sum() - counts[0]) <= 1
    with pytest.raises(ValueError, match="weights of None, the number of clips, and others"):
        config(sources[0], dataset)


def test_shares_follow_the_weights(two):
    sources = ({"path": str(two[0]), "weight": 3}, {"path": str(two[1]), "weight": 1.0})
    iterator = train(config(*sources), 4, seed=0)
    drawn = np.concatenate([batch["source"] for batch in take(iterator, 50)])
    assert (drawn == 0).sum() == 150 and (drawn == 1).sum() == 50


def test_validation_batches_are_fixed_and_held_out(two):
    batches = validation(config(*two), 4, 3)
    assert len(batches) == 3
    assert equal(list(batches), [batches[i] for i in range(3)])
    texts = {ByteTokenizer(48).decode(row) for batch in batches for row in batch["text"]}
    held_out = [item for item in range(len(LENGTHS)) if item >= len(LENGTHS) * 0.6]
    assert texts and all(int(text.split("task ")[1].split()[0]) in held_out for text in texts)
    none = [{"path": str(folder), "validation_split": ""} for folder in two]
    with pytest.raises(ValueError, match="No source has a validation_split"):
        validation(config(*none), 4, 3)


def test_validation_keeps_the_numbers_of_the_sources(two):
    sources = ({"path": str(two[0]), "validation_split": ""}, {"path": str(two[1])})
    batch = validation(config(*sources), 4, 1)[0]
    assert (batch["source"] == 1).all()


def episodes_in(batches):
    """The numbers in the texts of the tasks."""
    texts = {ByteTokenizer(48).decode(row) for batch in batches for row in batch["text"]}
    return {int(text.split("task ")[1].split()[0]) for text in texts}


def test_a_fraction_is_held_out_by_the_names_of_episodes(make_dataset):
    folder = make_dataset("fraction", lengths=(4,) * 12, max_steps=2)
    source = {"path": str(folder), "validation_split": "", "validation_fraction": 0.3}
    cfg = config(source, window=dataclasses.replace(WINDOW, chunk=2))
    held_out = episodes_in(validation(cfg, 4, 40))
    trained = episodes_in(take(train(cfg, 4, seed=0), 40))
    assert held_out and not held_out & trained and held_out | trained == set(range(12))
    fewer = make_dataset("fewer", lengths=(4,) * 9)  # The same episodes are held out.
    again = config(source | {"path": str(fewer)})
    assert episodes_in(validation(again, 4, 40)) == {n for n in held_out if n < 9}
    steps = normalizers(cfg)["test robot"].action.count
    assert steps == 4 * len(trained)
    with pytest.raises(ValueError, match="validation_fraction 0.0001 of .* holds no episode out"):
        train(config(source | {"validation_fraction": 0.0001}), 4, seed=0)
    for changes, message in (({"validation_split": "val"}, "a validation_split and a validation_"),
                             ({"validation_fraction": 1.0}, "fraction: expected float >= 0 and <")):
        with pytest.raises(ValueError, match=message):
            config(source | changes)


@pytest.mark.parametrize(("filters", "expected"), [
    ({"robots": ("one",)}, {0, 2, 4}), ({"min_views": 2}, {0, 1, 3, 5}),
    ({"min_seconds": 0.9}, {1, 2, 3, 5}),
    ({"robots": ("two", "one"), "min_views": 3, "min_seconds": 1.0}, {1, 3, 5}),
    ({"cameras": {"left_wrist": None}, "min_views": 2}, {0, 1, 3, 5})])
def test_filters_of_a_source(make_dataset, filters, expected):
    folder = make_dataset("filtered", robots=("one", "two"), blind=(2, 4), max_steps=10)
    cfg = config({"path": str(folder), **filters})
    assert episodes_in(take(train(cfg, 4, seed=0), 60)) == expected
    robots = {"one", "two"} & set(filters.get("robots", ("one", "two")))
    robots &= {("one", "two")[number % 2] for number in expected}
    found = normalizers(cfg)
    assert set(found) == robots
    counted = sum(normalizer.action.count for normalizer in found.values())
    assert counted == sum(LENGTHS[number] for number in expected)


def test_min_seconds_of_a_fraction(make_dataset):
    folder = make_dataset("fraction", lengths=(11, 12), fps=30000 / 1001)
    for seconds in (12 / 29.97, 12 / 29.971):
        episodes = open_source(cfg := config({"path": str(folder), "min_seconds": seconds}),
                                       cfg.sources[0])
        assert episodes.lengths.tolist() == [12]


def test_filters_that_leave_nothing(make_dataset):
    folder = str(make_dataset("filtered", robots=("one", "two"), blind=(1, 3, 5)))
    with pytest.raises(ValueError, match="No episode of .* train is left: of 6 records robots keeps"
                       " 3, min_views keeps 3, min_seconds keeps 6"):
        train(config({"path": folder, "robots": ("two",), "min_views": 2}), 4, 0)
    with pytest.raises(ValueError, match=r"has no robot 'three', but \['one', 'two'\]"):
        normalizers(config({"path": folder, "robots": ("two", "three")}))


def test_statistics_are_those_of_numpy(dataset):
    normalizer = normalizers(config(dataset))["test robot"]
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
    first = normalizers(config(folder))
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "compute", lambda sources: pytest.fail("computed again"))
        assert normalizers(config(folder)) == first
        quantile = normalizers(config(folder, normalization="quantile"))
    assert quantile["test robot"].action == first["test robot"].action
    changed = make_dataset("changed", lengths=(9, 4))
    for shard in folder.glob("synthetic-*"):
        shard.unlink()
    for name in ("dataset_info.json", "synthetic-train.array_record-00000-of-00001"):
        (folder / name).write_bytes((changed / name).read_bytes())
    assert normalizers(config(folder)) != first


def test_statistics_need_no_image(make_dataset):
    """100,000 steps, of which no image can be decoded."""
    folder = make_dataset("invalid", lengths=(2,))
    actions = np.random.default_rng(0).normal(size=(200, 500, 3)).astype(np.float32)

    def grow(file):
        data = next(iter(ArrayRecordDataSource([file])))
        example = tf_example_pb2.Example.FromString(data)
        feature = example.features.feature
        for name in [name for name in feature if name.startswith("steps/")]:
            values = getattr(feature[name], feature[name].WhichOneof("kind")).value
            values[:] = list(values)[: len(values) // 2] * 500
        for camera in ("head", "left_wrist", "right_wrist"):
            feature[f"steps/observation/{camera}"].bytes_list.value[:] = [b"no image"] * 500
        sink = ArrayRecordWriter(str(file), array_record.OPTIONS)
        for values in actions:
            feature["steps/action"].float_list.value[:] = values.ravel()
            sink.write(example.SerializeToString())
        sink.close()

    grow(*folder.glob("*.array_record*"))
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["200"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    found = normalizers(config(folder))["test robot"].action
    assert found.count == 100_000
    np.testing.assert_allclose(found.mean, actions.mean((0, 1), np.float64))
    np.testing.assert_allclose(found.q99, np.quantile(actions.astype(float), 0.99, (0, 1)))
    iterator = train(config(folder), 2, seed=0)
    with pytest.raises(ValueError, match="max_bad_records is 10"):
        next(iterator)


def test_statistics_leave_out_what_is_damaged(make_dataset):
    folder = make_dataset("damaged")
    cfg = config(folder)
    damage(folder, open_source(cfg, cfg.sources[0])[3].state.tobytes())
    assert not open_source(cfg, cfg.sources[0]).damaged  # Not where the hash looks.
    assert normalizers(cfg)["test robot"].action.count == sum(LENGTHS) - LENGTHS[3]
    iterator = train(cfg, 8, seed=0)
    take(iterator, 20)
    assert iterator.bad_records == 1


def test_statistics_per_robot(two):
    assert set(normalizers(config(*two))) == {"robot a", "robot b"}


@pytest.mark.parametrize("limit", [2, 8, 40])
def test_only_quantiles_are_of_a_sample(make_dataset, monkeypatch, limit):
    """The largest values come late, in records that are shorter than the distance of samples."""
    lengths = tuple(range(3, 20))
    rows = np.stack([action(number, step) for number, length in enumerate(lengths)
                     for step in range(length)]).astype(np.float64)
    monkeypatch.setattr(statistics, "MAX_STEPS", limit)
    found = normalizers(config(make_dataset("many", lengths=lengths)))["test robot"].action
    assert found.count == len(rows)
    assert (found.min, found.max) == (tuple(rows.min(0)), tuple(rows.max(0)))
    np.testing.assert_allclose(found.mean, rows.mean(0))
    np.testing.assert_allclose(found.std, rows.std(0), atol=1e-12)
    if limit == 40:  # Of 187 steps.
        ranks = np.searchsorted(np.sort(rows[:, 1]), (found.q01[1], found.q99[1])) / len(rows)
        assert ranks[0] < 0.06 and ranks[1] > 0.9


def test_a_sample_does_not_depend_on_records_and_sources(make_dataset, monkeypatch):
    """Episodes that are cut into other records, and sources in another order."""
    monkeypatch.setattr(statistics, "MAX_STEPS", 30)
    folders = [make_dataset(name, max_steps=steps) for name, steps in (("a", 600), ("b", 4))]
    other = make_dataset("other", lengths=(30,))
    opened = [[open_source(cfg := config(path), cfg.sources[0]) for path in paths]
              for paths in ((folders[0], other), (other, folders[0]), (other, folders[1]))]
    first, *others = [statistics.compute(sources)["test robot"]["action"]
                      for sources in opened]
    for found in others:
        for name, value in first.items():
            if name not in ("names", "units"):
                np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-12)


def test_video_without_actions_joins_a_mixture(dataset, make_dataset):
    video = make_dataset("video", has_action=False, robot="person")
    cfg = config(dataset, video)
    assert normalizers(cfg)["person"].action is None
    batch = next(train(cfg, 8, seed=0))
    assert batch["action_mask"].any((1, 2)).tolist() == (batch["source"] == 0).tolist()


def test_sizes_can_be_set_ahead(dataset):
    batch = next(train(config(dataset, action_size=7, state_size=3), 2, seed=0))
    assert batch["action"].shape == (2, 3, 7) and batch["state"].shape == (2, 1, 3)
    with pytest.raises(ValueError, match="action_size is 2, but a robot has 3"):
        train(config(dataset, action_size=2), 2, seed=0)


def test_clips_are_normalised_as_in_the_checkpoint(dataset):
    cfg = config(dataset)
    saved = normalizers(cfg)
    wide = dataclasses.replace(saved["test robot"].state, min=(-100.0, -100.0), max=(100.0, 100.0))
    given = {"test robot": dataclasses.replace(saved["test robot"], state=wide)}
    assert np.abs(next(train(cfg, 4, seed=0))["state"]).max() > 0.5
    assert np.abs(next(train(cfg, 4, seed=0, known=given))["state"]).max() < 0.1


def test_mean_and_standard_deviation(dataset):
    batch = next(train(config(dataset, normalization="mean_std"), sum(LENGTHS), seed=0))
    for values in (batch["action"][:, 0, :2], batch["state"][:, 0]):  # Every step once.
        np.testing.assert_allclose(values.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(values.std(0), 1, atol=1e-5)
    assert not batch["action"][..., 2].any()


def test_bad_records_are_counted(make_dataset):
    folder = make_dataset("corrupt", bad_frame=(1, 9))
    iterator = train(config(folder), 4, seed=0)
    take(iterator, 20)
    assert iterator.bad_records == 1
    for num_threads in (0, 2):
        strict = config(folder, max_bad_records=0, num_threads=num_threads)
        with pytest.raises(ValueError, match="1 records of .* are unreadable; max_bad_records is"):
            take(train(strict, 4, seed=0), 20)


def test_bad_configs(dataset):
    for changes, message in (
        ({"layout": "bimanal"}, r"data.layout: expected one of \['single', .*, found 'bimanal'"),
        ({"normalization": "z"}, "data.normalization: expected one of"),
        ({"crop": 0.8, "extra": {"latents": (2, 8)}}, "crop is 0.8, but the arrays of data.extra"),
        ({"extra": {"latents": (2, 0)}}, r"data.extra.latents\[1\]: expected int >= 1, found 0"),
        ({"window": {"fps": 5, "past": 0}}, "data.window.past: expected int >= 1, found 0"),
    ):
        with pytest.raises(ValueError, match=message):
            build(DataConfig, dataclasses.asdict(config(dataset)) | changes, "data")
    with pytest.raises(ValueError, match=r"data.sources\[0\].wieght does not exist. Did you mean"):
        config({"path": "x", "wieght": 2})
    with pytest.raises(ValueError, match="data.windw does not exist. Did you mean"):
        build(DataConfig, {"windw": 2}, "data")
    with pytest.raises(ValueError, match="sources is empty"):
        config()
    with pytest.raises(ValueError, match="batch_size 3 must be a positive multiple of the 2"):
        train(config(dataset), 3, seed=0, process_count=2)
