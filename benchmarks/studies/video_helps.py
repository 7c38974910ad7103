"""Does video help a policy? On the tabletop's 13 tasks, by Fast-WAM, 40 clips a step.

`all_*`: every one of 300 demonstrations a task has its actions. `few_*`: 24 a task have, and a
thousand other episodes of these tasks are video alone. `half_*`: the demonstrations of seven tasks
have their actions, those of the other six are video alone. Of the 40 clips of a step of `joint`,
eight are of video.
"""

from jaxvp.envs.tabletop import SEEN_TASKS
from jaxvp.study import Claim, Row, Run, Study

LABELLED = tuple(SEEN_TASKS)[::2]
VIDEO_ONLY = tuple(SEEN_TASKS)[1::2]
CONFIG = "configs/pretrain.py"
ALL, FEW, VIDEO = "data/tabletop", "data/tabletop_few", "data/tabletop_video"
WITH, WITHOUT = "data/tabletop_with", "data/tabletop_without"


def study(quick: bool) -> Study:
    """See the module's docstring; `quick` has a few steps and episodes."""
    steps = 20 if quick else 1500
    prefix = "data/quick" if quick else "data"

    def path(name):
        return name.replace("data", prefix, 1)

    def build(episodes, tasks, *more):
        return ("tabletop", f"--episodes={26 if quick else episodes}",
                f"--tasks={','.join(tasks)}", *more)

    def training(stage, *sources, share=1.0, **changes):
        """A run of `share` of the steps; a source is a folder, or (folder, labelled)."""
        sources = [source if isinstance(source, tuple) else (source, 1.0) for source in sources]
        changes = {
            "data.sources": tuple({"path": path(name), "weight": None, "labelled": labelled}
                                  for name, labelled in sources),
            "stage": stage, "steps": round(share * steps),
            "optimizer.warmup_steps": round(0.05 * share * steps), "log_every": 5 if quick else 50,
            "validate_every": 0, "sample_every": 0, "save_every": 500, **changes}
        return Run(CONFIG, changes)

    rows = {
        "all_joint": Row("all labelled: joint", (training("joint", ALL),)),
        "all_policy": Row("all labelled: no video", (training("policy", ALL),)),
        "all_two_stages": Row("all labelled: video, then the head on it, frozen", (
            training("video", ALL, share=1 / 3, batch_size=16),
            training("action", ALL, share=2 / 3))),
        "all_untuned": Row("all labelled: the head on a random transformer, frozen", (
            training("action", ALL, share=2 / 3),)),
        "few_joint": Row("24 labelled, 1,000 videos: joint", (
            training("joint", FEW, (VIDEO, 0.0)),)),
        "few_own": Row("24 labelled: joint, no other video", (training("joint", FEW),)),
        "few_policy": Row("24 labelled: no video", (training("policy", FEW),)),
        "few_pretrained": Row("24 labelled, 1,000 videos: video, then all by the action loss", (
            training("video", FEW, (VIDEO, 0.0), share=1 / 3, batch_size=16),
            training("policy", FEW, share=2 / 3))),
        "half_joint": Row("7 tasks labelled, 6 in video: joint", (
            training("joint", WITH, (WITHOUT, 0.0)),)),
        "half_policy": Row("7 tasks labelled: no video", (training("policy", WITH),)),
    }
    seen = "tabletop"
    backgrounds, distractors = "tabletop_unseen_backgrounds", "tabletop_unseen_distractors"
    claims = [
        Claim("All labelled: joint beats no video.", "all_joint", "all_policy", seen),
        Claim("All labelled, unseen table tops: joint beats no video.", "all_joint", "all_policy",
              backgrounds),
        Claim("All labelled, unseen distractors: joint beats no video.", "all_joint", "all_policy",
              distractors),
        Claim("Features of video beat those of a random network.", "all_two_stages", "all_untuned",
              seen),
        Claim("Joint beats two stages.", "all_joint", "all_two_stages", seen),
        Claim("24 labelled: video without actions beats no video.", "few_joint", "few_policy",
              seen),
        Claim("24 labelled: it beats the video of the labelled ones.", "few_joint", "few_own",
              seen),
        Claim("24 labelled: pretraining on video beats no video.", "few_pretrained", "few_policy",
              seen),
        Claim("24 labelled, unseen table tops: video without actions beats no video.", "few_joint",
              "few_policy", backgrounds),
        Claim("Tasks seen in video alone are solved more often than without.", "half_joint",
              "half_policy", seen, VIDEO_ONLY),
    ]
    trials = 1 if quick else 10
    return Study(
        question="Does video help a policy?",
        data={path(ALL): build(3900, ("seen",)),
              path(FEW): build(24 * 13, ("seen",), "--seed=3000000"),
              path(VIDEO): build(1000, ("seen",), "--seed=4000000"),
              path(WITH): build(300 * len(LABELLED), LABELLED, "--seed=5000000"),
              path(WITHOUT): build(300 * len(VIDEO_ONLY), VIDEO_ONLY, "--seed=6000000")},
        rows=rows, claims=claims, seeds=1 if quick else 3,
        suites={seen: 2 * trials, backgrounds: trials, distractors: trials})
