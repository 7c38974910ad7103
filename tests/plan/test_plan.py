import dataclasses
import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import hlo as golden

from configs import pretrain, vpp
from jaxvp import command, sharding, step
from jaxvp import config as config_lib
from jaxvp.data import sources
from jaxvp.errors import UserError
from jaxvp.methods import base
from jaxvp.plan import chips, flops, hlo_analysis, plan, policy

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


def make_config(**changes) -> step.TrainConfig:
    """The tabletop config, in the shape that `changes` give it; dotted keys."""
    raw = vpp.get_config().to_dict()
    raw["data"] |= {"action_size": 8, "state_size": 8}
    raw["method"]["video"]["transformer"] |= {"layers": 2, "unroll": 1}
    raw["method"]["taps"] = (0, 1)
    raw |= {"batch_size": 64, "mesh": {"data": 1, "fsdp": -1}}
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        at = raw
        for parent in parents:
            at = at[parent]
        at[leaf] = value
    return config_lib.build(step.TrainConfig, raw, "config")


def step_of(config: step.TrainConfig, machine: str = "h200:8") -> step.Step:
    mesh = plan._abstract_mesh(config.mesh, chips.parse(machine))
    return step.build(config, sources.clip_spec(config.data), mesh)


def flops_of(config: step.TrainConfig) -> dict[str, float]:
    return flops.model_flops(config, step_of(config))


# Chips.

@pytest.mark.parametrize("topology, number", [
    ("v5p:8x16x16", 2048), ("v5p:4x4x4", 64), ("v6e:16x16", 256), ("v5e:16x16", 256),
    ("v5e:1x1", 1), ("h200:8", 8), ("h100:64", 64)])
def test_topologies(topology, number):
    assert chips.parse(topology).chips == number
    assert str(chips.parse(topology)) == topology


@pytest.mark.parametrize("topology, message", [
    ("v9:4x4", r"no chip 'v9'; there are v5e, v5p, v6e"),
    ("v5p", r"expected v5p:AxBxC"),
    ("v5p:4x4x", r"expected v5p:AxBxC"),
    ("v5p:0x4x4", r"expected v5p:AxBxC"),
    ("v5p:3x4x4", r"no slice of this shape. Nearest: v5p:4x4x4"),
    ("v5p:16x16x8", r"Nearest: v5p:8x16x16"),
    ("v6e:16x32", r"Nearest: v6e:16x16"),
    ("v6e:4x4x4", r"Nearest: v6e:8x8"),
    ("h200:7", r"Nearest: h200:8, h200:4"),
])
def test_a_topology_that_does_not_exist(topology, message):
    with pytest.raises(ValueError, match=message):
        chips.parse(topology)


def test_gpus_have_no_slices_and_no_compiler():
    with pytest.raises(ValueError, match="--slices=2 of h200:8"):
        chips.parse("h200:8", 2)
    with pytest.raises(ValueError, match="no compiler for absent GPUs"):
        chips.parse("h200:8").devices()


def test_smaller_slices():
    assert [str(m) for m in chips.smaller(chips.parse("v5p:8x16x16"), 64)] == [
        "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8", "v5p:8x8x8", "v5p:8x8x16", "v5p:8x16x16"]
    assert [m.chips for m in chips.smaller(chips.parse("h200:16"))] == [1, 2, 4, 8, 16]


def network(topology, kind, size, sides, slices=1):
    """Seconds on ICI and DCN of one group over a box of chips."""
    machine = chips.parse(topology, slices)
    where = np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij"), -1).reshape(-1, len(sides))
    of_slice = np.repeat(np.arange(slices), len(where))
    return machine.network_seconds(kind, size, np.tile(where, (slices, 1))[None], of_slice[None])


def test_network():
    gib, link = 2**30, chips.CHIPS["v5p"].link
    ring, _ = network("v5p:4x4x4", "all-gather", gib, (1, 1, 4))
    assert ring == pytest.approx(gib * 3 / 4 / (2 * link))
    torus, _ = network("v5p:4x4x4", "all-gather", gib, (4, 4, 4))
    assert torus == pytest.approx(gib * 63 / 64 / (6 * link))
    assert network("v5p:4x4x4", "all-reduce", gib, (4, 4, 4))[0] == pytest.approx(2 * torus)
    assert network("v5p:4x4x4", "reduce-scatter", gib, (4, 4, 4))[0] == torus
    line, _ = network("v6e:4x4", "all-gather", gib, (1, 4))  # Only 16 chips make a ring.
    assert line == pytest.approx(gib * 3 / 4 / link)
    assert network("v5p:4x4x4", "collective-permute", gib, (1, 1, 2))[0] == gib / link
    assert network("v5p:4x4x4", "all-to-all", gib, (1, 1, 4))[0] == pytest.approx(gib / 2 / link)
    assert network("v5p:4x4x4", "all-reduce", 4, (4, 4, 4)) == (2 * 6 * chips.HOP_SECONDS, 0)
    near, far = network("v5p:4x4x4", "all-reduce", gib, (4, 4, 4), slices=2)
    assert near == pytest.approx(2 * torus)
    assert far == pytest.approx(2 * gib / 64 / 2 / chips.CHIPS["v5p"].dcn)


# FLOPs.

@pytest.mark.parametrize("stage", ["video", "action"])
def test_model_flops(stage):
    """Neither what is recomputed nor how attention is computed counts."""
    config = make_config(stage=stage)
    found = flops_of(config)
    assert flops_of(make_config(
        stage=stage, method__video__transformer__remat="full",
        method__video__transformer__attention="chunked")) == found
    assert {name.split()[0] for name in found} == {
        "video": {"video", "text"}, "action": {"video", "text", "action"}}[stage]
    model = step_of(config).method.video_model
    closed = model.network.flops(np.prod(model.grid), model.text_encoder.tokens)
    passes = {"video": 3, "action": 1}[stage]
    for name, scopes in (("self-attention projections", ["self-attention"]),
                         ("self-attention", ["self-attention scores"]),
                         ("cross-attention", ["cross-attention", "cross-attention scores"]),
                         ("feed-forward", ["feed-forward"])):
        assert sum(found[f"video {scope}"] for scope in scopes) == passes * closed[name]


@pytest.mark.parametrize("name", ["wan-1.3b", "wan-5b", "wan-14b"])
def test_model_flops_are_those_of_the_committed_plans(name):
    stored = json.loads(
        (ROOT / f"benchmarks/results/plan_{name}-latents_v5p-4x8x8.json").read_text())
    raw = pretrain.get_config(f"{name}-latents").to_dict()
    config = config_lib.build(step.TrainConfig, raw, "config")
    total = sum(flops.model_flops(config, step_of(config, "v5p:4x8x8")).values())
    assert config.batch_size == stored["batch_size"]
    assert total * config.batch_size == pytest.approx(
        sum(stored["model_flops"].values()), rel=0.02)


def test_plans_of_wan_need_no_data(tmp_path):
    """Also of the clip whose codec streams."""
    out = tmp_path / "plan.json"
    run = subprocess.run([
        sys.executable, "-m", "jaxvp.plan", "--config=configs/pretrain.py:wan-14b-720p",
        "--topology=v5p:4x4x4", "--dry_run", f"--json={out}"],
        cwd=ROOT, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(out.read_text())
    assert found["fits"] and found["model_flops"]["codec"] > 0


def test_stored_latents_need_no_codec():
    config = make_config(method__video__codec={"name": "wan", "version": "2.1", "width": 8},
                         data__window__future=4)
    found, shape = flops_of(config), step_of(config).method.video_model.latent_shape
    assert found.pop("codec") > 0
    config = dataclasses.replace(config, data=dataclasses.replace(
        config.data, extra={"latents": shape}, video=False))
    assert flops_of(config) == found
    clip = step.abstract_clip(sources.clip_spec(config.data), 2, step_of(config).mesh)
    assert clip["latents"].shape == (2, *shape) and "video" not in clip
    assert plan.make_plan(config, chips.parse("h200:8"), dry_run=True).fits


def test_traced_flops_leave_out_what_is_not_needed():
    x = jax.ShapeDtypeStruct((8, 8), np.float32)
    product = 2 * 8**3
    assert flops.traced_flops(lambda x: (x @ x, x @ x @ x)[0], x).total() == product
    assert flops.traced_flops(jax.grad(lambda x: jax.lax.scan(
        lambda y, _: (y @ x, None), x, None, length=5)[0].sum()), x).total() == 15 * product


def test_flops_are_of_the_scope_that_a_product_is_in():
    """Through loops, functions, differentiation and remat."""
    x, product = jax.ShapeDtypeStruct((8, 8), np.float32), 2 * 8**3

    def loss(x):
        def layer(y, _):
            with jax.named_scope("layer"):
                return jnp.einsum("ab,bc->ac", jax.jit(lambda y: y @ x)(y), x), None

        with jax.named_scope("net"):
            y = jax.lax.scan(layer, x, None, length=5)[0]
            with jax.named_scope("top"):
                y = jax.checkpoint(lambda y: jnp.sin(y @ x))(y)
        return (y @ x).sum()

    assert flops.traced_flops(loss, x) == {
        "net layer": 10 * product, "net top": product, flops.REST: product}
    assert flops.traced_flops(jax.grad(loss), x) == {
        "net layer": 30 * product, "net top": 4 * product, flops.REST: 2 * product}


# Plans.

def test_dry_run():
    config = make_config()
    found = plan.make_plan(config, chips.parse("h200:8"), dry_run=True)
    result = plan.to_json(found)
    assert found.fits and not found.advice and found.mesh["fsdp"] == 8
    assert {"chips", "fits", "hbm_bytes_per_chip", "hbm_capacity_bytes", "step_seconds_bound",
            "mfu_bound", "compile_seconds"} <= set(result)
    assert result["chips"] == 8 and result["compile_seconds"] is None
    assert found.hbm_bytes_per_chip == sum(found.memory.values())
    assert sum(found.model_flops.values()) == pytest.approx(
        64 * sum(flops_of(config).values()))
    json.dumps(result, default=str)


@pytest.fixture
def no_flops(monkeypatch):
    """Tracing takes seconds."""
    monkeypatch.setattr(plan, "model_flops", lambda *_: {"all": 1.0})


@functools.cache
def memory(number: int, remat: str = "full", microbatches: int = 1) -> dict:
    config = make_config(method__video__transformer__remat=remat, microbatches=microbatches)
    return plan.make_plan(config, chips.parse(f"h200:{number}"), dry_run=True).memory


def test_memory_follows_the_sharding(no_flops):
    """What is sharded shrinks with the chips, and activations with the clips on each."""
    one, eight = memory(1), memory(8)
    params = step_of(make_config()).abstract["params"]
    assert params.keys() == {"video", "text"}  # Of the stage `video`; pixels need no codec.
    assert one["parameters"] == one["EMA"] == 4 * sum(x.size for x in jax.tree.leaves(params))
    assert one["parameters"] / 8 < eight["parameters"] < one["parameters"]
    assert eight["activations (estimate)"] == pytest.approx(
        one["activations (estimate)"] / 8, rel=0.1)


def test_remat_and_microbatches_shrink_activations(no_flops):
    label = "activations (estimate)"
    assert memory(8)[label] < 0.7 * memory(8, "none")[label]
    assert memory(8, microbatches=4)[label] < 0.3 * memory(8)[label]


def test_what_does_not_fit_says_what_to_change(no_flops):
    config = make_config(mesh={"data": -1}, method__video__transformer__remat="none")
    machine = chips.parse("h200:8")
    small = dataclasses.replace(machine, chip=dataclasses.replace(machine.chip, hbm_bytes=4e6))
    found = plan.make_plan(config, small, dry_run=True)
    assert not found.fits
    advice = "\n".join(found.advice)
    for change in ("config.mesh.data=1, fsdp=8", "config.microbatches=",
                   "config.method.video.transformer.remat='full'",
                   "config.offload_optimizer=True", "More chips"):
        assert change in advice


class Regression(base.Method):
    """Actions from the state: a method without a video model."""

    modes = ((("observation",), ("action",)),)

    @property
    def stages(self):
        return {"all": base.Stage(trains=("linear",), window=self.spec.window)}

    def init(self, part, key):
        return {"kernel": jnp.zeros((self.spec.state_size, self.spec.action_size))}

    def loss(self, params, clip, keys, stage, train):
        with jax.named_scope("linear"):
            predicted = clip["state"] @ params["linear"]["kernel"]
        loss = jnp.square(predicted - clip["action"][:, :1]).mean()
        return loss, {}, {}


def test_a_method_without_a_video_model():
    config = make_config(method={"name": f"{__name__}:Regression"}, stage="all")
    machine = chips.parse("h200:8")
    found = plan.make_plan(config, machine, dry_run=True)
    assert found.fits and found.parameters == {"linear": 64}
    assert found.model_flops == {"linear": 64 * 2 * 2 * 8 * 8}  # Forward, and by the kernel.
    small = dataclasses.replace(machine, chip=dataclasses.replace(machine.chip, hbm_bytes=100))
    advice = plan.make_plan(config, small, dry_run=True).advice
    assert advice and not any("remat" in line for line in advice)


@pytest.mark.parametrize("message, needed", [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
     "(134.18G) exceeds available HBM (95.74G).", 134.18 * 2**30),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 100.5G of 95.74G hbm.",
     90.5 * 2**30)])
def test_the_compilers_complaint_is_understood(message, needed):
    assert plan._needed(message, 10 * 2**30) == pytest.approx(needed)


def test_other_complaints_are_not_memory():
    with pytest.raises(UserError, match="does not compile: INTERNAL: nonsense"):
        plan._needed("INTERNAL: nonsense", 0)


def test_a_mesh_that_does_not_fit(no_flops):
    with pytest.raises(ValueError, match="does not fit 8 devices. Nearest that does: data="):
        plan.make_plan(make_config(mesh={"fsdp": 3}), chips.parse("h200:8"), dry_run=True)
    with pytest.raises(ValueError, match="batch_size is 65.*the nearest is 64"):
        plan.make_plan(make_config(batch_size=65), chips.parse("h200:8"), dry_run=True)


def empty_plan(machine, mesh):
    return plan.Plan(
        config="c", topology=str(machine), chips=machine.chips, mesh=mesh, batch_size=64,
        microbatches=1, parameters={}, memory={}, host_memory={}, hbm_bytes_per_chip=0.0,
        hbm_capacity_bytes=machine.chip.hbm_bytes, fits=True, model_flops={"all": 64e9})


def roofline_of(name, mesh):
    """Of the stored module on chips that lie in the mesh as they lie in the torus."""
    machine = chips.parse("v5p:4x4x4")
    devices = np.array([types.SimpleNamespace(coords=c, slice_index=None)
                        for c in np.ndindex(4, 4, 4)])
    found = empty_plan(machine, mesh)
    analysis = hlo_analysis.analyze((GOLDEN / f"hlo_{name}.txt").read_text(), 64)
    plan.roofline(found, analysis, machine, types.SimpleNamespace(
        devices=devices.reshape(list(mesh.values())), shape=mesh))
    return found, analysis


def test_roofline():
    mesh = {"data": 4, "fsdp": 16, "context": 1, "tensor": 1}
    found, analysis = roofline_of("async", mesh)
    chip = chips.CHIPS["v5p"]
    terms = found.roofline
    assert terms["compute"] == analysis.flops / chip.flops
    assert terms["hbm"] == analysis.hbm_bytes / chip.hbm
    assert terms["ici"] > 0 and terms["dcn"] == terms["host"] == 0
    assert found.step_seconds_bound == max(terms.values()) == terms[found.bound_by]
    assert found.step_seconds_estimate >= found.step_seconds_bound
    assert found.mfu_bound == pytest.approx(
        64e9 / (64 * chip.flops * found.step_seconds_bound))
    assert found.communication_bound == (terms["ici"] > max(terms["compute"], terms["hbm"]))
    assert {c["axes"] for c in found.collectives} == {("fsdp",), ("data",)}
    gathered = 2 * 2 * golden.WIDTH * (3 * golden.WIDTH + 2 * golden.HIDDEN)
    assert gathered == sum(c["bytes"] for c in found.collectives if c["kind"] == "all-gather")


def test_all_reduces_that_gather_cost_more():
    plain, _ = roofline_of("plain", {"data": 1, "fsdp": 64, "context": 1, "tensor": 1})
    assert "all-reduce (gathers)" in {c["kind"] for c in plain.collectives}


def test_reports(capsys):
    console = command.console()
    console.width = 200
    found, _ = roofline_of("async", {"data": 4, "fsdp": 16, "context": 1, "tensor": 1})
    found.compile_seconds, found.memory = 1.0, {"parameters": 2**30}
    found.roofline["ici"], found.config = 1.0, "a[/b]:bear:.py"
    plan.report(found, console)
    machine = chips.parse("v5p:4x4x4")
    plan.report_sweep([(machine, "does not divide"), (machine, found)], console)
    text = capsys.readouterr().out
    for word in ("all-gather", "reduce-scatter", "fsdp", "MFU: at most", "takes over",
                 "does not divide", "a[/b]:bear:.py on "):
        assert word in text


# The command, and the compiler.

def test_command(tmp_path):
    path, config = tmp_path / "plan.json", tmp_path / "tiny.py"
    config.write_text(
        "from configs import vpp\n"
        "def get_config():\n"
        "    config = vpp.get_config()\n"
        "    config.data.update(action_size=8, state_size=8)\n"
        "    config.method.video.transformer.layers, config.method.taps = 2, (0, 1)\n"
        "    return config\n")
    done = subprocess.run(
        [sys.executable, "-m", "jaxvp.plan", f"--config={config}", "--dry_run",
         "--topology=h100:2", "--sweep", f"--json={path}"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Fits." in done.stdout
    result = json.loads(path.read_text())
    assert result["chips"] == 2 and [p["chips"] for p in result["sweep"]] == [1, 2]
    assert result["config"] == "tiny.py" and result["fits"]


def test_a_plan_refuses_what_is_out_of_range():
    done = subprocess.run(
        [sys.executable, "-m", "jaxvp.plan", "--config=configs/pretrain.py", "--dry_run",
         "--topology=h100:1", "--config.batch_size=-8"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: config.batch_size: expected int >= 1, found -8 (int)."


def test_a_plan_reads_no_data():
    with pytest.raises(ValueError, match="config.data.action_size is 0"):
        plan.make_plan(make_config(data__action_size=0), chips.parse("h200:8"), dry_run=True)


def test_the_compiler_itself():
    """The real step on a real TPU, which is not there."""
    pytest.importorskip("libtpu")
    machine = chips.parse("v6e:2x4")
    found = plan.make_plan(make_config(), machine)
    assert found.fits and found.compile_seconds > 0 and found.mfu_bound > 0
    assert 2 in found.loops.values()
    total = found.compiled_flops * machine.chips
    assert 0.95 < total / sum(found.model_flops.values()) < 1.5
    assert {axes for c in found.collectives for axes in c["axes"]} == {"fsdp"}
    devices = machine.devices()
    assert len(devices) == 8 and devices[0].platform == "tpu"
    assert sharding.make_mesh(sharding.MeshConfig(fsdp=-1, data=1), devices).size == 8


# A policy.

def test_a_call_of_the_policy_is_planned(monkeypatch, capsys):
    """On a CPU in place of the chip: counts are of the compiled program, times of the chip."""
    machine = chips.parse("v6e:1x1")
    monkeypatch.setattr(chips.Machine, "devices", lambda self: jax.devices())
    config = make_config()
    found = json.loads(json.dumps(policy.make_plan(config, machine, "toy"), default=plan._plain))
    assert found["chunk"] == config.data.window.chunk
    assert len(found["modes"]) == 3 and all(mode["fits"] for mode in found["modes"].values())
    action, video = (next(mode for name, mode in found["modes"].items() if name.startswith(
        f"observation-{what}.")) for what in ("action", "video"))
    assert action["parameters"] > video["parameters"]  # The head, too.
    assert action["flops"] > 2 * 96 * video["parameters"] / 2  # 96 tokens of a frame, or more.
    for mode in (action, video):
        assert mode["memory"] > 4 * mode["parameters"]
        assert mode["seconds_estimate"] >= mode["seconds_bound"] == max(
            mode["flops"] / machine.chip.flops, mode["hbm_bytes"] / machine.chip.hbm)
    policy.report(found, command.console())
    assert "observation-action" in capsys.readouterr().out


def test_a_policy_is_planned_for_one_chip():
    with pytest.raises(UserError, match="for one chip, found v6e:2x2"):
        policy.make_plan(make_config(), chips.parse("v6e:2x2"))
