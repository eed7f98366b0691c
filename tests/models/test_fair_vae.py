"""The fair autoencoder against its exact linear case and its own probabilities; and the columns of Adult."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from torch.nn.functional import one_hot

import pyro_elbo as pe
from models.fair_vae import FairVAE, Table, load_adult
from tests.support.compiled import _interpreted, assert_same  # noqa: F401  (fixtures work by name)

NUMERIC, GROUPS, N = 3, {"job": 4, "home": 2}, 60


def table(s_levels=2):
    s, y = torch.arange(N) % s_levels, (torch.rand(N) < 0.4).double()
    levels = [one_hot(torch.randint(size, (N,)), size) for size in GROUPS.values()]
    return Table(torch.cat([torch.randn(N, NUMERIC) + s[:, None], *levels], 1), s, y)


def make(**options):
    pyro.set_rng_seed(1)
    return FairVAE(NUMERIC, GROUPS, **{"z_dim": 3, "hidden": (8,)} | options)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def raw(scale, least):
    """The inverse of softplus plus the least scale."""
    return torch.special.expm1(scale - least).log()


@torch.no_grad()
def exact(columns=4, z_dim=2):
    """A linear model whose posterior is diagonal, with the encoder that is its posterior."""
    vae = FairVAE(columns, {}, z_dim=z_dim, hidden=(), target=False)
    noise = torch.linspace(0.5, 1.2, columns)
    weight = torch.linalg.qr(torch.randn(columns, z_dim))[0] * torch.tensor([1.5, 0.8]) * noise[:, None]
    of_s, bias = torch.randn(columns, 2), torch.randn(columns)
    vae.decoder[0].weight.copy_(torch.cat([weight, of_s], 1))
    vae.decoder[0].bias.copy_(bias)
    vae.raw_scale.copy_(raw(noise, 1e-2))
    precision = 1 + (weight / noise[:, None]).square().sum(0)
    gain = (weight / noise[:, None].square()).T / precision[:, None]
    vae.encoder[0].weight.copy_(torch.cat([gain, -gain @ of_s], 1))
    vae.encoder[0].bias.copy_(-gain @ bias)
    vae.shared_scale.copy_(raw(precision.rsqrt(), 1e-4))
    evidence = torch.distributions.MultivariateNormal(torch.zeros(columns), weight @ weight.T + noise.square().diag())
    return vae, lambda x, s: evidence.log_prob(x - bias - of_s.T[s])


def test_exact_linear_encoder_has_the_evidence_as_bound_without_variance():
    vae, evidence = exact()
    x, s = torch.randn(N, 4), torch.arange(N) % 2
    terms = pe.TraceBeta_ELBO(kl="sampled").terms(vae.model, vae.guide, x, s)
    per_datum = terms.log_likelihood["x_numeric"] - terms.kl["z"]
    torch.testing.assert_close(per_datum, evidence(x, s), rtol=0, atol=1e-10)
    torch.testing.assert_close(terms.log_likelihood["s"], torch.full((N,), -math.log(2)))


def test_sites_and_shapes():
    vae, data = make(), table()
    terms = pe.TraceBeta_ELBO().terms(vae.model, vae.guide, *data)
    assert set(terms.log_likelihood) == {"s", "x_numeric", "x_job", "x_home", "y"}
    assert all(x.shape == (N,) for x in terms.log_likelihood.values())
    assert terms.is_analytic["z"]
    torch.testing.assert_close(terms.kl_per_dim["z"].sum(-1), terms.kl["z"])
    unsupervised = pe.TraceBeta_ELBO().terms(vae.model, vae.guide, data.x, data.s)
    assert set(unsupervised.log_likelihood) == {"s", "x_numeric", "x_job", "x_home"}
    headless = make(target=False)
    assert "y" not in pe.TraceBeta_ELBO().terms(headless.model, headless.guide, *data).log_likelihood


def log_prob(vae, z, x, s, y=None):
    """Log-probabilities of the observed sites given z."""
    trace = poutine.trace(poutine.condition(vae.model, {"z": z})).get_trace(x, s, y)
    trace.compute_log_prob()
    return {name: site["log_prob"] for name, site in trace.nodes.items() if site.get("is_observed")}


@pytest.mark.parametrize("s_levels", [2, 4])
def test_probabilities_of_a_group_add_up_to_one(s_levels):
    vae, data, z = make(s_levels=s_levels), table(s_levels), torch.randn(N, 3)
    start = NUMERIC
    for name, size in GROUPS.items():
        total = torch.zeros(N)
        for level in range(size):
            x = data.x.clone()
            x[:, start : start + size] = one_hot(torch.tensor(level), size).double()
            total += log_prob(vae, z, x, data.s)[f"x_{name}"].exp()
        torch.testing.assert_close(total, torch.ones(N))
        start += size


def test_decoder_is_told_s_and_the_head_is_not():
    vae, data, z = make(), table(), torch.randn(N, 3)
    here, there = (log_prob(vae, z, data.x, s, data.y) for s in (data.s, 1 - data.s))
    assert all((here[name] != there[name]).all() for name in ("x_numeric", "x_job", "x_home"))
    torch.testing.assert_close(here["y"], there["y"], rtol=0, atol=0)


def test_weight_of_the_target_multiplies_its_share_alone():
    data, totals = table(), []
    for weight in (1.0, 20.0):
        vae = make(target_weight=weight)
        pyro.clear_param_store()
        terms = pe.TraceBeta_ELBO().terms(vae.model, vae.guide, *data)
        totals.append(terms.log_likelihood_total | terms.kl_total)
    once, often = totals
    torch.testing.assert_close(often["y"], 20 * once["y"])
    assert all(often[name] == once[name] for name in once if name != "y")


def test_minibatch_stands_for_the_full_data():
    vae, data = make(size=10 * N), table()
    terms = pe.TraceBeta_ELBO().terms(vae.model, vae.guide, *data)
    assert terms.num_data == 10 * N
    assert set(terms.scale.values()) == {10.0}
    torch.testing.assert_close(terms.kl_total["z"], 10 * terms.kl["z"].sum())


ESTIMATORS = ["aggregate", "variational", "club", "adversarial", "hsic"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_penalty_reaches_the_encoder(estimator):
    vae, data = make(), table()
    loss = pe.TraceMI_ELBO("z", attribute="s", weight=5.0, estimator=estimator)
    nats = loss.terms(vae.model, vae.guide, *data).penalties["I(z; s)"].nats
    nats.backward()
    assert nats.isfinite()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in vae.encoder.parameters())


@pytest.mark.parametrize("hidden", [(), (8,), (8, 5)])
def test_gradient_reaches_every_parameter(hidden):
    vae = make(hidden=hidden)
    data = table()._replace(s=(torch.rand(N) < 0.3).long())  # at equal shares the prior of s would be at its optimum
    pe.TraceMI_ELBO("z", attribute="s").loss_and_grads(vae.model, vae.guide, *data)
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in vae.parameters())


@pytest.mark.parametrize("estimator", ["aggregate", "adversarial"])
def test_compiled_equals_uncompiled(interpreted, estimator):
    data = table()

    def scenario(svi_of):
        vae = make(target_weight=7.0)
        loss = pe.TraceMI_ELBO("z", attribute="s", weight=5.0, estimator=estimator)
        svi = svi_of(vae.model, vae.guide, torch.optim.Adam(vae.parameters(), 0.01), loss)
        return [svi.step(*data) for _ in range(4)], vae.state_dict()

    assert_same(scenario)


def test_draws_have_the_moments_of_the_encoder_and_a_seed():
    vae, data = make(), table()
    with torch.no_grad():
        loc, scale = vae.encode(data.x, data.s)
    noise = torch.stack([(vae.draw(data.x, data.s, seed) - loc) / scale for seed in range(50)])
    # 9000 standard normals: 5 SE, a false alarm in a million
    assert abs(noise.mean()) < 5 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 5 * (2 / noise.numel()) ** 0.5
    torch.testing.assert_close(vae.draw(data.x, data.s, 3), vae.draw(data.x, data.s, 3), rtol=0, atol=0)


def test_columns_of_adult(data_dir):
    train, test, groups = load_adult(data_dir / "adult.npz")
    assert [len(t.x) for t in (train, test)] == [32561, 16281]
    assert list(groups.values()) == [9, 16, 7, 15, 6, 5, 42]
    assert "sex" not in groups
    numbers, levels = train.x[:, :6], train.x[:, 6:]
    torch.testing.assert_close(numbers.mean(0), torch.zeros(6, dtype=torch.float32), rtol=0, atol=1e-4)
    torch.testing.assert_close(numbers.var(0), torch.ones(6, dtype=torch.float32), rtol=0, atol=1e-3)
    for t in (train, test):
        assert all((part.sum(1) == 1).all() for part in t.x[:, 6:].split(list(groups.values()), 1))
    assert levels.unique().tolist() == [0, 1]
    assert (test.s.double().mean() - 0.667).abs() < 1e-3
    assert (test.y.double().mean() - 0.236).abs() < 1e-3
