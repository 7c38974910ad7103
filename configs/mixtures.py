"""What published systems were pretrained on, as data: `MIXTURES`, fields of `data` in a config.

    python -m jaxvp.tools.inspect_data --config=configs/mixtures.py:vidar --out=runs/vidar

`BUILD` says what makes each dataset. A source without a weight counts as much as it has clips, and
a clip starts at every stored step: an hour at 30 steps per second weighs ten times an hour at 3,
unless the builder's --fps makes them alike. `fps`, of the clips, is at most that of the slowest
dataset.

`vidar`: three views at 8 fps. AgiBot World, RoboMIND and RDT in proportion to their sizes, without
episodes of fewer than three views or four seconds; AgiBot cut into its annotated segments; for
simulated robots EgoDex too, the last source (arXiv 2507.12898; of RoboMIND Franka and AgileX, as
Vidarc, arXiv 2512.17661, lists them). EgoDex has one camera, so its other views are masked, and
the filter of views is not for it. Where Franka's side views go on the canvas is not published.

`talk`: one view at 3 fps, the rate of Fractal (Bridge has 5, AgiBot 30). The first stage of UVA on
real robots: AgiBot World Beta, Fractal, Bridge V1 and V2, of one camera. bridge_dataset holds both
versions of Bridge. The talk gives no weights; in proportion to size AgiBot would be 98 % of the
clips, so here it is each a third, hands a tenth of AgiBot's (22 of its 217 tasks).

`magic_soup`: a third-person and a wrist view at 2 fps, the rate of ucsd_kitchen (without it, under
0.1 % of the clips, 3). The 25 datasets of Octo (arXiv 2405.12213), weighted as its model card says
("proportion of batch", huggingface.co/rail-berkeley/octo-small), which is what its code's factors
(oxe_dataset_mixes.py: 0.54 Fractal, 0.83 Kuka, 1 Bridge, 2 Taco Play, ...) times the sizes of the
datasets come to. Octo keeps every dataset's own rate instead.

`video`: people without robots, one view at 8 fps: Ego4D and Something-Something v2, what the talk
wants to add next; half each, which nobody has published. To add them to another mixture, add their
sources, with the weights and the views of that mixture.
"""

from ml_collections import ConfigDict

from jaxvp.errors import UserError

ABSENT = {"left_wrist": None, "right_wrist": None}
VIDAR = {"weight": None, "min_views": 3, "min_seconds": 4.0}

# Dataset, share in percent, views that it lacks.
OCTO = (
    ("fractal20220817_data", 17.0, "wrist"),
    ("kuka", 17.0, "wrist"),
    ("bridge_dataset", 17.0, ""),
    ("bc_z", 9.1, "wrist"),
    ("stanford_hydra_dataset_converted_externally_to_rlds", 6.0, ""),
    ("language_table", 5.9, "wrist"),
    ("taco_play", 3.6, ""),
    ("furniture_bench_dataset_converted_externally_to_rlds", 3.3, ""),
    ("utaustin_mutex", 3.0, ""),
    ("austin_sailor_dataset_converted_externally_to_rlds", 2.9, ""),
    ("roboturk", 2.8, "wrist"),
    ("toto", 2.4, "wrist"),
    ("austin_sirius_dataset_converted_externally_to_rlds", 2.3, ""),
    ("berkeley_autolab_ur5", 1.5, ""),
    ("iamlab_cmu_pickup_insert_converted_externally_to_rlds", 1.2, ""),
    ("viola", 1.2, ""),
    ("berkeley_fanuc_manipulation", 1.0, ""),
    ("nyu_franka_play_dataset_converted_externally_to_rlds", 0.9, "wrist"),
    ("jaco_play", 0.6, ""),
    ("berkeley_cable_routing", 0.3, ""),
    ("austin_buds_dataset_converted_externally_to_rlds", 0.3, ""),
    ("cmu_stretch", 0.2, "wrist"),
    ("nyu_door_opening_surprising_effectiveness", 0.1, "agentview"),
    ("dlr_edan_shared_control_converted_externally_to_rlds", 0.1, "wrist"),
    ("ucsd_kitchen_dataset_converted_externally_to_rlds", 0.06, "wrist"),  # "<0.1": by its size.
)

MIXTURES = {
    "vidar": {
        "sources": (
            {"path": "data/agibot", **VIDAR},
            {"path": "data/agibot_dexhand", **VIDAR},
            {"path": "data/robomind_agilex_3rgb", **VIDAR,
             "cameras": {"head": "camera_front", "left_wrist": "camera_left_wrist",
                         "right_wrist": "camera_right_wrist"}},
            {"path": "data/robomind_franka_3rgb", **VIDAR,
             "cameras": {"head": "camera_top", "left_wrist": "camera_left",
                         "right_wrist": "camera_right"}},
            {"path": "data/rdt", **VIDAR,
             "cameras": {"head": "cam_high", "left_wrist": "cam_left_wrist",
                         "right_wrist": "cam_right_wrist"}},
            {"path": "data/egodex", "weight": None, "min_seconds": 4.0, "cameras": ABSENT},
        ),
        "layout": "bimanual",
        "fps": 8.0,
    },
    "talk": {
        "sources": (
            {"path": "data/agibot", "weight": 0.9, "cameras": {"agentview": "head"}},
            {"path": "data/agibot_dexhand", "weight": 0.1, "cameras": {"agentview": "head"}},
            {"path": "data/fractal20220817_data", "weight": 1.0},
            {"path": "data/bridge_dataset", "weight": 1.0},
        ),
        "layout": "single",
        "fps": 3.0,
    },
    "magic_soup": {
        "sources": tuple(
            {"path": f"data/{name}", "weight": share, "cameras": {lacks: None} if lacks else {}}
            for name, share, lacks in OCTO),
        "layout": "single_wrist",
        "fps": 2.0,
    },
    "video": {
        "sources": (
            {"path": "data/ego4d", "weight": 1.0, "cameras": {"agentview": "head"}},
            {"path": "data/something_something", "weight": 1.0, "cameras": {"agentview": "camera"}},
        ),
        "layout": "single",
        "fps": 8.0,
    },
}

# What follows `python -m data_builders.build`; RAW is the download.
BUILD = {
    "data/agibot": "agibot --raw=RAW",
    "data/agibot_dexhand": "agibot --raw=RAW --hand=dexhand",
    "data/robomind_agilex_3rgb": "robomind --raw=RAW --embodiment=agilex_3rgb",
    "data/robomind_franka_3rgb": "robomind --raw=RAW --embodiment=franka_3rgb",
    "data/rdt": "rdt --raw=RAW",
    "data/egodex": "egodex --raw=RAW",
    "data/ego4d": "ego4d --raw=RAW",
    "data/something_something": "something_something --raw=RAW",
    **{f"data/{name}": f"open_x --raw=RAW --dataset={name}" for name, _, _ in OCTO},
}


def clips(name: str, future: int, chunk: int, image_size, fps: float = 0) -> dict:
    """`config.data` of a mixture: clips of one observed frame and `future` ones, at the mixture's
    own rate unless `fps` says another."""
    mixture = dict(MIXTURES[name])
    own = mixture.pop("fps")
    window = {"fps": fps or own, "past": 1, "future": future, "past_actions": 0, "chunk": chunk}
    return {**mixture, "window": window, "image_size": image_size}


def get_config(name: str = "") -> ConfigDict:
    """Clips of 17 frames and 16 actions of a mixture, to look at."""
    if name not in MIXTURES:
        raise UserError(f"No mixture {name!r} in configs/mixtures.py: there are {[*MIXTURES]}.")
    return ConfigDict({"data": clips(name, future=16, chunk=16, image_size=256)})
