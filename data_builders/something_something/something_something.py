"""Something-Something v2 (arXiv 1706.04261) as RLDS: 220,847 short clips of hands, no actions.

Source: Qualcomm's AI datasets, formerly 20BN, with a login and a research licence that forbids
redistribution. The videos are one archive in two parts:

    cat 20bn-something-something-v2-?? | tar -xz

    RAW/20bn-something-something-v2/<id>.webm          12 frames per second, widths differ
    RAW/[labels/][something-something-v2-]{train,validation,test}.json

    python -m data_builders.build something_something --out=DIR --raw=RAW

The instruction is the label, such as "holding potato next to vicks vaporub bottle"; who mirrors
images must know that labels say left and right. The splits are the dataset's own, `validation` as
`val`. Its test split is listed without labels, so it is left out as "no instruction"; with
--unlabelled=keep it becomes `test`.
"""

import dataclasses
from collections.abc import Iterator

from data_builders import builder, episode, json_file, video

FOLDER = "20bn-something-something-v2"
PLACES = ("labels/{}.json", "{}.json", "labels/something-something-v2-{}.json",
          "something-something-v2-{}.json")
SPLITS = {"train": "train", "validation": "val", "test": "test"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Builder(builder.RawBuilder):
    """Something-Something v2: labelled clips of human hands, one camera, no actions."""

    name = "something_something"
    version = "1.0.0"
    items_per_shard = 500  # An episode has about half a megabyte.

    def features(self):
        size = (self.image_size, self.image_size)
        return episode.features({name: size for name in self.view_names(("camera",))}, (), None)

    def items(self) -> list[tuple[str, str, str]]:
        """(split, id, label), as listed.

        Raises:
          UserError: there is no list of the split train.
        """
        items = []
        for split in SPLITS:
            files = [file for file in (self.path() / place.format(split) for place in PLACES)
                     if file.exists()]
            if not files and split == "train":
                self.path(PLACES[0].format(split))
            for entry in json_file.read(files[0]) if files else ():
                items.append((split, str(entry["id"]), entry.get("label", "")))
        return items

    def split(self, item: tuple[str, str, str]) -> str:
        return SPLITS[item[0]]

    def episode_id(self, item: tuple[str, str, str]) -> str:
        return item[1]

    def build(self, item: tuple[str, str, str]) -> Iterator[episode.Episode]:
        _, number, label = item
        instruction = self.instruction(label)
        source = f"{FOLDER}/{number}.webm"
        path = self.path(source)
        length, fps = video.measure(path)
        self.admit(length, fps, views=1)
        steps = self.kept(length, fps)
        yield self.episode(
            item, fps, steps,
            robot="human hands",
            images={"camera": video.jpegs(path, steps, self.image_size)},
            camera_text="one camera",
            instruction=instruction,
            source=source)
