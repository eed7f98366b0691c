"""The VRNN of ``bench_sequences`` in NumPyro: jitted SVI over scans."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from jax.nn import relu, sigmoid, softplus
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from tests.benchmarks.sequences_torch import LR, H, Step, Z, data, start

Params = dict[str, jax.Array]
Normal = tuple[jax.Array, jax.Array]


def _linear(p: Params, name: str, x: jax.Array) -> jax.Array:
    return x @ p[f"{name}.weight"] + p[f"{name}.bias"]


def _normal(raw: jax.Array) -> Normal:
    loc, scale = jnp.split(raw, 2, -1)
    return loc, softplus(scale)


def features_x(p: Params, x: jax.Array) -> jax.Array:
    return relu(_linear(p, "phi_x", x))


def features_z(p: Params, z: jax.Array) -> jax.Array:
    return relu(_linear(p, "phi_z", z))


def prior(p: Params, h: jax.Array) -> Normal:
    return _normal(_linear(p, "prior_out", relu(_linear(p, "prior_hidden", h))))


def encode(p: Params, fx: jax.Array, h: jax.Array) -> Normal:
    hidden = relu(_linear(p, "encoder_hidden", jnp.concatenate([fx, h], -1)))
    return _normal(_linear(p, "encoder_out", hidden))


def decode(p: Params, fz: jax.Array, h: jax.Array) -> jax.Array:
    return _linear(p, "decoder_out", relu(_linear(p, "decoder_hidden", jnp.concatenate([fz, h], -1))))


def advance(p: Params, fx: jax.Array, fz: jax.Array, h: jax.Array) -> jax.Array:
    inputs = jnp.concatenate([fx, fz], -1) @ p["gru.weight_ih"] + p["gru.bias_ih"]
    hidden = h @ p["gru.weight_hh"] + p["gru.bias_hh"]
    reset, update = jnp.split(sigmoid(inputs[..., : 2 * H] + hidden[..., : 2 * H]), 2, -1)
    new = jnp.tanh(inputs[..., 2 * H :] + reset * hidden[..., 2 * H :])
    return new + update * (h - new)


def _params(initial: Params) -> Params:
    return {name: numpyro.param(name, value) for name, value in initial.items()}


def model(initial: Params, x: jax.Array) -> None:
    p = _params(initial)

    def step(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, None]:
        with numpyro.plate("sequences", x.shape[1]):
            z = numpyro.sample("z", dist.Normal(*prior(p, h)).to_event(1))
            fz = features_z(p, z)
            numpyro.sample("x", dist.Bernoulli(logits=decode(p, fz, h)).to_event(1), obs=x_t)
        return advance(p, features_x(p, x_t), fz, h), None

    scan(step, jnp.zeros((x.shape[1], H)), x)


def guide(initial: Params, x: jax.Array) -> None:
    p = _params(initial)

    def step(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, None]:
        fx = features_x(p, x_t)
        with numpyro.plate("sequences", x.shape[1]):
            z = numpyro.sample("z", dist.Normal(*encode(p, fx, h)).to_event(1))
        return advance(p, fx, features_z(p, z), h), None

    scan(step, jnp.zeros((x.shape[1], H)), x)


def batched_model(initial: Params, x: jax.Array) -> None:
    """As ``model``, with the decoder and the features of x outside of the scan, over all steps at once."""
    p = _params(initial)

    def step(h: jax.Array, fx: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        with numpyro.plate("sequences", x.shape[1]):
            z = numpyro.sample("z", dist.Normal(*prior(p, h)).to_event(1))
        fz = features_z(p, z)
        return advance(p, fx, fz, h), (fz, h)

    _, (fz, hs) = scan(step, jnp.zeros((x.shape[1], H)), features_x(p, x))
    with numpyro.plate("time", len(x), dim=-2), numpyro.plate("sequences", x.shape[1]):
        numpyro.sample("x", dist.Bernoulli(logits=decode(p, fz, hs)).to_event(1), obs=x)


def batched_guide(initial: Params, x: jax.Array) -> None:
    p = _params(initial)

    def step(h: jax.Array, fx: jax.Array) -> tuple[jax.Array, None]:
        with numpyro.plate("sequences", x.shape[1]):
            z = numpyro.sample("z", dist.Normal(*encode(p, fx, h)).to_event(1))
        return advance(p, fx, features_z(p, z), h), None

    scan(step, jnp.zeros((x.shape[1], H)), features_x(p, x))


def factor_model(initial: Params, x: jax.Array) -> None:
    """The whole bound as one factor: one ``lax.scan`` for model and guide, everything else over all steps at once."""
    p = _params(initial)
    noise = random.normal(numpyro.prng_key(), (*x.shape[:2], Z))

    def step(h: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        fx, eps = inputs
        loc, scale = encode(p, fx, h)
        fz = features_z(p, loc + scale * eps)
        return advance(p, fx, fz, h), (loc, scale, fz, h)

    _, (loc, scale, fz, hs) = lax.scan(step, jnp.zeros((x.shape[1], H)), (features_x(p, x), noise))
    logits, (prior_loc, prior_scale) = decode(p, fz, hs), prior(p, hs)
    ratio = jnp.square(scale / prior_scale)
    kl = 0.5 * (ratio + jnp.square((loc - prior_loc) / prior_scale) - 1 - jnp.log(ratio)).sum()
    numpyro.factor("elbo", (x * logits - softplus(logits)).sum() - kl)


def factor_guide(initial: Params, x: jax.Array) -> None:
    """Everything is in the model's factor."""


def _make(model: Callable, guide: Callable, loss: Trace_ELBO | TraceMeanField_ELBO, steps: int, batch: int) -> Step:
    x = jnp.asarray(data(steps, batch).numpy())
    initial = {name: jnp.asarray(value.numpy().T.copy()) for name, value in start().state_dict().items()}
    svi = SVI(partial(model, initial), partial(guide, initial), numpyro.optim.Adam(LR), loss)
    state, update = svi.init(random.key(0), x), jax.jit(svi.update)

    def step() -> float:
        nonlocal state
        state, value = update(state, x)
        return float(value)

    return step


make_scan = partial(_make, model, guide, TraceMeanField_ELBO())
make_batched = partial(_make, batched_model, batched_guide, TraceMeanField_ELBO())
make_factor = partial(_make, factor_model, factor_guide, Trace_ELBO())
