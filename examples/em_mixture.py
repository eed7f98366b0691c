"""Fit a mixture of Gaussians by EM, as an ELBO whose latent is summed out.

The program marks the component of each row for enumeration. Its terms then hold the exact posterior of the components:
the E-step. An M-step in closed form follows. The bound equals log p(x) after each E-step, never falls, and after the
same number of steps from the same start the mixture is that of scikit-learn's ``GaussianMixture``. Beside it runs an EM
whose E-step is mean-field: the component is read as two bits with independent posteriors. Its bound stays below its
log p(x) by KL(q || posterior), and its M-steps move to mixtures for which independent bits cost little.

The data are the two first principal components of scikit-learn's digits. Run with ``python -m examples.em_mixture``;
the figure is saved to ``runs/em_mixture/``.
"""

import argparse
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

import pyro_elbo as pe
from models.gaussian_mixture import GaussianMixture, factorized_posterior, m_step
from models.sequences import digits

COMPONENTS = 4


class Run(NamedTuple):
    """One run of EM: the bound after each E-step, log p(x) there, the last mixture, and the last posterior."""

    bound: Float[Tensor, " steps"]
    log_evidence: Float[Tensor, " steps"]
    mixture: GaussianMixture
    q: Float[Tensor, "n K"]


def load() -> Float[Tensor, "n 2"]:
    """Return the digits in their first two principal components, scaled to a variance of 1."""
    x = digits().flatten(1).double()
    _, _, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    x = (x - x.mean(0)) @ directions[:2].T
    return x / x.std(0)


def start(x: Float[Tensor, "n 2"]) -> GaussianMixture:
    """Return equal components around the four corners of the data."""
    corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=x.dtype)
    weights, eye = torch.full((COMPONENTS,), 1 / COMPONENTS, dtype=x.dtype), torch.eye(2, dtype=x.dtype)
    return GaussianMixture(weights, corners, eye.expand(COMPONENTS, 2, 2))


def no_guide(x: Float[Tensor, "n 2"]) -> None:
    """The model sums its only latent out: there is nothing to guide."""


def exact_step(mixture: GaussianMixture, x: Float[Tensor, "n 2"], _: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ELBO and the posterior of the components: one evaluation of the terms is the E-step."""
    terms = pe.TraceBeta_ELBO().terms(mixture, no_guide, x)
    return terms.elbo, terms.posterior["k"]


def mean_field_step(mixture: GaussianMixture, x: Float[Tensor, "n 2"], last: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ELBO under a better posterior with independent bits: the terms are averaged over this guide."""
    q = factorized_posterior(mixture.log_joint(x), last)

    def guide(x: Float[Tensor, "n 2"]) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(q), infer={"enumerate": "parallel"})

    return pe.TraceBeta_ELBO().terms(mixture, guide, x).elbo, q


EStep = Callable[[GaussianMixture, Tensor, Tensor], tuple[Tensor, Tensor]]


def em(step: EStep, mixture: GaussianMixture, x: Float[Tensor, "n 2"], steps: int) -> Run:
    """Alternate E- and M-steps, and end with an E-step."""
    bounds, evidence = [], []
    q = torch.full((len(x), COMPONENTS), 1 / COMPONENTS, dtype=x.dtype)
    for i in range(steps + 1):
        mixture = mixture if i == 0 else m_step(x, q)
        bound, q = step(mixture, x, q)
        bounds.append(bound)
        evidence.append(mixture.log_evidence(x))
    return Run(torch.stack(bounds), torch.stack(evidence), mixture, q)


def scikit_learn(first: GaussianMixture, x: Float[Tensor, "n 2"], steps: int) -> GaussianMixture:
    """Return the mixture that scikit-learn's EM reaches from the same start in as many steps."""
    from sklearn import mixture
    from sklearn.exceptions import ConvergenceWarning

    given = {
        "weights_init": first.weights.numpy(),
        "means_init": first.means.numpy(),
        "precisions_init": torch.linalg.inv(first.covariances).numpy(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = mixture.GaussianMixture(COMPONENTS, tol=0.0, reg_covar=0.0, max_iter=steps, **given).fit(x.numpy())
    return GaussianMixture(*map(torch.tensor, (fitted.weights_, fitted.means_, fitted.covariances_)))


def draw(x: Tensor, exact: Run, factorized: Run, path: Path) -> None:
    """Plot both bounds over the steps, and the data by component with the ellipses of both mixtures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", width_ratios=[1.1, 1])
    n = len(x)
    for run, color, name in ((exact, "#2b5c8a", "exact E-step"), (factorized, "#b3452c", "mean-field E-step")):
        left.plot(run.bound / n, color=color, linewidth=3, alpha=0.35, label=f"ELBO, {name}")
        left.plot(run.log_evidence / n, color=color, linewidth=1.2, linestyle=":", label=f"log p(x), {name}")
        for mean, covariance in zip(run.mixture.means, run.mixture.covariances, strict=True):
            angle = torch.linspace(0, 2 * torch.pi, 100, dtype=x.dtype)
            circle = torch.stack([angle.cos(), angle.sin()])
            ellipse = mean[:, None] + 2 * torch.linalg.cholesky(covariance) @ circle
            right.plot(*ellipse, color=color, linewidth=1.5)
    low = float(factorized.bound[5] / n)
    left.set(xlabel="EM step", ylabel="nats per datum", ylim=(low, float(exact.bound[-1] / n) + 0.01))
    left.legend(loc="lower right", fontsize=8)
    right.scatter(*x.T, c=exact.q.argmax(1), cmap="Set2", s=5)
    right.set(xlabel="first component", ylabel="second", title="two standard deviations (blue: exact, red: mean-field)")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(out: Path, *, smoke_test: bool = False) -> None:
    x, steps = load(), 15 if smoke_test else 60
    x = x[:400] if smoke_test else x
    first = start(x)
    exact, factorized = em(exact_step, first, x, steps), em(mean_field_step, first, x, steps)
    other = scikit_learn(first, x, steps)

    print(f"{'step':>6}{'ELBO, exact':>16}{'log p(x)':>12}{'ELBO, mean-field':>20}{'log p(x)':>12}   nats per datum")
    for i in sorted({0, 1, 2, 5, 10, steps // 2, steps}):
        values = (exact.bound, exact.log_evidence, factorized.bound, factorized.log_evidence)
        a, b, c, d = (v[i] / len(x) for v in values)
        print(f"{i:>6}{a:>16.6f}{b:>12.6f}{c:>20.6f}{d:>12.6f}")

    out.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("matplotlib") is not None:
        draw(x, exact, factorized, out / "em_mixture.png")
    print(f"written to {out}/: " + ", ".join(sorted(path.name for path in out.iterdir())))

    pairs = zip(vars(exact.mixture).values(), vars(other).values(), strict=True)
    apart = max((a - b).abs().max().item() for a, b in pairs)
    gaps = (factorized.log_evidence - factorized.bound) / len(x)
    falls = min(run.bound.diff().min().item() for run in (exact, factorized))
    print(
        f"after {steps} steps the mixture is scikit-learn's to {apart:.1e}; no step lowered a bound; "
        f"the mean-field bound lies up to {gaps.max():.4f} nats per datum below its log p(x)"
    )
    torch.testing.assert_close(exact.bound, exact.log_evidence, rtol=1e-10, atol=0)
    assert falls > -1e-8, f"EM never lowers its bound, got a fall of {-falls}"
    assert apart < 1e-6, f"EM must end where scikit-learn's ends, got a difference of {apart}"
    assert (gaps > -1e-10).all(), "the mean-field bound must stay below log p(x)"
    assert gaps.max() > 1e-3, f"independent bits must cost something, got {gaps.max()}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/em_mixture"))
    parser.add_argument("--smoke-test", action="store_true", help="fewer rows and steps")
    args = parser.parse_args()
    main(args.out, smoke_test=args.smoke_test)
