"""Draw figures for the docs: ``python -m docs.figures`` writes them to ``docs/images``.

The figure of linear response reads posteriordb's reference draws from the folder that PYRO_ELBO_DATA names.
"""

import os
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal, init_to_value
from sklearn.datasets import load_digits

import pyro_elbo as pe
from examples.posteriordb import SCHOOLS, SCHOOLS_DATA
from models.posteriordb import POSTERIORS
from models.vae import VAEGuide, VAEModel

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

STEPS = 1000
SCHEDULES = {
    "Constant(0.5)": pe.Constant(0.5),
    "LinearWarmup(0, 1, steps=1000)": pe.LinearWarmup(0.0, 1.0, STEPS),
    "SigmoidWarmup(0, 1, steps=1000)": pe.SigmoidWarmup(0.0, 1.0, STEPS),
    "Cyclical(0, 1, steps=1000)": pe.Cyclical(0.0, 1.0, STEPS),
    "Capacity(0, 25, steps=1000)": pe.Capacity(0.0, 25.0, STEPS),
}
COLORS = ("#5f6b78", "#1f5fa8", "#4f8f5b", "#d08c3f", "#b3452c")


def draw_schedules(path: Path) -> None:
    """Draw every schedule up to some steps after it has settled, each in a panel of its own."""
    figure, axes = plt.subplots(2, 3, figsize=(9, 4.6), layout="constrained")
    steps = range(STEPS * 5 // 4 + 1)
    for ax, color, (title, schedule) in zip(axes.flat, COLORS, SCHEDULES.items(), strict=False):
        ax.plot(steps, [schedule(step) for step in steps], color=color, lw=2)
        ax.axvline(schedule.settled, color="#9aa5b1", lw=1, ls=":")
        ax.set_title(title, fontsize=9)
        is_target = isinstance(schedule, pe.Capacity)
        ax.set(xlabel="optimization steps", ylabel="C, nats per datum" if is_target else "β")
        ax.set_ylim(-1.25 if is_target else -0.05, 26.25 if is_target else 1.05)
        ax.spines[["top", "right"]].set_visible(False)
    axes.flat[-1].axis("off")
    axes.flat[-1].text(0.0, 0.5, "dotted: settled", transform=axes.flat[-1].transAxes, va="center")
    figure.savefig(path, dpi=120)


def draw_convergence(path: Path) -> None:
    """Converge eight schools, and draw what every window of iterates said, at its last step."""
    pyro.set_rng_seed(0)
    posterior = POSTERIORS[SCHOOLS]
    start = init_to_value(values=posterior.init(*SCHOOLS_DATA), fallback=None)
    guide = AutoNormal(posterior.model, init_loc_fn=start)
    svi = pe.SVI(posterior.model, guide, pyro.optim.Adam({"lr": 0.1}), pe.TraceBeta_ELBO(), compile=True)
    report = svi.converge(*SCHOOLS_DATA, accuracy=0.1, progress=False)
    print(report)
    windows, steps = report.windows, 1 + np.cumsum([w.steps for w in report.windows])
    figure, (sizes, hats, distances) = plt.subplots(3, 1, figsize=(7, 6), sharex=True, layout="constrained")
    sizes.stairs([w.step_size for w in windows], [0, *steps], baseline=None, color=COLORS[1], lw=2)
    sizes.set(yscale="log", ylabel="step size")
    hats.plot(steps, [w.r_hat for w in windows], "o-", color=COLORS[2])
    hats.axhline(1.1, color="#9aa5b1", lw=1, ls=":", label="stationary below")
    hats.legend(frameon=False)
    hats.set(ylabel="largest split R-hat")
    for name, color in (("moved", COLORS[0]), ("error", COLORS[3]), ("distance", COLORS[4])):
        shown = [(step, getattr(w, name)) for step, w in zip(steps, windows, strict=True) if getattr(w, name) > 0]
        distances.plot(*zip(*shown, strict=True), "o-", color=color, label=name)
    distances.axhline(report.accuracy, color="#9aa5b1", lw=1, ls=":", label="accuracy asked for")
    distances.set(yscale="log", ylabel="√ symmetrized KL", xlabel="steps")
    distances.legend(frameon=False)
    for ax in (sizes, hats, distances):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def draw_diagnosis(path: Path) -> None:
    """Fit 80 images with many parameters, print the diagnosis, and draw the history with what is found."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().data, dtype=torch.float32)
    images = images[torch.randperm(len(images))]
    sizes = {"z_dim": 8, "hidden": 256}
    result = pe.fit(
        VAEModel(**sizes), VAEGuide(**sizes), images[:80], images[-300:], lr=5e-3, batch_size=40, max_epochs=150
    )
    print(result.diagnosis)
    axes = result.plot()
    axes[0].set_ylim(-260, -80)
    axes[0].figure.savefig(path, dpi=120)


def draw_linear_response(path: Path) -> None:
    """Draw the standard deviations of eight posteriors, by mean field and by linear response, over the reference's."""
    folder = Path(os.environ["PYRO_ELBO_DATA"]) / "posteriordb"
    figure, ax = plt.subplots(figsize=(9, 3.8), layout="constrained")
    left, ticks = 0, {}
    for name, posterior in POSTERIORS.items():
        args, (_, reference) = posterior.load(folder), posterior.reference(folder)
        pyro.clear_param_store()
        start = init_to_value(values=posterior.init(*args), fallback=None)
        guide = AutoNormal(posterior.model, init_loc_fn=start)
        guide(*args)
        response = pe.linear_response(posterior.model, guide, *args)
        where = left + np.arange(reference.shape[1])
        for data, color, label in (
            (response.guide_sd, COLORS[3], "mean-field guide"),
            (response.sd, COLORS[1], "linear response"),
        ):
            sd = posterior.columns({s: torch.as_tensor(data[s].values)[None] for s in posterior.sites}).numpy()[0]
            ax.plot(where, sd / reference.std(0), "o", ms=5, color=color, label="" if left else label)
        ticks[name.split("-")[0]] = where.mean()
        left = where[-1] + 3
    ax.axhline(1.0, color="#9aa5b1", lw=1, zorder=0)
    ax.set(
        yscale="log", ylabel="sd / reference sd", yticks=[0.1, 0.2, 0.5, 1.0], yticklabels=["0.1", "0.2", "0.5", "1"]
    )
    ax.set_xticks(list(ticks.values()), ticks, rotation=20, ha="right")
    ax.minorticks_off()
    ax.legend(frameon=False, loc=(0.3, 0.08))
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def centered_schools(sigma: torch.Tensor, y: torch.Tensor) -> None:
    """Eight schools as :doc:`calibration` shows them."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def draw_calibration(path: Path) -> None:
    """Calibrate AutoNormal on the centered eight schools, and draw positions of the true values."""
    guide = AutoNormal(centered_schools)
    svi = pe.SVI(centered_schools, guide, pyro.optim.Adam({"lr": 0.05}), pe.TraceBeta_ELBO(), compile=True)

    def fit(sigma: torch.Tensor, y: torch.Tensor) -> AutoNormal:
        svi.reset()
        svi.run(2000, sigma, y, progress=False)
        return guide

    arguments = SCHOOLS_DATA[0].float(), torch.zeros(8)
    found = pe.simulation_based_calibration(centered_schools, fit, *arguments, num_workers=2)
    print(found)
    found.plot()[0].figure.savefig(path, dpi=120)


if __name__ == "__main__":
    images = Path(__file__).parent / "images"
    draw_schedules(images / "schedules.png")
    draw_convergence(images / "convergence.png")
    draw_diagnosis(images / "diagnosis.png")
    draw_linear_response(images / "linear_response.png")
    draw_calibration(images / "calibration.png")
