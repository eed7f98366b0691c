"""Distributions of sites stacked over time, carries with lengths, forecasts of ragged batches, failures of a step."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, NonFiniteError, SiteError

T = 3


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def vector(c, size):
    return c.unsqueeze(-1) + torch.arange(size)


FAMILIES = {
    "RelaxedOneHotCategorical": lambda c: dist.RelaxedOneHotCategorical(torch.tensor(0.7), logits=vector(c, T)),
    "RelaxedBernoulli": lambda c: dist.RelaxedBernoulli(torch.tensor(0.5), logits=c),
    "Gumbel": lambda c: dist.Gumbel(c, 1.0),
    "LowRank": lambda c: dist.LowRankMultivariateNormal(vector(c, 3), torch.eye(3)[:, :2], torch.ones(3)),
    "MultivariateNormal": lambda c: dist.MultivariateNormal(vector(c, 2), scale_tril=torch.eye(2)),
    "MultivariateStudentT": lambda c: dist.MultivariateStudentT(torch.tensor(3.0), vector(c, 2), torch.eye(2)),
    "Uniform": lambda c: dist.Uniform(c - 1, c + 1),
    "Mixture": lambda c: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(vector(c, 2), 1.0)),
    "StudentT": lambda c: dist.StudentT(3.0, c, 1.0),
    "InverseGamma": lambda c: dist.InverseGamma(1.0 + c.abs(), 2.0),
    "Weibull": lambda c: dist.Weibull(1.0 + c.abs(), 2.0),
    "masked by values": lambda c: dist.Normal(vector(c, 3), 1.0).mask(vector(c, 3) < 1.5).to_event(1),
    "masked within an event": lambda c: (
        dist.Normal(vector(c, 3), 1.0).mask(torch.tensor([True, False, True])).to_event(1)
    ),
    "OneHotCategoricalStraightThrough": lambda c: dist.OneHotCategoricalStraightThrough(logits=vector(c, 3)),
    "ZeroInflatedPoisson": lambda c: dist.ZeroInflatedPoisson(c.exp(), gate=torch.tensor(0.3)),
    "BetaBinomial": lambda c: dist.BetaBinomial(1 + c.abs(), 1.0, 5),
    "Delta": lambda c: dist.Delta(vector(c, 2), event_dim=1),
    "VonMises": lambda c: dist.VonMises(c, 2.0),
}


@pytest.mark.parametrize(("batch", "lengths"), [(None, None), (2, None), (3, None), (3, torch.tensor([1, 3, 2]))])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_the_loops_density(family, batch, lengths):
    """Also where the number of steps or sequences equals a size of the distribution's own tensors."""
    shape = () if batch is None else (batch,)

    def program(way):
        c = torch.zeros(shape)
        with pyro.plate("n", batch or 1) if batch else poutine.block(hide_fn=lambda msg: False):
            if way == "scan":
                pe.scan(step, c, torch.zeros(T, *shape), lengths)
            for t in range(T) if way == "loop" else ():
                going = torch.tensor(True) if lengths is None else t < lengths
                with poutine.mask(mask=going):
                    new, _ = step(c, None, f"_{t}")
                c = torch.where(going, new, c)

    def step(c, x_t, suffix=""):
        z = pyro.sample("z" + suffix, FAMILIES[family](c))
        return c + 0.1 * z.reshape(*shape, -1).sum(-1), None

    found = []
    for way in ("scan", "loop"):
        pyro.set_rng_seed(1)
        found.append(poutine.trace(program).get_trace(way).log_prob_sum())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 1])])
def test_masked_observations_of_a_mixture(lengths):
    """A mixture has no transform to its support; NaN under the mask still enters neither value nor gradient."""
    x = torch.tensor([[0.5, 1.0, -1.0], [2.0, torch.nan, torch.nan]])
    seen = ~x.isnan() if lengths is None else torch.ones(2, 3, dtype=torch.bool)

    def mixture(loc):
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(vector(loc, 2), 1.0))

    def model():
        loc = pyro.param("loc", lambda: torch.tensor(0.2))

        def step(c, row):
            with poutine.mask(mask=row["seen"]):
                pyro.sample("x", mixture(loc + torch.zeros(2)), obs=row["x"])
            return c, None

        with pyro.plate("n", 2):
            pe.scan(step, None, {"x": x, "seen": seen}, lengths, dim=1)

    loss = pe.TraceBeta_ELBO().loss_and_grads(model, lambda: None)
    loc = torch.tensor(0.2, requires_grad=True)
    expected = -mixture(loc).log_prob(x[~x.isnan()]).sum()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(expected, loc)
    torch.testing.assert_close(pyro.param("loc").grad, gradient)


# --- the carry ------------------------------------------------------------------------------------------------------

SUMS, LENGTHS = torch.arange(1.0, 10.0, dtype=torch.float64).reshape(3, 3), torch.tensor([3, 2, 1])


@pytest.mark.parametrize("hidden", [1, 2, 3])
@pytest.mark.parametrize("inner", [2, 4])
def test_a_carry_ends_along_the_sequences(hidden, inner):
    """Although the number of hidden units, or rows of an inner plate, may equal that of the sequences."""

    def step(h, x_t):
        with pyro.plate("feature", inner, dim=-2):
            pyro.sample("w", dist.Normal(h[:, 0], 1.0))
        return h + x_t[:, None], None

    with pyro.plate("n", 3, dim=-1):
        last, _ = pe.scan(step, torch.zeros(3, hidden), SUMS, LENGTHS, dim=1)
    torch.testing.assert_close(last, torch.tensor([6.0, 9.0, 7.0]).unsqueeze(-1).expand(3, hidden))


@pytest.mark.parametrize("hidden", [1, 2, 3])
@pytest.mark.parametrize("particles", [2, 4])
def test_a_carry_ends_along_the_sequences_under_vectorized_particles(hidden, particles):
    last = []

    def model():
        def step(h, x_t):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            return h + x_t[:, None], None

        with pyro.plate("n", 3):
            last.append(pe.scan(step, torch.zeros(3, hidden), SUMS, LENGTHS, dim=1)[0])

    def guide():
        with pyro.plate("n", 3):
            pe.scan(
                lambda c, x_t: (pyro.sample("z", dist.Normal(0.0, 1.0)), None), torch.zeros(3), SUMS, LENGTHS, dim=1
            )

    options = {"num_particles": particles, "vectorize_particles": True, "max_plate_nesting": 1}
    pe.TraceBeta_ELBO(**options).loss(model, guide)
    torch.testing.assert_close(last[-1], torch.tensor([6.0, 9.0, 7.0]).unsqueeze(-1).expand(3, hidden))


def test_a_carry_that_may_begin_with_either_plate_is_refused():
    def step(h, x_t):
        with pyro.plate("feature", 3, dim=-2):
            pyro.sample("w", dist.Normal(h, 1.0))
        return h + x_t, None

    with (
        pyro.plate("n", 3, dim=-1),
        pytest.raises(ArgumentError, match=r"part 0 .*\(3, 3\).*\(3,\).*2 places.*Choose another size"),
    ):
        pe.scan(step, torch.zeros(3, 3), SUMS, LENGTHS, dim=1)


# --- forecasts of ragged batches ------------------------------------------------------------------------------------


def test_forecasts_of_ragged_batches_start_at_the_end_of_each_sequence():
    def step(last, x_t):
        x_t = pyro.sample("x", dist.Normal(last + 1.0, 1e-9), obs=x_t)
        return x_t, x_t

    def model(horizon):
        with pyro.plate("n", 3):
            return pe.scan(step, torch.zeros(3), SUMS, LENGTHS, horizon=horizon, dim=1)

    last, outs = model(2)
    expected = torch.tensor([[4.0, 5.0], [6.0, 7.0], [8.0, 9.0]])
    torch.testing.assert_close(outs[:, 3:], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(last, expected[:, -1], rtol=0, atol=1e-6)
    site = poutine.trace(model).get_trace(2).nodes["x"]
    assert site["value"].shape == (3, 5)
    torch.testing.assert_close(site["value"][0, :3], SUMS[0])


# --- failures of a step ---------------------------------------------------------------------------------------------


def test_a_carry_that_overflows_names_site_step_and_cure():
    """A scale that is fed back through exp."""

    def step(z, x_t):
        pyro.sample("y", dist.Normal(0.0, 1.0))
        return pyro.sample("z", dist.Normal(z, (50 * z).exp())), None

    pyro.set_rng_seed(0)
    with pytest.raises(NonFiniteError, match=r"Site 'z', step [1-9] of pe.scan: .* has grown .*softplus"):
        pe.scan(step, torch.tensor(1.0), None, length=20)


@pytest.mark.parametrize("mask", [torch.ones(4) > 0, torch.ones(2, 1) > 0, torch.ones(3) > 0])
def test_a_mask_wider_than_the_plates_of_a_site(mask: Tensor):
    def step(c, x_t):
        with poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        return c, None

    with pytest.raises(SiteError, match=r"'z'.*batch shape \(\).*plate"):
        pe.scan(step, None, None, length=4)
