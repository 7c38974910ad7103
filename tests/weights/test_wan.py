import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxvp import rules, sharding
from jaxvp.errors import UserError
from jaxvp.models.attention import rope_table, rotate
from jaxvp.models.transformer import SIZES, WAN_RULES, VideoTransformer, unpatchify
from jaxvp.weights import streaming, wan

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "transformer.npz"))
WEIGHTS = {k.removeprefix("weights/"): x for k, x in GOLDEN.items() if k.startswith("weights/")}
ORIGINAL = {o: WEIGHTS[key] for o, key in json.loads(str(GOLDEN["original_names"])).items()}
CONFIG = json.loads(str(GOLDEN["config"]))
MODEL = VideoTransformer(channels=4, width=24, layers=2, heads=2, ffn=32, text_width=16)


def write(folder, weights, config=CONFIG):
    folder.mkdir(exist_ok=True, parents=True)
    streaming.write_file(folder / "model.safetensors",
                         {key: (x.shape, x.dtype) for key, x in weights.items()},
                         weights.__getitem__)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    return wan.load(write(tmp_path_factory.mktemp("wan") / "tiny", WEIGHTS), MODEL)[0]


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4, tensor=2))


def sharded(mesh, dtype=jnp.float32, model=MODEL):
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    specs = rules.match(abstract, WAN_RULES, (), "WAN_RULES")
    leaves = [jax.ShapeDtypeStruct(x.shape, dtype, sharding=NamedSharding(mesh, jax.P(*specs[n])))
              for n, x in rules.named_leaves(abstract).items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


run = jax.jit(VideoTransformer.__call__, static_argnums=0)


@pytest.mark.parametrize("timestep", ["scalar", "frames", "tokens"])
def test_velocity_is_that_of_diffusers(params, timestep):
    """One timestep per sample (T2V), one per token (TI2V), and the same said per frame."""
    latents, text = GOLDEN["latents"].transpose(0, 2, 3, 4, 1), GOLDEN["text"]
    times = {"scalar": GOLDEN["scalar"], "frames": GOLDEN["frames"],
             "tokens": np.repeat(GOLDEN["frames"], 24, axis=1)}[timestep]
    expected = GOLDEN["velocity_scalar" if timestep == "scalar" else "velocity_tokens"]
    expected = expected.transpose(0, 2, 3, 4, 1)
    out, _ = run(MODEL, params, latents, times, text)
    assert np.linalg.norm(out - expected) < 5e-6 * np.linalg.norm(expected)
    assert np.abs(out - expected).max() < 1e-5 * np.abs(expected).max()


def test_rope_is_exactly_that_of_diffusers():
    """Turning (1, 0) gives (cos, sin)."""
    unit = jnp.zeros((1, 48, 1, 12)).at[..., ::2].set(1.0)
    turned = np.asarray(rotate(unit, jnp.asarray(rope_table(2, 4, 6, 12))))[0, :, 0]
    np.testing.assert_array_equal(turned[:, ::2], GOLDEN["rope_cos"][:, ::2])
    np.testing.assert_array_equal(turned[:, 1::2], GOLDEN["rope_sin"][:, 1::2])


def test_unpatchify_is_exactly_that_of_diffusers():
    count = jnp.arange(2 * 4 * 2 * 8 * 12, dtype=jnp.float32).reshape(2, 48, 16)
    np.testing.assert_array_equal(unpatchify(count, (2, 4, 6), (1, 2, 2)),
                                  GOLDEN["unpatchified"].transpose(0, 2, 3, 4, 1))


def test_both_spellings_give_the_same_parameters(params, tmp_path):
    other, report = wan.load(write(tmp_path / "original", ORIGINAL), MODEL)
    assert not report.initialised and not report.unused
    jax.tree.map(np.testing.assert_array_equal, other, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_sharded_over_eight_devices_is_exact(mesh, tmp_path, dtype):
    weights = {key: x.astype(dtype) for key, x in WEIGHTS.items()}
    write(tmp_path / "pipeline" / "transformer", weights)
    abstract = sharded(mesh, dtype)
    params, _ = wan.load(tmp_path / "pipeline", MODEL, abstract)
    for x, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True):
        assert x.sharding == wanted.sharding and x.dtype == dtype
    wan.save(params, MODEL, tmp_path / "out", shard_bytes=20_000)
    out = streaming.Tensors(tmp_path / "out")
    assert set(out) == set(WEIGHTS) and len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for key, x in weights.items():
        assert out[key].dtype == dtype
        np.testing.assert_array_equal(out[key][()], x)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in CONFIG} == CONFIG


def test_weights_of_another_size_are_named(tmp_path):
    folder = write(tmp_path / "tiny", WEIGHTS)
    wider = dataclasses.replace(MODEL, width=32)
    with pytest.raises(ValueError, match="has width 24, the model width 32: what fits is channels"):
        wan.load(folder, wider)
    with pytest.raises(ValueError, match="has heads 2, the model heads 4: what fits .* heads=2"):
        wan.load(folder, dataclasses.replace(MODEL, heads=4))


def test_what_shapes_do_not_tell_is_read_from_the_config(tmp_path):
    """Another number of heads, and another epsilon, would load and be wrong."""
    folder = write(tmp_path / "tiny", WEIGHTS, CONFIG | {"eps": 1e-5})
    with pytest.raises(UserError, match="epsilon 1e-05, the model epsilon 1e-06: .*epsilon=1e-05"):
        wan.load(folder, MODEL)
    model = dataclasses.replace(MODEL, epsilon=1e-5)
    params, _ = wan.load(folder, model)
    wan.save(params, model, tmp_path / "out")
    assert wan.stored_sizes(streaming.Tensors(tmp_path / "out")) == {
        "channels": 4, "in_channels": 4, "patch": (1, 2, 2), "width": 24, "layers": 2, "ffn": 32,
        "text_width": 16, "frequency_width": 256, "heads": 2, "epsilon": 1e-5}
    # Wan's own spelling of the config.
    own = {"_class_name": "WanModel", "dim": 24, "num_heads": 3, "in_dim": 4, "model_type": "t2v"}
    with pytest.raises(UserError, match="has heads 3, the model heads 2"):
        wan.load(write(tmp_path / "own", ORIGINAL, own), MODEL)


@pytest.mark.parametrize("said, message", [
    ({"num_attention_heads": "2"}, "num_attention_heads '2'; expected a positive number"),
    ({"num_attention_heads": 4}, "attention_head_dim 12; expected 6.0"),
    ({"eps": -1}, "eps -1; expected a positive number"),
    ({"num_layers": 30}, "num_layers 30; expected 2"),
    ({"in_channels": 16}, "in_channels 16; expected 4"),
    ({"window_size": [12, 12]}, r"window_size \[12, 12\]; expected \[-1, -1\]"),
    ({"qk_norm": "rms_norm"}, "qk_norm 'rms_norm'; expected 'rms_norm_across_heads' or True"),
    ({"_class_name": "CausalWanModel"}, "_class_name 'CausalWanModel'; expected 'WanTransformer3D"),
])
def test_a_config_of_another_model_is_refused(tmp_path, said, message):
    with pytest.raises(UserError, match=f"config.json says {message}"):
        wan.load(write(tmp_path / "tiny", WEIGHTS, CONFIG | said), MODEL)


def test_a_config_that_is_none_is_refused(tmp_path):
    folder = write(tmp_path / "tiny", WEIGHTS)
    for text, message in (("{", "is not JSON"), ("[]", "holds a list, expected a JSON object")):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=f"config.json {message}"):
            wan.load(folder, MODEL)


def test_without_a_config_the_number_of_heads_must_be_known(tmp_path):
    folder = write(tmp_path / "tiny", WEIGHTS)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json that says num_attention_heads.*wan-1.3b"):
        wan.load(folder, MODEL)
    small = VideoTransformer(**SIZES["wan-7m"])
    params = jax.eval_shape(small.init, jax.random.key(0))
    wan.save(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params), small, tmp_path / "7m")
    (tmp_path / "7m" / "config.json").unlink()
    wan.load(tmp_path / "7m", small)
    with pytest.raises(UserError, match="heads 4, the model heads 2: what fits is size='wan-7m'"):
        wan.load(tmp_path / "7m", dataclasses.replace(small, heads=2))
    with pytest.raises(UserError, match="epsilon 1e-06, the model epsilon 1e-05"):
        wan.load(tmp_path / "7m", dataclasses.replace(small, epsilon=1e-5))


@pytest.mark.parametrize("weights", [WEIGHTS, ORIGINAL], ids=["diffusers", "original"])
def test_image_to_video_weights_are_called_what_they_are(tmp_path, weights):
    kernel = weights["patch_embedding.weight"]
    wide = weights | {"patch_embedding.weight": np.tile(kernel, (1, 9, 1, 1, 1))}
    write(tmp_path / "i2v", wide, CONFIG | {"in_channels": 36})
    for channels in (4, 8):
        with pytest.raises(UserError, match="has 36 channels in and 4 out: weights that take an "
                           f"image, .* in_channels=36; this one has {channels}.* Take text-to-v"):
            wan.load(tmp_path / "i2v", dataclasses.replace(MODEL, in_channels=channels))
    name = "condition_embedder.image_embedder.ff.net.0.proj.weight" \
        if weights is WEIGHTS else "img_emb.proj.1.weight"
    image = weights | {name: np.ones(2, np.float32)}
    with pytest.raises(UserError, match=f"has {name}: weights that take .* not supported"):
        wan.load(write(tmp_path / "image", image), MODEL)


@pytest.mark.parametrize("weights", [WEIGHTS, ORIGINAL], ids=["diffusers", "original"])
def test_a_condition_on_channels_starts_at_zero(params, mesh, tmp_path, weights):
    """Wan's weights in a wider model compute what they did, whatever the condition is."""
    wide = dataclasses.replace(MODEL, in_channels=6)
    folder = write(tmp_path / "tiny", weights)
    loaded, report = wan.load(folder, wide)
    assert not report.initialised
    latents, text = jnp.asarray(GOLDEN["latents"].transpose(0, 2, 3, 4, 1)), GOLDEN["text"]
    condition = jnp.concatenate([latents, jnp.ones((*latents.shape[:-1], 2))], axis=-1)
    expected, _ = run(MODEL, params, latents, GOLDEN["scalar"], text)
    out, _ = run(wide, loaded, condition, GOLDEN["scalar"], text)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    # Sharded, each host reads the same; and what was saved wide is loaded as it is.
    elsewhere, _ = wan.load(folder, wide, sharded(mesh, model=wide))
    jax.tree.map(np.testing.assert_array_equal, elsewhere, loaded)
    changed = jax.tree.map(lambda x: x + 1, loaded)
    wan.save(changed, wide, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["in_channels"], config["out_channels"]) == (6, 4)
    jax.tree.map(np.testing.assert_array_equal, wan.load(tmp_path / "out", wide)[0], changed)
    # A width that does not fit is named as ever.
    with pytest.raises(UserError, match="has width 24, the model width 32: what fits is channels"):
        wan.load(folder, dataclasses.replace(wide, width=32))


@pytest.mark.parametrize("partial", [False, True])
def test_of_two_transformers_one_must_be_named(tmp_path, partial):
    """Wan 2.2 A14B: one transformer for high noise, another for low noise."""
    for name in ("transformer", "transformer_2"):
        write(tmp_path / name, WEIGHTS)
    if partial:  # Only what model_index.json says remains of the second.
        for file in (tmp_path / "transformer_2").iterdir():
            file.unlink()
        (tmp_path / "transformer_2").rmdir()
        (tmp_path / "model_index.json").write_text(
            '{"boundary_ratio": 0.875, "transformer_2": ["diffusers", "WanTransformer3DModel"]}')
    with pytest.raises(UserError, match="two transformers .*/transformer or .*/transformer_2"):
        wan.load(tmp_path, MODEL)
    wan.load(tmp_path / "transformer", MODEL)


def test_a_pipeline_that_predicts_something_else_is_refused(tmp_path):
    write(tmp_path / "transformer", WEIGHTS)
    (tmp_path / "model_index.json").write_text('{"transformer_2": [null, null]}')
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir()
    scheduler.write_text('{"prediction_type": "flow_prediction", "num_train_timesteps": 1000}')
    wan.load(tmp_path, MODEL)
    scheduler.write_text('{"prediction_type": "epsilon"}')
    with pytest.raises(UserError, match="scheduler_config.json says prediction_type 'epsilon'"):
        wan.load(tmp_path, MODEL)


def test_a_wan_size_that_fits_is_named(tmp_path):
    """Headers alone tell; the 57 GB of Wan 14B are a file without content here."""
    big = VideoTransformer(**SIZES["wan-14b"])
    shapes = jax.eval_shape(big.init, jax.random.key(0))
    leaves, header, end = rules.named_leaves(shapes), {}, 0
    for name, stored in wan.key_map(big, "original").items():
        stacked = not isinstance(stored.keys, str)
        leaf = jax.ShapeDtypeStruct(leaves[name].shape[stacked:], jnp.float32)
        shape = jax.eval_shape(stored.store, leaf).shape
        for key in stored.all_keys():
            header[key] = {"dtype": "F32", "shape": shape,
                           "data_offsets": [end, end + 4 * int(np.prod(shape))]}
            end = header[key]["data_offsets"][1]
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    with pytest.raises(ValueError, match="layers 40, .* model .*: what fits is size='wan-14b'"):
        wan.load(tmp_path, VideoTransformer(**SIZES["wan-5b"]))


def test_what_is_not_the_model_is_named(params, tmp_path):
    with pytest.raises(ValueError, match="not a Wan transformer"):
        wan.load(write(tmp_path / "other", {"a": np.ones(1, np.float32)}), MODEL)
    less = {key: x for key, x in WEIGHTS.items() if key != "blocks.1.attn2.to_k.bias"}
    write(tmp_path / "less", less)
    with pytest.raises(ValueError, match="no weights for blocks/attn2/to_k/bias"):
        wan.load(tmp_path / "less", MODEL)
    more = WEIGHTS | {"blocks.0.attn2.add_k_proj.bias": np.ones(24, np.float32)}
    with pytest.raises(ValueError, match="no parameter wants: blocks.0.attn2.add_k_proj.bias"):
        wan.load(write(tmp_path / "more", more), MODEL)
    headless = {key: x for key, x in WEIGHTS.items() if not key.startswith("proj_out")}
    write(tmp_path / "headless", headless)
    found, report = wan.load(tmp_path / "headless", MODEL, absent=("head/proj_out/.*",),
                             init=lambda: MODEL.init(jax.random.key(0)))
    assert report.initialised == ("head/proj_out/bias", "head/proj_out/kernel")
    assert not found["head"]["proj_out"]["kernel"].any()
    np.testing.assert_array_equal(found["blocks"]["ffn_1"]["bias"],
                                  params["blocks"]["ffn_1"]["bias"])


TWO_PROCESSES = """
import sys
from jaxvp import distributed
with distributed.processes(address=sys.argv[1], num_processes=2, process_id=int(sys.argv[2])):
    import jax, numpy as np
    from jaxvp import sharding
    from jaxvp.weights import wan
    from test_wan import MODEL, sharded
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4, tensor=2))
    assert jax.process_count() == 2 and len(jax.local_devices()) == 4
    params, _ = wan.load(sys.argv[3], MODEL, sharded(mesh))
    wan.save(params, MODEL, sys.argv[4])
"""


def test_two_processes_read_their_shards_and_write_one_file(tmp_path):
    source = write(tmp_path / "source", WEIGHTS)
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    paths = [str(Path(__file__).parent), *sys.path]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4",
                                "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", TWO_PROCESSES, address]
    processes = [subprocess.Popen(
        [*command, str(i), str(source), str(tmp_path / "out")], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for i in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    saved = streaming.Tensors(tmp_path / "out")
    assert set(saved) == set(WEIGHTS)
    for key, expected in WEIGHTS.items():
        np.testing.assert_array_equal(saved[key][()], expected)
