"""Noise of gradient estimators: ``python -m tests.benchmarks.bench_gradients [--figure docs/images/gradients.png]``.

Every row of the data has a copy of the parameters of its own, so that one run gives as many independent gradients as
rows. Signal to noise is |mean| / standard deviation of one element, averaged over the elements (Rainforth et al. 2018,
arXiv:1802.04537, section 4).
"""

import argparse
from pathlib import Path

import matplotlib
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_elbo as pe

COPIES, SIZE = 4000, 5
PARTICLES = (1, 4, 16, 64)
OFF = 0.3  # distance of each parameter from its optimum, in units of the data


def gaussian_model(x: Tensor) -> None:
    with pyro.plate("copies", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(SIZE), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def gaussian_guide(x: Tensor) -> None:
    """The posterior is N(x / 2, 1 / 2): the mean is off by a little, the variance too large (2 / 3)."""
    b = pyro.param("b", lambda: torch.full(x.shape, OFF))
    with pyro.plate("copies", len(x)):
        pyro.sample("z", dist.Normal(x / 2 + b, (2 / 3) ** 0.5).to_event(1))


def bits_model(x: Tensor) -> None:
    """A sigmoid belief network: three bits, ten pixels."""
    weights = (torch.arange(30.0).reshape(3, 10) % 7 - 3) / 2
    with pyro.plate("copies", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.4)).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=z @ weights).to_event(1), obs=x)


def bits_guide(x: Tensor) -> None:
    logits = pyro.param("logits", lambda: torch.full((len(x), 3), 0.3))
    with pyro.plate("copies", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))


def gradients(loss: pe.TraceBeta_ELBO, model, guide, x: Tensor) -> Tensor:
    """One gradient per copy."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    loss.loss_and_grads(model, guide, x)
    ((_, p),) = pyro.get_param_store().named_parameters()
    return -p.grad


def signal_to_noise() -> dict[str, list[float]]:
    x = torch.linspace(-1, 1, SIZE).expand(COPIES, SIZE)
    found: dict[str, list[float]] = {"auto": [], "dreg": []}
    for gradient, ratios in found.items():
        for k in PARTICLES:
            options = {"vectorize_particles": True, "max_plate_nesting": 1}
            drawn = gradients(pe.TraceIW_ELBO(k, gradient=gradient, **options), gaussian_model, gaussian_guide, x)
            ratios.append((drawn.mean(0).abs() / drawn.std(0)).mean().item())
    return found


def variances() -> dict[str, list[float]]:
    x = (torch.arange(10.0) % 3 == 0).to(torch.float64).expand(1000, 10)
    found: dict[str, list[float]] = {"auto": [], "rloo": [], "vargrad": []}
    for gradient, sums in found.items():
        for k in (2, 4, 16):
            options = {"num_particles": k, "vectorize_particles": True, "max_plate_nesting": 1}
            sums.append(
                gradients(pe.TraceBeta_ELBO(gradient=gradient, **options), bits_model, bits_guide, x).var(0).sum()
            )
    return {name: [x.item() for x in sums] for name, sums in found.items()}


def draw(found: dict[str, list[float]], path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for (name, ratios), color in zip(found.items(), ("#b3452c", "#1f5fa8"), strict=True):
        ax.plot(PARTICLES, ratios, "o-", color=color, label=f'gradient="{name}"')
    ax.set(xscale="log", yscale="log", xlabel="particles K", ylabel="signal / noise of the guide's gradient")
    ax.set_xticks(PARTICLES, [str(k) for k in PARTICLES])
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--figure", type=Path)
    figure = parser.parse_args().figure
    torch.set_default_dtype(torch.float64)
    found = signal_to_noise()
    print("signal to noise of the guide's mean under TraceIW_ELBO, a Gaussian with 5 latents")
    print("K" + "".join(f"{k:10}" for k in PARTICLES))
    for name, ratios in found.items():
        print(f"{name:8}" + "".join(f"{x:10.3f}" for x in ratios))
    print("\nsum of variances of the guide's logits under TraceBeta_ELBO, three bits and ten pixels")
    print("K" + "".join(f"{k:10}" for k in (2, 4, 16)))
    for name, sums in variances().items():
        print(f"{name:8}" + "".join(f"{x:10.3f}" for x in sums))
    if figure is not None:
        draw(found, figure)


if __name__ == "__main__":
    main()
