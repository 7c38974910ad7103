"""The datasets of a config: which of their episodes are trained on, and which are held out."""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np

from jaxvp.config import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Share,
    build,
)
from jaxvp.data import normalize, rates, rlds
from jaxvp.data.augment import NONE, Augmentation
from jaxvp.data.normalize import Normalizer
from jaxvp.data.observation import LAYOUTS
from jaxvp.data.rlds import Episodes
from jaxvp.data.spec import ClipSpec, Window
from jaxvp.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One dataset of the mixture.

    Attributes:
      path: a TFDS version folder, or a folder that holds exactly one.
      weight: its share of the examples, relative to the other sources, in steps of 1 % of the
        smallest; None: the number of its clips.
      split: the split to train on; validation_split: the one that is held out, "" for none.
      validation_fraction: share of the episodes of `split` that is held out when there is no
        validation_split; a hash of an episode's id decides.
      cameras: view to the dataset's name for it, None for a view that the dataset lacks; default:
        the names are the same.
      robots: the only ones whose episodes are kept; (): all.
      min_views: views of the clip that an episode must have.
      min_seconds: shorter episodes are left out.
      labelled: share of the episodes of `split` whose actions are trained on; the others are as of
        a dataset without actions. A hash of an episode's id decides.
    """

    path: str
    weight: PositiveFloat | None = 1.0
    split: str = "train"
    validation_split: str = "val"
    validation_fraction: Annotated[float, Range(ge=0, lt=1)] = 0.0
    cameras: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    robots: tuple[str, ...] = ()
    min_views: NonNegativeInt = 0
    min_seconds: NonNegativeFloat = 0.0
    labelled: Share = 1.0

    def __post_init__(self):
        if self.validation_fraction and self.validation_split:
            raise UserError(f"{self.path} has a validation_split and a validation_fraction: set "
                            "the split to \"\" or the fraction to 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What clips are made of and from.

    Attributes:
      sources: the datasets, `SourceConfig`s or their fields.
      window: what clips show around now; a stage's clips may show less.
      image_size: H = W, or (H, W), of every view.
      source_size: the same as the views are loaded, to be resized on the device; 0: image_size.
      crop: side of the part that is shown of each view, as a share of the whole: in training at a
        place that is drawn anew for every clip, elsewhere (validation, samples, bundles) the
        middle; 1.0: all of it.
      augmentation: what else is drawn for every clip in training, see `augment.Augmentation`.
      extra: name to shape of the arrays that the sources store for their clips, such as
        {"latents": (t, h, w, c)}; see jaxvp.tools.precompute.
      video: whether clips have pictures; False needs `extra`.
      cameras: the V views; default: the layout's cameras.
      layout: a name in `observation.LAYOUTS`.
      text_length: M, the longest text in bytes, or in tokens of the embeddings (Wan: 512).
      text_embeddings: a folder that `jaxvp.tools.embed_texts` made; "": text is bytes.
      text_width: D of the embeddings.
      normalization: "min_max", "quantile" or "mean_std", see `normalize.Normalizer`.
      action_size, state_size: A and S; 0: the largest of the sources. Set them when the data lacks
        a column that a later stage trains.
      num_threads: threads that read and decode clips; 0: the caller's, and nothing is made ahead.
      prefetch: batches made ahead.
      cache_bytes: memory for records of compressed files, all sources together.
      max_bad_records: records that cannot be read which a source may have.
    """

    sources: Sequence[SourceConfig | Mapping]
    window: Window
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt]
    source_size: NonNegativeInt | tuple[PositiveInt, PositiveInt] = 0
    crop: Annotated[float, Range(gt=0, le=1)] = 1.0
    augmentation: Augmentation = NONE
    extra: Mapping[str, tuple[PositiveInt, ...]] = dataclasses.field(default_factory=dict)
    video: bool = True
    cameras: tuple[str, ...] = ()
    layout: Literal[*LAYOUTS] = "bimanual"
    text_length: PositiveInt = 256
    text_embeddings: str = ""
    text_width: PositiveInt = 4096
    normalization: Literal[*normalize.MODES] = "min_max"
    action_size: NonNegativeInt = 0
    state_size: NonNegativeInt = 0
    num_threads: NonNegativeInt = 2
    prefetch: NonNegativeInt = 2
    cache_bytes: NonNegativeInt = 1 << 29
    max_bad_records: NonNegativeInt = 10

    def __post_init__(self):
        if not self.sources:
            raise UserError("data.sources is empty: name at least one dataset.")
        if self.crop < 1 and self.extra:
            raise UserError(f"data.crop is {self.crop}, but the arrays of data.extra were computed "
                            "from whole pictures: set data.crop=1.0 or data.extra={}.")
        sources = list(self.sources)
        for i, source in enumerate(sources):
            if not isinstance(source, SourceConfig):
                sources[i] = build(SourceConfig, source, f"data.sources[{i}]")
        if 0 < sum(source.weight is None for source in sources) < len(sources):
            raise UserError("data.sources has weights of None, the number of clips, and others: "
                            "give all sources one kind.")
        object.__setattr__(self, "sources", tuple(sources))
        object.__setattr__(self, "cameras", tuple(self.cameras) or LAYOUTS[self.layout].cameras)


def clip_spec(
    config: DataConfig, normalizers: Mapping[str, Normalizer] | None = None
) -> ClipSpec:
    """The arrays of the clips; reads no data: without normalizers, A and S are the config's.

    Raises:
      UserError: the config's A or S is smaller than a robot's.
    """
    normalizers = normalizers or {}
    height, width = _sides(config.image_size)
    return ClipSpec(
        cameras=config.cameras,
        window=config.window,
        height=height,
        width=width,
        text_length=config.text_length,
        text_width=config.text_width if config.text_embeddings else 0,
        source_size=_sides(config.source_size) if config.source_size else (),
        extra=config.extra,
        video=config.video,
        action_size=_size(config.action_size, "action", normalizers),
        state_size=_size(config.state_size, "state", normalizers),
    )


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _size(wanted: int, column: str, normalizers: Mapping[str, Normalizer]) -> int:
    """A or S: the largest of the robots, or `wanted`."""
    stats = [getattr(normalizer, column) for normalizer in normalizers.values()]
    largest = max((len(s.names) for s in stats if s is not None), default=0)
    if 0 < wanted < largest:
        raise UserError(f"data.{column}_size is {wanted}, but a robot has {largest} dimensions.")
    return wanted or largest


def held_out(config: DataConfig, robots: Collection[str]) -> tuple[dict[int, Episodes], list[str]]:
    """The held-out episodes of `robots`, those that are trained on, by the number of their source;
    and a note for every source that has episodes of other robots.

    Raises:
      UserError: a source has no such split, or nothing is held out.
    """
    opened, notes = {}, []
    for number, source in enumerate(config.sources):
        if not (source.validation_split or source.validation_fraction):
            continue
        splits = rlds.splits(source.path)
        if source.validation_split and source.validation_split not in splits:
            raise UserError(
                f"{source.path} has no split {source.validation_split!r} to validate on, but "
                f"{list(splits)}: set its validation_split to one, or to \"\" (with a "
                "validation_fraction some of its episodes are held out), or set "
                "config.validate_every and config.sample_every to 0.")
        episodes = open_source(config, source, held_out=True)
        if unknown := sorted(set(episodes.robots()) - set(robots)):
            known = episodes.where("robot", lambda robot: robot in robots)
            notes.append(f"{episodes.folder} {episodes.split}: {(~known).sum()} of {len(known)} "
                         f"records are of {unknown}, which nothing is trained on, and are left out "
                         "of validation.")
            if not known.any():
                continue
            episodes = episodes.only(known)
        opened[number] = episodes
    if not opened:
        reasons = notes or ["No source has a validation_split or a validation_fraction."]
        raise UserError(f"There is nothing to validate on. {' '.join(reasons)}")
    return opened, notes


def open_source(config: DataConfig, source: SourceConfig, held_out: bool = False) -> Episodes:
    """The episodes of a source that are trained on, or those that are held out.

    Raises:
      UserError: the dataset is absent or damaged, has no such robot, or no episode is left.
    """
    split = source.validation_split if held_out and source.validation_split else source.split
    episodes = Episodes(source.path, split, config.cache_bytes // len(config.sources))
    cameras = [source.cameras.get(camera, camera) for camera in config.cameras]
    unknown = set(source.robots) - set(episodes.robots())
    if unknown and not held_out:
        raise UserError(f"{episodes.folder} has no robot {min(unknown)!r}, but "
                        f"{list(episodes.robots())}.")
    kept = {
        "robots": episodes.where("robot", lambda robot: robot in (source.robots or (robot,))),
        "min_views": source.min_views <= sum(
            episodes.where("camera_layout", lambda names, camera=camera: camera in names.split(","))
            for camera in cameras),
        "min_seconds": rates.at_least(episodes.seconds(), source.min_seconds),
    }
    if source.validation_fraction:
        drawn = _drawn(episodes, "", source.validation_fraction)
        if not np.logical_and.reduce([drawn, *kept.values()]).any():
            raise UserError(f"The validation_fraction {source.validation_fraction} of "
                            f"{episodes.folder}, {len(episodes)} records, holds no episode out: "
                            "raise it.")
        kept["validation_fraction"] = drawn if held_out else ~drawn
    mask = np.logical_and.reduce(list(kept.values()))
    if not mask.any():
        counts = ", ".join(f"{name} keeps {passed.sum()}" for name, passed in kept.items())
        raise UserError(f"No episode of {episodes.folder} {split} is left: of {len(episodes)} "
                        f"records {counts}.")
    episodes = episodes.only(mask)
    if not held_out and source.labelled < 1:
        episodes.has_action &= _drawn(episodes, "labelled/", source.labelled)
    return episodes


def _drawn(episodes: Episodes, purpose: str, share: float) -> np.ndarray:
    """bool[records], always the same: those of about this share of the episodes."""
    def number(name):
        return int.from_bytes(hashlib.sha256((purpose + name).encode()).digest()[:8])

    return episodes.where("episode_id", lambda name: number(name) < share * 2**64)
