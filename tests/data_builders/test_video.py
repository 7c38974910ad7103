"""Video: frame k is frame k, whatever the codec, the container, its clock and its edit list."""

import struct

import av
import cv2
import numpy as np
import pytest
from raw import picture, seen, write_video

from data_builders import images, video
from jaxvp.errors import UserError

LENGTH, FPS = 41, 10
CODECS = {
    "h264.mp4": ("libx264", {"bf": "3", "g": "12"}),
    # Key frames that follow frames shown after them.
    "open.mkv": ("libx264", {"x264-params": "open-gop=1:keyint=10:scenecut=0:bframes=3"}),
    "open.ts": ("libx264", {"x264-params": "open-gop=1:keyint=10:scenecut=0:bframes=3"}),
    "hevc.mp4": ("libx265", {"x265-params": "open-gop=1:keyint=10:bframes=3:crf=6:log-level=none"}),
    "vp9.webm": ("libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "12"}),
    "av1.mp4": ("libsvtav1", {"g": "12"}),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """One video per codec, of pictures that say their number."""
    folder = tmp_path_factory.mktemp("videos")
    for name, (codec, options) in CODECS.items():
        pictures = [picture(k, 1, 64, 64) for k in range(LENGTH)]
        write_video(folder / name, pictures, FPS, codec, **options)
    return folder


def steps(jpegs: list[bytes]) -> list[int]:
    """The numbers that the pictures say."""
    return [seen(images.decode(jpeg))[0] for jpeg in jpegs]


def remux(source, target, shift: int = 0, **options: str):
    """Copies packets, each `shift` frames later."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                ticks = int(shift / FPS / packet.time_base)
                packet.pts, packet.dts, packet.stream = (
                    packet.pts + ticks, packet.dts + ticks, stream)
                new.mux(packet)


@pytest.mark.parametrize("name", CODECS)
def test_frame_k_is_frame_k(videos, name):
    assert video.measure(videos / name) == (LENGTH, FPS)
    made = video.jpegs(videos / name, range(LENGTH), 64)
    assert steps(made) == list(range(LENGTH))
    assert images.decode(made[0]).shape == (64, 64, 3)
    assert steps(video.jpegs(videos / name, np.array([3, 3, 17, 40]), 32)) == [3, 3, 17, 40]


@pytest.mark.parametrize("name", CODECS)
def test_frames_at_times(videos, name):
    """From every start: also from key frames and the frames just before them."""
    for start in range(LENGTH):
        times = np.array([start, LENGTH - 1]) / FPS
        assert steps(video.jpegs_at(videos / name, times, 32)) == [start, LENGTH - 1]
    shown = video.jpegs_at(videos / name, [0.0, 0.0999, 0.1499, 0.26, 4.0999], 32)
    assert steps(shown) == [0, 1, 1, 2, 40], "0.0999 is 0.1 by a clock of 1/1000 s"


def test_times_at_other_rates(videos):
    assert steps(video.jpegs_at(videos / "h264.mp4", np.arange(0, 4.1, 0.04), 32)) == [
        int(0.4 * k + 1e-6) for k in range(103)]


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm"])
def test_a_late_start_does_not_decode_from_the_beginning(videos, name):
    first, _ = next(video._frames(videos / name, 3.5))
    assert 2.0 < first <= 3.5


@pytest.mark.parametrize("name", ["late.mp4", "late.webm", "late.ts"])
def test_the_first_frame_is_at_zero(videos, tmp_path, name):
    """Streams that start at 100 s count from there, as the tables of datasets do."""
    source = videos / ("vp9.webm" if name == "late.webm" else "h264.mp4")
    remux(source, tmp_path / name, 1000)
    with av.open(str(tmp_path / name)) as container:
        stream = container.streams.video[0]
        assert stream.start_time * stream.time_base >= 100
    assert steps(video.jpegs_at(tmp_path / name, [0.0, 0.1, 3.1], 32)) == [0, 1, 31]
    assert steps(video.jpegs_at(tmp_path / name, [3.1, 3.2], 32)) == [31, 32]
    assert steps(video.jpegs(tmp_path / name, [0, 31], 32)) == [0, 31]
    if name != "late.ts":  # Its seeks go to a later key frame, see test_frames_at_times.
        assert next(video._frames(tmp_path / name, 3.1))[0] > 2.0


def test_what_an_edit_list_cuts_is_not_counted(videos, tmp_path):
    remux(videos / "h264.mp4", tmp_path / "cut.mp4", -5, avoid_negative_ts="disabled")
    assert video.measure(tmp_path / "cut.mp4") == (36, FPS)
    assert steps(video.jpegs(tmp_path / "cut.mp4", range(36), 32)) == list(range(5, 41))
    assert steps(video.jpegs_at(tmp_path / "cut.mp4", [0.0, 2.0], 32)) == [5, 25]
    assert steps(video.jpegs_at(tmp_path / "cut.mp4", [2.0], 32)) == [25]


def test_a_turned_video_is_upright(tmp_path):
    """A phone writes the picture as its sensor has it, and a matrix that turns it."""
    path = tmp_path / "turned.mp4"
    write_video(path, [np.rot90(picture(k, 1)) for k in range(3)], FPS)
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    data[start : start + 36] = struct.pack(
        ">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    with pytest.raises(AssertionError, match="upright"):
        steps(video.jpegs(path, [0], 64))
    path.write_bytes(data)
    assert steps(video.jpegs(path, [0, 2], 64)) == [0, 2]
    reader = cv2.VideoCapture(str(path))
    assert seen(reader.read()[1][..., ::-1]) == (0, 1), "OpenCV turns it in the same way"
    reader.release()


@pytest.mark.parametrize(("space", "tag"), [("ITU709", 1), ("ITU601", 6)])
@pytest.mark.parametrize("size", [64, 48])
def test_colours_are_those_that_the_video_declares(tmp_path, space, tag, size):
    """And not darker: swscale's faster ways lose more than a level."""
    colour = np.full((64, 64, 3), (200, 60, 90), np.uint8)
    path = tmp_path / "colour.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = tag, 1
        frame = av.VideoFrame.from_ndarray(colour, "rgb24")
        frame = frame.reformat(format="yuv444p", dst_colorspace=space, dst_color_range="MPEG")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (jpeg,) = video.jpegs(path, [0], size)
    mean = images.decode(jpeg)[8:-8, 8:-8].mean((0, 1))
    np.testing.assert_allclose(mean, (200, 60, 90), atol=1.6)


def test_a_title_that_is_not_utf8_is_no_error(tmp_path):
    path = tmp_path / "title.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["comment"] = "caf\u00e9"
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(0, 0, 64, 64), "rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace("caf\u00e9".encode(), b"caf\xe9!"))
    assert video.measure(path) == (1, FPS) and steps(video.jpegs(path, [0], 32)) == [0]


def test_ends_are_noticed(videos):
    path = videos / "h264.mp4"
    with pytest.raises(video.VideoError, match="h264.mp4 has 41 frames, frame 41 is wanted"):
        video.jpegs(path, [0, 41], 32)
    with pytest.raises(video.VideoError, match="ends at 4.10 s, 4.20 s is wanted"):
        video.jpegs_at(path, [0.0, 4.2], 32)
    with pytest.raises(video.VideoError, match="9.00 s is wanted"):
        video.jpegs_at(path, [9.0], 32)
    assert steps(video.jpegs_at(path, [4.05], 32)) == [40]


def test_nothing_asked_nothing_given(videos):
    assert video.jpegs(videos / "h264.mp4", [], 32) == []
    assert video.jpegs_at(videos / "h264.mp4", np.zeros(0), 32) == []


@pytest.mark.parametrize("wanted", [[2, 1], [-1, 0], [0, float("nan")]])
def test_unsorted_requests_are_errors(videos, wanted):
    with pytest.raises(ValueError, match="h264.mp4: frame numbers and times must ascend from 0"):
        video.jpegs(videos / "h264.mp4", wanted, 32)
    with pytest.raises(ValueError, match="must ascend from 0"):
        video.jpegs_at(videos / "h264.mp4", wanted, 32)


def test_truncated_files(videos, tmp_path):
    """Index at the end: not a video. Index first: as many frames as are there, then an error."""
    data = (videos / "h264.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[: len(data) // 2])
    for read in (video.measure, lambda path: video.jpegs(path, [0], 32)):
        with pytest.raises(video.VideoError, match="half.mp4 is not a video.*or is damaged"):
            read(tmp_path / "half.mp4")
    for source, target in (("h264.mp4", "short.mp4"), ("vp9.webm", "short.webm")):
        remux(videos / source, tmp_path / "whole.mp4", movflags="faststart")
        whole = tmp_path / "whole.mp4" if target == "short.mp4" else videos / source
        data = whole.read_bytes()
        (tmp_path / target).write_bytes(data[: int(len(data) * 0.8)])
        assert steps(video.jpegs(tmp_path / target, range(5), 32)) == [0, 1, 2, 3, 4]
        with pytest.raises(video.VideoError, match=f"{target} (has .* frame 40 is w|.*damaged)"):
            video.jpegs(tmp_path / target, [40], 32)
        with pytest.raises(video.VideoError, match=f"{target} (ends at .* 4.00 s is w|.*damaged)"):
            video.jpegs_at(tmp_path / target, [0.0, 4.0], 32)
    (tmp_path / "half.webm").write_bytes(data[: len(data) // 2])
    with pytest.raises(video.VideoError, match=r"half.webm is cut: it has [\d.]+ of [\d.]+ s"):
        video.measure(tmp_path / "half.webm")


def test_files_that_are_no_video(tmp_path):
    with pytest.raises(UserError, match="gone.mp4 does not exist"):
        video.measure(tmp_path / "gone.mp4")
    (tmp_path / "page.mp4").write_text("<html>not found</html>")
    with pytest.raises(video.VideoError, match="page.mp4 is not a video"):
        video.jpegs(tmp_path / "page.mp4", [0], 32)
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        samples = np.zeros((1, 16000), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for read in (video.measure, lambda path: video.jpegs_at(path, [0], 32)):
        with pytest.raises(video.VideoError, match="sound.mp4 has no video stream"):
            read(sound)


def test_frames_without_times_have_numbers_only(tmp_path):
    write_video(tmp_path / "raw.h264", [picture(k, 1) for k in range(5)], FPS)
    assert steps(video.jpegs(tmp_path / "raw.h264", range(5), 32)) == [0, 1, 2, 3, 4]
    with pytest.raises(video.VideoError, match="raw.h264: its frames have no times"):
        video.jpegs_at(tmp_path / "raw.h264", [0.0], 32)
    write_video(tmp_path / "b.avi", [picture(k, 1) for k in range(20)], FPS, bf="2")
    with pytest.raises(video.VideoError, match="b.avi: the times of its frames do not ascend"):
        video.jpegs_at(tmp_path / "b.avi", [0.0, 1.0], 32)
