"""What makes the tabletop's policy strong? configs/pretrain.py, one choice undone in each row.

All rows have a quarter of the steps of the config, and see equally many clips.
"""

from jaxvp.study import Claim, Row, Run, Study

CLEAN, NOISY = "data/tabletop", "data/tabletop_noisy"
UNDONE = {
    "noisy": ("demonstrations with noise", {}),
    "velocity": ("the action loss as the error of the velocity, 10 steps of the sampler", {
        "method.action_weight": "velocity", "method.action_shift": 1.0,
        "method.action_steps": 10}),
    "video_velocity": ("the video loss as the error of the velocity", {
        "method.video.weight": "velocity"}),
    "one_draw": ("one noise level a clip in the action loss, not four", {
        "method.action_draws": 1}),
    "adamw": ("AdamW at half of the learning rate, no Muon", {
        "optimizer.muon": (), "optimizer.learning_rate": 1e-3}),
    "large_batch": ("twice the batch, half of the steps", {}),
    "patches_4": ("tokens of 8 pixels, not 16", {"method.video.codec.patch": 4}),
}


def study(quick: bool) -> Study:
    """See the module's docstring; `quick` has a few steps and episodes."""
    steps, folder = (20, "data/quick") if quick else (1500, "data")

    def path(name):
        return name.replace("data", folder, 1)

    def run(source, changes, factor=1):
        return (Run("configs/pretrain.py", {
            "data.sources": ({"path": path(source)},), "steps": steps // factor,
            "batch_size": 40 * factor, "optimizer.warmup_steps": steps // factor // 20,
            "log_every": 5 if quick else 50, "validate_every": 0, "sample_every": 0,
            "save_every": 500, **changes}),)

    rows = {"recipe": Row("the config", run(CLEAN, {}))}
    for name, (about, changes) in UNDONE.items():
        rows[name] = Row(about, run(NOISY if name == "noisy" else CLEAN, changes,
                                    2 if name == "large_batch" else 1))
    build = ("tabletop", f"--episodes={26 if quick else 3900}", "--tasks=seen")
    return Study(
        question="What makes the tabletop's policy strong?",
        data={path(CLEAN): build,
              path(NOISY): (*build, "--disturbance=0.01", "--wander=0.01", "--seed=2000000")},
        rows=rows,
        claims=[Claim(f"The config beats: {about}.", "recipe", name, "tabletop")
                for name, (about, _) in UNDONE.items()],
        suites={"tabletop": 1 if quick else 20}, seeds=1 if quick else 3)
