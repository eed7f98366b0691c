"""Programs and data for the labeled runs of ``bench_diagnosis``: small enough to train in seconds."""

import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from models.vrnn import VRNN, MarkovVRNN

COUNT = 16  # of the largest pixel
VALID = 300


class Programs(NamedTuple):
    """Model, guide and the data of both splits."""

    model: Any
    guide: Any
    train: Any
    valid: Any


class VAE(nn.Module):
    """An autoencoder whose parts can be made to fail.

    Args:
        z_dim, hidden, encoder_hidden: sizes.
        scale: scale of a normal likelihood of pixels between 0 and 1; None for counts.
        told: columns that encoder and decoder are told beside x.
        deaf: the decoder does not hear z.
        fixed_scale: scale of the guide, not learned.
        discrete: z is binary, with a score-function gradient.
        prior_from: columns from which a network of 256 units learns the prior, which encoder and decoder are not told.
    """

    def __init__(
        self,
        x_dim: int,
        *,
        z_dim: int = 4,
        hidden: int = 32,
        encoder_hidden: int = 32,
        scale: float | None = None,
        told: int = 0,
        deaf: bool = False,
        fixed_scale: float | None = None,
        discrete: bool = False,
        prior_from: int = 0,
    ) -> None:
        super().__init__()
        self.prior_net = mlp(prior_from, 256, 2 * z_dim) if prior_from else None
        self.z_dim, self.scale, self.deaf, self.fixed_scale, self.discrete = z_dim, scale, deaf, fixed_scale, discrete
        outputs = z_dim if discrete else 2 * z_dim
        self.encoder = mlp(x_dim + told, encoder_hidden, outputs)
        self.decoder = mlp(z_dim + told, hidden, x_dim)

    def model(self, x: Tensor, c: Tensor | None = None) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x, c).to_event(1))
            out = self.decoder(self.beside(0.0 * z if self.deaf else z, c))
            likelihood = dist.Binomial(COUNT, logits=out) if self.scale is None else dist.Normal(out, self.scale)
            pyro.sample("x", likelihood.to_event(1), obs=x)

    def guide(self, x: Tensor, c: Tensor | None = None) -> None:
        pyro.module("vae", self)
        out = self.encoder(self.beside(x / COUNT if self.scale is None else x, c))
        with pyro.plate("data", len(x)):
            pyro.sample("z", (dist.Bernoulli(logits=out) if self.discrete else self.normal(out)).to_event(1))

    def prior(self, x: Tensor, c: Tensor | None) -> Any:
        if self.prior_net is not None:
            return self.normal(self.prior_net(c))
        return (
            dist.Bernoulli(x.new_full((self.z_dim,), 0.5))
            if self.discrete
            else dist.Normal(x.new_zeros(self.z_dim), 1.0)
        )

    def normal(self, out: Tensor) -> dist.Normal:
        loc, raw = out.chunk(2, -1)
        return dist.Normal(
            loc, softplus(raw) + 1e-3 if self.fixed_scale is None else torch.full_like(raw, self.fixed_scale)
        )

    def beside(self, x: Tensor, c: Tensor | None) -> Tensor:
        """Append what encoder and decoder are told."""
        return x if c is None or self.prior_net is not None else torch.cat([x, c.expand(*x.shape[:-1], -1)], -1)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Softplus(), nn.Linear(hidden, outputs))


class Known(nn.Module):
    """A linear decoder that is not learned."""

    def __init__(self, loadings: Tensor) -> None:
        super().__init__()
        self.register_buffer("loadings", loadings)

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.loadings


@cache
def images(source: str, shuffle: int = 0) -> tuple[Tensor, Tensor]:
    """Return images of 64 counts from 0 to 16, shuffled by a seed, and their classes."""
    if source == "digits":
        x, y = (torch.tensor(a) for a in (load_digits().data, load_digits().target))
    else:
        with np.load(Path(os.environ["PYRO_ELBO_DATA"]) / "fashion_mnist_20k.npz") as file:
            x, y = torch.tensor(file["x_train"][:1797].reshape(-1, 1, 28, 28)), torch.tensor(file["y_train"][:1797])
        x = torch.nn.functional.adaptive_avg_pool2d(x.float() / 255 * COUNT, 8).reshape(-1, 64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(shuffle))
    return x[order].round().float(), y[order].long()


def autoencoder(
    rows: int = 1200,
    source: str = "digits",
    told: str | None = None,
    scale: float | None = None,
    shuffle: int = 0,
    **sizes: Any,
) -> Programs:
    """An autoencoder of images, or of coin flips.

    Encoder and decoder are told nothing, the image's class (a conditional VAE) or a copy of it; with ``"noise"`` the
    prior alone is, columns that say nothing of the image.
    """
    x, y = images("digits" if source == "coins" else source, shuffle)
    if source == "coins":
        x = torch.distributions.Binomial(COUNT, torch.full((64,), 0.4)).sample((len(x),))
    x = x if scale is None else x / COUNT
    columns = {
        "class": one_hot(y, 10).float(),
        "copy": x / (COUNT if scale is None else 1),
        "noise": torch.randn(len(x), 30),
    }
    c = None if told is None else columns[told]
    role = {} if c is None else {"prior_from" if told == "noise" else "told": c.shape[1]}
    vae = VAE(64, scale=scale, **role, **sizes)
    data = (x,) if c is None else (x, c)
    return Programs(vae.model, vae.guide, tuple(d[:rows] for d in data), tuple(d[-VALID:] for d in data))


def factors(
    rows: int = 1200, x_dim: int = 60, z_dim: int = 3, strength: float = 0.4, noise: int = 0, encoder_hidden: int = 8
) -> Programs:
    """Factor analysis with the true decoder, not learned; the prior is learned from so many columns of noise."""
    loadings = torch.randn(z_dim, x_dim) * strength
    x = torch.randn(rows + VALID, z_dim) @ loadings + torch.randn(rows + VALID, x_dim)
    vae = VAE(x_dim, z_dim=z_dim, scale=1.0, encoder_hidden=encoder_hidden, prior_from=noise)
    vae.decoder = Known(loadings)
    data = (x, torch.randn(rows + VALID, noise)) if noise else (x,)
    return Programs(vae.model, vae.guide, tuple(d[:rows] for d in data), tuple(d[rows:] for d in data))


def regression(rows: int = 240, groups: int = 8) -> Programs:
    """A line for each group; intercepts and slopes of the groups are drawn around common ones."""

    def simulate(n: int) -> tuple[Tensor, Tensor, Tensor]:
        group, dose = torch.arange(n) % groups, torch.rand(n) * 2 - 1
        return group, dose, intercepts[group] + slopes[group] * dose + 0.5 * torch.randn(n)

    def model(group: Tensor, dose: Tensor, y: Tensor) -> None:
        intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
        with pyro.plate("groups", groups):
            a = pyro.sample("a", dist.Normal(intercept, 1.0))
            b = pyro.sample("b", dist.Normal(slope, 1.0))
        with pyro.plate("rows", rows, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(a[group] + b[group] * dose, 0.5), obs=y)

    def guide(group: Tensor, dose: Tensor, y: Tensor) -> None:
        for name in ("intercept", "slope"):
            pyro.sample(name, normal(name, ()))
        with pyro.plate("groups", groups):
            for name in ("a", "b"):
                pyro.sample(name, normal(name, (groups,)))

    def normal(name: str, shape: tuple[int, ...]) -> dist.Normal:
        scale = pyro.param(f"{name} scale", torch.full(shape, 0.3), constraint=dist.constraints.positive)
        return dist.Normal(pyro.param(f"{name} loc", torch.zeros(shape)), scale)

    intercepts, slopes = 3 + torch.randn(groups), -2 + torch.randn(groups)
    return Programs(model, guide, simulate(rows), simulate(rows // 2))


def sequences(
    rows: int = 300,
    source: str = "digits",
    z_dim: int = 3,
    hidden: int = 16,
    markov: bool = False,
    deaf: bool = False,
    shuffle: int = 0,
) -> Programs:
    """A recurrent autoencoder of binary frames: the rows of digits, chorales, simulated patterns, or coin flips.

    In the Markov form the decoder sees z alone; otherwise also a state that knows all earlier frames.
    """
    x = frames(source, shuffle)
    vrnn = (MarkovVRNN if markov else VRNN)(x.shape[-1], z_dim, hidden)
    vrnn.start_from(x[:rows].flatten(0, 1))
    if deaf:
        vrnn.features_z = Silence(hidden)
    return Programs(vrnn.model, vrnn.guide, x[:rows], x[-VALID // 2 :])


class Silence(nn.Module):
    """Features that do not depend on z."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, z: Tensor) -> Tensor:
        return z.new_zeros(*z.shape[:-1], self.features)


@cache
def frames(source: str, shuffle: int = 0) -> Tensor:
    """Return sequences of 8 binary frames, shuffled or drawn by a seed."""
    if source == "chorales":
        with np.load(Path(os.environ["PYRO_ELBO_DATA"]) / "jsb_chorales.npz") as file:
            keys, lengths = np.unpackbits(file["train_packed"], axis=1)[:, :88], file["train_lengths"]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        parts = [keys[s + i : s + i + 8] for s, n in zip(starts, lengths, strict=True) for i in range(0, n - 8, 16)]
        return torch.tensor(np.stack(parts)[500 * (shuffle > 0) :][:500, :, 20:80]).float()
    generator = torch.Generator().manual_seed(shuffle)
    if source == "coins":
        return torch.bernoulli(torch.full((500, 8, 8), 0.3), generator=generator)
    if source == "patterns":  # a frame is one of three patterns, as the one before it or drawn anew
        patterns = torch.bernoulli(torch.full((3, 20), 0.5), generator=generator)
        drawn, anew = torch.randint(3, (500, 8), generator=generator), torch.rand(500, 8, generator=generator) < 0.5
        for t in range(1, 8):
            drawn[:, t] = torch.where(anew[:, t], drawn[:, t], drawn[:, t - 1])
        return (patterns[drawn] - (torch.rand(500, 8, 20, generator=generator) < 0.03).float()).abs()
    return (images("digits", shuffle)[0] > COUNT / 2).float().reshape(-1, 8, 8)


FAMILIES = {"vae": autoencoder, "factors": factors, "regression": regression, "vrnn": sequences}
