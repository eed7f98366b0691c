"""The table of programs that every objective must get right: one row buys every law of test_conformance."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import autoguide

import pyro_elbo as pe

X = torch.tensor([0.3, -1.2, 0.8, 1.9], dtype=torch.float64)
COUNTS = torch.tensor([3.0, 1.0, 4.0, 2.0], dtype=torch.float64)
X2 = torch.tensor([[0.3, -1.2], [0.8, 1.9], [-0.4, 0.1]], dtype=torch.float64)


def num(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def loc(name: str, *shape: int, start: float = 0.4) -> torch.Tensor:
    """A location parameter whose entries differ."""
    n = torch.Size(shape).numel()
    return pyro.param(name, lambda: (start + 0.3 * torch.arange(n, dtype=torch.float64)).reshape(shape))


def scale(name: str, *shape: int) -> torch.Tensor:
    return pyro.param(name, lambda: torch.full(shape, 0.6, dtype=torch.float64), constraint=constraints.positive)


@dataclass(frozen=True)
class Program:
    """One row.

    Attributes:
        guide: makes a guide from the model (AutoGuides need it).
        mean_field: Pyro's TraceMeanField_ELBO is valid for the pair.
        vectorizes: the pair runs with particles on the left.
        evidence: log p(x) where the guide is the exact posterior.
        pyro_agrees: Pyro's Trace_ELBO has the gradient of the bound.
    """

    name: str
    model: Callable[..., Any]
    guide: Callable[[Callable[..., Any]], Callable[..., Any]]
    args: tuple = (X,)
    mean_field: bool = False
    vectorizes: bool = True
    evidence: Callable[[], torch.Tensor] | None = None
    pyro_agrees: bool = True


def plain(guide: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model: guide


# --- continuous latents ---------------------------------------------------------------------------------------


def global_model(x):
    z = pyro.sample("z", dist.Normal(num(0.0), num(1.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, num(1.0)), obs=x)


def global_guide(x):
    pyro.sample("z", dist.Normal(loc("loc"), scale("scale")))


def global_exact(x):
    n = len(x)
    pyro.sample("z", dist.Normal(x.sum() / (n + 1), num(1 / (n + 1) ** 0.5)))


def global_evidence():
    n = len(X)
    cov = torch.eye(n, dtype=torch.float64) + 1.0
    return dist.MultivariateNormal(torch.zeros(n, dtype=torch.float64), cov).log_prob(X)


def local_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), num(1.0)), obs=x)


def local_guide(x):
    with pyro.plate("data", len(x)):
        mean = loc("weight", 2) * x.unsqueeze(-1)
        pyro.sample("z", dist.Normal(mean, scale("scale", 2)).to_event(1))


def nested_model(x):
    mu = pyro.sample("mu", dist.Normal(num(0.0), num(2.0)))
    with pyro.plate("group", 3, dim=-2):
        m = pyro.sample("m", dist.Normal(mu, num(1.0)))
        with pyro.plate("item", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(m, num(1.0)))
            pyro.sample("x", dist.Normal(z, num(0.5)), obs=x)


def nested_guide(x):
    pyro.sample("mu", dist.Normal(loc("mu_loc"), scale("mu_scale")))
    with pyro.plate("group", 3, dim=-2):
        pyro.sample("m", dist.Normal(loc("m_loc", 3, 1), scale("m_scale", 3, 1)))
        with pyro.plate("item", 2, dim=-1):
            pyro.sample("z", dist.Normal(loc("z_loc", 3, 2), scale("z_scale", 3, 2)))


def subsampled_model(x, index):
    w = pyro.sample("w", dist.Normal(num(0.0), num(1.0)))
    with pyro.plate("data", len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(w, num(1.0)))
        pyro.sample("x", dist.Normal(z, num(0.5)), obs=x[index])


def subsampled_guide(x, index):
    pyro.sample("w", dist.Normal(loc("w_loc"), scale("w_scale")))
    with pyro.plate("data", len(x), subsample=index):
        pyro.sample("z", dist.Normal(loc("z_loc", 4)[index], scale("z_scale", 4)[index]))


MASK = torch.tensor([True, False, True, True])


def masked_model(x):
    with pyro.plate("data", len(x)), poutine.mask(mask=MASK):
        z = pyro.sample("z", dist.Normal(num(0.0), num(1.0)))
        pyro.sample("x", dist.Normal(z, num(1.0)), obs=x)


def masked_guide(x):
    with pyro.plate("data", len(x)), poutine.mask(mask=MASK):
        pyro.sample("z", dist.Normal(loc("loc", 4), scale("scale", 4)))


def dist_masked_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(num(0.0), num(1.0)).expand([4]).mask(MASK))
        pyro.sample("x", dist.Normal(z, num(1.0)).mask(MASK), obs=x)


def dist_masked_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc("loc", 4), scale("scale", 4)).mask(MASK))


def obs_mask_model(x):
    z = pyro.sample("z", dist.Normal(num(0.0), num(1.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, num(1.0)), obs=x, obs_mask=MASK)


def obs_mask_guide(x):
    pyro.sample("z", dist.Normal(loc("loc"), scale("scale")))
    with pyro.plate("data", len(x)), poutine.mask(mask=~MASK):
        pyro.sample("x_unobserved", dist.Normal(loc("x_loc", 4), scale("x_scale", 4)))


def scaled(model):
    return poutine.scale(model, 3.0)


def auxiliary_guide(x):
    u = pyro.sample("u", dist.Normal(loc("loc"), scale("scale")), infer={"is_auxiliary": True})
    pyro.sample("z", dist.Delta(torch.sinh(u), log_density=-torch.cosh(u).log()))


def factor_model(x):
    z = pyro.sample("z", dist.Normal(num(0.0), num(1.0)))
    pyro.factor("bonus", -(z**4))
    pyro.deterministic("twice", 2 * z)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, num(1.0)), obs=x)


def factor_guide(x):
    z = pyro.sample("z", dist.Normal(loc("loc"), scale("scale")))
    pyro.factor("correction", -0.1 * z**2, has_rsample=True)


def positive_model(x):
    rate = pyro.sample("rate", dist.Gamma(num(2.0), num(1.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


def lognormal_guide(x):
    pyro.sample("rate", dist.LogNormal(loc("loc"), scale("scale")))


def flow_guide(x):
    base = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    affine = dist.transforms.AffineTransform(loc("shift", 2), scale("stretch", 2), event_dim=1)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.TransformedDistribution(base, [affine]))


def constrained_model(x):
    rate = pyro.sample("rate", dist.Gamma(num(2.0), num(1.0)))
    p = pyro.sample("p", dist.Beta(num(2.0), num(3.0)))
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3, dtype=torch.float64)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(p + w[..., 0], rate), obs=x.clamp(-1, 2))


def vectors_model(x):
    a = pyro.sample("a", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        b = pyro.sample("b", dist.Normal(num(0.0), num(1.0)))
        pyro.sample("x", dist.Normal(a.sum(-1) + b, num(1.0)), obs=x)


def auto_list(model):
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["a"])))
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["b"])))
    return guide


def reversed_model(x):
    z1 = pyro.sample("z1", dist.Normal(num(0.0), num(1.0)))
    z2 = pyro.sample("z2", dist.Normal(z1, num(1.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z2, num(1.0)), obs=x)


def reversed_guide(x):
    z2 = pyro.sample("z2", dist.Normal(loc("loc"), scale("scale")))
    pyro.sample("z1", dist.Normal(loc("slope") * z2, scale("scale1")))


# --- discrete latents -----------------------------------------------------------------------------------------


def bernoulli_model(x):
    z = pyro.sample("z", dist.Bernoulli(num(0.3)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(2 * z - 1, num(1.0)), obs=x)


def bernoulli_guide(x):
    pyro.sample("z", dist.Bernoulli(logits=loc("logit")))


def mixture_model(x):
    m = pyro.sample("m", dist.Normal(num(0.0), num(2.0)))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)))
        pyro.sample("x", dist.Normal(m + k - 1.0, num(1.0)), obs=x)


def mixture_guide(x):
    pyro.sample("m", dist.Normal(loc("m_loc"), scale("m_scale")))
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Categorical(logits=loc("logits", 4, 3)))


def discrete_nested_model(x):
    with pyro.plate("group", 3, dim=-2):
        a = pyro.sample("a", dist.Bernoulli(num(0.4)))
        with pyro.plate("item", 2, dim=-1):
            b = pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a))
            pyro.sample("x", dist.Normal(a + b, num(1.0)), obs=x)


def discrete_nested_guide(x):
    with pyro.plate("group", 3, dim=-2):
        pyro.sample("a", dist.Bernoulli(logits=loc("a_logit", 3, 1)))
        with pyro.plate("item", 2, dim=-1):
            pyro.sample("b", dist.Bernoulli(logits=loc("b_logit", 3, 2)))


def discrete_subsampled_model(x, index):
    with pyro.plate("data", len(x), subsample=index):
        z = pyro.sample("z", dist.Bernoulli(num(0.3)))
        pyro.sample("x", dist.Normal(2 * z - 1, num(1.0)), obs=x[index])


def discrete_subsampled_guide(x, index):
    with pyro.plate("data", len(x), subsample=index):
        pyro.sample("z", dist.Bernoulli(logits=loc("logit", 4)[index]))


def sequential_model(x):
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z_{i}", dist.Normal(num(0.0), num(1.0)))
        pyro.sample(f"x_{i}", dist.Normal(z, num(1.0)), obs=x[i])


def sequential_guide(x):
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"z_{i}", dist.Normal(loc(f"loc_{i}"), scale(f"scale_{i}")))


def row_model(x):
    """One Bernoulli a row: small enough to sum out."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(num(0.3)))
        pyro.sample("x", dist.Normal(2 * z - 1, num(1.0)), obs=x)


def row_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=loc("logit", 4)))


def log_joint_rows(x):
    """Log p(z, x) of row_model for z = 0 and z = 1, a column each."""
    return torch.stack([dist.Normal(2 * z - 1.0, 1.0).log_prob(x) + num(p).log() for z, p in ((0, 0.7), (1, 0.3))], -1)


def row_exact(x):
    joint = log_joint_rows(x)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=joint[:, 1] - joint[:, 0]))


def local_exact(x):
    """x = z_0 + z_1 + noise, all N(0, 1): mean x/3 each, covariance I - 1/3."""
    with pyro.plate("data", len(x)):
        mean = (x / 3).unsqueeze(-1).expand(len(x), 2)
        pyro.sample("z", dist.MultivariateNormal(mean, torch.eye(2, dtype=torch.float64) - 1 / 3))


def masked_row_model(x):
    """The latent is masked, what depends on it is not: it still needs its score function."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(num(0.3)).mask(MASK))
        pyro.sample("x", dist.Normal(2 * z - 1, num(1.0)), obs=x)


def masked_row_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=loc("logit", 4)).mask(MASK))


def discrete_auxiliary_guide(x):
    b = pyro.sample("b", dist.Bernoulli(logits=loc("b_logit")), infer={"is_auxiliary": True})
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Bernoulli(logits=loc("u_logit", 4)), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Bernoulli(logits=loc("logit", 4) + u + b))


def mixed_model(x):
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)))
    z = pyro.sample("z", dist.Normal(k - 1.0, num(1.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, num(1.0)), obs=x)


def mixed_guide(x):
    k = pyro.sample("k", dist.Categorical(logits=loc("logits", 3)))
    pyro.sample("z", dist.Normal(loc("means", 3)[k], scale("scales", 3)[k]))


def chain_model(x):
    a = pyro.sample("a", dist.Normal(num(0.0), num(1.0)))
    with pyro.plate("data", len(x)):
        b = pyro.sample("b", dist.Normal(a, num(1.0)))
        pyro.sample("x", dist.Normal(b, num(1.0)), obs=x)


def chain_guide(x):
    """Continuous, analytic KL, and yet without pathwise gradient."""
    pyro.sample("a", NonreparameterizedNormal(loc("a_loc"), scale("a_scale")))
    with pyro.plate("data", len(x)):
        pyro.sample("b", NonreparameterizedNormal(loc("b_loc", 4), scale("b_scale", 4)))


def two_plates_model(x):
    """Plates side by side on one dimension, of different sizes, and a factor in one of them."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(num(0.3)))
        pyro.factor("bonus", z * x)
    with pyro.plate("other", 3):
        w = pyro.sample("w", dist.Bernoulli(0.2 + 0.5 * z.mean(-1, keepdim=True)))
        pyro.sample("y", dist.Normal(w, num(1.0)), obs=torch.zeros(3, dtype=torch.float64))


def two_plates_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=loc("z_logit", 4)))
    with pyro.plate("other", 3):
        pyro.sample("w", dist.Bernoulli(logits=loc("w_logit", 3)))


# --- sites over time ------------------------------------------------------------------------------------------


def walk_model(x):
    """A random walk, observed with noise."""

    def step(z, x_t):
        z = pyro.sample("z", dist.Normal(z, num(1.0)))
        pyro.sample("x", dist.Normal(z, num(1.0)), obs=x_t)
        return z, None

    pe.scan(step, num(0.0), x)


def walk_guide(x):
    gain, width = loc("gain", 2), scale("width")

    def step(z, x_t):
        z = pyro.sample("z", dist.Normal(gain[0] * z + gain[1] * x_t, width))
        return z, None

    pe.scan(step, num(0.0), x)


def walk_exact(x):
    """p(x_t..T | z_t) ∝ exp(-j z²/2 + h z) with j_t = 1 + j/(1 + j), h_t = x_t + h/(1 + j) of the step after."""
    j, h, rows = num(0.0), num(0.0), []
    for x_t in x.flip(0):
        j, h = 1 + j / (1 + j), x_t + h / (1 + j)
        rows.insert(0, torch.stack([j, h]))

    def step(z, row):
        variance = 1 / (1 + row[0])
        z = pyro.sample("z", dist.Normal(variance * (z + row[1]), variance.sqrt()))
        return z, None

    pe.scan(step, num(0.0), torch.stack(rows))


def walk_evidence():
    steps = torch.arange(1, len(X) + 1, dtype=torch.float64)
    cov = torch.minimum(steps, steps[:, None]) + torch.eye(len(X), dtype=torch.float64)
    return dist.MultivariateNormal(torch.zeros(len(X), dtype=torch.float64), cov).log_prob(X)


def auto_subsampled(model):
    return autoguide.AutoNormal(model, create_plates=lambda x, index: pyro.plate("data", len(x), subsample=index))


INDEX = torch.tensor([0, 2])

PROGRAMS = [
    Program("global normal", global_model, plain(global_guide), mean_field=True),
    Program("exact posterior", global_model, plain(global_exact), mean_field=True, evidence=global_evidence),
    Program("local latents", local_model, plain(local_guide), mean_field=True),
    Program("nested plates", nested_model, plain(nested_guide), (X2,), mean_field=True),
    Program("subsampled plate", subsampled_model, plain(subsampled_guide), (X, INDEX), mean_field=True),
    Program("poutine.mask", masked_model, plain(masked_guide), mean_field=True),
    Program("dist.mask", dist_masked_model, plain(dist_masked_guide), mean_field=True),
    Program("obs_mask", obs_mask_model, plain(obs_mask_guide)),
    Program("poutine.scale", scaled(local_model), plain(scaled(local_guide)), mean_field=True),
    Program("auxiliary and Delta", global_model, plain(auxiliary_guide)),
    Program("factors, deterministic", factor_model, plain(factor_guide)),
    Program("LogNormal guide", positive_model, plain(lognormal_guide), (COUNTS,), mean_field=True),
    Program("flow guide", local_model, plain(flow_guide)),
    Program("AutoNormal, constrained", constrained_model, autoguide.AutoNormal),
    Program("AutoNormal, real", vectors_model, autoguide.AutoNormal, mean_field=True),
    Program("AutoMultivariateNormal", constrained_model, autoguide.AutoMultivariateNormal),
    Program("AutoLowRank", vectors_model, autoguide.AutoLowRankMultivariateNormal),
    Program("AutoIAFNormal", vectors_model, autoguide.AutoIAFNormal),
    Program("AutoGuideList", vectors_model, auto_list),
    Program("AutoDelta", vectors_model, autoguide.AutoDelta),
    Program("reversed order", reversed_model, plain(reversed_guide)),
    Program("Bernoulli", bernoulli_model, plain(bernoulli_guide)),
    Program("mixture", mixture_model, plain(mixture_guide)),
    Program("discrete, nested", discrete_nested_model, plain(discrete_nested_guide), (X2,)),
    Program(
        "discrete, subsampled",
        discrete_subsampled_model,
        plain(discrete_subsampled_guide),
        (X, INDEX),
    ),
    Program("sequential plate", sequential_model, plain(sequential_guide), mean_field=True),
    Program(
        "exact posterior, local",
        local_model,
        plain(local_exact),
        evidence=lambda: dist.Normal(num(0.0), num(3.0).sqrt()).log_prob(X).sum(),
    ),
    Program(
        "exact posterior, discrete",
        row_model,
        plain(row_exact),
        evidence=lambda: log_joint_rows(X).logsumexp(-1).sum(),
    ),
    Program("scale in the model alone", poutine.scale(local_model, 3.0), plain(local_guide)),
    Program("mask in the model alone", poutine.mask(local_model, mask=MASK), plain(local_guide)),
    Program("mask in the guide alone", local_model, plain(poutine.mask(local_guide, mask=MASK))),
    Program("discrete, scale in the model alone", poutine.scale(row_model, 3.0), plain(row_guide)),
    Program("discrete, scale in the guide alone", row_model, plain(poutine.scale(row_guide, 3.0))),
    Program("discrete, masked", masked_row_model, plain(masked_row_guide)),
    Program("discrete auxiliary", row_model, plain(discrete_auxiliary_guide), pyro_agrees=False),
    Program("discrete and continuous", mixed_model, plain(mixed_guide)),
    Program("without pathwise gradient", chain_model, plain(chain_guide)),
    Program("two plates, factor", two_plates_model, plain(two_plates_guide)),
    Program("scan", walk_model, plain(walk_guide), mean_field=True),
    Program("exact posterior, scan", walk_model, plain(walk_exact), evidence=walk_evidence),
    Program("AutoNormal, subsampled", subsampled_model, auto_subsampled, (X, INDEX), mean_field=True),
]
