"""A compiled step equals the uncompiled one: programs, objectives, runs, noise."""

import copy
import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn, optim

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, NonFiniteError
from tests.support.compiled import (  # noqa: F401  (fixtures work by name)
    X,
    _as_captured,
    _double,
    _graphs,
    adam,
    assert_same,
    decoder_model,
    guide,
    model,
    network,
    parameters,
    sampled,
)

# --- programs ----------------------------------------------------------------------------------------------------


class Encoder(PyroModule):
    """Constrained and plain parameters, one of them tied, one without gradient, and a buffer that is updated."""

    def __init__(self):
        super().__init__()
        self.first, self.second = PyroModule[nn.Linear](1, 1), PyroModule[nn.Linear](1, 1)
        self.second.weight = self.first.weight
        self.width = PyroParam(torch.tensor(0.4), constraint=constraints.interval(0.1, 2.0))
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean.mul_(0.9).add_(0.1 * x.mean())
        loc = self.second(self.first(x[:1, None])).squeeze() - self.mean.clone()
        pyro.sample("z", dist.Normal(loc, self.width))


def test_pyro_module_with_local_parameters(interpreted):
    def scenario(svi_of):
        encoder = Encoder()
        svi = svi_of(model, encoder, optim.Adam(encoder.parameters(), 0.05, weight_decay=0.1), sampled())
        losses = [svi.step(X) for _ in range(5)]
        assert not pyro.get_param_store()
        return losses, svi.run(3, X, progress=False), encoder.state_dict()

    with pyro.settings.context(module_local_params=True):
        assert_same(scenario)


def amortized_guide(x):
    slope = pyro.param("slope", lambda: torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, 0.5))


def normed(momentum=0.1):
    norm = nn.BatchNorm1d(5, momentum=momentum)
    return nn.Sequential(nn.Linear(1, 5, bias=False), norm, nn.Dropout(0.3), nn.Linear(5, 1))


def train_and_eval(svi_of):
    """Training mode, evaluation mode, and back."""
    net = normed()
    svi = svi_of(decoder_model(net), amortized_guide, adam(0.02), sampled())
    losses = [svi.step(X) for _ in range(4)]
    after = copy.deepcopy(net.state_dict())
    net.eval()
    losses += [svi.step(X) for _ in range(3)]
    frozen = {name: b.clone() for name, b in net.named_buffers()}
    net.train()
    return [*losses, svi.step(X)], after, frozen, net.state_dict()


def test_batch_norm_and_dropout_follow_the_mode(interpreted, graphs):
    assert_same(train_and_eval)
    assert len(graphs) == 2


@pytest.mark.slow
def test_batch_norm_and_dropout_in_single_precision():
    torch.set_default_dtype(torch.float32)

    def scenario(svi_of):
        net = normed(momentum=0.3)
        svi = svi_of(decoder_model(net), amortized_guide, pyro.optim.SGD({"lr": 0.02}), sampled())
        return [svi.step(X.float()) for _ in range(4)], svi.run(4, X.float(), progress=False), net.state_dict()

    assert_same(scenario, rtol=1e-5, atol=1e-6)


def test_batch_norm_is_left_alone_by_an_unusable_step(interpreted):
    net = normed()
    svi = pe.SVI(decoder_model(net), amortized_guide, adam(), sampled(), compile=True)
    for _ in range(3):
        svi.step(X)
    before = copy.deepcopy(net.state_dict())
    for attempt in (svi.step, functools.partial(svi.run, 5, progress=False)):
        with pytest.raises(NonFiniteError):
            attempt(X.where(X < 1, math.nan))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def two_latents(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    pyro.sample("w", dist.Beta(2.0, 3.0))


def test_an_auto_guide_makes_its_parameters_first(interpreted):
    def scenario(svi_of):
        svi = svi_of(two_latents, AutoNormal(two_latents), adam(), pe.TraceBeta_ELBO())
        first = svi.evaluate_loss(X)
        return first, [svi.step(X) for _ in range(4)], svi.evaluate_loss(X), svi.run(3, X, progress=False), parameters()

    assert_same(scenario)


def twins(x):
    """Pairs of sites of the same distribution: each must have its own draw."""
    shape = pyro.param("shape", lambda: torch.tensor(0.8), constraint=constraints.positive)
    kinds = {
        "dirichlet": lambda: dist.Dirichlet(shape.expand(3)),
        "gamma": lambda: dist.Gamma(shape, 1.0),
        "laplace": lambda: dist.Laplace(0.0, shape),
        "categorical": lambda: dist.Categorical(torch.stack([shape, shape])),
    }
    return {f"{name}{i}": pyro.sample(f"{name}{i}", kind()) for name, kind in kinds.items() for i in range(2)}


def twins_model(x):
    with poutine.block(hide_types=["param"]):
        values = twins(x)
    pairs = [values[n].sum() - values[n[:-1] + "0"].sum() for n in values if n.endswith("1") and n != "dirichlet1"]
    pairs.append(values["dirichlet1"][0] - values["dirichlet0"][0])
    pyro.sample(
        "x", dist.Normal(torch.stack([d.double() for d in pairs]), 1.0).to_event(1), obs=torch.zeros(len(pairs))
    )


@pytest.mark.slow
def test_two_sites_of_one_distribution_have_two_draws():
    def scenario(svi_of):
        svi = svi_of(twins_model, lambda x: twins(x) and None, pyro.optim.SGD({"lr": 1e-4}), sampled())
        return [svi.step(X) for _ in range(4)], svi.run(2, X, progress=False), parameters()

    assert_same(scenario)


def test_parameters_without_gradient_follow_pyro(interpreted):
    """Pyro zeroes gradients: a parameter that had one once goes on moving by momentum and decay."""

    def scenario(svi_of):
        extra, other = network(), nn.Parameter(torch.ones(2))

        def sometimes(x, use):
            pyro.module("extra", extra)
            shift = extra(x[:1, None]).squeeze() if use else 0.0
            pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.tensor(0.1)) + shift, 0.5))

        svi = svi_of(lambda x, use: model(x), sometimes, adam(), sampled())
        losses = [svi.step(X, use) for use in (True, False) * 4]
        assert other.grad is None
        return losses, parameters()

    assert_same(scenario)


@pytest.mark.parametrize("optimizer", [lambda: adam(), lambda: optim.Adam([nn.Parameter(torch.ones(2))])])
def test_programs_without_parameters(interpreted, optimizer):
    def scenario(svi_of):
        loss = sampled(pe.LinearWarmup(0.0, 1.0, 4))
        svi = svi_of(model, lambda x: pyro.sample("z", dist.Normal(0.3, 0.5)), optimizer(), loss)
        return [svi.step(X) for _ in range(4)], loss.step

    assert_same(scenario)


def test_single_and_double_precision_mix(interpreted):
    def scenario(svi_of):
        net = network().float()

        def mixed(x):
            pyro.module("net", net)
            pyro.sample("z", dist.Normal(net(x.float()[:1, None]).squeeze().double(), 0.5))

        svi = svi_of(model, mixed, optim.Adam(net.parameters(), 0.05), sampled())
        return [svi.step(X) for _ in range(6)], parameters()

    assert_same(scenario, rtol=1e-5, atol=1e-6)


def test_autocast_is_honoured(interpreted):
    torch.set_default_dtype(torch.float32)

    def scenario(svi_of):
        net = nn.Linear(4, 4)

        def program(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + net(x).float(), 1.0).to_event(1), obs=x)

        svi = svi_of(program, guide, adam(), sampled())
        losses = [svi.step(X.float()) for _ in range(3)]
        with torch.autocast("cpu", torch.bfloat16):
            losses += [svi.step(X.float()) for _ in range(3)]
        return losses

    assert_same(scenario, rtol=1e-5, atol=1e-6)


# --- objectives: schedules, free bits, particles -----------------------------------------------------------------

OBJECTIVES = {
    "beta 1 to 50": lambda: sampled(pe.LinearWarmup(1.0, 50.0, 8)),
    "cyclical": lambda: sampled(pe.Cyclical(0.0, 1.0, steps=16, cycles=4)),
    "sigmoid, analytic": lambda: pe.TraceBeta_ELBO(pe.SigmoidWarmup(0.0, 2.0, 8)),
    "per site": lambda: sampled({"z": pe.LinearWarmup(0.0, 2.0, 6)}),
    "tensor": lambda: sampled(torch.tensor(3.0)),
    "free bits": lambda: sampled(2.0, free_bits=0.7),
    "capacity": lambda: pe.TraceBeta_ELBO(pe.Capacity(0.0, 5.0, steps=10, gamma=10.0)),
    "particles in a loop": lambda: sampled(pe.LinearWarmup(0.0, 1.0, 8), num_particles=3),
    "particles at once": lambda: sampled(num_particles=3, vectorize_particles=True),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_in_steps_and_runs(interpreted, graphs, name):
    """Schedules advance inside of a run as they do step by step, without another graph."""

    def scenario(svi_of):
        loss = OBJECTIVES[name]()
        svi = svi_of(model, guide, adam(), loss)
        losses = [svi.step(X) for _ in range(4)], svi.run(5, X, progress=False), [svi.step(X) for _ in range(2)]
        return losses, parameters(), loss.step

    assert_same(scenario)
    assert len(graphs) == 1


def test_a_run_equals_steps(interpreted):
    def trained(in_steps):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = sampled(pe.LinearWarmup(1.0, 50.0, 8))
        svi = pe.SVI(model, guide, adam(), loss, compile=True, fallback_random=True)
        if in_steps:
            losses = torch.tensor([svi.step(X) for _ in range(10)], dtype=torch.float64)
        else:
            losses = svi.run(10, X, progress=False)
        return losses, parameters(), loss.step

    steps, run = trained(True), trained(False)
    torch.testing.assert_close(run, steps, rtol=1e-12, atol=1e-14)
    assert run[0].shape == (10,)
    assert run[0].dtype == torch.float64


@pytest.mark.parametrize("num_steps", [0, -1])
def test_a_run_needs_a_step(num_steps):
    with pytest.raises(ArgumentError, match="num_steps"):
        pe.SVI(model, guide, adam(), sampled(), compile=True).run(num_steps, X)


def test_a_run_shows_progress(interpreted, capsys):
    svi = pe.SVI(model, guide, adam(), sampled(), compile=True)
    assert svi.run(1200, X).shape == (1200,)
    assert "1200/1200" in capsys.readouterr().err
    assert svi.loss.step == 1200


# --- noise -------------------------------------------------------------------------------------------------------


def row_model(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Uniform(0.0, 2.0))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


def row_guide(x):
    loc = pyro.param("loc", lambda: torch.tensor(0.2))
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Normal(loc, 0.7))
        pyro.sample("b", dist.Uniform(0.0, 2.0))


@pytest.fixture(scope="module")
def noise_svi():
    """Steps that draw 200 numbers but train nothing: a run of 4000 is done in parts."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    return pe.SVI(row_model, row_guide, pyro.optim.SGD({"lr": 0.0}), sampled(), compile=True)


@pytest.mark.slow
def test_default_noise_has_the_distribution_of_eager(noise_svi):
    """Means, variances and lag correlations within 5 standard errors; false alarms of all together: 1e-5."""
    torch.set_default_dtype(torch.float64)
    data = X.repeat(25)
    n = 4000
    noise_svi.run(5, data, progress=False)
    pyro.set_rng_seed(2)
    losses = noise_svi.run(n, data, progress=False)
    eager_svi = pe.SVI(row_model, row_guide, pyro.optim.SGD({"lr": 0.0}), sampled())
    eager = torch.tensor([eager_svi.step(data) for _ in range(1000)], dtype=torch.float64)
    assert losses.unique().numel() == n
    error = (losses.var() / n + eager.var() / len(eager)).sqrt()
    assert abs(losses.mean() - eager.mean()) < 5 * error
    kurtosis = ((eager - eager.mean()) ** 4).mean() / eager.var() ** 2
    assert abs(losses.var() / eager.var() - 1) < 5 * ((kurtosis - 1) * (1 / n + 1 / len(eager))).sqrt()
    centered = losses - losses.mean()
    for lag in (1, 2, 7):
        assert abs((centered[lag:] * centered[:-lag]).mean() / losses.var()) < 5 / math.sqrt(n)
    pyro.set_rng_seed(2)
    again = noise_svi.run(n, data, progress=False)
    assert torch.equal(again, losses)
    pyro.set_rng_seed(3)
    assert not torch.isin(noise_svi.run(100, data, progress=False), losses).any()


@pytest.mark.slow
def test_noise_is_independent_across_sites_and_rows():
    """The draws, seen through a buffer: no correlation above 5 / sqrt(n); false alarms over all pairs: 4e-5."""
    seen, n = torch.zeros(6), 4000

    def watching(x):
        with pyro.plate("data", 2):
            a = pyro.sample("a", dist.Normal(pyro.param("loc", lambda: torch.tensor(0.0)), 1.0))
            b = pyro.sample("b", dist.Uniform(0.0, 2.0))
            c = pyro.sample("c", dist.Normal(0.0, 1.0))
        seen.copy_(torch.cat([a, b, c]).detach())

    def silent(x):
        with pyro.plate("data", 2):
            for name, fn in (("a", dist.Normal(0.0, 1.0)), ("b", dist.Uniform(0.0, 2.0)), ("c", dist.Normal(0.0, 1.0))):
                pyro.sample(name, fn)

    svi = pe.SVI(silent, watching, pyro.optim.SGD({"lr": 0.0}), sampled(), compile=True)
    draws = torch.empty(n, 6)
    for i in range(n):
        svi.step(X)
        draws[i] = seen
    correlation = torch.corrcoef(torch.cat([draws[1:], draws[:-1]], 1).T) - torch.eye(12)
    assert correlation.abs().max() < 5 / math.sqrt(n)
    mean, sd = torch.tensor([0.0, 0, 1, 1, 0, 0]), torch.tensor([1.0, 1, 3**-0.5, 3**-0.5, 1, 1])
    assert ((draws.mean(0) - mean).abs() < 5 * sd / math.sqrt(n)).all()
    assert ((draws.std(0) / sd - 1).abs() < 5 * 0.71 / math.sqrt(n)).all()
