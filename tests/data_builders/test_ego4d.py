"""Ego4D: narrations and actions to segments, tags, redaction, stereo, the ends of streams."""

import dataclasses
import json

import numpy as np
import pytest
import raw

from data_builders import images
from data_builders.ego4d.ego4d import Builder, Segment, narrated
from jaxvp.data import rlds
from jaxvp.data.text import ByteTokenizer
from jaxvp.errors import UserError

FULL, STEREO, LATE, ABSENT, SILENT, UNLISTED = (
    f"{n}a8e63b0-6f1c-4c2d-8a55-0d2f4a1b7c9e" for n in range(1, 7))
LENGTH = 12.0  # Seconds of every video.
NARRATIONS = [(7.0, "#C C puts C's knife on the table."), (1.0, "#C C picks a cup"),
              (3.0, "#O man X pours water"), (5.0, "#C C holds a #unsure"),
              (9.0, "#c c walks  around\n")]
SECOND_PASS = [(1.5, "#C C takes something"), (8.0, "#C C moves")]
# Gaps of 2 s between the narrations; EgoVLP's rule for a mean length of 3 s.
HALF = 3 * 2.0 / 4.9 / 2


def picture(tenth):
    """The picture of a tenth of a second, of up to 160."""
    return raw.picture(tenth % 40, tenth // 40)


def shown(jpeg):
    """The tenth of a second that a stored image is of."""
    step, view = raw.seen(images.decode(jpeg))
    return 40 * view + step


def expected(start, end):
    """The tenths of a second that 8 of 30 frames per second show, from `start` to `end`."""
    steps = np.floor(np.arange(100) * 30 / 8 + 0.5)
    frames = np.floor(start * 30 + steps[steps < np.floor((end - start) * 30 + 1e-6)] + 1e-3)
    return (frames // 3).astype(int).tolist()


def entry(uid, **changes):
    """A video as ego4d.json lists it."""
    metadata = {"fps": 30.0, "num_frames": 30 * LENGTH, "video_codec": "vp9",
                "mp4_duration_sec": LENGTH + 1, "video_start_sec": 0.0,
                "video_duration_sec": LENGTH, "audio_start_sec": 0.0,
                "audio_duration_sec": LENGTH + 1}
    return {"video_uid": uid, "duration_sec": LENGTH + 1, "scenarios": ["Cooking"],
            "video_metadata": metadata, "is_stereo": False, "has_redacted_regions": False,
            "redacted_intervals": []} | changes


def narrations(points, uid):
    """Narrations as narration.json has them."""
    return [{"timestamp_sec": time, "timestamp_frame": round(30 * time),
             "_unmapped_timestamp_sec": time, "narration_text": text, "annotation_uid": uid}
            for time, text in points]


def passes(first, second=()):
    """A video's entry in narration.json."""
    summary = {"start_sec": 0.0, "end_sec": 12.0, "summary_text": "#summary C cooked",
               "annotation_uid": "a"}
    made = {"status": "complete",
            "narration_pass_1": {"narrations": narrations(first, "a"), "summaries": [summary]}}
    if second:
        made["narration_pass_2"] = {"narrations": narrations(second, "b"), "summaries": []}
    return made


def action(start, text, **changes):
    """An action as fho_main.json has it."""
    return {"uid": f"u{start}", "start_sec": start, "end_sec": start + 2.0,
            "start_frame": round(30 * start), "end_frame": round(30 * start) + 60,
            "clip_start_sec": start, "narration_text": text, "narration_timestamp_sec": start + 1,
            "is_valid_action": True, "is_partial": False, "is_rejected": False,
            "is_invalid_annotation": False, "reject_reason": None, "critical_frames": None,
            "frames": None} | changes


def interval(actions, redacted=False):
    return {"clip_id": "451", "clip_uid": None, "start_sec": 0.0, "end_sec": LENGTH,
            "narrated_actions": actions, "redacted": redacted}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of videos; that of the stereo video has another picture on the right."""
    folder = tmp_path_factory.mktemp("videos")
    frames = [picture(frame // 3) for frame in range(int(30 * LENGTH))]
    raw.write_video(folder / f"{FULL}.mp4", frames, 30, "libvpx-vp9", g="30")
    (folder / f"{LATE}.mp4").hardlink_to(folder / f"{FULL}.mp4")
    both = [np.concatenate([frame, raw.picture(20, 3)], axis=1) for frame in frames]
    raw.write_video(folder / f"{STEREO}.mp4", both, 30, "libvpx-vp9", g="30")
    return folder


@pytest.fixture
def builder(tmp_path, videos):
    root = tmp_path / "v2"
    root.mkdir()
    (root / "full_scale").symlink_to(videos)
    listed = [entry(FULL), entry(STEREO, is_stereo=True), entry(ABSENT), entry(SILENT)]
    later = entry(LATE)["video_metadata"] | {"video_start_sec": 0.5, "video_duration_sec": 7.0}
    listed.append(entry(LATE, video_metadata=later,
                        redacted_intervals=[{"start_sec": 4.9, "end_sec": 5.2}]))
    write(root, "ego4d.json", {"version": "2", "videos": listed, "clips": []})
    write(root, "annotations/narration.json", {FULL: passes(NARRATIONS, SECOND_PASS)})
    return Builder(raw=str(root), image_size=64, val_fraction=0.0)


def write(root, name, content):
    path = root / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def narrate(builder, **entries):
    write(builder.path(), "annotations/narration.json", {UIDS[k]: v for k, v in entries.items()})


UIDS = {"full": FULL, "stereo": STEREO, "late": LATE, "absent": ABSENT, "unlisted": UNLISTED}


def test_narrations_become_segments(builder, tmp_path):
    folder, report = raw.convert(builder, tmp_path / "out")
    assert report.kept == 3 and not report.unreadable
    assert report.skipped == {"left out by --tags": 2, "no annotations": 4}
    episodes = rlds.Episodes(folder, "train")
    texts = [episodes[k].instruction[0].decode() for k in range(3)]
    assert texts == ["the camera wearer picks a cup",
                     "the camera wearer puts the camera wearer's knife on the table",
                     "the camera wearer walks around"]
    for record, time in enumerate((1.0, 7.0, 9.0)):
        found = [shown(jpeg) for jpeg in episodes[record].images["head"]]
        assert found == expected(time - HALF, time + HALF) and len(found) == 10
    assert episodes.fps.tolist() == [8] * 3 and not episodes.has_action.any()
    assert episodes.text("episode_id", 1) == f"{FULL}/3"
    clips = raw.clips(folder, ("head",), fps=8)
    clip = clips[10 + 2]
    assert clip["video"].shape == (1, 4, 64, 64, 3) and clip["frame_mask"].all()
    step, view = raw.seen(clip["video"][0, 0])
    assert 40 * view + step == expected(7.0 - HALF, 7.0 + HALF)[2]
    assert not clip["action_mask"].any() and not clip["state_mask"].any()
    text = ByteTokenizer(256).decode(clip["text"])
    assert text.startswith("human hands; one head camera; the camera wearer puts")


def test_windows_follow_egovlp_and_end_at_the_neighbours():
    """Gaps 1, 1, 8 and 0: on average 2.5 s; with 9.8 s each window would have 5 s."""
    points = [(10.0, "c"), (1.0, "b"), (0.0, "a"), (2.0, "d"), (10.0, "e")]
    assert list(narrated(passes(points), 9.8)) == [
        Segment(0.0, 1.0, "a"), Segment(0.0, 2.0, "b"), Segment(1.0, 4.5, "d"),
        Segment(7.5, 12.5, "c"), Segment(7.5, 12.5, "e")]
    (alone,) = narrated(passes([(3.0, "a")]), 1.0)  # The gap of all videos, so 1 s.
    assert (alone.start, alone.end) == (2.5, 3.5)


def test_one_of_two_passes_is_used():
    longer = passes([(0.0, "a"), (4.0, "b")], [(0.0, "c"), (2.0, "d"), (4.0, "e")])
    assert [segment.text for segment in narrated(longer, 1.0)] == ["c", "d", "e"]
    later = passes([(0.0, "a"), (4.0, "b")], [(3.5, "c"), (6.0, "d"), (8.0, "e")])
    assert [segment.text for segment in narrated(later, 1.0)] == ["a", "c", "b", "d", "e"]
    only = {"status": "complete", "narration_pass_2": passes([(0.0, "a")])["narration_pass_1"]}
    assert [segment.text for segment in narrated(only, 1.0)] == ["a"]
    assert not list(narrated({"status": "redacted"}, 1.0))


def test_layout_of_v2(builder, tmp_path):
    def newer(points, annotator):
        return [{"time": time, "text": text, "is_summary": False, "_clip_time_start": 0,
                 "_clip_time_end": 0, "annotator": "413", "_annotation_uid": annotator}
                for time, text in points]

    mixed = [*newer(SECOND_PASS, "b"), *newer(NARRATIONS, "a")]
    mixed.append(newer([(6.0, "C cooked")], "c")[0] | {"is_summary": True})
    mixed.append({key: value for key, value in mixed[0].items() if key != "time"})
    content = {"videos": {FULL: {"narrations": mixed, "summaries": []}}, "_map_errs": []}
    old, _ = raw.convert(builder, tmp_path / "old")
    write(builder.path(), "annotations/all_narrations_redacted.json", content)
    write(builder.path(), "annotations/narration.json", {})
    folder, report = raw.convert(builder, tmp_path / "out")
    assert report.skipped == {"left out by --tags": 2, "no annotations": 4, "a summary": 1,
                              "the narration has no time": 1}
    old, new = rlds.Episodes(old, "train"), rlds.Episodes(folder, "train")
    for record in range(3):
        assert list(new[record].images["head"]) == list(old[record].images["head"])
        assert new[record].instruction == old[record].instruction


def test_tags_choose_whose_narrations(builder, tmp_path):
    narrate(builder, full=passes([*NARRATIONS, (11.0, "C stands"), (11.5, "no tag at all")]))

    def texts(*tags):
        made = dataclasses.replace(builder, tags=tags)
        folder, _ = raw.convert(made, tmp_path / "-".join(tags))
        episodes = rlds.Episodes(folder, "train")
        return [episodes[k].instruction[0].decode() for k in range(len(episodes))]

    assert texts("O") == ["man X pours water"]
    assert texts("C")[-1] == "the camera wearer stands" and len(texts("c")) == 4
    assert "the camera wearer holds a" in texts("C", "unsure", "O")


def test_stereo_videos_keep_the_left_half(builder, tmp_path):
    narrate(builder, stereo=passes(NARRATIONS))
    folder, _ = raw.convert(builder, tmp_path / "out")
    record = rlds.Episodes(folder, "train")[0]
    found = [shown(jpeg) for jpeg in record.images["head"]]
    assert found == expected(1.0 - HALF, 1.0 + HALF)
    image = images.decode(record.images["head"][0])
    assert image.shape == (64, 64, 3) and abs(image[40, 5].astype(int) - image[40, 60]).max() < 8


def test_streams_end_before_their_file_and_parts_are_redacted(builder, tmp_path):
    """The picture of this video starts at 0.5 s of the file and ends at 7.5 s."""
    points = [(1.0, "#C C sees"), (3.0, "#C C picks"), (5.0, "#C C eats"), (7.0, "#C C puts"),
              (9.0, "#C C waits")]
    narrate(builder, late=passes(points))
    folder, report = raw.convert(builder, tmp_path / "out")
    assert report.skipped == {"no annotations": 4, "redacted": 1, "no frame": 1}
    episodes = rlds.Episodes(folder, "train")
    found = [[shown(jpeg) for jpeg in episodes[k].images["head"]] for k in range(3)]
    assert found == [expected(0.0, 0.5 + HALF), expected(2.5 - HALF, 2.5 + HALF),
                     expected(6.5 - HALF, 7.0)]
    assert len(found[0]) < len(found[1]) > len(found[2])


def test_videos_that_are_not_there_are_counted(builder, tmp_path):
    narrate(builder, **dict.fromkeys(("full", "absent", "unlisted"), passes(NARRATIONS)))
    _, report = raw.convert(builder, tmp_path / "out")
    assert report.items == 6 and report.kept == 3
    assert report.skipped == {"left out by --tags": 2, "no annotations": 3,
                              "no file in full_scale": 1, "not in ego4d.json": 1}


def test_actions_of_fho(builder, tmp_path):
    actions = [action(1.0, "#C C picks a cup"), action(3.0, "C puts it", is_rejected=True),
               action(5.0, "C puts it", is_valid_action=False), action(11.0, "#C C ends."),
               action(7.0, "C puts it", is_invalid_annotation=True)]
    write(builder.path(), "annotations/fho_main.json", {"videos": [
        {"video_uid": FULL, "annotated_intervals": [interval(actions)]},
        {"video_uid": LATE, "annotated_intervals": [
            interval([], redacted=True), interval([action(1.0, "#C C")], redacted=True)]}]})
    folder, report = raw.convert(dataclasses.replace(builder, annotations="fho"), tmp_path / "out")
    assert report.skipped == {"no annotations": 3, "rejected action": 3, "redacted": 1}
    episodes = rlds.Episodes(folder, "train")
    found = [[shown(jpeg) for jpeg in episodes[k].images["head"]] for k in range(2)]
    assert found == [expected(1.0, 3.0), expected(11.0, 12.0)]
    assert episodes[1].instruction[0] == b"the camera wearer ends"


def test_short_segments_and_other_rates(builder, tmp_path):
    made = dataclasses.replace(builder, fps=0.0, min_seconds=1.0)
    folder, report = raw.convert(made, tmp_path / "out")
    episodes = rlds.Episodes(folder, "train")
    assert episodes.fps.tolist() == [30] * 3 and episodes.lengths.tolist() == [36] * 3
    with pytest.raises(ValueError, match="3 skipped: shorter than 2 s"):
        raw.convert(dataclasses.replace(builder, min_seconds=2.0), tmp_path / "long")


def test_damaged_videos_are_named(builder, tmp_path):
    """One is short, although ego4d.json says 12 s; its beginning is kept."""
    smaller = builder.path() / "video_540ss"
    frames = [picture(frame // 3) for frame in range(150)]
    raw.write_video(smaller / f"{FULL}.mp4", frames, 30, "libvpx-vp9")
    (smaller / f"{STEREO}.mp4").write_bytes(b"nothing")
    narrate(builder, full=passes(NARRATIONS), stereo=passes(NARRATIONS))
    made = dataclasses.replace(builder, videos="video_540ss")
    _, report = raw.convert(made, tmp_path / "out")
    short, damaged = report.unreadable
    assert report.kept == 1 and short["item"] == f"Video(uid='{FULL}')"
    assert f"2 segments, the first: {smaller}/{FULL}.mp4 ends at 5.00 s" in short["error"]
    assert f"3 segments, the first: {smaller}/{STEREO}.mp4 is not a video" in damaged["error"]


def test_missing_parts_are_named(builder, tmp_path):
    with pytest.raises(UserError, match="there is no .*video_540ss"):
        dataclasses.replace(builder, videos="video_540ss").items()
    with pytest.raises(UserError, match="fho_main.json; .*annotations has narration.json"):
        dataclasses.replace(builder, annotations="fho").items()
    with pytest.raises(ValueError, match="--annotations must be one of narrations, fho"):
        dataclasses.replace(builder, annotations="lta")
    (builder.path() / "ego4d.json").unlink()
    with pytest.raises(UserError, match="there is no .*ego4d.json"):
        builder.items()
