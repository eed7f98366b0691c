"""Products of experts against a grid, likelihoods against scipy, hidden modalities against NaN; and the example."""

import itertools
import math

import arviz as az
import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from pyro import poutine
from torch.nn.functional import softplus

import pyro_elbo as pe
from examples import multi_omics
from models.multi_omics import Cells, MultiOmics, Simulator, hide, load_scicar, product_of_experts

N, GENES, PEAKS = 6, 5, 7
BOTH = torch.ones(N, 2, dtype=torch.bool)


@pytest.fixture
def _double():
    torch.set_default_dtype(torch.float64)


def make_cells(seen=BOTH):
    genes = torch.poisson(torch.full((N, GENES), 3.0))
    return Cells(genes, torch.bernoulli(torch.full((N, PEAKS), 0.4)), seen)


def make(cells, **options):
    omics = MultiOmics(cells, **{"z_dim": 2, "hidden": 3} | options)
    with torch.no_grad():
        omics.loading_loc.normal_()
        omics.raw_dispersion.normal_()
    return omics


@pytest.mark.usefixtures("_double")
def test_product_of_experts_is_the_normalized_product_on_a_grid():
    seen = torch.tensor(list(itertools.product([False, True], repeat=3))).T
    locs, scales = torch.randn(3, 8, 1), 0.3 + torch.rand(3, 8, 1)
    loc, scale = product_of_experts(locs, scales, seen)
    z = torch.linspace(-12, 12, 8001)
    log_product = -z.square().expand(8, -1) / 2
    for m in range(3):
        log_product = log_product - seen[m, :, None] * ((z - locs[m]) / scales[m]).square() / 2
    weight = log_product.softmax(-1)
    mean = (weight * z).sum(-1, keepdim=True)
    torch.testing.assert_close(loc, mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(scale, (weight * (z - mean).square()).sum(-1, keepdim=True).sqrt(), rtol=0, atol=1e-9)


@pytest.mark.usefixtures("_double")
def test_a_cell_without_data_has_the_prior_and_no_likelihood():
    seen = BOTH.clone()
    seen[0] = False
    cells = make_cells(seen)
    omics = make(cells)
    loc, scale = omics.encode(cells)
    assert loc[0].tolist() == [0, 0]
    assert scale[0].tolist() == [1, 1]
    terms = pe.TraceBeta_ELBO().terms(omics.model, omics.guide, *cells)
    assert terms.is_analytic["z"]
    assert [t[0].item() for t in (terms.kl["z"], *terms.log_likelihood.values())] == [0, 0, 0]
    assert (terms.kl["z"][1:] > 0).all()


@pytest.mark.parametrize("column", [0, 1])
def test_a_hidden_modality_has_no_effect_and_no_gradient(column):
    seen = BOTH.clone()
    seen[:, column] = False
    cells = make_cells(seen)
    omics = make(cells)
    objectives, damaged = [], cells._replace(**{Cells._fields[column]: torch.full_like(cells[column], math.nan)})
    for x in (cells, damaged):
        pyro.set_rng_seed(0)
        loss = pe.TraceBeta_ELBO()(omics.model, omics.guide)(*x)
        objectives.append(loss.item())
    assert objectives[0] == objectives[1]
    loss.backward()
    gradients = {name: p.grad for name, p in omics.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in gradients.values())
    hidden = [g for name, g in gradients.items() if name.startswith(f"experts.{column}")]
    shown = [g for name, g in gradients.items() if name.startswith(f"experts.{1 - column}")]
    assert all((g == 0).all() for g in hidden)
    assert all((g != 0).any() for g in shown)


@pytest.mark.usefixtures("_double")
def test_likelihoods_are_those_of_scipy_at_the_stated_means():
    cells = make_cells()
    omics, z = make(cells), torch.randn(N, 2)
    loadings = torch.randn(2, GENES + PEAKS)
    of_genes, of_peaks = omics.likelihoods(z, loadings, cells)
    linear = (omics.profile + z @ loadings).detach()
    mean = cells.genes.sum(1, keepdim=True) * linear[:, :GENES].softmax(-1)
    torch.testing.assert_close(of_genes.mean.detach(), mean)
    size = (softplus(omics.raw_dispersion) + 1e-3).detach()
    expected = scipy.stats.nbinom.logpmf(cells.genes, size, size / (size + mean)).sum(1)
    torch.testing.assert_close(of_genes.log_prob(cells.genes).detach(), torch.tensor(expected))
    torch.testing.assert_close(of_genes.variance.detach(), mean + mean**2 / size)
    opened = cells.peaks.sum(1, keepdim=True)
    logits = linear[:, GENES:] + (opened / opened.mean()).log()
    expected = scipy.stats.bernoulli.logpmf(cells.peaks, logits.sigmoid()).sum(1)
    torch.testing.assert_close(of_peaks.log_prob(cells.peaks).detach(), torch.tensor(expected))


@pytest.mark.usefixtures("_double")
def test_predictive_density_is_the_integral_over_z():
    cells = make_cells()
    omics = make(cells, z_dim=1)
    with torch.no_grad():
        omics.loading_raw.fill_(-50.0)
    shown = cells.only(peaks=True)
    loc, scale = (x.detach() for x in omics.encode(shown))
    z = torch.linspace(-8, 8, 2001)
    log_density = torch.distributions.Normal(loc, scale).log_prob(z)
    given, _ = omics.likelihoods(z[:, None, None].expand(-1, N, -1), omics.loading_loc, cells)
    exact = (log_density.T + given.log_prob(cells.genes).detach()).logsumexp(0) + math.log(8 / 1000)
    batches = torch.stack([omics.log_predictive(shown, cells, draws=50)[0] for _ in range(8)])
    error = batches.std(0) / 8**0.5
    assert ((batches.mean(0) - exact).abs() < 6 * error + 5e-3).all()  # 5e-3: the least scale of the loadings


@pytest.mark.usefixtures("_double")
def test_program_without_latents_is_the_model_at_zero():
    cells = make_cells(hide(make_cells(), 0.3, 0).seen)
    omics = make(cells)
    plain = pe.TraceBeta_ELBO().terms(omics.means, multi_omics.no_latents, *cells)
    latents = {"z": torch.zeros(N, 2), "loadings": torch.randn(2, GENES + PEAKS)}
    trace = poutine.trace(poutine.condition(omics.model, latents)).get_trace(*cells)
    trace.compute_log_prob()
    for name in ("genes", "peaks"):
        torch.testing.assert_close(plain.log_likelihood[name], trace.nodes[name]["log_prob"])


def test_minibatches_scale_the_cells_and_not_the_loadings():
    cells = make_cells()
    omics = make(cells)
    whole = pe.TraceBeta_ELBO().terms(omics.model, omics.guide, *cells)
    half = pe.TraceBeta_ELBO().terms(omics.model, omics.guide, *cells.rows(torch.arange(3)))
    torch.testing.assert_close(half.rate - half.kl["loadings"], 2 * whole.kl["z"][:3].sum())
    assert whole.kl["loadings"].shape == ()


def test_simulator_states_the_law_of_its_cells():
    simulator = Simulator(programs=2, genes=6, peaks=8, others=4)
    cells, z = simulator.draw(4000, 0)
    of_genes, of_peaks = simulator.loadings()
    assert (of_genes.shape, of_peaks.shape) == ((2, 16), (2, 24))
    assert ((of_genes != 0).sum(0) <= 1).all()
    assert [cells.genes.shape, cells.peaks.shape] == [(4000, 16), (4000, 24)]
    assert abs(z.mean()) < 5 / 8000**0.5
    shares = torch.log((cells.genes + 0.5) / (cells.genes + 0.5).sum(1, keepdim=True))
    contrast = shares - shares[:, 12:].mean(1, keepdim=True)  # genes of no program have slope 0
    slopes = (z.T @ contrast) / 4000
    assert np.corrcoef(slopes.flatten(), of_genes.flatten())[0, 1] > 0.98


def test_hidden_shares():
    seen = hide(Simulator(genes=1, peaks=1, others=1).draw(4000, 0)[0], 0.25, 3).seen
    assert seen.any(1).all()
    for hidden in (~seen).double().mean(0):
        assert abs(hidden - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5


def test_cells_of_scicar(data_dir):
    cells, hours = load_scicar(data_dir / "scicar_a549_small.npz")
    assert (cells.genes.shape, cells.peaks.shape) == ((2641, 1185), (2641, 2000))
    assert hours.unique(return_counts=True)[1].tolist() == [583, 983, 1075]
    assert cells.peaks.unique().tolist() == [0, 1]


@pytest.mark.slow
def test_example_on_its_simulator(tmp_path, capsys):
    multi_omics.main(None, tmp_path, smoke_test=True)
    assert "least |r| of the 4 programs" in capsys.readouterr().out
    assert (tmp_path / "multi_omics.png").stat().st_size > 10_000
    data = az.from_netcdf(str(tmp_path / "posterior.nc"))
    assert data["posterior"]["loadings"].dims == ("chain", "draw", "latent", "feature")
    assert np.isfinite(data["training"]["elbo"].sel(split="train")).all()


@pytest.mark.slow
@pytest.mark.thorough
def test_example_fails_where_a_program_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(multi_omics, "match", lambda z, programs: (np.arange(4), np.full((4, 6), 0.5)))
    with pytest.raises(AssertionError, match="every program must be one latent"):
        multi_omics.main(None, tmp_path, smoke_test=True)


@pytest.mark.thorough
def test_example_on_scicar(data_dir, tmp_path, capsys):
    multi_omics.main(data_dir / "scicar_a549_small.npz", tmp_path)
    assert "gain of sharing z" in capsys.readouterr().out
