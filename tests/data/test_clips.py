"""Clips: frames, masks, actions and texts of every start step."""

import numpy as np
import pytest
from synthetic import LENGTHS, action, colour, damage, rewrite, state

from jaxvp.data.clips import Clips, ClipSpec
from jaxvp.data.normalize import Normalizer, Stats
from jaxvp.data.observation import LAYOUTS
from jaxvp.data.rlds import Episodes
from jaxvp.data.text import ByteTokenizer

# Bounds chosen so that normalising is easy to do by hand.
NORMALIZER = Normalizer(
    action=Stats(("x", "y", "z"), ("", "", ""), 1, (0, 0, 4), (10, 5, 4), *[(0, 0, 0)] * 4),
    state=Stats(("a", "b"), ("", ""), 1, (0, -10), (1, 10), *[(0, 0)] * 4),
)


def spec(**changes):
    values = dict(
        cameras=LAYOUTS["bimanual"].cameras,
        num_frames=4,
        fps=2.5,
        chunk=6,
        height=16,
        width=16,
        text_length=64,
        action_size=3,
        state_size=2,
    )
    return ClipSpec(**values | changes)


def clips_of(folder, clip_spec=None, **options):
    options = {"source": 7, "normalizers": {"test robot": NORMALIZER}} | options
    return Clips(Episodes(folder, "train"), clip_spec or spec(), **options)


def number(episode, step):
    return sum(LENGTHS[:episode]) + step


def check_colours(video, episode, steps):
    """Every frame of uint8[V, T, H, W, 3] has the colour of its view and step."""
    for view, frames in enumerate(video):
        for frame, step in zip(frames, steps, strict=True):
            assert np.abs(frame.astype(int) - colour(episode, step, view)).max() <= 3


def test_there_is_a_clip_for_every_step(dataset):
    clips = clips_of(dataset)
    assert len(clips) == sum(LENGTHS)
    firsts = [clips[number(episode, 0)] for episode in range(len(LENGTHS))]
    for episode, clip in enumerate(firsts):
        check_colours(clip["video"][:, :1], episode, [0])
    check_colours(clips[len(clips) - 1]["video"][:, :1], len(LENGTHS) - 1, [LENGTHS[-1] - 1])


def test_a_clip_in_the_middle(dataset):
    clip = clips_of(dataset)[number(3, 8)]
    check_colours(clip["video"], 3, [8, 12, 16, 20])
    assert clip["frame_mask"].all() and clip["view_mask"].all() and clip["action_mask"].all()
    assert clip["source"] == 7 and clip["source"].dtype == np.int32
    actions = np.stack([action(3, step) for step in range(8, 14)])
    expected = np.stack([actions[:, 0] / 5 - 1, actions[:, 1] / 2.5 - 1, np.zeros(6)], -1)
    np.testing.assert_allclose(clip["action"], expected, atol=1e-6)
    a, b = state(3, 8)
    np.testing.assert_allclose(clip["state"], [2 * a - 1, b / 10], atol=1e-6)
    text = ByteTokenizer(64).decode(clip["text"])
    assert text == "test robot; three views; task 3 more"
    text = ByteTokenizer(64).decode(clips_of(dataset)[number(3, 4)]["text"])
    assert text == "test robot; three views; task 3"


def test_past_the_end_the_last_frame_and_action_are_repeated_and_masked(dataset):
    clip = clips_of(dataset)[number(1, 9)]  # Of 12 steps.
    check_colours(clip["video"], 1, [9, 11, 11, 11])
    assert clip["frame_mask"].tolist() == [True, False, False, False]
    assert clip["action_mask"].tolist() == [[step < 12] * 3 for step in range(9, 15)]
    np.testing.assert_array_equal(clip["action"][3:], np.tile(clip["action"][2], (3, 1)))
    assert clip["state_mask"].all()


@pytest.mark.parametrize(
    ("fps", "steps"), [(10, [0, 1, 2, 3]), (5, [0, 2, 4, 6]), (4, [0, 3, 5, 8]), (3, [0, 3, 7, 10])]
)
def test_frames_are_the_nearest_steps(dataset, fps, steps):
    check_colours(clips_of(dataset, spec(fps=fps))[number(3, 0)]["video"], 3, steps)


def test_more_frames_per_second_than_the_data_is_an_error(dataset):
    with pytest.raises(ValueError, match="10 frames per second, clips want 12"):
        clips_of(dataset, spec(fps=12))


@pytest.mark.parametrize(
    ("stored", "fps"), [(29.97, 29.97), (29.97, 30000 / 1001), (30000 / 1001, 29.97), (4.95, 4.95)])
def test_a_fraction_is_the_same_rate_whatever_its_rounding(make_dataset, stored, fps):
    folder = make_dataset("fraction", lengths=(6, 12), fps=stored)
    clip = clips_of(folder, spec(fps=fps))[6 + 7]
    check_colours(clip["video"], 1, [7, 8, 9, 10])
    assert clip["frame_mask"].all()
    with pytest.raises(ValueError, match="frames per second, clips want"):
        clips_of(folder, spec(fps=fps * 1.001))


def test_images_are_resized(dataset):
    clip = clips_of(dataset, spec(height=8, width=32))[number(2, 0)]
    assert clip["video"].shape == (3, 4, 8, 32, 3)
    check_colours(clip["video"], 2, [0, 4, 8, 8])


def test_record_without_actions(make_dataset):
    clip = clips_of(make_dataset("video", has_action=False))[0]
    assert not clip["action_mask"].any() and not clip["action"].any()
    assert clip["state_mask"].all() and clip["frame_mask"].any()


def test_smaller_actions_and_states_are_padded_and_masked(dataset):
    clip = clips_of(dataset, spec(action_size=5, state_size=4))[0]
    assert clip["action"].shape == (6, 5) and not clip["action"][:, 3:].any()
    assert clip["action_mask"].tolist() == [[True] * 3 + [False] * 2] * 6
    assert clip["state_mask"].tolist() == [True, True, False, False]


def test_missing_camera_is_an_error_that_names_the_remedy(make_dataset):
    folder = make_dataset("two_views", cameras=("head", "left_wrist"))
    with pytest.raises(ValueError, match="no camera 'right_wrist'.*head.*to None for a view"):
        clips_of(folder)
    with pytest.raises(ValueError, match="names .'wrist'.: the views are"):
        clips_of(folder, cameras={"wrist": None})
    clip = clips_of(folder, cameras={"right_wrist": None, "left_wrist": "head"})[0]
    assert clip["view_mask"].tolist() == [True, True, False]
    np.testing.assert_array_equal(clip["video"][0], clip["video"][1])
    assert (clip["video"][2] == 127).all()


def test_camera_that_a_record_lacks_is_masked(make_dataset):
    folder = make_dataset("one_view", blind=(0,), has_action=False)
    clip = clips_of(folder)[0]
    assert clip["view_mask"].tolist() == [True, False, False]
    assert (clip["video"][1:] == 127).all()


def test_corrupt_image_is_replaced_by_the_next_record_and_counted(make_dataset):
    clips = clips_of(make_dataset("corrupt", bad_frame=(1, 9)))
    clip = clips[number(1, 1)]  # Shows steps 1, 5, 9.
    check_colours(clip["video"], 2, [1, 5, 8, 8])
    assert clip["state"][1] == pytest.approx(state(2, 1)[1] / 10)
    assert list(clips.bad_records) == [1]
    assert "episode episode-1 from step 0: camera head, step 9" in clips.bad_records[1]
    check_colours(clips[number(1, 2)]["video"], 1, [2, 6, 10, 11])
    clips[number(1, 1)]
    assert len(clips.bad_records) == 1


def test_too_many_corrupt_records_stop_the_run(make_dataset):
    clips = clips_of(make_dataset("corrupt", bad_frame=(1, 9)), max_bad_records=0)
    with pytest.raises(ValueError, match="(?s)1 records .* max_bad_records is 0.*episode-1"):
        clips[number(1, 1)]


def test_only_record_corrupt(make_dataset):
    clips = clips_of(make_dataset("corrupt", lengths=(5,), bad_frame=(0, 4)))
    with pytest.raises(ValueError, match="1 records .* unreadable"):
        clips[0]


@pytest.mark.parametrize("options", ["group_size:1,uncompressed", "group_size:1"])
def test_damaged_file_is_as_a_corrupt_image(make_dataset, capsys, options):
    folder = make_dataset("damaged")
    rewrite(folder, options=options)
    clips = clips_of(folder)
    expected = clips[number(2, 1)]
    if "uncompressed" in options:
        damage(folder, clips.episodes[1].images["head"][9])
    else:
        shard = next(folder.glob("*-00000-of-00002"))
        data = bytearray(shard.read_bytes())
        data[2500:2600] = bytes(100)  # In the second record.
        shard.write_bytes(data)
    clip = clips.spec.empty()
    for value in clip.values():
        value.fill(77)
    clips.fill(number(1, 1), clip)
    for name in clip:
        np.testing.assert_array_equal(clip[name], expected[name])
    assert list(clips.bad_records) == [1]
    assert "[1], episode episode-1 from step 0: " in clips.bad_records[1]
    assert "damaged" in clips.bad_records[1]
    assert capsys.readouterr().out.count("Skipped ") == 1


def test_damage_that_indexing_finds_is_counted(make_dataset):
    folder = make_dataset("damaged")
    damage(folder, Episodes(folder, "train")[1].images["head"][9])
    clips = clips_of(folder)  # The hash is another one: it is indexed again.
    assert list(clips.bad_records) == [1] and "[1] is damaged" in clips.bad_records[1]
    assert len(clips) == sum(LENGTHS) - LENGTHS[1]
    check_colours(clips[LENGTHS[0]]["video"][:, :1], 2, [0])
    with pytest.raises(ValueError, match="(?s)1 records .* max_bad_records is 0.*is damaged"):
        clips_of(folder, max_bad_records=0)


def test_robot_without_statistics(dataset):
    with pytest.raises(ValueError, match=r"robots \['test robot'\] without statistics"):
        clips_of(dataset, normalizers={})


def test_text_that_does_not_fit(dataset):
    with pytest.raises(ValueError, match="text_length is 8"):
        clips_of(dataset, spec(text_length=8))[0]
