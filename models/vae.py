"""The β-variational autoencoder for counts and for binary data.

    z_n ~ Normal(0, I),     x_n | z_n ~ Binomial(total, logits = decoder(z_n))
    q(z_n | x_n) = Normal(mean(x_n), diag(scale(x_n)²))

Kingma, Welling (2014), arXiv:1312.6114; Higgins et al. (2017), β-VAE, ICLR. With ``total = 1`` the pixels are
Bernoulli. Both KL and its gradient are analytic, per datum and per latent dimension.
"""

import pyro
import pyro.distributions as dist
from jaxtyping import Float
from pyro.nn import PyroModule
from torch import Tensor, nn


class VAEModel(PyroModule):
    """The generative program: ``forward(x)`` observes x, one row a datum.

    Args:
        x_dim: columns of x.
        z_dim: latent dimensions.
        hidden: width of the decoder's hidden layer.
        total: largest count of a column (16 for scikit-learn's digits, 1 for binary pixels).
    """

    def __init__(self, x_dim: int = 64, z_dim: int = 8, hidden: int = 128, total: int = 16) -> None:
        super().__init__()
        self.z_dim, self.total = z_dim, total
        self.decoder = nn.Sequential(nn.Linear(z_dim, hidden), nn.Softplus(), nn.Linear(hidden, x_dim))

    def forward(self, x: Float[Tensor, "n x_dim"]) -> Float[Tensor, "*particles n x_dim"]:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.z_dim), 1.0).to_event(1))
            logits = self.decoder(z)
            pyro.sample("x", dist.Binomial(self.total, logits=logits).to_event(1), obs=x)
        return logits


class VAEGuide(PyroModule):
    """The amortized posterior: ``forward(x)`` samples z for every row of x; :meth:`encode` gives its moments."""

    def __init__(self, x_dim: int = 64, z_dim: int = 8, hidden: int = 128, total: int = 16) -> None:
        super().__init__()
        self.total = total
        self.encoder = nn.Sequential(nn.Linear(x_dim, hidden), nn.Softplus(), nn.Linear(hidden, 2 * z_dim))

    def forward(self, x: Float[Tensor, "n x_dim"]) -> Float[Tensor, "*particles n z_dim"]:
        with pyro.plate("data", len(x)):
            loc, scale = self.encode(x)
            return pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def encode(self, x: Float[Tensor, "n x_dim"]) -> tuple[Float[Tensor, "n z_dim"], Float[Tensor, "n z_dim"]]:
        """Mean and standard deviation of q(z | x)."""
        loc, raw = self.encoder(x / self.total).chunk(2, dim=-1)
        return loc, nn.functional.softplus(raw) + 1e-4
