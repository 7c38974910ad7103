"""Latents of diffusers' pipeline for Wan 2.2 TI2V: a tiny transformer, UniPC, guidance."""

import json
from pathlib import Path

import numpy as np

STEPS, SHIFT, GUIDANCE = 6, 5.0, 3.0
SIZE = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16,
        "text_dim": 8, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "eps": 0.01}


def make(folder: Path):
    """Writes pipeline.npz.

    `noise` float32[1, 3, 4, 6, 16], of which the first frame is the encoded picture; `text` and
    `empty` float32[1, 5, 8]; `latents` like `noise`, what the pipeline makes of them; `timesteps`
    float32[STEPS], which it hands to the transformer, whose config and weights are there too.
    """
    import torch
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanImageToVideoPipeline,
        WanTransformer3DModel,
    )

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**SIZE).eval()
    with torch.no_grad():
        for name, x in transformer.named_parameters():
            noise = (2 * torch.randn_like(x).clamp(-2, 2)).round() / 2  # Compresses well.
            x.copy_(noise * (0.25 if x.ndim == 1 else x[0].numel() ** -0.5)
                    + ("norm" in name and name.endswith("weight")))
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000,
        flow_shift=SHIFT)
    pipeline = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=AutoencoderKLWan(base_dim=4).eval(),
        scheduler=scheduler, transformer=transformer, expand_timesteps=True)
    noise, timesteps = torch.randn(1, 16, 3, 4, 6), []
    text, empty = torch.randn(2, 1, 5, 8)
    transformer.register_forward_pre_hook(
        lambda *inputs: timesteps.append(float(inputs[2]["timestep"].max())), with_kwargs=True)
    latents = pipeline(
        torch.rand(1, 3, 32, 48), height=32, width=48, num_frames=9, num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, latents=noise.clone(), prompt_embeds=text,
        negative_prompt_embeds=empty, output_type="latent").frames
    noise[:, :, 0] = latents[:, :, 0]
    arrays = {"noise": noise.permute(0, 2, 3, 4, 1), "latents": latents.permute(0, 2, 3, 4, 1),
              "text": text, "empty": empty}
    np.savez_compressed(
        folder / "pipeline.npz", config=json.dumps(SIZE),
        timesteps=np.float32(timesteps[::2]),  # With the text and without it.
        **{name: x.numpy() for name, x in arrays.items()},
        **{f"weights/{key}": x.numpy() for key, x in transformer.state_dict().items()})
