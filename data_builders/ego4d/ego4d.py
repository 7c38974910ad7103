"""Ego4D (arXiv 2110.07058) as RLDS: 3,670 hours of daily life, narrated, without actions.

Source: ego4d-data.org, after signing a licence that forbids redistribution:

    ego4d --output_directory DIR --datasets full_scale annotations --version v2

    RAW/ego4d.json                                     RAW is DIR/v2, or DIR/v1
    RAW/{full_scale,video_540ss}/<video_uid>.mp4       VP9, 30 frames per second
    RAW/annotations/{all_narrations_redacted,narration,fho_main}.json

    python -m data_builders.build ego4d --out=DIR --raw=RAW

One segment of a video is one episode. With --annotations=narrations it surrounds a narration, which
has only a point in time: by the rule of EgoVLP (arXiv 2206.01670, section 3) it is
b / 4.9 * --seconds long and centred on the narration, where b is the mean gap between the video's
narrations and 4.9 s that of all videos, but does not reach past the narrations before and after.
EgoVLP's clips have --seconds=1; GR-1 (arXiv 2312.13139) learns from clips of 3 s. Most videos were
narrated in two passes: of annotations that overlap, only the one with more narrations is used. With
--annotations=fho the segments are the hand-object actions of fho_main.json, 8 s each.
"""

import bisect
import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from data_builders import builder, episode, images, json_file, video
from data_builders.builder import Skip, option
from jaxvp.config import NonNegativeFloat, PositiveFloat

FPS = 30
MEAN_GAP = 4.9
TAG = re.compile(r"#\s*(\w+)")


class Segment(NamedTuple):
    """`start` to `end`, seconds of a video, and what is said of it; `fault`: why to skip it."""

    start: float
    end: float
    text: str
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class Video:
    """A work item: a video as ego4d.json has it, and its segments.

    Attributes:
      start, end: of the picture, seconds of the file, whose sound may begin sooner or end later;
        end 0: ego4d.json lacks the video.
      stereo: left and right image side by side.
      redacted: (start, end) of what was made unrecognisable.
    """

    uid: str
    start: float = dataclasses.field(repr=False)
    end: float = dataclasses.field(repr=False)
    stereo: bool = dataclasses.field(repr=False)
    redacted: tuple[tuple[float, float], ...] = dataclasses.field(repr=False)
    segments: tuple[Segment, ...] = dataclasses.field(repr=False)


def narrated(entry: dict, seconds: float) -> Iterator[Segment]:
    """The segments of a video's narrations, of which `seconds` is the mean length.

    `entry` is the video's in narration.json, with two passes, or in all_narrations_redacted.json,
    whose layout is not documented.
    """
    passes = [entry] if "narrations" in entry else [
        entry[name] for name in ("narration_pass_1", "narration_pass_2") if entry.get(name)]
    annotations = collections.defaultdict(list)
    for number, narrations in enumerate(passes):
        for narration in narrations.get("narrations") or ():
            time = narration.get("timestamp_sec", narration.get("time"))
            text = narration.get("narration_text", narration.get("text")) or ""
            if time is None:
                yield Segment(0.0, 0.0, text, "the narration has no time")
            elif narration.get("is_summary"):
                yield Segment(time, time, text, "a summary")
            else:
                uid = narration.get("annotation_uid", narration.get("_annotation_uid", number))
                annotations[uid].append((time, text))
    used = []
    for annotation in sorted(annotations.values(), key=len, reverse=True):
        if not any(_overlap(annotation, other) for other in used):
            used.append(annotation)
    points = sorted(point for annotation in used for point in annotation)
    times = [time for time, _ in points]
    gap = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else MEAN_GAP
    half = seconds * gap / MEAN_GAP / 2
    for time, text in points:
        before, after = bisect.bisect_left(times, time) - 1, bisect.bisect_right(times, time)
        start = max(time - half, times[before] if before >= 0 else 0.0)
        end = min(time + half, times[after] if after < len(times) else time + half)
        yield Segment(start, end, text)


def acted(entry: dict) -> Iterator[Segment]:
    """The hand-object actions of a video, as in fho_main.json."""
    for interval in entry["annotated_intervals"]:
        for action in interval["narrated_actions"] or ():
            fault = "redacted" if interval.get("redacted") else ""
            if (action.get("is_rejected") or action.get("is_invalid_annotation")
                    or not action.get("is_valid_action", True)):
                fault = "rejected action"
            yield Segment(action.get("start_sec") or 0.0, action.get("end_sec") or 0.0,
                          action.get("narration_text") or "", fault)


def _overlap(one: Sequence[tuple[float, str]], other: Sequence[tuple[float, str]]) -> bool:
    """Whether two annotations share at least half of the time of the shorter one."""
    spans = [(min(points)[0], max(points)[0]) for points in (one, other)]
    common = min(end for _, end in spans) - max(start for start, _ in spans)
    return common >= min(end - start for start, end in spans) / 2


def _video(uid: str, entry: Mapping, segments: tuple[Segment, ...]) -> Video:
    """The work item of a video from its entry in ego4d.json, {} if there is none."""
    metadata = entry.get("video_metadata") or {}
    start = metadata.get("video_start_sec") or 0.0
    duration = metadata.get("video_duration_sec") or entry.get("duration_sec") or 0.0
    redacted = tuple((interval["start_sec"], interval["end_sec"])
                     for interval in entry.get("redacted_intervals") or ())
    return Video(uid, start, start + duration if entry else 0.0, bool(entry.get("is_stereo")),
                 redacted, segments)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Builder(builder.RawBuilder):
    """Ego4D: narrated daily life, one head camera, no actions."""

    name = "ego4d"
    version = "1.0.0"
    items_per_shard = 8  # A video has some 20 minutes and hundreds of episodes.

    fps: NonNegativeFloat = option(8.0, "steps per second to keep, at most 30; 0: all")
    annotations: str = option("narrations", "what cuts the videos into episodes: points in time, "
                              "or actions with start and end in 120 hours", ("narrations", "fho"))
    seconds: PositiveFloat = option(3.0, "mean length of a narration's segment")
    tags: tuple[str, ...] = option(
        ("C",), "whose narrations: C the camera wearer's, O others', unsure: also uncertain ones")
    videos: str = option("full_scale", "folder of the videos", ("full_scale", "video_540ss"))

    def features(self):
        size = (self.image_size, self.image_size)
        return episode.features({name: size for name in self.view_names(("head",))}, (), None)

    def items(self) -> list[Video]:
        """Every video that is listed or annotated, with its segments: workers read no annotations.

        Raises:
          UserError: ego4d.json, the annotations or the folder of videos is not there.
        """
        self.path(self.videos)
        listed = {entry["video_uid"]: entry for entry in self._json("ego4d.json")["videos"]}
        if self.annotations == "fho":
            entries = self._json("annotations", "fho_main.json")["videos"]
            segments = {entry["video_uid"]: tuple(acted(entry)) for entry in entries}
        else:
            newer = "all_narrations_redacted.json"
            there = (self.path("annotations") / newer).exists()
            entries = self._json("annotations", newer if there else "narration.json")
            segments = {uid: tuple(narrated(entry, self.seconds))
                        for uid, entry in entries.get("videos", entries).items()}
        return [_video(uid, listed.get(uid, {}), segments.get(uid, ()))
                for uid in sorted({*listed, *segments})]

    def build(self, item: Video) -> Iterator[episode.Episode | Skip]:
        if not item.end:
            raise Skip("not in ego4d.json")
        if not item.segments:
            raise Skip("no annotations")
        if not (self.path(self.videos) / f"{item.uid}.mp4").exists():
            raise Skip(f"no file in {self.videos}")
        failures = []
        for number, segment in enumerate(item.segments):
            try:
                yield self._episode(item, number, segment)
            except Skip as skip:
                yield skip
            except video.VideoError as failure:  # Others may be whole.
                failures.append(failure)
        if failures:
            raise video.VideoError(f"{len(failures)} segments, the first: {failures[0]}")

    def _episode(self, item: Video, number: int, segment: Segment) -> episode.Episode:
        if segment.fault:
            raise Skip(segment.fault)
        instruction = self.instruction(self._text(segment.text))
        start, end = max(segment.start, item.start), min(segment.end, item.end)
        if any(begin < end and start < stop for begin, stop in item.redacted):
            raise Skip("redacted")
        length = int((end - start) * FPS + 1e-6)
        if length < 1:
            raise Skip("no frame")
        self.admit(length, FPS, views=1)
        steps = self.kept(length, FPS)
        source = f"{self.videos}/{item.uid}.mp4"
        return self.episode(
            item, FPS, steps,
            episode_id=f"{item.uid}/{number}",
            robot="human hands",
            images={"head": self._images(source, item, start + steps / FPS)},
            camera_text="one head camera",
            instruction=instruction,
            source=f"{source}:{start:.2f}-{end:.2f}")

    def _text(self, text: str) -> str:
        """What is said, without tags such as the first part of "#C C picks a cup".

        Raises:
          Skip: `--tags` leaves it out. C without a tag is the camera wearer, too.
        """
        tags = {tag.lower() for tag in TAG.findall(text)} or {text[:2].strip().lower()}
        if not tags <= {tag.lower() for tag in self.tags}:
            raise Skip("left out by --tags")
        text = TAG.sub(" ", text).strip(" .,\n")
        return re.sub(r"^c\b|\bC\b", "the camera wearer", text)

    def _images(self, source: str, item: Video, times: Sequence[float]) -> list[bytes]:
        """The frames at these seconds of the file; of a stereo video, the left half."""
        path, size = self.path(source), self.image_size
        if not item.stereo:
            return video.jpegs_at(path, times - item.start, size)
        both = (images.decode(jpeg) for jpeg in video.jpegs_at(path, times - item.start, 2 * size))
        return images.jpegs((image[:, :size] for image in both), size)

    def _json(self, *parts: str):
        return json_file.read(self.path(*parts))
