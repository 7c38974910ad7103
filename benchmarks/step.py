"""One training step of Wan's transformer: jaxvp, and beside it diffusers in PyTorch when installed.

    python benchmarks/step.py --case=cpu-7m --json=benchmarks/results/step_cpu.json
    python benchmarks/step.py --case=wan-5b-robot --json=benchmarks/results/step_gpu.json

Each side runs in a process of its own, which it has to itself, in turns: ABAB. A time is the
median over the steps of all turns, after a first turn's worth of warming up. On a CPU a step is
forward and backward pass in float32, with equal weights, whose outputs are compared. On a GPU it
is a training step of both: bfloat16 matmuls, float32 master weights, AdamW; the peer compiled by
torch.compile, with the attention that PyTorch chooses.

The peer needs `pip install torch diffusers accelerate safetensors`; --peer names the Python that
has them, by default this one.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from result import hardware, save

from jaxvp.versions import versions

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Case:
    """Latents float32[B, t, h, w, c] and text float32[B, M, D'] of one step.

    Attributes:
      size: in `transformer.SIZES`; batch: B; latents: (t, h, w); text_tokens: M.
      train: with the optimizer, in bfloat16; otherwise forward and backward pass in float32.
      remat: what jaxvp recomputes; the peer recomputes whole blocks unless it is "none".
    """

    size: str
    batch: int
    latents: tuple[int, int, int]
    text_tokens: int = 512
    train: bool = True
    remat: str = "none"


# Robot clips are 17 frames of three cameras at 256 pixels on one canvas of 384 x 256.
CASES = {
    "cpu-7m": Case("wan-7m", 2, (4, 32, 32), text_tokens=128, train=False, remat="dots"),
    "wan-1.3b-robot": Case("wan-1.3b", 8, (5, 48, 32)),
    "wan-5b-robot": Case("wan-5b", 16, (5, 24, 16), remat="attention"),
    "wan-1.3b-480p": Case("wan-1.3b", 1, (13, 60, 104), remat="attention"),
    "wan-5b-480p": Case("wan-5b", 1, (13, 30, 52), remat="attention"),
}


def inputs(case: Case, channels: int, text_width: int) -> tuple[np.ndarray, ...]:
    """latents, target, timestep, text of a step; the same on both sides."""
    rng = np.random.default_rng(0)
    latents, target = rng.normal(size=(2, case.batch, *case.latents, channels)).astype(np.float32)
    text = rng.normal(size=(case.batch, case.text_tokens, text_width)).astype(np.float32)
    return latents, target, np.linspace(100, 900, case.batch, dtype=np.float32), text


def jaxvp_side(case: Case, steps: int, weights: Path | None) -> dict:
    """Times jaxvp; reads or writes nothing but `weights`, a diffusers folder."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxvp import optim
    from jaxvp.models.transformer import SIZES, VideoTransformer
    from jaxvp.weights import wan

    dtype = "bfloat16" if case.train else "float32"
    model = VideoTransformer(**SIZES[case.size], dtype=dtype, remat=case.remat)
    if weights:
        params = wan.load(weights, model)[0]
    else:
        params = jax.jit(model.init)(jax.random.key(0))
    batch = jax.device_put(inputs(case, model.channels, model.text_width))

    def loss(params, latents, target, timestep, text):
        out, _ = model(params, latents, timestep, text)
        return jnp.square(out - target).mean(), out

    grad = jax.value_and_grad(loss, has_aux=True)
    config = optim.OptimizerConfig(learning_rate=1e-5, weight_decay=0.1, schedule="constant")
    tx, _ = optim.make_optimizer(config, params, 1000)

    def update(state, batch):
        (value, _), grads = grad(state[0], *batch)
        updates, opt_state = tx.update(grads, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), value

    if case.train:
        state = params, jax.jit(tx.init)(params)
        run = jax.jit(update, donate_argnums=0).lower(state, batch).compile()
    else:
        run = jax.jit(grad).lower(params, *batch).compile()
    times, out = [], None
    for _ in range(2 * steps):
        start = time.perf_counter()
        if case.train:
            state, value = run(state, batch)
            jax.block_until_ready((state, value))
        else:
            (value, out), grads = run(params, *batch)
            jax.block_until_ready(grads)
        times.append(time.perf_counter() - start)
    device = jax.local_devices()[0]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    tokens = int(np.prod(model.tokens(*case.latents)))
    return {
        "times": times[steps:], "loss": float(value), "peak_bytes": memory or peak_rss(),
        "output": None if out is None else np.asarray(out).ravel()[:4096].tolist(),
        "flops": 3 * case.batch * sum(model.flops(tokens, case.text_tokens).values()),
        "parameters": model.parameter_count, "device": device.device_kind,
        "versions": versions("jax", "jaxlib", "flax")}


def peer_side(case: Case, steps: int, sizes: dict, weights: Path | None) -> dict:
    """Times diffusers' WanTransformer3DModel; writes its weights to `weights` first."""
    import diffusers
    import torch

    device = "cuda" if case.train else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = diffusers.WanTransformer3DModel(
            num_attention_heads=sizes["heads"], attention_head_dim=sizes["width"] // sizes["heads"],
            in_channels=sizes["channels"], out_channels=sizes["channels"],
            text_dim=sizes["text_width"], ffn_dim=sizes["ffn"], num_layers=sizes["layers"])
    if weights:
        model.save_pretrained(weights)
    latents, target, timestep, text = (
        torch.from_numpy(x).to(device) for x in inputs(case, sizes["channels"],
                                                       sizes["text_width"]))
    latents, target = (x.permute(0, 4, 1, 2, 3).contiguous() for x in (latents, target))
    if case.train:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        if case.remat != "none":
            model.enable_gradient_checkpointing()
        run_model = torch.compile(model)
    else:
        run_model = model
    times = []
    for _ in range(2 * steps):
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=case.train):
            out = run_model(latents, timestep, text, return_dict=False)[0]
        loss = (out.float() - target).square().mean()
        loss.backward()
        if case.train:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            torch.cuda.synchronize()
        model.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    first = out.permute(0, 2, 3, 4, 1).flatten()[:4096]
    return {
        "times": times[steps:], "loss": float(loss.detach()),
        "output": None if case.train else first.tolist(),
        "peak_bytes": torch.cuda.max_memory_allocated() if case.train else peak_rss(),
        "versions": versions("torch", "diffusers")}


def peak_rss() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def side(name: str, python: str, options: argparse.Namespace, *extra: str) -> dict:
    """Runs one side in a process; what it printed last is its result."""
    # Huge pages: a CPU step allocates anew, and the kernel then hands out fewer of them.
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ}
    environment["PYTHONPATH"] = str(ROOT)
    command = [python, __file__, f"--side={name}", f"--case={options.case}",
               f"--steps={options.steps}", *extra]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f"error: the side {name!r} stopped with status {result.returncode}.")
    return json.loads(result.stdout.splitlines()[-1])


def has_peer(python: str) -> bool:
    probe = "import importlib.util as u; print(all(map(u.find_spec, ('torch', 'diffusers'))))"
    found = subprocess.run([python, "-c", probe], capture_output=True, text=True)
    return found.stdout.strip() == "True"


def compare(options: argparse.Namespace) -> dict:
    """Both sides in turns, as the JSON of the result."""
    from jaxvp.plan import chips

    case = CASES[options.case]
    with tempfile.TemporaryDirectory() as folder:
        peer = has_peer(options.peer)
        equal = () if case.train or not peer else (f"--weights={folder}/weights",)
        turns = {"jaxvp": [], "peer": []}
        for _ in range(options.turns):
            if peer:
                turns["peer"].append(side("peer", options.peer, options, *equal))
            turns["jaxvp"].append(side("jaxvp", sys.executable, options, *equal))
    ours, theirs = turns["jaxvp"], turns["peer"]
    seconds = {name: statistics.median(t for turn in found for t in turn["times"])
               for name, found in turns.items() if found}
    result = {
        "benchmark": "step", "case": options.case, **dataclasses.asdict(case),
        "parameters": ours[0]["parameters"], "model_flops": ours[0]["flops"],
        "jaxvp_seconds": seconds["jaxvp"], "clips_per_second": case.batch / seconds["jaxvp"],
        "model_tflops_per_second": ours[0]["flops"] / seconds["jaxvp"] / 1e12,
        "jaxvp_peak_bytes": max(turn["peak_bytes"] for turn in ours),
        "device": ours[0]["device"], "hardware": hardware(),
        "versions": ours[0]["versions"]}
    for name, chip in chips.CHIPS.items():
        if name in ours[0]["device"].lower():
            result["mfu"] = result["model_tflops_per_second"] * 1e12 / chip.flops
    if peer:
        result |= {
            "peer": "diffusers WanTransformer3DModel", "peer_seconds": seconds["peer"],
            "ratio": seconds["peer"] / seconds["jaxvp"],
            "peer_peak_bytes": max(turn["peak_bytes"] for turn in theirs)}
        result["versions"] = theirs[0]["versions"] | result["versions"]
        if not case.train:
            a, b = (np.array(turn[0]["output"]) for turn in (ours, theirs))
            result["output_difference"] = float(np.abs(a - b).max() / np.abs(b).max())
    return result


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--case", default="cpu-7m", choices=CASES)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a turn")
    parser.add_argument("--turns", type=int, default=2, help="of each side")
    parser.add_argument("--peer", default=sys.executable, help="Python that has torch, diffusers")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--side", choices=("jaxvp", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    case = CASES[options.case]
    if options.side == "jaxvp":
        print(json.dumps(jaxvp_side(case, options.steps, options.weights)))
    elif options.side == "peer":
        # The sizes without importing jaxvp, whose packages the peer's Python may lack.
        print(json.dumps(peer_side(case, options.steps, sizes_of(case.size), options.weights)))
    else:
        save(compare(options), options.json)


def sizes_of(name: str) -> dict:
    """An entry of `transformer.SIZES`, read from its source."""
    import ast

    tree = ast.parse((ROOT / "jaxvp" / "models" / "transformer.py").read_text())
    sizes = next(node.value for node in tree.body if isinstance(node, ast.Assign)
                 and getattr(node.targets[0], "id", "") == "SIZES")
    return ast.literal_eval(sizes)[name]


if __name__ == "__main__":
    main(sys.argv[1:])
