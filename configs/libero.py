"""LIBERO from nothing: Fast-WAM on demonstrations of the scripted expert, two cameras, language.

    for suite in libero_object libero_spatial; do
      python -m data_builders.build libero_scripted --suites=$suite --episodes=60 --fps=4 \
          --permuted=0.25 --anywhere=0.35 --noisy=0.25 --recoveries=0.1 --val_fraction=0.02 \
          --out=data/$suite
    done
    python -m jaxvp.main --config=configs/libero.py
    python -m jaxvp.export --workdir=runs/libero --out=bundle
    python -m jaxvp.evaluate --bundle=bundle --suite=libero_object --trials=20 --out=evaluation

One model for the 20 tasks of both suites, 600 episodes each. Objects are where the benchmark places
them in two of five episodes, and elsewhere in the others. `libero_object` and `libero_spatial` have
one suite each. With both suites: `no_video` has no video loss, `no_state` no proprioception; `half`
has the actions of half of the episodes, and video of all; `half_no_video` of these actions alone.
Two CPU cores; no time and no success rate is claimed, since none has been measured yet.
"""

from ml_collections import ConfigDict

from configs import pretrain
from jaxvp.config import complete
from jaxvp.errors import UserError
from jaxvp.step import TrainConfig

SUITES = ("libero_object", "libero_spatial")
VARIANTS = ("", *SUITES, "no_video", "no_state", "half", "half_no_video")


def get_config(variant: str = "") -> ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"configs/libero.py:{variant}: variants are {sorted(VARIANTS)}.")
    config = pretrain.tabletop()
    config["embedded"] = {}
    config["data"] |= {
        "sources": tuple({"path": f"data/{suite}", "labelled": 0.5 if "half" in variant else 1.0}
                         for suite in ([variant] if variant in SUITES else SUITES)),
        "layout": "single_wrist",
        "window": {"fps": 4.0, "past": 1, "future": 3, "past_actions": 0, "chunk": 16},
        "image_size": 96,
        "source_size": 128,
        "crop": 0.92,
        "text_length": 160,
        "action_size": 7,
    }
    config["method"]["video"]["codec"]["patch"] = 4  # Objects are smaller than on the tabletop.
    config["method"] |= {"video_every": 9, "proprioception": variant != "no_state"}
    if "no_video" in variant:
        config["stage"] = "policy"
    config |= {"steps": 10_000, "batch_size": 36, "execution_horizon": 8}
    return ConfigDict(complete(TrainConfig, config))
