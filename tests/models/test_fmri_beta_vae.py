"""The linear β-VAE against its objective in closed form, its simulator against what it states, and its example."""

import math

import arviz as az
import numpy as np
import pytest
import torch

import pyro_elbo as pe
from examples import fmri_beta_vae as example
from models.fmri_beta_vae import Simulator, TaskVAE, covariance_within, matched_cosines, optimum

D, K, N = 7, 3, 40


def objective(maps, noise, beta, cov):
    """The weighted bound per trial at the best encoder, of data with mean 0: the formula of the module, in nats."""
    tempered = beta * noise**2
    m = maps.T @ maps + tempered * torch.eye(maps.shape[1])
    whole = maps @ maps.T + tempered * torch.eye(len(cov))
    evidence = -0.5 * (len(cov) * math.log(2 * math.pi) + torch.logdet(whole) + torch.linalg.solve(whole, cov).trace())
    lost = (m.diagonal().log().sum() - torch.logdet(m)) / 2
    const = len(cov) / 2 * (beta * (2 * math.pi * tempered).log() - (2 * math.pi * noise**2).log())
    return beta * (evidence - lost) + const


def double_data():
    torch.set_default_dtype(torch.float64)
    x = torch.randn(N, D) * torch.tensor([5.0, 3.0, 2.0, 1.0, 1.0, 0.9, 0.8])
    x = (x - x.mean(0)) @ torch.linalg.qr(torch.randn(D, D))[0]
    return x, x.T @ x / N


@torch.no_grad()
def with_best_encoder(maps, noise, beta):
    """A model of one subject without an offset, whose encoder is the best diagonal one."""
    vae = TaskVAE(D, 1, task_dim=K, subject_dim=1)
    m = maps.T @ maps + beta * noise**2 * torch.eye(K)
    vae.task_maps.copy_(maps)
    vae.subject_maps.zero_()
    vae.raw_noise.copy_(torch.special.expm1(noise - 1e-2).log())
    vae.raw_subject_scale.fill_(math.log(math.expm1(1 - 1e-4)))
    vae.encoder.weight.copy_(torch.cat([torch.linalg.solve(m, maps.T), torch.zeros(K, 1)], 1))
    vae.encoder.bias.zero_()
    vae.raw_task_scale.copy_(torch.special.expm1((beta * noise**2 / m.diagonal()).sqrt() - 1e-4).log())
    return vae


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_objective_at_the_best_encoder_is_the_formula(beta):
    x, cov = double_data()
    maps, noise = torch.randn(D, K), torch.tensor(0.8)  # oblique columns, which a diagonal posterior pays for
    vae, loss = with_best_encoder(maps, noise, beta), pe.TraceBeta_ELBO(beta={"z_task": beta})
    subject = torch.zeros(N, dtype=torch.long)
    with torch.no_grad():
        drawn = torch.stack([loss.terms(vae.model, vae.guide, x, subject).per_datum.objective for _ in range(60)])
    # 5 SE of 60 values: a false alarm in 100 000
    assert abs(drawn.mean() - objective(maps, noise, beta, cov)) < 5 * drawn.std() / 60**0.5


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
def test_optimum_is_stationary_and_higher_than_around_it(beta):
    _, cov = double_data()
    best = optimum(cov, K, beta)
    maps, noise = best.maps.requires_grad_(), torch.tensor(best.noise, requires_grad=True)
    top = objective(maps, noise, beta, cov)
    for gradient in torch.autograd.grad(top, (maps, noise)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)
    for _ in range(20):
        near = objective(maps + 0.1 * torch.randn(D, K), noise * (1 + 0.1 * torch.randn(())), beta, cov)
        assert near < top


def test_rotation_costs_what_a_diagonal_posterior_loses_times_beta():
    _, cov = double_data()
    rotation = torch.linalg.qr(torch.randn(K, K))[0]
    for beta in (1e-3, 0.5):
        maps, noise = optimum(cov, K, beta)
        turned, noise = maps @ rotation, torch.tensor(noise)
        m = turned.T @ turned + beta * noise**2 * torch.eye(K)
        lost = (m.diagonal().log().sum() - torch.logdet(m)) / 2
        cost = objective(maps, noise, beta, cov) - objective(turned, noise, beta, cov)
        torch.testing.assert_close(cost, beta * lost)
        assert lost > 0.1


def test_large_beta_prunes_the_weaker_axes():
    """With β = 2 three axes give σ² = 7 / (10 - 6) and 4 > 2σ²; a fourth would give 6 / (10 - 8) and 1 < 2σ²."""
    cov = torch.diag(torch.tensor([20.0, 8.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    kept = [int((optimum(cov, 4, beta).maps.norm(dim=0) > 0).sum()) for beta in (0.5, 2.0, 4.0, 9.0, 50.0)]
    assert kept == [4, 3, 1, 0, 0]
    assert optimum(cov, 4, 50.0).noise ** 2 == pytest.approx(cov.trace().item() / 10)


def test_columns_are_matched_whatever_their_order_sign_and_length():
    truth = torch.linalg.qr(torch.randn(D, K))[0]
    maps = torch.stack([truth[:, 2] * -3, torch.zeros(D), truth[:, 0] * 0.1, truth[:, 1] + 0.75 * truth[:, 0]], 1)
    cosines, columns = matched_cosines(maps, truth)
    torch.testing.assert_close(cosines, torch.tensor([1.0, 0.8, 1.0]))
    assert columns.tolist() == [2, 3, 0]
    assert matched_cosines(torch.zeros(D, K), truth)[0].tolist() == [0.0] * K


def test_simulator_has_the_contrasts_that_it_states():
    simulator = Simulator(repeats=50)
    x, subject, levels = simulator.draw(3)
    torch.testing.assert_close(simulator.contrasts.T @ simulator.contrasts, torch.eye(3))
    for s in range(simulator.subjects):
        seen = levels[subject == s]
        torch.testing.assert_close(seen.T @ seen / len(seen), torch.eye(3))
        assert seen.mean(0).tolist() == [0.0] * 3
    effects = levels.T @ x / len(x)  # every subject sees each level equally often: offsets cancel
    error = effects - (simulator.contrasts * torch.tensor(simulator.amplitudes)).T
    assert error.abs().max() < 5 / len(x) ** 0.5  # 432 voxels of noise 1: 5 SE
    assert (x[subject == 2].mean(0) - simulator.offsets[2]).abs().max() < 5 / (len(x) / simulator.subjects) ** 0.5


def test_covariance_within_subjects_ignores_their_offsets():
    x, subject = torch.randn(N, D, dtype=torch.float64), torch.arange(N) % 3
    expected = sum(torch.cov(x[subject == s].T, correction=0) * (subject == s).sum() for s in range(3)) / N
    shifted = x + 10 * torch.randn(3, D, dtype=torch.float64)[subject]
    torch.testing.assert_close(covariance_within(shifted, subject), expected)


@pytest.mark.parametrize("options", [{}, {"num_particles": 3, "vectorize_particles": True}])
def test_terms_have_the_plates_of_their_latents_and_every_parameter_a_gradient(options):
    x, subject, _ = Simulator(repeats=1).draw(0)
    vae = TaskVAE(x.shape[1], 8)
    loss = pe.TraceBeta_ELBO(**options)
    terms = loss.terms(vae.model, vae.guide, x, subject)
    assert terms.num_data == len(x)
    assert terms.kl["z_task"].shape == (len(x),)
    assert terms.kl["z_subject"].shape == (8,)
    assert terms.is_analytic == {"z_subject": True, "z_task": True}
    loss.loss_and_grads(vae.model, vae.guide, x, subject)
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in vae.parameters())


def test_walk_is_a_line_between_the_means_of_the_conditions():
    x, subject, levels = Simulator(repeats=1).draw(0)
    vae = TaskVAE(x.shape[1], 8)
    high = levels[:, 0] > 0
    path = example.walk(vae, x, subject, high, ~high, column=4)
    with torch.no_grad():
        z = vae.encode(x, vae.subject_loc[subject])[0][:, 4]
        step = (z[high].mean() - z[~high].mean()) / 4 * vae.task_maps[:, 4]
    torch.testing.assert_close(path.diff(dim=0), step.expand(4, -1), rtol=1e-4, atol=1e-5)
    assert example.correlation(x[0], x[1]) == pytest.approx(np.corrcoef(x[0], x[1])[0, 1], abs=1e-5)


def test_permutations_stay_within_runs():
    """Of two runs, each with a face and a house, only the four signs of their differences can arise."""
    x, maps = torch.randn(4, D), torch.randn(D, 2)
    blocks = example.Blocks(x, torch.tensor([0, 0, 1, 1]), np.array(["face", "house"] * 2), np.ones(D, bool))
    first, second = x[0] - x[1], x[2] - x[3]
    possible = torch.stack(
        [torch.cosine_similarity(maps, d[:, None], dim=0).abs().max() for d in (first + second, first - second)]
    )
    null = example.permuted(blocks, maps, draws=60, seed=0)
    nearest = (null[:, None] - possible).abs()
    assert nearest.min(1).values.max() < 1e-6
    assert nearest.argmin(1).unique().tolist() == [0, 1]  # both arise


@pytest.mark.slow
def test_example_on_its_simulator(tmp_path, capsys):
    example.main(None, tmp_path, smoke_test=True)
    assert "worst cosine " in capsys.readouterr().out
    assert (tmp_path / "fmri_beta_vae.png").stat().st_size > 20_000
    posterior = az.from_netcdf(str(tmp_path / "posterior.nc"))["posterior"]
    assert posterior["z_task"].dims == ("chain", "draw", "trials", "z_task_dim_0")
    assert posterior["z_subject"].dims == ("chain", "draw", "subjects", "z_subject_dim_0")


def test_blocks_of_haxby(data_dir):
    blocks = example.read(data_dir / "haxby2001_slice.npz")
    assert blocks.x.shape == (96, 530)
    assert all(len(set(blocks.category[blocks.run == r])) == 8 for r in range(12))


@pytest.mark.slow
@pytest.mark.thorough
def test_example_on_haxby(data_dir, tmp_path, capsys):
    example.main(data_dir / "haxby2001_slice.npz", tmp_path, smoke_test=True)
    assert "best cosine with faces - houses" in capsys.readouterr().out


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(20))
def test_every_seed_finds_the_contrasts(seed):
    simulator = Simulator()
    trials = simulator.draw(seed)
    vae, kl, _ = example.train(trials.x, trials.subject, 4.0, seed, steps=600)
    cosines, _ = matched_cosines(vae.task_maps.detach() * (kl > example.ACTIVE), simulator.contrasts)
    assert cosines.min() >= 0.9
