import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvp.diffusion import samplers


def gaussian_velocity(x, sigma, mean=2.0, std=0.5):
    """Exact velocity for data ~ N(mean, std^2): E[noise - data | x_sigma = x]."""
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    slope = (sigma - (1 - sigma) * std**2) / variance
    return slope * (x - (1 - sigma) * mean) - mean


def end_of_exact_flow(noise, mean=2.0, std=0.5):
    return mean + std * noise


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_with_their_order(name, order):
    with jax.enable_x64(True):
        noise = jnp.linspace(-2.0, 2.0, 9)
        errors = [
            np.abs(samplers.SAMPLERS[name](gaussian_velocity, noise, samplers.sigmas(n))
                   - end_of_exact_flow(noise)).max() for n in (40, 80)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_pytrees_move_together():
    x = (jnp.ones(3), jnp.zeros((2, 2)))
    schedule = samplers.sigmas(4, shift=3.0)
    end = samplers.euler(lambda x, s: (jnp.ones(3), jnp.full((2, 2), 2.0)), x, schedule)
    np.testing.assert_allclose(end[0], np.zeros(3), atol=1e-6)
    np.testing.assert_allclose(end[1], np.full((2, 2), -2.0), atol=1e-6)


def test_schedule():
    schedule = samplers.sigmas(4, shift=3.0)
    assert schedule[0] == 1 and schedule[-1] == 0 and (jnp.diff(schedule) < 0).all()
    assert schedule[2] == pytest.approx(0.75)
    with pytest.raises(ValueError, match="at least one step"):
        samplers.sigmas(0)


def test_guidance_scales():
    c, u = jnp.float32(3.0), jnp.float32(1.0)
    assert samplers.guided(c, u, 1.0) == c and samplers.guided(c, u, 2.0) == 5.0
