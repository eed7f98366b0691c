"""What cannot be exported is left out with a reason; everything else arrives, with names that files take."""

import math
from importlib.metadata import PackageNotFoundError
from typing import Any

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyro_elbo as pe
from pyro_elbo.posterior import arviz as exporter
from tests.support.exported import group_names

X = torch.tensor([0.3, -1.2, 0.8, 2.1])


def mean_guide(x: Tensor) -> None:
    pyro.sample("mu", dist.Normal(x.sum() / (len(x) + 1), 1.2 / math.sqrt(len(x) + 1)))


class Unsupported(dist.TorchDistribution):
    """A density without a support, as flows have."""

    arg_constraints = {}
    has_rsample = True

    def __init__(self, base: dist.TorchDistribution) -> None:
        self.base = base
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.base.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base.log_prob(value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Unsupported":
        return Unsupported(self.base.expand(batch_shape))


class Unsampled(dist.Normal):
    """A density without a sampler."""

    has_rsample = False

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("there is no sampler")


def simplex(x: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.ones(4)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(p[..., :1], 1.0), obs=x)


def correlation(x: Tensor) -> None:
    factor = pyro.sample("L", dist.LKJCholesky(3, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(factor[..., 1, :1], 1.0), obs=x)


def relaxed(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.RelaxedOneHotCategorical(torch.tensor(0.5), probs=torch.ones(3) / 3))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "name", "shape", "free"),
    [(simplex, "p", (4,), 3), (correlation, "L", (3, 3), 3), (relaxed, "z", (4, 3), 2)],
)
def test_latents_whose_unconstrained_form_has_another_shape(model: Any, name: str, shape: tuple, free: int) -> None:
    guide = AutoNormal(model)
    with torch.no_grad():
        guide(X)
    data = pe.to_arviz(model, guide, X, num_samples=20, coords={f"{name}_dim_0": range(100, 100 + shape[-1])})
    assert data["posterior"][name].shape == (1, 20, *shape)
    assert data["unconstrained_posterior"][name].shape[-1] == free
    assert data["unconstrained_posterior"][name].dims[-1] == f"{name}_unconstrained_dim_0"
    if name != "L":
        total = torch.tensor(data["posterior"][name].sum(f"{name}_dim_0").values)
        torch.testing.assert_close(total, torch.ones_like(total))


def test_a_prior_without_support_has_no_unconstrained_form() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Unsupported(dist.Normal(torch.zeros(2), 1.0).to_event(1)))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.unsqueeze(-1).expand(-1, 2) / 3, 0.8).to_event(1))

    data = pe.to_arviz(model, guide, X, num_samples=30)
    assert data["posterior"]["z"].shape == (1, 30, 4, 2)
    assert "unconstrained_posterior" not in group_names(data)
    assert "['z']" in data["posterior"].attrs["unconstrained_skipped"]
    assert pe.pareto_k(model, guide, X, num_samples=100).k.shape == (4,)


def test_a_likelihood_without_sampler_is_missing_from_predictive_draws_alone() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", Unsampled(mu, 1.0), obs=x)
            pyro.sample("y", dist.Normal(mu, 1.0), obs=x)

    data = pe.to_arviz(model, mean_guide, X, num_samples=30)
    for group in ("posterior_predictive", "prior_predictive"):
        assert list(data[group].data_vars) == ["y"]
        assert data["posterior"].attrs[f"{group}_skipped"] == "'x' cannot be sampled (there is no sampler)"
    assert list(data["prior"].data_vars) == ["mu"]
    assert list(data["log_likelihood"].data_vars) == ["x", "y"]


def slashed(x: Tensor) -> None:
    mu = pyro.sample("net/mu", dist.Normal(0.0, 1.0))
    with pyro.plate("all/data", len(x)):
        pyro.sample("net/x", dist.Normal(mu, 1.0), obs=x)


def test_slashes_in_names_become_dots(tmp_path: Any) -> None:
    def guide(x: Tensor) -> None:
        pyro.sample("net/mu", dist.Normal(x.sum() / (len(x) + 1), 1.2 / math.sqrt(len(x) + 1)))

    data = pe.to_arviz(slashed, guide, X, num_samples=200, coords={"all/data": list("abcd")})
    data.to_netcdf(tmp_path / "export.nc")
    read = az.from_netcdf(tmp_path / "export.nc")
    assert list(read["posterior"].data_vars) == ["net.mu"]
    assert read["log_likelihood"]["net.x"].dims == ("chain", "draw", "all.data")
    assert pe.loo(read, "net/x").elpd == pe.loo(read, "net.x").elpd == pe.loo(data).elpd


def test_a_checkout_that_is_not_installed_has_the_version_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(exporter, "version", missing)
    assert exporter._version() == pe.__version__


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ 0.23 with pandas 3
def test_arviz_compares_and_plots_leave_one_out() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")

    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    results = {str(seed): pe.loo(pe.to_arviz(model, mean_guide, X, num_samples=2000, seed=seed)) for seed in (0, 1)}
    table = az.compare(results, **({} if az.__version__.startswith("0.") else {"round_to": "none"}))
    column = "elpd_loo" if "elpd_loo" in table else "elpd"
    assert {n: table.loc[n, column] for n in results} == pytest.approx({n: r.elpd for n, r in results.items()}, abs=0.1)
    if az.__version__.startswith("0."):
        assert az.plot_khat(results["0"]) is not None
        assert results["0"].copy().elpd == results["0"].elpd
