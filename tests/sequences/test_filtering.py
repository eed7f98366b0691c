"""The filtering bound: sites, factors and masks outside the scan, paths of particles, steps of modules."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.utils import _pytree as pytree

import pyro_elbo as pe
from pyro_elbo.errors import SiteError

T, N, K = 4, 2, 3000
A, Q, R = 0.9, 0.5, 1.0  # z_t = A z_{t-1} + Q ε, x_t = z_t + R ε


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


X = torch.randn(N, T, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([2.0, -1.0], dtype=torch.float64)


def model_step(z, x_t):
    z = pyro.sample("z", dist.Normal(A * z, Q))
    pyro.sample("x", dist.Normal(z, R), obs=x_t)
    return z, z


def guide_step(z, x_t):
    return pyro.sample("z", dist.Normal(0.7 * A * z + 0.2 * x_t, 0.55)), None


def scan_model(outside=lambda last, path: None, mask: Any = True):
    def program():
        with pyro.plate("n", N), poutine.mask(mask=mask):
            outside(*pe.scan(model_step, torch.zeros(N), X.T))

    return program


def guide():
    with pyro.plate("n", N):
        pe.scan(guide_step, torch.zeros(N), X.T)


def exact(weights=None, noise=1.0):
    """log p of the frames and of y = Σ_t weights_t z_t + noise, per sequence: all are jointly Gaussian."""
    step = torch.tensor([[A ** (t - s) if s <= t else 0.0 for s in range(T)] for t in range(T)])
    cov_z = Q**2 * step @ step.T
    maps = torch.eye(T) if weights is None else torch.cat([torch.eye(T), weights.unsqueeze(0)])
    noises = torch.full((T,), R**2) if weights is None else torch.tensor([R**2] * T + [noise**2])
    data = X if weights is None else torch.cat([X, Y.unsqueeze(1)], 1)
    cov = maps @ cov_z @ maps.T + noises.diag()
    return dist.MultivariateNormal(torch.zeros(len(cov)), cov).log_prob(data)


def log_z(model, replicates=8, particles=K, **options):
    """Mean and standard error of log Ẑ."""
    objective = pe.TraceTimestep_ELBO(bound="filtering", num_particles=particles, resample=1.0, **options)
    pyro.set_rng_seed(1)
    values = torch.tensor([-objective.loss(model, guide) for _ in range(replicates)])
    return values.mean(), values.std() / replicates**0.5


def assert_close(model, expected):
    mean, error = log_z(model)
    assert error < 0.1
    assert (mean - expected).abs() < 5 * error + 0.002, (mean, expected, error)  # log is concave: a bias of order 1/K


def observe(location):
    return lambda last, path: pyro.sample("y", dist.Normal(location(last, path), 1.0), obs=Y)


@pytest.mark.parametrize(
    ("outside", "weights"),
    [
        pytest.param(
            observe(lambda last, path: last), [0.0, 0.0, 0.0, 1.0], id="last carry", marks=pytest.mark.thorough
        ),
        pytest.param(observe(lambda last, path: path.mean(0)), [0.25] * 4, id="mean of the path"),
        pytest.param(
            observe(lambda last, path: path[0]), [1.0, 0.0, 0.0, 0.0], id="first step", marks=pytest.mark.thorough
        ),
    ],
)
def test_observations_outside_of_the_scan_weigh_the_particles(outside, weights):
    """The outs follow the ancestors of the particles: an observation may depend on the whole path."""
    assert_close(scan_model(outside), exact(torch.tensor(weights)).sum())


def test_factors_and_sites_that_do_not_depend_on_particles_add():
    def outside(last, path):
        pyro.factor("f", torch.tensor([7.0, 1.0]))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=Y)

    assert_close(scan_model(outside), exact().sum() + 8 + dist.Normal(0.0, 1.0).log_prob(Y).sum())


def test_a_mask_around_the_scan_leaves_sequences_out():
    mask: Any = torch.tensor([True, False])

    def masked_guide():
        with poutine.mask(mask=mask):
            guide()

    objective = pe.TraceTimestep_ELBO(bound="filtering", num_particles=K)
    pyro.set_rng_seed(0)
    values = torch.tensor([-objective.loss(scan_model(mask=mask), masked_guide) for _ in range(8)])
    assert (values.mean() - exact()[0]).abs() < 5 * values.std() / 8**0.5 + 0.002


def test_a_site_outside_the_plates_must_not_depend_on_the_particles():
    def model(depends):
        with pyro.plate("n", N):
            last, _ = pe.scan(model_step, torch.zeros(N), X.T)
        loc = last.sum(-1, keepdim=True) if depends else torch.zeros(())
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(0.5))

    objective = pe.TraceTimestep_ELBO(bound="filtering", num_particles=3, max_plate_nesting=1)
    with pytest.raises(SiteError, match=r"'y'.*particles.*plates.*bound='importance'"):
        objective.loss(lambda: model(True), guide)
    pyro.set_rng_seed(0)
    found = -objective.loss(lambda: model(False), guide)
    pyro.set_rng_seed(0)
    without = -objective.loss(scan_model(), guide)
    assert found == pytest.approx(without + dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5)).item())


def test_latents_of_the_guide_outside_of_its_scan_are_refused():
    def auxiliary():
        pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        guide()

    with pytest.raises(SiteError, match=r"'u'.*outside"):
        pe.TraceTimestep_ELBO(bound="filtering", num_particles=3).loss(scan_model(), auxiliary)


@pytest.mark.parametrize("hidden", [2, 3])
def test_carries_that_particles_share_stay(hidden):
    """A carry of shape (sequences, hidden) is not one of (particles, sequences), also if the numbers are equal."""
    n = particles = 3
    seen = []

    def step(carry, x_t):
        z, h = carry
        z = pyro.sample("z", dist.Normal(A * z, Q))
        pyro.sample("x", dist.Normal(z, 0.1), obs=x_t)
        return (z, h + x_t.unsqueeze(-1)), None

    def model():
        with pyro.plate("n", n):
            (_, h), _ = pe.scan(step, (torch.zeros(n), torch.zeros(n, hidden)), frames)
            seen.append(h)

    def other():
        with pyro.plate("n", n):
            pe.scan(lambda z, x_t: (pyro.sample("z", dist.Normal(x_t, 1.0)), None), torch.zeros(n), frames)

    frames = torch.arange(4.0).unsqueeze(-1) * torch.tensor([1.0, 10.0, 100.0])
    objective = pe.TraceTimestep_ELBO(bound="filtering", num_particles=particles, resample=1.0, max_plate_nesting=1)
    objective.loss(model, other)
    torch.testing.assert_close(seen[-1], frames.sum(0).unsqueeze(-1).expand(n, hidden))


# --- steps written for one particle ---------------------------------------------------------------------------------


class Recurrent(torch.nn.Module):
    """A step with a GRU cell and ``torch.cat``, or the same written so that it broadcasts."""

    def __init__(self, cell, broadcasts):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.loc, self.broadcasts = cell(3, 2), torch.nn.Linear(2, 1), broadcasts

    def join(self, z, x_t):
        if not self.broadcasts:
            return torch.cat([z.unsqueeze(-1), x_t], -1)
        return torch.stack(torch.broadcast_tensors(z, x_t[..., 0], x_t[..., 1]), -1)

    def advance(self, x, h):
        if not self.broadcasts or x.dim() < 3:
            return self.cell(x, h)
        flat = self.cell(x.flatten(0, 1), pytree.tree_map(lambda part: part.expand(*x.shape[:2], 2).flatten(0, 1), h))
        return pytree.tree_map(lambda part: part.unflatten(0, x.shape[:2]), flat)

    def model(self, x):
        def step(h, x_t):
            last = h[0] if isinstance(h, tuple) else h
            z = pyro.sample("z", dist.Normal(self.loc(last).squeeze(-1), 1.0))
            h = self.advance(self.join(z, x_t), h)
            last = h[0] if isinstance(h, tuple) else h
            pyro.sample("x", dist.Normal(last, 1.0).to_event(1), obs=x_t)
            return h, None

        with pyro.plate("n", len(x[0])):
            pe.scan(step, self.start(len(x[0])), x)

    def guide(self, x):
        def step(h, x_t):
            last = h[0] if isinstance(h, tuple) else h
            z = pyro.sample("z", dist.Normal(x_t.sum(-1) + self.loc(last).squeeze(-1), 1.0))
            return self.advance(self.join(z, x_t), h), None

        with pyro.plate("n", len(x[0])):
            pe.scan(step, self.start(len(x[0])), x)

    def start(self, count):
        h = torch.zeros(count, 2)
        return (h, h.clone()) if isinstance(self.cell, torch.nn.LSTMCell) else h


@pytest.mark.parametrize("cell", [torch.nn.GRUCell, torch.nn.RNNCell, torch.nn.LSTMCell])
def test_cells_and_cat_broadcast_over_the_particles(cell):
    x = torch.randn(T, N, 2, generator=torch.Generator().manual_seed(0))
    found = []
    for broadcasts in (False, True):
        module = Recurrent(cell, broadcasts)
        objective = pe.TraceTimestep_ELBO(bound="filtering", num_particles=5, max_plate_nesting=1)
        pyro.set_rng_seed(0)
        loss = objective.loss_and_grads(module.model, module.guide, x)
        found.append((loss, [p.grad.clone() for p in module.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_a_step_that_cannot_take_particles_names_the_cause():
    def step(h, x_t):
        z = pyro.sample("z", dist.Normal(h, 1.0))
        return z.view(N), None

    def model():
        with pyro.plate("n", N):
            pe.scan(step, torch.zeros(N), X.T)

    with pytest.raises(SiteError, match=r"pe.scan.*particles.*shape.*from the right.*bound='importance'"):
        pe.TraceTimestep_ELBO(bound="filtering", num_particles=3).loss(model, model)
