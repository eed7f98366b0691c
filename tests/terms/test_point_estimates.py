"""Guides that are points: what stands for their KL is none, and the total no bound. All that shows it says so."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

import pyro_elbo as pe
from pyro_elbo.errors import GuideError
from tests.support.refusing import refusing

X = torch.linspace(-2.0, 2.0, 20)
LOSS = pe.TraceBeta_ELBO()
refuses = refusing(re.compile("Use a guide with a density"))


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.1), obs=x)


def autoencoder(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(x / 1.01))


def shared(x):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    s = pyro.sample("s", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w[..., 0], s), obs=x)


def started(guide, x=X):
    guide(x)
    return guide


def test_a_deterministic_encoder_has_no_bound_and_the_table_says_so():
    terms = LOSS.terms(local, autoencoder, X)
    exact = dist.Normal(0.0, 1.01**0.5).log_prob(X).sum()
    assert terms.elbo > exact + 10
    assert terms.point_estimates == ("z",)
    lines = {line.split()[0]: line for line in repr(terms).splitlines()[2:]}
    assert lines["elbo"].endswith("(no bound: point estimate of 'z')")
    assert lines["kl"].endswith("(no KL: minus the log prior at a point)")
    assert not lines["log_likelihood"].endswith(")")
    assert "no bound: point estimate of &#x27;z&#x27;" in terms._repr_html_()
    assert terms.to_dataset().attrs["point_estimates"] == ["z"]
    for refused in (
        lambda: pe.code_length(terms, 0.01),
        lambda: pe.compare_splits(terms, terms),
        lambda: pe.rate_distortion({1.0: terms}),
    ):
        with refuses(GuideError, "point estimate in ['z'] (Delta)"):
            refused()


@pytest.mark.parametrize("particles", [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}])
@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoIAFNormal])
def test_what_an_auto_guide_passes_on_is_no_point(make, particles):
    terms = pe.TraceBeta_ELBO(max_plate_nesting=1, **particles).terms(shared, started(make(shared)), X)
    assert terms.point_estimates == ()
    assert "no bound" not in repr(terms)
    assert "point_estimates" not in terms.to_dataset().attrs


def hidden():
    """A joint density of one latent beside a point of the other."""
    guide = AutoGuideList(shared)
    guide.append(AutoMultivariateNormal(pyro.poutine.block(shared, expose=["s"])))
    guide.append(AutoDelta(pyro.poutine.block(shared, expose=["w"])))
    return started(guide)


def test_points_beside_densities_are_found():
    assert LOSS.terms(shared, started(AutoDelta(shared)), X).point_estimates == ("w", "s")
    assert "w" in LOSS.terms(shared, hidden(), X).point_estimates


@pytest.mark.parametrize("kind", ["point", "passed on"])
def test_points_over_time(kind):
    """Every step of a scan is a point, or passes on a draw of its own."""

    def model(x):
        def step(z, x_t):
            z = pyro.sample("z", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x_t)
            return z, z

        with pyro.plate("data", x.shape[1]):
            pe.scan(step, torch.zeros(x.shape[1]), x)

    def guide(x):
        def step(carry, x_t):
            z = x_t / 2
            if kind == "passed on":
                z = z + pyro.sample("noise", dist.Normal(torch.zeros_like(x_t), 0.5), infer={"is_auxiliary": True})
            return carry, pyro.sample("z", dist.Delta(z))

        with pyro.plate("data", x.shape[1]):
            pe.scan(step, torch.zeros(x.shape[1]), x)

    terms = LOSS.terms(model, guide, torch.ones(4, 3))
    assert terms.point_estimates == (("z",) if kind == "point" else ())


def test_loops_of_points_are_points():
    def model(x):
        z = torch.tensor(0.0)
        for t in range(len(x)):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[t])

    x = X[:4]
    terms = pe.TraceTimestep_ELBO().terms(model, started(AutoDelta(model), x), x)
    assert terms.point_estimates == ("z",)
    joint = started(AutoMultivariateNormal(model), x)
    assert pe.TraceTimestep_ELBO().terms(model, joint, x).point_estimates == ()


def test_a_point_of_a_discrete_latent_has_a_bound():
    """KL(q ‖ p) of a point mass on k is -log p(k)."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Delta((x > 0.5).float()))

    terms = LOSS.terms(model, guide, X)
    assert terms.point_estimates == ()
    exact = sum(p * dist.Normal(m, 1.0).log_prob(X).exp() for p, m in ((0.3, 1.0), (0.7, 0.0))).log().sum()
    assert terms.elbo < exact


def test_points_that_all_rows_share_are_a_note_of_a_comparison():
    terms = LOSS.terms(shared, started(AutoDelta(shared)), X)
    compared = pe.compare_splits(terms, terms)
    assert len(compared.notes) == 2
    assert "point estimate in 'w': its total is minus a log prior density" in repr(compared).replace("\n ", "")
    with refuses(GuideError, "['w', 's']"):
        pe.rate_distortion({1.0: terms})


def test_map_training_trains_as_before_and_its_result_says_what_it_is(tmp_path):
    guide = AutoDelta(shared)
    result = pe.fit(shared, guide, X, batch_size=None, lr=0.05, max_epochs=40, progress=False)
    elbo = result.history.elbo.sel(split="train").values
    assert elbo[-1] > elbo[0]
    assert "the elbo is no bound: the guide is a point estimate of 'w', 's'" in repr(result)
    assert any("its elbo is no bound" in text for text in result.diagnosis.unsaid)
    summary = result.summary(num_samples=100)
    assert summary.point_estimates == ("w", "s")
    assert summary.to_dataframe().kl.isna().all()
    assert "The elbo is no bound, and minus the log prior stands for the KL of 'w', 's'." in repr(summary)
    result.save(tmp_path / "fit")
    pyro.clear_param_store()
    assert "no bound" in repr(pe.load(tmp_path / "fit", shared, AutoDelta(shared)))
    other = pe.fit(shared, AutoNormal(shared), X, batch_size=None, max_epochs=1, progress=False)
    assert "no bound" not in repr(other) + repr(other.diagnosis) + repr(other.summary(num_samples=100))
    assert repr(other).splitlines()[1].strip().startswith("1 epoch;")


def test_refusals_of_points_speak_of_what_was_asked():
    guide = started(AutoDelta(shared))
    for asked in (pe.linear_response, lambda *args: pe.log_evidence(*args, progress=False), pe.pareto_k):
        with refuses(GuideError, "The guide is a point estimate in 'w', 's' (Delta): it has no density there"):
            asked(shared, guide, X)
