"""The table of a fit's latents, and what results, objectives and terms print and show in notebooks."""

import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal

import pyro_elbo as pe
from tests.support.fitted import QUIET, VAE, X, _exact, _fitted, at_posterior, regression  # noqa: F401  (two fixtures)

# --- the table of the sites -----------------------------------------------------------------------------------


def test_the_summary_counts_units_that_follow_the_data(fitted):
    vae, result = fitted
    table = result.summary(num_samples=400)
    (site,) = table.sites
    assert (site.active_units, site.units) == (1, 2)
    assert site.kl == pytest.approx(result.terms().kl_total["z"].item(), rel=1e-6)
    assert site.kl_per_datum == pytest.approx(site.kl / 40)
    frame = table.to_dataframe()
    assert frame.loc["z", "active_units"] == 1
    assert frame.loc["z", "kl"] == site.kl
    assert table.pareto_k is not None
    assert site.pareto_k == float(table.pareto_k)
    printed = str(table)
    assert "1 of 2" in printed
    assert f"{site.kl:.4f}" in printed


def test_noise_of_the_draws_is_no_activity():
    """The posterior mean moves by nothing, its estimate from 30 draws by 1/30 > 0.01."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0] * 0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(4)), 1.0).to_event(1))

    x = torch.randn(2000)
    result = pe.fit(model, guide, x, batch_size=None, **QUIET)
    assert result.sample(30).z.mean("draw").var("data").min() > 0.02
    assert result.summary(num_samples=30).sites[0].active_units == 0


def test_the_summary_takes_a_part_of_many_rows_where_training_did():
    vae, x = VAE(), torch.randn(1000)
    table = pe.fit(vae.model, vae.guide, x, batch_size=500, **QUIET).summary(num_samples=30)
    assert (table.num_data, table.num_rows) == (1000, 250)
    assert "k-hat and active units of 250 rows." in str(table)
    assert len(table.pareto_k.k) == 250
    pyro.clear_param_store()
    vae = VAE()
    table = pe.fit(vae.model, vae.guide, x, batch_size=None, **QUIET).summary(num_samples=30)
    assert len(table.pareto_k.k) == 1000


def test_the_summary_of_global_joint_and_point_guides(exact):
    (site,) = exact.summary().sites
    assert (site.active_units, site.units) == (None, None)
    assert site.pareto_k < 0.5

    def two(x):
        a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    result = pe.fit(two, AutoMultivariateNormal(two), X, batch_size=None, **QUIET)
    table = result.summary().to_dataframe()
    assert table.kl[["a", "b"]].isna().all()
    assert table.kl["_AutoMultivariateNormal_latent"] == pytest.approx(
        np.mean([result.terms(seed=seed).rate.item() for seed in range(25)]), rel=1e-5
    )
    pyro.clear_param_store()
    points = pe.fit(two, AutoDelta(two), X, batch_size=None, **QUIET).summary()
    assert points.pareto_k is None
    assert points.to_dataframe().pareto_k.isna().all()
    assert "No k-hat: The guide is a point estimate" in str(points)


def test_units_of_a_sequence_are_averaged_over_real_steps():
    """z follows x with a slope of 1 in the real steps; in padding it would not."""

    def model(x, lengths):
        def step(carry, x_t):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x_t)
            return carry, None

        with pyro.plate("walks", len(x)):
            pe.scan(step, x.new_zeros(len(x)), x, lengths, dim=1)

    def guide(x, lengths):
        def step(carry, x_t):
            pyro.sample("z", dist.Normal(x_t * pyro.param("slope", torch.tensor(0.2)), 0.1))
            return carry, None

        with pyro.plate("walks", len(x)):
            pe.scan(step, x.new_zeros(len(x)), x, lengths, dim=1)

    x, lengths = torch.randn(12, 4), torch.randint(1, 5, (12,))
    result = pe.fit(model, guide, (x, lengths), loss=pe.TraceTimestep_ELBO(), **QUIET)
    (site,) = result.summary(num_samples=50).sites
    assert (site.active_units, site.units) == (1, 1)


# --- what is printed ------------------------------------------------------------------------------------------


def numbers(text):
    return re.findall(r"-?\d+\.\d+", text)


def test_notebooks_show_the_same_numbers_as_print(fitted):
    _, result = fitted
    for shown in (result, result.terms(), result.pareto_k(num_samples=60), result.summary(num_samples=60)):
        html = shown._repr_html_()
        assert numbers(re.sub(r"<[^>]*>", " ", html)) == numbers(str(shown))
        assert len(html) < 2000
        assert "color" not in html


def test_an_audit_in_a_notebook_says_what_print_says():
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    s = rng.integers(0, 2, 100)
    found = pe.audit(rng.normal(size=(100, 1)) + s[:, None], s, probes=["logistic"], name_s="<s>")
    html = found._repr_html_()
    assert "<s>" not in html.replace("&lt;s&gt;", "")
    assert "&lt;s&gt;" in html
    assert numbers(re.sub(r"<[^>]*>", " ", html)) == numbers(str(found))


def test_names_of_sites_are_escaped():
    def model(x):
        pyro.sample("<b>x", dist.Normal(0.0, 1.0), obs=x)

    html = pe.TraceBeta_ELBO().terms(model, lambda x: None, torch.tensor(0.0))._repr_html_()
    assert "&lt;b&gt;x" in html
    assert "<b>x" not in html


REPRS = {
    "TraceBeta_ELBO(beta=4.0, kl='auto')": lambda: pe.TraceBeta_ELBO(4.0),
    "TraceBeta_ELBO(beta=LinearWarmup(start=0.0, end=1.0, steps=9), kl='sampled')": lambda: pe.TraceBeta_ELBO(
        pe.LinearWarmup(0.0, 1.0, steps=9), kl="sampled"
    ),
    "TraceBeta_ELBO(beta={'z': 2.0, 'w': <tensor of shape (3,)>}, kl='auto', free_bits=0.5)": lambda: pe.TraceBeta_ELBO(
        {"z": 2.0, "w": torch.ones(3)}, free_bits=0.5
    ),
    "TraceIW_ELBO(beta=1.0, kl='sampled', num_particles=16)": lambda: pe.TraceIW_ELBO(16),
    "TraceMI_ELBO(beta=1.0, kl='auto', penalties=[I(z; s)])": lambda: pe.TraceMI_ELBO("z", "s", weight=3.0),
    "TraceTimestep_ELBO(beta=1.0, kl='auto', normalize='frame')": lambda: pe.TraceTimestep_ELBO(normalize="frame"),
}


@pytest.mark.parametrize("expected", REPRS)
def test_objectives_are_short(expected):
    loss = REPRS[expected]()
    assert repr(loss) == expected
    svi = pe.SVI(regression, VAE().guide, pyro.optim.Adam({"lr": 0.1}), loss, compile="auto")
    assert repr(svi) == f"SVI(regression, VAE.guide, Adam, {expected}, compile='auto')"


def test_the_result_prints_the_bound_of_its_parameters(fitted):
    _, result = fitted
    valid = result.history.elbo.sel(split="valid", epoch=0).item()
    lines = str(result).splitlines()
    assert lines[0] == "Fit of VAE.model and VAE.guide, TraceBeta_ELBO(beta=1.0, kl='auto')"
    assert lines[1] == "  1 epoch; best epoch 0"
    assert f"valid elbo {valid:.4f} nats per datum" in lines[2]
