"""Tiny random autoencoders of diffusers, Wan 2.1 and Wan 2.2."""

from pathlib import Path

import numpy as np

# Height and width of the video, and what differs from AutoencoderKLWan's defaults.
VERSIONS = {
    "2.1": ((24, 16), {"base_dim": 4}),
    "2.2": ((48, 32), {"base_dim": 4, "decoder_base_dim": 6, "z_dim": 48, "is_residual": True,
                       "in_channels": 12, "out_channels": 12, "patch_size": 2,
                       "scale_factor_spatial": 16}),
}


def make(folder: Path):
    """Writes vae_2.1.npz and vae_2.2.npz.

    `video` uint8[1, 13, H, W, 3]; `mean` float32[1, 4, h, w, c], its posterior mean (not
    normalised); random `latents` of that shape, and `pixels` float32[1, 13, H, W, 3] in [-1, 1],
    decoded from them; and the weights under diffusers' names.
    """
    import torch
    from diffusers import AutoencoderKLWan

    for version, ((height, width), config) in VERSIONS.items():
        model = AutoencoderKLWan(**config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Of nine values, so that the file compresses well.
                noise = torch.randn(parameter.shape, generator=generator).clamp(-2, 2)
                noise = (2 * noise).round() / 2
                parameter.copy_(1 + noise / 4 if name.endswith("gamma") else
                                noise / 5 if name.endswith("bias") else
                                noise / parameter[0].numel() ** 0.5)
            model.decoder.conv_out.weight.mul_(0.5)  # pixels are clipped: few shall be
            video = torch.randint(0, 256, (1, 3, 13, height, width), generator=generator)
            mean = model.encode(video / 127.5 - 1).latent_dist.mode()
            latents = torch.randn(mean.shape, generator=generator)
            pixels = model.decode(latents).sample
        arrays = {"video": video.byte(), "mean": mean, "latents": latents, "pixels": pixels}
        arrays = {name: array.permute(0, 2, 3, 4, 1) for name, array in arrays.items()}
        np.savez_compressed(folder / f"vae_{version}.npz", **{
            name: array.numpy() for name, array in {**arrays, **model.state_dict()}.items()})
