"""Golden arrays of the video transformer, by diffusers' WanTransformer3DModel."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

# Original spelling, by Wan-Video/Wan2.1 wan/modules/model.py; the order avoids renaming twice.
TO_ORIGINAL = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"), ("norm2", "norm3"), ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"), ("attn1", "self_attn"), ("attn2", "cross_attn"), ("to_out.0", "o"),
    ("to_q", "q"), ("to_k", "k"), ("to_v", "v"))


def original(key: str) -> str:
    if key == "scale_shift_table":
        return "head.modulation"
    for diffusers, wan in TO_ORIGINAL:
        key = key.replace(diffusers, wan)
    return key.replace("scale_shift_table", "modulation")


@torch.no_grad()
def make(folder: Path):
    torch.manual_seed(0)
    config = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12,
              "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 256, "ffn_dim": 32,
              "num_layers": 2}
    model = WanTransformer3DModel(**config).eval()
    for name, x in model.named_parameters():
        # Norms away from one, biases away from zero, so that none can be left out unnoticed.
        x.copy_(torch.randn_like(x) * (0.3 if x.ndim == 1 else x.shape[-1] ** -0.5)
                + ("norm" in name and name.endswith("weight")))
    weights = model.state_dict()
    names = {original(key): key for key in weights}
    converted = convert_wan_transformer_to_diffusers({o: weights[k] for o, k in names.items()})
    assert converted.keys() == weights.keys()
    assert all(converted[key] is weights[key] for key in weights)

    latents, text = torch.randn(2, 4, 2, 8, 12), torch.randn(2, 12, 16)
    scalar = torch.tensor([17.0, 983.25])
    frames = torch.tensor([[0.0, 412.5], [0.0, 1000.0]])
    tokens = frames.repeat_interleave(4 * 6, dim=1)
    arrays = {"latents": latents, "text": text, "scalar": scalar, "frames": frames}
    arrays["velocity_scalar"] = model(latents, scalar, text).sample
    arrays["velocity_tokens"] = model(latents, tokens, text).sample
    arrays["rope_cos"], arrays["rope_sin"] = (x[0, :, 0] for x in model.rope(latents))
    # Unpatchify alone: tokens that count up, in place of the projection's output.
    count = torch.arange(2 * 4 * 2 * 8 * 12, dtype=torch.float32).reshape(2, 48, 16)
    hook = model.proj_out.register_forward_hook(lambda *_: count)
    arrays["unpatchified"] = model(latents, scalar, text).sample
    hook.remove()
    np.savez_compressed(
        folder / "transformer.npz", config=json.dumps(config), original_names=json.dumps(names),
        **{key: x.numpy() for key, x in arrays.items()},
        **{f"weights/{key}": x.numpy() for key, x in weights.items()})
