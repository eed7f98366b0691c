"""Draw the figure of the schedules for the docs: ``python docs/figures.py`` writes ``docs/images/schedules.png``."""

from pathlib import Path

import matplotlib

import pyro_elbo as pe

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


def main(path: Path) -> None:
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


if __name__ == "__main__":
    main(Path(__file__).parent / "images" / "schedules.png")
