"""Solvers of dx/dsigma = velocity(x, sigma), from noise at sigma 1 to data at 0."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxvp.diffusion.flow_matching import shift_sigma

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (x, sigma scalar) -> like x; pytrees too


def sigmas(steps: int, shift: float = 1.0) -> jax.Array:
    """The schedule from 1 to 0, float32[steps + 1], shifted as in training."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got {steps}")
    return shift_sigma(jnp.linspace(1.0, 0.0, steps + 1), shift)


def euler(velocity: Velocity, x: jax.Array, schedule: jax.Array) -> jax.Array:
    """First-order steps through `schedule`; `x` is any pytree of noise."""

    def step(x, pair):
        now, after = pair
        v = velocity(x, now)
        return jax.tree.map(lambda a, b: a + (after - now) * b, x, v), None

    return jax.lax.scan(step, x, (schedule[:-1], schedule[1:]))[0]


def heun(velocity: Velocity, x: jax.Array, schedule: jax.Array) -> jax.Array:
    """Second-order (trapezoid) steps; the last one, into sigma 0, is an Euler step."""

    def step(x, pair):
        now, after = pair
        first = velocity(x, now)
        guess = jax.tree.map(lambda a, b: a + (after - now) * b, x, first)
        second = velocity(guess, after)
        return jax.tree.map(lambda a, b, c: a + (after - now) * (b + c) / 2, x, first, second), None

    x = jax.lax.scan(step, x, (schedule[:-2], schedule[1:-1]))[0]
    return euler(velocity, x, schedule[-2:])


SAMPLERS = {"euler": euler, "heun": heun}


def guided(conditional: jax.Array, unconditional: jax.Array, scale: float) -> jax.Array:
    """Classifier-free guidance (arXiv 2207.12598): u + scale * (c - u)."""
    return unconditional + scale * (conditional - unconditional)
