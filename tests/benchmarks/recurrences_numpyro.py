"""The works of ``bench_recurrences`` in NumPyro: jitted SVI over ``lax.scan``, each ending in a factor."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax
from jax.scipy.special import logsumexp

from tests.benchmarks.recurrences_ours import STATES

Pair = tuple[jax.Array, jax.Array]


def arma(y: jax.Array) -> None:
    mean, ar, ma = (numpyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("mean", "ar", "ma"))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))

    def step(carry: Pair, y_t: jax.Array) -> tuple[Pair, jax.Array]:
        before, error = carry
        error = y_t - mean - jnp.tanh(ar) * before - jnp.tanh(ma) * error
        return (y_t, error), error

    errors = lax.scan(step, (jnp.zeros(()), jnp.zeros(())), y)[1]
    numpyro.factor("y", dist.Normal(0.0, scale).log_prob(errors).sum())


def garch(y: jax.Array) -> None:
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    base = numpyro.sample("base", dist.LogNormal(-2.0, 1.0))
    arch, keep = (jax.nn.sigmoid(numpyro.sample(name, dist.Normal(0.0, 1.0))) for name in ("arch", "keep"))

    def step(carry: Pair, y_t: jax.Array) -> tuple[Pair, jax.Array]:
        variance, shock = carry
        variance = base + arch * (1 - keep) * shock**2 + keep * variance
        shock = y_t - mean
        return (variance, shock), dist.Normal(0.0, jnp.sqrt(variance)).log_prob(shock)

    terms = lax.scan(step, (jnp.ones(()), jnp.zeros(())), y)[1]
    numpyro.factor("y", terms.sum())


def local_level(y: jax.Array) -> None:
    walk, noise = (numpyro.sample(name, dist.LogNormal(-1.0, 1.0)) ** 2 for name in ("walk", "noise"))

    def step(carry: Pair, y_t: jax.Array) -> tuple[Pair, jax.Array]:
        mean, variance = carry
        variance = variance + walk
        total = variance + noise
        error = y_t - mean
        mean = mean + variance / total * error
        return (mean, variance * noise / total), dist.Normal(0.0, jnp.sqrt(total)).log_prob(error)

    terms = lax.scan(step, (jnp.zeros(()), jnp.ones(())), y)[1]
    numpyro.factor("y", terms.sum())


def markov(y: jax.Array) -> None:
    means = numpyro.sample("means", dist.Normal(jnp.linspace(-1.5, 1.5, STATES), 0.5).to_event(1))
    logits = numpyro.sample("logits", dist.Normal(jnp.zeros((STATES, STATES)), 1.0).to_event(2))
    transition = jax.nn.log_softmax(logits, -1)

    def step(log_p: jax.Array, y_t: jax.Array) -> tuple[jax.Array, None]:
        log_p = logsumexp(log_p[:, None] + transition, -2)
        return log_p + dist.Normal(means, 0.5).log_prob(y_t), None

    log_p = lax.scan(step, jnp.log(jnp.full(STATES, 1 / STATES)), y)[0]
    numpyro.factor("y", logsumexp(log_p))


WORKS = {"ARMA(1,1)": arma, "GARCH(1,1)": garch, "local level": local_level, "HMM filter": markov}
