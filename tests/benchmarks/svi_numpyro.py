"""The works of ``bench_svi`` as NumPyro programs: the same model, guide, start, optimizer and number of particles.

Steps are ``jax.jit(svi.update)``, also with the old state's memory donated to the new one. Runs are ``svi.run``'s
own loop, a ``lax.scan`` over ``svi.update``, jitted once: ``svi.run`` itself traces and compiles its loop again at
every call.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import torch
from jax import lax, random
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO, init_to_feasible
from numpyro.infer.autoguide import AutoNormal

Params = dict[str, jax.Array]


def eight_schools(y: jax.Array, sigma: jax.Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(y)):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)


def hierarchical(x: jax.Array, y: jax.Array) -> None:
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 5.0))
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    weights = [numpyro.sample(f"weight_{i}", dist.Normal(mean, scale)) for i in range(x.shape[-1])]
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(intercept + x @ jnp.stack(weights), noise), obs=y)


def logistic(total: int, rows: jax.Array, x: jax.Array, y: jax.Array) -> None:
    weights = numpyro.sample("weights", dist.Normal(jnp.zeros(x.shape[-1]), 1.0).to_event(1))
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 1.0))
    # NumPyro's plate draws its rows itself: the scale of given rows is set by hand.
    with numpyro.plate("data", len(rows)), handlers.scale(scale=total / len(rows)):
        numpyro.sample("y", dist.Bernoulli(logits=intercept + x @ weights), obs=y)


def perceptron(name: str, start: Params, x: jax.Array) -> jax.Array:
    weight = [numpyro.param(f"{name}.{key}", start[f"{name}.{key}"]) for key in ("0.w", "0.b", "2.w", "2.b")]
    return jax.nn.softplus(x @ weight[0] + weight[1]) @ weight[2] + weight[3]


def vae_model(beta: float, start: Params, x: jax.Array) -> None:
    with numpyro.plate("data", len(x)):
        with handlers.scale(scale=beta):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(20), 1.0).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=perceptron("decoder", start, z)).to_event(1), obs=x)


def vae_guide(beta: float, start: Params, x: jax.Array) -> None:
    loc, raw = jnp.split(perceptron("encoder", start, x), 2, axis=-1)
    with numpyro.plate("data", len(x)), handlers.scale(scale=beta):
        numpyro.sample("z", dist.Normal(loc, jax.nn.softplus(raw) + 1e-4).to_event(1))


def as_jax(state: dict[str, torch.Tensor]) -> Params:
    """Weights of the torch networks, in JAX's layout."""
    return {
        key.replace("weight", "w").replace("bias", "b"): jnp.asarray(np.array(value.numpy().T, order="C"))
        for key, value in state.items()
    }


def auto(model: Callable) -> tuple[Callable, Callable, Any]:
    """NumPyro's AutoNormal, started where Pyro's starts."""
    return model, AutoNormal(model, init_loc_fn=init_to_feasible, init_scale=0.1), Trace_ELBO()


def vae(state: dict[str, torch.Tensor], beta: float, particles: int) -> tuple[Callable, Callable, Any]:
    start = as_jax(state)
    loss = TraceMeanField_ELBO(num_particles=particles, vectorize_particles=True)
    return partial(vae_model, beta, start), partial(vae_guide, beta, start), loss


def contenders(parts: tuple, lr: float, args: tuple[torch.Tensor, ...], run: int) -> dict[str, tuple]:
    """Calls that train by one step or by ``run`` steps; each a pair of a call and its number of steps."""
    model, guide, loss = parts
    svi = SVI(model, guide, numpyro.optim.Adam(lr), loss)
    data = tuple(jnp.asarray(arg.numpy()) for arg in args)

    def many(start: Any, *data: jax.Array) -> tuple[Any, jax.Array]:
        return lax.scan(lambda state, _: svi.update(state, *data), start, None, length=run)

    def caller(update: Callable, seed: int) -> Callable[[], jax.Array]:
        # A state of its own: a donated one must share no memory with the guide's start.
        state = jax.tree.map(jnp.copy, svi.init(random.key(seed), *data))

        def call() -> jax.Array:
            nonlocal state
            state, loss = update(state, *data)
            return jax.block_until_ready(loss)

        return call

    return {
        "NumPyro, svi.update": (caller(jax.jit(svi.update), 0), 1),
        "NumPyro, svi.update, donated state": (caller(jax.jit(svi.update, donate_argnums=0), 1), 1),
        "NumPyro, svi.run": (caller(jax.jit(many), 2), run),
    }
