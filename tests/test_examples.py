"""The examples run as a user runs them; each ends in a claim that it checks itself."""

import arviz as az
import numpy as np
import pytest
import torch
import xarray

import examples.posteriordb as reference
from examples import (
    em_mixture,
    fair_representation,
    generalization,
    hmm_segments,
    quickstart,
    rate_distortion,
    svi_script,
    training_pathologies,
    trust_the_posterior,
    vrnn_digits,
    vrnn_music,
)
from models.posteriordb import POSTERIORS

pytestmark = pytest.mark.slow


def test_quickstart(tmp_path, capsys):
    quickstart.main(tmp_path, max_epochs=20)  # those of the warm-up
    printed = capsys.readouterr().out
    assert "active units: " in printed
    assert "k-hat per row of 'data'" in printed
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    data = az.from_netcdf(str(tmp_path / "posterior.nc"))
    assert dict(data["posterior"].sizes) == {"chain": 1, "draw": 400, "data": 297, "z_dim_0": 8}
    with xarray.open_dataset(tmp_path / "history.nc", engine="h5netcdf") as history:
        assert np.isfinite(history.elbo).all()
    assert {"best.ckpt", "last.ckpt"} <= {p.name for p in tmp_path.iterdir()}


def test_svi_script(capsys):
    svi_script.main()
    assert "KL in nats" in capsys.readouterr().out


def test_generalization_compares_and_draws(tmp_path):
    data = generalization.simulate(200)
    fits = {name: generalization.fit(data, 0.0, epochs=2, seed=0) for name in generalization.COLORS}
    assert fits["no decay"].comparison.rows == (100, 100)
    generalization.draw(fits, -20.0, tmp_path / "generalization.png")
    assert (tmp_path / "generalization.png").stat().st_size > 10_000


def test_rate_distortion(tmp_path, capsys):
    rate_distortion.main(tmp_path, smoke_test=True)
    assert "claim: all 9 points lie on the exact curve" in capsys.readouterr().out
    assert (tmp_path / "rate_distortion.png").stat().st_size > 10_000
    with xarray.open_dataset(tmp_path / "linear.nc", engine="h5netcdf") as points:
        assert points.sizes["beta"] == 9


@pytest.mark.thorough
def test_generalization(tmp_path, capsys):
    generalization.main(tmp_path, smoke_test=True)
    assert "claim: KL shrinkage explains" in capsys.readouterr().out


def test_training_pathologies_print_and_draw(tmp_path, capsys):
    trained = training_pathologies.on_digits(epochs=2)
    outcome = training_pathologies.run(
        training_pathologies.CASES[0]._replace(sick=lambda: trained, cured=lambda: trained)
    )
    assert "not converged: few and small steps\nDiagnosis of 2 epochs" in capsys.readouterr().out
    assert outcome.gain == 0.0
    training_pathologies.draw([outcome], tmp_path / "pathologies.png")
    assert (tmp_path / "pathologies.png").stat().st_size > 5_000


@pytest.mark.thorough
def test_training_pathologies(tmp_path, capsys):
    training_pathologies.main(tmp_path, smoke_test=True)
    assert "claim: 1 of 1 pathologies are named" in capsys.readouterr().out


@pytest.mark.thorough
def test_every_pathology_is_named_and_cured(tmp_path, capsys):
    training_pathologies.main(tmp_path)
    assert "claim: 9 of 9 pathologies are named" in capsys.readouterr().out


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(1, 6))
def test_weight_decay_cures_kl_shrinkage_from_every_seed(seed, tmp_path):
    generalization.main(tmp_path, seed=seed)


def test_vrnn_digits(tmp_path, capsys):
    vrnn_digits.main(None, tmp_path, smoke_test=True)
    printed = capsys.readouterr().out
    assert all(f"  row {t} " in printed for t in range(8))
    assert (tmp_path / "vrnn_digits.png").stat().st_size > 5_000
    z = az.from_netcdf(str(tmp_path / "posterior.nc"))["posterior"]["z"]
    assert dict(z.sizes) == {"chain": 1, "draw": 100, "sequences": 50, "time": 8, "z_dim_0": 4}


@pytest.mark.thorough
def test_vrnn_digits_on_a_tenth_of_fashion_mnist(data_dir, tmp_path, capsys):
    vrnn_digits.main(data_dir / "fashion_mnist_20k.npz", tmp_path, smoke_test=True)
    assert "earlier rows save " in capsys.readouterr().out


def test_vrnn_music_on_its_embedded_simulator(tmp_path, capsys):
    import mido

    vrnn_music.main(None, tmp_path, smoke_test=True)
    assert "nats per frame: bound " in capsys.readouterr().out
    assert (tmp_path / "vrnn_music.png").stat().st_size > 10_000
    assert any(message.type == "note_on" for message in mido.MidiFile(tmp_path / "generated.mid"))
    z = az.from_netcdf(str(tmp_path / "posterior.nc"))["posterior"]["z"]
    assert z.dims == ("chain", "draw", "sequences", "time", "z_dim_0")
    assert z.sizes["time"] == vrnn_music.PHRASE


def test_fair_representation_on_its_embedded_simulator(tmp_path, capsys):
    fair_representation.main(None, tmp_path, smoke_test=True)
    printed = capsys.readouterr().out
    assert "λ = 100: Audit of 4000 rows" in printed
    assert "The same from means" in printed
    assert (tmp_path / "fair_representation.png").stat().st_size > 10_000
    data = az.from_netcdf(str(tmp_path / "posterior.nc"))
    assert data["posterior"]["z"].dims == ("chain", "draw", "data", "latent")
    assert np.isfinite(data["training"]["elbo"].sel(split="train")).all()


@pytest.mark.thorough
def test_fair_representation_on_adult(data_dir, tmp_path, capsys):
    fair_representation.main(data_dir / "adult.npz", tmp_path, smoke_test=True)
    assert "λ = 100: Audit of 16281 rows" in capsys.readouterr().out


def test_known_information_is_the_entropy_that_the_mixture_gains():
    z = torch.linspace(-12.0, 15.0, 20_001, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0)
    for distance in (0.3, 1.0, 3.0):
        mixture = (normal.log_prob(z).exp() + normal.log_prob(z - distance).exp()) / 2
        gained = torch.trapezoid(torch.special.entr(mixture), z) - normal.entropy()
        assert abs(fair_representation.information_of_two_normals(distance) - gained) < 1e-6


def test_posteriordb_on_its_embedded_data(capsys):
    reference.main(None)
    assert "tau: " in capsys.readouterr().out


def test_trust_the_posterior(tmp_path, capsys):
    trust_the_posterior.main(tmp_path, smoke_test=True)
    printed = capsys.readouterr().out
    assert "claim: " in printed
    assert "exact draws" in printed
    assert (tmp_path / "trust_the_posterior.png").stat().st_size > 10_000
    posterior = az.from_netcdf(str(tmp_path / "posterior.nc"))["posterior"]
    assert dict(posterior["theta"].sizes) == {"chain": 1, "draw": 1000, "school": 8}


def judged(data_dir, name, guide):
    posterior = POSTERIORS[name]
    folder = data_dir / "posteriordb"
    _, draws = posterior.reference(folder)
    return reference.judge(posterior, posterior.load(folder), guide, draws.mean(0), draws.std(0))


@pytest.mark.parametrize(
    ("name", "guide"),
    [
        pytest.param("kidiq-kidscore_momiq", "AutoMultivariateNormal", marks=pytest.mark.thorough),
        ("arK-arK", "AutoNormal"),
    ],
)
def test_good_k_hat_means_good_resampled_means(data_dir, name, guide):
    row = judged(data_dir, name, guide)
    assert row.error < 0.3
    assert row.k >= 0.7 or row.resampled_error < 0.1
    if name == "arK-arK":  # a mean-field guide under strong correlations: only the tail of the weights can tell
        assert row.k > 0.8


@pytest.mark.thorough
def test_a_bad_fit_shows_in_k_hat(data_dir, monkeypatch):
    monkeypatch.setattr(reference, "STEPS", 20)
    row = judged(data_dir, "nes1972-nes", "AutoMultivariateNormal")
    assert row.error > 0.3
    assert row.k > 0.7


def test_bits_back_gives_the_digits_back(tmp_path, capsys):
    pytest.importorskip("constriction")
    from examples import bits_back

    bits_back.main(tmp_path, smoke_test=True)
    assert "given back bit for bit: True" in capsys.readouterr().out
    assert (tmp_path / "bits_back.png").stat().st_size > 10_000
    assert (tmp_path / "digits.ans").stat().st_size > 5_000


def test_em_mixture(tmp_path, capsys):
    em_mixture.main(tmp_path, smoke_test=True)
    assert "no step lowered a bound" in capsys.readouterr().out
    assert (tmp_path / "em_mixture.png").stat().st_size > 10_000


def test_hmm_segments(tmp_path, capsys):
    hmm_segments.main(None, tmp_path, smoke_test=True)
    assert "the draws hold their number" in capsys.readouterr().out
    assert (tmp_path / "hmm_segments.png").stat().st_size > 10_000
    k = az.from_netcdf(str(tmp_path / "posterior.nc"))["posterior"]["k"]
    assert k.dims == ("chain", "draw", "sequences", "time")


@pytest.mark.thorough
def test_hmm_segments_of_vowels(data_dir, tmp_path, capsys):
    hmm_segments.main(data_dir / "ts_japanesevowels.npz", tmp_path, smoke_test=True)
    assert "of 370 utterances are given to their speaker" in capsys.readouterr().out
