"""What is refused, or said, when data is opened, and not when it is met."""

import json

import numpy as np
import pytest
from synthetic import LENGTHS, rewrite

from jaxvp.data import checks, text_embeddings
from jaxvp.data.mixture import Mixture
from jaxvp.data.rlds import Episodes
from jaxvp.data.sources import DataConfig, held_out
from jaxvp.data.spec import Window
from jaxvp.data.text import ByteTokenizer
from jaxvp.data.text_embeddings import TextEmbeddings
from jaxvp.errors import UserError


def config(*folders, **changes):
    sources = [folder if isinstance(folder, dict) else {"path": str(folder)} for folder in folders]
    values = dict(window=Window(fps=5, future=1, chunk=3), image_size=16, text_length=48)
    return DataConfig(sources=sources, **values | changes)


def windowed(*folders, past=1, future=1, chunk=3, fps=5):
    return config(*folders, window=Window(fps=fps, past=past, future=future, chunk=chunk))


def train(cfg, batch_size):
    return Mixture(cfg).train(cfg.window, batch_size, seed=0)


def validation(cfg, batch_size, num_batches):
    return Mixture(cfg).validation(cfg.window, batch_size, num_batches)


def embed(folder, episodes, texts):
    """Made-up embeddings, a row for every byte of a text."""
    def encode(texts):
        return [np.zeros((len(text), 4), np.float32) for text in texts]

    text_embeddings.add(folder, texts, "encoder", 4, encode, [e.digest for e in episodes])
    return TextEmbeddings(folder)


# Texts.

def test_distinct_texts_are_those_of_the_records_and_kept(make_dataset, monkeypatch):
    episodes = Episodes(make_dataset("texts", robots=("one", "two")), "train")
    expected = {f"{('one', 'two')[i % 2]}; three views; task {i}{more}"
                for i in range(6) for more in ("", " more")} - {"one; three views; task 4 more"}
    assert checks.distinct_texts(episodes) == sorted(expected)
    part = episodes.only(np.array([1, 4]))
    assert checks.distinct_texts(part) == [
        "one; three views; task 4", "two; three views; task 1", "two; three views; task 1 more"]
    monkeypatch.setattr(checks, "texts_of", lambda episodes: pytest.fail("read again"))
    assert checks.distinct_texts(episodes) == sorted(expected)


def test_a_record_that_cannot_be_read_does_not_end_the_check(make_dataset):
    episodes = Episodes(make_dataset("damaged"), "train")
    episodes.rows["columns"]["instruction"]["crc"][1] ^= 1
    texts = checks.distinct_texts(episodes)
    assert len(texts) == 9 and not any("task 1" in text for text in texts)


def test_a_text_that_is_too_long_is_refused_at_opening(make_dataset):
    """The only one of 36 bytes is that of one step of one record."""
    folder = make_dataset("long", lengths=(5,) * 3 + (6,))
    cfg = config(folder, text_length=35)
    with pytest.raises(UserError, match=r"long/1.0.0 train: The text has 36 bytes, text_length is "
                                        r"35.*'test robot; three views; task 3 more'"):
        Mixture(cfg)
    short = config({"path": str(folder), "min_seconds": 0.55, "validation_split": ""},
                   text_length=36)
    next(train(short, 4))


def test_texts_of_records_that_a_filter_leaves_out_may_be_long(make_dataset):
    folder = make_dataset("robots", robots=("arm", "an arm with a much longer name"))
    with pytest.raises(UserError, match="raise text_length"):
        Mixture(config(folder, text_length=30))
    Mixture(config({"path": str(folder), "robots": ("arm",)}, text_length=30))


def test_a_held_out_text_that_is_too_long(make_dataset):
    """Of 11 episodes the last, `task 10 more`, is held out and has the longest text."""
    folder = make_dataset("held_out", lengths=(6,) * 11, val_fraction=0.1)
    cfg = config(folder, text_length=36)
    Mixture(cfg)
    with pytest.raises(UserError, match="1.0.0 val: The text has 37 bytes, text_length is 36"):
        validation(cfg, 4, 1)


def test_embedded_texts_are_checked_too(make_dataset, tmp_path):
    folder = make_dataset("data")
    episodes = Episodes(folder, "train")
    texts = checks.distinct_texts(episodes)
    there = dict(text_embeddings=str(tmp_path / "embeddings"), text_width=4)
    embed(tmp_path / "embeddings", [episodes], texts)
    Mixture(config(folder, text_length=36, **there))
    short = config(folder, text_length=35, **there)
    with pytest.raises(UserError, match="train: The text has 36 tokens, text_length is 35"):
        Mixture(short)
    # A folder that claims to be complete and is not.
    embed(tmp_path / "other", [episodes], texts[1:])
    there["text_embeddings"] = str(tmp_path / "other")
    with pytest.raises(UserError, match=f"no embedding of the text '{texts[0]}'"):
        Mixture(config(folder, **there))


# Robots.

def with_options(folder, **options):
    def change(number, example):
        made = example.features.feature["episode_metadata/options"].bytes_list
        made.value[0] = json.dumps(json.loads(made.value[0]) | options).encode()

    rewrite(folder, change)
    return folder


def test_a_robot_has_one_rate(make_dataset):
    folders = [make_dataset(name, fps=fps, lengths=(20, 20), max_steps=600)
               for name, fps in (("slow", 10.0), ("fast", 30.0), ("nearly", 10.0005))]
    Mixture(config(folders[0], folders[2]))
    for order in (folders[:2], folders[1::-1]):
        with pytest.raises(UserError, match="'test robot' has steps per second .* in .* and "):
            Mixture(config(*order))
    people = [make_dataset(name, fps=fps, has_action=False)
              for name, fps in (("video", 10.0), ("film", 30.0))]
    Mixture(config(*people))  # What has no actions may have any rate.


@pytest.mark.parametrize("name, values", [("rotation", ("180", "flip")), ("image_size", (64, 128))])
def test_a_robot_has_one_protocol(make_dataset, name, values):
    folders = [with_options(make_dataset(f"d{value}"), **{name: value}) for value in values]
    plain = make_dataset("plain")
    with pytest.raises(UserError, match=rf"has --{name} {values[0]} in .* and {values[1]} in "):
        Mixture(config(*folders))
    with pytest.raises(UserError, match=rf"has --{name} None in .* and {values[0]} in "):
        Mixture(config(plain, folders[0]))
    other = with_options(make_dataset("other", robot="other robot"), **{name: values[1]})
    data = Mixture(config(folders[0], other))
    assert [data.embodiments()[robot]["options"][name] for robot in ("test robot", "other robot")
            ] == list(values)


# Lengths.

def test_a_chunk_that_no_record_has(make_dataset):
    folder = make_dataset("data")
    assert not Mixture(windowed(folder, chunk=max(LENGTHS))).notes
    with pytest.raises(UserError, match="data.window.chunk is 31, but the longest record with "
                                        "actions has 30 steps"):
        Mixture(windowed(folder, chunk=31))
    short = make_dataset("short", robot="short robot", lengths=(9, 8))
    (note,) = Mixture(windowed(folder, short, chunk=10)).notes
    assert "'short robot' has no record of data.window.chunk = 10 steps, but at most 9" in note
    video = make_dataset("video", has_action=False, lengths=(9,))
    assert not Mixture(windowed(video, chunk=31)).notes


@pytest.mark.parametrize("past", [1, 6])
def test_a_clip_that_no_record_has(make_dataset, past):
    """30 steps at 10 per second are 15 frames at 5: the steps 0, 2, ... 28; observed or not."""
    folder = make_dataset("data")
    assert not Mixture(windowed(folder, past=past, future=15 - past)).notes
    (note,) = Mixture(windowed(folder, past=past, future=16 - past)).notes
    assert "3 seconds, so no clip has all of its 16 frames at 5 per second" in note


def test_a_clip_is_as_long_as_its_frames_say(make_dataset):
    """At 8 frames per second the steps -1, 0 and 1 are three; with the first as now, -0, 1 and 3
    are four."""
    folder = make_dataset("data", lengths=(3, 3))
    assert not Mixture(windowed(folder, past=2, future=1, fps=8)).notes
    (note,) = Mixture(windowed(folder, past=1, future=2, fps=8)).notes
    assert "no clip has all of its 3 frames" in note


def test_a_batch_that_is_larger_than_the_data(make_dataset):
    folder = make_dataset("data", lengths=(5, 4))
    assert len(next(train(config(folder), 9))["source"]) == 9
    with pytest.raises(UserError, match="batch_size is 10, but the data has only 9 clips"):
        train(config(folder), 10)


# What is held out.

def test_a_robot_that_is_only_held_out_is_left_out(make_dataset):
    robots = ("arm",) * 4 + ("arm", "rare arm")  # Episodes 4 and 5 are held out.
    folder = make_dataset("rare", robots=robots, val_fraction=0.4)
    cfg = config(folder)
    opened, notes = held_out(cfg, Mixture(cfg).normalizers)
    assert [episodes.robots() for episodes in opened.values()] == [("arm",)]
    assert len(notes) == 1 and "val: 1 of 2 records are of ['rare arm']" in notes[0]
    (batch,) = validation(cfg, 8, 1)
    texts = {ByteTokenizer(48).decode(row) for row in batch["text"]}
    assert texts == {"arm; three views; task 4"}

    alone = make_dataset("alone", robots=("arm",) * 4 + ("rare arm",) * 2, val_fraction=0.4)
    with pytest.raises(UserError, match="nothing to validate on.*2 of 2 records are of .'rare"):
        validation(config(alone), 4, 1)
    opened, notes = held_out(config(folder, alone), ("arm",))
    assert list(opened) == [0] and len(notes) == 2


def test_a_split_that_is_not_there(make_dataset):
    folder = make_dataset("no_val")
    with pytest.raises(UserError, match=r"no_val/1.0.0 has no split 'val' to validate on, but "
                                        r"\['train'\]: set its validation_split"):
        validation(config(folder), 4, 1)
