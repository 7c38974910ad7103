"""Something-Something v2: places of the lists, splits, labels, webm of different widths."""

import dataclasses
import json

import pytest
import raw

from data_builders.something_something.something_something import Builder
from jaxvp.data import rlds
from jaxvp.data.text import ByteTokenizer
from jaxvp.errors import UserError

LISTS = {
    "train": [
        {"id": "78687", "label": "holding potato next to vicks vaporub bottle",
         "template": "Holding [something] next to [something]",
         "placeholders": ["potato", "vicks vaporub bottle"]},
        {"id": "42326", "label": "moving cup from left to right",
         "template": "Moving [something] from left to right", "placeholders": ["cup"]}],
    "validation": [
        {"id": "74225", "label": "spinning cube that quickly stops spinning",
         "template": "Spinning [something] that quickly stops spinning",
         "placeholders": ["cube"]}],
    "test": [{"id": "1420"}],
}
# Frames and width; all are 48 pixels high.
CLIPS = {"78687": (24, 64), "42326": (20, 84), "74225": (18, 36), "1420": (16, 64)}


def write(root, name="labels/{}.json"):
    """The dataset as it is unpacked, with its lists called `name`."""
    for number, (length, width) in CLIPS.items():
        frames = [raw.picture(step, 2, width=width) for step in range(length)]
        path = root / "20bn-something-something-v2" / f"{number}.webm"
        raw.write_video(path, frames, 12, "libvpx-vp9")
    for split, entries in LISTS.items():
        path = root / name.format(split)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(entries))
    (root / "labels").mkdir(exist_ok=True)
    (root / "labels" / "test-answers.csv").write_text("1420;Throwing something\n")


@pytest.fixture
def builder(tmp_path):
    write(tmp_path / "raw")
    return Builder(raw=str(tmp_path / "raw"), image_size=64)


def test_clips_keep_frames_labels_and_splits(builder, tmp_path):
    folder, report = raw.convert(builder, tmp_path / "out")
    assert rlds.splits(folder) == ("train", "val")
    assert (report.kept, report.steps) == (3, 24 + 20 + 18)
    assert report.skipped == {"no instruction": 1} and not report.unreadable
    clips = raw.clips(folder, ("camera",), fps=12)
    clip = clips[24 + 5]  # The second episode, whose picture is wider.
    assert [raw.seen(frame) for frame in clip["video"][0]] == [(5 + k, 2) for k in range(4)]
    assert clip["video"].shape == (1, 4, 64, 64, 3)
    text = ByteTokenizer(256).decode(clip["text"])
    assert text == "human hands; one camera; moving cup from left to right"
    assert not clip["action_mask"].any() and not clip["state_mask"].any()
    episodes = clips.episodes
    assert not episodes.has_action.any() and episodes.fps.tolist() == [12, 12]
    assert episodes.names == {"action": (), "state": ()}
    assert episodes.text("camera_layout", 0) == "camera"
    assert episodes.text("episode_id", 0) == "78687"
    val = rlds.Episodes(folder, "val")
    assert set(val[0].instruction) == {b"spinning cube that quickly stops spinning"}


@pytest.mark.parametrize("name", [
    "labels/{}.json", "{}.json", "something-something-v2-{}.json",
    "labels/something-something-v2-{}.json"])
def test_lists_are_found_by_both_names_in_both_places(tmp_path, name):
    write(tmp_path, name)
    assert Builder(raw=str(tmp_path)).items() == [
        ("train", "78687", "holding potato next to vicks vaporub bottle"),
        ("train", "42326", "moving cup from left to right"),
        ("validation", "74225", "spinning cube that quickly stops spinning"),
        ("test", "1420", "")]


def test_clips_without_labels_can_be_kept(builder, tmp_path):
    keep = dataclasses.replace(builder, unlabelled="keep")
    folder, report = raw.convert(keep, tmp_path / "out")
    assert rlds.splits(folder) == ("test", "train", "val") and not report.skipped
    assert rlds.Episodes(folder, "test")[0].instruction == [b""] * 16


def test_frames_are_thinned_in_time(builder, tmp_path):
    folder, _ = raw.convert(dataclasses.replace(builder, fps=4.0), tmp_path / "out")
    clips = raw.clips(folder, ("camera",), fps=4)
    assert clips.episodes.fps.tolist() == [4, 4] and clips.episodes.lengths.tolist() == [8, 7]
    assert [raw.seen(frame)[0] for frame in clips[2]["video"][0]] == [6, 9, 12, 15]


def test_short_absent_and_damaged_clips_are_counted(builder, tmp_path):
    videos = tmp_path / "raw" / "20bn-something-something-v2"
    (videos / "78687.webm").unlink()
    (videos / "74225.webm").write_bytes(b"not a video")
    _, report = raw.convert(dataclasses.replace(builder, min_seconds=1.6), tmp_path / "out")
    assert report.kept == 1 and report.skipped == {"no instruction": 1}
    damaged, absent = sorted(report.unreadable, key=lambda entry: entry["error"], reverse=True)
    assert "74225.webm is not a video" in damaged["error"]
    assert absent["error"].startswith("UserError") and "78687.webm" in absent["error"]
    short = dataclasses.replace(builder, min_seconds=1.7)
    with pytest.raises(ValueError, match="1 skipped: shorter than 1.7 s"):
        raw.convert(short, tmp_path / "short")


def test_wrong_folders_and_cameras_are_named(builder, tmp_path):
    with pytest.raises(UserError, match="there is no .*labels/train.json.*has raw"):
        dataclasses.replace(builder, raw=str(tmp_path)).items()
    with pytest.raises(ValueError, match="--cameras=head: something_something has camera"):
        dataclasses.replace(builder, cameras=("head",)).features()
