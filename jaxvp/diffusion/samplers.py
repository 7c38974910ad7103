"""Solvers of dx/dsigma = velocity(x, sigma), from noise at sigma 1 to data at 0.

Each is `sampler(velocity, x, schedule) -> x at the schedule's end`: `x` is any pytree of noise,
`velocity(x, sigma)` returns what x is made of, `sigma` is a float32 scalar.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxvp.diffusion.flow_matching import shift_sigma
from jaxvp.errors import UserError

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (x, sigma scalar) -> like x; pytrees too


def sigmas(steps: int, shift: float = 1.0) -> np.ndarray:
    """The schedule from 1 to 0, float32[steps + 1], shifted as in training.

    The flow schedule of diffusers' UniPCMultistepScheduler: evenly spaced towards 1/1000, then 0.

    Raises:
      UserError: there is no step to make.
    """
    if steps < 1:
        raise UserError(f"a sampler needs at least one step, got {steps}")
    levels = shift_sigma(np.linspace(1.0, 1e-3, steps + 1)[:-1], shift)
    return np.append(levels, 0.0).astype(np.float32)


def euler(velocity: Velocity, x: jax.Array, schedule: np.ndarray) -> jax.Array:
    """First-order steps through `schedule`."""

    def step(x, pair):
        now, after = pair
        v = velocity(x, now)
        return jax.tree.map(lambda a, b: a + (after - now) * b, x, v), None

    return jax.lax.scan(step, x, (schedule[:-1], schedule[1:]))[0]


def heun(velocity: Velocity, x: jax.Array, schedule: np.ndarray) -> jax.Array:
    """Second-order (trapezoid) steps; the last one, into sigma 0, is an Euler step."""

    def step(x, pair):
        now, after = pair
        first = velocity(x, now)
        guess = jax.tree.map(lambda a, b: a + (after - now) * b, x, first)
        second = velocity(guess, after)
        return jax.tree.map(lambda a, b, c: a + (after - now) * (b + c) / 2, x, first, second), None

    x = jax.lax.scan(step, x, (schedule[:-2], schedule[1:-1]))[0]
    return euler(velocity, x, schedule[-2:])


def unipc(velocity: Velocity, x: jax.Array, schedule: np.ndarray) -> jax.Array:
    """UniPC of order 2 with B(h) = exp(h) - 1 (arXiv 2302.04867), Wan's sampler.

    It predicts data, m = x - sigma * velocity, and costs one velocity a step: the one that a
    prediction is corrected with also makes the next prediction. `schedule` is a NumPy array, not
    traced.
    """
    correct, predict = _unipc_coefficients(np.asarray(schedule))

    def weighted(weights, *trees):
        def add(*leaves):
            return sum(w * leaf for w, leaf in zip(weights, leaves, strict=True))

        return jax.tree.map(add, *trees)

    def step(carry, row):
        x, last, m1, m2 = carry
        sigma, correct, predict = row
        m = jax.tree.map(lambda a, v: a - sigma * v, x, velocity(x, sigma))
        last = weighted(correct, last, m1, m2, m)
        return (weighted(predict, last, m, m1), last, m, m1), None

    nothing = jax.tree.map(jnp.zeros_like, x)
    rows = schedule[:-1], correct, predict
    return jax.lax.scan(step, (x, x, nothing, nothing), rows)[0][0]


def _unipc_coefficients(schedule: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of every step, float32.

    [steps, 4] of (last corrected x, m1, m2, m) in the corrected x, where m1 and m2 are the data as
    predicted one and two steps before, and [steps, 3] of (corrected x, m, m1) in the next x.
    """
    steps = len(schedule) - 1
    # As diffusers does: at 1 the log-SNR is infinite and the second step would be of order 1.
    sigma = np.minimum(schedule, np.float32(1 - 1e-6)).astype(np.float64)
    alpha = 1 - sigma
    with np.errstate(divide="ignore"):
        log_snr = np.log(alpha) - np.log(sigma)
    correct, predict = np.zeros((steps, 4)), np.zeros((steps, 3))
    correct[0, 0] = 1  # The noise is as it is.
    order = 1
    for i in range(steps):
        if i:  # From i - 1 to i once more, now with m, at the order of the prediction.
            h = log_snr[i] - log_snr[i - 1]
            phi = alpha[i] * np.expm1(-h)
            correct[i, :2] = sigma[i] / sigma[i - 1], -phi
            if order == 1:
                slope, curve = 0.5, 0.0
            else:
                r = (log_snr[i - 2] - log_snr[i - 1]) / h
                moment = np.expm1(-h) / -h - 1
                moments = np.array([moment, 2 * (moment / -h - 0.5)]) / np.expm1(-h)
                curve, slope = np.linalg.solve([[1, 1], [r, 1]], moments)
                curve /= r
            correct[i] += -phi * np.array([0, -slope - curve, curve, slope])
        order = min(2, i + 1, steps - i)
        h = log_snr[i + 1] - log_snr[i]
        phi = alpha[i + 1] * np.expm1(-h)
        predict[i, :2] = sigma[i + 1] / sigma[i], -phi
        if order == 2:
            r = (log_snr[i - 1] - log_snr[i]) / h
            predict[i] += -phi * 0.5 / r * np.array([0, -1, 1])
    return correct.astype(np.float32), predict.astype(np.float32)


SAMPLERS = {"euler": euler, "heun": heun, "unipc": unipc}


def integer_timestep(sigma: jax.Array) -> jax.Array:
    """The whole number up to 999 that Wan's samplers, and diffusers' UniPC, call `sigma` by.

    They truncate 1000 * sigma in float64, which here is float32: where that is whole up to
    rounding, which takes steps and shifts that nobody uses, the two differ by 1.
    """
    return jnp.minimum(jnp.floor(1000.0 * sigma), 999.0)


# How a network is told of a noise level: sigma in [0, 1] -> float32 timestep in [0, 1000].
TIMESTEPS = {"continuous": lambda sigma: 1000.0 * sigma, "integer": integer_timestep}


def guided(conditional: jax.Array, unconditional: jax.Array, scale: float) -> jax.Array:
    """Classifier-free guidance (arXiv 2207.12598): u + scale * (c - u)."""
    return unconditional + scale * (conditional - unconditional)
