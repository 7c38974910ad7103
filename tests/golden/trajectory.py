"""4-step trajectories of diffusers' flow samplers."""

from pathlib import Path

import numpy as np

STEPS, SHIFT = 4, 5.0


def make(folder: Path):
    """Writes trajectory.npz: `noise`, and of each sampler `*_sigmas` and `*_x`, what x was at
    every level, float32[STEPS + 1, ...]."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    def velocity(x, sigma):
        return torch.sin(3 * x) * sigma + 0.5 * x - torch.cos(2 * sigma)

    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    unipc = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000,
        flow_shift=SHIFT)
    unipc.set_timesteps(STEPS)
    euler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    euler.set_timesteps(sigmas=np.linspace(1, 1e-3, STEPS + 1)[:-1])
    arrays = {"noise": noise.numpy()}
    for name, scheduler in ("unipc", unipc), ("euler", euler):
        x, path = noise, [noise]
        for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            x = scheduler.step(velocity(x, sigma), timestep, x, return_dict=False)[0]
            path.append(x)
        arrays[f"{name}_sigmas"] = scheduler.sigmas.numpy()
        arrays[f"{name}_x"] = torch.stack(path).numpy()
    np.savez_compressed(folder / "trajectory.npz", **arrays)
