"""Likelihoods against formulas, sites of a lattice against the truth, patches of the simulator; and the example."""

import math

import arviz as az
import numpy as np
import pytest
import torch
from pyro import poutine

import pyro_elbo as pe
from examples import microscopy
from models.microscopy import KINDS, SIDE, Lattice, PatchVAE, brightness, cut_patches, find_sites, load_mos2


@pytest.mark.parametrize("likelihood", ["laplace", "gaussian"])
def test_likelihood_is_its_formula_at_the_draw(likelihood):
    x, vae = torch.randn(5, SIDE, SIDE), PatchVAE(likelihood, z_dim=3, channels=2)
    drawn = poutine.trace(vae.guide).get_trace(x)
    seen = poutine.trace(poutine.replay(vae.model, drawn)).get_trace(x)
    seen.compute_log_prob()
    off = (x - vae.decode(drawn.nodes["z"]["value"])).abs()
    per_pixel = {
        "laplace": -off / vae.scale - (2 * vae.scale).log(),
        "gaussian": -((off / vae.scale) ** 2) / 2 - (vae.scale * math.sqrt(2 * math.pi)).log(),
    }[likelihood]
    torch.testing.assert_close(seen.nodes["x"]["log_prob"], per_pixel.sum((1, 2)))
    assert pe.TraceBeta_ELBO().terms(vae.model, vae.guide, x).is_analytic["z"]


def test_gradients_reach_every_parameter():
    vae = PatchVAE("laplace", channels=2)
    pe.TraceBeta_ELBO()(vae.model, vae.guide)(torch.randn(5, SIDE, SIDE)).backward()
    assert all(p.grad.isfinite().all() and (p.grad != 0).any() for p in vae.parameters())


def test_vectorized_particles_decode_alike():
    vae, z = PatchVAE("gaussian", channels=2), torch.randn(3, 5, 4)
    torch.testing.assert_close(vae.decode(z)[1], vae.decode(z[1]))


def test_an_unknown_likelihood_is_named():
    with pytest.raises(ValueError, match="likelihood must be one of .*'gaussian', 'laplace'.*, got 'normal'"):
        PatchVAE("normal")


def test_kinds_differ_where_they_should():
    lattice, still = Lattice(), torch.zeros(5, 2)
    images = lattice.image(torch.arange(5), still)
    y = x = (SIDE - 1) / 2
    blob = torch.exp(-((torch.arange(SIDE) - y)[:, None] ** 2 + (torch.arange(SIDE) - x) ** 2) / (2 * lattice.width**2))
    for kind, height in (("vacancy", -1.0), ("brighter atom", 0.6), ("dimmer atom", -0.5)):
        torch.testing.assert_close(images[KINDS.index(kind)] - images[0], height * blob)
    extra = images[KINDS.index("interstitial")] - images[0]
    assert extra[7:9].argmax(1).tolist() == [11, 11]  # half a spacing, 4 pixels, right of the center at 7.5


def test_noise_is_poisson_and_scratches_come_as_often_as_stated():
    lattice = Lattice(jitter=0.0, scratched=0.0)
    x, kinds = lattice.draw(2000, 0)
    clean = lattice.image(kinds, torch.zeros(2000, 2))
    variance, mean = clean.var(), clean.mean()
    counts = (x * (variance + mean / lattice.dose).sqrt() + mean) * lattice.dose
    dispersion = ((counts - lattice.dose * clean) ** 2 / (lattice.dose * clean)).mean()
    assert (
        abs(dispersion - 1) < 5 * (2.2 / counts.numel()) ** 0.5
    )  # variance of each: 2 + 1 / (dose * clean), at most 2.5
    scratched, _ = Lattice(dose=1e4, brightness=50.0).draw(2000, 0)
    share = (scratched.flatten(1).amax(1) > 20).double().mean()
    assert abs(share - 0.4) < 5 * (0.24 / 2000) ** 0.5


def lattice_image(missing, side=360, spacing=24.0):
    """Blobs of a slightly turned and bent triangular lattice, one of them missing; the image and the true places."""
    i, j = (n.flatten() for n in np.meshgrid(np.arange(-15, 16), np.arange(-15, 16), indexing="ij"))
    row, column = spacing * 3**0.5 / 2 * i, spacing * (j + i / 2)
    turn = 0.05
    row, column = row * np.cos(turn) - column * np.sin(turn), row * np.sin(turn) + column * np.cos(turn)
    places = np.stack([row + 2e-5 * column**2, column], 1) + side / 2
    gap = np.linalg.norm(places - missing, axis=1).argmin()
    rows, columns = (np.exp(-((np.arange(side) - p[:, None]) ** 2) / (2 * 4.0**2)) for p in places.T)
    rows[gap] = 0.0
    return rows.T @ columns, places, places[gap]


def test_all_sites_of_a_bent_lattice_are_found_with_the_empty_one():
    image, places, gap = lattice_image(missing=(200.0, 150.0))
    sites = find_sites(image)
    inside = places[((places > SIDE + 2) & (places < 360 - SIDE - 2)).all(1)]
    nearest = np.linalg.norm(inside[:, None] - sites, axis=-1).min(1)
    assert nearest.max() < 1.0
    assert np.linalg.norm(sites[:, None] - places, axis=-1).min(1).max() < 1.0
    bright = brightness(image + 1e-2 * np.random.default_rng(0).normal(size=image.shape), sites)
    assert np.linalg.norm(sites[bright.argmin()] - gap) < 1.0


def test_patches_sample_a_wave_at_their_pixels():
    wave = lambda rows: np.sin(2 * np.pi * rows / 24)  # noqa: E731
    sites = np.array([[200.25, 199.5], [190.0, 210.75]])
    patches = cut_patches(np.repeat(wave(np.arange(400.0))[:, None], 400, 1), sites, step=1.5)
    expected = np.stack([wave(row + 1.5 * (np.arange(SIDE) - 7.5)) for row in sites[:, 0]])
    expected = (expected - expected.mean()) / expected.std()
    torch.testing.assert_close(
        patches, torch.tensor(expected).float()[..., None].expand(-1, -1, SIDE), atol=0.02, rtol=0
    )


def test_sites_of_mos2(data_dir):
    image, nm = load_mos2(data_dir / "stem_mos2_se.npz")
    sites = find_sites(image)
    assert 2000 < len(sites) < 2100
    steps = np.sort(np.linalg.norm(sites[:, None] - sites, axis=-1), axis=1)[:, 1]
    assert abs(nm * np.median(steps) - 0.316) < 0.03  # lattice constant of MoS2 in nm
    vacancies, hole = microscopy.dark_sites(brightness(image, sites), sites)
    assert hole.sum() >= 5
    assert np.linalg.norm(sites[hole].mean(0) - [680, 545]) < 20


def test_interval_is_students():
    mean, low, high = microscopy.interval(np.array([1.0, 2.0, 3.0]))
    assert mean == 2.0
    assert high - mean == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert mean - low == pytest.approx(high - mean)


@pytest.mark.slow
def test_example_on_its_simulator(tmp_path, capsys):
    microscopy.main(None, tmp_path, smoke_test=True)
    assert "95 % interval over 3 seeds" in capsys.readouterr().out
    assert (tmp_path / "microscopy.png").stat().st_size > 10_000
    data = az.from_netcdf(str(tmp_path / "posterior.nc"))
    assert data["posterior"]["z"].sizes["sites"] == 100


def test_claim_fails_without_a_gain():
    with pytest.raises(AssertionError, match="Laplace must gain more than 0.1"):
        microscopy.judge_kinds(np.array([[0.5, 0.45], [0.5, 0.55], [0.4, 0.35]]))


@pytest.mark.thorough
def test_example_on_mos2(data_dir, tmp_path, capsys):
    microscopy.main(data_dir / "stem_mos2_se.npz", tmp_path)
    assert "hole against vacancies" in capsys.readouterr().out
