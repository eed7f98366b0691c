"""Models whose posterior is known, and fits of them: exact, too narrow, shifted, mean-field."""

import pyro
import pyro.distributions as dist
import torch

import pyro_elbo as pe

Y = torch.zeros(5, dtype=torch.float64)


def normal(y):
    """mean ~ N(0, 1), five y ~ N(mean, 1): the posterior is N(Σy / 6, 1/6)."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    pyro.deterministic("square", mean**2)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def exact(y, narrower=1.0, shift=0.0):
    def guide(y):
        pyro.sample("mean", dist.Normal(y.sum() / 6 + shift * 6**-0.5, narrower * 6**-0.5))

    return guide


def narrow(y):
    return exact(y, narrower=0.6)


def shifted(y):
    return exact(y, shift=-0.6)


def correlated(y):
    """Two means with one datum each on their sum and, weakly, on their difference: a correlated Gaussian posterior."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z[..., 0] + z[..., 1], 0.3), obs=y)


def mean_field(y):
    """The best mean-field posterior of `correlated`: the right means, the precisions of the conditionals."""
    precision = torch.eye(2, dtype=torch.float64) + torch.ones(2, 2, dtype=torch.float64) / 0.09
    loc = torch.linalg.solve(precision, torch.ones(2, dtype=torch.float64) * y / 0.09)
    return lambda y: pyro.sample("z", dist.Normal(loc, precision.diagonal() ** -0.5).to_event(1))


SIGMA = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])


def centered_schools(sigma, y):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


class AutoNormalFit:
    """Steps of one `pe.SVI`, begun again for every data set."""

    def __init__(self, model, steps, compile, lr=0.05):
        self.guide = pyro.infer.autoguide.AutoNormal(model)
        self.svi = pe.SVI(model, self.guide, pyro.optim.Adam({"lr": lr}), pe.TraceBeta_ELBO(), compile=compile)
        self.steps = steps

    def __call__(self, *args):
        self.svi.reset()
        self.svi.run(self.steps, *args, progress=False)
        return self.guide
