"""A deterministic autoencoder, and the bound of any encoder and decoder, computed after training.

    codes c_n = encoder(x_n), trained on the reconstruction decoder(c_n) alone

    z_n ~ Normal(m, diag(s²)),     x_n | z_n ~ likelihood(decoder(z_n)),     q(z_n | x_n) = Normal(c_n, diag((w s)²))

An autoencoder has no prior and no posterior. Here both are put around its codes: the prior has their mean m and
standard deviation s over the training rows, and w is the posterior's width in units of s. Averaged over those rows the
KL of a dimension is w²/2 - log w, whatever the encoder: the width alone sets the rate. As w → 0 the distortion becomes
that of the reconstruction, and the rate grows without bound.
Hinton, Salakhutdinov (2006), Reducing the dimensionality of data with neural networks; Ghosh, Sajjadi, Vergari, Black,
Schölkopf (2020), From variational to deterministic autoencoders, arXiv:1903.12436; Alemi, Poole, Fischer, Dillon,
Saurous, Murphy (2018), Fixing a broken ELBO, arXiv:1711.00464.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions import TorchDistribution
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader

import pyro_elbo as pe
from models.fair_vae import layers
from pyro_elbo.errors import ArgumentError, check_positive

NARROWEST = 1e-4  # width, in standard deviations of the codes, at which the search for the best one begins


class Autoencoder(nn.Module):
    """Encoder and decoder of intensities from 0 to 1, plain torch: ``forward(x)`` returns the logits of their means.

    Args:
        x_dim: columns of x.
        z_dim: dimensions of a code.
        hidden: width of the hidden layer of either.
    """

    def __init__(self, x_dim: int = 64, z_dim: int = 8, hidden: int = 128) -> None:
        super().__init__()
        self.encoder, self.decoder = layers(x_dim, hidden, z_dim), layers(z_dim, hidden, x_dim)

    def forward(self, x: Float[Tensor, "n x_dim"]) -> Float[Tensor, "n x_dim"]:
        return self.decoder(self.encoder(x))


def train(
    autoencoder: Autoencoder, x: Float[Tensor, "n x_dim"], *, epochs: int, lr: float = 3e-3, seed: int = 0
) -> None:
    """Minimize the cross-entropy between intensities and their reconstructions by Adam, in batches of 128."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr)
    for _ in range(epochs):
        for rows in DataLoader(x, batch_size=128, shuffle=True, generator=order):
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(autoencoder(rows), rows).backward()
            optimizer.step()


@dataclass(frozen=True)
class PostHoc:
    """Model and guide around an encoder and a decoder that were trained in any way: ``model(x)`` and ``guide(x)``.

    Attributes:
        encode: from rows to codes, (n, ...) to (n, z_dim).
        decode: from codes, (..., z_dim), to the parameters of the likelihood.
        likelihood: from the decoder's output to the distribution of a row, all its dimensions in the event.
        loc, scale: mean and standard deviation of the prior.
        width: standard deviation of the posterior, in those of the prior.
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    likelihood: Callable[[Tensor], TorchDistribution]
    loc: Float[Tensor, " z_dim"]
    scale: Float[Tensor, " z_dim"]
    width: float

    def model(self, x: Float[Tensor, "n ..."]) -> Tensor:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, self.scale).to_event(1))
            pyro.sample("x", self.likelihood(self.decode(z)), obs=x)
        return z

    def guide(self, x: Float[Tensor, "n ..."]) -> Tensor:
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Normal(self.encode(x), self.width * self.scale).to_event(1))


@torch.no_grad()
def around_codes(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    likelihood: Callable[[Tensor], TorchDistribution],
    x: Float[Tensor, "n ..."],
    width: float | None = None,
) -> PostHoc:
    """Put a prior and a posterior around the codes of the training rows x. Modules must be in eval mode.

    Args:
        encode, decode, likelihood: see :class:`PostHoc`.
        width: of the posterior; None takes the one of the largest bound of x, by :func:`best_width`.
    """
    if width is not None:
        check_positive("width", width, "The KL of a dimension, width²/2 - log width, is infinite at 0.")
    codes = encode(x)
    loc, scale = codes.mean(0), codes.std(0, correction=0)
    if (scale == 0).any():
        raise ArgumentError(
            f"encode: dimensions {(scale == 0).nonzero().flatten().tolist()} of the codes are the same for all rows, "
            "and their standard deviation is no unit of width. Leave them out of the code."
        )
    programs = PostHoc(encode, decode, likelihood, loc, scale, 1.0)
    return replace(programs, width=best_width(programs, x) if width is None else width)


def best_width(programs: PostHoc, x: Float[Tensor, "n ..."], seed: int = 0) -> float:
    """Return the width between 1e-4 and 1 at which the ELBO of x is largest, with the same noise at every width."""
    loss = pe.TraceBeta_ELBO()

    def negative_elbo(log_width: float) -> float:
        wide = replace(programs, width=math.exp(log_width))
        with torch.no_grad(), torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return -loss.terms(wide.model, wide.guide, x).per_datum.elbo.item()

    found = minimize_scalar(negative_elbo, bounds=(math.log(NARROWEST), 0.0), options={"xatol": 1e-3})
    return math.exp(found.x)
