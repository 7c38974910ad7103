"""AgiBot World 2026 as RLDS (huggingface.co/datasets/agibot-world/AgiBotWorld2026).

Licence CC BY-NC-SA 4.0. Archives such as ImitationLearning/<scene>/task_<id>/<a>_<b>.tar.gz hold
LeRobot datasets of format 2.1: unpack each into a folder of its own. RAW is any folder above:

    python -m data_builders.build agibot_2026 --out=DIR --raw=RAW

Where a dimension is in the vectors differs from task to task: info.json says it. The instruction
of a step is that of its segment on the track `default`; between segments it is the task's.
"""

import dataclasses

from data_builders.builder import option
from data_builders.lerobot import lerobot

FIELDS = ("joint/position", "left_effector/position", "right_effector/position", "head/position",
          "waist/position")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Builder(lerobot.Builder):
    """AgiBot World 2026: G2 robot with two arms, head and wrist cameras, joint angles."""

    name = "agibot_2026"
    version = "1.0.0"
    units = {f"{column}/{field}/position": "rad" for column in ("state", "action")
             for field in ("joint", "head", "waist")}

    state: tuple[str, ...] = option(
        tuple(f"state/{field}" for field in FIELDS), "parts of the state; empty: no state")
    action: tuple[str, ...] = option(
        (*(f"action/{field}" for field in FIELDS), "action/robot/velocity"),
        "parts of the action; empty: no actions")
    # Seen in the data: 0 is open; from -0.91 on it is closed.
    gripper: tuple[str, ...] = option(
        tuple(f"{column}/{side}_effector/position=-0.91:0" for column in ("state", "action")
              for side in ("left", "right")), "NAME=CLOSED:OPEN of the gripper dimensions")
    cameras: tuple[str, ...] = option(("top_head", "hand_left", "hand_right"),
                                      "cameras to keep, in canvas order; empty: all")
    robot: str = option("AgiBot G2 with two arms, grippers and wheels", "what to call the robot")
