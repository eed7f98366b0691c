"""What estimates of log p(x) say of themselves: too few draws, crossed bounds, idle options, NaN found at once."""

import math
import time

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, DataError, NonFiniteError
from pyro_elbo.evidence import EvidenceBracket, LogEvidence

X = torch.linspace(-1.0, 2.0, 10, dtype=torch.float64)


def model(x):
    mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def guide(x):
    pyro.sample("mean", dist.Normal(x.sum() / (len(x) + 0.25), x.new_tensor(0.4)))


def evidence(num_samples, seed=0, **options):
    return pe.log_evidence(model, guide, X, num_samples=num_samples, seed=seed, progress=False, **options)


def test_few_draws_never_state_an_error_without_a_word():
    """Of two draws the error is often far too small; of a thousand it is the spread over seeds, and nothing is said."""
    exact = dist.MultivariateNormal(torch.zeros(10).double(), torch.eye(10).double() + 4).log_prob(X).item()
    few = [evidence(2, seed) for seed in range(100)]
    assert sum(abs(float(r) - exact) > 3 * r.total_standard_error for r in few) > 10
    assert all("2 draws show little of their own spread: the standard error means little" in repr(r) for r in few)
    assert all("Take more num_samples" in r._repr_html_() for r in few)
    many = [evidence(1000, seed) for seed in range(50)]
    assert sum(abs(float(r) - exact) > 3 * r.total_standard_error for r in many) <= 1
    assert all(r.caution is None for r in many)


def test_the_rows_whose_weights_few_draws_carry_are_counted():
    ess = torch.tensor([9.0, 10.0, 1.0], dtype=torch.float64)
    found = LogEvidence(torch.zeros(3).double(), torch.ones(3).double(), ess, 1000, "importance", "data")
    assert found.caution is not None
    assert found.caution.startswith("Few draws carry all the weight in 2 of 3 rows")
    assert "higher" in found.caution
    assert found.caution in repr(found)
    assert "lower. More num_temperatures" in str(side(-1.0, 1.0, "reverse ais", ess=9.0).caution)


def side(total, error, method="ais", ess=16.0):
    numbers = (torch.tensor(x, dtype=torch.float64) for x in (total, error, ess))
    return LogEvidence(*numbers, 16, method, None)


def test_bounds_that_cross_are_explained():
    both = EvidenceBracket(side(-39.2, 0.3), side(-39.5, 0.4, "reverse ais"), {})
    assert both.gap_standard_error == pytest.approx(0.5)
    assert "gap -0.3000 ± 0.5000, one number for all data" in repr(both)
    assert "The lower estimate lies above the upper one: noise of the chains" in repr(both)
    assert "more than their noise" in repr(EvidenceBracket(side(-37.0, 0.3), side(-39.5, 0.4, "reverse ais"), {}))
    right = repr(EvidenceBracket(side(-39.5, 0.3), side(-39.2, 0.4, "reverse ais"), {}))
    assert "lies above" not in right
    assert "lower: " not in right
    few = EvidenceBracket(side(-39.5, 0.3, ess=2.0), side(-39.2, 0.4, "reverse ais"), {})
    assert "lower: Few draws carry all the weight" in few._repr_html_()


@pytest.mark.parametrize(("name", "value"), [("start", "guide"), ("num_temperatures", 10), ("num_leapfrog", 7)])
def test_options_of_annealing_are_refused_by_importance_sampling(name, value):
    with pytest.raises(ArgumentError, match=f"{name}={value!r} is a setting of annealing: pass method='ais'"):
        evidence(10, **{name: value})


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_data_that_are_nan_are_named_before_a_walk_begins(start):
    x = X.clone()
    x[3] = math.nan
    began = time.perf_counter()
    with pytest.raises(NonFiniteError, match=r"Site 'x': 1 of 10 values are not finite .* index \(3,\)"):
        pe.log_evidence(model, guide_of_nothing, x, method="ais", start=start, num_temperatures=4000, progress=False)
    assert time.perf_counter() - began < 5


def guide_of_nothing(x):
    pyro.sample("mean", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))


def test_a_model_without_a_density_is_named_before_a_walk_begins():
    def broken(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(mean, torch.tensor(math.nan), validate_args=False).expand([10]).to_event(1), obs=x)

    with pytest.raises(NonFiniteError, match="Site 'x'.*Look for a diverged parameter of the model"):
        pe.log_evidence(broken, None, X.float(), method="ais", progress=False)


def test_a_guide_among_the_data_is_noticed():
    with pytest.raises(DataError, match="It simulates from the model alone, without a guide"):
        pe.bidirectional_evidence(model, guide, X, progress=False)


def test_what_is_refused_at_once_leaves_no_bar(capsys):
    def part(x):
        with pyro.plate("data", 100, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide_of_part(x):
        with pyro.plate("data", 100, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="took 10 of its 100 rows"):
        pe.log_evidence(part, guide_of_part, X.float())
    assert capsys.readouterr().err == ""
