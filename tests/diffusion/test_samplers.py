from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvp.diffusion import samplers

GOLDEN = np.load(Path(__file__).parents[1] / "golden/trajectory.npz")


def gaussian_velocity(x, sigma, mean=2.0, std=0.5):
    """Exact velocity for data ~ N(mean, std^2): E[noise - data | x_sigma = x]."""
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    slope = (sigma - (1 - sigma) * std**2) / variance
    return slope * (x - (1 - sigma) * mean) - mean


def end_of_exact_flow(noise, mean=2.0, std=0.5):
    return mean + std * noise


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("unipc", 2)])
def test_solvers_converge_with_their_order(name, order):
    with jax.enable_x64(True):
        noise = jnp.linspace(-2.0, 2.0, 9)
        errors = [
            np.abs(samplers.SAMPLERS[name](gaussian_velocity, noise, samplers.sigmas(n))
                   - end_of_exact_flow(noise)).max() for n in (40, 80)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_pytrees_move_together(name):
    x = (jnp.ones(3), jnp.zeros((2, 2)))
    schedule = samplers.sigmas(4, shift=3.0)
    solve = samplers.SAMPLERS[name]
    end = solve(lambda x, s: (jnp.ones(3), jnp.full((2, 2), 2.0)), x, schedule)
    np.testing.assert_allclose(end[0], np.zeros(3), atol=2e-6)
    np.testing.assert_allclose(end[1], np.full((2, 2), -2.0), atol=2e-6)


def velocity(x, sigma):
    """As in golden/trajectory.py."""
    return jnp.sin(3 * x) * sigma + 0.5 * x - jnp.cos(2 * sigma)


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_trajectory_is_that_of_diffusers(name):
    path = []

    def watched(x, sigma):
        path.append(x)
        return velocity(x, sigma)

    expected, schedule = GOLDEN[f"{name}_x"], samplers.sigmas(4, shift=5.0)
    np.testing.assert_allclose(schedule, GOLDEN[f"{name}_sigmas"], atol=2e-6)
    with jax.disable_jit():  # A scan is then a loop, and its steps can be watched.
        path.append(samplers.SAMPLERS[name](watched, jnp.array(expected[0]), schedule))
    np.testing.assert_allclose(np.stack(path), expected, atol=1e-5)
    end = jax.jit(lambda x: samplers.SAMPLERS[name](velocity, x, schedule))(expected[0])
    np.testing.assert_allclose(end, expected[-1], atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_unipc_of_few_steps(steps):
    """Exact for data that is one point, whatever the number of steps."""
    noise = jnp.linspace(-2.0, 2.0, 5)
    solve = jax.jit(lambda x: samplers.unipc(lambda x, s: (x - 0.7) / s, x,
                                             samplers.sigmas(steps, 3.0)))
    np.testing.assert_allclose(solve(noise), np.full(5, 0.7), atol=1e-5)


def test_unipc_needs_fewer_steps_than_euler():
    noise, schedule = jnp.linspace(-2.0, 2.0, 9), samplers.sigmas(10)
    exact = end_of_exact_flow(noise)
    error = {name: np.abs(solve(gaussian_velocity, noise, schedule) - exact).max()
             for name, solve in samplers.SAMPLERS.items()}
    assert error["unipc"] < error["euler"] / 5


def test_schedule():
    schedule = samplers.sigmas(4, shift=3.0)
    assert schedule[0] == 1 and schedule[-1] == 0 and (np.diff(schedule) < 0).all()
    assert schedule[2] == pytest.approx(0.75, abs=1e-3) and schedule.dtype == np.float32
    np.testing.assert_allclose(samplers.sigmas(2), [1, 0.5005, 0])
    with pytest.raises(ValueError, match="at least one step"):
        samplers.sigmas(0)


def test_integer_timesteps_are_those_of_the_pipeline():
    """Six steps of shift 5, as diffusers' UniPC hands them to the transformer."""
    golden = np.load(Path(__file__).parents[1] / "golden/pipeline.npz")["timesteps"]
    assert golden.tolist() == [999, 961, 909, 833, 714, 501]
    timesteps = samplers.integer_timestep(samplers.sigmas(6, 5.0)[:-1])
    assert timesteps.tolist() == golden.tolist() and timesteps.dtype == jnp.float32


@pytest.mark.parametrize("shift", [3.0, 5.0])
def test_integer_timesteps_are_truncated_in_float64(shift):
    """By diffusers' formula, for every number of steps that anybody takes."""
    for steps in range(1, 101):
        sigma = np.linspace(1, 1 / 1000, steps + 1)[:-1]
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        sigma[0] -= 1e-6
        found = samplers.integer_timestep(samplers.sigmas(steps, shift)[:-1])
        assert found.tolist() == (1000 * sigma).astype(np.int64).tolist()


def test_guidance_scales():
    c, u = jnp.float32(3.0), jnp.float32(1.0)
    assert samplers.guided(c, u, 1.0) == c and samplers.guided(c, u, 2.0) == 5.0
