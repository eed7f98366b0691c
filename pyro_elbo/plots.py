"""Matplotlib figures of what the library computes. Needs the extra ``plot``."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

_COLOURS = {"train": "#9aa5b1", "valid": "#1f5fa8"}


def plot_history(history: "xarray.Dataset", axes: "list[Axes] | None" = None) -> "list[Axes]":
    """Training curves: the bound with its two parts, and the KL of every latent site beside its weight.

    Args:
        history: of :class:`pyro_elbo.FitResult`, dimensions ``epoch`` and ``split``, nats per datum.
        axes: two matplotlib axes to draw into; a new figure if omitted.

    Returns:
        The two axes.
    """
    if axes is None:
        import matplotlib.pyplot as plt

        axes = list(plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")[1])
    bound, kl = axes
    for split in history.split.values:
        curve = history.elbo.sel(split=split)
        if bool(curve.notnull().any()):
            bound.plot(history.epoch, curve, color=_COLOURS[str(split)], label=f"elbo, {split}")
    bound.plot(
        history.epoch, -history.distortion.sel(split="train"), color="#d08c3f", lw=1, ls=":", label="-distortion"
    )
    bound.set(xlabel="epoch", ylabel="nats per datum", title="evidence lower bound (β = 1)")
    bound.legend(frameon=False)
    for site in history.latent.values:
        kl.plot(history.epoch, history.kl.sel(split="train", latent=site), label=f"KL of {site}")
    kl.set(xlabel="epoch", ylabel="nats per datum", title="rate, site by site")
    weight = kl.twinx()
    weight.plot(history.epoch, history.beta.mean("latent"), color="#b3452c", lw=1, ls="--")
    weight.set(ylim=(0, None))
    weight.set_ylabel("β", color="#b3452c")
    kl.legend(frameon=False, loc="center right")
    return axes
